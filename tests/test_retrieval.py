"Search and metrics against a brute-force reference in float64, and against what other libraries get right"
import json, math, re, subprocess, sys, time, warnings
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
import dmlfast.retrieval.search as retrieval
from dmlfast.retrieval import products
from dmlfast.retrieval.results import Contingency, RetrievalResult
from dmlfast.retrieval.metrics import evaluate_random_gallery, evaluate_retrieval
from dmlfast.retrieval.search import Gallery, kmeans, neighbours

KS = (1,2,4,8)
RANKED = ['recall','precision@1','r_precision','map@r','map','mrr']
BACKENDS = ['torch','faiss']+['onednn']*products._onednn() # which is not there on every machine

# ---- the reference: one query at a time, straight from the definitions, in float64 ----
def ref_scores(q, g, metric):
    "Scores of all pairs, each a sum over the columns in one order, so that equal rows have equal scores"
    q,g = (np.asarray(o, np.float64) for o in (q,g))
    if metric=='l2': return np.stack([-np.sqrt(((o-g)**2).sum(1)) for o in q])
    s = np.stack([(o*g).sum(1) for o in q])
    if metric=='dot': return s
    nq,ng = np.sqrt((q**2).sum(1)),np.sqrt((g**2).sum(1))
    return s/np.where(nq==0, 1, nq)[:,None]/np.where(ng==0, 1, ng)

def ref_rankings(q, g, metric='cosine', own=None, ignore=None):
    "For each query its ranking of the gallery as indices, equal scores by index; and the scores"
    s = ref_scores(q, g, metric)
    def rank(i):
        cand = [j for j in range(len(g)) if (own is None or j!=own[i]) and (ignore is None or ignore[0][i]!=ignore[1][j])]
        return sorted(cand, key=lambda j: (-s[i,j], j))
    return [rank(i) for i in range(len(q))],s

def ref_metrics(ranking, rel, ks=KS):
    "Metrics of one query; None if nothing is relevant"
    hits = [int(rel[j]) for j in ranking]
    R = sum(hits)
    if not R: return None
    P = [sum(hits[:j+1])/(j+1) for j in range(len(hits))]
    found = [sum(hits[:j+1])/R for j in range(len(hits))]
    curve = [max(p for p,f in zip(P, found) if f>=l-1e-9) for l in np.linspace(0, 1, 101)]
    res = {f'recall@{k}': float(any(hits[:k])) for k in ks}
    return res | {'precision@1': float(hits[0]), 'r_precision': sum(hits[:R])/R, 'map@r': sum(P[j]*hits[j] for j in range(R))/R,
        'map': sum(p*h for p,h in zip(P, hits))/R, 'mrr': 1/(hits.index(1)+1), 'curve': curve}

def ref_evaluate(q, y, g=None, gy=None, metric='cosine', own=None, ignore=None, ks=KS):
    "Values by metric for each query, nan where nothing is relevant, and the mean curve"
    y = np.asarray(y)
    if g is None: g,gy,own,ignore = q,y,np.arange(len(q)),None if ignore is None else (ignore,ignore)
    rows = [ref_metrics(r, np.asarray(gy)==y[i], ks) for i,r in enumerate(ref_rankings(q, g, metric, own, ignore)[0])]
    names = [f'recall@{k}' for k in ks] + ['precision@1','r_precision','map@r','map','mrr']
    curves = [r['curve'] for r in rows if r is not None]
    return {n: np.array([np.nan if r is None else r[n] for r in rows]) for n in names},np.mean(curves, 0) if curves else None

def check(*args, ks=KS, block=None, own=None, **kw):
    "`evaluate_retrieval` gives what the reference gives, query by query, in the mean and on the curve, the cheap metrics alone or all"
    ref,curve = ref_evaluate(*args, ks=ks, own=own, **kw)
    used = ~np.isnan(ref['mrr'])
    for ms in (None, [*RANKED,'pr_curve']):
        res = evaluate_retrieval(*args, ks=ks, metrics=ms, block=block, self_exclude=own, **kw)
        assert res.n_left_out==(~used).sum()
        for n in res.keys():
            np.testing.assert_allclose(res.values[n], ref[n], atol=1e-6, err_msg=n)
            np.testing.assert_allclose(res[n], ref[n][used].mean() if used.any() else np.nan, atol=1e-7)
    if used.any(): np.testing.assert_allclose(res.curve[1], curve, atol=1e-6)
    else: assert np.isnan(res.curve[1]).all()

def rand(n, d=8, seed=0): return np.random.default_rng(seed).standard_normal((n,d)).astype(np.float32)
def labels(n, c, seed=0): return np.random.default_rng(seed).integers(0, c, n)
def whole(n, d=3, seed=0): return np.random.default_rng(seed).integers(-1, 2, (n,d)).astype(np.float32)
def same(a, b):
    assert a.keys()==b.keys()
    for k in a.keys(): np.testing.assert_array_equal(a.values[k], b.values[k], err_msg=k)

METRICS = ['cosine','l2','dot']

# ---- metrics against the reference ----
@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('n,c', [(60,6), (60,2), (60,1), (50,25), (40,200)])
def test_random(n, c, metric): check(rand(n), labels(n,c), metric=metric)

@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('block', [1,7,None])
def test_duplicates(metric, block):
    "Copies, under right labels and wrong ones, tie and are ordered by index; a query's own copy may be found"
    x = rand(25)[labels(70,25,1)]
    check(x, labels(70,5), metric=metric, block=block)

@pytest.mark.parametrize('block', [1,7,None])
def test_ties(block):
    "Whole numbers: equal products are exactly equal, among equal rows and others"
    check(whole(70), labels(70,5), metric='dot', block=block)
    check(whole(50), labels(50,4), whole(60,seed=1), labels(60,4,1), metric='dot', block=block)

def test_collapsed():
    "All rows equal: the ranking is the order of the indices, and not a perfect score"
    for x in (np.ones((30,4), np.float32), np.zeros((30,4), np.float32)):
        for m in METRICS: check(x, labels(30,3), metric=m)

def test_copies_under_wrong_labels():
    "Every image twice, the second time under another label: nearest is always the copy, which is wrong"
    x,y = rand(40),np.arange(40)//4
    assert evaluate_retrieval(np.concatenate([x,x]), np.concatenate([y,y+10]))['recall@1']==0

