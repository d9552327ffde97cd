"Runs as settings: names, types and sense are checked before any work, files say what was meant, and a run goes on where it was"
import copy, csv, json, math
from pathlib import Path
import numpy as np
import pytest
from fastai.callback.core import Callback

small = dict(seed=3, batch=dict(bs=32, per_class=4, num_workers=0), model=dict(arch='test_resnet', pretrained=False, emb_sz=16),
    loss=dict(name='dr_triplet', gamma=.2), fit=dict(n_epoch=3, lr=6e-3))

class Stop(Callback):
    "Ctrl-C in the middle of an epoch"
    def __init__(self, epoch): self.at = epoch
    def before_batch(self):
        if self.training and self.epoch==self.at and self.iter==1: raise KeyboardInterrupt

class Count(Callback):
    "Epochs that are trained"
    n = 0
    def before_train(self): self.n += 1

def _with(changes, base=small):
    from dmlfast.study.runs import with_settings
    return with_settings(base, changes)

def test_round_trip(tmp_path):
    from dmlfast.study.runs import load_settings, save_settings
    s = _with({'data':dict(reader='csv', path=Path('some')/'täble.csv', columns=dict(label='species')), 'batch.valid':'none',
        'loss.miner':dict(name='distance_weighted', upper=math.inf),
        'ssr':dict(m=4, views=dict(n=3, strength=.1), loss=dict(alpha=.01)), 'fit.sched':'step', 'fit.steps':[1,2], 'fit.factor':.5,
        'model.timm':dict(pad_type='same'), 'recipe':'margin'})
    save_settings(s, tmp_path/'a.toml')
    back = load_settings(tmp_path/'a.toml')
    assert back==_with({'data.path':'some/täble.csv'}, s)
    save_settings(back, tmp_path/'b.toml')
    assert (tmp_path/'a.toml').read_bytes()==(tmp_path/'b.toml').read_bytes()
    with pytest.raises(ValueError, match='inf means the same'):
        save_settings(_with({'loss.miner':dict(name='distance_weighted', upper=None)}), tmp_path/'c.toml')

@pytest.mark.parametrize('path,near', [('data.val_pc','data.val_pct'), ('batch.per_clas','batch.per_class'), ('model.archi','model.arch'),
    ('loss.gama','loss.gamma'), ('loss.miner.marg','loss.miner.margin'),
    ('ssr.gama','ssr.gamma'), ('ssr.views.stength','ssr.views.strength'), ('ssr.loss.alfa','ssr.loss.alpha'),
    ('fit.n_epochs','fit.n_epoch'), ('seeds','seed')])
def test_every_unknown_name(path, near):
    from dmlfast.study.runs import check_settings
    full = _with({'loss.miner':dict(name='semi_hard'), 'ssr':dict(views={}, loss={}), 'data':dict(reader='folder', path='x')})
    check_settings(full)
    with pytest.raises(ValueError, match=f'nearest is {near!r}'): check_settings(_with({path:1}, full))

@pytest.mark.parametrize('changes,said', [
    ({'batch.bs':'64'}, 'whole number'), ({'batch.bs':64.}, 'whole number'), ({'batch.bs':True}, 'whole number'),
    ({'loss.gamma':'x'}, 'is a number'), ({'loss.gamma':math.nan}, 'is a number'),
    ({'model.pretrained':'no'}, 'true or false'), ({'loss.miner':'semi_hard'}, 'is a table'),
    ({'loss.miner':dict(margin=.1)}, 'needs the `name`'), ({'loss':dict(margin=.1)}, 'nearest is'),
    ({'fit.lr':0.}, 'greater than 0'), ({'fit.n_epoch':-1}, '0 or more'), ({'batch.per_class':0}, '1 or more'),
    ({'batch.bs':33}, 'multiple of'), ({'seed':-1}, '0 or more'), ({'seed':1.5}, 'whole number'),
    ({'fit.sched':'stp'}, "nearest is 'step'"), ({'fit.steps':[2]}, "for the schedule 'step'"),
    ({'fit.sched':'step', 'fit.steps':[2,1]}, 'greater than the one before'), ({'fit.factor':.5}, 'for the schedules'),
    ({'fit.sched':'step', 'fit.steps':[3,5]}, 'A fit of 3 epochs comes to none of its `fit.steps`'),
    ({'fit.precision':'fp8'}, 'fp16'), ({'fit.patience':2, 'batch.valid':'none'}, 'measures on nothing'),
    ({'fit.monitor':'recall@1', 'batch.valid':'test'}, 'would choose an epoch'),
    ({'batch.device':'gpu'}, 'cpu'), ({'ssr':dict(p=2.)}, '0 to 1'), ({'ssr':dict(n=3, views=dict(n=3))}, 'set one of them'),
    ({'recipe':'dr_tripplet'}, 'dr_triplet'), ({'ssr':dict(gamma=[1])}, 'is a number')])
