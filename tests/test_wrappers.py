"Terms around and beside a loss: by hand, by their definitions, and in a training"
import copy, math, pickle, pytest, torch
from torch import nn
from torch.nn.functional import normalize
from pytorch_metric_learning import losses as pml
from dmlfast.all import *
from dmlfast.losses.base import asking
from dmlfast.retrieval.results import ResultsByLength
from dmlfast.deploy.embedder import Preprocess

f64 = torch.float64

def batch(n=20, d=16, c=5, seed=0, dtype=f64):
    g = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=g, dtype=f64), dim=1).to(dtype),torch.arange(n)%c

LOSSES = dict(triplet=DRTripletLoss, ms=DRMultiSimilarityLoss, contrastive=lambda: ContrastiveLoss(neg_margin=1., gamma=.3),
    npair=NPairLoss, margin=lambda: MarginLoss(miner=None), nca=DRProxyNCALoss, anchor=lambda: ProxyAnchorLoss(gamma=.3),
    sum=lambda: CombinedLoss((TripletLoss(), ProxyNCALoss(), lambda f,y: f.pow(3).sum()), weights=(1,.5,2)))

def made(name, d=16, c=5, wrap=lambda o: o):
    torch.manual_seed(0)
    return wrap(LOSSES[name]()).setup(c, d).double()

def alone(name, loss, d):
    "A loss of its own for embeddings of `d` numbers, with the first `d` numbers of another's class vectors"
    res = made(name, d)
    for (k,p),q in zip(res.named_parameters(), loss.parameters()): p.data = q.data[:,:d].clone() if 'proxies' in k else q.data.clone()
    return res

@pytest.mark.parametrize('name', LOSSES)
def test_matryoshka_is_a_sum_of_losses_of_short_embeddings(name):
    "Values and gradients, at the embeddings before they are scaled and at the weights of the loss"
    z,y = 3*batch()[0],batch()[1]
    loss = made(name, wrap=lambda o: MatryoshkaLoss(o, dims=(16,7,2), weights=(1,.5,3)))
    x = z.clone().requires_grad_()
    got = loss(normalize(x, dim=1) if loss.normalize_embs else x, y)
    got.backward()
    x2 = z.clone().requires_grad_()
    own = [alone(name, loss.loss, d) for d in (16,7,2)]
    want = sum(w*o(normalize(x2[:,:d], dim=1) if o.normalize_embs else x2[:,:d], y) for w,d,o in zip((1,.5,3), (16,7,2), own))
    want.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(x.grad, x2.grad)
    for i,p in enumerate(loss.loss.parameters()):
        by = torch.zeros_like(p)
        for o in own:
            q = [*o.parameters()][i]
            by[tuple(map(slice, q.shape))] += q.grad
        torch.testing.assert_close(p.grad, by)

@pytest.mark.parametrize('emb_sz,dims', [(128,[128,64,32,16]), (10,[10,5,2,1]), (3,[3,1]), (1,[1])])
def test_halves_unless_told(emb_sz, dims): assert [d for d,_ in MatryoshkaLoss(TripletLoss()).lengths(emb_sz)]==dims

@pytest.mark.parametrize('name', LOSSES)
def test_one_value_for_each_row(name):
    f,y = batch()
    loss = made(name, wrap=MatryoshkaLoss)
    loss.reduction = 'none'
    inner = loss.loss
    each = 0
    for d in (16,8,4,2):
        o = alone(name, inner, d)
        o.reduction = 'none'
        each = each+o(normalize(f[:,:d], dim=1) if o.normalize_embs else f[:,:d], y)
    torch.testing.assert_close(loss(f, y), each)
    assert inner.reduction!='none'

@pytest.mark.parametrize('name', LOSSES)
def test_matryoshka_gradcheck(name):
    f,y = batch(8, 8, 3, seed=3)
    loss = made(name, 8, 3, wrap=lambda o: MatryoshkaLoss(o, dims=(8,3)))
    assert torch.autograd.gradcheck(lambda f,*ps: loss(f, y), (f.requires_grad_(),*loss.parameters()), atol=1e-6)

@pytest.mark.parametrize('dtype,tol', [(torch.float32,1e-5), (torch.float16,2e-2), (torch.bfloat16,1e-1)])
@pytest.mark.parametrize('name', LOSSES)
def test_matryoshka_precision(name, dtype, tol):
    f,y = batch(dtype=dtype)
    loss = made(name, wrap=MatryoshkaLoss)
    want = loss(f.double(), y)
    got = loss.float()(f, y)
    assert got.dtype==torch.float32 and abs(got.item()-want.item())<=tol*(1+abs(want.item()))

