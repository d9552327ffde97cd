"""Training a head on features that the body made once, beside training the whole network; and what a start in closed form costs.

    python benchmarks/features.py

Images a second of a whole step (reading included) and of a step of `fit_head`, alternating in one process, with `mobilenetv2_035` at 128 pixels and batches of 64;
and the seconds of the algebra of an LDA head of 10,000 images with 2,048 features, the choice of the shrinkage included. Random weights: they do not change the time."""
import os, platform, statistics, time, torch, warnings
warnings.simplefilter('ignore')
from fastai.vision.all import *
from fastai.callback.channelslast import ChannelsLast
from dmlfast.all import *
from dmlfast.models.embedder import make_head
from dmlfast.models.heads import WithinClass
from dmlfast.train.baseline import start_head

def seconds(f):
    t = time.perf_counter()
    f()
    return time.perf_counter()-t

class Pace(Callback):
    "Seconds from batch to batch of a training"
    order,run_valid = 100,False
    def before_train(self): self.at,self.seconds = None,[]
    def after_batch(self):
        now = time.perf_counter()
        if self.at: self.seconds.append(now-self.at)
        self.at = now

def steps(n=12, rounds=5):
    "Images a second of a whole step, and of one on features"
    ds = glyphs()
    some = MetricDataset(ds.df[ds.df.label.isin(sorted(set(ds.df.label))[:160])], ds.path, size=128, flip=False)
    dls = some.dataloaders(bs=64, per_class=4, seed=0, num_workers=0)
    learn = metric_learner(dls, 'mobilenetv2_035', DRTripletLoss(), pretrained=False, freeze_bn=True, cbs=[ChannelsLast(),Pace()])
    def _rate(): return 64/statistics.median(learn.pace.seconds)
    whole,head = [],[]
    with learn.no_bar(), learn.no_logging():
        for _ in range(rounds):
            learn.fit(1, 1e-4, cbs=ShortEpochCallback((n+1)/len(dls.train), short_valid=True))
            whole.append(_rate())
            learn.fit_head(2)
            head.append(_rate())
    return whole,head

def algebra(n=10_000, d=2048, classes=100):
    "Seconds of an LDA start"
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n)%classes
    X = torch.randn(classes, d, generator=g)[y]+2*torch.randn(n, d, generator=g)
    head,_ = make_head('linear', d, 128)
    all_of_it = seconds(lambda: print(start_head(head, X, y)))
    cov = [None]
    def _one(): cov[0] = WithinClass(X, y); cov[0].head(128, .5)
    return all_of_it,seconds(_one)

if __name__=='__main__':
    print(f'{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n')
    whole,head = steps()
    ratio = [b/a for a,b in zip(whole, head)]
    print(f'whole step      {statistics.median(whole):10,.0f} images/s   ({min(whole):,.0f} to {max(whole):,.0f})')
    print(f'step on features{statistics.median(head):10,.0f} images/s   ({min(head):,.0f} to {max(head):,.0f})')
    print(f'ratio           {statistics.median(ratio):10,.0f}            ({min(ratio):,.0f} to {max(ratio):,.0f})\n')
    total,one = algebra()
    print(f'LDA of 10,000 × 2,048: {one:.1f} s; with the choice among six shrinkages {total:.1f} s')
