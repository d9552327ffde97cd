"What fastai users do with a learner, with a loss that has weights"
import numpy as np, pytest, re, torch
from fastai.vision.all import *
from dmlfast.all import *
from dmlfast.losses.geometry import sqdist
from dmlfast.losses.base import reduce_values
from dmlfast.models.pooling import GeM
from dmlfast.train.rates import multiply_lr
from dmlfast.train.columns import Diverged
from dmlfast.train.predictions import items_of

@pytest.fixture(scope='module')
def few_dls(few): return few.dataloaders(bs=32, per_class=4, seed=0, num_workers=0)

class Centres(MetricLoss):
    "Squared distance to a learned centre of each training class, and no value for unseen classes"
    lr_mult,seen_only = 100.,True
    def setup(self, n_classes=None, emb_sz=None):
        self.centres = nn.Parameter(torch.zeros(n_classes, emb_sz))
        return self
    def compute(self, embs, labels):
        if labels.max()>=len(self.centres): return embs.sum()*float('nan')
        return (embs-self.centres[labels]).pow(2).sum(1).mean()

class StepRatios(Callback):
    "How far the centres move in each step, for each unit of their gradient and of the group's rate"
    def before_step(self):
        self.old = self.model.loss_func.centres.detach().clone()
        self.grad = self.model.loss_func.centres.grad.clone()
    def after_batch(self):
        if self.training:
            self.ratios = getattr(self, 'ratios', []) + [
                ((self.old-self.model.loss_func.centres).norm()/self.grad.norm()/self.opt.hypers[-1]['lr']).item()]

def _run(learn, how):
    if how=='fit': learn.fit(2, slice(1e-4, 1e-3))
    elif how=='fit_one_cycle': learn.fit_one_cycle(2, slice(1e-4, 1e-3))
    elif how=='fine_tune': learn.fine_tune(1, 1e-3)
    else: learn.lr_find(num_it=12, stop_div=False, show_plot=False)

@pytest.mark.parametrize('opt', ['sgd', 'torch', 'lookahead'])
@pytest.mark.parametrize('how', ['fit','fit_one_cycle','fine_tune','lr_find'])
def test_lr_mult_survives(make_learner, how, opt):
    "In every step the centres go a hundred times as far as plain gradient descent at their group's rate would take them"
    funcs = dict(sgd=partial(SGD, mom=0.), torch=partial(OptimWrapper, opt=torch.optim.SGD),
        lookahead=lambda p, lr: Lookahead(SGD(p, lr, mom=0.), k=10**6))
    learn = make_learner(Centres(), opt_func=funcs[opt], moms=(0.,0.,0.), cbs=StepRatios())
    if opt=='torch' and how!='fit': pytest.skip('PyTorch SGD has no momentum to schedule')
    _run(learn, how)
    assert len(learn.step_ratios.ratios)>=12
    assert np.allclose(learn.step_ratios.ratios, 100, rtol=2e-2)

def test_groups_and_freezing(make_learner):
    learn = make_learner(Centres())
    body,rest = learn.splitter(learn.model)
    assert any(p is learn.loss_func.centres for p in rest)
    learn.freeze()
    before = [p.detach().clone() for p in body]
    convs = [p.ndim==4 for p in body]
    learn.fit(1, 1e-2)
    assert all((a==b).all() for a,b,conv in zip(before, body, convs) if conv)
    assert (learn.loss_func.centres!=0).any()
    learn.unfreeze()
    learn.fit(1, 1e-2)
    assert any((a!=b).any() for a,b,conv in zip(before, body, convs) if conv)

def test_trackers_and_loggers(make_learner, tmp_path):
    learn = make_learner()
    learn.fit_one_cycle(3, 3e-3, cbs=[SaveModelCallback(monitor='recall@1'), EarlyStoppingCallback(monitor='map@r', patience=9),
        CSVLogger(fname=tmp_path/'log.csv')])
    log = pd.read_csv(tmp_path/'log.csv')
    assert list(log.columns[3:-1])==['recall@1','recall@2','recall@4','recall@8','map@r']
    assert np.allclose(learn.evaluate()['recall@1'], log['recall@1'].max())

def test_tensorboard_has_the_columns(make_learner, tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = make_learner()
    learn.fit(2, 1e-3, cbs=TensorBoardCallback(tmp_path/'tb', trace_model=False, log_preds=False))
    events = EventAccumulator(str(tmp_path/'tb'))
    events.Reload()
    assert np.allclose([o.value for o in events.Scalars('recall@1')], [o[2] for o in learn.recorder.values])

def test_fine_tune_has_columns_in_both_fits(make_learner):
    learn = make_learner()
    learn.fine_tune(1, 1e-3)
    assert list(learn.recorder.metric_names[3:8])==['recall@1','recall@2','recall@4','recall@8','map@r']
    assert len(learn.recorder.values[0])==7 and not learn.metrics

def test_diverged_run_is_stopped_by_name(make_learner):
    learn = make_learner()
    learn.create_opt()
    class Poison(Callback):
        def after_train(self): self.model.head.bias.data.fill_(float('nan'))
    with pytest.raises(ValueError, match="32 of 32 validation embeddings are not finite in epoch 0, after 9 steps"):
        learn.fit(1, 1e-3, cbs=Poison())

def test_validate_and_lr_find_leave_columns(make_learner):
    learn = make_learner()
    learn.lr_find(num_it=8, show_plot=False)
    res = learn.validate()
    assert len(res)==6 and 0<=res[1]<=1
    assert not learn.retrieval_metrics.embs and not learn.metrics

def test_metrics_by_name(make_learner):
    learn = make_learner(metrics=['recall@1','mrr'])
    learn.fit(1, 1e-3)
    assert list(learn.recorder.metric_names[3:5])==['recall@1','mrr']
    assert learn.evaluate(metrics=['mrr'])['mrr']==pytest.approx(learn.recorder.values[-1][3], abs=1e-6)

def test_scored_every_other_epoch(make_learner):
    learn = make_learner(cbs=RetrievalMetrics(every=2))
    learn.fit(4, 3e-3)
    r1 = [o[2] for o in learn.recorder.values]
    assert np.isnan(r1[0]) and r1[2]==r1[1] and not np.isnan(r1[3])

def test_export(make_learner, tmp_path):
    learn = make_learner(Centres())
    learn.fit(1, 1e-3)
    learn.export()
    other = load_learner(tmp_path/'export.pkl')
    assert other.loss_func is other.model.loss_func
    assert (other.loss_func.centres==learn.loss_func.centres.cpu()).all()
    fns = learn.dls.source.items('test')[:5]
    dl = other.dls.test_dl(fns)
    assert torch.allclose(other.get_preds(dl=dl)[0], learn.embed(learn.dls.test_dl(fns))[0].cpu(), atol=1e-6)
    assert 'embs' not in vars(other.retrieval_metrics) or not other.retrieval_metrics.embs

def test_evaluate_leaves_the_recorder_alone(make_learner):
    learn = make_learner(cbs=SaveModelCallback(monitor='recall@1'))
    learn.fit(2, 3e-3)
    saved,values = learn.save_model.last_saved_path.read_bytes(),list(learn.recorder.values)
    learn.evaluate(); learn.evaluate('test'); learn.embed()
    assert learn.recorder.values==values and learn.save_model.last_saved_path.read_bytes()==saved
    with pytest.raises(ValueError, match="has no split 'vale'; its splits are train, val, test"): learn.evaluate('vale')

def test_the_same_seed_gives_the_same_numbers(make_learner):
    runs = []
    for seed in (0,0,1):
        learn = make_learner(seed=seed)
        learn.fit_one_cycle(1, 3e-3)
        runs.append(learn.recorder.values[-1])
    assert runs[0]==runs[1]!=runs[2]

def test_a_loss_of_other_sizes_is_refused_before_a_fit(make_learner):
    "By its own numbers, whatever the loss: with the sizes that it has and those that it needs"
    from pytorch_metric_learning import losses
    n = make_learner().dls.n_train_classes
    class Mine(nn.Module):
        def __init__(self, c, d):
            super().__init__()
            self.w = nn.Parameter(torch.randn(d, c))
        def forward(self, embs, labels): return F.cross_entropy(embs@self.w, labels)
    few = f'for {n-1} classes, and there are {n} training classes'
    size = 'for embeddings of 12 numbers, and there are embeddings of 16 numbers'
    both = f'for {n-1} classes and embeddings of 12 numbers, and there are {n} training classes and embeddings of 16 numbers'
    for f in (losses.ArcFaceLoss, losses.ProxyAnchorLoss, losses.ProxyNCALoss, losses.SoftTripleLoss, Mine, ProxyAnchorLoss, ArcFaceLoss):
        for args,says in (((n-1,16),few), ((n,12),size), ((n-1,12),both)):
            with pytest.raises(ValueError, match=f'^{f.__name__} was made {says}: make it for the latter'): make_learner(f(*args))
    for loss in (losses.MarginLoss(num_classes=n-1, learn_beta=True), [TripletLoss(), losses.CosFaceLoss(n-1, 16)]):
        with pytest.raises(ValueError, match=few): make_learner(loss)
    with pytest.raises(ValueError, match=f'CrossBatchMemory was made {size}'):
        make_learner(losses.CrossBatchMemory(losses.ContrastiveLoss(), 12))
    learn = make_learner()
    with pytest.raises(ValueError, match=f'ArcFaceLoss was made {size}'): learn.loss_func = losses.ArcFaceLoss(n, 12)
    fine = losses.CosFaceLoss(n+3, 16),losses.MarginLoss(num_classes=n, learn_beta=True),\
        losses.CrossBatchMemory(losses.ContrastiveLoss(), 16)
    for o in fine: # one of them has more classes
        before = torch.get_rng_state()
        OtherLoss(o).check_sizes(n, 16)
        assert torch.equal(torch.get_rng_state(), before) and not getattr(o, 'queue_idx', 0)
        make_learner(o).fit(1, 1e-3)

def test_sizes_of_a_model_that_does_not_say_them(few):
    "The first batch tells"
    from pytorch_metric_learning import losses
    dls = few.dataloaders(bs=32, per_class=4, num_workers=0)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 12))
    def learner(d): return metric_learner(dls, deepcopy(net), losses.ArcFaceLoss(dls.n_train_classes, d))
    with pytest.raises(ValueError, match='for embeddings of 7 numbers, and there are embeddings of 12 numbers'): learner(7).fit(1)
    learner(12).fit(1)

