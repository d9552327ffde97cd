"Search and metrics against a brute-force reference in float64, and against what other libraries get right"
import numpy as np, pytest, torch
from dmlfast.retrieval import evaluate_retrieval, neighbours

KS = (1,2,4,8)
RANKED = ['recall','precision@1','r_precision','map@r','map','mrr']

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
    "For each query its ranking of the gallery as indices, equal scores by index"
    s = ref_scores(q, g, metric)
    def rank(i):
        cand = [j for j in range(len(g)) if (own is None or j!=own[i]) and (ignore is None or ignore[0][i]!=ignore[1][j])]
        return sorted(cand, key=lambda j: (-s[i,j], j))
    return [rank(i) for i in range(len(q))]

def ref_metrics(ranking, rel, ks=KS):
    "Metrics of one query; None if nothing is relevant"
    hits = [int(rel[j]) for j in ranking]
    R = sum(hits)
    if not R: return None
    P = [sum(hits[:j+1])/(j+1) for j in range(len(hits))]
    res = {f'recall@{k}': float(any(hits[:k])) for k in ks}
    return res | {'precision@1': float(hits[0]), 'r_precision': sum(hits[:R])/R, 'map@r': sum(P[j]*hits[j] for j in range(R))/R,
        'map': sum(p*h for p,h in zip(P, hits))/R, 'mrr': 1/(hits.index(1)+1)}

def ref_evaluate(q, y, g=None, gy=None, metric='cosine', own=None, ignore=None, ks=KS):
    "Values by metric for each query, nan where nothing is relevant"
    if g is None: g,gy,own = q,y,np.arange(len(q)) if own is None else own
    rows = [ref_metrics(r, np.asarray(gy)==np.asarray(y)[i], ks) for i,r in enumerate(ref_rankings(q, g, metric, own, ignore))]
    names = [f'recall@{k}' for k in ks] + ['precision@1','r_precision','map@r','map','mrr']
    return {n: np.array([np.nan if r is None else r[n] for r in rows]) for n in names}

def check(*args, ks=KS, metrics=None, block=None, ref_kw=None, **kw):
    "`evaluate_retrieval` gives what the reference gives, query by query and in the mean, cheap metrics alone or all"
    ref = ref_evaluate(*[o if o is None else np.asarray(o) for o in args], ks=ks, **(ref_kw or {}), **kw)
    for ms in (RANKED, None):
        res = evaluate_retrieval(*args, ks=ks, metrics=ms, block=block, **kw)
        for n in res.keys():
            np.testing.assert_allclose(res.values[n], ref[n], atol=1e-9, err_msg=n)
            used = ~np.isnan(ref[n])
            assert res.n_left_out==(~used).sum()
            if used.any(): np.testing.assert_allclose(res[n], ref[n][used].mean(), atol=1e-9)
            else: assert np.isnan(res[n])

def rand(n, d=8, seed=0): return np.random.default_rng(seed).standard_normal((n,d)).astype(np.float32)
def labels(n, c, seed=0): return np.random.default_rng(seed).integers(0, c, n)

@pytest.mark.parametrize('metric', ['cosine','l2','dot'])
@pytest.mark.parametrize('n,c', [(60,6), (60,2), (50,25), (40,40), (30,1)])
def test_random(n, c, metric): check(rand(n), labels(n,c), metric=metric)

def test_tied():
    "Whole numbers: equal products are exactly equal, among equal rows and unequal ones"
    x = np.random.default_rng(0).integers(-1, 2, (70,3)).astype(np.float32)
    check(x, labels(70,5), metric='dot')

def test_separate():
    check(rand(40), labels(40,7), rand(55, seed=1), labels(55,9,1))
