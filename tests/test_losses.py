"Losses against their definitions, against other libraries, and on batches that break losses"
import copy, inspect, math, pickle, pytest, re, torch, warnings
import numpy as np
from functools import partial
from hypothesis import given, settings, strategies as st
from torch.nn.functional import normalize
from fastai.torch_core import TensorCategory
from pytorch_metric_learning import losses as pml, miners as pml_miners
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.reducers import MeanReducer
from dmlfast import all as package
from dmlfast.losses.geometry import *
from dmlfast.losses import *

def plain_repr(o):
    "As `repr`, without addresses, which differ between the processes that share these tests"
    return re.sub(' at 0x[0-9a-f]+', '', repr(o))

f64 = torch.float64
i = torch.arange(96).reshape(12,8).double()
F12,Y12 = normalize(torch.sin(1.3*i+0.7*(i%5)), dim=1),torch.arange(12)%3

P3 = torch.cos(.9*torch.arange(24).reshape(3,8).double())
ALL = dict(triplet=TripletLoss, triplet_mined=partial(TripletLoss, miner=BatchHardMiner()),
    contrastive=partial(ContrastiveLoss, neg_margin=1.3), margin=partial(MarginLoss, 5, miner=None, nu=.01),
    margin_one=partial(MarginLoss, miner=BatchHardMiner()), npair=NPairLoss, ms=partial(MultiSimilarityLoss, lam=.7),
    supcon=SupConLoss, circle=CircleLoss, recall=partial(RecallAtKLoss, t2=.1),
    anchor=partial(ProxyAnchorLoss, 5, 16), nca=partial(ProxyNCALoss, 5, 16),
    nca_plain=partial(ProxyNCALoss, 5, 16, squared=False, include_positive=False),
    normface=partial(NormFaceLoss, 5, 16), cosface=partial(CosFaceLoss, 5, 16), arcface=partial(ArcFaceLoss, 5, 16),
    subcenter=partial(SubCenterArcFaceLoss, 5, 16), softtriple=partial(SoftTripleLoss, 5, 16, centers=4))
MINERS = [RandomMiner(), SemiHardMiner(), SoftHardMiner(), BatchHardMiner(), DistanceWeightedMiner(), MultiSimilarityMiner()]
SEEN = [k for k,v in ALL.items() if v().seen_only]

SOFTMAX = [NormFaceLoss, CosFaceLoss, ArcFaceLoss, SubCenterArcFaceLoss, SoftTripleLoss]

def make(name, gamma=.3, reduction=None):
    torch.manual_seed(100)
    loss = ALL[name](gamma=gamma)
    if reduction: loss.reduction = reduction
    return loss

def close(a, b, tol=1e-8): assert abs(a.item()-b)<=tol, (a.item(),b)

def gathered(f, y, margin=.2, gamma=0., squared=False, reduction='active'):
    "The triplet loss as it is written, one gathered triplet at a time"
    pos,neg = label_masks(y)
    a,p,n = (pos[:,:,None]&neg[:,None]).nonzero(as_tuple=True)
    u,v = f[n]-f[a],f[p]-f[a]
    d = lambda o: o.pow(2).sum(1) if squared else o.norm(dim=1)
    h = (d(v)-d(u)+margin-gamma*torch.cosine_similarity(u, v, dim=1)).relu()
    if reduction=='none': return torch.stack([h[a==k].mean() if (a==k).any() else h.new_zeros(()) for k in range(len(f))])
    return h.sum()/dict(active=(h>0).sum(), mean=len(h), sum=1)[reduction]

@pytest.mark.parametrize('squared,gamma,mean,active', [
    (True,.3,.17688771,.67924879), (True,0.,.19860244,.68092266), (True,-.3,.22740462,.64208363),
    (False,.3,.08968736,.28699955), (False,0.,.12084344,.27842329)])
def test_triplet_values(squared, gamma, mean, active):
    close(TripletLoss(gamma=gamma, squared=squared, reduction='mean')(F12, Y12), mean)
    close(TripletLoss(gamma=gamma, squared=squared)(F12, Y12), active)

def batch(n, d, n_classes, seed=0, dtype=f64):
    g = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=g, dtype=dtype), dim=1),torch.randint(n_classes, (n,), generator=g)

def value_grad(loss, f, y, w=None):
    "The loss (weighted where it is one value per anchor) and its gradient"
    f = f.detach().clone().requires_grad_()
    l = loss(f, y)
    (l if l.ndim==0 else l@w).backward()
    return l.detach(),f.grad

