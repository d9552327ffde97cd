"The site: every public name has its card, no link is dead, and a reader's browser finds nothing to complain of"
import functools, http.server, importlib, re, shutil, sys, threading
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
import pytest
from dmlfast._modidx import d as modidx
from browser import Browser, chromium

root = Path(__file__).parent.parent
sys.path.insert(0, str(root/'docs'))
needs_browser = pytest.mark.skipif(chromium is None, reason='there is no Chromium on PATH: Debian has it in the package chromium')
rooms = [o.removeprefix('dmlfast.') for o,syms in modidx['syms'].items() if syms]

# what is written

class Text(HTMLParser):
    "Words of a page, without scripts"
    def __init__(self, html):
        super().__init__()
        self.words,self.skip = [],0
        self.feed(html)
    def handle_starttag(self, tag, attrs): self.skip += tag in ('script','style')
    def handle_endtag(self, tag): self.skip -= tag in ('script','style')
    def handle_data(self, data): self.words += [] if self.skip else [data]

def test_every_public_name_has_a_card_and_a_line(site):
    "On the page of its room, at the top of that page, and on the page of all names"
    every = (site/'reference.html').read_text(encoding='utf-8')
    for room in rooms:
        where = f"api/{room.replace('.', '/')}.html"
        page = (site/where).read_text(encoding='utf-8')
        head = page[:page.index('class="sig ')]
        for name in importlib.import_module(f'dmlfast.{room}').__all__:
            if f'"dmlfast.{room}.{name}"' not in page: # another room's, passed on
                home = importlib.import_module(f'dmlfast.{room}').__dict__[name].__module__
                assert home!=f'dmlfast.{room}', f'{room}.{name} has no card'
                continue
            for o,link in ((head,f'#dmlfast.{room}.{name}"'), (every,f'{where}#dmlfast.{room}.{name}"')):
                assert link in o, f'{room}.{name} is not listed'

def test_cards_say_what_the_code_says(site):
    pages = [(site/'api'/'losses'/f'{o}.html').read_text(encoding='utf-8') for o in ('base','triplet')]
    words = ' '.join(' '.join(o for page in pages for o in Text(page).words).split())
    assert 'class TripletLoss ( margin = 0.2 , gamma = 0.0' in words
    assert "Class of each row, (n,) integer" in words and 'Weight of the direction regulariser' in words
    every = ' '.join(o for f in (site/'api').rglob('*.html') for o in Text(f.read_text(encoding='utf-8')).words)
    assert '__main__' not in every and not re.search(r'(object|function \S+) at 0x', every)

def test_nbdevs_anchors_are_there(site):
    "README and other projects link to them"
    from dmlfast._modidx import d
    for room,syms in d['syms'].items():
        public = importlib.import_module(room).__all__
        wanted = [where.split('#') for full,(where,_) in syms.items() if full.removeprefix(f'{room}.') in public]
        assert [o for page,o in wanted if f' id="{o}"' not in (site/page).read_text(encoding='utf-8')]==[]

def test_a_dead_link_is_found(site, tmp_path):
    from links import dead_links
    shutil.copytree(site, tmp_path/'site')
    assert dead_links(tmp_path/'site', root)==[]
    page = tmp_path/'site'/'index.html'
    bad = {'nowhere.html':'no such page', 'api/losses/base.html#nothing':'no such anchor', '#nothing':'no such anchor',
        'https://dmlfast.github.io/dmlfast/api/nowhere.html':'no such page',
        'https://github.com/dmlfast/dmlfast/blob/main/dmlfast/losses/base.py#L99999':'no such line',
        'https://github.com/dmlfast/dmlfast/blob/main/nowhere.py':'no such file'}
    good = ['https://github.com/dmlfast/dmlfast/blob/main/dmlfast/losses/base.py#L1',
        'https://dmlfast.github.io/dmlfast/api/losses/triplet.html#tripletloss', 'https://example.invalid/',
        'api/losses/triplet.html#tripletloss']
    page.write_text(page.read_text(encoding='utf-8').replace('</article>', ''.join(f'<a href="{o}">x</a>' for o in [*bad,*good])
        + '<pre>[x](https://example.invalid/)</pre>[<a>x</a>](https://example.invalid/twice) [<a>x</a> y](far.ipynb#z)</article>', 1),
        encoding='utf-8')
    bad |= {'https://example.invalid/twice':'stayed text', 'far.ipynb#z':'stayed text'}
    found = dead_links(tmp_path/'site', root)
    assert len(found)==len(bad)
    for o,why in bad.items(): assert any(f'index.html: {o}: ' in f and why in f for f in found), o

