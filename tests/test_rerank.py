"Re-ranking: against loops over sets and rows, in bounded memory, beside the plain search"
import pytest, subprocess, sys, torch
import numpy as np
from torch.nn.functional import normalize
from dmlfast.retrieval import Embedded, RetrievalResult, evaluate_retrieval, neighbours
from dmlfast.retrieval.rerank import KReciprocal, QueryExpansion, expand, register_reranker

i = torch.arange(96).reshape(12,8).double()
F12 = normalize(torch.sin(1.3*i+0.7*(i%5)), dim=1)

def clusters(n, c, d=12, seed=0, noise=1.):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, c, n)
    x = rng.normal(size=(c,d))[y]+noise*rng.normal(size=(n,d))
    return (x/np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32),y

def order(s, without=()):
    "Columns, the best first, equal ones by index"
    return [j for j in sorted(range(len(s)), key=lambda j: (-s[j],j)) if j not in without]

# ---- query expansion ----

def loop_expand(q, g, k, alpha, own=None, skip=lambda a, b: False):
    q,g,res = np.float64(q),np.float64(g),[]
    for a,x in enumerate(q):
        s = g@x
        near = [j for j in order(s, () if own is None else (own[a],)) if not skip(a, j)][:k]
        v = x+sum(max(s[j], 0)**alpha*g[j] for j in near)
        res.append(v/np.linalg.norm(v))
    return np.stack(res)

def test_the_published_formula():
    new = expand(F12, k=3, alpha=3)
    assert (new[0]@new[1]).item()==pytest.approx(-0.0270914600, abs=1e-7)

@pytest.mark.parametrize('k,alpha', [(1,3),(10,0),(4,2.5),(200,3)])
def test_queries_take_up_their_neighbours(k, alpha):
    x,_ = clusters(60, 6)
    q,_ = clusters(9, 6, seed=1)
    np.testing.assert_allclose(expand(x, k=k, alpha=alpha), loop_expand(x, x, k, alpha, range(60)), atol=2e-6)
    np.testing.assert_allclose(expand(5*q, 3*x, k=k, alpha=alpha), loop_expand(q, x, k, alpha), atol=2e-6)

def test_what_is_ignored_is_not_taken_up():
    x,_ = clusters(40, 4)
    ids = np.arange(40)//5
    want = loop_expand(x, x, 3, 3, range(40), lambda a, j: ids[a]==ids[j])
    np.testing.assert_allclose(expand(x, k=3, ignore=ids), want, atol=2e-6)

def test_few_items_are_enough():
    assert torch.allclose(expand([[3.,4]]), torch.tensor([[.6,.8]]))
    e = Embedded([[1.,0],[.9,.1],[.2,1],[0,1]], [0,0,1,1])
    for o in register_reranker: assert e.neighbours(3, rerank=o)[1].shape==(4,3) and e.find([[1.,1]], 2, o)[1].shape==(1,2)

@pytest.mark.parametrize('queries,gallery', [(True,False),(False,True),(True,True)])
def test_a_search_with_expanded_rows(queries, gallery):
    x,y = clusters(70, 7)
    role = np.where(np.arange(70)%3==0, 'query', 'gallery')
    q,g = np.flatnonzero(role=='query'),np.flatnonzero(role=='gallery')
    a,b = x[q],x[g]
    if gallery: b = loop_expand(b, b, 4, 3, range(len(b)))
    if queries: a = loop_expand(a, b, 4, 3)
    s,found = Embedded(x, y, role=role).neighbours(6, rerank=QueryExpansion(4, 3, queries, gallery))
    for r,(u,f) in enumerate(zip(s, found)):
        assert f.tolist()==g[order(b@a[r])[:6]].tolist()
        np.testing.assert_allclose(u, (b@a[r])[order(b@a[r])[:6]], atol=2e-6)

# ---- k-reciprocal ----

