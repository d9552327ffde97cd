"An embedder's folder that a stranger made: one sentence, or an embedder that embeds; nothing is built that the weights do not fill"
import copy, hashlib, json, pickle, re, shutil, subprocess, sys, time
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from pathlib import Path
from PIL import Image
from safetensors.torch import load_file, save_file
from dmlfast.deploy import ImageEmbedder, Preprocess, load_embedder
from dmlfast.models.bodies import load_weights, timm_body
from dmlfast.models.embedder import Embedder

photo = Image.fromarray(np.random.RandomState(0).randint(0, 255, (24,24,3), dtype=np.uint8))
names = 'embedder.json','gallery.json'

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The folder of a small embedder with a gallery"
    torch.manual_seed(0)
    e = ImageEmbedder(Embedder('test_resnet', 8, pretrained=False), Preprocess([('fit', (32,32), 2)], [.5]*3, [.2]*3),
        dict(data='noise', n=[1,2.5,None]))
    return e.add([photo,photo.rotate(90),photo.rotate(180)], ['a','b','b'],
        ['x/1.png','x/2.png','x/3.png']).save(tmp_path_factory.mktemp('whole')/'e')

@pytest.fixture(scope='module')
def folder(whole, tmp_path_factory):
    "A copy to tamper with"
    return Path(shutil.copytree(whole, tmp_path_factory.mktemp('tampered')/'e'))

def sha(fn): return hashlib.sha256(fn.read_bytes()).hexdigest()

def restore(whole, folder):
    for o in folder.iterdir():
        if not (whole/o.name).exists(): o.unlink()
    for o in whole.iterdir(): shutil.copy(o, folder)

def tamper(whole, folder, change=None, **files):
    "Put `files` in the place of the folder's, with their hashes, and `change` its description"
    restore(whole, folder)
    about = json.loads((whole/'embedder.json').read_text())
    for name,o in files.items():
        fn = folder/name.replace('_', '.')
        if isinstance(o, dict) and fn.suffix=='.safetensors': save_file(o, fn)
        else: fn.write_bytes(o if isinstance(o, bytes) else json.dumps(o).encode())
        about['sha256'][fn.name] = sha(fn)
    if change: about = change(about)
    (folder/'embedder.json').write_text(about if isinstance(about, str) else json.dumps(about))
    return folder

def put(path, o):
    "Function that puts `o` where `path` leads, such as `'model.arch'`"
    def _f(about):
        *parts,last = path.split('.')
        at = about
        for p in parts: at = at[p]
        at[last] = o
        return about
    return _f

# ---- any change of one field ----
def paths(o, at=()):
    "Where every value in a nest of dictionaries and lists is"
    res = [at] if at else []
    for k in (o if isinstance(o, dict) else range(len(o)) if isinstance(o, list) else ()): res += paths(o[k], (*at,k))
    return res

gone,deep = '\0gone','\0deep'
numbers = st.sampled_from([-1, 0, 1, 2, 3, 5, 32, 10**6, 2**31, 2**63, 10**30, 10**400, -10**9, 1e-300, .5, -2.5, 1e308, float('nan'),
    float('inf')])
texts = st.sampled_from(['', '..', '../x', '/etc/passwd', 'C:\\x', 'a/b', '\ud800', 'é', 'x'*5000, '0'*64, 'test_vit',
    'test_resnet.nothing', 'resnet18', 'hf-hub:a/b', 'local-dir:/', 'gem', 'max',
    'mlp', 'identity', 'L', 'crop', 'weights.safetensors', 'gallery.json', 'checkpoint_path', 'img_size', 'in_chans', 'num_classes',
    'features_only', 'block_args']) | st.text(max_size=5)
plain = st.none() | st.booleans() | numbers | texts
values = st.just(gone) | st.just(deep) | plain | st.recursive(plain, lambda o: st.lists(o, max_size=3)
    | st.dictionaries(texts, o, max_size=3), max_leaves=4)

