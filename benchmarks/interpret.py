"What an interpretation of 60,000 items takes: seconds and memory of each of its answers: writes interpret.md"
import argparse, os, platform, time, warnings
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.simplefilter('ignore')
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt, numpy as np, torch
from dmlfast.all import *

def status(k): return int(next(o for o in Path('/proc/self/status').read_text().splitlines() if o.startswith(k)).split()[1])/1024

def measure(f, base):
    "Processor seconds of `f`, and MiB at its peak above `base`"
    Path('/proc/self/clear_refs').write_text('5') # the peak starts anew
    t = time.process_time()
    f()
    plt.close('all')
    return time.process_time()-t,status('VmHWM')-base

def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--n', type=int, default=60_000, help='items')
    ap.add_argument('--dims', type=int, default=128)
    ap.add_argument('--per-class', type=int, default=5)
    ap.add_argument('--out', default=Path(__file__).with_suffix('.md'))
    args = ap.parse_args()
    torch.set_num_threads(1)
    g,y = torch.Generator().manual_seed(0),torch.arange(args.n)//args.per_class
    centres = torch.randn(int(y.max())+1, args.dims, generator=g)
    x = centres[y]+1.5*torch.randn(args.n, args.dims, generator=g)
    small = RetrievalInterpretation(x[:300], y[:300]) # what is loaded only once is loaded
    small.plot_map(), small.plot_recall(), small.label_noise()
    plt.close('all')
    base = status('VmRSS') # the embeddings are there
    image = lambda i: np.full((160,160,3), int(i)%256, dtype=np.uint8)
    r = RetrievalInterpretation(x, y, image=image)
    parts = {'nearest(8)':lambda: r.nearest(8), 'result':lambda: r.result, 'top_losses, plot_neighbours':lambda: (r.top_losses(), r.plot_neighbours()), 'most_confused, plot_most_confused':lambda: (r.most_confused(), r.plot_most_confused()),
        'plot_pr, plot_recall, plot_similarities':lambda: (r.plot_pr(), r.plot_recall(), r.plot_similarities()), 'label_noise, duplicates':lambda: (r.label_noise(.5), r.duplicates(.5)), 'plot_map':lambda: r.plot_map(), 'plot_triplets':lambda: r.plot_triplets()}
    rows = {k:measure(f, base) for k,f in parts.items()}
    text = f'''# Interpretation of {args.n:,} items: time and memory

`python benchmarks/interpret.py`, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, one thread. Random embeddings of {args.dims} dimensions ({x.numel()*4/2**20:.0f} MiB, not counted below), {args.per_class} items to a class.
All similarities at once would be {args.n**2*4/2**30:.1f} GiB. Peak is that of the process above what it had before, so that what earlier lines keep is in it.

| | processor seconds | peak, MiB |
|---|---|---|
''' + '\n'.join(f'| `{k}` | {a:.1f} | {b:.0f} |' for k,(a,b) in rows.items()) + '\n'
    Path(args.out).write_text(text)
    print(text)

if __name__=='__main__': main()
