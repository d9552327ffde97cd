"What a browser shows of a gallery: numbers by brute force, decisions that survive, and the map in headless Chromium"
import csv, json, os, signal, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from dmlfast.data.tables import MetricDataset
from dmlfast.data import leaks # which gives `without` and `relabel`
from dmlfast.files.review import LabelReview
from dmlfast.files.writing import whole_folder
from dmlfast.retrieval.embedded import Embedded
from dmlfast.retrieval.maps import layout
from dmlfast.web.static import as_script, static_page
from dmlfast.web.views import colours_apart, map_data, map_positions, mistakes, sheet, slots, some_items, suspects, threshold_counts
from browser import Browser, chromium

evil = '</script><img src=x onerror="document.title=1">' # a class that would be HTML

def groups(n=8, each=20, noise=1., seed=0):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(n), each)
    return (3*rng.normal(size=(n,16)))[y]+noise*rng.normal(size=(n*each,16)),y

def cosines(x):
    x = np.asarray(x, np.float64)
    x = x/np.linalg.norm(x, axis=1, keepdims=True)
    return x@x.T

def own_share(xy, y, k=5):
    d = np.linalg.norm(xy[:,None]-xy, axis=-1)
    np.fill_diagonal(d, np.inf)
    return (y[d.argsort(1)[:,:k]]==y[:,None]).mean()

# ---- places ----
@pytest.mark.parametrize('most', [1000,60]) # all by t-SNE, and a part of them with the others beside
def test_neighbours_stay_together(most):
    x,y = groups()
    xy = layout(x, most=most)
    assert xy.shape==(160,2) and own_share(xy, y)>.9
    np.testing.assert_array_equal(layout(x, most=most), xy)
    a = map_positions(Embedded(x, y), most=most)
    assert a.min()==0 and a.max()==1 and own_share(a, y)>.9
    for d in range(2): assert (np.argsort(a[:,d], kind='stable')==np.argsort(xy[:,d], kind='stable')).all() # who is left of whom

def test_components_are_those_of_numpy():
    x,_ = groups()
    u = x/np.linalg.norm(x, axis=1, keepdims=True)
    u,s,_ = np.linalg.svd(u-u.mean(0), full_matrices=False)
    got = layout(x, 'pca')
    for d in range(2): assert abs(np.corrcoef(got[:,d], u[:,d])[0,1])>.9999

@pytest.mark.parametrize('x', [np.ones((1,4)), np.ones((2,4)), np.eye(3), np.ones((9,4)), np.ones((6,1)), np.eye(5)])
def test_few_items_and_equal_ones_have_places(x):
    d = map_data(Embedded(x))
    xy = np.array([d['x'],d['y']])
    assert np.isfinite(xy).all() and xy.min()>=0 and xy.max()<=1
    assert d['c']==[0]*len(x) and d['classes']==[''] and sorted(d['slot'])==[*range(len(x))] and json.dumps(d)

def test_classes_side_by_side_have_other_colours():
    rng = np.random.default_rng(0)
    mid = rng.random((200,2))
    c = np.repeat(np.arange(200), 3)
    col = colours_apart(mid[c], c)
    d = np.linalg.norm(mid[:,None]-mid, axis=-1)
    np.fill_diagonal(d, 9)
    assert set(col)==set(range(12)) and (col[d.argmin(1)]!=col).all()
    assert np.bincount(col).max()<=2*np.bincount(col).min()

def test_a_sheet_has_neighbours():
    xy = np.random.default_rng(0).random((400,2))
    at = np.argsort(slots(xy))
    step = np.linalg.norm(np.diff(xy[at], axis=0), axis=1).mean()
    assert step<.35*np.linalg.norm(np.diff(xy, axis=0), axis=1).mean()
    im = sheet([Image.new('RGB', (30,10), 'red'),None,Image.new('L', (5,5), 255)], 8, 2)
    assert im.size==(16,16) and [im.getpixel(o) for o in ((0,0),(1,9))]==[(255,0,0),(255,255,255)]