def test_what_makes_no_sense(changes, said):
    from dmlfast.study.runs import check_settings
    base = {k:v for k,v in small.items() if k!='loss'} if changes=={'loss':dict(margin=.1)} else small
    if base is not small: said = 'needs the `name`'
    with pytest.raises(ValueError, match=said): check_settings(_with(changes, base))

def test_a_rate_of_the_body_alone(few):
    "It is a share of whatever rate the learner has"
    from dmlfast.study.runs import make_learner
    learn = make_learner(_with({'fit.lr':None, 'fit.body_lr':.1}), few)
    assert learn.group_rates(1.)==slice(.1, 1.) and learn.group_rates(slice(2.))==slice(2.)

def test_a_seed_draws_weights_and_batches(few):
    from dmlfast.study.runs import make_learner
    a,b,c = (make_learner(_with({'seed':o}), few) for o in (3,3,4))
    for f in (lambda o: o.model.head.weight, lambda o: o.dls.train.sampler.classes(0)): assert (f(a)==f(b)).all() and (f(a)!=f(c)).any()

def test_steps_of_the_rate_in_a_fit(few):
    from dmlfast.study.runs import fit_settings, make_learner
    s = _with({'fit':dict(sched='step', steps=[1,2], factor=.5, body_lr=.1)})
    learn = make_learner(s, few)
    with learn.no_bar(), learn.no_logging(): fit_settings(learn, s)
    lrs = np.array(learn.recorder.lrs).reshape(3, -1)
    assert np.allclose(lrs, np.array([[6e-3],[3e-3],[1.5e-3]])*np.ones_like(lrs))

def test_the_best_epoch_is_not_kept_among_the_images(few, tmp_path):
    "It is in a temporary file, or where one says"
    from dmlfast.study.runs import fit_settings, make_learner
    s = _with({'fit.monitor':'map@r', 'fit.n_epoch':1})
    learn,before = make_learner(s, few),{*few.path.rglob('*')}
    for best in (None,tmp_path/'best'):
        with learn.no_bar(), learn.no_logging(): fit_settings(learn, s, best=best)
    assert {*few.path.rglob('*')}==before and [o.name for o in tmp_path.iterdir()]==['best.pth'] and learn.model_dir=='models'

def test_settings_are_not_changed_by_their_use(few):
    from dmlfast.study.runs import make_learner
    s = _with({'ssr':dict(n=3, views=dict(strength=.1), m=4), 'model.timm':{}, 'batch.valid':'none'})
    before = copy.deepcopy(s)
    learn = make_learner(s, few)
    assert s==before and not len(learn.dls.valid.dataset)
    assert (learn.self_supervised_ranking.views.n, learn.self_supervised_ranking.views.strength)==(3,.1)

def test_interrupted_and_resumed(few, tmp_path):
    from dmlfast.study.runs import train_settings
    s = _with({'fit.monitor':'map@r'})
    whole = train_settings(s, tmp_path/'whole', few, plain=True)
    with pytest.raises(KeyboardInterrupt): train_settings(s, tmp_path/'cut', few, plain=True, cbs=[Stop(2)])
    assert not (tmp_path/'cut'/'results.json').exists()
    assert len((tmp_path/'cut'/'history.csv').read_text().splitlines())==3 # a head and two epochs
    with pytest.raises(FileExistsError, match='interrupted run'): train_settings(s, tmp_path/'cut', few)
    count = Count()
    again = train_settings(s, tmp_path/'cut', few, resume=True, plain=True, cbs=[count])
    assert again['scores']==whole['scores'] and again['epochs']==3 and count.n==1 # the one that was interrupted
    assert (tmp_path/'cut'/'history.csv').read_text()==(tmp_path/'whole'/'history.csv').read_text()
    (tmp_path/'cut'/'results.json').unlink() # as if it had been killed while it measured
    assert train_settings(s, tmp_path/'cut', few, resume=True, plain=True)['scores']==whole['scores']
    rows = list(csv.DictReader((tmp_path/'whole'/'history.csv').open()))
    # the best epoch is what is left
    assert math.isclose(max(float(o['map@r']) for o in rows), whole['scores']['val']['metrics']['map@r']['mean'], rel_tol=1e-5)

