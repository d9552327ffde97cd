"LoRA: what trains, what stays, what is stored, and what is left when it is merged"
import ast, sys
from pathlib import Path
import pytest, timm, torch
from fastai.vision.all import *
from dmlfast.all import *
from dmlfast.models.embedder import body_stages
from dmlfast.models.lora import LoraEmbedder, add_lora, as_filed, lora_layers, merge_lora, merged, own_state
from dmlfast.models import lora as room
from test_checkpoint import Do, plain, same, scramble, stop

tiny = dict(img_size=24, patch_size=8, depth=2, embed_dim=64, num_heads=4)
vit = 'vit_tiny_patch16_224'

def embedder(arch=vit, seed=0, **kwargs):
    torch.manual_seed(seed)
    return Embedder(arch, 8, pretrained=False, **(kwargs or (tiny if arch==vit else {}))).eval()

def images(size=24, n=4): return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))

def trained(model, steps=2, x=None):
    "The model after some steps with a large rate"
    x = images() if x is None else x
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.)
    for _ in range(steps):
        opt.zero_grad()
        model(x)[:,0].pow(2).sum().backward()
        opt.step()
    return model

def copied(sd): return {k:v.clone() for k,v in sd.items()}
def equal(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "Files of two bodies"
    res = []
    for seed in (0,1):
        torch.manual_seed(seed)
        res.append(tmp_path_factory.mktemp('weights')/'body.pth')
        torch.save(timm.create_model(vit, num_classes=0, **tiny).state_dict(), res[-1])
    return res

@pytest.fixture
def make(make_learner, weights):
    "Function that makes a learner on a body from a file"
    def _make(seed=0, body=0, **kwargs):
        return make_learner(ProxyNCALoss(), seed=seed, **{**dict(arch=vit, weights=weights[body], model_kwargs=tiny), **kwargs})
    return _make

# ---- the model ----

def test_a_layer_computes_the_formula():
    model = trained(add_lora(embedder(), rank=3, alpha=12))
    layer = model.body.get_submodule('blocks.1.attn.qkv')
    W,b = (layer.base_layer.get_parameter(o) for o in ('weight','bias'))
    A,B = (getattr(layer, o).default.weight for o in ('lora_A','lora_B'))
    x = torch.randn(5, 64)
    assert B.abs().max()>0
    torch.testing.assert_close(layer(x), x@W.T + b + 4*(x@A.T)@B.T)

@pytest.mark.parametrize('arch,target,kwargs,size', [(vit,'qkv',tiny,24), (vit,'linear',tiny,24), ('test_resnet','conv',{},32),
    ('test_convnext','linear',{},32), ('test_efficientnet','conv',{},32)])
def test_merged_it_makes_the_same_embeddings(arch, target, kwargs, size):
    model,x = embedder(arch, **kwargs),images(size)
    names,before = list(model.state_dict()),model(x).detach()
    add_lora(model, 4, 8, target)
    assert torch.equal(model(x), before) # LoRA starts at zero
    after = trained(model, x=x)(x).detach()
    assert (after-before).abs().max()>1e-3
    plain = merged(model)
    torch.testing.assert_close(plain(x), after, atol=1e-5, rtol=0)
    assert type(plain) is Embedder and sorted(plain.state_dict())==sorted(names) and torch.equal(model(x), after)
    merge_lora(model)
    assert torch.equal(model(x), plain(x))
    assert [k for k,p in model.body.named_parameters() if not p.requires_grad]==model.unused and model.head.weight.requires_grad

@pytest.mark.parametrize('arch,target', [(vit,'linear'), ('test_resnet','conv')])
def test_the_body_stays_to_the_last_bit(arch, target):
    "Its batch norm, too, which moves otherwise"
    model = add_lora(embedder(arch), target=target)
    own,x = copied(own_state(model)),images(24 if arch==vit else 32)
    trained(model.train(), x=x)
    assert equal(own_state(model), own)
    for n,p in model.body.named_parameters(): assert p.requires_grad==('.lora_' in n)==(p.grad is not None), n

def test_names_are_those_without_lora():
    a,b = embedder(),embedder()
    add_lora(b)
    assert equal(own_state(b), own_state(a)) and [k for k in b.state_dict() if k not in a.state_dict()]==[
        f'body.blocks.{i}.attn.qkv.lora_{o}.default.weight' for i in (0,1) for o in 'AB']
    b.load_state_dict({**b.state_dict(), **embedder(seed=1).state_dict()})
    assert equal(own_state(b), own_state(embedder(seed=1)))

def test_frozen_stages_have_none():
    model = embedder(frozen_stages=2, **tiny)
    assert add_lora(model).lora['layers']==['blocks.1.attn.qkv']
    merge_lora(model)
    assert len(model.frozen_params())==len(sum(body_stages(model.body)[:2], []))
    assert not any(p.requires_grad for p in model.frozen_params())
    model.freeze_body(0)
    add_lora(model).freeze_body(2)
    assert [n for n,p in model.body.named_parameters() if p.requires_grad]==[f'blocks.1.attn.qkv.lora_{o}.default.weight' for o in 'AB']

def test_layers_that_are_never_called_are_refused():
    "Swin v2 takes the weights of `qkv`: LoRA on it would change nothing"
    small = dict(img_size=64, embed_dim=16, depths=(1,1), num_heads=(2,2), window_size=4)
    says = r"LoRA on 'layers.0.blocks.0.attn.qkv' would do nothing, since 'swinv2_tiny_window8_256' takes its.*fc1 \(2\)"
    with pytest.raises(ValueError, match=says): add_lora(embedder('swinv2_tiny_window8_256', **small))
    assert not any('qkv' in o for o in lora_layers(embedder('swinv2_tiny_window8_256', **small), 'linear'))

@pytest.mark.parametrize('kwargs,says', [
    (dict(target='nothing'),r"has no layers 'nothing'.*linear: qkv \(2\), proj \(2\), fc1 \(2\), fc2 \(2\); convolution: proj \(1\)"),
    (dict(target=['qkv','nothing']),'has no layers'), (dict(target=3),"`target` is 'qkv', 'linear'"),
    (dict(target='('),'no regular expression'), (dict(rank=0),'`rank` is a whole number'), (dict(rank=True),'`rank`'),
    (dict(alpha=0),'`alpha` is a number greater than 0')])
def test_wrong_arguments_are_refused_before_anything_is_changed(kwargs, says):
    model = embedder()
    with pytest.raises(ValueError, match=says): add_lora(model, **kwargs)
    assert type(model) is Embedder and all(p.requires_grad for p in model.parameters())

def test_a_recipe_is_refused_before_the_head_is_trained(few):
    dls = few.dataloaders(bs=32, per_class=4, num_workers=0)
    learn = metric_learner(dls, 'test_resnet', recipe='lora', pretrained=False, normalize=False)
    def never(*args, **kwargs): raise AssertionError('the head was trained first')
    learn.fit_head = never
    with pytest.raises(ValueError, match="has no layers 'qkv'"): learn.fit_recipe(1)
    with pytest.raises(ValueError, match='`rank` is a whole number'): learn.fit_recipe(1, lora=dict(rank=0))
    with pytest.raises(ValueError, match=r'such as dict\(rank=8\); got True'): learn.fit_recipe(1, lora=True)

def test_targets():
    model = embedder()
    assert lora_layers(model)==['blocks.0.attn.qkv','blocks.1.attn.qkv']==lora_layers(model, ['attn.qkv'])
    assert lora_layers(model, r'.*fc\d')==[f'blocks.{i}.mlp.fc{j}' for i in (0,1) for j in (1,2)]
    assert lora_layers(model, 'conv')==['patch_embed.proj'] and lora_layers(model, ['blocks.0.attn.proj'])==['blocks.0.attn.proj']
    split = embedder('eva02_base_patch14_224', img_size=28, embed_dim=48, depth=1, num_heads=2)
    assert [o.rpartition('.')[2] for o in lora_layers(split)]==['q_proj','k_proj','v_proj']
    with pytest.raises(ValueError, match="LoRA is put on the body of a model"): add_lora(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match='has no LoRA to merge'): merge_lora(model)
    with pytest.raises(ValueError, match='merge it first'): add_lora(model).spec()

def test_without_peft_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, 'peft', None)
    with pytest.raises(ImportError, match=r"LoRA needs peft: pip install 'dmlfast\[lora\]'"): add_lora(embedder())
    imports = [o for o in ast.parse(Path(room.__file__).read_text()).body if isinstance(o, (ast.Import,ast.ImportFrom))]
    assert len(imports)>5 and not any('peft' in ast.unparse(o) for o in imports) # it takes seconds

