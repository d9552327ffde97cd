"Runs made sick on purpose, each of which must get its diagnosis, and healthy ones, which must get none"
import math, pickle
import pytest, torch
from torch import nn
from fastai.vision.all import *
from dmlfast.train.gain import what_to_try
from dmlfast.all import *
from dmlfast.losses.geometry import label_masks, safe_sqrt, sqdist
from dmlfast.train.doctor import active_share, dr_share, effective_rank

def points(noise=.6, shuffle_labels=False, n=24, per=16, bs=48):
    "Loaders of points of `n` classes, of which the first half are for training"
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n).repeat_interleave(per)
    x,h = torch.randn(n, 16, generator=g)[y]+noise*torch.randn(n*per, 16, generator=g),n*per//2
    seen = y[:h][torch.randperm(h, generator=g)] if shuffle_labels else y[:h]
    train = BalancedDL(list(zip(x[:h],seen)), bs=bs, per_class=8, labels=seen.numpy(), shuffle=True, seed=0, num_workers=0)
    return DataLoaders(train, TfmdDL(list(zip(x[h:],y[h:])), bs=96, num_workers=0))

class Net(nn.Module):
    "Features, and a head whose embeddings are scaled to length 1"
    def __init__(self, normalize=True):
        super().__init__()
        self.body,self.head = nn.Sequential(nn.Linear(16, 64), nn.ReLU()),nn.Linear(64, 16)
        self.n_features,self.emb_sz,self.normalize = 64,16,normalize
    def features(self, x): return self.body(x)
    def forward(self, x):
        x = self.head(self.features(x))
        return F.normalize(x, dim=1) if self.normalize else x

def run(loss, lr=3e-3, n_epoch=6, wd=None, every=2, net=None, opt_func=Adam, cbs=(), **kwargs):
    "A learner after a fit with a doctor"
    set_seed(0)
    learn = metric_learner(points(**kwargs), net or Net(), loss, cbs=[TrainingDoctor(every=every), *cbs], opt_func=opt_func, wd=wd)
    learn.remove_cbs([o for o in learn.cbs if type(o).__name__=='ProgressCallback'])
    learn.logger = lambda *a: None
    learn.fit(n_epoch, lr)
    return learn

def names(learn): return [o.name for o in learn.training_doctor.findings]

def proxy(cls=ProxyNCALoss, **kwargs): return cls(n_classes=12, emb_sz=16, **kwargs)

class PullTogether(MetricLoss):
    "Mean distance of all pairs, whatever their class"
    def compute(self, embs, labels): return sqdist(embs).mean().to(embs.dtype)

healthy = dict(triplet=TripletLoss, dr=DRTripletLoss, mined=lambda: DRTripletLoss(miner=SemiHardMiner()),
    mean=lambda: TripletLoss(margin=.278, gamma=.49, reduction='mean'),
    hard=lambda: TripletLoss(miner=BatchHardMiner()), ms=MultiSimilarityLoss, dr_ms=DRMultiSimilarityLoss,
    margin=lambda: MarginLoss(n_classes=12), contrastive=ContrastiveLoss, nca=proxy,
    dr_nca=lambda: proxy(DRProxyNCALoss), anchor=lambda: proxy(ProxyAnchorLoss), npair=NPairLoss,
    both=lambda: CombinedLoss([proxy(), DRTripletLoss()]))

@pytest.mark.parametrize('name', healthy)
def test_a_healthy_run_gets_none(name, capsys):
    net = Net(normalize=name!='npair')
    # which of so few classes learns the training set by heart sooner
    learn = run(healthy[name](), lr=5e-4 if name=='npair' else 3e-3, net=net)
    assert learn.training_doctor.findings==[] and 'TrainingDoctor' not in capsys.readouterr().out
    assert learn.training_doctor.epochs[-1]['recall']>.7
    if name=='both': assert learn.training_doctor.plot()._suptitle.get_text()=='Nothing wrong was found.'

