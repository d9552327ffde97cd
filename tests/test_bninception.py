"BN-Inception against the published layout, written down a second time and computed a second time"
import pytest, timm, torch, torch.nn.functional as F
from safetensors.torch import save_file
from dmlfast.models.bninception import BNInception
from dmlfast.models.bodies import load_weights, timm_body
from dmlfast.models.embedder import Embedder

# channels in, and channels out of each convolution, as the layers of Caffe's network are listed
listing = """
3a 192 1x1:64 3x3_reduce:64 3x3:64 double_3x3_reduce:64 double_3x3_1:96 double_3x3_2:96 pool_proj:32
3b 256 1x1:64 3x3_reduce:64 3x3:96 double_3x3_reduce:64 double_3x3_1:96 double_3x3_2:96 pool_proj:64
3c 320 3x3_reduce:128 3x3:160 double_3x3_reduce:64 double_3x3_1:96 double_3x3_2:96
4a 576 1x1:224 3x3_reduce:64 3x3:96 double_3x3_reduce:96 double_3x3_1:128 double_3x3_2:128 pool_proj:128
4b 576 1x1:192 3x3_reduce:96 3x3:128 double_3x3_reduce:96 double_3x3_1:128 double_3x3_2:128 pool_proj:128
4c 576 1x1:160 3x3_reduce:128 3x3:160 double_3x3_reduce:128 double_3x3_1:160 double_3x3_2:160 pool_proj:128
4d 608 1x1:96 3x3_reduce:128 3x3:192 double_3x3_reduce:160 double_3x3_1:192 double_3x3_2:192 pool_proj:128
4e 608 3x3_reduce:128 3x3:192 double_3x3_reduce:192 double_3x3_1:256 double_3x3_2:256
5a 1056 1x1:352 3x3_reduce:192 3x3:320 double_3x3_reduce:160 double_3x3_1:224 double_3x3_2:224 pool_proj:128
5b 1024 1x1:352 3x3_reduce:192 3x3:320 double_3x3_reduce:192 double_3x3_1:224 double_3x3_2:224 pool_proj:128"""

def _convs():
    "Name, channels in and out, and size of each convolution"
    yield from [('conv1_7x7_s2', 3, 64, 7), ('conv2_3x3_reduce', 64, 64, 1), ('conv2_3x3', 64, 192, 3)]
    for line in listing.split('\n')[1:]:
        block,n,*layers = line.split()
        n,out = int(n),{}
        for o in layers:
            name,c = o.split(':')
            before = {'3x3':'3x3_reduce', 'double_3x3_1':'double_3x3_reduce', 'double_3x3_2':'double_3x3_1'}.get(name)
            yield f'inception_{block}_{name}', out.get(before, n), int(c), 3 if before else 1
            out[name] = int(c)

def make_published(rows):
    "A file's worth of random weights in the published layout, batch norm as `rows` of 1×C or not"
    g,sd = torch.Generator().manual_seed(0),{}
    for name,n_in,n_out,k in _convs():
        sd[f'{name}.weight'] = torch.randn(n_out, n_in, k, k, generator=g)*(2/(n_in*k*k))**.5
        sd[f'{name}.bias'] = torch.randn(n_out, generator=g)*.1
        bn = dict(weight=1+.1*torch.randn(n_out, generator=g), bias=.1*torch.randn(n_out, generator=g),
            running_mean=.1*torch.randn(n_out, generator=g), running_var=torch.rand(n_out, generator=g)+.5)
        sd.update({f'{name}_bn.{k}': v[None] if rows else v for k,v in bn.items()})
    return {**sd, 'last_linear.weight': torch.randn(1000, 1024, generator=g)*.03, 'last_linear.bias': torch.randn(1000, generator=g)}

