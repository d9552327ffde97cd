"The explorer and the server: who is let in, what is shown and kept, and what a browser does with the pages"
import http.client, io, json, re, shutil, signal, struct, subprocess, sys, threading, time, zlib
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from dmlfast.deploy import ImageEmbedder, Preprocess, load_embedder
from dmlfast.models import Embedder
from dmlfast.files.images import open_image
from dmlfast.web import Explorer, Guard, Items, Pictures, Serving, openapi, safe_app, serve
from dmlfast.web.server import Batched, Server
pytest.importorskip('fasthtml', reason="the explorer needs the packages of `pip install -e '.[explore]'`")
from starlette.testclient import TestClient
from browser import Browser, chromium

evil = '<img src=x onerror="document.title=\'hacked\'">&"\'</script><script>document.title=\'hacked\'</script>'
hosts = ['127.0.0.1:8000','localhost:8000']

@pytest.fixture(scope='module')
def folder(few, tmp_path_factory):
    "An embedder with a gallery of glyphs, one class with a name that is HTML"
    torch.manual_seed(0)
    finder = ImageEmbedder(Embedder('test_resnet', 16, pretrained=False), Preprocess([('squash',(24,24),2)]))
    emb = finder.embedded(few)
    with pytest.warns(UserWarning, match='of the pairs of one class are missed'): finder.calibrate(emb, fmr=.05, min_classes=2)
    labels = [emb.label(i) for i in range(len(emb))]
    finder.add_embs(emb.embs, [evil if o==labels[0] else o for o in labels], [str(few.path/o) for o in few.df.path])
    return finder.save(tmp_path_factory.mktemp('web')/'glyphs')

@pytest.fixture
def own(folder, tmp_path):
    "A copy of it that keeps changes"
    return load_embedder(shutil.copytree(folder, tmp_path/'own'/'glyphs'), write=True)

def client(finder, token='t', image=None, read_only=False, **kwargs):
    "A client of the explorer that knows the token"
    x = Explorer(Items(finder, image, **kwargs), 'glyphs', read_only)
    res = TestClient(x.app(hosts, token), base_url='http://127.0.0.1:8000', raise_server_exceptions=True)
    res.headers['authorization'] = f'Bearer {token}'
    res.x = x
    return res

@pytest.fixture(scope='module')
def shown(folder): return client(load_embedder(folder))

def png(color='red', size=(24,24), **kwargs):
    f = io.BytesIO()
    Image.new('RGB', size, color).save(f, 'PNG', **kwargs)
    return f.getvalue()

pages = '/','/?q=0','/?q=3&k=5&rerank=qe&side=1','/?label=nothing','/map','/mistakes?now=1','/labels?now=1','/gallery'

# ---- safe ----

def test_a_name_from_elsewhere_is_refused(shown):
    for host in ('evil.example','evil.example:8000','127.0.0.1:8001','127.0.0.1',''):
        assert shown.get('/', headers=dict(host=host)).status_code==403
    assert shown.get('/', headers=dict(host='LOCALHOST:8000')).status_code==200

def test_requests_from_other_pages_are_refused(shown):
    for origin in ('http://evil.example','http://127.0.0.1:8888','null','https://127.0.0.1:8000.evil.example'):
        assert shown.get('/', headers=dict(origin=origin)).status_code==403
        assert shown.post('/look', content=png(), headers=dict(origin=origin)).status_code==403
    for site in ('cross-site','same-site'): # another port of this machine is the same site
        assert shown.get('/image/0', headers={'sec-fetch-site':site, 'sec-fetch-mode':'no-cors'}).status_code==403
        assert shown.get('/', headers={'sec-fetch-site':site, 'sec-fetch-mode':'navigate', 'sec-fetch-dest':'iframe'}).status_code==403
        assert shown.get('/', headers={'sec-fetch-site':site, 'sec-fetch-mode':'navigate', 'sec-fetch-dest':'document'}).status_code==200
    assert shown.post('/look', content=png(), headers={'origin':'http://127.0.0.1:8000', 'sec-fetch-site':'same-origin'}).status_code==200

def test_nothing_is_shown_without_the_token(shown):
    c = TestClient(shown.x.app(hosts, 'secret'), base_url='http://127.0.0.1:8000')
    for path in (*pages,'/image/0','/files/explorer.js','/threshold.json','/map.json'):
        assert c.get(path).status_code==401 and c.get(path, headers=dict(authorization='Bearer t')).status_code==401
    assert c.get('/?token=wrong').status_code==401 and c.post('/look?token=secret', content=png()).status_code==401
    res = c.get('/?token=secret')
    cookie = res.headers['set-cookie']
    assert res.status_code==200 and 'HttpOnly' in cookie and 'SameSite=Strict' in cookie and cookie.startswith('dmlfast-8000=secret')
    assert c.get('/gallery').status_code==200 # by the cookie
    assert c.post('/look', content=png()).status_code==401 # a cookie without an origin is no form of ours
    assert c.post('/look', content=png(), headers=dict(origin='http://127.0.0.1:8000')).status_code==200

def test_what_a_browser_may_do_is_said(shown):
    for path in (*pages,'/image/0','/threshold.json','/nowhere'):
        h = shown.get(path).headers
        assert h['content-security-policy'].startswith("default-src 'self';") and "frame-ancestors 'none'" in h['content-security-policy']
        assert 'unsafe' not in h['content-security-policy']
        assert h['cache-control']=='no-store' and h['x-content-type-options']=='nosniff' and h['referrer-policy']=='no-referrer'
        assert 'access-control-allow-origin' not in h
    assert shown.get('/', headers=dict(host='evil')).headers['content-security-policy']

def test_a_request_has_at_most_so_many_bytes(folder):
    seen = []
    def take(req, body): seen.append(len(body))
    c = TestClient(safe_app({'POST /take':take}, hosts=hosts, token=None, max_bytes=1000), base_url='http://127.0.0.1:8000')
    assert c.post('/take', content=b'x'*1000).status_code==200
    assert c.post('/take', content=b'x'*1001).status_code==413
    def parts(): yield from [b'x'*400]*3
    assert c.post('/take', content=parts()).status_code==413 # no length is said
    assert seen==[1000]

def test_an_image_has_at_most_so_many_pixels(folder):
    "A small file of many pixels is not decoded"
    def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
    bomb = b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', 9000, 9000, 1, 0, 0, 0, 0))+chunk(b'IDAT', zlib.compress(b'\0'*100))
    res = client(load_embedder(folder)).post('/look', content=bomb+chunk(b'IEND', b''))
    assert res.status_code==400 and '9000×9000 pixels, more than 50,000,000' in res.text
    res = client(load_embedder(folder), max_pixels=500).post('/look', content=png())
    assert res.status_code==400 and 'more than 500' in res.text