def changed(doc, path, o, key):
    "`doc` with `o` where `path` leads, or under another `key` of the object there"
    doc = copy.deepcopy(doc)
    at = doc
    for k in path[:-1]: at = at[k]
    if key is not None and isinstance(at[path[-1]], dict): at,k = at[path[-1]],key
    else: k = path[-1]
    if o==gone: at.pop(k, None) if isinstance(at, dict) else at.pop(k)
    else: at[k] = o
    return doc

@settings(max_examples=320, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_one_field_is_changed(whole, folder, data):
    "What a field may not be is one sentence that says where; otherwise an image is embedded and found"
    name = data.draw(st.sampled_from(names+names[:1]*3))
    docs = {o:json.loads((whole/o).read_text()) for o in names}
    doc = docs[name]
    path = data.draw(st.sampled_from(paths(doc)))
    text = json.dumps(changed(doc, path, data.draw(values), data.draw(st.none() | texts)))
    text = text.replace(json.dumps(deep), '['*3000+']'*3000)
    (folder/name).write_text(text)
    if name!='embedder.json':
        (folder/'embedder.json').write_text(json.dumps(put('sha256',
            {**docs['embedder.json']['sha256'], name:sha(folder/name)})(docs['embedder.json'])))
    try: e = load_embedder(folder)
    except (ValueError,FileNotFoundError) as err: _is_sentence(err)
    else:
        assert e.embed(photo).isfinite().all() and e.embed(photo).shape==(8,)
        assert len(e.search(photo, k=2))==2
    finally: restore(whole, folder)

def _is_sentence(e):
    assert type(e) in (ValueError,FileNotFoundError) and '\n' not in str(e) and len(str(e))<700, e
    assert "/e'" in str(e)

# ---- what a stranger would try ----
def nested(n): return lambda about: json.dumps(about).replace('"noise"', '['*n+']'*n)

tampered = {
    'a list': (lambda about: [about], r"'embedder.json' in .*must hold an object; got \["),
    'a number': (lambda about: 7, 'must hold an object; got 7'),
    'nested by 20': (nested(20), 'nested more than 16 levels'),
    'nested by 100,000': (nested(100_000), "'embedder.json' in .* cannot be read"),
    'two MiB': (put('facts.data', 'x'*2**21), 'must have at most 1,048,576'),
    'no hashes': (put('sha256', {}), "lacks sha256 of 'weights.safetensors'"),
    'no hash of the gallery': (lambda about: put('sha256', {k:v for k,v in about['sha256'].items() if 'gallery' not in k})(about),
    "lacks sha256 of 'gallery.json'"),
    'hashes in a list': (put('sha256', ['weights.safetensors']), '`sha256` must be an object'),
    'a format in words': (put('format', '1'), "`format` must be a whole number of 1 or more; got '1'"),
    'true as a number': (put('model.emb_sz', True), '`model.emb_sz` must be a whole number from 1 to 65,536; got True'),
    'emb_sz of a billion': (put('model.emb_sz', 10**9), 'from 1 to 65,536; got 1000000000'),
    'emb_sz of 60,000': (put('model.emb_sz', 60_000), "far more parameters than .* in 'weights.safetensors'"),
    'steps of 1e12 pixels': (put('preprocess.steps', [['fit',[10**6,10**6],2]]), r'`preprocess.steps` must be .* of up to 16,384 each and '
    r'16,777,216 pixels'),
    'steps of 2e8 pixels': (put('preprocess.steps', [['fit',[16384,16384],2]]), '16,777,216 pixels'),
    'a step without a size': (put('preprocess.steps', [['fit',32,2]]), '`preprocess.steps` must be'),
    'a filter that Pillow lacks': (put('preprocess.steps', [['fit',[32,32],9]]), 'the number of a PIL filter, 0 to 5'),
    'four means': (put('preprocess.mean', [.5]*4), '`preprocess.mean` must be null, or 1 or 3 numbers from -1,000'),
    'a mean alone': (put('preprocess.std', None), '`preprocess.std` must be given if and only if'),
    'a deviation of 0': (put('preprocess.std', [.2,0,.2]), '`preprocess.std` must be null, or 1 or 3 numbers from 0.000001'),
    'a deviation that float32 lacks': (put('preprocess.std', [1e-300]), 'from 0.000001 to 1,000'),
    'a mean that float64 lacks': (put('preprocess.mean', [10**400]), 'from -1,000 to 1,000'),
    'grey images': (lambda about: put('preprocess.mode', 'L')(put('preprocess.mean', None)(put('preprocess.std', None)(about))),
    '`model` must be .* for images of `preprocess`: .*channels'),
    'another pooling': (put('model.pool', 'sum'),
        r"`model.pool` must be null, 'token', 'token\+avg', 'map', 'avg', 'max', 'avgmax' or 'gem'; got 'sum'"),
    'a hidden argument': (put('model.model_kwargs', dict(cache_dir='/tmp')), "may not set: 'cache_dir'"),
    'an argument of the training': (put('model.frozen_stages', 1), "may not set: 'frozen_stages'"),
    'an argument timm lacks': (put('model.model_kwargs', dict(bogus=1)), "`model` must be a model that timm can build.*bogus"),
    'a number that is none': (put('model.model_kwargs', dict(drop_rate=float('nan'))),
    '`model.model_kwargs` must be .*numbers of up to 16,384'),
    'no arch': (lambda about: put('model', {k:v for k,v in about['model'].items() if k!='arch'})(about),
    'lacks model.arch: it must be the name of a timm model'),
    'another arch': (put('model.arch', 'test_resnet2'), "`model` must be .*no timm model 'test_resnet2'"),
    'an arch of as many numbers': (put('model.arch', 'test_byobnet'), r'do not fit the model that is described there: \d+ missing'),
    'facts in a list': (put('facts', ['noise']), "`facts` must be an object; got \\['noise'\\]")}

@pytest.mark.parametrize('name', tampered)
def test_a_description_that_was_tampered_with(whole, folder, name):
    change,says = tampered[name]
    with pytest.raises(ValueError, match=says) as e: load_embedder(tamper(whole, folder, change))
    _is_sentence(e.value)

def test_tensors_that_were_tampered_with(whole, folder):
    w,g = load_file(whole/'weights.safetensors'),load_file(whole/'gallery.safetensors')['embs']
    j = json.loads((whole/'gallery.json').read_text())
    def spoilt(x, v):
        x = x.clone()
        x.view(-1)[3] = v
        return x
    for says,files in {
        "'weights.safetensors' in .*'head.weight' has nan or infinite": dict(
        weights_safetensors={**w, 'head.weight':spoilt(w['head.weight'], torch.nan)}),
        "'body.bn1.running_var' has nan or infinite": dict(weights_safetensors={**w,
        'body.bn1.running_var':spoilt(w['body.bn1.running_var'], torch.inf)}),
        r'do not fit .*1 misshapen \(head.weight \(9, 96\) for \(8, 96\)\)':
            dict(weights_safetensors={**w, 'head.weight':torch.zeros(9,96)}),
        r'1 missing \(head.weight\)': dict(weights_safetensors={k:v for k,v in w.items() if k!='head.weight'}),
        r'1 unexpected \(more\)': dict(weights_safetensors={**w, 'more':torch.zeros(1)}),
        'head.bias must be of torch.float32': dict(weights_safetensors={**w, 'head.bias':torch.zeros(8, dtype=torch.int64)}),
        "'weights.safetensors' in .* cannot be read: it must be in the format safetensors":
            dict(weights_safetensors=pickle.dumps(w['head.bias'])),
        "'gallery.safetensors' in .*'embs' has nan": dict(gallery_safetensors=dict(embs=spoilt(g, torch.nan))),
        r"'gallery.safetensors' in .*`embs` must be .* of 8 numbers; got \{'embs': \(3, 9\)\}":
            dict(gallery_safetensors=dict(embs=torch.ones(3,9))),
        r"'embs': \(8,\)": dict(gallery_safetensors=dict(embs=torch.ones(8))),
        r"'embs': \(0, 8\)": dict(gallery_safetensors=dict(embs=torch.ones(0,8)), gallery_json=dict(labels=[], items=[])),
        r"of floats in at least one row": dict(gallery_safetensors=dict(embs=torch.ones(3,8).long())),
        r"its only tensor": dict(gallery_safetensors=dict(embs=g, more=torch.ones(10))),
        "'gallery.json' in .*`labels` must be a list of text, one for each of 3 rows": dict(gallery_json={**j, 'labels':['a','b']}),
        "`items` must be a list of text": dict(gallery_json={**j, 'items':[1,2,3]}),
        "`labels` must be a list of text.*got 'abc'": dict(gallery_json={**j, 'labels':'abc'}),
        "`labels` must be .*got None": dict(gallery_json=dict(items=j['items'])),
        "`labels` must be .*got \\[1, 2\\]": dict(gallery_json=[1,2]),
        "'gallery.json' in .* cannot be read: it must be JSON": dict(gallery_json=b'[' * 100_000)}.items():
        with pytest.raises(ValueError, match=says) as e: load_embedder(tamper(whole, folder, **files))
        _is_sentence(e.value)
    half = load_embedder(tamper(whole, folder, weights_safetensors={k:v.half() if v.is_floating_point() else v for k,v in w.items()}))
    assert torch.allclose(half.embed(photo), load_embedder(whole).embed(photo), atol=1e-2)

def test_a_file_that_is_not_there(whole, folder):
    for name in ('weights.safetensors','gallery.safetensors','gallery.json'):
        tamper(whole, folder)
        (folder/name).unlink()
        with pytest.raises(FileNotFoundError, match=f'incomplete: there is no {name!r}'): load_embedder(folder)
    for o in (folder/'nowhere', whole/'embedder.json'):
        with pytest.raises(FileNotFoundError, match="no 'embedder.json'"): load_embedder(o)

script = '''
import resource, sys, time, torch
from dmlfast.deploy import load_embedder
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform=='darwin' else 2**10)
load_embedder(sys.argv[1])
for folder in sys.argv[2:]:
    before,start = peak(),time.process_time()
    try: load_embedder(folder)
    except ValueError as e: print(f'{time.process_time()-start:.2f} {peak()-before:.0f} {e}')
'''

def test_what_costs_too_much_is_refused_before_it_costs(whole, tmp_path):
    "In a process of its own, whose memory is measured: within two seconds and 500 MiB"
    changes = [put('model.arch', 'vit_giant_patch14_dinov2'), put('model.arch', 'vit_huge_patch14_clip_224'),
        put('model.arch', 'convnext_xxlarge'), put('model.emb_sz', 10**9), put('model.emb_sz', 65_536),
        put('preprocess.steps', [['squash',[10**6,10**6],2]]), put('model.model_kwargs', dict(layers=[16384]*4)),
        put('model.model_kwargs', dict(stem_width=16384)), put('model.model_kwargs', dict(layers=[10**9]*4)),
        put('model', dict(arch='test_vit', emb_sz=8, normalize=True, pool=None, head='linear', model_kwargs=dict(img_size=16384)))]
    todo = [tamper(whole, Path(shutil.copytree(whole, tmp_path/f'{i}'/'e')), o) for i,o in enumerate(changes)]
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', script, str(whole), *map(str, todo)], capture_output=True, text=True,
        check=True).stdout.splitlines()
    assert len(res)==len(todo), res
    for o in res: assert float(o.split()[0])<2 and float(o.split()[1])<500, o

