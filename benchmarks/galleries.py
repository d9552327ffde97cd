"""Search in galleries of ten thousand to a million items: exact, indexes, LanceDB, faiss itself and PML's `InferenceModel`.

    nice python benchmarks/galleries.py                # rows in benchmarks/galleries.jsonl; those that are there are not made again
    python benchmarks/galleries.py --rows 10000 --only exact int8
    python benchmarks/galleries.py --table             # what is in it, in Markdown
    python benchmarks/galleries.py --file 10000000 --queries 10000 # a gallery in a file, scored in blocks
    python benchmarks/galleries.py --rerank 20000      # k-reciprocal re-ranking

One thread, the process's own seconds (`process_time`) and those of the clock, medians; each size and kind in a process of its own, so that
the peak of memory is its own. The gallery is 128 numbers an item, in classes of 20 that overlap. Recall is of the ten nearest, against
exact search, for 64 queries that are not in the gallery."""
import argparse, json, os, resource, subprocess, sys, tempfile
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
import numpy as np, torch
from dmlfast.retrieval import Embedded, Index, evaluate_retrieval, neighbours
from dmlfast.retrieval.products import fastest_product, multiply

OUT = Path(__file__).with_suffix('.jsonl')
KINDS = 'bare','exact','int8','hnsw','ivf','bits','SQ8','lance','faiss flat','PML'