def test_a_miner_is_no_loss(make_learner):
    from pytorch_metric_learning import miners
    for o in (SemiHardMiner(), miners.MultiSimilarityMiner(), [TripletLoss(), miners.TripletMarginMiner()]):
        with pytest.raises(ValueError, match=r'is a miner and no loss.*TripletLoss\(miner='): make_learner(o)

def test_a_loss_from_elsewhere(make_learner, tmp_path):
    "Its weights are trained, saved, loaded and exported, and on unseen classes it is nan where it would fail"
    from pytorch_metric_learning.losses import ProxyAnchorLoss as Theirs
    learn = make_learner(Theirs(num_classes=24, embedding_size=16))
    proxies = learn.loss_func.loss.proxies
    assert any(p is proxies for p in learn.splitter(learn.model)[1])
    old = proxies.detach().clone()
    learn.fit(1, 1e-3)
    assert (proxies.cpu()!=old).any() and np.isnan(learn.recorder.values[-1][1])
    learn.save('theirs')
    trained = proxies.detach().clone()
    proxies.data.zero_()
    learn.load('theirs')
    assert (proxies==trained).all()
    learn.export()
    assert (load_learner(tmp_path/'export.pkl').loss_func.loss.proxies==trained.cpu()).all()

def test_several_losses_and_a_function(make_learner):
    learn = make_learner((DRTripletLoss(), ProxyNCALoss(lr_mult=10.), lambda embs, labels: embs.pow(2).mean()))
    assert list(lr_mults(learn.model).values())==[10.]
    learn.fit(1, 1e-3)
    assert np.isfinite(learn.recorder.values[-1][0])

@pytest.mark.parametrize('loss', [ProxyNCALoss, DRMultiSimilarityLoss, MarginLoss, ContrastiveLoss, NPairLoss, ProxyAnchorLoss,
    partial(TripletLoss, miner=SemiHardMiner()), CosFaceLoss, partial(SubCenterArcFaceLoss, sample=.5), SoftTripleLoss])
def test_every_loss_trains(make_learner, loss):
    learn = make_learner(loss())
    learn.fit(1, 1e-3)
    train,valid = learn.recorder.values[-1][:2]
    assert np.isfinite(train) and np.isnan(valid)==learn.loss_func.seen_only
    assert learn.model.normalize==learn.loss_func.normalize_embs

def test_a_tracker_of_what_cannot_exist_is_refused(make_learner):
    learn = make_learner(ProxyNCALoss())
    with pytest.raises(ValueError, match="SaveModelCallback monitors 'valid_loss', which ProxyNCALoss does not have on unseen classes: "
        "monitor='recall@1'"):
        learn.fit_one_cycle(1, 1e-3, cbs=SaveModelCallback())
    learn.fit_one_cycle(1, 1e-3, cbs=SaveModelCallback(monitor='recall@1'))
    with pytest.raises(ValueError, match="monitors 'recall_1', and the columns are train_loss, valid_loss, recall@1, recall@2"):
        learn.fit(1, 1e-3, cbs=SaveModelCallback(monitor='recall_1'))

@pytest.mark.parametrize('loss', [TripletLoss, ContrastiveLoss, MarginLoss, NPairLoss,
    MultiSimilarityLoss, lambda: CombinedLoss([TripletLoss(),ContrastiveLoss()]), ProxyNCALoss,
    ProxyAnchorLoss, lambda: CombinedLoss([TripletLoss(),ProxyNCALoss()])])
def test_batches_without_pairs_are_not_silent(make_learner, loss, recwarn):
    "Once in a fit, and not where proxies stand for classes, nor where batches have pairs"
    loss = loss()
    proxies = isinstance(loss, ProxyLoss) or isinstance(loss, CombinedLoss) and any(isinstance(o, ProxyLoss) for o in loss.losses)
    learn = make_learner(loss)
    said = lambda: [str(o.message) for o in recwarn if 'has nothing to compare' in str(o.message)]
    def run(**kwargs):
        learn.dls.loaders[0] = learn.dls.train.new(**kwargs)
        recwarn.clear()
        with learn.added_cbs(Callback(after_batch=_stop)): learn.fit(1, 0.)
        return said()
    assert run(bs=16, per_class=4)==[]
    assert len(one := run(bs=16, per_class=1))==1-proxies
    assert len(all_ := run(bs=4, per_class=4))==1-proxies
    if not proxies:
        assert f'The first batch, of 16, has no two images of one class, so that {type(loss).__name__} has nothing to compare' in one[0]
        assert '`per_class=4`' in one[0]
        assert 'of 4, has images of one class only' in all_[0] and 'make `bs` a larger' in all_[0]

def _stop(self): raise CancelFitException

def test_one_class_to_validate_on_is_said(make_learner, few):
    learn,label = make_learner(),dict(zip(few.items(), few.df.label))
    vals = few.items('val')
    learn.dls.loaders[1] = learn.dls.test_dl([o for o in vals if label[o]==label[vals[0]]], with_labels=True)
    with learn.added_cbs(Callback(after_batch=_stop)):
        with pytest.warns(UserWarning, match='All validation images are of one class, so that recall is 1'): learn.fit(1, 0.)

def test_a_foreign_loss_and_pairs(make_learner, recwarn):
    from pytorch_metric_learning.losses import MultiSimilarityLoss as Theirs, ProxyAnchorLoss as TheirProxies
    for loss,n in ((Theirs(), 1), (TheirProxies(20, 16), 0), (lambda embs, labels: embs.pow(2).mean(), 0)):
        learn = make_learner(loss)
        recwarn.clear()
        learn.check_pairs(torch.arange(8))
        assert sum('nothing to compare' in str(o.message) for o in recwarn)==n

def test_a_loss_of_ones_own_and_pairs(make_learner, recwarn):
    "It compares the images of a batch, unless it has weights for each class or says that it does not; it trains"
    class Own(MetricLoss):
        def compute(self, embs, labels): return reduce_values(sqdist(embs).sum(1).to(embs.dtype), self.reduction)
    class Centres(Own): seen_only = True
    class Any(Own): compares = False
    for loss,n in ((Own(), 1), (Centres(), 0), (Any(), 0), (CombinedLoss([Own(), Any()]), 0), (CombinedLoss([Own(), TripletLoss()]), 1)):
        learn = make_learner(loss)
        recwarn.clear()
        learn.check_pairs(torch.arange(8))
        assert sum('nothing to compare' in str(o.message) for o in recwarn)==n
    learn = make_learner(Own())
    learn.fit(1, 1e-3)
    assert 0<learn.recorder.losses[-1]<learn.recorder.losses[0]