@pytest.mark.parametrize('data', [b'', b'x', b'<svg xmlns="http://www.w3.org/2000/svg"/>', b'%!PS', b'GIF89a'], ids=repr)
def test_what_is_no_image_is_refused_in_a_sentence(shown, data):
    res = shown.post('/look', content=data)
    assert res.status_code==400 and res.headers['content-type'].startswith('text/plain') and res.text.startswith('The image in')

def test_uploads_are_opened_as_files_are(shown, tmp_path):
    "Turned by EXIF and composed on white, as `open_image` does it"
    rng = np.random.default_rng(0)
    im,exif = Image.fromarray(rng.integers(0, 256, (24,24,3), dtype=np.uint8)),Image.Exif()
    exif[0x0112] = 6
    im.save(tmp_path/'a.png', exif=exif)
    key = shown.post('/look', content=(tmp_path/'a.png').read_bytes()).json()['q']
    finder = shown.x.items.finder
    assert torch.allclose(shown.x.items.query(key).emb, finder.embed(tmp_path/'a.png'), atol=1e-6)
    assert not torch.allclose(finder.embed(tmp_path/'a.png'), finder.embed(np.asarray(im)), atol=1e-3)

def test_files_are_served_by_number_alone(shown, folder):
    n = len(shown.x.items)
    assert shown.get('/image/0').headers['content-type']=='image/jpeg' and shown.get(f'/image/{n-1}').status_code==200
    for path in (f'/image/{n}','/image/-1','/image/x','/image/0/../../glyphs/embedder.json','/image//etc/passwd','/query/999','/query/x',
        '/files/..%2f..%2fapp.py','/files/%2e%2e/app.py','/files/app.py','/files/','/photos/x.jpg','/embedder.json',
        '/%2e%2e/glyphs/embedder.json'):
        assert shown.get(path).status_code==404, path
    assert shown.get('/files/explorer.css').status_code==200

def test_a_picture_holds_pixels_alone(folder, tmp_path):
    "What a file says of itself, such as where it was taken, is not sent"
    exif = Image.Exif()
    exif[0x010e] = 'my secret garden'
    Image.new('RGB', (500,300), 'red').save(tmp_path/'a.jpg', exif=exif)
    finder = load_embedder(folder)
    finder.add([tmp_path/'a.jpg'], 'a')
    c = client(finder)
    data = c.get(f'/image/{len(finder)-1}').content
    assert b'secret' in (tmp_path/'a.jpg').read_bytes() and b'secret' not in data
    assert Image.open(io.BytesIO(data)).size==(320,192)

class Tags(HTMLParser):
    "Elements and attributes of a page, and its text"
    def __init__(self, html):
        super().__init__()
        self.tags,self.words = [],[]
        self.feed(html)
    def handle_starttag(self, tag, attrs): self.tags.append((tag,dict(attrs)))
    def handle_data(self, data): self.words.append(data)

@pytest.mark.parametrize('path', [*pages,'class','asked'])
def test_no_name_is_html(shown, path):
    "A class called as a tag, and a name of a file too, are text wherever they stand"
    i = shown.x.items
    at = next(n for n in i.numbers if i.label(n)==evil)
    res = shown.get('/gallery', params=dict(label=evil)) if path=='class' else shown.get(f'/?q={at}') if path=='asked' else shown.get(path)
    page = Tags(res.text)
    assert res.status_code==200 and res.headers['content-type'].startswith('text/html')
    assert {t for t,_ in page.tags}<={'html','head','meta','title','link','script','body','header','a','img','span','nav','main','div','p',
        'b','h2','h3',
        'section','aside','form','input','label','select','option','output','datalist','details','summary','figure','figcaption','svg',
        'rect',
        'button','dialog','strong','small','kbd','progress','pre','code'}
    assert not [a for _,a in page.tags for k in a if k.startswith('on') or k=='style']
    assert all(a['src'].startswith('/') for t,a in page.tags if t in ('img','script') and 'src' in a)
    assert len([t for t,_ in page.tags if t=='script'])<=2 and all(a.get('src') for t,a in page.tags if t=='script')
    if path in ('/gallery','class','asked'): assert evil in page.words or any(evil in (v or '') for _,a in page.tags for v in a.values())

def test_a_name_that_is_no_text_is_shown(folder):
    "File systems have names of any bytes"
    finder = load_embedder(folder)
    finder.add([png()], 'c\udcff', ['photo\udcfe.png'])
    c = client(finder)
    for path in (*pages,f'/?q={len(finder)-1}','/gallery?find=c','/map.json','/near/0'): assert c.get(path).status_code==200, path
    assert 'photo?.png' in c.get(f'/?q={len(finder)-1}&k=1').text or 'c?' in c.get('/gallery?find=c').text

def test_an_error_is_plain_text(shown):
    res = shown.get('/', params=dict(q='0', rerank=evil[:30]))
    assert res.status_code==400 and res.headers['content-type'].startswith('text/plain') and '<img' in res.text

def all_files(folder):
    return {o.relative_to(folder).as_posix():o.read_bytes() for o in Path(folder).rglob('*') if o.is_file() and o.name!='.writing'}

def test_read_only_changes_nothing(folder, tmp_path):
    where = load_embedder(folder).save(tmp_path/'glyphs')
    before = all_files(tmp_path)
    c = client(load_embedder(where), read_only=True)
    for path,body in {'add?label=a':png(), 'remove':b'{"numbers":[0]}', 'rename':b'{}', 'decide':b'{}', '':b'', 'anything':b''}.items():
        res = c.post(f'/change/{path}', content=body)
        assert res.status_code==403 and 'read-only' in res.text
    for path in pages: assert c.get(path).status_code==200
    assert c.post('/look', content=png()).status_code==200
    html = c.get('/gallery', params=dict(label=c.x.items.label(3))).text
    html += c.get('/labels?now=1').text
    assert not [o for o in ('data-post','data-remove','data-add','data-decide') if o in html]
    assert all_files(tmp_path)==before and len(c.x.items)==len(load_embedder(where))

def test_nothing_is_written_outside_the_folder(own, tmp_path):
    c = client(own)
    before = {k:v for k,v in all_files(tmp_path).items() if not k.startswith('own/glyphs/')}
    for label in ('../../out','/tmp/out','a/b','..'): assert c.post('/change/add', params=dict(label=label),
        content=png(label and 'blue')).status_code==200
    assert {k:v for k,v in all_files(tmp_path).items() if not k.startswith('own/glyphs/')}==before
    photos = own.gallery.journal.folder/'photos'
    assert [re.fullmatch(r'[0-9a-f]{24}\.jpg', o.name) is not None for o in photos.iterdir()]==[True]
    photos.rename(tmp_path/'elsewhere')
    photos.symlink_to(tmp_path/'elsewhere')
    n = len(own)
    res = c.post('/change/add?label=a', content=png('green'))
    assert res.status_code==400 and 'not a folder of this gallery' in res.text and len(own)==n
    assert len([*(tmp_path/'elsewhere').iterdir()])==1

