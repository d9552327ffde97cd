"""Search in galleries of ten thousand to a million items: exact, indexes, faiss itself and PyTorch Metric Learning's `InferenceModel`.

    python benchmarks/galleries.py                     # every size: a table in Markdown
    python benchmarks/galleries.py --rows 10000 --only exact int8
    python benchmarks/galleries.py --file 10000000     # a gallery in a file, scored in blocks
    python benchmarks/galleries.py --rerank 20000      # k-reciprocal re-ranking

One thread, the process's own seconds (`process_time`), medians; each size and kind in a process of its own, so that the peak of
memory is its own. The gallery is 128 numbers an item, in classes of 20 that overlap. Recall is of the ten nearest, against exact search, for
64 queries that are not in the gallery."""
import argparse, os, resource, subprocess, sys, tempfile
from pathlib import Path
from statistics import median
from time import process_time
import numpy as np, torch
from dmlfast.retrieval import Embedded, Index, evaluate_retrieval, neighbours

KINDS = 'bare','exact','int8','hnsw','ivf','bits','faiss flat','PML'

def data(n, q=64, d=128, seed=0):
    "Gallery and queries of the same classes"
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(1, n//20), d, generator=g)
    def some(m):
        y = torch.randint(len(centres), (m,), generator=g)
        return torch.nn.functional.normalize(centres[y]+torch.randn(m, d, generator=g))
    return some(n),some(q)

def seconds(f):
    s = process_time()
    res = f()
    return process_time()-s,res

def searcher(kind, x):
    "A function of queries that gives the indices of ten neighbours"
    if kind=='bare': return lambda q: torch.mm(q, x.T).topk(10)[1]
    if kind=='exact':
        e = Embedded(x)
        e.find(x[:1])
        return lambda q: e.find(q, 10)[1]
    if kind=='faiss flat':
        import faiss
        index = faiss.IndexFlatIP(x.shape[1])
        index.add(x.numpy())
        return lambda q: torch.from_numpy(index.search(q.numpy(), 10)[1])
    if kind=='PML':
        from pytorch_metric_learning.utils.inference import InferenceModel
        model = InferenceModel(torch.nn.Identity())
        model.train_knn(x)
        return lambda q: model.get_nearest_neighbors(q, 10)[1]
    index = Index(x, kind)
    return lambda q: index.search(q, 10)[1]

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def measure(kind, n):
    "A row of the table"
    x,q = data(n)
    before = peak()
    build,find = seconds(lambda: searcher(kind, x))
    after,found = peak(),find(q)
    want = neighbours(q, x, 10, backend='torch')[1]
    for o in q[:3]: find(o[None])
    one = median(seconds(lambda: find(o[None]))[0] for o in q[:15])
    many = median(seconds(lambda: find(q))[0] for _ in range(3))
    recall = np.mean([len({*a}&{*b})/10 for a,b in zip(found.tolist(), want.tolist())])
    return f'| {n:,} | {kind} | {build:.2f} s | {one*1e3:.1f} ms | {many*1e3:.0f} ms | {after-before:.0f} MiB | {recall:.3f} |'

def in_file(n, q=1000, d=128):
    "Time and memory of the metrics of `q` queries in a gallery of `n` rows in a file, and of the bare product"
    rng,y = np.random.default_rng(0),np.arange(n)%(n//20)
    centres = rng.standard_normal((n//20,d), dtype=np.float32)
    with tempfile.TemporaryDirectory() as tmp:
        file = Path(tmp)/'g.npy'
        with file.open('wb') as f:
            np.lib.format.write_array_header_1_0(f, dict(descr='<f4', fortran_order=False, shape=(n,d)))
            for i in range(0, n, 50_000):
                f.write((centres[y[i:i+50_000]]+1.5*rng.standard_normal((min(50_000, n-i),d), dtype=np.float32)).tobytes())
        x = np.array(np.load(file, mmap_mode='r')[:q])
        t,_ = seconds(lambda: evaluate_retrieval(x, y[:q], file, y, self_exclude=np.arange(q)))
    g,x = torch.randn(65_536, d),torch.from_numpy(x)
    bare = seconds(lambda: [torch.mm(o, g.T) for o in x.split(64)])[0]*n/65_536
    return f'{q:,} queries, {n:,}×{d} in a file: {t:.0f} s, bare product {bare:.0f} s, peak {peak():.0f} MiB'

def rerank(n):
    "Time and memory of k-reciprocal re-ranking, all on all"
    x,_ = data(n)
    e = Embedded(x)
    plain = seconds(lambda: e.neighbours(100))[0]
    t = seconds(lambda: e.neighbours(10, rerank='k-reciprocal'))[0]
    return f'{n:,} on {n:,}: plain {plain:.1f} s, k-reciprocal {t:.1f} s, peak {peak():.0f} MiB'

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--rows', type=int, nargs='*', default=[10_000,100_000,1_000_000])
    p.add_argument('--only', nargs='*', default=KINDS)
    p.add_argument('--file', type=int)
    p.add_argument('--rerank', type=int)
    p.add_argument('--one', nargs=2)
    a = p.parse_args()
    torch.set_num_threads(1)
    try:
        import faiss
        faiss.omp_set_num_threads(1)
    except ImportError: pass
    if a.one: return print(measure(a.one[0], int(a.one[1])))
    if a.file: return print(in_file(a.file))
    if a.rerank: return print(rerank(a.rerank))
    print(f'torch {torch.__version__}, 1 thread of {os.cpu_count()}, load {os.getloadavg()[0]:.1f}\n')
    print('| items | search | build | one query | 64 queries | memory | recall@10 |\n|---|---|---|---|---|---|---|')
    for n in a.rows:
        for kind in a.only:
            r = subprocess.run([sys.executable, __file__, '--one', kind, str(n)], capture_output=True, text=True)
            print(r.stdout.strip() or f'| {n:,} | {kind} | {r.stderr.strip().splitlines()[-1]} |', flush=True)

if __name__=='__main__': main()