@pytest.mark.parametrize('reduction', ['active','mean','sum','none'])
@pytest.mark.parametrize('squared', [True,False])
@pytest.mark.parametrize('gamma', [0.,.4,-.4])
def test_triplet_is_its_definition(gamma, squared, reduction):
    for n,d,c in [(20,5,4),(31,3,2),(12,16,9)]:
        f,y = batch(n, d, c)
        w = torch.rand(n, dtype=f64)
        args = dict(margin=.3, gamma=gamma, squared=squared, reduction=reduction)
        (l0,g0),(l1,g1) = value_grad(lambda f,y: gathered(f, y, **args), f, y, w),value_grad(TripletLoss(**args), f, y, w)
        torch.testing.assert_close(l1, l0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(g1, g0, rtol=1e-7, atol=1e-9)

def test_blocks_do_not_matter(monkeypatch):
    import dmlfast.losses.triplet as m
    f,y = batch(40, 4, 5)
    want = value_grad(DRTripletLoss(), f, y)
    monkeypatch.setattr(m, 'mate_blocks', lambda y,sz,n: mate_blocks(y, 1))
    got = value_grad(DRTripletLoss(), f, y)
    for g,w in zip(got,want): torch.testing.assert_close(g, w)

def test_blocks_of_ranks_do_not_matter(monkeypatch):
    import dmlfast.losses.recallk as m
    f,y = batch(40, 4, 5)
    want,sizes = value_grad(RecallAtKLoss(t2=.1), f, y),[]
    def blocks(y, sz, n):
        for a,p in mate_blocks(y, 1):
            sizes.append(len(a))
            yield a,p
    monkeypatch.setattr(m, 'mate_blocks', blocks)
    for g,w in zip(value_grad(RecallAtKLoss(t2=.1), f, y),want): torch.testing.assert_close(g, w)
    assert sizes==[1]*40

@pytest.mark.parametrize('gamma,value', [(.3,1.1673855943),(0.,1.1673862799)])
def test_ms_values(gamma, value): close(DRMultiSimilarityLoss(gamma=gamma)(F12, Y12), value, 1e-9)

@pytest.mark.parametrize('kw,value', [
    (dict(squared=False), .4186433087), (dict(), .2888880495), (dict(include_positive=True), .8987632620),
    (dict(scale=9.), -1.4982026870), (dict(gamma=0.), .4852373866)])
def test_nca_values(kw, value):
    loss = DRProxyNCALoss(3, 8, **{**dict(scale=1., include_positive=False), **kw}).double()
    with torch.no_grad(): loss.proxies.copy_(P3)
    close(loss(F12, Y12), value, 1e-9)

# Definitions, written out with loops

def cosine(u, v): return u@v/(u.norm()*v.norm())
def nearest_last(f, y, i): return max((k for k in range(len(f)) if k!=i and y[k]==y[i]), key=lambda k: (f[k]-f[i]).norm())

def slow_contrastive(f, y, gamma, pm=0., nm=.5):
    pos,neg = [],[]
    for i in range(len(f)):
        for k in range(len(f)):
            d = (f[i]-f[k]).norm()
            if i!=k and y[i]==y[k]: pos.append((d-pm).relu())
            if y[i]!=y[k]: neg.append((nm-d-gamma*cosine(f[k]-f[i], f[nearest_last(f,y,i)]-f[i])).relu())
    return sum(torch.stack(o).sum()/max(sum(h>0 for h in o), 1) for o in (pos,neg))

def slow_ms(f, y, gamma, alpha=2., beta=50., lam=.5, eps=.1):
    s,res = f@f.T,[]
    for i in range(len(f)):
        pos,neg = [k for k in range(len(f)) if k!=i and y[k]==y[i]],[k for k in range(len(f)) if y[k]!=y[i]]
        p = nearest_last(f, y, i)
        P = [k for k in pos if s[i,k]-eps<s[i,neg].max()]
        N = [k for k in neg if s[i,k]+eps>s[i,pos].min()]
        ep = sum((-alpha*(s[i,k]-lam)).exp() for k in P)
        en = sum((beta*(s[i,k]-lam-gamma*cosine(f[k]-f[i], f[p]-f[i]))).exp() for k in N)
        res.append(torch.log(torch.as_tensor(1+ep))/alpha+torch.log(torch.as_tensor(1+en))/beta)
    return torch.stack(res).mean()

def shifted(f, y, i, gamma):
    "Similarities of row i, those of its negatives with direction regularisation"
    p = nearest_last(f, y, i)
    return [f[i]@f[k]-(gamma*cosine(f[k]-f[i], f[p]-f[i]) if y[k]!=y[i] else 0) for k in range(len(f))]

def complete(y): return [i for i in range(len(y)) if (y==y[i]).sum()>1 and (y!=y[i]).any()]

def slow_supcon(f, y, gamma, t=.1):
    res = []
    for i in complete(y):
        s = shifted(f, y, i, gamma)
        total = sum((s[k]/t).exp() for k in range(len(f)) if k!=i)
        res.append(-sum(torch.log((s[k]/t).exp()/total) for k in range(len(f)) if k!=i and y[k]==y[i])/((y==y[i]).sum()-1))
    return torch.stack(res).mean()

def slow_circle(f, y, gamma, m=.4, scale=80.):
    res = []
    for i in complete(y):
        s = shifted(f, y, i, gamma)
        pull = sum((-scale*(1+m-s[k].detach()).relu()*(s[k]-1+m)).exp() for k in range(len(f)) if k!=i and y[k]==y[i])
        push = sum((scale*(s[k].detach()+m).relu()*(s[k]-m)).exp() for k in range(len(f)) if y[k]!=y[i])
        res.append(torch.log(1+pull*push))
    return torch.stack(res).mean()

def slow_recall(f, y, gamma, k=(1,2,4,8,16), t1=1., t2=.01):
    res = []
    for q in complete(y):
        s = shifted(f, y, q, gamma)
        P = [x for x in range(len(f)) if x!=q and y[x]==y[q]]
        rank = [1+sum(((s[z]-s[x])/t2).sigmoid() for z in range(len(f)) if z not in (q,x)) for x in P]
        smooth = [(m,sum(((m-r)/t1).sigmoid() for r in rank)) for m in k]
        res.append(sum(o.clamp(max=min(m, len(P)))/min(m, len(P)) for m,o in smooth)/len(smooth))
    return 1-torch.stack(res).mean()

def slow_margin(f, y, gamma, m=.2, b=1.2):
    h = []
    for a in range(len(f)):
        for p in range(len(f)):
            for n in range(len(f)):
                if a==p or y[a]!=y[p] or y[a]==y[n]: continue
                h += [(m+(f[a]-f[p]).norm()-b).relu(), (m-(f[a]-f[n]).norm()-gamma*cosine(f[n]-f[a], f[p]-f[a])+b).relu()]
    return torch.stack(h).sum()/sum(o>0 for o in h)

def slow_npair(f, y, gamma, l2=.02):
    pairs = [torch.nonzero(y==c)[:2,0].tolist() for c in y.unique()]
    res = [torch.log(1+sum((f[a]@f[q]-f[a]@f[p]-gamma*cosine(f[q]-f[a], f[p]-f[a])).exp() for b,q in pairs if b!=a)) for a,p in pairs]
    return torch.stack(res).mean()+l2*f.pow(2).sum(1).mean()

def slow_anchor(f, y, proxies, gamma, m=.1, alpha=32.):
    p = normalize(proxies, dim=1)
    s,pos,neg = f@p.T,[],[]
    for z in range(len(p)):
        mine,other = [i for i in range(len(f)) if y[i]==z],[i for i in range(len(f)) if y[i]!=z]
        if mine: pos.append(torch.log(1+sum((-alpha*(s[i,z]-m)).exp() for i in mine)))
        neg.append(torch.log(torch.as_tensor(1+sum((alpha*(s[i,z]-gamma*cosine(p[z]-f[i], p[y[i]]-f[i])+m)).exp() for i in other))))
    return torch.stack(pos).mean()+torch.stack(neg).mean()

def slow_nca(f, y, proxies, gamma, scale=9., squared=True, include_positive=True, norm=True):
    p,res = normalize(proxies, dim=1) if norm else proxies,[]
    for i,c in enumerate(y):
        d = [(f[i]-q).norm() for q in p]
        if squared: d = [o**2 for o in d]
        logit = [-scale*(d[z]+(gamma*cosine(p[z]-f[i], p[c]-f[i]) if z!=c else 0)) for z in range(len(p))]
        res.append(torch.stack([o for z,o in enumerate(logit) if include_positive or z!=c]).logsumexp(0)-logit[c])
    return torch.stack(res).mean()

def same(fast, slow, f, y):
    (l0,g0),(l1,g1) = value_grad(slow, f, y),value_grad(fast, f, y)
    torch.testing.assert_close(l1, l0, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(g1, g0, rtol=1e-6, atol=1e-8)

@pytest.mark.parametrize('gamma', [0.,.3,-.3])
def test_definitions(gamma):
    f,y = batch(15, 4, 5, seed=1)
    y[:10] = torch.arange(10)%5 # every class twice
    same(ContrastiveLoss(gamma=gamma, neg_margin=1.2), partial(slow_contrastive, gamma=gamma, nm=1.2), f, y)
    same(MultiSimilarityLoss(gamma=gamma), partial(slow_ms, gamma=gamma), f, y)
    same(MarginLoss(gamma=gamma, miner=None, beta=1.25), partial(slow_margin, gamma=gamma, b=1.25), f, y)
    same(NPairLoss(gamma=gamma), partial(slow_npair, gamma=gamma), 2*f, y)
    anchor = ProxyAnchorLoss(7, 4, gamma=gamma).double()
    same(anchor, partial(slow_anchor, proxies=anchor.proxies.detach(), gamma=gamma), f, y)
    same(SupConLoss(gamma=gamma), partial(slow_supcon, gamma=gamma), f, y)
    same(CircleLoss(gamma=gamma, scale=20.), partial(slow_circle, gamma=gamma, scale=20.), f, y)
    for squared,include,norm in [(True,True,True),(False,False,False),(True,False,True),(False,True,True)]:
        nca = ProxyNCALoss(7, 4, gamma=gamma, squared=squared, include_positive=include, normalize_proxies=norm).double()
        same(nca, partial(slow_nca, proxies=nca.proxies.detach(), gamma=gamma, squared=squared, include_positive=include, norm=norm), f, y)

@pytest.mark.parametrize('labels', [[0,0,1,1,2,2,0,1], [0,0,0,0,0,1,1,2,3,3,3], [0]*9+[1,1]], ids=['even','uneven','one large'])
@pytest.mark.parametrize('gamma', [0.,.05])
@pytest.mark.parametrize('args', [dict(t2=.1), dict(k=(1,2,4), t1=.3, t2=.02), dict(k=(3,1000), t1=.05, t2=.3)], ids=str)
def test_recall_is_its_formula(args, gamma, labels):
    "Also for a class of one, and where a k is met, or more than there are rows"
    f,y = batch(len(labels), 3, 1)[0],torch.tensor(labels)
    slow,fast = partial(slow_recall, gamma=gamma, **args),RecallAtKLoss(gamma=gamma, **args)
    (l0,g0),(l1,g1) = value_grad(slow, f, y),value_grad(fast, f, y)
    torch.testing.assert_close(l1, l0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(g1, g0, rtol=1e-9, atol=1e-12)
    assert g0.norm()>1e-3

@pytest.mark.parametrize('loss,value', [(SupConLoss(), 4.2354747520), (RecallAtKLoss((1,2,4), t2=.1), .5311622779)],
    ids=['supcon','recall'])
def test_values_of_shares_and_ranks(loss, value): close(loss(F12, Y12), value, 1e-9)

def test_smooth_ranks_become_ranks():
    "With small temperatures the loss is one less the recall that is counted; a place at the very edge is a half, so k lies between two"
    f,y = batch(40, 3, 6)
    sim = (f@f.T).fill_diagonal_(-9)
    order = y[sim.argsort(1, descending=True)[:,:-1]]==y[:,None] # whether the first, second, ... is of the class
    assert (torch.bincount(y)>1).all()
    for k in (1,4,30):
        found,most = order[:,:k].sum(1),order.sum(1).clamp(max=k)
        got = RecallAtKLoss(k, t1=1e-3, t2=1e-7)(f, y)
        ends = order[:,k-1].double()/2*(found<=most) # the k-th place counts a half
        close(got, (1-(found-ends)/most).mean().item(), 1e-6)

# PyTorch Metric Learning, at gamma=0

SHAPES = [(24,8,6),(50,16,7),(64,32,16),(33,4,3)]

def same_pml(ours, theirs, f, y):
    "PML normalises by itself, so its gradient has no radial part"
    same(lambda f,y: ours(normalize(f, dim=1), y), theirs, f, y)

def with_proxies(ours, theirs):
    with torch.no_grad(): theirs.proxies.copy_(ours.proxies)
    return ours.double(),theirs.double()

@pytest.mark.parametrize('n,d,c', SHAPES)
def test_pml(n, d, c):
    f,y = batch(n, d, c, seed=n)
    same_pml(TripletLoss(margin=.1), pml.TripletMarginLoss(margin=.1), f, y)
    same_pml(TripletLoss(margin=.1, reduction='mean'), pml.TripletMarginLoss(margin=.1, reducer=MeanReducer()), f, y)
    same_pml(ContrastiveLoss(neg_margin=1.), pml.ContrastiveLoss(), f, y)
    miner,ms = pml_miners.MultiSimilarityMiner(.1),pml.MultiSimilarityLoss(2, 50, .5)
    same_pml(MultiSimilarityLoss(), lambda f,y: ms(f, y, miner(f, y)), f, y)
    same_pml(MultiSimilarityLoss(miner=miner), lambda f,y: ms(f, y, miner(f, y)), f, y)
    same(NPairLoss(l2=0.), pml.NPairsLoss(distance=DotProductSimilarity(normalize_embeddings=False)), f, y)
    same_pml(*with_proxies(ProxyNCALoss(c, d), pml.ProxyNCALoss(c, d, softmax_scale=9)), f, y)
    same_pml(*with_proxies(ProxyAnchorLoss(c, d), pml.ProxyAnchorLoss(c, d)), f, y)

@pytest.mark.parametrize('n,d,c', [*SHAPES, (32,16,1), (12,4,11)])
@pytest.mark.parametrize('ours,theirs', [(SupConLoss,pml.SupConLoss), (partial(SupConLoss, .03),partial(pml.SupConLoss, .03)),
    (CircleLoss,pml.CircleLoss), (partial(CircleLoss, .25, 256.),partial(pml.CircleLoss, .25, 256))],
    ids=['supcon','sharp','circle','faces'])
def test_pml_to_ten_digits(ours, theirs, n, d, c):
    "On balanced and other batches, and reduced in every way"
    f,y = batch(n, d, c, seed=n)
    for y in (y, torch.arange(n)%c):
        for ours_,theirs_ in [(ours(),theirs()), (lambda f,y: ours(reduction='none')(f, y).mean(),theirs(reducer=MeanReducer()))]:
            (l0,g0),(l1,g1) = value_grad(theirs_, f, y),value_grad(lambda f,y: ours_(normalize(f, dim=1), y), f, y)
            torch.testing.assert_close(l1, l0, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(g1, g0, rtol=1e-9, atol=1e-10)

@pytest.mark.parametrize('per_class', [False,True])
@pytest.mark.parametrize('n,d,c', SHAPES)
def test_pml_margin(n, d, c, per_class):
    f,y = batch(n, d, c, seed=n)
    same_pml(MarginLoss(miner=None), pml.MarginLoss(), f, y)
    idx = RandomMiner()(f, y)
    ours,theirs = MarginLoss(c, miner=lambda f,y: idx).double(),pml.MarginLoss(num_classes=c, learn_beta=True).double()
    same_pml(ours, lambda f,y: theirs(f, y, idx), f, y)
    ours.zero_grad(); theirs.zero_grad()
    ours(normalize(f, dim=1), y).backward(); theirs(f, y, idx).backward()
    torch.testing.assert_close(ours.betas.grad, theirs.beta.grad)

def test_pml_margin_of_pairs():
    "Their margin loss makes triplets of mined pairs first, ours takes the pairs"
    from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_triplets
    f,y = batch(24, 8, 6, seed=1)
    idx = pml_miners.MultiSimilarityMiner(.1)(f, y)
    def ours(idx): return MarginLoss(miner=lambda *_: idx)(normalize(f, dim=1), y).item()
    theirs = pml.MarginLoss()(f, y, idx).item()
    assert len(idx)==4 and abs(ours(convert_to_triplets(idx, y))-theirs)<1e-9 and abs(ours(idx)-theirs)>.01

@pytest.mark.parametrize('n,d,c', SHAPES)
def test_pml_miners(n, d, c):
    f,y = batch(n, d, c, seed=n)
    rows = lambda idx: {tuple(o) for o in torch.stack(idx, 1).tolist()}
    ours,theirs = MultiSimilarityMiner(.1)(f, y),pml_miners.MultiSimilarityMiner(.1)(f, y)
    assert rows(ours[:2])==rows(theirs[:2]) and rows(ours[2:])==rows(theirs[2:])
    assert rows(BatchHardMiner()(f, y))==rows(pml_miners.BatchHardMiner()(f, y))

@pytest.mark.parametrize('miner', [*MINERS, pml_miners.TripletMarginMiner(margin=.2), pml_miners.MultiSimilarityMiner()],
                         ids=lambda o: type(o).__module__[:8]+type(o).__name__)
@pytest.mark.parametrize('loss', [TripletLoss, MarginLoss, ContrastiveLoss, MultiSimilarityLoss])
def test_any_miner_goes_with_any_loss(loss, miner):
    f,y = batch(24, 8, 5, dtype=torch.float32)
    l,g = value_grad(loss(gamma=.3, miner=miner), f, y)
    assert l.isfinite() and g.isfinite().all()

# Properties

@pytest.mark.parametrize('name', ALL)
def test_gamma_zero_is_the_plain_loss(name):
    f,y = batch(20, 16, 5)
    a,b,c = (make(name, gamma=g).double()(f, y) for g in (0,0.,.3))
    assert a==b and a!=c

@pytest.mark.parametrize('name', ALL)
def test_symmetries(name):
    f,y = batch(20, 16, 5)
    loss = make(name).double()
    want,each = loss(f, y),make(name, reduction='none').double()(f, y)
    i = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    if name!='npair': # which takes the first two of each class
        torch.testing.assert_close(loss(f[i], y[i]), want)
        torch.testing.assert_close(make(name, reduction='none').double()(f[i], y[i]), each[i])
    q = torch.linalg.qr(torch.randn(16, 16, dtype=f64))[0]
    if isinstance(loss, ProxyLoss):
        with torch.no_grad(): loss.proxies.copy_(loss.proxies@q)
    torch.testing.assert_close(loss(f@q, y), want)

@pytest.mark.parametrize('reduction', ['scalar','none'])
@pytest.mark.parametrize('name', [o for o in ALL if o!='circle']) # which holds its factors fixed: see `slow_circle`
def test_gradcheck(name, reduction):
    f,y = batch(12, 16, 4, seed=3)
    loss = make(name, reduction=None if reduction=='scalar' else 'none').double()
    params = list(loss.parameters())
    assert torch.autograd.gradcheck(lambda f,*ps: loss(f, y), (f.requires_grad_(),*params), atol=1e-6)

@pytest.mark.parametrize('name', ['nca','nca_plain','ms','normface','arcface','softtriple'])
def test_none_is_what_mean_averages(name):
    f,y = batch(20, 16, 5)
    each,mean = (make(name, reduction=r)(f, y) for r in ('none','mean'))
    assert each.shape==(20,)
    torch.testing.assert_close(each.mean(), mean)

@pytest.mark.parametrize('name', ALL)
def test_none_is_one_value_per_row(name):
    f,y = batch(20, 16, 5)
    assert make(name, reduction='none')(f, y).shape==(20,)

def test_unknown_reduction():
    loss = TripletLoss()
    loss.reduction = 'median' # a plain attribute
    with pytest.raises(ValueError, match="'median' is none of"): loss(F12, Y12)

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=14), st.sampled_from(list(ALL)), st.sampled_from([0.,.3]))
def test_any_labels(labels, name, gamma):
    "Whatever the labels: finite, connected, and the triplet loss is its definition"
    f,y = batch(len(labels), 16, 1, seed=len(labels))[0],torch.tensor(labels)
    for reduction in (None,'none'):
        loss = make(name, gamma, reduction).double()
        x = f.clone().requires_grad_()
        l = loss(x, y)
        l.sum().backward()
        assert l.isfinite().all() and x.grad.isfinite().all()
    if name=='triplet' and label_masks(y)[0].any() and len(set(labels))>1:
        close(make(name, gamma, 'mean')(f, y), gathered(f, y, gamma=gamma, reduction='mean').item())

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=14), st.sampled_from(MINERS))
def test_miners_on_any_labels(labels, miner):
    "Valid triplets whatever the labels; each anchor that has any is there, except where none is informative"
    y = torch.tensor(labels, dtype=torch.int64)
    f = batch(len(labels), 6, 1, seed=len(labels), dtype=torch.float32)[0]
    a,p,a2,n = as_pairs(miner(f, y))
    assert (y[a]==y[p]).all() and (a!=p).all() and (y[a2]!=y[n]).all()
    pos,neg = label_masks(y)
    if not isinstance(miner, MultiSimilarityMiner): assert set(a.tolist())==set((pos.any(1)&neg.any(1)).nonzero()[:,0].tolist())

