"A gallery that changes: against a plain list, in memory and in LanceDB, and in a process that is killed at any moment"
import builtins, json, os, shutil, signal, subprocess, sys, time, warnings
import hypothesis.strategies as st, numpy as np, pytest, torch
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pathlib import Path
from safetensors.torch import load_file, save_file
from tempfile import TemporaryDirectory
from unittest.mock import Mock
from dmlfast.deploy import ImageEmbedder, Journal, LanceGallery, MemoryGallery, Preprocess, load_embedder
from dmlfast.deploy.folder import _read_gallery
from dmlfast.deploy.journal import hash_of
from dmlfast.files.writing import whole_folder
from dmlfast.models.embedder import Embedder

pytestmark = pytest.mark.filterwarnings('ignore:.*have names that are in the gallery already') # drawn at random, some are

d = 4

@pytest.fixture(scope='module')
def empty(tmp_path_factory):
    "The folder of a small embedder without a gallery"
    torch.manual_seed(0)
    e = ImageEmbedder(Embedder('test_resnet', d, pretrained=False), Preprocess([('fit', (32,32), 2)]))
    Machine.folder = e.save(tmp_path_factory.mktemp('empty')/'e')
    return Machine.folder

@pytest.fixture
def one_model(empty, monkeypatch):
    "The network is built once, since that takes the most time"
    model = load_embedder(empty).model
    monkeypatch.setattr('dmlfast.deploy.folder._model', lambda *args: model)

@pytest.fixture
def folder(empty, tmp_path): return Path(shutil.copytree(empty, tmp_path/'e'))

def stub(finder):
    "An embedder for which an array of `d` numbers is an image, and its own embedding"
    def embed(images):
        one = isinstance(images, np.ndarray)
        x = torch.from_numpy(np.stack([images] if one else images)).float()
        return x[0] if one else x
    finder.embed = embed
    return finder

# ---- a plain list ----
labels,names = st.sampled_from(['a','b',"c's"]),st.sampled_from(['1.jpg','2.jpg','ö 3.jpg'])
known = st.fixed_dictionaries({}, optional=dict(price=st.sampled_from([1,2.5,-3,None]), camera=st.sampled_from(['A','B`',None]),
    sold=st.booleans()))
conditions = st.one_of(labels.map(lambda v: dict(label=v)), st.lists(labels, max_size=2).map(lambda v: dict(label=v)),
    names.map(lambda v: dict(item=v)), st.sampled_from([dict(label=lambda v: v>'a'), dict(price=lambda p: p>1), dict(price=[None,1]),
    dict(camera='A'), dict(camera=lambda o: o in 'B`', label=['a','b']), dict(sold=True), dict(price=lambda p: p in (-3,2.5)),
    dict(sold=[1,2]), dict(sold='True'), dict(price=['1',True]), dict(camera=[1,'B`'])]))

def passes(row, where):
    def ok(v, want):
        if callable(want): return v is not None and want(v)
        return v in want if isinstance(want, list) else v==want
    return all(ok(row.get(k), w) for k,w in where.items())

touching = 'open','replace','fsync','write','close','chmod','unlink','rename','mkdir','serialize_file','read','__exit__','scandir'

def killed(f, die=None, after=0., names=touching):
    "Call `f` in another process, which is killed at call or return `die` of what touches a file, or `after` seconds"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # LanceDB's of a fork
        pid = os.fork()
    if not pid:
        calls = 0
        def count(frame, event, arg):
            nonlocal calls
            calls += event in ('c_call','c_return') and arg.__name__ in names
            if calls==die: os.kill(os.getpid(), signal.SIGKILL)
        try:
            signal.alarm(60) # whatever becomes of the test
            if die: sys.setprofile(count)
            f()
        finally: os._exit(1)
    if not die:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])

class Machine(RuleBasedStateMachine):
    "What is done to a finder is done to a list of dictionaries"
    lance,kind,kills = False,None,0

    @initialize()
    def begin(self):
        self.tmp,self.rows,self.rng,self.columns = TemporaryDirectory(),[],np.random.RandomState(0),set()
        self.at = shutil.copytree(self.folder, Path(self.tmp.name)/'e')
        if self.lance: stub(load_embedder(self.at, write=True)).to_lancedb(self.table)
        self.load()
        self.add([('a','1.jpg'),('b','2.jpg'),("c's",'ö 3.jpg')], {})
        self.started()

    def started(self): pass
    @property
    def table(self): return Path(self.tmp.name)/'g.lance'
    def teardown(self):
        if hasattr(self, 'tmp'): self.tmp.cleanup()

    @rule(new=st.lists(st.tuples(labels, names), min_size=1, max_size=4), facts=known)
    def add(self, new, facts):
        xs = self.rng.randn(len(new), d).astype('float32')
        self.finder.add([*xs], [l for l,_ in new], [n for _,n in new], {k:[v]*len(new) for k,v in facts.items()})
        self.rows += [dict(label=l, item=n, x=x, **facts) for (l,n),x in zip(new, xs)]
        self.columns |= {k for k,v in facts.items() if v is not None}

    def has(self, where): return all(k in ('label','item',*self.columns) for k in where)
    def changes(self, f, where, change):
        "`f` changes the rows that `where` lets through, or says that there are none"
        hit = [o for o in self.rows if passes(o, where)]
        if hit:
            f()
            change(hit)
        else:
            with pytest.raises(ValueError, match='Nothing in the gallery has '): f()

    @rule(where=conditions)
    def remove(self, where):
        if not self.has(where): return
        def gone(hit): self.rows = [o for o in self.rows if not any(o is h for h in hit)]
        self.changes(lambda: self.finder.remove(**where), where, gone)

    @rule(column=st.sampled_from(['label','item']), data=st.data())
    def rename(self, column, data):
        old,new = (data.draw(dict(label=labels, item=names)[column]) for _ in range(2))
        self.changes(lambda: self.finder.rename(old, new, column), {column:old}, lambda hit: [o.update({column:new}) for o in hit])

    @rule(item=names)
    def replace(self, item):
        x,n = self.rng.randn(d).astype('float32'),sum(o['item']==item for o in self.rows)
        if n>1:
            with pytest.raises(ValueError, match=f'is the name of {n} items'): self.finder.replace(item, x)
        else: self.changes(lambda: self.finder.replace(item, x), dict(item=item), lambda hit: hit[0].update(x=x))

    @rule(where=conditions | st.none(), k=st.integers(1, 6))
    def search(self, where, k):
        if not self.rows or where is not None and not self.has(where): return
        qs = [*self.rng.randn(2, d).astype('float32')]
        rows = [o for o in self.rows if where is None or passes(o, where)]
        for q,hits in zip(qs, self.finder.search(qs, k, filter=where)):
            s = np.array([o['x']@q/np.linalg.norm(o['x'])/np.linalg.norm(q) for o in rows])
            want = [rows[i] for i in (-s).argsort()[:k]]
            assert [(o.label, o.item) for o in hits]==[(o['label'], o['item']) for o in want]
            assert np.allclose([o.score for o in hits], np.sort(s)[::-1][:k], atol=1e-5)

    @rule()
    def load(self): self.finder = stub(load_embedder(self.at, write=True, gallery=self.table if self.lance else None))

    @rule()
    def save(self): self.finder.save(self.at, overwrite=True)

    def state(self): return [(o['label'], o['item'], *o['x'].tolist()) for o in self.rows]
    @rule(how=st.sampled_from(['add','remove','rename','replace','save']), label=labels, which=st.integers(0, 99), die=st.integers(1, 60))
    def kill(self, how, label, which, die):
        "A process is killed while it makes a change, or has made it"
        row = self.rows[which%len(self.rows)] if self.rows else None
        def relabel(hit):
            for o in hit: o['label'] = label
        f = dict(add=lambda: self.add([(label,'1.jpg')]*2, {}), save=lambda: self.finder.save(self.at, overwrite=True),
            remove=lambda: self.remove(dict(label=row['label'])), replace=lambda: self.replace(row['item']),
            rename=lambda: self.changes(lambda: self.finder.rename(row['label'], label), dict(label=row['label']), relabel))[how]
        if row is None and how not in ('add','save') or how=='replace' and sum(o['item']==row['item'] for o in self.rows)>1: return
        Machine.kills += killed(f, **(dict(after=die/500) if self.lance else dict(die=die)))
        before,states = [dict(o) for o in self.rows],[self.state()]
        self.finder = Mock()
        f() # to the list alone
        states.append(self.state())
        self.load()
        g = self.finder.gallery
        got = [(a,b,*x) for a,b,x in zip(g.labels, g.items, g.embs.tolist())] if len(g) else []
        assert got in states
        if got!=states[1]: self.rows = before

    @invariant()
    def same(self):
        g = self.finder.gallery
        assert self.finder.index_kind==self.kind
        assert isinstance(g, LanceGallery if self.lance else MemoryGallery) and len(self.finder)==len(self.rows)
        assert (g.labels, g.items)==([o['label'] for o in self.rows], [o['item'] for o in self.rows])
        assert g.classes()==sorted({o['label'] for o in self.rows})
        for k in self.columns: assert g.facts.get(k, [None]*len(self.rows))==[o.get(k) for o in self.rows]
        if self.rows: assert np.array_equal(g.embs.numpy(), np.stack([o['x'] for o in self.rows]))
        if self.lance: return
        e = MemoryGallery() # of a reader beside the writer
        _read_gallery(e, json.loads((self.at/'embedder.json').read_text()), self.at)
        assert (e.labels, e.items, e.index_kind)==(g.labels, g.items, self.kind)

