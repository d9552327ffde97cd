"Embedders of many kinds of timm models, what of them is frozen, and what weights may be loaded"
import copy, pickle, pytest, timm, torch
from torch import nn
from safetensors.torch import save_file
import dmlfast.models.bninception
from dmlfast.models.bodies import built_as, load_weights, one_size, sized, timm_body
from dmlfast.models.pooling import GeM, make_pool, pool_names
from dmlfast.models.embedder import (Embedder, body_stages, embedder_splitter, init_head, make_head,
    stage_splitter)

# Maps with the channels first and last, tokens with and without tokens of no patch, and features whose width is not `num_features`. For
# each a model's arguments,
# and how many stages it has: the stem, and the stages of a convolutional network or the blocks of a transformer
families = {
    'test_resnet': ({}, 5), 'test_efficientnet': ({}, None), 'test_convnext': ({}, 5), 'test_nfnet': ({}, 5), 'test_mambaout': ({}, 5),
    'test_byobnet': ({}, 5),
    'test_vit': (dict(img_size=64), 7), 'test_vit2': (dict(img_size=64), 9), 'test_vit4': (dict(img_size=64), 10),
    'resnet10t': ({}, 5), 'resnext50_32x4d': (dict(layers=(1,1,1,1)), 5), 'mobilenetv2_035': (dict(pad_type='same'), 8),
    'mobilenetv3_small_050': ({}, 7), 'lcnet_050': ({}, 7), 'tf_efficientnetv2_b0': ({}, 7), 'convnext_atto': ({}, 5),
    'edgenext_xx_small': ({}, 5),
    'swin_tiny_patch4_window7_224': (dict(img_size=64, window_size=2, depths=(1,1,1,1), embed_dim=24, num_heads=(1,2,4,8)), 5),
    'densenet121': (dict(block_config=(1,1,1,1)), 5), 'regnetx_002': ({}, 5), 'repvgg_a0': ({}, None), 'ghostnet_050': ({}, None),
    'vit_tiny_patch16_224': (dict(img_size=64, depth=2), 3), 'deit_tiny_distilled_patch16_224': (dict(img_size=64, depth=2), 3),
    'levit_128s': (dict(img_size=64), 4), 'beit_base_patch16_224': (dict(img_size=64, depth=2, embed_dim=96, num_heads=4), 3),
    'poolformer_s12': ({}, 4)}

@pytest.mark.parametrize('arch', families)
def test_forward_backward_and_freezing(arch):
    torch.manual_seed(0)
    kwargs,n_stages = families[arch]
    m,x = Embedder(arch, 8, pretrained=False, **kwargs),torch.randn(2, 3, 64, 64)
    embs = m(x)
    assert embs.shape==(2,8) and embs.dtype==torch.float32
    assert torch.allclose(embs.norm(dim=1), torch.ones(2), atol=1e-5)
    embs[:,0].sum().backward()
    assert m.head.weight.grad.abs().sum()>0 and next(m.body.parameters()).grad.abs().sum()>0
    assert m.head.in_features==m.n_features==m.features(x).shape[1]
    body,rest = embedder_splitter(m)
    unreached = [k for k,p in m.body.named_parameters() if p.grad is None] # in a backward that sees all there is
    assert m.unused==m.frozen==unreached and not any(m.body.get_parameter(k).requires_grad for k in unreached)
    behind_pooling = 'mobilenetv3','test_convnext','convnext','lcnet','ghostnet','edgenext','test_mambaout','poolformer' # of timm's
    assert bool(unreached)==arch.startswith(behind_pooling), unreached
    assert {id(p) for p in body+rest}=={id(p) for p in m.parameters()}-{id(p) for p in m.frozen_params()} and len(rest)==2
    _check_stages(m, n_stages)
    m.zero_grad()
    m.freeze_body(2)
    m.pool,m.own_pool = GeM(),False
    m(x)[:,0].sum().backward()
    _check_frozen(m)
    m.freeze_body()
    assert {id(p) for p in m.parameters() if not p.requires_grad}=={id(m.body.get_parameter(k)) for k in unreached}