def test_miners_choose_what_they_say():
    f,y = batch(60, 6, 5, dtype=torch.float32)
    d = sqdist(f).sqrt()
    pos,neg = label_masks(y)
    torch.manual_seed(0)
    a,p,n = SemiHardMiner(.2)(f, y)
    window = neg[a]&(d[a]>d[a,p][:,None])&(d[a]<d[a,p][:,None]+.2)
    has = window.any(1)
    assert has.any() and (window[has].gather(1, n[has,None])).all()
    a,p,n = SoftHardMiner()(f, y)
    dn = torch.where(neg, d, 9.).amin(1)
    dp = torch.where(pos, d, -1.).amax(1)
    assert (d[a,p]>dn[a]).all() and (d[a,n]<dp[a]).all() # here every anchor has such pairs
    for miner in (RandomMiner(),SemiHardMiner(),SoftHardMiner(),DistanceWeightedMiner()):
        torch.manual_seed(7); one = miner(f, y)
        torch.manual_seed(7); two = miner(f, y)
        three = miner(f, y)
        assert all(torch.equal(i,j) for i,j in zip(one,two)) and not all(torch.equal(i,j) for i,j in zip(one,three))

def test_semi_hard_is_farther_than_the_positive():
    "A negative as near as the positive is none: of those at 1 and 1.1 it is the latter"
    f,y = torch.tensor([[0.],[1.],[-1.],[1.1]]),torch.tensor([0,0,1,1])
    for seed in range(8):
        torch.manual_seed(seed)
        a,p,n = SemiHardMiner(.2)(f, y)
        assert n[(a==0)&(p==1)].item()==3

