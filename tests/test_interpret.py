"Interpretation at its edges: what is drawn, what is refused, and how much memory it takes"
import numpy as np, pytest, torch
import matplotlib.pyplot as plt
from pathlib import Path
from PIL import Image
from fastai.vision.all import L
from dmlfast.all import *
from dmlfast.look.pictures import _triplet_settings

GREEN,RED = (plt.matplotlib.colors.to_rgba(o) for o in ('#1a7f37','#c4320a'))

@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')

def grey(i): return np.full((6,6), 20*i, dtype=np.uint8)

def angles(*degrees): return np.stack([np.cos(np.radians(degrees)),np.sin(np.radians(degrees))], 1)

@pytest.fixture
def fan():
    "Six directions: 0, 10 and 40 degrees are of class x, 12, 45 and 180 of class y"
    return RetrievalInterpretation(angles(0,10,40,12,45,180), [0,0,0,1,1,1], vocab=['x','y'], image=grey)

def test_neighbours_are_drawn_in_order_with_marks(fan):
    fig = fan.plot_neighbours([1,5], k=3)
    first,second = fig.axes[:4],fig.axes[4:]
    assert [o.get_title() for o in first]==['x','✗ y','✓ x','✓ x'] # from 10 degrees: 12, 0, 40
    assert [o.get_xlabel() for o in first]==['',*(f'{np.cos(np.radians(o)):.2f}' for o in (2,10,30))]
    assert [o.get_title() for o in second]==['y','✓ y','✗ x','✓ y'] # from 180 degrees: 45, 40, 12
    assert [o.spines['left'].get_edgecolor() for o in first[1:]]==[RED,GREEN,GREEN]
    assert [o.get_images()[0].get_array()[0,0] for o in first]==[20,60,0,40]

def test_worst_queries_by_hand(fan):
    "Item 4 (45 degrees) finds 40, 12, 10, 0, 180: its class at ranks 2 and 5, so that AP is (1/2+2/5)/2"
    worst = fan.top_losses(6)
    assert worst.average_precision[4]==pytest.approx((1/2+2/5)/2)
    assert worst.average_precision.is_monotonic_increasing and worst.nearest[4]=='x' and worst.label[4]=='y'
    fig = fan.plot_top_losses(max_n=2, k=2)
    assert [fig.axes[o].get_ylabel() for o in (0,3)]==[f'AP {o:.2f}' for o in worst.average_precision[:2]]

def test_confused_classes_by_hand(fan):
    "Nearest neighbours: 0→10 x, 10→12 y, 40→45 y, 12→10 x, 45→40 x, 180→45 y"
    df = fan.most_confused()
    assert sorted(zip(df['query'], df.found, df['count'], df.of))==[('x','y',2,3),('y','x',2,3)]
    assert fan.most_confused(k=5)['count'].sum()==sum(3 for _ in range(6)) # of its five others, each has three of the other class
    fig = fan.plot_most_confused(max_n=1, each=3)
    a,b = fig.subfigs[0].axes[:2]
    assert a.get_title()=='x' and b.get_title()=='✗ y' and b.get_xlabel()==f'{np.cos(np.radians(2)):.3f}'

def test_confusion_has_a_direction():
    "An x that takes a y for nearest, while the two ys have each other"
    df = RetrievalInterpretation(angles(0,30,35), [0,1,1], vocab=['x','y']).most_confused()
    assert df[['query','found','count','of']].values.tolist()==[['x','y',1,1]]

def test_nothing_confused_is_said():
    good = RetrievalInterpretation(angles(0,1,90,91), [0,0,1,1], image=grey)
    assert len(good.most_confused())==0
    assert [o.get_text() for o in good.plot_most_confused().texts]==['Nothing is confused: the nearest neighbour of each item is of its '
        'class.']
    for pairs in (good.label_noise(), good.duplicates(min_sim=1.1)):
        assert good.plot_pairs(pairs).texts[0].get_text().startswith('There are no such pairs')