def test_a_small_file_of_a_large_body():
    model = add_lora(Embedder('vit_small_patch16_224', 128, pretrained=False))
    def size(sd): return sum(v.nbytes for v in sd.values() if isinstance(v, Tensor))
    with as_filed(model): short = size(model.state_dict())
    assert short<.01*size(model.state_dict())

# ---- the learner ----

def rates(learn): return [o['lr'] for o in learn.opt.hypers]
def grads(learn): return {n for n,p in learn.model.body.named_parameters() if p.requires_grad}

def test_two_groups_and_all_that_hangs_on_them(make):
    learn = make()
    learn.fit_head(1)
    learn.add_lora(rank=2)
    own,lora = copied(own_state(learn.model)),{n for n,_ in learn.model.body.named_parameters() if '.lora_' in n}
    assert len(lora)==4
    learn.fit(1, slice(1e-3, 1e-2))
    assert [len(o) for o in learn.opt.param_lists]==[4,3] and rates(learn)==[1e-3,1e-2]
    learn.freeze()
    assert grads(learn)==set() and learn.model.head.weight.requires_grad
    now = copied({k:v for k,v in learn.model.state_dict().items() if k.startswith('body.')})
    learn.fit(1, 1e-2)
    assert equal(now, {k:v for k,v in learn.model.state_dict().items() if k.startswith('body.')}) # LoRA too
    learn.unfreeze()
    assert grads(learn)==lora
    learn.fine_tune(1, 1e-3, lr_mult=10)
    assert grads(learn)==lora and equal(own_state(learn.model), own)
    state = copied(learn.model.state_dict())
    with pytest.warns(UserWarning, match='leave the rate out'): learn.lr_find(num_it=8, show_plot=False)
    assert equal(learn.model.state_dict(), state)
    with pytest.raises(ValueError, match=r'has LoRA already \(rank 2, alpha 16, 2 layers\)'): learn.add_lora(rank=2)