class IndexMachine(Machine):
    def started(self): self.index('hnsw')
    @rule(kind=st.sampled_from(['hnsw','int8','ivf','auto',None]))
    def index(self, kind):
        self.finder.index(kind)
        self.kind = kind

class LanceMachine(Machine): lance = True

@pytest.mark.parametrize('machine,n,steps', [(Machine,20,20), (IndexMachine,20,20), (LanceMachine,12,16)],
    ids=['memory','index','lance'])
def test_a_gallery_is_a_list(empty, one_model, monkeypatch, machine, n, steps):
    "In memory and its folder, with an index, and as a table; whatever is done to it, and whenever its process is killed"
    from hypothesis.stateful import run_state_machine_as_test
    if machine is IndexMachine: pytest.importorskip('faiss')
    Machine.kills = 0
    monkeypatch.setattr(Journal, 'most', 2) # changes until their files become one
    run_state_machine_as_test(machine, settings=settings(max_examples=n, stateful_step_count=steps, deadline=None, derandomize=True,
        database=None, phases=(Phase.generate,)))
    assert Machine.kills>5

# ---- a process that is killed ----
script = '''
import os, random, signal, sys, time, torch
from dmlfast.deploy import MemoryGallery, load_embedder
import dmlfast.deploy.folder as rooms
assert 'lancedb' not in sys.modules and 'fastai' not in sys.modules
folder,kills = sys.argv[1],int(sys.argv[2])
model = load_embedder(folder).model
rooms._model = lambda *args: model # the network does not change, and takes the most time

def step(g, i):
    "Change number `i` of a gallery: what it is follows from `i` and from what is there"
    r,n = random.Random(i),len(g)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(i))
    todo = r.choice(['add','remove','rename','replace'] if n>3 else ['add'])
    if todo=='add': g.add(x, [f'{i%3}']*3, [f'{i}-{j}' for j in range(3)], dict(price=[i,None,i/2]))
    elif todo=='remove': g.remove(dict(item=r.sample(g.items, n-6 if n>30 else 2)))
    elif todo=='rename': g.rename('item', r.choice(g.items), f'new {i}')
    else: g.replace(r.choice(g.items), x[:1])

touching = 'open','replace','fsync','write','close','chmod','unlink','serialize_file','read','__exit__','listdir','scandir'

def state(g): return g.labels,g.items,g.facts,None if g.embs is None else g.embs.tolist()

def work(at, pipe, die):
    "Make changes from number `at` on, and say so after each; it kills itself at call `die` that touches a file"
    g = load_embedder(folder, write=True).gallery
    g.journal.most = 4
    calls = 0
    def count(frame, event, arg):
        nonlocal calls
        calls += event in ('c_call','c_return') and arg.__name__ in touching
        if calls==die: os.kill(os.getpid(), signal.SIGKILL)
    os.write(pipe, b'!')
    if die: sys.setprofile(count)
    while True:
        step(g, at)
        at += 1
        os.write(pipe, b'.')

truth,done,rng,between = MemoryGallery(),0,random.Random(0),0
for kill in range(kills):
    out,pipe = os.pipe()
    die = rng.randint(1, 90) if kill%2 else None
    if not (pid := os.fork()):
        signal.alarm(60) # whatever becomes of the test
        try: work(done, pipe, die)
        finally: os._exit(1)
    os.close(pipe)
    assert os.read(out, 1)==b'!'
    seen = None
    if not die:
        time.sleep(rng.random()*.15)
        if kill%4==0: seen = state(load_embedder(folder).gallery) # a reader beside the writer
        os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1])==signal.SIGKILL
    said = b''
    while o := os.read(out, 2**16): said += o
    os.close(out)
    states = [state(truth)]
    for i in range(len(said)):
        step(truth, done+i)
        states.append(state(truth))
    done += len(said)
    got = state(load_embedder(folder).gallery)
    if got!=states[-1]: # the change that nobody was told of is there whole
        step(truth, done)
        done += 1
        between += 1
        states.append(state(truth))
    assert got==states[-1], f'{kill}: {len(said)} changes were acknowledged'
    assert seen is None or seen in states, f'{kill}: a reader saw something else'
open(os.path.join(folder, '.tmpAb12Cd'), 'w').close() # as safetensors leaves it, when it is killed as it writes
g = load_embedder(folder, write=True).gallery
left = sorted(o for o in os.listdir(folder))
assert not [o for o in left if o.startswith('.') and o!='.writing'], left
print(done, between, len(left))
'''

def test_what_was_acknowledged_is_there_after_a_kill(folder):
    "At random moments and in random calls: nothing is lost and nothing is half there, also for a reader beside the writer"
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', script, str(folder), '24'], capture_output=True, text=True, timeout=300)
    assert not res.returncode, res.stderr
    done,between,left = map(int, res.stdout.split())
    assert done>12 and between>0 and left<12 # how many depends on the load of the machine

def test_a_folder_is_never_missing_while_another_takes_its_place(folder):
    e = stub(load_embedder(folder)).add([*np.eye(d)], list('abcd'), list('1234'))
    for die in range(1, 5): # before and after each of the renamings that there would be without an exchange
        killed(lambda: e.save(folder, overwrite=True), die, names=('rename',))
        assert len(load_embedder(folder))==4