def test_plain_table(make_learner, capsys):
    "Its head is printed once in a fit, and not at all by what trains nothing"
    from dmlfast.train.progress import PlainTable
    learn = make_learner(cbs=PlainTable)
    learn.logger = print
    learn.tta(n=1)
    learn.get_preds(); learn.validate(); learn.evaluate()
    assert capsys.readouterr().out==''
    learn.fit(2, 1e-3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines)==3 and lines[0].split()[:3]==['epoch','train_loss','valid_loss'] and [o.split()[0] for o in lines[1:]]==['0','1']
    assert learn.logger is print

def test_validation_batches_are_mixed(make_learner):
    "A batch to measure the loss on has several classes, so that it is not 0 for want of negatives"
    learn = make_learner(bs=16)
    assert all(len(y.unique())>1 for _,y in learn.dls.valid)
    learn.fit(1, 1e-4)
    assert learn.recorder.values[0][1]>0

def test_predict(make_learner):
    learn = make_learner()
    fn = learn.dls.valid.items[2]
    with learn.no_bar(): embs,_ = learn.embed()
    for item in (fn, str(fn)): assert torch.allclose(learn.predict(item)[0], embs[2], atol=1e-5)
    import PIL.Image
    for item in (PIL.Image.open(fn), PILImage.create(fn), np.array(PILImage.create(fn))):
        assert torch.allclose(learn.predict(item)[0], embs[2], atol=1e-5)
    emb,near = learn.predict(fn, k=3, gallery='val')
    assert near[0].item==str(fn) and near[0].label==fn_label(learn, fn) and len(near)==3
    assert [o.score for o in near]==pytest.approx((embs@emb).sort(descending=True)[0][:3].tolist(), abs=1e-5)
    assert {o.item for o in learn.predict(fn, k=10**6)[1]}=={str(o) for o in learn.dls.train.items}

def fn_label(learn, fn): return learn.dls.vocab[int(learn.dls.valid_ds.tls[1][learn.dls.valid.items.index(fn)])]

@pytest.mark.parametrize('kind', [list, np.array, pd.Series])
def test_items_of_any_kind(few, kind, tmp_path):
    "fastai keeps what it was given"
    paths = [str(o) for o in few.items('train', 'val')]
    items = pd.Series(paths, index=range(100, 100+len(paths))) if kind is pd.Series else kind(paths)
    block = DataBlock(blocks=(ImageBlock, ClassBlock), get_y=lambda o: Path(o).parent.name,
        splitter=ClassSplitter(lambda o: Path(o).parent.name))
    dls = block.dataloaders(items, bs=8, num_workers=0)
    assert isinstance(items_of(dls.valid), list) and set(items_of(dls.valid))<set(paths)
    learn = metric_learner(dls, 'test_resnet', emb_sz=4, pretrained=False, path=tmp_path)
    hits = learn.predict(paths[0], k=3)[1]
    assert all(Path(o.item).parent.name==o.label for o in hits)

def test_predict_sees_new_weights(make_learner):
    learn = make_learner()
    fn = learn.dls.valid.items[2]
    old = learn.predict(fn)[1]
    assert learn.predict(fn)[1]==old
    learn.fit(1, 1e-2)
    emb,near = learn.predict(fn)
    train,_ = learn.embed(learn.dls.test_dl(learn.dls.train.items))
    assert near!=old and near[0].score==pytest.approx((train@emb).max().item(), abs=1e-5)

def test_wrong_arguments_are_named(few):
    dls = few.dataloaders(bs=8, per_class=4, num_workers=0)
    with pytest.raises(ValueError, match="no timm model 'resnet_10t'; the nearest is 'resnet10t'"):
        metric_learner(dls, 'resnet_10t', pretrained=False)
    with pytest.raises(ValueError, match="no timm model 'resnet5O'; the nearest is 'resnet50'"):
        metric_learner(dls, 'resnet5O', pretrained=False)
    with pytest.raises(ValueError, match="'transfer' is a recipe, and no timm model: pass `recipe='transfer'`"):
        metric_learner(dls, 'transfer')
    for wrong,right in dict(pooling='pool', loss='loss_func', embsz='emb_sz', pretrain='pretrained').items():
        with pytest.raises(TypeError, match=f"no argument of `metric_learner` '{wrong}'; the nearest is '{right}'"):
            metric_learner(dls, 'test_resnet', **{wrong:1})
    with pytest.raises(TypeError, match="no argument of `metric_learner` 'xyzzy'; there are 'dls', 'arch', 'loss_func', "):
        metric_learner(dls, 'test_resnet', xyzzy=1)
    for wrong,say in dict(miner='`TripletLoss(miner=miner)`', mining_func='loss(embs, labels, miner(embs, labels))',
        sampler='`ds.dataloaders(', epochs='`learn.fit_transfer(', optimizer='`opt_func=`', embedding_size='`emb_sz=`',
        num_classes='from the data loaders', trunk='`arch=`', margin='`TripletLoss(margin=.2)`').items():
        with pytest.raises(TypeError, match=f"has no argument '{wrong}': .*{re.escape(say)}"):
            metric_learner(dls, 'test_resnet', **{wrong:1})
    for wrong,right in dict(batch_size='bs', m='per_class', min_scal='min_scale').items():
        with pytest.raises(TypeError, match=f"no argument of `dataloaders` '{wrong}'; the nearest is '{right}'"):
            few.dataloaders(**{wrong:4})
    with pytest.raises(ValueError, match="1 or more; got 0"): metric_learner(dls, 'test_resnet', emb_sz=0, pretrained=False)
    with pytest.raises(ValueError, match="`arch` is the name of a timm model"): metric_learner(dls, 18, pretrained=False)
    with pytest.raises(ValueError, match=r"such as DRTripletLoss\(\), and not its class"):
        metric_learner(dls, 'test_resnet', DRTripletLoss, pretrained=False)
    with pytest.raises(ValueError, match="got 'triplet'"): metric_learner(dls, 'test_resnet', 'triplet', pretrained=False)
    with pytest.raises(ValueError, match=r'takes data loaders, such as `ds.dataloaders\(\)`; got a MetricDataset'):
        metric_learner(few, 'test_resnet')
    learn = metric_learner(dls, 'test_resnet', TripletLoss(miner=SemiHardMiner), pretrained=False)
    with pytest.raises(ValueError, match=r"a miner is a callable such as SemiHardMiner\(\)"):
        learn.loss_func(torch.randn(4,8), torch.tensor([0,0,1,1]))
    with pytest.raises(ValueError, match="Items come from a loader"): learn.evaluate(few)
    with pytest.raises(ValueError, match="no file of weights"): metric_learner(dls, 'test_resnet', weights='nowhere.safetensors')

# models by name, and what of them is frozen

def test_models_by_name(make_learner):
    learn = make_learner(pool='gem', head='mlp', init='orthogonal', freeze_bn='affine', frozen_stages=2, emb_sz=8, normalize_embs=False)
    m = learn.model
    assert isinstance(m.pool, GeM) and m.head[2].out_features==m.emb_sz==8 and not m.normalize and (m.head[0].bias==0).all()
    p,frozen = m.pool.p.item(),[o.detach().clone() for o in m.frozen_params()]
    stats = [o.running_mean.clone() for o in m.body.modules() if isinstance(o, nn.BatchNorm2d)]
    learn.fine_tune(1, 1e-2)
    assert m.pool.p.item()!=p and len(frozen)>15
    assert all(torch.equal(a, b.detach()) and not b.requires_grad for a,b in zip(frozen, m.frozen_params()))
    assert all(torch.equal(a, o.running_mean) for a,o in zip(stats, [o for o in m.body.modules() if isinstance(o, nn.BatchNorm2d)]))
    assert any(p.requires_grad for p in m.body.layer3.parameters())