sick = dict(
    collapse=(PullTogether, dict(n_epoch=10), 'similarity of 0.99'),
    inactive=(lambda: TripletLoss(margin=.01), dict(noise=.05, n_epoch=8), '0.00% of the triplets'),
    still=(DRTripletLoss, dict(lr=1e-6), 'Raise the learning rate'),
    margin=(lambda: TripletLoss(margin=2.), {}, 'margin of 2 cannot be met'),
    lengths=(lambda: TripletLoss(margin=1.), dict(lr=1., n_epoch=3, every=1, wd=0.), 'times as long'),
    dr=(lambda: DRTripletLoss(gamma=20.), {}, 'of the gradient'),
    proxies=(lambda: proxy(lr_mult=0.), dict(n_epoch=3, every=1), 'do not move'),
    stuck=(TripletLoss, dict(shuffle_labels=True, lr=1e-6), 'margin of 0.2'),
    runaway=(TripletLoss, dict(shuffle_labels=True, lr=1e-2, n_epoch=20), 'learned by heart'))

@pytest.mark.parametrize('name', sick)
def test_a_sick_run_gets_its_diagnosis(name, capsys):
    make,kwargs,said = sick[name]
    learn = run(make(), **kwargs)
    found = {o.name:o.text for o in learn.training_doctor.findings}
    assert list(found)==[name], found
    assert said in found[name] and found[name].count('. ')>=1 # what is wrong, and a remedy
    assert found[name] in capsys.readouterr().out
    assert ' '.join(learn.training_doctor.plot()._suptitle.get_text().split())==found[name]

@pytest.mark.parametrize('loss,said', [(lambda: TripletLoss(margin=2.), 'raise its `margin`, which is 2.'),
    (lambda: TripletLoss(margin=3.), 'Lower the learning rate; if'),
    (lambda: TripletLoss(margin=3., miner=BatchHardMiner()), 'easier triplets'),
    (lambda: TripletLoss(margin=5., squared=True), 'raise its `margin`'), (lambda: TripletLoss(margin=7., squared=True), 'Lower'),
    (lambda: ContrastiveLoss(neg_margin=3.), 'raise its `neg_margin`, which is 3.'), (lambda: ContrastiveLoss(neg_margin=4.), 'Lower'),
    (ProxyNCALoss, 'Lower the learning rate; if'),
    (lambda: DRTripletLoss(margin=3., gamma=6.), 'lower `gamma`'),
    (lambda: DRTripletLoss(margin=3., gamma=5.9), 'Lower the learning rate; if')])
def test_the_remedy_of_a_collapse_fits_its_cause(loss, said):
    "Negatives 3.5 apart and positives 1, so that a margin is met up to 2.5; where distances are squared, 2.6 and 1, and up to 5.76"
    doctor = TrainingDoctor()
    doctor.learn = SimpleNamespace(loss_func=loss())
    squared = getattr(doctor.learn.loss_func, 'squared', False)
    d_pos,d_neg = (1.,2.6) if squared and doctor.learn.loss_func.__class__ is TripletLoss else (1.,3.5)
    doctor.steps = [dict(pos=.97, neg=.95, rank=5., most=16, d_pos=d_pos, d_neg=d_neg, loss=.1)]*6
    text, = [o.text for o in doctor.findings]
    assert said in text and 'similarity of 0.95' in text

def test_a_regulariser_that_takes_the_margin_away():
    learn = run(DRTripletLoss(margin=.05, gamma=.6), noise=2., n_epoch=15)
    assert names(learn)==['collapse'] and 'lower `gamma`' in learn.training_doctor.findings[0].text