def loop_reciprocal(s, k1, k2, lam, query=None):
    "Zhong et al.'s algorithm over sets, on similarities `s` of all items; those of a query outside are `query`: scores with all items"
    n = len(s)
    def nearest(i, k): return [i]+order(s[i], (i,))[:k]
    def reciprocal(i, k): return {j for j in nearest(i, k) if i in nearest(j, k)}
    def widened(base):
        res = set(base)
        for c in base:
            more = reciprocal(c, round(k1/2))
            if len(more&base)>2/3*len(more): res |= more
        return res
    def vector(sims, members, extra=0):
        w = np.zeros(n)
        for j in members: w[j] = np.exp(-(1-sims[j]))
        return w/(w.sum()+extra)
    V = np.stack([vector(s[i], widened(reciprocal(i, k1))) for i in range(n)])
    W = np.stack([V[nearest(i, k2-1)].mean(0) for i in range(n)])
    def mixed(v, sims):
        both = np.minimum(v, W).sum(1)
        return lam*sims+(1-lam)*both/(2-both)
    if query is None: return np.stack([mixed(W[i], s[i]) for i in range(n)])
    base = {j for j in order(query)[:k1] if query[j]>=s[j,nearest(j, k1)[-1]]}
    own = vector(query, widened(base), 1)
    near = V[order(query)[:k2-1]]
    return mixed((own+near.sum(0))/(len(near)+1), query)

@pytest.mark.parametrize('k1,k2,lam', [(20,6,.3),(5,1,0.),(7,3,.5),(4,9,.3)])
def test_reciprocal_neighbours_of_items(k1, k2, lam):
    x,y = clusters(80, 5)
    s = np.float64(x)@np.float64(x).T
    want = loop_reciprocal(s, k1, k2, lam)
    got,found = Embedded(x, y).neighbours(25, rerank=KReciprocal(k1, k2, lam, 25))
    for r in range(80):
        short = order(s[r], (r,))[:25]
        assert set(short)==set(found[r].tolist())
        np.testing.assert_allclose(got[r], want[r,found[r]], atol=2e-6)
        assert (got[r].diff()<=0).all()

def test_reciprocal_neighbours_of_others():
    x,_ = clusters(80, 5)
    q,_ = clusters(7, 5, seed=2)
    s = np.float64(x)@np.float64(x).T
    got,found = Embedded(x).find(q, 10, KReciprocal(8, 4, .3, 30))
    for r in range(7):
        sims = np.float64(x)@np.float64(q[r])
        want = loop_reciprocal(s, 8, 4, .3, sims)
        short = order(sims)[:30]
        np.testing.assert_allclose(got[r], sorted(want[short], reverse=True)[:10], atol=2e-6)
        np.testing.assert_allclose(got[r], want[found[r]], atol=2e-6)

@pytest.mark.parametrize('n', [1, 2, 5, 8])
def test_a_gallery_of_few_items(n):
    "All of them are near, by each of the re-rankers; an item that is searched for by itself is the nearest"
    x,_ = clusters(n, 2)
    q = np.concatenate([clusters(4, 2, seed=2)[0], x[:1]])
    s,e = np.float64(x)@np.float64(x).T,Embedded(x)
    got,found = e.find(q, 10, KReciprocal())
    for r,sims in enumerate(np.float64(q)@np.float64(x).T):
        if r<4: np.testing.assert_allclose(got[r], loop_reciprocal(s, 20, 6, .3, sims)[found[r]], atol=2e-6)
        for o in register_reranker: assert sorted(e.find(q[r:r+1], 10, o)[1][0].tolist())==[*range(n)]
    assert found[4,0]==0
    if n>1:
        got,found = e.neighbours(10, rerank=KReciprocal())
        np.testing.assert_allclose(got, np.take_along_axis(loop_reciprocal(s, 20, 6, .3), found.numpy(), 1), atol=2e-6)

def test_a_query_is_ranked_the_same_alone():
    x,y = clusters(90, 6)
    role = np.where(np.arange(90)%4==0, 'query', 'gallery')
    e = Embedded(x, y, role=role)
    every = e.neighbours(5, rerank='k-reciprocal')
    for r,q in enumerate(e.queries[:6].tolist()): assert torch.equal(e.neighbours(5, [q], 'k-reciprocal')[1][0], every[1][r])

def test_memory_is_bounded():
    "6,000 items, of whom a full matrix of distances would have 144 MB in each of several copies"
    code = '''if True:
        import resource, torch
        from dmlfast.retrieval import Embedded
        x = torch.randn(6_000, 32, generator=torch.Generator().manual_seed(0))
        e = Embedded(x, torch.arange(6_000)//10)
        e.neighbours(1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        e.neighbours(10, rerank='k-reciprocal')
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)/1024)'''
    assert float(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout)<500