def test_after_a_fit_and_frozen_it_trains(make):
    learn = make()
    learn.freeze()
    learn.fit(1, 1e-2)
    old = learn.opt
    learn.add_lora()
    assert learn.opt is not old and len(grads(learn))==4 and learn.model.head.weight.requires_grad
    before = copied(learn.model.state_dict())
    learn.fit(1, 1e-2)
    assert {k.split('.')[0] for k,v in learn.model.state_dict().items() if not torch.equal(v, before[k])}=={'body','head','loss_func'}
    learn.merge_lora()
    assert all(p.requires_grad for p in learn.model.body.parameters())
    learn.fit(1, 1e-3)
    assert not equal(own_state(learn.model), {k:v for k,v in before.items() if k.startswith('body.') and '.lora_' not in k})

def test_what_would_train_the_body_is_refused(make):
    learn = make(splitter=lambda m: [list(m.body.parameters()), list(m.head.parameters())+list(m.loss_func.parameters())])
    with pytest.raises(ValueError, match="hold the body's own weights"): learn.add_lora()
    assert type(learn.model) is Embedder
    learn = make(splitter=stage_splitter)
    learn.add_lora()
    learn.fit(1, 1e-3)
    assert [len(o) for o in learn.opt.param_lists]==[2,2,3]

def test_it_is_measured_against_the_features_before(make):
    learn = make()
    was = learn.baseline(metrics='map@r')['map@r']
    learn.add_lora()
    assert learn.gain(metrics='map@r').what=='The start of the head'
    learn.fit(1, 1e-1)
    gain = learn.gain(metrics='map@r')
    assert gain.what=='Training' and gain.b['map@r']==was
    rows = learn.head_start.rows
    assert rows['features']['scores']['map@r']==was and 'start' in rows
    learn.merge_lora()
    assert learn.baseline(metrics='map@r')['map@r']==was and learn.gain(metrics='map@r').what=='Training'

def test_the_rest_of_a_learner(make):
    learn = make(cbs=SelfSupervisedRanking(n=2, m=4, p=1.))
    learn.add_lora()
    head = copied(learn.model.ranking_head.state_dict())
    learn.fit(1, 1e-2, cbs=Interpolate(metric='recall@1', say=False) if not learn.measures_on_test() else None)
    assert not equal(head, learn.model.ranking_head.state_dict())
    learn.fit_head(1)
    embs = learn.embedded('val').embs if 'val' in learn.dls.source.summary().index else learn.embedded().embs
    assert embs.shape[1]==16 and learn.evaluate(metrics='recall@1', n_boot=1)['recall@1']>0
    learn.show_results(max_n=2)
    plt.close('all')

# ---- files ----