def test_what_matryoshka_passes_on():
    loss = MatryoshkaLoss(ProxyNCALoss(lr_mult=50.)).setup(5, 16)
    assert loss.seen_only and not loss.compares and loss.repeatable and loss.loss.proxies.shape==(5,16) and loss.asks() is None
    assert lr_mults(nn.Sequential(nn.Linear(2,2), loss))=={loss.loss.proxies:50.}
    f,y = batch(dtype=torch.float32)
    loss.start(f, y)
    torch.testing.assert_close(loss.loss.proxies.detach(), normalize(torch.stack([f[y==c].mean(0) for c in range(5)]), dim=1))
    with pytest.raises(ValueError, match='ProxyNCALoss was made for 5 classes'): loss(f, y+1)
    assert loss.eval()(f, y+1).isnan()
    loss.reduction = 'none'
    assert torch.equal(loss(f, y+1).isnan(), y==4)
    inner = TripletLoss(margin=.4)
    loss = MatryoshkaLoss(inner)
    assert loss.compares and loss.active(f, y)==inner.active(f, y)
    assert asking(loss)==(inner,inner.asks()) and asking(CombinedLoss([loss]), 'gap')[0] is inner
    assert not MatryoshkaLoss(lambda f,y: f.sum()).repeatable and not MatryoshkaLoss(NPairLoss()).normalize_embs
    for o in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))): assert torch.equal(o(f, y), loss(f, y)) and repr(o)==repr(loss)

def test_boundaries_are_shared_by_all_lengths():
    loss = MatryoshkaLoss(MarginLoss(miner=None)).setup(5, 16)
    f,y = batch(dtype=torch.float32)
    loss(f, y).backward()
    assert loss.loss.betas.shape==(5,) and loss.loss.betas.grad.abs().sum()>0

class Centres(ProxyLoss):
    "Two vectors for each class, as a loss with sub-centres has them"
    def setup(self, n_classes=None, emb_sz=None):
        if n_classes: self.n_classes,self.emb_sz,self.proxies = n_classes,emb_sz,nn.Parameter(torch.full((n_classes, 2, emb_sz), 2.))
        return self
    def compute(self, embs, labels): return ((embs[:,None]-self.proxies[labels])**2).sum()

def test_vectors_of_any_shape_are_cut_at_their_last_axis():
    loss = MatryoshkaLoss(Centres(), dims=(4,3)).setup(2, 8)
    loss(torch.eye(8)[:2], torch.tensor([0,1])).backward()
    assert (loss.loss.proxies.grad[...,:3]!=0).all() and (loss.loss.proxies.grad[...,4:]==0).all()

def test_what_matryoshka_cannot_wrap():
    for o in (pml.ProxyAnchorLoss(5, 16), (TripletLoss(), pml.ProxyAnchorLoss(5, 16))):
        with pytest.raises(ValueError, match='ProxyAnchorLoss has weights, and does not say how they are cut'): MatryoshkaLoss(o)
    theirs = pml.ContrastiveLoss()
    f,y = batch()
    torch.testing.assert_close(MatryoshkaLoss(theirs, dims=(16,4))(f, y), theirs(f, y)+theirs(normalize(f[:,:4], dim=1), y))
    torch.testing.assert_close(MatryoshkaLoss(theirs, dims=4, weights=2.)(f, y), MatryoshkaLoss(theirs, dims=(4,), weights=(2.,))(f, y))
    for wrap in (MatryoshkaLoss, lambda o: CombinedLoss((TripletLoss(), o))):
        with pytest.raises(ValueError, match=r'such as ContrastiveLoss\(\), and not its class'): wrap(pml.ContrastiveLoss)
    for kw,says in ((dict(dims=(0,)),'dims must be'), (dict(dims=0),'dims must be'), (dict(dims=(2.5,)),'dims must be'),
        (dict(dims=(4,), weights=(1,2)),'1 lengths'),
        (dict(weights=(1,)),'4 lengths'), (dict(weights=(1,1,1,math.nan)),'weights must be')):
        with pytest.raises(ValueError, match=says): MatryoshkaLoss(TripletLoss(), **kw)
    with pytest.raises(ValueError, match='first 17 numbers of an embedding, and there are 16'):
        MatryoshkaLoss(TripletLoss(), dims=(17,))(f, y)
    with pytest.raises(ValueError, match='and there are 8'): MatryoshkaLoss(TripletLoss(), dims=(17,)).setup(5, 8)

# Terms

def slow_tcm(f, y, pos=.9, neg=.5):
    few,many = [],[]
    for i in range(len(f)):
        for j in range(len(f)):
            s = f[i]@f[j]
            if i!=j and y[i]==y[j] and s<=pos: few.append(pos-s)
            if y[i]!=y[j] and s>=neg: many.append(s-neg)
    return sum(torch.stack(o).mean() if o else f.sum()*0 for o in (few,many))