def test_what_cannot_be_interpreted_is_refused(fan):
    with pytest.raises(ValueError, match='not finite: rows 1'): RetrievalInterpretation([[1.,0],[np.nan,0]], [0,0])
    with pytest.raises(ValueError, match='two items'): RetrievalInterpretation([[1.,0]], [0])
    with pytest.raises(ValueError, match='one for each of 6'): RetrievalInterpretation(fan.embs, fan.labels, items=['a'])
    with pytest.raises(ValueError, match='one whole number for each'): RetrievalInterpretation(fan.embs, fan.labels[:3])
    with pytest.raises(ValueError, match='no class has two items'): RetrievalInterpretation(fan.embs, range(6)).top_losses()
    with pytest.raises(ValueError, match='no images'): RetrievalInterpretation(fan.embs, fan.labels).plot_neighbours()
    with pytest.raises(ValueError, match="'tsne' or 'pca', not 'umap'"): fan.plot_map('umap')
    with pytest.raises(ValueError, match='no triplets'): RetrievalInterpretation(fan.embs, [0]*6, image=grey).plot_triplets()

def test_labels_without_names_and_more_neighbours_than_items():
    r = RetrievalInterpretation(torch.eye(3), torch.tensor([7,7,9]), image=grey)
    assert r.label(0)=='7' and r.nearest(10)[1].shape==(3,2)
    assert len(r.plot_neighbours(k=10).axes)==9
    assert r.top_losses().index.tolist()==[0,1] # the third has nothing to find

def test_blocks_do_not_matter():
    g = torch.Generator().manual_seed(0)
    x,y = torch.randn(90, 8, generator=g),torch.randint(9, (90,), generator=g)
    a,b = RetrievalInterpretation(x, y),RetrievalInterpretation(x, y, block=7)
    assert a.nearest(5)[1].tolist()==b.nearest(5)[1].tolist()
    assert a.result.values['map'].tolist()==pytest.approx(b.result.values['map'].tolist())
    assert a.most_confused(50, k=3).equals(b.most_confused(50, k=3))

def test_similarities_are_those_of_all_pairs():
    g = torch.Generator().manual_seed(0)
    x,y = torch.randn(60, 5, generator=g),torch.randint(4, (60,), generator=g)
    h = RetrievalInterpretation(x, y).similarities(bins=20)
    u = torch.nn.functional.normalize(x)
    s,same,other = u@u.T,y[:,None]==y,~torch.eye(60, dtype=torch.bool)
    for name,mask in (('pos',same&other),('neg',~same)):
        expected = np.histogram(s[mask], bins=20, range=(-1,1))[0]/mask.sum().item()
        assert np.abs(h[name]-expected).max()<.002 and h[f'{name}_mean']==pytest.approx(s[mask].mean().item(), abs=1e-5)
    assert h['overlap']==pytest.approx(np.minimum(h['pos'], h['neg']).sum())
    some = RetrievalInterpretation(x, y).similarities(max_n=30, bins=20)
    assert some['n_queries']==30 and some['overlap']==pytest.approx(h['overlap'], abs=.15)

def test_axes_say_what_they_show(fan):
    pr,rec,sim = fan.plot_pr(),fan.plot_recall(),fan.plot_similarities()
    assert (pr.get_xlabel(),pr.get_ylabel())==('recall','precision') and f'map {fan.result["map"]:.3f}' in pr.get_title()
    assert rec.get_ylabel()=='recall@k' and [o.get_text() for o in rec.get_xticklabels()]==['1','2','4']
    assert rec.get_lines()[0].get_ydata()[0]==pytest.approx(2/6)
    assert rec.get_lines()[1].get_ydata()[0]==pytest.approx(2/5) # chance: two of five others are of the class
    assert {o.get_text().split(',')[0] for o in sim.get_legend().get_texts()}=={'same class','different classes'}
    assert '%' in sim.get_ylabel() and 'overlap' in sim.get_title()