def test_ranking_that_takes_over_is_found(make_learner):
    def fit(gamma):
        learn = make_learner(DRTripletLoss(), cbs=[SelfSupervisedRanking(m=8, p=.9, gamma=gamma), TrainingDoctor(every=1)])
        learn.fit(2, 3e-3)
        return learn
    well,ill = fit(.8),fit(1000.)
    assert names(well)==[]
    assert 0<well.training_doctor.recent('ssr')<.9 and 0<well.training_doctor.recent('dr')<.9
    assert names(ill)==['ssr'] and 'Lower its `gamma`' in ill.training_doctor.findings[0].text
    assert sum('ssr' in o for o in ill.training_doctor.steps)==sum(not math.isnan(o) for o in ill.self_supervised_ranking.ssr_losses)
    shown = [o.get_title() for o in ill.training_doctor.plot().axes if o.get_title()]
    assert shown==['Similarity of training pairs','Directions in use','What is learned from','Loss','Embeddings before normalisation',
        'Share of the gradient','Distance moved by the weights','Training against validation']

def test_share_of_ranking_is_that_of_two_backward_passes(make_learner):
    "The gradients at the pooled features, each from a backward pass of its own"
    class Look(Callback):
        order,run_valid = 4,False # before the ranking loss is added
        def before_batch(self): self.feats = {}
        def before_fit(self):
            for k,m in dict(metric=self.model.head, ssr=self.model.ranking_head).items():
                m.register_forward_pre_hook(lambda m,x,k=k: self.feats.__setitem__(k, x[0]))
        def after_loss(self): self.metric = self.learn.loss
        def before_backward(self):
            ssr = self.learn.loss_grad-self.metric
            g = [torch.autograd.grad(l, self.feats[k], retain_graph=True)[0].norm().item() for k,l in (('metric',self.metric),('ssr',ssr))]
            self.share = g[1]/sum(g)
            raise CancelFitException
    doctor = TrainingDoctor(every=1, say=False)
    learn = make_learner(TripletLoss(), cbs=[SelfSupervisedRanking(m=8, p=1.), Look()])
    learn.fit(1, 1e-3)
    other = make_learner(TripletLoss(), cbs=[SelfSupervisedRanking(m=8, p=1.), doctor])
    other.fit(1, 1e-3)
    assert doctor.steps[0]['ssr']==pytest.approx(learn.look.share, rel=1e-3)

@pytest.mark.parametrize('loss', [lambda: DRTripletLoss(miner=RandomMiner()), lambda: MarginLoss(gamma=.2), DRProxyNCALoss],
    ids=['random','margin','proxy'])
def test_the_run_is_the_same_without_it(make_learner, loss):
    def fit(*cbs):
        learn = make_learner(loss(), cbs=[SelfSupervisedRanking(m=4, p=.5), *cbs])
        learn.fit_one_cycle(2, 1e-2)
        return learn
    a,b = fit(),fit(TrainingDoctor(every=1))
    assert [float(o) for o in a.recorder.losses]==[float(o) for o in b.recorder.losses]
    assert all(torch.equal(v, w) for v,w in zip(a.model.state_dict().values(), b.model.state_dict().values()))
    assert len(b.training_doctor.steps)==len(b.recorder.losses) and not b.training_doctor.hooks

def test_it_looks_seldom(make_learner):
    learn = make_learner(cbs=TrainingDoctor(every=5))
    learn.fit(2, 1e-3)
    n = len(learn.dls.train)
    assert [o['step']-1 for o in learn.training_doctor.steps]==sorted({*range(0, 2*n, 5),0,n})
    assert names(learn)==[] # too little was seen

def test_a_short_fit_is_looked_at_often_enough_and_a_long_one_seldom():
    learn = run(TripletLoss(), n_epoch=3, every=None)
    n = 3*len(learn.dls.train)
    assert n<48 and len(learn.training_doctor.steps)==n and learn.training_doctor.enough
    learn.training_doctor.learn.n_epoch = 480//len(learn.dls.train)+1
    learn.training_doctor.before_fit()
    assert learn.training_doctor.period==20
    learn.training_doctor.after_fit()