def beside(folder): return sorted(o.name for o in folder.parent.iterdir())

def mine(folder):
    "Files that are not the library's, in its folder, and what is in them"
    (folder/'photos'/'none').mkdir(parents=True)
    (folder/'photos'/'1.jpg').write_bytes(b'a photo')
    (folder/'review.csv').write_text('mine')
    (folder/'config.json').write_text('mine too')
    (folder/'best.jpg').symlink_to('photos/1.jpg')
    return lambda: ((folder/'photos'/'none').is_dir(), (folder/'photos'/'1.jpg').read_bytes(), (folder/'review.csv').read_text(),
        (folder/'config.json').read_text(), os.readlink(folder/'best.jpg'))

def test_other_files_stay_when_an_embedder_is_replaced(folder, monkeypatch):
    "All of them or none; not what changes left behind, also where no file can have two names, or the old list cannot be read"
    e,kept = stub(load_embedder(folder, write=True)),mine(folder)
    e.add([*np.eye(d)], list('abcd'), list('1234')).remove('a')
    want,others = kept(),{'photos','review.csv','config.json','best.jpg'}
    for o in ('.123.gallery-000007.safetensors','.tmpAb12Cd','gallery-000009.safetensors'): (folder/o).write_text('left')
    for step in range(3):
        e.save(folder, overwrite=True)
        assert {o.name for o in folder.iterdir()}=={'embedder.json','weights.safetensors','gallery.json','gallery.safetensors',
            '.writing',*others}
        assert kept()==want and beside(folder)==['e'] and load_embedder(folder).labels==list('bcd')
        if step==0: monkeypatch.setattr(os, 'link', Mock(side_effect=OSError('no second names here')))
        (folder/'embedder.json').write_text('{}')
    e.save(folder, overwrite=True)
    before = {o:o.read_bytes() for o in folder.rglob('*') if o.is_file()}
    monkeypatch.setattr(shutil, 'copy2', Mock(side_effect=PermissionError('not yours')))
    with pytest.raises(OSError, match='not yours'): e.save(folder, overwrite=True)
    assert {o:o.read_bytes() for o in folder.rglob('*') if o.is_file()}==before and beside(folder)==['e']

def test_the_body_for_timm_goes_with_its_embedder(folder):
    e,others = load_embedder(folder),folder.parent/'timm'
    e.save(others, for_timm=True)
    (others/'README.md').write_text('a card')
    e.save(others, overwrite=True)
    assert {o.name for o in others.iterdir()}=={'embedder.json','weights.safetensors','README.md'}

def test_what_a_kill_left_beside_a_folder_is_removed(folder):
    "By the next that writes there; not what another one is writing, nor folders with similar names"
    e,kept,left = stub(load_embedder(folder)).add([*np.eye(d)], list('abcd'), list('1234')),mine(folder),0
    want,like = kept(),folder.parent/'.e-settings'
    like.mkdir()
    for die in range(1, 11):
        assert killed(lambda: e.save(folder, overwrite=True), die, names=('link','mkdir','rename'))
        left += len(beside(folder))>2
        assert kept()==want
    assert left and len(beside(folder))<=3
    with whole_folder(folder) as first:
        e.save(folder, overwrite=True)
        assert beside(folder)==sorted(['.e-settings','e',first.name]) and kept()==want
    assert beside(folder)==['.e-settings','e'] and kept()==want

# ---- folders ----
def test_a_folder_that_changed(folder):
    about = json.loads((folder/'embedder.json').read_text())
    e = stub(load_embedder(folder, write=True))
    assert json.loads((folder/'embedder.json').read_text())==about and about['format']==2
    a,b = load_embedder(folder, write=True),stub(load_embedder(folder, write=True))
    e.add([np.ones(d)], 'a', 'x', dict(price=1))
    assert json.loads((folder/'embedder.json').read_text())['format']==3
    with pytest.raises(ValueError, match='changed by another process since it was read: load it again'): b.add([np.ones(d)], 'b', 'y')
    assert len(b)==len(a)==0 and len(load_embedder(folder))==1
    whole = load_embedder(load_embedder(folder).save(folder.parent/'whole'))
    assert whole.gallery.facts==dict(price=[1]) and whole.labels==['a']
    assert json.loads((folder.parent/'whole'/'embedder.json').read_text())['format']==2

def test_a_folder_that_was_moved_or_removed(folder):
    "A change is refused in a sentence, and makes no folder there; the gallery stays, here and where the folder is now"
    e = stub(load_embedder(folder, write=True)).add([*np.eye(d)], list('aabb'), list('1234'))
    moved = folder.rename(folder.with_name('moved'))
    def refused():
        for f in (lambda: e.add([np.ones(d)], 'c', '5'), lambda: e.remove('a'), lambda: e.rename('a', 'z'),
            lambda: e.replace('1', np.ones(d))):
            with pytest.raises(FileNotFoundError, match='no embedder in .* any more: the folder was moved or removed, so load') as err: f()
            assert '\n' not in str(err.value) and repr(str(folder)) in str(err.value)
            assert (e.labels, e.items)==(list('aabb'), list('1234')) and np.array_equal(e.embs, np.eye(d))
    refused()
    assert beside(folder)==['moved']
    assert len(stub(load_embedder(moved, write=True)).add([np.ones(d)], 'c', '5'))==5
    shutil.rmtree(moved)
    folder.mkdir() # of something else
    (folder/'notes.txt').write_text('mine')
    refused()
    assert [o.name for o in folder.iterdir()]==['notes.txt']

def test_a_full_disk_leaves_what_was_there(folder, monkeypatch):
    e = stub(load_embedder(folder, write=True))
    e.add([np.ones(d)], 'a', 'x')
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('dmlfast.deploy.journal.write_whole', full)
    with pytest.raises(OSError): e.remove('a')
    monkeypatch.undo()
    assert len(e)==1 and len(load_embedder(folder))==1
    assert len(load_embedder(folder, write=True).remove('a'))==0 and len(load_embedder(folder))==0

