"Indexes: their recall against loops and exact search, how they grow, are saved, and are refused"
import hashlib, json, pytest, re, sys, torch, warnings
import numpy as np
from PIL import Image
from dmlfast.deploy import ImageEmbedder, Preprocess, load_embedder
from dmlfast.models.embedder import Embedder
from dmlfast.retrieval import Embedded, Index, neighbours
from dmlfast.retrieval import indexes as room, search

KINDS = 'hnsw','ivf','int8','bits','IVF8,SQ8'

def points(n=1500, d=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(30, d, generator=torch.Generator().manual_seed(9))[torch.arange(n)%30]*2+torch.randn(n, d, generator=g)

@pytest.fixture
def no_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, 'faiss', None)
    for o in (search._faiss,room._said): o.cache_clear()
    yield
    for o in (search._faiss,room._said): o.cache_clear()

@pytest.mark.parametrize('kind', KINDS)
def test_scores_are_cosines_and_most_neighbours_are_found(kind):
    x,q = points(),points(60, seed=1)*3
    s,i = Index(x, kind).search(q, 10)
    want = neighbours(q, x, 10)[1]
    share = np.mean([len({*a}&{*b})/10 for a,b in zip(i.tolist(), want.tolist())])
    assert share>=(.5 if kind=='bits' else .9), share
    cos = torch.nn.functional.cosine_similarity(q[:,None].double(), x[i].double(), dim=2)
    torch.testing.assert_close(s.double(), cos, atol=1e-6, rtol=0)
    assert (s.diff(dim=1)<=0).all()

@pytest.mark.parametrize('kind', [None,'exact','auto'])
def test_few_items_are_searched_exactly(kind):
    x,q = points(),points(40, seed=1)
    for a,b in zip(Index(x, kind).search(q, 7), neighbours(q, x, 7)): torch.testing.assert_close(a, b)

def test_bytes_by_hand():
    "Those of the definition: round((x-min)/(max-min)·255)-128 by dimension"
    x = points(50, 3)
    u = torch.nn.functional.normalize(x)
    lo,hi = u.amin(0),u.amax(0)
    core = Index(x, 'int8').core
    assert ((core.codes-(((u-lo)/(hi-lo)*255).round()-128)).abs()<=1).all() and core.codes.amin()==-128 and core.codes.amax()==127
    coarse = (core.codes.float()+128)*(hi-lo)/255+lo
    want = (u[:4]@coarse.T).sort(dim=1, descending=True).indices[:,:6]
    assert [set(o) for o in core.search(u[:4], 6).tolist()]==[set(o) for o in want.tolist()]

def test_equal_items_come_by_index():
    x = points(300)
    x[[40,250,7]] = x[100].clone()
    for kind in ('int8','bits','hnsw'): assert Index(x, kind).search(x[100:101], 4)[1][0].tolist()==[7,40,100,250]

@pytest.mark.parametrize('kind', (None,)+KINDS)
def test_it_grows(kind):
    x = points()
    index = Index(x[:1400], kind).add(x[1400:])
    assert len(index)==1500 and index.search(x[1450:1460], 1)[1].flatten().tolist()==list(range(1450, 1460))
    if kind in (None,'int8'): assert torch.equal(index.search(x[:9], 5)[1], Index(x, kind).search(x[:9], 5)[1])

@pytest.mark.parametrize('kind', ['int8','bits','ivf','PQ12'])
def test_what_an_index_learned_from_few_items_it_learns_again(kind):
    "The first 300 items are alike; the recall of an index that grew from these is about that of one that is made of all"
    x,few = points(2400),points(300)[:1]+.01*torch.randn(300, 24, generator=torch.Generator().manual_seed(1))
    index,all_,q = Index(few, kind),torch.cat([few,x]),points(100, seed=1)
    for o in x.split(100): index.add(o)
    want = neighbours(q, all_, 10)[1].tolist()
    def share(o): return np.mean([len({*a}&{*b})/10 for a,b in zip(o.search(q, 10)[1].tolist(), want)])
    assert share(index)>share(Index(all_, kind))-.05, (share(index),share(Index(all_, kind)))

