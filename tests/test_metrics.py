"The table of metrics: a metric registered in a test is known wherever metrics are"
import numpy as np, pytest, torch
from dmlfast.all import *
from dmlfast.retrieval.metrics import metric_meanings, metric_names
from dmlfast.retrieval.metrics import metric_of

@pytest.fixture
def mine():
    "Share of the 3 nearest that are right, by one function with an exact depth, by one of the whole ranking, and for any k"
    share = lambda ranks, there, k=3: ((ranks<=k) & there).sum(1)/k
    register_metric(share, name='mine', depth=3, says='share of the 3 nearest that are right')
    register_metric(share, name='deep')
    register_metric(share, name='share@k', depth='k')
    yield share
    for o in ('mine','deep','share@k'): register_metric.remove(o)

def data(n=90, n_classes=12):
    y = np.random.default_rng(0).integers(0, n_classes, n)
    return np.random.default_rng(1).normal(size=(n,6))+np.random.default_rng(2).normal(size=(n_classes,6))[y],y

def by_hand(x, y, k=3):
    x = x/np.linalg.norm(x, axis=1, keepdims=True)
    res = []
    for i in range(len(x)):
        s = x@x[i]
        s[i] = -np.inf
        res.append((y[np.argsort(-s)[:k]]==y[i]).mean() if (y==y[i]).sum()>1 else np.nan)
    return np.array(res)

def test_a_metric_of_ones_own(mine):
    x,y = data()
    for block in (None,7):
        r = evaluate_retrieval(x, y, metrics=['mine','deep','share@3','share@5','map@r'], block=block)
        for o in ('mine','deep','share@3'): np.testing.assert_allclose(r.values[o], by_hand(x, y), atol=1e-6)
        np.testing.assert_allclose(r.values['share@5'], by_hand(x, y, 5), atol=1e-6)
    assert r.interval('mine')[0]<r['mine']<r.interval('mine')[1] and 'mine' in repr(r) and (r-r)['mine']==0
    # no deeper than it must look
    np.testing.assert_allclose(evaluate_retrieval(x, y, metrics='mine').values['mine'], by_hand(x, y), atol=1e-6)
    assert evaluate_random_gallery(x, y, 2, metrics=['mine'])['mine']<=1/3+1e-9 # one right item in the gallery

def test_names(mine):
    assert metric_names(['share','mine'], (2,6))==['share@2','share@6','mine']
    assert {'mine','deep','share@4'}<=set(metric_names('all', 4)) and 'nmi' not in metric_names('all', drawn=True)
    assert 'pr_curve' not in metric_names('all', curve=False)
    assert metric_of('share@k') is metric_of('share@0') is metric_of('share') is metric_of('mine@3') is metric_of(3) is None
    assert metric_of('share@7')[1]==7 and metric_of('map@r')[1] is None
    assert metric_meanings(['mine','share@2','recall@4'])=={'recall@k':'share of queries with an item of their class among the k nearest',
        'mine':'share of the 3 nearest that are right'}
    with pytest.raises(ValueError, match="no metric 'min'; the nearest is 'mine'"): metric_names('min')

def test_what_cannot_be_registered_or_read(mine, tmp_path, monkeypatch):
    for o in (0,'r',None,1.5):
        with pytest.raises(ValueError, match="`depth` is a number of ranks, 1 or more, or 'R', 'k' or 'all'"):
            register_metric(mine, name='no', depth=o)
    register_metric(lambda ranks,there: ranks, name='mine')
    with pytest.raises(ValueError, match=r"'mine' gave values of shape \(90, \d+\) for 90 queries"):
        evaluate_retrieval(*data(), metrics='mine', block=1000)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path/'of_my_own.py').write_text("from dmlfast.retrieval.metrics import register_metric\n@register_metric(depth=1)\ndef "
        "first(ranks, there): return ranks[:,0]==1\n")
    try: assert evaluate_retrieval(*data(), metrics='of_my_own:first')['first']==evaluate_retrieval(*data(), metrics='recall@1')['recall@1']
    finally: register_metric.remove('first')
    with pytest.raises(ValueError, match="'no_such:first' names a metric of the module 'no_such', which cannot be imported"):
        metric_names('no_such:first')

def test_a_column_a_result_and_a_line_of_the_report(mine, make_learner, tmp_path):
    learn = make_learner(metrics=['recall@1','mine'])
    learn.fit(1, 1e-3)
    assert list(learn.recorder.metric_names[3:5])==['recall@1','mine']
    r = learn.evaluate(metrics=['mine','map@r'])
    assert r['mine']==pytest.approx(learn.recorder.values[-1][3], abs=1e-6)
    np.testing.assert_allclose(r['mine'], np.nanmean(by_hand(*(o.numpy() for o in learn.embed()))), atol=1e-6)
    text = learn.report(tmp_path, n_queries=1).read_text()
    assert 'share of the 3 nearest that are right' in text and f"{r['mine']:.4f}" in text