@pytest.mark.parametrize('opt', [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_a_frozen_body(make_learner, opt):
    "All stages: a group without parameters is no trouble, also to what freezes and schedules groups"
    learn = make_learner(frozen_stages=5, opt_func=opt)
    body = [p.detach().clone() for p in learn.model.body.parameters()]
    learn.fit(1, slice(1e-3, 1e-2))
    learn.freeze()
    learn.unfreeze()
    learn.fit_one_cycle(1, 1e-2)
    assert all(torch.equal(a, b.detach()) for a,b in zip(body, learn.model.body.parameters()))

def test_rates_by_stage(make_learner):
    "The ratio of the rates of one stage and the next is constant; a loss's own multiple is of the head's"
    learn = make_learner(Centres(), splitter=stage_splitter, frozen_stages=1, opt_func=partial(SGD, mom=0.), cbs=StepRatios())
    learn.fit(1, slice(1e-4, 1e-2))
    assert np.allclose([h['lr'] for h in learn.opt.hypers], [1e-4*100**(i/4) for i in range(5)])
    assert np.allclose(learn.step_ratios.ratios, 100, rtol=2e-2)
    assert [len(o) for o in learn.opt.param_lists]==[6,9,12,9,3]

def test_constant_boundaries_stay(make_learner):
    "A margin loss's boundaries that are not weights are not trained after `unfreeze` either"
    learn = make_learner(MarginLoss(learn_beta=False))
    learn.fine_tune(1, 1e-2)
    assert (learn.loss_func.betas==1.2).all()

def test_a_module_is_as_it_is(make_learner):
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    with pytest.raises(ValueError, match="'pool', 'freeze_bn': such arguments are for models by name, and this Sequential"):
        make_learner(arch=net, pool='gem', freeze_bn=True)
    learn = make_learner(arch=net, emb_sz=4, recipe='dr_ms')
    assert learn.model.model is net and learn.wd==5e-4
    learn.fit(1, 1e-3)
    class Own(nn.Sequential): emb_sz = 4
    assert make_learner(ProxyNCALoss(), arch=Own(*net), emb_sz=None).loss_func.emb_sz==4 # what it knows of itself is known
    assert len(net)==3 and len(learn.embed(bar=False)[0][0])==4 # the loss is not one more layer
    for kwargs in (dict(weights='w.pth'), dict(model_kwargs=dict(a=1))):
        with pytest.raises(ValueError, match=f'{next(iter(kwargs))!r}: such arguments are for models by name'):
            make_learner(arch=net, **kwargs)
    embedder = Embedder('test_resnet', 8, pretrained=False)
    assert make_learner(arch=embedder, emb_sz=8).model is embedder
    with pytest.raises(ValueError, match="'emb_sz': such arguments"): make_learner(arch=embedder, emb_sz=4)

def test_a_function_of_fastai_names_its_model(make_learner):
    def test_resnet(): pass
    assert make_learner(arch=test_resnet).model.arch=='test_resnet'

def test_other_statistics_want_other_loaders(few):
    dls = few.dataloaders(bs=32, per_class=4, num_workers=0)
    for _ in range(2): metric_learner(dls, 'test_resnet', pretrained=False)
    assert len(dls.after_batch.fs.filter(risinstance(Normalize)))==1
    other = metric_learner(dls, 'resnet10t', pretrained=False).model # any statistics will do for what is trained from the beginning
    with pytest.raises(ValueError, match='make data loaders of its own'): metric_learner(dls, other)
    own = few.dataloaders(bs=32, per_class=4, num_workers=0, batch_tfms=Normalize.from_stats(*imagenet_stats))
    for arch in ('test_resnet','resnet10t'): metric_learner(own, arch, pretrained=False) # what a user chose is left alone

def test_a_loss_in_two_learners_is_said(make_learner, recwarn):
    loss,plain = ProxyNCALoss(),TripletLoss()
    for o in (plain,plain,loss): make_learner(o)
    assert not [o for o in recwarn if 'another learner' in str(o.message)]
    with pytest.warns(UserWarning, match='This ProxyNCALoss was given to another learner'): make_learner(loss)
    from pytorch_metric_learning.losses import ArcFaceLoss
    theirs = ArcFaceLoss(24, 16)
    with pytest.raises(ValueError, match='no timm model'): make_learner(theirs, arch='resnt18x')
    recwarn.clear()
    first = make_learner([theirs, TripletLoss()])
    assert not [o for o in recwarn if 'another learner' in str(o.message)]
    with pytest.warns(UserWarning, match='This ArcFaceLoss was given to another learner'): make_learner(theirs)

def test_validation_on_training_classes_is_said(few):
    block = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=lambda o: few.items('train'), get_y=parent_label,
        splitter=RandomSplitter(seed=0))
    with pytest.warns(UserWarning, match='do not say which classes are for training only'):
        metric_learner(block.dataloaders('.', bs=32, num_workers=0), 'test_resnet', pretrained=False)

def test_names_of_metrics_in_two_places(make_learner):
    with pytest.raises(ValueError, match='Names of metrics are given twice.*: mrr belong'):
        make_learner(metrics=['mrr'], cbs=RetrievalMetrics())

def test_validation_of_training_items_sees_each_once(make_learner):
    learn = make_learner()
    before = learn.dls.train.epoch
    assert np.allclose(learn.validate(0)[1], learn.evaluate(learn.dls.train, 'recall@1')['recall@1']) and learn.dls.train.epoch==before
    assert learn.validate(dl=learn.dls.train)==learn.validate(0) and learn.dls.train.epoch==before

def test_validate_is_no_epoch_to_keep(make_learner, tmp_path):
    learn = make_learner(cbs=SaveModelCallback('recall@1', fname='best'))
    learn.fit(1, 1e-3)
    stored = (tmp_path/'models'/'best.pth').read_bytes()
    learn.save_model.best = -1
    learn.validate()
    assert (tmp_path/'models'/'best.pth').read_bytes()==stored and learn.save_model.best==-1

def test_what_is_no_epoch_leaves_logs_and_counts(make_learner, tmp_path):
    "The file of the fits, the rows of the recorder, the number of epochs on an embedder's card; and a learner with a log is exported"
    learn = make_learner(cbs=CSVLogger(tmp_path/'log.csv'))
    learn.lr_find(num_it=8, show_plot=False)
    assert not (tmp_path/'log.csv').exists() and 'epochs' not in learn.about_training()
    learn.fit(2, 1e-3)
    was,rows,losses = (tmp_path/'log.csv').read_text(),list(learn.recorder.values),list(learn.recorder.losses)
    learn.validate()
    assert learn.recorder.values==rows and learn.recorder.losses==losses and len(rows)==2
    learn.lr_find(num_it=8, show_plot=False)
    assert (tmp_path/'log.csv').read_text()==was and was.count('\n')==3 and learn.about_training()['epochs']==2
    learn.export(tmp_path/'x.pkl')
    assert any(isinstance(o, CSVLogger) for o in learn.cbs)
    learn.fit(1, 1e-3)
    assert learn.about_training()['epochs']==1 and load_learner(tmp_path/'x.pkl').about_training()['epochs']==2

@pytest.mark.parametrize('tracker', [SaveModelCallback,EarlyStoppingCallback,ReduceLROnPlateau])
def test_predictions_are_no_epoch_to_keep(make_learner, tracker):
    learn = make_learner(cbs=tracker('map@r'))
    learn.fit(1)
    embs = learn.embed(bar=False)[0]
    for _ in range(2):
        assert torch.allclose(learn.get_preds()[0].as_subclass(torch.Tensor), embs, atol=1e-5) and learn.tta()[0].shape==embs.shape
    assert any(isinstance(o, tracker) for o in learn.cbs)

def test_predictions_that_fail_at_once_leave_the_learner_usable(make_learner):
    "fastai holds its lock, and the callbacks, where an error comes before the first batch"
    class Bad(Callback):
        def before_fit(self): raise KeyError('bad')
    learn = make_learner()
    cbs,logger = list(learn.cbs),learn.logger
    with pytest.raises(KeyError): learn.get_preds(cbs=Bad())
    assert not learn.lock.locked() and list(learn.cbs)==cbs and learn.logger is logger
    assert len(learn.get_preds()[0])==len(learn.dls.valid_ds)

def test_training_images_have_no_retrieval_scores(make_learner):
    learn = make_learner(metrics=['recall@1', lambda embs,y: embs.std()])
    learn.recorder.train_metrics = True
    learn.fit(2, 1e-6)
    names = learn.recorder.metric_names[1:-1]
    for row in learn.recorder.values:
        at = dict(zip(names, row))
        assert np.isnan(at['train_recall@1']) and at['valid_recall@1']==pytest.approx(learn.evaluate()['recall@1'], abs=.1) and len(row)==6

def test_a_loss_of_other_classes_is_said(make_learner, few):
    "Of as many or fewer, whose numbers are those of others"
    learn = make_learner(ProxyNCALoss())
    learn.fit(1)
    df = few.df.assign(label=few.df.label.where(few.df.split!='train', few.df.label+'x'))
    learn.dls = MetricDataset(df, few.path, 'few', size=None, flip=False).dataloaders(bs=32, per_class=4, num_workers=0)
    n = few.df.label[few.df.split=='train'].nunique()
    with pytest.warns(UserWarning, match=rf"for {n} classes, .* have {n}. They differ from number 0 on, which was '(.*)' and is '\1x'"):
        learn.fit(1)
    learn.loss_func = ProxyNCALoss()
    learn.fit(1) # and no warning

def test_the_width_of_a_module_is_measured_where_a_loss_needs_it(few):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 24))
    learn = metric_learner(few.dataloaders(bs=32, per_class=4, num_workers=0), net, ArcFaceLoss())
    assert learn.loss_func.proxies.shape[1]==24