@pytest.mark.parametrize('own', [True,False])
def test_singletons_are_left_out(own):
    y = np.concatenate([np.arange(20)//2, 100+np.arange(15)])
    x = rand(35) if own else np.eye(35, dtype=np.float32)[np.minimum(np.arange(35)//2*2, np.arange(35))]
    check(x, y)
    assert evaluate_retrieval(x, y).n_left_out==15

def test_nothing_relevant():
    res = evaluate_retrieval(rand(12), np.arange(12), metrics=[*RANKED,'pr_curve'])
    assert res.n_left_out==12 and all(np.isnan(res[k]) for k in res.keys())
    assert json.loads(res.to_json())['metrics']['map']['mean'] is None

@pytest.mark.parametrize('n', [1,2,3])
@pytest.mark.parametrize('y', [[0,0,0],[0,0,1],[0,1,2]])
def test_tiny(n, y): check(rand(n), np.array(y[:n]))

def test_separate_sets_with_absent_classes():
    check(rand(40), labels(40,9), rand(55, seed=1), labels(55,6,1))
    assert evaluate_retrieval(rand(40), labels(40,9), rand(55, seed=1), labels(55,6,1)).n_left_out==(labels(40,9)>5).sum()

def test_no_class_in_common(): check(rand(9), labels(9,3), rand(7, seed=1), 5+labels(7,3,1))

def test_one_item_in_the_gallery(): check(rand(5), np.array([0,0,1,1,0]), rand(1, seed=1), np.array([1]))

def test_uneven_classes():
    y = np.repeat(np.arange(6), [1,2,3,10,40,90])
    for b in (1,7,None): check(rand(len(y)), y[np.random.default_rng(0).permutation(len(y))], block=b)

def test_k_beyond_the_gallery(): check(rand(20), labels(20,4), ks=(1,10,100,1000))

def test_queries_within_the_gallery():
    "Some items of a set as queries to the whole of it, -1 where a query is not there"
    x,y,own = rand(60),labels(60,6),np.random.default_rng(1).permutation(60)[:25]
    check(x[own], y[own], x, y, own=own)
    a,b = evaluate_retrieval(x[own], y[own], x, y, self_exclude=own),evaluate_retrieval(x[own], y[own], x, y, self_exclude=list(own))
    same(a, b)
    own = np.where(np.arange(25)<10, own, -1)
    check(x[:25], y[:25], x, y, own=own)

@pytest.mark.parametrize('block', [1,7,None])
def test_ignore(block):
    x,y,cam = rand(60),labels(60,6),labels(60,4,3)
    check(x, y, ignore=cam, block=block)
    check(x, y, x[::-1].copy(), y[::-1].copy(), ignore=(cam,labels(60,4,5)), block=block)
    check(whole(60), y, ignore=cam, metric='dot', block=block)
    assert evaluate_retrieval(x, y, ignore=np.zeros(60, int)).n_left_out==60

@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_labels(data):
    n = data.draw(st.integers(1, 24))
    y = data.draw(arrays(np.int64, n, elements=st.sampled_from([0,1,2,3,-5,2**24,2**24+1,2**62,-2**63])))
    x = whole(n) if data.draw(st.booleans()) else rand(n)
    check(x, y, metric='dot', block=data.draw(st.sampled_from([1,2,7,None])))

# ---- labels ----
def test_label_ids_are_exact():
    "16777216 to 16777219 are four classes, though float32 knows three of them; so are negative and huge ids"
    x,y = rand(80),labels(80,4)
    for ids in (np.arange(2**24, 2**24+4), np.array([-2**63,-1,2**62,2**62+1])):
        same(evaluate_retrieval(x, ids[y]), evaluate_retrieval(x, y))

@pytest.mark.parametrize('f', [list, torch.as_tensor, lambda y: torch.as_tensor(y).to(torch.uint8), lambda y: np.asarray(y, np.int16)])
def test_label_types(f): same(evaluate_retrieval(rand(30), f(labels(30,3))), evaluate_retrieval(rand(30), labels(30,3)))

@pytest.mark.parametrize('y', [np.zeros(30), np.zeros(29, int), np.zeros((30,1), int), ['a']*30, np.array(3), None])
def test_bad_labels(y):
    with pytest.raises(ValueError, match='labels'): evaluate_retrieval(rand(30), y)

# ---- embeddings ----
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('rows', [[0],[3,17],range(30)])
def test_not_finite(bad, rows):
    x = rand(30)
    x[list(rows),5] = bad
    y = labels(30,3)
    for f in (lambda: evaluate_retrieval(x, y), lambda: evaluate_retrieval(rand(30), y, x, y), lambda: neighbours(x), lambda: kmeans(x, 2)):
        with pytest.raises(ValueError, match=f'{len(rows)} of 30 rows.*not finite: rows {rows[0]}'): f()

@pytest.mark.parametrize('x', [np.zeros((0,8)), np.zeros((8,0)), np.zeros(8), np.zeros((2,3,4)), 'abc', [[1.,2.],[3.]]])
def test_bad_embeddings(x):
    with pytest.raises(ValueError, match='embs must be'): evaluate_retrieval(x, [])
    with pytest.raises(ValueError, match='query must be'): neighbours(x)

def test_bad_arguments():
    x,y = rand(20),labels(20,3)
    for kw,msg in [
        (dict(metric='cosin'),'metric must be'), (dict(metrics=['map','recal']),"There is no metric 'recal'; the nearest is "
        "'recall'."), (dict(metrics=['MAP@R']),"nearest is 'map@r'"), (dict(metrics=[42]),'no metric 42; there are recall, recall@k, '),
        (dict(metrics=['recall@0']),"no metric 'recall@0'"), (dict(ks=[0]),'ks must be'), (dict(ks=[1.5]),'ks must be'),
        (dict(ks=2.5),'ks must be'), (dict(ks='5'),'ks must be'),
        (dict(ks=[np.nan]),'ks must be'), (dict(ks=np.inf),'ks must be'), (dict(ks=['x']),'ks must be'),
        (dict(gallery=x),'come together'), (dict(gallery_labels=y),'come together'), (dict(ignore=y[:-1]),'ignore'),
        (dict(gallery=rand(20,9), gallery_labels=y),'8 columns, gallery has 9'), (dict(gallery=x, gallery_labels=y[:-1]),'gallery_labels'),
        (dict(gallery=x, gallery_labels=y, self_exclude=np.full(20,20)),'index of 20'),
        (dict(ci='images'),'ci must be'), (dict(block=-1),'block must be')]:
        with pytest.raises(ValueError, match=msg): evaluate_retrieval(x, y, **kw)
    for kw,msg in [(dict(k=0),'between 1 and 19'), (dict(k=20),'between 1 and 19'), (dict(k=2.5),'a whole number'),
        (dict(k='2'),'a whole number'), (dict(backend='annoy'),'backend must be'),
        (dict(gallery=x[:9], self_exclude=True),'20 and 9')]:
        with pytest.raises(ValueError, match=msg): neighbours(x, **kw)
    with pytest.raises(ValueError, match='a whole number'): kmeans(x, 2.5)

def test_one_k():
    "A number of `ks` is one of them; those of NumPy are numbers too"
    x,y = rand(20),labels(20,3)
    want = evaluate_retrieval(x, y, metrics='recall', ks=(5,))
    for k in (5, 5., np.int64(5)):
        got = evaluate_retrieval(x, y, metrics='recall', ks=k)
        assert list(got.values)==['recall@5'] and (got.values['recall@5']==want.values['recall@5']).all()
    for a,b in zip(neighbours(x, k=np.int64(3)), neighbours(x, k=3)): assert (a==b).all()

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_float_types(dtype):
    "Half precision is computed with in float32: the answer is that of the same numbers in float32"
    x,y = torch.tensor(rand(60)).to(dtype),labels(60,6)
    for m in METRICS: same(evaluate_retrieval(x, y, metric=m), evaluate_retrieval(x.float(), y, metric=m))
    assert neighbours(x)[0].dtype==torch.float32

@pytest.mark.parametrize('scale', [1e-30,1e-3,1e3,1e30,5e37])
def test_any_scale(scale):
    for m in METRICS: check(rand(50)*np.float32(scale), labels(50,5), metric=m)

def test_rows_of_any_length(): check(rand(50)*np.logspace(-18, 18, 50, dtype=np.float32)[:,None], labels(50,5))

def test_equal_distances_are_exactly_equal():
    "Whole numbers and codes of 0 and 1, wherever their mean is: as by a stable sort of float64"
    assert neighbours(torch.tensor([[0.]]), torch.tensor([[1.],[-1.],[5.]]), k=2, metric='l2')[1].tolist()==[[0,1]]
    rng = np.random.default_rng(0)
    for x in ((rng.random((300,8))<.3), rng.integers(0, 256, (300,4)), 7+rng.integers(0, 3, (300,5))):
        x = x.astype(np.float64)
        d = np.sqrt(((x[:,None]-x)**2).sum(2))
        np.fill_diagonal(d, np.inf)
        s,i = neighbours(torch.tensor(x), k=20, metric='l2')
        np.testing.assert_array_equal(i, np.argsort(d, axis=1, kind='stable')[:,:20])
        np.testing.assert_allclose(-s, np.take_along_axis(d, i.numpy(), 1), rtol=1e-5)

def test_a_row_far_away_spoils_no_other():
    "A query of zeros beside others that are far from the origin, and an item of zeros among many"
    rng = torch.manual_seed(0)
    g,q = torch.rand(500, 64, generator=rng)+1e5,torch.rand(20, 64, generator=rng)+1e5
    want = (q.double()[:,None]-g.double()).norm(dim=2).argsort(dim=1, stable=True)[:,:5]
    assert torch.equal(neighbours(torch.cat([q, torch.zeros(1, 64)]), g, k=5, metric='l2')[1][:20], want)
    x = torch.rand(5000, 8, generator=rng)+1e5
    x[0] = 0
    assert torch.equal(neighbours(x, k=1, metric='l2', self_exclude=False)[1][:,0], torch.arange(5000))

def test_l2_far_from_the_origin():
    "Without centring, float32 has no digits left for these distances"
    x = rand(60)+np.float32(3000)
    check(x, labels(60,6), metric='l2')
    d,i = neighbours(x, k=5, metric='l2')
    ref,s = ref_rankings(x, x, 'l2', own=np.arange(60))
    np.testing.assert_array_equal(i, [r[:5] for r in ref])
    np.testing.assert_allclose(d, np.take_along_axis(s, i.numpy(), 1), rtol=1e-4)

def test_process_settings_do_not_matter_and_are_left_alone(monkeypatch):
    "A training loop may have chosen fast products and autocast; metrics are computed in float32"
    x,prec,seen,mm = torch.tensor(rand(60), requires_grad=True),torch.get_float32_matmul_precision(),[],torch.mm
    monkeypatch.setattr(torch, 'mm', lambda *a, **k: seen.append(torch.get_float32_matmul_precision()) or mm(*a, **k))
    try:
        torch.set_float32_matmul_precision('medium')
        with torch.autocast('cpu', dtype=torch.bfloat16): a = evaluate_retrieval(x, labels(60,6), metrics=RANKED)
        assert torch.get_float32_matmul_precision()=='medium' and seen and set(seen)=={'highest'}
    finally: torch.set_float32_matmul_precision(prec)
    same(a, evaluate_retrieval(x.detach(), labels(60,6), metrics=RANKED))

# ---- whose product ----
needs_onednn = pytest.mark.skipif('onednn' not in BACKENDS, reason='oneDNN is not there')

@pytest.fixture
def unprobed():
    cached = products._onednn,products.fastest_product
    for o in cached: o.cache_clear()
    yield
    for o in cached: o.cache_clear()

@needs_onednn
@pytest.mark.parametrize('metric', ['cosine','l2','dot'])
def test_metrics_by_either_product(metric):
    "Whole numbers are multiplied without rounding, so that both give the same to the bit; and of others nothing but rounding differs"
    x,y,full = whole(150)/8,labels(150,9),RANKED+['pr_curve']
    a,b = (evaluate_retrieval(x, y, metrics=full, metric=metric, backend=o, block=37) for o in ('torch','onednn'))
    if metric!='cosine': same(a, b)
    assert (a.settings['product'],b.settings['product'])==('torch','onednn')
    x = torch.randn(150, 40, generator=torch.Generator().manual_seed(1))
    same(*(evaluate_retrieval(x, y, metrics=full, metric=metric, backend=o, block=37) for o in ('torch','onednn')))

@needs_onednn
@pytest.mark.parametrize('d', [1,2,15,16,33,128,200,512,1100])
def test_the_product_of_two_rows_does_not_depend_on_others(d):
    "Nor on where they stand, or the order of equal items and the results of blocks would"
    x = torch.randn(700, d, generator=torch.Generator().manual_seed(d))
    u = products.multiply('onednn', x, x)
    torch.testing.assert_close(u.double(), x.double()@x.double().T, atol=1e-5*d, rtol=1e-5)
    assert torch.equal(u, u.T)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    for n in (2,3,5,16,31,64,333):
        for m in (2,17,100,699): assert torch.equal(products.multiply('onednn', x[5:5+n], x[order[:m]]), u[5:5+n,order[:m]])

@pytest.mark.parametrize('slow,want', [('torch','onednn'),('onednn','torch')])
def test_the_faster_product_is_found_out_once(slow, want, monkeypatch, unprobed):
    if 'onednn' not in BACKENDS: want = 'torch'
    mm,seen = torch.mm,[]
    def _multiply(product, q, g, *args):
        seen.append(product)
        if product==slow: time.sleep(.02)
        return mm(q, g.T)
    monkeypatch.setattr(products, 'multiply', _multiply)
    monkeypatch.setattr(products, '_onednn', lambda: 'onednn' in BACKENDS)
    cpu,state = torch.device('cpu'),torch.get_rng_state()
    assert products.product_of('auto', 2**30-1, cpu)=='torch' and not seen # little to multiply is not worth it
    assert products.product_of('auto', 2**30, cpu)==want
    n = len(seen)
    assert products.product_of('auto', 2**40, cpu)==want and len(seen)==n and torch.equal(torch.get_rng_state(), state)
    assert products.product_of('torch', 2**40, cpu)==products.product_of('auto', 2**40, torch.device('cuda'))=='torch'

@pytest.mark.parametrize('why', ['missing','uneven'])
def test_a_product_that_cannot_be_used(why, monkeypatch, unprobed):
    def _multiply(product, q, g, *args):
        if why=='missing': raise RuntimeError('no such kernel')
        return q@g.T+torch.arange(len(q))[:,None]*1e-6 # by where a row stands
    monkeypatch.setattr(products, 'multiply', _multiply)
    assert products.fastest_product()=='torch'
    with pytest.raises(ValueError, match="no oneDNN for this processor: take backend='auto' or 'torch'"):
        neighbours(rand(9), backend='onednn')

def test_both_choose_by_the_whole_of_the_work(monkeypatch, tmp_path):
    "Metrics say whose product it was; a gallery in a file takes the one that it would take in memory"
    monkeypatch.setattr(products, 'fastest_product', lambda: 'onednn' if 'onednn' in BACKENDS else 'torch')
    x,y = torch.randn(1100, 512, generator=torch.Generator().manual_seed(0)),labels(1100,100)
    np.save(tmp_path/'g.npy', x[:1000].numpy())
    for n in (1100,1000): # 1,100 x 1,000 x 512 are more than 2**29, and are called many here
        monkeypatch.setattr(products, '_much', n*1000*512)
        for q in (1100,1000):
            a,b = (evaluate_retrieval(x[:q], y[:q], g, y[:1000], backend='auto') for g in (x[:1000],tmp_path/'g.npy'))
            same(a, b)
            assert a.settings['product']==b.settings['product']==(BACKENDS[-1] if q>=n and BACKENDS[-1]=='onednn' else 'torch')

@needs_onednn
def test_onednn_multiplies_in_float32_whatever_training_has_chosen():
    x,prec = torch.tensor(rand(60), requires_grad=True),torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('medium')
        with torch.autocast('cpu', dtype=torch.bfloat16): v,i = neighbours(x, k=9, backend='onednn')
    finally: torch.set_float32_matmul_precision(prec)
    ref,s = ref_rankings(x.detach(), x.detach(), own=np.arange(60))
    np.testing.assert_array_equal(i, [r[:9] for r in ref])
    np.testing.assert_allclose(v, np.take_along_axis(s, i.numpy(), 1), atol=1e-6)

def test_inputs_are_not_written_to():
    x,y = rand(40),labels(40,4)
    x0,y0 = x.copy(),y.copy()
    for m in METRICS: evaluate_retrieval(x, y, metric=m, metrics='all'); neighbours(x, k=3, metric=m)
    np.testing.assert_array_equal(x, x0); np.testing.assert_array_equal(y, y0)

# ---- what must not matter ----
def test_block_and_threads_do_not_matter():
    x,y = rand(25)[labels(90,25,1)],labels(90,5)
    a = evaluate_retrieval(x, y, metrics=RANKED)
    for b in (1,7,90,1000): same(a, evaluate_retrieval(x, y, metrics=RANKED, block=b))
    n = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if n==1 else 1)
        same(a, evaluate_retrieval(x, y, metrics=RANKED))
    finally: torch.set_num_threads(n)

def test_many_rows_in_threads():
    "Enough scores that rows are sorted in threads"
    x,y,n = rand(700, 32),labels(700,20),torch.get_num_threads()
    res = []
    try:
        for t in (1,2):
            torch.set_num_threads(t)
            res.append(evaluate_retrieval(x, y, metrics=RANKED))
    finally: torch.set_num_threads(n)
    same(*res)

def test_order_of_items_does_not_matter():
    x,y,p = rand(80),labels(80,8),np.random.default_rng(4).permutation(80)
    a,b = evaluate_retrieval(x, y, metrics=RANKED),evaluate_retrieval(x[p], y[p], metrics=RANKED)
    for k in a.keys(): np.testing.assert_allclose(a.values[k][p], b.values[k], atol=1e-9)

def test_rotation_does_not_matter():
    x,y,r = rand(80),labels(80,8),np.linalg.qr(rand(8,8,9).astype(np.float64))[0]
    a,b = evaluate_retrieval(x, y, metrics=RANKED),evaluate_retrieval(x@r, y, metrics=RANKED)
    for k in a.keys(): np.testing.assert_allclose(a[k], b[k], atol=1e-6)

def test_metrics_alone_or_together():
    x,y = whole(60),labels(60,5)
    a = evaluate_retrieval(x, y, metrics=RANKED, metric='dot')
    for m in ('recall@2','precision@1','r_precision','map@r','map','mrr'):
        np.testing.assert_array_equal(a.values[m], evaluate_retrieval(x, y, metrics=m, metric='dot').values[m])

# ---- search ----
@pytest.mark.parametrize('backend', BACKENDS+['auto'])
@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('data', ['random','duplicates','separate'])
def test_neighbours(backend, metric, data):
    x = rand(25)[labels(70,25,1)] if data=='duplicates' else rand(70)
    g = rand(50, seed=1) if data=='separate' else None
    ref,s = ref_rankings(x, x if g is None else g, metric, np.arange(70) if g is None else None)
    for k in (1,4,20):
        v,i = neighbours(x, g, k, metric, backend=backend)
        assert v.dtype==torch.float32 and i.dtype==torch.int64 and v.shape==i.shape==(70,k)
        np.testing.assert_array_equal(i, [r[:k] for r in ref])
        np.testing.assert_allclose(v, np.take_along_axis(s, i.numpy(), 1), atol=2e-3 if metric=='l2' else 1e-5)

@pytest.mark.parametrize('backend', BACKENDS)
def test_neighbours_do_not_see_what_is_to_be_ignored(backend):
    "Among themselves and in a gallery, against the ranking from the definition; where too little is left, the score says so"
    rng = np.random.default_rng(0)
    x,g = rng.normal(size=(30,4)).astype(np.float32),rng.normal(size=(25,4)).astype(np.float32)
    a,b = rng.integers(3, size=30),rng.integers(3, size=25)
    for kw,ref in ((dict(ignore=a),ref_rankings(x, x, own=np.arange(30), ignore=(a,a))),
        (dict(gallery=g, ignore=(a,b)),ref_rankings(x, g, ignore=(a,b)))):
        v,i = neighbours(x, k=20, backend=backend, block=7, **kw)
        for row,score,want in zip(i.tolist(), v, ref[0] if isinstance(ref, tuple) else ref):
            n = min(20, len(want))
            assert row[:n]==list(want[:n]) and score[:n].isfinite().all() and (score[n:]==-torch.inf).all()
    with pytest.raises(ValueError, match='ignore'): neighbours(x, ignore=a[:3])

@pytest.mark.parametrize('backend', BACKENDS)
def test_neighbours_that_tie(backend):
    x = whole(80)
    ref,_ = ref_rankings(x, x, 'dot', np.arange(80))
    for k in (1,3,10,79): np.testing.assert_array_equal(neighbours(x, k=k, metric='dot', backend=backend)[1], [r[:k] for r in ref])
    one = np.ones((12,3), np.float32)
    np.testing.assert_array_equal(neighbours(one, k=11, backend=backend)[1], [[j for j in range(12) if j!=i] for i in range(12)])

@pytest.mark.parametrize('block', [1,7,None])
def test_neighbours_blocks(block):
    x = rand(25)[labels(70,25,1)]
    for a,b in zip(neighbours(x, k=6, block=block), neighbours(x, k=6)): torch.testing.assert_close(a, b)

def test_copies_tie_at_every_place_of_a_block():
    "A product may round a row differently at the edge of a block; copies all over a gallery tie all the same"
    x = rand(1001, 67)
    x[::10] = x[500]
    v,i = neighbours(x[:40], x, k=101, metric='dot', self_exclude=False)
    at = (i%10==0)
    for r in range(40):
        if at[r].any(): assert len(v[r][at[r]].unique())==1 and (i[r][at[r]].diff()>0).all()

@pytest.mark.parametrize('backend', BACKENDS)
def test_a_cosine_is_at_most_1(backend):
    "Also where rounding says otherwise; the order and the ties are those of what was computed, and `dot` stays as it is"
    x = torch.from_numpy(rand(300, 96))
    x[250:] = x[:50]
    unit = x/x.norm(dim=1, keepdim=True)
    assert (unit*unit).sum(1).max()>1
    plain = neighbours(unit, unit, 300, 'dot', self_exclude=False, backend=backend)
    assert plain[0].max()>1
    for v,i in (neighbours(x, x, 300, self_exclude=False, backend=backend),
        neighbours(x, Gallery(x), 300, self_exclude=False, backend=backend)):
        assert v.max()==1 and (v[:,0]>1-1e-6).all() and (v[:,1:]<=v[:,:-1]).all()
        assert (i[:250,0]==torch.arange(250)).all() and (i[250:,0]==torch.arange(50)).all() and (i[:50,1]==torch.arange(250,300)).all()
    v,_ = neighbours(x, -x, 300, self_exclude=False, backend=backend)
    assert v.min()==-1 and neighbours(x[:2], x[:2], 1, ignore=([0,1],[0,0]), self_exclude=False, backend=backend)[0][0]==-torch.inf

def test_exclusion_is_by_index():
    x = rand(20)
    assert (neighbours(x, x, self_exclude=False)[1][:,0]==torch.arange(20)).all()
    assert (neighbours(x, x, self_exclude=True)[1]==neighbours(x)[1]).all()
    assert (neighbours(x[5:9], x, self_exclude=[5,6,7,8])[1]==neighbours(x)[1][5:9]).all()

# ---- without faiss ----
def test_without_faiss(monkeypatch):
    "The absence is said once, and the answers are the same"
    x = np.repeat(rand(10, 8, 3)*4, 12, 0)+rand(120)
    y = np.arange(120)//12
    a,ka = neighbours(x, k=5, backend='faiss'),evaluate_retrieval(x, y, metrics=['nmi','ami','f1'])
    monkeypatch.setitem(sys.modules, 'faiss', None)
    retrieval._faiss.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            b,kb = neighbours(x, k=5, backend='faiss'),evaluate_retrieval(x, y, metrics=['nmi','ami','f1'])
        assert [str(o.message) for o in w if 'faiss is not installed' in str(o.message)].__len__()==1
    finally: retrieval._faiss.cache_clear()
    for o,p in zip(a, b): torch.testing.assert_close(o, p)
    for m in ka.keys(): np.testing.assert_allclose(ka[m], kb[m], atol=1e-9)

def test_import_is_light():
    "No fastai, faiss, scikit-learn, scipy or pandas until they are needed"
    heavy = ('fastai','faiss','sklearn','scipy','pandas','matplotlib','timm')
    code = f'import sys, dmlfast.retrieval.metrics; print([m for m in {heavy} if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()=='[]'

# ---- clusterings ----
def ref_f1(y, z):
    y,z,off = np.asarray(y),np.asarray(z),~np.eye(len(y), dtype=bool)
    a,b = (y[:,None]==y)&off,(z[:,None]==z)&off
    return 2*(a&b).sum()/(a.sum()+b.sum()) if a.sum()+b.sum() else 1.

@pytest.mark.parametrize('n,c,k', [(200,10,10), (200,10,3), (50,50,50), (50,1,1), (30,1,4), (30,7,1), (3,2,1), (1,1,1)])
def test_cluster_scores(n, c, k):
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
    rng = np.random.default_rng(n+c+k)
    y = rng.integers(0, c, n)
    z = np.where(rng.random(n)<.6, y%k, rng.integers(0, k, n))
    s = Contingency(y, z).scores()
    np.testing.assert_allclose(s['nmi'], normalized_mutual_info_score(y, z), atol=1e-9)
    np.testing.assert_allclose(s['ami'], adjusted_mutual_info_score(y, z), atol=1e-9)
    np.testing.assert_allclose(s['f1'], ref_f1(y, z), atol=1e-9)

def test_cluster_scores_of_weighted_classes():
    "Weight 0 leaves a class out, weight 2 doubles its items"
    y,z = labels(90,6),labels(90,5,1)
    c = Contingency(y, z)
    w = np.array([[0,1,2,1,0,2],[1,1,1,1,1,1]])
    for i in range(2):
        at = np.concatenate([np.flatnonzero(y==o) for o in range(6) for _ in range(w[i,o])])
        for k,v in Contingency(y[at], z[at]).scores().items(): np.testing.assert_allclose(c.scores(w)[k][i], v, atol=1e-9)

def test_kmeans_is_seeded_and_scored():
    from sklearn.metrics import normalized_mutual_info_score
    x,y = rand(10, 8, 3)[np.arange(200)%10]*5+rand(200),np.arange(200)%10
    np.testing.assert_array_equal(kmeans(x, 10, seed=1), kmeans(x, 10, seed=1))
    r = evaluate_retrieval(x, y, metrics=['nmi','f1'], metric='l2', seed=1)
    np.testing.assert_allclose(r['nmi'], normalized_mutual_info_score(y, kmeans(x, 10, seed=1)), atol=1e-9)
    np.testing.assert_allclose(r['f1'], ref_f1(y, kmeans(x, 10, seed=1)), atol=1e-9)

def test_perfect_clusters_stay_perfect():
    y = np.arange(60)//4
    r = RetrievalResult({}, y, dict.fromkeys(('nmi','ami','f1'), Contingency(y, 7*y)), n_boot=50)
    for k in r.keys(): np.testing.assert_allclose([r[k],*r.interval(k)], 1, atol=1e-9)

def test_cluster_samples_are_about_the_score():
    "Drawing classes again raises f1 by itself; what is used is the spread"
    x,y = noisy(30, 8, 1.)
    r = evaluate_retrieval(x, y, metrics=['nmi','ami','f1'], n_boot=200)
    raw = r.whole['f1'].scores(np.random.default_rng(0).multinomial(30, np.ones(30)/30, 200).astype(float))
    assert raw['f1'].mean()>r['f1']+raw['f1'].std()
    for k in r.keys():
        np.testing.assert_allclose(r.boot(k).mean(), r[k], atol=1e-6)
        np.testing.assert_allclose(r.boot(k).std(), raw[k].std(), rtol=.25)

# ---- intervals and differences ----
def noisy(n_classes=30, per=8, noise=1.5, seed=0):
    y = np.arange(n_classes).repeat(per)
    return rand(n_classes,16,seed)[y]+noise*rand(n_classes*per,16,seed+1),y

def test_interval_is_a_bootstrap_over_classes():
    x,y = noisy()
    r = evaluate_retrieval(x, y, metrics=['map@r'], n_boot=4000)
    rng,v = np.random.default_rng(5),r.values['map@r']
    boots = [np.concatenate([v[y==c] for c in rng.integers(30, size=30)]).mean() for _ in range(2000)]
    np.testing.assert_allclose(r.interval('map@r'), np.percentile(boots, [2.5,97.5]), atol=.01)

def test_interval_of_unequal_classes():
    "The mean of a sample is over its queries, so large classes weigh more"
    r = RetrievalResult({'mrr':np.repeat([0.,1.], [100,10])}, np.r_[np.repeat(0,100), np.arange(1,11)], n_boot=2000)
    rng = np.random.default_rng(1)
    cs = rng.integers(11, size=(20000,11))
    ref = (cs>0).sum(1)/((cs>0).sum(1)+100*(cs==0).sum(1))
    np.testing.assert_allclose(r.interval('mrr'), np.percentile(ref, [2.5,97.5]), atol=.03)

def test_interval_over_queries_is_narrower():
    x,y = noisy()
    a,b = (evaluate_retrieval(x, y, metrics='map@r', ci=c).interval('map@r') for c in ('classes','queries'))
    assert np.diff(a)>np.diff(b)

def test_intervals_repeat_and_follow_the_seed():
    x,y = noisy()
    f = lambda s: evaluate_retrieval(x, y, metrics='map', seed=s).interval('map')
    assert f(0)==f(0)!=f(1)

def test_few_classes_have_no_interval():
    x,y = noisy(9)
    r = evaluate_retrieval(x, y, metrics=['map','nmi'])
    for k in ('map','nmi'):
        assert r.interval(k) is None and 'no interval: 9 classes' in r.why_no_interval(k)
        assert r.why_no_interval(k) in repr(r)
    assert r.to_dict()['intervals']['none'] and r.to_dict()['metrics']['map']['low'] is None
    assert evaluate_retrieval(*noisy(10), metrics='map').interval('map')

def test_classes_without_a_value_are_not_drawn():
    x,y = noisy(12)
    y = np.where(np.arange(len(y))<8*4, 1000+np.arange(len(y)), y)
    r = evaluate_retrieval(x, y, metrics='map')
    assert r.n_left_out==32 and '8 classes' in r.why_no_interval('map')

def test_macro_and_per_class():
    y = np.repeat([3,5], [6,2])
    r = evaluate_retrieval(rand(8), y, metrics='map')
    v = r.values['map']
    np.testing.assert_allclose(r.macro('map'), (v[:6].mean()+v[6:].mean())/2)
    assert r.per_class('map')=={3:pytest.approx(v[:6].mean()), 5:pytest.approx(v[6:].mean())}
    with pytest.raises(KeyError, match="'mrr' was not measured: there are map"): r.per_class('mrr')
    with pytest.raises(ValueError, match="'pr_curve' is the mean curve of all queries"):
        evaluate_retrieval(rand(8), y, metrics=['map','pr_curve']).per_class('pr_curve')
    with pytest.raises(ValueError, match="'nmi' is a score of the whole set"):
        evaluate_retrieval(rand(8), y, metrics=['map','nmi']).per_class('nmi')

def test_difference_is_paired():
    x,y = noisy()
    a,b = evaluate_retrieval(x, y, metrics='all', n_boot=300),evaluate_retrieval(x+.2*rand(240,16,9), y, metrics='all', n_boot=300)
    d = a-b
    assert d.keys()==a.keys()
    for k in d.keys():
        assert d[k]==a[k]-b[k]
        np.testing.assert_allclose(d.interval(k), np.percentile(a.boot(k)-b.boot(k), [2.5,97.5]))
    assert np.ptp(d.interval('map@r'))<np.ptp(a.interval('map@r'))
    assert (a-a).interval('map')==(0,0)
    assert json.loads(d.to_json())['metrics']['map']['difference']==pytest.approx(d['map'])

def test_difference_needs_the_same_queries():
    x,y = noisy()
    a = evaluate_retrieval(x, y)
    with pytest.raises(ValueError, match='not of the same queries'): a-evaluate_retrieval(x, y[::-1].copy())
    with pytest.raises(ValueError, match='seed'): a-evaluate_retrieval(x, y, seed=1)
    with pytest.raises(ValueError, match='in common'): a-evaluate_retrieval(x, y, metrics='mrr')

def test_result_says_how_it_was_obtained():
    x,y = noisy()
    r = evaluate_retrieval(x, y, metrics='all', metric='l2', n_boot=50)
    d = json.loads(r.to_json())
    assert d==r.to_dict()
    assert (d['similarity'],d['n_queries'],d['n_left_out'],d['n_classes'])==('l2',240,0,30)
    assert (d['intervals']['over'],d['intervals']['n_boot'])==('classes',50)
    assert len(d['pr_curve']['recall'])==len(d['pr_curve']['precision'])==101
    assert list(d['metrics'])==r.keys()==[*(f'recall@{k}' for k in KS),'r_precision','map@r','map','mrr','nmi','ami','f1']
    for k in r.keys():
        assert f'<th>{k}</th><td>{r[k]:.4f}</td>' in re.sub(r'\s', '', r._repr_html_()) and k in repr(r)
        assert 'loss' not in k and 'error' not in k
    with pytest.raises(KeyError, match='was not measured'): r['recall@3']

def test_a_result_as_a_data_frame():
    "The numbers of `to_dict`, nan for null; its text has them with four digits, and nothing for nan"
    x,y = noisy(12)
    r = evaluate_retrieval(x, y, metrics=['map','nmi'], n_boot=50)
    for res,name,key in ((r,'mean','mean'), (r-r,'difference','difference')):
        df,d = res.to_frame(),res.to_dict()['metrics']
        assert list(df.columns)==[name,'macro','2.5 %','97.5 %'] and list(df.index)==['map','nmi']
        for k,o in d.items():
            np.testing.assert_array_equal(df.loc[k], [np.nan if o[i] is None else o[i] for i in (key,'macro','low','high')])
    line = next(o for o in repr(r).splitlines() if o.startswith('nmi'))
    assert line.split()==['nmi',*(f'{o:.4f}' for o in (r['nmi'],*r.interval('nmi')))] and r.why_no_interval('map') is None
    assert repr(evaluate_retrieval(x, y, metrics='pr_curve')).splitlines()[0]==f'{len(x)} queries' # a curve has no row

def test_what_counts_classes_where_no_query_has_a_value():
    assert evaluate_retrieval(rand(30), labels(30,3), metrics=['nmi']).to_dict()['n_classes']==3
    with pytest.raises(ValueError, match='1 or more; got 0'): evaluate_retrieval(rand(30), labels(30,3), n_boot=0)

# ---- a random gallery ----
def test_random_gallery():
    x,y = noisy(20, 5)
    r = evaluate_random_gallery(x, y, repeats=4, ks=(1,5), metrics=['recall','map','pr_curve'], seed=3)
    assert len(r.labels)==4*80 and r.settings['repeats']==4 and r.settings['n_gallery']==20
    parts = []
    for items in r.items.reshape(4,80):
        g = np.setdiff1d(np.arange(100), items)
        np.testing.assert_array_equal(np.sort(y[g]), np.arange(20))
        parts.append(ref_evaluate(x[items], y[items], x[g], y[g], ks=(1,5))[0])
    for k in r.keys(): np.testing.assert_allclose(r.values[k], np.concatenate([p[k] for p in parts]), atol=1e-7)
    assert len({tuple(i) for i in r.items.reshape(4,80)})==4
    same(r, evaluate_random_gallery(x, y, repeats=4, ks=(1,5), metrics=['recall','map','pr_curve'], seed=3))

def test_random_gallery_intervals_over_queries_draw_items():
    "An item that is a query four times is one item"
    x,y = noisy(20, 5)
    r = evaluate_random_gallery(x, y, repeats=8, metrics='mrr', ci='queries')
    alone = RetrievalResult(r.values, r.labels, ci='queries')
    assert np.ptp(r.interval('mrr'))>1.5*np.ptp(alone.interval('mrr'))

def test_random_gallery_refusals():
    x,y = noisy(12, 4)
    with pytest.raises(ValueError, match='no gallery'): evaluate_random_gallery(x, y, metrics=['map','nmi'])
    for n in (0,-1,1.5):
        with pytest.raises(ValueError, match=f'repeats is how often a gallery is drawn, 1 or more, not {n}'):
            evaluate_random_gallery(x, y, repeats=n)
    with pytest.raises(ValueError, match='one item only'): evaluate_random_gallery(x, np.arange(48))
    r = evaluate_random_gallery(x, y, repeats=2, ignore=np.arange(48)//2)
    assert 0<r.n_left_out<72

# ---- other libraries, where they are right ----
@pytest.mark.parametrize('n,c', [(300,20), (200,80), (60,3)])
def test_pytorch_metric_learning(n, c):
    "Its labels are float32 and it must be told how many neighbours to fetch; with small ids and all of them it is right"
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    x,y = torch.nn.functional.normalize(torch.tensor(rand(n))),torch.tensor(labels(n,c))
    names = dict(precision_at_1='precision@1', r_precision='r_precision', mean_average_precision_at_r='map@r', mean_average_precision='map',
        mean_reciprocal_rank='mrr')
    ref = AccuracyCalculator(include=tuple(names), k=n-1).get_accuracy(x, y)
    res = evaluate_retrieval(x, y, metrics=RANKED)
    for a,b in names.items():
        np.testing.assert_allclose(res[b], ref[a], atol=1e-6, err_msg=b)

def test_pytorch_metric_learning_by_its_arguments():
    "Its map is ours with all neighbours alone, `avg_of_avgs` is the macro mean, and clusters score the same"
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    g = torch.Generator().manual_seed(0)
    y = torch.arange(10).repeat_interleave(torch.arange(4, 14))
    x = torch.nn.functional.normalize(torch.randn(10, 6, generator=g)[y]+torch.randn(len(y), 6, generator=g), dim=1)
    names = dict(precision_at_1='recall@1', r_precision='r_precision', mean_average_precision_at_r='map@r', mean_average_precision='map',
        mean_reciprocal_rank='mrr')
    def theirs(names=names, **kwargs):
        return AccuracyCalculator(include=tuple(names), device=torch.device('cpu'), **kwargs).get_accuracy(x, y)
    res = evaluate_retrieval(x, y, metrics=[*names.values()])
    for k,of in ((None,res.__getitem__),(len(y)-1,res.__getitem__)):
        for a,b in theirs(k=k).items(): np.testing.assert_allclose(of(names[a]), b, atol=1e-6, err_msg=a)
    for a,b in theirs(avg_of_avgs=True).items(): np.testing.assert_allclose(res.macro(names[a]), b, atol=1e-6, err_msg=a)
    binned = theirs(k='max_bin_count')
    assert abs(binned['mean_average_precision']-res['map'])>.01 and abs(binned['mean_average_precision_at_r']-res['map@r'])<1e-6
    by = evaluate_retrieval(x, y, metrics=['nmi','ami'])
    for a,b in theirs(('NMI','AMI'), kmeans_func=lambda e, n: kmeans(e, n)).items(): np.testing.assert_allclose(by[a.lower()], b, atol=1e-6)

@pytest.mark.parametrize('name,ours', [('precision_at_1','recall@1'), ('mean_average_precision_at_r','map@r'),
    ('mean_average_precision','map'), ('mean_reciprocal_rank','mrr'), ('NMI','nmi'), ('AMI','ami'), ('cmc@1','recall@1')])
def test_names_of_metrics_elsewhere(name, ours):
    with pytest.raises(ValueError, match=f"There is no metric '{name}'; the nearest is '{ours}'"):
        evaluate_retrieval(*noisy(3, 4), metrics=[name])

def test_sklearn_average_precision():
    from sklearn.metrics import average_precision_score
    x,y = rand(60),labels(60,5)
    s = ref_scores(x, x, 'cosine')
    r = evaluate_retrieval(x, y, metrics='map').values['map']
    for i in range(60):
        o = np.arange(60)!=i
        np.testing.assert_allclose(r[i], average_precision_score(y[o]==y[i], s[i,o]), atol=1e-6)

@pytest.mark.parametrize('backend', BACKENDS)
def test_a_gallery_that_is_ready_gives_the_same(backend):
    "Bit for bit, with copies, zeros and excluded items, and it is not changed by being searched"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=g)
    x[100:150],x[7] = x[:50].clone(),0
    q = torch.randn(20, 8, generator=g)
    ready = Gallery(x)
    for kwargs in (dict(), dict(self_exclude=torch.arange(20)), dict(ignore=(torch.arange(20), torch.arange(300)%30))):
        for _ in range(2):
            a,b = (neighbours(q, o, k=9, backend=backend, **kwargs) for o in (x,ready))
            assert (a[0]==b[0]).all() and (a[1]==b[1]).all()
    assert len(ready)==300
    for metric in ('l2','dot'):
        with pytest.raises(ValueError, match=f"searched by 'cosine', not '{metric}'"): neighbours(q, ready, metric=metric)
    with pytest.raises(ValueError, match='query has 3 columns, gallery has 8'): neighbours(q[:,:3], ready)
    with pytest.raises(ValueError, match='1 of 300 rows of gallery are not finite'): Gallery(x.index_fill(0, torch.tensor([3]), math.nan))

def test_embeddings_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    import dmlfast.retrieval.embedded as room
    from dmlfast.retrieval.embedded import Embedded
    file = Embedded(torch.eye(3), [0,0,1], vocab=['a','b']).save(tmp_path/'e.safetensors')
    before,save = file.read_bytes(),room.save_file
    def _full(tensors, to, **kwargs):
        save(tensors, to, **kwargs)
        with open(to, 'r+b') as f: f.truncate(20)
        raise OSError('No space left on device')
    with monkeypatch.context() as m:
        m.setattr(room, 'save_file', _full)
        with pytest.raises(OSError, match='No space'): Embedded(torch.eye(4)).save(file)
    assert file.read_bytes()==before and [o.name for o in tmp_path.iterdir()]==['e.safetensors'] and Embedded.load(file).name(1)=='b'

def test_neighbours_of_queries_however_they_are_given():
    "Also of an array that cannot be written to, as pandas gives it"
    from dmlfast.retrieval.embedded import Embedded
    emb = Embedded(torch.tensor([[1.,0],[.9,.1],[0,1.],[.1,.9]]))
    fixed = np.array([0,2])
    fixed.flags.writeable = False
    mask = np.array([True,False,True,False])
    for o in ([0,2], torch.tensor([0,2]), fixed, mask, mask.tolist(), torch.tensor(mask), [-4,2]):
        assert emb.neighbours(1, o)[1].tolist()==[[1],[3]]
    assert emb.sides(mask).own.tolist()==[0,2]
    for o in ([.7,2.], mask[:3], [4], 'a', 2):
        with pytest.raises(ValueError, match='`queries` are indices of the 4 items, or true or false for each'): emb.neighbours(1, o)

def test_tables_are_embeddings_and_their_columns_labels(tmp_path):
    "Whatever rows they begin with; and what NumPy counts is written as what Python counts"
    import pandas as pd
    from dmlfast.retrieval.embedded import Embedded
    x,df = rand(12),pd.DataFrame(dict(label=np.arange(12)//3))
    e = Embedded(pd.DataFrame(x[4:]), df[4:].label, ks=np.array([1,2]), random_gallery=np.int64(3), facts=dict(a=np.float32(.5)))
    assert e.labels.tolist()==[1,1,2,2,2,3,3,3] and np.allclose(e.embs, x[4:])
    e = Embedded.load(e.save(tmp_path/'e.safetensors'))
    assert (e.ks,e.random_gallery,e.facts)==((1,2),3,dict(a=.5))
    with pytest.raises(ValueError, match='Facts in a file are .* a set'): Embedded(x, facts=dict(a={1})).save(tmp_path/'e.safetensors')
    with pytest.raises(ValueError, match='vocab names 2 classes, and there is a label 5'): Embedded(x[:2], [0,5], vocab=['a','b'])

def test_labels_in_order():
    from dmlfast.retrieval.embedded import in_order, numbered
    assert in_order(['b','a','b'])==['a','b'] and in_order([10,9,9])==[9,10] and in_order(['b',2,'a'])==[2,'a','b']
    assert numbered(['b','a','b'])==dict(labels=[1,0,1], vocab=['a','b']) and numbered(np.array([5,3]))==dict(labels=[1,0], vocab=[3,5])
    assert numbered(torch.tensor([5,3]), [3,4,5])==dict(labels=[2,0], vocab=[3,4,5])

def test_nearest_items_of_ones_own_without_the_query():
    "A search that finds each query first would be perfect"
    g = torch.Generator().manual_seed(0)
    x,y = torch.randn(40, 8, generator=g),torch.arange(40)//4
    _,i = neighbours(x, x, 11, self_exclude=False)
    with pytest.raises(ValueError, match='`found` has for 40 of 40 queries items that they do not see'): evaluate_retrieval(x, y, found=i)
    _,i = neighbours(x, k=10)
    assert evaluate_retrieval(x, y, found=i)['recall@1']==evaluate_retrieval(x, y)['recall@1']
    ids = torch.zeros(40, dtype=torch.int64)
    with pytest.raises(ValueError, match='`found` has for 40 of 40'): evaluate_retrieval(x, y, found=i, ignore=ids)
    with pytest.raises(ValueError, match='for each of 40 queries'): evaluate_retrieval(x, y, found=i[:9])
    assert evaluate_retrieval(x, y, x, y, found=neighbours(x, x, 11, self_exclude=False)[1])['recall@1']==1 # another gallery

@pytest.mark.parametrize('metric', ['cosine','l2','dot'])
def test_no_class_in_common(metric):
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    res = evaluate_retrieval(x, torch.zeros(9, dtype=torch.int64), x, torch.ones(9, dtype=torch.int64), metric=metric)
    assert math.isnan(res['recall@1']) and res.n_left_out==9

def test_a_block_of_a_file_that_holds_the_own_item_of_one_query_alone(tmp_path, monkeypatch):
    "The nearest of the others are all found there"
    g = torch.Generator().manual_seed(0)
    x,q = torch.randn(40, 6, generator=g),torch.randn(3, 6, generator=g)
    x[32:] = q[0]+.01*torch.randn(8, 6, generator=g) # the nearest ones of the first query are the last block
    np.save(tmp_path/'g.npy', x.numpy())
    monkeypatch.setattr(retrieval.Rows, 'blocks', lambda self: (slice(i, i+8) for i in range(0, 40, 8)))
    own = torch.tensor([-1,35,-1])
    for k in (8,12,39):
        a,b = (neighbours(q, o, k, self_exclude=own) for o in (np.load(tmp_path/'g.npy', mmap_mode='r'),x))
        assert torch.equal(a[1], b[1]) and torch.allclose(a[0], b[0], atol=1e-5) and a[1].shape==(3,k)
