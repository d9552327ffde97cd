"""What large batches cost: losses alone, a body in chunks, a memory, and gathering. Time and peak memory.

    python benchmarks/scale.py losses     # each loss alone at d=128, four images a class, forward and backward, 256 to 16,384 rows
    python benchmarks/scale.py chunks     # a step of `LargeBatch` beside one of the whole batch: 256 images of 64 pixels, a small body
    python benchmarks/scale.py memory     # 128 rows against 4,096 remembered ones, beside a plain rectangle and the square of them all
    python benchmarks/scale.py gather     # rows of two processes (gloo) one below the other, and their gradient: 256 to 16,384 rows

Each measurement of memory is a process of its own: its peak less what it had before the step. What would take more than 6 GiB is stopped,
and says so. Time is processor time of one thread, the median of a few steps, since a machine may be shared; of
gathering it is time by the clock, least and median of 30, since processes wait for each other."""
import json, os, resource, statistics, subprocess, sys, time, warnings
warnings.simplefilter('ignore')
limit,d,ns = 6,128,(256,1024,4096,16384)
names = dict(TripletLoss='TripletLoss()', DRTripletLoss='DRTripletLoss()', MultiSimilarityLoss='MultiSimilarityLoss()',
    DRMultiSimilarityLoss='DRMultiSimilarityLoss()', ContrastiveLoss='ContrastiveLoss()', SupConLoss='SupConLoss()',
    RecallAtKLoss='RecallAtKLoss()', ProxyNCALoss='ProxyNCALoss(11_318, 128)')
remembered = {k:v for k,v in names.items() if k!='ProxyNCALoss'} | {'DRTripletLoss, hardest':'DRTripletLoss(miner=BatchHardMiner())'}

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10

def batch(n, seed=0, classes=None):
    import torch
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1)
    return x,torch.randint(classes, (n,), generator=g) if classes else torch.arange(n)//4

def step(loss, x, *more):
    x = x.clone().requires_grad_()
    loss(x, *more).backward()

def timed(f, at_least=.5):
    "Median seconds of one thread, of three or more calls, or of one that is long"
    res = []
    while not res or (sum(res)<at_least and len(res)<25) or (len(res)<3 and sum(res)<10):
        t = time.process_time()
        f()
        res.append(time.process_time()-t)
    return statistics.median(res)

def one_loss(name, n):
    import torch, dmlfast.losses as l
    loss,(x,y) = eval(names[name], vars(l)),batch(int(n))
    step(loss, *batch(16))
    before = peak()
    t = time.process_time()
    step(loss, x, y)
    first,used = time.process_time()-t,peak()-before
    return dict(seconds=first if first>5 else timed(lambda: step(loss, x, y)), mib=used)