def test_cells_that_were_read_are_learned_again_too():
    "Where a gallery grows by less than double each time that it is read"
    x = points(4000)
    index = Index(x[:700], 'ivf')
    few = index.core.index.nlist
    for i in range(700, 4000, 550): index = room.read_index(index.embs, 'ivf', index.packed()).add(x[i:i+550])
    assert index.core.index.nlist>=2*few

def test_bytes_of_a_class_elsewhere():
    "Fewer than there are, and outside the range of these"
    g = torch.Generator().manual_seed(0)
    c,e = torch.randn(2, 24, generator=g)*3,torch.randn(290, 24, generator=g)*.3
    x = torch.cat([c[0]+e[:150],c[1]+e[150:]])
    assert Index(x[:150], 'int8').add(x[150:]).report(290).loc['int8','recall@10']>.98

def test_k_is_a_whole_number():
    index = Index(points(50), 'int8')
    assert index.search(points(2), np.int64(3))[1].shape==(2,3)
    for k in (0,-1,2.5):
        with pytest.raises(ValueError, match='k must be a whole number from 1'): index.search(points(2), k)

def test_bits_of_numbers_that_are_all_positive():
    "As pooled features are: signs alone would say nothing"
    x = points(1500).sigmoid()
    want = neighbours(x[:100], x, 10)[1].tolist()
    assert np.mean([len({*a}&{*b})/10 for a,b in zip(Index(x, 'bits').search(x[:100], 10)[1].tolist(), want)])>.6

def test_auto_by_size(monkeypatch):
    monkeypatch.setattr(room, '_exact_below', 100)
    assert Index(points(99), 'auto').kind is None and Index(points(100), 'auto').kind=='hnsw'

def test_a_report_is_against_the_exact_search():
    rep = Index(points(), 'hnsw').report(100, 5)
    assert rep.columns.tolist()==['recall@5','bytes an item','ms a query'] and rep.index.tolist()==['exact','hnsw']
    assert rep.loc['exact','recall@5']==1 and rep.loc['hnsw','recall@5']>.9 and rep.loc['exact','bytes an item']==96
    worse = Index(points(), 'hnsw')
    worse.core.search = lambda q, k: torch.arange(k).expand(len(q), k)
    assert worse.report(100, 5).loc['hnsw','recall@5']<.1

def test_without_faiss(no_faiss):
    "Exact search, which is said once, and bytes"
    x,q = points(),points(5, seed=1)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        for _ in range(2): assert torch.equal(Index(x, 'hnsw').search(q, 5)[1], neighbours(q, x, 5)[1])
        assert Index(x, 'int8').search(q, 5)[1].shape==(5,5) and Index(x, 'auto').kind is None
    assert ["'hnsw' needs faiss" in str(o.message) for o in w]==[True]

def test_auto_of_many_without_faiss(no_faiss, monkeypatch):
    monkeypatch.setattr(room, '_exact_below', 100)
    with pytest.warns(UserWarning, match="'auto' needs faiss, which is not installed: the search is by 'int8'"): a = Index(points(), 'auto')
    assert a.kind=='int8' and Index(points(), 'auto').kind=='int8'

def test_refused():
    with pytest.raises(ValueError, match="what|got 'hsnw'"): Index(points(), 'hsnw')
    with pytest.raises(ValueError, match='name of a kind'): Index(points(), 3)
    with pytest.raises(ValueError, match='40 items are too few'): Index(points(40), 'IVF64,PQ8')
    with pytest.raises(ValueError, match='query has 5 columns'): Index(points(), 'int8').search(torch.ones(1,5))

