"Embedders on the hub: uploaded and downloaded for real, from a stand-in of its HTTP interface that runs here"
import json, os, subprocess, sys
import numpy as np, pytest, timm, torch
from pathlib import Path
from huggingface_hub import constants
from PIL import Image
from dmlfast.deploy import *
from dmlfast.deploy.embedder import Preprocess
from dmlfast.models.embedder import Embedder
from dmlfast.retrieval.embedded import Embedded
from dmlfast.train.gain import Gain
from hub import Hub, serve

colours = dict(red=(250,0,0), green=(0,250,0), blue=(0,0,250))
def plain(rgb, size=(40,30)): return np.full((*size,3), rgb, dtype=np.uint8)

def make(**kwargs):
    torch.manual_seed(0)
    model = Embedder('test_resnet', None if kwargs.get('head')=='identity' else 8, pretrained=False, **kwargs)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.momentum = None
    with torch.no_grad(): model.train()(torch.rand(8, 3, 32, 40)) # its batch norm has seen images, as after a training
    return ImageEmbedder(model, Preprocess([('fit', (40,32), 3)], [.5]*3, [.25]*3), dict(network='test_resnet', data='colours | more'))

@pytest.fixture
def finder(): return make().add([plain(o) for o in colours.values()], [*colours])

def point_to(url, monkeypatch):
    "What `HF_ENDPOINT` does before huggingface_hub is imported"
    monkeypatch.setattr(constants, 'ENDPOINT', url)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', url+'/{repo_id}/resolve/{revision}/{filename}')

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub, its address in `HF_ENDPOINT`'s place, an empty cache, and nobody logged in"
    hub = Hub()
    with serve(hub) as url:
        point_to(url, monkeypatch)
        for k,v in dict(HF_HUB_DISABLE_XET=True, HF_HUB_OFFLINE=False, HF_HUB_CACHE=str(tmp_path/'cache'),
            HF_TOKEN_PATH=str(tmp_path/'token'), HF_STORED_TOKENS_PATH=str(tmp_path/'tokens')).items():
            monkeypatch.setattr(constants, k, v)
        for o in ('HF_TOKEN','HUGGING_FACE_HUB_TOKEN'): monkeypatch.delenv(o, raising=False)
        hub.url = url
        yield hub

def alike(a, b):
    assert torch.equal(a.embs, b.embs) and (a.labels,a.items,a.facts,a.calibration)==(b.labels,b.items,b.facts,b.calibration)
    x = plain((9,99,200))
    assert torch.equal(a.embed(x), b.embed(x)) and a.search(x)==b.search(x)

def test_there_and_back(finder, hub):
    finder.calibration = dict(threshold=.5, fmr=1e-3)
    name = finder.push_to_hub('user/colours', token='writes')
    assert name=='hf-hub:user/colours@'+hub.repos['user/colours']['branches']['main']
    assert set(hub.files('user/colours'))=={'.gitattributes','README.md','config.json','embedder.json','gallery.json','gallery.safetensors',
        'model.safetensors','weights.safetensors'}
    assert len(hub.repos['user/colours']['commits'])==2 # the first and this
    again = load_embedder('hf-hub:user/colours')
    alike(again, finder)
    assert again.source==name and repr(again).endswith(f', from {name})') and again.threshold==.5
    hub.asked.clear()
    alike(load_embedder(name), finder)
    assert hub.asked==[] # a commit does not change
    got = {p for m,p,_ in hub.asked}
    load_embedder('hf-hub:user/colours')
    assert got|{p.rpartition('/')[2] for m,p,_ in hub.asked}=={'embedder.json'} # which commit `main` is