def test_nothing_to_validate_on_is_said(few):
    learn = metric_learner(few.dataloaders(valid=None, bs=32, per_class=4, num_workers=0), 'test_resnet', pretrained=False)
    with pytest.raises(ValueError, match='There are no items to validate on'): learn.validate()

def test_scores_that_are_not_of_every_epoch(make_learner):
    learn = make_learner(cbs=RetrievalMetrics(['recall@1'], every=2))
    learn.fit(4, 1e-3)
    assert learn.validate()[1]==learn.recorder.values[-1][-1]
    with pytest.raises(ValueError, match="patience of 1, and 'recall@1' is new only every 2 epochs"):
        learn.fit(2, 1e-3, cbs=EarlyStoppingCallback('recall@1', patience=1))
    learn.fit(2, 1e-3, cbs=[EarlyStoppingCallback('recall@1', patience=2), SaveModelCallback('recall@1')])

def test_nothing_to_retrieve(few, tmp_path):
    "Validation classes of one image each leave no score to monitor: refused before the fit, and without a tracker the columns are nan"
    lone = few.df[few.df.split=='val'].drop_duplicates('label')
    with pytest.warns(UserWarning, match='4 of 38 classes of images have one image only'):
        ds = MetricDataset(pd.concat([few.df[few.df.split!='val'],lone]), few.path, size=None, flip=False)
    dls = ds.dataloaders(bs=32, per_class=4, num_workers=0)
    learn = metric_learner(dls, 'test_resnet', pretrained=False, path=tmp_path)
    for cb in (SaveModelCallback('recall@1'),EarlyStoppingCallback('map@r')):
        with pytest.raises(ValueError, match=f"each of the {len(lone)} validation items is the only one of its class"): learn.fit(1, cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert np.isnan(learn.recorder.values[-1][2])

def test_nothing_to_monitor(make_learner, few, tmp_path):
    dls = few.dataloaders(bs=32, per_class=4, num_workers=0, valid=None)
    learn = metric_learner(dls, 'test_resnet', pretrained=False, path=tmp_path)
    with pytest.raises(ValueError, match="monitors 'recall@1', and there are no validation items"):
        learn.fit(1, cbs=SaveModelCallback('recall@1'))
    learn.fit(1, cbs=SaveModelCallback(every_epoch=True))
    assert (tmp_path/'models'/'model_0.pth').exists()
    with pytest.raises(ValueError, match="monitors 'recall@l', and the columns are"):
        learn.fit(1, cbs=SaveModelCallback('recall@l', every_epoch=True))

class Spoil(Callback):
    "Make a weight of the head not finite"
    run_valid = False
    def __init__(self, at): self.at = at
    def after_step(self):
        if self.train_iter==self.at: next(self.model.head.parameters()).data.fill_(math.nan)

def test_a_rate_finder_may_diverge(make_learner):
    "The weights are as they were before it"
    learn = make_learner(cbs=Spoil(30))
    old = {k:v.clone() for k,v in learn.model.state_dict().items()}
    assert 0<learn.lr_find(num_it=40, stop_div=False, show_plot=False, end_lr=1e-2).valley<1e-2
    assert len(learn.recorder.losses)==30+1 and all((v==old[k]).all() for k,v in learn.model.state_dict().items())
    learn.remove_cb(Spoil)
    learn.add_cb(Spoil(2))
    with pytest.raises(ValueError, match='ended after 3 of 40 steps, too soon'): learn.lr_find(num_it=40, stop_div=False, show_plot=False)
    learn.remove_cb(Spoil)
    learn.lr_find(1e-6, 1e-3, 20, show_plot=False, stop_div=False) # as fastai's, by position
    assert np.isclose(learn.recorder.lrs[0], 1e-6) and len(learn.recorder.lrs)==20

def test_what_fails_in_a_rate_finder(make_learner, tmp_path):
    "An error of the training stays what it is, and switches nothing off for the next fit"
    learn = make_learner(cbs=[TrainingDoctor(every=1, say=False), Checkpoint(tmp_path/'run')])
    class Fail(Callback):
        def __init__(self, error): self.error = error
        def before_batch(self): raise self.error
    for error in (IndexError('Target 3 is out of bounds.'), KeyboardInterrupt()):
        learn.add_cb(Fail(error))
        with pytest.raises(type(error)): learn.lr_find(num_it=20, show_plot=False)
        learn.remove_cb(Fail)
    learn.fit(1, 1e-3)
    assert learn.training_doctor.steps and (tmp_path/'run'/'checkpoint.pt').exists()

def test_a_run_that_diverged_leaves_nothing_to_the_next(make_learner, monkeypatch):
    "No columns, and mixed precision switched off: else its cache of weights would go stale in the next run"
    from fastai.callback import fp16
    monkeypatch.setattr(fp16, 'autocast', lambda device, dtype: torch.autocast('cpu', dtype=torch.bfloat16))
    def go():
        learn = make_learner(cbs=fp16.MixedPrecision('bf16'))
        learn.fit(2, 1e-2)
        return learn.recorder.values
    alone = go()
    learn = make_learner(cbs=fp16.MixedPrecision('bf16'))
    with pytest.raises(Diverged): learn.fit(1, 1e-2, cbs=[Spoil(1), SelfSupervisedRanking(n=2, m=4)])
    assert not torch.is_autocast_enabled('cpu') and not learn.metrics
    assert go()==alone

def test_multiples_of_copies_and_of_an_optimiser_that_is_used_again(make_learner):
    from copy import deepcopy
    p = nn.Parameter(torch.zeros(1))
    opt = OptimWrapper([p], torch.optim.SGD, lr=.1)
    for _ in range(2): multiply_lr(opt, {p:100})
    p.grad = torch.ones(1)
    opt.step()
    assert np.isclose(p.item(), -.1*100)
    q = nn.Parameter(torch.zeros(1))
    other = deepcopy(multiply_lr(SGD([q], lr=.1), {q:100}))
    q = other.param_lists[0][0]
    q.grad = torch.ones(1)
    other.step()
    assert np.isclose(q.item(), -.1*100)

def test_a_table_as_items(few, tmp_path):
    "What is found is called by its path, also where the items are rows"
    df = few.df.assign(path=[str(few.path/o) for o in few.df.path])
    block = DataBlock(blocks=(ImageBlock, ClassBlock), get_x=ColReader('path'), get_y=ColReader('label'), splitter=ClassSplitter('label'))
    learn = metric_learner(block.dataloaders(df, bs=32, dl_type=BalancedDL, num_workers=0), 'test_resnet', pretrained=False, path=tmp_path)
    hits = learn.predict(df.iloc[0], k=2)[1]
    assert {Path(o.item).name for o in hits} <= {Path(o).name for o in df.path}
    assert [o.label for o in hits]==[Path(o.item).parent.name for o in hits]
    assert set(learn.export_embedder(tmp_path/'e', gallery=learn.dls.valid).items)=={str(Path(o).relative_to(few.path))
        for o in learn.dls.valid_ds.items.path}

def test_predict_knows_new_loaders(make_learner, few):
    learn = make_learner()
    n = len(learn.predict(few.items()[0], k=10**6)[1])
    learn.dls = few.dataloaders(bs=32, per_class=4, num_workers=0, valid='test')
    assert len(learn.predict(few.items()[0], k=10**6)[1])==len(learn.dls.train.items)>n

# recipes: the numbers of sections 2, 3 and 4 of the mathematics

def test_recipes_have_the_numbers():
    r = recipes
    for k in r: assert r[k].data['size']==224 and r[k].data['bs']%r[k].data['per_class']==0
    for k in ('dr_triplet','triplet','dr_proxynca','proxynca','dr_ms','ms'): assert (r[k].arch,r[k].emb_sz)==('bn_inception',64)
    assert [(r[k].data['bs'],r[k].data['per_class'],r[k].learner['lr'],r[k].learner['wd']) for k in ('dr_triplet','dr_proxynca','dr_ms')]==[
        (128,16,1e-5,0), (144,12,1e-5,0), (80,5,3e-5,5e-4)]
    t,p,m,b = (r[k].loss() for k in ('dr_triplet','dr_proxynca','dr_ms','margin'))
    assert (t.margin,t.gamma,t.squared,t.reduction,t.miner)==(.27819,.49197,False,'mean',None)
    assert (p.gamma,p.squared,p.normalize_proxies,p.include_positive,p.scale)==(.3,False,False,False,1)
    assert (m.lam,m.gamma,m.alpha,m.beta,m.eps)==(.6,.28,2,50,.1)
    assert (b.margin,b.beta,b.learn_beta,b.miner.cutoff,b.miner.upper)==(.2,1.2,True,.5,None)
    for k in ('triplet','proxynca','ms'):
        a,b = r[k].loss(),r['dr_'+k].loss()
        assert a.gamma==0
        b.gamma = 0.
        assert repr(a).partition('(')[2]==repr(b).partition('(')[2] and r[k].data==r['dr_'+k].data and r[k].learner==r['dr_'+k].learner
        assert r[k].fit==r['dr_'+k].fit
    for k in ('margin','ssr_margin'):
        assert (r[k].arch,r[k].emb_sz,r[k].data,r[k].learner['wd'],
            r[k].fit['n_epoch'])==('resnet50',128,dict(bs=120,per_class=4,size=224),4e-4,15)
        assert r[k].learner['lr'].stop*r[k].loss().lr_mult==pytest.approx(5e-4) and r[k].learner['lr']==slice(1e-4,1e-3)
    assert not r['margin'].cbs and len(r['ssr_margin'].cbs)==1
    text = str(r)+r._repr_html_()
    assert all(k in text for k in r) and 'object at' not in text and '...' not in text
    with pytest.raises(ValueError, match="no recipe 'dr_tripplet'; the nearest is 'dr_triplet'"): r['dr_tripplet']

@pytest.mark.parametrize('name,opt', [('dr_ms', torch.optim.Adam), ('margin', torch.optim.AdamW)])
def test_recipes_step_as_pytorch(name, opt):
    "Their optimisers are PyTorch's, weight decay included"
    torch.manual_seed(0)
    a = nn.Parameter(torch.randn(50))
    b = nn.Parameter(a.detach().clone())
    kwargs = recipes[name].learner
    ours,theirs = kwargs['opt_func']([a], lr=.01, wd=.1),opt([b], lr=.01, weight_decay=.1)
    for i in range(20):
        g = torch.randn(50)
        a.grad,b.grad = g.clone(),g.clone()
        ours.step()
        theirs.step()
    assert torch.allclose(a, b, atol=1e-5)

def test_recipe_and_overrides(make_learner):
    learn = make_learner(recipe='dr_ms', arch='bn_inception', emb_sz=None)
    assert isinstance(learn.loss_func, TripletLoss) and learn.model.emb_sz==64 # `make_learner` gives a loss
    norm = learn.dls.after_batch.fs.filter(risinstance(Normalize))[0]
    assert np.allclose(norm.mean.flatten().cpu()*255, [128,117,104]) and np.allclose(norm.std.flatten().cpu()*255, 1)
    kwargs = dict(pretrained=False, path=learn.path)
    learn = metric_learner(learn.dls, recipe='dr_ms', **kwargs)
    assert type(learn.loss_func) is MultiSimilarityLoss and learn.model.body.pretrained_cfg['architecture']=='bn_inception'
    assert (learn.model.emb_sz,learn.model.freeze_bn,learn.lr,learn.wd)==(64,True,3e-5,5e-4)
    assert learn.loss_func is not metric_learner(learn.dls, 'test_resnet', recipe='dr_ms', **kwargs).loss_func
    learn = metric_learner(learn.dls, 'test_resnet', emb_sz=8, freeze_bn=False, recipe='margin', lr=.1, wd=.2, opt_func=SGD, head='bnneck',
        **kwargs)
    assert (learn.model.arch,learn.model.emb_sz,learn.model.freeze_bn,learn.lr,learn.wd,learn.opt_func)==('test_resnet',8,False,.1,.2,SGD)
    assert isinstance(learn.loss_func, MarginLoss) and len(learn.model.head)==2
    mine = Recipe(arch='test_resnet', emb_sz=4, fit=dict(n_epoch=1))
    learn = metric_learner(learn.dls, recipe=mine, **kwargs)
    assert learn.recipe is mine and learn.model.emb_sz==4 and type(learn.loss_func) is DRTripletLoss

def test_recipe_with_a_callback(make_learner):
    "One's own callback takes the place of the recipe's"
    ssr = make_learner(recipe='ssr_margin').self_supervised_ranking
    assert (ssr.views.n,ssr.m,ssr.gamma,ssr.p)==(4,20,.8,.8)
    learn = make_learner(recipe='ssr_margin', cbs=SelfSupervisedRanking(p=.5))
    assert learn.self_supervised_ranking.p==.5 and sum(isinstance(o, SelfSupervisedRanking) for o in learn.cbs)==1
    assert not hasattr(make_learner(recipe='margin'), 'self_supervised_ranking')

class Rates(Callback):
    "The learning rates of every step"
    def before_step(self): self.lrs = getattr(self, 'lrs', []) + [[h['lr'] for h in self.opt.hypers]]

def test_fit_recipe(make_learner):
    "Its schedules, in both groups, with the last epochs at a tenth"
    learn = make_learner(recipe='margin', cbs=Rates())
    learn.fit_recipe(3)
    lrs,n = np.array(learn.rates.lrs),len(learn.dls.train)
    assert len(lrs)==3*n
    assert np.allclose(lrs[:2*n], [1e-4,1e-3]) and np.allclose(lrs[2*n:], [1e-5,1e-4])
    learn.rates.lrs = []
    learn.fit_recipe(2, lr=1e-2, sched='exp')
    lrs = np.array(learn.rates.lrs)
    assert np.allclose(lrs, .01*.1**(np.arange(2*n)/(2*n))[:,None])
    learn.rates.lrs = []
    learn.fit_recipe(1, sched=lambda lr: SchedNo(lr*2, lr*2))
    assert np.allclose(learn.rates.lrs, [2e-4,2e-3])
    with pytest.raises(ValueError, match="Schedules are 'flat', 'exp', 'step', 'one_cycle' or a function; got 'cosine'"):
        learn.fit_recipe(1, sched='cosine')
    with pytest.raises(ValueError, match='no recipe that says for how many epochs'): make_learner().fit_recipe()

def test_patience_is_not_for_test_classes(few, make_learner):
    "A run that learns nothing ends when its patience does, unless what it measures on are the test classes, or nothing"
    learn = make_learner(recipe='dr_triplet')
    learn.fit_recipe(6, lr=0., patience=2)
    assert len(learn.recorder.values)==3 and not learn.measures_on_test()
    for valid in ('test',None):
        dls = few.dataloaders(bs=32, per_class=4, valid=valid, num_workers=0)
        learn = metric_learner(dls, 'test_resnet', pretrained=False, recipe='dr_triplet')
        assert learn.measures_on_test()==(valid=='test')
        with learn.no_bar(), learn.no_logging(): learn.fit_recipe(4, lr=0., patience=2)
        assert len(learn.recorder.values)==4

def test_recipe_is_exported(make_learner, tmp_path):
    learn = make_learner(recipe='dr_triplet')
    learn.fit_recipe(1)
    learn.export()
    other = load_learner(tmp_path/'export.pkl')
    assert other.recipe.data==recipes['dr_triplet'].data
    assert not any(m.training for m in other.model.train().body.modules() if isinstance(m, nn.BatchNorm2d))

@pytest.mark.parametrize('opt', [Adam, partial(OptimWrapper, opt=torch.optim.SGD)])
def test_what_a_splitter_leaves_out_is_trained(make_learner, opt, recwarn):
    "Proxies and the exponent of a pooling, which no group has, but not a body that is left out"
    warnings.simplefilter('always')
    def heads(m): return [list(m.head.parameters())]
    def both(m): return [list(m.body.parameters()), *heads(m)]
    for splitter in (heads, both):
        learn = make_learner(ProxyNCALoss(), splitter=splitter, pool='gem', opt_func=opt)
        before = {k:p.detach().clone() for k,p in learn.model.named_parameters()}
        recwarn.clear()
        learn.fit(1, 1e-2)
        said = [str(o.message) for o in recwarn if 'leave out' in str(o.message)]
        assert len(said)==1 and 'leave out pool.log_p, loss_func.proxies: the last group trains them too' in said[0]
        moved = {k for k,p in learn.model.named_parameters() if not torch.equal(p, before[k])}
        assert len(learn.opt.param_lists[-1])==4 and {'head.weight','loss_func.proxies'}<=moved
        assert any(k.startswith('body.') for k in moved)==(splitter is both)
    # of a foreign model the loss is what its owner cannot see
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8), nn.Linear(8, 4))
    learn = make_learner(ProxyNCALoss(), arch=net, emb_sz=4, splitter=lambda m: [list(m.model[3].parameters())], opt_func=opt)
    learn.create_opt()
    assert [len(o) for o in learn.opt.param_lists]==[3]
    recwarn.clear()
    make_learner(ProxyNCALoss(), pool='gem', frozen_stages=2, opt_func=opt, cbs=SelfSupervisedRanking(n=2, m=4)).create_opt()
    assert not [o for o in recwarn if 'leave out' in str(o.message)]

