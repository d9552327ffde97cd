"Embedders that leave the training behind: the same numbers without fastai, and folders that are not as they were written"
import json, os, pickle, re, subprocess, sys
import numpy as np, pytest, torch
from datetime import date
from PIL import Image
from safetensors import SafetensorError
from fastai.vision.all import *
from dmlfast.all import *
from dmlfast.deploy.embedder import Preprocess
from dmlfast.train.export import preprocess_of, split_hash

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Coloured noise of several sizes, two classes, and one file each that is grey, with alpha, and tiny"
    path = tmp_path_factory.mktemp('photos')
    rng = np.random.RandomState(0)
    for i,(w,h) in enumerate([(60,40),(41,67),(50,50),(33,90),(64,48),(47,47),(20,14),(90,31)]):
        small = Image.fromarray(rng.randint(0, 255, (7,5,3), dtype=np.uint8)).resize((w,h), Image.BICUBIC)
        if i==2: small = small.convert('L')
        if i==3: small = small.convert('RGBA')
        (path/'ab'[i%2]).mkdir(exist_ok=True)
        small.save(path/'ab'[i%2]/f'{i}.png')
        (path/'cd'[i%2]).mkdir(exist_ok=True)
        small.rotate(90).save(path/'cd'[i%2]/f'{i}.png')
    return path

def loaders(path, item_tfms, batch_tfms=None, block=ImageBlock):
    dblock = DataBlock(blocks=(block, ClassBlock), get_items=get_image_files, get_y=parent_label, splitter=ClassSplitter(parent_label),
                       item_tfms=item_tfms, batch_tfms=batch_tfms)
    return dblock.dataloaders(path, bs=4, dl_type=BalancedDL, per_class=2, num_workers=0)

pipelines = dict(
    default=lambda p: MetricDataset.from_folder(p).dataloaders(bs=4, per_class=2, size=32, num_workers=0, valid='test'),
    contract=lambda p: loaders(p, RandomResizedCrop(32), aug_transforms()),
    squish=lambda p: loaders(p, Resize((32,48), ResizeMethod.Squish)),
    crop=lambda p: loaders(p, [Resize(40), CropPad(32, order=2), FlipItem()]),
    pad=lambda p: loaders(p, CropPad((64,48))),
    grey=lambda p: loaders(p, Resize(32), block=ImageBlock(PILImageBW)))

script = '''
import json, sys
from dmlfast.deploy import load_embedder
import torch
todo = json.load(open(sys.argv[1]))
res = {k: load_embedder(folder).embed(files).tolist() for k,(folder,files) in todo.items()}
ours = 'dmlfast.losses.base','dmlfast.train.learner','dmlfast.data.batches','dmlfast.all'
wrong = [o for o in sys.modules if o.split('.')[0] in ('fastai','fastprogress') or o in ours]
json.dump(dict(res=res, wrong=wrong), open(sys.argv[2], 'w'))
'''

def test_the_same_embeddings_in_a_process_without_fastai(photos, tmp_path):
    todo,want = {},{}
    for name,make in pipelines.items():
        set_seed(0)
        dls = make(photos)
        arch,kwargs = ('test_vit',dict(img_size=32)) if name=='crop' else ('test_resnet',dict(in_chans=1) if name=='grey' else {})
        learn = metric_learner(dls, arch, ProxyNCALoss(), emb_sz=8, pretrained=False, model_kwargs=kwargs, path=tmp_path,
            head='mlp' if name=='squish' else 'linear', pool='gem' if name=='pad' else None)
        for o in learn.model.modules(): # as a training would leave it, in less time
            if isinstance(o, nn.BatchNorm2d): o.momentum = None
        with torch.no_grad(): learn.model.train()(dls.train.one_batch()[0].cpu())
        learn.export_embedder(tmp_path/name)
        want[name] = learn.embed(bar=False)[0]
        assert len(want[name].unique(dim=0))>2
        todo[name] = str(tmp_path/name),[str(o) for o in dls.valid.items]
    (tmp_path/'in.json').write_text(json.dumps(todo))
    subprocess.run([sys.executable, '-W', 'ignore', '-c', script, str(tmp_path/'in.json'), str(tmp_path/'out.json')], check=True)
    out = json.loads((tmp_path/'out.json').read_text())
    assert out['wrong']==[]
    for name,o in out['res'].items(): assert torch.allclose(torch.tensor(o), want[name], atol=1e-5), name