def test_nothing_is_written_that_could_not_be_read(tmp_path):
    torch.manual_seed(0)
    def make(steps=(('fit', (32,32), 2),), facts=None, **kwargs):
        return ImageEmbedder(Embedder('test_resnet', 8, pretrained=False, **kwargs), Preprocess(steps), facts)
    for says,e in {
        "'preprocess.steps|`preprocess.steps` must be": make([('fit', (10**6,10**6), 2)]),
        'fails on the images of its preprocessing': make(in_chans=1),
        'cannot be written as JSON': make(facts=dict(when={1,2})),
        'keep fewer': make(facts=dict(text='x'*2**20)),
        'nested more than': make(facts=dict(text=json.loads('['*30+']'*30))),
        'The gallery has embeddings of 3 numbers, and the model makes 8': make().add_embs(torch.ones(1,3), ['a'], [''])}.items():
        with pytest.raises(ValueError, match=says): e.save(tmp_path/'e')
    e = make()
    e.model.head.bias.data[2] = torch.nan
    with pytest.raises(ValueError, match="The model cannot be written: 'head.bias' has nan"): e.save(tmp_path/'e')
    assert not list(tmp_path.iterdir())
    load_embedder(make(in_chans=4).save(tmp_path/'e')) # takes batches of tensors