def test_changes_that_were_tampered_with(folder):
    name = 'gallery-000002.safetensors'
    e = stub(load_embedder(folder, write=True)).add([*np.eye(d)], list('aabb'), list('1234'), dict(price=[1,2,3,4])).remove(item='2')
    def text(**how): return torch.tensor(list(json.dumps(how).encode()), dtype=torch.uint8)
    add = dict(op='add', labels=['a'], items=['1'], facts={})
    rows = dict(rows=torch.tensor([1]))
    for says,o in {'`rows` must be of 4 rows': dict(change=text(op='remove'), rows=torch.tensor([4])),
        'rows, ascending': dict(change=text(op='remove'), rows=torch.tensor([1,1])),
        'rows` must be of': dict(change=text(op='remove'), rows=torch.tensor([0.])),
        'must be tensors': dict(change=text(op='remove', rows=[1])),
        'must have the parts of a change': dict(change=text(op='wipe'), **rows),
        'the parts of': dict(change=text(op=['add']), **rows),
        'finite float32 numbers, 4 a row': dict(change=text(**add), embs=torch.ones(1,5)),
        'finite float32': dict(change=text(**add), embs=torch.full((1,d), torch.nan)),
        '`labels` and `items` must be text, one a row': dict(change=text(**add), embs=torch.ones(2,d)),
        'values of one type, .*text\\.$': dict(change=text(**{**add, 'facts':dict(price=['x'])}), embs=torch.ones(1,d)),
        '`facts` must be lists': dict(change=text(**{**add, 'facts':dict(price='x')}), embs=torch.ones(1,d)),
        'one row replaces one': dict(change=text(op='replace'), embs=torch.ones(2,d), **rows),
        '`name` must be text': dict(change=text(op='name', column='embs', name='x'), **rows),
        'KeyError': rows, 'JSONDecodeError': dict(change=torch.tensor([91], dtype=torch.uint8)),
        'TypeError': dict(change=torch.tensor([*b'null'], dtype=torch.uint8))}.items():
        save_file(o, folder/name)
        with pytest.raises(ValueError, match=f"'{name}' in .* was changed or cut off since it was written"): load_embedder(folder)
        about = json.loads((folder/'embedder.json').read_text())
        (folder/'embedder.json').write_text(json.dumps({**about, 'sha256':{**about['sha256'], name:hash_of(folder/name)}}))
        with pytest.raises(ValueError, match=f"'{name}' in .* is no change of a gallery: .*({says})") as err: load_embedder(folder)
        assert '\n' not in str(err.value)
        (folder/'embedder.json').write_text(json.dumps(about))
    (folder/name).unlink()
    with pytest.raises(FileNotFoundError, match=f"incomplete: there is no '{name}'"): load_embedder(folder)

def test_a_gallery_with_facts_that_was_tampered_with(folder):
    e = stub(load_embedder(folder)).add([*np.eye(d)], 'a', list('1234'), dict(price=[1,2,3,4]))
    whole = e.save(folder.parent/'whole')
    g = json.loads((whole/'gallery.json').read_text())
    for facts in (dict(price=[1]), dict(price=[1,2,3,'x']), 7, ['price'], dict(label=[1]*4), dict(price=[[1]]*4)):
        (whole/'gallery.json').write_text(json.dumps({**g, 'facts':facts}))
        about = json.loads((whole/'embedder.json').read_text())
        about['sha256']['gallery.json'] = hash_of(whole/'gallery.json')
        (whole/'embedder.json').write_text(json.dumps(about))
        with pytest.raises(ValueError, match="'gallery.json' in .*`facts` must be an object of lists"): load_embedder(whole)

# ---- what is asked for wrongly ----
@pytest.mark.parametrize('lance', [False,True])
def test_what_is_refused(folder, tmp_path, lance):
    e = stub(load_embedder(folder))
    if lance: e.to_lancedb(tmp_path/'g.lance')
    with pytest.raises(ValueError, match='gallery is empty'): e.search(np.ones(d))
    e.add([*np.eye(d)], ['cat','cat','dog','cow'], ['1','2','3','3'], dict(price=[1,2,3,None], day=np.array(['2024-05-01']*4, 'M8[D]')))
    assert e.gallery.facts['day']==['2024-05-01']*4
    for says,f in {
        "There is no column 'colour': the gallery has label, item, price, day": lambda: e.search(np.ones(d), filter=dict(colour=1)),
        "no column 'colour'": lambda: e.remove(colour='red'),
        "Nothing in the gallery has label 'cats'. Did you mean 'cat'\\?": lambda: e.remove('cats'),
        "has item '9'": lambda: e.replace('9', np.ones(d)),
        "'3' is the name of 2 items": lambda: e.replace('3', np.ones(d)),
        'Give the items to remove': lambda: e.remove(),
        "is 'label' or 'item'; got 'price'": lambda: e.rename('1', '2', 'price'),
        "values of one type, and 'price' holds numbers and text": lambda: e.add([np.ones(d)], 'a', 'b', dict(price='cheap')),
        'There are 1 images, and 2 facts': lambda: e.add([np.ones(d)], 'a', 'b', dict(price=[1,2])),
        "a name of letters and digits": lambda: e.add([np.ones(d)], 'a', 'b', {'a`b':1}),
        'A fact is text, a number': lambda: e.add([np.ones(d)], 'a', 'b', dict(price=[{}])),
        'embeddings of 4 numbers, and not of 3': lambda: e.add([np.ones(3)], 'a', 'b')}.items():
        with pytest.raises(ValueError, match=says): f()
    assert len(e)==4 and e.search(np.ones(d), filter='cats')==[]
    assert [o.item for o in e.search(np.eye(d)[0], k=9, filter=['cat','dog'])]==['1','2','3']
    import pandas as pd
    e.add([np.ones(d)]*2, 'owl', ['a','b'], pd.DataFrame(dict(price=[7,None], day=pd.to_datetime(['2024-06-01',None]))))
    assert [o.item for o in e.search(np.ones(d), filter=dict(day=lambda o: o>='2024-06'))]==['a']

def test_tables(folder, tmp_path, monkeypatch):
    "An index is near the exact answer, filtered or not; another network, a stranger's table and no LanceDB are a sentence"
    e,g = stub(load_embedder(folder)),torch.Generator().manual_seed(0)
    x = torch.randn(3000, d, generator=g)
    e.add_embs(x, [f'{i%5}' for i in range(3000)], [str(i) for i in range(3000)])
    qs = [*torch.randn(20, d, generator=g).numpy()]
    want = [[o.item for o in h] for f in (None,'3') for h in e.search(qs, 10, filter=f)]
    e.to_lancedb(tmp_path/'g.lance')
    assert [[o.item for o in h] for f in (None,'3') for h in e.search(qs, 10, filter=f)]==want
    e.index()
    e.add([qs[0]], '3', 'new')
    assert e.search(qs[0], 1)[0][1]=='new'
    e.remove(item='new')
    got = [[o.item for o in h] for f in (None,'3') for h in e.search(qs, 10, filter=f)]
    assert np.mean([len({*a}&{*b})/10 for a,b in zip(want, got)])>.95
    again = load_embedder(folder, gallery=tmp_path/'g.lance')
    assert len(again)==3000 and repr(again).endswith('3000 items of 5 classes in the gallery)')
    assert len(load_embedder(again.save(tmp_path/'alone')))==0 # the table stays where it is
    torch.manual_seed(1)
    other = ImageEmbedder(Embedder('test_resnet', d, pretrained=False), Preprocess([('fit', (32,32), 2)])).save(tmp_path/'other')
    with pytest.raises(ValueError, match='were made by another network: write'): load_embedder(other, gallery=tmp_path/'g.lance')
    nowhere = tmp_path/'nowhere.lance'
    with pytest.raises(FileNotFoundError, match="There is no gallery '.*nowhere.lance'"): load_embedder(other, gallery=nowhere)
    with pytest.raises(ValueError, match="ends in '.lance'"): e.to_lancedb(tmp_path/'g')
    with pytest.raises(FileExistsError, match='overwrite=True'): e.to_lancedb(tmp_path/'g.lance')
    (tmp_path/'none.lance').mkdir()
    with pytest.raises(ValueError, match="none.lance' is no table of LanceDB"): load_embedder(folder, gallery=tmp_path/'none.lance')
    imported = builtins.__import__
    def without(name, *args, **kwargs):
        if name=='lancedb': raise ModuleNotFoundError('No module', name='lancedb')
        return imported(name, *args, **kwargs)
    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(ImportError, match=r"needs lancedb: pip install 'dmlfast\[lance\]'"):
        load_embedder(folder, gallery=tmp_path/'g.lance')