def test_losses_from_elsewhere_and_losses_of_ones_own():
    "They are not computed a second time, for they may remember what they saw"
    class Counts(MetricLoss):
        calls = 0
        def compute(self, embs, labels):
            self.calls += 1
            return TripletLoss()(embs, labels)
    loss = Counts()
    learn = run(loss, n_epoch=2, every=1)
    steps = learn.training_doctor.steps
    n_valid = 2*len(learn.dls.valid)
    assert loss.calls==len(steps)+n_valid and 'active' not in steps[0] and 0<steps[0]['rows']<=1
    learn = run(lambda e,y: TripletLoss()(e, y), n_epoch=2, every=1)
    assert {'pos','neg','rank','rows','length'}<=set(learn.training_doctor.steps[0])

class ApartLoss(MetricLoss):
    "Negatives at least `far` away; it says so, and which share is not"
    def __init__(self, far=1.4, gamma=0.):
        super().__init__(gamma)
        self.far,self.calls = far,0
    def hinges(self, embs, labels): return (self.far-safe_sqrt(sqdist(embs)))[label_masks(labels)[1]].relu()
    def compute(self, embs, labels):
        self.calls += 1
        return self.hinges(embs, labels).mean().to(embs.dtype)
    def active(self, embs, labels):
        torch.rand(9) # leaves no trace
        return (self.hinges(embs, labels)>0).float().mean()
    def asks(self): return Margin('far', self.far, of='negatives')

def test_a_loss_of_ones_own_answers_for_itself():
    "What it says of itself is drawn and named, as what ours say; draws of `active` do not change the run"
    class Silent(ApartLoss):
        def active(self, embs, labels): pass
    learn,silent = run(ApartLoss(), n_epoch=2, every=1),run(Silent(), n_epoch=2, every=1)
    steps = learn.training_doctor.steps
    assert all(0<o['active']<1 for o in steps) and not any('active' in o for o in silent.training_doctor.steps)
    assert [float(o) for o in learn.recorder.losses]==[float(o) for o in silent.recorder.losses]
    said = next(o for o in learn.training_doctor.plot().axes if o.get_title()=='What is learned from')
    assert [o.get_label() for o in said.lines]==['triplets or pairs','embeddings with a gradient']
    doctor = TrainingDoctor()
    doctor.learn = SimpleNamespace(loss_func=CombinedLoss([ProxyNCALoss(), ApartLoss(.001)]))
    doctor.steps = [dict(pos=.97, neg=.95, rank=5., most=16, d_pos=.01, d_neg=.01, loss=.1)]*6
    assert 'raise its `far`, which is 0.001.' in doctor.findings[0].text

@pytest.mark.parametrize('repeatable', [True,False])
def test_what_may_not_be_repeated_is_not(repeatable):
    "Without and with γ, its share takes two more values"
    class Remembers(ApartLoss): pass
    Remembers.repeatable = repeatable
    loss = Remembers(gamma=.1)
    learn = run(loss, n_epoch=1, every=1)
    n = len(learn.training_doctor.steps)
    assert loss.calls-len(learn.dls.valid)==(3*n if repeatable else n)
    assert all(('active' in o)==('dr' in o)==repeatable for o in learn.training_doctor.steps)

def test_foreign_proxies_that_do_not_move_are_found():
    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.W,self.lr_mult = nn.Parameter(torch.randn(12, 16)),0.
        def forward(self, e, y): return F.cross_entropy(e@self.W.T*5, y%12)
    assert 'proxies' in names(run(Foreign(), n_epoch=3, every=1))

def test_lr_find_predictions_and_checkpoints(make_learner, tmp_path):
    learn = make_learner(ProxyNCALoss(), cbs=TrainingDoctor(every=1))
    learn.lr_find(num_it=8, show_plot=False)
    learn.get_preds()
    assert learn.training_doctor.steps==[]
    learn.fit(2, 1e-3, cbs=Checkpoint(tmp_path/'run'))
    steps = list(learn.training_doctor.steps)
    learn.validate()
    assert steps and learn.training_doctor.steps==steps
    class Trip(Callback):
        def before_batch(self):
            if self.epoch==1: raise KeyboardInterrupt
    cut = make_learner(ProxyNCALoss(), cbs=TrainingDoctor(every=1))
    with pytest.raises(KeyboardInterrupt): cut.fit(2, 1e-3, cbs=[Checkpoint(tmp_path/'cut'), Trip()])
    new = make_learner(ProxyNCALoss(), cbs=TrainingDoctor(every=1)).resume(tmp_path/'cut')
    new.fit(2, 1e-3, cbs=Checkpoint(tmp_path/'cut'))
    whole = make_learner(ProxyNCALoss(), cbs=TrainingDoctor(every=1))
    whole.fit(2, 1e-3)
    assert new.training_doctor.steps==whole.training_doctor.steps and new.training_doctor.epochs==whole.training_doctor.epochs