@pytest.mark.parametrize('arch,kwargs,pre', [('test_vit', dict(img_size=32), Preprocess([('squash', (32,32), 2)])),
    ('test_resnet', dict(in_chans=1), Preprocess(mode='L')), ('test_resnet', {}, Preprocess(mean=[.5]*3, std=[.2]*3, mode='L')),
    ('bn_inception', {}, Preprocess([('fit', (64,48), 2)]))])
def test_what_was_written_is_read(arch, kwargs, pre, tmp_path):
    import dmlfast.models.bninception
    torch.manual_seed(0)
    e = ImageEmbedder(Embedder(arch, pretrained=False, head='identity', pool='gem', **kwargs), pre)
    again = load_embedder(e.save(tmp_path/'e'))
    im = photo.resize((32,32))
    assert torch.equal(again.embed(im), e.embed(im)) and again.model.state_dict().keys()==e.model.state_dict().keys()

def test_other_modules_may_be_made_meanwhile(whole, monkeypatch):
    "The bound on parameters holds for the thread that reads, and no longer than it reads"
    import threading
    import dmlfast.deploy.folder as deploy
    probe,made = deploy._probe,[]
    def _make(): made.append(torch.nn.Linear(4000,4000))
    def _slow(*args):
        t = threading.Thread(target=_make)
        t.start()
        t.join()
        return probe(*args)
    monkeypatch.setattr(deploy, '_probe', _slow)
    load_embedder(whole)
    _make()
    assert len(made)==3