def test_it_loads_nothing_from_elsewhere(site):
    "Neither scripts nor styles, fonts or pictures; links to other places are only followed by a reader"
    for f in site.rglob('*.html'):
        html = f.read_text(encoding='utf-8')
        assert not re.findall(r'<(?:script|img|link|iframe|source)\b[^>]*(?:src|href)="(?:https?:)?//(?!dmlfast\.github\.io)', html), f
    for f in (site/'_static').rglob('*.css'):
        assert not re.search(r'(@import|url\()\s*["\']?(https?:)?//', f.read_text(encoding='utf-8')), f

def test_headings_of_what_is_not_shown_are_left_out():
    from fastcore.nbio import mk_cell
    from nbsite import drop_empty
    shown = [('# a','markdown'), ('## b','markdown'), ('x = 1','code'), ('## c','markdown'), ('','code'), ('## d','markdown'),
        ('text\n\n## e','markdown'), ('## f\n\ntext','markdown'), ('## g','markdown')]
    left = drop_empty([mk_cell(src, kind) for src,kind in shown])
    assert [o.source.strip() for o in left]==['# a','## b','x = 1','## d','text','## f\n\ntext']

def test_words_in_tables_are_at_the_left():
    from nbsite import align_columns
    from fastcore.basics import AttrDict
    rows = '<tr><th></th><th>name</th><th>x</th></tr>', '<tr><td>0</td><td>bird</td><td>nan</td></tr>',\
        '<tr><td>1</td><td>car</td><td>2.5</td></tr>'
    html = f"<table>{''.join(rows)}</table>"
    cell = AttrDict(cell_type='code', outputs=[dict(data={'text/html':html})])
    align_columns(cell)
    assert re.findall('class="(.*?)"', cell.outputs[0]['data']['text/html'])==['','words','']*3

# in a browser

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def url(site):
    "Address of the site on this machine"
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()
    server.server_close()

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp('browser')) as b: yield b

@pytest.fixture
def page(browser):
    "The browser, at the size of a desk, with nothing noted yet"
    browser.faults.clear()
    browser.urls.clear()
    browser.look(1280)
    return browser

@needs_browser
def test_a_reader_finds_recall(page, url):
    "From the first page along the navigation, and by the search to the page of a metric"
    page.go(url)
    assert page.eval('document.querySelector("h1").textContent').startswith('dmlfast')
    assert page.eval('[...document.querySelectorAll("article img")].every(o => o.complete && o.naturalWidth>0)')
    assert 'learn.export_embedder' in page.eval('document.querySelector("article").textContent')
    captions = page.eval('[...document.querySelectorAll(".sidebar-tree .caption-text")].map(o => o.textContent)')
    assert captions==['Tutorials','Decide','Look up','Understand','Reference','Project']
    links = page.eval('[...document.querySelectorAll(".sidebar-tree a.internal")].map(o => o.href)')
    assert len(links)>=len(rooms)+len(list((root/'nbs'/'explanations').glob('*.ipynb')))
    for link in links:
        page.click(f'[...document.querySelectorAll(".sidebar-tree a.internal")].find(o => o.href==={link!r})')
        assert page.eval('location.href.split("#")[0]')==link.split('#')[0]
        assert page.eval('document.querySelector("article h1").textContent.length>2')
    page.eval('document.querySelector(".sidebar-search").value = "recall"')
    page._loaded = False
    page.eval('document.querySelector(".sidebar-search-container").submit()')
    page.wait('document.querySelectorAll("#search-results li a").length>3')
    found = page.eval('[...document.querySelectorAll("#search-results li a")].map(o => o.textContent)')
    assert any('metric' in o.lower() for o in found), found
    said = page.wait('[...document.querySelectorAll("#search-results .context")].map(o => o.textContent)')
    assert not any('what it is' in o or 'epoch train_loss' in o for o in said), said # of tables and outputs
    page.click('[...document.querySelectorAll("#search-results li a")].find(o => o.href.includes("explanations/metrics"))')
    assert 'recall@1' in page.eval('document.querySelector("article").textContent')
    assert page.faults==[] and all(o.startswith((url,'data:','about:')) for o in page.urls)

