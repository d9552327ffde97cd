"Softmax losses over learned vectors of classes, against PyTorch Metric Learning and their definitions"
import copy, math, pickle, pytest, torch
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning.regularizers import SparseCentersRegularizer
from dmlfast.losses import *

f64 = torch.float64
i = torch.arange(96).reshape(12,8).double()
F12,Y12 = normalize(torch.sin(1.3*i+0.7*(i%5)), dim=1),torch.arange(12)%3
P3 = torch.cos(.9*torch.arange(24).reshape(3,8).double())
EACH = [NormFaceLoss, CosFaceLoss, ArcFaceLoss, SubCenterArcFaceLoss, SoftTripleLoss]

def made(cls, vectors=P3, **kwargs):
    "A loss with given vectors, in float64"
    loss = cls(*vectors.shape, **kwargs) if cls not in EACH[3:] else cls(len(vectors)//kwargs.get('centers', 1), vectors.shape[1], **kwargs)
    loss = loss.double()
    with torch.no_grad(): loss.proxies.copy_(vectors)
    return loss

def by_class(loss):
    "Its vectors, `(c,k,d)`"
    return loss.proxies.detach().unflatten(0, (loss.centers,-1)).transpose(0, 1)

def batch(n, d, c, seed=0):
    g = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=g, dtype=f64), dim=1),torch.randint(c, (n,), generator=g)

def value_grad(loss, f, y, to_f=lambda o: o):
    f = f.detach().clone().requires_grad_()
    l = loss(to_f(f), y)
    l.backward()
    return l.detach(),f.grad

@pytest.mark.parametrize('cls,value', [(NormFaceLoss,2.7384864979), (ArcFaceLoss,8.2237754251)])
def test_values(cls, value): assert made(cls)(F12, Y12).item()==pytest.approx(value, abs=1e-9)

def test_defaults():
    assert [o().scale for o in EACH]==[16,16,16,16,20]
    assert (CosFaceLoss().margin,ArcFaceLoss().margin,SubCenterArcFaceLoss().centers)==(.35,.5,3)
    want = dict(margin=.01, temp=.1, tau=.2, centers=10, gamma=0)
    assert {k:getattr(SoftTripleLoss(), k) for k in want}==want

DEG = math.degrees(.5)
PAIRS = dict(normface=(NormFaceLoss, lambda c,d: pml.NormalizedSoftmaxLoss(c, d, temperature=1/16)),
    cosface=(CosFaceLoss, lambda c,d: pml.CosFaceLoss(c, d, scale=16)), arcface=(ArcFaceLoss, lambda c,d: pml.ArcFaceLoss(c, d, DEG, 16)),
    wide_margin=(lambda c,d: ArcFaceLoss(c, d, 1.7), lambda c,d: pml.ArcFaceLoss(c, d, math.degrees(1.7), 16)), # many angles are past pi-m
    subcenter=(SubCenterArcFaceLoss, lambda c,d: pml.SubCenterArcFaceLoss(num_classes=c, embedding_size=d, margin=DEG, scale=16)),
    softtriple=(lambda c,d: SoftTripleLoss(c, d, tau=0), pml.SoftTripleLoss),
    regularised=(SoftTripleLoss, lambda c,d: pml.SoftTripleLoss(c, d, weight_regularizer=SparseCentersRegularizer(c, 10),
        weight_reg_weight=.2)))

@pytest.mark.parametrize('n,d,c', [(24,8,6),(50,16,7),(33,4,3)])
@pytest.mark.parametrize('name', PAIRS)
def test_pml(name, n, d, c):
    torch.manual_seed(n)
    ours,theirs = (o(c, d).double() for o in PAIRS[name])
    (theirs.fc if hasattr(theirs, 'fc') else theirs.W).data = by_class(ours).flatten(0, 1).T.clone()
    f,y = batch(n, d, c, seed=n)
    (l0,g0),(l1,g1) = value_grad(theirs, 2*f, y),value_grad(ours, 2*f, y, lambda o: normalize(o, dim=1))
    assert abs(l0-l1)<1e-10
    torch.testing.assert_close(g1, g0, rtol=1e-9, atol=1e-12)
    w = (theirs.fc if hasattr(theirs, 'fc') else theirs.W).grad.T.unflatten(0, (c,-1)).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(ours.proxies.grad, w, rtol=1e-8, atol=1e-11)