def test_removing_an_item_touches_no_file_of_others(own, tmp_path, few):
    "The photos of a data set stay, and so does a file that a name points at from within"
    out = tmp_path/'mine.png'
    out.write_bytes(png())
    own.add([png(),png('blue')], 'a', ['photos/../../../mine.png','photos/'])
    c = client(own)
    assert c.post('/change/add?label=a', content=png('green')).status_code==200 # the folder `photos` is there
    numbers = c.x.items.numbers
    assert c.post('/change/remove', json=dict(numbers=numbers)).json()==dict(removed=len(numbers))
    assert out.exists() and all((few.path/o).exists() for o in few.df.path) and len(own)==0
    for path in pages: assert c.get(path).status_code==(404 if 'q=' in path else 200), path

# ---- items ----

def test_a_number_is_never_another_items(own):
    i = Items(own)
    first = list(i.numbers)
    names = [i.name(n) for n in first]
    i.remove(first[2:5])
    assert i.numbers==first[:2]+first[5:] and [i.name(n) for n in i.numbers]==names[:2]+names[5:]
    with pytest.raises(ValueError, match='no longer'): i.name(first[2])
    n, = i.add([png()], 'new')
    assert n==max(first)+1 and i.label(n)=='new'
    i.remove([n])
    m, = i.add([png()], 'new')
    assert m==n+1

def test_changes_by_others_are_seen(own):
    i = Items(own)
    was = i.numbers
    own.add([png()], 'a', ['x'])
    i.sync()
    assert i.numbers[:-1]==was and i.name(i.numbers[-1])=='x'
    own.remove(item='x')
    i.sync()
    assert len(i.numbers)==len(was) and not set(i.numbers)&set(was) # which are which is not known

def test_pictures_are_kept_within_bounds():
    opened = []
    def _open(k):
        opened.append(k)
        return Image.effect_noise((300,300), 80) if k<9 else None
    p = Pictures(_open, max_bytes=10**6)
    one = len(p(0))
    p.max_bytes = int(3.5*one)
    for k in (1,2,3,0,3): p(k)
    assert opened==[0,1,2,3,0] and p.n<=p.max_bytes and p.n==sum(map(len, p.kept.values()))
    assert Image.open(io.BytesIO(p(9))).size==(320,320) # grey, where there is none

def test_the_shape_of_most_pictures_is_known(own):
    assert Items(own).shape=='square'
    for size,want in (((60,20),'wide'),((20,60),'tall')):
        own.remove(label=lambda o: True)
        i = Items(own)
        assert i.shape=='square'
        i.add([png(c, size) for c in ('red','blue','green')]+[png()], 'a')
        assert i.shape==want

def test_neighbours_are_those_of_the_finder(shown, few):
    i = shown.x.items
    path = few.path/few.df.path[7]
    q = i.query(i.ask(path.read_bytes()))
    got,want = i.near(q, 6),i.finder.search(path, 6)
    assert [(i.label(n),i.name(n)) for n,_ in got]==[(o.label,o.item) for o in want] and np.allclose([s for _,s in got],
        [o.score for o in want])
    assert i.name(got[0][0])==str(path) and got[0][1]==pytest.approx(1, abs=1e-5)
    itself = i.near(i.query('7'), 6)
    assert [n for n,_ in itself]==[n for n,_ in i.near(q, 7) if n!=7][:6]
    label = i.label(20)
    assert {i.label(n) for n,_ in i.near(q, 4, label)}=={label} and i.near(q, 4, 'no such class')==[]
    assert i.like(label)==[label] and i.like('no such class')==[] and i.like(evil[5:12].upper())==[evil]
    assert [n for n,_ in i.near(q, 5, None, 'qe')]==[n for s,n in i.gallery.find_rows(q.emb[None], 6, None, 'qe')[0]][:5]

def test_what_is_unknown_is_said(folder):
    finder = load_embedder(folder)
    finder.calibration = dict(finder.calibration, threshold=.9999999)
    c = client(finder)
    key = c.post('/look', content=png('red')).json()['q']
    html = c.get(f'/?q={key}').text
    assert '<h2>Unknown</h2>' in html and html.count('class="line"')==1
    finder.calibration = None
    html = c.get(f'/?q={key}').text
    assert '<h2>Unknown</h2>' not in html and 'class="line"' not in html and 'no calibrated' in html

# ---- changes ----

def test_what_is_changed_is_in_the_folder(own):
    where = own.gallery.journal.folder
    c = client(own)
    n = len(own)
    got = c.post('/change/add', params=dict(label=' new <b> '), content=png('red', (400,200))).json()
    assert got['label']=='new <b>'
    assert c.post('/change/add', params=dict(label='new <b>'), content=png('green')).status_code==200
    again = load_embedder(where)
    assert len(again)==n+2 and again.labels[-2:]==['new <b>']*2
    photo = where/again.items[-2]
    assert open_image(photo).size==(400,200) and torch.allclose(again.embed(photo), own.embs[-2], atol=.05)
    assert Image.open(io.BytesIO(client(again).get(f'/image/{n}').content)).size==(320,160)
    assert c.post('/change/rename', json=dict(old='new <b>', new='newer')).json()==dict(to='/gallery?label=newer')
    assert c.post('/change/remove', json=dict(numbers=[got['n']])).json()==dict(removed=1)
    again = load_embedder(where)
    assert again.labels[-1]=='newer' and len(again)==n+1 and not photo.exists() and (where/again.items[-1]).is_file()
    assert c.post('/change/remove', json=dict(label='newer')).status_code==200 and [*(where/'photos').iterdir()]==[]

@pytest.mark.parametrize('path,body', [('add?label=',png()), ('add?label='+'a'*201,png()), ('remove',b''), ('remove',b'[]'), ('remove',
    b'{"numbers":["0"]}'),
    ('remove',b'{"numbers":[]}'), ('remove',b'{"numbers":[true]}'), ('remove',b'{"label":"none"}'), ('remove',b'{"numbers":{}}'),
    ('rename',b'{"old":"a"}'),
    ('rename',b'{"old":"none","new":"b"}'), ('decide',b'{"n":0}'), ('decide',b'{"n":"x"}'), ('decide',b'{"n":[0],"decision":"right"}'),
    ('decide',b'{"n":0,"decision":"other"}'), ('remove',b'['*100000)], ids=lambda o: str(o)[:30])
