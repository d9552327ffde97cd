"What happens on a GPU, as far as a machine without one can tell: no two devices meet, and half precision changes no gradient"
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.vision.all import *
from other_device import Elsewhere, elsewhere, two_devices
from dmlfast.all import *
from dmlfast.models.heads import lda_head, pca_head
from dmlfast.retrieval.confusions import pairs_across
from dmlfast.retrieval.indexes import Index
from dmlfast.retrieval.verify import open_set, pair_scores

names = [o for o in register_loss if not o.startswith('DR')]

@pytest.fixture(scope='module')
def batch():
    g = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(32, 16, generator=g)+2*torch.eye(16)[torch.arange(32)%8], dim=1),torch.arange(32)%8

def made(name, **kwargs):
    loss = register_loss[name](**kwargs)
    torch.manual_seed(0)
    return loss.setup(8, 16).train()

@pytest.mark.parametrize('gamma', [0.,.2])
@pytest.mark.parametrize('name', names)
def test_backward_within_autocast(name, gamma, batch):
    "A loop of one's own may call `backward` where autocast is on: the gradients are those of float32"
    x,y = batch
    grads = []
    for on in (False,True):
        loss,z = made(name, gamma=gamma),x.clone().requires_grad_()
        torch.manual_seed(1)
        with torch.autocast('cpu', torch.bfloat16, enabled=on): loss(z, y).backward()
        grads.append([z.grad,*(p.grad for p in loss.parameters())])
    for a,b in zip(*grads): assert torch.equal(a, b)

@pytest.mark.parametrize('name', names)
def test_proxies_start_from_elsewhere(name, batch, monkeypatch):
    x,y = batch
    a,b = made(name),made(name)
    if not hasattr(a, 'start'): pytest.skip('it has no proxies')
    a.start(x, y)
    with two_devices(monkeypatch): b.start(elsewhere(x), elsewhere(y))
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters()))

def _plain(o): return o.x if isinstance(o, Elsewhere) else o

def test_search_and_heads_take_tensors_of_a_gpu(batch, monkeypatch):
    "What has its work done by faiss, LAPACK or NumPy brings them there; a waiting tensor gives what one of the CPU gives"
    x,y = batch
    with two_devices(monkeypatch):
        X,Y = elsewhere(x),elsewhere(y)
        for f in (lambda x, y: pca_head(x, 4), lambda x, y: lda_head(x, y, 4)):
            for a,b in zip(f(X, Y), f(x, y)): assert torch.equal(_plain(a), b)
        for kind in ('int8','hnsw','bits'):
            a,b = Index(X, kind),Index(x, kind)
            for s,t in zip(a.add(X[:4]).search(X[:3], 5), b.add(x[:4]).search(x[:3], 5)): assert torch.equal(_plain(s), t)
        for kw in (dict(), dict(gallery=x.flip(0), gallery_labels=y.flip(0))):
            a = open_set(X, Y, **{k:elsewhere(v) for k,v in kw.items()}, n_boot=20)
            b = open_set(x, y, **kw, n_boot=20)
            assert np.array_equal(a.score, b.score) and a.to_frame().equals(b.to_frame())
        own = torch.arange(32)
        a,b = open_set(X, Y, X, Y, self_exclude=elsewhere(own), n_boot=20),open_set(x, y, x, y, self_exclude=own, n_boot=20)
        assert np.array_equal(a.score, b.score)
        assert pairs_across(X, list('ab')*16, .5).equals(pairs_across(x, list('ab')*16, .5))
        assert pair_scores(X, Y).auc==pair_scores(x, y).auc
        e = Embedded(x, y)
        for a,b in zip(e.neighbours(3, queries=elsewhere(torch.tensor([1,4]))), e.neighbours(3, queries=[1,4])): assert torch.equal(a, b)

@pytest.mark.parametrize('arch', ['test_efficientnet','test_resnet'])
def test_batch_norm_of_all_processes_is_there_in_a_fit_alone(arch):
    "Layers that share their statistics take the place of others and give it back, with their activations, however often"
    from dmlfast.train.distributed import put_layers, sync_norms
    torch.manual_seed(0)
    m,x = Embedder(arch, 8, pretrained=False),torch.randn(4, 3, 64, 64)
    m(x) # so that statistics are not as they began
    m.eval()
    was,layers,embs = dict(m.named_parameters()),dict(m.named_modules()),m(x)
    own = sync_norms(m)
    assert len(own)==sum(isinstance(o, nn.modules.batchnorm._BatchNorm) for o in layers.values())
    assert all(isinstance(m.get_submodule(k), nn.SyncBatchNorm) for k in own) and torch.equal(m(x), embs)
    assert all(p is was[k] for k,p in m.named_parameters())
    assert sync_norms(m)=={} and torch.equal(m(x), embs)
    m.train()
    put_layers(m, own)
    assert dict(m.named_modules())==layers and m.training and all(o.training for k,o in m.named_modules())
    assert torch.equal(m.eval()(x), embs)

def test_statistics_of_images_go_where_the_images_are(few, monkeypatch):
    "On a machine whose first GPU is not the one that is used, or that is to use none"
    monkeypatch.setattr('fastai.data.transforms.default_device', lambda *args: torch.device('meta'), raising=False)
    monkeypatch.setattr('fastai.torch_core.default_device', lambda *args: torch.device('meta'))
    dls = few.dataloaders(bs=32, per_class=4, seed=0, num_workers=0, device='cpu')
    learn = metric_learner(dls, 'test_resnet', TripletLoss(), pretrained=False, emb_sz=8)
    norm = [o for o in dls.train.after_batch.fs if isinstance(o, Normalize)][0]
    assert norm.mean.device.type==norm.std.device.type=='cpu'
    assert torch.isfinite(dls.one_batch()[0]).all() and torch.isfinite(learn.embed(bar=False)[0]).all()

def test_a_learner_embeds_where_its_images_are(make_learner, tmp_path, monkeypatch):
    "After `load`, too, where the model has not been in a fit: else a GPU would bring images to a CPU"
    learn,asked = make_learner(TripletLoss()),[]
    learn.save(tmp_path/'w')
    learn.load(tmp_path/'w')
    was = nn.Module.to
    monkeypatch.setattr(nn.Module, 'to', lambda self, *args, **kwargs: (asked.append((self,*args)), was(self, *args, **kwargs))[1])
    learn.embed(bar=False)
    assert (learn.model,learn.dls.device) in asked

def test_a_run_of_more_gpus_goes_on_with_fewer(monkeypatch):
    from dmlfast.train import checkpoint
    given,state = [],checkpoint._random_states()
    for k,v in dict(is_available=lambda: True, device_count=lambda: 1, set_rng_state_all=given.extend).items():
        monkeypatch.setattr(torch.cuda, k, v)
    checkpoint._set_random_states({**state, 'cuda':['first','second']})
    assert given==['first']
