"Whatever loader comes in, and wherever: the same images, the same numbers"
import numpy as np, pytest, torch
from fastai.vision.all import *
from dmlfast.all import *
from dmlfast.train.features import collect

@pytest.fixture(scope='module')
def learn(few, tmp_path_factory):
    "A learner whose statistics are not those of the images, with random crops in training"
    set_seed(1) # with the weights of 0 two items are nearly as near, and the order of batches decides between them
    learn = metric_learner(few.dataloaders(bs=32, per_class=4, seed=0, num_workers=0, size=24), 'test_resnet', emb_sz=16, pretrained=False,
        path=tmp_path_factory.mktemp('loaders'))
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn

@pytest.fixture
def other(few):
    "Loaders that no model has met, with other classes in validation"
    return few.dataloaders(bs=32, per_class=4, seed=1, num_workers=0, size=24, valid='test')

def norms(dl): return [o for o in dl.after_batch.fs if isinstance(o, Normalize)]

# statistics

def test_other_loaders_are_normalised_wherever_they_come_in(learn, few, other):
    right = learn.embed('test')[0]
    assert not norms(other.valid) and not torch.allclose(right, collect(learn.model, other.valid)[0]) # which is what the door is for
    order = [str(o) for o in few.items('test')]
    def same(embs): return torch.allclose(embs[torch.tensor([list(map(str, other.valid.items)).index(o) for o in order])], right, atol=1e-6)
    assert same(learn.embed(other.valid)[0]) and same(learn.get_preds(dl=other.valid)[0])
    assert same(RetrievalInterpretation.from_learner(learn, other.valid).embs)
    assert np.allclose(learn.evaluate(other.valid)['map@r'], learn.evaluate('test')['map@r'])
    assert np.allclose(learn.validate(dl=other.valid)[1], learn.evaluate('test')['recall@1'])
    hits = [learn.predict(few.items('test')[0], k=3, gallery=o)[1] for o in ('test',other.valid)]
    assert np.allclose([o.score for o in hits[0]], [o.score for o in hits[1]])
    assert [o.label for o in hits[0]]==[o.label for o in hits[1]]==[Path(o.item).parent.name for o in hits[1]] # its own numbers of classes
    assert not norms(other.valid) # what is measured is left as it was

def test_loaders_that_take_the_place_of_others_are_normalised(make_learner, few, other, tmp_path):
    learn = make_learner(seed=5)
    right = learn.evaluate('test')['map@r']
    learn.dls = other = few.dataloaders(bs=32, per_class=4, num_workers=0, valid='test')
    assert [len(norms(o)) for o in other.loaders]==[1,1] and np.allclose(learn.evaluate()['map@r'], right)
    assert learn.export_embedder(tmp_path/'e').preprocess.mean is not None
    learn.dls = other
    assert [len(norms(o)) for o in other.loaders]==[1,1]

def test_loaders_for_another_model_are_refused(learn, other):
    metric_learner(other, 'resnet10t', pretrained=False)
    for f in (learn.embed, learn.evaluate, lambda o: learn.get_preds(dl=o), lambda o: learn.validate(dl=o),
        lambda o: setattr(learn, 'dls', DataLoaders(o, o))):
        with pytest.raises(ValueError, match='normalise images for another model'): f(other.valid)

def test_a_users_own_normalisation_is_kept(learn, few):
    own = few.dataloaders(bs=32, per_class=4, num_workers=0, size=24, batch_tfms=Normalize.from_stats([.1]*3, [.9]*3))
    assert learn.admit(own.valid) is own.valid

def test_loaders_keep_their_data_set(learn, few, tmp_path):
    assert all(o.source is few for o in (learn.dls, learn.dls.valid, learn.dls.test_dl(few.items('test')), learn.dls.new_empty().train))
    learn.export('l.pkl')
    assert len(load_learner(learn.path/'l.pkl').embed('test')[0])==len(few.items('test'))

# augmentation

def test_training_items_are_measured_without_augmentation(learn):
    right,train = learn.evaluate('train')['map@r'],learn.dls.train
    x = train.new(shuffle=False, drop_last=False)
    assert not torch.equal(collect(learn.model, x)[0], collect(learn.model, x)[0]) # crops are drawn
    for o in (learn.evaluate(train), learn.evaluate(x)): assert np.isclose(o['map@r'], right)
    assert torch.equal(learn.embed(train)[0], learn.embed('train')[0]) and torch.equal(learn.get_preds(0)[0], learn.embed(train)[0])
    assert np.allclose(learn.validate(0)[1], learn.evaluate('train')['recall@1'])
    embs,ys = learn.get_preds(dl=train)
    assert torch.equal(embs, learn.get_preds(0)[0]) and ys.tolist()==learn.embed('train')[1].tolist()
    assert not torch.allclose(learn.get_preds(dl=x)[0], embs, atol=1e-3) # a loader of one's own is taken as it is, as everywhere in fastai
    assert not torch.allclose(learn.tta(dl=train, n=1)[0], embs, atol=1e-3) and torch.allclose(learn.tta(dl=train, n=1, beta=1)[0], embs,
        atol=1e-6)

# wrapped models

@pytest.mark.parametrize('wrap', ['compile','torch.compile','DataParallel'])
def test_wrapped_models(make_learner, few, tmp_path, wrap):
    learn = make_learner(ProxyNCALoss(), init='lda')
    right = learn.evaluate()['map@r']
    if wrap=='compile': learn.model.compile(backend='eager')
    else: learn.model = torch.compile(learn.model, backend='eager') if wrap=='torch.compile' else nn.DataParallel(learn.model)
    assert np.isclose(learn.evaluate()['map@r'], right)
    emb,hits = learn.predict(few.items('test')[0], k=1)
    res = learn.export_embedder(tmp_path/'e', gallery='val')
    assert torch.allclose(res.embed([few.items('test')[0]])[0], emb, atol=1e-6) and len(learn.get_preds()[0])==len(learn.dls.valid_ds)
    learn.fit(1, 1e-3)
    learn.show_results()
    assert [len(o) for o in learn.opt.param_lists][1]>=3 # the proxies are with the head