def test_changes_that_are_none_are_refused(own, path, body):
    n = len(own)
    res = client(own).post(f'/change/{path}', content=body)
    assert res.status_code in (400,404) and res.headers['content-type'].startswith('text/plain') and res.text.endswith('.') and len(own)==n

def test_one_label_and_none(own, few):
    "Nothing is confused with one label, and duplicates are still shown; an empty gallery has no label at all"
    one = own.shorten(own.model.emb_sz)
    one.gallery = type(own.gallery)()
    assert 'one label' not in client(one).get('/mistakes?now=1').text
    x = Image.open(few.path/few.df.path[0])
    one.add([x,x], 'mine', ['a','b'])
    assert 'All items have one label' in client(one).get('/mistakes?now=1').text
    assert 'Nearly the same photo twice' in client(one).get('/labels?now=1').text

def test_an_embedder_of_the_wing_deploy_explores(tmp_path):
    code = "import sys; from dmlfast.deploy import ImageEmbedder as E; sys.exit(not hasattr(E, 'explore') or 'fastai' in sys.modules)"
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path).returncode==0

def test_labels_are_decided_one_by_one(own, few):
    x = Image.open(few.path/few.df.path[0])
    own.add([x], 'wrong', [str(few.path/few.df.path[0])+' again'])
    where,c = own.gallery.journal.folder,client(own)
    def _asked(): return re.search(r'data-item="(\d+)"', c.get('/labels?now=1').text)
    n = int(_asked()[1])
    assert c.post('/change/decide', json=dict(n=n, decision='other', other='a, "b"\n')).json()==dict(done=1)
    assert (after := _asked()) is None or int(after[1])!=n
    review = client(load_embedder(where)).x.review() # as after a restart
    assert review.other=={c.x.items.name(n):'a, "b"'}
    assert c.post('/change/decide', json=dict(decision='undo')).json()==dict(done=0) and int(_asked()[1])==n
    assert c.post('/change/decide', json=dict(n=n, decision='wrong')).status_code==200 and c.x.review().wrong==[c.x.items.name(n)]

def test_labels_of_a_gallery_that_changes(own, few):
    "A photo that is added is asked about and can be decided on; a decision has the label of its time, also after a renaming"
    paths = [few.path/o for o in few.df.path[:3]]
    own.remove(label=lambda o: True)
    own.add([paths[0]]*3+paths[1:], [*'aaabb'], [*'vwxyz'])
    c = client(own)
    def _asked(): return int(re.search(r'data-item="(\d+)"', c.get('/labels?now=1').text)[1])
    def _decide(n): return c.post('/change/decide', json=dict(n=n, decision='skip')).status_code
    _asked()
    n = c.post('/change/add?label=new', content=paths[0].read_bytes()).json()['n']
    assert _asked()==n and _decide(n)==200 and _asked()!=n
    assert c.post('/change/rename', json=dict(old='a', new='renamed')).status_code==200 and _decide(0)==200
    assert [(o.item[:7],o.label) for o in c.x.review().log]==[('photos/','new'),('v','renamed')]

def test_items_without_names_are_not_asked_about(own, few):
    "A decision names its item; the page says how many cannot be decided on"
    x = Image.open(few.path/few.df.path[0])
    own.remove(label=lambda o: True)
    own.add([x,x], ['a','b'])
    html = client(own).get('/labels?now=1').text
    assert 'data-item' not in html and '1 more cannot be decided on' in html and 'No label is suspicious' not in html
    own.remove(label=lambda o: True)
    own.add([x]*3, ['c','a','b'], ['named','',''])
    html = client(own).get('/labels?now=1').text
    assert 'data-item="0"' in html and '0 of 1 decided' in html and '1 more cannot be decided on' in html

def test_what_is_in_two_splits_is_a_leak(own, few):
    "Where the items say which split they are of, as those of a data set do"
    n = len(own)
    own.add([own.items[9]], own.labels[9], ['copy'], facts=dict(split=['test']))
    own.gallery.facts['split'][:n] = ['train']*n
    x = client(own).x
    leaks = [{o['n'],o['beside']} for o in x.suspects() if o['kind']=='leak']
    assert {9,n} in leaks and all(n in o for o in leaks)
    own.gallery.facts['split'] = ['train']*(n+1)
    assert not [o for o in client(own).x.suspects() if o['kind']=='leak']

# ---- serving ----

def test_explore_answers_at_its_address_and_stops(folder):
    finder = load_embedder(folder)
    with finder.explore(browser=False) as s:
        assert re.fullmatch(r'http://127\.0\.0\.1:\d+/\?token=[\w-]{20,}', s.url)
        h = http.client.HTTPConnection('127.0.0.1', s.port, timeout=20)
        h.request('GET', '/?token='+s.token)
        res = h.getresponse()
        assert res.status==200 and 'server' not in dict(res.getheaders()) and b'<!doctype html>' in res.read()
        with pytest.raises(ValueError, match='cannot be used'): finder.explore(browser=False, port=s.port)
    with pytest.raises(OSError): http.client.HTTPConnection('127.0.0.1', s.port, timeout=5).request('GET', '/')

def test_a_gallery_that_is_no_list_is_refused(folder):
    finder = load_embedder(folder)
    finder.gallery = object()
    with pytest.raises(ValueError, match='a gallery in memory'): Items(finder)

# ---- for programs ----

@pytest.fixture
def api(own):
    server = Server(Items(own), max_images=4)
    c = TestClient(server.app(hosts, 't', max_bytes=10**6), base_url='http://127.0.0.1:8000')
    c.headers['authorization'],c.server = 'Bearer t',server
    yield c
    server.batched.stop()

def test_three_ways_to_send_an_image(api, few):
    from base64 import b64encode
    data = (few.path/few.df.path[5]).read_bytes()
    want = api.server.items.finder.search(data, 3)
    res = api.post('/search?k=3&unknown=false', content=data, headers={'content-type':'image/png'}).json()
    assert [(o['label'],o['item']) for o in res['results'][0]]==[(o.label,o.item) for o in want]
    assert np.allclose([o['score'] for o in res['results'][0]], [o.score for o in want], atol=1e-5)
    parts = api.post('/search', files=[('image',('a.png',data)),('image',('b.png',png()))], data=dict(k='3', unknown='false')).json()
    text = api.post('/search', json=dict(images=[b64encode(data).decode(),'data:image/png;base64,'+b64encode(png()).decode()], k=3,
        unknown=False)).json()
    def _numbers(o): return [[h['number'] for h in r] for r in o['results']]
    assert _numbers(parts)[0]==_numbers(res)[0] and len(_numbers(parts))==2 and _numbers(parts)==_numbers(text)