@pytest.mark.parametrize('method', ['tsne','pca'])
def test_map_has_every_item_once_and_says_what_it_leaves_out(method):
    g = np.random.default_rng(0)
    r = RetrievalInterpretation(g.normal(size=(60,6)), np.repeat(range(12), 5), image=lambda i: Image.new('L', (300,200), i))
    ax = r.plot_map(method, n_classes=4, max_n=18)
    assert sum(len(o.get_offsets()) for o in ax.collections)==18
    assert '18 of 60 items, 4 of 12 classes' in ax.get_title()
    assert len({tuple(o.get_facecolor()[0]) for o in ax.collections})==4
    assert 1<=len(ax.artists)<=18
    assert len(r.plot_map(method, n_classes=4, max_n=18, thumbs=False).artists)==0

def test_classes_of_one_item_have_no_curves(tmp_path):
    "A plot of these says so, and a page does without"
    r = RetrievalInterpretation(angles(0,10,40,90), [0,1,2,3], image=grey)
    for f in (r.plot_pr, r.plot_recall, r.plot_top_losses, r.top_losses):
        with pytest.raises(ValueError, match='no class has two items'): f()
    assert not plt.get_fignums()
    page = r.report(tmp_path, code='').read_text(encoding='utf-8')
    assert 'No class has two items, so that there is nothing to find' in page
    assert all((f'id="fig-{k}"' in page)==there for k,there in dict(curves_retrieval=False, worst=False, neighbours=True).items())

def test_names_that_are_no_text_are_escaped(tmp_path):
    "As those of folders with odd bytes; a lone half of a pair has no bytes"
    r = RetrievalInterpretation(angles(0,10,40,12,45,180,181), [0,0,0,1,1,2,2], vocab=['caf\udce9','é','\ud83d'], image=grey)
    want = ['caf\\xe9','é','\ufffd']
    assert [r.name(c) for c in range(3)]==want and r.vocab[0]=='caf\udce9'
    assert [o.get_text() for o in r.plot_map(thumbs=False, method='pca').get_legend().get_texts()]==want
    assert r.top_losses(7).label.isin(want).all()
    for f in (r.plot_top_losses, r.plot_neighbours, r.plot_most_confused): f().savefig(tmp_path/'x.png')
    page = r.report(tmp_path, code='', title='caf\udce9').read_text(encoding='utf-8')
    assert '<h1>caf\\xe9</h1>' in page and '<td class="l">caf\\xe9</td>' in page

def test_long_names_on_a_map_are_cut_and_leave_room():
    "The legend takes its room before images are placed, which do not cover one another"
    g = np.random.default_rng(0)
    names = [f'{i:03}.{"Northern_Rough_winged_Swallow_of_the_south" if i else "Ani"}' for i in range(8)]
    r = RetrievalInterpretation(g.normal(size=(160,6)), np.repeat(range(8), 20), vocab=names,
        image=lambda i: np.zeros((9,9,3), dtype=np.uint8))
    ax = r.plot_map('pca', figsize=(8,5))
    assert [o.get_text() for o in ax.get_legend().get_texts()]==['000.Ani']+[f'{i:03}.Northern_Rough_winged…' for i in range(1, 8)]
    ax.figure.canvas.draw()
    boxes = [o.get_window_extent() for o in ax.artists]
    assert len(boxes)>20 and not any(a.overlaps(b) for i,a in enumerate(boxes) for b in boxes[:i])

def test_map_of_one_dimension_and_of_few_items():
    assert RetrievalInterpretation([[1.],[2.],[-1.],[3.]], [0,0,1,1]).plot_map('pca').get_title()
    assert RetrievalInterpretation(angles(0,5,90), [0,0,1]).plot_map().get_title()

def test_images_are_reduced_and_names_wrapped():
    big = Image.new('RGB', (2000,1000))
    long = 'Black_footed_Albatross of the southern '
    r = RetrievalInterpretation(angles(0,1,2), [0,1,0], vocab=[long+'sea',long+'ocean'], image=lambda i: big)
    assert r.image(0).size==(160,80) and big.size==(2000,1000)
    fig = r.plot_neighbours([0], k=2)
    assert max(map(len, fig.axes[0].get_title().split('\n')))<=14 and fig.axes[0].get_title().startswith('Black footed\n')
    assert [o.get_title()[0] for o in fig.axes[1:]]==['✗','✓'] # what is left out of the names is what tells them apart

