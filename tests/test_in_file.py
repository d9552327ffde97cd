"A gallery in a file is searched and scored in blocks, as it is in memory"
import json, pytest, subprocess, sys, torch
import numpy as np, pandas as pd
from safetensors import safe_open
from dmlfast.retrieval import Embedded, evaluate_retrieval, neighbours, pair_scores, products
from dmlfast.retrieval.search import Rows

EVERY = ['recall','precision@1','r_precision','map@r','map','mrr','pr_curve']

def in_file(x, path, dtype=np.float32):
    m = np.lib.format.open_memmap(path, 'w+', dtype, x.shape)
    m[:] = x
    m.flush()
    return np.load(path, mmap_mode='r')

def in_blocks(monkeypatch, n):
    monkeypatch.setattr(Rows, 'blocks', lambda self: [slice(i, min(i+n, len(self))) for i in range(0, len(self), n)])

def same(a, b):
    assert a.keys()==b.keys()
    for k,v in a.values.items(): np.testing.assert_array_equal(v, b.values[k], k)
    if a.curve is not None: np.testing.assert_array_equal(a.curve, b.curve)

def data(kind, seed=0):
    "Queries, gallery and the classes of both: of random numbers, with copies, of few numbers that tie, of uneven classes"
    rng = np.random.default_rng(seed)
    x,g = (rng.normal(size=(n,6)).astype(np.float32) for n in (43,331))
    y,gy = rng.integers(0, 9, 43),rng.integers(1, 9, 331)
    if kind=='copies': x,g = g[rng.integers(0, 20, 43)],g[rng.integers(0, 20, 331)]
    if kind=='ties': x,g = rng.integers(-1, 2, (43,3)).astype(np.float32),rng.integers(-1, 2, (331,3)).astype(np.float32)
    if kind=='uneven': y,gy = (rng.integers(0, 30, 43)**2//60,rng.integers(0, 30, 331)**2//60)
    if kind=='sorted': gy = np.sort(gy)
    return x,y,g,gy

@pytest.mark.parametrize('block', [7,64,1000])
@pytest.mark.parametrize('metric', ['cosine','dot'])
@pytest.mark.parametrize('kind', ['random','copies','ties','uneven','sorted'])
def test_metrics_are_those_in_memory(kind, metric, block, tmp_path, monkeypatch):
    x,y,g,gy = data(kind)
    file = in_file(g, tmp_path/'g.npy')
    in_blocks(monkeypatch, block)
    for names in (EVERY, ['recall','map@r']):
        same(evaluate_retrieval(x, y, file, gy, names, metric=metric), evaluate_retrieval(x, y, g, gy, names, metric=metric))

@pytest.mark.skipif(not products._onednn(), reason='oneDNN is not there')
@pytest.mark.parametrize('kind', ['random','copies','ties'])
def test_by_onednn_too(kind, tmp_path, monkeypatch):
    x,y,g,gy = data(kind)
    file = in_file(g, tmp_path/'g.npy')
    in_blocks(monkeypatch, 50)
    same(*(evaluate_retrieval(x, y, o, gy, EVERY, backend='onednn') for o in (file,g)))
    for a,b in zip(*(neighbours(x, o, 12, backend='onednn') for o in (file,g))): assert torch.equal(a, b)

@pytest.mark.parametrize('kind', ['random','ties'])
def test_what_a_query_must_not_see(kind, tmp_path, monkeypatch):
    _,_,g,gy = data(kind)
    own,ids = np.arange(0, 331, 5),np.arange(331)//3
    own[::4] = -1
    q = np.arange(0, 331, 5)
    args = dict(self_exclude=own, ignore=(ids[q],ids))
    in_blocks(monkeypatch, 50)
    for kw in ({}, dict(self_exclude=own), args):
        want = evaluate_retrieval(g[q], gy[q], g, gy, EVERY, **kw)
        same(evaluate_retrieval(g[q], gy[q], in_file(g, tmp_path/'g.npy'), gy, EVERY, **kw), want)
        for a,b in zip(neighbours(g[q], tmp_path/'g.npy', 12, **kw), neighbours(g[q], g, 12, **kw)):
            assert torch.allclose(a, b) if a.is_floating_point() else torch.equal(a, b)

@pytest.mark.parametrize('backend', ['torch']+['onednn']*products._onednn())
def test_no_row_is_alone(backend, tmp_path):
    "A block of one row would be rounded otherwise, so that its equal would come first"
    g = torch.randn(2049, 8192, generator=torch.Generator().manual_seed(0)).numpy()
    g[2048] = g[5]
    rows = Rows(in_file(g, tmp_path/'g.npy'))
    assert [(o.start,o.stop) for o in rows.blocks()]==[(0,1024),(1024,2049)]
    assert [o.stop for o in Rows(in_file(g[:1100,:3], tmp_path/'s.npy')).blocks()]==[1100]
    q = g[:40]+.5*g[5]
    a,b = (neighbours(q, o, 9, backend=backend) for o in (tmp_path/'g.npy',g))
    assert torch.equal(a[1], b[1]) and torch.equal(a[0], b[0])

PAIRS = ['eer','auc','fnmr@fmr=1e-2']

@pytest.mark.parametrize('block', [64,1000])
@pytest.mark.parametrize('metric', ['cosine','dot'])
@pytest.mark.parametrize('kind', ['random','uneven'])
def test_pairs_are_those_in_memory(kind, metric, block, tmp_path, monkeypatch):
    "Kept and counted in bins, with intervals; a query sees neither itself nor what it must not see, in whatever block that is"
    x,y,g,gy = data(kind)
    in_blocks(monkeypatch, block)
    file,q = in_file(g, tmp_path/'g.npy'),np.arange(0, 331, 5)
    own = np.where(q%20, q, -1)
    for a,c,kw in ((x,y,{}), (g[q],gy[q],dict(self_exclude=own)), (g[q],gy[q],dict(self_exclude=own, ignore=(q//3,np.arange(331)//3)))):
        for most in (10**6,50):
            got,want = (pair_scores(a, c, o, gy, metric, most=most, block=500, **kw) for o in (file,g))
            assert (len(got.genuine),len(got.impostor))==(len(want.genuine),len(want.impostor))
            pd.testing.assert_frame_equal(got.to_frame(), want.to_frame(), atol=1e-3 if most==50 else 1e-5)
        a,b = (evaluate_retrieval(a, c, o, gy, PAIRS+['recall@1'], metric=metric, **kw) for o in (file,g))
        assert a.keys()==b.keys() and np.allclose([a[k] for k in PAIRS], [b[k] for k in PAIRS], atol=1e-5)

def test_pairs_of_float64_and_of_a_path(tmp_path):
    x,y,g,gy = data('random')
    np.save(tmp_path/'g.npy', g.astype(np.float64))
    want = pair_scores(x, y, g, gy)
    for o in (tmp_path/'g.npy', str(tmp_path/'g.npy'), g): # this one is float32, and the queries are not
        assert evaluate_retrieval(x.astype(np.float64), y, o, gy, ['auc'])['auc']==pytest.approx(want.auc, abs=1e-6)
    with pytest.raises(ValueError, match="by 'cosine' or 'dot', not by 'l2'"): pair_scores(x, y, tmp_path/'g.npy', gy, 'l2')

def test_nothing_is_relevant(tmp_path):
    x,y,g,gy = data('random')
    res = evaluate_retrieval(x, y+100, in_file(g, tmp_path/'g.npy'), gy, EVERY)
    assert not res.used.any()

def test_any_file(tmp_path):
    x,y,g,gy = data('random')
    e = Embedded(x, y)
    want = e.evaluate(EVERY, gallery=g, gallery_labels=gy)
    in_file(g, tmp_path/'g.npy')
    in_file(g, tmp_path/'d.npy', np.float64)
    file = Embedded(g, gy).save(tmp_path/'g.safetensors')
    for o in (tmp_path/'g.npy', str(tmp_path/'d.npy'), file): same(e.evaluate(EVERY, gallery=o, gallery_labels=gy), want)
    with safe_open(file, 'np') as f: same(e.evaluate(EVERY, gallery=f.get_slice('embs'), gallery_labels=gy), want)
    half = in_file(g, tmp_path/'h.npy', np.float16)
    same(e.evaluate(EVERY, gallery=half, gallery_labels=gy), e.evaluate(EVERY, gallery=np.array(half), gallery_labels=gy))

def test_refused(tmp_path):
    x,y,g,gy = data('random')
    def no(match, gallery, **kw):
        with pytest.raises(ValueError, match=match): evaluate_retrieval(x, y, gallery, gy, **kw)
    file = in_file(g, tmp_path/'g.npy')
    no("by 'cosine' or 'dot', not by 'l2'", file, metric='l2')
    no('There is no file', tmp_path/'none.npy')
    no("'.npy' and '.safetensors' files", __file__)
    no('6 columns, gallery has 5', in_file(g[:,:5], tmp_path/'five.npy'))
    g[300,2] = np.nan
    no('not finite: the first that was read is row 300', in_file(g, tmp_path/'nan.npy'))

def test_memory_is_bounded(tmp_path):
    "200,000 × 128 are 98 MiB in a file; what is computed with takes less than half of the 300 MiB that it does in memory"
    code = f'''if True:
        import sys, numpy as np, torch
        from dmlfast.retrieval import evaluate_retrieval
        rng = np.random.default_rng(0)
        x,y = rng.normal(size=(100,128)).astype(np.float32),np.arange(200_000)//20
        evaluate_retrieval(x, y[:100])
        if sys.argv[1]=='write':
            m = np.lib.format.open_memmap({str(tmp_path/'g.npy')!r}, 'w+', np.float32, (200_000,128))
            for i in range(0, 200_000, 10_000): m[i:i+10_000] = rng.normal(size=(10_000,128))
        else:
            g = {str(tmp_path/'g.npy')!r} if sys.argv[1]=='file' else np.load({str(tmp_path/'g.npy')!r})
            def peak(): return int(next(o for o in open('/proc/self/status') if o.startswith('VmHWM')).split()[1])
            before = peak() # `ru_maxrss` would be that of the process which began this one
            res = evaluate_retrieval(x, y[:100], g, y)
            print((peak()-before)/1024, res['map@r'], res['recall@8'])'''
    def run(how): return [float(o) for o in subprocess.run([sys.executable, '-c', code, how], capture_output=True, text=True,
        check=True).stdout.split()]
    run('write')
    a,b = run('file'),run('memory')
    assert a[1:]==b[1:] and a[0]<150<b[0]
