"Embedders as ONNX: notes, a finder that needs neither PyTorch nor fastcore, folders that are not as they were written, and 8 bits"
import json, os, shutil, subprocess, sys
import numpy as np, pytest, torch
from pathlib import Path
from PIL import Image
from dmlfast.deploy import *
from dmlfast.deploy.embedder import Preprocess
from dmlfast.deploy.runtime import NumpyGallery, OnnxFinder
from dmlfast.files.described import hash_of
from dmlfast.files.resizing import Resizing
from dmlfast.models.embedder import Embedder

onnx,ort = pytest.importorskip('onnx'),pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

def made(seed=0, arch='test_resnet', **kwargs):
    torch.manual_seed(seed)
    model = Embedder(arch, 8, pretrained=False, **kwargs)
    return used(model)

@torch.no_grad()
def used(model, size=(32,32)):
    "A model whose batch norm has seen images, as after a training"
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.momentum = None
    model.train()(torch.rand(8, model.named['model_kwargs'].get('in_chans', 3), *size))
    return model.eval()

@torch.no_grad()
def spread(e, images):
    "Shift the head so that the embeddings of some images point everywhere: those of an untrained network are all alike"
    x = torch.stack([e.preprocess(o) for o in images])
    e.model.head.bias.copy_(-e.model.head.weight@e.model.features(x).mean(0))
    return e

def noise(rng, w, h): return Image.fromarray(rng.randint(0, 255, (7,5,3), dtype=np.uint8)).resize((w,h), Image.BICUBIC)

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Files of several sizes: colour, grey, 16 bits, transparent, lying on its side, a palette, tiny, and CMYK"
    path,rng = tmp_path_factory.mktemp('photos'),np.random.RandomState(0)
    ims = [noise(rng, w, h) for w,h in [(60,40),(41,67),(50,50),(33,90),(640,481),(47,47),(5,4),(90,31)]]
    ims[1],ims[2],ims[5] = ims[1].convert('L'),Image.fromarray(rng.randint(0, 2**16, (50,50)).astype(np.uint16)),ims[5].convert('P')
    ims[3].putalpha(Image.fromarray(rng.randint(0, 255, (90,33), dtype=np.uint8)))
    files = [path/f'{i}.png' for i in range(len(ims))]
    for o,f in zip(ims[:-1], files[:-1]): o.save(f)
    ims[-1].convert('CMYK').save(path/'7.jpg')
    exif = Image.Exif()
    exif[0x0112] = 6
    ims[4].save(path/'4.jpg', exif=exif)
    return [*files[:4], path/'4.jpg', *files[4:-1], path/'7.jpg']

@pytest.fixture(scope='module')
def finder(photos):
    e = ImageEmbedder(made(), Preprocess([('fit', (40,32), 2)], [.485,.456,.406], [.229,.224,.225]),
        dict(network='test_resnet', data='noise'), dict(threshold=.8, fmr=1e-3))
    return spread(e, photos).add(photos, [*'aabbccddd'], [f'p{i}' for i in range(9)], dict(price=[*range(9)]))

@pytest.fixture(scope='module')
def folder(finder, tmp_path_factory):
    folder = tmp_path_factory.mktemp('onnx')/'noise'
    assert repr(finder.save_onnx(folder))=='OnnxFinder(test_resnet, Resizing(fit 40×32), 9 items of 4 classes)'
    return folder

@pytest.fixture(scope='module')
def vit_folder(photos, tmp_path_factory):
    "Tokens, of grey images, squashed and cut, with a filter of another kind"
    e = ImageEmbedder(made(arch='test_vit', img_size=32, in_chans=1), Preprocess([('squash', (40,44), 3), ('crop', (32,32), 3)], [.5],
        [.25], mode='L', background='black'))
    folder = tmp_path_factory.mktemp('vit')/'vit'
    spread(e, photos).add(photos[:3], 'x').save_onnx(folder)
    return folder,e

# ---- one file ----

