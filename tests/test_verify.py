"Pairs, thresholds and open sets: against values by hand, NumPy, scikit-learn and brute force"
import json, re, subprocess, sys
import numpy as np, pytest, torch
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve
from dmlfast.retrieval import *
from dmlfast.retrieval.metrics import less_is_better
from dmlfast.retrieval.results import class_draws

def unit(x): return x/np.linalg.norm(x, axis=1, keepdims=True)

def data(n_classes=30, per=6, noise=.8, seed=0, d=12):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(n_classes), per)
    return rng.normal(size=(n_classes,d))[y]+noise*rng.normal(size=(len(y),d)),y

def brute(x, y, g=None, gy=None, own=None, ids=None):
    "Scores of all pairs, one by one: genuine and impostor"
    once,res = g is None,([],[])
    g,gy = (x,y) if once else (g,gy)
    for i in range(len(x)):
        for j in range(i+1 if once else 0, len(g)):
            if own is not None and own[i]==j or ids is not None and ids[0][i]==ids[1][j]: continue
            res[int(y[i]!=gy[j])].append(unit(x[i:i+1])[0]@unit(g[j:j+1])[0])
    return [np.sort(o) for o in res]

def all_of(o): return np.repeat(o.values, o.counts)

def test_values_of_the_formulas():
    i = np.arange(96).reshape(12, 8)
    p = pair_scores(unit(np.sin(1.3*i+.7*(i%5))), np.arange(12)%3, rates=.25)
    assert (len(p.genuine),len(p.impostor))==(18,48)
    np.testing.assert_allclose(p.threshold(.25), 0.0618094944, atol=1e-9)
    np.testing.assert_allclose([p.fnmr(.25),p.auc], [0.3888888889,0.7638888889], atol=1e-9)

def test_equals_scikit_learn_and_numpy():
    x,y = data()
    p,(gen,imp) = pair_scores(x, y),brute(x, y)
    np.testing.assert_allclose(all_of(p.genuine), gen, atol=1e-12)
    np.testing.assert_allclose(all_of(p.impostor), imp, atol=1e-12)
    gen,imp = all_of(p.genuine),all_of(p.impostor) # to the last bit, since curves step at them
    same,s = np.repeat([1,0], [len(gen),len(imp)]),np.concatenate([gen,imp])
    np.testing.assert_allclose(p.auc, roc_auc_score(same, s), atol=1e-12)
    fpr,tpr,t = roc_curve(same, s, drop_intermediate=False)
    np.testing.assert_allclose(p.fmr_at(t[1:]), fpr[1:], atol=1e-12)
    np.testing.assert_allclose(1-p.fnmr_at(t[1:]), tpr[1:], atol=1e-12)
    for r in (1e-3,.01,.3):
        np.testing.assert_allclose(p.threshold(r), np.quantile(imp, 1-r), atol=1e-12)
        np.testing.assert_allclose(p.fnmr(r), (gen<np.quantile(imp, 1-r)).mean(), atol=1e-12)
    grid = np.linspace(0, 1, 10**6+1) # where the line of the curve crosses the diagonal
    np.testing.assert_allclose(p.eer, grid[np.argmin(abs(1-np.interp(grid, fpr, tpr)-grid))], atol=2e-6)

def test_ties_count_half():
    p = pair_scores(np.eye(3)[[0,0,1,1,0]], [0,0,0,1,1])
    gen,imp = brute(np.eye(3)[[0,0,1,1,0]], [0,0,0,1,1])
    np.testing.assert_allclose(p.auc, np.mean([(a>b)+.5*(a==b) for a in gen for b in imp]))

@pytest.mark.parametrize('block', [1,70,2**20])
def test_roles_and_ids_to_ignore(block):
    x,y = data(8, 5)
    rng = np.random.default_rng(1)
    role,ids = rng.choice(['query','gallery',''], 40),rng.integers(9, size=40)
    e = Embedded(x, y, role=role, ignore=ids)
    q,g,own = (o.numpy() for o in e.search)
    gen,imp = brute(x[q], y[q], x[g], y[g], own[q], (ids[q],ids[g]))
    p = e.verify(block=block)
    np.testing.assert_allclose(all_of(p.genuine), gen, atol=1e-6)
    np.testing.assert_allclose(all_of(p.impostor), imp, atol=1e-6)
    gen,imp = brute(x, y, ids=(ids,ids))
    p = Embedded(x, y, ignore=ids).verify(block=block)
    np.testing.assert_allclose(all_of(p.genuine), gen, atol=1e-6)
    np.testing.assert_allclose(all_of(p.impostor), imp, atol=1e-6)

