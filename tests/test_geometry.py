"Distances where rounding matters, and index tables on odd batches"
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import normalize
from dmlfast.losses.geometry import *

f64 = torch.float64

def rows(n, d, scale=1., seed=0):
    return scale*normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=f64), dim=1)

@pytest.mark.parametrize('scale', [1e-3,1.,1e3])
@pytest.mark.parametrize('d', [3,64,2048])
def test_rows_that_differ_by_rounding_are_the_same(d, scale):
    x = rows(6, d, scale).float()
    y = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(1))<.5, x.nextafter(x+1), x)
    both = torch.cat([x,y]).requires_grad_()
    d2 = sqdist(both)
    assert (d2.diagonal()==0).all() and (d2.diagonal(6)==0).all() and (d2[:6,:6]>0).sum()==30
    weights = torch.diag_embed(torch.full((6,), 1e8, dtype=f64), offset=6)
    (d2*weights).sum().backward()
    assert (both.grad==0).all()

@pytest.mark.parametrize('scale', [1e-3,1.,1e3])
@pytest.mark.parametrize('gap', [1e-2,1e-4,1e-5])
def test_near_rows_keep_their_distance(gap, scale):
    x = rows(8, 128, scale).float()
    y = (x.double()+gap*rows(8, 128, scale, seed=1)).float()
    want = (x.double()-y.double()).pow(2).sum(1)
    torch.testing.assert_close(sqdist(torch.cat([x,y])).diagonal(8), want, rtol=1e-4, atol=0)

def test_is_cdist():
    x = rows(20, 7)
    torch.testing.assert_close(safe_sqrt(sqdist(x)), torch.cdist(x, x, compute_mode='donot_use_mm_for_euclid_dist'))
    assert torch.autograd.gradcheck(sqdist, x.requires_grad_())

def test_dir_cos_is_a_cosine():
    f = rows(9, 5)
    a,p,n = torch.tensor([0,1,2]),torch.tensor([3,4,5]),torch.tensor([6,7,8])
    d2 = sqdist(f)
    torch.testing.assert_close(dir_cos(d2[a,p], d2[a,n], d2[p,n]), torch.cosine_similarity(f[n]-f[a], f[p]-f[a], dim=1))

@pytest.mark.parametrize('dtype', [torch.float32,f64])
def test_safe_roots(dtype):
    x = torch.tensor([0.,-0.,1e-20,4.], dtype=dtype, requires_grad=True)
    for f in (safe_rsqrt,safe_sqrt):
        assert (f(x)[:2]==0).all() and torch.equal(f(x), f(x.detach()))
        g, = torch.autograd.grad(f(x).sum(), x)
        assert (g[:2]==0).all() and g.isfinite().all()
    assert torch.autograd.gradcheck(lambda x: (safe_rsqrt(x),safe_sqrt(x)), torch.tensor([.5,2.], dtype=f64, requires_grad=True))

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-2, 2**40), max_size=12)|st.lists(st.integers(0, 3), max_size=12))
def test_tables_are_the_masks(labels):
    y = torch.tensor(labels, dtype=torch.int64)
    pos,neg = label_masks(y)
    assert torch.equal(pos.float(), label_masks(y, torch.float32)[0]) and torch.equal(neg.double(), label_masks(y, f64)[1])
    pairs = {(a,p) for rows,mates in class_mates(y) for a,ps in zip(rows.tolist(), mates.tolist()) for p in ps}
    assert pairs=={tuple(o) for o in pos.nonzero().tolist()} and sum(m.numel() for _,m in class_mates(y))==len(pairs)
    assert class_index(y)[1].tolist()==[labels.count(o) for o in labels]