def test_onnx(tmp_path):
    e = ImageEmbedder(made(), Preprocess([('fit', (32,32), 2)], [.5]*3, [.2]*3), dict(data='noise'))
    path = e.to_onnx(tmp_path/'e.onnx')
    x = torch.randn(5,3,32,32)
    got = ort.InferenceSession(str(path)).run(None, {'images':x.numpy()})[0]
    assert np.abs(got-e.embed(x).numpy()).max()<1e-4
    with pytest.raises(ValueError, match='give `size`'): ImageEmbedder(e.model, Preprocess()).to_onnx(tmp_path/'f.onnx')
    tiny = ImageEmbedder(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12,2)), Preprocess([('fit', (2,2), 2)]))
    with pytest.raises(ValueError, match='differs from this one by'): tiny.to_onnx(path, tol=-1)
    # the old one
    assert ort.InferenceSession(str(path)).get_inputs()[0].shape[2:]==[32,32]
    assert sorted(o.name for o in tmp_path.iterdir())==['e.onnx','e.onnx.json']
    notes = json.loads((tmp_path/'e.onnx.json').read_text())
    assert notes['image']==['opened upright, what is transparent on white, as RGB',
        'the largest centred part with the ratio of 32×32, resized '
        'to that with a bilinear filter', 'divided by 255', 'less 0.5, 0.5, 0.5', 'divided by 0.2, 0.2, 0.2']
    assert [notes[k] for k in ('input','output','layout','type','size','channels','mean','std','embedding','unit_length','background')]==[
        'images','embeddings','n,c,h,w','float32',[32,32],'RGB',[.5]*3,[.2]*3,8,True,'white']
    told = ort.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
    assert {k:v if isinstance(notes[k], str) else json.loads(v) for k,v in told.items()}==notes
    by_hand = np.asarray(Image.fromarray(np.full((32,32,3), 102, np.uint8)), np.float32).transpose(2,0,1)/255 # as the notes say it
    by_hand = ((by_hand-np.array(notes['mean'])[:,None,None])/np.array(notes['std'])[:,None,None]).astype(np.float32)
    got = ort.InferenceSession(str(path)).run(None, {'images':by_hand[None]})[0][0]
    assert np.abs(got-e.embed(np.full((32,32,3), 102, np.uint8)).numpy()).max()<1e-5

# ---- the finder ----

def test_arrays_are_the_tensors(photos):
    for args in (dict(), dict(steps=[('fit', (40,32), 2)], mean=[.485,.456,.406], std=[.229,.224,.225]),
        dict(steps=[('crop', (50,9), 2)], mode='L')):
        p,r = Preprocess(**args),Resizing(**args)
        for o in photos:
            x = torch.from_numpy(np.array(p.resized(o))) # as fastai does it
            x = x.view(x.shape[0], x.shape[1], -1).permute(2,0,1).float().div_(255)
            if p.mean: x = (x-torch.tensor(p.mean)[:,None,None])/torch.tensor(p.std)[:,None,None]
            assert torch.allclose(p(o), x, atol=1e-6) and np.array_equal(p(o).numpy(), r.array(o)) and r.array(o).dtype==np.float32

