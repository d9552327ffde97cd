"What `test_distributed.py` runs: once in two processes, which this file begins, and once in one, with batches twice as large"
import os, sys, pandas as pd, torch
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

def plain(few, loss, n, cbs=(), steps=3, bs=16, p=0., metrics=None, **kwargs):
    "A learner in float64 after some steps; `n` processes share a batch of 32"
    set_seed(0)
    dls = few.dataloaders(bs=bs*2//n, per_class=4, seed=3, num_workers=0)
    body,seen = Body(p),Steps(steps)
    learn = quiet(MetricLearner(dls, body, loss, emb_sz=8, opt_func=SGD, cbs=[SetEpoch(), *cbs], metrics=metrics))
    if metrics is None: learn.remove_cbs([Recorder]) # which smooths losses in float32
    body.double()
    learn.seen = seen
    with learn.distrib_ctx(**kwargs): learn.fit(3, .1, cbs=[seen, BnFreeze(), *([SameDraws()] if n==1 else [])])
    return learn

def losses():
    return dict(triplet=TripletLoss(), dr_triplet=DRTripletLoss(), semihard=TripletLoss(miner=SemiHardMiner()),
        proxynca=ProxyNCALoss(lr_mult=1.), dr_ms=DRMultiSimilarityLoss(), margin=MarginLoss(lr_mult=1.),
        sum=CombinedLoss([TripletLoss(), ProxyNCALoss(lr_mult=1.)]))

def weights(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}

def check_weights(few, n, out):
    "The weights of each loss after three steps"
    return {k:weights(plain(few, o, n)) for k,o in losses().items()} | dict(
        large=weights(plain(few, DRTripletLoss(), n, [LargeBatch(5)])),
        accumulated=weights(plain(few, TripletLoss(), n, [GradientAccumulation(64)], 6)))

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
    path = Path(out)/f'of{os.environ.get("RANK", 0)}'
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
        learn.export_embedder(learn.path/'embedder')
        learn.export()
    files = sorted(o.name for o in learn.path.rglob('*') if o.is_file())
    return dict(values=values, valid=valid, embs=embs, preds=torch.as_tensor(preds), ys=ys,
        scores={k:o['mean'] for k,o in scores.items()}, weights=weights(learn), files=files,
        names=[str(o) for o in learn.recorder.metric_names], n_valid=len(learn.dls.valid), shards=[o.shard for o in learn.dls.loaders])

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

def check_head(few, n, out):
    "A head from features, its rows above the table, and `fit_head`, as all processes have them; `fit_transfer` too"
    body = out/f'body{os.environ.get("RANK", 0)}.pth'
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

def check_gpus(few, n, out):
    "On GPUs: running batch norm has the statistics of all"
    learn = small(few, out, freeze_bn=False).to_fp16()
    with learn.distrib_ctx():
        learn.fit_one_cycle(2, 1e-2)
        device = str(next(learn.model.parameters()).device)
    return dict(weights={k:v.cpu() for k,v in weights(learn).items()}, values=[list(o) for o in learn.recorder.values], devices=device,
        synced=sum(isinstance(o, nn.SyncBatchNorm) for o in learn.model.modules()))

def main(data, out, *names):
    few = MetricDataset(pd.read_pickle(Path(data)/'few.pkl'), (Path(data)/'where').read_text(), 'few glyphs', size=None, flip=False)
    res = {}
    for o in names: res[o] = globals()[f'check_{o}'](few, int(os.environ['WORLD_SIZE']), mkdir(Path(out)/o, exist_ok=True, parents=True))
    torch.save(res, Path(out)/f"{os.environ['RANK']}.pt")

if __name__=='__main__': main(*sys.argv[1:])
