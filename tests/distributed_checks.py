"What `test_distributed.py` runs: once in two processes, which this file begins, and once in one, with batches twice as large"
import os, pytest, resource, sys, time, warnings, pandas as pd, torch
os.environ.setdefault('OMP_NUM_THREADS', '1')
from pathlib import Path
from fastcore.all import *
from torch import nn
from fastai.callback.all import *
from fastai.callback.core import Callback
from fastai.learner import *
from fastai.metrics import AccumMetric, skm_to_fastai
from fastai.optimizer import SGD
from fastai.data.core import TfmdDL
from fastai.learner import noop # not fastcore's
from fastai.torch_core import get_random_states, set_random_states, set_seed
from dmlfast.all import *
from dmlfast.study import plans
from dmlfast.train import distributed
from dmlfast.train.processes import *

class Body(nn.Module):
    "A network in float64, with batch norm that is frozen"
    def __init__(self, p=0.):
        super().__init__()
        self.conv,self.bn,self.drop,self.out = nn.Conv2d(3, 8, 5, stride=3),nn.BatchNorm2d(8),nn.Dropout(p),nn.Linear(8*49, 8)
        self.bn.requires_grad_(False)
    def forward(self, x):
        x = self.bn(self.conv(x.as_subclass(torch.Tensor).double())).relu().flatten(1)
        return nn.functional.normalize(self.out(self.drop(x)))

class Steps(Callback):
    "End after some steps; remember the loss of each"
    order = 70
    def __init__(self, n): self.n,self.losses = n,[]
    def after_loss(self):
        if self.training: self.losses.append(self.learn.loss.item())
    def after_batch(self):
        if self.training and self.train_iter>=self.n: raise CancelFitException

class Single(Callback):
    "What Recorder smooths is float32"
    order = 49
    def after_batch(self): self.learn.loss = self.learn.loss.float()

class SameDraws(Callback):
    "In one process: the random numbers that several would have while they compute a loss"
    order = 11
    def before_fit(self):
        now = torch.Generator()
        now.set_state(torch.get_rng_state())
        self.seed = torch.randint(2**31, (1,), generator=now).item()
    def after_pred(self):
        if self.training: self.states = get_random_states(),set_seed(self.seed+self.train_iter)
    def after_loss(self):
        if self.training: set_random_states(**self.states[0])

def quiet(learn):
    learn.remove_cbs([ProgressCallback])
    learn.logger = noop
    return learn

