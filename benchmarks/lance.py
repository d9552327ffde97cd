"""A gallery of LanceDB built, indexed, searched and changed: time, recall against exact search, and the memory of each process

    python benchmarks/lance.py 10000 100000 1000000

Rows are of 128 numbers around 10,000 centres and come in batches of 50,000, so that no process holds them all. Each step is a process of
its own, whose peak of resident memory is counted from what the imports take."""
import json, os, resource, subprocess, sys, tempfile, time
from pathlib import Path

d,batch,n_centres,n_queries,k = 128,50_000,10_000,50,10

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10

def rows(i, n=batch):
    "Batch `i` of embeddings, and the centre of each row"
    import torch
    from torch.nn.functional import normalize
    centres = torch.randn(n_centres, d, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(i+1)
    c = torch.randint(n_centres, (n,), generator=g)
    return normalize(centres[c]+.7*torch.randn(n, d, generator=g), dim=1),c

def finder_at(path):
    "An embedder whose gallery is the table at `path`, if it is there"
    import torch
    from dmlfast.deploy import ImageEmbedder, LanceGallery, Preprocess
    class Nothing(torch.nn.Module): emb_sz = d
    finder = ImageEmbedder(Nothing(), Preprocess())
    if Path(path).exists(): finder.gallery = LanceGallery(path)
    return finder

def build(finder, path, n):
    finder.to_lancedb(path)
    for i in range(0, n, batch):
        x,c = rows(i//batch, min(batch, n-i))
        finder.add_embs(x, c.tolist(), [f'{i+j}.jpg' for j in range(len(x))], dict(price=(c%100).tolist()))

def index(finder, path, n): finder.index()

def queries(keep=lambda c: c>=0):
    "Those of centres that count"
    x,c = rows(10**6, 50*n_queries)
    return x[keep(c)][:n_queries]

def found(finder, keep=lambda c: c>=0, **kwargs):
    "Names found for the queries, and milliseconds a query"
    q = queries(keep)
    finder.gallery.find(q[:1], k, **kwargs)
    start = time.perf_counter()
    res = finder.gallery.find(q, k, **kwargs)
    return [[o.item for o in h] for h in res],dict(ms=(time.perf_counter()-start)/n_queries*1e3, peak=peak())

def nearest(n, keep=lambda c: c>=0):
    "The exact answer, a batch of rows at a time"
    import torch
    q,best,names = queries(keep),torch.zeros(n_queries, 0),torch.zeros(n_queries, 0, dtype=torch.int64)
    for i in range(0, n, batch):
        x,c = rows(i//batch, min(batch, n-i))
        s = (q@x.T).masked_fill(~keep(c), -2)
        v,j = s.topk(k, dim=1)
        best,names = torch.cat([best,v], 1),torch.cat([names,j+i], 1)
        best,j = best.topk(k, dim=1)
        names = names.gather(1, j)
    return [[f'{o}.jpg' for o in r] for r in names.tolist()]

def recall(got, want): return sum(len({*a}&{*b}) for a,b in zip(got, want))/(k*len(want))

def scan(finder, path, n):
    got,res = found(finder)
    return dict(res, recall=recall(got, nearest(n)))

def search(finder, path, n, probes=50): # as `find` has it
    got,res = found(finder, probes=probes)
    return dict(res, recall=recall(got, nearest(n)))

def few_lists(finder, path, n): return search(finder, path, n, 20)

def filtered(finder, path, n):
    def keep(c): return c%100<10
    got,res = found(finder, keep, filter=dict(price=lambda p: p<10))
    return dict(res, recall=recall(got, nearest(n, keep)))

def change(finder, path, n):
    "Milliseconds of each change, and that it is found"
    g,res = finder.gallery,{}
    def timed(name, f):
        start = time.perf_counter()
        f()
        res[name] = (time.perf_counter()-start)*1e3
    x,_ = rows(10**7, 1000)
    timed('add 1,000', lambda: finder.add_embs(x, ['new']*1000, [f'new {i}' for i in range(1000)]))
    timed('rename', lambda: finder.rename('new', 'newer'))
    timed('replace', lambda: g.replace('new 0', x[5:6]))
    timed('remove 10', lambda: finder.remove(item=[f'new {i}' for i in range(10)]))
    hits = g.find(x[20:21], 1)[0]
    assert (hits[0].label,hits[0].item,len(finder))==('newer','new 20',n+990)
    timed('remove the class', lambda: finder.remove('newer'))
    timed('tidy up', lambda: g.table.optimize())
    assert len(finder)==n
    return res

steps = dict(build=build, scan=scan, index=index, search=search, few_lists=few_lists, filtered=filtered, change=change)

def one(name, path, n):
    finder = finder_at(path)
    import lancedb, pyarrow
    rows(0, 10)
    before,start = peak(),time.perf_counter() # after the imports
    res = steps[name](finder, path, n) or {}
    print(json.dumps(dict(step=name, seconds=time.perf_counter()-start, MiB=(res.pop('peak', 0) or peak())-before, **res)))

def main(sizes):
    print('| rows | step | seconds | peak MiB | ms a query | recall@10 |\n|---|---|---|---|---|---|')
    later = []
    for n in sizes:
        with tempfile.TemporaryDirectory() as tmp:
            for name in steps:
                args = [sys.executable, '-W', 'ignore', __file__, name, f'{tmp}/g.lance', str(n)]
                out = subprocess.run(args, capture_output=True, text=True)
                if out.returncode: sys.exit(out.stderr)
                o = json.loads(out.stdout.splitlines()[-1])
                ms,rec = (f'{o[c]:{f}}' if c in o else '' for c,f in (('ms','.1f'),('recall','.3f')))
                print(f"| {n:,} | {name} | {o['seconds']:.1f} | {o['MiB']:.0f} | {ms} | {rec} |", flush=True)
                if name=='change': later.append(f"| {n:,} | "+' | '.join(f'{o[c]:.0f}' for c in changes)+' |')
            size = sum(f.stat().st_size for f in Path(tmp).rglob('*') if f.is_file())
            print(f'| {n:,} | on disk | | {size/2**20:.0f} | | |', flush=True)
    print(f"\n| rows | {' | '.join(changes)} |\n|---|{'---|'*len(changes)}", *later, sep='\n')

changes = 'add 1,000','rename','replace','remove 10','remove the class','tidy up'

if __name__=='__main__':
    os.environ.setdefault('LANCE_LOG', 'error')
    if sys.argv[1] in steps: one(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else: main([int(o) for o in sys.argv[1:]] or [100_000,1_000_000])
