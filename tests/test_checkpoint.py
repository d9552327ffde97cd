"Runs that are killed at any moment, and what they are resumed from"
import io, os, random, re, resource, signal
from contextlib import redirect_stdout
import pytest, torch
from fastai.vision.all import *
from dmlfast.all import *

@pytest.fixture(scope='module')
def few(few):
    "A handful of images of each class: three batches of 32 an epoch"
    df = few.df[few.df.groupby('label').cumcount()<5]
    return MetricDataset(df, few.path, few.name, size=None, flip=False)

class Do(Callback):
    "Call something at the beginning of a batch"
    run_valid = False
    def __init__(self, at, f): self.at,self.f = at,f
    def before_batch(self):
        if self.train_iter==self.at: self.f()

def stop(): raise KeyboardInterrupt
def die(*args): os.kill(os.getpid(), signal.SIGKILL)

def killed(f):
    "Run `f` in a process of its own, which must end by `kill -9`"
    if not (pid := os.fork()):
        try: f()
        finally: os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])==-signal.SIGKILL

def same(a, b):
    assert str([list(o) for o in a.recorder.values])==str([list(o) for o in b.recorder.values]) # nan is nan
    assert [float(o) for o in a.recorder.losses]==[float(o) for o in b.recorder.losses] and a.recorder.lrs==b.recorder.lrs
    assert a.recorder.iters==b.recorder.iters
    assert {k:v.tolist() for k,v in a.model.state_dict().items()}=={k:v.tolist() for k,v in b.model.state_dict().items()}
    assert plain(a.opt)==plain(b.opt) and a.train_iter==b.train_iter

def plain(opt): return re.sub(r'np\.float64\(([^)]*)\)', r'\1', str(opt.state_dict())) # a number of NumPy's is as good as a number

def scramble():
    "Another process would have other random states"
    set_seed(random.randint(0, 999))

@pytest.mark.parametrize('at', [0,4,11])
def test_killed_anywhere_and_resumed_is_a_run_that_was_not(make_learner, tmp_path, at):
    def cbs(name):
        return [SaveModelCallback(monitor='recall@1', fname=name), EarlyStoppingCallback(monitor='map@r', patience=3),
            GradientAccumulation(48), CSVLogger(f'{name}.csv')]
    def go(learn, *more, name='a'): learn.fit_one_cycle(4, 1e-2, cbs=[*cbs(name), *more])
    run = tmp_path/'run'
    whole = make_learner(ProxyNCALoss())
    go(whole)
    killed(lambda: go(make_learner(ProxyNCALoss()), Checkpoint(run), Do(at, die), name='b'))
    scramble()
    assert len(whole.dls.train)==3 # `at` is before all, within an epoch, and in the last batch
    learn = make_learner(ProxyNCALoss(), seed=9)
    if (run/'checkpoint.pt').exists(): learn.resume(run)
    else: learn = make_learner(ProxyNCALoss())
    go(learn, Checkpoint(run), name='b')
    same(learn, whole)
    rows = [[o.split(',')[:-1] for o in (tmp_path/f'{n}.csv').read_text().splitlines()] for n in 'ab'] # all but the time
    assert rows[0]==rows[1] and len(rows[0])==len(whole.recorder.values)+1

def test_neighbours_of_classes_go_on_with_the_run(make_learner, tmp_path):
    "What a model knew when they were found is not known again"
    def go(learn, *cbs): learn.fit_one_cycle(3, 1e-2, cbs=cbs)
    near = {c:[(c+1)%20,(c+2)%20] for c in range(20)}
    whole,half = make_learner(ProxyNCALoss()),make_learner(ProxyNCALoss())
    for o in (whole,half): o.dls.train.set_neighbours(near, .75)
    go(whole)
    with pytest.raises(KeyboardInterrupt): go(half, Checkpoint(tmp_path/'run'), Do(len(whole.dls.train)+1, stop))
    scramble()
    learn = make_learner(ProxyNCALoss(), seed=9).resume(tmp_path/'run')
    go(learn, Checkpoint(tmp_path/'run'))
    same(learn, whole)