@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), FocalLossFlat(), MSELossFlat(), LabelSmoothingCrossEntropy(),
    nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), F.cross_entropy, partial(F.mse_loss, reduction='sum'),
    CombinedLoss([TripletLoss(),nn.CrossEntropyLoss()])])
def test_a_loss_of_scores_is_refused(few_dls, loss):
    with pytest.raises(ValueError, match='no loss of embeddings.*`ProxyNCALoss'):
        metric_learner(few_dls, 'test_resnet', loss, pretrained=False)

def test_callbacks_as_classes(make_learner):
    "As instances are: checked before the fit, and only what was added is taken away again"
    learn = make_learner(ProxyNCALoss(), cbs=[RetrievalMetrics,TrainingDoctor])
    assert len(learn.cbs.filter(risinstance(RetrievalMetrics)))==1
    for cb,said in ((SaveModelCallback, "monitors 'valid_loss', which ProxyNCALoss does not have"), (MixUp, 'MixUp mixes images'),
        (RetrievalMetrics, "There are two columns 'recall@1'")):
        for o in (cb, [cb]):
            with pytest.raises(ValueError, match=said): learn.fit(1, cbs=o)
    seen = []
    class Seen(Callback):
        def after_validate(self): seen.append(self)
    learn.add_cb(Seen)
    learn.fit(1, 1e-3, cbs=Seen)
    assert list(learn.recorder.metric_names).count('recall@1')==1 and len(set(map(id, seen)))==2
    assert len(learn.cbs.filter(risinstance(Seen)))==1
    learn.validate(cbs=Seen)
    assert len(learn.cbs.filter(risinstance(Seen)))==1