def _check_stages(m, n_stages):
    "Every parameter is in one stage, and the stages come in the order that the parameters are used in"
    stages,names = body_stages(m.body),[n for n,_ in m.body.named_parameters()]
    assert sorted(sum(stages, []))==sorted(names) and (n_stages is None or len(stages)==n_stages)
    assert len(stages)>2 and names[0] in stages[0] and not [o for o in stages[0] if o.startswith('blocks.1.')]
    assert [len(o) for o in stage_splitter(m)]==[len({*o}-{*m.unused}) for o in stages]+[2]

def _check_frozen(m):
    "The first two stages have no gradient, keep their statistics and are in no group; the others are trained"
    frozen = set(sum(body_stages(m.body)[:2], []))
    assert all(p.grad is None and not p.requires_grad for n,p in m.body.named_parameters() if n in frozen)
    assert sum(p.grad is not None for n,p in m.body.named_parameters()
        if n not in frozen) > 0.8*(len(list(m.body.parameters()))-len(frozen))
    m.train()
    for n,o in m.body.named_modules():
        if isinstance(o, nn.modules.batchnorm._BatchNorm): assert o.training==(f'{n}.weight' not in frozen)
    both = [{id(p) for o in f(m) for p in o} for f in (embedder_splitter,stage_splitter)]
    assert both[0]==both[1]=={id(p) for p in m.parameters() if p.requires_grad}
    assert m.pool.log_p.grad is not None

def test_the_body_sees_plain_tensors():
    "fastai's class of images makes each activation in place slow"
    from fastai.vision.core import TensorImage
    model,seen = Embedder('test_resnet', 8, pretrained=False).eval(),[]
    f = model.body.forward_features
    model.body.forward_features = lambda x: (seen.append(type(x)), f(x))[1]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(TensorImage(x)), model(x)) and seen==[torch.Tensor,torch.Tensor]

def test_pooling_is_the_models_own():
    "On maps our average equals timm's; on tokens timm's own pooling is used"
    x = torch.randn(2, 3, 64, 64)
    for arch,kw in (('test_resnet',{}),('test_vit',dict(img_size=64)),('bn_inception',{})):
        m = Embedder(arch, 8, pretrained=False, **kw).eval()
        assert torch.allclose(m.features(x), m.body(x), atol=1e-5)

def test_tokens_are_pooled_as_asked():
    "Those of patches, and where the model has a norm behind its pooling, this too: timm's own average is such a model's"
    x = torch.randn(2, 3, 64, 64)
    m = Embedder('test_vit', 8, pretrained=False, pool='max', img_size=64).eval()
    assert torch.allclose(m.features(x), m.body.forward_features(x)[:,1:].amax(1), atol=1e-6)
    m = Embedder('beit_base_patch16_224', 8, pretrained=False, pool='avg', **families['beit_base_patch16_224'][0]).eval()
    m.body.fc_norm.weight.data.uniform_(.5, 2)
    assert torch.allclose(m.features(x), m.body(x), atol=1e-5)
    with pytest.raises(ValueError, match="'crossvit_9_240' ends in neither a map nor tokens"):
        Embedder('crossvit_9_240', 8, pretrained=False, pool='avg')

def test_channels_last_maps():
    m,x = Embedder('swin_tiny_patch4_window7_224', 8, pretrained=False, pool='max',
        **families['swin_tiny_patch4_window7_224'][0]).eval(),torch.randn(2, 3, 64, 64)
    assert torch.allclose(m.features(x), m.body.forward_features(x).flatten(1,2).amax(1), atol=1e-6)