def theirs(sd, x):
    "What the published network makes of `x`, which is blue, green, red, from 0 to 255 less the means"
    sd = {k: v.flatten() if '_bn.' in k else v for k,v in sd.items()}
    def conv(x, name, stride=1):
        w = sd[f'{name}.weight']
        x = F.conv2d(x, w, sd[f'{name}.bias'], stride, w.shape[2]//2)
        return F.relu(F.batch_norm(x, *(sd[f'{name}_bn.{o}'] for o in ('running_mean','running_var','weight','bias'))))
    def pool(x): return F.max_pool2d(x, 3, 2, ceil_mode=True)
    x = conv(conv(pool(conv(x, 'conv1_7x7_s2', 2)), 'conv2_3x3_reduce'), 'conv2_3x3')
    x,maps = pool(x),{}
    for b in ('3a','3b','3c','4a','4b','4c','4d','4e','5a','5b'):
        p,small = f'inception_{b}_',b in ('3c','4e')
        three = conv(conv(x, p+'3x3_reduce'), p+'3x3', 1+small)
        double = conv(conv(conv(x, p+'double_3x3_reduce'), p+'double_3x3_1'), p+'double_3x3_2', 1+small)
        if small: x = torch.cat([three, double, pool(x)], 1)
        else:
            around = F.max_pool2d(x, 3, 1, 1) if b=='5b' else F.avg_pool2d(x, 3, 1, 1)
            x = torch.cat([conv(x, p+'1x1'), three, double, conv(around, p+'pool_proj')], 1)
        maps[b] = x
    return F.linear(x.mean((2,3)), sd['last_linear.weight'], sd['last_linear.bias']),maps

@pytest.fixture(scope='module')
def published(): return make_published(rows=True)

@pytest.fixture(scope='module')
def rgb():
    "Images, red, green, blue, from 0 to 1"
    return torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))

def _normalized(model, x):
    cfg = model.pretrained_cfg
    return (x-torch.tensor(cfg['mean'])[:,None,None])/torch.tensor(cfg['std'])[:,None,None]

def _close(a, b): return (a-b).abs().max()<1e-5*b.abs().max()

def _caffe(x): return x.flip(1)*255-torch.tensor([104.,117,128])[:,None,None]

def test_layout(published):
    model = timm.create_model('bn_inception')
    shapes = {k: tuple(v.shape) for k,v in model.state_dict().items() if 'num_batches' not in k and k!='input_is_rgb'}
    assert shapes=={k: tuple(v.flatten().shape if '_bn.' in k else v.shape) for k,v in published.items()}
    assert sum(p.numel() for p in model.parameters())==11_295_240 # with 1,000 classes
    assert 'bn_inception' in timm.list_models('bn_*') and timm.is_model('bn_inception')

@pytest.mark.parametrize('rows', [True, False])
def test_published_file_gives_the_published_network(tmp_path, rgb, rows):
    sd = make_published(rows)
    torch.save(sd, tmp_path/'bn.pth')
    model = timm.create_model('bn_inception', pretrained=True, pretrained_cfg_overlay=dict(file=tmp_path/'bn.pth')).eval()
    body = timm_body('bn_inception', weights=tmp_path/'bn.pth').eval()
    x = _normalized(model, rgb)
    want,maps = theirs(sd, _caffe(rgb))
    with torch.no_grad():
        assert _close(model(x), want)
        assert _close(body.forward_features(x), maps['5b'])
        assert _close(body(x), maps['5b'].mean((2,3)))
        got = model.forward_intermediates(x, intermediates_only=True)
    for a,b in zip(got[2:], ('3b','4d','5b')): assert _close(a, maps[b])

def test_the_wrong_order_of_channels_would_show(published, rgb):
    "The comparison above is one that an unflipped convolution fails"
    assert (theirs(published, _caffe(rgb))[0]-theirs(published, _caffe(rgb.flip(1)))[0]).abs().max()>1

@pytest.mark.parametrize('ext', ['pth','safetensors'])
def test_flipped_once(tmp_path, published, ext):
    "What was read from the published file and saved by us is read as it is, with its classifier and without, however often"
    torch.save(published, tmp_path/'bn.pth')
    first = published['conv1_7x7_s2.weight'].flip(1)
    fn = tmp_path/f'ours.{ext}'
    for model in (timm_body('bn_inception', weights=tmp_path/'bn.pth'), load_weights(timm.create_model('bn_inception'), tmp_path/'bn.pth')):
        assert (model.conv1_7x7_s2.weight==first).all()
        for _ in range(2):
            sd = {k: v.contiguous() for k,v in model.state_dict().items()}
            save_file(sd, fn) if ext=='safetensors' else torch.save(sd, fn)
            model = timm_body('bn_inception', weights=fn)
            assert (model.conv1_7x7_s2.weight==first).all()
            again = timm.create_model('bn_inception', pretrained=True, num_classes=3, pretrained_cfg_overlay=dict(file=str(fn)))
            assert (again.conv1_7x7_s2.weight==first).all()