@pytest.mark.parametrize('loss', [TripletLoss, MarginLoss, ContrastiveLoss, MultiSimilarityLoss])
def test_no_gradient_goes_through_a_miner(loss):
    seen = []
    def miner(embs, labels):
        seen.append(embs.requires_grad)
        return all_triplets(labels)
    f,y = batch(12, 8, 3)
    value_grad(loss(miner=miner), f, y)
    assert seen and not any(seen)

def test_random_negatives_are_uniform():
    torch.manual_seed(0)
    y = torch.tensor([2,0,1,0,2,2,1])
    n = pair_negatives(y, torch.full((40000,), 4))
    share = torch.bincount(n, minlength=7)/40000
    torch.testing.assert_close(share, torch.tensor([0,.25,.25,.25,0,0,.25]), atol=.01, rtol=0)

@pytest.mark.parametrize('D', [2,3,16,512])
def test_distance_weights(D):
    "Proportional to 1/q, exactly 0 for the own class, no nan where a row has no negative or an antipode"
    f,y = batch(20, D, 4)
    f[1] = -f[0]
    y[:2] = torch.tensor([0,1])
    w = DistanceWeightedMiner().weights(f, y, sqdist(f))
    d = sqdist(f).sqrt().clamp(.5, 1.4)
    q = (D-2)*d.log()+(D-3)/2*(1-d**2/4).log()
    neg = label_masks(y)[1]
    want = torch.where(neg, (-q+torch.where(neg, q, math.inf).amin(1, keepdim=True)).exp(), 0.)
    torch.testing.assert_close(w, want/want.sum(1, keepdim=True))
    assert (w[~neg]==0).all()
    assert DistanceWeightedMiner().weights(f, y*0, sqdist(f)).isfinite().all()

# Precision

SPREADS = [1.,1e-1,1e-2,1e-3,1e-4]