def test_it_answers_as_the_embedder(finder, folder, vit_folder, photos):
    for there,e in ((folder,finder), vit_folder):
        small = load_onnx(there)
        assert np.abs(small.embed(photos)-e.embed(photos).numpy()).max()<1e-5
        for o in (photos[0], str(photos[0]), photos[0].read_bytes(), Image.open(photos[0]), np.array(Image.open(photos[0]))):
            assert small.embed(o).shape==(8,) and np.abs(small.embed(o)-e.embed(o).numpy()).max()<1e-5
        assert (small.labels,small.items,small.gallery.facts)==(e.labels,e.items,e.gallery.facts)
        assert [[h[:2] for h in o] for o in small.search(photos, k=9)]==[[h[:2] for h in o] for o in e.search(photos, k=9)]
        for a,b in zip(small.search(photos[2], k=9), e.search(photos[2], k=9)): assert a.score==pytest.approx(b.score, abs=1e-5)
    small = load_onnx(folder)
    rng = np.random.RandomState(1)
    images = [*photos, *(noise(rng, 50, 40) for _ in range(9))]
    def alike(got, want):
        if isinstance(want, list): return len(got)==len(want) and all(map(alike, got, want))
        return got[:-1]==want[:-1] and got.score==pytest.approx(want.score, abs=1e-5)
    assert {o.label is None for o in finder.classify(images, unknown=True)}=={True,False}
    for how in ('vote','prototype','nearest'):
        for kwargs in ({}, dict(unknown=True), dict(min_score=.99)):
            assert alike(small.classify(images, how=how, **kwargs), finder.classify(images, how=how, **kwargs)), (how,kwargs)
    for kwargs in (dict(unknown=True), dict(filter='b'), dict(filter=dict(price=lambda p: p>4)), dict(filter=['a','d'], k=2),
        dict(min_score=.999)):
        assert alike(small.search(images, **kwargs), finder.search(images, **kwargs)), kwargs
    for a,b in zip(images, images[1:]):
        got,want = small.same(a, b),finder.same(a, b)
        assert got.same==want.same and got.score==pytest.approx(want.score, abs=1e-5) and got.threshold==want.threshold==.8
    assert small.threshold==.8 and small.facts==finder.facts and small.calibration==finder.calibration
    with pytest.raises(ValueError, match='Re-ranking needs PyTorch'): small.search(photos[0], rerank='dba')
    for bad,says in (({'a':1}, 'got a dict'), ([], 'no images'), (None, 'got a NoneType'), ('nowhere.jpg', "no image 'nowhere.jpg'")):
        with pytest.raises(ValueError, match=says): small.embed(bad)
    with pytest.raises(ValueError, match='1 or more; got 0'): small.embed(photos, bs=0)
    assert np.allclose(small.embed(photos, bs=2), small.embed(photos), atol=1e-6)
    small.add(images[-2:], 'new', facts=dict(price=[7,8]))
    assert len(small)==11 and small.search(images[-1], k=1)[0].label=='new'
    with pytest.raises(ValueError, match='2 images, 1 labels and 2 names'): small.add(images[:2], ['x'])

def test_a_gallery_of_many(tmp_path):
    "Against brute force: nearest first, of equal ones the earlier, fewer where there are fewer"
    rng = np.random.RandomState(0)
    g,x = NumpyGallery(),rng.randn(200,5).astype(np.float32)
    x[150] = 2*x[20]
    g.add(x, [str(i%7) for i in range(200)], [f'{i}' for i in range(200)])
    q = np.concatenate([rng.randn(9,5), x[20:21]]).astype(np.float32)
    s = (q/np.linalg.norm(q, axis=1, keepdims=True))@(x/np.linalg.norm(x, axis=1, keepdims=True)).T
    for k in (1,3,199,200,999):
        for row,hits in zip(s, g.find(q, k)):
            order = sorted(range(200), key=lambda i: -row[i])[:k]
            assert len(hits)==len(order) and np.allclose([o.score for o in hits], row[order], atol=1e-6)
            if k<9: assert [o.item for o in hits[:-1]]==[str(i) for i in order[:-1]] or order[0] in (20,150)
    assert [o.item for o in g.find(q[-1:], 2)[0]]==['20','150'] and g.find(q, 3, lambda o: False)==[[]]*10
    names,means = g.prototypes()
    mean = (x/np.linalg.norm(x, axis=1, keepdims=True))[3::7].mean(0)
    assert names==[*'0123456'] and np.allclose(means[3], mean/np.linalg.norm(mean), atol=1e-6)

def both(embs, labels):
    "A finder on onnxruntime and one on PyTorch, with the same gallery; they have no network"
    items = [f'{i}' for i in range(len(labels))]
    return [o.add_embs(embs, labels, items) for o in (OnnxFinder(None, None), ImageEmbedder(torch.nn.Identity(), None))]

def cosines(q, x):
    "By hand, in float64, one pair at a time; 0 with a row of zeros"
    def _cos(a, b): return a@b/(np.linalg.norm(a)*np.linalg.norm(b) or 1)
    return np.array([[_cos(a, b) for b in x.astype(np.float64)] for a in q.astype(np.float64)])