@pytest.mark.parametrize('tfm,batch,name', [(RandomCrop(32), None, 'RandomCrop'), (Resize(32, ResizeMethod.Pad), None, 'Resize'),
    ([Resize(32), CropPad(40, pad_mode='reflection')], None, 'CropPad'),
    (Resize(32), RandomErasing(), None), (Resize(32), aug_transforms(size=24), 'Flip'), ([Resize(32), lambda o: o], None, '')])
def test_other_transforms_are_refused_by_name(photos, tfm, batch, name):
    dls = loaders(photos, tfm, batch)
    if name is None:
        assert preprocess_of(dls).steps
        return
    with pytest.raises(ValueError, match=f'{name}.*cannot be exported'): preprocess_of(dls)

@pytest.mark.parametrize('tfm,batch,size', [(Resize(32), aug_transforms(), 32), (Resize(32), aug_transforms(size=32), 32),
    (Resize((24,32)), aug_transforms(size=(24,32)), (24,32)), (Resize(32), aug_transforms(size=32, min_scale=.5), 32),
    (Resize(32), aug_transforms(size=24), None), (Resize((24,32)), aug_transforms(size=(32,24)), None),
    (Resize(32), RandomResizedCropGPU(24), None), (Resize(32), RandomResizedCropGPU(32, valid_scale=.5), None),
    (Resize((16,64)), RandomResizedCropGPU((16,64)), None)])
def test_what_becomes_of_a_batch_is_exported_or_refused_whatever_came_before(photos, tmp_path, tfm, batch, size):
    "fastai's affine transforms note in `split_idx` what the last batch was, and resize in another way than single images are"
    dls = loaders(photos, tfm, batch)
    dls.valid.drop_last = False
    learn = metric_learner(dls, 'test_resnet', emb_sz=8, pretrained=False, path=tmp_path)
    w = '×'.join(map(str, reversed(size) if isinstance(size, tuple) else [size]*2))
    for before in (noop, lambda: learn.dls.train.one_batch(), lambda: learn.dls.valid.one_batch()):
        before()
        if size is None:
            with pytest.raises(ValueError, match=r'cannot be exported.*pixels.*such as `Resize\('): learn.export_embedder(tmp_path/'e')
            continue
        e = learn.export_embedder(tmp_path/'e', overwrite=True)
        want,_ = learn.embed(bar=False)
        assert torch.allclose(e.embed([str(o) for o in dls.valid.items]), want, atol=1e-5)
        assert learn.about_training()['size']==w

def test_a_gallery_of_several_splits(few, make_learner, tmp_path):
    learn = make_learner()
    n = few.df.split.value_counts()
    assert len(learn.export_embedder(tmp_path/'a', gallery='all'))==len(few.df)
    e = learn.export_embedder(tmp_path/'b', gallery=['val','test'])
    assert len(e)==n['val']+n['test'] and {*e.items}=={*few.df.path[few.df.split!='train']}
    for bad in ('tests',['val','tests']):
        with pytest.raises(ValueError, match="no split 'tests'; its splits are"): learn.export_embedder(tmp_path/'c', gallery=bad)

def test_a_body_takes_arguments_as_a_learner_does(tmp_path):
    "TensorFlow's padding makes other features than PyTorch's"
    set_seed(0)
    kwargs = dict(pad_type='same')
    e = ImageEmbedder.from_body('mobilenetv3_small_050', 64, pretrained=False, model_kwargs=kwargs)
    torch.save(e.model.body.state_dict(), tmp_path/'w.pth')
    x = torch.rand(2, 3, 64, 64)
    def make(**kw): return ImageEmbedder.from_body('mobilenetv3_small_050', 64, weights=tmp_path/'w.pth', **kw).embed(x)
    assert torch.equal(make(model_kwargs=kwargs), make(pad_type='same'))
    assert not torch.allclose(make(model_kwargs=kwargs), make())
    for kw in (dict(model_kwargs=dict(pad_typ='same')), dict(pad_typ='same')):
        with pytest.raises(ValueError, match="timm cannot make 'mobilenetv3_small_050' with {'pad_typ': 'same'}"): make(**kw)