def spread_batch(spread, n=64, per=4, d=32, seed=0):
    "Unit rows whose classes are `spread` wide, as float32 can hold them"
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n)//per
    mu = normalize(torch.randn(n//per, d, generator=g, dtype=f64), dim=1)
    return normalize(mu[y]+spread*torch.randn(n, d, generator=g, dtype=f64)/d**.5, dim=1).float(),y

def grad_error(loss, f, y):
    "Relative error of a float32 gradient against float64 on the same numbers"
    g32,g64 = (value_grad(loss.to(o), f.to(o), y)[1].double() for o in (torch.float32,f64))
    return ((g32-g64).norm()/g64.norm()).item()

@pytest.mark.parametrize('spread', SPREADS)
@pytest.mark.parametrize('gamma', [0.,.3,-1.])
@pytest.mark.parametrize('squared', [True,False])
def test_triplet_gradient_of_tight_classes(spread, gamma, squared):
    for n,per,d in [(64,4,32),(32,2,256),(64,16,64)]:
        assert grad_error(TripletLoss(margin=5, gamma=gamma, squared=squared), *spread_batch(spread, n, per, d))<2e-5

# Margins here keep every hinge and every mining decision away from its edge.
WIDE = dict(mined=lambda: DRTripletLoss(margin=5, miner=RandomMiner()),
    contrastive=lambda: ContrastiveLoss(pos_margin=-1, neg_margin=5, gamma=.3),
    margin=lambda: MarginLoss(gamma=.3, margin=5, miner=RandomMiner()), ms=lambda: DRMultiSimilarityLoss(eps=5),
    supcon=SupConLoss, supcon_dr=lambda: SupConLoss(gamma=.3), circle=CircleLoss, circle_dr=lambda: CircleLoss(gamma=.3),
    recall=RecallAtKLoss, recall_dr=lambda: RecallAtKLoss(t2=.1, gamma=.3),
    npair=lambda: NPairLoss(gamma=.3),
    anchor=lambda: ProxyAnchorLoss(16, 32, gamma=.3), nca=lambda: DRProxyNCALoss(16, 32),
    **{f'{cls.__name__}_{g}':partial(cls, 16, 32, gamma=g) for cls in SOFTMAX for g in (0.,.3)},
    nca_plain=lambda: DRProxyNCALoss(16, 32, squared=False, include_positive=False, scale=1.))

@pytest.mark.parametrize('spread', SPREADS)
@pytest.mark.parametrize('name', WIDE)
def test_gradients_of_tight_classes(name, spread):
    torch.manual_seed(0)
    loss,(f,y) = WIDE[name](),spread_batch(spread)
    if getattr(loss,'miner',None):
        idx = loss.miner(f, y)
        loss.miner = lambda f,y: idx
    assert grad_error(loss, f, y)<1e-4
    if isinstance(loss, ProxyLoss): # and with the proxies in the middle of their classes
        middles = torch.stack([f[y==c].mean(0) for c in range(16)]).repeat(loss.centers, 1)
        loss.proxies.data = middles+.5*spread*torch.randn(len(middles), 32)/32**.5*(loss.centers>1)
        assert grad_error(loss, f, y)<1e-4

PROXY = dict(nca=ProxyNCALoss, excluded=partial(ProxyNCALoss, include_positive=False), plain=partial(ProxyNCALoss, squared=False),
    free=partial(ProxyNCALoss, normalize_proxies=False), anchor=ProxyAnchorLoss, normface=NormFaceLoss, cosface=CosFaceLoss,
    arcface=ArcFaceLoss)

def proxy_batch(where, gap, n=64, c=16, d=32):
    "Unit embeddings and proxies: one embedding `gap` from another class's proxy, pairs of proxies `gap` apart, or all of them within `gap`"
    g = torch.Generator().manual_seed(0)
    noise = lambda *shape: gap*torch.randn(*shape, generator=g, dtype=f64)/d**.5
    p,y = normalize(torch.randn(c, d, generator=g, dtype=f64), dim=1),torch.arange(n)%c
    f = p[y]+torch.randn(n, d, generator=g, dtype=f64)/(2*d**.5)
    if where=='one': f[0] = p[1]+noise(d)
    if where=='pairs': p[1::2] = normalize(p[::2]+noise(c//2, d), dim=1)
    if where=='all': p = normalize(p[:1]+noise(c, d), dim=1)
    if where in ('pairs','all','own'): f = p[y]+noise(n, d)
    return normalize(f, dim=1).float(),y,p.float()

@pytest.mark.parametrize('gap', [.3,.1,.065,.035,1e-2,1e-3,1e-4])
@pytest.mark.parametrize('where', ['one','pairs','all','own'])
@pytest.mark.parametrize('gamma', [0.,.3])
@pytest.mark.parametrize('name', PROXY)
def test_near_proxies(name, gamma, where, gap):
    "Value and both gradients of float32 are those of float64 on the same numbers"
    f,y,p = proxy_batch(where, gap)
    res = []
    for dtype in (torch.float32,f64):
        loss = PROXY[name](16, 32, gamma=gamma).to(dtype)
        with torch.no_grad(): loss.proxies.copy_(p)
        res.append([o.double() for o in (*value_grad(loss, f.to(dtype), y),loss.proxies.grad)])
    for got,want in zip(*res): assert (got-want).norm()<=1e-4*want.norm()

def test_a_collapse_of_pairs():
    "All rows within 1e-4 of each other: what is left of the gradient are differences"
    f,y,_ = proxy_batch('all', 1e-4)
    for loss in (NPairLoss(l2=0.), NPairLoss(l2=0., gamma=.3), MultiSimilarityLoss(), DRTripletLoss(margin=5),
        SupConLoss(), CircleLoss(), RecallAtKLoss()):
        assert grad_error(loss, f, y)<1e-4

@pytest.mark.parametrize('x', [-30.,-5.,0.,5.,60.])
def test_small_sums_are_not_swallowed(x):
    want = torch.tensor([x,x], dtype=f64).exp().sum().log1p()
    got = log1p_sum_exp(torch.tensor([[x,x,99.]]), torch.tensor([[1.,1.,0.]]))
    torch.testing.assert_close(got[0].double(), want, rtol=1e-6, atol=0)

def test_on_another_proxy():
    "Distance, cosine and their gradients are 0 where an embedding coincides with a proxy, its own or another"
    p = torch.randn(6, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    f = normalize(p.detach(), dim=1).requires_grad_()
    for y in (torch.arange(6), torch.arange(6).roll(1)):
        d2,c = proxy_cos(f, y, *proxy_norms(p, True))
        assert (d2.diagonal()==0).all() and (c.diagonal()==0).all() and (d2>1).sum()==30
        for o in torch.autograd.grad((d2.diagonal()+c.diagonal()).sum()*1e8, (f,p)): assert (o==0).all()

@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16])
def test_half_precision(name, dtype):
    f,y = batch(20, 16, 5, dtype=torch.float32)
    l,g = value_grad(make(name), f.to(dtype), y)
    assert l.dtype==torch.float32 and l.isfinite() and g.dtype==dtype and g.isfinite().all()
    torch.testing.assert_close(l, make(name)(f.to(dtype).float(), y))

@pytest.mark.parametrize('name', ALL)
def test_autocast_changes_nothing(name):
    f,y = batch(20, 16, 5, dtype=torch.float32)
    def inside(f, y):
        with torch.autocast('cpu', torch.bfloat16): return make(name)(f, y)
    assert all(torch.equal(i,j) for i,j in zip(value_grad(make(name), f, y),value_grad(inside, f, y)))

# Hard batches

CASES = dict(no_positives=[0,1,2,3,4], no_negatives=[1]*5, one_item=[2], two_of_one=[1,1], two_of_two=[0,1], lonely=[0,0,0,0,3])

@pytest.mark.parametrize('labels', CASES.values(), ids=CASES)
@pytest.mark.parametrize('name', ALL)
def test_little_to_learn(name, labels):
    f,y = batch(len(labels), 16, 1, dtype=torch.float32)[0],torch.tensor(labels)
    for r in (None,'none'):
        loss = make(name, reduction=r)
        l,g = value_grad(loss, f, y, torch.ones(len(y)))
        assert l.isfinite().all() and g.isfinite().all()
        if labels!=CASES['lonely'] and name.startswith('triplet'): assert (l==0).all() and (g==0).all()

@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('direction', ['axis','dense'])
def test_identical_embeddings(name, direction):
    "No gradient between rows that are the same; that of the proxies is the same for every row of a class"
    f = torch.eye(16)[:1].repeat(12, 1) if direction=='axis' else normalize(torch.linspace(-1, 2, 16)[None], dim=1).repeat(12, 1)
    y = torch.arange(12)%4
    for gamma in (0.,.3):
        l,g = value_grad(make(name, gamma), f, y)
        assert l.isfinite() and g.isfinite().all()
        if name.startswith(('triplet','margin','contrastive')): assert (g==0).all()

@pytest.mark.parametrize('name', ALL)
def test_duplicates(name):
    f,y = batch(20, 16, 5, dtype=torch.float32)
    f[5:10],f[10] = f[:5],f[11]
    for labels in (y, y.clone().scatter_(0, torch.arange(5,10), y[:5])):
        l,g = value_grad(make(name), f, labels)
        assert l.isfinite() and g.isfinite().all()

@pytest.mark.parametrize('name', [k for k in ALL if hasattr(ALL[k](),'proxies')])
def test_embedding_on_a_proxy(name):
    loss = make(name)
    for y in (torch.arange(5), torch.arange(5).roll(1)):
        l,g = value_grad(loss, normalize(loss.proxies[:5], dim=1), y)
        assert l.isfinite() and g.isfinite().all() and loss.proxies.grad.isfinite().all()

@pytest.mark.parametrize('name', ALL)
def test_labels_of_any_type(name):
    f,y = batch(20, 16, 5, dtype=torch.float32)
    want = make(name)(f, y)
    for o in (y.int(), y.to(torch.uint8), TensorCategory(y), torch.stack([y,y],1)[:,0]):
        got = make(name)(f, o)
        assert type(got) is torch.Tensor and torch.equal(got, want)
    torch.testing.assert_close(make(name)(f.T.contiguous().T, y), want)

@pytest.mark.parametrize('name', ALL)
def test_non_finite_embeddings(name):
    f,y = batch(20, 16, 5, dtype=torch.float32)
    f[3,1],f[17,0] = math.nan,math.inf
    with pytest.raises(ValueError, match=r'2 of 20 embeddings are not finite, in rows \[3, 17\]'): make(name)(f, y)

def test_embeddings_of_another_length():
    f,y = batch(6, 4, 2)
    with pytest.raises(ValueError, match='proxies of length 8, not 4'): ProxyNCALoss(3, 8)(f, y)

# The least inputs, for every loss and miner of the package

def classes(base): return {k:o for k,o in vars(package).items() if isinstance(o, type) and issubclass(o, base) and not k.startswith('_')}

WRAPS = dict(OtherLoss=lambda: OtherLoss(pml.ContrastiveLoss()),
    CombinedLoss=lambda: CombinedLoss([TripletLoss(), ProxyNCALoss(), MarginLoss()]),
    MatryoshkaLoss=lambda: MatryoshkaLoss(CombinedLoss([TripletLoss(), ProxyNCALoss(), MarginLoss()])))
TERMS = 'ThresholdConsistency','AntiCollapse' # which stand beside another loss, and are no setting of their own
EVERY = {k:WRAPS.get(k, o) for k,o in classes(MetricLoss).items()
         if o.compute is not MetricLoss.compute and getattr(o,'compare',None) is not ProxyLoss.compare}

def each_reduction(name, n_classes=5):
    for r in EVERY[name]().reductions:
        torch.manual_seed(0)
        loss = EVERY[name]().setup(n_classes, 16)
        loss.reduction = r
        yield loss

def test_every_loss_is_there(): assert {*WRAPS,'TripletLoss','NPairLoss','DRProxyNCALoss','ProxyAnchorLoss'}<=set(EVERY) and len(EVERY)>=12

@pytest.mark.parametrize('dtype', [torch.float32,torch.float16])
@pytest.mark.parametrize('name', EVERY)
def test_empty_batch(name, dtype):
    "Costs 0, or nothing for each of no rows, and `backward` reaches the embeddings and the weights"
    for loss in each_reduction(name):
        f = torch.zeros(0, 16, dtype=dtype, requires_grad=True)
        l = loss(f, torch.zeros(0, dtype=torch.int64))
        assert l.shape==((0,) if loss.reduction=='none' else ()) and l.sum()==0 and l.dtype==torch.float32
        l.sum().backward()
        assert f.grad.shape==(0,16) and all((p.grad==0).all() for p in loss.parameters())

@pytest.mark.parametrize('name', EVERY)
def test_one_class_in_all(name):
    f = batch(6, 16, 1, dtype=torch.float32)[0]
    for loss in each_reduction(name, n_classes=1):
        if hasattr(loss, 'include_positive'): loss.include_positive = False
        for y in (torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)[:1]):
            l,g = value_grad(loss, f[:len(y)], y, torch.ones(len(y)))
            assert l.isfinite().all() and g.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in loss.parameters())

@pytest.mark.parametrize('gamma', [0.,.3])
@pytest.mark.parametrize('name', PROXY)
def test_a_proxy_of_zeros(name, gamma):
    f,y = batch(20, 16, 5, dtype=torch.float32)
    loss = PROXY[name](5, 16, gamma=gamma)
    loss.proxies.data[2:4] = 0
    l,g = value_grad(loss, f, y)
    assert l.isfinite() and g.isfinite().all() and loss.proxies.grad.isfinite().all()

@pytest.mark.parametrize('name', EVERY)
def test_what_is_no_batch(name):
    f,y = batch(6, 16, 2, dtype=torch.float32)
    for embs,labels,says in [(f.numpy(),y,'embeddings must be a tensor, not ndarray'),
        (f.tolist(),y,'embeddings must be a tensor, not list'),
            (f,y.numpy(),'labels must be a tensor, not ndarray'), (f,y.tolist(),'labels must be a tensor, not list'),
            (f,list('aabbcc'),'labels .*, not list: torch.as_tensor makes one of whole numbers, which np.unique'),
            (f[0],y,'embeddings must be'), (f[:,:0],y,'embeddings must be'), (f.long(),y,'embeddings must be'), (f,y[:5],'labels must be'),
            (f,y[:,None],'labels must be'),
            (f,y.float(),'labels must be integers'), (f,y>0,'labels must be integers'),
            (f,y.to(torch.complex64),'labels must be integers')]:
        with pytest.raises(ValueError, match=says): EVERY[name]().setup(5, 16)(embs, labels)

def test_a_loss_in_float64_has_the_type_of_the_embeddings():
    "fastai's running mean of the loss takes no other"
    class Wide(MetricLoss):
        def compute(self, embs, labels): return sqdist(embs).sum()
    f,y = batch(6, 16, 2, dtype=torch.float32)
    assert sqdist(f).dtype==torch.float64
    for loss in (Wide(), OtherLoss(lambda f,y: sqdist(f).sum())):
        assert loss(f, y).dtype==torch.float32 and loss(f.half(), y).dtype==torch.float32 and loss(f.double(), y).dtype==torch.float64

WRONG = {'finite':[], 'from 0':[-.1], 'positive':[0,-1], 'count':[0,-3,2.5], 'share':[0,1.1], 'limit':[0,-1],
    'angle':[-.1,math.pi,28.6]}

@pytest.mark.parametrize('name', {**classes(MetricLoss),**classes(Miner)})
def test_arguments_out_of_range(name):
    "Each number among the arguments has a range, and what is outside is refused"
    cls = getattr(package, name)
    args = inspect.signature(cls.__init__).parameters.values()
    ranges = {k:v for o in reversed(cls.__mro__) for k,v in vars(o).get('ranges', {}).items()}
    numbers = [o.name for o in args if type(o.default) in (int,float) or o.name in ('n_classes','emb_sz')]
    for o in numbers:
        for bad in (math.nan, 'x', [1], *WRONG[ranges[o]], *[math.inf]*(ranges[o]!='limit')):
            with pytest.raises(ValueError, match=f'^{name}: {o} must be'): cls(**{o:bad})
    if any(o.name=='reduction' for o in args):
        with pytest.raises(ValueError, match=f"^{name}: reduction 'avg' is none of"): cls(reduction='avg')

@pytest.mark.parametrize('call',
    [lambda: MultiSimilarityLoss(alpha=0), lambda: DRMultiSimilarityLoss(2., -1), lambda: ProxyNCALoss(scale=0.),
    lambda: DRProxyNCALoss(-3, 8), lambda: ProxyAnchorLoss(5, 2.5), lambda: ProxyAnchorLoss(alpha=-32), lambda: ProxyNCALoss(lr_mult=-1),
    lambda: NPairLoss(-.02), lambda: MarginLoss(n_classes=0), lambda: MarginLoss(nu=-1.),
    lambda: SemiHardMiner(0), lambda: DistanceWeightedMiner(0.)])
def test_some_ranges(call):
    with pytest.raises(ValueError, match=' must be '): call()

def test_wrong_combinations():
    for args in ([()], [[TripletLoss()],[math.nan]], [[TripletLoss()],['x']], [[TripletLoss()],[1,2]]):
        with pytest.raises(ValueError): CombinedLoss(*args)
    with pytest.raises(TypeError, match='bogus'): TripletLoss(bogus=1)

@pytest.mark.parametrize('name', [k for k,o in classes(Miner).items() if o is not Miner])
def test_miners_on_little(name):
    miner = getattr(package, name)()
    for n in (0,1):
        assert all(o.dtype==torch.int64 and not len(o) for o in miner(torch.ones(n, 4), torch.zeros(n, dtype=torch.int64)))
    with pytest.raises(ValueError, match='embeddings must be a tensor'): miner(np.ones((4,4)), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match='labels must be'): miner(torch.ones(4, 4), torch.zeros(3, dtype=torch.int64))

def test_nothing_to_rank():
    z = torch.zeros(0, 5, 8, requires_grad=True)
    l = package.RankingLoss()(z)
    l.backward()
    assert l==0 and z.grad.shape==z.shape

@pytest.mark.parametrize('name', SEEN)
@pytest.mark.parametrize('unseen', [5,900,-1])
def test_unseen_labels(name, unseen):
    f,y = batch(20, 16, 5, dtype=torch.float32)
    y[7] = unseen
    loss = make(name)
    with pytest.raises(ValueError, match=rf'{type(loss).__name__} was made for 5 classes.* label \[{unseen}\]'): loss(f, y)
    model = torch.nn.ModuleList([loss]).eval()
    assert loss(f, y).isnan()
    loss.reduction = 'none'
    assert loss(f, y)[7].isnan()
    model.train()

def test_unseen_labels_do_not_trouble_one_boundary():
    f,y = batch(20, 16, 5)
    assert MarginLoss(n_classes=1, miner=None).eval()(f, y+100).isfinite()

# Weights, names and combinations

@pytest.mark.parametrize('cls', [ProxyNCALoss, DRProxyNCALoss, ProxyAnchorLoss, *SOFTMAX])
def test_setup(cls):
    loss = cls()
    assert not list(loss.parameters())
    with pytest.raises(RuntimeError, match='setup'): loss(F12, Y12)
    loss.setup(n_classes=3, emb_sz=8)
    w = loss.proxies
    assert loss.setup(n_classes=9, emb_sz=5).proxies is w and w.shape==(3*loss.centers,8)
    assert cls(n_classes=7).setup(n_classes=3, emb_sz=8).proxies.shape==(7*loss.centers,8)
    assert loss(F12, Y12).isfinite()

def test_margin_setup():
    assert MarginLoss().setup(n_classes=4).betas.shape==(4,)
    assert MarginLoss(n_classes=1).setup(n_classes=4).betas.shape==(1,)
    assert not MarginLoss(learn_beta=False).setup(n_classes=4).betas.requires_grad

@pytest.mark.parametrize('name', ALL)
def test_copies_and_pickles(name):
    f,y = batch(20, 16, 5)
    loss = make(name).double()
    for o in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(o(f, y), loss(f, y)) and repr(o)==repr(loss)

def test_repr():
    assert repr(DRTripletLoss(margin=.28))=="DRTripletLoss(margin=0.28, gamma=0.3, squared=False, reduction='active', miner=None)"
    assert repr(MarginLoss(3))==("MarginLoss(n_classes=3, margin=0.2, beta=1.2, learn_beta=True, nu=0.0, gamma=0.0, lr_mult=5.0, "
                                 "miner=DistanceWeightedMiner(cutoff=0.5, upper=1.4), reduction='active')")

def test_combined():
    f,y = batch(20, 16, 5, dtype=torch.float32)
    theirs = pml.ProxyAnchorLoss(5, 16)
    loss = CombinedLoss((DRProxyNCALoss(), theirs, lambda f,y: f.sum()), weights=(1,.5,2)).setup(n_classes=5, emb_sz=16)
    torch.testing.assert_close(loss(f, y), loss.losses[0](f, y)+.5*theirs(f, y)+2*f.sum())
    assert {tuple(p.shape) for p in loss.parameters()}=={(5,16)} and len(list(loss.parameters()))==2
    assert lr_mults(torch.nn.Sequential(torch.nn.Linear(2,2), loss))=={loss.losses[0].proxies: 100.}
    theirs.lr_mult = 10.
    assert lr_mults(loss)[theirs.proxies]==10.
    loss.reduction = 'none'
    assert loss(f, y).shape==(20,) and loss.losses[0].reduction=='mean'
    again = pickle.loads(pickle.dumps(CombinedLoss(loss.losses[:2])))
    assert again.seen_only and len(list(again.parameters()))==2
    with pytest.raises(ValueError, match='normalised'): CombinedLoss((TripletLoss(), NPairLoss()))

def test_starts_without_fastai():
    import subprocess, sys
    code = "import sys, dmlfast.losses.proxies; sys.exit('fastai' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode==0

def test_a_loss_that_remembers_batches_remembers_those_of_training_alone():
    from pytorch_metric_learning.losses import ContrastiveLoss as Theirs, CrossBatchMemory
    loss = OtherLoss(CrossBatchMemory(Theirs(), embedding_size=4, memory_size=64)).setup(n_classes=2)
    embs,labels = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)),torch.arange(8)//4
    loss.train()(embs, labels)
    old = loss.loss.embedding_memory.clone()
    value = loss.eval()(embs+1, labels+2)
    assert value.isfinite() and loss.loss.queue_idx==8 and (loss.loss.embedding_memory==old).all()
    loss.train()(embs+1, labels)
    assert loss.loss.queue_idx==16
    class Keeps(torch.nn.Module): # a result that hangs on a graph cannot be copied
        def forward(self, embs, labels): self.last = embs.pow(2).mean(); return self.last
    loss = OtherLoss(Keeps())
    loss(embs.requires_grad_(), labels).backward()
    assert loss.eval()(embs, labels).isfinite()