def test_a_run_that_stops_early_has_its_last_epoch(few, tmp_path):
    from dmlfast.study.runs import train_settings
    class Worse(Callback):
        order = 46
        def after_validate(self): self.learn.retrieval_metrics.scores['recall@1'] = -self.epoch
    res = train_settings(_with({'fit.n_epoch':9, 'fit.patience':1, 'fit.monitor':'recall@1'}), tmp_path/'run', few, plain=True,
        cbs=[Worse()])
    assert res['epochs']==2 and [o['epoch'] for o in csv.DictReader((tmp_path/'run'/'history.csv').open())]==['0','1']

def test_what_stops_a_run_is_the_recipes_unless_said():
    from dmlfast.study.runs import _trackers
    def _patience(**s): return [o.patience for o in _trackers(s) if hasattr(o, 'patience')]
    assert _patience(recipe='dr_triplet', fit=dict(monitor='recall@1'))==[10] # the reproduction's
    assert _patience(recipe='dr_triplet', fit=dict(monitor='recall@1', patience=3))==[3]
    assert _patience(recipe='dr_triplet', fit=dict(monitor='recall@1', patience=0))==[]
    assert _patience(fit=dict(monitor='recall@1'))==[] and _patience(recipe='dr_triplet')==[]

def test_a_rank_in_the_settings_is_lora(few):
    "It is put on between head and fit, and `fit_transfer` does not look at it"
    pytest.importorskip('peft', reason='LoRA is an extra')
    from dmlfast.study.checks import check_settings
    from dmlfast.study.runs import fit_settings, make_learner
    tiny = dict(patch_size=8, depth=1, embed_dim=32, num_heads=2)
    s = dict(model=dict(arch='vit_tiny_patch16_224', pretrained=False, timm=tiny), fit=dict(n_epoch=1, lora=2), batch=dict(bs=32),
        loss=dict(name='arcface'))
    learn = make_learner(s, few)
    with learn.no_bar(), learn.no_logging(): fit_settings(learn, s)
    assert type(learn.model).__name__=='LoraEmbedder' and {o.shape[0] for k,o in learn.model.named_parameters() if 'lora_A' in k}=={2}
    with pytest.raises(ValueError, match='`fit.lora` would not be looked at'):
        check_settings(dict(fit=dict(transfer=True, lora=2)))
    with pytest.raises(ValueError, match='`fit.lora` is trained as the network is fitted, and `fit.n_epoch` is 0'):
        check_settings({**s, 'fit':dict(n_epoch=0, lora=2)})