def one_chunk(chunk):
    import torch, timm
    from fastai.torch_core import set_seed
    from fastai.optimizer import SGD
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from dmlfast.all import LargeBatch, MetricLearner, MultiSimilarityLoss
    from dmlfast.models.embedder import Embedder
    set_seed(0)
    x = torch.randn(256, 3, 64, 64)
    dls = DataLoaders(DataLoader([(x, torch.arange(256)//4)], bs=None, num_workers=0), DataLoader([], bs=None), device='cpu')
    model = Embedder('resnet18', emb_sz=d, pretrained=False, freeze_bn=True)
    learn = MetricLearner(dls, model, MultiSimilarityLoss(), opt_func=SGD, cbs=[LargeBatch(int(chunk))] if int(chunk) else None)
    with torch.no_grad(): model.eval()(x[:8])
    before,seconds = peak(),[]
    with learn.no_bar(), learn.no_logging():
        for _ in range(3):
            t = time.process_time()
            learn.fit(1, 1e-3)
            seconds.append(time.process_time()-t)
    return dict(seconds=statistics.median(seconds), mib=peak()-before)

def one_memory(name, classes, way, n=128, m=4096):
    import torch, dmlfast.losses as l
    (x,y),(o,oy) = batch(n),batch(m, 1, int(classes))
    y = y%int(classes)
    if name=='plain rectangle':
        def f():
            z = x.clone().requires_grad_()
            (z@torch.cat([z, o]).T).exp().sum().backward()
    else:
        loss = eval(remembered[name], vars(l))
        f = dict(memory=lambda: step(loss, x, y, o, oy), square=lambda: step(loss, torch.cat([x, o]), torch.cat([y, oy])))[way]
        step(loss, *batch(16))
    before = peak()
    f()
    used = peak()-before
    return dict(seconds=timed(f), mib=used)

def child(*args):
    "A measurement in a process of its own, stopped where it takes more than `limit` GiB"
    code = (f'import resource, runpy; resource.setrlimit(resource.RLIMIT_DATA, ({limit}<<30,)*2);'
        f'runpy.run_path({__file__!r}, run_name="__main__")')
    res = subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True,
        env=dict(os.environ, OMP_NUM_THREADS='1'), timeout=900)
    if res.returncode: return None if 'alloc' in res.stderr or 'Memory' in res.stderr or res.returncode<0 else sys.exit(res.stderr)
    return json.loads(res.stdout.splitlines()[-1])

def show(res, unit=1): return 'over 6 GiB' if res is None else f"{res['seconds']*unit:.3g} / {res['mib']:,.0f}"

def losses(*only):
    print('| loss, s / MiB | '+' | '.join(f'{n:,}' for n in ns)+' |\n|---'*1+'|---'*len(ns)+'|')
    for name in only or names: print(f'| {name} | '+' | '.join(show(child('one_loss', name, str(n))) for n in ns)+' |', flush=True)

def chunks():
    print('| chunk | s a step | MiB |\n|---|---|---|')
    for c in (0,64,16): # 0: the whole batch
        r = child('one_chunk', str(c))
        print(f"| {c or 'whole batch'} | {r['seconds']:.2f} | {r['mib']:,.0f} |" if r else f'| {c} | over 6 GiB | |', flush=True)

def memory():
    print('| loss, ms / MiB | 1,000 classes | 100 classes | the square of 4,224, 1,000 classes |\n|---|---|---|---|')
    print(f"| plain rectangle | {show(child('one_memory', 'plain rectangle', '1000', 'memory'), 1e3)} | | |", flush=True)
    for name in remembered:
        res = [show(child('one_memory', name, *o), 1e3) for o in (('1000','memory'),('100','memory'),('1000','square'))]
        print(f'| {name} | '+' | '.join(res)+' |', flush=True)

def gather_part(ns):
    "What each of two processes does"
    import torch
    from dmlfast.train.distributed import gather_rows
    from dmlfast.train.processes import together
    res = []
    with together():
        for n in ns:
            x,times = torch.randn(n//2, d, requires_grad=True),[]
            for _ in range(31):
                t = time.perf_counter()
                gather_rows(x).sum().backward()
                times.append(time.perf_counter()-t)
            res.append((min(times[1:]),statistics.median(times[1:])))
    return res

def gather():
    from dmlfast.train.launcher import launch
    os.environ['PYTHONPATH'] = os.pathsep.join([os.path.dirname(os.path.abspath(__file__)), os.environ.get('PYTHONPATH', '')])
    print('| rows of both | MB that come to a process | ms, least | ms, median |\n|---|---|---|---|')
    for n,(least,median) in zip(ns, launch('scale:gather_part', 2, ns=ns)):
        print(f'| {n:,} | {n/2*d*4/1e6:.2f} | {least*1e3:.2f} | {median*1e3:.2f} |')

if __name__=='__main__':
    what,*args = sys.argv[1:] or ['']
    if what.startswith('one_'): print(json.dumps(globals()[what](*args)))
    elif what in ('losses','chunks','memory','gather'):
        import torch
        print(f'{os.cpu_count()} CPUs, one thread, load {os.getloadavg()[0]:.0f}, torch {torch.__version__}\n')
        globals()[what](*args)
    else: print(__doc__)