# ---- mistakes ----
def test_worst_queries_and_their_neighbours():
    x,y = groups(noise=3)
    e = Embedded(x, y, vocab=[f'c{i}' for i in range(8)])
    got,s = mistakes(e, n=5, k=3, pairs=4, each=2),cosines(x)
    np.fill_diagonal(s, -9)
    order = np.argsort(-s, 1)[:,:-1]
    hit = y[order]==y[:,None]
    ap = ((hit.cumsum(1)/np.arange(1, hit.shape[1]+1))*hit).sum(1)/hit.sum(1)
    assert [o['ap'] for o in got['queries']]==[round(v, 4) for v in np.sort(ap)[:5]]
    for o in got['queries']:
        q = o['row']
        assert [a['row'] for a in o['found']]==order[q][:3].tolist() and [a['right'] for a in o['found']]==hit[q][:3].tolist()
    first,pairs = order[:,0],{}
    for q in range(160):
        if y[first[q]]!=y[q]: pairs.setdefault((f'c{y[q]}',f'c{y[first[q]]}'), []).append(q)
    assert sorted((o['count'] for o in got['pairs']), reverse=True)==sorted(map(len, pairs.values()), reverse=True)[:4]
    for o in got['pairs']:
        qs = sorted(pairs[o['query'],o['found']], key=lambda q: -s[q,first[q]])[:2]
        assert [(a['query'],a['found']) for a in o['cases']]==[(q,first[q]) for q in qs] and o['of']==20
    json.dumps(got)

def test_where_nothing_can_be_found():
    got = mistakes(Embedded(np.eye(4), range(4)))
    assert got['queries']==[] and len(got['pairs'])==4
    with pytest.raises(ValueError, match='no labels'): mistakes(Embedded(np.eye(4)))

def test_queries_find_only_the_gallery():
    x,y = groups(noise=3)
    role = np.where(np.arange(160)%2, 'query', 'gallery')
    for o in mistakes(Embedded(x, y, role=role), n=9)['queries']: assert o['row']%2 and not any(a['row']%2 for a in o['found'])

# ---- thresholds ----
def test_each_threshold_counts_pairs():
    x,y = groups(noise=3)
    got,s = threshold_counts(Embedded(x, y), n=50),cosines(x.astype(np.float32))
    upper = np.triu_indices(160, 1)
    s,same = s[upper],(y[:,None]==y)[upper]
    assert (got['n_genuine'],got['n_impostor'],got['items'])==(same.sum(),(~same).sum(),160) and len(got['threshold'])==50
    for t,f,m in list(zip(got['threshold'], got['false'], got['missed']))[1:-1]:
        for eps in (-2e-5,2e-5): assert ((s[~same]>=t+eps).sum()-f)*eps<=0 and ((s[same]<t+eps).sum()-m)*eps>=0 # t is rounded
    assert (got['false'][0],got['missed'][0])==((~same).sum(),0)
    assert np.all(np.diff(got['fmr'])<=0) and np.all(np.diff(got['tmr'])<=0)
    json.dumps(got, allow_nan=False)

def test_of_many_items_some_are_compared():
    x,y = groups()
    got = threshold_counts(Embedded(x, y), most=50)
    assert got['items']==50 and got['n_genuine']+got['n_impostor']==50*49/2
    with pytest.raises(ValueError, match='both kinds are needed'): threshold_counts(Embedded(x, [0]*160))

def test_some_items_keep_what_is_known():
    x,y = groups()
    e = Embedded(x, y, [f'{i}.png' for i in range(160)], [f'c{i}' for i in range(8)], lambda i: i, role=['query','gallery']*80)
    some,rows = some_items(e, 40)
    assert (np.diff(rows)>0).all() and [some.item(i) for i in range(40)]==[f'{i}.png' for i in rows]
    assert [some.label(i) for i in range(40)]==[e.label(i) for i in rows] and [some.draw(i) for i in range(40)]==rows.tolist()
    assert (some.role==e.role[rows]).all() and some_items(e, 160)[0] is e

