"What the training doctor costs: one look at a batch, against a training step of resnet50: writes doctor.md"
import argparse, os, platform, time, warnings
from pathlib import Path
from statistics import median
os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.simplefilter('ignore')
import torch
from fastai.vision.all import *
from dmlfast.all import *

now = time.process_time

def make(loss, bs, model, size, cbs=()):
    "A learner on random images in the middle of a fit, and one of its batches"
    torch.manual_seed(0)
    x,y = torch.randn(bs, 3, size, size),torch.arange(bs)//4
    loader = lambda: DataLoader(list(zip(x, y)), bs=bs, num_workers=0)
    learn = Learner(DataLoaders(loader(), loader()), model, loss, splitter=embedder_splitter, cbs=cbs, default_cbs=False)
    learn.training,learn.iter,learn.train_iter,learn.epoch,learn.n_epoch,learn.dl = True,0,0,0,1,learn.dls.train
    learn.create_opt()
    learn('before_fit')
    model.train()
    return learn,(x,y)

def clock(f, *args):
    t = now()
    f(*args)
    return now()-t

class Cheap(nn.Module):
    "Embeddings that cost nothing, with a head for the doctor to hang on"
    def __init__(self):
        super().__init__()
        self.body,self.head = nn.Linear(3, 128),nn.Linear(128, 128)
    def forward(self, x): return F.normalize(self.head(self.body(x[:,:,0,0])), dim=1)

def look(loss, bs, repeats):
    "Seconds that a look takes: steps of a network that costs nothing, with and without"
    pair = [make(loss, bs, Cheap(), 2, cbs) for cbs in ((),TrainingDoctor(every=1))]
    for l,b in pair: l.one_batch(0, b)
    return median(-clock(pair[0][0].one_batch, 0, pair[0][1])+clock(pair[1][0].one_batch, 0, pair[1][1]) for _ in range(repeats))

def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--repeats', type=int, default=3)
    ap.add_argument('--bs', type=int, default=120, help='batch that is looked at')
    ap.add_argument('--part', type=int, default=12, help='images in the step that is timed; its time is scaled to the batch')
    ap.add_argument('--out', default=Path(__file__).with_suffix('.md'))
    args = ap.parse_args()
    torch.set_num_threads(1)
    losses = dict(DRTripletLoss=DRTripletLoss(), TripletLoss=TripletLoss(), MarginLoss=MarginLoss(n_classes=100, gamma=.2), DRMultiSimilarityLoss=DRMultiSimilarityLoss(),
        DRProxyNCALoss=DRProxyNCALoss(n_classes=100, emb_sz=128))
    looks = {k:look(o, args.bs, 10*args.repeats) for k,o in losses.items()}
    learn,batch = make(DRTripletLoss(), args.part, Embedder('resnet50', 128, pretrained=False), 224)
    learn.one_batch(0, batch)
    step = median(clock(learn.one_batch, 0, batch) for _ in range(args.repeats))*args.bs/args.part
    every = 20 # in a fit that is not short
    rows = [f'| `{k}` | {1e3*o:.1f} | {100*o/step:.3f} % | {100*o/step/every:.4f} % |' for k,o in looks.items()]
    text = f'''# The training doctor: time

`python benchmarks/doctor.py`, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, one thread, load of the machine {os.getloadavg()[0]:.1f}. CPU times, medians.

A look at a batch of {args.bs} embeddings of 128 dimensions, 4 to a class, against a training step of `resnet50` on as many images of 224 pixels: {step:.1f} s (a step on {args.part}, times {args.bs//args.part}). By default one step of {every} is looked at;
promised are at most 2 %.

| loss | a look, ms | of a step | of a step, by default |
|---|---|---|---|
''' + '\n'.join(rows) + '\n'
    Path(args.out).write_text(text)
    print(text)

if __name__=='__main__': main()