def test_an_unflipped_file_is_never_loaded(tmp_path):
    "Ways into the model that convert nothing refuse the published file, also where all of its shapes fit"
    sd = make_published(rows=False)
    torch.save(sd, tmp_path/'bn.pth')
    with pytest.raises(RuntimeError, match='input_is_rgb'): timm.create_model('bn_inception').load_state_dict(sd)
    with pytest.raises(RuntimeError, match='input_is_rgb'): timm.create_model('bn_inception', checkpoint_path=str(tmp_path/'bn.pth'))

def test_files_that_do_not_fit_are_named(tmp_path, published):
    torch.save({k:v for k,v in published.items() if not k.startswith('inception_4b')}, tmp_path/'less.pth')
    with pytest.raises(ValueError, match=r'42 missing \(inception_4b_1x1.weight, '): timm_body('bn_inception', weights=tmp_path/'less.pth')
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path/'other.pth')
    with pytest.raises(ValueError, match='do not fit a BNInception'): timm_body('bn_inception', weights=tmp_path/'other.pth')

def test_what_timm_models_do():
    x = torch.randn(2, 3, 64, 64)
    model = timm.create_model('bn_inception', num_classes=7, drop_rate=.5).eval()
    with torch.no_grad():
        assert model(x).shape==(2,7) and model.forward_head(model.forward_features(x), pre_logits=True).shape==(2,1024)
        model.reset_classifier(5)
        assert model(x).shape==(2,5) and model.get_classifier().out_features==5
        model.reset_classifier(0)
        assert torch.allclose(model(x), model.forward_features(x).mean((2,3)), atol=1e-5)
        final,maps = model.forward_intermediates(x)
        assert torch.equal(final, maps[-1]) and torch.equal(final, model.forward_features(x))
        mid,last = model.forward_intermediates(x, indices=[3], stop_early=True)
        assert torch.equal(mid, last[0]) and torch.equal(mid, maps[3])
    info = timm.create_model('bn_inception', features_only=True).feature_info
    assert info.channels()==[o.shape[1] for o in maps]==[64,192,320,608,1024] and info.reduction()==[64//o.shape[2] for o in maps]
    with pytest.raises(ValueError, match='NCHW'): model.forward_intermediates(x, output_fmt='NHWC')

def test_features_only_is_pruned():
    net = timm.create_model('bn_inception', features_only=True, out_indices=(1,3))
    assert [tuple(o.shape) for o in net(torch.randn(1,3,64,64))]==[(1,192,16,16),(1,608,4,4)]
    assert not [n for n,_ in net.named_parameters() if any(o in n for o in ('4e','5a','5b','last'))]
    assert any('inception_4d' in n for n,_ in net.named_parameters())

@pytest.mark.parametrize('size', [32, 97, 112, 224, 225])
def test_sizes(size):
    "Also those at which Caffe's pooling and convolutions would disagree; a map never has fewer places than a 32nd of the pixels"
    with torch.no_grad(): out = BNInception(0).eval().forward_features(torch.randn(1, 3, size, size))
    assert out.shape[1]==1024 and size//32<=out.shape[2]<=-(-size//32)

def test_in_an_embedder(tmp_path, published):
    torch.save(published, tmp_path/'bn.pth')
    m = Embedder('bn_inception', 64, weights=tmp_path/'bn.pth', frozen_stages=2)
    assert m.n_features==1024 and m.head.weight.shape==(64,1024)
    m(torch.randn(2,3,64,64))[:,0].sum().backward()
    assert m.body.inception_3c_3x3.weight.grad is None and m.body.inception_4a_3x3.weight.grad is not None
    assert not m.body.inception_3c_3x3_bn.training and m.body.inception_4a_3x3_bn.training
    gray = timm.create_model('bn_inception', in_chans=1, pretrained=True, num_classes=0,
        pretrained_cfg_overlay=dict(file=str(tmp_path/'bn.pth')))
    assert torch.allclose(gray.conv1_7x7_s2.weight, published['conv1_7x7_s2.weight'].sum(1, keepdim=True), atol=1e-5)