def test_items_that_are_there_already_are_said(embedder, photos):
    files = get_image_files(photos/'a').sorted()
    e = ImageEmbedder(embedder.model, embedder.preprocess).add(files[:2], 'a')
    with pytest.warns(UserWarning, match='^2 of these 3 items have names that are in the gallery already.*`replace`'): e.add(files[:3], 'a')
    assert len(e)==5
    x = torch.rand(2, 3, 32, 32)
    e.add(x, 'b').add(x, 'b') # without names
    with pytest.raises(ValueError, match='do not go together'): e.add(files[:2], ['x']) # and no warning

@pytest.fixture(scope='module')
def embedder():
    torch.manual_seed(0)
    return ImageEmbedder(Embedder('test_resnet', 8, pretrained=False), Preprocess([('fit', (32,32), 2)], [.5]*3, [.2]*3),
        dict(data='noise'))

def test_what_an_image_may_be(embedder, photos, tmp_path):
    fn = photos/'a'/'0.png'
    im = Image.open(fn)
    want = embedder.embed(fn)
    assert want.shape==(8,)
    for o in (str(fn), im, np.array(im), embedder.preprocess(im)): assert torch.equal(embedder.embed(o), want)
    for o in ([fn,im], np.array([im,im]), np.array([str(fn)]*2), np.array([fn,str(fn)]), torch.stack([embedder.preprocess(fn)]*2)):
        assert torch.allclose(embedder.embed(o), want.expand(2, -1), atol=1e-6)
    assert torch.allclose(embedder.embed([fn]*5, bs=2), want.expand(5, -1), atol=1e-6)
    data,x = fn.read_bytes(),embedder.preprocess(im)
    for o in (bytearray(data), memoryview(data), x.double()): assert torch.equal(embedder.embed(o), want)
    for o in (x.half(), x.bfloat16(), torch.stack([x.half()]*2), [x.half(),fn]): assert torch.allclose(embedder.embed(o), want, atol=.02)
    with pytest.raises(ValueError, match=r'they have one size, and not \(3, 8, 8\) and \(3, 9, 8\)'):
        embedder.embed([torch.zeros(3,8,8),torch.zeros(3,9,8)])
    for a,b in (([fn],fn),(fn,[fn])):
        with pytest.raises(ValueError, match='`same` compares two images'): embedder.same(a, b, min_score=.5)
    for bs in (0,-1,1.5,'2'):
        with pytest.raises(ValueError, match='`bs` is a number of images, 1 or more'): embedder.embed([fn], bs=bs)
    for bad,says in (({'a':fn}, 'got a dict'), ({fn}, 'got a set'), (None, 'got a NoneType'), (np.zeros((4,4,2)), r'got \(4, 4, 2\)'),
        (torch.zeros(1,3,4,4).int(), 'got int32'), (np.full((4,4), 2.), r'values in \[0,1\]; got 2 to 2'), ([3], 'got a int'),
        ([], 'no images'), (3, 'got a int'), ('nowhere.jpg', "There is no image 'nowhere.jpg'")):
        with pytest.raises(ValueError, match=says): embedder.embed(bad)
    cut = tmp_path/'cut.jpg'
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64,64,3), dtype=np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:-900])
    with pytest.raises(ValueError, match=r"cut.jpg' cannot be read: .*truncated"): embedder.embed(cut)

