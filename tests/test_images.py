"An image is what a viewer shows: the same pixels in training, in `predict`, in `bad_images` and in an exported embedder"
import io, json, os, struct, warnings, zlib
import numpy as np, pytest, torch
from PIL import Image
from fastai.vision.all import *
import dmlfast.files.images as images
from dmlfast.all import *
from dmlfast.deploy.embedder import Preprocess
from dmlfast.data.datasets import NamedImage
from dmlfast.train.export import preprocess_of

H,W = 40,60
RED,GREEN,BLUE,GREY = (255,0,0),(0,255,0),(0,0,255),(90,90,90)

def quadrants(a, b, c, d, h=H, w=W):
    "Red and so on in the four corners, row by row"
    res = np.zeros((h, w, *np.shape(a)), dtype=np.uint8)
    res[:h//2,:w//2],res[:h//2,w//2:],res[h//2:,:w//2],res[h//2:,w//2:] = a,b,c,d
    return res

def on_white(rgb, alpha): return np.where(np.asarray(alpha)[...,None]==255, rgb, 255).astype(np.uint8)
def grey(a): return np.repeat(np.asarray(a, dtype=np.uint8)[...,None], 3, -1)

FLAG = quadrants(RED, GREEN, BLUE, GREY)
SEEN = quadrants(255, 255, 0, 255) # where a mask shows something
LEVELS = quadrants(0, 100, 200, 255)

# What is stored for each orientation so that the flag is upright: row 0 and column 0 of the file lie where EXIF says
stored_as = {1:lambda a: a, 2:lambda a: a[:,::-1], 3:lambda a: a[::-1,::-1], 4:lambda a: a[::-1], 5:lambda a: a.swapaxes(0, 1),
    6:lambda a: np.rot90(a), 7:lambda a: np.rot90(a, 2).swapaxes(0, 1), 8:lambda a: np.rot90(a, -1)}

def exif(o):
    res = Image.Exif()
    res[0x0112] = o
    return res

def palette(colours, ids):
    im = Image.frombytes('P', ids.shape[::-1], ids.tobytes())
    im.putpalette([v for c in colours for v in c])
    return im

def _cases():
    "Name -> (file's ending, how it is written, pixels that a viewer shows)"
    res = {f'exif{o}':('.png', lambda f,o=o: Image.fromarray(np.ascontiguousarray(stored_as[o](FLAG))).save(f, exif=exif(o)), FLAG)
        for o in range(2,9)}
    res |= {f'exif{o}_tiff':('.tif', lambda f,o=o: Image.fromarray(np.ascontiguousarray(stored_as[o](FLAG))).save(f, exif=exif(o)), FLAG)
        for o in (6,7)}
    res['rgb'] = '.png', Image.fromarray(FLAG).save, FLAG
    res['grey'] = '.png', Image.fromarray(LEVELS).save, grey(LEVELS)
    res['rgba'] = '.png', Image.fromarray(np.dstack([FLAG,SEEN])).save, on_white(FLAG, SEEN)
    res['rgba_webp'] = '.webp', lambda f: Image.fromarray(np.dstack([FLAG,SEEN])).save(f, lossless=True), on_white(FLAG, SEEN)
    res['la'] = '.png', Image.merge('LA', [Image.fromarray(LEVELS),Image.fromarray(SEEN)]).save, on_white(grey(LEVELS), SEEN)
    res['palette'] = '.png', palette([RED,GREEN,BLUE,GREY], quadrants(0,1,2,3)).save, FLAG
    clear = bytes([255,255,0,255])
    res['palette_clear'] = ('.png', lambda f: palette([RED,GREEN,BLUE,GREY], quadrants(0,1,2,3)).save(f, transparency=clear),
        on_white(FLAG, SEEN))
    res['rgb_key'] = '.png', lambda f: Image.fromarray(FLAG).save(f, transparency=BLUE), on_white(FLAG, SEEN)
    res['i16_png'] = '.png', Image.fromarray(LEVELS.astype(np.uint16)*256+7).save, grey(LEVELS)
    res['i16_tiff'] = '.tif', Image.fromarray(LEVELS.astype(np.uint16)*257).save, grey(LEVELS)
    res['i16_key'] = ('.png', lambda f: Image.fromarray(LEVELS.astype(np.uint16)*257).save(f, transparency=200*257),
        grey(quadrants(0, 100, 255, 255)))
    res['i_tiff'] = '.tif', Image.fromarray(LEVELS.astype(np.int32)*1000-70000).save, grey(LEVELS)
    res['f_tiff'] = '.tif', Image.fromarray(LEVELS.astype(np.float32)/8-3).save, grey(LEVELS)
    res['pgm16'] = '.pgm', lambda f: f.write_bytes(b'P5 %d %d 65535\n' % (W,H) + (LEVELS.astype('>u2')*257).tobytes()), grey(LEVELS)
    res['cmyk'] = '.tif', Image.frombytes('CMYK', (W,H),
        np.ascontiguousarray(np.dstack([255-FLAG,np.zeros_like(LEVELS)])).tobytes()).save, FLAG
    res['1bit'] = '.png', Image.fromarray(quadrants(0, 255, 255, 0)).convert('1').save, grey(quadrants(0, 255, 255, 0))
    first,last = (palette([RED,GREEN,BLUE,GREY], o) for o in (quadrants(0,1,2,3), quadrants(3,2,1,0)))
    res['gif'] = '.gif', lambda f: first.save(f, save_all=True, append_images=[last], duration=100, optimize=False), FLAG
    res['one'] = '.png', Image.fromarray(FLAG[:1,:1]).save, FLAG[:1,:1]
    long = quadrants(RED, GREEN, BLUE, GREY, 3, 2000)
    res['wide'],res['high'] = ('.png', Image.fromarray(long).save, long),('.png',
        Image.fromarray(np.ascontiguousarray(np.rot90(long))).save, np.rot90(long))
    return res

cases = _cases()

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Each case in a file of its own, half of them in each class"
    path = tmp_path_factory.mktemp('stored')
    for i,(name,(suffix,write,_)) in enumerate(cases.items()):
        (path/'abcd'[i%4]).mkdir(exist_ok=True)
        write(path/'abcd'[i%4]/f'{name}{suffix}')
    return path

@pytest.fixture(scope='module')
def four(folder, tmp_path_factory):
    "File of each case; the data set, a learner on it, and what was exported from it"
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Images of 32-bit')
        ds = MetricDataset.from_folder(folder, val_pct=.5)
        set_seed(0)
        learn = metric_learner(ds.dataloaders(bs=4, per_class=2, size=32, num_workers=0, valid='test'), 'test_resnet', TripletLoss(),
            emb_sz=8, pretrained=False, path=tmp_path_factory.mktemp('x'), head='linear')
        learn.logger = noop
        return {o.stem:o for o in ds.items()},ds,learn,learn.export_embedder(tmp_path_factory.mktemp('y')/'e')

@pytest.mark.parametrize('name', cases)
@pytest.mark.filterwarnings('ignore:Images of 32-bit')
def test_the_four_see_the_same(four, name):
    "Pixels are those that were thought out above, and embeddings those of these pixels"
    files,ds,learn,embedder = four
    fn,want = files[name],cases[name][2]
    dl = next(o for o in learn.dls if fn in o.items)
    assert np.array_equal(np.asarray(dl.dataset[list(dl.items).index(fn)][0]), want) # as it is trained on
    assert np.array_equal(np.asarray(Preprocess().resized(fn)), want)
    assert bad_images([fn])==[]
    emb = embedder.embed(np.ascontiguousarray(want))
    with learn.no_bar(): embs = [learn.predict(fn)[0],learn.predict(fn.read_bytes())[0],embedder.embed(fn),embedder.embed(fn.read_bytes())]
    for o in embs: assert torch.allclose(o, emb, atol=1e-5)

def test_pixels_count(four):
    "The comparison above can fail: a turned flag, and what is hidden, have other embeddings"
    _,_,_,embedder = four
    want = embedder.embed(FLAG)
    for o in (FLAG[::-1], FLAG[:,::-1], np.rot90(FLAG), on_white(FLAG, SEEN)):
        assert (embedder.embed(np.ascontiguousarray(o))-want).abs().max()>1e-3

def test_what_an_embedder_was_exported_with_is_written_down(four, folder, tmp_path):
    files,ds,learn,embedder = four
    e = embedder.save(tmp_path/'e')
    assert json.loads((e/'embedder.json').read_text())['preprocess']['background']=='white'
    black = ImageEmbedder(embedder.model, Preprocess(**embedder.preprocess.spec() | dict(background='black'))).save(tmp_path/'black')
    assert np.array_equal(np.asarray(load_embedder(black).preprocess.resized(files['rgba']).resize((2,2), 0))[1,0], (0,0,0))
    with pytest.raises(ValueError, match="background is the name of a colour or '#rrggbb'; got 3"): Preprocess(background=3)
    with pytest.raises(ValueError, match='unknown color'): Preprocess(background='blakc')

def _first_format(folder):
    "Take away what the first format did not have"
    about = json.loads((folder/'embedder.json').read_text())
    del about['preprocess']['background']
    (folder/'embedder.json').write_text(json.dumps(about | dict(format=1)))
    return load_embedder(folder)

@pytest.mark.filterwarnings('ignore:Images of 32-bit')
def test_folders_of_the_first_format_do_as_they_did(four, tmp_path):
    "Pixels as they are stored: neither turned nor composed, and 16 bits cut off"
    files,ds,learn,embedder = four
    old = _first_format(embedder.save(tmp_path/'e'))
    bare = Preprocess(background=None)
    for name,want in (('exif6', np.rot90(FLAG)), ('rgba', FLAG), ('palette_clear', FLAG), ('i16_png', grey(quadrants(7, 255, 255, 255))),
        ('grey', grey(LEVELS))):
        assert np.array_equal(np.asarray(bare.resized(files[name])), want)
        assert torch.allclose(old.embed(files[name]), embedder.embed(np.ascontiguousarray(want)), atol=1e-6)
    assert torch.equal(load_embedder(old.save(tmp_path/'again')).embed(files['exif6']), old.embed(files['exif6']))
    for o in (old,embedder): # measured, each opens images its own way, and draws them so
        m = o.embedded(ds, num_workers=2)
        at = {name:m.items.index(str(files[name])) for name in ('exif6','rgba','i16_png')}
        for name,i in at.items(): assert torch.allclose(m.embs[i], o.embed(files[name]), atol=1e-5)
        assert np.array_equal(np.asarray(m.draw(at['exif6'])), np.rot90(FLAG) if o is old else FLAG)
        assert torch.equal(o.embed(Image.open(files['exif6'])), o.embed(files['exif6']))

@pytest.mark.filterwarnings('ignore:Images of 32-bit')
def test_fastais_own_images_stay_as_fastai_opens_them(folder, tmp_path):
    "Where the training opened bare pixels, so do `predict` and what is exported"
    block = DataBlock(blocks=(ImageBlock, ClassBlock), get_items=get_image_files, get_y=parent_label, splitter=ClassSplitter(parent_label),
        item_tfms=Resize(32, ResizeMethod.Squish))
    dls = block.dataloaders(folder, bs=4, dl_type=BalancedDL, per_class=2, num_workers=0)
    learn = metric_learner(dls, 'test_resnet', TripletLoss(), emb_sz=8, pretrained=False, path=tmp_path)
    learn.logger = noop
    assert preprocess_of(dls).background is None
    e = learn.export_embedder(tmp_path/'e')
    fn = next(folder.rglob('exif6.png'))
    for o in (fn, fn.read_bytes(), Image.open(fn), np.rot90(FLAG)):
        with learn.no_bar(): assert torch.allclose(learn.predict(o)[0], e.embed(fn), atol=1e-5)

@pytest.mark.filterwarnings('ignore:Images of 32-bit')
def test_a_learner_that_was_loaded_opens_images_as_before(four, tmp_path):
    "It has no items left, and still knows how they were opened"
    files,ds,learn,embedder = four
    learn.export(tmp_path/'l.pkl')
    again = load_learner(tmp_path/'l.pkl')
    again.logger = noop
    assert preprocess_of(again.dls).background=='white'
    for o in (files['exif6'], files['exif6'].read_bytes(), Image.open(files['exif6']), FLAG):
        with again.no_bar(): assert torch.allclose(again.predict(o)[0], embedder.embed(FLAG), atol=1e-5)

# one by one

def test_what_can_be_opened(tmp_path):
    "The same four quadrants, as everything that an image may be"
    Image.fromarray(FLAG).save(fn := tmp_path/'x.png')
    first = np.moveaxis(FLAG, -1, 0)
    with open(fn, 'rb') as f:
        for o in (fn, str(fn), fn.read_bytes(), bytearray(fn.read_bytes()), f, io.BytesIO(fn.read_bytes()), Image.open(fn),
            Image.fromarray(FLAG), FLAG, first, FLAG[:,::-1][:,::-1], FLAG.astype(np.uint16)*257,
            (FLAG.astype(np.uint16)*257).astype('>u2'), FLAG/255,
            (first/255).astype(np.float16), FLAG.astype(np.float32)/255, np.dstack([FLAG,np.full((H,W), 255, np.uint8)]),
            torch.tensor(FLAG), torch.tensor(first), torch.tensor(first)/255, (torch.tensor(first)/255).requires_grad_(),
            TensorImage(torch.tensor(first)), torch.tensor(first.astype(np.uint16)*257)):
            assert np.array_equal(np.asarray(open_image(o)), FLAG)
    for o in (LEVELS, LEVELS[...,None], LEVELS[None], LEVELS/255, torch.tensor(LEVELS), torch.tensor(LEVELS)[None]):
        assert np.array_equal(np.asarray(open_image(o)), grey(LEVELS)) and np.array_equal(np.asarray(open_image(o, 'L')), LEVELS)
    assert np.array_equal(np.asarray(open_image(np.dstack([FLAG,SEEN]))), on_white(FLAG, SEEN))
    for m,n in (('RGBA','PA'), ('LA','La'), ('RGBA','RGBa')):
        assert open_image(Image.new(m, (2,1)).convert(n)).getpixel((0,0))==(255,255,255)
    for m in ('LAB','HSV','YCbCr','RGBX','CMYK','P','1'): assert all(open_image(Image.new(m, (2,1)), k).size==(2,1) for k in ('L','RGB'))

def test_two_readings_of_an_array():
    "Three rows or three channels: an array has its channels last, a tensor first"
    a = np.random.RandomState(0).randint(0, 256, (3,5,3), dtype=np.uint8)
    assert np.array_equal(np.asarray(open_image(a)), a)
    assert np.array_equal(np.asarray(open_image(torch.tensor(a))), np.moveaxis(a, 0, -1))

@pytest.mark.parametrize('o,says', [(np.zeros((4,5,2), np.uint8), r'got \(4, 5, 2\)'), (np.zeros((2,4,5), np.uint8), r'got \(2, 4, 5\)'),
    (np.zeros(7), r'got \(7,\)'), (np.zeros((2,3,4,5)), r'\(2, 3, 4, 5\)'),
    (np.zeros((0,5,3), np.uint8), 'not empty'), (np.zeros((4,5), np.int64), 'got int64'), (np.zeros((4,5), bool), 'got bool'),
    (np.full((4,5), 1.5), r'in \[0,1\]; got 1.5 to 1.5'), (np.full((4,5), np.nan), 'got nan'),
    (torch.zeros(4, 5, 2), r'got \(4, 5, 2\)'), (torch.full((3,4,5), -1.), 'got -1'), (3, 'got a int'), (None, 'got a NoneType'),
    ([1,2], 'got a list'), (b'', 'in 0 bytes cannot be read'), (b'GIF89a', 'in 6 bytes cannot be read'),
    (io.BytesIO(b'text'), 'in a BytesIO cannot be read: Pillow knows no such format'), ('nowhere.png', "There is no image 'nowhere.png'"),
    (os.sep, f"An image is a file, and '{os.sep}' is a folder")])
def test_what_is_no_image(o, says):
    with pytest.raises(ValueError, match=says): open_image(o)

def test_every_broken_file_is_named(tmp_path):
    "Cut off anywhere, or with some bytes of it changed, a file opens or is refused by its name"
    rng = np.random.RandomState(0)
    for suffix in ('.png','.jpg','.gif','.tif','.webp','.bmp','.tga','.jp2','.ico'):
        Image.fromarray(FLAG).save(good := tmp_path/f'good{suffix}', **(dict(exif=exif(6)) if suffix in ('.png','.jpg','.webp') else {}))
        data,bad = good.read_bytes(),tmp_path/f'bad{suffix}'
        for i in range(20):
            b = bytearray(data[:rng.randint(len(data))] if i%2 else data)
            if len(b): b[rng.randint(min(len(b), 200))] ^= 1<<rng.randint(8)
            bad.write_bytes(bytes(b))
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                try: assert open_image(bad).mode=='RGB'
                except ValueError as e: assert f"bad{suffix}' cannot be read" in str(e)

def test_what_training_cannot_open_is_bad(tmp_path):
    "A PNG whose pixels are numbers of colours, and the colours are not there: `verify_images` of fastai passes it"
    from fastai.vision.utils import verify_image
    def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
    fn = tmp_path/'no_palette.png'
    fn.write_bytes(b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', 8, 8, 8, 3, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(bytes(8*9))) + chunk(b'IEND', b''))
    assert verify_image(fn) and bad_images([fn])==[fn]
    with pytest.raises(ValueError, match='no_palette.png'): NamedImage.create(fn)

def test_pixels_are_counted_before_they_are_decoded(tmp_path, monkeypatch):
    "A claim of 200 megapixels in a few bytes, and bounds of one's own"
    head = b'IHDR'+struct.pack('>IIBBBBB', 20000, 10000, 8, 0, 0, 0, 0)
    (bomb := tmp_path/'bomb.png').write_bytes(
        b'\x89PNG\r\n\x1a\n'+struct.pack('>I', 13)+head+struct.pack('>I', zlib.crc32(head))
        +struct.pack('>I', 0)+b'IDAT'+struct.pack('>I', zlib.crc32(b'IDAT')))
    for f in (open_image, NamedImage.create, Preprocess().resized, Preprocess(background=None).resized):
        with pytest.raises(ValueError, match=r"bomb.png' cannot be read: .*200000000 pixels"): f(bomb)
    assert bad_images([bomb])==[bomb]
    Image.fromarray(FLAG).save(fn := tmp_path/'x.png')
    assert open_image(fn, max_pixels=H*W).size==(W,H)
    monkeypatch.setattr(Image.Image, 'load', lambda *a: 1/0)
    for o in (fn, Image.open(fn)):
        with pytest.raises(ValueError, match=f"x.png' cannot be read: it has 60×40 pixels, more than 2,399"):
            open_image(o, max_pixels=H*W-1)

def test_ordinary_files_are_bit_for_bit_as_before(tmp_path):
    "RGB and grey of 8 bits, as Pillow decodes and converts them"
    rng = np.random.RandomState(0)
    for suffix,kw in (('.png',{}), ('.jpg',dict(quality=80)), ('.bmp',{}), ('.tif',{}), ('.webp',{})):
        for a in (rng.randint(0, 256, (31,47,3), dtype=np.uint8), rng.randint(0, 256, (31,47), dtype=np.uint8)):
            Image.fromarray(a).save(fn := tmp_path/f'x{suffix}', **kw)
            for mode in ('RGB','L'): assert np.array_equal(np.asarray(open_image(fn, mode)), np.asarray(Image.open(fn).convert(mode)))
            assert np.array_equal(np.asarray(NamedImage.create(fn)), np.asarray(PILImage.create(fn)))

def test_half_transparent_is_half_white():
    "51 of 255 of black on white is 204, and on red it is red's share"
    im = Image.new('RGBA', (1,1), (0,0,0,51))
    assert open_image(im).getpixel((0,0))==(204,204,204) and open_image(im, background='red').getpixel((0,0))==(204,0,0)

def test_a_broken_note_is_not_looked_at():
    for o in (0, 9, 77): assert np.array_equal(np.asarray(open_image(_png(FLAG, exif=exif(o)))), FLAG)
    assert np.array_equal(np.asarray(open_image(_png(FLAG, exif=b'Exif\x00\x00nonsense'))), FLAG)

def _png(a, **kwargs):
    Image.fromarray(a).save(f := io.BytesIO(), 'PNG', **kwargs)
    return f.getvalue()

def test_an_opened_image_is_not_turned_again():
    im = open_image(_png(FLAG, exif=exif(6)))
    assert np.array_equal(np.asarray(open_image(im)), np.asarray(im)) and im.info=={}

def test_scaled_is_said_once():
    images._say_scaled.cache_clear()
    im = Image.fromarray(np.array([[0,1],[2,4]], dtype=np.int32))
    with pytest.warns(UserWarning, match='no fixed range: each is scaled'):
        assert np.array_equal(np.asarray(open_image(im, 'L')), [[0,64],[128,255]])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        open_image(im)
        assert np.array_equal(np.asarray(open_image(Image.fromarray(np.array([[np.nan,-1],[np.inf,1]], dtype=np.float32)), 'L')),
            [[0,0],[0,255]])
        assert np.array_equal(np.asarray(open_image(Image.fromarray(np.full((2,2), 9, dtype=np.int32)), 'L')), np.zeros((2,2)))

def test_a_subclass_has_its_own_background(tmp_path):
    class OnBlack(NamedImage): background = 'black'
    Image.fromarray(np.dstack([FLAG,SEEN])).save(fn := tmp_path/'x.png')
    assert np.array_equal(np.asarray(OnBlack.create(fn)), np.where(SEEN[...,None]==255, FLAG, 0))

# which files of a folder are images

def _tree(path, *names):
    for o in names:
        (path/o).parent.mkdir(parents=True, exist_ok=True)
        (path/o).write_bytes(_png(FLAG) if Path(o).suffix else b'')

def test_which_files_are_images_depends_on_no_system_table(tmp_path, monkeypatch):
    "Endings that a table of types may lack, in capitals too; what is left out is counted"
    import fastai.data.transforms as tfms
    monkeypatch.setattr(tfms, 'image_extensions', {'.png'})
    _tree(tmp_path, 'a/1.png', 'a/2.JPG', 'a/3.webp', 'b/1.jfif', 'b/2.jp2', 'b/3.tga', 'c/1.heic', 'c/2.heic', 'a/x.txt', 'a/y.json',
        'models/best.pth', 'models/tmp/_tmp.pth', 'a/noend', 'a/.hidden.png', 'b/.cache/1.png', 'b/.cache/index', '.DS_Store',
        'a/Thumbs.db')
    with pytest.warns(UserWarning,
        match=r"^Some files in '.*' are left out: 2 .heic, 2 hidden, 1 .json, 1 .txt, 1 without an ending\.") as w:
        ds = MetricDataset.from_folder(tmp_path)
    assert [str(o) for o in ds.df.path]==['a/1.png','a/2.JPG','a/3.webp','b/1.jfif','b/2.jp2','b/3.tga'] and len(w)==1
    (tmp_path/'none').mkdir()
    _tree(tmp_path, 'none/x/1.heic')
    with pytest.raises(ValueError, match=r"There are no images in .*Some files in .* are left out: 1 .heic\."):
        MetricDataset.from_folder(tmp_path/'none')

def test_a_link_to_where_it_is_leads_nowhere(tmp_path):
    "And a link to a folder elsewhere is a folder"
    _tree(tmp_path, 'in/a/1.png', 'in/b/2.png', 'out/3.png')
    for name,to in (('a/up','..'),('b/here','.'),('b/out','../../out')): (tmp_path/'in'/name).symlink_to(to)
    assert [o.name for o in images.image_files(tmp_path/'in')]==['1.png','2.png','3.png']

def test_folders_of_the_same_name_are_said_to_be_one_class(tmp_path):
    _tree(tmp_path, 'cats/persian/1.png', 'cats/siamese/1.png', 'cats/siamese/2.png', 'dogs/persian/1.png', 'dogs/boxer/1.png',
        'dogs/boxer/2.png')
    with pytest.warns(UserWarning, match=r"1 of 3 classes are merged from several folders: 'persian' \(cats/persian, dogs/persian\)\. "
        r"Rename") as w:
        ds = MetricDataset.from_folder(tmp_path)
    assert ds.df.label.tolist().count('persian')==2 and len(w)==1

def test_folders_of_splits_are_said_to_be_divided_anew(tmp_path):
    "As fastai's `GrandparentSplitter` has them"
    _tree(tmp_path, *(f'{s}/{c}/{i}.png' for s in ('train','valid') for c in 'abc' for i in range(2)))
    with pytest.warns(UserWarning, match=r"3 of 3 classes are merged from .*'a' \(train/a, valid/a\).* They are divided again"):
        MetricDataset.from_folder(tmp_path)

def test_a_folder_under_two_names_is_refused(tmp_path):
    "A link beside it, links to each other, and a table with names from here and from the root"
    _tree(tmp_path, 'x/a/1.png', 'x/b/2.png', 'y/a/1.png', 'y/b/2.png')
    (tmp_path/'x'/'z').symlink_to('a')
    for a,b in (('a','b'),('b','a')): (tmp_path/'y'/a/'more').symlink_to(f'../{b}')
    for o in 'xy':
        with pytest.raises(ValueError, match='images are in the table twice'), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            MetricDataset.from_folder(tmp_path/o)
    df = pd.DataFrame(dict(path=['x/a/1.png',str(tmp_path/'x/a/1.png'),'x/b/2.png'], label=[*'aab'], split='train'))
    with pytest.raises(ValueError, match=r"1 images are in the table twice: '/.*, perhaps under two names"): MetricDataset(df, tmp_path)

def test_images_in_no_folder_of_a_class_are_said(tmp_path):
    _tree(tmp_path/'birds', '1.png', '2.png', 'a/1.png', 'a/2.png', 'b/1.png', 'b/2.png')
    with pytest.warns(UserWarning, match="2 images are in '.*birds' itself and not in a folder of a class: they are a class 'birds'"):
        ds = MetricDataset.from_folder(tmp_path/'birds')
    assert sorted(ds.df.label)==['a','a','b','b','birds','birds']

@pytest.mark.parametrize('kw', [dict(test_pct=20), dict(val_pct=20), dict(test_pct=-.1), dict(val_pct=1), dict(val_pct=-3),
    dict(test_pct=float('nan')), dict(test_pct=1.), dict(test_pct='.2'), dict(val_pct=None)])
def test_shares_that_are_none(kw):
    "Refused before the folder is looked at"
    (k,v), = kw.items()
    for f in (lambda: MetricDataset.from_folder('nowhere', **kw), lambda: MetricDataset.from_df(pd.DataFrame(), **kw)):
        with pytest.raises(ValueError, match=f'`{k}` is a share of the classes, 0 or more and less than 1; got {v!r}'): f()

@pytest.mark.parametrize('path', ['', None, 3])
def test_a_folder_is_named(path):
    for f in (MetricDataset.from_folder, cub200):
        with pytest.raises(ValueError, match=f"The images' folder is a path, .*; got {path!r}"): f(path)

def test_no_classes_for_test(tmp_path):
    _tree(tmp_path, *[f'{c}/{i}.png' for c in 'abcde' for i in (1,2)])
    df = MetricDataset.from_folder(tmp_path, test_pct=0).df
    assert df.groupby('split').label.unique().map(list).to_dict()==dict(train=['a','b','c','d'], val=['e'])

@pytest.mark.parametrize('size', [-3, 1.5, '24'])
def test_a_size_that_is_none(few, size):
    with pytest.raises(ValueError, match=f'`size` is a number of pixels to a side, 1 or more; got {size!r}'):
        few.dataloaders(bs=8, size=size, num_workers=0)