def test_what_the_server_does(api, few):
    data,own = (few.path/few.df.path[5]).read_bytes(),api.server.items.finder
    n = len(own)
    assert api.get('/health').json()==dict(status='ok', items=n, classes=len(set(own.labels)), threshold=own.threshold, read_only=False)
    assert api.post('/classify', content=data).json()['results'][0]['label']==own.classify(data, unknown=True).label
    own.calibration = dict(own.calibration, threshold=.99999999)
    assert api.post('/classify', content=png('red')).json()['results'][0]['label'] is None and api.post('/search',
        content=png('red')).json()['results']==[[]]
    assert len(api.post('/search?unknown=0', content=png('red')).json()['results'][0])==5
    got = api.post('/items', files=[('image',('a.png',png('red'))),('image',('b.png',png('blue')))], data=dict(label='new')).json()
    assert len(got['numbers'])==2 and load_embedder(own.gallery.journal.folder).labels[-2:]==['new','new']
    assert api.post('/search?k=1', content=png('red')).json()['results'][0][0]['label']=='new'
    assert api.get(f"/image/{got['numbers'][0]}").headers['content-type']=='image/jpeg'
    assert api.request('DELETE', '/items', json=dict(numbers=got['numbers'][:1])).json()==dict(removed=1)
    assert api.request('DELETE', '/items', json=dict(label='new')).json()==dict(removed=1) and len(own)==n
    spec = api.get('/openapi.json').json()
    assert spec==openapi() and set(spec['paths'])=={'/health','/search','/classify','/items','/image/{n}'} and spec['openapi']=='3.1.0'
    page = Tags(api.get('/').text)
    assert {'/search','/classify'}<={o.split()[-1] for o in page.words if o.startswith('POST ')} and all(a['href'].startswith('/') for t,
        a in page.tags
        if t in ('a','link'))

def test_all_that_are_asked_for_vote(api, few):
    "Three of the nearest five are of one class, and all the others of another"
    data,own = (few.path/few.df.path[5]).read_bytes(),api.server.items.finder
    own.remove(label=lambda o: True)
    q = torch.nn.functional.normalize(own.embed(data), dim=0)
    def _at(c):
        r = torch.randn(len(q), generator=torch.Generator().manual_seed(len(str(c))))
        return c*q+(1-c*c)**.5*torch.nn.functional.normalize(r-r@q*q, dim=0)
    own.add_embs(torch.stack([_at(.95)]*3+[_at(.949)]*2+[_at(.94)]*20), ['owl']*3+['cat']*22, ['']*25)
    for k,label in ((1,'owl'),(5,'owl'),(25,'cat')):
        got = api.post(f'/classify?k={k}&unknown=0', content=data).json()['results'][0]
        assert (got['label'],own.classify(data, k=k).label)==(label,label)
    assert api.post('/classify?unknown=0', content=data).json()['results'][0]['label']=='owl'
    c = client(own)
    key = c.post('/look', content=data).json()['q']
    own.calibration = None
    assert '<h2>owl</h2>' in c.get(f'/?q={key}&k=25').text # five vote there

def test_a_class_is_searched_by_its_whole_name(api):
    "By the server; who types a part into the explorer finds the classes with it"
    own = api.server.items.finder
    own.add([png('red')], 'snowy owl').add([png('red')], 'snowy owlet')
    def _found(label): return api.post('/search?unknown=0', params=dict(label=label), content=png('red'))
    assert [o['label'] for o in _found('snowy owl').json()['results'][0]]==['snowy owl']
    assert _found('').json()['results']!=[[]] and _found('owl').status_code==400
    assert _found('snowy owll').json()['error']=="Nothing in the gallery has label 'snowy owll'. Did you mean 'snowy owl'?"
    c = client(own)
    key = c.post('/look', content=png('red')).json()['q']
    for q in ('',f'&q={key}'):
        assert [c.get(f'/?label={o}{q}').text.count('<figure') for o in ('OWL','snowy owl','owlx')]==[2,1,0]

def test_one_item_is_found_by_every_re_ranker(api):
    own = api.server.items.finder
    own.add([png('red')], 'alone')
    for o in ('qe','dba','dba+qe','k-reciprocal'):
        found = api.post('/search', params=dict(label='alone', rerank=o), content=png('blue')).json()['results'][0]
        assert [h['label'] for h in found]==['alone']

@pytest.mark.parametrize('bad', ['ü', ' ', ';', '"', ',', '\\', '\n'])
def test_a_token_that_clients_cannot_send_is_refused(folder, bad):
    with pytest.raises(ValueError, match=re.escape(f'A token cannot hold {bad!r}')): serve(load_embedder(folder), token=f'a{bad}b')
    with pytest.raises(ValueError, match='A token cannot hold'): load_embedder(folder).explore(browser=False, token=f'a{bad}b')

def test_a_token_of_other_signs_is_sent_in_every_way(folder):
    token = ''.join(o for o in map(chr, range(33, 127)) if o not in '",;\\')
    with load_embedder(folder).explore(browser=False, token=token) as s:
        def _get(path, **headers):
            h = http.client.HTTPConnection('127.0.0.1', s.port, timeout=20)
            h.request('GET', path, headers=headers)
            return h.getresponse()
        res = _get(s.url[s.url.index('/?'):])
        assert res.status==200 and _get('/gallery', authorization=f'Bearer {token}').status==200
        assert _get('/gallery', cookie=res.headers['set-cookie'].partition('; ')[0]).status==200 and _get('/gallery').status==401

@pytest.mark.parametrize('kwargs', [dict(content=b''), dict(content=b'x'), dict(json=[]), dict(json=dict(images='a')),
    dict(json=dict(images=['%%%'])),
    dict(json=dict(image=3)), dict(content=b'{', headers={'content-type':'application/json'}), dict(content=b'x',
    headers={'content-type':'multipart/form-data'}),
    dict(content=b'x', headers={'content-type':'multipart/form-data; boundary=a'}), dict(content=png(), params=dict(k='0')),
    dict(content=png(), params=dict(k='x')),
    dict(content=png(), params=dict(unknown='maybe')), dict(content=png(), params=dict(rerank='none')),
    dict(files=[('image',('a.png',png()))]*5)],
    ids=lambda o: str(o)[:40])
def test_what_the_server_cannot_read_is_said(api, kwargs):
    res = api.post('/search', **kwargs)
    assert res.status_code==400 and list(res.json())==['error'] and res.json()['error']

def test_the_server_has_the_same_limits(api, folder):
    assert api.post('/search', content=b'x'*(10**6+1)).status_code==413
    assert api.get('/health', headers=dict(host='evil')).status_code==403 and api.get('/health',
        headers=dict(origin='http://evil')).status_code==403
    assert api.get('/health', headers=dict(authorization='Bearer x')).status_code==401
    server = Server(Items(load_embedder(folder)), read_only=True)
    c = TestClient(server.app(hosts, ''), base_url='http://127.0.0.1:8000')
    assert c.post('/items?label=a', content=png()).status_code==403 and c.request('DELETE', '/items',
        json=dict(numbers=[0])).status_code==403
    assert c.get('/health').status_code==200 and c.post('/search', content=png()).status_code==200
    server.batched.stop()
    with pytest.raises(ValueError, match='set a `token`'): serve(load_embedder(folder), host='0.0.0.0')