# epochs

class Few(Callback):
    "Keep the first batches of each epoch, and leave it there"
    def __init__(self, n=2): self.n,self.seen = n,[]
    def before_batch(self):
        if self.training: self.seen.append(self.yb[0].tolist())
    def after_batch(self):
        if self.training and self.iter>=self.n-1: raise CancelTrainException

def test_a_cut_epoch_counts(make_learner):
    learn = make_learner(cbs=Few())
    learn.fit(2, 1e-3)
    learn.dls.train.one_batch()
    with learn.removed_cbs(few := learn.few): learn.lr_find(num_it=12, stop_div=False, show_plot=False) # neither is a training
    few.seen.clear()
    learn.fit(1, 1e-3)
    items = learn.dls.train.sampler.idxs(2)[:2]
    labels = np.array([int(o) for o in learn.dls.train_ds.tls[1]])
    assert learn.few.seen==labels[items].tolist()

def test_learners_with_the_same_loaders_see_the_same(make_learner):
    a = make_learner(cbs=Few())
    a.fit(2, 1e-3)
    b = metric_learner(a.dls, 'test_resnet', emb_sz=16, pretrained=False, cbs=Few())
    b.fit(2, 1e-3)
    assert a.few.seen==b.few.seen and a.few.seen[0]!=a.few.seen[2]

# the door

@pytest.mark.parametrize('part', [0,1])
@pytest.mark.parametrize('how', ['dls','in place'])
def test_every_loader_is_normalised_or_refused(make_learner, few, how, part):
    learn = make_learner(seed=5)
    def _by_name(dl):
        return learn.embed(dl)[0][np.argsort(learn.embedded(dl).items)]
    right,norm = _by_name('test'),norms(learn.dls.valid)[0]
    def _same(): return all(torch.allclose(_by_name(o), right, atol=1e-5) for o in (learn.dls.valid,'test'))
    new = few.dataloaders(bs=32, per_class=4, num_workers=0, valid='test')
    loaders = [new[i] if i==part else learn.dls[i] for i in (0,1)]
    if how=='dls': learn.dls = DataLoaders(*loaders)
    else:
        learn.dls.loaders[part] = new[part]
        if part: assert _same()
        learn.fit(1, lr=0.)
        right = _by_name('test') # batch norm has seen images
    assert [norms(o) for o in learn.dls.loaders]==[[norm],[norm]] and not norms(new[part])
    if part: assert _same()
    foreign = few.dataloaders(bs=32, per_class=4, num_workers=0)
    metric_learner(foreign, 'resnet10t', pretrained=False)
    was = list(learn.dls.loaders)
    for f in (lambda: setattr(learn, 'dls', DataLoaders(*(foreign[i] if i==part else was[i] for i in (0,1)))), lambda: (
        learn.dls.loaders.__setitem__(part, foreign[part]), learn.fit(1))):
        with pytest.raises(ValueError, match='normalise images for another model'): f()
    assert learn.dls.loaders[1-part] is was[1-part]

def test_a_loader_without_transforms(make_learner, few, learn):
    ds = [(TensorImage(torch.rand(3,24,24)), TensorCategory(i//2)) for i in range(8)]
    bare = DataLoader(ds, bs=4)
    for f in (learn.evaluate, learn.embed, lambda o: learn.get_preds(dl=o),
        lambda o: setattr(learn, 'dls', DataLoaders(learn.dls.train, o)),
        lambda o: metric_learner(DataLoaders(o, o), 'test_resnet', pretrained=False)):
        with pytest.raises(ValueError, match='A DataLoader without transforms of batches cannot normalise images.*`normalize=False`'):
            f(bare)
    assert make_learner(normalize=False).embed(bare)[0].shape==(8,16)

def test_loaders_of_pytorch_are_refused_and_its_data_sets_taken():
    ds = [torch.utils.data.TensorDataset(torch.randn(48, 10), torch.arange(48)//4) for _ in range(2)]
    def made(*dls): return metric_learner(DataLoaders(*dls), nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4)), TripletLoss())
    with pytest.raises(ValueError, match='BalancedDL'): made(*(torch.utils.data.DataLoader(o, batch_size=16) for o in ds))
    learn = made(BalancedDL(ds[0], bs=16, labels=ds[0].tensors[1], shuffle=True, num_workers=0), TfmdDL(ds[1], bs=16, num_workers=0))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.embed(bar=False)[0].shape==(48,4) and len(learn.validate())==6

def test_a_model_that_gives_more_than_embeddings_is_refused(few):
    class Two(nn.Linear):
        def forward(self, x): return super().forward(x.flatten(1)[:,:8]),x
    learn = metric_learner(few.dataloaders(bs=32, per_class=4, seed=0, num_workers=0), Two(8, 4), TripletLoss())
    with learn.no_bar(), pytest.raises(ValueError, match='The model gives a tuple, and not embeddings'): learn.fit(1)

def test_labels_are_as_many_as_items():
    ds = torch.utils.data.TensorDataset(torch.arange(60), torch.arange(60)//5)
    for y in (torch.arange(48)//5, torch.arange(70)//5):
        with pytest.raises(ValueError, match=f'There are {len(y)} `labels` for 60 items'): BalancedDL(ds, bs=8, labels=y, shuffle=True)
    with pytest.raises(ValueError, match=r'not of shape \(60, 1\)'): BalancedSampler((torch.arange(60)//5)[:,None], bs=8)
