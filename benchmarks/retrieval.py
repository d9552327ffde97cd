"""Time and memory of `evaluate_retrieval`, against the matrix product it contains and PyTorch Metric Learning.

    python benchmarks/retrieval.py                     # every case: a table in Markdown
    python benchmarks/retrieval.py --threads 1 --runs 5 cub sop

"Product" is the bare product by the faster of PyTorch's BLAS and oneDNN, which `evaluate_retrieval` takes too. All are timed in turn in
one process, so that they meet the same load; the numbers are medians. Memory is the peak of a fresh process above what it holds once the
embeddings are there. On a machine that others use, `--clock cpu --threads 1` counts the process's own seconds."""
import argparse, gc, os, subprocess, sys
from statistics import median
from time import perf_counter, process_time
import torch
from dmlfast.retrieval.metrics import evaluate_retrieval
from dmlfast.retrieval.products import fastest_product, multiply
from dmlfast.retrieval.search import neighbours

CLOCK = perf_counter
CHEAP,FULL = ['recall','r_precision','map@r'],['recall','r_precision','map@r','map','mrr','pr_curve']

def clusters(n, c, d, seed=0, weights=None):
    "`n` embeddings in `c` classes that overlap"
    g = torch.Generator().manual_seed(seed)
    y = torch.randperm(n, generator=g)%c if weights is None else torch.multinomial(weights, n, True, generator=g)
    return torch.randn(c, d, generator=g)[y] + 3*torch.randn(n, d, generator=g),y

def uneven(): return clusters(20_000, 20, 512, weights=torch.linspace(1, 20, 20)**.9)

def in_shop():
    x,y = clusters(14_218+12_612, 3_985, 512)
    return x[:14_218],y[:14_218],x[14_218:],y[14_218:]

def million():
    x,y = clusters(1_000_000, 50_000, 128)
    return x[:10_000],y[:10_000],x,y

CASES = {
    'cub': ('CUB: 5,924×512, 100 classes', lambda: clusters(5_924, 100, 512), CHEAP),
    'cub-full': ('the same with map, mrr, PR curve', lambda: clusters(5_924, 100, 512), FULL),
    'sop': ('SOP: 60,502×512, 11,316 classes', lambda: clusters(60_502, 11_316, 512), CHEAP),
    'uneven': ('uneven: 20,000×512, 20 classes', uneven, CHEAP),
    'uneven-full': ('the same with map, mrr, PR curve', uneven, FULL),
    'in-shop': ('In-Shop: 14,218 on 12,612×512', in_shop, CHEAP),
    'million': ('10,000 of 1,000,000×128 on all', million, CHEAP)}

def product(x, g, rows, by=None):
    "The bare product in blocks of `rows`"
    by = by or fastest_product()
    buf = torch.empty(rows, len(g)) if by=='torch' else None
    for q in x.split(rows): multiply(by, q, g, out=None if buf is None else buf[:len(q)])

def best_rows(x, g):
    "The block size that is fastest for the product"
    x = x[:4096]
    def t(r):
        product(x, g, r)
        s = CLOCK(); product(x, g, r); return CLOCK()-s
    return min([r for r in (128,256,512,1024,2048,4096) if r*len(g)<=2**28] or [64], key=t)

def ours(data, names):
    own = torch.arange(len(data[0])) if len(data)==4 and len(data[2])>100_000 else None
    return evaluate_retrieval(*data, metrics=names, self_exclude=own)

def pml(data, names):
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    inc = ['precision_at_1','r_precision','mean_average_precision_at_r']
    if 'map' in names: inc += ['mean_average_precision','mean_reciprocal_rank']
    calc = AccuracyCalculator(include=inc, k=None if 'map' in names else 'max_bin_count')
    return calc.get_accuracy(*data)

def seconds(f):
    gc.collect()
    s = CLOCK(); f(); return CLOCK()-s