def test_it_refuses_what_the_gallery_in_memory_refuses():
    "In the same sentences; nothing is added then"
    def said(f):
        with pytest.raises(ValueError) as e: f()
        return str(e.value)
    x,nan,inf = np.eye(4, dtype=np.float32),np.ones((12,4)),np.ones((2,4), np.float32)
    nan[:11,1],inf[1,3] = np.nan,-np.inf
    new,mine = both(x, list('aabb')),'1 of 2 rows of embs are not finite: rows 1'
    for bad,says in ((inf,mine), (torch.tensor(inf, requires_grad=True),mine), (inf.astype(np.float64).clip(-1e300),mine),
        (nan,'11 of 12 rows of embs are not finite: rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...'),
        (np.ones(4),'embs must be a matrix with at least one row and one column, not (4,)'),
        (np.ones((2,3)),'The gallery holds embeddings of 4 numbers, and not of 3.')):
        assert [said(lambda: o.add_embs(bad, ['c']*len(bad), ['']*len(bad))) for o in new]==[says]*2 and [len(o) for o in new]==[4,4]
    for bad,says in ((inf,mine.replace('embs', 'query')), (np.ones((2,3)),'query has 3 columns, gallery has 4'),
        (x[0],'query must be a matrix with at least one row and one column, not (4,)'),
        (x[:0],'query must be a matrix with at least one row and one column, not (0, 4)')):
        for f in ('hits','by_prototype'): assert [said(lambda: getattr(o, f)(bad)) for o in new]==[says]*2
    for o in both(x, list('aabb')): assert o.hits(x[:1], 1, filter='none')==[[]]
    for f in (OnnxFinder(None, None), ImageEmbedder(torch.nn.Identity(), None)): assert f.hits(x[:2], 1)==[[],[]]
    for o in new:
        for k in (0,-1,1.5):
            with pytest.raises(ValueError, match='k must be a whole number'): o.hits(x, k)
    with pytest.raises(ValueError, match='embs must be numbers in a tensor or an array'): new[0].add_embs([['x']], ['c'], [''])

def test_embeddings_of_any_size():
    "Cosines are those of directions, whatever the lengths; a row of zeros has the cosine 0 with every other"
    rng = np.random.RandomState(0)
    x,q = rng.randn(20,6).astype(np.float32),rng.randn(7,6).astype(np.float32)
    x[3:6]*=np.float32(1e25)
    x[6:9]*=np.float32(1e-25)
    x[9],x[10],x[11:13],q[1],q[2],q[3] = 1e38,1e-42,0,q[1]*np.float32(1e25),q[2]*np.float32(1e-25),0
    want,labels = cosines(q, x),[*'abcde'*4]
    small,e = both(x, labels)
    for o in (small,e):
        for row,hits in zip(want, o.hits(q, 20)):
            assert np.allclose([h.score for h in hits], [row[int(h.item)] for h in hits], atol=1e-5)
            assert np.allclose([h.score for h in hits], np.sort(row)[::-1], atol=1e-5)
        assert [h.item for h in o.hits(q[3:4], 4)[0]]==['0','1','2','3']
    unit = x.astype(np.float64)/np.maximum(np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True), 1e-300)
    s = cosines(q, np.stack([unit[i::5].sum(0) for i in range(5)]))
    for i,o in enumerate(small.by_prototype(q)): assert o.label=='abcde'[s[i].argmax()] and o.score==pytest.approx(s[i].max(), abs=1e-5)