@pytest.mark.parametrize('metric', ['l2','dot'])
def test_other_similarities(metric):
    x,y = data(6, 4)
    i,j = np.triu_indices(24, 1)
    s = -np.linalg.norm(x[i]-x[j], axis=1) if metric=='l2' else (x@x.T)[i,j]
    p,b = pair_scores(x, y, metric=metric),pair_scores(x, y, metric=metric, most=5)
    np.testing.assert_allclose(all_of(p.impostor), np.sort(s[y[i]!=y[j]]), atol=1e-6)
    assert abs(b.threshold(.2)-p.threshold(.2))<=b.impostor.width

def test_bins_are_within_their_width():
    x,y = data(40, 10)
    a,b = pair_scores(x, y),pair_scores(x, y, most=1000)
    assert a.impostor.width==0 and b.impostor.width==pytest.approx(1e-4) and len(b.impostor)==len(a.impostor)==len(y)*(len(y)-10)//2
    for r in (1e-3,1e-2,.1,.5):
        assert abs(a.threshold(r)-b.threshold(r))<=1e-4
        assert a.fnmr_at(a.threshold(r)-2e-4)<=b.fnmr(r)<=a.fnmr_at(a.threshold(r)+2e-4)
    np.testing.assert_allclose([b.eer,b.auc], [a.eer,a.auc], atol=5e-4)
    np.testing.assert_allclose(b.interval('eer'), a.interval('eer'), atol=2e-3)
    assert 'exact to 0.0001' in repr(b) and 'exact to' not in repr(a)

def test_counts_by_class_are_those_of_the_pairs():
    x,y = data(4, 5)
    e = np.array([-.2,.1,.5])
    gen,imp = pair_scores(x, y, block=17).by_class(e)
    want,i,j = np.zeros((2,4,4), int),*np.triu_indices(20, 1)
    for a,b,s in zip(y[i], y[j], (unit(x)@unit(x).T)[i,j]):
        k = (e<=s).sum()
        if a==b: want[0,a,k] += 1
        else: want[1,[a,b],k] += 1
    np.testing.assert_array_equal(gen, want[0])
    np.testing.assert_array_equal(imp, want[1])

