"Several processes with one batch: the weights and the columns of one process; what they share is in `distributed_checks.py`"
import os, signal, socket, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest, torch
from fastcore.all import mkdir
pytest.importorskip('accelerate')
import distributed_checks as checks
from dmlfast.data.batches import BalancedSampler

here = Path(__file__).parent

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])

def launch(few, folder, *names, n=2, timeout=300):
    "Run checks in `n` processes; exit status and output of each. All are ended when time is up"
    few.df.to_pickle(folder/'few.pkl')
    (folder/'where').write_text(str(few.path))
    env = {**os.environ, **dict(WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port())}
    logs = [open(folder/f'{r}.log', 'w') for r in range(n)]
    ps = [subprocess.Popen([sys.executable, here/'distributed_checks.py', folder, folder, *names], stdout=o, stderr=subprocess.STDOUT,
        env={**env, 'RANK':str(r), 'LOCAL_RANK':str(r)}) for r,o in enumerate(logs)]
    end = time.monotonic()+timeout
    try:
        for p in ps: p.wait(max(0, end-time.monotonic()))
    finally:
        for p,o in zip(ps, logs):
            p.kill()
            p.wait()
            o.close()
    return [(p.returncode, (folder/f'{r}.log').read_text()) for r,p in enumerate(ps)]

def results(few, folder, *names):
    "What checks gave in each of two processes"
    ended = launch(few, folder, *names)
    assert not any(o[0] for o in ended), '\n\n'.join(o[1][-3000:] for o in ended)
    return [torch.load(folder/f'{r}.pt', weights_only=False) for r in (0,1)]

@pytest.fixture(scope='module')
def steps(few, tmp_path_factory):
    return results(few, tmp_path_factory.mktemp('steps'), 'weights', 'memory', 'controls', 'draws', 'refusals')