def test_gem_is_the_formula():
    torch.manual_seed(0)
    x = (torch.randn(3, 5, 4, 6)*10).requires_grad_()
    gem = GeM(2.7)
    got = gem(x)
    x2,p = x.detach().double().requires_grad_(),torch.tensor(2.7, dtype=torch.float64, requires_grad=True)
    want = x2.clamp(min=1e-6).pow(p).mean((2,3)).pow(1/p)
    assert torch.allclose(got.double(), want, rtol=1e-5)
    got.sum().backward()
    want.sum().backward()
    assert torch.allclose(x.grad.double(), x2.grad, rtol=1e-4, atol=1e-7)
    assert gem.log_p.grad.item()==pytest.approx((p.grad*2.7).item(), rel=1e-4) # dp/dlog(p) = p

def test_gem_is_safe():
    "Large exponents and half precision do not overflow, an empty map has a gradient, and no step makes the exponent negative"
    x = torch.rand(2, 3, 4, 4)*1000
    assert torch.allclose(GeM(300)(x), x.amax((2,3)), rtol=2e-2)
    assert GeM()(x.half()).dtype==torch.float32 and GeM()(x.half()).isfinite().all()
    gem,zero = GeM(),torch.zeros(1, 2, 3, 3, requires_grad=True)
    gem(zero).sum().backward()
    assert zero.grad.isfinite().all() and gem.log_p.grad.isfinite()
    gem.log_p.data -= 100
    assert gem.p>0
    for bad in (dict(p=0), dict(p=-1), dict(eps=0)):
        with pytest.raises(ValueError, match='positive exponent'): GeM(**bad)

def test_heads():
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    kaiming = make_head('linear', 512, 256, 'kaiming')[0]
    assert kaiming.weight.std().item()==pytest.approx((2/256)**.5, rel=.02) and (kaiming.bias==0).all()
    ortho = make_head('mlp', 32, 8, 'orthogonal')[0]
    assert torch.allclose(ortho[2].weight@ortho[2].weight.T, torch.eye(8), atol=1e-5)
    assert [o.out_features for o in (ortho[0],ortho[2])]==[512,8]
    neck = make_head('bnneck', 32, 8)[0]
    assert len(list(neck.parameters()))==2
    neck(x).sum().backward()
    assert neck[1].weight.grad is not None
    neck.eval()
    assert torch.allclose(neck(x*0), -(neck[1].running_mean*neck[1].weight/(neck[1].running_var+1e-5).sqrt()).expand(64,8), atol=1e-6)
    assert make_head('identity', 32)[1]==32 and make_head(lambda n_in, n: nn.Linear(n_in, n, bias=False), 32)[0].weight.shape==(128,32)
    assert init_head(neck, None) is neck

def test_unnormalised_and_identity():
    m = Embedder('test_resnet', 8, pretrained=False, normalize=False).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(m(x), m.head(m.features(x)))
    m = Embedder('test_resnet', pretrained=False, normalize=False, head='identity').eval()
    assert m.emb_sz==m.n_features and torch.equal(m(x), m.features(x))

@pytest.mark.parametrize('arch,kwargs,size,said', [('test_vit', {}, 24, r'24×24 pixels .*: make them 32 pixels to a side, a multiple of '
    r'its patches of 16\.$'), ('test_vit', dict(dynamic_img_size=False), 24,
    'patches of 16, and pass `model_kwargs=dict\\(img_size=32\\)`'),
    ('mixer_s32_224', {}, 24, 'make them 224 pixels to a side')])
def test_sizes_that_patches_do_not_fit(arch, kwargs, size, said):
    with pytest.raises(ValueError, match=f'{arch!r} cannot take images of {said if "×" in said else ".*"+said}'):
        Embedder(arch, 8, pretrained=False, **kwargs)(torch.zeros(2,3,size,size))
    if 'vit' in arch: assert Embedder(arch, 8, pretrained=False, img_size=32, **kwargs)(torch.rand(2,3,32,32)).shape==(2,8) # as it says

