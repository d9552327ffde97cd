"""What a GPU changes, in less than eight minutes: `benchmarks/gpu.sh` runs the suite's GPU tests and this, and writes gpu.jsonl.

    python benchmarks/gpu.py            # on a GPU
    python benchmarks/gpu.py --tiny     # the same steps with small numbers on any device, to see that they run

Each part prints a row as it ends, and one that fails says so and does not stop the others. Seconds are medians between synchronisations."""
import argparse, json, platform, time, traceback, warnings
from pathlib import Path
from statistics import median
warnings.simplefilter('ignore')
import torch
from fastai.vision.all import Callback, DataLoaders, set_seed
from dmlfast.all import *
from dmlfast.data.batches import BalancedDL

def timed(f, n=5, warm=2):
    "Median seconds of `f`"
    def _once():
        sync()
        t = time.perf_counter()
        f()
        sync()
        return time.perf_counter()-t
    for _ in range(warm): _once()
    return median(_once() for _ in range(n))

def sync():
    if device=='cuda': torch.cuda.synchronize()

def peak(f):
    "MiB that `f` takes on top of what is there"
    if device!='cuda': return f() and None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    was = torch.cuda.memory_allocated()
    f()
    return round((torch.cuda.max_memory_allocated()-was)/2**20)

def loader(n, size, classes, bs):
    "Random images on the device, as a balanced loader; what is timed is no reading of images"
    g = torch.Generator().manual_seed(0)
    x,y = torch.rand(n, 3, size, size, generator=g).to(device),torch.arange(n, device=device)%classes
    class Set:
        n_inp,n_train_classes,vocab,items = 1,classes,[*map(str, range(classes))],None
        def __init__(self, n): self.n = n
        def __len__(self): return self.n
        def __getitem__(self, i): return x[i],y[i]
    def _dl(shuffle, n): return BalancedDL(Set(n), bs=bs, per_class=4, shuffle=shuffle, drop_last=shuffle, labels=y[:n].cpu().numpy(), num_workers=0, device=device)
    return DataLoaders(_dl(True, n), _dl(False, min(n, 2*classes)), device=device) # a fit wants some to validate on

class Steps(Callback):
    "Seconds of each training step, from its batch on to the next one, between synchronisations"
    order = -100
    def before_fit(self): self.secs,self.began = [],None
    def before_batch(self):
        sync()
        now = time.perf_counter()
        if self.training and self.began is not None: self.secs.append(now-self.began)
        self.began = now if self.training else None
    def before_validate(self): self.began = None
    @property
    def median(self): return median(self.secs[2:] or self.secs) # after what is made in the first ones

def bs(n): return min(n, 16) if tiny else n

def parity():
    "Losses of the first steps with half precision in the loop, beside float32"
    res = {}
    for k in ('float32','float16','bfloat16'):
        set_seed(0)
        dls = loader(bs(256), 64, 4 if tiny else 32, bs(64))
        learn = metric_learner(dls, 'resnet18' if not tiny else 'test_resnet', TripletLoss(), pretrained=False, metrics=['recall@1'])
        if k!='float32' and device=='cuda': learn = learn.to_fp16() if k=='float16' else learn.to_bf16()
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3)
        res[k] = [round(float(o), 4) for o in learn.recorder.losses[:6]]
    return res