@pytest.mark.parametrize('where', ['learner', 'fit'])
def test_ranking_goes_on_with_its_own_coin(make_learner, tmp_path, where):
    def make(seed=0): return make_learner(MarginLoss(), seed=seed, cbs=ssr() if where=='learner' else None)
    def ssr(): return SelfSupervisedRanking(n=2, m=4, p=.5)
    def go(learn, *cbs): learn.fit_one_cycle(3, 1e-2, cbs=[*cbs, *([ssr()] if where=='fit' else [])])
    whole = make()
    keep = Keep()
    go(whole, keep)
    with pytest.raises(KeyboardInterrupt): go(make(), Checkpoint(tmp_path/'run'), Do(2*len(whole.dls.train)+1, stop))
    scramble()
    learn,kept = make(seed=7).resume(tmp_path/'run'),Keep()
    go(learn, Checkpoint(tmp_path/'run'), kept)
    same(learn, whole)
    assert str(kept.series)==str(keep.series) and len(keep.series)==3*len(whole.dls.train)

class Keep(Callback):
    "Keep the series of ranking losses"
    def after_epoch(self): self.series = list(self.learn.self_supervised_ranking.ssr_losses)

def test_two_fits_of_fine_tune(make_learner, tmp_path, capsys):
    whole = make_learner()
    whole.fine_tune(3, 1e-2)
    n = 3*len(whole.dls.train)
    learn = make_learner()
    with pytest.raises(KeyboardInterrupt): learn.fine_tune(3, 1e-2, cbs=[Checkpoint(tmp_path/'run'), Do(n//3+1, stop)])
    scramble()
    learn = make_learner(seed=5).resume(tmp_path/'run')
    learn.fine_tune(3, 1e-2, cbs=Checkpoint(tmp_path/'run'))
    same(learn, whole)
    assert 'Fit 1 of the run' in capsys.readouterr().out

def test_the_callback_need_not_be_repeated_and_every_is_kept(make_learner, tmp_path):
    whole = make_learner()
    whole.fit(5, 1e-2)
    learn,n = make_learner(),len(whole.dls.train)
    killed(lambda: learn.fit(5, 1e-2, cbs=[Checkpoint(tmp_path/'run', every=2), Do(3*n+1, die)]))
    learn = make_learner(seed=2).resume(tmp_path/'run')
    assert learn.checkpoint.every==2
    learn.fit(5, 1e-2)
    same(learn, whole)
    assert torch.load(tmp_path/'run'/'checkpoint.pt', weights_only=True)['epoch']==5

def test_killed_twice(make_learner, tmp_path):
    "`resume` adds a `Checkpoint`, and the call as it was has one too: they must not count the fit twice"
    def go(learn, *cbs): learn.fit_one_cycle(4, 1e-2, cbs=[Checkpoint(tmp_path/'run'), *cbs])
    whole = make_learner()
    n = len(whole.dls.train)
    whole.fit_one_cycle(4, 1e-2)
    for i in (1,2):
        learn = make_learner(seed=i)
        if i>1: learn.resume(tmp_path/'run')
        else: learn = make_learner()
        with pytest.raises(KeyboardInterrupt): go(learn, Do(i*n+2, stop))
    for _ in range(2): # the second time it is complete
        learn = make_learner(seed=3).resume(tmp_path/'run')
        go(learn)
        same(learn, whole)

def test_a_fit_after_an_interrupted_resumed_one_is_whole(make_learner, tmp_path):
    learn = make_learner()
    n = len(learn.dls.train)
    with pytest.raises(KeyboardInterrupt): learn.fit(3, 1e-2, cbs=[Checkpoint(tmp_path/'run'), Do(n+1, stop)])
    learn = make_learner().resume(tmp_path/'run')
    with pytest.raises(KeyboardInterrupt): learn.fit(3, 1e-2, cbs=Do(n+2, stop))
    learn.fit(2, 1e-2)
    assert len(learn.recorder.values)==2

def test_a_complete_run_is_not_repeated(make_learner, tmp_path):
    learn = make_learner()
    learn.fit(2, 1e-2, cbs=Checkpoint(tmp_path/'run'))
    again = make_learner(seed=2).resume(tmp_path/'run')
    again.fit(2, 1e-2, cbs=[Checkpoint(tmp_path/'run'), Do(0, die)])
    same(again, learn)

def test_reduced_rates_and_columns_that_repeat(make_learner, tmp_path):
    def go(learn, *cbs): learn.fit(5, 1e-2, cbs=[ReduceLROnPlateau(monitor='train_loss', patience=1, min_delta=9.), *cbs])
    make = lambda **kw: make_learner(cbs=RetrievalMetrics(every=3), **kw)
    whole = make()
    go(whole)
    assert whole.opt.hypers[-1]['lr']<1e-3
    with pytest.raises(KeyboardInterrupt): go(make(), Checkpoint(tmp_path/'run'), Do(3*len(whole.dls.train)+2, stop))
    learn = make(seed=4).resume(tmp_path/'run')
    go(learn, Checkpoint(tmp_path/'run'))
    same(learn, whole)

def test_a_checkpoint_is_written_whole_or_not_at_all(make_learner, tmp_path, monkeypatch):
    learn,run = make_learner(),tmp_path/'run'
    n = len(learn.dls.train)
    def go():
        monkeypatch.setattr(os, 'replace', lambda *a: die() if learn.epoch==2 else os.rename(*a))
        learn.fit(4, 1e-2, cbs=Checkpoint(run))
    killed(go)
    assert torch.load(run/'checkpoint.pt', weights_only=True)['epoch']==2

def test_a_full_disk_leaves_the_earlier_checkpoint_and_the_run_goes_on(make_learner, tmp_path):
    learn,run,n = make_learner(),tmp_path/'run',None
    def fill(): 
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000,-1))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with redirect_stdout(io.StringIO()), pytest.warns(UserWarning, match='No checkpoint was written after epoch 1.*before it is kept'):
            learn.fit(2, 1e-2, cbs=[Checkpoint(run), Do(len(learn.dls.train), fill)])
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert torch.load(run/'checkpoint.pt', weights_only=True)['epoch']==1 and [o.name for o in run.iterdir()]==['checkpoint.pt']

def test_a_table_that_cannot_be_written_does_not_end_the_run(make_learner, tmp_path):
    "Its rows are written with those of the next epoch"
    from dmlfast.study.runs import History
    learn,old = make_learner(),resource.getrlimit(resource.RLIMIT_FSIZE)
    def limit(n):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n,-1))
    try:
        # what is printed may go to a file, too
        with redirect_stdout(io.StringIO()), pytest.warns(UserWarning, match='The rows up to epoch 0 were not written.*the next epoch'):
            learn.fit(2, 1e-2, cbs=[History(tmp_path/'h.csv'), Do(0, lambda: limit(10)), Do(len(learn.dls.train), lambda: limit(old[0]))])
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert [o.split(',')[0] for o in (tmp_path/'h.csv').read_text().splitlines()]==['epoch','0','1'] and len(list(tmp_path.iterdir()))==1

