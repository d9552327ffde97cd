"What self-supervised ranking costs: a step, the views and the loss, against what each stands for: writes ranking.md"
import argparse, math, os, platform, random, time, warnings
from pathlib import Path
from statistics import median
os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.simplefilter('ignore')
import numpy as np, torch
import torch.nn.functional as F
from PIL import ImageEnhance
from torchvision import transforms as T
from torchvision.transforms import functional as TF
from fastai.vision.all import *
from dmlfast.all import *

MEAN,STD = [.485,.456,.406],[.229,.224,.225]
now = time.process_time

def learner(arch, size, bs, ssr, **kwargs):
    "A learner on random images, in the middle of a fit, and one of its batches"
    torch.manual_seed(0)
    x,y = torch.randn(bs, 3, size, size),torch.arange(bs)//4
    loader = lambda: DataLoader(list(zip(x, y)), bs=bs, num_workers=0)
    model = Embedder(arch, 128, pretrained=False, **kwargs)
    learn = Learner(DataLoaders(loader(), loader()), model, DRTripletLoss(), splitter=embedder_splitter, cbs=ssr, default_cbs=False)
    learn.training,learn.iter,learn.epoch,learn.n_epoch,learn.dl = True,0,0,1,learn.dls.train
    learn.create_opt()
    if ssr: # the views are of normalised images, as always
        learn.self_supervised_ranking.stats = lambda: (torch.tensor(MEAN),torch.tensor(STD))
        learn('before_fit'); learn('before_epoch'); learn('before_train')
    model.train()
    return learn,(x,y)

def step(learn, batch):
    "CPU seconds of a whole training step: forward, backward, optimiser"
    t = now()
    learn.one_batch(0, batch)
    return now()-t

def step_ratio(arch, size, bs, m, n, repeats, **kwargs):
    "Cost of a step with ranking relative to one without, run in turn: seconds, their ratio, and that per share of forward and backward passes"
    pair = [learner(arch, size, bs, o, **kwargs) for o in (None, SelfSupervisedRanking(n=n, m=m, p=1.))]
    for o in pair: step(*o)
    runs = [[step(*o) for o in pair] for _ in range(repeats)]
    a,b = (median(o) for o in zip(*runs))
    ratio = median(y/x for x,y in runs)
    return a,b,ratio,ratio/(1+m*(n+1)/bs)

def literal_views(x, n=4):
    "As a loop over images and levels on PIL images would have it: to bytes, crop, perspective, jitter, to a tensor, normalise; literal in kind and strength"
    mean,std = torch.tensor(MEAN)[:,None,None],torch.tensor(STD)[:,None,None]
    res = []
    for im in x:
        size,pil = im.shape[-1],TF.to_pil_image((im*std+mean).clamp(0, 1))
        views = [im]
        for tau in (math.tanh(.2*k) for k in range(1, n+1)):
            box = T.RandomResizedCrop.get_params(pil, (1-tau,1-tau), (1.,1.))
            v = TF.resized_crop(pil, *box, [size,size])
            v = TF.perspective(v, *T.RandomPerspective.get_params(size, size, tau))
            for enhance in (ImageEnhance.Brightness,ImageEnhance.Contrast,ImageEnhance.Color): v = enhance(v).enhance(1+.5*tau*random.choice((-1,1)))
            views.append((TF.to_tensor(v)-mean)/std)
        res.append(torch.stack(views))
    return torch.stack(res)

def literal_loss(z, s=12., alpha=.05, beta=.5, lam=1.):
    "The formula, one image and one pair of levels after the other"
    total = 0.
    for zi in z:
        sims = [F.cosine_similarity(zi[0], zi[k], dim=0) for k in range(1, len(zi))]
        sort = torch.log(1+sum(torch.exp(s*(sims[k+1]-sims[k]+alpha)) for k in range(len(sims)-1)))/s
        pos = torch.log(1+sum(torch.exp(-s*(o-beta)) for o in sims))/s
        total = total+sort+lam*pos
    return total/len(z)