@pytest.mark.parametrize('pos,neg', [(.9,.5), (.9,-.2), (.1,.3), (-1.,1.)])
def test_threshold_consistency_is_its_definition(pos, neg):
    f,y = batch()
    loss = ThresholdConsistency(pos, neg)
    a,b = f.clone().requires_grad_(),f.clone().requires_grad_()
    got,want = loss(a, y),slow_tcm(b, y, pos, neg)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(l, x)[0] for l,x in ((got,a), (want,b))))
    assert torch.autograd.gradcheck(lambda f: loss(f, y), (f.requires_grad_(),))
    assert 0<=loss.active(f, y)<=1 and loss.compares and not loss.seen_only

def test_threshold_consistency_by_hand():
    f,y = torch.tensor([[1.,0.],[.6,.8],[1.,0.],[0.,1.]]),torch.tensor([0,0,1,1])
    # positive pairs .6 and 0; negative pairs (0,2) 1, (0,3) 0, (1,2) .6, (1,3) .8
    loss = ThresholdConsistency()
    assert abs(loss(f, y).item()-((.3+.9)/2+(.5+.1+.3)/3))<1e-6
    assert abs(ThresholdConsistency(reduction='mean')(f, y).item()-((.3+.9)/2+(.5+.1+.3)/4))<1e-6
    torch.testing.assert_close(ThresholdConsistency(reduction='none')(f, y), torch.tensor([.3+.25,.3+.2,.9+.3,.9+.15]))
    assert abs(loss.active(f, y).item()-(4+6)/12)<1e-6

def slow_rate(f, eps2):
    n,d = f.shape
    s = torch.linalg.svdvals(f)**2
    return .5*torch.log(1+d/(n*eps2)*s).sum()

@pytest.mark.parametrize('n,d', [(20,16), (6,16), (16,16), (1,4)])
@pytest.mark.parametrize('eps2', [.5,.01])
def test_anti_collapse_is_minus_the_coding_rate(n, d, eps2):
    f,y = batch(n, d)
    want = slow_rate(f, eps2)
    torch.testing.assert_close(AntiCollapse(eps2, 'sum')(f, y), -want)
    torch.testing.assert_close(AntiCollapse(eps2)(f, y), -want/n)
    assert torch.autograd.gradcheck(lambda f: AntiCollapse(eps2, 'sum')(f, y), (f.requires_grad_(),))