def test_equal_rows_are_found_in_their_order():
    "As the gallery in memory finds them: for every query, k and filter, also where more are equal than are found"
    rng = np.random.RandomState(0)
    for d,n in ((3,40),(8,200),(33,500),(128,1000),(0,300)):
        few = rng.randn(max(2, n//20), d) if d else np.array([[*map(int, f'{i:08b}')] for i in range(20)])*2-1 # of all signs one sum
        few = few.astype(np.float32)
        d = few.shape[1]
        of = rng.randint(len(few), size=n)
        x,q = few[of]*2.**rng.randint(-3, 4, (n,1)).astype(np.float32),rng.randn(6, d).astype(np.float32)
        x[of==1] = 0
        if n!=300: q[0] = few[0] # of signs several are equally near it
        s = cosines(q, few)
        s[:,1] = 0
        small,e = both(x, [f'{i%3}' for i in range(n)])
        third = [i for i in range(n) if i%3==1]
        for k in (1,2,7,n//3,n-1,n):
            for filter,rows in ((None,range(n)), ('1',third)):
                want = [[f'{i}' for i in sorted(rows, key=lambda i: -row[of[i]])[:k]] for row in s]
                for o in (small,e): assert [[h.item for h in hits] for hits in o.hits(q, k, filter=filter)]==want, (d,k,filter)
        scores = [{of[int(h.item)]:h.score for h in hits} for hits in small.hits(q, n)]
        assert all(h.score==at[of[int(h.item)]] for hits,at in zip(small.hits(q, n), scores) for h in hits)
    few = rng.randn(40,16).astype(np.float32)
    small,e = both(np.tile(few, (2,1)), [f'{i//40*40+i%40:02}' for i in range(80)]) # two classes of each image
    assert [o.label for o in small.by_prototype(few)]==[o.label for o in e.by_prototype(few)]==[f'{i:02}' for i in range(40)]

def test_a_gallery_keeps_its_own_rows():
    "An array that is used again for the next batch does not change them"
    g,buf = NumpyGallery(),np.eye(3, dtype=np.float32)
    g.add(buf, list('abc'), ['']*3)
    buf[:] = 7
    assert np.array_equal(g.embs, np.eye(3)) and g.find(np.eye(3), 1)==[[(o,'',1.)] for o in 'abc']

script = '''
import sys, json
sys.path[:0] = [sys.argv[1]]
for o in ('torch','fastcore','fastai','timm','safetensors','pandas','matplotlib','onnx','huggingface_hub'):
    try: __import__(o)
    except ImportError: continue
    raise SystemExit(f'{o} is there')
from dmlfast.deploy import load_onnx
res = []
for folder,files in json.loads(sys.argv[2]):
    finder = load_onnx(folder)
    res.append(dict(embs=finder.embed(files).tolist(), found=finder.search(files, k=4),
        labels=finder.classify(files, unknown=finder.threshold is not None), same=finder.same(files[0], files[1], .5), shown=repr(finder)))
print(json.dumps(res))
'''

def test_with_numpy_pillow_and_onnxruntime_alone(finder, folder, vit_folder, photos, tmp_path):
    "In an environment that has these, what they import, and this package"
    site = Path(np.__file__).parent.parent
    for o in ('numpy','numpy.libs','PIL','pillow.libs','onnxruntime','flatbuffers','google','packaging'):
        if (site/o).exists(): (tmp_path/o).symlink_to(site/o)
    import dmlfast
    (tmp_path/'dmlfast').symlink_to(Path(dmlfast.__file__).parent)
    files = [*map(str, photos)]
    todo = [(str(folder),files),(str(vit_folder[0]),files)]
    env = {k:v for k,v in os.environ.items() if k!='PYTHONPATH'}
    res = subprocess.run([sys.executable,'-I','-S','-c',script,str(tmp_path),json.dumps(todo)], env=env, capture_output=True, text=True)
    assert res.returncode==0, res.stderr[-2000:]
    for got,e in zip(json.loads(res.stdout), (finder,vit_folder[1])):
        assert np.abs(np.array(got['embs'])-e.embed(photos).numpy()).max()<1e-4
        assert [[h[:2] for h in o] for o in got['found']]==[[[*h[:2]] for h in o] for o in e.search(photos, k=4)]
        want = e.classify(photos, unknown=e.threshold is not None)
        assert [o[0] for o in got['labels']]==[o.label for o in want] and got['same'][0]==e.same(photos[0], photos[1], .5).same

def test_a_name_of_the_wing_loads_what_it_needs():
    "`load_onnx` without PyTorch, and the others as ever"
    code = "import sys; from dmlfast.deploy import load_onnx; assert 'torch' not in sys.modules; import dmlfast.deploy as d; " \
        "from dmlfast.deploy import load_embedder, Hit; assert hasattr(d.ImageEmbedder, 'push_to_hub') and 'load_onnx' in d.__all__; " \
        "assert not hasattr(d, 'nothing')"
    subprocess.run([sys.executable,'-W','ignore','-c',code], check=True)

# ---- folders of strangers ----

@pytest.fixture
def change(folder, tmp_path):
    "Function that changes a copy of the folder, and says its hashes anew"
    def _change(f, rehash=True):
        new = tmp_path/'f'
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(folder, new)
        about = json.loads((new/'onnx.json').read_text())
        about = f(new, about) or about
        if rehash and isinstance(about, dict): about['sha256'] = {o.name:hash_of(o) for o in new.iterdir() if o.name!='onnx.json'}
        (new/'onnx.json').write_text(json.dumps(about))
        return new
    return _change

def network(change_graph, folder):
    "Function that writes the network, changed"
    def _f(new, about):
        net = onnx.load(str(folder/'model.onnx'))
        change_graph(net)
        onnx.save(net, str(new/'model.onnx'))
    return _f

def test_folders_that_are_not_as_they_were_written(folder, change):
    def refused(f, says, exc=ValueError, rehash=True):
        with pytest.raises(exc, match=says) as e: load_onnx(change(f, rehash))
        assert len(str(e.value).splitlines())==1
    def cut(name): return lambda new, about: (new/name).write_bytes((new/name).read_bytes()[:-9]) and None
    def says(**kw): return lambda new, about: {**about, **kw}
    for o in ('model.onnx','gallery.npy','gallery.json'):
        refused(cut(o), f"'{o}' in .* was changed or cut off since it was written", rehash=False)
        refused(lambda new, about: (new/o).unlink(), f"incomplete: there is no '{o}'", FileNotFoundError, rehash=False)
    refused(lambda new, about: about['sha256'].pop('gallery.npy') and None, "lacks sha256 of 'gallery.npy'", rehash=False)
    refused(cut('model.onnx'), "'model.onnx' in .* is no network that onnxruntime can run")
    refused(cut('gallery.npy'), "'gallery.npy' in .* is no array")
    refused(cut('gallery.json'), "'gallery.json' in .* cannot be read: it must be JSON")
    refused(lambda new, about: [1], 'must hold an object')
    refused(says(format=2), r'newer version of the library \(format 2; this one reads up to 1\)')
    refused(says(embedding=9), r'must give 9 finite numbers for an image; got an array of \(2, 8\)')
    refused(says(embedding=True), '`embedding` must be a whole number from 1 to 65,536')
    refused(says(preprocess=dict(Resizing([('fit', (41,32), 2)]).spec())), 'fails on the images of `preprocess`')
    refused(says(preprocess=dict(Resizing([('fit', (2**14,2**14), 2)]).spec())), '`preprocess.steps` must be at most 16 of')
    refused(says(preprocess=dict(Resizing([('fit', (40,32), 2)]).spec(), more=1)), '`preprocess` must be the arguments of `Resizing`')
    refused(says(calibration=dict(threshold=2, fmr=.1)), '`calibration` must be null')
    refused(lambda new, about: np.save(new/'gallery.npy', np.array([dict()]*9), allow_pickle=True), "'gallery.npy' in .* is no array")
    for x in (np.zeros((9,7), np.float32), np.zeros((9,8)), np.full((9,8), np.nan, np.float32), np.zeros((0,8), np.float32)):
        refused(lambda new, about: np.save(new/'gallery.npy', x), 'must be finite float32 numbers, 8 a row')
    refused(lambda new, about: np.save(new/'gallery.npy', np.zeros((8,8), np.float32)), "`labels` must be .* text, one for each of 8")
    def huge(new, about): # 2**40 rows are said, and not there
        head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 8), }".ljust(117)+b'\n'
        (new/'gallery.npy').write_bytes(b'\x93NUMPY\x01\x00'+len(head).to_bytes(2, 'little')+head)
    refused(huge, "'gallery.npy' in .* is no array")
    with pytest.raises(FileNotFoundError, match="there is no 'onnx.json' in it"): load_onnx(folder.parent)
    assert load_onnx(change(lambda new, about: [(new/o).unlink() for o in ('gallery.npy','gallery.json')] and None)).labels==[]

def test_networks_of_strangers(folder, change, tmp_path, monkeypatch):
    "One that reads another file, and one that is something else, are refused; what is executable has no place in the format"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'secret.bin').write_bytes(bytes(10**6))
    def elsewhere(net):
        t = max(net.graph.initializer, key=lambda o: len(o.raw_data))
        n = len(t.raw_data)
        t.ClearField('raw_data')
        t.data_location = onnx.TensorProto.EXTERNAL
        for k,v in dict(location='secret.bin', offset='0', length=str(n)).items(): t.external_data.add(key=k, value=v)
    def outside(net):
        elsewhere(net)
        next(o for t in net.graph.initializer for o in t.external_data if o.key=='location').value = '../secret.bin'
    def write(f): # `onnx.save` would look for the file
        def _f(new, about):
            net = onnx.load(str(folder/'model.onnx'))
            f(net)
            (new/'model.onnx').write_bytes(net.SerializeToString())
        return _f
    for f in (elsewhere,outside):
        with pytest.raises(ValueError, match='has tensors in other files'): load_onnx(change(write(f)))
        with monkeypatch.context() as m: # written so that it is not seen
            m.setattr('dmlfast.deploy.runtime._elsewhere', b'nothing like it')
            with pytest.raises(ValueError, match='is no network that onnxruntime can run'): load_onnx(change(write(f)))
    def renamed(net):
        for node in net.graph.node: node.output[:] = ['other' if o=='embeddings' else o for o in node.output]
        net.graph.output[0].name = 'other'
    with pytest.raises(ValueError, match="must have the input 'images', .* and the output 'embeddings'"): load_onnx(change(write(renamed)))
    def own_operation(net): net.graph.node[0].domain,net.graph.node[0].op_type = 'evil','Run'
    with pytest.raises(ValueError, match='is no network that onnxruntime can run'): load_onnx(change(write(own_operation)))

