"Heads that start from the data, features and what they were worth, and the way from them: what reads badly in the notebooks"
import json, logging, shutil
from abc import ABC
from copy import deepcopy
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
import numpy as np, pandas as pd, pytest, timm, torch
import torch.nn.functional as F
from fastai.vision.all import *
from dmlfast.all import *
from dmlfast.models.embedder import mlp_head
from dmlfast.models.heads import lda_head, pca_head
from dmlfast.train.columns import is_fitting
from dmlfast.train.features import body_features, measured_dl, train_features
from dmlfast.data.batches import labels_of
from dmlfast.train.baseline import choose_shrinkage, start_head
from dmlfast.train.gain import narrow_head
from dmlfast.train.export import preprocess_of
from dmlfast.train.transfer import halves
from dmlfast.study.checks import with_settings
from dmlfast.train.baseline import _halves
from dmlfast.train.features import _kept, body_key, body_state, collect, items_key, said_of, weights_hash

@pytest.fixture(scope='module')
def body(few, tmp_path_factory):
    "Weights of a body that was trained a little"
    set_seed(0)
    learn = metric_learner(few.dataloaders(bs=32, per_class=4, seed=0, num_workers=0), 'test_resnet', TripletLoss(), emb_sz=16,
        pretrained=False)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2)
    file = tmp_path_factory.mktemp('body')/'body.pth'
    torch.save(learn.model.body.state_dict(), file)
    return file

@pytest.fixture
def quiet(few, body, tmp_path):
    "Function that makes a learner with this body, and prints nothing"
    def _make(loss=None, seed=0, dls=None, **kwargs):
        set_seed(seed)
        dls = dls or few.dataloaders(bs=32, per_class=4, seed=seed, num_workers=0)
        learn = metric_learner(dls, 'test_resnet', loss or TripletLoss(), **{**dict(weights=body, emb_sz=16, path=tmp_path), **kwargs})
        learn.remove_cbs([o for o in learn.cbs if type(o).__name__=='ProgressCallback'])
        learn.logger = sys.modules['fastai.learner'].noop
        return learn
    return _make

def map_r(z, y): return evaluate_retrieval(F.normalize(z.float()), y, metrics=['map@r'], n_boot=1)['map@r']

# when the head starts

@pytest.mark.filterwarnings('ignore:.*a rate that is found in this way')
def test_a_head_is_saved_after_it_started(quiet):
    "`save('init')` before anything else, as is usual with fastai, and `load` after `lr_find` or into another learner"
    learn = quiet()
    want = quiet().embed(bar=False)[0]
    learn.save('init')
    learn.lr_find(num_it=3, show_plot=False)
    assert torch.allclose(learn.load('init').embed(bar=False)[0], want, atol=1e-5)
    assert torch.allclose(quiet().load('init').embed(bar=False)[0], want, atol=1e-5)

def test_other_validation_images_have_rows_of_their_own(quiet, few):
    learn = quiet()
    learn.fit(1, 1e-7)
    was = learn.head_start.rows
    other = MetricDataset(few.df.assign(split=few.df.split.replace(dict(val='test', test='val'))), few.path, 'few', size=None, flip=False)
    learn.dls = other.dataloaders(bs=32, per_class=4, seed=0, num_workers=0)
    learn.fit(1, 1e-7)
    rows = learn.head_start.rows
    assert rows['features']['scores']['map@r']==pytest.approx(learn.baseline()['map@r'])
    assert rows['features']['scores']!=was['features']['scores']
    assert 'start' not in rows # the head has moved on
    learn.fit_head(1)
    assert learn.head_start.rows is rows

def test_new_loaders_of_the_same_images_keep_the_rows(quiet, few):
    learn = quiet()
    learn.fit(1, 1e-7)
    rows = learn.head_start.rows
    learn.dls = few.dataloaders(bs=16, per_class=4, seed=3, num_workers=0)
    learn.fit(1, 1e-7)
    assert learn.head_start.rows is rows and {*rows}=={'features','start'}

def test_the_rows_of_a_head_that_is_trained_first(quiet):
    "Above the first epoch on features, as above one on images, which writes them no second time; and of the original body"
    learn,want = quiet(),quiet()
    want.fit(1, 1e-7)
    learn.fit_head(2, .01)
    rows,was = learn.head_start.rows,want.head_start.rows
    assert {*rows}=={'features','start'}
    for k in rows: assert rows[k]['scores']==pytest.approx(was[k]['scores'], abs=1e-3)
    learn.fit(1, 1e-7)
    assert learn.head_start.rows is rows
    moved,columns = quiet(),quiet().retrieval_metrics
    moved.remove_cb(moved.retrieval_metrics)
    moved.fit(1, .1)
    moved.add_cb(columns).fit_head(1)
    rows = moved.head_start.rows
    assert {*rows}=={'features'} and rows['features']['scores']==pytest.approx(was['features']['scores'], abs=1e-3)

def test_a_data_set_may_have_images_and_features_of_its_own(quiet, few):
    "Loaders pass on what is asked of them to their data sets"
    class Own:
        def __init__(self, ds): self.ds,self.images,self.features = ds,['a list'],[1,2]
        def __len__(self): return len(self.ds)
        def __getitem__(self, i): return self.ds[i]
    usual = few.dataloaders(bs=32, per_class=4, seed=0, num_workers=0)
    tfms = dict(num_workers=0, after_item=ToTensor(), after_batch=IntToFloatTensor())
    train = BalancedDL(Own(usual.train_ds), bs=32, per_class=4, seed=0, shuffle=True, labels=labels_of(usual.train_ds), **tfms)
    learn = quiet(dls=DataLoaders(train, TfmdDL(Own(usual.valid_ds), bs=32, **tfms)))
    for i in range(2): learn.fit(1, 1e-7)
    want = quiet()
    want.fit(1, 1e-7)
    rows = learn.head_start.rows
    assert {*rows}=={'features','start'}
    for k in rows: assert rows[k]['scores']==pytest.approx(want.head_start.rows[k]['scores'], abs=1e-3)