def test_anti_collapse_spreads():
    "Collapsed rows cost most, rows at right angles least, and a step leads away from collapse; also in half precision"
    y = torch.arange(8)
    one = normalize(torch.ones(8, 8)+1e-3*torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    f = one.clone().requires_grad_()
    l = AntiCollapse()(f, y)
    assert l>AntiCollapse()(torch.eye(8), y)
    l.backward()
    assert AntiCollapse()(normalize(f.detach()-f.grad, dim=1), y)<l
    for dtype,tol in ((torch.float16,1e-3), (torch.bfloat16,1e-2), (torch.float32,1e-6)):
        x = one.to(dtype).requires_grad_()
        got = AntiCollapse(1e-6)(x, y)
        got.backward()
        want = AntiCollapse(1e-6)(x.detach().double(), y)
        assert got.dtype==torch.float32 and abs(got.item()-want.item())<tol and x.grad.isfinite().all()

def test_terms_beside_a_loss():
    f,y = batch()
    parts = TripletLoss(),ThresholdConsistency(),AntiCollapse()
    loss = CombinedLoss(parts, weights=(1,.5,.1))
    torch.testing.assert_close(loss(f, y), sum(w*o(f, y) for w,o in zip((1,.5,.1), parts)))
    nested = MatryoshkaLoss((ProxyNCALoss(5, 16).double(), *parts), dims=(16,8))
    short = normalize(f[:,:8], dim=1)
    nca = ProxyNCALoss(5, 8).double()
    nca.proxies.data = nested.loss.losses[0].proxies.data[:,:8]
    want = nested.loss.losses[0](f, y)+nca(short, y)+sum(o(f, y)+o(short, y) for o in parts)
    torch.testing.assert_close(nested(f, y), want)
    with pytest.raises(ValueError, match='normalised'): CombinedLoss((NPairLoss(), ThresholdConsistency()))

# Shorter embeddings

def test_shortened_embeddings():
    x,y = batch(40, 8, 5, dtype=torch.float32)
    emb = Embedded(x, y, items=[f'{o}.jpg' for o in range(40)], vocab=[*'abcde'], role=['query','gallery']*20, facts=dict(net='n'))
    for d in (1,3,8):
        short = emb.shorten(d)
        torch.testing.assert_close(short.embs, x[:,:d]/x[:,:d].norm(dim=1, keepdim=True))
        assert short.items==emb.items and short.facts==dict(net='n', shortened_from=8) and torch.equal(short.queries, emb.queries)
        assert short.shorten(1).facts['shortened_from']==8 and emb.embs.shape==(40,8)
    res = emb.evaluate(['recall@1','map@r'], dims=(2,8))
    assert [*res]==[2,8] and isinstance(res, ResultsByLength)
    for d in res:
        for k in ('recall@1','map@r'): assert res[d][k]==emb.shorten(d).evaluate([k])[k]
    assert res.to_dict()['2']['metrics']['map@r']['mean']==res[2]['map@r'] and '8' in repr(res) and 'map@r' in res._repr_html_()
    assert [*emb.evaluate(['recall@1'], dims=4)]==[4]
    torch.testing.assert_close(Embedded(3*x).shorten(3).embs, 3*x[:,:3]) # where length says something it still does
    for d in (0,9,2.,True,'4'):
        with pytest.raises(ValueError, match=r'8 numbers are shortened to 1 to 8 of them; got'): emb.shorten(d)
        with pytest.raises(ValueError, match=r'1 to 8 of them; got'): emb.evaluate(dims=d if isinstance(d, str) else (4,d))

@pytest.mark.parametrize('head', ['linear','mlp','bnneck','identity'])
def test_a_shortened_embedder(head, tmp_path):
    "Images and gallery give the first numbers, the body is shared, the folder is one of a smaller embedder, the long one stays"
    torch.manual_seed(0)
    model = Embedder('test_resnet', None if head=='identity' else 16, pretrained=False, head=head)
    finder = ImageEmbedder(model, Preprocess([('squash', (32,32), 2)]))
    images = [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(o)) for o in range(6)]
    finder.add(images, [*'aabbcc'], items=[*'123456'])
    long,n = finder.embs.clone(),model.emb_sz
    short = finder.shorten(5)
    want = normalize(long[:,:5], dim=1)
    torch.testing.assert_close(short.embs, want)
    torch.testing.assert_close(short.embed(images), want, rtol=1e-4, atol=1e-5)
    assert short.model.body is model.body and short.search(images[0], k=1)[0].item=='1'
    again = load_embedder(short.save(tmp_path/'short'))
    torch.testing.assert_close(again.embed(images), want, rtol=1e-4, atol=1e-5)
    assert again.model.emb_sz==5 and again.facts['shortened_from']==n and torch.equal(again.embs, short.embs)
    assert again.shorten(2).facts['shortened_from']==n and again.shorten(2).embs.shape==(6,2)
    assert torch.equal(finder.embs, long) and model.emb_sz==n and torch.equal(finder.embed(images), long)
    for d in (0, n+1):
        with pytest.raises(ValueError, match=rf'Embeddings of {n} numbers are shortened to 1 to {n} of them; got {d}'): finder.shorten(d)

def test_a_learner_of_embeddings_that_can_be_shortened(make_learner, tmp_path):
    "Trained, its class vectors learned at their own rate, stored, resumed, measured and exported as with any loss"
    make = lambda seed=0: make_learner(MatryoshkaLoss((ProxyNCALoss(), ThresholdConsistency()), dims=(16,4)), seed=seed)
    learn = make()
    proxies = learn.loss_func.loss.losses[0].proxies
    assert proxies is dict(learn.model.named_parameters())['loss_func.losses.0.losses.0.proxies']
    assert proxies.shape==(learn.dls.n_train_classes,16)
    before = proxies.detach().clone()
    learn.fit_one_cycle(2, 1e-2, cbs=Checkpoint(tmp_path/'run'))
    assert (proxies!=before).any(1).all() and lr_mults(learn.model)[proxies]==100.
    learn.save('short')
    other = make(seed=5).load('short')
    res,res2 = (o.evaluate(metrics=['recall@1','map@r'], dims=(4,8,16)) for o in (learn,other))
    assert res.to_dict()==res2.to_dict() and res[16]['map@r']==learn.evaluate(metrics=['map@r'])['map@r']
    assert res[4]['map@r']==learn.embedded().shorten(4).evaluate(['map@r'])['map@r']
    with pytest.raises(ValueError, match='1 to 16 of them; got 32'): learn.evaluate(dims=(4,32))
    finder = learn.export_embedder(tmp_path/'out', gallery='val').shorten(4)
    torch.testing.assert_close(finder.embs, learn.embedded('val').shorten(4).embs)
    assert learn.validate()[0]!=learn.validate()[0] # no value on unseen classes, as of the loss inside
