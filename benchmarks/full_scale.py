"What full-scale training needs on one device: measures a step of each recipe, and writes full_scale.md with hours and memory for four data sets"
import argparse, math, os, platform, time, warnings
from pathlib import Path
from statistics import median
warnings.simplefilter('ignore')
import torch
from torch.utils.flop_counter import FlopCounterMode
from dmlfast.all import *
from dmlfast.study.runs import n_epochs

# images and classes for training, images for testing: the data sets' own protocols
data = dict(cub200=(5864,100,5924), cars196=(8054,98,8131), online_products=(59551,11318,60502), inshop=(25882,3997,26830))
titles = dict(cub200='CUB-200-2011', cars196='Cars-196', online_products='Online Products', inshop='In-Shop')

def embedder(name):
    "The network of a recipe, as it is trained"
    r = recipes[name]
    return Embedder(r.arch, r.emb_sz, pretrained=False, **r.model).train()

def views(name):
    "Views that ranking adds to the images of a step, and the share of steps in which it does"
    o = recipes[name].cbs[0].keywords if recipes[name].cbs else dict(m=0, n=0, p=0.)
    return o['m']*(o['n']+1),o['p']

def epoch_images(name, which):
    "Images of an epoch: all of them, or as many as let every class come once, in whole batches"
    (n,n_classes,_),bs = data[which],recipes[name].data['bs']
    per_class = 4 if which in ('online_products','inshop') else recipes[name].data['per_class'] # whose classes have five or six images
    return max(n//bs, math.ceil(n_classes*per_class/bs))*bs

def seconds(f, x, grad=True):
    "Seconds of `f` on the device of `x`, with gradients or without"
    def _sync():
        if x.is_cuda: torch.cuda.synchronize()
    _sync()
    t = time.perf_counter()
    with torch.set_grad_enabled(grad): f(x)
    _sync()
    return time.perf_counter()-t

def saved_bytes(model, x):
    "Bytes that a forward pass keeps for the backward pass, weights apart"
    kept,weights = {},{o.untyped_storage().data_ptr() for o in model.parameters()}
    def _pack(o):
        s = o.untyped_storage()
        if s.data_ptr() not in weights: kept[s.data_ptr()] = (s.nbytes(),o)
        return o
    with torch.autograd.graph.saved_tensors_hooks(_pack, lambda o: o): model(x)
    return sum(o for o,_ in kept.values())

def measure(name, device, repeats):
    "What one recipe needs: operations and memory by counting, seconds by the clock"
    r,model = recipes[name],embedder(name).to(device)
    bs = r.data['bs'] if device.type=='cuda' else 4
    x = torch.randn(bs, 3, r.data['size'], r.data['size'], device=device)
    with FlopCounterMode(display=False) as f, torch.no_grad(): model(x[:1])
    res = dict(gflop=f.get_total_flops()/1e9, params=sum(o.numel() for o in model.parameters()), kept=saved_bytes(model, x[:4])/4)
    if device.type=='cuda': torch.cuda.reset_peak_memory_stats()
    def _step(x): model(x).square().mean().backward()
    seconds(_step, x), seconds(model, x, grad=False)
    res |= dict(train=median(seconds(_step, x) for _ in range(repeats))/bs, test=median(seconds(model, x, grad=False) for _ in range(repeats))/bs)
    if device.type=='cuda': res['peak'] = torch.cuda.max_memory_allocated()
    return res

def gib(name, o):
    "Memory of a step: what is kept for the backward pass of the whole batch, and weights, gradients and two moments of each"
    return (o['kept']*(recipes[name].data['bs']+views(name)[0])+16*o['params'])/2**30

def hours(name, o, which):
    "Hours of a whole training with its recipe, and petaflops: all epochs, measured once at the end"
    n_test,(more,p) = data[which][2],views(name)
    images = epoch_images(name, which)*recipes[name].fit['n_epoch']*(1+p*more/recipes[name].data['bs'])
    return (images*o['train']+n_test*o['test'])/3600,(3*images+n_test)*o['gflop']/1e6

def comparison(which, rows):
    "Petaflops of the whole comparison in the plan of a data set: searches on half of the training classes, runs on all of them; a pruned search counts as two thirds"
    plan,(n,_,n_test) = Experiment(Path(__file__).parent/'evidence'/f'{which}.toml', Path(__file__).with_name('none.jsonl')),data[which]
    gflop = {recipes[k].arch:o['gflop'] for k,o in rows.items()}
    def _one(name):
        s,trials = plan.settings(name),plan.search['n_trials']*bool(plan.space(name))
        ssr = s.get('ssr', dict(m=0, n=0))
        images = n*(len(plan.seeds(name))*n_epochs(s) + trials*plan.search['n_epoch']/2*2/3)*(1+ssr['m']*(ssr['n']+1)/s['batch']['bs'])
        return (3*images+n_test*len(plan.seeds(name)))*gflop[s['model']['arch']]/1e6
    return sum(map(_one, plan.methods))

def table(head, rows):
    return '\n'.join('| '+' | '.join(map(str, o))+' |' for o in (head,['---']*len(head),*rows))

def write(file, rows, device):
    what = torch.cuda.get_device_name() if device.type=='cuda' else f'{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores'
    def _needs(k, o):
        r,(more,p) = recipes[k],views(k)
        peak = f" (batch alone, measured: {o['peak']/2**30:.1f})" if 'peak' in o else ''
        batch = f"{r.data['bs']}" + (f' and {more} views in {p:.0%} of steps' if more else '')
        return f'`{k}`',f"{r.arch}, {r.data['size']} px",batch,f"{o['gflop']:.2f}",f"{o['kept']/2**20:.0f}",f'{gib(k, o):.1f}{peak}',f"{1/o['train']:.1f}",f"{1/o['test']:.1f}"
    def _times(k, o, f): return f'`{k}`',recipes[k].fit['n_epoch'],*(f(*hours(k, o, w)) for w in data)
    head = ['recipe','epochs',*titles.values()]
    needs = table(['recipe','network','batch','GFLOP an image','MiB kept an image','GiB a step','images/s, training','images/s, embedding'], [_needs(*o) for o in rows.items()])
    here = table(head, [_times(*o, lambda h,p: f'{h:,.1f}') for o in rows.items()])
    ops = table(head, [_times(*o, lambda h,p: f'{p:.1f}: {p/36:.2f} h') for o in rows.items()] + [['all of `evidence/`','',*(f'{p:.0f}: {p/36:.1f} h' for p in (comparison(o, rows) for o in data))]])
    file.write_text(f"""# Full-scale training: time and memory

`python benchmarks/full_scale.py`, torch {torch.__version__}, {what}, load (1 minute) {os.getloadavg()[0]:.1f}, single precision. Seconds are medians; data loading, which needs enough workers to keep up, is not in them.

{needs}

Operations, and what a forward pass keeps for the backward pass, are counted, and hold for any device. The memory of a step is computed from them: what all its images keep, and the weights, their gradients and the optimiser's two moments.

## Hours on this device

One training by its recipe (on the last two data sets with four images of a class), measured once at the end, computed from the images per second above:

{here}

## Whatever the device

The operations of the same trainings, in units of 10^15 (training counted as three forward passes), and the hours of a device that sustains 10^13 of them per second. That number is an assumption: put in that of your own card, or run the script there. The last row is the whole comparison, eight methods with their searches and five seeds each, by the data set's plan in `evidence`.

{ops}
""")
    print(file.read_text())

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--threads', type=int, default=0, help='of a processor; all if not given')
    p.add_argument('--repeats', type=int, default=5)
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.md'))
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    device = torch.device(a.device)
    names = 'dr_triplet','dr_proxynca','dr_ms','margin','ssr_margin'
    write(a.out, {k:measure(k, device, a.repeats) for k in names}, device)