def test_a_learner_with_a_doctor_is_exported(make_learner, tmp_path):
    learn = make_learner(TripletLoss(), cbs=TrainingDoctor(every=1))
    learn.fit(1, 1e-3)
    learn.logger = noop
    learn.export(tmp_path/'learner.pkl')
    assert load_learner(tmp_path/'learner.pkl').training_doctor.steps==learn.training_doctor.steps

def test_what_it_is_asked_wrongly():
    with pytest.raises(ValueError, match='1 or more; got 0'): TrainingDoctor(every=0)
    with pytest.raises(ValueError, match='no training step'): TrainingDoctor().plot()

def test_half_precision():
    "Embeddings in half precision, as autocast gives them"
    class Half(Net):
        def forward(self, x): return super().forward(x).half()
    learn = run(DRTripletLoss(), net=Half())
    assert names(learn)==[] and learn.training_doctor.steps[-1]['rank']>3

# against the features that it started with

@pytest.fixture(scope='module')
def body(few, tmp_path_factory):
    "File of a body that was trained a little on `few`"
    set_seed(0)
    tmp = tmp_path_factory.mktemp('body')
    learn = metric_learner(few.dataloaders(bs=32, per_class=4, seed=0, num_workers=0), 'test_resnet', TripletLoss(), emb_sz=16,
        pretrained=False, path=tmp)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
    torch.save(learn.model.body.state_dict(), tmp/'body.pth')
    return tmp/'body.pth'

def from_body(make_learner, body, n_epoch=1, lr=1e-4, cbs=(), **kwargs):
    "A learner after a fit that began with a trained body"
    learn = make_learner(TripletLoss(), **{**dict(weights=body, emb_sz=32), **kwargs}, cbs=[TrainingDoctor(every=2), *cbs])
    learn.fit(n_epoch, lr)
    return learn

def as_if(learn, recalls, features, start=None):
    "Give the doctor other recalls of epochs, of the features and of the start"
    learn.training_doctor.epochs = [dict(epoch=i, recall=o, gap=.1) for i,o in enumerate(recalls)]
    for k,v in dict(features=features, start=start).items():
        if v is not None: learn.head_start.rows[k]['scores']['recall@1'] = v
    return {o.name:o.text for o in learn.training_doctor.findings}

sicker = dict(norm=(dict(freeze_bn=False, lr=.5), "Keep the body's batch norm as it was trained: `freeze_bn=True`."),
    head=(dict(init='random', lr=.5), "Start the head from the data and not at random: `init='lda'`."),
    rate=(dict(lr=.5), 'Use a lower learning rate, or let `fit_transfer` look for one. This fit reached 0.5.'))

@pytest.mark.parametrize('name', sicker)
def test_what_ends_below_its_features_is_told_why(name, make_learner, body, capsys):
    "After one epoch, first of all findings, and above the plot"
    kwargs,said = sicker[name]
    learn = from_body(make_learner, body, **kwargs)
    doctor,theirs = learn.training_doctor,learn.baseline(metrics=['recall@1'])['recall@1']
    first,last = doctor.findings[0],learn.recorder.values[-1][2]
    assert doctor.theirs==theirs>last+.01
    assert first==('below', f'Below the features it started with since epoch 0: recall@1 is {last:.3f} and theirs {theirs:.3f}. {said}')
    assert first.text in capsys.readouterr().out and first.text in ' '.join(doctor.plot()._suptitle.get_text().split())