def plain(few, loss, n, cbs=(), steps=3, bs=16, p=0., metrics=None, resume=None, **kwargs):
    "A learner in float64 after some steps; `n` processes share a batch of 32"
    set_seed(0)
    dls = few.dataloaders(bs=bs*2//n, per_class=4, seed=3, num_workers=0)
    body,seen = Body(p),Steps(steps)
    learn = quiet(MetricLearner(dls, body, loss, emb_sz=8, opt_func=SGD, cbs=[SetEpoch(), Single(), *cbs], metrics=metrics))
    if metrics is None: learn.remove_cbs([Recorder])
    body.double()
    learn.seen = seen
    if resume: learn.resume(resume)
    with learn.distrib_ctx(**kwargs): learn.fit(3, .1, cbs=[seen, BnFreeze(), *([SameDraws()] if n==1 else [])])
    return learn

def losses():
    from pytorch_metric_learning import losses as pml
    torch.manual_seed(7) # of the classes that `sampled` draws
    return dict(triplet=TripletLoss(), dr_triplet=DRTripletLoss(), contrastive=ContrastiveLoss(),
        semihard=TripletLoss(miner=SemiHardMiner()), proxynca=ProxyNCALoss(lr_mult=1.), proxyanchor=ProxyAnchorLoss(lr_mult=1.),
        sampled=ArcFaceLoss(sample=.5, lr_mult=1.),
        theirs=pml.SupConLoss(), dr_ms=DRMultiSimilarityLoss(), margin=MarginLoss(lr_mult=1.),
        sum=CombinedLoss([TripletLoss(), ProxyNCALoss(lr_mult=1.)]))

def weights(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}

def check_weights(few, n, out):
    "The weights of each loss after three steps"
    return {k:weights(plain(few, o, n)) for k,o in losses().items()} | dict(
        large=weights(plain(few, DRTripletLoss(), n, [LargeBatch(5)])),
        accumulated=weights(plain(few, TripletLoss(), n, [GradientAccumulation(64)], 6)),
        remembered=weights(plain(few, DRMultiSimilarityLoss(), n, [BatchMemory(80, start=1)])),
        remembered_chunks=weights(plain(few, TripletLoss(), n, [LargeBatch(5), BatchMemory(80, start=1)])))

def check_controls(few, n, out):
    "What would come of it without gathering, and without the factor"
    res,rows,back = {},distributed.gather_rows,distributed._Rows.backward
    try:
        distributed.gather_rows = lambda x: x
        res['alone'] = weights(plain(few, TripletLoss(), n))
        distributed.gather_rows = rows
        distributed._Rows.backward = staticmethod(lambda ctx, g: back(ctx, g)/n)
        res['mean'] = weights(plain(few, TripletLoss(), n))
    finally: distributed.gather_rows,distributed._Rows.backward = rows,back
    return res

def check_memory(few, n, out):
    "A run with a memory, and one that is killed after its first epoch and goes on, with what they remember"
    def run(*cbs, **kwargs):
        memory = BatchMemory(80, start=2)
        return plain(few, MultiSimilarityLoss(), n, [memory, *cbs], 100, metrics=[], **kwargs),memory
    def _has(learn, memory): return dict(weights=weights(learn), embs=memory.embs, labels=memory.labels, at=memory.at, steps=memory.steps)
    whole = _has(*run())
    if n==1: return dict(whole=whole)
    try: run(Checkpoint(out/'run'), Kill(0))
    except Killed: pass
    return dict(whole=whole, again=_has(*run(resume=out/'run')))

def check_draws(few, n, out):
    "What a loss draws at random is the same in all processes, and dropout is not"
    drawn = []
    class Drawing(MultiSimilarityLoss):
        def compute(self, embs, labels):
            if self.training: drawn.append((torch.rand(1).item(), embs.detach().clone()))
            return super().compute(embs, labels)*drawn[-1][0] if self.training else super().compute(embs, labels)
    learn = plain(few, Drawing(), n, p=.5)
    own = torch.rand(1).item()
    return dict(drawn=[o[0] for o in drawn], losses=learn.seen.losses, own=own, rows=[len(o[1]) for o in drawn])

def small(few, out, loss=None, bs=24, seed=0, cbs=None, **kwargs):
    set_seed(seed)
    dls = few.dataloaders(bs=bs, per_class=4, seed=5, num_workers=0)
    path = Path(out)/f'of{own_rank()}'
    path.mkdir(parents=True, exist_ok=True)
    kwargs = {**dict(pretrained=False, freeze_bn=True), **kwargs}
    learn = metric_learner(dls, 'test_resnet', loss or TripletLoss(), emb_sz=16, path=path, cbs=cbs, **kwargs)
    return quiet(learn)

def check_columns(few, n, out):
    "Columns, and who writes"
    from fastai.callback.progress import CSVLogger
    learn = small(few, out)
    with learn.distrib_ctx():
        trackers = SaveModelCallback('recall@1', fname='best'),EarlyStoppingCallback('map@r', patience=2)
        learn.fit_one_cycle(3, 1e-2, cbs=[CSVLogger(), *trackers])
        values = [list(o) for o in learn.recorder.values]
        valid = list(learn.validate())
        embs,ys = learn.embed(bar=False)
        preds = learn.get_preds()[0]
        scores = learn.evaluate().to_dict()['metrics']
        tta = learn.tta(n=1)[0]
        learn.export_embedder(learn.path/'embedder')
        learn.export()
        learn.report(learn.path/'report')
    files = sorted(o.name for o in learn.path.rglob('*') if o.is_file())
    return dict(values=values, valid=valid, embs=embs, preds=torch.as_tensor(preds), ys=ys, tta=torch.as_tensor(tta),
        scores={k:o['mean'] for k,o in scores.items()}, weights=weights(learn), files=files,
        names=[str(o) for o in learn.recorder.metric_names], n_valid=len(learn.dls.valid), shards=[o.shard for o in learn.dls.loaders])

def with_roles(few):
    "Every third validation image is a query, and the others are what it is looked for in"
    df = few.df.copy()
    df['role'] = ''
    at = df.index[df.split=='val']
    df.loc[at,'role'] = ['query' if i%3==0 else 'gallery' for i in range(len(at))]
    return MetricDataset(df, few.path, 'few glyphs', size=None, flip=False)

def check_roles(few, n, out):
    "Columns, by the protocol of the data"
    learn = small(with_roles(few), out)
    with learn.distrib_ctx():
        learn.fit(1, 1e-2)
        return dict(row=list(learn.recorder.values[0]), valid=list(learn.validate()), recall=learn.evaluate()['recall@1'],
            weights=weights(learn))

def check_half(few, n, out):
    "Half precision"
    learn = small(few, out).to_bf16()
    with learn.distrib_ctx(): learn.fit(1, 1e-3)
    return dict(weights=weights(learn), values=[list(o) for o in learn.recorder.values])

def check_full(few, n, out):
    "No file of process 0 may be larger than 4,096 bytes, as on a full disk"
    learn,first = small(few, out),own_rank()==0
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    res = {}
    with learn.distrib_ctx(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn.fit(1, 1e-3, cbs=Checkpoint(out/'run'))
        before = (out/'run'/'checkpoint.pt').read_bytes()
        if first: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        try:
            learn.fit(1, 1e-3, cbs=Checkpoint(out/'run', overwrite=True))
            def _embedder(): learn.export_embedder(learn.path/'embedder')
            for name,f in dict(embedder=_embedder, export=learn.export, save=lambda: learn.save('model')).items():
                try: f()
                except OSError as e: res[name] = str(e)
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        learn.fit(1, 1e-3)
    return dict(res=res, said=[str(o.message) for o in said], kept=(out/'run'/'checkpoint.pt').read_bytes()==before, weights=weights(learn),
        left=sorted(o.name for o in out.rglob('*') if o.is_file()))

def own_rank(): return int(os.environ.get('RANK', 0))

def check_finding(few, n, out):
    "`lr_find` puts back what was there, in all processes; `fine_tune` agrees, running batch norm included"
    learn = small(few, out, freeze_bn=False)
    with learn.distrib_ctx():
        before = weights(learn)
        rate = learn.lr_find(num_it=20, show_plot=False).valley
        after = weights(learn)
        learn.fine_tune(1, 1e-2)
    return dict(before=before, after=after, rate=rate, steps=len(learn.recorder.losses), tuned=weights(learn))

class Killed(Exception): pass

class Kill(Callback):
    order = 100
    def __init__(self, epoch): self.at = epoch
    def after_epoch(self):
        if self.epoch==self.at: raise Killed('here')

def check_resume(few, n, out):
    "A run that is killed after its first epoch ends where one ends that is not, ranking and coin included"
    def run(*cbs, resume=None):
        learn = small(few, out, cbs=[SelfSupervisedRanking(n=2, m=4, p=.7), *cbs])
        if resume: learn.resume(resume)
        try:
            with learn.distrib_ctx(): learn.fit_one_cycle(3, 1e-2)
        except Killed: return
        return learn
    whole = run()
    run(Checkpoint(Path(out)/'run'), Kill(0))
    again = run(resume=Path(out)/'run')
    return dict(whole=weights(whole), again=weights(again), values=[list(o) for o in whole.recorder.values],
        ssr=whole.self_supervised_ranking.ssr_losses, views=whole.self_supervised_ranking.views.rng.get_state())

def check_experiment(few, n, out):
    "Trials and runs of a plan, and a trial that is given up after its first epoch"
    import optuna
    from dmlfast.study import experiments
    plan = dict(seeds=2, measures=['recall@1','map@r'], keep_models=True, search=dict(n_trials=2, n_epoch=2),
        settings=dict(batch=dict(bs=32, num_workers=0), model=dict(arch='test_resnet', pretrained=False, emb_sz=16, freeze_bn=True),
            fit=dict(n_epoch=2, lr=1e-3)), methods=dict(a=dict(loss=dict(name='ms'), space={'loss.alpha':[1.,4.]})))
    exp = experiments.Experiment(plan, out/'results.jsonl', few)
    exp.run()
    def given_up(trial):
        def _report(epoch, value): raise optuna.TrialPruned('given up')
        return _report
    was,experiments.trial_report = experiments.trial_report,given_up
    try:
        if own_rank(): exp.follow()
        else:
            exp.run_trial('a')
            exp.tell()
    finally: experiments.trial_report = was
    def odd(): plans.train_run({**plan['settings'], 'batch':dict(bs=36), 'loss':dict(name='ms')}, few, 'val')
    return dict(rows=exp.rows(), refused=refused(odd) if n>1 else None, kept=sorted(o.name for o in out.rglob('embedder.json')))

def check_head(few, n, out):
    "A head from features, its rows above the table, and `fit_head`, as all processes have them; `fit_transfer` too"
    body = out/f'body{own_rank()}.pth'
    torch.save(Embedder('test_resnet', pretrained=False).body.state_dict(), body)
    learn = small(few, out, weights=body, pretrained=True, freeze_bn=None)
    with learn.distrib_ctx():
        learn.fit_head(2, 1e-2)
        learn.fit(1, 1e-3)
        rows = {k:o['scores'] for k,o in learn.head_start.rows.items()}
        learn.fit_transfer(1, lr=1e-3, body_lr=.1, head_epochs=1)
    return dict(weights=weights(learn), rows=rows, said=learn.transfer['sentence'])

def refused(f):
    try: f()
    except ValueError as e: return str(e)

def check_refusals(few, n, out):
    from accelerate import DistributedDataParallelKwargs
    class Count(AccumMetric):
        def __init__(self): super().__init__(lambda a, b: 0, name='count')
    def other():
        learn = small(few, out)
        learn.dls.loaders[0] = learn.dls.train.new(cls=TfmdDL)
        with learn.distrib_ctx(): learn.fit(1)
    res = dict(loader=refused(other), accum=refused(lambda: plain(few, TripletLoss(), n, metrics=Count())),
        unused=refused(lambda: plain(few, TripletLoss(), n, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])),
        many=refused(lambda: plain(few, TripletLoss(), n, bs=44)))
    if n>1:
        with pytest.raises(RuntimeError, match='within `together'): distributed.gather_rows(torch.zeros(2, 3))
    def first(): raise FileExistsError('there already')
    if n>1: work_together(True)
    try: by_first(first)
    except FileExistsError as e: res['first'] = str(e)
    finally: work_together(False)
    return res

def check_killed(few, n, out):
    "Process 1 ends in the middle of a fit"
    class End(Callback):
        def after_batch(self):
            if self.train_iter==2 and own_part()[0]==1: os._exit(9)
    plain(few, TripletLoss(), n, [End()])

def check_hung(few, n, out):
    "Process 1 stays away"
    class Stay(Callback):
        def after_batch(self):
            if self.train_iter==2 and own_part()[0]==1: time.sleep(20)
    plain(few, TripletLoss(), n, [Stay()], timeout=.05)

def check_gpus(few, n, out):
    "On GPUs: running batch norm has the statistics of all"
    seen = []
    class Count(Callback):
        def before_batch(self): seen.append(sum(isinstance(o, nn.SyncBatchNorm) for o in self.model.modules()))
    learn = small(few, out, freeze_bn=False).to_fp16()
    with learn.distrib_ctx():
        learn.fit_one_cycle(2, 1e-2, cbs=Count())
        device = str(next(learn.model.parameters()).device)
    return dict(weights={k:v.cpu() for k,v in weights(learn).items()}, values=[list(o) for o in learn.recorder.values], devices=device,
        synced=max(seen), left=sum(isinstance(o, nn.SyncBatchNorm) for o in learn.model.modules()))

def main(data, out, *names):
    few = MetricDataset(pd.read_pickle(Path(data)/'few.pkl'), (Path(data)/'where').read_text(), 'few glyphs', size=None, flip=False)
    res = {}
    for o in names: res[o] = globals()[f'check_{o}'](few, int(os.environ['WORLD_SIZE']), mkdir(Path(out)/o, exist_ok=True, parents=True))
    torch.save(res, Path(out)/f"{os.environ['RANK']}.pt")

if __name__=='__main__': main(*sys.argv[1:])
