"Splits, labels and balanced batches: the rule of an epoch on any data, workers, and faults"
import math
from enum import Enum
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from fastai.vision.all import *
from dmlfast.all import *
from dmlfast.data.datasets import glyph_chars
from dmlfast.retrieval.embedded import numbered

@given(counts=st.lists(st.integers(1, 12), min_size=2, max_size=15), per_class=st.integers(1, 5), p=st.integers(1, 6),
    seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch(counts, per_class, p, seed, epoch):
    p = min(p, len(counts))
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(len(counts)), counts))
    s = BalancedSampler(labels, p*per_class, per_class, seed)
    idxs = s.idxs(epoch)
    assert len(idxs)==len(s)==max(len(labels)//(p*per_class), math.ceil(len(counts)/p))
    groups = idxs.reshape(len(s), p, per_class)
    assert (labels[groups]==labels[groups][...,:1]).all()
    assert all(len(set(b))==p for b in labels[groups][...,0])
    assert all(len(set(g))==min(per_class, counts[labels[g[0]]]) for g in groups.reshape(-1, per_class))
    assert set(labels[idxs.ravel()])==set(range(len(counts)))
    assert (idxs==BalancedSampler(labels, p*per_class, per_class, seed).idxs(epoch)).all()

@given(counts=st.lists(st.integers(1, 30), min_size=3, max_size=8), per_class=st.integers(1, 4), seed=st.integers(0, 99),
    start=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_every_image_is_seen(counts, per_class, seed, start):
    "The rule as stated: any `2*ceil(n/K)-1` draws in a row show all `n` images of a class, wherever they begin"
    labels = np.repeat(np.arange(len(counts)), counts)
    s = BalancedSampler(labels, 2*per_class, per_class, seed)
    draws = len(s)//math.ceil(len(counts)/2) # of each class in an epoch, at the least
    passes = math.ceil((2*math.ceil(max(counts)/per_class)-1)/draws)
    seen = {i for e in range(start, start+passes) for i in s.idxs(e).ravel()}
    assert seen==set(range(len(labels)))

def test_epochs_differ_and_seeds_differ():
    labels = np.repeat(np.arange(20), 10)
    s,t = BalancedSampler(labels, 16, 4, 0),BalancedSampler(labels, 16, 4, 1)
    for f in ('idxs','classes'): assert (getattr(s, f)(0)!=getattr(s, f)(1)).any() and (getattr(s, f)(0)!=getattr(t, f)(0)).any()

def test_classes_are_drawn_alike():
    "Neither rare nor frequent classes are drawn more often than others: over many passes within a tenth"
    labels = np.repeat(np.arange(9), [2,2,2,30,30,30,5,5,5])
    s = BalancedSampler(labels, 16, 4, 0)
    n = np.bincount(np.concatenate([s.classes(e).ravel() for e in range(300)]))
    assert n.max()/n.min()<1.1

# Classes that look alike, drawn together

def near_of(n, k, seed=0):
    "Some neighbours of some classes: none of the last one, and one class that is everybody's"
    r = np.random.RandomState(seed)
    return {c:[*dict.fromkeys([0, *r.choice(n, min(k, n), replace=False)])] for c in range(n-1)}

@given(counts=st.lists(st.integers(1, 12), min_size=2, max_size=25), per_class=st.integers(1, 4), p=st.integers(1, 8),
    seed=st.integers(0, 99), epoch=st.integers(0, 3), share=st.sampled_from([.1,.5,.9,1]))
@settings(max_examples=80, deadline=None)
def test_an_epoch_with_neighbours(counts, per_class, p, seed, epoch, share):
    "All that an epoch promises without: its length, classes that differ, all in each round, images in turn, the same for a seed"
    p,n = min(p, len(counts)),len(counts)
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(n), counts))
    make = lambda: BalancedSampler(labels, p*per_class, per_class, seed, near_of(n, 3), share)
    s = make()
    idxs,classes = s.idxs(epoch),s.classes(epoch)
    assert len(idxs)==len(s)==len(classes)==max(len(labels)//(p*per_class), math.ceil(n/p))
    groups = idxs.reshape(len(s), p, per_class)
    assert (labels[groups]==classes[...,None]).all() and all(len(set(b))==p for b in classes)
    assert all(len(set(g))==min(per_class, counts[labels[g[0]]]) for g in groups.reshape(-1, per_class))
    for i in range(0, len(s)-s.round+1, s.round): # each round: every class once, and what fills up the last batch
        n_of = np.bincount(classes[i:i+s.round].ravel(), minlength=n)
        assert n_of.min()==1 and n_of.max()<=2 and n_of.sum()==s.round*p
        assert (np.bincount(classes[i:i+s.round-1].ravel(), minlength=n)<=1).all()
    assert (idxs==make().idxs(epoch)).all() and (epoch or (make().idxs(1)[:len(idxs)]!=idxs).any() or n<=p or n<4)

@given(counts=st.lists(st.integers(1, 30), min_size=3, max_size=8), per_class=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_every_image_is_seen_with_neighbours(counts, per_class, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    s = BalancedSampler(labels, 2*per_class, per_class, seed, near_of(len(counts), 2))
    passes = math.ceil((2*math.ceil(max(counts)/per_class)-1)/(len(s)//s.round))
    assert {i for e in range(passes) for i in s.idxs(e).ravel()}==set(range(len(labels)))

def test_no_share_is_the_order_of_before():
    "Bit for bit that of permutations of the classes, cut into batches and filled up from the front"
    labels = np.repeat(np.arange(23), 7)
    for p,seed in ((4,0), (5,3), (23,1), (7,2)):
        for kw in ({}, dict(neighbours=near_of(23, 4), share=0.), dict(neighbours={})):
            s = BalancedSampler(labels, 2*p, 2, seed, **kw)
            for epoch in (0,5):
                rng,rounds = np.random.default_rng([seed, epoch]),math.ceil(len(s)/s.round)
                perms = rng.permuted(np.tile(np.arange(23), (rounds,1)), axis=1)
                want = [c for o in perms for c in [*o, *o[:s.round*p-23]]]
                assert s.classes(epoch).ravel().tolist()==want[:len(s)*p]
                assert (s.idxs(epoch)==BalancedSampler(labels, 2*p, 2, seed).idxs(epoch)).all()

@pytest.mark.parametrize('share,n_near', [(.25,2), (.5,4), (.75,6), (1.,7)])
def test_the_share_of_neighbours_is_reached(share, n_near):
    "Sixteen families of four: how many classes of a batch follow one of their own family?"
    labels = np.repeat(np.arange(64), 4)
    family = {c:[o for o in range(c//4*4, c//4*4+4) if o!=c] for c in range(64)}
    s,plain = (BalancedSampler(labels, 32, 4, 0, o, share) for o in (family,None))
    def followers(s): return [8-len({c//4 for c in b}) for e in range(20) for b in s.classes(e)]
    got = followers(s)
    most = min(n_near, 6) # two whole families
    assert np.mean(got)>=.8*most and np.mean([o>=most for o in got])>=.5 and np.mean(followers(plain))<1.5
    assert all(8-len({c//4 for c in b})>=most for e in range(20) for b in s.classes(e)[:2]) # before families are used up

def test_classes_are_drawn_alike_with_neighbours():
    s = BalancedSampler(np.repeat(np.arange(30), 8), 16, 4, 0, near_of(30, 3))
    n = np.bincount(np.concatenate([s.classes(e).ravel() for e in range(200)]))
    assert n.max()/n.min()<1.1

def test_neighbours_that_are_no_classes():
    labels = [0,0,1,1,2,2]
    for kw,says in ((dict(neighbours={0:[5]}),'names 5'), (dict(neighbours={7:[0]}),'names 7'),
        (dict(neighbours={0:[1]}, share=1.1),'0 to 1'), (dict(neighbours={0:[1]}, share='half'),'0 to 1')):
        with pytest.raises(ValueError, match=says): BalancedSampler(labels, 4, 2, **kw)
    s = BalancedSampler([3,3,8,8,9,9], 4, 2, 0, {9:[3,9]}) # labels need not begin at 0, and no class is its own neighbour
    assert s.near==[[],[],[0]]

def test_a_loader_with_neighbours():
    labels = np.repeat(np.arange(12), 4)
    make = lambda **kw: BalancedDL(list(range(48)), 8, 2, labels=labels, shuffle=True, seed=0, num_workers=0, **kw)
    near = near_of(12, 3)
    dl,plain = make(neighbours=near, share=.5),make()
    assert dl.get_idxs()==plain.set_neighbours(near).get_idxs()==dl.new().get_idxs()!=make().get_idxs()
    assert plain.set_neighbours().get_idxs()==make().get_idxs()==dl.new(neighbours=None).get_idxs()
    with pytest.raises(ValueError, match='names 99'): dl.set_neighbours({99:[0]}, .1)
    assert dl.neighbours is near and dl.near_share==.5 and dl.get_idxs()==make(neighbours=near).get_idxs()
    other = dl.new(list(range(6)), labels=[0,0,1,1,5,5], bs=4) # classes of its own
    assert other.neighbours is None and len(other)==2

def test_hard_pairs_are_the_nearest_prototypes():
    "By brute force, in order, whatever the numbers of the classes and the lengths of rows"
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([3,5,9,11,20])[torch.arange(60)%5]
    x = torch.randn(60, 6, generator=g)*torch.rand(60, 1, generator=g)
    unit = torch.nn.functional.normalize(x, dim=1)
    proto = {c:sum(unit[labels==c]) for c in set(labels.tolist())}
    cos = lambda a,b: (proto[a]@proto[b]/proto[a].norm()/proto[b].norm()).item()
    for k in (1,3,9):
        want = {c:sorted((o for o in proto if o!=c), key=lambda o: -cos(c, o))[:k] for c in proto}
        assert hard_pairs(Embedded(x, labels), k)==want
    for emb,k,says in ((Embedded(x),1,'no labels'), (Embedded(x, labels*0),1,'one class'), (Embedded(x, labels),0,'1 or more')):
        with pytest.raises(ValueError, match=says): hard_pairs(emb, k)
    with pytest.raises(ValueError, match=r'such as `learn.embedded\(learn.dls.train\)`; got a Tensor'): hard_pairs(x)

def test_hard_pairs_go_into_the_loader_of_a_learner(make_learner):
    learn = make_learner()
    near = hard_pairs(learn.embedded(learn.dls.train), 2)
    assert sorted(near)==list(range(learn.dls.n_train_classes))
    assert learn.dls.train.set_neighbours(near) is learn.dls.train
    learn.fit(1, 1e-3)
    assert learn.dls.train.sampler.n_near==4

def _dls(labels, **kwargs):
    dblock = DataBlock(blocks=(TransformBlock, ClassBlock), get_y=lambda i: labels[i],
        splitter=ClassSplitter(lambda i: labels[i], n_valid=1))
    return dblock.dataloaders(L(range(len(labels))), dl_type=BalancedDL, num_workers=0, **kwargs)

def test_training_classes_come_first():
    "Whatever the order of their names: a class id below their number is a proxy's row"
    labels = list('aabbccdd')
    block = DataBlock(blocks=(TransformBlock, ClassBlock), get_y=lambda i: labels[i],
        splitter=ClassSplitter(lambda i: labels[i], valid=['a','c']))
    dls = block.dataloaders(L(range(8)), dl_type=BalancedDL, bs=4, per_class=2, num_workers=0)
    assert list(dls.vocab)==['b','d','a','c'] and dls.n_train_classes==2

def test_faults_come_before_the_first_batch():
    for kwargs,said in [*((dict(bs=b, per_class=k), f'both at least 1; got bs={b} and per_class={k}') for b,
        k in ((6,4), (0,4), (-4,4), (4,0), (-4,-4), (4.,4), (4,None))), (dict(bs='4', per_class=4), "got bs='4' and per_class=4"),
                        (dict(bs=64, per_class=4), 'needs 16 classes and there are 3: take bs=12')]:
        with pytest.raises(ValueError, match=said): _dls([0,0,0,0,1,1,1,1,2,2,2,2,3], **kwargs)
    with pytest.raises(ValueError, match='All 4 items are of one class'): _dls([0,0,0,0,1,1], bs=4, per_class=4)
    with pytest.raises(ValueError, match='pass them as `labels`'): BalancedDL(list(range(8)), bs=4, per_class=2, shuffle=True)

def test_targets_that_are_no_class(few):
    "A balanced loader and a learner say the same of them"
    def dls(*blocks, **kwargs):
        return DataBlock(blocks=(ImageBlock,*blocks), n_inp=1, splitter=RandomSplitter(seed=0), **kwargs).dataloaders
    for make,said in ((dls(MultiCategoryBlock, get_y=lambda o: [o.parent.name]), r'a TensorMultiCategory of torch.float32, of shape'),
        (dls(), 'no target')):
        with pytest.raises(ValueError, match=f'takes the class of each image.*{said}'):
            make(few.items(), bs=8, per_class=4, dl_type=BalancedDL, num_workers=0)
        with pytest.raises(ValueError, match=f'takes the class of each image.*{said}'):
            metric_learner(make(few.items(), bs=8, num_workers=0), 'test_resnet', pretrained=False)

def test_labels_of_any_dataset():
    dl = BalancedDL(list(range(8)), bs=4, per_class=2, shuffle=True, labels=[0,0,1,1,2,2,3,3], num_workers=0)
    for b in dl: assert len({int(o)//2 for o in b})==2

def test_workers_do_not_change_the_order(glyph_dir):
    block = DataBlock(blocks=(ImageBlock, ClassBlock), get_items=get_image_files, get_y=parent_label,
        splitter=ClassSplitter(parent_label, n_valid=400))
    ys = [[y.tolist() for _,y in block.dataloaders(glyph_dir, bs=32, dl_type=BalancedDL, per_class=8, seed=3, num_workers=n).train]
        for n in (0,2)]
    assert ys[0]==ys[1]

def test_get_preds_sees_each_training_item_once(make_learner):
    learn = make_learner()
    embs,y = learn.get_preds(ds_idx=0)
    assert y.tolist()==[int(o) for o in learn.dls.train_ds.tls[1]]
    assert len(embs)==len(learn.dls.train_ds)

def test_peeking_moves_nothing(few):
    a,b = (few.dataloaders(bs=16, per_class=4, seed=1, num_workers=0).train for _ in range(2))
    b.one_batch(); b.one_batch()
    assert [y.tolist() for _,y in a]==[y.tolist() for _,y in b]
    assert a.epoch==b.epoch==1

def test_labels_in_a_frame():
    df = pd.DataFrame(dict(path=list('abcd'), label=['x','x','y','y']))
    for train,val in (ClassSplitter('label')(df), ClassSplitter(lambda r: r.label)(df)): assert (train,sorted(val))==([0,1],[2,3])

def test_validation_items_are_mixed():
    "Class by class, a batch would have no negatives"
    labels = [i//20 for i in range(200)]
    train,val = ClassSplitter(lambda i: labels[i])(range(200))
    assert train==list(range(100)) and sorted(val)==list(range(100,200)) and val==ClassSplitter(lambda i: labels[i])(range(200))[1]
    assert all(len({labels[i] for i in val[j:j+20]})>1 for j in range(0, 100, 20))

def test_splits_that_are_none():
    for n in (0,-1,4,7,1.5,'2'):
        with pytest.raises(ValueError, match=f'`n_valid` is a number of classes, 1 to 3 of the 4 there are; got {n!r}'):
            ClassSplitter(str, n_valid=n)(list('aabbccdd'))
    for pct in (0,1,'.5',None,float('nan')):
        with pytest.raises(ValueError,
            match='`valid_pct` is the share of the classes for validation, between 0 and 1; got '+re.escape(repr(pct))):
            ClassSplitter(str, valid_pct=pct)(list('aabbccdd'))
    with pytest.raises(ValueError, match="The table has no column 'klass'; it has 'path', 'class'"):
        ClassSplitter('klass')(pd.DataFrame({'path':['a','b'], 'class':[1,2]}))
    with pytest.raises(ValueError, match="`label_func` is a function .*; got 'class' for a list"): ClassSplitter('class')(['a','b'])
    for none in (None, float('nan'), pd.NA):
        with pytest.raises(ValueError, match='2 of 5 items have no label; the first is item 1'):
            ClassSplitter('label')(pd.DataFrame(dict(label=['x',none,'y','y',none])))

def test_a_corrupt_image_is_named(few, tmp_path):
    for c in sorted(set(few.df.label))[:4]:
        for f in few.items().filter(lambda o: o.parent.name==c)[:4]:
            (tmp_path/c).mkdir(exist_ok=True)
            (tmp_path/c/f.name).write_bytes(f.read_bytes())
    bad = get_image_files(tmp_path).sorted()[2] # a training image
    bad.write_bytes(bad.read_bytes()[:150])
    with pytest.raises(ValueError, match=f"cannot be read: '{bad}'"): MetricDataset.from_folder(tmp_path, bad='raise')
    ds = MetricDataset.from_folder(tmp_path, val_pct=0, test_pct=0.5, size=None, flip=False)
    dls = ds.dataloaders(bs=4, per_class=2, valid='test', num_workers=0)
    with pytest.raises(ValueError, match=f"The image '{bad}' cannot be read"): [o for o in dls.train for _ in range(2)]
    with pytest.warns(UserWarning, match='1 of 16 images cannot be read'): assert len(MetricDataset.from_folder(tmp_path, bad='skip'))==15

def test_glyphs_have_no_twins(glyph_dir):
    "No two classes are the same drawing in every face: their pixels in one face differ"
    from PIL import Image
    chars = glyph_chars()
    assert len(set(chars))==len(chars)
    lookalikes = ['AΑА','OΟО','oοо','eе','µμ','ëё','ΓГ']
    assert all(sum(c in chars for c in s)==1 for s in lookalikes)
    assert 430<=len(chars)<=470 and len(get_image_files(glyph_dir))>6500

class Kind(Enum):
    a,b,c,d = range(4)

@pytest.mark.parametrize('of', [lambda i: ('x',i), lambda i: Kind(i), lambda i: np.int64(i), lambda i: ('x',('y',Kind(i)))])
def test_labels_of_several_parts(of):
    "A tuple is one label, whatever its parts are"
    get_y = lambda i: of(i//4)
    dls = DataBlock(blocks=(TransformBlock, ClassBlock), get_y=get_y,
        splitter=ClassSplitter(get_y, valid=[of(1),of(2)])).dataloaders(L(range(16)), dl_type=BalancedDL, bs=4, per_class=2, num_workers=0)
    assert list(dls.vocab)==[of(0),of(3),of(1),of(2)] and dls.n_train_classes==2
    assert [y.item() for _,y in dls.valid_ds]==[2+(i//4-1) for i in dls.valid_ds.items]
    assert dls.valid_ds.decode((0,tensor(3)))[1]==str(of(2))
    rows = pd.DataFrame(dict(path=[f'{i}.png' for i in range(16)], label=pd.Series([get_y(i) for i in range(16)], dtype=object)))
    ds = MetricDataset.from_df(rows, check_files=False)
    assert set(ds.df.label[ds.df.split=='test'])=={of(2),of(3)} and ds.folds(2)[1].df.split.nunique()==3

@pytest.mark.parametrize('of', [lambda i: [i], lambda i: {i}, lambda i: (i,[i]), lambda i: np.array([i]), lambda i: tensor(i)])
def test_labels_that_are_none(of):
    get_y,said = (lambda i: of(i//4)),'A label names one class.* is of the type (list|set|tuple|ndarray|Tensor)'
    with pytest.raises(ValueError, match=said): ClassSplitter(get_y)(range(16))
    with pytest.raises(ValueError, match=said): DataBlock(blocks=(TransformBlock, ClassBlock), get_y=get_y).datasets(L(range(16)))
    rows = pd.DataFrame(dict(path=[f'{i}.png' for i in range(16)], label=pd.Series([get_y(i) for i in range(16)], dtype=object)))
    for df in (rows, rows.assign(split='train')):
        with pytest.raises(ValueError, match=said): MetricDataset.from_df(df, check_files=False)

def test_rows_are_what_getters_get():
    df = pd.DataFrame(dict(path=list('abcd'), label=['x','x','y','y'], name=[1,2,3,4]), index=[7,7,8,9])
    seen = []
    for f in ('label', ColReader('label'), lambda r: r['label'], lambda r: r.label, lambda r: (seen.append(r), r.iloc[1])[1]):
        train,val = ClassSplitter(f)(df)
        assert (train,sorted(val))==([0,1],[2,3])
    theirs = []
    DataBlock(get_x=lambda r: theirs.append(r), get_y=noop).datasets(df)[3]
    assert type(seen[3]) is type(theirs[-1]) and seen[3].equals(theirs[-1])

def test_one_name_as_text_and_as_a_number_is_refused(tmp_path):
    from PIL import Image
    for i in range(4): Image.new('L', (4,4), i).save(tmp_path/f'{i}.png')
    df = pd.DataFrame(dict(path=[f'{i}.png' for i in range(4)], label=['1',1,'2','2']))
    with pytest.raises(ValueError, match=r"'1' is there as both: make all of them text"): MetricDataset.from_df(df, tmp_path)
    with pytest.raises(ValueError, match=r"'1' is there as both"): numbered(['1',1,'1',1])
    with pytest.raises(ValueError, match=r"2 of 3 labels are missing"): numbered(['a',None,float('nan')])