def test_a_pair_is_listed_once_whoever_finds_it(fan):
    df = fan.label_noise(min_sim=.99)
    assert df[['a','b']].to_numpy().tolist()==[[1,3],[2,4]] # 10 and 12 degrees, 40 and 45
    assert df.similarity.tolist()==pytest.approx(np.cos(np.radians([2,5])), abs=1e-5)
    fig = fan.plot_pairs(df)
    assert [o.get_title() for o in fig.axes if o.axison]==['x','✗ y']*2

@pytest.mark.parametrize('block', [None,3])
def test_near_pairs_are_those_of_a_loop(block):
    "However many near ones an item has, the `n` nearest, equal ones by row; bursts of equal rows, rows that must not see each other"
    rng = np.random.default_rng(0)
    for t in range(12):
        x = rng.normal(size=(40,3))[rng.integers(0, 40 if t%2 else 4, 40)]
        ignore = rng.integers(0, 30, 40) if t%3==0 else None
        r = RetrievalInterpretation(x, rng.integers(0, 3, 40), ignore=ignore, block=block)
        s = np.corrcoef(np.c_[x,-x]) # of rows whose mean is 0 this is the cosine
        every = [(a,b) for b in range(40) for a in range(b) if s[a,b]>=.8 and (ignore is None or ignore[a]!=ignore[b])]
        for same,f,of in ((True,r.duplicates,None), (False,r.label_noise,None), (False,r.label_noise,[3,7]), (False,r.label_noise,[]),
            (False,r.label_noise,range(0, 40, 3))):
            want = {o for o in every if (r.labels[o[0]]==r.labels[o[1]])==same and (of is None or {*o}&{*of})}
            kwargs = dict(min_sim=.8)|({} if of is None else dict(of=of))
            df = f(n=2000, **kwargs)
            assert {*zip(df.a, df.b)}==want and len(df)==len(want) and np.allclose(df.similarity, s[df.a,df.b], atol=1e-6)
            rows = [*zip(-df.similarity, df.a, df.b)]
            assert rows==sorted(rows)
            for n in (0,1,7): assert f(n=n, **kwargs).values.tolist()==df[:n].values.tolist()

def test_bursts_under_two_labels_are_found():
    "Ten nearly equal images under each of two labels, whose nearest are all of their own label"
    rng = np.random.default_rng(0)
    v = rng.normal(size=64)
    w = v+.3*rng.normal(size=64)
    r = RetrievalInterpretation(np.concatenate([o+.02*rng.normal(size=(10,64)) for o in (v,w)]), np.repeat([0,1], 10))
    df = r.label_noise(min_sim=.9, n=1000)
    assert {(a,b) for a,b in zip(df.a, df.b)}=={(a,b) for a in range(10) for b in range(10, 20)}
    assert (df.agree_a==1).all() and len(RetrievalInterpretation(np.ones((20,4)), [0]*20).duplicates(n=1000))==190

def test_triplets_by_hand():
    "Anchor 0, positive 3 to the east, negative 4 to the north: a right angle, and c = 0"
    x,y = torch.tensor([[0.,0],[3,0],[0,4],[9,9]]),torch.tensor([0,0,1,2])
    t = triplet_table(x, y, miner=lambda e,l: (torch.tensor([0,1]),torch.tensor([1,0]),torch.tensor([2,2])), margin=3., gamma=1.)
    t = t.set_index('a')
    assert t.loc[0,['d_ap','d_an','d_pn','angle','violation','violation_dr']].tolist()==pytest.approx([3,4,5,90,2,2])
    assert t.loc[1,['d_an','violation','violation_dr']].tolist()==pytest.approx([5,1,.4])
    assert t.loc[1,'angle']==pytest.approx(np.degrees(np.arccos(.6)), abs=1e-4)
    sq = triplet_table(x, y, lambda e,l: tuple(torch.tensor([o]) for o in (0,1,2)), margin=8., gamma=1., squared=True)
    assert sq.violation[0]==pytest.approx(9-16+8)

