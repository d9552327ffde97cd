"Time and memory of our losses, forward and backward, against PyTorch Metric Learning and the literal form: writes losses.md"
import argparse, math, os, platform, subprocess, sys, time
from importlib.metadata import version
from pathlib import Path
from statistics import median
os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch
from torch.nn.functional import cosine_similarity, normalize
from pytorch_metric_learning import losses as pml, miners as pml_miners
from dmlfast.losses import *

class Literal(torch.nn.Module):
    "DR-triplet as the formula reads: one row of coordinates for each triplet"
    def forward(self, f, y):
        same = y[:,None]==y
        a,p,n = ((same&~torch.eye(len(y), device=y.device).bool())[:,:,None]&~same[:,None]).nonzero(as_tuple=True)
        u,v = f[n]-f[a],f[p]-f[a]
        h = (v.norm(dim=1)-u.norm(dim=1)+.2-.3*cosine_similarity(u, v, dim=1)).relu()
        return h.sum()/(h>0).sum()

class Dense(torch.nn.Module):
    "The same without a choice of triplets: every coordinate of every (anchor, positive, negative) of the batch"
    def forward(self, f, y):
        same = y[:,None]==y
        valid = (same&~torch.eye(len(y), device=y.device).bool())[:,:,None]&~same[:,None]
        d = f[None]-f[:,None]
        u,v = d[:,None].expand(-1, len(y), -1, -1),d[:,:,None].expand(-1, -1, len(y), -1)
        dist = (d.pow(2).sum(-1)+1e-12).sqrt()
        h = (dist[:,:,None]-dist[:,None]+.2-.3*cosine_similarity(u, v, dim=-1)).relu()*valid
        return h.sum()/(h>0).sum()

class Mined(torch.nn.Module):
    "A PML loss with its miner"
    def __init__(self, loss, miner):
        super().__init__()
        self.loss,self.miner = loss,miner
    def forward(self, f, y): return self.loss(f, y, self.miner(f, y))