def test_a_table_in_an_object_store_and_one_that_is_open(folder, tmp_path):
    "LanceDB reads an address `file://` as it reads those of other object stores; a connection of one's own may be to a service"
    lancedb = pytest.importorskip('lancedb')
    e,where = stub(load_embedder(folder)).add([*np.eye(d)], list('aabb'), list('1234'), dict(price=[1,2,3,None])),f'file://{tmp_path}'
    e.to_lancedb(f'{where}/g.lance').add([np.ones(d)], 'c', '5').remove(item='2')
    again = stub(load_embedder(folder, gallery=f'{where}/g.lance'))
    assert again.labels==['a','b','b','c'] and again.gallery.facts==dict(price=[1,3,None,None])
    assert [o.item for o in again.search(np.eye(d)[2], 1)]==['3']
    with pytest.raises(FileExistsError, match='g.lance'): e.to_lancedb(f'{where}/g.lance')
    with pytest.raises(FileNotFoundError, match='There is no gallery'): load_embedder(folder, gallery=f'{where}/none.lance')
    db = lancedb.connect(tmp_path/'service')
    again.to_lancedb('birds', db=db)
    with pytest.raises(FileExistsError, match="'birds' exists already"): again.to_lancedb('birds', db=db)
    again.to_lancedb('birds', overwrite=True, db=db).rename('c', 'd')
    open_ = load_embedder(folder, gallery=db.open_table('birds'))
    assert (open_.labels, open_.items, open_.gallery.facts)==(['a','b','b','d'], ['1','3','4','5'], dict(price=[1,3,None,None]))
    db.create_table('others', [dict(x=1)])
    with pytest.raises(ValueError, match='is no gallery: a gallery has the columns'): load_embedder(folder, gallery=db.open_table('others'))

def test_a_table_finds_what_memory_finds(folder, tmp_path):
    "By values of another type, which may equal those of the column or not, and of any size"
    pytest.importorskip('lancedb')
    facts = dict(b=[True,False,True,None], i=[1,2**53,None,2**60], s=['1','True',None,"c's"])
    e = stub(load_embedder(folder)).add([*np.eye(d)], list('aabb'), list('1234'), facts)
    wants = dict(b=[1,0.,2,'True',[False,1,None],lambda v: v,lambda v: True], s=[1,True,['1',1],'caf\udce9',lambda v: v>'1'],
        i=['1',True,2**53,2**53+1,2**60,2**60+1,10**400,-10**400,float('inf'),float('nan'),[None,'1',1.],lambda v: v>1],
        label=['caf\udce9',1])
    def answers(): return [sorted(o.item for o in e.search(np.ones(d), 4, filter={k:v})) for k,o in wants.items() for v in o]
    want = answers()
    assert want[:4]==[['1','3'],['2'],[],[]] and want[12:18]==[[],['1'],['2'],[],['4'],[]]
    e.to_lancedb(tmp_path/'g.lance')
    assert answers()==want and e.gallery.facts['i']==[1,2**53,None,2**60]
    assert len(e.remove(i=2**60).remove(b=0))==2

def test_embeddings_of_any_size_are_found_in_a_table(folder, tmp_path):
    "Of rows of zeros, and of numbers whose squares are no float32, with an index and without; what is in the table stays as it was given"
    pytest.importorskip('lancedb')
    rng = np.random.RandomState(0)
    x,q = rng.randn(300,d).astype(np.float32),rng.randn(6,d).astype(np.float32)
    for rows,by in ((slice(10,20),1e25), (slice(20,30),1e-25), (slice(30,35),1e13), (slice(35,40),1e-13)): x[rows]*=np.float32(by)
    x[40:44],q[1],q[2],q[3] = 0,q[1]*np.float32(1e25),q[2]*np.float32(1e-25),0
    def cosines(x):
        x,z = (o.astype(np.float64)/np.maximum(np.linalg.norm(o.astype(np.float64), axis=1, keepdims=True), 1e-300) for o in (x,q))
        return z@x.T
    def check(o, x, k=12):
        s = cosines(x)
        for filter,rows in ((None,range(len(x))), ('1',range(1,len(x),3)), (dict(n=lambda n: 8<n<42),range(9,42))):
            for a,hits in zip(s, o.hits(q, k, filter=filter)):
                want = sorted(rows, key=lambda i: -a[i])[:k]
                assert [h.item for h in hits]==[f'{i}' for i in want] and np.allclose([h.score for h in hits], a[want], atol=1e-5)
                assert [h.label for h in hits]==[f'{i%3}' for i in want]
    e,args = stub(load_embedder(folder)),([f'{i%3}' for i in range(300)], [f'{i}' for i in range(300)], dict(n=[*range(300)]))
    check(e.add_embs(x, *args), x)
    def again(): return stub(load_embedder(folder, gallery=tmp_path/'g.lance'))
    e.to_lancedb(tmp_path/'g.lance') # all at once
    for o in (e,again()): check(o, x)
    t = stub(load_embedder(folder)).to_lancedb(tmp_path/'h.lance')
    for i in range(0, 300, 150): t.add_embs(x[i:i+150], *(o[i:i+150] for o in args[:2]), dict(n=[*range(i, i+150)])) # arrays
    check(t, x)
    assert t.gallery.kinds==e.gallery.kinds==dict(n=float) and t.gallery.facts==args[2] and np.array_equal(t.embs.numpy(), x)
    with pytest.raises(ValueError, match="no column 'odd-vector': the gallery has label, item, n.$"):
        t.search(q[0], filter={'odd-vector':True})
    y = x.copy()
    y[5],y[6],y[15],y[41] = 0,x[6]*np.float32(1e25),x[7]+1,x[8]-1
    for i in (5,6,15,41): e.replace(f'{i}', y[i])
    check(again(), y)
    e.index()
    check(again(), y)
    assert [o.label for o in e.classify([*q], how='nearest')]==[f'{i%3}' for i in cosines(y).argmax(1)]

def test_a_table_answers_as_memory(folder, tmp_path):
    "Arrays, what is refused, images of zeros, and more copies of an image than are found"
    pytest.importorskip('lancedb')
    def said(f):
        with pytest.raises(ValueError) as e: f()
        return str(e.value)
    x = np.repeat(np.random.RandomState(0).randn(3,d), 40, axis=0)
    memory,table = stub(load_embedder(folder)),stub(load_embedder(folder)).to_lancedb(tmp_path/'g.lance')
    new = memory,table
    for o in new: o.add_embs(x[::-1].copy(), ['b']*120, [f'{i}' for i in range(120)])
    nan,inf = np.full((2,d), np.nan),np.array([[1]*d,[1,np.inf,0,0]])
    for bad,says in ((nan,'2 of 2 rows of embs are not finite: rows 0, 1'), (inf,'1 of 2 rows of embs are not finite: rows 1'),
        (np.ones((2,3)),'The gallery holds embeddings of 4 numbers, and not of 3.')):
        assert [said(lambda: o.add_embs(bad, ['c']*2, ['']*2)) for o in new]==[says]*2
    for bad,says in ((nan,'2 of 2 rows of query are not finite: rows 0, 1'), (np.ones((2,3)),'query has 3 columns, gallery has 4'),
        (np.ones(d),'query must be a matrix with at least one row and one column, not (4,)')):
        assert [said(lambda: o.hits(bad)) for o in new]==[says]*2
    assert [said(lambda: o.replace('5', nan[0])) for o in new]==['1 of 1 rows of embs are not finite: rows 0']*2
    assert 'embeddings of 4 numbers, and not of 3' in said(lambda: table.replace('5', np.ones(3)))
    for k in (0,-1,1.5): assert all('k must be a whole number' in said(lambda: o.hits(x[:1], k)) for o in new)
    for k in (1,5,39,40,41,60,120,200):
        for i,at in ((0,80),(40,40),(80,0)): # the copies are the nearest, and come in their order
            for o in new: assert [h.item for h in o.hits(x[i:i+1], k)[0][:40]]==[f'{at+j}' for j in range(min(k, 40))], (o,k)
    for o in new:
        assert o.hits(np.zeros((1,d)), 3)==[[('b',f'{i}',0.) for i in range(3)]] and o.hits(x[:1], 3, filter='none')==[[]]
        assert o.classify(np.zeros(d), how='nearest')==o.classify(np.zeros(d))==('b',0.)
        assert o.add([np.zeros(d)], 'black', 'night').search(-x[0]-x[40]-x[80], 1, filter='black')==[('black','night',0.)]
    assert len(table)==len(memory)==121