def test_the_size_of_the_head_is_no_remedy_for_a_second_fit(quiet):
    "Where the head was trained before, that the first one began low says nothing of this training"
    learn = quiet(emb_sz=4)
    learn.fit(1, 1e-7)
    learn.head_start.rows = dict(features=dict(scores={'recall@1':.6}), start=dict(scores={'recall@1':.5}))
    assert 'raise `emb_sz`' in narrow_head(learn, .55)
    learn.fit_head(1, .01)
    learn.fit(1, 1e-7)
    assert learn.head_start.rows['start']['scores']['recall@1']==.5 and narrow_head(learn, .55) is None

def test_a_loss_that_takes_the_place_of_another_starts_from_the_data(quiet):
    "From the embeddings that there are, as the first would; and not where its weights were loaded"
    want,learn = quiet(ArcFaceLoss()),quiet()
    for o in (want,learn): o.start_head()
    learn.loss_func = ArcFaceLoss()
    learn.start_head()
    assert torch.allclose(learn.loss_func.proxies, want.loss_func.proxies, atol=1e-5)
    state = {k:v+1 if 'proxies' in k else v for k,v in learn.model.state_dict().items()}
    learn.loss_func = ArcFaceLoss()
    learn.model.load_state_dict(state)
    learn.start_head()
    assert torch.allclose(learn.loss_func.proxies, want.loss_func.proxies+1, atol=1e-5)

def test_a_copy_knows_its_features_and_an_export_does_not(quiet, tmp_path):
    learn = quiet()
    copy = deepcopy(learn)
    copy.fit(1, 1e-7)
    assert {*copy.head_start.rows}=={'features','start'} and copy.gain().b['map@r']==pytest.approx(learn.baseline()['map@r'])
    copy.export('a.pkl')
    assert copy.head_start.origin is not None and copy.head_start.rows
    again = load_learner(copy.path/'a.pkl')
    assert again.head_start.origin is None and not again.head_start.rows

def test_a_head_that_no_closed_form_can_fill_is_refused(quiet):
    with pytest.raises(ValueError, match=r"`init='lda'` fills a linear layer at the end of the head, and this head ends in ReLU\(\)"):
        quiet(head=lambda i,o: nn.Sequential(nn.Linear(i, o), nn.ReLU()), init='lda')

# heads

def test_lda_is_what_its_definition_says():
    "Against the definition with an inverse and a singular value decomposition, up to the signs of rows"
    g = torch.Generator().manual_seed(0)
    X,y = torch.randn(40, 6, generator=g).double(),torch.arange(40).sqrt().long() # classes of 1 to 11
    W,mu = lda_head(X, y, 3, s=.3)
    D = X-torch.stack([X[y==c].mean(0) for c in range(7)])[y]
    S = D.T@D/40
    L = torch.linalg.cholesky(torch.linalg.inv(.7*S+.3*S.diagonal().mean()*torch.eye(6).double()))
    V = torch.linalg.svd((X-X.mean(0))@L, full_matrices=False)[2][:3]@L.T
    V = V/V.norm(dim=1).mean()
    assert torch.allclose((W*V).sum(1).abs(), V.norm(dim=1)**2, rtol=1e-8) and torch.allclose(mu, X.mean(0))

def test_shrinkage_is_judged_on_classes_that_it_was_not_fitted_to():
    "Half of the classes fit, the other half score, and the other way round"
    g = torch.Generator().manual_seed(0)
    y = torch.arange(64)%8
    X = 2*torch.randn(8, 6, generator=g)[y]+torch.randn(64, 6, generator=g)*torch.arange(1, 7)
    s,scores = choose_shrinkage(X, y, 3)
    a,b = (torch.isin(y, o) for o in _halves(y.unique()))
    def score(fit, held, s):
        W,mu = lda_head(X[fit], y[fit], 3, s)
        return map_r((X[held]-mu.float())@W.float().T, y[held])
    want = {o:(score(a, b, o)+score(b, a, o))/2 for o in (.05,.1,.3,.5,.7,.9)}
    assert scores==pytest.approx(want, abs=1e-6) and s==max(want, key=want.get) and len(set(want.values()))>3

def test_pca_is_that_of_scikit_learn():
    from sklearn.decomposition import PCA
    X = np.random.default_rng(0).normal(size=(50,7))@np.diag(range(1,8))
    W,mu = pca_head(torch.from_numpy(X), 4, q=0)
    V = torch.from_numpy(PCA(4).fit(X).components_)
    assert torch.allclose((W*V).sum(1).abs(), torch.ones(4).double(), atol=1e-8)

def test_more_numbers_than_images_are_kept():
    "With as many numbers as features, distances of unseen images do not shrink in the directions in which few images do not vary"
    g = torch.Generator().manual_seed(0)
    X,y = torch.randn(12, 30, generator=g),torch.arange(12)%3
    W,mu = lda_head(X, y, s=.9)
    assert W.shape==(30,30) and torch.linalg.matrix_rank(W)==30
    assert pca_head(X, 30)[0].shape==(30,30) and pca_head(X, 30)[0].norm(dim=1).max()<3