def test_gallery(embedder, photos, tmp_path):
    e = ImageEmbedder(embedder.model, embedder.preprocess)
    with pytest.raises(ValueError, match='gallery is empty'): e.search(photos/'a'/'0.png')
    files = sorted(photos.glob('a/*.png'))
    e.add(files, 'a').add(photos/'b'/'1.png', 'b')
    assert len(e)==5 and e.items[0]==str(files[0])
    hits = e.search(files[1], k=99)
    assert len(hits)==5 and hits[0].item==str(files[1]) and hits[0].score==pytest.approx(1, abs=1e-5)
    f = e.embed(files+[photos/'b'/'1.png'])
    assert [o.score for o in hits]==pytest.approx((f@f[1]).sort(descending=True)[0].tolist(), abs=1e-5)
    assert [o[0].item for o in e.search(files[:2], k=1)]==[str(o) for o in files[:2]]
    with pytest.raises(ValueError, match='2 images, 1 labels and 2 names'): e.add(files[:2], ['x'])
    with pytest.raises(ValueError, match='2 images, 2 labels and 1 names'): e.add(files[:2], 'x', items='ab')
    assert len(e)==5 and all(o.score<=1 for f in files for o in e.search(f))
    for o in ('tabby',['tabby'],Path('tabby')):
        assert ImageEmbedder(embedder.model, embedder.preprocess).add(files[0], 'cat', items=o).items==['tabby']
    with pytest.raises(ValueError, match='embeddings of 8 numbers, and not of 3'): e.add_embs(torch.zeros(1,3), ['x'], [''])
    assert ImageEmbedder(embedder.model, embedder.preprocess).add(L(files[:2]), L('x','y')).labels==['x','y']
    assert ImageEmbedder(embedder.model, embedder.preprocess).add(files[:2], np.int64(7)).labels==['7','7']
    assert ImageEmbedder(embedder.model, embedder.preprocess).add(files[:2], (o for o in 'xy')).labels==['x','y']
    less = ImageEmbedder(embedder.model, embedder.preprocess).add(files[:2], 'x').add_embs(np.ones((1,8)), [3], ['y'])
    assert less.embs[2].tolist()==[1]*8 and less.remove(item=files[0]).items==[str(files[1]),'y']
    for k in (0,-1,2.5,'2'):
        with pytest.raises(ValueError, match='`k` is a number of items, 1 or more'): e.search(files[0], k=k)
        with pytest.raises(ValueError, match='`k` is a number of neighbours, 1 or more'): e.classify(files[0], k=k)
    for o in (torch.tensor([7,7]), list(torch.tensor([7,7])), np.array([7,7]), torch.tensor(7)):
        assert ImageEmbedder(embedder.model, embedder.preprocess).add(files[:2], o).labels==['7','7']
    less = ImageEmbedder(embedder.model, embedder.preprocess).add(files, ['x']*len(files))
    less.search(files[0])
    less.embs,less.labels,less.items = less.embs[1:],less.labels[1:],less.items[1:]
    assert less.search(files[1], k=1)[0].item==str(files[1])
    again = load_embedder(e.save(tmp_path/'e'))
    assert again.search(files[1])==e.search(files[1]) and repr(again)==repr(e)
    with pytest.raises(FileExistsError, match='overwrite=True'): e.save(tmp_path/'e')
    assert len(load_embedder(ImageEmbedder(embedder.model, embedder.preprocess).save(tmp_path/'e', overwrite=True)))==0
    assert [o.name for o in tmp_path.iterdir()]==['e']

def test_a_folder_that_cannot_be_replaced_is_kept(embedder, tmp_path, monkeypatch):
    "As where another process holds the place, and the system cannot exchange folders: the old one is put back"
    monkeypatch.setattr('dmlfast.files.writing._exchange', lambda a, b: False)
    e = embedder
    folder,rename = e.save(tmp_path/'v1.2'),Path.rename
    old = sorted((o.name,o.read_bytes()) for o in folder.iterdir())
    def busy(self, to):
        if self.name.startswith('.v1.2-') and not self.name.endswith('.old'): raise PermissionError('in use')
        return rename(self, to)
    monkeypatch.setattr(Path, 'rename', busy)
    with pytest.raises(PermissionError): ImageEmbedder(e.model, e.preprocess, dict(new=1)).save(folder, overwrite=True)
    assert sorted((o.name,o.read_bytes()) for o in folder.iterdir())==old and [o.name for o in tmp_path.iterdir()]==['v1.2']

def test_nothing_else_is_overwritten(embedder, tmp_path, monkeypatch):
    mine = tmp_path/'mine'
    mine.mkdir()
    (mine/'thesis.txt').write_text('all of it')
    for o in (mine, mine/'thesis.txt'):
        with pytest.raises(FileExistsError, match='is not overwritten'): embedder.save(o, overwrite=True)
    monkeypatch.chdir(mine)
    with pytest.raises(FileExistsError, match='is not overwritten'): embedder.save('.', overwrite=True)
    with pytest.raises(ValueError, match="cannot be made: .*thesis.txt' is a file"): embedder.save(mine/'thesis.txt'/'e')
    assert (mine/'thesis.txt').read_text()=='all of it' and [o.name for o in tmp_path.iterdir()]==['mine']
    folder = embedder.save(tmp_path/'e')
    assert {oct(o.stat().st_mode)[-3:] for o in folder.iterdir()}=={'644'}