# What losses say of themselves

def by_hand(f, y, loss):
    "Share of its triplets or pairs that are above 0, one at a time, from coordinates; all are looked at"
    d,n = (lambda i,j: (f[i]-f[j]).norm()),len(y)
    def cos(a, p, k): return 0. if torch.equal(f[a], f[p]) or torch.equal(f[a], f[k]) else cosine(f[k]-f[a], f[p]-f[a])
    pos = [(a,p) for a in range(n) for p in range(n) if a!=p and y[a]==y[p]]
    neg = [(a,k) for a in range(n) for k in range(n) if y[a]!=y[k]]
    far = {a:max((p for b,p in pos if b==a), key=lambda p: d(a,p)) for a,_ in pos}
    trip = [(a,p,k) for a,p in pos for b,k in neg if a==b]
    power = 2 if getattr(loss, 'squared', False) else 1
    if isinstance(loss, TripletLoss): terms = [d(a,p)**power-d(a,k)**power+loss.margin-loss.gamma*cos(a,p,k) for a,p,k in trip]
    elif isinstance(loss, MarginLoss):
        beta = loss.betas.detach().expand(5) if len(loss.betas)==1 else loss.betas.detach()
        terms = [loss.margin+d(a,p)-beta[y[a]] for a,p,_ in trip]+[loss.margin-d(a,k)-loss.gamma*cos(a,p,k)+beta[y[a]] for a,p,k in trip]
    else:
        terms = [d(a,p)-loss.pos_margin for a,p in pos]+[loss.neg_margin-d(a,k)-loss.gamma*(cos(a,far[a],k) if a in far else 0) for a,
            k in neg]
    return sum(bool(o>0) for o in terms)/len(terms)