def test_weights_are_saved_whole_or_not_at_all(make_learner, tmp_path, monkeypatch):
    "Also those of the best epoch, which `SaveModelCallback` writes"
    learn = make_learner()
    assert learn.save('best.v1')==tmp_path/'models'/'best.v1.pth'
    before = (tmp_path/'models'/'best.v1.pth').read_bytes()
    def _half(o, file, **kwargs):
        Path(file).write_bytes(b'half')
        raise OSError('No space left on device')
    with monkeypatch.context() as m:
        m.setattr(torch, 'save', _half)
        with pytest.raises(OSError, match='No space'): learn.save('best.v1')
    assert [o.name for o in (tmp_path/'models').iterdir()]==['best.v1.pth'] and (tmp_path/'models'/'best.v1.pth').read_bytes()==before
    learn.load('best.v1')

def test_a_run_goes_on_with_progress_bars(make_learner, tmp_path):
    "As in a notebook or a terminal"
    from fastai.callback.progress import ProgressCallback
    with pytest.raises(KeyboardInterrupt): make_learner().fit(3, cbs=[Checkpoint(tmp_path/'run'), Do(4, stop)])
    learn = make_learner().resume(tmp_path/'run')
    learn.add_cb(ProgressCallback())
    learn.fit(3)
    assert len(learn.recorder.values)==3 and not hasattr(learn.progress, 'mbar')