def test_what_cannot_be_written(embedder, photos, tmp_path):
    with pytest.raises(ValueError, match='a Linear with a Preprocess'):
        ImageEmbedder(torch.nn.Linear(2,2), embedder.preprocess).save(tmp_path/'x')
    with pytest.raises(ValueError, match="head.*no name"):
        ImageEmbedder(Embedder('test_resnet', 8, pretrained=False, head=lambda a,b: torch.nn.Linear(a,b)),
            embedder.preprocess).save(tmp_path/'x')
    with pytest.raises(ValueError, match='"?fit, squash, crop; got \'zoom\''): Preprocess([('zoom', (2,2), 2)])
    model = Embedder('test_resnet', 8, pretrained=False, act_layer=torch.nn.SiLU)
    with pytest.raises(ValueError, match="may not set: 'act_layer'"): ImageEmbedder(model, embedder.preprocess).save(tmp_path/'x')
    assert not list(tmp_path.iterdir())
    dls = loaders(photos, Resize(32))
    learn = metric_learner(dls, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3*32*32, 4)), TripletLoss(), path=tmp_path)
    with pytest.raises(ValueError, match='this one was given as it is'): learn.export_embedder(tmp_path/'x')

def test_what_could_not_be_read_is_not_written(embedder, tmp_path):
    "Nothing new is left, and what was there stays"
    model = deepcopy(embedder.model)
    model.body.register_buffer('more', torch.zeros(1))
    e,old = ImageEmbedder(model, embedder.preprocess),embedder.save(tmp_path/'old')
    was = sorted((o.name,o.read_bytes()) for o in old.iterdir())
    for folder in (tmp_path/'new', tmp_path/'a'/'b', old):
        with pytest.raises(ValueError,
            match=f"could not be read again: The weights in {str(folder)!r} do not fit .*1 unexpected .body.more"):
            e.save(folder, overwrite=True)
    assert [o.name for o in tmp_path.iterdir()]==['old'] and sorted((o.name,o.read_bytes()) for o in old.iterdir())==was

def test_a_full_disk_is_said(embedder, tmp_path, monkeypatch):
    "With the name of the folder, and nothing of it is left"
    def full(*args): raise SafetensorError('Error while serializing: I/O error: File too large (os error 27)')
    monkeypatch.setattr('dmlfast.deploy.folder.save_file', full)
    with pytest.raises(OSError, match=f"cannot be written to '{tmp_path/'a'/'e'}': Error while serializing"):
        embedder.save(tmp_path/'a'/'e')
    assert not list(tmp_path.iterdir())

def test_compiled_parts(photos, tmp_path):
    "A compiled model, or a part of one, has the names of weights that it has otherwise, and is exported like any other"
    dls = loaders(photos, Resize(32))
    learn = metric_learner(dls, 'test_resnet', ProxyNCALoss(), emb_sz=8, pretrained=False, path=tmp_path)
    names,want,file = [*learn.model.state_dict()],learn.embed(bar=False)[0],photos/'a'/'0.png'
    learn.save('plain')
    for part in ('body','head'): setattr(learn.model, part, torch.compile(getattr(learn.model, part), backend='eager'))
    assert sorted(learn.model.state_dict())==sorted(names) and len(stage_splitter(learn.model))>2
    res = learn.export_embedder(tmp_path/'e', gallery=dls.test_dl([*dls.valid.items], with_labels=True))
    assert torch.allclose(res.embs, want, atol=1e-6)
    learn.save('compiled')
    with torch.no_grad(): learn.model.head.weight.zero_()
    for o in ('plain','compiled'): assert torch.allclose(learn.load(o).embed(bar=False)[0], want, atol=1e-6)
    plain = metric_learner(dls, 'test_resnet', ProxyNCALoss(), emb_sz=8, pretrained=False, path=tmp_path).load('compiled')
    assert torch.allclose(plain.embed(bar=False)[0], want, atol=1e-6)
    # as they were written before
    plain.model.load_state_dict({k.replace('body.', 'body._orig_mod.'):v for k,v in plain.model.state_dict().items()})
    whole = ImageEmbedder(torch.compile(res.model, backend='eager'), res.preprocess)
    assert torch.allclose(load_embedder(whole.save(tmp_path/'whole')).embed(file), res.embed(file), atol=1e-6)