# ---- suspects ----
def test_a_wrong_label_a_duplicate_and_a_leak():
    x,y = groups(4, 10, noise=.5)
    x,y = np.r_[x,x[[25]]],[*y,2]
    y[3] = 1 # of class 0
    part = ['train']*20+['test']*21
    part[25],part[40] = 'train','test'
    found = suspects(Embedded(x, y), label_sim=.5, same_sim=.9999)
    first = [o for o in found if o['kind']=='label'][0]
    assert (first['row'],first['label'],first['other'],first['agree'])==(3,'1','0',0)
    assert [(o['row'],o['beside'],o['score']) for o in found if o['kind']=='duplicate']==[(40,25,1.0)]
    leaks = [o for o in suspects(Embedded(x, y), label_sim=.5, same_sim=.9999, parts=part) if o['kind']=='leak']
    assert [(o['row'],o['beside']) for o in leaks]==[(25,40)] # the training image can go
    assert len({o['row'] for o in found})==len(found) and json.dumps(found)

# ---- decisions ----
items,labels = [f'{i}.jpg' for i in range(6)],['cat']*3+['dog']*3
def review(file, items=items, labels=labels): return LabelReview(file, items, labels)

def test_decisions_are_read_back(tmp_path):
    a = review(tmp_path/'r.csv')
    assert not (tmp_path/'r.csv').exists() and len(a)==0
    a.decide('0.jpg', 'right')
    a.decide('1.jpg', 'wrong')
    a.decide('1.jpg', 'other', 'dog')
    b = review(tmp_path/'r.csv')
    assert b.decisions==a.decisions and (b.wrong,b.other)==([],{'1.jpg':'dog'})
    assert b.undo().decision=='other' and b.wrong==['1.jpg'] # what was decided before counts again
    assert b.undo().item=='1.jpg' and b.undo().item=='0.jpg' and b.undo() is None
    a.decide('2.jpg', 'skip') # the first window sees what the second one did
    assert [*a.decisions]==['2.jpg'] and len((tmp_path/'r.csv').read_text().splitlines())==1+3+3+1

def test_names_of_any_kind(tmp_path):
    odd = ['a,"b".jpg','line\nbreak.jpg','\udcff.jpg','=1+1','é\r.jpg',evil]
    a = review(tmp_path/'r.csv', odd, ['x\n"y"']*6)
    for o in odd: a.decide(o, 'other', f'of {o}')
    assert review(tmp_path/'r.csv', odd, ['x\n"y"']*6).other=={o:f'of {o}' for o in odd}
    assert list(pd.read_csv(tmp_path/'r.csv', encoding_errors='replace').item)[:2]==odd[:2]

@pytest.mark.parametrize('cut', range(1, 80, 7))
def test_half_a_line_is_passed_over(tmp_path, cut):
    a = review(tmp_path/'r.csv')
    for o in ('0.jpg','1.jpg'): a.decide(o, 'wrong')
    raw = (tmp_path/'r.csv').read_bytes()
    tail = b'3.jpg,"'+b'x\n'*150 if cut%2 else b'' # half a line that is longer than the next one, of a name with line breaks
    (tmp_path/'r.csv').write_bytes(raw+tail if tail else raw[:-cut])
    b = review(tmp_path/'r.csv')
    assert [*b.decisions] in (['0.jpg','1.jpg'] if tail else ['0.jpg'],[])
    b.decide('2.jpg', 'other', 'a "cat"')
    assert [*review(tmp_path/'r.csv').decisions]==[*b.decisions] and b.other=={'2.jpg':'a "cat"'}

def test_no_decision_is_lost_by_a_killed_process(tmp_path):
    code = ("import sys; from dmlfast.files.review import LabelReview\n"
        "r = LabelReview(sys.argv[1], map(str, range(10**5)), ['x']*10**5)\n"
        "for i in range(10**5):\n    r.decide(str(i), 'wrong'); print(i, flush=True)")
    p = subprocess.Popen([sys.executable, '-c', code, tmp_path/'r.csv'], stdout=subprocess.PIPE, text=True)
    for _ in range(25): p.stdout.readline()
    p.send_signal(signal.SIGKILL)
    told = 24+len(p.stdout.read().splitlines())
    p.wait()
    got = LabelReview(tmp_path/'r.csv', map(str, range(10**5)), ['x']*10**5)
    assert len(got)>=told+1 and got.wrong==[str(i) for i in range(len(got))]