def test_lengths_in_the_settings_are_matryoshka(few, tmp_path):
    "In a file, in a command and in a search, whatever the loss, and checked before the training"
    import torch
    from torch.nn.functional import normalize
    from dmlfast.cli import dmlfast_train, parse_command, run_settings
    from dmlfast.losses import MatryoshkaLoss, ProxyNCALoss
    from dmlfast.study.runs import check_settings, load_settings, make_learner, make_loss, save_settings
    from dmlfast.study.tuning import default_params
    s = _with({'loss':dict(name='proxynca', gamma=.3, dims=[16,4])})
    save_settings(s, tmp_path/'a.toml')
    assert load_settings(tmp_path/'a.toml')==s
    said = run_settings(**parse_command(dmlfast_train, '--loss proxynca --loss-args gamma=.3 --dims 16 4'.split()))
    assert said['loss']==s['loss'] and default_params(s, {'loss.gamma':[.1,.3]})=={'loss.gamma':.3}
    learn = make_learner(s, few)
    loss = learn.loss_func
    assert isinstance(loss, MatryoshkaLoss) and loss.dims==(16,4) and isinstance(loss.loss, ProxyNCALoss) and loss.loss.gamma==.3
    x,y = normalize(torch.randn(8, 16)),torch.arange(8)//2
    short = ProxyNCALoss(gamma=.3).setup(learn.dls.n_train_classes, 4)
    short.proxies.data = loss.loss.proxies.data[:,:4]
    assert torch.allclose(loss(x, y), loss.loss(x, y)+short(normalize(x[:,:4]), y), atol=1e-5)
    for dims,says in (([0],'1 or more'), (4,'a list'), ([4.5],'whole numbers')):
        with pytest.raises(ValueError, match=says): check_settings(_with({'loss.dims':dims}))
    with pytest.raises(ValueError, match='keeps the first 32 numbers of an embedding, and there are 16'):
        make_learner(_with({'loss.dims':[32]}), few)
    with pytest.raises(ValueError, match='needs --loss'): run_settings(dims=[4], recipe='margin')
    assert not isinstance(make_loss(dict(name='triplet')), MatryoshkaLoss)

def test_views_are_drawn_with_the_seed_of_the_ranking():
    from dmlfast.study.checks import make_ranking
    assert [make_ranking(dict(seed=5, **o), 1).views.seed for o in ({}, dict(views={}), dict(views=dict(seed=7)))]==[5,5,7]
    assert make_ranking(dict(views={}), 1).views.seed==1

def test_interrupted_in_the_first_epoch(few, tmp_path):
    from dmlfast.study.runs import train_settings
    s = _with({'fit.n_epoch':1})
    with pytest.raises(KeyboardInterrupt): train_settings(s, tmp_path/'cut', few, plain=True, cbs=[Stop(0)])
    assert train_settings(s, tmp_path/'cut', few, resume=True, plain=True)['epochs']==1

def test_nothing_of_anyone_else_is_touched(few, tmp_path):
    from dmlfast.study.runs import train_settings
    s,out = _with({'fit.n_epoch':0}),tmp_path/'run'
    out.mkdir()
    (out/'thesis.txt').write_text('years of work')
    for o in (False,True):
        with pytest.raises(FileExistsError, match='holds no run'): train_settings(s, out, few, overwrite=o)
    (out/'thesis.txt').rename(tmp_path/'thesis.txt')
    train_settings(s, out, few)
    (tmp_path/'thesis.txt').rename(out/'thesis.txt')
    train_settings(s, out, few, overwrite=True)
    assert (out/'thesis.txt').read_text()=='years of work'
    with pytest.raises(FileNotFoundError, match='no run to resume'): train_settings(s, tmp_path/'nowhere', few, resume=True)
    with pytest.raises(ValueError, match='take one'): train_settings(s, out, few, resume=True, overwrite=True)

def test_nothing_is_written_for_a_run_that_cannot_be(few, tmp_path):
    from dmlfast.study.runs import train_settings
    for changes in ({'model.arch':'resnett'}, {'batch.bs':4096}, {'fit.monitor':'recal@1'}, {'fit.n_epoch':None},
        {'model.weights':'no.pth'}):
        with pytest.raises(ValueError): train_settings(_with(changes), tmp_path/'run', few)
        assert not (tmp_path/'run').exists()

def test_an_exported_embedder_is_measured_as_the_learner_was(few, tmp_path):
    "Also with roles, and on a split whose images the training loaders never saw"
    from dmlfast.all import MetricDataset, load_embedder
    from dmlfast.study.runs import fit_settings, make_learner
    df = few.df.assign(role=['query' if i%2 else 'gallery' for i in range(len(few.df))])
    ds = MetricDataset(df, few.path, 'roles', size=24, flip=False)
    learn = make_learner(small, ds)
    with learn.no_bar(), learn.no_logging(): fit_settings(learn, small, 1)
    learn.export_embedder(tmp_path/'e')
    want = learn.evaluate('test')
    finder = load_embedder(tmp_path/'e')
    got = finder.embedded(ds, 'test', num_workers=2).evaluate()
    assert got.keys()==want.keys() and np.array_equal(got.used, want.used)
    assert all(abs(got[k]-want[k])<.01 for k in ('recall@1','map@r','mrr'))
    assert abs(got['map@r']-want['map@r'])<1e-5
    assert np.abs(got.boot('map@r')-want.boot('map@r')).max()<.01 # the classes are in the same order
    with pytest.raises(ValueError, match="roles has no split 'tset'; its splits are train, val, test"): finder.embedded(ds, 'tset')