def test_revisions(finder, hub):
    "A branch of its own; what is named by its commit stays, and files of another gallery go"
    old = finder.push_to_hub('user/x', token='writes')
    few = make()
    new = few.push_to_hub('user/x', token='writes')
    assert 'gallery.json' not in hub.files('user/x') and len(load_embedder('hf-hub:user/x'))==0 and old!=new
    alike(load_embedder(old), finder)
    assert finder.push_to_hub('user/x', revision='v2', token='writes').partition('@')[2]==hub.repos['user/x']['branches']['v2']
    assert len(load_embedder('hf-hub:user/x@v2'))==3 and len(load_embedder('hf-hub:user/x@main'))==0
    assert finder.push_to_hub('user/x', revision='v2', token='writes')
    with pytest.raises(ValueError, match="There is no 'hf-hub:user/x@v3': its repository has no such revision"):
        load_embedder('hf-hub:user/x@v3')

def test_private(finder, hub):
    finder.push_to_hub('user/secret', private=True, token='writes')
    alike(load_embedder('hf-hub:user/secret', token='reads'), finder)
    for token in (None,'wrong'):
        with pytest.raises(ValueError, match="The hub has no 'hf-hub:user/secret@main', or has it not for you: log in"):
            load_embedder('hf-hub:user/secret', token=token)
    for token in (None,'wrong','reads'):
        with pytest.raises(ValueError, match="The hub has no 'hf-hub:user/mine', or has it not for you"):
            finder.push_to_hub('user/mine', token=token)
    assert set(hub.repos)=={'user/secret'}
    finder.push_to_hub('user/open', token='writes')
    with pytest.raises(ValueError, match="'user/open' exists already, and everybody can see it"):
        finder.push_to_hub('user/open', private=True, token='writes')
    assert len(hub.repos['user/open']['commits'])==2
    hub.gated.add('user/open')
    with pytest.raises(ValueError, match='has conditions: accept them'): load_embedder('hf-hub:user/open')

def test_what_was_changed_on_the_hub_is_refused(finder, hub):
    finder.push_to_hub('user/x', token='writes')
    files = dict(hub.files('user/x'))
    for name in ('model.safetensors','weights.safetensors','gallery.json','gallery.safetensors'):
        hub.commit('user/x', 'main', {**files, name:files[name][:-1]+bytes([files[name][-1]^1])})
        with pytest.raises(ValueError, match=f"'{name}' in 'hf-hub:user/x@[0-9a-f]{{40}}' was changed or cut off"):
            load_embedder('hf-hub:user/x')
    about = json.loads(files['embedder.json'])
    def told(**more): return json.dumps({**about, **more}).encode()
    for data,says in ((told(model={**about['model'], 'pretrained_cfg':dict(url='http://x')}), 'an argument that a folder may not set'),
        (told(model={**about['model'], 'arch':'hf-hub:user/x'}), '`model.arch` must be the name'), (b'[]', 'must hold an object'),
        (told(sha256={**about['sha256'], '../x':'0'*64}), 'in no other folder'), (told(sha256={}), "there is no 'weights.safetensors'"),
        (b' '*2**20+told(), 'at most 1,048,576 are fetched'), (told(sha256={**about['sha256'], 'x.pkl':'0'*64}), "There is no 'x.pkl'")):
        hub.tamper('user/x', 'embedder.json', data)
        with pytest.raises((ValueError,FileNotFoundError), match=says) as e: load_embedder('hf-hub:user/x')
        assert 'hf-hub:user/x@' in str(e.value)
    hub.commit('user/x', 'main', {k:v for k,v in files.items() if k!='embedder.json'})
    with pytest.raises(ValueError, match="There is no 'embedder.json' in 'hf-hub:user/x@main'"): load_embedder('hf-hub:user/x')

def test_only_what_has_a_hash_is_fetched_and_no_more_than_agreed(finder, hub):
    finder.push_to_hub('user/x', token='writes')
    hub.tamper('user/x', 'pytorch_model.bin', b'pickle')
    hub.asked.clear()
    with pytest.raises(ValueError, match=r"safetensors' in 'hf-hub:user/x@\w+' has [\d,]+ bytes, and at most [\d,]+ are fetched"):
        load_embedder('hf-hub:user/x', most=10_000)
    load_embedder('hf-hub:user/x')
    got = {p.rpartition('/')[2] for m,p,_ in hub.asked if m=='GET'}
    assert got=={'embedder.json','gallery.json','gallery.safetensors','model.safetensors','weights.safetensors'}
    hub.lied['model.safetensors'] = 2**40
    hub.tamper('user/x', 'README.md', b'new')
    with pytest.raises(ValueError, match='has 1,099,511,627,776 bytes, and at most'): load_embedder('hf-hub:user/x')