def times(case, runs, with_pml=True):
    "Medians of the product, ours and PML's, in turn"
    _,make,names = CASES[case]
    data = make()
    x,g = data[0],data[2] if len(data)==4 else data[0]
    rows = best_rows(x, g)
    fs = [lambda: product(x, g, rows), lambda: ours(data, names)] + ([lambda: pml(data, names)] if with_pml else [])
    if with_pml: fs.append(lambda: product(x, g, rows, 'torch'))
    for f in fs[:2] if len(x)*len(g)<1e9 else []: f()
    ts = [[seconds(f) for f in fs] for _ in range(runs)]
    return [median(t) for t in zip(*ts)],median(t[1]/t[0] for t in ts),median(t[1]/t[2] for t in ts) if with_pml else None

def status(key):
    "A line of /proc/self/status in MiB"
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(key))/1024

def peak(case, which):
    "Peak memory above what is there before, in MiB, of this process"
    _,make,names = CASES[case]
    data = make()
    evaluate_retrieval(torch.randn(64,8), torch.arange(64)//4)
    gc.collect()
    before = status('VmRSS')
    with open('/proc/self/clear_refs', 'w') as f: f.write('5')
    dict(ours=ours, pml=pml)[which](data, names)
    return status('VmHWM')-before

def peak_in_fresh_process(case, which, threads):
    r = subprocess.run([sys.executable, __file__, '--threads', str(threads), '--peak', which, case], capture_output=True, text=True)
    return float(r.stdout.strip().splitlines()[-1]) if r.returncode==0 else float('nan')

def search(runs):
    "Median seconds of a search for 10 neighbours, by the faster product, PyTorch's and faiss, in turn"
    x,_ = clusters(20_000, 1_000, 512)
    ts = [[seconds(lambda: neighbours(x, k=10, backend=b)) for b in ('auto','torch','faiss')] for _ in range(runs)]
    return [median(t) for t in zip(*ts)]

def main():
    p = argparse.ArgumentParser()
    p.add_argument('cases', nargs='*', default=list(CASES))
    p.add_argument('--threads', type=int, default=os.cpu_count())
    p.add_argument('--runs', type=int, default=5)
    p.add_argument('--clock', choices=['wall','cpu'], default='wall')
    p.add_argument('--peak', choices=['ours','pml'])
    a = p.parse_args()
    global CLOCK
    if a.clock=='cpu': CLOCK = process_time
    torch.set_num_threads(a.threads)
    try:
        import faiss
        faiss.omp_set_num_threads(a.threads)
        version = faiss.__version__
    except ImportError: version = 'none'
    if a.peak: return print(peak(a.cases[0], a.peak))
    import numpy, pytorch_metric_learning
    print(f'torch {torch.__version__}, numpy {numpy.__version__}, faiss {version}, PML {pytorch_metric_learning.__version__}; '
        f'{a.threads} threads of {os.cpu_count()}, {a.clock} seconds, {a.runs} runs, load {os.getloadavg()[0]:.1f} at the start\n')
    print(f'The faster product: {fastest_product()}\n\n| case | torch.mm | faster product | ours | ratio | PML | ours to PML | peak ours '
        '| peak PML | load |\n'+'|---'*10+'|')
    for c in a.cases:
        big = c=='million'
        t,ratio,to_pml = times(c, 1 if big else a.runs, with_pml=not big)
        mem = [peak_in_fresh_process(c, w, a.threads) for w in (['ours'] if big else ['ours','pml'])]
        mm,*theirs = ('','','','') if big else (f'{t[3]:.2f} s',f'{t[2]:.2f} s',f'{to_pml:.2f}',f'{mem[1]:.0f} MiB')
        cells = [CASES[c][0], mm, f'{t[0]:.2f} s', f'{t[1]:.2f} s', f'{ratio:.2f}', *theirs[:2], f'{mem[0]:.0f} MiB', theirs[2],
            f'{os.getloadavg()[0]:.1f}']
        print('| '+' | '.join(map(str, cells))+' |', flush=True)
    t = search(min(a.runs, 3))
    print(f'\nNeighbours of 20,000×512, k 10: auto {t[0]:.2f} s, torch {t[1]:.2f} s, faiss {t[2]:.2f} s')

if __name__=='__main__': main()