@pytest.mark.parametrize('name,near', [('tripel','TripletLoss'), ('DRTripletLos','DRTripletLoss'), ('dr-triple','DRTripletLoss'),
    ('proxy_nca2','ProxyNCALoss'), ('multi_simlarity','MultiSimilarityLoss')])
def test_the_nearest_loss(name, near):
    from dmlfast.study.runs import loss_class
    with pytest.raises(ValueError, match=f"no loss {name!r}; the nearest is {near!r}"): loss_class(name)

def test_batches_fit_few_classes(few):
    "Where nothing says how large a batch is, it has no more classes than there are to train on, and says so"
    from dmlfast.study.runs import make_learner
    df = few.df[few.df.split!='val']
    keep = df.label[df.split=='train'].unique()[:3]
    ds = few.__class__(df[df.label.isin(keep)], few.path, 'three classes', size=None, flip=False)
    s = _with({'batch':dict(per_class=4, num_workers=0, valid='none')})
    del s['batch']['bs']
    with pytest.warns(UserWarning, match='Batches have 12 images, since there are 3 training classes, with 4 images of each'):
        learn = make_learner(s, ds)
    assert learn.dls.train.bs==12
    assert few.dataloaders(per_class=5, num_workers=0, size=24).train.bs==60 # whole classes: 12 of them

def test_odd_values_of_every_loss():
    "What a loss or a miner cannot work with is refused before a fit, whatever stumbles over it"
    from dmlfast.losses import register_loss, register_miner
    from dmlfast.study.checks import allowed_settings, check_settings
    tables = [('loss', dict(name=o)) for o in register_loss]+[('loss.miner', dict(name='triplet', miner=dict(name=o)))
        for o in register_miner]
    assert len(tables)>15
    for table,loss in tables:
        check_settings(dict(loss=loss))
        for k in allowed_settings(dict(loss=loss))[table]:
            for v in (None, '', -3, math.nan, math.inf, -math.inf, 'word', 10**30, [1,[2,3]], {}, True):
                try: check_settings(_with({f'{table}.{k}':v}, dict(loss=loss)))
                except ValueError as e: assert str(e) and '\n' not in str(e)

def test_a_setting_of_your_own(few, tmp_path, monkeypatch):
    "Written in one place, it is checked, has an argument with its help, is recorded, reaches the fit and is there when the run is read"
    import io, contextlib
    import dmlfast.study.settings as schema
    from dmlfast.cli import dmlfast_train, parse_command, run_command, run_settings
    from dmlfast.study.runs import check_settings, load_settings, make_learner, train_settings
    monkeypatch.setattr(schema, '_registered', {})
    lengths = []
    class Clip(Callback):
        "Scale gradients down to a length"
        def __init__(self, most): self.most = most
        def before_step(self):
            import torch
            torch.nn.utils.clip_grad_norm_(self.learn.model.parameters(), self.most)
            lengths.append(math.sqrt(sum(float(o.grad.pow(2).sum()) for o in self.learn.model.parameters() if o.grad is not None)))

    @schema.register_setting('fit', above=0, arg='clip')
    def clip_grad(
        learn, # New learner
        most:float, # Longest gradient of a step; any if not given
    ): learn.add_cb(Clip(most))

    for value in (-1., 'x'):
        with pytest.raises(ValueError, match='`fit.clip_grad` is a number, greater than 0; got'):
            check_settings(_with({'fit.clip_grad':value}))
    with pytest.raises(ValueError, match="nearest is 'fit.clip_grad'"): check_settings(_with({'fit.clip_gard':1.}))
    with contextlib.redirect_stdout(io.StringIO()) as out: assert run_command(dmlfast_train, ['--help'])==0
    said = ' '.join(out.getvalue().split()) # lines are as long as the screen is wide
    assert '--clip (float)' in said and 'Longest gradient of a step; any if not given' in said
    s = run_settings(**parse_command(dmlfast_train, '--clip 1e-3 --loss triplet'.split()))
    assert s==dict(loss=dict(name='triplet'), fit=dict(clip_grad=1e-3))
    row = '| `fit.clip_grad` | a number, greater than 0 | `--clip` | Longest gradient of a step; any if not given |'
    assert row in schema.settings_table()
    train_settings(_with({'fit.clip_grad':1e-3, 'fit.n_epoch':1}), tmp_path/'run', few, plain=True)
    assert lengths and max(lengths)<1.001e-3
    back = load_settings(tmp_path/'run'/'settings.toml')
    assert back['fit']['clip_grad']==1e-3 and any(isinstance(o, Clip) for o in make_learner(back, few).cbs)
    assert not any(isinstance(o, Clip) for o in make_learner(small, few).cbs)
    @schema.register_setting('batch', words=('few','many'))
    def seen(learn, seen:str): learn.seen = seen
    assert make_learner(_with({'batch.seen':'many'}), few).seen=='many' # and the data loaders are not told
    with pytest.raises(ValueError, match="no `batch.seen` 'fewer'; the nearest is 'few'"): run_settings(seen='fewer')