# ---- measuring ----

def average_precision(ranking, rel):
    hits = np.flatnonzero(np.isin(ranking, rel))
    return np.mean([(n+1)/(h+1) for n,h in enumerate(hits)])

@pytest.mark.parametrize('deep', [1, 7, 39])
def test_metrics_of_an_order_of_ones_own(deep):
    x,y = clusters(40, 4, d=5)
    s = np.float64(x)@np.float64(x).T
    ranking = [order(s[r], (r,)) for r in range(40)]
    rng = np.random.default_rng(3)
    found = np.stack([rng.permutation(o[:deep]) for o in ranking])
    res = evaluate_retrieval(x, y, metrics=['recall@1','recall@4','map','mrr','r_precision'], found=found)
    less = evaluate_retrieval(x, y, metrics=['recall@1','recall@4','r_precision'], found=found)
    for r in range(40):
        new,rel = [*found[r],*ranking[r][deep:]],np.flatnonzero((y==y[r])&(np.arange(40)!=r))
        assert res.values['map'][r]==pytest.approx(average_precision(new, rel))
        hits = np.isin(new, rel)
        assert res.values['mrr'][r]==pytest.approx(1/(1+hits.argmax()))
        for o in (res,less):
            assert o.values['recall@1'][r]==hits[0] and o.values['recall@4'][r]==hits[:4].any()
            assert o.values['r_precision'][r]==pytest.approx(hits[:len(rel)].mean())

def test_the_plain_order_changes_nothing():
    x,y = clusters(60, 5)
    e = Embedded(x, y, ignore=np.arange(60)//2)
    def as_it_was(scores, found, embedded, queries): return scores,found
    res = e.evaluate(rerank=as_it_was)
    for k,v in res.values.items(): np.testing.assert_array_equal(v, res.plain.values[k])
    assert set(res.plain.keys())-set(res.keys())=={'nmi','ami','f1'} and res.name=='as_it_was'

@pytest.mark.parametrize('name', list(register_reranker))
@pytest.mark.parametrize('random_gallery', [0, 3])
def test_an_evaluation_is_of_the_new_ranking(name, random_gallery):
    x,y = clusters(60, 6)
    role = None if random_gallery else np.where(np.arange(60)%3==0, 'query', 'gallery')
    e = Embedded(x, y, role=role, random_gallery=random_gallery)
    res = e.evaluate(['recall@1','map@r'], rerank=name)
    found = e.neighbours(1, rerank=name)[1][:,0]
    np.testing.assert_array_equal(res.values['recall@1'][:len(e.queries)], (e.labels[found]==e.labels[e.queries]).numpy())
    assert {'plain',name,'difference'}<={*res.to_frame().columns} and name in repr(res)
    assert res.to_dict()['plain']['n_queries']==len(res.labels)
    low,high = res.difference.interval('map@r') or (0,0)
    assert res.difference['map@r']==pytest.approx(res['map@r']-res.plain['map@r'])

def test_refused():
    e = Embedded(F12, torch.arange(12)%3)
    with pytest.raises(ValueError, match="There is no reranker 'qu'"): e.evaluate(rerank='qu')
    with pytest.raises(ValueError, match="by 'cosine'"): e.neighbours(2, rerank='qe', metric='l2')
    with pytest.raises(ValueError, match='without `dims`'): e.evaluate(rerank='qe', dims=4)
    with pytest.raises(ValueError, match='have no ranking'): e.evaluate('nmi', rerank='qe')
    with pytest.raises(ValueError, match='`k` is 1 or more'): QueryExpansion(0)
    with pytest.raises(ValueError, match='`lam` 0 to 1'): KReciprocal(lam=2)

def test_scores_of_pairs_have_no_ranking():
    x,y = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)),torch.arange(40)//4
    with pytest.raises(ValueError, match="'eer'.*which have no ranking"): Embedded(x, y).evaluate(['eer'], rerank='qe')
    res = Embedded(x, y).evaluate(['recall@1','eer'], rerank='qe')
    assert [*res.keys()]==['recall@1'] and 'which have no ranking: eer' in repr(res)