def flat_features(rank, n, seed=0, d=1280):
    "What a body makes of images that are too small for it: most features constant, the others of a low rank, each image there twice"
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n)//8
    on = torch.rand(d, generator=g)<.13
    X = torch.rand(d, generator=g).repeat(n, 1)
    z = torch.randn(n//8, rank, generator=g)[y]+.3*torch.randn(n, rank, generator=g)
    X[:,on] = F.relu6(z@torch.randn(rank, int(on.sum()), generator=g))
    X[1::2] = X[::2]
    return X,y

@pytest.mark.parametrize('rank', [1,2,5,10])
def test_features_that_hardly_vary(rank):
    "The head starts, and knows the classes nearly as well as the features do"
    X,y = flat_features(rank, 320)
    for init in ('lda','pca'):
        head = nn.Linear(1280, 64)
        assert start_head(head, X, y, init).startswith(f'The head starts from {init.upper()} of 320')
        assert head.weight.isfinite().all() and map_r(head(X).detach(), y)>map_r(X-X.mean(0), y)-.02
    X,y = flat_features(rank, 64)
    for scale in (1e-4,1e-30): assert lda_head(X*scale, y, 64)[0].isfinite().all() and pca_head(X*scale, 64)[0].isfinite().all()
    assert pca_head(X[:1].repeat(8, 1), 64)[0].isfinite().all()

def test_a_hidden_layer_that_gives_the_same_for_all_images():
    head = mlp_head(6, 4, 8)
    nn.init.constant_(head[0].bias, -1e3)
    was = head[2].weight.clone()
    assert start_head(head, torch.randn(16, 6), torch.arange(16)//4).startswith('The features of all training images are the same')
    assert torch.equal(head[2].weight, was)

@pytest.mark.parametrize('kind', ['linear','bnneck','mlp'])
def test_every_head_starts_better_than_at_random(kind, quiet, tmp_path):
    "For a body that knows nothing of these classes"
    set_seed(0)
    torch.save(Embedder('test_resnet', pretrained=False).body.state_dict(), tmp_path/'b.pth')
    learn,rand = (quiet(head=kind, weights=tmp_path/'b.pth', emb_sz=32, **kwargs) for kwargs in ({},dict(init='random')))
    start,random = (o.evaluate(metrics=['map@r'])['map@r'] for o in (learn,rand))
    assert start>1.1*random and 'LDA' in learn.head_start.said

def test_the_same_start_twice_and_no_second_start(quiet, tmp_path):
    a,b = quiet(),quiet()
    a.start_head(), b.start_head()
    assert all(torch.equal(v, b.model.state_dict()[k]) for k,v in a.model.state_dict().items() if k.startswith('head'))
    with torch.no_grad(): a.model.head.weight += 1
    was = a.model.head.weight.clone()
    a.embed(), a.start_head()
    assert torch.equal(a.model.head.weight, was)
    a.save('x')
    c = quiet().load('x')
    c.embed()
    assert torch.equal(c.model.head.weight, was) and not c.head_start.said # what is loaded does not wait

def test_the_start_belongs_to_the_weights(quiet, few, tmp_path):
    "An export before any fit holds it, and lr_find begins with it and puts it back"
    learn = quiet()
    finder = learn.export_embedder(tmp_path/'e')
    fns = few.items('val')[:20]
    assert torch.allclose(torch.as_tensor(finder.embed(fns)), learn.embed(learn.dls.test_dl(fns, with_labels=True))[0], atol=2e-3)
    learn = quiet()
    with pytest.warns(UserWarning, match='leave the rate out'): learn.lr_find(num_it=5, show_plot=False)
    other = quiet()
    other.start_head()
    assert torch.equal(learn.model.head.weight.cpu(), other.model.head.weight.cpu())

def test_rows_and_start_leave_the_random_generators_alone(quiet):
    "With a head that does not start from the data, the callback changes nothing in a training"
    res = []
    for bare in (False,True):
        _kept.clear()
        learn = quiet(init='random')
        if bare: learn.remove_cb(learn.head_start)
        learn.fit(1, 1e-3)
        res.append(torch.stack(list(learn.recorder.losses)))
    assert torch.equal(*res)

def test_faults_of_features(quiet, few):
    "One image a class, features that are all the same or not finite"
    df = few.df.copy()
    train = df[df.split=='train'].groupby('label').head(1)
    with pytest.warns(UserWarning, match='one image only'):
        one = MetricDataset(pd.concat([train, df[df.split=='val']]), few.path, 'one', size=None, flip=False)
    learn = quiet(ProxyNCALoss(), dls=one.dataloaders(bs=8, per_class=1, num_workers=0, seed=0))
    learn.start_head()
    assert 'PCA of' in learn.head_start.said and 'LDA needs' in learn.head_start.said
    learn = quiet()
    for p in learn.model.body.parameters(): p.data.zero_()
    learn.start_head()
    assert 'keeps its random start' in learn.head_start.said
    learn = quiet()
    next(iter(learn.model.body.parameters())).data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r'features of \d+ of \d+ training images are not finite, the first of .*png'): learn.start_head()

def test_items_of_a_table(few, body, tmp_path):
    "A `DataBlock` on a DataFrame: its training items are measured, and divided by class"
    df = few.df[few.df.split!='test'].reset_index(drop=True)
    block = DataBlock(blocks=(ImageBlock,ClassBlock), get_x=ColReader('path', pref=str(few.path)+'/'), get_y=ColReader('label'),
        splitter=ClassSplitter('label', n_valid=8), item_tfms=Resize(24))
    dls = block.dataloaders(df, bs=16, per_class=4, dl_type=BalancedDL, num_workers=0)
    learn = metric_learner(dls, 'test_resnet', TripletLoss(), emb_sz=8, weights=body, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        assert learn.embed()[0].shape[1]==8 and 'LDA' in learn.head_start.said
        learn.fit_head(1)
        half = halves(dls)
        assert half.n_train_classes*2-1<=dls.n_train_classes<=half.n_train_classes*2
        assert len(half.valid.dataset)+len(half.train_ds)==len(dls.train_ds)

# defaults

def test_defaults_of_a_trained_body(quiet, make_learner):
    learn = quiet()
    assert learn.model.freeze_bn is True and learn.group_rates(3.)==slice(1., 3.) and learn.lr==1e-4
    assert learn.group_rates(slice(1e-3))==slice(1e-3) # a slice says otherwise
    rand = quiet(init='random')
    assert rand.model.pending is None and rand.group_rates(1.)==slice(.1, 1.) and rand.lr==defaults.lr
    plain = make_learner()
    assert plain.model.freeze_bn is False and plain.group_rates(1.)==1. and not hasattr(plain, 'head_start') and plain.lr==defaults.lr
    assert quiet(freeze_bn=False, lr=.1).lr==.1 and quiet(freeze_bn=False).model.freeze_bn is False

def test_few_images_keep_all_numbers(quiet):
    "A head from fewer than 512 images has as many numbers as there are features, unless a size is given"
    learn = quiet(emb_sz=None)
    assert len(learn.dls.train_ds)<512 and learn.model.emb_sz==learn.model.n_features==learn.embed()[0].shape[1]
    assert quiet(emb_sz=None, init='random').model.emb_sz==128

def test_recipes_keep_their_start(few, body):
    for name in ('triplet','margin'):
        learn = metric_learner(few.dataloaders(bs=32, per_class=4, num_workers=0), 'test_resnet', weights=body, recipe=name)
        assert learn.model.pending is None and learn.body_share==1 and learn.group_rates(1.)==1.

class Fits(Callback):
    "What is fitted, one after the other: `'features'` or `'images'`, for how many epochs, and with how much trained"
    def __init__(self): self.seen = []
    def before_fit(self):
        if not is_fitting(self.learn): return
        what = 'features' if hasattr(self.dls.train, 'features') else 'images'
        self.seen.append((what, self.n_epoch, any(p.requires_grad for k,p in self.model.named_parameters() if 'patch_embed' in k)))

@pytest.mark.parametrize('name,epochs', [('transfer',3), ('lora',5), ('arcface',3), ('recallk',10)])
def test_recipes_for_a_trained_body(name, epochs, few, tmp_path):
    "The head on features, then LoRA if asked for, then everything; and of the way the best"
    if name=='lora': pytest.importorskip('peft', reason='LoRA is an extra')
    set_seed(0)
    tiny,r = dict(patch_size=8, depth=1, embed_dim=32, num_heads=2),recipes[name]
    body = tmp_path/'body.pth'
    torch.save(timm.create_model('vit_tiny_patch16_224', num_classes=0, img_size=24, **tiny).state_dict(), body)
    dls = few.dataloaders(**{**r.data, 'bs':32, 'size':None}, num_workers=0)
    learn = metric_learner(dls, 'vit_tiny_patch16_224', weights=body, recipe=name, model_kwargs=tiny, cbs=(fits := Fits()), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(1, head_epochs=2)
    assert fits.seen==[('features',2,True), ('images',1,name!='lora')]
    assert r.fit['n_epoch']==epochs and r.fit['head_epochs']==(20 if name=='lora' else 10)
    assert learn.between['kept'] in (0,.25,.5,.75,1) and learn.model.freeze_bn is True
    assert (learn.group_rates(None) if name=='lora' else learn.model.emb_sz)==(slice(1e-3,1e-4) if name=='lora' else 128)
    assert type(learn.loss_func).__name__==dict(arcface='ArcFaceLoss', recallk='RecallAtKLoss').get(name, 'DRTripletLoss')
    assert any(isinstance(o, LargeBatch) for o in learn.cbs)==(name=='recallk')

def test_a_recipe_chooses_nothing_by_test_classes(few, body):
    dls = few.dataloaders(bs=32, per_class=4, valid='test', num_workers=0)
    learn = metric_learner(dls, 'test_resnet', weights=body, recipe='transfer')
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(1, head_epochs=0)
    assert learn.between is None and not any(isinstance(o, Interpolate) for o in learn.cbs)

class SeenRates(Callback):
    "The learning rates of every step"
    def before_fit(self): self.lrs = []
    def before_step(self): self.lrs.append([h['lr'] for h in self.opt.hypers])

@pytest.mark.parametrize('fit', ['fit','fit_one_cycle','fit_flat_cos','fine_tune','fit_recipe'])
def test_one_rate_gives_the_body_a_third(fit, quiet):
    learn = quiet(cbs=SeenRates())
    getattr(learn, fit)(1, 3e-4)
    body,head = learn.seen_rates.lrs[len(learn.seen_rates.lrs)//3]
    assert body==pytest.approx(head/3)

def test_proxies_begin_at_the_means_of_their_classes(quiet):
    learn = quiet(ProxyNCALoss())
    learn.start_head()
    embs,y = learn.embed(measured_dl(learn.dls))
    means = F.normalize(torch.stack([embs[y==c].mean(0) for c in range(learn.dls.n_train_classes)]))
    assert torch.allclose(learn.loss_func.proxies.detach().cpu(), means, atol=1e-4)

# features

def test_features_in_a_file(quiet, tmp_path):
    "The same to half precision; cut off or of another body, they are made anew"
    learn = quiet()
    kwargs = dict(views=2, memory=0, folder=tmp_path/'f')
    a = train_features(learn.model, learn.dls, views=2)
    b = train_features(learn.model, learn.dls, **kwargs)
    whole = b.rows([3,0,7])
    idx,view = np.array([3,0,7]),np.array([1,0,1])
    assert torch.allclose(a.rows(idx, view), b.rows(idx, view), rtol=1e-2, atol=1e-3)
    file = next((tmp_path/'f').glob('*.npy'))
    made = file.stat().st_mtime_ns
    train_features(learn.model, learn.dls, **kwargs)
    assert file.stat().st_mtime_ns==made
    file.write_bytes(file.read_bytes()[:100])
    c = train_features(learn.model, learn.dls, **kwargs)
    assert torch.equal(c.rows(idx), whole)
    with torch.no_grad(): next(iter(learn.model.body.parameters())).mul_(2)
    train_features(learn.model, learn.dls, **kwargs)
    assert len(list((tmp_path/'f').glob('*.npy')))==2

def test_another_image_under_the_same_name(quiet, few, tmp_path):
    "Kept features go by what the files are, and not by their names alone"
    shutil.copytree(few.path, tmp_path/'copy')
    ds = MetricDataset(few.df.copy(), tmp_path/'copy', 'copy', size=None, flip=False)
    learn = quiet(dls=ds.dataloaders(bs=32, per_class=4, num_workers=0))
    X,_ = body_features(learn.model, learn.dls.valid)
    fn = learn.dls.valid.dataset.items[0]
    Image.new('RGB', (24,24), (255,0,0)).save(fn)
    Y,_ = body_features(learn.model, learn.dls.valid)
    assert not torch.equal(X[0], Y[0]) and torch.allclose(X[1:], Y[1:], atol=1e-5)

def test_features_are_kept_whatever_transforms_drew(quiet, few):
    "fastai's crops remember the last image; that is no other transform"
    ds = MetricDataset(few.df.copy(), few.path, 'few', size=16) # a random crop in training, a central one in validation
    learn = quiet(dls=ds.dataloaders(bs=32, per_class=4, num_workers=0))
    dls = [measured_dl(learn.dls),learn.dls.valid]
    was = [items_key(o) for o in dls]
    learn.dls.one_batch(), learn.dls.valid.one_batch()
    assert [items_key(o) for o in dls]==was and None not in was and was[0]!=was[1]

def _by(k):
    def _darker(o:PILImage, j=1): return PILImage.create(np.array(o)//k//j)
    return _darker

class Holds(Transform):
    def __init__(self, what): self.what = what
    def encodes(self, o:PILImage): return o

class Colour(Transform):
    "Its settings have names that fastai's transforms give to what they draw"
    def __init__(self, coeffs): self.coeffs,self.do,self.log = coeffs,coeffs>.5,logging.getLogger('colour')
    def encodes(self, o:PILImage): return o

@dataclass
class Plain(ABC):
    gain:int

def _edited(code):
    "A class as a cell of a notebook defines it"
    names = dict(Transform=Transform, PILImage=PILImage, __name__='__main__')
    exec(f'class Own(Transform):\n    def encodes(self, o:PILImage): return {code}', names)
    return names['Own']()

@pytest.mark.parametrize('make,args', [(lambda o: Transform(_by(o)),(1,2)), (lambda o: Holds(partial(_by(1), j=o)),(1,2)),
    (Holds,([0,0,9,9],[0,0,9,8])), (lambda o: Holds(dict(a=o)),(1,2)), (lambda o: Holds(np.arange(o)),(8,9)),
    (lambda o: Holds(torch.arange(2000)*o),(1,2)), (lambda o: Holds(_by(o)),(1,2)), (lambda o: Holds(pd.Series([o])),(1,2)),
    (_edited,('o','o.copy()')), (Colour,(1.,.1)), (lambda o: Holds(Plain(o)),(1,2)), (lambda o: Holds(SimpleNamespace(idx=o)),(0,1))],
    ids=range(12))
def test_a_transform_is_named_by_all_that_it_holds(few, make, args):
    "Lists, arrays, captured values and code; equal ones have one name"
    def _key(o): return items_key(few.dataloaders(bs=32, per_class=4, num_workers=0, item_tfms=[make(o)]).valid)
    a,b = args
    assert _key(a)==_key(a) and _key(a)!=_key(b) and None not in (_key(a),_key(b))

def test_functions_that_call_each_other_are_said_once():
    "Sixty functions, each of which calls all later ones: along every path there would be 2^58 of them"
    names = dict(__name__='__main__')
    for i in range(60): exec(f"def f{i}(x): return x{''.join(f'+f{j}(x)' for j in range(i+1, 60))}", names)
    text = said_of(names['f0'])
    exec('def f59(x): return 2*x', names)
    assert len(text)<10**6 and said_of(names['f0'])!=text

def test_ones_own_modules_are_read(monkeypatch):
    "A constant in them, and a function that another one calls"
    tools = ModuleType('my_tools')
    exec('SIZE = 8\ndef shrink(x): return x[:SIZE]', tools.__dict__)
    names = dict(my_tools=tools, __name__='__main__')
    exec('def f(x): return my_tools.shrink(x)', names)
    monkeypatch.setitem(sys.modules, 'my_tools', tools)
    was = said_of(names['f'])
    assert said_of(names['f'])==was
    tools.SIZE = 16
    assert said_of(names['f'])!=was

def test_augmented_views_that_cannot_be_named_are_computed_again(quiet, few, tmp_path):
    class Gain(Transform):
        split_idx = 0
        def __init__(self, by, file): self.by,self.file = by,file
        def encodes(self, o:TensorImage): return o*self.by
    with open(tmp_path/'a', 'w') as f:
        a,b = (train_features(quiet().model, few.dataloaders(bs=32, per_class=4, num_workers=0, seed=0, batch_tfms=[Gain(o, f)]), views=2,
            memory=0, folder=tmp_path).X for o in (1.,.1))
    assert np.array_equal(a[0], b[0]) and np.abs(a[1]-b[1]).max()>1e-3

def test_what_opens_images_is_part_of_the_key(few):
    "Two folders with the same ids in a `DataBlock`"
    fns = sorted((few.path).rglob('*.png'))[:8]
    def _key(at):
        return items_key(DataBlock((ImageBlock,CategoryBlock), get_items=lambda o: [*'0123'], get_x=lambda o: at[int(o)],
            get_y=lambda o: o in '01', splitter=IndexSplitter([1,3])).dataloaders(few.path, bs=2, num_workers=0).valid)
    assert _key(fns[:4])==_key(fns[:4])!=_key(fns[4:])

def test_what_cannot_be_named_is_not_kept(few, tmp_path):
    with open(tmp_path/'a', 'w') as f:
        dls = few.dataloaders(bs=32, per_class=4, num_workers=0, item_tfms=[Holds(f)])
        assert items_key(dls.valid) is None

def test_training_augmentation_of_a_file_of_features(quiet, few, tmp_path):
    "With another range of angles, augmented views are others; what is measured is not"
    def _dls(o): return few.dataloaders(bs=32, per_class=4, num_workers=0, batch_tfms=[Rotate(o), Hue(.1)])
    assert items_key(_dls(5).train)==items_key(_dls(5).train)!=items_key(_dls(90).train)
    hue = few.dataloaders(bs=32, per_class=4, num_workers=0, batch_tfms=[Hue(.2)]).valid
    assert items_key(hue)==items_key(few.dataloaders(bs=32, per_class=4, num_workers=0, batch_tfms=[Hue(.1)]).valid)

def test_a_head_on_features_learns_as_under_a_frozen_body(quiet, few):
    "Step for step, where images are not augmented"
    def _dls(): return few.dataloaders(bs=32, per_class=4, seed=0, num_workers=0, item_tfms=[])
    a = quiet(dls=_dls())
    a.fit_head(1, 1e-2)
    b = quiet(dls=_dls(), train_bn=False) # fastai trains the weights of batch norm in a frozen body otherwise
    b.freeze()
    b.fit_one_cycle(1, slice(1e-2,1e-2))
    assert torch.allclose(torch.stack(list(a.recorder.losses)), torch.stack(list(b.recorder.losses)), rtol=1e-3, atol=1e-5)
    assert torch.allclose(a.model.head.weight.cpu(), b.model.head.weight.cpu(), atol=1e-4)

def test_fit_head_leaves_everything_else(quiet):
    "The body, the loaders and the optimiser; what makes views of images waits"
    learn = quiet(cbs=SelfSupervisedRanking(m=4))
    dls,was = learn.dls,{k:v.clone() for k,v in body_state(learn.model).items()}
    learn.fit_head(1, cbs=(save := SaveModelCallback('recall@1', fname='h')))
    assert learn.dls is dls and hasattr(learn, 'self_supervised_ranking') and save.best>0
    assert all(torch.equal(v, was[k]) for k,v in body_state(learn.model).items())
    learn.fit_one_cycle(1)
    assert 'ssr_loss' in learn.recorder.metric_names
    with pytest.raises(ValueError, match='nothing to train'): quiet(head='identity', emb_sz=None).fit_head(1)

# gain

def test_gain_is_the_paired_difference(quiet):
    "Features before the training, by hand, and the embedding after it"
    learn = quiet()
    X,y = collect(learn.model, learn.split_dl('test'), learn.model.features)
    learn.fit_one_cycle(1, 1e-2)
    g = learn.gain('test', ['recall@1','map@r'])
    by_hand = learn.evaluate('test', ['recall@1','map@r'])-evaluate_retrieval(X, y, metrics=['recall@1','map@r'])
    assert g['map@r']==pytest.approx(by_hand['map@r'], abs=1e-6) and g.interval('map@r')==pytest.approx(by_hand.interval('map@r'), abs=1e-6)
    assert g.to_dict()['features']['recall@1']==pytest.approx(learn.baseline('test')['recall@1'])
    now = body_state(learn.model)
    assert not all(torch.equal(v, now[k]) for k,v in learn.head_start.origin.items()) # the trained body is back in its place

def test_verdicts_and_sentences():
    from dmlfast.train.gain import Gain
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(40), 10)
    base = rng.random(400)
    def _of(v): return RetrievalResult({'recall@1':v}, labels)
    up,down,same = (Gain(_of(base+o), _of(base), 128, 1280, 'Do this.') for o in (.1,-.1,rng.normal(size=400)*.1))
    assert up.verdict()=='raised'
    assert up.sentence.startswith('Training raised recall@1 by 10.0 points (95 % interval 10.0 to 10.0) over the features')
    assert up.sentence.endswith('a tenth of the numbers.')
    assert up.sentence in repr(up) and up.sentence in up._repr_html_() # in a script and in a notebook
    assert down.verdict()=='lowered' and down.sentence.endswith('Do this.') and 'lowered recall@1 by 10.0 points' in down.sentence
    assert same.verdict()=='kept' and 'within noise' in same.sentence and 'Do this' not in same.sentence
    few = Gain(RetrievalResult({'recall@1':base}, labels%5), RetrievalResult({'recall@1':base}, labels%5))
    assert 'no interval' in few.sentence and few.verdict()=='kept'

def test_a_loaded_learner_does_not_know_its_features(quiet, tmp_path):
    learn = quiet()
    learn.fit_one_cycle(1)
    learn.export('l.pkl')
    assert (tmp_path/'l.pkl').stat().st_size<3*sum(v.nbytes for v in learn.model.state_dict().values())+10**6
    loaded = load_learner(tmp_path/'l.pkl')
    with pytest.raises(ValueError, match='not known here'): loaded.gain(learn.dls.valid)

# between start and end

def test_interpolate_refuses_what_it_cannot_choose_by(quiet, few):
    for valid,said in ((None,'there are none'), ('test','test classes')):
        learn = quiet(dls=few.dataloaders(bs=32, per_class=4, num_workers=0, valid=valid))
        with pytest.raises(ValueError, match=said): learn.fit_one_cycle(1, cbs=Interpolate())
    with pytest.raises(ValueError, match='from 0'): Interpolate(at=(0,2))

def test_interpolated_weights(quiet):
    "Half way is the mean of both ends; the curve has the scores that these weights have"
    learn = quiet()
    learn.start_head()
    start = {k:v.clone() for k,v in learn.model.state_dict().items()}
    learn.fit_one_cycle(1, 1e-2)
    end = {k:v.clone() for k,v in learn.model.state_dict().items()}
    again = quiet()
    again.fit_one_cycle(1, 1e-2, cbs=(cb := Interpolate(at=(.5,))))
    now = again.model.state_dict()
    assert all(torch.allclose(now[k], (start[k]+end[k])/2, atol=1e-5) for k in now if k.startswith(('head','body'))
        and now[k].is_floating_point())
    assert cb.curve[.5]==pytest.approx(again.evaluate()['map@r'], abs=1e-4) and cb.chosen==.5

# the transfer

def test_what_a_transfer_decides_can_be_given(quiet):
    learn = quiet()
    learn.fit_transfer(1, head_epochs=0, body_lr=0)
    assert learn.transfer['regime']=='frozen' and not getattr(learn.recorder, 'losses', None)
    learn = quiet(cbs=SeenRates())
    learn.fit_transfer(1, lr=1e-3, body_lr=.5, freeze_bn=False, head_epochs=1)
    body,head = learn.seen_rates.lrs[3]
    assert body==pytest.approx(head/2) and learn.model.freeze_bn is False and 'how_far' not in learn.transfer
    assert json.loads(json.dumps(learn.transfer))['kept'] in (0,.25,.5,.75,1)

def test_test_classes_are_not_chosen_by(quiet, few, capsys):
    learn = quiet(dls=few.dataloaders(bs=32, per_class=4, seed=0, num_workers=0, valid='test'))
    learn.logger = print
    with learn.no_bar(): g = learn.fit_transfer(1, head_epochs=1)
    out = capsys.readouterr().out
    assert 'on training classes held out' in out and 'kept' not in learn.transfer and 'were chosen on these classes' not in out
    assert g.a.labels.shape==(len(few.items('test')),)

def test_few_validation_classes_are_said(quiet, few, capsys):
    "With one class every score is 1"
    names = sorted(set(few.df.label[few.df.split=='val']))
    says = 'with one validation class all scores are 1','to choose by 2 validation classes is little more than a guess'
    for keep,said in enumerate(says, 1):
        ds = MetricDataset(few.df[(few.df.split!='val') | few.df.label.isin(names[:keep])], few.path, size=None, flip=False)
        learn = quiet(dls=ds.dataloaders(bs=32, per_class=4, seed=0, num_workers=0))
        learn.logger = print
        with learn.no_bar(): learn.plan_transfer(1, body_lr=0, head_epochs=0)
        assert said in capsys.readouterr().out
        assert (learn.evaluate(metrics=['map@r'])['map@r']==1)==(keep==1)

def test_not_below_the_start(quiet):
    "On the validation classes, whatever the rate does"
    learn = quiet()
    start = learn.evaluate()['map@r']
    learn.fit_transfer(1, lr=1., body_lr=1., head_epochs=1)
    assert learn.evaluate()['map@r']>=start-1e-4

def test_a_body_with_random_weights_is_refused(make_learner):
    with pytest.raises(ValueError, match='began with random weights'): make_learner().fit_transfer(1)

class Stop(Callback):
    "Interrupt in an epoch"
    order = 100
    def __init__(self, epoch): self.at = epoch
    def before_epoch(self):
        train,now = self.learn.dls.train,self.epoch==self.at and self.n_epoch==3
        if now and is_fitting(self.learn) and len(train.dataset.items)>0 and not hasattr(train, 'features'):
            raise KeyboardInterrupt

def test_an_interrupted_transfer_goes_on(few, body, tmp_path):
    "The plan is not made again, and the result is that of a run that was not interrupted"
    s = dict(batch=dict(bs=32, per_class=4, num_workers=0), model=dict(arch='test_resnet', weights=str(body), emb_sz=8),
        loss=dict(name='triplet'),
        fit=dict(n_epoch=3, transfer=True, lr=1e-3, head_epochs=1), seed=1)
    whole = train_settings(s, tmp_path/'a', few, plain=True)
    with pytest.raises(KeyboardInterrupt): train_settings(s, tmp_path/'b', few, plain=True, cbs=Stop(2))
    plan = (tmp_path/'b'/'transfer.json').read_bytes()
    again = train_settings(s, tmp_path/'b', few, plain=True, resume=True)
    assert (tmp_path/'b'/'transfer.json').read_bytes()==plan
    assert again['scores']==whole['scores'] and again['transfer']['between']==whole['transfer']['between']
    assert whole['gain']['val']['sentence'] and set(whole['gain']['val']['features'])>={'recall@1','map@r'}

def test_settings_of_a_transfer_that_contradict_each_other():
    ok = dict(loss=dict(name='triplet'), fit=dict(transfer=True))
    check_settings(ok)
    for change,said in (({'fit.sched':'flat'},'fit.sched'), ({'model.pretrained':False},'random weights'), ({'recipe':'triplet'},'recipe'),
        ({'fit.monitor':'map@r'},'fit.monitor')):
        with pytest.raises(ValueError, match=said): check_settings(with_settings(ok, change))

def test_whole_images(few):
    "Nothing is cut off them where they are measured"
    ds = MetricDataset(few.df.copy(), few.path, 'whole', size=16, whole=True)
    steps = preprocess_of(ds.dataloaders(bs=32, per_class=4, num_workers=0)).steps
    assert steps==[('squash', (16,16), 2)] or steps[0][0]=='squash'

def test_other_loaders_number_classes_their_way(quiet, few):
    "Features are kept by image, and class ids are those of the loaders that ask: a gain on test classes after one on validation classes"
    for valid in ('val','test'):
        learn = quiet(dls=few.dataloaders(bs=32, per_class=4, seed=0, num_workers=0, valid=valid))
        g = learn.gain('test')
        assert g.a.labels.tolist()==g.b.labels.tolist()==learn.embed('test')[1].tolist()

def test_halves_have_no_class_in_common(few):
    "All training images, half of the classes to train on and the others to measure on, and none of the held-out ones"
    dls = few.dataloaders(bs=32, per_class=4, seed=0, num_workers=0)
    half = halves(dls)
    train,valid = ({parent_label(o) for o in dl.items} for dl in half.loaders)
    assert not train & valid and train|valid=={parent_label(o) for o in dls.train.items}
    assert len(train)==half.n_train_classes==(len(train|valid)+1)//2
    assert sorted([*half.train.items,*half.valid.items])==sorted(dls.train.items)

def test_halves_are_judged_from_their_own_start(quiet, few):
    "A trial's head has not seen the classes that it is measured on"
    from dmlfast.train.transfer import _trial, _try_head
    learn = quiet(dls=few.dataloaders(bs=32, per_class=4, seed=0, num_workers=0, valid='test'))
    learn.start_head()
    half = halves(learn.dls)
    trial = _trial(learn, half)
    _,before,_ = _try_head(trial, 1)
    X,y = body_features(trial.model, measured_dl(half))
    s,_ = choose_shrinkage(X, y, 16)
    W,mu = lda_head(X, y, 16, s)
    Z,z = body_features(trial.model, half.valid)
    assert before==pytest.approx(map_r((Z-mu)@W.T, z), abs=1e-3)

def test_how_a_body_is_built_decides_its_features(few, body):
    "The same weights with another padding make other features, and are not taken for the same"
    a,b = (Embedder('test_resnet', weights=body) for _ in range(2))
    conv = next(m for m in b.body.modules() if isinstance(m, nn.Conv2d))
    conv.padding = (0,0)
    dl = few.dataloaders(bs=32, per_class=4, num_workers=0).valid
    fs = [body_features(o, dl)[0] for o in (a,b)]
    assert not torch.allclose(*fs) and torch.allclose(fs[1], collect(b, dl, b.features)[0], atol=1e-5)
    assert weights_hash(body_state(a))==weights_hash(body_state(b)) and body_key(a)!=body_key(b)

def test_a_gain_says_what_made_it(quiet):
    "The start of a head, a head, or training"
    learn = quiet()
    assert learn.gain('test').what=='The start of the head'
    learn.fit_head(1, 1e-2)
    assert learn.gain('test').what=='The head'
    learn.fit_one_cycle(1, 1e-2)
    assert learn.gain('test').what=='Training'

def test_faults_are_found_before_anything_is_done(quiet, few):
    learn = quiet()
    for f,said in ((lambda: learn.fit_transfer(0),'1 or more'), (lambda: learn.fit_transfer(1, lr=-1),'greater than 0'),
        (lambda: learn.fit_transfer(1, body_lr=-1),'0 or more'),
            (lambda: learn.fit_head(0),'1 or more'), (lambda: learn.fit_head(1, lr=-1),'greater than 0'),
            (lambda: learn.fit_head(1, views=0),'1 or more'),
            (lambda: Interpolate(metric='mapr'),'no metric'), (lambda: Interpolate(at=()),'numbers from 0')):
        with pytest.raises(ValueError, match=said): f()
    test = quiet(dls=few.dataloaders(bs=32, per_class=4, num_workers=0, valid='test'))
    with pytest.raises(ValueError, match='test classes'): test.fit_one_cycle(1, cbs=Interpolate())
    assert not test.head_start.said # refused before the start was computed

def test_rates_may_be_a_slice(quiet):
    learn = quiet(cbs=SeenRates())
    learn.fit_transfer(1, lr=slice(1e-4,1e-3), head_epochs=0)
    body,head = learn.seen_rates.lrs[3]
    assert head==pytest.approx(10*body)