def test_a_draw_is_the_weighted_set():
    "A class that is drawn twice is there twice; its pairs with others count as often as both are drawn, to first order"
    x,y = data(12, 6, noise=.6)
    x[y==0] = x[y>0].reshape(11, 6, -1).sum(0)/4 # a class that is near to all others
    p,w = pair_scores(x, y),np.array([[8]+[1]*9+[2,1]])
    i,j = np.triu_indices(len(y), 1)
    s,same = (unit(x)@unit(x).T)[i,j],y[i]==y[j]
    v = np.where(same, w[0,y[i]], w[0,y[i]]+w[0,y[j]]-1)
    got = p.scores(w, ['auc','fnmr@fmr=0.1','threshold@fmr=0.1'])
    t = np.sort(np.repeat(s[~same], v[~same]))
    np.testing.assert_allclose(got['threshold@fmr=0.1'], t[-len(t)//10], atol=.01)
    np.testing.assert_allclose(got['auc'], roc_auc_score(same[v>0], s[v>0], sample_weight=v[v>0]), atol=3e-3)
    fpr,tpr,_ = roc_curve(same[v>0], s[v>0], sample_weight=v[v>0])
    np.testing.assert_allclose(got['fnmr@fmr=0.1'], 1-np.interp(.1, fpr, tpr), atol=.02)

def test_intervals_hold_what_new_classes_give():
    "Sixty classes drawn anew thirty times: the interval holds the value of very many classes nearly always, and is not much wider"
    many = pair_scores(*data(500, 6, seed=100))
    hit,wide,vals = [],[],[]
    for s in range(30):
        p = pair_scores(*data(60, 6, seed=s), n_boot=200)
        low,high = p.interval('eer')
        hit.append(low<=many.eer<=high), wide.append(high-low), vals.append(p.eer)
    assert np.mean(hit)>=.85
    assert .6<np.mean(wide)/(3.92*np.std(vals))<1.7

def test_few_classes_have_no_interval_and_missing_pairs_no_value():
    x,y = data(5, 4)
    p = pair_scores(x, y)
    assert p.interval('eer') is None and 'fewer than 10' in repr(p) and '<table' in p._repr_html_()
    p = pair_scores(x, np.arange(20)) # no genuine pair
    assert np.isnan(p.eer) and np.isnan(p.auc) and p.interval('eer') is None
    json.dumps(p.to_dict(), allow_nan=False)
    with pytest.raises(ValueError, match='0 pairs of one class and 190 of two'): finder().calibrate(Embedded(x, np.arange(20)), .1)
    r = evaluate_retrieval(x, np.arange(20), metrics=['eer'])
    assert np.isnan(r['eer']) and 'no such pairs' in r.why_no_interval('eer')
    json.loads(r.to_json())

@pytest.mark.parametrize('rate', [0,1,-.1,'1e-3',None])
def test_rates_are_shares(rate):
    with pytest.raises(ValueError, match='above 0 and below 1'): pair_scores(*data(5, 4), rates=[rate])

# ---- in the table of metrics ----
def test_metrics_of_pairs_beside_those_of_ranks():
    x,y = data()
    ms = ['recall@1','fnmr@fmr=1e-2','eer','nmi','auc']
    r,p = evaluate_retrieval(x, y, metrics=ms),Embedded(x, y).verify(rates=[1e-2])
    assert set(r.keys())==set(ms)
    np.testing.assert_allclose([r['eer'],r['auc'],r['fnmr@fmr=1e-2']], [p.eer,p.auc,p.fnmr(.01)], atol=1e-6)
    np.testing.assert_allclose(r.interval('eer'), p.interval('eer'), atol=1e-6)
    noisier = evaluate_retrieval(data(noise=1.3)[0], y, metrics=ms)
    d = r-noisier
    assert d['eer']<0 and d.interval('eer')[1]<0 and d['auc']>0
    paired,sd = np.diff(d.interval('auc'))[0],[np.diff(o.interval('auc'))[0] for o in (r,noisier)]
    assert paired<np.hypot(*sd) # the same classes are drawn for both
    with pytest.raises(ValueError, match='whole set'): r.per_class('eer')

def test_names_of_metrics():
    assert metric_of('fnmr@fmr=1e-3')[1]==1e-3 and metric_of('fnmr@fmr=2') is None and metric_of('fnmr@fmr=r') is None
    assert not {'eer','auc'}&set(metric_names('all'))
    with pytest.raises(ValueError, match="nearest is 'fnmr@fmr=1e-3'"): metric_names('fnmr@fmr=5')
    with pytest.raises(ValueError, match='here it is drawn'): metric_names(['eer'], drawn=True)
    assert [less_is_better(o) for o in ('eer','fnmr@fmr=.1','auc','recall@1','valid_loss')]==[True,True,False,False,False]

def test_samples_are_those_of_the_other_metrics():
    x,y = data(15, 4)
    r = evaluate_retrieval(x, y, metrics=['eer'], n_boot=50, seed=3)
    p = pair_scores(x.astype('float32'), y)
    np.testing.assert_allclose(r.boot('eer'), p.boots(class_draws(15, 50, 3), ['eer'])['eer'], atol=1e-5)

# ---- open sets ----
def test_open_set_by_brute_force():
    x,y = data(20, 5)
    g = (np.arange(100)%5<2)&(y<12) # the last eight classes are unknown
    o = open_set(x[~g], y[~g], x[g], y[g])
    s = unit(x[~g])@unit(x[g]).T
    best,right,unknown = s.max(1),y[g][s.argmax(1)]==y[~g],y[~g]>=12
    assert o.n_classes==(12,8) and o.interval(.1) is None
    for far in (.05,.2):
        t = np.quantile(best[unknown], 1-far)
        np.testing.assert_allclose(o.threshold(far), t, atol=1e-6)
        np.testing.assert_allclose(o.dir(far), (right&(best>=t))[~unknown].mean())
        assert o.far_at(o.threshold(far))==pytest.approx((best[unknown]>=t).mean())

def test_open_set_holds_classes_out():
    x,y = data(30, 5)
    o = open_set(x, y, seed=1)
    assert o.n_classes==(15,15) and len(o.labels)==15*5+15*2 and 'held out' in repr(o)
    assert repr(open_set(x, y, seed=1))==repr(o)!=repr(open_set(x, y, seed=2))
    low,high = o.interval(.1)
    assert low<o.dir(.1)<high or low==high==o.dir(.1)
    role = np.where(np.arange(150)%5<2, 'query', 'gallery')
    assert Embedded(x, y, role=role).open_set(unknown=.2).n_classes==(24,6)
    with pytest.raises(ValueError, match='share of the 30 classes'): open_set(x, y, unknown=0)

# ---- memory ----
def test_memory_is_bounded():
    "20,000 items are 200 million pairs, whose scores would take 800 MB"
    code = ("import resource, torch; from dmlfast.retrieval.verify import pair_scores; torch.manual_seed(0)\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024\n"
        "y = torch.arange(20_000)//8; x = torch.randn(2500,64)[y]+.8*torch.randn(20_000,64); a = peak()\n"
        "p = pair_scores(x, y); assert len(p.impostor)+len(p.genuine)==20_000*19_999//2; print(p.auc, peak()-a)")
    auc,mib = map(float, subprocess.run([sys.executable,'-c',code], capture_output=True, text=True, check=True).stdout.split())
    assert mib<400 and auc>.9

# ---- in training ----
def test_columns_of_a_fit_and_what_keeps_the_best(make_learner):
    from fastai.callback.tracker import SaveModelCallback
    from dmlfast.train.columns import RetrievalMetrics
    from dmlfast.train.transfer import Interpolate
    from dmlfast.study.tuning import check_metric
    ms = ['recall@1','fnmr@fmr=1e-1','eer','auc']
    learn = make_learner(metrics=ms)
    learn.fit_one_cycle(1, 1e-3, cbs=SaveModelCallback(monitor='eer', comp=np.less))
    res = learn.evaluate(metrics=ms)
    np.testing.assert_allclose(learn.recorder.values[-1][2:], [res[o] for o in ms], atol=1e-4)
    with pytest.raises(ValueError, match='SaveModelCallback keeps what has most of'): learn.fit(1, cbs=SaveModelCallback(monitor='eer'))
    for f in (lambda: Interpolate(metric='eer'), lambda: check_metric('fnmr@fmr=1e-3')):
        with pytest.raises(ValueError, match='is better'): f()

# ---- in an embedder ----
class Colour(torch.nn.Module):
    def forward(self, x): return torch.nn.functional.normalize(x.mean((2,3)), dim=1)

def colour(*rgb): return np.full((4,4,3), rgb, dtype=np.uint8)

def finder(**kwargs):
    from dmlfast.deploy import ImageEmbedder
    from dmlfast.deploy.embedder import Preprocess
    return ImageEmbedder(Colour(), Preprocess(), **kwargs)

def test_a_folder_is_a_gallery(tmp_path, recwarn):
    "Its subfolders are the classes; other files are left out, and one label may be for all"
    for name,rgb in dict(red=(250,0,0), green=(0,250,0)).items():
        (tmp_path/'photos'/name).mkdir(parents=True)
        for i in '21': Image.fromarray(colour(*rgb)).save(tmp_path/'photos'/name/f'{i}.png')
    f = finder().add(tmp_path/'photos')
    assert f.labels==['green','green','red','red']
    assert f.items==[str(tmp_path/'photos'/o) for o in ('green/1.png','green/2.png','red/1.png','red/2.png')]
    assert f.search(colour(200,0,0), 1)[0].label=='red' and not len(recwarn)
    (tmp_path/'photos'/'red'/'list.txt').write_text('x')
    with pytest.warns(UserWarning, match='left out: 1 .txt'): f.add(str(tmp_path/'photos'/'red'), 'ruby')
    with pytest.warns(UserWarning, match='left out'): f.add(str(tmp_path/'photos'/'red'))
    assert f.labels[4:]==['ruby','ruby','red','red']
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match="There are no images in '.*empty'"): f.add(tmp_path/'empty')
    with pytest.raises(ValueError, match='Each image needs a label: .*a label for each, or one for all'): f.add(f.items[:2])
    with pytest.raises(ValueError, match="An image is a file, and '.*photos' is a folder"): f.embed(tmp_path/'photos')
    assert len(f)==8

def test_search_may_find_nothing():
    f = finder().add([colour(250,0,0),colour(0,250,0)], ['red','green'], ['a','b'])
    blue,orange = colour(0,0,250),colour(250,100,0)
    assert len(f.search(blue))==2 and f.threshold is None
    for call in (lambda: f.search(blue, unknown=True), lambda: f.classify(blue, unknown=True), lambda: f.same(blue, blue)):
        with pytest.raises(ValueError, match='no calibrated threshold'): call()
    for call in (f.search, f.classify):
        with pytest.raises(ValueError, match="`unknown` is True or False; got 0.5.*`min_score=`"): call(blue, unknown=.5)
    with pytest.raises(ValueError, match='`min_score=.5`'): f.search(blue, unknown=True)
    assert f.search(blue, min_score=.5)==[] and [o.label for o in f.search(orange, min_score=.5)]==['red']
    f.calibration = dict(threshold=.8, fmr=1e-3)
    assert f.search([blue,orange], unknown=True)[0]==[] and [o.label for o in f.search([blue,orange], unknown=True)[1]]==['red']
    a,b = f.same(colour(250,0,0), orange),f.same(orange, blue)
    assert a and not b and a.score==pytest.approx(250/np.hypot(250, 100), abs=1e-5) and b==(False,0.,.8)
    assert not f.same(colour(250,0,0), orange, min_score=.99)
    with pytest.raises(ValueError, match='gallery is empty'): finder().classify(blue)

def test_labels_from_neighbours():
    f = finder().add([colour(250,0,0),colour(250,30,0),colour(250,60,0),colour(250,90,0)], 'red').add(colour(120,250,0), 'new')
    near = colour(150,250,0)
    assert [f.classify(near, how=o).label for o in ('vote','prototype','nearest')]==['new']*3 # one photo against four
    rows = [np.array(o)/np.linalg.norm(o) for o in ([250,0,0],[250,30,0],[250,60,0],[250,90,0])]
    mean,q = np.mean(rows, 0),np.array([250,10,0])/np.hypot(250, 10)
    got = f.classify(colour(250,10,0), how='prototype')
    assert got.label=='red' and got.score==pytest.approx(q@mean/np.linalg.norm(mean), abs=1e-5)
    f.add(colour(0,0,250), 'blue') # prototypes are made anew
    assert f.classify(colour(0,9,250), how='prototype').label=='blue'
    # two at .995 have more weight than one at .998, and one at 1 more than both would have at .9
    hits = [('a',.998),('b',.995),('b',.995),('c',.2)]
    votes = {k:sum(np.exp(s/.07) for a,s in hits if a==k) for k in 'abc'}
    g = finder().add_embs(torch.tensor([[s,np.sqrt(1-s*s),0.] for _,s in hits]), [o for o,_ in hits], [''] * 4)
    assert g.classify(colour(250,0,0)).label==max(votes, key=votes.get)=='b'
    assert g.classify(colour(250,0,0), k=1).label==g.classify(colour(250,0,0), how='nearest').label=='a'
    assert g.classify([colour(0,0,250)], min_score=.5)==[(None,pytest.approx(0, abs=1e-6))]
    with pytest.raises(ValueError, match="'vote', 'prototype' or 'nearest'"): g.classify(near, how='mean')

def test_a_body_is_calibrated_on_its_gallery():
    "A trained embedder is not: its gallery may have classes that it was trained on"
    x,y = data(30, 8)
    f,g = (finder().add_embs(x, y.tolist(), ['']*len(x)) for _ in range(2))
    f.calibrate(fmr=.1)
    assert f.threshold==g.calibrate(Embedded(x, y), .1).threshold and f.calibration['measured_on']=='the gallery'
    g.facts['loss'] = 'TripletLoss()'
    for o in (g,finder()):
        with pytest.raises(ValueError, match="such as `finder.embedded"): o.calibrate(fmr=.1)

def test_calibration():
    x,y = data(30, 8)
    e = Embedded(x, y, facts=dict(measured_on='noise, val'))
    with pytest.warns(UserWarning, match='pairs of one class are missed'):
        f = finder().calibrate(e, 1e-2, split_hash='abc')
    gen,imp = brute(x, y)
    assert f.threshold==pytest.approx(np.quantile(imp, .99), abs=1e-6) and f.calibration['fnmr']==pytest.approx((gen<f.threshold).mean())
    c = f.calibration
    assert c['interval'][0]<f.threshold<c['interval'][1] and (c['classes'],c['measured_on'],c['split_hash'])==(30,'noise, val','abc')
    with pytest.raises(ValueError, match='20 classes or more, and these items are of 5'): finder().calibrate(Embedded(x[:40], y[:40]), .1)
    assert finder().calibrate(Embedded(x[:40], y[:40]), .1, min_classes=5).calibration['interval'] is None
    with pytest.raises(ValueError, match='10,000 pairs of two classes'): finder().calibrate(Embedded(x[:80], y[:80]), 1e-4, min_classes=5)

def test_a_threshold_among_equal_scores_lies_above_them():
    "One image stands in 40 classes of 200: its 780 pairs of 79,600 all have the similarity 1, which a rate of 1e-3 cannot let through"
    x = np.random.default_rng(0).normal(size=(400,64))
    x[::10] = x[0]
    with (pytest.warns(UserWarning, match='rate of 0.001, 100.0% of the pairs of one class are missed'),
        pytest.warns(UserWarning, match='a threshold above it, 1.000001, has a false-match rate of 0 and not 0.001')):
        f = finder().calibrate(Embedded(x, np.arange(400)//2), 1e-3)
    assert f.calibration['fmr']==1e-3 and f.calibration['fnmr']==1 and f.calibration['interval'][1]<=f.threshold

def test_rates_are_kept_among_equal_scores():
    "By a loop over all thresholds: the least one that a share `r` and one more reaches at most; a collapsed embedding matches nothing"
    rng = np.random.default_rng(0)
    x,y = np.where(rng.random((60,4))<.5, -1., 1.),np.arange(60)//6
    p,(gen,imp) = pair_scores(x, y),brute(x, y)
    for r in (.003,.03,.1,.3,.8):
        t = min(o for o in [*np.unique(imp),9] if (imp>=o-1e-9).sum()<=r*len(imp)+1)
        assert p.fmr_at(p.threshold(r))==pytest.approx((imp>=t-1e-9).mean()) and p.fnmr(r)==pytest.approx((gen<t-1e-9).mean())
    p = pair_scores(np.ones((200,8)), np.arange(200)//10)
    assert p.fnmr(1e-3)==1 and p.interval('fnmr@fmr=0.001')==pytest.approx((1,1), abs=.01)
    o = open_set(np.ones((400,8)), np.arange(400)%40)
    assert o.far_at(o.threshold(.01))==0 and o.dir(.01)==0

def test_a_threshold_that_misses_most_is_said():
    "Of noise in three dimensions nearly all pairs of a class are missed, of tight classes few; both are said"
    x,y = torch.randn(200, 3, generator=torch.manual_seed(0)),torch.arange(200)%25
    gen,imp = brute(x.numpy(), y.numpy())
    missed = (gen<np.quantile(imp, .99)).mean()
    assert missed>.9
    f = finder()
    assert 'threshold' not in repr(f)
    with pytest.warns(UserWarning, match=f'rate of 0.01, {missed:.1%} of the pairs of one class are missed.*a larger `fmr`, or training'):
        f.calibrate(Embedded(x, y), 1e-2)
    f = finder().calibrate(Embedded(torch.eye(25)[y]+.01*torch.randn(200, 25, generator=torch.manual_seed(1)), y), 1e-2) # no warning
    assert re.search(r'threshold 0\.\d{3} for fmr=0.01, which misses 0.0% of the pairs of one class\)$', repr(f))
    f.calibration = dict(threshold=.5, fmr=.1) # of an older folder
    assert repr(f).endswith('threshold 0.500 for fmr=0.1)')
    with pytest.raises(ValueError, match="embeddings with labels, such as .*; got 'photos'"): f.calibrate('photos')

def test_a_threshold_travels(make_learner, tmp_path):
    from dmlfast.deploy import load_embedder
    learn = make_learner()
    n = int(learn.embedded().labels.unique().numel())
    with pytest.raises(ValueError, match=f'20 validation classes or more, and there are {n}'): learn.export_embedder(tmp_path/'e', fmr=.1)
    assert not (tmp_path/'e').exists()
    with pytest.warns(UserWarning, match='are missed'):
        f = learn.export_embedder(tmp_path/'e', gallery='val', fmr=.1, min_classes=2)
    want = learn.embedded().verify([.1]).threshold(.1)
    assert f.threshold==pytest.approx(want, abs=1e-6) and f.calibration['fmr']==.1 and len(f.calibration['split_hash'])==64
    about = json.loads((tmp_path/'e'/'embedder.json').read_text())
    assert about['calibration']==f.calibration and about['format']==2
    assert f.shorten(4).threshold is None
    for bad in (dict(threshold=3, fmr=.1), dict(threshold=.5), [], 'x', dict(threshold=True, fmr=.1), dict(threshold=.5, fmr=0)):
        (tmp_path/'e'/'embedder.json').write_text(json.dumps(about|dict(calibration=bad)))
        with pytest.raises(ValueError, match='`calibration` must be null, or an object'): load_embedder(tmp_path/'e')
    for old in (about|dict(calibration=None), {k:o for k,o in about.items() if k!='calibration'}):
        (tmp_path/'e'/'embedder.json').write_text(json.dumps(old))
        assert load_embedder(tmp_path/'e').threshold is None

def test_trained_classes_calibrate_nothing(make_learner, tmp_path):
    learn = make_learner()
    learn.dls.n_train_classes = len(learn.dls.vocab)
    with pytest.raises(ValueError, match='not trained on'): learn.export_embedder(tmp_path/'e', fmr=.1, min_classes=2)

@pytest.mark.parametrize('known,unknown', [(100,50),(50,100),(2000,40)])
def test_intervals_of_an_open_set_have_all_their_samples(known, unknown):
    "However the draws come in blocks: against the definition with all of them at once"
    from dmlfast.retrieval import verify
    rng = np.random.default_rng(0)
    y = np.r_[np.arange(known).repeat(2),known+np.arange(unknown).repeat(2)]
    given = rng.normal(size=len(y))+(y<known),rng.random(len(y))<.8,y>=known,y
    o = verify.OpenSet(*map(torch.from_numpy, given), n_boot=400)
    s,draws = o.score,[next(class_draws(n, 400, i, 10**9)) for i,n in enumerate((known,unknown))]
    res = []
    for a,b in zip(*draws):
        w = b[y[o.unknown]-known]
        best = np.argsort(-s[o.unknown])
        t = s[o.unknown][best][np.searchsorted(w[best].cumsum(), .1*w.sum())]
        w = a[y[~o.unknown]]
        res.append(w[o.right[~o.unknown]&(s[~o.unknown]>=t)].sum()/w.sum())
    assert len(res)==400
    spread = np.diff(np.percentile(res, [2.5,97.5]))
    assert np.diff(o.interval(.1))==pytest.approx(spread, abs=1e-9)

def test_known_queries_with_nothing_to_find_are_no_misses():
    "Not itself, and not what is ignored: singletons and those whose mates are all hidden are left out, and it is said"
    x = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)))
    y = torch.arange(40)//4
    y[:4] = torch.arange(100, 104) # each alone
    kw = dict(unknown=.3, seed=1)
    o = open_set(x, y, x, y, self_exclude=torch.arange(40), **kw)
    kept = ~o.unknown
    assert not np.isin(o.labels[kept], np.arange(100, 104)).any() and 'nothing of theirs to find' in o.said
    ids = y.clone() # all of a class were seen together
    ids[4:8] = torch.arange(50, 54)
    o = open_set(x, y, x, y, self_exclude=torch.arange(40), ignore=(ids,ids), **kw)
    assert {*o.labels[~o.unknown].tolist()}<={1}
    other = open_set(x, y, x.clone(), y, **kw)
    assert 'nothing of theirs' not in other.said and len(other.labels)==40

def test_pairs_of_frames_and_of_any_layout():
    import pandas as pd
    rng = np.random.default_rng(0)
    x,y = rng.normal(size=(60,6)),np.arange(60)//6
    want = pair_scores(x, y)['eer']
    same = (pd.DataFrame(x),y),(x[::-1],y[::-1]),(x.astype('>f8'),y),(np.asfortranarray(x),y)
    for o,l in same: assert pair_scores(o, l)['eer']==want