def test_two_hundred_clients_at_once(own, few):
    "Each adds an image of its own and finds it; none fails, none is lost, and the network is called for many at once"
    n = len(own)
    with serve(own, token='t') as s:
        gate = threading.Barrier(200)
        def _client(k):
            rng = np.random.default_rng(k)
            f = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (6,6,3), dtype=np.uint8)).resize((24,24), 0).save(f, 'PNG')
            h = http.client.HTTPConnection('127.0.0.1', s.port, timeout=60)
            gate.wait()
            res = []
            for path in (f'/items?label=c{k}','/search?k=1&unknown=0'):
                h.request('POST', path, f.getvalue(), {'authorization':'Bearer t', 'content-type':'image/png'})
                r = h.getresponse()
                res.append((r.status,json.loads(r.read())))
            return res
        with ThreadPoolExecutor(200) as pool: got = [*pool.map(_client, range(200))]
        sizes = s.what.batched.sizes
    assert {status for o in got for status,_ in o}=={200}
    assert [o[1][1]['results'][0][0]['label'] for o in got]==[f'c{k}' for k in range(200)]
    assert len({o[0][1]['numbers'][0] for o in got})==200 and sum(sizes)==400 and max(sizes)>8 and max(sizes)<=32
    again = load_embedder(own.gallery.journal.folder)
    assert len(own)==len(again)==n+200 and {f'c{k}' for k in range(200)}<=set(again.labels)

def test_an_image_that_fails_does_not_fail_for_others():
    class Net(torch.nn.Module):
        def forward(self, x):
            if (x>.9).all((1,2,3)).any(): raise RuntimeError('too bright')
            return x.mean((2,3))
    b = Batched(ImageEmbedder(Net(), Preprocess()), wait=.3)
    ims = [np.full((4,4,3), c, dtype=np.uint8) for c in (0,255,51)]
    with ThreadPoolExecutor(3) as pool: got = [pool.submit(b, o) for o in ims]
    assert torch.allclose(got[0].result(), torch.zeros(3)) and torch.allclose(got[2].result(), torch.full((3,), .2))
    with pytest.raises(RuntimeError, match='too bright'): got[1].result()
    b.stop()

# ---- in a browser ----

@pytest.fixture(scope='module')
def site(folder, tmp_path_factory):
    "An explorer and a browser for all tests"
    if chromium is None: pytest.skip('there is no Chromium')
    tmp = tmp_path_factory.mktemp('browser')
    where = load_embedder(folder).save(tmp/'glyphs')
    finder = load_embedder(where, write=True)
    finder.add([open_image(finder.items[40])], finder.labels[0] if finder.labels[0]!=evil else 'other',
        [finder.items[40]+' again']) # suspicious
    finder.add([open_image(finder.items[80])], 'something', [finder.items[80]+' again'])
    with finder.explore(browser=False, token='t', name='glyphs') as s, Browser(tmp/'profile') as b:
        b.url,b.where,b.tmp = s.url.partition('/?')[0],where,tmp
        b.go(s.url)
        yield b

@pytest.fixture
def page(site):
    yield site
    assert site.faults==[] and not [o for o in site.urls if not o.startswith(site.url)] and site.eval('document.title').find('hacked')<0
    assert site.eval("document.querySelectorAll('img[src=x]').length")==0
    site.urls.clear()

ready = dict(search="document.querySelectorAll('.card img').length>5", map="document.querySelector('.dm-canvas')!==null",
    mistakes="document.querySelector('#roc .curve')!==null", labels="document.querySelector('.two')!==null",
    gallery="document.querySelectorAll('.class').length>5")

@pytest.mark.parametrize('width,dark', [(1280,False), (1280,True), (390,False), (390,True)])
def test_every_view_fits(page, width, dark):
    "Nothing is wider than the window, the colours are those that the reader prefers, and pictures arrive"
    page.look(width, 800, dark)
    for view,js in ready.items():
        page.go(page.url+dict(search='/?q=3').get(view, f'/{view}'))
        page.wait(js)
        assert page.eval('document.documentElement.scrollWidth')<=width, view
        light = page.eval("getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a+b)/3")
        assert (light<60)==dark and (light>200)!=dark
        page.wait("[...document.images].filter(o => o.getBoundingClientRect().top<innerHeight).every(o => o.complete)")
        assert page.eval("[...document.images].filter(o => o.complete && o.src && !o.naturalWidth && o.id!=='zoomed').length")==0
        assert page.eval("document.querySelector('nav [aria-current]').textContent.toLowerCase()")==view

def choose(page, selector, *files):
    "Give files to an input"
    root = page.call('DOM.getDocument')['root']['nodeId']
    node = page.call('DOM.querySelector', nodeId=root, selector=selector)['nodeId']
    page.call('DOM.setFileInputFiles', files=[str(o) for o in files], nodeId=node)

def put(page, selector, value):
    "Set a control, as a person does"
    page.eval(f"(o => {{ o.value = {value!r}; for (const e of ['input','change']) o.dispatchEvent(new Event(e, {{bubbles:true}})) }})"
        f"(document.querySelector({selector!r}))")

@pytest.mark.parametrize('width', [1280,390])
def test_search_by_a_file(page, width, few):
    page.look(width, 800)
    page.go(page.url+'/')
    page.wait(ready['search'])
    file = few.path/few.df.path[50]
    choose(page, '#photo', file)
    page.wait("!!document.querySelector('.asked') && !!document.querySelector('.score')")
    label = few.df.label[50]
    texts = [page.eval(f"document.querySelector('{o}').textContent") for o in ('#found h2','.card .label','.card .score')]
    assert texts==[label,label,'1.000']
    assert page.eval("document.querySelectorAll('#found .card').length")==12
    put(page, '#k', 4)
    page.wait("document.querySelectorAll('#found .card').length===4")
    put(page, '#rerank', 'qe')
    page.wait("!!document.querySelector('#side')")
    page.eval("document.querySelector('#side').click()")
    page.wait("document.querySelectorAll('.sides .card').length===8")
    asked = page.eval("location.search")
    page.eval("document.querySelector('.card > a').click()") # one click: its own neighbours
    page.wait(f"location.search!=={asked!r} && !!document.querySelector('.facts')")
    page.eval("history.back()")
    page.wait(f"location.search==={asked!r} && !document.querySelector('.facts') && document.querySelectorAll('.sides .card').length===8")