def every_pair(embs, labels): return all_pairs(labels)

@pytest.mark.parametrize('loss', [TripletLoss(.3), TripletLoss(.3, gamma=.5), TripletLoss(.3, gamma=.5, squared=True),
    TripletLoss(.3, miner=every_pair), TripletLoss(.3, gamma=.5, squared=True, miner=every_pair),
    ContrastiveLoss(.7, 1.3), ContrastiveLoss(.7, 1.3, gamma=.4), ContrastiveLoss(.7, 1.3, gamma=.4, miner=every_pair),
    MarginLoss(5, miner=None, nu=.3), MarginLoss(1, gamma=.4, miner=None)], ids=plain_repr)
def test_active_by_hand(loss):
    "All triplets or pairs of 13 rows, one of them alone in its class"
    f,y = batch(13, 6, 4)
    f,y = normalize(f),torch.cat([y[:12],torch.tensor([4])])
    if len(getattr(loss, 'betas', ()))==5: loss.betas.data += torch.linspace(-.3, .3, 5)
    want = by_hand(f, y, loss.double() if isinstance(loss, MarginLoss) else loss)
    assert 0<want<1 and loss.active(f, y).item()==pytest.approx(want, abs=1e-6)

@pytest.mark.parametrize('loss', [TripletLoss(miner=BatchHardMiner()), ContrastiveLoss(miner=BatchHardMiner()),
    MarginLoss(1, miner=BatchHardMiner())], ids=plain_repr)
def test_active_is_of_what_the_miner_chose(loss):
    "Two tight classes far apart, and two that lie on each other: of the hard triplets, those of the latter are active"
    f,y = torch.tensor([[0.,0],[0,1e-3],[9,0],[9,1e-3], [0,9],[0,9.001],[0,9.0005],[0,9.0015]]),torch.tensor([0,0,1,1,2,2,3,3])
    active = loss.active(f, y).item()
    if isinstance(loss, ContrastiveLoss): assert active==pytest.approx((8+4)/16) # every positive is farther than 0
    else: assert active==pytest.approx(.5 if isinstance(loss, TripletLoss) else 4/16)

def test_active_of_multi_similarity_has_a_gradient():
    "A pair that is not chosen has none: gradients by the similarities, from the loss as a sum over them"
    f,y = batch(12, 5, 3)
    f = normalize(f)
    for loss in (MultiSimilarityLoss(), MultiSimilarityLoss(eps=-.3), MultiSimilarityLoss(miner=BatchHardMiner())):
        pos,neg = label_masks(y, f64)
        sim = (f@f.T).requires_grad_()
        P,N = loss.masks(f, y, sim.detach(), pos, neg)
        value = sum((log1p_sum_exp(-loss.alpha*(sim-loss.lam), P).sum()/loss.alpha,
            log1p_sum_exp(loss.beta*(sim-loss.lam), N).sum()/loss.beta))
        torch.testing.assert_close(value/len(y), loss(f, y))
        grad = torch.autograd.grad(value, sim)[0]
        assert loss.active(f, y).item()==pytest.approx((grad!=0).sum().item()/(12*11)) and 0<loss.active(f, y)<1

