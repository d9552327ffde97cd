"Time of balanced batches, against PyTorch Metric Learning's sampler, and of reading a table: writes data.md"
import argparse, os, platform, tempfile, time
from importlib.metadata import version
from pathlib import Path
from statistics import median
os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np
from pytorch_metric_learning.samplers import MPerClassSampler
from dmlfast.data.batches import BalancedDL, BalancedSampler
from dmlfast.data.datasets import online_products

def labels_of(n, n_classes):
    "Labels of `n` items in random order, of `n_classes` classes of different sizes"
    rng = np.random.default_rng(0)
    return rng.permutation(np.r_[np.arange(n_classes), rng.integers(0, n_classes, n-n_classes)])

def clock(f):
    "Seconds of CPU time, and what `f` returns"
    t = time.process_time()
    res = f()
    return time.process_time()-t, res

def epochs(n=59551, n_classes=11318, bs=128, k=4, runs=15):
    "Median milliseconds of an epoch's indices: ours, theirs in batches, theirs without a batch size; run in turn"
    y = labels_of(n, n_classes)
    dl,(theirs,loose) = BalancedDL(range(n), bs, k, labels=y, shuffle=True, seed=0, num_workers=0),(MPerClassSampler(y, k, o, n) for o in (bs,None))
    def ours(e):
        dl.epoch = e
        return dl.get_idxs()
    fs = [ours, lambda e: list(theirs), lambda e: list(loose)]
    return [1e3*median(o) for o in zip(*[[clock(lambda: f(e))[0] for f in fs] for e in range(runs)])]

def large(n=10_000_000, n_classes=1_000_000, bs=128, k=4, runs=3):
    "Least seconds of the set-up and of an epoch"
    y = labels_of(n, n_classes)
    setup = [clock(lambda: BalancedSampler(y, bs, k)) for _ in range(runs)]
    s = setup[-1][1]
    return min(o for o,_ in setup), min(clock(lambda: s.idxs(e))[0] for e in range(runs))

def write_products(path):
    "Lists of the size of Stanford Online Products"
    i = 1
    for part,n,n_classes,first in (('train',59551,11318,1), ('test',60502,11316,11319)):
        rows = [f'{i+j} {first+c} {1+c*12//n_classes} chair_final/{100000000000+i+j}_{j%9}.JPG' for j,c in enumerate(np.sort(labels_of(n, n_classes)))]
        (path/f'Ebay_{part}.txt').write_text('\n'.join(['image_id class_id super_class_id path', *rows]))
        i += n

def reading(runs=5):
    "Least seconds of reading and checking that table"
    with tempfile.TemporaryDirectory() as tmp:
        write_products(Path(tmp))
        times = [clock(lambda: online_products(tmp, check_files=False)) for _ in range(runs)]
    assert len(times[-1][1])==120053
    return min(o for o,_ in times)

def row(what, value, says, ok): return f'| {what} | {value} | {says}{"" if ok else " (missed)"} |'

def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--out', default=Path(__file__).with_suffix('.md'))
    args = ap.parse_args()
    ours,theirs,loose = epochs()
    setup,epoch = large()
    read = reading()
    rows = ['| what | measured | promised |', '|---|---|---|',
        row('indices of an epoch, 59,551 items of 11,318 classes, 128 = 32×4', f'{ours:.1f} ms', '', True),
        row("the same by PML's `MPerClassSampler(batch_size=128)`", f'{theirs:.0f} ms: {theirs/ours:.0f} times ours', '≥ 5 times', theirs>=5*ours),
        row("`MPerClassSampler(batch_size=None)`, which makes one pass over the classes, 45,272 indices", f'{loose:.0f} ms: {loose/ours:.0f} times ours', '', True),
        row('10,000,000 items of 1,000,000 classes: set-up', f'{setup:.1f} s', '≤ 6 s', setup<=6),
        row('10,000,000 items of 1,000,000 classes: an epoch', f'{epoch:.1f} s', '≤ 15 s', epoch<=15),
        row('reading and checking the lists of Stanford Online Products, 120,053 rows, `check_files=False`', f'{read:.2f} s', '≤ 2 s', read<=2)]
    print('\n'.join(rows))
    Path(args.out).write_text(f'# Data: time of batches and tables\n\n`python benchmarks/data.py`, numpy {np.__version__}, pytorch-metric-learning '
        f'{version("pytorch-metric-learning")}, {platform.machine()}, {os.cpu_count()} cores. CPU times of one thread, in one process: medians of runs in turn for the '
        'first rows, the least of several for the others. Ours are those of `BalancedDL.get_idxs`.\n\n' + '\n'.join(rows) + '\n')

if __name__=='__main__': main()
