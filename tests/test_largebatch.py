"Batches in chunks: the gradient is that of the whole batch"
import copy, pickle, pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.training import BnFreeze
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.callback.progress import ProgressCallback
from fastai.learner import Recorder
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from dmlfast.losses import *
from dmlfast.train.largebatch import LargeBatch
from dmlfast.train.learner import MetricLearner
from dmlfast.train.ssr import SelfSupervisedRanking

class Gradients(Callback):
    "Remember the gradient of the first step"
    def before_step(self):
        if not hasattr(self, 'grads'): self.grads = {k:p.grad.clone() for k,p in self.model.named_parameters() if p.grad is not None}

class Peak(Callback):
    "Count the images of each run of the body"
    def __init__(self, layer): self.layer,self.sizes = layer,[]
    def before_fit(self): self.hook = self.layer.register_forward_hook(lambda m, x, y: self.sizes.append(len(x[0])))
    def after_fit(self): self.hook.remove()

def batches(n=24, size=16, steps=2):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, size, size, generator=g, dtype=torch.float64), torch.arange(n)//4) for _ in range(steps)]

class Body(nn.Module):
    def __init__(self, p=0.):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.GELU(), nn.Dropout(p), nn.Flatten(), nn.Linear(8*49, 8))
    def forward(self, x): return self.layers(x)

def trained(cbs, model, loss=None, steps=2):
    "Gradient of the first step and weights after all of them, from the same start and the same random numbers"
    data = batches(steps=steps)
    dl = DataLoader(data, bs=None, num_workers=0)
    set_seed(0)
    kept,dls = Gradients(),DataLoaders(dl, DataLoader([], bs=None), device='cpu')
    learn = MetricLearner(dls, copy.deepcopy(model).double(), loss or MultiSimilarityLoss(), emb_sz=8, opt_func=SGD)
    learn.remove_cbs([Recorder, ProgressCallback]) # the former smooths losses in float32
    set_seed(1)
    learn.fit(1, .1, cbs=[kept, *cbs])
    return kept.grads,learn

def far(a, b): return max((a[k]-b[k]).abs().max().item() for k in a)

@pytest.mark.parametrize('chunk', [1,5,8,23])
@pytest.mark.parametrize('loss', [MultiSimilarityLoss(), DRTripletLoss(), ProxyNCALoss(6, 8), ContrastiveLoss(gamma=.3)], ids=str)
def test_the_gradient_is_that_of_the_whole_batch(chunk, loss):
    set_seed(0)
    model = Body()
    want,whole = trained([], model, copy.deepcopy(loss))
    got,learn = trained([LargeBatch(chunk)], model, copy.deepcopy(loss))
    assert want.keys()==got.keys() and far(want, got)<1e-13
    assert far(dict(whole.model.named_parameters()), dict(learn.model.named_parameters()))<1e-12

def test_the_loss_of_each_chunk_alone_would_be_another():
    "The control: accumulating the gradients of chunks of 8 is not the gradient of 24"
    set_seed(0)
    model = Body().double()
    x,y = batches()[0]
    loss = MultiSimilarityLoss()
    def grads(parts):
        model.zero_grad()
        sum(loss(nn.functional.normalize(model(x[i]), dim=1), y[i])/len(parts) for i in parts).backward()
        return {k:p.grad.clone() for k,p in model.named_parameters()}
    assert far(grads([slice(0,24)]), grads([slice(o,o+8) for o in (0,8,16)]))>1e-3

def test_only_a_chunk_runs_at_a_time_and_each_twice():
    set_seed(0)
    _,learn = trained([LargeBatch(8)], Body())
    seen = Peak(learn.model.layers[0])
    learn.fit(1, .1, cbs=[LargeBatch(8), seen])
    assert seen.sizes==[8]*3*2*2 # chunks, passes, steps
    seen.sizes.clear()
    learn.fit(1, .1, cbs=seen)
    assert seen.sizes==[24]*2 # the callback is gone, and with it the chunks

def test_random_numbers_are_those_of_the_first_time():
    "With dropout a second draw would give another gradient"
    set_seed(0)
    model = Body(p=.3)
    ref,(x,y) = copy.deepcopy(model).double(),batches()[0]
    kept = []
    class Loss(MultiSimilarityLoss):
        def forward(self, embs, labels):
            kept.append(embs.detach().clone())
            return super().forward(embs, labels)
    class States(Callback):
        order = 59
        def before_batch(self): self.rng = torch.get_rng_state()
    states = States()
    got,_ = trained([LargeBatch(8), states], model, Loss(), steps=1)
    torch.set_rng_state(states.rng)
    z = torch.cat([ref(o) for o in x.split(8)])
    assert torch.equal(z.detach(), kept[0])
    loss = MultiSimilarityLoss()
    loss.of_cosines = False # these rows are of any length
    loss(z, y).backward()
    assert far({k:p.grad for k,p in ref.named_parameters()}, got)<1e-13

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv,self.bn,self.out = nn.Conv2d(3, 8, 3),nn.BatchNorm2d(8),nn.Linear(8, 8)
    def forward(self, x): return self.out(self.bn(self.conv(x)).relu().mean((2,3)))

def test_running_batch_norm_is_refused():
    with pytest.raises(ValueError, match="1 layers of batch norm would use the statistics of 8 images .* freeze_bn=True"):
        trained([LargeBatch(8)], Net())

def test_frozen_batch_norm_is_exact():
    set_seed(0)
    model = Net()
    model.bn.requires_grad_(False) # `BnFreeze` is for such layers
    want,got = (trained([*cbs, BnFreeze()], model)[0] for cbs in ([],[LargeBatch(7)]))
    assert far(want, got)<1e-13

def test_running_statistics_move_once():
    "Where a running batch norm was asked for, each chunk moves its statistics in the first pass alone"
    set_seed(0)
    model = Net()
    _,learn = trained([LargeBatch(8, bn='chunk')], model, steps=1)
    ref = copy.deepcopy(model).double().train()
    for o in batches()[0][0].split(8): ref(o)
    assert torch.allclose(learn.model.bn.running_mean, ref.bn.running_mean) and learn.model.bn.num_batches_tracked==3

@pytest.mark.parametrize('args', [dict(chunk=0), dict(chunk=2.5), dict(chunk=None), dict(bn='whole')], ids=str)
def test_odd_arguments(args):
    with pytest.raises(ValueError, match=next(iter(args))): LargeBatch(**args)

def test_of_a_learner(make_learner, tmp_path):
    "On an `Embedder` the head sees the whole batch, ranking runs in chunks too, and the model is copied, pickled and exported meanwhile"
    def run(*cbs, **kwargs):
        learn = make_learner(head='bnneck', freeze_bn=True, opt_func=SGD, **kwargs)
        learn.add_cb(SelfSupervisedRanking(n=2, m=8))
        learn.add_cbs(cbs)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        return learn
    whole,learn = run(),run(LargeBatch(chunk=6))
    assert far(dict(whole.model.named_parameters()), dict(learn.model.named_parameters()))<1e-5
    assert whole.recorder.losses[0].item()==pytest.approx(learn.recorder.losses[0].item(), rel=1e-5)
    x = torch.zeros(9, 3, 24, 24)
    for other in (copy.deepcopy(learn.model), pickle.loads(pickle.dumps(learn.model))):
        assert torch.allclose(other.eval()(x), learn.model.eval()(x), atol=1e-6)
        assert other.state_dict().keys()==whole.model.state_dict().keys()
    learn.remove_cb(LargeBatch)
    assert 'features' not in vars(learn.model) and not hasattr(learn.model, 'chunk')