def test_embedded_finds_by_it():
    e = Embedded(points())
    e.index('int8')
    assert torch.equal(e.find(e.embs[:3], 2)[1][:,0], torch.arange(3)) and e.find(e.embs[:3], 2, rerank='k-reciprocal')[1].shape==(3,2)
    assert e.shorten(8).indexed is None

# ---- an embedder with an index ----

def image(i): return Image.fromarray(np.random.RandomState(i).randint(0, 255, (24,24,3), dtype=np.uint8))

@pytest.fixture(scope='module')
def made():
    torch.manual_seed(0)
    model = Embedder('test_resnet', 8, pretrained=False).eval()
    def _make(n=60):
        e = ImageEmbedder(model, Preprocess([('fit', (32,32), 2)]))
        return e.add([image(i) for i in range(n)], [str(i%3) for i in range(n)], [f'{i}.png' for i in range(n)])
    return _make

@pytest.mark.parametrize('kind', ['hnsw','hnsw:efSearch=99','int8','bits','SQ8',None])
def test_an_embedder_with_an_index(made, kind, tmp_path):
    finder = made().index(kind)
    assert [o[0].item for o in finder.search([image(3),image(40)], 20)]==['3.png','40.png'] # 20, as bits of 8 numbers tell little apart
    finder.add([image(100)], 'new', ['100.png'])
    assert finder.search(image(100), 20)[0].label=='new' and len(finder.gallery.searched())==61
    again = load_embedder(finder.save(tmp_path/'e'))
    assert again.index_kind==kind and (tmp_path/'e'/'index.faiss').exists()==(kind in ('hnsw','hnsw:efSearch=99','SQ8'))
    assert [o.item for o in again.search(image(5), 4)]==[o.item for o in finder.search(image(5), 4)]
    assert again.index_report(20, 3).index.tolist()==['exact']+[kind]*bool(kind)

def test_a_grown_index_is_not_made_again(made, monkeypatch):
    finder = made().index('hnsw')
    core = finder.gallery.searched().indexed.core
    finder.add([image(100)], 'new')
    assert finder.gallery.searched().indexed.core is core and core.index.ntotal==61
    finder.index(None)
    assert finder.gallery.searched().indexed is None

def test_auto_goes_with_the_size(made, monkeypatch, tmp_path):
    "Of a gallery that grows, too, and that is loaded"
    monkeypatch.setattr(room, '_exact_below', 62)
    finder = made().index()
    def kind(o): return o.gallery.searched().indexed.kind
    assert kind(finder) is None and kind(finder.add([image(100)], 'new')) is None
    assert finder.add([image(101)], 'new') is finder and kind(finder)=='hnsw' and finder.search(image(101))[0].label=='new'
    again = load_embedder(finder.save(tmp_path/'e'))
    assert again.gallery.is_ready and again.index_kind=='auto' and kind(again)=='hnsw'

def test_a_folder_whose_index_is_not_as_it_was(made, tmp_path):
    folder = made().index('hnsw').save(tmp_path/'e')
    def tampered(match, hashed=True, **files):
        for name,o in files.items(): (folder/name.replace('_', '.')).write_bytes(o)
        about = json.loads((folder/'embedder.json').read_text())
        if hashed: about['sha256'] |= {k.replace('_', '.'):hashlib.sha256(o).hexdigest() for k,o in files.items()}
        (folder/'embedder.json').write_text(json.dumps(about))
        with pytest.raises(ValueError, match=match): load_embedder(folder)
    good = (folder/'index.faiss').read_bytes()
    tampered("'index.faiss' in .* was changed or cut off", False, index_faiss=good[:-1])
    tampered("The index in .* cannot be used: 'index.faiss' cannot be read", index_faiss=good[:-100])
    made(30).index('hnsw').save(tmp_path/'other')
    tampered('does not fit the gallery', index_faiss=(tmp_path/'other'/'index.faiss').read_bytes())
    tampered('`kind` must be', index_json=b'{"kind": 3}', index_faiss=good)
    tampered('does not fit the gallery', index_json=b'{"kind": "ivf"}')
    (folder/'index.faiss').unlink()
    with pytest.raises(FileNotFoundError, match="there is no 'index.faiss'"): load_embedder(folder)