def test_a_wrapper_that_is_not_known(make_learner):
    class Wrapper(nn.Module):
        def __init__(self, module): super().__init__(); self.module = module
        def forward(self, x): return self.module(x)
    learn = make_learner()
    learn.model = Wrapper(learn.model)
    with pytest.raises(ValueError, match='A Wrapper has no `body`'): learn.fit(1)

class Bomb:
    def __reduce__(self): return os.system, ('touch exploded',)

def test_where_weights_came_from_is_not_part_of_an_embedder(embedder, tmp_path):
    model = Embedder('test_resnet', 8, pretrained=False, cache_dir=str(tmp_path/'cache'), pretrained_cfg_overlay=dict(file='w.pth'),
        block_args=dict(attn_layer='eca'))
    again = load_embedder(ImageEmbedder(model, embedder.preprocess).save(tmp_path/'e'))
    assert again.model.spec()['model_kwargs']==dict(block_args=dict(attn_layer='eca'))
    assert again.model.state_dict().keys()==model.state_dict().keys()

def test_folders_that_are_not_as_they_were_written(embedder, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    e = ImageEmbedder(embedder.model, embedder.preprocess).add(photos/'a'/'0.png', 'a')
    def broken(change, says, exc=ValueError):
        change(e.save(tmp_path/'f', overwrite=True))
        with pytest.raises(exc, match=says): load_embedder(tmp_path/'f')
    def edit(**kw): 
        def _f(p):
            about = json.loads((p/'embedder.json').read_text())
            for k,v in kw.items(): about[k] = {**about[k], **v} if isinstance(v, dict) else v
            (p/'embedder.json').write_text(json.dumps({k:v for k,v in about.items() if v!='gone'}))
        return _f
    def cut(name, n=100): return lambda p: (p/name).write_bytes((p/name).read_bytes()[:-n])
    def swap(p):
        (p/'weights.safetensors').write_bytes(pickle.dumps(Bomb()))
        import hashlib
        edit(sha256={'weights.safetensors':hashlib.sha256((p/'weights.safetensors').read_bytes()).hexdigest()})(p)
    with pytest.raises(FileNotFoundError, match="no 'embedder.json'"): load_embedder(tmp_path)
    broken(cut('embedder.json'), "'embedder.json' in .* cannot be read")
    broken(lambda p: (p/'embedder.json').write_text('[]'), 'does not describe an embedder')
    broken(edit(format=6), r"newer version of the library \(format 6; this one reads up to 5\)")
    broken(edit(model='gone'), 'lacks model')
    broken(cut('weights.safetensors'), "'weights.safetensors' in .* was changed or cut off")
    broken(cut('gallery.json', 3), "'gallery.json' in .* was changed or cut off")
    broken(lambda p: (p/'weights.safetensors').unlink(), "incomplete: there is no 'weights.safetensors'", FileNotFoundError)
    broken(edit(model=dict(emb_sz=9)), 'do not fit the model that is described there')
    broken(edit(model=dict(arch='resnet999')), "no timm model 'resnet999'")
    broken(edit(model=dict(model_kwargs=dict(checkpoint_path='bomb.pth'))), "may not set: 'checkpoint_path'")
    broken(edit(model=dict(weights='bomb.pth')), "may not set: 'weights'")
    broken(edit(sha256={'../x':'0'*64}), '`sha256` must be .*in no other folder')
    broken(swap, "'weights.safetensors' in .* cannot be read: it must be in the format safetensors")
    assert not (tmp_path/'exploded').exists()

def test_names_in_a_gallery_begin_below_the_data(few, make_learner, tmp_path):
    "However the loaders were made: that the folder is given as `path` is no matter"
    block = DataBlock(blocks=(ImageBlock, ClassBlock), get_y=parent_label, splitter=ClassSplitter(parent_label))
    learn,names = make_learner(),[]
    for i,dls in enumerate((few.dataloaders(bs=8, num_workers=0), block.dataloaders(few.items(), bs=8, num_workers=0),
        block.dataloaders(few.items(), bs=8, num_workers=0, path=few.path))):
        learn = metric_learner(dls, learn.model.arch, emb_sz=4, pretrained=False)
        files = learn.dls.train.items
        got = learn.export_embedder(tmp_path/str(i), gallery=dls.test_dl(files, with_labels=True)).items
        assert got==[str(o.relative_to(few.path)) for o in files]

# ---- measuring ----
def test_images_are_embedded_with_their_labels_and_names(embedder, photos):
    "In order, whatever the threads and the batches; the rows are those of `embed`"
    files = sorted(photos.rglob('*.png'))
    labels,want = [o.parent.name for o in files],embedder.embed(files)
    for kwargs in (dict(num_workers=0), dict(num_workers=3, bs=2), dict(num_workers=2, bs=len(files)), dict(bs=5)):
        emb = embedder.embedded(files, labels=labels, **kwargs)
        assert torch.allclose(emb.embs, want, atol=1e-6) and emb.items==[str(o) for o in files] and emb.vocab==['a','b','c','d']
        assert [emb.label(i) for i in range(len(emb))]==labels
    assert emb.evaluate(['map@r'])['map@r']==evaluate_retrieval(want, [ord(o) for o in labels], metrics=['map@r'])['map@r']
    assert np.array_equal(np.asarray(emb.draw(3)), np.asarray(Image.open(files[3]).convert('RGB')))
    assert emb.facts==dict(data='noise', network='test_resnet', preprocess='Preprocess(fit 32×32)', measured_on=None)
    assert embedder.embedded(files[:2], labels=torch.tensor([7,3])).vocab==['3','7']
    # what the network takes cannot be drawn
    assert embedder.embedded(torch.stack([embedder.preprocess(o) for o in files]), num_workers=2).draw is None

def test_what_cannot_be_measured(embedder, photos, tmp_path):
    files = sorted(photos.glob('a/*.png'))
    emb = embedder.embedded(files[0])
    assert len(emb)==1 and emb.labels is None
    bad = tmp_path/'bad.png'
    bad.write_bytes(b'no image')
    for f,says in ((lambda: embedder.embedded(files, labels=['a']), f'There are {len(files)} images and 1 labels'),
        (lambda: embedder.embedded([]), 'There are no images to embed'), (emb.evaluate, 'have no labels'),
        (lambda: embedder.embedded(files, 'test'), 'Only a data set has splits'),
        (lambda: embedder.embedded(MetricDataset.from_folder(photos), 'tset'), "has no split 'tset'; its splits are "),
        (lambda: embedder.embedded([*files,bad,*files], num_workers=2, bs=2), "bad.png' cannot be read")):
        with pytest.raises(ValueError, match=says): f()

def test_threads_open_no_more_than_the_next_batch():
    "So that memory does not grow with the number of images; and they do open while the network works"
    import threading
    opened,most,ids,lock = [0],[0],set(),threading.Lock()
    def prepare(o):
        with lock:
            opened[0] += 1
            ids.add(threading.get_ident())
        return torch.full((3,2,2), float(o))
    class Net(nn.Module):
        done = 0
        def forward(self, x):
            most[0] = max(most[0], opened[0]-self.done)
            self.done += len(x)
            return x.mean((2,3))
    def progress(o):
        seen.append(len(o))
        return iter(o)
    seen = []
    emb = ImageEmbedder(Net(), prepare).embed(range(50), bs=4, num_workers=3, progress=progress)
    assert emb[:,0].tolist()==list(range(50)) and 4<=most[0]<=8 and threading.get_ident() not in ids and seen==[13]

def test_embeddings_of_a_learner_say_what_made_them(few, tmp_path, monkeypatch):
    "The facts of an exported embedder, which a file keeps and a page tells; of what is not known nothing"
    learn = metric_learner(few.dataloaders(bs=16, per_class=4, item_tfms=Resize((40,32)), num_workers=0, seed=3), 'test_resnet',
        ProxyNCALoss(scale=2.), emb_sz=8, pretrained=False, path=tmp_path)
    about = dict(network='test_resnet', embedding=8, size='32×40', loss=repr(learn.loss_func), data='few glyphs',
        train_classes=few.df.label[few.df.split=='train'].nunique(), batch_seed=3)
    with learn.no_bar(), learn.no_logging():
        assert about|dict(measured_on='few glyphs, val')=={k:o for k,o in learn.embedded().facts.items() if k!='date'} # no epochs yet
        learn.fit(2)
    about.update(epochs=2, date=date.today().isoformat())
    emb = learn.embedded('test')
    assert emb.facts==about|dict(measured_on='few glyphs, test')
    assert learn.export_embedder(tmp_path/'e').facts==about|dict(split_hash=split_hash(learn.dls))
    assert learn.embedded(learn.dls.train).facts['measured_on']=='few glyphs, train'
    for part in (few.items('test')[:9], few.items('test')[[0,*range(len(few.items('test')))]]):
        assert 'measured_on' not in learn.embedded(learn.dls.test_dl(part, with_labels=True)).facts
    emb = Embedded.load(emb.save(tmp_path/'e.safetensors'))
    assert emb.facts==about|dict(measured_on='few glyphs, test')
    own = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    of_own = metric_learner(learn.dls, own, TripletLoss(), emb_sz=3, path=tmp_path, normalize=False).about_training()
    assert (of_own['network'],of_own['embedding']) == ('Sequential',3) and not {'epochs','settings','recipe','seed'} & set(of_own)
    monkeypatch.setattr('dmlfast.look.page._figures', lambda *args: iter(()))
    html = emb.report(tmp_path/'r', code='').read_text(encoding='utf-8')
    for k,v in {'network':'test_resnet', 'embedding':'8 numbers', 'image size':'32×40', 'trained on':'few glyphs', 'epochs':2,
        'seed of the batches':3, 'date':about['date']}.items():
        assert f'<tr><th scope="row">{k}</th><td>{v}</td></tr>' in html, k
    assert 'test_resnet on few glyphs, test' in html and 'scale=2' in html
    assert not [o for o in ('recipe','optimiser') if f'row">{o}' in html]

def test_an_embedder_says_what_trained_it(few, tmp_path):
    "Loss, data, classes, epochs and settings, but no paths of whoever trained it; a page about it has these, and of an older folder less"
    from dmlfast.study.runs import fit_settings, make_learner
    body = Embedder('test_resnet', 8, pretrained=False).body
    torch.save(body.state_dict(), tmp_path/'body.pth')
    s = dict(data=dict(reader='folder', path=str(few.path)), model=dict(arch='test_resnet', weights=str(tmp_path/'body.pth'), emb_sz=8),
        batch=dict(bs=16, per_class=4, num_workers=0), loss=dict(name='triplet', margin=.3), fit=dict(n_epoch=1))
    learn = make_learner(s, few)
    with learn.no_bar(), learn.no_logging(): fit_settings(learn, s)
    e = learn.export_embedder(tmp_path/'e')
    assert e.facts=={'data':'few glyphs', 'train_classes':learn.dls.n_train_classes, 'loss':repr(learn.loss_func), 'epochs':1,
        'network':'test_resnet', 'embedding':8, 'batch_seed':0, 'date':learn.about_training()['date'], 'split_hash':split_hash(learn.dls),
        'settings':{k:o for k,o in s.items() if k!='data'} | dict(model=dict(s['model'], weights='body.pth'))}
    assert str(tmp_path) not in (tmp_path/'e'/'embedder.json').read_text()
    about = json.loads((tmp_path/'e'/'embedder.json').read_text())
    assert about['format']==2
    def page(o, name, **kwargs):
        with pytest.MonkeyPatch.context() as m:
            m.setattr('dmlfast.look.page._figures', lambda *args: iter(()))
            return o.embedded(few, 'test', num_workers=0).report(tmp_path/name, code='', **kwargs).read_text(encoding='utf-8')
    html = page(e, 'r', ds=few)
    def row(k, v): return f'<tr><th scope="row">{k}</th><td>{v}</td></tr>'
    for o in (row('network','test_resnet'), row('embedding','8 numbers'), row('trained on','few glyphs'), row('epochs',1),
        row('loss.margin',.3), row('model.weights','body.pth'), 'TripletLoss(margin=0.3', 'measured on few glyphs, test'):
        assert o in html, o
    assert not [o for o in ('optimiser','callbacks','No fit is known','What is wrong','#training') if o in html]
    for facts in ({}, None):
        (tmp_path/'e'/'embedder.json').write_text(json.dumps(about | dict(facts=facts)))
        html = page(load_embedder(tmp_path/'e'), 'r', overwrite=True)
        assert row('network','test_resnet') in html and 'loss' not in re.sub('<style.*?</style>', '', html, flags=re.S)
        assert 'trained on' not in html and 'hash of the splits' not in html
    with pytest.raises(FileExistsError, match='overwrite=True'): page(e, 'r')