def speed():
    "Images a second of a step: in the Learner, and in a bare loop of PyTorch"
    res = {}
    for arch in ('test_resnet',) if tiny else ('resnet50','vit_small_patch16_224'):
        size,n = (32,16) if tiny else (224,128)
        x,y = torch.randn(n, 3, size, size, device=device),torch.arange(n, device=device)%(n//4)
        model,loss = Embedder(arch, pretrained=False).to(device).train(),TripletLoss()
        opt = torch.optim.Adam(model.parameters(), 1e-4)
        def _bare():
            with torch.autocast(device, torch.bfloat16): z = model(x)
            loss(z.float(), y).backward()
            opt.step()
            opt.zero_grad()
        steps = Steps()
        learn = metric_learner(loader(n*8, size, n//4, n), arch, TripletLoss(), pretrained=False, metrics=['recall@1'], cbs=steps)
        if device=='cuda': learn.to_bf16()
        with learn.no_bar(), learn.no_logging(): learn.fit(1 if tiny else 2, 1e-4)
        res[arch] = dict(learner=round(n/steps.median), bare=round(n/timed(_bare)))
    return res

def views():
    "Self-supervised ranking with views made on the device: seconds a step of 64 images, and without ranking"
    from dmlfast.train.ssr import SelfSupervisedRanking
    res = {}
    for name,cbs in dict(with_ranking=[SelfSupervisedRanking(n=2, m=4, p=1.)], without=[]).items():
        steps,dls = Steps(),loader(64 if tiny else 512, 32 if tiny else 224, 4 if tiny else 32, bs(64))
        learn = metric_learner(dls, 'test_resnet' if tiny else 'resnet18', MarginLoss(), pretrained=False, metrics=['recall@1'], cbs=[*cbs,steps])
        with learn.no_bar(), learn.no_logging(): learn.fit(1 if tiny else 2, 1e-4)
        res[name] = round(steps.median, 4)
    return res

def losses():
    "Forward and backward of losses by the size of the batch, ours and PyTorch Metric Learning's: milliseconds / MiB"
    from pytorch_metric_learning import losses as pml, miners
    mine = miners.MultiSimilarityMiner()
    ms = pml.MultiSimilarityLoss()
    pairs = dict(triplet=(TripletLoss(), pml.TripletMarginLoss(margin=.2)), dr_triplet=(DRTripletLoss(), None),
        multi_similarity=(MultiSimilarityLoss(), lambda e,y: ms(e, y, mine(e, y))), supcon=(SupConLoss(), pml.SupConLoss()),
        proxynca=(ProxyNCALoss(1000, 128).to(device), pml.ProxyNCALoss(1000, 128).to(device)), recallk=(RecallAtKLoss(), None))
    res = {}
    for n in (16,64) if tiny else (512,2048,4096,16384):
        x = torch.nn.functional.normalize(torch.randn(n, 128, device=device), dim=1).requires_grad_()
        y = torch.arange(n, device=device)%min(n//4, 1000)
        for k,both in pairs.items():
            for who,f in zip(('ours','pml'), both):
                if f is None: continue
                def _step(): f(x, y).backward()
                try: res[f'{k} {n} {who}'] = f'{1e3*timed(_step, 3, 1):.1f} / {peak(_step)}'
                except (RuntimeError,torch.OutOfMemoryError) as e: res[f'{k} {n} {who}'] = str(e).split('\n')[0][:60]
    return res

def search():
    "1,000,000 items of 128 numbers: seconds of 10,000 queries, beside the bare product and topk"
    n,q = (2000,100) if tiny else (1_000_000,10_000)
    g,x = (torch.nn.functional.normalize(torch.randn(o, 128, device=device), dim=1) for o in (n,q))
    def _bare(): return [(o@g.T).topk(10) for o in x.split(1000)]
    ours,bare = (timed(f, 3, 1) for f in (lambda: neighbours(x, g, 10), _bare))
    return dict(ours=round(ours, 3), bare=round(bare, 3))

def large():
    "A batch of 4,096 in chunks: seconds a step and memory"
    n,size = (32,32) if tiny else (4096,96)
    steps,dls = Steps(),loader(n*3, size, n//4, n)
    learn = metric_learner(dls, 'test_resnet' if tiny else 'resnet50', RecallAtKLoss(), pretrained=False, metrics=['recall@1'], freeze_bn=True,
        cbs=[LargeBatch(chunk=bs(256)),steps])
    with learn.no_bar(), learn.no_logging(): mib = peak(lambda: learn.fit(1, 1e-4))
    return dict(seconds_a_step=round(min(steps.secs), 2), mib=mib)

def head():
    "`fit_head` on glyphs: seconds"
    learn = metric_learner(glyphs(size=24).dataloaders(bs=bs(128), per_class=8, seed=0, num_workers=0), 'test_resnet', emb_sz=64, pretrained=False, init='lda')
    t = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_head(1 if tiny else 10, 1e-3)
    return dict(seconds=round(time.perf_counter()-t, 2))

def main():
    global tiny, device
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--tiny', action='store_true')
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.jsonl'))
    p.add_argument('parts', nargs='*', default=['parity','speed','views','losses','search','large','head'])
    args = p.parse_args()
    tiny,device = args.tiny,'cuda' if torch.cuda.is_available() else 'cpu'
    if device=='cpu' and not tiny: raise SystemExit('There is no GPU here: see `--tiny`.')
    about = dict(torch=torch.__version__, device=torch.cuda.get_device_name() if device=='cuda' else platform.machine())
    failed = 0
    for o in args.parts:
        t = time.perf_counter()
        try: row = dict(part=o, result=globals()[o]())
        except Exception as e:
            row,failed = dict(part=o, error=f'{type(e).__name__}: {e}', where=traceback.format_exc()[-600:]),failed+1
        row |= dict(seconds=round(time.perf_counter()-t, 1), **about)
        print(json.dumps(row), flush=True)
        if not tiny:
            with args.out.open('a') as f: f.write(json.dumps(row)+'\n')
    raise SystemExit(min(failed, 1))

if __name__=='__main__': main()