PML_NCA = lambda c,d: pml.ProxyNCALoss(c, d, softmax_scale=9)
PML_T,PML_MS = lambda: pml.TripletMarginLoss(margin=.2),lambda: Mined(pml.MultiSimilarityLoss(), pml_miners.MultiSimilarityMiner())
PML_ARC = lambda c,d: pml.ArcFaceLoss(c, d, margin=math.degrees(.5), scale=16)
PML_M = lambda: Mined(pml.MarginLoss(), pml_miners.DistanceWeightedMiner())
# what, (batch, per class, dimensions), ours, theirs, the least ratio of their time to ours that is promised
CASES = [
    ('DR-triplet / PML triplet', (128,4,512), DRTripletLoss, PML_T, 2),
    ('DR-triplet / PML triplet', (256,4,512), DRTripletLoss, PML_T, 4),
    ('DR-triplet / PML triplet', (512,4,512), DRTripletLoss, PML_T, 9),
    *[('DR-triplet / PML triplet', (n,4,128), DRTripletLoss, PML_T, least) for n,least in ((64,1),(128,2),(256,4),(512,9))],
    ('plain triplet / PML triplet', (512,4,512), TripletLoss, PML_T, None),
    ('DR-triplet / one row per triplet', (128,16,64), DRTripletLoss, Literal, None),
    ('DR-triplet / dense', (128,16,64), DRTripletLoss, Dense, 300),
    *[('DR-MS / PML MS and miner', (n,4,128), DRMultiSimilarityLoss, PML_MS, 1.2) for n in (64,128,256,512)],
    ('DR-MS / PML MS and miner', (80,5,64), DRMultiSimilarityLoss, PML_MS, 1/1.2),
    ('DR-MS / PML MS and miner', (128,4,512), DRMultiSimilarityLoss, PML_MS, 1/1.2),
    ('DR-MS / PML MS and miner', (512,4,512), DRMultiSimilarityLoss, PML_MS, 1/1.2),
    ('plain ProxyNCA / PML, 100 classes', (144,12,64), lambda: ProxyNCALoss(100, 64), lambda: PML_NCA(100, 64), 1/.65),
    ('plain ProxyNCA / PML, 11,318 classes', (128,4,512), lambda: ProxyNCALoss(11318, 512), lambda: PML_NCA(11318, 512), 1/.65),
    ('DR-ProxyNCA / PML ProxyNCA, 11,318 classes', (128,4,512), lambda: DRProxyNCALoss(11318, 512),
        lambda: PML_NCA(11318, 512), 1/1.1),
    *[('DR-ProxyNCA / PML ProxyNCA, 128 classes', (n,4,128), lambda: DRProxyNCALoss(128, 128), lambda: PML_NCA(128, 128), None)
        for n in (64,128,256,512)],
    *[('ArcFace / PML, 128 classes', (n,4,128), lambda: ArcFaceLoss(128, 128), lambda: PML_ARC(128, 128), 1) for n in (64,128,256,512)],
    ('NormFace / PML, 11,318 classes', (128,4,512), lambda: NormFaceLoss(11318, 512),
        lambda: pml.NormalizedSoftmaxLoss(11318, 512, temperature=1/16), 1/.9),
    ('CosFace / PML, 11,318 classes', (128,4,512), lambda: CosFaceLoss(11318, 512), lambda: pml.CosFaceLoss(11318, 512, scale=16), 1/.9),
    ('ArcFace / PML, 11,318 classes', (128,4,512), lambda: ArcFaceLoss(11318, 512), lambda: PML_ARC(11318, 512), 1/.9),
    ('DR-ArcFace / PML ArcFace, 11,318 classes', (128,4,512), lambda: ArcFaceLoss(11318, 512, gamma=.3), lambda: PML_ARC(11318, 512), None),
    ('sub-centre ArcFace / PML, 3×11,318', (128,4,512), lambda: SubCenterArcFaceLoss(11318, 512), lambda: pml.SubCenterArcFaceLoss(
        num_classes=11318, embedding_size=512, margin=math.degrees(.5), scale=16), 1/.9),
    ('SoftTriple without τ / PML, 10×11,318', (128,4,512), lambda: SoftTripleLoss(11318, 512, tau=0), lambda: pml.SoftTripleLoss(11318, 512), 1),
    ('SoftTriple / PML without τ, 10×11,318', (128,4,512), lambda: SoftTripleLoss(11318, 512), lambda: pml.SoftTripleLoss(11318, 512), None),
    ('margin / PML, distance-weighted', (128,4,512), MarginLoss, PML_M, 5),
    ('margin / PML, distance-weighted', (512,4,512), MarginLoss, PML_M, 5),
    *[('contrastive / PML', (n,4,128), ContrastiveLoss, pml.ContrastiveLoss, 1.2) for n in (64,128,256,512)],
    *[('DR-contrastive / PML contrastive', (n,4,128), lambda: ContrastiveLoss(gamma=.3), pml.ContrastiveLoss, None)
        for n in (64,128,256,512)],
    ('contrastive / PML', (512,4,512), ContrastiveLoss, pml.ContrastiveLoss, None),
    *[('SupCon / PML', (n,4,128), SupConLoss, pml.SupConLoss, 1) for n in (64,128,256,512)],
    ('SupCon / PML', (512,4,512), SupConLoss, pml.SupConLoss, 1),
    *[('circle / PML', (n,4,128), CircleLoss, pml.CircleLoss, 1) for n in (64,128,256,512)],
    ('circle / PML', (512,4,512), CircleLoss, pml.CircleLoss, 1),
    ('Recall@k / our plain MS', (512,4,512), RecallAtKLoss, MultiSimilarityLoss, 1/4),
    ('Proxy-Anchor / PML, 100 classes', (128,4,512), lambda: ProxyAnchorLoss(100, 512), lambda: pml.ProxyAnchorLoss(100, 512), None),
]

