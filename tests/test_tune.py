"Searches: judged on training classes, given up where they fall behind, and the same whether interrupted or not"
import contextlib, math, multiprocessing, os, sqlite3, time
from pathlib import Path
import pytest

class Toy:
    "What `tune` needs of a learner: its score after epoch `e` is known"
    def __init__(self, f, **params): self.f,self.params = f,params
    def measures_on_test(self): return False
    def no_bar(self): return contextlib.nullcontext()
    def no_logging(self): return contextlib.nullcontext()

def _fit(learn, n_epoch, score):
    for e in range(n_epoch):
        score.value = learn.f(e, **learn.params)
        score.report(e, score.value)

def _search(ds, f=lambda e, x: -(x-.3)**2*(e+1), n=6, space={'x':(0.,1.)}, seen=None, **kwargs):
    from dmlfast.study.tuning import tune
    def _build(ds, **params):
        if seen is not None: seen.append(ds)
        return Toy(f, **params)
    return tune(_build, ds, space, n_trials=n, **{'fit':_fit, 'n_epoch':3, **kwargs})

def _xs(study): return [o.params for o in study.trials if o.state.name in ('COMPLETE','PRUNED')]

def test_folds_are_of_training_classes_and_disjoint(few):
    seen = []
    _search(few, n=1, folds=3, seen=seen)
    classes = {s:set(few.df.label[few.df.split==s]) for s in ('train','val','test')}
    vals = [set(o.df.label[o.df.split=='val']) for o in seen]
    assert len(seen)==3 and set.union(*vals)==classes['train']|classes['val'] and sum(map(len, vals))==len(set.union(*vals))
    for o,val in zip(seen, vals):
        assert not val & set(o.df.label[o.df.split=='train']) and set(o.df.label[o.df.split=='test'])==classes['test']

def test_interrupted_search_is_the_search(few, tmp_path):
    whole = _search(few, n=9)
    _search(few, n=4, storage=tmp_path/'s.db')
    parts = _search(few, n=9, storage=tmp_path/'s.db')
    assert _xs(parts)==_xs(whole) and len({o['x'] for o in _xs(whole)})==9

def test_ctrl_c_in_a_trial(few, tmp_path):
    tries = []
    def _f(e, x):
        tries.append(x)
        if len(tries)==4: raise KeyboardInterrupt # in the second trial
        return x
    with pytest.raises(KeyboardInterrupt): _search(few, _f, storage=tmp_path/'s.db', first=[dict(x=.5)], n=3)
    study = _search(few, _f, storage=tmp_path/'s.db', first=[dict(x=.5)], n=3)
    assert len(_xs(study))==3 and _xs(study)[0]==dict(x=.5) and sum(o==dict(x=.5) for o in _xs(study))==1

def test_the_first_settings_are_tried_again_if_their_trial_failed(few, tmp_path):
    tries = []
    def _f(e, x):
        tries.append(x)
        if len(tries)==1: raise KeyboardInterrupt
        return x
    with pytest.raises(KeyboardInterrupt): _search(few, _f, storage=tmp_path/'s.db', first=[dict(x=.5)], n=2)
    assert dict(x=.5) in _xs(_search(few, _f, storage=tmp_path/'s.db', first=[dict(x=.5)], n=2))

def test_a_process_that_died_in_a_trial(few, tmp_path):
    "Its trial is done again once its heart has not beaten for long enough"
    from dmlfast.study.tuning import make_study
    study = make_study(tmp_path/'s.db', first=[dict(x=.5)])
    trial = study.ask()
    assert trial.suggest_float('x', 0., 1.)==.5
    study._storage.record_heartbeat(trial._trial_id)
    with sqlite3.connect(tmp_path/'s.db') as db: db.execute("update trial_heartbeats set heartbeat = datetime('now', '-1 hour')")
    study = _search(few, lambda e, x: x, storage=tmp_path/'s.db', first=[dict(x=.5)], n=3)
    assert [o.state.name for o in study.trials].count('FAIL')==1 and dict(x=.5) in _xs(study)

def _resume(ds, file, barrier, log):
    "What one of several processes does"
    def _f(e, x):
        if e==0:
            with open(log, 'a') as f: f.write(f'{os.getpid()} {x}\n')
            time.sleep(.05)
        return x
    barrier.wait()
    _search(ds, _f, n=8, storage=file)