def test_without_a_network(finder, hub, monkeypatch, tmp_path):
    name = finder.push_to_hub('user/x', token='writes')
    with pytest.raises(ValueError, match="'embedder.json' of 'hf-hub:user/x@main' was not fetched before"):
        load_embedder('hf-hub:user/x', local_files_only=True)
    load_embedder('hf-hub:user/x')
    hub.tamper('user/x', 'embedder.json', b'{}')
    assert load_embedder('hf-hub:user/x', local_files_only=True).source==name
    point_to('http://127.0.0.1:9', monkeypatch) # nobody is there
    alike(load_embedder('hf-hub:user/x'), finder) # as it was last time, and it says which that was
    assert load_embedder('hf-hub:user/x').source==name
    with pytest.raises(ConnectionError, match=r"cannot be reached \(ConnectError\), and 'embedder.json' of 'hf-hub:user/y@main' was not"):
        load_embedder('hf-hub:user/y')
    with pytest.raises(ConnectionError, match=r"The hub cannot be reached \(ConnectError\): go online"):
        finder.push_to_hub('user/x', token='writes')

def test_a_hub_that_fails(finder, hub, monkeypatch):
    "What it says is said, in a sentence"
    import hub as standin
    monkeypatch.setattr(standin, '_routes', [('POST', '/api/repos/create', lambda self, *args: self.no(422, 'Bad'))])
    with pytest.raises(ValueError, match="The hub refuses what is asked of 'hf-hub:user/x': .*422"):
        finder.push_to_hub('user/x', token='writes')
    monkeypatch.setattr(standin, '_routes', [(('GET','HEAD'), '/.*', lambda self, *args: self.no(503, 'Busy'))])
    with pytest.raises(ValueError, match="The hub refuses what is asked of 'hf-hub:user/x@main': .*503"): load_embedder('hf-hub:user/x')

def test_a_plain_name_is_a_folder(finder, hub, tmp_path, monkeypatch):
    finder.push_to_hub('user/colours', token='writes')
    monkeypatch.chdir(tmp_path)
    hub.asked.clear()
    with pytest.raises(FileNotFoundError, match="There is no folder 'user/colours'. A repository of the hub is 'hf-hub:user/colours'"):
        load_embedder('user/colours')
    for bad in ('hf-hub:colours','hf-hub:user/a/b','hf-hub:../x/y','hf-hub:user/x@','hf-hub:user/x@../y'):
        with pytest.raises(ValueError, match="'hf-hub:user/name'"): load_embedder(bad)
    for bad in ('colours','a/b/c','hf-hub:user/x'):
        with pytest.raises(ValueError, match="is called 'user/name'"): finder.push_to_hub(bad)
    with pytest.raises(ValueError, match='`token` is for a repository'): load_embedder('colours', token='reads')
    with pytest.raises(ValueError, match='`save` it to a folder'): load_embedder('hf-hub:user/colours', write=True)
    assert hub.asked==[]
    finder.save(tmp_path/'user'/'colours')
    assert len(load_embedder('user/colours'))==3 and hub.asked==[]

# ---- the body for timm ----

def x_of(n=2, c=3, size=(32,40)): return torch.randn(n, c, *size, generator=torch.Generator().manual_seed(1))

