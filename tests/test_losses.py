"Losses against their definitions, against other libraries, and on batches that break losses"
import math, pytest, torch
from torch.nn.functional import normalize
from dmlfast.geometry import *
from dmlfast.losses import *

f64 = torch.float64
i = torch.arange(96).reshape(12,8).double()
F12,Y12 = normalize(torch.sin(1.3*i+0.7*(i%5)), dim=1),torch.arange(12)%3

def close(a, b, tol=1e-8): assert abs(float(a)-b)<=tol, (float(a),b)

def gathered(f, y, margin=.2, gamma=0., squared=False, reduction='active'):
    "The triplet loss as it is written, one gathered triplet at a time"
    pos,neg = label_masks(y)
    a,p,n = (pos[:,:,None]&neg[:,None]).nonzero(as_tuple=True)
    u,v = f[n]-f[a],f[p]-f[a]
    d = lambda o: o.pow(2).sum(1) if squared else o.norm(dim=1)
    h = (d(v)-d(u)+margin-gamma*torch.cosine_similarity(u, v, dim=1)).relu()
    if reduction=='none': return torch.stack([h[a==k].mean() if (a==k).any() else h.new_zeros(()) for k in range(len(f))])
    return h.sum()/dict(active=(h>0).sum(), mean=len(h), sum=1)[reduction]

@pytest.mark.parametrize('squared,gamma,mean,active', [(True,.3,.17688771,.67924879), (True,0.,.19860244,.68092266), (True,-.3,.22740462,.64208363),
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
    import dmlfast.losses as m
    f,y = batch(40, 4, 5)
    want = value_grad(DRTripletLoss(), f, y)
    blocks = m._anchor_blocks
    monkeypatch.setattr(m, '_anchor_blocks', lambda y,sz: blocks(y, 1))
    got = value_grad(DRTripletLoss(), f, y)
    for g,w in zip(got,want): torch.testing.assert_close(g, w)

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
@pytest.mark.parametrize('squared', [True,False])
@pytest.mark.parametrize('reduction', ['active','mean'])
def test_triplet_gradient_of_tight_classes(spread, squared, reduction):
    assert grad_error(DRTripletLoss(margin=4.5, squared=squared, reduction=reduction), *spread_batch(spread))<1e-5