def test_save_and_load(make, tmp_path):
    learn = make()
    learn.add_lora(rank=2, target='linear')
    learn.fit(1, 1e-2)
    file = learn.save('short')
    kept = torch.load(file, weights_only=False)['model']
    assert [k for k in kept if k.startswith("body.") and ".lora_" not in k]==[]
    other = make(seed=5)
    other.load('short')
    assert equal(other.model.state_dict(), learn.model.state_dict()) and len(other.opt.param_lists[0])==16
    assert plain(other.opt)==plain(learn.opt)
    other.add_lora(rank=2, target='linear') # a script that goes on after `load` may say so
    says = "'short' holds LoRA for another body: it needs the weights with the hash"
    with pytest.raises(ValueError, match=says): make(body=1).load('short')
    other = make()
    other.add_lora(rank=3)
    says = r'holds another LoRA \(rank 2, alpha 16, 8 layers\) than this model has \(rank 3'
    with pytest.raises(ValueError, match=says): other.load('short')
    make().save('none')
    with pytest.raises(ValueError, match=r"'none' holds no LoRA, and this model has it .*: load it before `add_lora`"): learn.load('none')

def test_the_best_epoch_is_kept(make):
    learn = make()
    learn.add_lora()
    learn.fit(3, 1e-1, cbs=SaveModelCallback(monitor='map@r', fname='best'))
    best = max(o[-1] for o in learn.recorder.values)
    assert learn.validate()[-1]==best and (learn.path/'models'/'best.pth').is_file()

def go(learn, *cbs): learn.fit_one_cycle(3, 1e-2, cbs=list(cbs))

@pytest.mark.parametrize('asked', [False,True])
def test_resumed_it_is_a_run_that_was_not_interrupted(make, tmp_path, asked):
    def start(learn):
        learn.fit_head(1)
        learn.add_lora(rank=2)
        return learn
    whole = start(make())
    go(whole)
    with pytest.raises(KeyboardInterrupt): go(start(make()), Checkpoint(tmp_path/'run'), Do(2*len(whole.dls.train)+1, stop))
    scramble()
    learn = make(seed=7).resume(tmp_path/'run')
    if asked: learn.add_lora(rank=2) # as the script says that was interrupted
    go(learn, Checkpoint(tmp_path/'run'))
    same(learn, whole)
    state = torch.load(tmp_path/'run'/'checkpoint.pt', weights_only=True)['model']
    assert not any(k.startswith('body.') and '.lora_' not in k for k in state) and state['lora']['rank']==2
    with pytest.raises(ValueError, match="holds LoRA for another body"): make(body=1).resume(tmp_path/'run')
    with pytest.raises(ValueError, match='has LoRA already'): make().resume(tmp_path/'run').add_lora(rank=4)
    for rank in (2,3):
        other = make()
        other.add_lora(rank=rank)
        if rank==2: other.resume(tmp_path/'run')
        else:
            with pytest.raises(ValueError, match=r'another LoRA \(rank 2.*\) than this model has \(rank 3'): other.resume(tmp_path/'run')

def test_a_body_that_was_trained_is_in_the_checkpoint(make, tmp_path):
    def start(learn):
        learn.fit(1, 1e-2)
        learn.add_lora(rank=2)
        return learn
    whole = start(make())
    go(whole)
    with pytest.raises(KeyboardInterrupt): go(start(make()), Checkpoint(tmp_path/'run'), Do(2*len(whole.dls.train)+1, stop))
    learn = make(body=1).resume(tmp_path/'run') # whose body is given up
    go(learn, Checkpoint(tmp_path/'run'))
    assert equal(learn.model.state_dict(), whole.model.state_dict())

# ---- export ----

def test_exported_it_needs_no_peft(make, tmp_path, monkeypatch):
    learn = make()
    learn.add_lora(target='linear')
    learn.fit(1, 1e-1)
    learn.export_embedder(tmp_path/'out', gallery='train')
    assert isinstance(learn.model, LoraEmbedder)
    monkeypatch.setitem(sys.modules, 'peft', None)
    finder = load_embedder(tmp_path/'out')
    assert type(finder.model) is Embedder and not any('lora' in k for k in finder.model.state_dict())
    x = learn.dls.valid.one_batch()[0].as_subclass(Tensor)
    torch.testing.assert_close(finder.model(x), learn.model.eval()(x), atol=1e-5, rtol=0)
    items = learn.dls.valid_ds.items
    assert finder.search(items[0], k=1)[0].score>0

def test_onnx_of_what_was_merged(make, tmp_path):
    pytest.importorskip('onnxruntime')
    learn = make()
    learn.add_lora()
    finder = learn.export_embedder(tmp_path/'out')
    assert finder.to_onnx(tmp_path/'out.onnx', 24).is_file() # raises where it embeds otherwise