def test_wrong_names_are_named():
    def make(**kwargs): return Embedder('test_resnet', pretrained=False, **kwargs)
    for kwargs,said in ((dict(pool='gen'), "'avgmax' or 'gem'; got 'gen'"), (dict(head='bn'), "'bnneck' and 'identity'; got 'bn'"),
        (dict(init='he'), "'orthogonal', 'kaiming' or 'random'; got 'he'"),
        (dict(freeze_bn='all'), "`freeze_bn` is True, False or 'affine'; got 'all'"),
        (dict(frozen_stages=6), "has 5 stages, so `frozen_stages` cannot be 6"),
        (dict(frozen_stages=-1), "cannot be -1"), (dict(head='identity', emb_sz=5), "embeddings of 96 numbers, as many as features, and "
        "not 5"), (dict(emb_sz=0), "1 or more; got 0"), (dict(weights=3), '`weights` is the path of a file; got 3')):
        with pytest.raises(ValueError, match=said): make(**kwargs)

def _stats(m): return [o.running_mean.clone() for o in m.body.modules() if isinstance(o, nn.BatchNorm2d)]

@pytest.mark.parametrize('freeze_bn', [True, 'affine'])
def test_frozen_bn(freeze_bn):
    "Whatever is done to the model, its body's statistics stay; the head's batch norm and, unless asked for, the weights are trained"
    m = Embedder('test_resnet', 8, pretrained=False, freeze_bn=freeze_bn, head='bnneck')
    before,x = _stats(m),torch.randn(4, 3, 64, 64)
    for o in (m, copy.deepcopy(m), pickle.loads(pickle.dumps(m)), m.eval().train(), nn.Sequential(m).train()[0]):
        o.train()
        o(x)[:,0].sum().backward()
        assert all(torch.equal(a, b) for a,b in zip(_stats(o), before)) and o.head[1].running_mean.abs().sum()>0
        bn = next(o for o in o.body.modules() if isinstance(o, nn.BatchNorm2d))
        assert (bn.weight.grad is None)==(freeze_bn=='affine')
        assert any(bn.weight is p for p in embedder_splitter(o)[0])==(freeze_bn is True)
    free = Embedder('test_resnet', 8, pretrained=False)
    free(x)
    assert not torch.equal(_stats(free)[0], before[0])

def test_frozen_weights_stay_frozen_in_a_new_group():
    "A parameter that is only for now without a gradient, as after `freeze`, is in the groups; one that is frozen for good is not"
    m = Embedder('test_resnet', 8, pretrained=False, frozen_stages=1)
    for p in m.body.parameters(): p.requires_grad_(False)
    assert len(embedder_splitter(m)[0])==len(list(m.body.parameters()))-9
    m.loss_func = nn.Module()
    m.loss_func.fixed,m.loss_func.learned = nn.Parameter(torch.ones(2), requires_grad=False),nn.Parameter(torch.ones(2))
    assert [p.shape for p in stage_splitter(m)[-1]]==[(8,96),(8,),(2,)]
    assert len(embedder_splitter(Embedder('test_resnet', 8, pretrained=False, frozen_stages=5))[0])==0

@pytest.mark.parametrize('ext', ['safetensors','pth'])
def test_weights_of_a_classifier(tmp_path, ext):
    "The classifier's weights are left out; everything else must fit"
    full,fn = timm.create_model('test_resnet', num_classes=5),tmp_path/f'w.{ext}'
    save_file(full.state_dict(), fn) if ext=='safetensors' else torch.save(full.state_dict(), fn)
    body = timm_body('test_resnet', weights=fn)
    assert (next(body.parameters())==next(full.parameters())).all()
    sd = {k:v for k,v in full.state_dict().items() if k!='conv1.0.weight' and k!='bn1.weight'}
    torch.save(sd, tmp_path/'less.pth')
    with pytest.raises(ValueError, match='missing'): timm_body('test_resnet', weights=tmp_path/'less.pth')
    torch.save({**full.state_dict(), 'more':torch.ones(1)}, tmp_path/'more.pth')
    with pytest.raises(ValueError, match=r'1 unexpected \(more\)'): timm_body('test_resnet', weights=tmp_path/'more.pth')
    with pytest.raises(ValueError, match='misshapen'): timm_body('test_resnet', weights=fn, in_chans=1)