def test_two_processes_go_on_after_a_third_was_killed(few, tmp_path):
    "Two of eight trials are done and one died, with its heart or before the first beat: six more, the dead one's too, and none twice"
    from dmlfast.study.tuning import make_study
    _search(few, lambda e, x: x, n=2, storage=tmp_path/'s.db', first=[dict(x=.5)])
    study = make_study(tmp_path/'s.db')
    dead = study.ask()
    x = dead.suggest_float('x', 0., 1.)
    study._storage.record_heartbeat(dead._trial_id)
    with sqlite3.connect(tmp_path/'s.db') as db: db.execute("update trial_heartbeats set heartbeat = datetime('now', '-1 hour')")
    ctx = multiprocessing.get_context('fork')
    barrier = ctx.Barrier(2)
    ps = [ctx.Process(target=_resume, args=(few, tmp_path/'s.db', barrier, tmp_path/'log')) for _ in range(2)]
    for p in ps: p.start()
    for p in ps: p.join(120)
    study = make_study(tmp_path/'s.db')
    states,lines = [o.state.name for o in study.trials],(tmp_path/'log').read_text().splitlines()
    assert [p.exitcode for p in ps]==[0,0] and len(_xs(study))==8 and not {'RUNNING','WAITING'} & {*states}
    assert len(lines)==len(set(lines))==6 and len({o.split()[0] for o in lines})==2 and dict(x=x) in _xs(study)

def test_a_trial_too_many_is_not_begun(few, tmp_path, monkeypatch):
    "Another process asks for its trial between our look at what is left and our asking"
    import dmlfast.study.tuning as tune
    others,said,real = [],[],tune._is_one_left
    def _look(study, n_trials):
        left = not others and real(study, n_trials)
        if left: others.append(tune.make_study(tmp_path/'s.db').ask())
        else: study.tell(others[0], .5) # which is then finished
        return left
    monkeypatch.setattr(tune, '_is_one_left', _look)
    study = _search(few, lambda e, x: 1/0, n=1, storage=tmp_path/'s.db', callbacks=[lambda *a: said.append(a)])
    assert [o.value for o in study.trials if o.state.name=='COMPLETE']==[.5] and [o.state.name for o in study.trials]==['COMPLETE','FAIL']
    assert not said

def test_transactions_of_sqlite_do_not_overlap(few, tmp_path):
    "Else two processes read that a trial waits, and both take it"
    from dmlfast.study.tuning import _storage
    with _storage(tmp_path/'s.db').engine.begin() as one, sqlite3.connect(tmp_path/'s.db', timeout=0) as other:
        one.exec_driver_sql('select * from trials')
        with pytest.raises(sqlite3.OperationalError, match='locked'): other.execute('begin immediate')