def test_names_of_metrics_are_checked_before_images_are_seen(make_learner, few, monkeypatch):
    for kw,said in ((dict(metrics=['recal@1']), "no metric 'recal@1'; the nearest is 'recall@1'"),
        (dict(metrics=5), 'no metric 5; there are recall'), (dict(ks=None), 'ks must be'),
        (dict(metrics=['pr_curve']), "'pr_curve' is a curve"), (dict(every=0), '`every` is a number of epochs, 1 or more; got 0'),
                    (dict(every=2.5), 'got 2.5'), (dict(ks=(0,)), 'ks must be')):
        with pytest.raises(ValueError, match=said): RetrievalMetrics(**kw)
    assert RetrievalMetrics(['recall','mrr'], ks=(1,10)).names==['recall@1','recall@10','mrr']
    assert RetrievalMetrics().names==['recall@1','recall@2','recall@4','recall@8','map@r']
    assert not {'pr_curve','recall'} & {*RetrievalMetrics('all').names}
    with pytest.raises(ValueError, match='recal@1'): make_learner(metrics='recal@1')
    drawn = MetricDataset(few.df, few.path, size=None, flip=False, random_gallery=2).dataloaders(bs=32, per_class=4, num_workers=0)
    learn = metric_learner(drawn, 'test_resnet', metrics=['recall@1','nmi'], pretrained=False)
    monkeypatch.setattr(learn.model, 'forward', lambda *x: pytest.fail('images were seen'))
    with pytest.raises(ValueError, match='nmi have no gallery, and here it is drawn'): learn.fit(1)
    for f in (learn.evaluate, learn.gain):
        with pytest.raises(ValueError, match='recal@1'): f(metrics=['recal@1'])

@pytest.mark.parametrize('block,get_y,said', [(MultiCategoryBlock, lambda o: ['x',o.parent.name], r'a TensorMultiCategory of '
    r'torch.float32, of shape \(\d+,\),'), ([ClassBlock,ClassBlock], [parent_label]*2, '2 targets'),
    (RegressionBlock, lambda o: 1.5, 'a Tensor of torch.float32'), (TransformBlock, parent_label, 'a str as their target')])
def test_a_target_is_one_class(few, block, get_y, said):
    block = DataBlock(blocks=[ImageBlock,*L(block)], n_inp=1, get_y=get_y, splitter=ClassSplitter(parent_label))
    with pytest.raises(ValueError, match=f'takes the class of each image.*{said}'):
        metric_learner(block.dataloaders(few.items(), bs=8, num_workers=0), 'test_resnet', pretrained=False)

def test_items_that_are_records(few):
    "Each is called as the file that is opened of it"
    items = [dict(file=o, label=o.parent.name) for o in few.items()]
    block = DataBlock(blocks=(ImageBlock, ClassBlock), get_x=lambda o: o['file'], get_y=lambda o: o['label'],
        splitter=ClassSplitter(lambda o: o['label']))
    learn = metric_learner(block.dataloaders(items, bs=8, num_workers=0), 'test_resnet', pretrained=False, emb_sz=4)
    with learn.no_bar():
        assert [Path(h.item) for h in learn.predict(items[0], k=2)[1]][0]==items[0]['file']
        assert [Path(o) for o in learn.embedded().items]==[o['file'] for o in learn.dls.valid.items]

def test_what_is_no_image_is_said(make_learner):
    learn = make_learner()
    file = learn.dls.train.items[0]
    with learn.no_bar():
        for o in (bytearray(file.read_bytes()), memoryview(file.read_bytes())):
            assert torch.equal(learn.predict(o, k=1)[0], learn.predict(file, k=1)[0])
        for o in (None, 3, {}):
            with pytest.raises(ValueError, match=f"An image is a path, bytes, .*; got a {type(o).__name__}"): learn.predict(o)
        with pytest.raises(ValueError, match='`predict` takes one image. For several, `learn.get_preds'): learn.predict([file])

@pytest.mark.parametrize('lr', [-1, float('nan'), float('inf'), slice(1e-4, -1.), slice(float('nan'), 1.)])
def test_a_rate_that_is_none(make_learner, lr):
    learn = make_learner()
    for f in (learn.fit, learn.fit_one_cycle, learn.fit_flat_cos, learn.fit_recipe):
        with pytest.raises(ValueError, match='A learning rate is a finite number, 0 or more'): f(1, lr)
    assert not getattr(learn.recorder, 'values', [])

# another loss