def clock(f):
    t = now()
    f()
    return now()-t

def alternate(ours, theirs, repeats):
    "Median seconds of both, run in turn, and the median of their ratios"
    for o in (ours,theirs): o()
    runs = [[clock(ours),clock(theirs)] for _ in range(repeats)]
    return *(median(o) for o in zip(*runs)),median(a/b for a,b in runs)

def views_ratio(m, n, size, repeats):
    x = (torch.rand(m, 3, 7, 7)).clamp(0, 1)
    x = (F.interpolate(x, size, mode='bicubic').clamp(0, 1)-torch.tensor(MEAN)[:,None,None])/torch.tensor(STD)[:,None,None]
    views,mean,std = GradedViews(n),torch.tensor(MEAN),torch.tensor(STD)
    return alternate(lambda: views(x, mean, std), lambda: literal_views(x, n), repeats)

def loss_ratio(m, n, d, repeats):
    z = torch.randn(m, n+1, d, requires_grad=True)
    loss = RankingLoss()
    assert abs(loss(z)-literal_loss(z))<1e-5
    def run(f):
        z.grad = None
        f(z).backward()
    return alternate(lambda: run(loss), lambda: run(literal_loss), repeats)

def says(value, limit): return f'{limit}' + ('' if (value<=limit if limit<2 else value>=limit) else ' (missed)')

def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--repeats', type=int, default=7, help='alternating runs of a step; views take as many, the loss thirty times as many')
    ap.add_argument('--only', nargs='+', default=['views','loss','mobilenet','resnet'])
    ap.add_argument('--out', default=Path(__file__).with_suffix('.md'))
    args = ap.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    rows,costs = [],[]
    def add(name, ours, theirs, ratio, limit, word):
        rows.append(f'| {name} | {1e3*ours:.4g} | {1e3*theirs:.4g} | {word} {ratio:.3g} | {limit} |')
        print(rows[-1], flush=True)
    if 'views' in args.only:
        a,b,r = views_ratio(20, 4, 224, args.repeats)
        add('views, M=20, N=4, 224 px / PIL loop', a, b, r, f'≤ {says(r, .7)}', 'ours / theirs')
    if 'loss' in args.only:
        a,b,r = loss_ratio(20, 4, 128, 30*args.repeats)
        add('`RankingLoss`, M=20, N=4, 128-d, forward and backward / loop', a, b, 1/r, f'≥ {says(1/r, 8)}', 'theirs / ours')
    for name,case,limit in (('mobilenet',('mobilenetv2_035',128,60,10,4),1.25), ('resnet',('resnet50',224,12,2,4),1.1)):
        if name not in args.only: continue
        arch,size,bs,m,n = case
        a,b,r,share = step_ratio(*case, args.repeats)
        costs.append(f'| `{arch}`, {size} px, B={bs}, M={m}, N={n} | {a:.2f} | {b:.2f} | {r:.3f} | {1+m*(n+1)/bs:.3f} | {share:.3f} | ≤ {says(share, limit)} |')
        print(costs[-1], flush=True)
    text = f'''# Self-supervised ranking: time

`python benchmarks/ranking.py`, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, one thread. CPU times, medians of alternating runs in one process, ratios are medians of the ratios of neighbouring runs.
Load of the machine (1 minute) {load:.1f} at the beginning and {os.getloadavg()[0]:.1f} at the end; the ratios vary less with it than the times. What is compared is in the script.

## A training step

With ranking in every step (p=1) and without: forward, backward and optimiser. The share is what its forward and backward passes alone would cost, 1 + M(N+1)/B.

| network | without, s | with, s | with / without | share | per share | promised |
|---|---|---|---|---|---|---|
''' + '\n'.join(costs) + '''

## Views and loss

| what | ours, ms | theirs, ms | ratio | promised |
|---|---|---|---|---|
''' + '\n'.join(rows) + '\n'
    Path(args.out).write_text(text)

if __name__=='__main__': main()