def test_each_line_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, 'fsync', lambda fd: synced.append(os.fstat(fd).st_size))
    a = review(tmp_path/'r.csv')
    for o in items: a.decide(o, 'right')
    a.undo()
    assert (tmp_path/'r.csv').stat().st_size in synced and len(synced)==len(items)+1+1 # and the folder, for a new file

def test_a_write_that_fails_decides_nothing(tmp_path, monkeypatch):
    a = review(tmp_path/'r.csv')
    a.decide('0.jpg', 'right')
    def full(fd): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        with pytest.raises(OSError): a.decide('1.jpg', 'wrong')
    assert [*a.decisions]==['0.jpg']

def test_a_file_of_other_data_is_refused(tmp_path):
    a = review(tmp_path/'r.csv')
    for i in range(5): a.decide(f'{i}.jpg', 'right' if i else 'wrong')
    before = (tmp_path/'r.csv').read_bytes()
    for other in (['x.jpg','y.jpg'],['a','b']), (items,['bird']*6): # other items, and the same names with other labels
        with pytest.raises(ValueError, match='another data set'): review(tmp_path/'r.csv', *other)
    assert len(review(tmp_path/'r.csv', items[1:], labels[1:]))==5 # one was left out since
    assert len(review(tmp_path/'r.csv', [*items,'new.jpg'], [*labels,'cow']))==5
    (tmp_path/'s.csv').write_text('path,label\na,b\n')
    with pytest.raises(ValueError, match='no review of labels'): review(tmp_path/'s.csv')
    (tmp_path/'t.csv').write_text('item,label,decision,other,time,data\n0.jpg,cat,maybe,,now,0\n')
    with pytest.raises(ValueError, match='it has a line'): review(tmp_path/'t.csv')
    assert (tmp_path/'r.csv').read_bytes()==before

def test_what_cannot_be_decided(tmp_path):
    a = review(tmp_path/'r.csv')
    for args,says in ((('x.jpg','right'),'no item'),(('','right'),'no item'),(('0.jpg','perhaps'),'A decision is'),
            (('0.jpg','other'),'A class is named'),(('0.jpg','wrong','dog'),'A class is named')):
        with pytest.raises(ValueError, match=says): a.decide(*args)
    assert not (tmp_path/'r.csv').exists()

def test_labels_may_change_after_decisions(tmp_path):
    "Each line has the label of its time; the items of now can be decided on, and no others"
    a = review(tmp_path/'r.csv')
    a.decide('0.jpg', 'right')
    a.follow([*items[1:],'new.jpg'], ['kitten']*2+['dog']*3+['cow'])
    for o in ('1.jpg','new.jpg'): a.decide(o, 'wrong')
    assert [(o.item,o.label) for o in a.log]==[('0.jpg','cat'),('1.jpg','kitten'),('new.jpg','cow')]
    with pytest.raises(ValueError, match='no item'): a.decide('0.jpg', 'right')
    assert len(review(tmp_path/'r.csv', [*items[1:],'new.jpg'], ['kitten']*2+['dog']*3+['cow']))==3

