"The page about a run: what it says, that it loads nothing, and that a browser has nothing to complain of"
import base64, io, json, os, re, resource, shutil, signal, subprocess, sys
from html.parser import HTMLParser
import numpy as np, pytest, torch
from PIL import Image
from fastai.vision.all import *
from dmlfast.all import *
from dmlfast.train.baseline import HeadStart
from dmlfast.train.export import split_hash
from dmlfast.look.report import plot_curves

class Page(HTMLParser):
    "Text, tables, links and pictures of a page"
    def __init__(self, file):
        super().__init__()
        self.html,self.refs,self.ims,self.cells,self.words,self.ids,self.open = file.read_text(encoding='utf-8'),[],{},[],[],[],[]
        self.fig = None
        self.feed(self.html)
        self.close()
        self.text = ' '.join(' '.join(self.words).split())
    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        self.refs += [d[k] for k in ('src','href') if k in d]
        if 'id' in d: self.ids.append(d['id'])
        if tag=='figure': self.fig = d['id']
        if tag=='img': self.ims[self.fig] = d
        if tag=='tr': self.cells.append([])
        if tag not in ('meta','link','img'): self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop()==tag
    def handle_data(self, data):
        if self.open and self.open[-1] in ('td','th'): self.cells[-1].append(data)
        if not {'style','script'} & set(self.open): self.words.append(data)

@pytest.fixture(scope='module')
def run(few, tmp_path_factory):
    "A learner after a fit with a doctor, and its report"
    set_seed(0)
    tmp = tmp_path_factory.mktemp('run')
    dls = few.dataloaders(bs=32, per_class=4, seed=0, num_workers=0)
    learn = metric_learner(dls, 'test_resnet', DRTripletLoss(), emb_sz=16, pretrained=False, path=tmp, cbs=TrainingDoctor(every=1))
    learn.remove_cbs([o for o in learn.cbs if type(o).__name__=='ProgressCallback'])
    learn.logger = noop
    learn.fit(2, 1e-3)
    return learn,learn.report(tmp/'report', 'test', code='fit(2, 1e-3) # <b>&', n_queries=2)

@pytest.fixture(scope='module')
def page(run): return Page(run[1])

def test_it_says_what_evaluate_says(run, page):
    learn,_ = run
    res = learn.evaluate('test')
    rows = {o[0]:o for o in page.cells if o}
    for k in ('recall@1','recall@8','r_precision','map@r'):
        assert rows[k][1]==f'{res[k]:.4f}'
        if res.interval(k): assert rows[k][3:]==[f'{o:.4f}' for o in res.interval(k)]
    told = json.loads(re.search('<script[^>]*>(.*?)</script>', page.html, re.S)[1])
    assert told['metrics']['recall@1']['mean']==pytest.approx(res['recall@1'])

def test_it_says_how_the_run_was_made(run, page, few):
    learn,_ = run
    rows = {o[0]:o[1:] for o in page.cells if o}
    assert rows['loss']==[repr(learn.loss_func)] and rows['network']==['test_resnet'] and rows['greatest learning rate']==['0.001']
    assert '32 items, 4 of a class, seed 0' in rows['batches'] and 'TrainingDoctor(every=1)' in rows['callbacks'][0]
    assert rows['epochs']==['2'] and rows['steps']==[str(2*len(learn.dls.train))]
    assert rows['hash of the splits']==[split_hash(learn.dls)] and rows['torch']==[torch.__version__]
    for split,o in few.summary().iterrows(): assert rows[split]==[str(o.images),str(o.classes)]
    assert re.fullmatch(r'[\d.]+ s', rows['time of the fit'][0]) and re.fullmatch(r'[\d.]+ s', rows['time of this report'][0])
    assert 'fit(2, 1e-3) # <b>&' in page.text # as it was written, and no markup
    assert [o[0] for o in page.cells if o and o[0] in ('0','1')]==['0','1'] # both epochs
    assert f'{len(few.items("test"))} items' in page.text