def test_what_a_table_cannot_hold_is_refused_before_anything_is_written(folder, tmp_path):
    lancedb = pytest.importorskip('lancedb')
    def memory(label='a', **facts): return stub(load_embedder(folder)).add([np.ones(d)], label, 'x', facts)
    for kwargs,why in ((dict(label='caf\udce9'),"hold 'caf.udce9' in the column 'label', since text is UTF-8 there: rename it"),
        (dict(where='caf\udce9'),"in the column 'where'"), (dict(n=2**53+1),"hold 9007199254740993 in the column 'n', .* as text"),
        (dict(n=10**400),"hold 1000.* in the column 'n'")):
        for how in (dict(path=tmp_path/'g.lance'), dict(path='g', db=lancedb.connect(tmp_path))):
            with pytest.raises(ValueError, match=why): memory(**kwargs).to_lancedb(**how)
            assert beside(folder)==['e']
    e = memory(n=1).to_lancedb(tmp_path/'g.lance')
    for f in (lambda: e.add([np.ones(d)], 'caf\udce9'), lambda: e.add([np.ones(d)], 'a', 'y', dict(n=2**53+1, more=1)),
        lambda: e.rename('a', 'caf\udce9')):
        with pytest.raises(ValueError, match='A table of LanceDB cannot hold'): f()
    with pytest.raises(ValueError, match='Nothing in the gallery has label'): e.rename('caf\udce9', 'a')
    assert e.labels==['a'] and e.gallery.facts==dict(n=[1])

def test_a_table_takes_the_place_of_a_gallery_alone(folder, tmp_path):
    "At the end, so that a kill leaves the old one or the new one; a stranger's folder, file or table is not touched"
    lancedb = pytest.importorskip('lancedb')
    e,at = stub(load_embedder(folder)).add([*np.eye(d)], list('aabb'), list('1234')),tmp_path/'g.lance'
    for o in ('mine.lance','theirs.lance','empty.lance'): (tmp_path/o).mkdir()
    (tmp_path/'mine.lance'/'thesis.txt').write_text('all of it')
    (tmp_path/'file.lance').write_text('mine')
    lancedb.connect(tmp_path).create_table('theirs', [dict(x=1)], mode='overwrite')
    for o in ('mine','theirs','file'):
        for over in (False,True):
            with pytest.raises(FileExistsError, match=f"{o}.lance' exists already and holds no gallery"):
                e.to_lancedb(tmp_path/f'{o}.lance', overwrite=over)
    with pytest.raises(FileExistsError, match="'theirs' exists already and is no gallery"):
        e.to_lancedb('theirs', overwrite=True, db=lancedb.connect(tmp_path))
    assert (tmp_path/'mine.lance'/'thesis.txt').read_text()=='all of it' and (tmp_path/'file.lance').read_text()=='mine'
    assert lancedb.connect(tmp_path).open_table('theirs').to_arrow().to_pylist()==[dict(x=1)]
    assert len(load_embedder(folder, gallery=e.to_lancedb(tmp_path/'empty.lance').gallery.table))==4
    e.to_lancedb(at)
    (at/'notes.txt').write_text('mine')
    def again():
        new = stub(load_embedder(folder, gallery=at))
        new.add([np.ones(d)], 'c', str(len(new)+1))
        stub(load_embedder(folder, gallery=at)).to_lancedb(at, overwrite=True)
    n = 4
    for die in range(1, 7): # beside the table, and as it takes its place
        killed(again, die, names=('replace','rename','rmtree','mkdir','scandir'))
        got = load_embedder(folder, gallery=at)
        assert len(got)>=n and (at/'notes.txt').read_text()=='mine'
        n = len(got)
    e.to_lancedb(at, overwrite=True)
    assert load_embedder(folder, gallery=at).items==list('1234') and not [o for o in tmp_path.iterdir() if o.name.startswith('.')]