def slow(loss, f, y):
    "Any of the losses as it is written, one number at a time"
    w,res = normalize(by_class(loss), dim=2),[]
    for x,c in zip(f, y):
        own = max(w[c], key=lambda o: x@o)
        def of(k, g):
            "What a class has of a number of each of its vectors"
            if not isinstance(loss, SoftTripleLoss): return g(max(w[k], key=lambda o: x@o))
            return (torch.stack([x@o/loss.temp for o in w[k]]).softmax(0)*torch.stack([g(o) for o in w[k]])).sum()
        def c_of(k): return of(k, lambda o: cosine_similarity(o-x, own-x, dim=0)) if k!=c else 0
        logits = [of(k, lambda o: x@o)-loss.gamma*c_of(k) for k in range(len(w))]
        if isinstance(loss, ArcFaceLoss):
            theta = (x@own).acos()
            logits[c] = (theta+loss.margin).cos() if theta<=math.pi-loss.margin else theta.cos()-loss.margin*math.sin(loss.margin)
        elif isinstance(loss, CosFaceLoss): logits[c] = logits[c]-loss.margin
        res.append(cross_entropy(loss.scale*torch.stack(logits), c))
    res = torch.stack(res).mean()
    if not isinstance(loss, SoftTripleLoss): return res
    k = w.shape[1]
    return res+loss.tau*sum((o[a]-o[b]).norm() for o in w for a in range(k) for b in range(a))/(len(w)*k*(k-1))