def test_ctrl_c_while_the_tables_are_made(few, tmp_path, monkeypatch):
    "Optuna would never make the index again without which a study is there twice; what its database does say is one sentence"
    from sqlalchemy.schema import Index
    def _index(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr('sqlalchemy.sql.ddl.SchemaGenerator.visit_index', _index)
        with pytest.raises(KeyboardInterrupt): _search(few, n=1, storage=tmp_path/'s.db')
    with sqlite3.connect(tmp_path/'s.db') as db: assert db.execute("select name from sqlite_master where name='studies'").fetchall()
    for n in (1,2,3): assert len(_search(few, n=n, storage=tmp_path/'s.db').trials)==n
    def _lose(study, trial):
        with sqlite3.connect(tmp_path/'s.db') as db: db.execute('drop table trials')
    with pytest.raises(RuntimeError, match='^The database of the study, .* failed: no such table: trials$'):
        _search(few, n=9, storage=tmp_path/'s.db', callbacks=[_lose])

def test_first_settings_of_two_processes(few, tmp_path):
    "Both saw that nobody had tried them; they are tried once, and beside them as many others as asked for"
    import dmlfast.study.tuning as tune
    tries = []
    tune.make_study(tmp_path/'s.db', first=[dict(x=.5)]).enqueue_trial(dict(x=.5))
    study = _search(few, lambda e, x: tries.append(x) or x, n=3, n_epoch=1, storage=tmp_path/'s.db')
    assert len(tries)==len(set(tries))==3 and tries[0]==.5 and _xs(study)==[dict(x=o) for o in tries]

def test_a_process_that_died_before_its_heart_beat(few, tmp_path, monkeypatch, capsys):
    "It is waited for no longer than any other"
    import dmlfast.study.tuning as tune
    tune.make_study(tmp_path/'s.db', first=[dict(x=.5)]).ask() # and no more of it
    naps = iter(range(9))
    def _later(_):
        next(naps) # which ends, and so does a wait for ever
        with sqlite3.connect(tmp_path/'s.db') as db: db.execute("update trial_heartbeats set heartbeat = datetime('now', '-1 hour')")
    monkeypatch.setattr(tune.time, 'sleep', _later)
    study = _search(few, lambda e, x: x, n=1, storage=tmp_path/'s.db')
    assert _xs(study)==[dict(x=.5)] and 'under way in other processes (1)' in capsys.readouterr().out

def test_trials_that_fall_behind_are_given_up(few):
    study = _search(few, lambda e, x: (1-x)*(e+1), n=15, space={'x':[0.,.2,.4,.6,.8,1.]})
    pruned = [o for o in study.trials if o.state.name=='PRUNED']
    assert pruned and all(len(o.intermediate_values)<=3 for o in pruned) and any(len(o.intermediate_values)<3 for o in pruned)
    assert study.best_value==3. and all(o.params['x']>study.best_params['x'] for o in pruned)

def test_folds_go_on_counting_and_report_the_mean_so_far(few):
    """The second fold's three epochs are steps 3 to 5; its scores are 0, 1, 2 as the first one's, whose last was 2. Optuna ignores a step
    that was reported before"""
    study = _search(few, lambda e, x: float(e), n=1, folds=2)
    assert study.trials[0].intermediate_values=={0:0., 1:1., 2:2., 3:1., 4:1.5, 5:2.} and study.best_value==2.

def test_what_is_said_of_trials_has_no_gaps(few, tmp_path, capsys):
    "The second of three numbers was taken by a trial that failed; a trial that was pruned has no score"
    from dmlfast.cli.studies import _after_trial, _study_results
    from dmlfast.study.tuning import distributions, make_study
    from optuna.trial import TrialState
    study = make_study()
    for value,state in ((.25,'COMPLETE'),(None,'FAIL'),(None,'PRUNED'),(.5,'COMPLETE')):
        study.tell(study.ask(distributions({'fit.lr':(1e-3,1e-2)})), value, state=TrialState[state])
        if state!='FAIL': _after_trial(dict(loss=dict(name='triplet')), tmp_path, 3)(study, study.trials[-1])
    assert [o.split(',')[0] for o in capsys.readouterr().out.splitlines()]==['trial 1 of 3: complete','trial 2 of 3: pruned',
        'trial 3 of 3: complete']
    assert [(o['number'],o['score']) for o in _study_results(study)['trials']]==[(0,.25),(1,None),(2,.5)]

def test_a_trial_that_diverged_scores_nothing(few):
    from dmlfast.train.columns import Diverged
    def _f(e, x):
        if x>.5: raise Diverged('no longer finite')
        return x
    study = _search(few, _f, n=8)
    bad = [o for o in study.trials if o.params['x']>.5]
    assert bad and all(o.value==0 for o in bad) and study.best_params['x']<=.5 and len(_xs(study))==8

def test_a_real_search_fits_with_what_it_tries(few, monkeypatch):
    "The rate of a trial is the rate of its fit; where it is too high for the weights to stay finite, the trial scores nothing"
    from dmlfast.train.learner import MetricLearner
    from dmlfast.study.tuning import tune_settings
    s = dict(batch=dict(bs=32, per_class=4, num_workers=0), model=dict(arch='test_resnet', pretrained=False, emb_sz=8),
        loss=dict(name='triplet'), fit=dict(lr=1e-3, sched='flat'))
    rates,real = [],MetricLearner.fit_recipe
    monkeypatch.setattr(MetricLearner, 'fit_recipe', lambda self, *args, **kwargs: (rates.append(args[1]), real(self, *args, **kwargs)))
    study = tune_settings(s, {'fit.lr':[1e-3,1e36]}, few, folds=1, n_trials=4, n_epoch=2)
    tried = [o.params['fit.lr'] for o in study.trials]
    assert rates==tried and set(tried)=={1e-3,1e36}
    assert all(o.value==0 for o in study.trials if o.params['fit.lr']==1e36) and study.best_params=={'fit.lr':1e-3}

def test_another_search_under_the_same_name(few, tmp_path):
    _search(few, n=1, storage=tmp_path/'s.db')
    for kwargs,said in ((dict(n_epoch=2), 'n_epoch was 3 and is 2'), (dict(space={'x':(0.,2.)}), 'space'), (dict(folds=2), 'folds'),
        (dict(about=dict(settings=1)), 'settings')):
        with pytest.raises(ValueError, match=said): _search(few, n=2, storage=tmp_path/'s.db', **kwargs)
    assert len(_search(few, n=1, storage=tmp_path/'s.db', name='other', n_epoch=2).trials)==1

@pytest.mark.parametrize('space', [{}, [], {'x':()}, {'x':(1,)}, {'x':(1.,0.)}, {'x':(0.,1.,'log')}, {'x':(0.,1.,'lin')}, {'x':[]},
    {'x':(0.,math.inf)}, {'x':dict(low=1.)}, {'x':(False,True)}, {'x':'a'}])
def test_what_is_no_space(space, few):
    with pytest.raises(ValueError): _search(few, space=space)

def test_wrong_arguments(few, tmp_path):
    from dmlfast.study.tuning import check_space, tune_settings
    for k in ('n_epoch','folds'):
        with pytest.raises(ValueError, match=k): _search(few, **{k:0})
    with pytest.raises(ValueError, match='n_trials'): _search(few, n=True)
    with pytest.raises(ValueError, match='no folder'): _search(few, storage=tmp_path/'no'/'s.db')
    with pytest.raises(ValueError, match='cannot be opened'): _search(few, storage='nosql://here')
    with pytest.raises(ValueError, match='score is nan'): _search(few, lambda e, x: math.nan)
    s = dict(loss=dict(name='triplet'))
    for o in ({'loss.margn':(.1,.5)}, {'loss.margin':['a','b']}, {'fit.lr':(-1.,1.)}, {'seed.x':(1,2)}):
        with pytest.raises(ValueError): check_space(s, o)
        with pytest.raises(ValueError): tune_settings(s, o, few)
    for o,said in (({'data.size':[16,32]}, "'data.size' cannot be searched for"), ({'fit.n_epoch':(1,9)}, "'fit.n_epoch' cannot be"),
        ({'fit.interpolate':[None,.5]}, "'fit.interpolate' cannot be .* last epoch"),
        ({'fit.monitor':['map@r']}, "'fit.monitor' cannot be")):
        with pytest.raises(ValueError, match=said): tune_settings(s, o, few)
    assert check_space(s, {'fit.n_epoch':(1,9)})=={'fit.n_epoch':(1,9)} # an experiment does as it says

def test_a_column_that_is_not_there(few, tmp_path):
    "Names of metrics are checked before there is a study, and other columns before the first epoch"
    from dmlfast.study.runs import make_learner
    from dmlfast.study.tuning import TrialScore, tune_settings
    s = dict(batch=dict(bs=32, per_class=4, num_workers=0), model=dict(arch='test_resnet', pretrained=False, emb_sz=8),
        loss=dict(name='triplet'))
    for metric,said in (('recal@1',"nearest is 'recall@1'"), ('pr_curve','is a curve'), ('recall','one metric'),
        (['map@r'],'one metric')):
        with pytest.raises(ValueError, match=said):
            tune_settings(s, {'fit.lr':[1e-3]}, few, n_trials=1, storage=tmp_path/'s.db', metric=metric)
    assert not [*tmp_path.iterdir()]
    learn,steps = make_learner(s, few),[]
    learn.one_batch = lambda *a: steps.append(a)
    with pytest.raises(ValueError, match="The score is 'f1', and the columns are train_loss, valid_loss, recall@1"):
        learn.fit(1, 1e-3, cbs=TrialScore(print, 'f1'))
    assert not steps

def test_two_whole_ends(few):
    "Mean all numbers between them, where the setting is one"
    from dmlfast.study.tuning import tune_settings
    s = dict(batch=dict(bs=32, per_class=4, num_workers=0), model=dict(arch='test_resnet', pretrained=False, emb_sz=8),
        loss=dict(name='triplet'))
    made = []
    tune_settings(s, {'loss.margin':(0,1), 'model.emb_sz':(4,8)}, few, folds=1, n_trials=2, n_epoch=1,
        fit=lambda learn, n_epoch, cbs: (made.append((learn.loss_func.margin, learn.model.emb_sz)), setattr(cbs, 'value', .5)))
    assert all(0<m<1 and m!=int(m) and n in range(4, 9) for m,n in made[1:]) and made[0][0]==.2

def test_a_search_on_another_machine(few, tmp_path):
    "What reads images and computes may be said there alone; and a study from before, which held None for it, goes on"
    from dmlfast.study.tuning import make_study, tune_settings
    s = dict(batch=dict(bs=32, per_class=4), model=dict(arch='test_resnet', pretrained=False, emb_sz=8), loss=dict(name='triplet'))
    def _go(s): return tune_settings(s, {'fit.lr':[1e-3]}, few, folds=1, n_trials=1, n_epoch=1, storage=tmp_path/'s.db',
        fit=lambda learn, n_epoch, cbs: setattr(cbs, 'value', .5))
    _go(dict(s, batch=dict(s['batch'], num_workers=0)))
    assert len(_go(s).trials)==len(_go(dict(s, data=dict(reader='folder', path='x'))).trials)==1
    study = make_study(tmp_path/'s.db')
    about = study.user_attrs['search']
    old = {**about['settings'], 'data':None, 'batch':{**about['settings']['batch'], 'device':None}}
    study.set_user_attr('search', {**about, 'settings':old})
    _go(s)
    with pytest.raises(ValueError, match='another search: its settings was'): _go(dict(s, seed=1))

def test_paths_among_the_choices(few, tmp_path):
    "A database holds them as words, and another process finds them in it"
    for n in (2,4):
        study = _search(few, lambda e, x: float(len(x)), n=n, n_epoch=1, space={'x':[Path('a'),Path('bb')]}, first=[dict(x='bb')],
            storage=tmp_path/'s.db')
    assert study.best_params==dict(x='bb') and study.trials[0].params==dict(x='bb') and len(_xs(study))==4
    with pytest.raises(ValueError, match="`x` is <built-in"): _search(few, space={'x':[print]})

def test_test_classes_stay_out(few):
    "Whatever the settings say, a search measures on `val`; patience and best epochs are not for trials"
    from dmlfast.study.tuning import tune_settings
    s = dict(batch=dict(bs=32, per_class=4, num_workers=0, valid='test'), model=dict(arch='test_resnet', pretrained=False, emb_sz=8),
        loss=dict(name='triplet'), fit=dict(lr=1e-3))
    looked,items = [],type(few).items
    study = tune_settings(s, {'loss.margin':(.1,.3)}, few, n_trials=1, n_epoch=1,
        callbacks=[lambda study, trial: looked.append(trial.value)])
    assert len(looked)==1 and 0<looked[0]<1

def test_the_first_trial_has_what_a_learner_would_have():
    "Its rate, and for a trained body also how it begins"
    from fastai.learner import defaults
    from dmlfast.study.tuning import default_params, run_space, settings_space
    s = dict(loss=dict(name='triplet'), model=dict(pretrained=False))
    assert default_params(s, run_space(s))=={'fit.lr':defaults.lr, 'loss.margin':.2} and run_space(s)==settings_space(s)
    s = dict(loss=dict(name='triplet'))
    begins = {'fit.lr':1e-4, 'fit.body_lr':1/3, 'model.freeze_bn':True, 'model.emb_sz':128, 'model.init':'lda'}
    assert default_params(s, run_space(s))==begins|{'loss.margin':.2}
    assert 'model.emb_sz' not in run_space(dict(s, model=dict(emb_sz=32))) # the settings say it
    assert 'fit.lr' not in default_params(dict(s, recipe='triplet'), run_space(dict(s, recipe='triplet'))) # it has rates of its own

def test_few_validation_classes_are_not_chosen_by(few, capsys):
    "Folds of all training classes take their place, and it is said; the best settings name their epochs"
    from dmlfast.study.tuning import best_settings, n_folds, tune_settings
    assert few.df.label[few.df.split=='val'].nunique()<20 and n_folds(few)==3
    assert 'To choose by fewer than 20 is guesswork' in capsys.readouterr().out
    s = dict(batch=dict(bs=32, per_class=4, num_workers=0), model=dict(arch='test_resnet', pretrained=False, emb_sz=8),
        loss=dict(name='triplet'))
    study = tune_settings(s, {'fit.lr':[1e-3]}, few, folds=1, n_trials=1, n_epoch=1)
    assert study.user_attrs['search']['folds']==1 and 'guesswork' not in capsys.readouterr().out # who says how many is not told of others
    study = tune_settings(s, {'fit.lr':[1e-3]}, few, n_trials=1, n_epoch=1)
    assert capsys.readouterr().out.count('guesswork')==1
    assert study.user_attrs['search']['folds']==3 and best_settings(s, study)['fit']=={'lr':1e-3, 'n_epoch':1}
