"A batch against more than the batch: the rectangle is the square restricted to the batch's anchors; and the memory of the last steps"
import copy, pytest, torch
from functools import partial
from torch.nn.functional import normalize
from fastai.callback.core import Callback
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from pytorch_metric_learning import losses as pml
from dmlfast.all import BatchMemory, Checkpoint, LargeBatch
from dmlfast.losses import *

f64 = torch.float64
LOSSES = dict(triplet=TripletLoss, triplet_squared=partial(TripletLoss, squared=True),
    triplet_hard=partial(TripletLoss, miner=BatchHardMiner()),
    contrastive=partial(ContrastiveLoss, neg_margin=1.3),
    contrastive_mined=partial(ContrastiveLoss, neg_margin=1.3, miner=MultiSimilarityMiner()),
    contrastive_hard=partial(ContrastiveLoss, neg_margin=1.3, miner=BatchHardMiner()), margin=partial(MarginLoss, 9, miner=None, nu=.01),
    margin_pairs=partial(MarginLoss, miner=MultiSimilarityMiner()), npair=NPairLoss, ms=partial(MultiSimilarityLoss, lam=.7),
    ms_mined=partial(MultiSimilarityLoss, miner=BatchHardMiner()), supcon=SupConLoss, circle=CircleLoss,
    recall=partial(RecallAtKLoss, t2=.1), both=lambda gamma: CombinedLoss([TripletLoss(gamma=gamma), SupConLoss(gamma=gamma)]),
    matryoshka=lambda gamma: MatryoshkaLoss(TripletLoss(gamma=gamma)), threshold=lambda gamma: ThresholdConsistency())

def some(n, m, d=6, c=6, seed=0, dtype=f64):
    "A batch of the first classes, and others of all: anchors with positives in one of both, in both and in none"
    g = torch.Generator().manual_seed(seed)
    x = normalize(torch.randn(n+m, d, generator=g, dtype=dtype), dim=1)
    y = torch.cat([torch.randint(c-2, (n,), generator=g), 1+torch.randint(c, (m,), generator=g)])
    y[n-1],y[0],y[n] = 7,1,1
    return x[:n],y[:n],x[n:],y[n:]

def rows(loss):
    loss.reduction = 'none'
    return loss

def grads(f, x):
    x = x.clone().requires_grad_()
    l = f(x)
    l.backward()
    return l.detach(),x.grad

@pytest.mark.parametrize('gamma', [0.,.3])
@pytest.mark.parametrize('name', LOSSES)
def test_it_is_the_square_restricted_to_the_anchors(name, gamma):
    "Values and gradients of the batch; what is remembered is constant"
    loss = rows(LOSSES[name](gamma=gamma))
    for n,m in ((7,11),(12,5),(1,9)):
        x,y,ox,oy = some(n, m)
        w = torch.rand(n, dtype=f64, generator=torch.Generator().manual_seed(1))
        want = grads(lambda x: w@loss(torch.cat([x, ox]), torch.cat([y, oy]))[:n], x)
        got = grads(lambda x: w@loss(x, y, ox, oy), x)
        assert want[1].abs().max()>0
        for a,b in zip(got, want): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

def triplets(x, y, n, gamma, margin=.2):
    "The hinges of the triplets whose anchor is among the first rows, as written"
    d = lambda o: o.norm()
    return torch.stack([d(x[p]-x[a])-d(x[k]-x[a])+margin-gamma*torch.cosine_similarity(x[k]-x[a], x[p]-x[a], dim=0) for a in range(n)
        for p in range(len(x)) if p!=a and y[p]==y[a] for k in range(len(x)) if y[k]!=y[a]]).relu()