def test_it_loads_nothing(page):
    assert page.refs and all(o.startswith(('data:','#')) for o in page.refs)
    assert "default-src 'none'" in page.html and '@import' not in page.html and 'url(' not in page.html
    assert {o[1:] for o in page.refs if o.startswith('#')}<=set(page.ids) and len(set(page.ids))==len(page.ids)

def test_pictures_are_whole_and_described(page):
    assert list(page.ims)==['fig-curves_retrieval','fig-decisions','fig-neighbours','fig-worst','fig-confused','fig-curves','fig-doctor']
    for d in page.ims.values():
        im = Image.open(io.BytesIO(base64.b64decode(d['src'].split(',')[1])))
        im.load()
        assert (im.width//2,im.height//2)==(int(d['width']),int(d['height'])) and im.width<=2100
        assert len(d['alt'])>20 and np.asarray(im.convert('L')).std()>5

@pytest.fixture
def no_pictures(monkeypatch):
    "Reports without figures, where a test looks at words"
    for o in ('page._figures','report._fit_figures'): monkeypatch.setattr(f'dmlfast.look.{o}', lambda *args: iter(()))

def test_findings_are_on_the_page(run, tmp_path, no_pictures):
    learn,_ = run
    doctor = learn.training_doctor
    kept = doctor.steps
    doctor.steps = [dict(o, neg=.99) for o in kept]
    try: p = Page(learn.report(tmp_path, n_queries=1))
    finally: doctor.steps = kept
    assert 'The embeddings collapse' in p.text and 'class="finding"' in p.html
    doctor.steps = kept[:3]
    try: assert 'too few to tell' in Page(learn.report(tmp_path, n_queries=1, overwrite=True)).text
    finally: doctor.steps = kept

def test_a_colleague_can_read_it(run, page, tmp_path):
    "What metrics and panels mean, which items search, and no words that only who trained it knows"
    assert 'Each item searches for items of its class among all the others.' in page.text
    assert all(o in page.text for o in ('share of queries with an item of their class','mean of classes','class of its nearest',
        'How to read the doctor','Over how many directions'))
    assert not [o for o in ('model_kwargs','macro','nan','None,') if o in page.text.replace('miner=None','').replace("miner=None)",'')]
    titles = [o.get_title() for o in run[0].training_doctor.plot().axes if o.get_title()]
    assert titles and all(o in page.text for o in titles)

def test_queries_and_galleries(few, tmp_path, no_pictures):
    roles = np.where(np.arange(len(few.df))%3==0, 'query', 'gallery')
    ds = MetricDataset(few.df.assign(role=roles), few.path, 'few with roles', size=None, flip=False, ks=(1,10,20))
    learn = metric_learner(ds.dataloaders(bs=32, per_class=4, seed=0, num_workers=0), 'test_resnet', emb_sz=8, pretrained=False,
        path=tmp_path)
    with learn.no_bar():
        p,res = Page(learn.report(tmp_path/'r', 'test', n_queries=1)),learn.evaluate('test')
    rows,q = {o[0]:o for o in p.cells if o},(ds.df[ds.df.split=='test'].role=='query').sum()
    assert rows['recall@20'][1]==f'{res["recall@20"]:.4f}' and rows['map@r'][1]==f'{res["map@r"]:.4f}' and 'recall@8' not in rows
    assert f'{q} queries search for items of their class in a gallery of {(ds.df.split=="test").sum()-q}' in p.text

def test_the_curve_of_the_loss_is_that_of_recorder(run):
    "`Recorder` has smoothed it: the mean of all losses so far, with a weight that falls by .98 for each step"
    learn,_ = run
    a,b,c = plot_curves(learn).axes
    x,y = a.lines[0].get_data()
    assert list(x)==list(range(1, 1+2*len(learn.dls.train))) and y.tolist()==[float(o) for o in learn.recorder.losses]
    raw = [o['loss'] for o in learn.training_doctor.steps]
    assert y[:2].tolist()==pytest.approx([raw[0],(.98*raw[0]+raw[1])/1.98], rel=1e-5)

def test_a_report_is_written_whole_or_not_at_all(run, tmp_path, no_pictures):
    learn,_ = run
    file = learn.report(tmp_path/'r', n_queries=1)
    before,old = file.read_bytes(),resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000,-1)) # as a full disk
    try:
        with pytest.raises(OSError): learn.report(tmp_path/'r', n_queries=1, overwrite=True)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert file.read_bytes()==before and [o.name for o in file.parent.iterdir()]==['index.html']

