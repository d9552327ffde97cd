"Experiments: each piece of work is done once, whatever happens to the processes, and a plan that cannot be is refused at once"
import json, math, multiprocessing, os, signal, time
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np
import pytest

trainer = """
import os, time, torch, numpy as np
from dmlfast.train.columns import Diverged
def train(settings, ds, valid, report):
    "Embeddings of the labels themselves, with as much noise as `noise` says"
    s = settings['toy']
    if 'log' in s:
        with open(s['log'], 'a') as f: f.write(f"{os.getpid()} {valid} {settings['seed']} {s['noise']}\\n")
    time.sleep(s.get('wait', 0))
    if s.get('diverge'): raise Diverged('no longer finite')
    if report:
        for e in range(settings['fit']['n_epoch']): report(e, 1-s['noise'])
    labels = ds.df.label[ds.df.split==valid].tolist()
    ids = torch.tensor([sorted(set(labels)).index(o) for o in labels])
    g = torch.Generator().manual_seed(settings['seed'])
    return torch.nn.functional.one_hot(ids).float()+s['noise']*torch.randn(len(ids), int(ids.max())+1, generator=g), ids, {}
"""

def _plan(tmp_path, **toy):
    (tmp_path/'toy.py').write_text(trainer)
    ours = dict(trainer=str(tmp_path/'toy.py')+':train', settings=dict(toy=dict(noise=.5, **toy)), space={'toy.noise':(.1,2.)})
    return dict(name='toys', seeds=3, search=dict(n_trials=4, n_epoch=2), measures=['recall@1','map@r'],
        methods={'a':ours, 'γ':{**ours, 'twin':'a'}, 'louder':dict(like='a', settings=dict(toy=dict(noise=3.)), twin='a', seeds=[1,5],
        trainer=ours['trainer'])})

def _exp(tmp_path, ds, plan=None):
    from dmlfast.study.experiments import Experiment
    return Experiment(plan or _plan(tmp_path), tmp_path/'r.jsonl', ds)

def _keys(exp): return sorted([(o['kind'],o['method'],o.get('seed', o.get('number'))) for o in exp.rows()])

all_work = sorted([('trial',m,i) for m in ('a','γ') for i in range(4)] + [('run',m,i) for m in ('a','γ') for i in range(3)]
    + [('run','louder',i) for i in (1,5)])

def test_all_of_it(few, tmp_path):
    exp = _exp(tmp_path, few)
    exp.run()
    assert _keys(exp)==all_work
    best = max(exp.rows('trial', 'a'), key=lambda o: o['value'] if o['state']=='COMPLETE' else -1)
    assert exp.chosen('a')['toy']['noise']==best['params']['toy.noise']
    tried = [o['params']['toy.noise'] for o in exp.rows('trial', 'a')]
    assert tried[0]==.5 and len(set(tried))==4 # what the method says is tried first, and once
    assert exp.chosen('louder')['toy']==dict(noise=3.) and exp.chosen('louder')['seed']==0
    assert list(exp.values('louder', 'map@r'))==[1,5]
    d = exp.difference('louder', measure='recall@1') # seed 1 is the only one that both have
    assert len(d)==1 and d[0]==100*(exp.values('louder', 'recall@1')[1]-exp.values('a', 'recall@1')[1]) and d[0]<0
    assert list(exp.differences().index)==['γ'] # one seed in common is no interval
    assert list(exp.choices().index)==['a','γ'] and list(exp.table().index)==['a','γ','louder']
    assert exp.hours_left()==0 and exp.jobs()==[]

def test_trials_that_were_given_up_are_not_chosen(few, tmp_path):
    "Neither by the experiment nor in its table, however high their last score; and its search knows which ones they were"
    exp = _exp(tmp_path, few)
    for i,(state,scores) in enumerate((('COMPLETE',[.1,.3]),('PRUNED',[.9]),('COMPLETE',[.2,.4]),('COMPLETE',[.3,.2]))):
        exp.write(dict(kind='trial', method='a', number=i, params={'toy.noise':.5*(i+1)}, state=state, value=scores[-1], scores=scores,
            seconds=1., cpu_seconds=1.))
    assert exp.chosen('a')['toy']['noise']==1.5
    assert exp.choices().loc['a'].to_dict()=={'chosen':'toy.noise=1.5', 'map@r in validation':40., 'trials':4, 'pruned':1}
    trials = exp.study('a').trials
    assert [o.state.name for o in trials]==['COMPLETE','PRUNED','COMPLETE','COMPLETE']
    assert [o.intermediate_values for o in trials]==[{0:.1, 1:.3},{0:.9},{0:.2, 1:.4},{0:.3, 1:.2}]
    for o in exp.rows('trial'): exp.write({**o, 'method':'γ', 'state':'PRUNED'})
    with pytest.raises(ValueError, match="None of the 4 trials of 'γ' finished"): exp.chosen('γ')

def test_killed_and_started_again(few, tmp_path):
    "A process that is killed loses the piece that it was in; what it half wrote, within a letter, is not in the way"
    plan = _plan(tmp_path, wait=.15)
    p = multiprocessing.get_context('fork').Process(target=_exp(tmp_path, few, plan).run)
    p.start()
    while len(_exp(tmp_path, few, plan).rows())<3: time.sleep(.05)
    os.kill(p.pid, signal.SIGKILL)
    p.join()
    whole = '{"kind": "run", "method": "γ", "seed": 0, "sco'.encode()
    with open(tmp_path/'r.jsonl', 'ab') as f: f.write(whole[:whole.index('γ'.encode())+1])
    n = len(_exp(tmp_path, few, plan).rows())
    exp = _exp(tmp_path, few, plan)
    exp.run()
    assert n>=3 and _keys(exp)==all_work
    other = tmp_path/'whole'
    other.mkdir()
    whole = _exp(other, few, _plan(other))
    whole.run()
    # the search that it would have been
    assert [o['params'] for o in exp.rows('trial', 'γ')]==[o['params'] for o in whole.rows('trial', 'γ')]
    assert exp.values('γ', 'map@r')==whole.values('γ', 'map@r')