def test_parameters_of_an_index(tmp_path):
    "All cells are an exact search, one cell is not; they are part of the kind, so that a file and what is built again have them"
    x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
    want = neighbours(x[:50], x, 10, self_exclude=False)[1]
    def found(index): return (index.search(x[:50], 10)[1]==want).float().mean().item()
    for kind in ('ivf','IVF10,Flat'):
        few,every = Index(x, f'{kind}:nprobe=1'),Index(x, f'{kind}:nprobe=1000')
        assert found(few)<.8 and found(every)==1
        every.save(tmp_path/'i')
        again = room.read_index(x, every.kind, tmp_path/'i')
        assert found(again)==1 and found(room.read_index(x, every.kind, every.packed()))==1 and again.core.index.nprobe==1000
    assert Index(x, 'ivf:nprobe=64').fetch==1 and Index(x, 'hnsw:efSearch=200').core.index.hnsw.efSearch==200
    assert Index(x, 'hnsw').core.index.hnsw.efSearch==64
    for bad in ('ivf:probes=3', 'ivf:', 'ivf:nprobe=0', 'ivf:nprobe=2.5', 'hnsw:nprobe=3'):
        with pytest.raises(ValueError, match=f"whole numbers from 1.*got {bad.split(':')[1]!r}"): Index(x, bad)
    with pytest.raises(ValueError, match="'int8' has no parameters"): Index(x, 'int8:nprobe=3')
    own = 'exact','int8','bits','auto','hnsw','ivf','hnsw:efSearch=9','ivf:nprobe=9'
    assert all(map(room.is_own_kind, own)) and not any(map(room.is_own_kind, (None, 'SQ8', 'IVF8,SQ8:nprobe=2', 'ivf:nprobe=0',
        'ivf:efSearch=9', 'hnsw:efSearch=9999999999', 'int8:nprobe=9')))

@pytest.mark.parametrize('kind', ['PQ12','IVF4,PQ12','PCA16,PQ8','PQ12,RFlat'])
def test_a_product_quantiser_is_not_trained_for_a_search_that_is_not_made(kind):
    "It is faiss's own without that"
    faiss,made = pytest.importorskip('faiss'),Index(points(300), kind)
    index,x = made.core.index,torch.nn.functional.normalize(made.embs).numpy()
    alone = faiss.index_factory(24, re.sub(r'(PQ\d+)', r'\1np', kind), faiss.METRIC_INNER_PRODUCT)
    alone.train(x)
    alone.add(x)
    assert np.array_equal(faiss.serialize_index(index), faiss.serialize_index(alone))

def test_a_product_quantiser_is_trained_for_a_search_by_hamming_distance():
    faiss,made = pytest.importorskip('faiss'),Index(points(300), 'IVF4,PQ12x4:ht=20')
    x,alone = torch.nn.functional.normalize(made.embs).numpy(),faiss.index_factory(24, 'IVF4,PQ12x4', faiss.METRIC_INNER_PRODUCT)
    alone.train(x)
    alone.add(x)
    alone.polysemous_ht = 20
    assert np.array_equal(faiss.serialize_index(made.core.index), faiss.serialize_index(alone))

def test_a_copy_that_is_added_does_not_stand_before_its_original():
    x = points(400)
    for n in (1,2): # rows that are scaled twice differ from those that are scaled once
        index = Index(x, None)
        for _ in range(n): index.add(x[:100])
        assert index.search(x[:100], n+1)[1].tolist()==[[i,*(400+100*j+i for j in range(n))] for i in range(100)]

def test_an_index_is_read_by_a_name(tmp_path):
    index = Index(points(), 'hnsw')
    index.save(str(tmp_path/'a.faiss'))
    assert len(room.read_index(index.embs, 'hnsw', str(tmp_path/'a.faiss')))==1500