def test_a_report_is_not_overwritten_unasked(run, tmp_path):
    learn,file = run
    with pytest.raises(FileExistsError, match='overwrite=True'): learn.report(file.parent)

def test_an_untrained_learner_and_strange_names(make_learner, tmp_path):
    learn = make_learner()
    learn.dls.source.name,old = '<script>alert(1)</script>',learn.dls.source.name
    try: p = Page(learn.report(tmp_path, n_queries=1))
    finally: learn.dls.source.name = old
    assert 'No fit is known' in p.text and 'No TrainingDoctor looked at this run' in p.text
    assert 'alert(1)' in p.text and '<script>alert' not in p.html
    assert 'fig-curves' not in p.ims and 'fig-neighbours' in p.ims

@pytest.mark.parametrize('args,stdin,command', [(['-c','{}'],'','-c'), (['-'],'{}',''), (['{file}','a b'],'',"run.py 'a b'"),
    (['-m','run','x'],'','-m run x')])
def test_the_command_repeats_the_run(tmp_path, args, stdin, command):
    "Code given with `-c` is in the command; what came from a console is in no command"
    code = 'from dmlfast.look.page import _repeat; print(_repeat()[0])'
    file = tmp_path/'run.py'
    file.write_text(code)
    res = subprocess.run([sys.executable,*(o.replace('{file}', str(file)).replace('{}', code) for o in args)],
        input=stdin.replace('{}', code), capture_output=True, text=True,
        cwd=tmp_path, env=os.environ|{'PYTHONPATH':os.pathsep.join([str(Path(__file__).parent.parent),os.environ.get('PYTHONPATH', '')])})
    said = res.stdout.strip()
    assert res.returncode==0 and (command in said and said.startswith('python') if command else said==''), res.stderr
    if '-c' in args: assert code in said

class Net(nn.Module):
    "Points to unit vectors"
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
    def forward(self, x): return F.normalize(self.body(x), dim=1)