def test_two_processes_do_each_thing_once(few, tmp_path):
    plan = _plan(tmp_path, wait=.1, log=str(tmp_path/'log'))
    ctx = multiprocessing.get_context('fork')
    ps = [ctx.Process(target=_exp(tmp_path, few, plan).run) for _ in range(2)]
    for p in ps: p.start()
    for p in ps: p.join(120)
    assert [p.exitcode for p in ps]==[0,0] and _keys(_exp(tmp_path, few, plan))==all_work
    lines = (tmp_path/'log').read_text().splitlines()
    assert len(lines)==len(all_work) and len({o.split()[0] for o in lines})==2

def test_lines_of_an_older_version(few, tmp_path):
    "Lines that do not say of which plan they are"
    exp = _exp(tmp_path, few)
    exp.run()
    rows = [{k:v for k,v in o.items() if k!='plan'} for o in exp.rows()]
    (tmp_path/'r.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    again = _exp(tmp_path, few)
    assert again.jobs()==[] and again.table().equals(exp.table())

def test_a_method_that_was_changed(few, tmp_path):
    exp = _exp(tmp_path, few)
    for _ in range(2): exp.step()
    plan = _plan(tmp_path)
    plan['methods']['a']['settings'] = dict(toy=dict(noise=.7))
    with pytest.raises(ValueError, match="method 'a' with other settings"): _exp(tmp_path, few, plan)
    plan = {**_plan(tmp_path), 'seeds':5, 'search':dict(n_trials=6, n_epoch=2)} # more of the same
    assert len(_exp(tmp_path, few, plan).rows())==2
    del plan['methods']['louder'], plan['methods']['a'], plan['methods']['γ']['twin']
    exp = _exp(tmp_path, few, plan) # lines of a method that is no longer in the plan
    assert exp.hours_left()>=0 or math.isnan(exp.hours_left())

def test_a_plan_on_another_machine(few, tmp_path, body):
    "What reads images and computes, and where the file of the weights is, change no method; lines with the hash of what is written count"
    import hashlib
    from dmlfast.study.experiments import Experiment
    def _at(weights=body, file='r.jsonl', **batch):
        return Experiment({**_trained(weights), 'settings':dict(_trained(weights)['settings'], batch=batch)}, tmp_path/file, few)
    where = f'elsewhere/{Path(body).parent.name}/{Path(body).name}'
    here,more = _at(bs=32),_at(num_workers=2)
    assert more.hash_of('wide')!=here.hash_of('wide')!=here.hash_of('narrow')
    row = dict(kind='run', method='narrow', scores=dict.fromkeys(here.measures, .5))
    here.write(dict(row, seed=0, plan=here.hash_of('narrow')))
    for o in (_at(where, bs=32, num_workers=3, device='cpu'), _at(bs=32, num_workers=0)): assert len(o.rows())==1
    assert _at('a/best.pth', 's').hash_of('narrow')!=_at('b/best.pth', 's').hash_of('narrow') # runs have one name for their weights
    for kwargs in (dict(bs=64), dict(weights='other.pth', bs=32)):
        with pytest.raises(ValueError, match="method 'narrow' with other settings"): _at(**kwargs)
    settings = {k:o for k,o in here.settings('narrow').items() if k!='data'}
    old = json.dumps(dict(settings=settings, space={}, search=dict(n_epoch=4, metric='map@r')), sort_keys=True)
    here.write(dict(row, seed=1, plan=hashlib.sha256(old.encode()).hexdigest()[:8]))
    assert len(_at(bs=32).rows())==2

def test_whole_ends_of_a_number(few, tmp_path):
    "They are the ends of a range of numbers, for a setting that need not be whole"
    from dmlfast.study.tuning import distributions
    plan = dict(settings=dict(fit=dict(n_epoch=1), loss=dict(name='triplet')), methods=dict(a=dict(
        space={'loss.margin':dict(low=0, high=1), 'fit.lr':(1,2,'log'), 'model.emb_sz':(8,16), 'fit.wd':[0,1]})))
    space = _exp(tmp_path, few, plan).space('a')
    assert space=={'loss.margin':dict(low=0., high=1.), 'fit.lr':(1.,2.,'log'), 'model.emb_sz':(8,16), 'fit.wd':[0,1]}
    assert [type(o).__name__[0] for o in distributions(space).values()]==['F','F','I','C']

def test_more_trials_than_the_runs_were_chosen_by(few, tmp_path):
    plan = _plan(tmp_path)
    del plan['methods']['γ']
    exp = _exp(tmp_path, few, plan)
    exp.run()
    assert exp.hours_left()==0
    plan['search']['n_trials'] = 5
    with pytest.raises(ValueError, match="holds runs of 'a' after 4 trials, and the plan asks for 5"): _exp(tmp_path, few, plan)

def test_the_commit_is_ours_or_none(tmp_path, monkeypatch):
    "An environment within a repository of someone else says nothing about our source"
    import subprocess
    import dmlfast.study.experiments as protocol
    home = tmp_path/'theirs'
    (home/'env'/'dmlfast').mkdir(parents=True)
    (home/'env'/'dmlfast'/'__init__.py').write_text('')
    (home/'a.txt').write_text('a')
    for o in (['init','-q'], ['add','a.txt'], ['-c','user.name=a','-c','user.email=a@b','commit','-qm','a']):
        subprocess.run(['git',*o], cwd=home, check=True)
    monkeypatch.setattr(protocol.dmlfast, '__file__', str(home/'env'/'dmlfast'/'__init__.py'))
    assert protocol._commit()==''
    subprocess.run(['git','add','env'], cwd=home, check=True)
    assert protocol._commit()!=''

def test_a_run_that_diverged(few, tmp_path):
    plan = _plan(tmp_path)
    plan['methods'] = dict(a={**plan['methods']['a'], 'space':{}, 'settings':dict(toy=dict(noise=1., diverge=True))})
    exp = _exp(tmp_path, few, plan)
    exp.run()
    assert [o['scores']['map@r'] for o in exp.rows('run')]==[0,0,0] and exp.rows('run')[0]['seen']['diverged']

def test_hours_left(few, tmp_path):
    plan = _plan(tmp_path)
    del plan['methods']['γ'], plan['methods']['louder']
    plan['settings'] = dict(fit=dict(n_epoch=5))
    exp = _exp(tmp_path, few, plan)
    exp.write(dict(kind='run', method='a', seed=0, scores={}, seconds=360., settings=plan['settings']))
    exp.write(dict(kind='trial', method='a', number=0, params={'toy.noise':.5}, state='COMPLETE', value=.5, scores=[.5,.5], seconds=0.))
    for i in (1,2,3):
        exp.write(dict(kind='trial', method='a', number=i, params={'toy.noise':.5}, state='PRUNED', value=.1, scores=[.1], seconds=0.))
    assert abs(exp.hours_left()-.2)<1e-9 # two runs are left, and one took 6 minutes

def test_our_own_methods(few, tmp_path):
    "Time before anything was measured, batches as large as there are classes for, a kept model, a model that a killed process left half of"
    run = dict(batch=dict(per_class=4, num_workers=0), model=dict(arch='test_resnet', pretrained=False, emb_sz=8),
        fit=dict(n_epoch=1, lr=1e-3))
    plan = dict(seeds=1, keep_models=True, settings=run,
        methods=dict(untrained=dict(fit=dict(n_epoch=0), space={}), triplet=dict(loss=dict(name='triplet'), space={})))
    exp = _exp(tmp_path, few, plan)
    assert 0<exp.hours_left()<1
    left = tmp_path/'r-models'/'untrained-0'
    left.mkdir(parents=True)
    (left/'embedder.json').write_text('{')
    exp.run()
    from dmlfast.deploy import load_embedder
    assert load_embedder(left).model.emb_sz==8 and len(exp.rows('run'))==2

def test_kept_embeddings(few, tmp_path):
    "What was written down can be computed from them again, and what was not thought of, too; rows are as without them"
    def plan(**kwargs):
        res = dict(_plan(tmp_path), seeds=1, measures=['recall@1','map@r','eer'], **kwargs)
        ours = dict(trainer=res['methods']['a']['trainer'], space={})
        res['methods'] = {'a.5':dict(ours, settings=dict(toy=dict(noise=.5))),
            'lost':dict(ours, settings=dict(toy=dict(noise=1., diverge=True)))}
        return res
    exp = _exp(tmp_path, few, plan(keep_embeddings=True))
    exp.run()
    again = _exp(tmp_path, few, plan()) # a plan need not say so to read them
    emb,(row,) = again.embedded('a.5', 0),exp.rows('run', 'a.5')
    assert {k:round(emb.evaluate([k])[k], 6) for k in exp.measures}==row['scores'] and 0<emb.evaluate(['mrr'])['mrr']<=1
    test = few.df[few.df.split=='test']
    assert emb.items==list(test.path) and [emb.label(i) for i in range(len(emb))]==list(test.label) and emb.image(0).size==(24,24)
    assert emb.facts['method']=='a.5' and emb.facts['seed']==0 and emb.facts['data_hash']==row['data_hash']
    assert emb.facts['settings']==row['settings']
    assert 0<row['scores']['eer']<1 and exp.rows('run', 'lost')[0]['scores']=={'recall@1':0,'map@r':0,'eer':1} # less is better
    assert [o.name for o in (tmp_path/'r-embeddings').iterdir()]==['a.5-0.safetensors'] # nothing of a run that diverged
    for seed,method,says in ((1,'a.5','keep_embeddings = true'), (0,'lost','There are no embeddings'), (0,'a',"no method 'a'")):
        with pytest.raises(ValueError, match=says): again.embedded(method, seed)
    exp = _exp(tmp_path/'other', few, plan())
    exp.run()
    assert not (tmp_path/'other'/'r-embeddings').exists()
    for o in ('scores','settings','plan','seed'): assert exp.rows('run', 'a.5')[0][o]==row[o]

def test_classes_of_a_trainers_own_have_no_names(few, tmp_path):
    exp = _exp(tmp_path, few)
    n,names = (few.df.split=='test').sum(),list(few.df.label[few.df.split=='test'])
    codes = [sorted(set(names)).index(o) for o in names]
    embs = np.eye(len(set(names)))[codes]
    assert exp._tested('a', embs, [7+3*o for o in codes]).vocab==sorted(set(names))
    merged = exp._tested('a', embs, [o//2 for o in codes])
    assert merged.vocab is None and merged.labels.tolist()==[o//2 for o in codes]
    assert exp._tested('a', embs, [*range(n)]).vocab is None and exp._tested('a', None, None) is None

def test_data_without_test_classes(few, tmp_path):
    from dmlfast.data.tables import MetricDataset
    ds = MetricDataset(few.df[few.df.split!='test'], few.path, 'no test', size=None)
    with pytest.raises(ValueError, match="has no classes in its split 'test'"): _exp(tmp_path, ds).run()
    assert not (tmp_path/'r.jsonl').exists()

def test_one_class_to_choose_on(few, tmp_path):
    "Each neighbour would be right, whatever the settings"
    from dmlfast.data.tables import MetricDataset
    val = few.df.split=='val'
    ds = MetricDataset(few.df[~val | (few.df.label==few.df.label[val].iloc[0])], few.path, 'one', size=None)
    with pytest.raises(ValueError, match="one has 1 class in its split 'val', and it takes two or more"): _exp(tmp_path, ds).run()

def test_results_of_other_data(few, tmp_path):
    "They are not mixed; nor those of seeds that the plan does not ask for, or of trials beyond its number"
    from dmlfast.data.tables import MetricDataset
    plan = _plan(tmp_path)
    exp = _exp(tmp_path, few, plan)
    exp.run()
    other = MetricDataset(few.df.iloc[1:], few.path, 'less', size=None)
    with pytest.raises(ValueError, match="r.jsonl' holds results of 'a' on other images, labels or splits than these of less"):
        _exp(tmp_path, other, plan).run()
    fewer = _exp(tmp_path, few, {**plan, 'seeds':2})
    assert list(fewer.values('a', 'recall@1'))==[0,1] and fewer.table().loc['a','seeds']==2 and fewer.jobs()==[]
    with pytest.raises(ValueError, match="4 trials of 'a', and the plan asks for 3|after 4 trials, and the plan asks for 3"):
        _exp(tmp_path, few, {**plan, 'search':dict(n_trials=3, n_epoch=2)})
    with pytest.raises(ValueError, match="runs of 'a' that were not scored by 'recall@2'"):
        _exp(tmp_path, few, {**plan, 'measures':['recall@1','recall@2']})

def test_networks_that_are_not_there(few, tmp_path):
    "Found before the first method is trained, and not when results are only looked at"
    loss = dict(loss=dict(name='triplet'), space={})
    for model,said in ((dict(arch='test_resnt'), "Method 'b': There is no timm model 'test_resnt'; the nearest is 'test_resnet'"),
        (dict(arch='test_resnet', weights='no.safetensors'), "Method 'b': There is no file of weights")):
        plan = dict(seeds=1, settings=dict(fit=dict(n_epoch=1), model=dict(arch='test_resnet', pretrained=False)),
            methods=dict(a=loss, b={**loss, 'model':model}))
        exp = _exp(tmp_path, few, plan)
        with pytest.raises(ValueError, match=said): exp.run()
        assert not exp.rows()
        for o in 'ab':
            exp.write(dict(kind='run', method=o, seed=0, scores=dict.fromkeys(exp.measures, .5), seen={}, seconds=1., cpu_seconds=1.))
        assert len(_exp(tmp_path, few, plan).table())==2
        exp.check()
        exp.out.unlink()

@pytest.mark.parametrize('change,said', [
    (dict(seed=3), "nearest is 'seeds'"), (dict(seeds=0), 'seeds'), (dict(seeds=[1,1]), 'seeds'), (dict(seeds=True), 'seeds'),
    (dict(search=dict(trials=3)), 'search.n_trials'), (dict(search=dict(n_epoch=0)), '1 or more'),
    (dict(measures=['recal@1']), 'no metric'), (dict(measures=['pr_curve']), 'is a curve'),
    (dict(measures=[]), 'one or more metrics'), (dict(measures=3), 'no metric 3'),
    (dict(search=dict(metric='recal@1')), "nearest is 'recall@1'"),
    (dict(search=dict(metric='recall')), "one metric, such as 'map@r'"), (dict(search=dict(metric=['map@r'])), 'one metric'),
    (dict(search=dict(seed='a')), 'search.seed'),
    (dict(search=3), '`search` is a table'), (dict(settings=3), '`settings` is a table'), (dict(methods=['a']), '`methods` is a table'),
    (dict(methods={}), 'no `methods`'), (dict(methods=dict(a=1)), 'is a table'),
    (dict(methods=dict(a=dict(tvin='b'))), "nearest is 'twin'"),
    (dict(methods=dict(a=dict(twin='b'))), 'the methods are'), (dict(methods=dict(a=dict(twin='a'))), 'the method itself'),
    (dict(methods=dict(a={}, b=dict(like='a'), c=dict(like='b'))), 'like another one'),
    (dict(methods=dict(a={}, b=dict(like='a', space={'fit.lr':(1.,2.)}))), 'would not be looked at'),
    (dict(methods=dict(a=dict(settings=dict(x=1)))), 'for a `trainer`'),
    (dict(methods=dict(a=dict(loss=dict(name='triplett')))), "Method 'a': There is no loss"),
    (dict(methods=dict(a=dict(space={'loss.margn':(.1,.2)}, loss=dict(name='triplet')))), 'loss.margin'),
    (dict(methods=dict(a=dict(fit=dict(n_epoch=None)))), 'how many epochs'),
    (dict(methods=dict(a=dict(fit=dict(patience=2)))), 'nothing to go by'),
    (dict(methods=dict(a=dict(fit=dict(interpolate=True)))), '`fit.interpolate` has nothing to go by'),
    (dict(methods=dict(a=dict(fit=dict(fmr=.1)))), '`fit.fmr` would not be looked at'),
    (dict(settings=dict(fit=dict(n_epoch=1), batch=dict(valid='test'))), '`batch.valid` would not be looked at'),
    (dict(methods=dict(a=dict(data=dict(size=16)))), "Method 'a': `data` would not be looked at, since all methods have one data set"),
    (dict(methods=dict(a=dict(trainer='TOY:train', settings=dict(data=dict(size=16))))), '`data` would not be looked at'),
    (dict(methods=dict(a=dict(loss=dict(name='ms'), space={'data.size':[16,32]}))), "Method 'a': 'data.size' cannot be searched for"),
    (dict(methods=dict(a=dict(loss=dict(name='ms'), fit=dict(n_epoch=8, sched='step', steps=[9])))), 'comes to none of its `fit.steps`'),
    (dict(methods=dict(a=dict(trainer='toy.py'))), 'file.py:function'), (dict(methods=dict(a=dict(trainer='no.py:train'))), 'no file'),
    (dict(methods=dict(a=dict(trainer='TOY:nothing'))), 'no function'), (dict(methods=dict(a=False)), 'leaves out a method of a base'),
    (dict(methods=dict(a=dict(lr=2.))), "is 'fit.lr' meant"),
    (dict(methods=dict(a=dict(seeds=2))), "Method 'a': nothing says with which `loss`")])
def test_plans_that_cannot_be(change, said, few, tmp_path):
    plan = dict(settings=dict(fit=dict(n_epoch=1)), methods=dict(a={}))
    _plan(tmp_path)
    text = json.dumps({**plan, **change}).replace('TOY', str(tmp_path/'toy.py'))
    with pytest.raises(ValueError, match=said.replace('[', r'\[')): _exp(tmp_path, few, json.loads(text))

@pytest.mark.parametrize('name', ['../../x', 'a/b', '..', '', 'a\\b', 'a\0', 'a\nb', 'c:x', '.a', 'γ'*101, 3])
def test_names_that_are_no_names_of_files(name, few, tmp_path):
    "A kept model and a lock are called by them"
    with pytest.raises(ValueError, match='files are called by the names of methods'):
        _exp(tmp_path, few, dict(methods={name:dict(loss=dict(name='triplet'))}, keep_models=True, settings=dict(fit=dict(n_epoch=1))))
    assert not [*tmp_path.iterdir()]

def test_what_a_plan_has_can_be_written_and_read(few, tmp_path, body):
    """Paths as words, tuples as lists, the same in the settings of all and of one method, a choice among them, and whatever numbers a
    trainer gives; the file is the same plan's again"""
    plan = _plan(tmp_path)
    (tmp_path/'toy.py').write_text(trainer.replace('ids, {}',
        'ids, dict(numpy=np.float32(.5), torch=torch.tensor([1,2]))').replace("report(e, 1-s['noise'])",
        "report(e, np.float32(1-s['noise']))"))
    ours = dict(trainer=f"{tmp_path/'toy.py'}:train",
        space={'toy.noise':(.1,2.), 'toy.file':[Path('a'),Path('b')], 'toy.pair':[(1,2),(3,4),None]})
    plan = dict(seeds=1, measures=['map@r'], search=dict(n_trials=6, n_epoch=1), settings=dict(model=dict(weights=body)),
        methods=dict(a=dict(ours, settings=dict(toy=dict(noise=.5, file=Path('a'), pair=(1,2))))))
    exp = _exp(tmp_path, few, plan)
    exp.run()
    again = _exp(tmp_path, few, plan)
    assert again.jobs()==[] and again.rows()==exp.rows() and again.chosen('a')==exp.chosen('a') and len(again.study('a').trials)==6
    assert again.rows('trial')[0]['params']=={'toy.noise':.5, 'toy.file':'a', 'toy.pair':[1,2]} # as the method says
    row = again.rows('run')[0]
    assert row['settings']['model']['weights']==str(body) and row['seen']==dict(numpy=.5, torch=[1,2])

@pytest.mark.parametrize('change,said', [(dict(settings=dict(toy=dict(f=print))), r"Method 'a': `settings.toy.f` is <built-in"),
    (dict(model=dict(timm=dict(act=dict))), '`model.timm.act` is <class'), (dict(settings=dict(toy={1:2})), r"`settings.toy` is \{1: 2\}"),
    (dict(space={'toy.noise':[print]}), "Method 'a': `toy.noise` is <built-in")])
def test_what_cannot_be_written_down(change, said, few, tmp_path):
    "It is refused before anything is trained, and not after it"
    plan = _plan(tmp_path)
    plan['methods'] = dict(a={**plan['methods']['a'], **change})
    with pytest.raises(ValueError, match=said): _exp(tmp_path, few, plan)
    with pytest.raises(ValueError, match='`model.timm.act` is <class'):
        _exp(tmp_path, few, {**_plan(tmp_path), 'settings':dict(model=dict(timm=dict(act=dict)))})

def test_a_weights_path_of_our_own_method(few, tmp_path, body):
    exp = _exp(tmp_path, few, {**_trained(body), 'seeds':1, 'methods':dict(a=dict(model=dict(weights=body), space={}))})
    exp.run()
    assert [o['kind'] for o in exp.rows()]==['features','run']
    assert exp.rows('run')[0]['settings']['model']['weights']==str(body)==exp.rows('features')[0]['body']['weights']

def test_the_file_is_read_when_it_has_changed(few, tmp_path, monkeypatch):
    "Once to make an experiment, and again when another process has added a line"
    plan = dict(_plan(tmp_path), search=dict(n_trials=1, n_epoch=2))
    exp = _exp(tmp_path, few, plan)
    for m in ('a','γ'):
        exp.write(dict(kind='trial', method=m, number=0, params={'toy.noise':.5}, state='COMPLETE', value=.5, scores=[.5], seconds=1.,
            cpu_seconds=1.))
    for seed in (1,5,7):
        exp.write(dict(kind='run', method='louder', seed=seed, scores=dict.fromkeys(exp.measures, .5), seen={}, seconds=1., cpu_seconds=1.))
    row,n,real = exp.rows('run')[0],[],Path.read_text
    monkeypatch.setattr(Path, 'read_text', lambda self, *a, **k: (n.append(self), real(self, *a, **k))[1])
    again = _exp(tmp_path, few, plan)
    assert list(again.table().index)==['louder'] and n.count(again.out)==1
    exp.write({**row, 'seed':99})
    assert len(again.rows('run'))==4 and len(again.rows('trial'))==2 and n.count(again.out)==2

def test_a_worker_that_fails_says_why(tmp_path, monkeypatch, capsys):
    "Its own sentence is that of the command, once however many failed; one that was killed said none, and an unforeseen error is named"
    import sys
    from dmlfast.cli.studies import _guarded, _share
    def _fail(e): raise e
    assert _guarded(lambda: print('on its way'))==0 and capsys.readouterr().out==''
    assert _guarded(lambda: _fail(ValueError('the drum is out of oil')))==1 and capsys.readouterr().out=='the drum is out of oil\n'
    assert _guarded(lambda: _fail(KeyError('oil')))==1 and 'Traceback' in (said := capsys.readouterr()).err
    assert said.out=="KeyError: 'oil'\n"
    worker = tmp_path/'worker.sh' # in Python's place
    monkeypatch.setattr(sys, 'executable', str(worker))
    for line,said in (('echo no oil; exit 1','2 of 2 workers failed: no oil'), ('kill -9 $$','2 of 2 workers failed: one ended with '
        'status -9 and no word')):
        worker.write_text(f'#!/bin/sh\n{line}\n')
        worker.chmod(0o755)
        with pytest.raises(RuntimeError) as e: _share('p.toml', tmp_path/'r.jsonl', None, 2)
        assert str(e.value)==said

def test_trainers_that_break_their_word(few, tmp_path):
    (tmp_path/'bad.py').write_text('import torch\ndef silent(s, ds, valid, report): return None\ndef few(s, ds, valid, report): return '
        'torch.eye(2), torch.arange(2), {}\n')
    def _one(name, space): return dict(seeds=1, methods=dict(a=dict(trainer=f'{tmp_path}/bad.py:{name}', space=space)))
    with pytest.raises(ValueError, match='reported no score'): _exp(tmp_path, few, _one('silent', {'x':(0.,1.)})).step()
    with pytest.raises(ValueError, match='2 embeddings'): _exp(tmp_path, few, _one('few', {})).step()

def test_files(few, tmp_path):
    from dmlfast.study.experiments import Experiment
    with pytest.raises(ValueError, match='no file'): Experiment(tmp_path/'no.toml', tmp_path/'r.jsonl')
    (tmp_path/'p.toml').write_text('methods = [')
    with pytest.raises(ValueError, match='not a TOML file'): Experiment(tmp_path/'p.toml', tmp_path/'r.jsonl')
    with pytest.raises(ValueError, match='no twin'): _exp(tmp_path, few).difference('a')
    with pytest.raises(ValueError, match="does not measure 'map@R'; its `measures` are recall@1, map@r"):
        _exp(tmp_path, few).values('a', 'map@R')
    for f in (lambda e: e.table(['a','lowder']), lambda e: e.difference('lowder'), lambda e: e.differences([('a','lowder')]),
        lambda e: e.chosen('lowder')):
        with pytest.raises(ValueError, match="no method 'lowder'; the nearest is 'louder'"): f(_exp(tmp_path, few))
    assert _exp(tmp_path, few).table().empty and _exp(tmp_path, few).choices().empty and _exp(tmp_path, few).differences().empty

def test_a_plan_with_a_base(few, tmp_path):
    "It changes settings of the base, adds methods to its methods, and replaces all else"
    from dmlfast.study.experiments import Experiment
    def _write(name, text): (tmp_path/name).write_text(text)
    _write('all.toml', 'seeds = 4\nname = "all"\n[settings]\nfit = {n_epoch = 2, lr = 1e-3}\nmodel = {arch = '
        '"resnet18"}\n[methods.triplet]\nloss = {name = "triplet"}\n[methods.ms]\nloss = {name = "ms"}\n')
    _write('one.toml', 'base = "all.toml"\nname = "one"\nsettings.fit.n_epoch = 3\n[methods.margin]\nloss = {name = '
        '"margin"}\n[methods.ms]\nloss = {name = "ms", lam = 0.7}\n')
    exp = Experiment(tmp_path/'one.toml', tmp_path/'r.jsonl', few)
    assert exp.name=='one' and exp.seeds('ms')==[0,1,2,3] and list(exp.methods)==['triplet','ms','margin']
    assert exp.settings('triplet')['fit']==dict(n_epoch=3, lr=1e-3) and exp.settings('triplet')['model']==dict(arch='resnet18')
    assert exp.settings('ms')['loss']['lam']==.7
    _write('two.toml', 'base = "one.toml"\nseeds = 2\n[methods]\nms = false\nmargin = {loss = {name = "margin"}, seeds = 3}\n')
    exp = Experiment(tmp_path/'two.toml', tmp_path/'r.jsonl', few)
    assert list(exp.methods)==['triplet','margin'] and exp.seeds('triplet')==[0,1] and exp.seeds('margin')==[0,1,2]
    assert exp.settings('triplet')['fit']==dict(n_epoch=3, lr=1e-3)
    _write('two.toml', 'base = "one.toml"\nmethods.mss = false\n')
    with pytest.raises(ValueError, match="no method 'mss'; the nearest is 'ms'"): Experiment(tmp_path/'two.toml', tmp_path/'r.jsonl', few)
    _write('all.toml', 'base = "two.toml"\n')
    with pytest.raises(ValueError, match="'two.toml' is the base of .*all.toml', and that one of 'two.toml'"):
        Experiment(tmp_path/'two.toml', tmp_path/'r.jsonl', few)
    _write('none.toml', 'base = "no.toml"\n')
    with pytest.raises(ValueError, match="none.toml' has the base 'no.toml', and there is no file"):
        Experiment(tmp_path/'none.toml', tmp_path/'r.jsonl', few)

plans = sorted((Path(__file__).parent.parent/'benchmarks'/'evidence').glob('*.toml'))

@pytest.mark.parametrize('plan', plans, ids=lambda o: o.stem)
def test_the_plans_of_the_evidence(plan, tmp_path):
    "Each is complete and consistent, and every regularised method has the twin without"
    from dmlfast.study.experiments import Experiment
    exp = Experiment(plan, tmp_path/'r.jsonl')
    twins = dict(dr_triplet='triplet', dr_proxynca='proxynca', dr_ms='ms', margin_ssr='margin')
    again = plan.stem=='cub100_again' # a part of another plan
    heads = {f'{k}, head':f'{o}, head' for k,o in twins.items() if k!='margin_ssr'} # of a frozen body, where ranking has nothing to train
    if plan.stem.startswith('start'): twins |= heads
    assert {o:m['twin'] for o,m in exp.methods.items() if 'twin' in m}=={k:o for k,o in twins.items() if k in exp.methods or not again}
    assert {len(exp.seeds(o)) for o in exp.methods}<={1,3,5,2*again} and len(exp.seeds('dr_triplet'))==5-3*again
    assert exp.search['n_trials']==12

def test_what_was_seen_and_a_sweep(few, tmp_path):
    exp = _exp(tmp_path, few)
    with pytest.raises(ValueError, match='nothing to draw'): exp.plot_sweep('toy.noise', 'a')
    assert exp.seen().empty
    for seed,at in enumerate((.2,.4)):
        exp.write(dict(kind='run', method='a', seed=seed, scores={'recall@1':.5,'map@r':.1}, seen=dict(active=at), seconds=1.,
            cpu_seconds=1.))
    for i,v in enumerate((.2,.9,.1,.3)):
        exp.write(dict(kind='trial', method='a', number=i, params={'toy.noise':.5*i}, state='COMPLETE', value=v, scores=[v]))
    for seed,r in ((1,.3),(5,.5)):
        exp.write(dict(kind='run', method='louder', seed=seed, scores={'recall@1':r,'map@r':.05}, seen={}, seconds=1., cpu_seconds=1.))
    assert exp.seen().loc['a','active']==pytest.approx(.3) and list(exp.seen().index)==['a']
    ax = exp.plot_sweep('toy.noise', 'a')
    assert ax.lines[0].get_xydata().tolist()==[[.5,50.],[3.,40.]] # the method itself with what was chosen for it, and its like
    with pytest.raises(ValueError, match="the setting 'toy.nose'"): exp.plot_sweep('toy.nose', 'a')
    assert exp.table()['map@r'].tolist()==['10.0 ± 0.0','5.00 ± 0.00']

def test_differences_of_any_two(few, tmp_path):
    "Seeds 0 and 1 in common: 40 - 50 and 30 - 50, 25 - 10 and 5 - 10; Student's t of one degree of freedom is 12.706; γ has none"
    plan = _plan(tmp_path)
    plan['methods']['louder']['seeds'] = [0,1,5]
    exp = _exp(tmp_path, few, plan)
    for method,seed,r,m in (('a',0,.5,.1),('a',1,.5,.1),('louder',0,.4,.25),('louder',1,.3,.05),('louder',5,.9,.9),('γ',2,.1,.1)):
        exp.write(dict(kind='run', method=method, seed=seed, scores={'recall@1':r,'map@r':m}, seen={}, seconds=1., cpu_seconds=1.))
    assert exp.differences([('louder','a'),('louder','γ')]).to_dict('records')==[{'minus':'a', 'recall@1':'-15.0 (-78.5 to +48.5)',
        'map@r':'+5.0 (-122.1 to +132.1)', 'seeds':2}]
    plt.close('all')
    ax = exp.plot_differences('map@r', [('louder','a'),('louder','γ')])
    assert [o.get_text() for o in ax.get_yticklabels()]==['louder − a'] and ax.lines[0].get_xdata().tolist()==pytest.approx([15,-5])
    assert ax.lines[1].get_xdata().tolist()==pytest.approx([5])
    assert exp.compared(('louder','a'))==exp.compared([('louder','a')])==[('louder','a')] and list(exp.table('a').index)==['a']
    with pytest.raises(ValueError, match='two seeds in common'): exp.plot_differences(pairs=[('louder','γ')])
    assert len(plt.get_fignums())==1

def test_tables_and_pictures_without_recall(few, tmp_path):
    "The first measure takes its place"
    exp = _exp(tmp_path, few, {**_plan(tmp_path), 'measures':['map@r','recall@2']})
    for method in ('a','γ'):
        for seed in (0,1):
            exp.write(dict(kind='run', method=method, seed=seed, scores={'map@r':.1*seed,'recall@2':.9}, seen={}, seconds=1.,
                cpu_seconds=1.))
    assert exp.difference('γ').tolist()==[0,0] and list(exp.differences().index)==['γ']
    for o in (exp.plot(),exp.plot_differences()): assert 'map@r' in o.get_xlabel()
    with pytest.raises(ValueError, match="does not measure 'recall@1'"): exp.plot('recall@1')

# the features that methods with a trained body begin with

@pytest.fixture(scope='module')
def body(few, tmp_path_factory):
    "File of a body with the weights of one draw"
    import torch
    from dmlfast.models.embedder import Embedder
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp('body')/'body.pth'
    torch.save(Embedder('test_resnet', pretrained=False).body.state_dict(), file)
    return file

def _trained(body, **more):
    "A plan with a trained body, of which nothing is trained"
    run = dict(batch=dict(bs=32, per_class=4, num_workers=0), model=dict(arch='test_resnet', weights=str(body), emb_sz=8),
        fit=dict(n_epoch=0))
    return dict(seeds=2, measures=['recall@1','map@r'], settings=run,
        methods=dict(narrow=dict(space={}), wide=dict(space={}, model=dict(emb_sz=16), twin='narrow')), **more)

def _frozen(body, ds, size=None):
    "Scores of pooled features, from a network and a loader of our own"
    import torch
    from dmlfast.all import Embedder, evaluate_retrieval
    from fastai.vision.all import Normalize
    net = Embedder('test_resnet', weights=body).eval()
    dls = ds.dataloaders(bs=32, per_class=4, num_workers=0, valid='test', **(dict(size=size) if size else {}))
    dls.add_tfms([Normalize.from_stats(net.cfg['mean'], net.cfg['std'])], 'after_batch')
    with torch.no_grad(): feats,ys = zip(*[(net.features(x),y) for x,y in dls.valid])
    res = evaluate_retrieval(torch.cat(feats), torch.cat(ys), metrics=['recall@1','map@r'])
    return {k:float(res[k]) for k in res.keys()}

def test_features_are_scored_once(few, tmp_path, body, monkeypatch, capsys):
    "Before the first run, for all methods with the same body; they cost nothing later"
    exp = _exp(tmp_path, few, _trained(body))
    assert exp.jobs()[0]==('features','narrow') and exp.n_left()==5 and 0<exp.hours_left()<1 and exp.todo().loc['features','runs']=='0/1'
    row = exp.step()
    assert row['kind']=='features' and list(exp.table().index)==['features'] and 'features' not in [o for o,_ in exp.jobs()]
    lines = []
    exp.out.unlink()
    exp.run(log=lines.append)
    assert capsys.readouterr().out=='' # neither bars nor how heads start
    assert lines[0].startswith('features of test_resnet: recall@1 0.') and '4 left' in lines[0]
    assert [o['kind'] for o in exp.rows()]==['features']+['run']*4 and exp.jobs()==[] and exp.todo().loc['features','runs']=='1/1'
    row,expected = exp.rows('features')[0],_frozen(body, few)
    assert row['scores']==pytest.approx(expected, abs=1e-6) and row['n_features']>16 and row['data_hash']==exp.facts()['data_hash']
    monkeypatch.setattr('dmlfast.study.experiments.make_learner', None) # nothing is made to look at results
    again = _exp(tmp_path, few, _trained(body))
    table = again.table()
    assert list(table.index)==['features','narrow','wide']
    assert table.loc['features'].tolist()[:3]==[f"{100*expected['recall@1']:.1f}",f"{100*expected['map@r']:.{1+(expected['map@r']<.1)}f}",
        '']
    assert list(again.table('wide').index)==['features','wide'] and again.run().loc['features','runs']=='1/1'
    assert again.theirs('wide', 'map@r')==row['scores']['map@r']
    d = again.difference('narrow', 'features', 'map@r')
    assert d.tolist()==[100*(v-row['scores']['map@r']) for v in again.values('narrow', 'map@r').values()] and len(d)==2
    assert again.differences([('narrow','features')])['minus'].tolist()==['features'] and list(again.differences().index)==['wide']
    plt.close('all')
    ax = again.plot('map@r')
    assert [o.get_text() for o in ax.get_yticklabels()]==['features','narrow','wide']
    x = 100*row['scores']['map@r']
    assert ax.lines[0].get_xdata()==[x,x] and ax.lines[1].get_xdata().tolist()==[x]
    assert len(again.plot_differences('map@r', [('wide','features')]).lines)>=2

def test_features_of_several_bodies(few, tmp_path, body):
    "One line for each pair of body and size; none for random weights or a trainer of one's own; each method is compared with its own"
    plan = _trained(body)
    plan['methods'] |= dict(large=dict(space={}, batch=dict(size=32)), random=dict(space={}, model=dict(weights=None, pretrained=False)),
        other={**_plan(tmp_path)['methods']['a'], 'space':{}})
    plan['seeds'] = 1
    exp = _exp(tmp_path, few, plan)
    assert list(exp.bodies())==['narrow','large'] and exp.bodies()['narrow'][1]==['narrow','wide']
    exp.run()
    assert [o['kind'] for o in exp.rows()][:2]==['features']*2 and len(exp.rows('features'))==2
    assert list(exp.table().index)==['features (default)','features (32)','narrow','wide','large','random','other']
    assert exp.theirs('large', 'map@r')==pytest.approx(_frozen(body, few, 32)['map@r'], abs=1e-6)!=exp.theirs('wide', 'map@r')
    assert list(exp.table(['random','other']).index)==['random','other'] and list(exp.table('large').index)==['features (32)','large']
    for o in ('random','other'):
        with pytest.raises(ValueError, match=f"no scores of the features that '{o}' begins with"): exp.theirs(o, 'map@r')
        with pytest.raises(ValueError, match='there are no features to score'): exp.run_features(o)

def test_files_from_before_features_were_scored(few, tmp_path, body):
    "A finished one shows what it did, has nothing left to do, and takes a line if it is asked for; one with work left gets it first"
    exp = _exp(tmp_path, few, _trained(body))
    for method in ('narrow','wide'):
        for seed in range(2):
            exp.write(dict(kind='run', method=method, seed=seed, scores=dict.fromkeys(exp.measures, .5), seen={}, seconds=1.,
                cpu_seconds=1.))
    assert list(exp.table().index)==['narrow','wide'] and exp.jobs()==[] and list(exp.todo().index)==['narrow','wide'] and len(exp.run())==2
    assert [o.get_text() for o in exp.plot().get_yticklabels()]==['narrow','wide']
    with pytest.raises(ValueError, match=r"`run_features\('wide'\)` adds them"): exp.difference('wide', 'features')
    more = _exp(tmp_path, few, _trained(body) | dict(seeds=3))
    assert more.jobs()==[('features','narrow'),('narrow',2),('wide',2)]
    exp.run_features('wide')
    assert list(exp.table().index)==['features','narrow','wide'] and more.jobs()==[('narrow',2),('wide',2)]
    less = _exp(tmp_path, few, _trained(body) | dict(measures=['recall@1','r_precision'], seeds=[7])) # by which they were not scored
    assert less.features()=={} and less.jobs()[0]==('features','narrow')

def test_features_do_not_change_what_methods_are(few, tmp_path, body):
    "Hashes of the evidence as they were before; a name that cannot be; features of other images"
    from dmlfast.study.experiments import Experiment
    from dmlfast.data.tables import MetricDataset
    root = Path(__file__).parent.parent/'benchmarks'/'evidence'
    for name in ('cars','cub100'):
        exp = Experiment(root/f'{name}.toml', root/f'{name}.jsonl')
        assert exp.jobs()==[] and 'features' not in exp.table().index and len(exp.todo())==len(exp.methods)
        assert any('plan' in o for o in exp.rows()) and all(exp.has(o) for o in exp.rows() if o['method']=='triplet')
    with pytest.raises(ValueError, match="No method can be called 'features'"):
        _exp(tmp_path, few, dict(methods=dict(features=dict(loss=dict(name='triplet')))))
    plan = _trained(body)
    _exp(tmp_path, few, plan).step()
    less = MetricDataset(few.df.iloc[1:], few.path, 'less', size=None, flip=False)
    with pytest.raises(ValueError, match="holds results of 'features' on other images"): _exp(tmp_path, less, plan).run()

def test_what_is_no_file_of_results_is_left_alone(few, tmp_path):
    from dmlfast.study.experiments import Experiment
    plan,file = _plan(tmp_path),tmp_path/'notes.txt'
    for o in ('Shopping list\n', '{"a": 1}\n', '[1, 2]\n{"kind": 3}\n', '7'):
        file.write_text(o)
        with pytest.raises(ValueError, match=r"notes.txt' holds something else than results of an experiment"): Experiment(plan, file, few)
        assert file.read_text()==o
    with pytest.raises(ValueError, match="is a folder: name a file in it"): Experiment(plan, tmp_path, few)
    # begun by a process that was killed, or with methods of another plan
    for o in ('', '\n', '{"ki', '{"kind": "tri', '{"kind": "run", "method": "else", "seed": 0}\n'):
        file.write_text(o)
        Experiment(plan, file, few)

# results alone

def test_results_are_read_without_what_trains(few, tmp_path, monkeypatch):
    "Tables, chosen settings and kept numbers are those of the experiment, without data or a learner; what would train is not there"
    from dmlfast.study.comparison import Results
    exp = _exp(tmp_path, few)
    exp.run()
    monkeypatch.setattr('dmlfast.study.plans.read_data', None)
    res = Results(_plan(tmp_path), tmp_path/'r.jsonl')
    for o in ('table','differences','choices','seen'): assert getattr(res, o)().equals(getattr(exp, o)()), o
    assert res.chosen('γ')==exp.chosen('γ') and res.rows()==exp.rows() and res.name=='toys'
    assert res.difference('γ').tolist()==exp.difference('γ').tolist() and not hasattr(res, 'run')
    with pytest.raises(ValueError, match="no method 'lowder'; the nearest is 'louder'"): res.values('lowder', 'map@r')

def test_mean_intervals_are_those_of_a_t_test():
    "By hand: 4.3027/sqrt(3) for 1, 2, 3; a single number has none, and equal numbers one of no width"
    from scipy import stats
    from dmlfast.study.comparison import mean_interval
    assert mean_interval([1,2,3])==pytest.approx((2,2-4.302653/3**.5,2+4.302653/3**.5), abs=1e-6)
    m,lo,hi = mean_interval([.7])
    assert m==.7 and math.isnan(lo) and math.isnan(hi) and mean_interval([.5]*4)==(.5,.5,.5)
    a,b = np.random.default_rng(0).standard_normal((2,7))
    ci = stats.ttest_rel(a, b).confidence_interval()
    assert mean_interval(a-b)==pytest.approx(((a-b).mean(),ci.low,ci.high))

def test_a_plan_by_itself(tmp_path, few):
    "It is called as its file is, and reads its data when these are asked for"
    from dmlfast.study.plans import Plan
    (tmp_path/'cars.toml').write_text('[settings]\nfit = {n_epoch = 1}\ndata = {reader = "folder", path = "not/there"}\n'
        '[methods.a]\nloss = {name = "triplet"}\n')
    plan = Plan(tmp_path/'cars.toml')
    assert plan.name=='cars' and plan.home==tmp_path and repr(plan)=='cars: a' and Plan(_plan(tmp_path)).name=='toys'
    assert Plan(_plan(tmp_path), few).ds is few
    with pytest.raises(ValueError, match='not/there'): plan.ds