def test_a_file_that_is_no_image_is_said(page, tmp_path):
    page.look(1280, 800)
    page.go(page.url+'/')
    (tmp_path/'a.png').write_text('<b>none</b>')
    choose(page, '#photo', tmp_path/'a.png')
    page.wait("!!document.querySelector('#toast.shown')")
    assert 'cannot be read' in page.eval("document.querySelector('#toast').textContent")
    assert [o for o in page.faults if '400' not in o]==[]
    page.faults.clear() # the answer with 400 is what was tested

def test_keys(page):
    page.look(1280, 800)
    page.go(page.url+'/?q=3')
    def key(k, code=0): 
        for t in ('keyDown','keyUp'): page.call('Input.dispatchKeyEvent', type=t, key=k, windowsVirtualKeyCode=code,
            **(dict(text=k) if len(k)==1 and t=='keyDown' else {}))
    key('ArrowRight', 39)
    assert page.eval("document.activeElement.matches('.card:first-child > a')")
    key('ArrowRight', 39)
    assert page.eval("[...document.querySelectorAll('.card > a')].indexOf(document.activeElement)")==1
    key(' ', 32)
    page.wait("document.querySelector('#zoom').open && document.querySelector('#zoomed').naturalWidth>0")
    key('Escape', 27)
    page.wait("!document.querySelector('#zoom').open")
    key('/', 191)
    assert page.eval("document.activeElement.id")=='label'
    page.call('Input.insertText', text='Latin')
    page.eval("document.activeElement.form.requestSubmit()")
    page.wait("location.search.includes('label=Latin')")
    page.eval("document.activeElement.blur()")
    page._loaded = False
    key('5', 53)
    page.wait("location.pathname==='/gallery'")

@pytest.mark.parametrize('width', [1280,390])
def test_a_click_on_the_map_shows_neighbours(page, width):
    page.look(width, 800)
    page.go(page.url+'/map')
    page.wait(ready['map'])
    r = page.eval("document.querySelector('.dm-canvas').getBoundingClientRect().toJSON()")
    x,y = r['left']+r['width']/2,r['top']+r['height']/2
    def _click(x, y):
        for t in ('mousePressed','mouseReleased'): page.call('Input.dispatchMouseEvent', type=t, x=x, y=y, button='left', clickCount=1)
    for dx,dy in [(0,0)]+[(30*i,30*j) for i in range(-5, 6) for j in range(-4, 5)]:
        _click(x+dx, y+dy)
        if page.eval("document.querySelector('.dm-panel').hidden===false"): break
    page.wait("document.querySelectorAll('.dm-tile').length>=5")
    assert page.eval("[...document.querySelectorAll('.dm-tile img')].every(o => new URL(o.src).pathname.startsWith('/image/'))")
    page.click("document.querySelector('.dm-open')")
    page.wait("location.pathname==='/' && !!document.querySelector('.facts')")

@pytest.mark.parametrize('width', [1280,390])
def test_no_photo_of_the_map_is_cut(page, width):
    page.look(width, 800)
    page.go(page.url+'/map')
    page.wait(ready['map'])
    page.wait("document.querySelector('#map').dmlMap.boxes().length>5")
    inside = """(() => { const m = document.querySelector('#map').dmlMap, s = m.side()/2+2, o = document.querySelector('.dm-canvas')
        return m.boxes().every(([x, y]) => x>=s && y>=s && x<=o.clientWidth-s && y<=o.clientHeight-s) })()"""
    assert page.eval(inside)
    page.eval("document.querySelector('#map').dmlMap.view.tx -= 60")
    assert not page.eval(inside)

def test_the_slider_recounts(page):
    page.look(1280, 800)
    page.go(page.url+'/mistakes')
    page.wait("document.querySelector('#missedcount') && document.querySelector('#missedcount').textContent")
    d = page.eval("fetch('/threshold.json').then(r => r.json())")
    for i in (0,137,len(d['threshold'])-1):
        put(page, '#cutter', i)
        assert page.eval("document.querySelector('#cut').value")==f"{d['threshold'][i]:.3f}"
        assert page.eval("document.querySelector('#missedcount').textContent")==f"{d['missed'][i]:,} of {d['n_genuine']:,}"
        assert page.eval("document.querySelector('#falsecount').textContent").startswith(f"{d['false'][i]:,} of {d['n_impostor']:,}")
    legend = [f"{d['threshold'][0]:.2f}",'false matches','missed pairs',f"{d['threshold'][-1]:.2f}"] # the chart's ends and colours
    assert page.eval("[...document.querySelectorAll('.legend span')].map(o => o.textContent)")==legend
    page.eval("document.querySelector('#rates button').click()")
    assert page.eval("document.querySelector('#rates button').getAttribute('aria-pressed')")=='true'

@pytest.mark.parametrize('width', [1280,390])
def test_labels_are_reviewed_with_undo(page, width):
    page.look(width, 800)
    page.go(page.url+'/labels')
    page.wait(ready['labels'])
    def now(): return page.eval("document.querySelector('#deciding') && document.querySelector('#deciding').dataset.item")
    def done(): return int(page.eval("document.querySelector('.because').textContent.split(' ')[0].replace(',', '')"))
    first,n = now(),done()
    press = "dispatchEvent(new KeyboardEvent('keydown', {key:'%s', bubbles:true}))"
    page.eval("document.body."+press%'w')
    page.wait(f"!document.querySelector('#deciding') || document.querySelector('#deciding').dataset.item!=={first!r}")
    assert done()==n+1 and len((page.where/'review.csv').read_text().splitlines())>=2
    assert page.eval("document.querySelector('.because code').textContent")==str(page.where/'review.csv')
    page.eval("document.body."+press%'u')
    page.wait(f"document.querySelector('#deciding') && document.querySelector('#deciding').dataset.item==={first!r}")
    assert done()==n
    page.eval("document.querySelector('#other').value = 'a new <class>'")
    page.eval("document.querySelector('[data-decide=other]').click()")
    page.wait(f"!document.querySelector('#deciding') || document.querySelector('#deciding').dataset.item!=={first!r}")
    assert done()==n+1 and 'a new <class>' in (page.where/'review.csv').read_text()
    page.eval("document.querySelector('[data-decide=undo]').click()")
    page.wait(f"document.querySelector('#deciding') && document.querySelector('#deciding').dataset.item==={first!r}")