def data(n, q=64, d=128, seed=0):
    "Gallery and queries of the same classes"
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(1, n//20), d, generator=g)
    def some(m):
        y = torch.randint(len(centres), (m,), generator=g)
        return torch.nn.functional.normalize(centres[y]+torch.randn(m, d, generator=g))
    return some(n),some(q)

def seconds(f):
    "The process's own seconds, those of the clock, and what `f` gave"
    s,c = process_time(),perf_counter()
    res = f()
    return process_time()-s,perf_counter()-c,res

def in_lancedb(x, tmp):
    "A function of queries, and bytes on disk"
    from dmlfast.deploy import ImageEmbedder, Preprocess
    class Nothing(torch.nn.Module): emb_sz = x.shape[1]
    finder = ImageEmbedder(Nothing(), Preprocess()).to_lancedb(f'{tmp}/g.lance')
    for i in range(0, len(x), 50_000):
        o = x[i:i+50_000]
        finder.add_embs(o, ['']*len(o), [str(i+j) for j in range(len(o))])
    finder.index()
    nbytes = sum(o.stat().st_size for o in Path(tmp).rglob('*') if o.is_file())
    return lambda q: torch.tensor([[int(o.item) for o in h] for h in finder.gallery.find(q, 10)]),nbytes

def searcher(kind, x, tmp):
    "A function of queries that gives the indices of ten neighbours, and bytes of what is searched"
    if kind=='lance': return in_lancedb(x, tmp)
    if kind=='bare': return lambda q: torch.mm(q, x.T).topk(10)[1],x.nbytes
    if kind=='exact':
        e = Embedded(x)
        e.find(x[:1])
        return lambda q: e.find(q, 10)[1],x.nbytes
    if kind=='faiss flat':
        import faiss
        index = faiss.IndexFlatIP(x.shape[1])
        index.add(x.numpy())
        return lambda q: torch.from_numpy(index.search(q.numpy(), 10)[1]),x.nbytes
    if kind=='PML':
        from pytorch_metric_learning.utils.inference import InferenceModel
        model = InferenceModel(torch.nn.Identity())
        model.train_knn(x)
        return lambda q: model.get_nearest_neighbors(q, 10)[1],x.nbytes
    index = Index(x, kind)
    return lambda q: index.search(q, 10)[1],None if kind=='hnsw' else index.core.nbytes()

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def measure(kind, n):
    "A row of the table"
    x,q = data(n)
    if kind=='lance': import dmlfast.deploy, lancedb, pyarrow # what imports take is not its memory
    before = peak()
    with tempfile.TemporaryDirectory() as tmp:
        cpu,wall,(find,nbytes) = seconds(lambda: searcher(kind, x, tmp))
        after,found = peak(),find(q)
        for o in q[:3]: find(o[None])
        one = [seconds(lambda: find(o[None])) for o in q[:25]]
        many = [seconds(lambda: find(q)) for _ in range(3)]
    want = neighbours(q, x, 10, backend='torch')[1]
    def ms(ts): return [round(median(o)*1e3, 3) for o in list(zip(*ts))[:2]]
    return dict(items=n, search=kind, build=[round(cpu, 2),round(wall, 2)], one=ms(one), many=ms(many), MiB=round(after-before),
        bytes=nbytes and round(nbytes/n), recall=round(np.mean([len({*a}&{*b})/10 for a,b in zip(found.tolist(), want.tolist())]), 3))

def rows(): return [json.loads(o) for o in OUT.read_text().splitlines()] if OUT.is_file() else []

def table():
    "What was measured, in Markdown"
    res = ['| items | search | build | one query | 64 queries | bytes an item | memory to build | recall@10 | load |','|---'*9+'|']
    def both(o, unit): return f'{o[0]:,} ({o[1]:,}) {unit}'
    for o in sorted(rows(), key=lambda o: (o['items'],KINDS.index(o['search']))):
        cells = [f"{o['items']:,}", o['search'], both(o['build'], 's'), both(o['one'], 'ms'), both(o['many'], 'ms'), o['bytes'] or '',
            f"{o['MiB']:,} MiB", o['recall'], o['load']]
        res.append('| '+' | '.join(map(str, cells))+' |')
    return '\n'.join(res)

def in_file(n, q, d=128):
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
        cpu,wall,_ = seconds(lambda: evaluate_retrieval(x, y[:q], file, y, self_exclude=np.arange(q)))
        most = peak()
    g,x = torch.randn(65_536, d),torch.from_numpy(x)
    bare = {o:round(seconds(lambda: [multiply(o, b, g) for b in x.split(64)])[0]*n/65_536) for o in {'torch',fastest_product()}}
    return (f'{q:,} queries, {n:,}×{d} in a file: {cpu:.0f} s ({wall:.0f} s by the clock) with the product of {fastest_product()}, '
        f'bare products {bare} s, peak {most:.0f} MiB, load {os.getloadavg()[0]:.0f}')

def rerank(n):
    "Time and memory of k-reciprocal re-ranking, all on all"
    x,_ = data(n)
    e = Embedded(x)
    plain = seconds(lambda: e.neighbours(100))[1]
    t = seconds(lambda: e.neighbours(10, rerank='k-reciprocal'))[1]
    return f'{n:,} on {n:,}: plain {plain:.1f} s, k-reciprocal {t:.1f} s, peak {peak():.0f} MiB'

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--rows', type=int, nargs='*', default=[10_000,100_000,1_000_000])
    p.add_argument('--only', nargs='*', default=KINDS)
    p.add_argument('--file', type=int)
    p.add_argument('--queries', type=int, default=1000)
    p.add_argument('--rerank', type=int)
    p.add_argument('--table', action='store_true')
    p.add_argument('--one', nargs=2)
    a = p.parse_args()
    torch.set_num_threads(1)
    try:
        import faiss
        faiss.omp_set_num_threads(1)
    except ImportError: pass
    if a.one: return print(json.dumps(measure(a.one[0], int(a.one[1]))))
    if a.file: return print(in_file(a.file, a.queries))
    if a.rerank: return print(rerank(a.rerank))
    for n in [] if a.table else a.rows:
        for kind in a.only:
            if any((o['items'],o['search'])==(n,kind) for o in rows()): continue
            r = subprocess.run([sys.executable, __file__, '--one', kind, str(n)], capture_output=True, text=True)
            if r.returncode:
                print(n, kind, r.stderr.strip().splitlines()[-1], flush=True)
                continue
            row = dict(json.loads(r.stdout.splitlines()[-1]), load=round(os.getloadavg()[0]))
            with OUT.open('a') as f: f.write(json.dumps(row)+'\n')
            print(row, flush=True)
    print(table())

if __name__=='__main__': main()