@pytest.mark.parametrize('loss', [None, ProxyNCALoss(), MarginLoss(n_classes=1), DRTripletLoss(margin=.5, gamma=.7, miner=SemiHardMiner()),
    CombinedLoss([MultiSimilarityLoss(), TripletLoss(margin=.5)]), CombinedLoss([ProxyAnchorLoss(), TripletLoss(margin=.5)]),
    MultiSimilarityLoss()], ids=lambda o: type(o).__name__)
def test_triplets_of_any_loss(loss):
    g = torch.Generator().manual_seed(0)
    r = RetrievalInterpretation(torch.randn(300, 4, generator=g), torch.arange(300)%30, image=lambda i: np.zeros((4,4), dtype=np.uint8),
        loss=loss)
    state = torch.get_rng_state()
    fig = r.plot_triplets(max_n=1)
    assert torch.equal(state, torch.get_rng_state())
    margin = .5 if isinstance(loss, (DRTripletLoss,CombinedLoss)) else .2
    assert f'of a batch of 64, ' in fig.get_suptitle() and f'a margin of {margin}' in fig.get_suptitle()
    assert f'γ = {0.7 if isinstance(loss, DRTripletLoss) else 0.3}:' in fig.axes[4].texts[0].get_text()

def test_triplets_of_a_loss_of_ones_own():
    "One that says nothing gets what stands in; one that asks for a gap gets it, with its γ and miner"
    class Own(MetricLoss):
        def compute(self, embs, labels): return embs.sum()
    class Asks(Own):
        miner = SemiHardMiner()
        def asks(self): return Margin('width', .4, squared=True)
    assert _triplet_settings(Asks(gamma=.1))==dict(miner=Asks.miner, margin=.4, gamma=.1, squared=True)
    for loss,gamma in ((Own(),.3), (Own(gamma=.6),.6), (CombinedLoss([Own(), ContrastiveLoss(gamma=.2)]),.2), (torch.nn.Linear(1, 1),.3),
        (len,.3)):
        o = _triplet_settings(loss)
        assert (type(o['miner']),o['margin'],o['gamma'],o['squared'])==(BatchHardMiner,.2,gamma,False)

def test_from_learner_and_batch(make_learner, few):
    learn = make_learner(DRTripletLoss())
    r = RetrievalInterpretation.from_learner(learn, 'test')
    assert len(r)==len(few.items('test')) and [Path(o) for o in r.items]==list(few.items('test'))
    assert r.label(0)==few.df[few.df.split=='test'].label.iloc[0]
    assert r.result['map@r']==learn.evaluate('test')['map@r']
    assert len(r.plot_neighbours(max_n=2, k=2).axes)==6
    learn.model.train()
    batch = learn.dls.train.one_batch()
    stats = {k:v.clone() for k,v in learn.model.named_buffers()}
    b = RetrievalInterpretation.from_batch(learn, batch)
    assert learn.model.training and all(torch.equal(v, stats[k]) for k,v in learn.model.named_buffers())
    assert len(b)==32 and b.labels.tolist()==batch[1].tolist()
    shown = np.asarray(b.image(0))
    assert shown.dtype==np.uint8 and shown.max()>200 and shown.std()>20 # dark strokes on white, as they were

# queries and galleries