@pytest.fixture(scope='module')
def fits_at(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp('fits')
    return folder,results(few, folder, 'columns', 'roles', 'half', 'full')

@pytest.fixture(scope='module')
def runs_at(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    return folder,results(few, folder, 'finding', 'resume', 'head')

@pytest.fixture
def fits(fits_at): return fits_at[1]
@pytest.fixture
def runs(runs_at): return runs_at[1]

def far(a, b):
    assert a.keys()==b.keys()
    return max((a[k].double()-b[k].double()).abs().max().item() for k in a)

# the sampler

@pytest.mark.parametrize('n', [2,4])
def test_loaders_that_share_make_the_batches_of_one(few, n):
    "Each has whole classes, different ones, and as many batches; together they are one loader of `n` times as many images"
    whole = few.dataloaders(bs=16, per_class=4, seed=3, num_workers=0).train
    parts = [few.dataloaders(bs=16//n, per_class=4, seed=3, num_workers=0).train for _ in range(n)]
    for r,dl in enumerate(parts): dl.share(r, n)
    assert {len(o) for o in parts}=={len(whole)} and len(whole)>3
    for epoch in (0,1,5):
        for o in (whole,*parts): o.set_epoch(epoch)
        idx = np.stack([np.array(o.get_idxs()).reshape(len(o), -1) for o in parts], 1)
        assert (idx.reshape(len(whole), 16)==np.array(whole.get_idxs()).reshape(-1, 16)).all()
        classes = np.array(few.df.label[few.df.split=='train'].astype('category').cat.codes)[idx] # in the order of the items
        assert len(np.unique(classes))==20 # every class in every epoch
    parts[0].share(0, 1)
    assert len(parts[0].get_idxs())==len(parts[0])*16//n and len(parts[0])>len(whole) # it has it all again

def test_classes_that_do_not_divide():
    "Seven classes, four of them in a batch of two loaders: every epoch has each class, and no batch has one twice"
    labels = np.repeat(np.arange(7), 5)
    s = BalancedSampler(labels, 8, 2, seed=1)
    for epoch in range(6):
        batches = labels[s.idxs(epoch)].reshape(len(s), 2, 2, 2) # batch, loader, class, image
        assert (batches[...,0]==batches[...,1]).all()
        assert all(len(set(o.ravel()))==4 for o in batches) and set(batches.ravel())==set(range(7))

@pytest.mark.parametrize('n', [2,3,5])
def test_items_in_order_are_shared_in_whole_batches(few, n):
    whole = few.dataloaders(bs=24, per_class=4, num_workers=0).valid
    want,parts = [o[1].tolist() for o in whole],[]
    for r in range(n):
        dl = whole.new()
        dl.share(r, n)
        parts.append([o[1].tolist() for o in dl])
        assert len(parts[-1])==len(dl)
    assert len(want)==3 and len(want[-1])<24 and sum(parts, [])==want
    assert n!=2 or list(map(len, parts))==[1,2]

# equality with one process

@pytest.fixture(scope='module')
def one(few, tmp_path_factory): return checks.check_weights(few, 1, tmp_path_factory.mktemp('one'))

def test_the_weights_are_those_of_one_process(steps, one):
    "In float64, after three steps of each loss, miners that draw and gradients in chunks included"
    assert len(one)==15
    for k in one:
        assert far(one[k], steps[0]['weights'][k])<1e-12, k
        assert far(steps[0]['weights'][k], steps[1]['weights'][k])==0, k

def test_a_memory_is_that_of_one_process(steps, few, tmp_path):
    "In float64, over three epochs, and where the two were killed after the first"
    one = checks.check_memory(few, 1, tmp_path)['whole']
    assert len(one['embs'])==80 and one['steps']>6 and one['at'] # full, and more than once around
    for o in (steps[0]['memory'], steps[1]['memory']):
        for k in ('whole','again'):
            assert far(one['weights'], o[k]['weights'])<1e-12
            torch.testing.assert_close(o[k]['embs'], one['embs'], rtol=0, atol=1e-12)
            assert torch.equal(o[k]['labels'], one['labels']) and (o[k]['at'],o[k]['steps'])==(one['at'],one['steps'])
    plain = checks.plain(few, checks.MultiSimilarityLoss(), 1, steps=100, metrics=[])
    assert far(one['weights'], checks.weights(plain))>1e-3 # without a memory

def test_without_gathering_and_without_the_factor_they_are_others(steps, one):
    for k in ('alone','mean'): assert far(one['triplet'], steps[0]['controls'][k])>1e-3

def test_random_numbers(steps):
    "Those of a loss are the same in both processes, those of augmentation and dropout are not"
    a,b = (o['draws'] for o in steps)
    assert a['drawn']==b['drawn'] and len(set(a['drawn']))==3 and a['losses']==b['losses'] and a['own']!=b['own']
    assert a['rows']==[32]*3

def test_what_cannot_be_shared_is_refused(steps):
    for o in steps:
        o = o['refusals']
        assert 'dl_type=BalancedDL' in o['loader'] and "'count'" in o['accum'] and 'find_unused_parameters' in o['unused']
        assert 'share one batch of 88 images' in o['many'] and '20' in o['many']
        assert o['first']=='there already' # an error of process 0 is everybody's

# fits

def test_columns_are_equal_and_those_of_one_process(fits, few, tmp_path):
    "With validation batches that do not divide by the processes"
    a,b = (o['columns'] for o in fits)
    assert a['values']==b['values'] and len(a['values'])==3 and a['n_valid']==3 and a['shards']==[(0,1)]*2
    learn = checks.small(few, tmp_path)
    learn.model.load_state_dict(a['weights'])
    assert a['valid']==b['valid']==pytest.approx(list(learn.validate()), rel=1e-5)
    embs,ys = learn.embed(bar=False)
    for o in (a,b):
        assert torch.equal(o['ys'], ys)
        for k in ('embs','preds'): assert torch.allclose(o[k], embs, atol=1e-6)
        assert torch.allclose(o['tta'], torch.as_tensor(learn.tta(n=1)[0]), atol=1e-6)
        assert o['scores']==pytest.approx({k:v['mean'] for k,v in learn.evaluate().to_dict()['metrics'].items()}, rel=1e-5)
    best = max(a['values'], key=lambda o: o[2])
    assert a['valid'][1]==pytest.approx(best[2]) # SaveModelCallback has loaded it in both

def test_queries_and_gallery_are_scored_by_their_protocol(fits, few, tmp_path):
    a,b = (o['roles'] for o in fits)
    learn = checks.small(checks.with_roles(few), tmp_path)
    learn.model.load_state_dict(a['weights'])
    assert a['row'][1:-1]==b['row'][1:-1] and a['valid']==b['valid']==pytest.approx(list(learn.validate()), rel=1e-5)
    assert a['recall']==b['recall']==pytest.approx(learn.evaluate()['recall@1']) and a['recall']==pytest.approx(a['valid'][1])
    every = checks.small(few, tmp_path)
    every.model.load_state_dict(a['weights'])
    assert a['recall']!=pytest.approx(every.evaluate()['recall@1']) # each image a query

def test_half_precision(fits):
    a,b = (o['half'] for o in fits)
    assert far(a['weights'], b['weights'])==0 and a['values']==b['values'] and all(np.isfinite(a['values'][0]))

def test_a_full_disk_of_the_first_process(fits):
    "The fit goes on in both, with the checkpoint before; what cannot be written says so, and leaves nothing and the learner as it was"
    a,b = (o['full'] for o in fits)
    assert a['res']['embedder']==b['res']['embedder'] and set(b['res'])=={'embedder'} # all of them make it; to `save` is the first's
    assert set(a['res'])=={'embedder','export','save'} and all('too large' in o or 'output error' in o for o in a['res'].values()), a['res']
    for o in (a,b):
        assert o['kept'] and sum('No checkpoint was written after epoch 0' in m for m in o['said'])==1, o['said']
    assert far(a['weights'], b['weights'])==0 and a['left']==['checkpoint.pt'], a['left']

def test_the_first_process_alone_writes_and_prints(fits_at, runs_at):
    folder,(a,b) = fits_at
    assert {'best.pth','history.csv','export.pkl','embedder.json','weights.safetensors'}<=set(a['columns']['files'])
    assert b['columns']['files']==[] and not list((folder/'columns').rglob('of1/*.*'))
    assert 'Better model found' in (folder/'0.log').read_text() and not (folder/'1.log').read_text().strip()
    assert not any(k.startswith('module.') for k in torch.load(runs_at[0]/'resume'/'run'/'checkpoint.pt', weights_only=True)['model'])

def test_lr_find_puts_back_and_fine_tune_agrees(runs):
    a,b = (o['finding'] for o in runs)
    assert a['rate']==b['rate'] and a['steps']==b['steps']
    for o in (a,b): assert far(o['before'], o['after'])==0
    assert far(a['tuned'], b['tuned'])==0 and far(a['after'], a['tuned'])>1e-4

def test_a_run_goes_on_exactly_with_as_many_processes(runs_at, few, tmp_path):
    folder,(a,b) = runs_at
    for o in (a,b): assert far(o['resume']['whole'], o['resume']['again'])==0
    assert far(a['resume']['whole'], b['resume']['whole'])==0
    learn = checks.small(few, tmp_path, cbs=[checks.SelfSupervisedRanking(n=2, m=4, p=.7)])
    learn.resume(folder/'resume'/'run')
    with pytest.raises(ValueError, match='had 2 processes, and here is 1'): learn.fit_one_cycle(3, 1e-2)

def test_ranking_has_one_coin_and_its_own_views(runs):
    a,b = (o['resume'] for o in runs)
    assert a['values']==b['values'] and not torch.equal(a['views'], b['views'])
    np.testing.assert_equal(a['ssr'], b['ssr'])
    assert 0<np.isnan(a['ssr']).sum()<len(a['ssr'])

def test_heads_begin_and_are_fitted_alike(runs):
    "Although the bodies of the two processes came from different files"
    a,b = (o['head'] for o in runs)
    assert far(a['weights'], b['weights'])==0 and a['rows']==b['rows'] and {'features'}<=a['rows'].keys() and a['said']==b['said']

def test_a_process_that_ends_ends_the_others(few, tmp_path):
    began = time.monotonic()
    (first,log),(second,_) = launch(few, tmp_path, 'killed', timeout=120)
    assert second==9 and first==1 and 'Another of the 2 processes ended or did not answer within 60 minutes' in log
    assert time.monotonic()-began<100

def test_a_process_that_hangs_is_waited_for_so_long(few, tmp_path):
    began = time.monotonic()
    (first,log),_ = launch(few, tmp_path, 'hung', timeout=250)
    assert first==1 and 'did not answer within 0.05 minutes, so process 0 ends' in log, log[-2000:]

# the command

def own(few, tmp_path):
    (tmp_path/'own').mkdir()
    for c in set(few.df.label): (tmp_path/'own'/c).symlink_to(few.path/c)

def lives(pid):
    "Is there a process of this number, and not one that only waits to be counted?"
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0]!='Z'
    except OSError: return False

def train(*args, cwd, until=None, then=None):
    "Run `dmlfast-train`; when so many further epochs are written, do something to it. Its status, and what it printed"
    table,stored = cwd/'run'/'history.csv',cwd/'run'/'checkpoint'/'checkpoint.pt'
    def _epochs(): return len(table.read_text().splitlines())-1 if table.is_file() and stored.is_file() else 0
    end,before,parts = time.monotonic()+400,_epochs(),[]
    with open(cwd/'out.txt', 'w') as out, open(cwd/'err.txt', 'w') as err:
        p = subprocess.Popen([Path(sys.executable).parent/'dmlfast-train', '--out', 'run', *map(str, args)], cwd=cwd, stdout=out,
            stderr=err, start_new_session=True)
    try:
        if until:
            while p.poll() is None and _epochs()<before+until and time.monotonic()<end: time.sleep(.1)
            parts = parts_of(p.pid)
            assert len(parts)==2, (before, _epochs(), p.poll())
            then(p.pid, parts)
        p.wait(max(0, end-time.monotonic()))
        for o in parts: assert not lives(o) # none goes on by itself
    finally:
        for o in (p.pid,*parts):
            if lives(o): os.kill(o, signal.SIGKILL)
    return p.returncode,(cwd/'out.txt').read_text(),(cwd/'err.txt').read_text().strip().splitlines()

def parts_of(launcher):
    "Processes of a launcher, in order"
    rows = [o.split() for o in subprocess.run(['ps','-ww','-eo','pid,ppid,args'], capture_output=True, text=True).stdout.splitlines()]
    return sorted(int(o[0]) for o in rows if o[1]==str(launcher) and 'run_part' in ' '.join(o))

@pytest.mark.skipif(sys.platform!='linux', reason='it looks at processes as Linux has them')
def test_the_command_ends_all_processes_and_goes_on(few, tmp_path):
    "Ctrl-C, a process that is killed, and a run to the end: one message each, and nothing is lost"
    own(few, tmp_path)
    new = '--data own --arch test_resnet --no-pretrained --size 24 --bs 16 --epochs 10 --workers 0 --launch 2'.split()
    status,_,err = train(*new, cwd=tmp_path, until=1, then=lambda pid, parts: os.kill(pid, signal.SIGINT))
    assert status==130 and len(err)==1 and 'goes on with it' in err[0] and '--out run --resume --launch 2' in err[0]
    again = '--resume','--launch',2
    status,_,err = train(*again, cwd=tmp_path, until=1, then=lambda pid, parts: os.kill(parts[1], signal.SIGKILL))
    assert status==1 and len(err)==1 and 'Process 1 was ended by SIGKILL' in err[0] and 'goes on with it' in err[0]
    status,out,err = train(*again, cwd=tmp_path)
    assert status==0 and not err and (tmp_path/'run'/'results.json').is_file()
    assert len((tmp_path/'run'/'history.csv').read_text().splitlines())==11 and out.count('epoch ')==1

@pytest.mark.skipif(sys.platform!='linux', reason='it looks at processes as Linux has them')
def test_processes_end_with_a_launcher_that_is_killed(few, tmp_path):
    "It can end nothing any more; no file is left half written, and the run goes on"
    own(few, tmp_path)
    left = []
    def _kill(pid, parts):
        left.extend(parts)
        os.kill(pid, signal.SIGKILL)
        end = time.monotonic()+60
        while any(map(lives, parts)) and time.monotonic()<end: time.sleep(.2)
    new = '--data own --arch test_resnet --no-pretrained --size 24 --bs 16 --epochs 200 --workers 0 --launch 2'.split()
    status,_,err = train(*new, cwd=tmp_path, until=1, then=_kill)
    assert status==-signal.SIGKILL and not any(map(lives, left)) and not err
    assert {o.name for o in (tmp_path/'run'/'checkpoint').iterdir()}=={'checkpoint.pt'}
    assert not [o for o in (tmp_path/'run').iterdir() if o.name.startswith('.')]
    assert torch.load(tmp_path/'run'/'checkpoint'/'checkpoint.pt', weights_only=True)['epoch']>=1

def test_an_experiment_in_two_processes(few, tmp_path):
    "Trials and runs are those of one process, with the plan's batches; the first process writes, and what it gives up all give up"
    a,b = results(few, mkdir(tmp_path/'two'), 'experiment')
    rows,one = a['experiment']['rows'],checks.check_experiment(few, 1, tmp_path)['rows']
    assert [o['kind'] for o in rows]==['trial','trial','run','run','trial'] and rows[-1]['state']=='PRUNED' and len(rows[-1]['scores'])==1
    for x,y in zip(rows, one, strict=True):
        assert (x['kind'],x['plan'],x.get('params'),x.get('state'))==(y['kind'],y['plan'],y.get('params'),y.get('state'))
        if x['kind']=='trial': assert x['scores']==pytest.approx(y['scores'], abs=2e-3)
        else: assert x['scores']==pytest.approx(y['scores'], abs=5e-3) and x['processes']==2 and 'processes' not in y
    assert len(a['experiment']['kept'])==2 and '2 processes share out batches' in a['experiment']['refused']

@pytest.mark.skipif(sys.platform!='linux', reason='it looks at processes as Linux has them')
def test_the_command_compares_methods_in_two_processes(few, tmp_path):
    import json
    own(few, tmp_path)
    def _plan(more=''):
        (tmp_path/'p.toml').write_text('seeds = 1\nmeasures = ["recall@1"]\n[settings]\ndata = {path = "own", size = 24}\n'
            'batch = {bs = 32, num_workers = 0}\nmodel = {arch = "test_resnet", pretrained = false, emb_sz = 16}\nfit = {n_epoch = 1}\n'
            f'[methods.a]\nloss = {{name = "triplet"}}\nspace = {{}}\n{more}')
    def _bench(*args):
        p = subprocess.run([Path(sys.executable).parent/'dmlfast-bench', 'p.toml', '--launch', '2', *args], cwd=tmp_path,
            capture_output=True, text=True, timeout=500)
        return p.returncode,p.stdout,p.stderr.strip().splitlines()
    _plan()
    status,out,err = _bench('--json')
    res = json.loads(out)
    assert status==0 and res['left']==0 and [(o['seed'],o['processes']) for o in res['runs']]==[(0,2)], err
    assert sum(o.startswith('a, seed 0: recall@1') for o in err)==1 # said once
    _plan('[methods.b]\ntrainer = "toy.py:train"\n')
    (tmp_path/'toy.py').write_text('def train(settings, ds, valid, report): pass\n')
    status,_,err = _bench()
    assert status==1 and len(err)==1 and "Method 'b' has a trainer of its own" in err[0], err
    assert _bench('--workers', '2')[0]==2

def test_without_accelerate(monkeypatch, make_learner):
    "It is one sentence, and the rest of the library does not need it"
    learn = make_learner()
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    with pytest.raises(ImportError, match=r'pip install "dmlfast\[distributed\]"'):
        with learn.distrib_ctx(): pass

@pytest.mark.skipif(torch.cuda.device_count()<2, reason='it takes two GPUs')
def test_on_gpus(few, tmp_path):
    "With NCCL, and batch norm over the images of both"
    a,b = results(few, tmp_path, 'gpus')
    assert far(a['gpus']['weights'], b['gpus']['weights'])==0 and a['gpus']['values']==b['gpus']['values']
    assert a['gpus']['synced']>0 and not a['gpus']['left'] and a['gpus']['devices']!=b['gpus']['devices']