@pytest.mark.parametrize('name', EVERY)
def test_active_of_the_least_batches(name):
    "Nothing to compare is nothing active"
    loss = EVERY[name]().setup(5, 16)
    for y in ([1], [1,1,1], [0,1,2]):
        active = loss.active(torch.randn(len(y), 16), torch.tensor(y, dtype=torch.int64))
        assert active is None or 0<=active<=1 and (len(y)>1 or active==0)

PROXIES = ['ProxyNCALoss','DRProxyNCALoss','ProxyAnchorLoss',*(o.__name__ for o in SOFTMAX)]
@pytest.mark.parametrize('name', EVERY)
def test_what_a_loss_compares(name):
    loss = EVERY[name]().setup(5, 16)
    # a sum with a part that compares with proxies learns from any batch
    assert loss.compares==(name not in (*PROXIES,'CombinedLoss','MatryoshkaLoss','AntiCollapse'))
    assert loss.repeatable==(name!='OtherLoss')
    if name in PROXIES: assert loss.seen_only and loss.active(F12, Y12) is None and loss.asks() is None

def test_what_a_sum_says():
    foreign = OtherLoss(lambda e,y: e.mean())
    assert not foreign.compares and OtherLoss(pml.ContrastiveLoss()).compares and not OtherLoss(pml.ProxyAnchorLoss(5, 16)).compares
    both = CombinedLoss([MultiSimilarityLoss(), ContrastiveLoss(neg_margin=.7), TripletLoss(margin=.4, squared=True)])
    assert both.compares and both.repeatable and not CombinedLoss([TripletLoss(), foreign]).repeatable
    assert not CombinedLoss([TripletLoss(), foreign]).compares
    assert both.asks()==Margin('neg_margin', .7, of='negatives') and asking(both)==(both.losses[1],both.asks())
    assert asking(both, 'gap')==(both.losses[2],Margin('margin', .4, squared=True)) and asking(both, 'boundary')==(None,None)
    assert asking(CombinedLoss([both, MarginLoss(1)]), 'boundary')[1]==Margin('margin', .2, of='boundary')
    assert both.active(F12, Y12)==both.losses[0].active(F12, Y12)
    assert CombinedLoss([ProxyNCALoss(), both]).active(F12, Y12)==both.active(F12, Y12)
    for o in (None, lambda e,y: 0, pml.ContrastiveLoss(), ProxyNCALoss()): assert asking(o)==(None,None)

# Names

def test_all_are_registered():
    assert {o for _,o in register_loss.items()}>={o for k,o in EVERY.items() if k not in (*WRAPS,*TERMS)}
    assert {type(o) for o in MINERS}=={o for _,o in register_miner.items()}
    assert register_loss['ms'] is MultiSimilarityLoss
    assert register_loss['drms'] is register_loss['dr_multi-similarity'] is DRMultiSimilarityLoss
    assert MultiSimilarityLoss.short=='ms' and DRMultiSimilarityLoss.short=='drms' and TripletLoss.short is None

@pytest.fixture
def registered():
    "Classes that a user derives from ours, found by name for as long as the test runs"
    @register_loss
    class SharpLoss(MultiSimilarityLoss):
        "Its base class keeps its short name"
    @register_loss
    class OwnLoss(MetricLoss):
        short = 'own'
        ranges = dict(scale='positive')
        def __init__(self, scale:float=1., miner=None, gamma:float=0., reduction:str='mean'):
            super().__init__(gamma, reduction)
            self.scale,self.miner = scale,miner
        def compute(self, embs, labels): return reduce_values(self.scale*embs.pow(2).sum(1), self.reduction)
    @register_miner
    class FirstMiner(Miner):
        def __init__(self, n:int=1): self.n = n
        def mine(self, embs, labels, d2): return tuple(o[:self.n] for o in all_triplets(labels))
    yield SharpLoss,OwnLoss,FirstMiner
    for o in (SharpLoss,OwnLoss): register_loss.remove(o.__name__)
    register_miner.remove('FirstMiner')

def test_a_loss_of_ones_own_is_found_by_name(registered):
    from dmlfast.study.runs import check_settings, loss_class, make_loss, miner_class, with_settings
    sharp,own,first = registered
    assert loss_class('sharp') is sharp and loss_class('ms') is MultiSimilarityLoss and loss_class('OWN') is loss_class('own_loss') is own
    assert miner_class('first') is first
    made = make_loss(dict(name='own', scale=2, miner=dict(name='first', n=3)))
    assert type(made) is own and made.scale==2 and made.miner.n==3
    check_settings(dict(loss=dict(name='own', scale=2., gamma=.1, miner=dict(name='first', n=3))))
    for loss,said in ((dict(name='onw'),"the nearest is 'OwnLoss'"), (dict(name='own', scales=2.),"the nearest is 'loss.scale'"),
        (dict(name='own', scale='big'),'`loss.scale` is'), (dict(name='own', scale=-1.),'scale must be'),
            (dict(name='own', miner=dict(name='frist')),"the nearest is 'FirstMiner'")):
        with pytest.raises(ValueError, match=said): check_settings(dict(loss=loss))
    old = dict(loss=dict(name='own', scale=2., miner=dict(name='first', n=3)))
    # another way to write it
    assert with_settings(old, dict(loss=dict(name='OwnLoss', miner=dict(name='FirstMiner'))))['loss']==dict(name='OwnLoss', scale=2.,
        miner=dict(name='FirstMiner', n=3))
    assert with_settings(old, dict(loss=dict(name='sharp')))['loss']==dict(name='sharp')

# ---- what a loop of one's own may do ----
@pytest.mark.parametrize('name', 'triplet,dr_triplet,contrastive,ms,margin,supcon,proxy_anchor,dr_proxynca,arcface'.split(','))
def test_a_second_derivative_is_refused(name):
    "PyTorch takes the result of an analytic backward for a constant, so that a penalty on the gradient would do nothing"
    x = normalize(torch.randn(16, 8, generator=torch.manual_seed(0)), dim=1).requires_grad_()
    loss = package.register_loss[name]().setup(4, 8)
    g, = torch.autograd.grad(loss(x, torch.arange(16)%4), x) # the first one there is
    assert g.isfinite().all() and g.any()
    with pytest.raises(RuntimeError, match='leave out `create_graph=True`'):
        torch.autograd.grad(loss(x, torch.arange(16)%4), x, create_graph=True)

def test_rows_of_other_lengths_are_said_once():
    x,y = 3*torch.randn(16, 8, generator=torch.manual_seed(0)),torch.arange(16)%4
    for loss in (SupConLoss(), CombinedLoss([CircleLoss()])):
        with pytest.warns(UserWarning, match='for embeddings of length 1') as said: loss(x, y), loss(x, y)
        assert len(said)==1
    unit = normalize(x, dim=1)
    unit[3] = 0
    late = SupConLoss()
    late(x[:0], y[:0])
    with pytest.warns(UserWarning, match='for embeddings of length 1') as said: late(x, y) # an empty batch says nothing
    assert said[0].filename==__file__
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for o in (unit,unit.half()): SupConLoss()(o, y)
        for loss in (NPairLoss(),TripletLoss(),OtherLoss(pml.SupConLoss())): loss(x, y)

def test_a_miner_beside_each_batch_is_refused():
    "As PyTorch Metric Learning's losses take it"
    x,y = normalize(torch.randn(16, 8, generator=torch.manual_seed(0)), dim=1),torch.arange(16)%4
    with pytest.raises(ValueError, match='by its argument `miner`'): TripletLoss()(x, y, pml_miners.TripletMarginMiner()(x, y))
    with pytest.raises(ValueError, match='in a function around it alone'): SupConLoss()(x, y, pml_miners.TripletMarginMiner()(x, y))
    for o in ((x,), (None,y)):
        with pytest.raises(ValueError, match='come together'): TripletLoss()(x, y, *o)

@pytest.mark.parametrize('dtype', [torch.float32,torch.float16])
def test_an_embedding_of_zeros_gets_no_gradient_of_arcface(dtype):
    x = normalize(torch.randn(24, 16, generator=torch.manual_seed(0)), dim=1)
    x[3] = 0
    x = x.to(dtype).requires_grad_()
    ArcFaceLoss(6, 16)(x, torch.arange(6).repeat_interleave(4)).backward()
    assert x.grad.isfinite().all() and x.grad.norm(dim=1).max()<10