@pytest.mark.parametrize('kwargs', [{}, dict(head='identity'), dict(pool='gem'), dict(head='bnneck', act_layer='silu')], ids=str)
def test_timm_reads_the_body(kwargs, tmp_path, hub):
    e = make(**kwargs)
    folder = e.save_pretrained(tmp_path/'e')
    x = x_of()
    with torch.no_grad():
        want,body = e.model.body.eval()(x),timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=0).eval()
        assert want.std(0).mean()>1e-3 # it is no network of zeros
        assert torch.equal(body(x), want)
        if 'pool' not in kwargs: assert torch.equal(e.model.features(x), want)
        e.push_to_hub('user/e', token='writes')
        assert torch.equal(timm.create_model('hf-hub:user/e', pretrained=True, num_classes=0).eval()(x), want)
        assert torch.equal(Embedder(f'local-dir:{folder}', 8).eval().body(x), want)
    cfg = body.pretrained_cfg
    assert [list(cfg[k]) for k in ('mean','std','input_size')]==[[.5]*3, [.25]*3, [3,32,40]] and cfg['num_classes']==0
    assert (cfg['interpolation'],cfg['crop_pct'],cfg['crop_mode'])==('bicubic',1,'center')
    assert torch.equal(load_embedder(folder).embed(x), e.embed(x))

def test_tokens_and_grey_images_for_timm(tmp_path):
    torch.manual_seed(0)
    model = Embedder('test_vit', 8, pretrained=False, img_size=32, in_chans=1)
    e = ImageEmbedder(model, Preprocess([('squash', (40,40), 2), ('crop', (32,32), 2)], [.5], [.2], mode='L'))
    body,x = timm.create_model(f"local-dir:{e.save_pretrained(tmp_path/'e')}", pretrained=True).eval(),x_of(c=1, size=(32,32))
    with torch.no_grad(): assert torch.equal(body(x), e.model.features(x))
    cfg = body.pretrained_cfg
    assert (cfg['crop_mode'],cfg['crop_pct'],list(cfg['mean']))==('squash',.8,[.5])