def test_what_ends_above_its_features_is_not(make_learner, body):
    "Nor what is as good, or was below for a while; the epoch is the one since which all are below"
    learn = from_body(make_learner, body)
    assert 'below' not in as_if(learn, [.8], .7) and 'below' not in as_if(learn, [.691], .7)
    assert 'below' not in as_if(learn, [.5,.6,.695], .7)
    assert 'below' not in as_if(learn, [math.nan]*3, .7)
    assert 'since epoch 0: recall@1 is 0.689 and theirs 0.700.' in as_if(learn, [.689], .7)['below']
    assert 'since epoch 2: recall@1 is 0.600' in as_if(learn, [.5,.695,.689,math.nan,.6], .7)['below']
    assert 'since epoch 3' in as_if(learn, [.5,.5,.72,.6], .7)['below']

def test_a_head_that_is_too_narrow(make_learner, body):
    "It began below the features and training did not make it worse: it is the head, and not the rate; where it got worse, it is the rate"
    learn = from_body(make_learner, body, emb_sz=4)
    said = as_if(learn, [.61], .7, .6)['below']
    assert f'the head began at 0.600, with 4 numbers in place of {learn.model.n_features}: raise `emb_sz`.' in said
    assert 'lower learning rate' in as_if(learn, [.58], .7, .6)['below'] and 'lower learning rate' in as_if(learn, [.61], .7, .695)['below']
    learn.recorder.values[-1][2] = .61 # `gain` says the same
    as_if(learn, [], .7, .6)
    assert what_to_try(learn)==said.partition('theirs 0.700. ')[2]
    learn.recorder.values[-1][2] = .58
    assert 'lower learning rate' in what_to_try(learn)
    wide = from_body(make_learner, body, emb_sz=learn.model.n_features)
    assert 'lower learning rate' in as_if(wide, [.61], .7, .6)['below']

def test_a_start_is_no_training_at_too_high_a_rate(make_learner, body):
    learn = make_learner(TripletLoss(), weights=body, emb_sz=32)
    learn.start_head()
    assert what_to_try(learn).startswith('Nothing is trained beyond the start of the head')
    learn.fit(1, 1e-3)
    assert 'lower learning rate' in what_to_try(learn)

def test_without_features_nothing_is_compared(make_learner, body):
    "Random weights; a learner that was not fitted; one that does not measure recall@1"
    learn = make_learner(cbs=TrainingDoctor(every=1))
    learn.fit(1, 1e-3)
    assert learn.training_doctor.theirs is None and names(learn)==[]
    assert _level(learn)==[] and 'grey line' not in learn.training_doctor.panels[-1][-1]
    assert make_learner(weights=body, cbs=TrainingDoctor()).training_doctor.theirs is None
    learn = from_body(make_learner, body, metrics=['map@r'])
    assert learn.training_doctor.theirs is None and learn.training_doctor.measured==[] and names(learn)==[]

def _level(learn):
    "Height of the line of the features in the panel of the epochs"
    ax = next(o for o in learn.training_doctor.plot().axes if o.get_title()=='Training against validation')
    return [float(o.get_ydata()[0]) for o in ax.lines if o.get_label()=='the features: recall@1']

def test_the_features_are_a_line(make_learner, body):
    learn = from_body(make_learner, body)
    assert _level(learn)==[learn.training_doctor.theirs]
    assert 'The grey line is the recall of the features' in learn.training_doctor.panels[-1][-1]

def test_it_is_below_after_it_went_on(make_learner, body, harm, tmp_path):
    "A fit that was interrupted and goes on ends with the finding of one that was not"
    class Trip(Callback):
        def before_batch(self):
            if self.epoch==1: raise KeyboardInterrupt
    sick = dict(weights=body, emb_sz=32, freeze_bn=False)
    def _make(): return make_learner(TripletLoss(), **sick, cbs=TrainingDoctor(every=2))
    with pytest.raises(KeyboardInterrupt): _make().fit(2, 1e-3, cbs=[Checkpoint(tmp_path/'cut'), harm, Trip()])
    new = _make().resume(tmp_path/'cut')
    new.fit(2, 1e-3, cbs=[Checkpoint(tmp_path/'cut'), harm])
    whole = _make()
    whole.fit(2, 1e-3, cbs=harm)
    assert new.training_doctor.findings==whole.training_doctor.findings and names(new)[0]=='below'