def table(**kwargs):
    df = pd.DataFrame(dict(path=[f'{i}.png' for i in range(12)], label=[i//3 for i in range(12)], split=['train']*6+['test']*6)|kwargs)
    return MetricDataset(df, 'photos', check_files=False)

def test_a_data_set_takes_the_decisions(tmp_path):
    ds = table()
    a = LabelReview(tmp_path/'r.csv', ds.items(), ds.df.label) # by whole paths; numbers as labels
    a.decide('photos/0.png', 'wrong')
    a.decide('photos/1.png', 'other', '3')
    a.decide('photos/2.png', 'right')
    for file in (tmp_path/'r.csv', a):
        with pytest.warns(UserWarning, match='one image only'): clean = ds.without(file).relabel(file)
        assert list(clean.df.path)==[f'{i}.png' for i in range(1, 12)]
        assert clean.df.loc[0,['label','split']].tolist()==[3,'test'] # to the split of its class
        with pytest.warns(UserWarning, match='one image only'): assert list(ds.relabel(file).without(file).df.label)==list(clean.df.label)
    assert list(ds.df.label)==[i//3 for i in range(12)] and len(ds)==12

def test_new_labels_by_path():
    ds = table(label=[f'c{i//3}' for i in range(12)])
    new = ds.relabel({'0.png':'new','photos/1.png':'new','2.png':'c2'})
    assert list(new.df.label[:4])==['new','new','c2','c1'] and list(new.df.split[:4])==['train','train','test','train']
    with pytest.raises(ValueError, match="has no image 'x.png'"): ds.relabel({'x.png':'c1'})

def test_decisions_on_other_data_change_nothing(tmp_path):
    a = review(tmp_path/'r.csv')
    a.decide('0.jpg', 'wrong')
    a.decide('1.jpg', 'other', 'dog')
    for f in 'without','relabel':
        with pytest.raises(ValueError, match='None of the 1 images'): getattr(table(), f)(tmp_path/'r.csv')
        with pytest.raises(ValueError, match='There is no review'): getattr(table(), f)(tmp_path/'none.csv')
    ds = table(path=[f'{i}.jpg' for i in range(12)])
    for f in 'without','relabel':
        with pytest.raises(ValueError, match='belongs to another data set'): getattr(ds, f)(tmp_path/'r.csv')

# ---- the page of plain files ----
def photos(n=8, each=20):
    x,y = groups(n, each)
    def draw(i): return Image.new('RGB', (40,30), tuple(int(o) for o in np.random.default_rng(int(y[i])).integers(0, 255, 3)))
    return Embedded(x, y, [f'<i>{i}</i>.png' for i in range(n*each)], [evil,*(f'class_{i}' for i in range(1, n))], draw)

@pytest.fixture(scope='module')
def page(tmp_path_factory):
    return static_page(photos(), tmp_path_factory.mktemp('static')/'map', title=f'A & {evil}')

def read(page): return json.loads((page.parent/'data.js').read_text(encoding='utf-8').splitlines()[0].removeprefix('window.dmlData = '))

def test_no_text_is_html(page):
    assert not set('<>&') & set((page.parent/'data.js').read_text(encoding='utf-8').splitlines()[0])
    html = page.read_text(encoding='utf-8')
    assert '<img' not in html and html.count('</script>')==2 and 'A &amp; &lt;/script&gt;' in html
    assert read(page)['classes'][0]==evil and read(page)['item'][3]=='<i>3</i>.png'
    for o in ('\u2028\u2029</script>','\udcff','é'): assert json.loads(as_script(o))==o and not set('<\u2028\u2029') & set(as_script(o))

def test_neighbours_are_those_of_a_search(page):
    s = cosines(photos().embs.numpy())
    np.fill_diagonal(s, -9)
    for i,row in enumerate(read(page)['near']):
        assert [j for j,_ in row]==np.argsort(-s[i], kind='stable')[:12].tolist()
        np.testing.assert_allclose([v for _,v in row], np.sort(s[i])[::-1][:12], atol=1e-4)

def test_photos_are_where_the_data_says(page):
    d,e = read(page),photos()
    for o in (d['sheets'],d['large']):
        per = o['cols']**2
        for i in (0,77,159):
            im = Image.open(page.parent/o['urls'][d['slot'][i]//per]).convert('RGB')
            j = d['slot'][i]%per
            got = im.getpixel((j%o['cols']*o['side']+o['side']//2, j//o['cols']*o['side']+o['side']//2))
            assert np.abs(np.array(got)-e.draw(i).getpixel((0,0))).max()<12

def test_a_page_does_not_say_where_it_was_made(tmp_path):
    x,y = groups(2, 3)
    e = Embedded(x, y, [f'/home/somebody/photos/{o}/{i}.jpg' for i,o in enumerate(y)])
    assert read(static_page(e, tmp_path/'map'))['item']==[f'{o}/{i}.jpg' for i,o in enumerate(y)]
    assert 'somebody' not in (tmp_path/'map'/'data.js').read_text()

def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    e,n = photos(),0
    def fails(i):
        if i>100: raise OSError('the disk is gone')
        return photos().draw(i)
    e.draw = fails
    with pytest.raises(OSError): static_page(e, tmp_path/'new'/'map')
    assert not any(tmp_path.iterdir())
    old = static_page(photos(2), tmp_path/'map')
    before = {o.name:o.read_bytes() for o in old.parent.iterdir()}
    with pytest.raises(OSError): static_page(e, tmp_path/'map', overwrite=True)
    assert {o.name:o.read_bytes() for o in old.parent.iterdir()}==before and [o.name for o in tmp_path.iterdir()]==['map']
    with pytest.raises(FileExistsError, match='overwrite=True'): static_page(photos(2), tmp_path/'map')
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'a.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='holds no map'): static_page(photos(2), tmp_path/'mine', overwrite=True)
    (tmp_path/'map'/'large-007.webp').write_text('of a larger map')
    (tmp_path/'map'/'CNAME').write_text('birds.example.org')
    static_page(photos(3), tmp_path/'map', overwrite=True, most=30)
    assert (tmp_path/'map'/'CNAME').read_text()=='birds.example.org' and not (tmp_path/'map'/'large-007.webp').exists()
    assert len(read(old)['x'])==30 and '30 of 60 photos' in old.read_text()

def test_items_without_photos_are_dots(tmp_path):
    x,y = groups(3, 5)
    d = read(static_page(Embedded(x, y), tmp_path/'map'))
    assert 'sheets' not in d and not [*(tmp_path/'map').glob('*.webp')]

def test_a_folder_takes_its_place_at_the_end(tmp_path):
    with whole_folder(tmp_path/'a'/'b') as tmp:
        (tmp/'x').write_text('1')
        assert not (tmp_path/'a'/'b').exists()
    with pytest.raises(KeyboardInterrupt):
        with whole_folder(tmp_path/'a'/'b') as tmp: raise KeyboardInterrupt
    assert (tmp_path/'a'/'b'/'x').read_text()=='1' and len([*(tmp_path/'a').iterdir()])==1

# ---- in a browser ----
needs_browser = pytest.mark.skipif(chromium is None, reason='there is no Chromium')

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp('profile'), args=['--hide-scrollbars']) as b: yield b

def mouse(b, kind, x, y, **kwargs): b.call('Input.dispatchMouseEvent', type=f'mouse{kind}', x=x, y=y, **kwargs)
def at(b, i):
    "Where an item is in the window"
    return np.add(b.eval('(o => [o.x,o.y])(document.querySelector("canvas").getBoundingClientRect())'), b.eval(f'page.at({i})')).tolist()
def click(b, x, y):
    for o in 'Pressed','Released': mouse(b, o, x, y, button='left', clickCount=1)
def key(b, k, **kwargs):
    for o in 'keyDown','keyUp': b.call('Input.dispatchKeyEvent', type=o, key=k, **kwargs)
def state(b): return b.eval('page.state')
def text(b, css): return b.eval(f'(document.querySelector({css!r}) || {{}}).textContent')

@needs_browser
@pytest.mark.parametrize('width,height', [(1280,820),(390,780)])
@pytest.mark.parametrize('dark', [False,True])
def test_the_page_in_a_browser(browser, page, width, height, dark):
    b = browser
    b.faults.clear(); b.urls.clear()
    b.look(width, height, dark)
    b.go(page.as_uri())
    b.wait('window.page && page.state.photos>5')
    assert b.eval('document.documentElement.scrollWidth')<=width and b.eval('document.querySelector("canvas").clientHeight')>height/2
    bar = b.eval('getComputedStyle(document.querySelector(".dm-bar")).backgroundColor')
    assert bar==('rgb(27, 29, 32)' if dark else 'rgb(255, 255, 255)')
    # a click shows the neighbours
    i = 25
    b.eval(f'page.show([{i}], .05)')
    b.wait(f'Math.abs(page.at({i})[0]-document.querySelector("canvas").clientWidth/2)<2')
    click(b, *at(b, i))
    b.wait('page.state.near.length==12')
    assert state(b)['selected']==i and [o[0] for o in state(b)['near']]==[o[0] for o in read(page)['near'][i]]
    assert text(b, '.dm-panel .dm-label')=='class 1' and b.eval('document.querySelectorAll(".dm-panel .dm-tile").length')==12
    assert text(b, '.dm-panel .dm-item')=='<i>25</i>.png'
    # a neighbour in the list is the next
    b.eval('document.querySelector(".dm-tile").click()')
    assert state(b)['selected']==read(page)['near'][i][0][0]
    key(b, 'Escape')
    # search by name: highlights, and Enter goes there
    b.eval('document.querySelector("input").focus()')
    b.call('Input.insertText', text='CLASS_7')
    assert state(b)['shown']==[*range(140, 160)] and text(b, '.dm-found')=='20 items' and text(b, '.dm-list li')=='class 7'
    key(b, 'Enter')
    b.eval('document.querySelector("input").value=""')
    b.call('Input.insertText', text='onerror')
    assert state(b)['shown']==[*range(20)] and text(b, '.dm-list li')==evil.replace('_', ' ')
    key(b, 'ArrowDown')
    assert b.eval('document.querySelector(".dm-list [aria-selected=true]").id')=='dm-list-0'
    b.call('Input.insertText', text=' nothing is called so')
    assert state(b)['shown']==[] and 'No class' in text(b, '.dm-found')
    key(b, 'Escape')
    assert state(b)['shown'] is None
    assert b.faults==[] and b.eval('document.title').startswith('A & </script>') and not b.eval('document.querySelector("img[src=x]")')
    assert b.urls and not [o for o in b.urls if not o.startswith((page.parent.as_uri(),'data:'))]

@needs_browser
def test_zoom_pan_hover_and_lasso(browser, page):
    b = browser
    b.faults.clear()
    b.look(1280, 820)
    b.go(page.as_uri())
    b.wait('window.page && page.state.photos>5')
    x,y = at(b, 40)
    mouse(b, 'Moved', x, y)
    b.wait('!document.querySelector(".dm-tip").hidden')
    under = text(b, '.dm-tip .dm-label')
    assert under in {'class '+str(i) for i in range(8)}|{evil}
    k = b.eval('page.view.k')
    mouse(b, 'Wheel', x, y, deltaX=0, deltaY=-240)
    b.wait(f'page.view.k>{k}*1.3')
    assert np.abs(np.subtract(at(b, 40), (x,y))).max()<1.5 # what is under the pointer stays there
    mouse(b, 'Pressed', x, y, button='left')
    mouse(b, 'Moved', x+60, y+30, button='left')
    mouse(b, 'Released', x+60, y+30, button='left')
    assert np.abs(np.subtract(at(b, 40), (x+60,y+30))).max()<1.5 and state(b)['selected']==-1
    b.eval('page.fit()')
    b.wait(f'Math.abs(page.view.k-{k})<1e-3')
    # around the items of one class, by shift
    pts = np.array([at(b, i) for i in range(60, 80)])
    (l,t),(r,m) = pts.min(0)-4,pts.max(0)+4
    shift = dict(button='left', modifiers=8)
    mouse(b, 'Pressed', l, t, **shift)
    for p in ((r,t),(r,m),(l,m)): mouse(b, 'Moved', *p, **shift)
    mouse(b, 'Released', l, m, **shift)
    everyone = np.array([at(b, i) for i in range(160)])
    inside = {i for i,(u,v) in enumerate(everyone) if l<u<r and t<v<m}
    assert set(state(b)['within'])==inside>=set(range(60, 80)) and text(b, '.dm-panel h2')==f'{len(inside)} items'
    key(b, 'Escape')
    assert state(b)['within'] is None and b.faults==[]

@needs_browser
def test_keys_and_fingers(browser, page):
    b = browser
    b.faults.clear()
    b.look(390, 780)
    b.go(page.as_uri())
    b.wait('window.page && page.state.photos>5')
    b.eval('document.querySelector("canvas").focus()')
    key(b, 'ArrowRight')
    first = state(b)['selected']
    assert first>=0
    key(b, 'ArrowRight')
    assert state(b)['selected']!=first and b.eval(f'page.at({state(b)["selected"]})[0]>page.at({first})[0]')
    key(b, 'Escape')
    k = b.eval('page.view.k')
    key(b, '+', text='+')
    assert b.eval('page.view.k')>k
    key(b, '0', text='0')
    b.wait(f'Math.abs(page.view.k-{k})<1e-3')
    key(b, '/', text='/')
    assert b.eval('document.activeElement.type')=='search' and b.eval('document.activeElement.value')==''
    def touch(kind, *pts):
        b.call('Input.dispatchTouchEvent', type=f'touch{kind}', touchPoints=[dict(x=x, y=y, id=i) for i,(x,y) in enumerate(pts)])
    touch('Start', (150,400), (250,400))
    touch('Move', (100,400), (300,400))
    touch('End')
    assert b.eval('page.view.k')==pytest.approx(2*k, rel=.05)
    b.eval('page.show([100], .1)')
    b.wait('Math.abs(page.at(100)[0]-195)<2')
    touch('Start', at(b, 100))
    touch('End')
    b.wait('page.state.selected==100')
    assert b.faults==[]

many = '''<!DOCTYPE html><html><head><meta charset="utf-8"><link rel="icon" href="data:,"><link rel="stylesheet" href="map.css"></head>
<body class="dm-page"><div id="map"></div><script src="map.js"></script><script>
const n = 10000, k = [...Array(n).keys()], random = i => { const v = Math.sin(i*12.9898)*43758.5453; return v-Math.floor(v) }
window.page = dmlMap(document.getElementById('map'), {
  x:k.map(i => (i%10+random(i))/10), y:k.map(i => (Math.floor(i/10)%10+random(i+n))/10), c:k.map(i => i%100),
  item:k.map(String), classes:k.slice(0, 100).map(i => 'class '+i), colour:k.slice(0, 100).map(i => i%12), slot:k.map(i => i%160),
  sheets:SHEETS, near:k.map(i => [[(i+1)%n, .9], [(i+100)%n, .8]])})
window.frames_ = async (f, m=25) => {
  const res = []
  for (let i=0; i<m; i++) { f(i); res.push(page.draw()); await new Promise(requestAnimationFrame) }
  return res.sort((a, b) => a-b)[m>>1]
}
</script></body></html>'''

@needs_browser
def test_ten_thousand_items_move_fluently(browser, page):
    b = browser
    b.faults.clear()
    b.look(1280, 820)
    (page.parent/'many.html').write_text(many.replace('SHEETS', as_script(read(page)['sheets'])))
    b.go((page.parent/'many.html').as_uri())
    b.wait('window.page && page.state.photos>100')
    steps = dict(pan='page.view.tx += 2', zoom='page.view.k *= 1.05', selected='if (!i) page.select(5000)')
    times = {k:b.eval(f'frames_(i => {{ {o} }})') for k,o in steps.items()}
    assert max(times.values())<60, times # milliseconds on a busy machine; 3 to 8 on an idle one
    assert b.eval('(() => { const t = performance.now(); page.find("class"); return performance.now()-t })()')<1500
    # photos that are drawn at one time do not overlap
    b.eval('page.find(""); page.clear()')
    for zoom in (1,3):
        b.eval(f'page.view.k *= {zoom}; page.draw()')
        boxes = np.array(b.eval('page.boxes()'))
        gap = np.abs(boxes[:,None]-boxes).max(-1)
        assert len(boxes)>20 and gap[~np.eye(len(boxes), dtype=bool)].min()>=b.eval('page.side()')
    assert b.faults==[]