@pytest.mark.parametrize('part', ['data','_indices','_versions'])
def test_a_table_that_was_tampered_with(folder, tmp_path, part):
    e,x = stub(load_embedder(folder)),torch.randn(300, d, generator=torch.Generator().manual_seed(0))
    e.add_embs(x, ['a']*300, [str(i) for i in range(300)]).to_lancedb(tmp_path/'g.lance').index()
    files = [o for o in (tmp_path/'g.lance'/part).rglob('*') if o.is_file()]
    assert files
    for o in files: o.write_bytes(o.read_bytes()[:len(o.read_bytes())//2])
    with pytest.raises(ValueError, match='cannot be searched|is no table of LanceDB'):
        stub(load_embedder(folder, gallery=tmp_path/'g.lance')).search(x[0].numpy())

def test_a_table_is_tidied_up_by_its_versions(folder, tmp_path, monkeypatch):
    "Also where each process makes one change"
    e = stub(load_embedder(folder)).to_lancedb(tmp_path/'g.lance')
    tidied = []
    monkeypatch.setattr(type(e.gallery.table), 'optimize', lambda self: tidied.append(self.version))
    monkeypatch.setattr(LanceGallery, 'tidy_every', 4)
    while e.gallery.table.version<9: stub(load_embedder(folder, gallery=tmp_path/'g.lance')).add([np.ones(d)], 'a', 'x')
    assert tidied==[4,8]

# ---- with an index, a threshold and a second look ----
def near(rows, q, k):
    "Names of the nearest of `(name, embedding)`s, by hand"
    s = [x@q/np.linalg.norm(x)/np.linalg.norm(q) for _,x in rows]
    return [rows[i][0] for i in np.argsort(-np.array(s))[:k]]

@pytest.mark.parametrize('kind', ['hnsw','hnsw:efSearch=99','int8','SQ8',None])
def test_an_index_follows_the_changes(folder, kind):
    if kind not in ('int8',None): pytest.importorskip('faiss')
    rng = np.random.RandomState(0)
    xs,q = [*rng.randn(40, d).astype('float32')],rng.randn(d).astype('float32')
    e = stub(load_embedder(folder)).add(xs, ['a','b']*20, [f'{i}' for i in range(40)]).index(kind)
    e.save(folder, overwrite=True)
    rows = {f'{i}':x for i,x in enumerate(xs)}
    def check(e):
        for q in rng.randn(5, d).astype('float32'):
            assert [o.item for o in e.search(q, 5)]==near([*rows.items()], q, 5)
            odd = [o for o in rows.items() if int(o[0])%2]
            assert [o.item for o in e.search(q, 5, filter=dict(item=lambda o: int(o)%2))]==near(odd, q, 5)
            assert [o.item for o in e.search(q, 50, rerank='k-reciprocal', filter=dict(item=['1','3']))] in (['1','3'],['3','1'])
    def change(f):
        w = stub(load_embedder(folder, write=True))
        f(w)
        f(e)
        check(e)
        again = stub(load_embedder(folder))
        check(again)
        return again.gallery
    check(stub(load_embedder(folder)))
    rows['40'] = q
    g = change(lambda e: e.add([q], 'c', '40'))
    assert g.index_kind==kind and len(g.searched())==41
    if kind=='hnsw': assert g.searched().indexed.core.index.ntotal==41
    rows['2'] = -q
    g = change(lambda e: e.replace('2', -q))
    assert g.index_kind==(None if kind=='SQ8' else kind) # a string of faiss's own is not made from a stranger's words
    del rows['3'], rows['5']
    rows['1'],rows['3'] = rows['1'],rows.pop('7')
    change(lambda e: e.remove(item=['3','5']).rename('7', '3', 'item'))

def test_an_index_that_faiss_refuses_changes_nothing(folder):
    pytest.importorskip('faiss')
    xs = [*np.random.RandomState(0).randn(300, d).astype('float32')]
    e = stub(load_embedder(folder, write=True)).add(xs[:9], 'a', [f'{i}' for i in range(9)])
    for kind,says in (('',"takes for 4 numbers; got ''"),
        ('PQ2','9 items are too few for'),('IDMap,Flat','cannot be added to'),('PQ3','takes for 4 numbers')):
        with pytest.raises(ValueError, match=says): e.index(kind)
        assert e.index_kind is None and len(stub(load_embedder(folder)).add(xs[9:10], 'b'))==10
    e.remove(item=lambda o: True).index('PQ2')
    for n in (2,3):
        with pytest.warns(UserWarning, match='too few for an index .* the search is exact'): e.add(xs[n-2:n], 'a', ['x','y']).search(xs[0])
        assert e.search(xs[0], 1)[0].item=='x' and len(load_embedder(folder))==len(e)==2*n-2
    e.add(xs, 'b', ['']*300)
    assert e.search(xs[5], 1)[0].score>.99 and e.gallery.searched().indexed.kind=='PQ2'

def test_what_is_not_finite_stays_outside(folder):
    e = stub(load_embedder(folder, write=True)).add([np.ones(d)], 'a', 'x')
    for bad in (np.full(d, np.nan),np.full(d, np.inf)):
        with pytest.raises(ValueError, match='1 of 1 rows of embs are not finite'): e.add([bad], 'b')
        with pytest.raises(ValueError, match='1 of 1 rows of embs are not finite'): e.replace('x', bad)
    assert len(e)==len(load_embedder(folder))==1

@pytest.mark.parametrize('kind', ['int8','SQ8','hnsw'])
def test_the_change_of_all_has_its_index(folder, kind):
    "What took long to make is kept, also where the file of all changes takes the place of the folder's own; what is stale is made again"
    if kind!='int8': pytest.importorskip('faiss')
    stub(load_embedder(folder)).add([*np.eye(d)], list('abcd'), list('1234')).index(kind).save(folder, overwrite=True)
    e = stub(load_embedder(folder, write=True))
    e.calibration = dict(threshold=.5, fmr=.1)
    e.gallery.journal.most = 2
    for i in range(3): e.rename('abcd'[i], f'{i}')
    assert e.index_kind==kind and not [o.name for o in folder.iterdir() if o.name.startswith('index')]
    again = stub(load_embedder(folder))
    assert again.labels==['0','1','2','d'] and again.index_kind==kind and again.gallery.is_ready==(kind!='int8')
    assert [o.item for o in again.search(np.eye(d)[2], 1)]==['3']
    again = load_embedder(e.save(folder, overwrite=True))
    assert again.labels==['0','1','2','d'] and again.index_kind==kind and again.threshold==.5
    e.replace('1', -np.eye(d)[0])
    for i in range(3): e.rename(f'{i}', 'abc'[i]) # folded, and not searched since an item has another image
    again = load_embedder(folder)
    assert again.labels==list('abcd') and not again.gallery.is_ready and again.index_kind==(None if kind=='SQ8' else kind)

def test_an_index_is_kept_like_a_change(folder):
    pytest.importorskip('faiss')
    e = stub(load_embedder(folder, write=True)).add([*np.eye(d)], list('abcd'), list('1234')).index('SQ8')
    assert json.loads((folder/'embedder.json').read_text())['format']==4
    again = stub(load_embedder(folder, write=True))
    core = again.gallery.searched().indexed.core.index
    assert again.index_kind=='SQ8' and type(core).__name__=='IndexScalarQuantizer' and core.ntotal==4
    again.add([-np.ones(d)], 'e', '5').index(None)
    assert core.ntotal==5 and load_embedder(folder).index_kind is None
    with pytest.raises(ValueError, match='changed by another process'): e.index('hnsw')
    name = 'gallery-000002.safetensors'
    def text(**how): return torch.tensor(list(json.dumps(how).encode()), dtype=torch.uint8)
    good = load_file(folder/name)['packed']
    for says,o in {'that of an index in it': dict(change=text(op='index', kind='SQ8')),
        'index in it.': dict(change=text(op='index', kind=3), packed=good),
        'must be bytes': dict(change=text(op='index', kind='SQ8'), packed=good.float()),
        'cannot be read: it must be an index of faiss': dict(change=text(op='index', kind='SQ8'), packed=good[:-9]),
        'does not fit the gallery: it is IndexScalarQuantizer for 4': dict(change=text(op='index', kind='hnsw'), packed=good),
        "got 'SQX'": dict(change=text(op='index', kind='SQX'), packed=good),
        'the parts of a change': dict(change=text(op='remove'), rows=torch.tensor([1]), packed=good)}.items():
        save_file(o, folder/name)
        about = json.loads((folder/'embedder.json').read_text())
        with pytest.raises(ValueError, match='was changed or cut off'): load_embedder(folder)
        about['sha256'][name] = hash_of(folder/name)
        whole = (folder/'embedder.json').read_text()
        (folder/'embedder.json').write_text(json.dumps(about))
        with pytest.raises(ValueError, match=f"'{name}' in .* is no change of a gallery: .*{says}"): load_embedder(folder)
        (folder/'embedder.json').write_text(whole)

def test_a_threshold_stays_with_changes(folder):
    e = load_embedder(folder)
    e.calibration = dict(threshold=.9, fmr=.1)
    e.save(folder, overwrite=True)
    w = stub(load_embedder(folder, write=True)).add([*np.eye(d)], list('aabb'), list('1234'))
    w.prototypes
    w.rename('b', 'c')
    for e in (w,stub(load_embedder(folder))):
        assert e.threshold==.9 and e.search(np.ones(d), unknown=True)==[] and e.prototypes[0]==['a','c']
        assert e.classify(np.eye(d)[2], how='prototype').label=='c'
        assert [o.item for o in e.search(np.eye(d)[0], unknown=True, filter=['a','c'])]==['1']
        assert e.search(np.eye(d)[0], unknown=True, filter='c')==[]

def test_a_table_has_thresholds_and_no_second_look(folder, tmp_path):
    e = stub(load_embedder(folder)).add([*np.eye(d)], list('aabb'), list('1234')).to_lancedb(tmp_path/'g.lance')
    q = np.array([.1,1,0,0])
    assert [o.item for o in e.search(q, 4, min_score=.9)]==['2'] and e.search(-q, min_score=.9)==[]
    assert e.search(q, 4, min_score=.9, filter='b')==[]
    assert e.classify(q).label==e.classify(q, how='nearest').label=='a' and e.classify(-q, min_score=.5).label is None
    for says,f in {'has no re-ranking': lambda: e.search(q, rerank='qe'), 'its own kind of index': lambda: e.index('hnsw'),
        'compares an index': lambda: e.index_report(), "use 'vote' or 'nearest'": lambda: e.classify(q, how='prototype'),
        'at least 256 rows': lambda: e.index()}.items():
        with pytest.raises(ValueError, match=says): f()

def test_an_array_that_is_filled_again_changes_nothing(empty):
    "A gallery has its own numbers, whether they came as an array or as a tensor"
    x = np.random.default_rng(0).random((8,d)).astype(np.float32)
    for make in (np.empty,torch.empty):
        buf,e = make((4,d), dtype=np.float32 if make is np.empty else torch.float32),stub(load_embedder(empty))
        for i in range(2):
            buf[:] = x[4*i:4*i+4] if make is np.empty else torch.from_numpy(x[4*i:4*i+4])
            e.add_embs(buf, ['a']*4, [f'{4*i+j}' for j in range(4)])
        assert [o[0].item for o in e.hits(x, 1)]==[*map(str, range(8))]

@pytest.mark.parametrize('gone', [None,float('nan'),np.nan,np.float32('nan'),torch.tensor(float('nan'))])
def test_a_missing_label_is_no_class(empty, gone):
    e = stub(load_embedder(empty))
    with pytest.raises(ValueError, match="1 of 3 labels are missing, the first that of '2'"):
        e.add_embs(np.eye(d)[:3], ['a',gone,'b'], list('123'))
    with pytest.raises(ValueError, match='labels are missing'): e.add([*np.eye(d)], ['a','b','c',gone])
    assert not len(e)

def test_what_is_wrong_is_said_before_anything_is_embedded(empty):
    e = load_embedder(empty)
    e.embed = Mock(side_effect=AssertionError('embedded'))
    for kw,says in ((dict(labels=['a']), '2 images, 1 labels'), (dict(labels=['a','b'], items=['1']), '1 names'),
        (dict(labels='a', facts=dict(n=[1])), '1 facts'), (dict(labels='a', bad='drop'), "`bad` is 'skip' or None")):
        with pytest.raises(ValueError, match=says): e.add([np.eye(d)]*2, **kw)

def test_dates_of_every_unit_are_dates(empty):
    import pandas as pd
    e,days = stub(load_embedder(empty)),pd.date_range('2024-05-01', periods=4)
    for unit in ('D','s','us','ns'):
        e = stub(load_embedder(empty)).add([*np.eye(d)], 'a', list('1234'), facts=dict(day=days.values.astype(f'M8[{unit}]')))
        assert [o[:10] for o in e.gallery.facts['day']]==['2024-05-01','2024-05-02','2024-05-03','2024-05-04']
        assert len(e.search(np.ones(d), 4, filter=dict(day=lambda o: o<'2024-05-03')))==2
    assert e.gallery.facts['day'][0]==days[0].isoformat() # the last are those of pandas
    with pytest.raises(ValueError, match='a timedelta'): e.add([*np.eye(d)], 'a', facts=dict(took=np.arange(4).astype('m8[ns]')))
    e = stub(load_embedder(empty)).add([*np.eye(d)], 'a', facts=dict(day=np.array(['2024-05-01','NaT']*2, dtype='M8[ns]')))
    assert e.gallery.facts['day'][1] is None

def test_embeddings_in_any_layout(empty):
    "Backwards, in the other order of bytes, and in whole numbers"
    x = np.random.default_rng(1).random((6,d)).astype(np.float32)
    e = stub(load_embedder(empty)).add_embs(x, ['a']*6, [*map(str, range(6))])
    for o in (x[::-1][::-1],np.flip(x, (0,1))[::-1,::-1],x.astype('>f4'),x.astype('>f8'),x.T.copy().T):
        assert [h[0].item for h in e.hits(o, 1)]==[*map(str, range(6))]
    assert [h[0].item for h in e.hits(x[::-1], 1)]==[*map(str, range(5, -1, -1))]
    e.add_embs(x[:0], [], [])
    assert len(e)==6

@pytest.mark.parametrize('score', ['.5',float('nan'),[.5]])
def test_a_least_score_is_a_number(empty, score):
    e = stub(load_embedder(empty)).add([*np.eye(d)], 'a')
    with pytest.raises(ValueError, match='`min_score` is a number'): e.search(np.ones(d), min_score=score)
    assert e.search(np.eye(d)[0], min_score=np.float32(.5)) and e.search(np.eye(d)[0], min_score=1)

def test_broken_images_can_be_left_out(empty, tmp_path):
    "With their labels, names and facts; without `bad` nothing is added, and the sentence says what to do"
    from PIL import Image
    rng,fns = np.random.default_rng(0),[tmp_path/'ab'[i%2]/f'{i}.png' for i in range(6)]
    for o in fns:
        o.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20,20,3), dtype=np.uint8)).save(o)
    for o in fns[2:4]: o.write_bytes(o.read_bytes()[:200])
    e = load_embedder(empty)
    with pytest.raises(ValueError, match=r"2.png.* cannot be read.*Nothing was added: .*bad='skip'"): e.add(tmp_path)
    assert not len(e)
    with pytest.warns(UserWarning, match=r"2 of 6 images cannot be read, and are left out; the first is .*2.png"):
        e.add(tmp_path, bad='skip')
    assert sorted(zip(e.gallery.labels, (Path(o).name for o in e.gallery.items)))==[('a','0.png'),('a','4.png'),('b','1.png'),('b','5.png')]
    f = load_embedder(empty)
    with pytest.warns(UserWarning, match='2 of 6'): f.add(fns, [*range(6)], facts=dict(n=np.arange(6)), bad='skip')
    assert f.gallery.labels==[*'0145'] and f.gallery.facts['n']==[0,1,4,5]
    for o in fns: assert (o in fns[2:4]) or e.search(o, 1)[0].item==str(o)

def test_embeddings_are_no_image(empty):
    e = load_embedder(empty).add([np.full((9,9), .5)], 'a')
    embs = torch.nn.functional.normalize(torch.rand(3, d), dim=1)
    with pytest.raises(ValueError, match='3×4 numbers is one of embeddings.*`finder.hits'): e.search(embs)
    assert e.search(np.random.default_rng(0).random((3,d)), 1)

def test_the_mean_of_a_class_has_rows_of_any_size(empty):
    "Each row counts once, however long it is, as the cosine counts it"
    x = np.array([[1,0,0,0],[0,1,0,0],[0,0,1,0],[0,0,0,1]], dtype=np.float32)
    e = stub(load_embedder(empty)).add_embs(x*np.float32([[1e25],[1],[1e-25],[1]]), list('aabb'), list('1234'))
    assert e.prototypes[0]==['a','b'] and torch.allclose(e.prototypes[1], torch.tensor([[1,1,0,0],[0,0,1,1]])/2**.5)