def test_items_that_are_no_images(tmp_path):
    g = torch.Generator().manual_seed(0)
    x,y = torch.randn(48, 4, generator=g),torch.arange(48)//4
    train = BalancedDL(list(zip(x[:24],y[:24])), bs=12, per_class=4, labels=y[:24].numpy(), shuffle=True, seed=0, num_workers=0)
    dls = DataLoaders(train, TfmdDL(list(zip(x[24:],y[24:])), bs=12, num_workers=0))
    learn = metric_learner(dls, Net(), TripletLoss(), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        p = Page(learn.report(tmp_path/'r'))
    assert 'These items are not images' in p.text and list(p.ims)==['fig-curves_retrieval','fig-decisions','fig-curves']
    assert re.search('time of the last epoch', p.text)

def test_the_hash_is_of_items_labels_and_splits(few):
    def dls(df, name='x', bs=32, **kwargs):
        return MetricDataset(df, few.path, name, size=None, flip=False).dataloaders(bs=bs, num_workers=0, **kwargs)
    h = split_hash(dls(few.df))
    assert re.fullmatch('[0-9a-f]{64}', h)
    assert h==split_hash(dls(few.df.sample(frac=1, random_state=1), 'another name', 16, seed=3))
    assert h!=split_hash(dls(few.df.drop(few.df.index[0])))
    other = few.df.copy()
    a,b = other.label.unique()[:2]
    other['label'] = other.label.replace({a:b, b:a})
    other['split'] = few.df.split
    assert h!=split_hash(dls(other[~other.label.isin([a,b])])) # without two classes

def test_curves_say_what_they_show(run):
    learn,_ = run
    a,b,c = plot_curves(learn).axes
    assert (a.get_xlabel(),a.get_ylabel(),b.get_xlabel(),c.get_ylabel())==('steps','loss','epochs','learning rate of the head')
    assert len(a.lines[0].get_xdata())==2*len(learn.dls.train) and a.lines[1].get_ydata().tolist()==[o[1] for o in learn.recorder.values]
    names = [o.get_label() for o in b.lines]
    assert names==['recall@1','recall@2','recall@4','recall@8','map@r']
    assert b.lines[0].get_ydata().tolist()==[o[2] for o in learn.recorder.values]
    assert c.lines[0].get_ydata().tolist()==learn.recorder.lrs

# against the features that it started with

@pytest.fixture(scope='module')
def body(run, tmp_path_factory):
    "File of a body that was trained a little on `few`"
    file = tmp_path_factory.mktemp('body')/'body.pth'
    torch.save(run[0].model.body.state_dict(), file)
    return file

@pytest.fixture(scope='module')
def gained(few, body, tmp_path_factory):
    "A learner that began with a trained body, after `fit_transfer`, its report, and how often features were asked for"
    set_seed(0)
    tmp,asked = tmp_path_factory.mktemp('gained'),[]
    dls = few.dataloaders(bs=32, per_class=4, seed=0, num_workers=0)
    learn = metric_learner(dls, 'test_resnet', TripletLoss(), emb_sz=24, weights=body, path=tmp, cbs=TrainingDoctor(every=1))
    with learn.no_bar(), learn.no_logging():
        learn.fit_transfer(2, 3e-3, head_epochs=2)
        learn.transfer['how_far'] = dict(frozen=.25, gentle=.375)
        with pytest.MonkeyPatch.context() as m:
            features = HeadStart.features
            m.setattr(HeadStart, 'features', lambda self,dl: asked.append(len(dl.dataset)) or features(self, dl))
            return learn,learn.report(tmp/'report', 'test', n_queries=1),asked

def test_it_begins_with_what_training_was_worth(gained, few):
    "The sentence of `gain`, its numbers beside those of the features, and both in the JSON; the features are computed once"
    learn,file,asked = gained
    with learn.no_bar(): gain = learn.gain('test')
    p = Page(file)
    assert gain.sentence in p.text[:p.text.index('What is wrong')] and asked==[len(few.items('test'))]
    rows = [o for o in p.cells if len(o)==6 and o[0] in gain.keys()]
    more = [o for o in ('recall@16','recall@32') if o in gain.keys()]
    assert [o[0] for o in rows]==['recall@1','recall@2','recall@4','recall@8','map@r']+more
    for k,*o in rows:
        ends = gain.interval(k)
        assert o==[f'{gain.b[k]:.4f}',f'{gain.a[k]:.4f}',f'{gain[k]:+.4f}',*([f'{e:+.4f}' for e in ends] if ends else ['',''])]
    said = json.loads(re.search('<script[^>]*>(.*?)</script>', p.html, re.S)[1])
    assert said['gain']['sentence']==gain.sentence and said['gain']['features']['map@r']==pytest.approx(gain.b['map@r'])
    assert 'recall@1' in said['metrics']
    assert '#gain' in p.refs and 'gain' in p.ids

def test_the_features_are_above_the_epochs(gained):
    "Empty where they have no loss"
    learn,file,_ = gained
    p = Page(file)
    at = next(i for i,o in enumerate(p.cells) if o[:1]==['epoch'])
    n,rows = len(p.cells[at]),[' '.join(o) for o in p.cells[at+1:at+5]]
    scores = learn.head_start.rows
    for row,name in zip(p.cells[at+1:at+3], ('features','start')):
        assert row==[name]+[f'{scores[name]["scores"][k]:.4f}' for k in p.cells[at][3:]] and n==len(row)+2
    assert [o[0] for o in p.cells[at+3:at+5]]==['0','1']
    assert learn.head_start.said.startswith('The head starts from LDA')
    assert [learn.head_start.said]==next(o[1:] for o in p.cells if o[:1]==['start of the head'])

def test_what_fit_transfer_decided(gained):
    learn,file,_ = gained
    p,t = Page(file),learn.transfer
    rows = {o[0]:o[1] for o in p.cells if len(o)==2}
    head = t['head']
    assert rows['head alone']==(f"2 epochs on the features of the body as it was: map@r {head['before']:.4f} → {head['after']:.4f}, "
        f"{'kept' if head['kept'] else 'not kept'}")
    assert rows['how far the body may move'].startswith('frozen 0.2500, gentle 0.3750 (map@r')
    assert rows['chosen']=='gentle: a low rate, batch norm as it is, lr=0.003'
    assert rows['between start and end']==', '.join(f'{a}: {v:.4f}' for a,v in t['between'].items())+f"; kept: {t['kept']:g}"
    assert 'fig-between' in p.ims

def test_the_curve_between_start_and_end(gained):
    from dmlfast.look.report import _plot_between
    ax, = _plot_between(gained[0], {0:.2,1:.3,.5:.4}, .5, 'map@r').axes
    line,kept,level = ax.lines
    assert line.get_xydata().tolist()==[[0,.2],[.5,.4],[1,.3]] and kept.get_xydata().tolist()==[[.5,.4]]
    assert level.get_ydata()[0]==gained[0].head_start.rows['features']['scores']['map@r'] and ax.get_ylabel()=='map@r, validation classes'
    assert len(_plot_between(gained[0], {0:.2,1:.3}, 0, 'r_precision').axes[0].lines)==2 # which the features were not scored by

def test_training_that_did_harm(few, body, harm, tmp_path, no_pictures):
    "In red, with the doctor's finding, where names of arguments are code"
    set_seed(0)
    dls = few.dataloaders(bs=32, per_class=4, seed=0, num_workers=0)
    learn = metric_learner(dls, 'test_resnet', TripletLoss(), emb_sz=24, weights=body, freeze_bn=False, path=tmp_path,
        cbs=[TrainingDoctor(), Interpolate(at=(1,), say=False)])
    with learn.no_bar(), learn.no_logging():
        untrained = learn.report(tmp_path/'u')
        learn.fit(1, 1e-3, cbs=harm)
        harmed = learn.report(tmp_path/'h')
    p = Page(harmed)
    assert re.search('<p class="finding">From the features to the trained embedding, .*<code>freeze_bn=True</code>', p.html)
    assert '<p class="finding">Below the features it started with since epoch 0' in p.html
    assert 'too few to tell' not in p.text or 'something else' in p.text
    assert next(o for o in p.cells if o[:1]==['between start and end'])[1]==f'1: {learn.interpolate.curve[1]:.4f}; kept: 1'
    p = Page(untrained) # the start of the head against the features, and nothing of training
    assert 'Against the features' in p.text and 'Training ' not in p.text[:p.text.index('What is wrong')]

def test_without_features_the_page_is_as_before(run, page, body, gained, few, tmp_path, no_pictures):
    "Random weights, a model that was given, an exported embedder, a learner that was loaded"
    assert 'gain' not in page.ids and not [o for o in page.cells if o[:1] in (['features'],['start'],['between start and end'])]
    assert 'below the features' not in page.text
    learn = gained[0]
    with learn.no_bar():
        learn.export_embedder(tmp_path/'e')
        other = load_embedder(tmp_path/'e').embedded(few, 'test', num_workers=0)
        given = metric_learner(learn.dls, learn.model, TripletLoss(), path=tmp_path)
        for i,o in enumerate((other,given)):
            with given.no_bar(): p = Page(o.report(tmp_path/str(i)))
            assert 'gain' not in p.ids and 'Metrics' in p.text
            assert {o[1:] for o in p.refs if o.startswith('#')}<=set(p.ids)
            rows = {o[0] for o in p.cells if len(o)==2}
            # a page says what is known
            assert ('training' in p.ids)==('findings' in p.ids)==({'optimiser','callbacks'}<=rows)==(o is given)
            assert rows>={'network','loss','torch'}
    learn = gained[0]
    origin,learn.head_start.origin,learn.between = learn.head_start.origin,None,None # as of a learner that was loaded
    transfer = learn.__dict__.pop('transfer')
    try: p = Page(learn.report(tmp_path/'l'))
    finally: learn.head_start.origin,learn.transfer = origin,transfer
    assert 'gain' not in p.ids and ['features'] in [o[:1] for o in p.cells] # the rows of its epochs are still known

# in a browser

chromium = next(filter(None, map(shutil.which, ('chromium','chromium-browser','google-chrome'))), None)
needs_browser = pytest.mark.skipif(chromium is None, reason='there is no Chromium on PATH: Debian has it in the package chromium')

def browse(file, tmp, width=1280, *args):
    "What the browser makes of a page, and what its console says"
    cmd = [chromium,'--headless','--no-sandbox','--disable-gpu',f'--user-data-dir={tmp}','--enable-logging=stderr','--v=0',
        f'--window-size={width},1500',*args,file.as_uri()]
    res = subprocess.run(cmd, capture_output=True, text=True, timeout=120)
    assert res.returncode==0, res.stderr[-2000:]
    return res.stdout,[o for o in res.stderr.splitlines() if 'CONSOLE' in o]

@needs_browser
def test_the_console_is_empty(run, gained, tmp_path):
    for file in (run[1],gained[1]):
        dom,said = browse(file, tmp_path/file.parent.parent.name, 1280, '--dump-dom')
        assert said==[]
    assert '<h2 id="gain">' in dom
    dom,_ = browse(run[1], tmp_path/'profile', 1280, '--dump-dom')
    assert '<h2 id="versions">' in dom and dom.count('<img')==7

@needs_browser
def test_an_error_would_be_seen(run, tmp_path):
    "The page forbids scripts and what is elsewhere, and a browser that obeys says so"
    bad = tmp_path/'bad.html'
    bad.write_text(run[1].read_text(encoding='utf-8').replace('</main>', '<script>console.error(1)</script><img '
        'src="https://example.invalid/x.png"></main>'), encoding='utf-8')
    _,said = browse(bad, tmp_path/'profile', 1280, '--dump-dom')
    assert len(said)>=2 and 'Content Security Policy' in ' '.join(said)

@needs_browser
@pytest.mark.parametrize('width', [1280,390])
@pytest.mark.parametrize('which', ['run','gained'])
def test_the_page_is_as_wide_as_the_screen(which, request, tmp_path, width):
    "A script, for which the policy is lifted in a copy, compares the page with the window, whatever scrolls by itself"
    copy = tmp_path/'copy.html'
    html = re.sub('<meta http-equiv.*?>', '', request.getfixturevalue(which)[1].read_text(encoding='utf-8'))
    probe = ('<script>addEventListener("load", () => document.title = [innerWidth, document.documentElement.scrollWidth, '
        '[...document.images].every(o => o.complete && o.naturalWidth>0)].join(" "))</script>')
    copy.write_text(html.replace('</main>', f'</main>{probe}'), encoding='utf-8')
    dom,said = browse(copy, tmp_path/'profile', width, '--dump-dom')
    window,page,loaded = re.search('<title>(.*?)</title>', dom)[1].split()
    assert said==[] and int(page)<=int(window) and loaded=='true'