@pytest.mark.parametrize('width', [1280,390])
def test_a_class_is_added_renamed_and_removed(page, width, tmp_path):
    page.look(width, 800)
    for o in ('red','blue'): (tmp_path/f'{o}{width}.png').write_bytes(png(o, (30+width//10,40)))
    page.go(page.url+'/gallery')
    page.eval("document.querySelector('.adding').open = true")
    name = f'<i>new</i> {width}'
    page.eval(f"document.querySelector('#newlabel').value = {name!r}")
    choose(page, '#photos', *sorted(tmp_path.glob('*.png')))
    page.wait("document.querySelectorAll('.pick').length===2")
    assert page.eval("document.querySelector('h2').textContent")==name and load_embedder(page.where).labels.count(name)==2
    page.eval("document.querySelector('[name=new]').value = 'newer & <b>'")
    page.eval("document.querySelector('[data-post]').requestSubmit()")
    page.wait("document.querySelector('h2').textContent==='newer & <b>'")
    page.eval("document.querySelector('.pick input').click()")
    page.wait("!document.querySelector('[data-remove=selected]').disabled")
    page.eval("document.querySelector('[data-remove=selected]').click()")
    page.eval("document.querySelector('#sureyes').click()")
    page.wait("document.querySelectorAll('.pick').length===1")
    page.eval("document.querySelector('[data-remove=all]').click()")
    assert 'newer & <b>' in page.eval("document.querySelector('#sureof').textContent")
    page.eval("document.querySelector('#sureyes').click()")
    page.wait("document.querySelectorAll('.class').length>0")
    assert not {name,'newer & <b>'} & set(load_embedder(page.where).labels) and [*(page.where/'photos').iterdir()]==[]

# ---- from the shell ----

def started(command, *args, cwd):
    "A command as a process of its own"
    code = (f"import sys; from dmlfast.cli import {command} as f; from dmlfast.cli.commands import run_command\n"
        "sys.exit(run_command(f, sys.argv[1:]))")
    return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=cwd, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # it may be ignored where tests run behind

def asked(url, path, **headers):
    "Status and body"
    host = re.match(r'http://([^/]+)', url)[1]
    h = http.client.HTTPConnection(host, timeout=30)
    h.request('GET', path, headers=headers)
    res = h.getresponse()
    return res.status,res.read()

def test_explore_and_serve_as_commands(own, tmp_path):
    "Each says its address, answers there, and ends with Ctrl-C"
    where = own.gallery.journal.folder
    ps = [started('dmlfast_explore', where, '--no-browser', '--read-only', cwd=tmp_path),
        started('dmlfast_serve', where, '--port', 0, '--token', 'secret', cwd=tmp_path)]
    try:
        url,url2 = (o.stdout.readline().strip() for o in ps)
        status,body = asked(url, url[url.index('/?'):])
        assert status==200 and f'{len(own):,} items' in body.decode() and 'read-only' in body.decode()
        assert json.loads(asked(url2, '/health', authorization='Bearer secret')[1])['items']==len(own) and asked(url2, '/health')[0]==401
    finally:
        for p in ps: p.send_signal(signal.SIGINT)
        ends = [p.communicate(timeout=30)[1] for p in ps]
    assert [p.returncode for p in ps]==[0,0] and ends==['','']

def test_a_data_set_is_explored_and_not_put_into_the_folder(own, few):
    from dmlfast.cli.exploring import explored
    where = own.gallery.journal.folder
    before = all_files(where)
    finder,image,_ = explored(where, str(few.path), None, None, 'val', None, 64, 0, 'cpu', True)
    assert set(finder.gallery.facts['split'])=={'val'}
    assert 0<len(finder)!=len(own) and finder.gallery.journal is None and all_files(where)==before
    i = Items(finder, image)
    assert np.array_equal(np.asarray(i.pictures.image(5)), np.asarray(open_image(finder.items[5])))

def test_what_cannot_be_explored_is_said(own, tmp_path, capsys, monkeypatch):
    from dmlfast.cli import dmlfast_explore, dmlfast_serve
    from dmlfast.cli.commands import run_command
    monkeypatch.chdir(tmp_path)
    def said(f, *args):
        status = run_command(f, [*map(str, args)])
        err = capsys.readouterr().err.strip()
        assert status==2 and '\n' not in err
        return err
    where = own.gallery.journal.folder
    empty = load_embedder(where)
    empty.remove(label=lambda o: True)
    empty.save(tmp_path/'empty')
    assert 'neither a run of dmlfast-train nor an exported embedder: name the embedder first' in said(dmlfast_explore, tmp_path)
    assert 'has no gallery' in said(dmlfast_explore, tmp_path/'empty')
    assert 'set a `token`' in said(dmlfast_serve, where, '--host', '0.0.0.0')
    assert '--batch' in said(dmlfast_serve, where, '--batch', 0)
    monkeypatch.setattr('dmlfast.web.app.needs_explore', lambda: (_ for _ in ()).throw(ImportError("pip install 'dmlfast[explore]'.")))
    assert run_command(dmlfast_explore, [str(where)])==1 and "dmlfast[explore]" in capsys.readouterr().err

def test_without_the_extra_one_sentence_says_so(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'fasthtml.core', None)
    with pytest.raises(ImportError, match=r"pip install 'dmlfast\[explore\]'"): load_embedder(folder).explore(browser=False)

def test_decisions_have_a_file_without_being_told(folder, own, few, tmp_path, monkeypatch):
    "Beside a gallery that can be written to, else in the current folder; the page says where, and whether it may be decided"
    monkeypatch.chdir(tmp_path)
    assert Explorer(Items(own)).review_file==own.folder/'review.csv'
    assert Explorer(Items(own), review='mine.csv').review_file==Path('mine.csv')
    monkeypatch.setattr('os.access', lambda *a: False)
    c = client(load_embedder(folder))
    assert c.x.review_file==Path('review.csv') and 'kept in <code' in c.get('/labels?now=1').text
    n = c.x.suspects()[0]['n']
    assert c.post('/change/decide', json=dict(n=n, decision='wrong')).json()==dict(done=1)
    assert c.x.items.name(n) in (tmp_path/'review.csv').read_text()
    text = client(load_embedder(folder), read_only=True).get('/labels?now=1').text
    assert 'this gallery is read-only' in text and 'kept in' not in text and 'data-decide' not in text

def test_a_learner_is_explored(make_learner):
    learn = make_learner()
    with learn.explore(browser=False, token='t') as s:
        items = s.what.items
        want = learn.embedded()
        assert len(items)==len(want) and items.gallery.labels==[want.label(i) for i in range(len(want))]
        assert torch.allclose(items.gallery.embs, want.embs) and np.array_equal(np.asarray(items.pictures.image(3)),
            np.asarray(want.draw(3).convert('RGB')))
        assert s.what.review_file==Path('review.csv')

def test_a_page_of_plain_files(folder, tmp_path):
    finder = load_embedder(folder)
    finder.remove(item=lambda o: o not in finder.items[:30])
    page = finder.explore(static=tmp_path/'page')
    assert page.read_text().startswith('<!DOCTYPE html>') and evil.encode() not in page.with_name('data.js').read_bytes()