def test_queries_search_the_gallery_only():
    "Directions 0 and 3 are queries of class x, 1 one of y; 2 (x), 10 (y) and 20 (x) are in the gallery, 11 (y) is both"
    r = RetrievalInterpretation(angles(0,3,1,2,10,20,11), [0,0,1,0,1,0,1], vocab=['x','y'], image=grey, role=['query']*3+['gallery']*3+[''])
    assert (r.queries.tolist(),r.gallery.tolist())==([0,1,2,6],[3,4,5,6]) and '4 queries in a gallery of 4' in repr(r)
    s,i = r.nearest(3)
    assert i.tolist()==[[3,4,6],[3,4,6],[3,4,6],[4,3,5]] # 11 degrees: 10, then 2 and 20 tie and the earlier is first
    assert s[0].tolist()==pytest.approx(np.cos(np.radians([2,10,11])), abs=1e-6)
    assert r.result['recall@1']==3/4 and r.top_losses(1).index.tolist()==[2]
    assert r.top_losses(1).average_precision[2]==pytest.approx((1/2+2/3)/2) # x, y, y, x
    assert r.most_confused()[['query','found','count','of']].values.tolist()==[['y','x',1,2]]
    fig = r.plot_neighbours(max_n=4, k=2)
    assert {o.get_images()[0].get_array()[0,0] for o in fig.axes[::3]}=={0,20,40,120} # queries, each 20 times its index
    assert {o.get_images()[0].get_array()[0,0] for o in fig.axes if o.get_xlabel()}<={60,80,100,120}
    assert 'in the gallery' in fig.get_suptitle()
    assert r.plot_most_confused().subfigs[0].axes[0].get_images()[0].get_array()[0,0]==40
    chance = r.plot_recall().get_lines()[1].get_ydata()[0]
    assert chance==pytest.approx(np.mean([2/4,2/4,2/4,1/3])) # the last does not see itself
    h = r.similarities(bins=20)
    same = np.cos(np.radians([0-2,0-20,3-2,3-20,1-10,1-11,11-10])).mean()
    assert h['pos_mean']==pytest.approx(same, abs=1e-6) and h['n_queries']==4
    # among all, whatever their roles
    assert {tuple(o) for o in r.label_noise(min_sim=np.cos(np.radians(1.5)))[['a','b']].values}=={(0,2),(2,3)}
    for of in ([9], [.5], [True,False]):
        with pytest.raises(ValueError, match='`of` are indices of the'): r.label_noise(of=of)
    mask = np.arange(len(r))==3
    for of,want in (([0],{(0,2)}), (mask,{(2,3)}), (torch.tensor([3]),{(2,3)}), ([2],{(0,2),(2,3)}), ([1],set())):
        assert {tuple(o) for o in r.label_noise(min_sim=np.cos(np.radians(1.5)), of=of)[['a','b']].values}==want

def test_labels_of_any_size():
    a,b = (RetrievalInterpretation(angles(0,1,2,3), [0,k,0,k], image=grey).most_confused()[['count','of']].values.tolist()
        for k in (1,10**12))
    assert a==b and a

def test_what_is_to_be_ignored_is_not_seen():
    "Two films: items 0 to 2 and 3 to 4; item 5 is of none"
    r = RetrievalInterpretation(angles(0,1,2,30,31,60), [0,0,0,0,1,1], image=grey, ignore=[0,0,0,1,1,2])
    assert r.nearest(3)[1][0].tolist()==[3,4,5] and r.nearest(5)[0][0].isinf().tolist()==[False]*3+[True]*2
    assert len(r.duplicates(min_sim=.99))==0
    assert len(RetrievalInterpretation(angles(0,1,2,30,31,60), [0,0,0,0,1,1]).duplicates(min_sim=.99))==3
    assert [o.axison for o in r.plot_neighbours([0,3], k=5).axes]==[True]*4+[False]+[True]*5 # the first finds three, the other four
    assert r.most_confused(k=5).query('a==0').of.tolist()==[3*3+4] # each of the first three sees three, the fourth sees four
    every = [(3,1),(3,1),(3,1),(4,3),(4,1),(5,1)] # for each query, how many it sees and how many of them are relevant
    assert r.plot_recall().get_lines()[1].get_ydata()[0]==pytest.approx(np.mean([b/a for a,b in every]))