def batch(n, per, d, device='cpu'):
    "Unit embeddings with some structure, as in the middle of training"
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n)//per
    f = normalize(torch.randn(n//per, d, generator=g)[y]+torch.randn(n, d, generator=g), dim=1)
    return f.to(device),y.to(device)

def step(loss, f, y):
    for p in loss.parameters(): p.grad = None
    x = f.clone().requires_grad_()
    loss(x, y).backward()

def clock(loss, f, y):
    "Milliseconds of one step: of CPU time, or on a GPU of wall time"
    now = time.perf_counter if f.is_cuda else time.process_time
    if f.is_cuda: torch.cuda.synchronize()
    t = now()
    step(loss, f, y)
    if f.is_cuda: torch.cuda.synchronize()
    return 1e3*(now()-t)

def times(shape, ours, theirs, device='cpu', budget=8.):
    "Median milliseconds of both, run in turn"
    f,y = batch(*shape, device)
    pair = [o().to(device) for o in (ours,theirs)]
    for o in pair: clock(o, f, y)
    first = sum(clock(o, f, y) for o in pair)/1e3
    runs = [[clock(o, f, y) for o in pair] for _ in range(max(5, min(101, int(budget/first))))]
    return [median(o) for o in zip(*runs)]

PEAKS = {'DR-triplet':DRTripletLoss, 'Recall@k':RecallAtKLoss, 'PML triplet':PML_T, 'one row per triplet':Literal}

def status(key):
    "A line of /proc/self/status, in MiB"
    return next(int(o.split()[1])/1024 for o in Path('/proc/self/status').read_text().splitlines() if o.startswith(key))

def peak(name, shape):
    "MiB by which the peak of one step exceeds what the process held before it; a small step has been run"
    loss = PEAKS[name]()
    step(loss, *batch(8, 4, 8))
    f,y = batch(*shape)
    Path('/proc/self/clear_refs').write_text('5') # the peak starts from here
    before = status('VmRSS')
    step(loss, f, y)
    return status('VmHWM')-before

def fresh_peak(name, shape):
    args = [sys.executable, __file__, '--peak', name, *map(str, shape)]
    return float(subprocess.run(args, capture_output=True, text=True, check=True).stdout.split()[-1])

def table(device):
    rows = ['| what | batch | ours, ms | theirs, ms | theirs / ours | promised |', '|---|---|---|---|---|---|']
    for what,shape,ours,theirs,least in CASES:
        a,b = times(shape, ours, theirs, device)
        says = '' if least is None else f'≥ {least:.3g}' + ('' if b/a>=least else ' (missed)')
        rows.append(f'| {what} | {shape[0]} = {shape[0]//shape[1]}×{shape[1]}, {shape[2]}-d | {a:.2f} | {b:.2f} | {b/a:.2f} | {says} |')
        print(rows[-1], flush=True)
    return '\n'.join(rows)

def memory():
    rows = ['| what | batch | MiB |', '|---|---|---|']
    for name,shape in [('DR-triplet',(512,4,512)), ('PML triplet',(512,4,512)), ('DR-triplet',(128,16,64)),
                       ('one row per triplet',(128,16,64)), ('DR-triplet',(4096,4,512)),
                       ('Recall@k',(512,4,512)), ('Recall@k',(4096,4,512))]:
        rows.append(f'| {name} | {shape[0]} = {shape[0]//shape[1]}×{shape[1]}, {shape[2]}-d | {fresh_peak(name, shape):.0f} |')
        print(rows[-1], flush=True)
    return '\n'.join(rows)

def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--peak', nargs='+', help=argparse.SUPPRESS)
    ap.add_argument('--threads', type=int, nargs='+', default=[1,2])
    ap.add_argument('--out', default=Path(__file__).with_suffix('.md'))
    args = ap.parse_args()
    torch.set_num_threads(1)
    if args.peak: return print(peak(args.peak[0], tuple(map(int, args.peak[1:]))))
    res = [f'# Losses: time and memory\n\n`python benchmarks/losses.py`, torch {torch.__version__}, pytorch-metric-learning '
           f'{version("pytorch-metric-learning")}, {platform.machine()}, {os.cpu_count()} cores. Forward and backward, medians of '
           'alternating runs in one process. Times on the CPU are CPU times, all threads added up. What is compared is in the script.']
    for n in args.threads:
        torch.set_num_threads(n)
        res += [f'## {n} thread{"s"*(n>1)}', table('cpu')]
    if torch.cuda.is_available(): res += [f'## {torch.cuda.get_device_name()}, wall time', table('cuda')]
    res += ['## Peak memory\n\nWhat one step adds to the memory of a fresh process at its peak (Linux).', memory()]
    Path(args.out).write_text('\n\n'.join(res)+'\n')

if __name__=='__main__': main()