def test_a_folder_that_cannot_be_written_to(make_learner, tmp_path):
    (tmp_path/'file').write_text('')
    learn = make_learner()
    with pytest.raises(OSError, match='Checkpoints cannot be written to'): learn.fit(1, cbs=[Checkpoint(tmp_path/'file'/'run'), Do(0, die)])

def test_what_cannot_be_resumed(make_learner, tmp_path, few):
    run = tmp_path/'run'
    with pytest.raises(FileNotFoundError, match='There is no checkpoint in'): make_learner().resume(run)
    make_learner().fit(1, 1e-2, cbs=Checkpoint(run))
    learn = make_learner()
    for _ in range(2): # a call that was refused is refused again
        with pytest.raises(FileExistsError, match='learn.resume.*goes on.*overwrite=True'): learn.fit(1, 1e-2, cbs=Checkpoint(run))
    learn.resume(run)
    for _ in range(2):
        with pytest.raises(ValueError, match='one of 1 epochs, and this one is of 3'): learn.fit(3, 1e-2)
    with pytest.raises(ValueError, match=r"another model: 'head.*\(16, .*and \(8, "): make_learner(emb_sz=8).resume(run)
    with pytest.raises(ValueError, match="another model: 'loss_func.proxies' is not in it"): make_learner(ProxyNCALoss()).resume(run)
    make_learner(ProxyNCALoss()).fit(1, 1e-2, cbs=Checkpoint(tmp_path/'proxies'))
    with pytest.raises(ValueError, match="another model: 'loss_func.proxies' is not here"): make_learner().resume(tmp_path/'proxies')
    make_learner(cbs=SelfSupervisedRanking(n=2, m=4)).fit(1, 1e-2, cbs=Checkpoint(tmp_path/'ranked'))
    learn = make_learner().resume(tmp_path/'ranked')
    with pytest.raises(ValueError, match="another model: 'ranking_head.* is not here"): learn.fit(1, 1e-2) # forgotten
    learn = make_learner()
    learn.dls.train_ds.tls[1].vocab = ['a']
    with pytest.raises(ValueError, match='on other classes'): learn.resume(run)
    make_learner().fit(1, 1e-2, cbs=Checkpoint(run, overwrite=True))
    data = (run/'checkpoint.pt').read_bytes()
    for bad in (data[:len(data)//2], data[:9000], b'', b'hello', b'x'*100):
        (run/'checkpoint.pt').write_bytes(bad)
        with pytest.raises(ValueError, match='is not a checkpoint'): make_learner().resume(run)
    with pytest.raises(ValueError, match='`every` is a number of epochs'): Checkpoint(run, every=0)

@pytest.mark.parametrize('how', ['the same','rate','loss','batches','ranking','flat'])
def test_another_call_goes_on_and_says_so(make_learner, tmp_path, how, recwarn):
    "One sentence with what differs, and none where nothing does"
    def make(loss=None, bs=32, seed=0, m=4):
        return make_learner(loss or TripletLoss(margin=.2), seed=seed, bs=bs, cbs=SelfSupervisedRanking(n=2, m=m))
    def go(learn, lr=1e-2, **kwargs): getattr(learn, 'fit' if how=='flat' else 'fit_one_cycle')(3, lr, **kwargs)
    learn,run = make(),tmp_path/'run'
    with pytest.raises(KeyboardInterrupt): go(learn, cbs=[Checkpoint(run), Do(4, stop)])
    learn = make(**dict(loss=dict(loss=TripletLoss(margin=.3)), batches=dict(bs=16), ranking=dict(m=6)).get(how, {}), seed=1).resume(run)
    recwarn.clear()
    go(learn, **{'lr':1e-3} if how in ('rate','flat') else {})
    said = [str(o.message) for o in recwarn if 'is not the call' in str(o.message)]
    assert len(said)==(how!='the same')
    names = ['learning rate','weight decay','loss','batch size','images of a class','training images','optimiser','ranking']
    want = dict(rate='learning rate 0.0004→0.01→', loss='loss TripletLoss(margin=0.2', batches='batch size 32 then and 16 now',
        ranking='SelfSupervisedRanking(m=4', flat='learning rate 0.01 then and 0.001 now')
    if said:
        assert want[how] in said[0]
        differ = [o for o in names if re.search(f'(: |; ){o} ', said[0])]
        assert differ==dict(rate=['learning rate'], loss=['loss'], batches=['batch size'], ranking=['ranking'], flat=['learning rate'])[how]
    assert len(learn.recorder.values)==3
    if how=='flat': assert learn.opt.hypers[-1]['lr']==1e-2 # as the sentence says

def test_facts_have_no_addresses(make_learner, tmp_path, recwarn):
    "A loss or an optimiser that is a function is not another one in another process"
    def make(): return make_learner(lambda e,y: e.pow(2).mean(), opt_func=lambda p, lr: SGD(p, lr, mom=.9))
    with pytest.raises(KeyboardInterrupt): make().fit(2, 1e-2, cbs=[Checkpoint(tmp_path/'run'), Do(4, stop)])
    make().resume(tmp_path/'run').fit(2, 1e-2)
    assert not [o for o in recwarn if 'is not the call' in str(o.message)]

def test_looking_at_an_interrupted_run_changes_nothing(make_learner, tmp_path):
    "`validate` before and after `resume` is no fit"
    run = tmp_path/'run'
    whole = make_learner()
    whole.fit_one_cycle(3, 1e-2)
    learn = make_learner(cbs=Checkpoint(run))
    with pytest.raises(KeyboardInterrupt): learn.fit_one_cycle(3, 1e-2, cbs=Do(4, stop))
    stored = (run/'checkpoint.pt').read_bytes()
    learn.validate()
    new = make_learner(seed=9).resume(run)
    assert new.validate()[1:]==new.validate()[1:] and (run/'checkpoint.pt').read_bytes()==stored
    new.fit_one_cycle(3, 1e-2)
    same(new, whole)

def test_lr_find_is_no_fit_of_the_run(make_learner, tmp_path):
    learn = make_learner(cbs=Checkpoint(tmp_path/'run'))
    learn.lr_find(num_it=3, show_plot=False)
    assert not (tmp_path/'run').exists()
    learn.fit(1, 1e-2)
    assert (tmp_path/'run'/'checkpoint.pt').exists()

def test_two_of_a_kind_are_told_apart_wherever_they_stand(make_learner, tmp_path):
    "`resume` adds the checkpoint before the callbacks of the next call, which must not change what the second of two is called"
    from fastai.callback.tracker import SaveModelCallback
    def _two(): return [SaveModelCallback('recall@1', fname='a'), SaveModelCallback('map@r', fname='b')]
    whole,learn = make_learner(),make_learner()
    best = _two()
    whole.fit(3, 1e-2, cbs=best)
    killed(lambda: learn.fit(3, 1e-2, cbs=[*_two(), Checkpoint(tmp_path/'run'), Do(2*len(whole.dls.train)+1, die)]))
    learn,cbs = make_learner(seed=4).resume(tmp_path/'run'),_two()
    class Look(Callback):
        order = 70
        def before_epoch(self): self.best = [o.best for o in cbs]
    look = Look()
    learn.fit(3, 1e-2, cbs=[*cbs, look])
    assert all(np.isfinite(look.best)) and [o.best for o in cbs]==[o.best for o in best]