def test_no_weight_is_there_twice(finder, tmp_path):
    "The folder for timm is as large as the plain one, but for a card and a description; both are read, and changes are kept in it"
    plain_folder,folder = finder.save(tmp_path/'plain'),finder.save_pretrained(tmp_path/'timm')
    def size(o): return sum(f.stat().st_size for f in o.glob('*.safetensors'))
    assert abs(size(folder)-size(plain_folder))<1000
    assert [json.loads((o/'embedder.json').read_text())['format'] for o in (plain_folder,folder)]==[2,5]
    assert not (plain_folder/'config.json').exists()
    for o in (plain_folder,folder): alike(load_embedder(o), finder)
    load_embedder(folder, write=True).remove(label='red')
    assert json.loads((folder/'embedder.json').read_text())['format']==5 and load_embedder(folder).labels==['green','blue']
    (folder/'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match="incomplete: there is no 'model.safetensors'"): load_embedder(folder)

# ---- the card ----

def measured(n=12):
    "Scores of an embedding and of the features before it, on `n` classes of four items"
    rng = np.random.RandomState(0)
    labels,means = np.repeat(np.arange(n), 4),rng.randn(n, 8)
    embs,feats = (Embedded(torch.tensor(means[labels]+s*rng.randn(len(labels), 8)).float(), labels) for s in (.5,1.5))
    return embs.evaluate(['recall@1','map@r']),feats.evaluate(['recall@1','map@r'])

def test_the_card_says_what_is_known(finder, tmp_path):
    import yaml
    after,before = measured()
    finder.facts |= dict(train_classes=100, split_hash='ab'*32, loss='ProxyNCALoss()', epochs=3, embedding=8)
    finder.calibration = dict(threshold=.625, fmr=1e-3, interval=[.6,.65], fnmr=.25, fnmr_interval=[.2,.3], classes=40,
        genuine=1200, impostor=50_000, measured_on='colours, val')
    folder = finder.save_pretrained(tmp_path/'colours', result=Gain(after, before), on='colours, test', licence='mit',
        about='Tells *colours* apart.')
    card = (folder/'README.md').read_text()
    _,head,text = card.split('---\n', 2)
    assert yaml.safe_load(head)==dict(library_name='dmlfast', pipeline_tag='image-feature-extraction', license='mit',
        tags=['dmlfast','timm','metric-learning','image-retrieval','image-similarity'])
    assert text.startswith('\n# colours\n\nTells *colours* apart.\n')
    gain = after-before
    low,high = gain.interval('recall@1')
    ends = [f"{o['recall@1']:.3f} ({o.interval('recall@1')[0]:.3f} to {o.interval('recall@1')[1]:.3f})" for o in (after,before)]
    for o in ('On colours, test: 48 queries of 12 classes; in brackets 95 % intervals over classes.',
        f"| recall@1 | {ends[0]} | {ends[1]} | {gain['recall@1']:+.3f} ({low:+.3f} to {high:+.3f}) |",
        r'| trained on | colours \| more |', '| training classes | 100 |', f"| hash of the splits | `{'ab'*32}` |",
        '| loss | `ProxyNCALoss()` |',
        'from a similarity of 0.625 (95 % interval 0.600 to 0.650) on. Of pairs of two classes 0.001 then count '
        'as one, found on 1,200 pairs of one class and 50,000 of two, of 40 classes that it was not trained on '
        '(colours, val). Of pairs of one class 25.0% are missed (95 % interval 20.0% to 30.0%).',
        "finder = load_embedder('colours')\nfinder.search('photo.jpg', k=5)  # the nearest of 3 items of 3 classes",
        'with the ratio of 40×32, resized to that with a bicubic filter',
        "timm.create_model('local-dir:colours', pretrained=True, num_classes=0)", '## Licence\n\nmit'): assert o in text, o
    again = load_embedder(folder)
    assert again.facts['measured']['embedder']['map@r']['value']==after['map@r'] and again.facts['measured']['on']=='colours, test'
    assert (again.save_pretrained(tmp_path/'again', name='colours')/'README.md').read_text().replace('# again', '# colours')==card
    assert 'measured' not in finder.facts # the copy has it

def test_the_card_says_nothing_that_is_not_known(tmp_path):
    e = make()
    e.facts = {}
    card = (e.save_pretrained(tmp_path/'e')/'README.md').read_text()
    for o in ('license:','| ','interval','recall','None','nan'):
        if o!='None': assert o not in card, o
    for o in ('Nothing was measured when this card was written.', '## Training\n\nNothing is known of it.', 'It has none: a search finds',
        'None was stated. Ask whoever published it', "finder.add(['robin.jpg','wren.jpg'], ['robin','wren'])"): assert o in card, o
    assert card.count('None')==1 and 'same(' not in card
    after,_ = measured(4) # too few classes for an interval
    card = (e.save_pretrained(tmp_path/'f', result=after)/'README.md').read_text()
    assert f"| recall@1 | {after['recall@1']:.3f} |" in card and 'interval' not in card and '\n16 queries of 4 classes.' in card
    with pytest.raises(ValueError, match='got a float'): e.save_pretrained(tmp_path/'g', result=.9)
    assert not (tmp_path/'g').exists()
    e.facts = dict(data='<img src=x onerror=alert(1)>', about='a\n---\nlibrary_name: other')
    card = (e.save_pretrained(tmp_path/'h')/'README.md').read_text()
    assert '<img' not in card and card.index('library_name: dmlfast')<card.index('library_name: other')

# ---- as a stranger ----

script = '''
import sys, os
from dmlfast.deploy import load_embedder
finder = load_embedder('hf-hub:user/colours')
print(finder.source)
print([o.label for o in finder.search(sys.argv[1], k=2)])
wrong = [o for o in sys.modules if o.split('.')[0] in ('fastai','fastprogress')]
assert wrong==[], wrong
'''

def test_a_plain_script(finder, hub, tmp_path):
    "`HF_ENDPOINT` is all that tells of the stand-in, and fastai is not imported"
    name = finder.push_to_hub('user/colours', token='writes')
    Image.fromarray(plain(colours['green'])).save(tmp_path/'green.png')
    env = {**os.environ, 'HF_ENDPOINT':hub.url, 'HF_HOME':str(tmp_path/'home'), 'HF_HUB_DISABLE_XET':'1'}
    env.pop('HF_HUB_OFFLINE', None)
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', script, str(tmp_path/'green.png')], env=env, capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    said,labels = res.stdout.splitlines()
    assert said==name and labels==str([o.label for o in finder.search(tmp_path/'green.png', k=2)])