def test_older_layouts(tmp_path):
    "What fits is read as it is, also where timm's conversion would spoil it; what does not is converted; counters may be missing"
    kwargs = families['swin_tiny_patch4_window7_224'][0]
    swin = timm_body('swin_tiny_patch4_window7_224', pretrained=False, **kwargs)
    torch.save(swin.state_dict(), tmp_path/'swin.pth')
    again = timm_body('swin_tiny_patch4_window7_224', weights=tmp_path/'swin.pth', **kwargs)
    assert all(torch.equal(a, b) for a,b in zip(swin.state_dict().values(), again.state_dict().values()))
    vit = timm_body('test_vit', pretrained=False, img_size=32)
    torch.save(vit.state_dict(), tmp_path/'vit.pth')
    larger = timm_body('test_vit', weights=tmp_path/'vit.pth', img_size=64)
    assert larger.pos_embed.shape[1]>vit.pos_embed.shape[1] and torch.equal(larger.cls_token, vit.cls_token)
    resnet = timm_body('test_resnet', pretrained=False)
    torch.save({k:v for k,v in resnet.state_dict().items() if 'num_batches' not in k}, tmp_path/'old.pth')
    assert torch.equal(timm_body('test_resnet', weights=tmp_path/'old.pth').conv1[0].weight, resnet.conv1[0].weight)

def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self): return (print, ('run',))
    torch.save(dict(a=Evil()), tmp_path/'evil.pth')
    with pytest.raises(Exception, match='[Ww]eights'): load_weights(timm_body('test_resnet', pretrained=False), tmp_path/'evil.pth')

def test_no_network(monkeypatch):
    "Pretrained weights that cannot be fetched are a sentence that says what to do"
    def _fail(*args, **kwargs): raise OSError('no network')
    monkeypatch.setattr(timm, 'create_model', _fail)
    monkeypatch.setattr('dmlfast.models.bodies._reach_weights', lambda arch: None)
    with pytest.raises(RuntimeError, match="pass a file as `weights=`, or `pretrained=False`"): timm_body('resnet18')

def test_the_hub_is_asked_once(monkeypatch):
    "Without a network it is said at once, and not after five tries for each of two files; weights that are here are not asked for"
    import socket, time
    import dmlfast.models.bodies as models
    asked,there = [],[]
    def _no_name(*args, **kwargs):
        asked.append(args)
        raise socket.gaierror(-2, 'Name or service not known')
    monkeypatch.setattr(socket, 'getaddrinfo', _no_name)
    for o in ('http','https','all'):
        monkeypatch.delenv(f'{o}_proxy', raising=False), monkeypatch.delenv(f'{o.upper()}_PROXY', raising=False)
    monkeypatch.setattr(models, 'try_to_load_from_cache', lambda *args, **kwargs: there[0] if there else None)
    began = time.perf_counter()
    with pytest.raises(RuntimeError, match='could not be loaded.*pass a file as `weights=`'): timm_body('test_resnet')
    assert len(asked)<5 and time.perf_counter()-began<8 # 46 seconds otherwise
    asked.clear(), there.append('model.safetensors')
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: 'made')
    assert timm_body('test_resnet')=='made' and not asked

def test_arguments_that_timm_does_not_take():
    for o in (dict(bogus=1), dict(a=(1,(2,3))), dict(layers=5)):
        with pytest.raises(ValueError, match="timm cannot make 'test_resnet' with"): timm_body('test_resnet', pretrained=False, **o)