def test_a_table_is_written_as_a_gallery(finder, folder, photos, tmp_path):
    "And other files in the folder that is replaced are kept"
    pytest.importorskip('lancedb')
    e = ImageEmbedder(finder.model, finder.preprocess, finder.facts, finder.calibration)
    e.add_embs(finder.embs, finder.labels, finder.items, finder.gallery.facts)
    there = Path(shutil.copytree(folder, tmp_path/'noise'))
    (there/'notes.txt').write_text('mine')
    got = e.to_lancedb(tmp_path/'g.lance').save_onnx(there, overwrite=True)
    want = load_onnx(folder)
    assert len(got)==9 and got.gallery.facts==want.gallery.facts and got.search(photos[0], 9)==want.search(photos[0], 9)
    assert {o.name for o in there.iterdir()}=={o.name for o in folder.iterdir()}|{'notes.txt'}

def test_what_cannot_be_written(finder, folder, photos, tmp_path):
    with pytest.raises(FileExistsError, match='overwrite=True'): finder.save_onnx(folder)
    with pytest.raises(ValueError, match="has a function: `to_onnx` writes"):
        ImageEmbedder(finder.model, lambda o: o).save_onnx(tmp_path/"x")
    with pytest.raises(ValueError, match='pass `data`'): finder.save_onnx(tmp_path/'x', int8=True)
    with pytest.raises(ValueError, match='no class of `data` has two'):
        finder.save_onnx(tmp_path/'x', int8=True, data=photos[:2], labels=[0,1])
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('all of it')
    with pytest.raises(FileExistsError, match='is not overwritten'): finder.save_onnx(tmp_path/'mine', overwrite=True)
    with pytest.raises(ValueError, match='differs from this one by'): finder.save_onnx(tmp_path/'x', tol=-1)
    assert [o.name for o in tmp_path.iterdir()]==['mine']