@pytest.mark.parametrize('reduction', ['active','mean','sum'])
@pytest.mark.parametrize('gamma', [0.,.3])
def test_triplets_are_counted_for_anchors_alone(gamma, reduction):
    x,y,ox,oy = some(6, 8)
    def definition(x):
        h = triplets(torch.cat([x, ox]), torch.cat([y, oy]), len(x), gamma)
        return h.sum()/dict(active=(h>0).sum(), mean=len(h), sum=1)[reduction]
    for a,b in zip(grads(lambda x: TripletLoss(gamma=gamma, reduction=reduction)(x, y, ox, oy), x), grads(definition, x)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

@pytest.mark.parametrize('reduction', ['mean','sum'])
@pytest.mark.parametrize('name', ['ms','supcon','circle','recall'])
def test_reductions_are_those_of_anchors(name, reduction):
    x,y,ox,oy = some(9, 14)
    loss = LOSSES[name](gamma=.3)
    each,loss.reduction = rows(copy.copy(loss))(x, y, ox, oy),reduction
    both = torch.cat([y, oy])
    counts = torch.tensor([name=='ms' or 1<(both==o).sum()<len(both) for o in y])
    assert name=='ms' or not counts.all()
    torch.testing.assert_close(loss(x, y, ox, oy), each[counts].sum()/(counts.sum() if reduction=='mean' else 1), rtol=1e-12, atol=0)

@pytest.mark.parametrize('gamma', [0.,.3])
@pytest.mark.parametrize('name', LOSSES)
def test_no_others_are_the_plain_loss(name, gamma):
    "Bit for bit, in float32"
    x,y,ox,oy = some(12, 5, dtype=torch.float32)
    loss = LOSSES[name](gamma=gamma)
    for a,b in zip(grads(lambda x: loss(x, y, ox[:0], oy[:0]), x), grads(lambda x: loss(x, y), x)): assert torch.equal(a, b)

@pytest.mark.parametrize('miner', [RandomMiner(), SemiHardMiner(), SoftHardMiner(), BatchHardMiner(), DistanceWeightedMiner(),
    MultiSimilarityMiner()], ids=str)
def test_miners_see_the_rectangle(miner):
    "Anchors of the batch alone, and positives and negatives in both"
    x,y,ox,oy = some(12, 30)
    x,y = torch.cat([x, ox]),torch.cat([y, oy])
    torch.manual_seed(0)
    a,p,a2,n = as_pairs(miner(x, y, sqdist(x, 12)))
    assert max(a.max(), a2.max())<12 and (y[a]==y[p]).all() and (a!=p).all() and (y[a2]!=y[n]).all()
    assert p.max()>=12 and n.max()>=12
    if not isinstance(miner, (BatchHardMiner,MultiSimilarityMiner)): return
    full = as_pairs(miner(x, y)) # the two that draw nothing
    for got,want in ((torch.stack([a, p]),torch.stack(full[:2])), (torch.stack([a2, n]),torch.stack(full[2:]))):
        assert torch.equal(got, want[:,want[0]<12])

@pytest.mark.parametrize('theirs', [pml.TripletMarginLoss(margin=.3), pml.MultiSimilarityLoss(), pml.ContrastiveLoss(neg_margin=1.2),
    pml.SupConLoss()], ids=lambda o: type(o).__name__)
def test_losses_from_elsewhere_take_their_own_arguments(theirs):
    "PyTorch Metric Learning's compare with `ref_emb`; no row is a pair with itself"
    x,y,ox,oy = some(9, 14)
    ours = dict(TripletMarginLoss=TripletLoss(margin=.3), MultiSimilarityLoss=None, ContrastiveLoss=ContrastiveLoss(neg_margin=1.2),
        SupConLoss=SupConLoss())[type(theirs).__name__]
    value = OtherLoss(theirs)(x, y, ox, oy)
    if ours is not None: torch.testing.assert_close(value, ours(x, y, ox, oy), rtol=1e-5, atol=1e-6) # they add up in float32 here and there
    assert value.item()!=pytest.approx(OtherLoss(theirs)(x, y).item())

@pytest.mark.parametrize('loss,why', [(ProxyNCALoss(4, 6),'ProxyNCALoss does not compare images with each other'),
    (ArcFaceLoss(4, 6),'ArcFaceLoss does not'),
    (AntiCollapse(),'AntiCollapse does not'), (CombinedLoss([ProxyNCALoss(4, 6), AntiCollapse()]),'ProxyNCALoss does not'),
    (OtherLoss(pml.ProxyNCALoss(4, 6)),'ProxyNCALoss compares images with weights of its own'),
    (OtherLoss(lambda e,y: e.sum()),'takes no others: it has no indices_tuple, ref_emb, ref_labels'),
    (TripletLoss(miner=lambda e,y: all_triplets(y)),'the miner of TripletLoss, .*, chooses within a batch alone')],
    ids=['proxies','softmax','no pairs','several','weights of its own','a function','a miner'])
def test_what_has_nothing_to_compare_is_refused(loss, why):
    x,y,ox,oy = some(5, 6)
    with pytest.raises(ValueError, match=why): loss(x, y%4, ox, oy%4)

def test_one_that_can_is_enough():
    "A part that has no pairs sees the batch alone"
    x,y,ox,oy = some(9, 14)
    y,oy = y%4,oy%4
    torch.manual_seed(0)
    nca = ProxyNCALoss(4, 6)
    torch.testing.assert_close(CombinedLoss([TripletLoss(), nca])(x, y, ox, oy), TripletLoss()(x, y, ox, oy)+nca(x, y))

def test_others_of_another_length():
    x,y,ox,oy = some(5, 6)
    with pytest.raises(ValueError, match='embeddings have 6 numbers, and the others 4'): TripletLoss()(x, y, ox[:,:4], oy)

class Steps(Callback):
    "What each step compared, and with what value"
    order,run_valid = 71,False
    def before_fit(self): self.seen = []
    def before_batch(self): self.batch = self.yb
    def after_loss(self):
        assert self.yb is self.batch or len(self.yb)==1 # as it was, for whoever comes after
        self.seen.append((self.pred.detach().clone(), self.yb[0].clone(), self.learn.loss.item()))

@pytest.mark.parametrize('size', [20,70,10_000])
def test_each_batch_is_compared_with_the_last_steps(make_learner, size):
    "With the embeddings as they were then, those of the oldest first to go; with none before `start`, and none of validation images"
    loss = MultiSimilarityLoss()
    learn,steps = make_learner(loss),Steps()
    learn.fit(2, 1e-2, cbs=[BatchMemory(size, start=3), steps])
    assert len(steps.seen)>6
    for t,(x,y,value) in enumerate(steps.seen):
        past = () if t<3 else [torch.cat([o[k] for o in steps.seen[:t]])[-size:] for k in (0,1)]
        assert value==pytest.approx(loss(x, y, *past).item(), rel=1e-5)
        assert not len(past) or value!=pytest.approx(loss(x, y).item(), rel=1e-5)

def test_chunks_do_not_matter(make_learner):
    "Of a large batch, the memory gets the embeddings of all chunks"
    def run(*cbs, memory=True):
        learn = make_learner(DRMultiSimilarityLoss(), freeze_bn=True, opt_func=SGD)
        learn.fit(1, 1e-2, cbs=[*cbs, *([BatchMemory(100, start=0)] if memory else [])])
        return learn.model.state_dict()
    def far(a, b): return max((a[k]-b[k]).abs().max().item() for k in a)
    whole = run()
    chunks,none = far(whole, run(LargeBatch(7))),far(whole, run(memory=False))
    assert 10*chunks<none and chunks<1e-4, (chunks,none)

@pytest.mark.parametrize('size', [50,400])
def test_a_run_is_resumed_with_its_memory(make_learner, tmp_path, size):
    def go(learn, *cbs): learn.fit_one_cycle(3, 1e-2, cbs=[BatchMemory(size, start=4), *cbs])
    class Stop(Callback):
        run_valid = False
        def before_batch(self):
            if self.epoch==2: raise KeyboardInterrupt
    whole = make_learner()
    go(whole)
    with pytest.raises(KeyboardInterrupt): go(make_learner(), Checkpoint(tmp_path/'run'), Stop())
    set_seed(5)
    learn = make_learner(seed=9).resume(tmp_path/'run')
    go(learn, Checkpoint(tmp_path/'run'))
    assert [float(o) for o in learn.recorder.losses]==[float(o) for o in whole.recorder.losses]
    for k,v in whole.model.state_dict().items(): assert torch.equal(v, learn.model.state_dict()[k])
    other = make_learner(seed=9)
    with pytest.raises(KeyboardInterrupt): go(other, Checkpoint(tmp_path/'other'), Stop())
    with pytest.raises(ValueError, match=fr'remembered {size} embeddings: continue it with `BatchMemory\({size}\)`'):
        make_learner().resume(tmp_path/'other').fit_one_cycle(3, 1e-2, cbs=[BatchMemory(7, start=4), Checkpoint(tmp_path/'other')])

def test_the_learner_refuses_what_cannot_remember(make_learner):
    with pytest.raises(ValueError, match='BatchMemory does not work with this loss: ProxyNCALoss does not compare'):
        make_learner(ProxyNCALoss()).fit(1, cbs=BatchMemory())
    with pytest.raises(ValueError, match='BatchMemory does not work with this loss: the miner of TripletLoss'):
        make_learner(TripletLoss(miner=lambda e,y: all_triplets(y))).fit(1, cbs=BatchMemory())
    learn = make_learner(pml.MultiSimilarityLoss())
    learn.fit(1, 1e-3, cbs=BatchMemory(50, start=1))

def test_a_fit_that_is_too_short_says_so(make_learner):
    learn = make_learner()
    with pytest.warns(UserWarning, match='starts after 1000 steps, and this fit has .*: choose a smaller `start`'):
        learn.fit(1, 1e-3, cbs=BatchMemory())

def test_finding_a_rate_leaves_no_memory(make_learner):
    learn = make_learner(cbs=BatchMemory(100, start=0))
    learn.lr_find(num_it=4, show_plot=False)
    assert learn.batch_memory.embs is None

@pytest.mark.parametrize('args', [dict(size=0), dict(size=2.5), dict(start=-1), dict(start=None)], ids=str)
def test_odd_arguments(args):
    with pytest.raises(ValueError, match=next(iter(args))): BatchMemory(**args)