def test_a_setting_is_declared_once(monkeypatch):
    import dmlfast.study.settings as schema
    monkeypatch.setattr(schema, '_registered', {})
    def lr(learn, value:float): pass
    def rate(learn, value:float): pass
    with pytest.raises(ValueError, match="a setting 'fit.lr' already"): schema.register_setting('fit')(lr)
    with pytest.raises(ValueError, match='`fit.lr` has the argument'): schema.register_setting('model', arg='lr')(rate)
    with pytest.raises(ValueError, match='its own arguments'): schema.register_setting('loss')(rate)
    schema.register_setting('', arg='out')(rate)
    from dmlfast.cli import dmlfast_train, parse_command
    with pytest.raises(ValueError, match="`rate` cannot have the argument 'out', which dmlfast-train has already"):
        parse_command(dmlfast_train, [])

def test_the_schema_is_what_is_called():
    "Fields of a table are arguments of the function that gets them, and the help says what each is"
    import inspect
    from dmlfast.all import MetricDataset, metric_learner
    from dmlfast.study.settings import declared_settings, settings_of, table_settings
    batch,model = set(table_settings('batch')),{k for k,o in table_settings('model').items() if k!='timm'}
    assert batch==set(settings_of(MetricDataset.dataloaders, 'batch', ('item_tfms','batch_tfms')))
    assert model<=set(inspect.signature(metric_learner).parameters)
    assert set(table_settings('data'))<=set(settings_of(MetricDataset.__init__)) | {'reader','images'}
    assert all(o.help for o in declared_settings().values())

def test_a_reader_of_your_own(few, tmp_path):
    "Found by its name in settings and by --data, with its own arguments"
    from fastcore.meta import delegates
    from dmlfast.all import MetricDataset, register_reader
    from dmlfast.cli import run_settings
    from dmlfast.study.runs import check_settings, read_data
    @register_reader
    @delegates(MetricDataset.__init__, but=['df','path'])
    def some_characters(
        path=few.path, # Folder
        every:int=2, # Leave out all classes but each of so many
        **kwargs
    ): return MetricDataset(few.df[few.df.label.isin(sorted(few.df.label.unique())[::every])], path, **kwargs)
    try:
        s = run_settings(data='some_characters', data_args='every=3,size=24')
        assert s['data']==dict(reader='some_characters', every=3, size=24)
        ds = read_data(s['data'])
        assert ds.size==24 and ds.df.label.nunique()==math.ceil(few.df.label.nunique()/3)
        assert run_settings(data='some_characters', path=str(tmp_path))['data']==dict(reader='some_characters', path=str(tmp_path))
        with pytest.raises(ValueError, match="nearest is 'data.every'"): check_settings(dict(data=dict(reader='some_characters', evry=3)))
        with pytest.raises(ValueError, match='`data.every` is a whole number'):
            check_settings(dict(data=dict(reader='some_characters', every='x')))
    finally: register_reader.remove('some_characters')
    with pytest.raises(ValueError, match="no reader 'some_characters'"): check_settings(dict(data=dict(reader='some_characters')))