# ---- 8 bits ----

def test_int8_says_what_it_costs(tmp_path):
    "Recall by brute force, of what the folder gives; the best of the ways that were tried is kept"
    rng = np.random.RandomState(0)
    base = rng.randint(0, 255, (12,3,3,3))
    images = [np.kron(np.clip(b+rng.randint(-60, 60, b.shape), 0, 255), np.ones((12,12,1))) for b in base for _ in range(5)]
    images = [o.astype(np.uint8) for o in images]
    labels = [f'c{i//5}' for i in range(60)]
    e = ImageEmbedder(made(arch='test_vit', img_size=32), Preprocess([('fit', (32,32), 2)], [.5]*3, [.25]*3), dict(network='vit'))
    spread(e, images).add(images[:9], labels[:9])
    small = e.save_onnx(tmp_path/'e', int8=True, data=images, labels=labels)
    def recall(x):
        x = np.asarray(x, dtype=np.float64)
        s = x@x.T
        np.fill_diagonal(s, -9)
        return np.mean([labels[i]==labels[j] for i,j in enumerate(s.argmax(1))])
    told,was,now = small.facts['int8'],e.embed(images),small.embed(images)
    assert told['recall_float32']==pytest.approx(recall(was)) and told['recall_int8']==pytest.approx(recall(now))
    assert told['difference']==pytest.approx(recall(now)-recall(was)) and told['low']<=told['difference']<=told['high']
    assert told['similarity']==pytest.approx((was.numpy()*now).sum(1).mean(), abs=1e-4)
    assert 1e-5<np.abs(now-was.numpy()).max()<.5 # it is another network
    assert (told['images'],told['calibrated_on'],told['how'] in ('static','dynamic'))==(60,60,True)
    assert told['bytes']==(tmp_path/'e'/'model.onnx').stat().st_size<told['bytes_float32']/2
    assert sorted(o.name for o in (tmp_path/'e').iterdir())==['gallery.json','gallery.npy','model.onnx','onnx.json']
    assert ', int8, ' in repr(small) and np.array_equal(small.embs, e.embs.numpy()) and 'int8' not in e.facts
    kinds = {o.op_type for o in onnx.load(str(tmp_path/'e'/'model.onnx')).graph.node}
    assert kinds & {'QuantizeLinear','DynamicQuantizeLinear'}
    import dmlfast.deploy.onnx as room
    with pytest.MonkeyPatch.context() as m: # the other way, alone: no better
        m.setattr(room, '_ways', lambda file: [{'static':'dynamic','dynamic':'static'}[told['how']]])
        other = e.save_onnx(tmp_path/'f', int8=True, data=images, labels=labels).facts['int8']
    assert other['how']!=told['how'] and other['recall_int8']<=told['recall_int8']
    with pytest.raises(ValueError, match='no labels'): e.save_onnx(tmp_path/'g', int8=True, data=images)

@pytest.mark.parametrize('arch', ['mobilenetv2_035','test_resnet'])
def test_int8_rounds_what_activations_leave(arch, tmp_path):
    "A sum before ReLU or ReLU6 would be rounded in steps of its own range, of which they cut off most"
    rng = np.random.RandomState(0)
    images = [noise(rng, 32, 32) for _ in range(8)]
    e = spread(ImageEmbedder(made(arch=arch), Preprocess([('fit', (32,32), 2)], [.5]*3, [.25]*3), dict(network=arch)), images)
    e.save_onnx(tmp_path/'e', int8=True, data=images, labels=[i//2 for i in range(8)], tol=1)
    nodes = onnx.load(str(tmp_path/'e'/'model.onnx')).graph.node
    maker = {k:o.op_type for o in nodes for k in o.output}
    assert 'DequantizeLinear' in maker.values() and 'Conv' in maker.values()
    assert [o.name for o in nodes if o.op_type in ('Relu','Clip') and maker.get(o.input[0])=='DequantizeLinear']==[]