# what is measured

def test_effective_rank_by_hand():
    "Two directions with energies 3 and 1: exp of the entropy of (3/4, 1/4)"
    x = torch.tensor([[1.,0],[1,0],[1,0],[0,1]])
    h = -(.75*math.log(.75)+.25*math.log(.25))
    for o in (x, F.pad(x, (0,9)), x.repeat(5, 1)): assert effective_rank(o).item()==pytest.approx(math.exp(h), abs=1e-4)
    assert math.isfinite(effective_rank(torch.zeros(3,3)))

def brute(embs, labels, hinge):
    n = len(embs)
    d = torch.cdist(embs.double(), embs.double())
    h = [hinge(d[a,p], d[a,k]) for a in range(n) for p in range(n) for k in range(n) if a!=p and labels[a]==labels[p]!=labels[k]]
    return sum(o>0 for o in h)/len(h)

def test_active_share_by_brute_force():
    g = torch.Generator().manual_seed(1)
    x,y = F.normalize(torch.randn(18, 4, generator=g)),torch.arange(18)//3
    for squared in (False,True):
        f = lambda ap,an: (ap**2-an**2 if squared else ap-an)+.3
        assert active_share(TripletLoss(margin=.3, squared=squared), x, y).item()==pytest.approx(brute(x, y, f).item(), abs=1e-6)
    state = torch.get_rng_state()
    d = torch.cdist(x, x)
    pos,neg = (y[:,None]==y)&~torch.eye(18, dtype=torch.bool),y[:,None]!=y
    margin = active_share(MarginLoss(n_classes=1, margin=.2, beta=1.2, nu=.5,
        miner=lambda e,l: (*pos.nonzero(as_tuple=True),*neg.nonzero(as_tuple=True))), x, y)
    assert margin.item()==pytest.approx((((d>1.)&pos).sum()+((d<1.4)&neg).sum()).item()/(18*17), abs=1e-6)
    assert torch.equal(state, torch.get_rng_state())
    contrastive = active_share(ContrastiveLoss(pos_margin=.9, neg_margin=1.3), x, y)
    assert contrastive.item()==pytest.approx((((d>.9)&pos).sum()+((d<1.3)&neg).sum()).item()/(18*17), abs=1e-6)
    ms = MultiSimilarityLoss(eps=-5.) # nothing is that hard
    assert active_share(ms, x, y).item()==0 and active_share(MultiSimilarityLoss(eps=5.), x, y).item()==1
    assert active_share(CombinedLoss([ProxyNCALoss(n_classes=6, emb_sz=4), TripletLoss(margin=.3)]), x,
        y)==active_share(TripletLoss(margin=.3), x, y)

def test_dr_share_is_of_the_gradient():
    "With gradients by finite differences"
    g = torch.Generator().manual_seed(1)
    x,y = F.normalize(torch.randn(8, 3, generator=g)).double(),torch.arange(8)//2
    def grad(loss):
        res,eps = torch.zeros_like(x),1e-6
        for i,j in np.ndindex(*x.shape):
            e = torch.zeros_like(x)
            e[i,j] = eps
            res[i,j] = (loss(x+e, y)-loss(x-e, y))/(2*eps)
        return res
    g1,g0 = grad(MultiSimilarityLoss(gamma=.3)),grad(MultiSimilarityLoss())
    expected = (g1-g0).norm()/((g1-g0).norm()+g0.norm())
    loss = MultiSimilarityLoss(gamma=.3)
    assert dr_share(loss, x, y).item()==pytest.approx(expected.item(), rel=1e-4) and loss.gamma==.3
