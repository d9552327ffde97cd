"Embedders of many kinds of timm models, and what weights may be loaded"
import pytest, timm, torch
from safetensors.torch import save_file
from dmlfast.models import Embedder, embedder_splitter, load_weights, timm_body

# maps with the channels first and last, tokens, and features whose width is not `num_features`
archs = ['test_resnet','test_efficientnet','test_convnext','test_nfnet','test_mambaout','test_byobnet','test_vit','test_vit2',
    'mobilenetv3_small_050','lcnet_050','edgenext_xx_small','test_vit4']

@pytest.mark.parametrize('arch', archs)
def test_forward_and_backward(arch):
    torch.manual_seed(0)
    m = Embedder(arch, 8, pretrained=False, **(dict(img_size=64) if 'vit' in arch else {}))
    embs = m(torch.randn(2, 3, 64, 64))
    assert embs.shape==(2,8) and embs.dtype==torch.float32
    assert torch.allclose(embs.norm(dim=1), torch.ones(2), atol=1e-5)
    embs[:,0].sum().backward()
    assert m.head.weight.grad.abs().sum()>0 and next(m.body.parameters()).grad.abs().sum()>0
    assert m.head.in_features==m.features(torch.randn(2, 3, 64, 64)).shape[1]
    body,rest = embedder_splitter(m)
    assert {id(p) for p in body+rest}=={id(p) for p in m.parameters()} and len(rest)==2

def test_pooling_is_the_models_own():
    "On maps our average equals timm's; on tokens timm's own pooling is used"
    x = torch.randn(2, 3, 64, 64)
    for arch,kw in (('test_resnet',{}),('test_vit',dict(img_size=64))):
        m = Embedder(arch, 8, pretrained=False, **kw).eval()
        assert torch.allclose(m.features(x), m.body(x), atol=1e-5)

def test_unnormalised():
    m = Embedder('test_resnet', 8, pretrained=False, normalize=False).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(m(x), m.head(m.features(x)))

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

def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self): return (print, ('run',))
    torch.save(dict(a=Evil()), tmp_path/'evil.pth')
    with pytest.raises(Exception, match='[Ww]eights'): load_weights(timm_body('test_resnet', pretrained=False), tmp_path/'evil.pth')

def test_no_network(monkeypatch):
    "Pretrained weights that cannot be fetched are a sentence that says what to do"
    def _fail(*args, **kwargs): raise OSError('no network')
    monkeypatch.setattr(timm, 'create_model', _fail)
    with pytest.raises(RuntimeError, match="pass a file as `weights=`, or `pretrained=False`"): timm_body('resnet18')