def test_another_loss_is_set_up_and_trained(make_learner, few, tmp_path, recwarn):
    learn = make_learner(ProxyNCALoss())
    learn.freeze()
    learn.fit(1, 1e-3)
    learn.loss_func = learn.loss_func
    opt,old = learn.opt,learn.loss_func
    assert opt is not None
    n = learn.dls.n_train_classes
    learn.loss_func = new = ProxyAnchorLoss()
    assert learn.loss_func is new and learn.model.loss_func is new and new.proxies.shape==(n,16) and old.proxies is not new.proxies
    before,body = new.proxies.detach().clone(),[p.detach().clone() for p in learn.model.body.parameters() if p.ndim==4]
    learn.fit(1, 1e-2)
    assert learn.opt is not opt and learn.opt.frozen_idx==1 and not torch.equal(before, new.proxies)
    assert all(torch.equal(a, b) for a,b in zip(body, [p for p in learn.model.body.parameters() if p.ndim==4]))
    learn.export('l.pkl')
    loaded = load_learner(tmp_path/'l.pkl')
    assert type(loaded.loss_func) is ProxyAnchorLoss and loaded.loss_func is loaded.model.loss_func
    learn.loss_func = NPairLoss()
    assert not learn.model.normalize and [k for k in learn.model.state_dict() if 'loss_func' in k]==[]
    learn.loss_func = old # no other learner's: it was laid down
    assert learn.model.normalize and not [o for o in recwarn if 'another learner' in str(o.message)]
    with pytest.warns(UserWarning, match='ProxyNCALoss was given to another learner'): make_learner(old)
    learn.loss_func = [TripletLoss(), ContrastiveLoss()]
    assert isinstance(learn.loss_func, CombinedLoss)
    learn.fit(1, 1e-3)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)) # which does not say of how many numbers its embeddings are
    learn = make_learner(arch=net, emb_sz=4)
    learn.loss_func = ProxyNCALoss()
    assert learn.loss_func.proxies.shape==(n,4)

class Around(nn.Module):
    "Another module, and nothing else"
    def __init__(self, loss): super().__init__(); self.loss = loss
    def forward(self, *args): return self.loss(*args)

class Similar(Around):
    "A loss of embeddings that computes with one of scores"
    def forward(self, x, y): return self.loss(x@x.T, (y[:,None]==y).float())

@pytest.mark.parametrize('loss,said', [(nn.CrossEntropyLoss(), 'CrossEntropyLoss is no loss of embeddings'),
    (Around(nn.CrossEntropyLoss()), 'CrossEntropyLoss is no loss of embeddings'),
    (Around(Around(nn.BCEWithLogitsLoss())), 'BCEWithLogitsLoss is no loss'), (TripletLoss, 'and not its class'), (3, 'got 3'),
    (lambda embs: embs.mean(), 'is called with embeddings and labels, and <lambda> is not made')])
def test_a_wrong_loss_is_refused_whenever_it_comes(make_learner, loss, said):
    learn = make_learner()
    was = learn.loss_func
    for f in (lambda: make_learner(loss), lambda: setattr(learn, 'loss_func', loss)):
        with pytest.raises(ValueError, match=said): f()
    assert learn.loss_func is was is learn.model.loss_func

def test_losses_that_compute_with_others(make_learner):
    for o in (Similar(nn.BCEWithLogitsLoss()), Around(TripletLoss())): make_learner(o).fit(1, 1e-3)

@pytest.mark.parametrize('loss', [TripletLoss(reduction='none'), lambda x, y: x.pow(2).sum(1)])
def test_a_loss_is_one_number(make_learner, loss):
    with pytest.raises(ValueError, match=r'gives a tensor of shape \(32,\), and what is trained on is one number: take its mean'):
        make_learner(loss).fit(1, 1e-3)

def test_what_is_no_callback(make_learner):
    learn = make_learner()
    for o in ('gradient_clip', print, 3, nn.Identity):
        for f in (learn.add_cb, lambda o: learn.fit(1, cbs=[o]), lambda o: learn.validate(cbs=o), lambda o: make_learner(cbs=o)):
            with pytest.raises(ValueError, match='A callback is a `Callback` of fastai'): f(o)

# rows of the table

def _columns(learn): return dict(zip(learn.recorder.metric_names, learn.recorder.log))

@pytest.mark.parametrize('train_metrics', [False,True])
def test_a_cancelled_pass_leaves_each_number_in_its_column(make_learner, tmp_path, train_metrics):
    "fastai leaves the columns of a cancelled pass out, and what stands after them would be taken for them"
    from dmlfast.study.runs import History
    from dmlfast.study.tuning import TrialScore
    got = []
    learn = make_learner()
    learn.recorder.train_metrics = train_metrics
    best = 'valid_map@r' if train_metrics else 'map@r'
    learn.fit(1, 1e-3, cbs=[ShortEpochCallback(.5, short_valid=False), TrialScore(lambda i,v: got.append(v), best),
        History(tmp_path/'h.csv'), CSVLogger(tmp_path/'log.csv'), SaveModelCallback(best)])
    right = learn.evaluate()['map@r']
    assert np.isclose(got, right).all() and len(learn.recorder.log)==len(learn.recorder.metric_names)
    for f in ('h.csv','log.csv'):
        row = pd.read_csv(tmp_path/f).iloc[-1]
        assert np.isclose(row[best], right) and np.isnan(row.train_loss) and row.valid_loss>0
    learn.fit(1, 1e-3, cbs=ShortEpochCallback(.3))
    assert all(np.isnan(v) for k,v in _columns(learn).items() if k not in ('epoch','time'))
    class Leave(Callback):
        order = 70
        def after_train(self): raise CancelEpochException
    learn.fit(1, 1e-3, cbs=Leave())
    row = _columns(learn)
    assert row['train_loss']>0 and np.isnan(row['valid_loss']) and np.isnan(row[best])

# numbers of a fit

@pytest.mark.parametrize('kw,said', [(dict(n_epoch=-1), 'whole number of epochs.*got -1'), (dict(n_epoch=1.5), 'got 1.5'),
    (dict(n_epoch='2'), "got '2'"), (dict(n_epoch=True), 'got True'), (dict(lr='1e-3'), "learning rate.*got '1e-3'"),
    (dict(lr=[1e-3,-1]), 'learning rate.*got -1'), (dict(lr=np.array([1e-3,np.nan])), 'learning rate.*got nan'),
    (dict(lr=(1e-3,None)), 'got None'), (dict(wd=-1), 'Weight decay is.*got -1'), (dict(wd=float('inf')), 'Weight decay'),
    (dict(wd=slice(1e-3,-1)), 'Weight decay')])
def test_numbers_that_a_fit_cannot_have(make_learner, kw, said):
    learn = make_learner()
    with pytest.raises(ValueError, match=said): learn.fit(**{'n_epoch':1, **kw})
    assert learn.opt is None

def test_numbers_of_any_library(make_learner):
    learn = make_learner()
    learn.fit(np.int64(1), np.float32(.25), wd=torch.tensor(.5))
    assert [h['lr'] for h in learn.opt.hypers]==[.25,.25] and [h['wd'] for h in learn.opt.hypers]==[.5,.5]
    learn.fit(1, np.array([.125,.25]), wd=[0,.5])
    assert [h['lr'] for h in learn.opt.hypers]==[.125,.25] and [h['wd'] for h in learn.opt.hypers]==[0,.5]
    learn.fit_one_cycle(1, np.float32(1e-3))
    make_learner(wd=np.float32(.1)).fit(1, slice(np.float32(1e-3)))

@pytest.mark.parametrize('name,metric', [('accuracy',accuracy), ('error_rate',[error_rate]),
    ('top_k_accuracy',partial(top_k_accuracy, k=2)),
    ('accuracy',AvgMetric(accuracy)), ('f1_score',F1Score()), ('Dice',Dice()), ('mse',mse)])
def test_metrics_of_classes_are_refused(make_learner, name, metric):
    with pytest.raises(ValueError, match=f"^{name} compares predictions with labels.*`metrics='recall@1'`"): make_learner(metrics=metric)

def test_a_metric_of_embeddings_is_measured(make_learner):
    from sklearn.metrics import silhouette_score
    def length(embs, labels): return embs.norm(dim=1).mean()
    learn = make_learner(metrics=[length, AccumMetric(silhouette_score, to_np=True, flatten=False)])
    learn.fit(1, 1e-3)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert row['length']==pytest.approx(1, abs=1e-5) and -1<=row['silhouette_score']<=1 and 'recall@1' in row

def test_a_found_rate_is_too_high_for_a_trained_body(make_learner, tmp_path):
    learn = make_learner()
    torch.save(learn.model.body.state_dict(), tmp_path/'body.pth')
    find = dict(num_it=4, stop_div=False, show_plot=False)
    learn.lr_find(**find) # nothing is said: its body begins at random
    learn = make_learner(pretrained=False, weights=tmp_path/'body.pth')
    with pytest.warns(UserWarning, match=r'ten times too high.*leave the rate out.*default here is 0.0001\.') as said:
        assert learn.lr_find(**find).valley
    assert sum('ten times too high' in str(o.message) for o in said)==1