def test_an_older_timm(whole, monkeypatch):
    "What cannot be built without memory is built within the same bounds"
    import dmlfast.deploy.folder as deploy
    build,devices = deploy._build,[]
    def _old(about, header, device):
        devices.append(device)
        if device=='meta': raise NotImplementedError('Cannot copy out of meta tensor')
        return build(about, header, device)
    monkeypatch.setattr(deploy, '_build', _old)
    assert load_embedder(whole).embed(photo).shape==(8,) and devices==['meta','cpu']

# ---- weights of a body ----
def test_weights_that_are_none(tmp_path):
    body = timm_body('test_resnet', pretrained=False)
    jpeg = tmp_path/'photo.jpg'
    photo.save(jpeg)
    torch.save(body, tmp_path/'module.pth')
    torch.save([torch.ones(2)], tmp_path/'list.pth')
    torch.save(dict(state_dict=7), tmp_path/'seven.pth')
    torch.save(dict(net=body.state_dict(), epoch=3), tmp_path/'other.pth')
    torch.save({1:torch.ones(2)}, tmp_path/'keys.pth')
    save_file(body.state_dict(), tmp_path/'cut.safetensors')
    (tmp_path/'cut.safetensors').write_bytes((tmp_path/'cut.safetensors').read_bytes()[:-50])
    torch.save(body.state_dict(), tmp_path/'cut.pth')
    (tmp_path/'cut.pth').write_bytes((tmp_path/'cut.pth').read_bytes()[:5000])
    for name,o in {'raw.pkl':pickle.dumps(dict(a=[1])), 'np.pth':pickle.dumps(np.ones(3)), 'words.pth':b'no weights\n',
        'words.safetensors':b'no weights\n', 'empty.pth':b'', 'empty.safetensors':b'', 'photo.safetensors':jpeg.read_bytes(),
        'zeros.pth':bytes(500)}.items():
        (tmp_path/name).write_bytes(o)
    files = sorted(tmp_path.iterdir())
    for fn in files:
        with pytest.raises(ValueError, match=re.escape(f"{str(fn)!r} is no file of weights: it must ")) as e: load_weights(body, fn)
        assert '\n' not in str(e.value) and not re.search('weights_only|[Pp]ickle[^r]|trust|arbitrary|Error',
            str(e.value).replace(str(fn), '')), e.value
        assert e.value.__suppress_context__ or e.value.__context__ is None # nor in what Python prints above it
    assert len(files)==16
    with pytest.raises(ValueError, match='There is no file of weights'): load_weights(body, tmp_path)