@pytest.mark.parametrize('kind', ['roles','films','both','random'])
def test_numbers_are_those_of_evaluate(few, tmp_path, kind):
    rng = np.random.default_rng(0)
    df,kwargs = few.df.copy(),dict(ks=(1,10,20))
    if kind in ('roles','both'): df['role'] = rng.choice(['query','gallery',''], len(df))
    if kind in ('films','both'): df['sequence'] = rng.integers(3, size=len(df)).astype(str)
    if kind=='random': kwargs.update(random_gallery=3, ks=(1,5))
    ds = MetricDataset(df, few.path, 'few with roles', size=None, flip=False, **kwargs)
    learn = metric_learner(ds.dataloaders(bs=32, per_class=4, seed=0, num_workers=0), 'test_resnet', emb_sz=8, pretrained=False,
        path=tmp_path)
    with learn.no_bar():
        r,res = RetrievalInterpretation.from_learner(learn, 'test'),learn.evaluate('test')
        for k in ('recall@1',f'recall@{kwargs["ks"][-1]}','map@r','map'): assert r.result[k]==res[k]
    test = ds.df[ds.df.split=='test']
    q,g = set(r.queries.tolist()),set(r.gallery.tolist())
    if 'role' in test: assert q==set(np.flatnonzero(test.role!='gallery')) and g==set(np.flatnonzero(test.role!='query'))
    if kind=='random': assert len(g)==test.label.nunique()==len({r.label(i) for i in g}) and not q&g and len(q|g)==len(test)
    s,i = r.nearest(8)
    assert set(i[s>-torch.inf].tolist())<=g
    worst = r.top_losses(3)
    for j,row in worst.iterrows(): # average precision, from the similarities
        u = torch.nn.functional.normalize(r.embs)
        seen = [o for o in g if o!=j and ('sequence' not in test or test.label.iloc[o]!=test.label.iloc[j]
            or test.sequence.iloc[o]!=test.sequence.iloc[j])]
        right = np.array([r.labels[o]==r.labels[j] for o in sorted(seen, key=lambda o: -(u[o]@u[j]).item())])
        assert row.average_precision==pytest.approx((np.cumsum(right)/np.arange(1, len(right)+1))[right].mean(), abs=1e-6)
    assert r.plot_pr() and r.plot_recall() and r.plot_neighbours(max_n=2, k=3)

def test_roles_that_cannot_be_searched_are_refused(fan):
    with pytest.raises(ValueError, match="for each of 6 items"): RetrievalInterpretation(fan.embs, fan.labels, role=['query'])
    with pytest.raises(ValueError, match="'query', 'gallery' or ''"): RetrievalInterpretation(fan.embs, fan.labels, role=['probe']*6)
    with pytest.raises(ValueError, match='6 items are queries and 0 are in the gallery'):
        RetrievalInterpretation(fan.embs, fan.labels, role=['query']*6)

def test_items_without_labels_are_refused(make_learner, few):
    learn = make_learner()
    with pytest.raises(ValueError, match='no labels'): RetrievalInterpretation.from_learner(learn, learn.dls.test_dl(few.items('test')[:4]))

def test_memory_is_that_of_a_block():
    "12,000 items: the matrix of similarities would have 576 MB"
    try: Path('/proc/self/clear_refs').write_text('5') # the peak starts anew
    except OSError: pytest.skip('the peak of memory cannot be read here')
    def status(k): return int(next(o for o in Path('/proc/self/status').read_text().splitlines() if o.startswith(k)).split()[1])/1024
    before = status('VmRSS')
    r = RetrievalInterpretation(torch.randn(12_000, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12_000)//4)
    r.nearest(4), r.most_confused(), r.result, r.similarities(), r.label_noise()
    assert status('VmHWM')-before<350

def test_names_of_classes_are_of_their_numbers():
    "A dict has them by number, and a label below 0 has none"
    from dmlfast.retrieval import Embedded
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for vocab in ({0:'cat', 1:'dog'}, {'1':'dog', '0':'cat'}, ['cat','dog']): assert Embedded(x, [0,1,1,0], vocab=vocab).label(1)=='dog'
    assert Embedded(x, [0,2,2,0], vocab={0:'cat', 2:'dog'}).label(1)=='dog'
    with pytest.raises(ValueError, match='a label -1'): Embedded(x, [0,1,-1,0], vocab=['cat','dog'])