@pytest.mark.parametrize('gamma', [0.,.3,-.3])
@pytest.mark.parametrize('cls', EACH)
def test_definitions(cls, gamma):
    torch.manual_seed(1)
    loss,(f,y) = cls(5, 6, gamma=gamma).double(),batch(15, 6, 5)
    (l0,g0),(l1,g1) = (value_grad(o, f, y, lambda f: normalize(f, dim=1)) for o in (lambda f,y: slow(loss, f, y),loss))
    torch.testing.assert_close(l1, l0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(g1, g0, rtol=1e-7, atol=1e-9)

@pytest.mark.parametrize('theta', [0.,1e-7,1e-4,1e-2,1.,math.pi-.5-1e-3,math.pi-.5+1e-3,math.pi-1e-4,math.pi])
def test_angles(theta):
    "Value and gradient by the angle, which is `-sin(theta+m)` up to `pi-m`, and `-sin(theta)` past it; at 0 there is no direction"
    for dtype in (torch.float32,f64):
        t = torch.tensor(theta, dtype=f64)
        f = torch.stack([t.cos(),t.sin()])[None].to(dtype).requires_grad_()
        cos,sin = small_angle(f, torch.tensor([[3.,0]], dtype=dtype))
        shift = ArcFaceLoss().shift(f, torch.tensor([[3.,0]], dtype=dtype))
        past = theta>math.pi-.5
        want = (math.cos(theta)-.5*math.sin(.5) if past else math.cos(theta+.5))-math.cos(theta)
        assert shift.item()==pytest.approx(want, abs=2e-7) and sin.item()==pytest.approx(math.sin(theta), abs=2e-7)
        by_theta = torch.autograd.grad((shift+cos)[0], f)[0].double()@torch.stack([-t.sin(),t.cos()])
        if 0<theta<math.pi and not (dtype==torch.float32 and theta==1e-7): # that is within rounding of 0
            assert by_theta.item()==pytest.approx(-math.sin(theta) if past else -math.sin(theta+.5), rel=1e-4, abs=1e-6)
        else: assert by_theta.isfinite().all()

@pytest.mark.parametrize('cls', EACH)
def test_several_vectors_of_few_images(cls):
    "`start`: each vector of a class is the mean of a part of its images, of all where there are fewer images than vectors"
    loss = cls(3, 8)
    was = loss.proxies.detach().clone().unflatten(0, (loss.centers,-1))
    f = F12[:8].float()
    y = torch.tensor([0,1,0,0,0,0,0,0])
    loss.start(f, y)
    w,k = by_class(loss),loss.centers
    for o in w[1]: torch.testing.assert_close(o, f[1])
    assert torch.equal(w[2], was[:,2]) # no images: as they were
    mine,every = f[y==0],normalize(f[y==0].mean(0), dim=0)
    for j in range(k): torch.testing.assert_close(w[0,j], normalize(mine[j::k].mean(0), dim=0) if j<len(mine) else every)

def test_two_looks_share_a_class():
    "Images of a class with two looks get a vector each, where the sum of both is far from either"
    torch.manual_seed(0)
    looks = torch.eye(4)[:3]
    f,y = normalize(looks.repeat(8, 1)+.05*torch.randn(24, 4), dim=1),torch.tensor([0,0,1]).repeat(8)
    loss = SubCenterArcFaceLoss(2, 4, margin=.2)
    loss.start(f, y)
    opt = torch.optim.Adam(loss.parameters(), lr=.02)
    for _ in range(200):
        opt.zero_grad(); loss(f, y).backward(); opt.step()
    w = normalize(by_class(loss), dim=2)[0]
    assert (w@looks[:2].T).amax(0).min()>.9

# Outliers

@pytest.mark.parametrize('train', [True,False])
def test_outliers(train):
    "Ten images of a class, seven near its first vector, two at the second and one at the third, in any order"
    torch.manual_seed(0)
    loss = SubCenterArcFaceLoss(3, 6).train(train)
    loss.proxies.data = 2*torch.eye(6)[[3,0,4, 5,1,1, 4,2,0]] # first vectors of the three classes, second, third
    f = normalize(torch.cat([torch.eye(6)[[0]*7+[1]*2+[2]]])+.05*torch.rand(10, 6), dim=1)
    f[9] = normalize(torch.tensor([-.2,0,1,0,0,0]), dim=0)
    y,mix = torch.ones(10, dtype=torch.int64),torch.randperm(10)
    y[3] = 0 # in its own class it is alone, and what is nearest to it is dominant
    loss.proxies.data[3] = torch.eye(6)[0]
    rows,cos = loss.outliers(3*f[mix], y[mix])
    assert mix[rows].tolist()[0]==9 and sorted(mix[rows].tolist())==[7,8,9] and not cos.requires_grad
    torch.testing.assert_close(cos, f[mix][rows]@torch.eye(6)[0])
    assert (cos.diff()>=0).all()
    with pytest.raises(ValueError, match='3 classes'): loss.outliers(f, y+2)

# A sample of the classes

def sampled(n=200, d=16, sample=.1, cls=ArcFaceLoss, **kwargs):
    torch.manual_seed(0)
    return cls(n, d, sample=sample, **kwargs).double()

@pytest.mark.parametrize('cls', EACH)
def test_sample(cls):
    "The loss is that over the classes of the batch and a share of the others, which alone get a gradient"
    loss,(f,y) = sampled(cls=cls),batch(12, 16, 200)
    l,_ = value_grad(loss, f, y)
    grad = loss.proxies.grad.unflatten(0, (loss.centers,-1))
    seen = torch.tensor(sorted({*grad.abs().sum((0,2)).nonzero()[:,0].tolist(),*y.tolist()}))
    if cls in EACH[:3]: assert len(seen)==len(y.unique())+math.ceil(.1*(200-len(y.unique())))
    else: assert len(y.unique())<len(seen)<=len(y.unique())+20
    if cls in EACH[:3]:
        part = made(cls, loss.proxies.detach()[seen])
        assert l.item()==pytest.approx(part(f, torch.searchsorted(seen, y)).item(), abs=1e-10)

def test_a_sample_changes_in_every_step_and_visits_all():
    loss,(f,y) = sampled(n=50, sample=.2),batch(4, 16, 50)
    visits = torch.zeros(50)
    for _ in range(400):
        rows,own = loss.chosen(y)
        here = (rows.detach()[:,None]==loss.proxies.detach()).all(2).nonzero()
        assert torch.equal(here[:,1][own], y) and len(here)==len(rows)==4+10
        visits[here[:,1]] += 1
    assert (visits[y]==400).all()
    rest = visits[[k for k in range(50) if k not in y]]/400 # each with a chance of 10/46
    assert (rest-10/46).abs().max()<5*(10/46*36/46/400)**.5

def test_all_classes_in_evaluation():
    loss,(f,y) = sampled(),batch(12, 16, 200)
    whole = made(ArcFaceLoss, loss.proxies.detach())
    assert loss(f, y)!=whole(f, y)==loss.eval()(f, y)
    assert loss(f, y+200).isnan() and sampled(sample=1.).repeatable and not loss.repeatable

def test_a_sample_has_a_generator_of_its_own():
    "It draws nothing from the global one, and goes on where it was after a copy, a pickle and a state"
    loss,(f,y) = sampled(),batch(12, 16, 200)
    state = torch.get_rng_state()
    first = [loss(f, y).item() for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state) and len(set(first))==3
    assert [sampled()(f, y).item()]==first[:1]
    others = [copy.deepcopy(loss),pickle.loads(pickle.dumps(loss)),sampled()]
    others[2].load_state_dict(loss.state_dict())
    want = [loss(f, y).item() for _ in range(3)]
    for o in others: assert [o(f, y).item() for _ in range(3)]==want
    torch.manual_seed(1)
    assert ArcFaceLoss(200, 16, sample=.1).draws[0]!=loss.draws[0] and 'draws' not in ArcFaceLoss(200, 16).state_dict()

@pytest.mark.parametrize('labels', [[],[3],[3,3,3],[*range(20)]])
@pytest.mark.parametrize('cls', EACH)
def test_samples_of_little(cls, labels):
    for n,sample in ((20,.01),(20,1.),(4,.5)):
        y = torch.tensor(labels, dtype=torch.int64)%n
        for reduction in ('mean','sum','none'):
            loss = sampled(n, 8, sample, cls, reduction=reduction)
            l,g = value_grad(lambda f,y: loss(f, y).sum(), batch(len(y), 8, 1)[0], y)
            assert l.isfinite() and g.isfinite().all() and loss.proxies.grad.isfinite().all()

# Reductions and names

@pytest.mark.parametrize('cls', EACH)
def test_reductions(cls):
    f,y = batch(20, 8, 5)
    torch.manual_seed(0)
    loss,res = cls(5, 8, gamma=.2).double(),{}
    for r in loss.reductions: loss.reduction,res[r] = r,None or (setattr(loss, 'reduction', r),loss(f, y))[1]
    assert res['none'].shape==(20,)
    torch.testing.assert_close(res['none'].mean(), res['mean'])
    torch.testing.assert_close(res['none'].sum(), res['sum'])

@pytest.mark.parametrize('tau', [0.,20.])
def test_tau_pulls_the_vectors_of_a_class_together(tau):
    torch.manual_seed(0)
    loss,(f,y) = SoftTripleLoss(3, 8, centers=4, tau=tau),batch(30, 8, 3)
    opt = torch.optim.SGD(loss.parameters(), lr=.02)
    spread = lambda: centers_apart(normalize(loss.proxies.detach(), dim=1).unflatten(0, (4,3))).item()
    before = spread()
    for _ in range(200):
        opt.zero_grad(); loss(f.float(), y).backward(); opt.step()
    assert (spread()<.1*before)==(tau>0)

@pytest.mark.parametrize('gap', [1e-1,1e-3,1e-4])
def test_centers_that_nearly_coincide(gap):
    g = torch.Generator().manual_seed(0)
    w = normalize(torch.randn(1, 5, 32, generator=g)+gap*torch.randn(4, 5, 32, generator=g)/32**.5, dim=2)
    got,want = (o.requires_grad_() for o in (w.clone(),w.double()))
    for o in (got,want): centers_apart(o).backward()
    assert (got.grad-want.grad).norm()<1e-3*want.grad.norm()
    half = torch.stack([(w[a]-w[b]).double().norm(dim=1) for a in range(4) for b in range(a)]).mean()/2
    torch.testing.assert_close(centers_apart(w).double(), half, rtol=1e-4, atol=0)
    same = w[:1].repeat(4, 1, 1).requires_grad_()
    centers_apart(same).backward()
    assert (same.grad==0).all()

def test_names():
    for name,cls in zip(('normface','cos_face','arcface','subcenter','soft_triple'), EACH): assert register_loss[name] is cls
    for bad in (0, 1.5, -1, math.nan):
        with pytest.raises(ValueError, match='^ArcFaceLoss: sample must be a number greater than 0 and at most 1'): ArcFaceLoss(sample=bad)