# ---- names and files ----
@pytest.mark.parametrize('name,names,near', [('nope',['inshop','cub200','glyphs'],None),
    ('data.val_pct',['data.path','data.images','data.reader'],None), ('data.test_pc',['data.path','data.test_pct'],'data.test_pct'),
    ('loss.gama',['loss.gamma','ssr.gamma'],'loss.gamma'), ('glyph',['inshop','glyphs'],'glyphs'), ('cars',['cub200','cars196'],'cars196'),
    ('gamma',['loss.gamma','fit.lr'],'loss.gamma'), ('Margn',['margin','gamma'],'margin')])
def test_the_nearest_name_is_near(name, names, near):
    from dmlfast.files.registry import nearest
    assert nearest(name, names, 'word')==f"There is no word {name!r}; " + (f"the nearest is {near!r}." if near
        else f"there are {', '.join(map(repr, names))}.")

def test_a_long_name_leaves_room_for_the_reason():
    from dmlfast.files.registry import nearest, shortened
    assert nearest('nope', ['margin'], 'word', 'ask a book')=="There is no word 'nope'; ask a book."
    assert nearest('margn', ['margin'], 'word', 'ask a book')=="There is no word 'margn'; the nearest is 'margin'."
    assert nearest('x'*300, ['margin'], 'word')==f"There is no word '{'x'*49}…{'x'*19}'; there are 'margin'."
    assert shortened('a'*78)==repr('a'*78)

def test_a_full_disk_is_said_of_a_file(tmp_path):
    "Whoever writes, and whatever its error: a full disk names the file, and what was there stays"
    import errno
    from safetensors import SafetensorError
    from dmlfast.files.writing import whole_file
    file = tmp_path/'w.bin'
    file.write_bytes(b'old')
    for e in (OSError(errno.ENOSPC, 'No space left on device'), SafetensorError('Error while serializing: I/O error: No space left on '
        'device (os error 28)')):
        with pytest.raises(OSError, match=re.escape(f"No space left on device: {str(file)!r}")) as got:
            with whole_file(file) as tmp:
                tmp.write_bytes(b'n')
                raise e
        assert got.value.errno==errno.ENOSPC and file.read_bytes()==b'old' and [o.name for o in tmp_path.iterdir()]==['w.bin']
    with pytest.raises(KeyError):
        with whole_file(file): raise KeyError('mine')
    with pytest.raises(FileNotFoundError, match=re.escape(repr(str(tmp_path/'no'/'w.bin')))):
        with whole_file(tmp_path/'no'/'w.bin') as tmp: tmp.write_bytes(b'n')
