"Bodies of today: names and folders, images of a size, tokens and their pooling, and everything else a learner does, with each of them"
import json, re, shutil, pytest, timm, torch
import numpy as np
from safetensors.torch import load_file
from timm.layers import global_pool_nlc
from fastai.callback.channelslast import ChannelsLast
from fastai.vision.all import *
from dmlfast.all import *
from dmlfast.models.bodies import built_as, one_size, sized, timm_body

small = dict(depth=2, embed_dim=48, num_heads=3)
bodies = { # arguments that make it small, side of images in pixels, and width of features
    'vit_small_patch14_reg4_dinov2': (small, 56, 48), 'vit_small_patch16_dinov3': (small, 64, 48),
    'vit_base_patch16_clip_224': (small, 48, 48), 'vit_base_patch16_siglip_224': (small, 48, 48),
    'eva02_tiny_patch14_224': (small, 42, 48), 'deit_tiny_distilled_patch16_224': (small, 48, 48),
    'swin_tiny_patch4_window7_224': (dict(depths=(1,1,1,1), embed_dim=24, num_heads=(1,2,4,8)), 56, 192),
    'convnext_atto': (dict(depths=(1,1,1,1), dims=(16,24,32,48)), 40, 48)}

@pytest.fixture(scope='module')
def make(few, tmp_path_factory):
    "Function that makes a learner of a small body on the images of a dozen classes"
    names = sorted(set(few.df.label))
    ds = MetricDataset(few.df[few.df.label.isin(names[::len(names)//12])], few.path, 'a dozen glyphs', size=None, flip=False)
    path = tmp_path_factory.mktemp('bodies')
    def _make(arch, size, model_kwargs=None, **kwargs):
        set_seed(0)
        dls = ds.dataloaders(bs=16, per_class=4, size=size, seed=0, num_workers=0)
        args = dict(loss_func=TripletLoss(), emb_sz=8, pretrained=False, path=path, model_kwargs=model_kwargs)
        learn = metric_learner(dls, arch, **{**args, **kwargs})
        learn.remove_cbs([o for o in learn.cbs if type(o).__name__=='ProgressCallback'])
        learn.logger = lambda *a: None
        return learn
    return _make

def weights_of(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}

# names

def save_folder(arch, folder, **kwargs):
    "A model as timm shares it"
    torch.manual_seed(1)
    model = timm.create_model(arch, **kwargs)
    timm.models.save_for_hf(model, folder, model_config=dict(model_args=kwargs), safe_serialization=True)
    return model

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A vision transformer of two blocks for images of 64 pixels"
    path = tmp_path_factory.mktemp('vit')/'mine'
    save_folder('vit_tiny_patch16_224', path, **small, img_size=64)
    return path

def test_one_batch_is_read_for_size_and_channels(make, folder, monkeypatch):
    read,old = [],DataLoader.one_batch
    monkeypatch.setattr(DataLoader, 'one_batch', lambda self: read.append(1) or old(self))
    make(f'local-dir:{folder}', 64)
    assert len(read)==1

def test_a_folder_trains_and_is_not_needed_again(make, folder, tmp_path):
    "Its weights are what training begins with; an export has timm's own name, and is read where the folder is not"
    (there := tmp_path/'there').mkdir()
    for o in folder.iterdir(): (there/o.name).write_bytes(o.read_bytes())
    learn = make(f'local-dir:{there}', 64, pretrained=True)
    want = load_file(there/'model.safetensors')
    assert torch.equal(learn.model.body.blocks[1].attn.qkv.weight, want['blocks.1.attn.qkv.weight'])
    assert learn.model.cfg['input_size']==(3,64,64) and learn.model.arch=='vit_tiny_patch16_224'
    assert built_as(f'local-dir:{there}')==('vit_tiny_patch16_224', dict(small, img_size=[64,64], global_pool='token'))
    embs = learn.embed(bar=False)[0]
    learn.export_embedder(tmp_path/'e')
    for o in there.iterdir(): o.unlink()
    there.rmdir()
    about = json.loads((tmp_path/'e'/'embedder.json').read_text())['model']
    assert about['arch']=='vit_tiny_patch16_224' and about['model_kwargs']==dict(small, img_size=[64,64], global_pool='token')
    assert str(tmp_path) not in (tmp_path/'e'/'embedder.json').read_text()
    assert torch.allclose(load_embedder(tmp_path/'e').embed([*learn.dls.valid.items]), embs, atol=1e-5)

def test_positions_are_resampled(make, folder):
    "Weights for images of 64 pixels, 4×4 patches, in a body for 96, 6×6: as timm resamples them"
    learn = make(f'local-dir:{folder}', 96, pretrained=True)
    body,first = learn.model.body,load_file(folder/'model.safetensors')
    want = timm.layers.resample_abs_pos_embed(first['pos_embed'], [6,6], [4,4], num_prefix_tokens=1)
    assert body.pos_embed.shape==(1,37,48) and torch.allclose(body.pos_embed, want, atol=1e-6)
    assert torch.equal(body.pos_embed[:,0], first['pos_embed'][:,0]) and torch.equal(body.norm.weight, first['norm.weight'])
    again = timm_body('vit_tiny_patch16_224', weights=folder/'model.safetensors', **small, img_size=96) # a file, read by us
    assert torch.allclose(again.pos_embed, want, atol=1e-6)

def test_what_a_folder_says_is_kept(tmp_path):
    "Channels, size and pooling that are in its configuration alone"
    (tmp_path/'f').mkdir()
    cfg = dict(input_size=[1,32,32], fixed_input_size=True, mean=[.5], std=[.2], num_classes=7, classifier='head')
    about = dict(architecture='vit_tiny_patch16_224', model_args=dict(small, global_pool='avg', num_classes=7), pretrained_cfg=cfg)
    (tmp_path/'f'/'config.json').write_text(json.dumps(about))
    m = Embedder(f"local-dir:{tmp_path/'f'}", 4, pretrained=False)
    assert m.named['model_kwargs']==dict(small, img_size=[32,32], in_chans=1, global_pool='avg') and list(m.cfg['mean'])==[.5]
    spec = m.spec()
    again = Embedder(**{k:v for k,v in spec.items() if k!='model_kwargs'}, pretrained=False, **spec['model_kwargs'])
    again.load_state_dict(m.embedder_state())
    x = torch.rand(2,1,32,32)
    assert torch.equal(again.eval()(x), m.eval()(x))

def test_names(tmp_path, folder):
    assert Embedder('timm/test_vit', 4, pretrained=False, img_size=32).arch=='test_vit'
    for arch,said in (('user/model', "write 'hf-hub:user/model' for a model of the Hugging Face hub, and 'local-dir:user/model' for a fo"),
        ('ftp:x', "timm has no model 'ftp:x'"), ('timm/resnet19', "nearest is 'resnet18'"),
        ('resnet18.b', "no weights 'b' of 'resnet18'; it has"),
        (f'local-dir:{tmp_path}', f"There is no timm model in {str(tmp_path)!r}: its folder holds 'config.json'"), (3, 'got 3')):
        with pytest.raises(ValueError, match=re.escape(said)): Embedder(arch, 4, pretrained=False)
    (tmp_path/'config.json').write_text('{"architecture": "nothing"}')
    with pytest.raises(ValueError, match='does not describe a timm model'): Embedder(f'local-dir:{tmp_path}', 4)
    (tmp_path/'config.json').write_text((folder/'config.json').read_text())
    with pytest.raises(RuntimeError, match='Its folder must hold those of the model'): Embedder(f'local-dir:{tmp_path}', 4) # no weights

def test_the_hub_without_a_network(monkeypatch):
    "One sentence, at once, also where only the description would be fetched"
    import socket, time, dmlfast.models.bodies as rooms
    def _no_name(*args, **kwargs): raise socket.gaierror(-2, 'Name or service not known')
    monkeypatch.setattr(socket, 'getaddrinfo', _no_name)
    monkeypatch.setattr(rooms, 'get_hf_file_metadata', lambda *args: _no_name())
    began = time.perf_counter()
    for kwargs in (dict(), dict(pretrained=False), dict(weights=__file__)):
        with pytest.raises(RuntimeError, match="hf-hub:user/model' could not be loaded.*use a folder, 'local-dir:folder'"):
            Embedder('hf-hub:user/model', 4, **kwargs)
    with pytest.raises(RuntimeError, match='hf-hub:user/model'): one_size('hf-hub:user/model')
    assert time.perf_counter()-began<5

def test_the_hub(monkeypatch, folder):
    "A description that is there is read as that of a folder is; a file that is not there is said"
    import dmlfast.models.bodies as rooms
    asked = []
    def _fetch(repo, file, revision=None): return asked.append((repo, file, revision)) or folder/file
    monkeypatch.setattr(rooms, 'try_to_load_from_cache', lambda *args, **kwargs: 'there')
    monkeypatch.setattr(rooms, 'hf_hub_download', _fetch)
    assert built_as('hf-hub:user/model@v2')==built_as(f'local-dir:{folder}') and asked==[('user/model', 'config.json', 'v2')]
    monkeypatch.setattr(rooms, 'hf_hub_download', lambda *args, **kwargs: 1/0)
    with pytest.raises(RuntimeError, match="'hf-hub:user/model' could not be loaded"): built_as('hf-hub:user/model')

def test_an_exported_description_reaches_for_nothing(make, tmp_path, folder):
    "Neither a folder nor the hub is opened because a file says so"
    make('test_resnet', 32).export_embedder(tmp_path/'e')
    about = json.loads((tmp_path/'e'/'embedder.json').read_text())
    for arch in (f'local-dir:{folder}', 'hf-hub:user/model', 'timm/test_resnet'):
        about['model']['arch'] = arch
        (tmp_path/'e'/'embedder.json').write_text(json.dumps(about))
        with pytest.raises(ValueError, match='`model.arch` must be the name of a timm model'): load_embedder(tmp_path/'e')

# sizes

@pytest.mark.parametrize('arch,size,do', [('vit_small_patch14_dinov2', 64, '56 or 70'), ('vit_tiny_patch16_224', 28, '16 or 32'),
    ('hiera_tiny_224', 112, '96 or 128'), ('efficientformer_l1', 64, '224')])
def test_sizes_that_work_are_named(arch, size, do):
    "And they do"
    if not timm.is_model(arch): pytest.skip(f'this timm has no {arch}')
    with pytest.raises(ValueError, match=f'{arch!r} cannot take images of {size}×{size} pixels: make them {do} pixels to a side'):
        sized(arch, (size,size))
    for n in map(int, do.split(' or ')):
        with torch.device('meta'): body = timm.create_model(arch, num_classes=0, **sized(arch, (n,n))).eval()
        with torch.no_grad(): body.forward_features(torch.zeros(1, 3, n, n, device='meta'))

def test_only_what_is_needed_is_said_to_timm():
    assert sized('resnet18', (30,50))==sized('vit_tiny_patch16_224', (224,224))=={}
    assert sized('vit_tiny_patch16_224', (64,96), depth=2)==dict(depth=2, img_size=(64,96))
    for o in (dict(dynamic_img_size=True), dict(img_size=32)): assert sized('vit_tiny_patch16_224', (64,64), **o)==o
    with pytest.raises(ValueError, match="timm cannot make 'vit_tiny_patch16_224' with {'bogus': 1"):
        sized('vit_tiny_patch16_224', (64,64), bogus=1)
    was = torch.get_rng_state()
    sized('vit_tiny_patch16_224', (64,64))
    assert torch.equal(was, torch.get_rng_state())

def test_a_learner_says_it_before_a_body_is_made(make):
    with pytest.raises(ValueError, match="cannot take images of 40×40 pixels: make them 32 or 48"): make('vit_tiny_patch16_224', 40, small)
    learn = make('vit_tiny_patch16_224', 48, {**small, 'dynamic_img_size':True})
    assert learn.model.body.pos_embed.shape[1]==197 and len(learn.embed(bar=False)[0]) # the user's way

# pooling

def _end(m, x):
    with torch.no_grad(): return m.body.forward_features(x)

@pytest.mark.parametrize('arch', [o for o in bodies if o not in ('swin_tiny_patch4_window7_224','convnext_atto')])
def test_tokens_by_name(arch):
    "timm's own pooling of tokens, and the formula of GeM on those of patches"
    kwargs,size,d = bodies[arch]
    kind = re.search('dinov2|dinov3|siglip|clip|eva02|deit', arch)[0]
    x,n = torch.rand(2, 3, size, size),dict(dinov2=5, dinov3=5, clip=1, siglip=0, eva02=1, deit=2)[kind] # class, registers, distillation
    def _of(pool):
        torch.manual_seed(0)
        m = Embedder(arch, 4, pretrained=False, pool=pool, **kwargs, img_size=size).eval()
        with torch.no_grad():
            torch.manual_seed(1)
            if isinstance(m.body.fc_norm, nn.LayerNorm): m.body.fc_norm.weight.uniform_(.5, 2)
            return m,m.features(x),_end(m, x)
    def _norm(m, o): return m.body.fc_norm(o)
    for pool in ('avg','max','avgmax'):
        m,got,end = _of(pool)
        assert torch.allclose(got, _norm(m, global_pool_nlc(end, pool, n)), atol=1e-6) and m.n_features==d
    m,got,end = _of('gem')
    assert torch.allclose(got, _norm(m, end[:,n:].clamp(min=1e-6).pow(3).mean(1).pow(1/3)), atol=1e-5)
    if 'siglip' in arch:
        for o in ('token','token+avg'):
            with pytest.raises(ValueError, match='has no class token'): _of(o)
        assert torch.equal(_of('map')[1], _of(None)[1]) and not torch.equal(_of(None)[1], _of('avg')[1])
        return
    m,got,end = _of('token')
    assert torch.allclose(got, _norm(m, end[:,0]), atol=1e-6)
    m,got,_ = _of('token+avg')
    assert torch.equal(got, torch.cat([_of('token')[1],_of('avg')[1]], 1)) and m.n_features==2*d
    with pytest.raises(ValueError, match='has not learned to pool by attention'): _of('map')
    m,got,_ = _of(None)
    assert torch.allclose(got, m.body(x).detach(), atol=1e-6) # as the model was trained

def test_maps_have_no_tokens():
    for arch in ('convnext_atto','swin_tiny_patch4_window7_224'):
        for o in ('token','token+avg','map'):
            with pytest.raises(ValueError, match=f"{arch!r} ends in a map, .* instead of pool={re.escape(repr(o))} it takes 'avg'"):
                Embedder(arch, 4, pretrained=False, pool=o, **bodies[arch][0])

def test_attention_that_is_not_used_is_not_trained():
    "No gradient would reach it, and that is what several processes wait for"
    m = Embedder('vit_base_patch16_siglip_224', 4, pretrained=False, pool='avg', **small, img_size=32)
    m(torch.rand(2,3,32,32)).sum().backward()
    assert all((p.grad is not None)==p.requires_grad for p in m.parameters()) and 'attn_pool.q.weight' in m.frozen

# everything else

@pytest.mark.parametrize('arch', bodies)
def test_a_body_does_what_all_do(make, arch, tmp_path):
    "A head in closed form, cached features, groups, a step, half precision, and the same embeddings without fastai"
    if not timm.is_model(arch): pytest.skip(f'this timm has no {arch}')
    kwargs,size,d = bodies[arch]
    learn = make(arch, size, kwargs, init='lda', pool='gem' if arch=='convnext_atto' else None, splitter=stage_splitter, cbs=ChannelsLast())
    m = learn.model
    assert m.n_features==d and m.named['model_kwargs'].get('img_size', size)==size
    learn.fit_head(1)
    was = weights_of(learn)
    learn.freeze()
    learn.fit(1, slice(1e-3))
    now = weights_of(learn)
    assert [k for k in was if was[k].ndim>1 and not torch.equal(was[k], now[k])]==['head.weight'] # fastai trains norms all the same
    learn.unfreeze()
    learn.fit(1, slice(1e-4,1e-3))
    moved = [k for k,v in weights_of(learn).items() if k.startswith('body.') and not torch.equal(v, now[k])]
    assert len(learn.opt.param_lists)>3 and len(moved)>.7*len([k for k in now if k.startswith('body.')])
    embs = learn.embed(bar=False)[0]
    x = learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): half = m.eval()(x)
    assert half.dtype==torch.float32 and (half*embs[:len(x)]).sum(1).min()>.99
    res = learn.export_embedder(tmp_path/'e')
    assert torch.allclose(res.embed([*learn.dls.valid.items]), embs, atol=1e-5)

def test_a_body_without_pytorch_and_with_ranking(make, tmp_path):
    "As ONNX: rotated positions, registers and two pooled parts; and trained with a second task"
    pytest.importorskip('onnxruntime'), pytest.importorskip('onnxscript')
    learn = make('vit_small_patch16_dinov3', 48, small, pool='token+avg', cbs=SelfSupervisedRanking(m=8))
    learn.fit(1, 1e-3)
    assert np.isfinite(learn.recorder.values[-1][:3]).all() and learn.model.n_features==96
    res = learn.export_embedder(tmp_path/'e')
    assert res.to_onnx(tmp_path/'m.onnx').is_file() # compared with PyTorch as it is written

# compiled models

def compiled(learn, how):
    "In place, or wrapped"
    if how=='in place': learn.model.compile(backend='eager')
    else: learn.model = torch.compile(learn.model, backend='eager')
    return learn

class Stop(Callback):
    "Interrupt a fit"
    order = 100 # after the checkpoint
    def after_epoch(self):
        if self.epoch==0: raise KeyboardInterrupt

@pytest.mark.parametrize('how', ['in place','wrapped'])
def test_compiled_models(make, tmp_path, how):
    "Every method gives what it gives otherwise; files are written with the names of weights that all have, and read with those of before"
    def _new(how=None, **kwargs):
        learn = make('vit_tiny_patch16_224', 48, small, **{**dict(loss_func=ProxyNCALoss()), **kwargs})
        return compiled(learn, how) if how else learn
    plain = _new()
    plain.fit(2, 1e-3)
    want,file = plain.embed(bar=False)[0],plain.dls.valid.items[0]
    learn = _new(how)
    with pytest.raises(KeyboardInterrupt): learn.fit(2, 1e-3, cbs=[Checkpoint(tmp_path/'c'), Stop()])
    state = torch.load(tmp_path/'c'/'checkpoint.pt', weights_only=True)
    assert list(state['model'])==list(plain.model.state_dict())
    state['model'] = {f'_orig_mod.{k}':v for k,v in state['model'].items()} # as a wrapped model's were written
    (tmp_path/'old').mkdir()
    torch.save(state, tmp_path/'old'/'checkpoint.pt')
    shutil.copytree(tmp_path/'c', tmp_path/'d')
    for o,folder in ((how,'c'), (None,'d'), (how,'old')): # it goes on compiled and not compiled
        learn = _new(o).resume(tmp_path/folder)
        learn.fit(2, 1e-3)
        assert learn.recorder.iters[-1]>1 and torch.allclose(learn.embed(bar=False)[0], want, atol=1e-4), folder
    assert np.isclose(learn.evaluate()['map@r'], plain.evaluate()['map@r'], atol=.02)
    emb,_ = learn.predict(file, k=1)
    assert torch.allclose(learn.export_embedder(tmp_path/'e', gallery='val').embed(file), emb, atol=1e-5)
    assert torch.allclose(load_embedder(tmp_path/'e').embed(file), want[0], atol=1e-4)
    learn.export('l.pkl')
    assert torch.allclose(load_learner(learn.path/'l.pkl').predict(file, k=1)[0], emb, atol=1e-5)
    head = _new(how, init='lda')
    was = weights_of(head)
    head.fit_head(1) # on features
    now = weights_of(head)
    assert {k.replace('_orig_mod.', '').split('.')[0] for k in was if not torch.equal(was[k], now[k])}=={'head','loss_func'}