@needs_browser
def test_a_fault_would_be_seen(page, url):
    "What the test above relies on"
    page.go(f'{url}explanations/metrics.html')
    page.eval('console.error("broken")')
    page.eval('fetch("nowhere.png").then(o => o.status)')
    page.eval('setTimeout(() => missing(), 0)')
    page.eval('new Promise(o => setTimeout(o, 300))')
    assert any("'broken'" in o for o in page.faults) and any(o.startswith('404') and 'nowhere.png' in o for o in page.faults)
    assert any('missing is not defined' in o for o in page.faults)

@needs_browser
def test_formulas_are_drawn(page, url):
    page.go(f'{url}api/train/ssr.html')
    n = page.wait('document.querySelectorAll("article .math mjx-container svg").length')
    assert n>=page.eval('document.querySelectorAll("article div.math").length')>3
    assert not page.eval('document.querySelectorAll("article mjx-merror, article [data-mjx-error]").length')

looks = (root/'tests'/'looks.js').read_text(encoding='utf-8')

@needs_browser
def test_every_page_looks_well(page, url, site):
    "Nothing is wider than its place (tables, code and formulas scroll by themselves), pale, empty or left as markdown, in light and dark"
    bad = {}
    for f in sorted(site.rglob('*.html')):
        where,found = f.relative_to(site).as_posix(),set()
        page.look(1280)
        page.go(url+where)
        for width,dark in ((1280,False), (1280,True), (390,False), (390,True)):
            page.look(width, dark=dark)
            found.update(page.eval(looks))
        if found: bad[where] = sorted(found)
    assert bad=={} and page.faults==[]

@needs_browser
def test_ugly_pages_are_found(page, url):
    "What the test above relies on"
    page.look(390)
    page.go(f'{url}explanations/metrics.html')
    assert page.eval(looks)==[]
    page.eval("""document.body.insertAdjacentHTML('beforeend', '<div style="width:900px">beside the page</div>')
        document.querySelector('article').insertAdjacentHTML('beforeend', `<section id="bare"><h2>x</h2></section>
            <p style="color:#bbb">pale</p><p>**bold**</p><p><a href="#x" style="text-decoration:none">plain</a></p>
            <div style="width:500px">wide</div>
            <table><tr><td style="max-width:3rem"><code style="overflow-wrap:anywhere">a_rather_long_name</code></table>`)""")
    kinds = {o.partition(':')[0] for o in page.eval(looks)}
    assert kinds=={'wider than the screen','wider than the page','nothing below a heading','too little contrast','markdown',
        'a link that does not look like one','a line ends within a name'}

@needs_browser
def test_the_cheat_sheet_is_one_page_of_paper(page, url):
    page.go(f'{url}explanations/cheat_sheet.html')
    pdf = b64decode(page.call('Page.printToPDF', paperWidth=8.27, paperHeight=11.69)['data']) # A4, in inches
    assert len(re.findall(rb'/Type\s*/Page\b', pdf))==1

@needs_browser
@pytest.mark.parametrize('dark', [False,True])
def test_text_can_be_read_in_light_and_dark(page, url, dark):
    "The colours follow what the reader's system prefers, with the contrast that WCAG asks of text (4.5)"
    page.look(1280, dark=dark)
    page.go(f'{url}api/losses/base.html')
    def light(js):
        r,g,b = [int(o)/255 for o in re.findall(r'\d+', page.eval(js))[:3]]
        return sum(w*(c/12.92 if c<=.03928 else ((c+.055)/1.055)**2.4) for w,c in zip((.2126,.7152,.0722), (r,g,b)))
    back = light('getComputedStyle(document.body).backgroundColor')
    assert (back<.1)==dark
    for o in ('article p','article a.reference.internal code','dl.py .sig-name'):
        fore = light(f'getComputedStyle(document.querySelector({o!r})).color')
        assert (max(fore,back)+.05)/(min(fore,back)+.05)>=4.5, o
