"Near duplicates across the parts of a data set, against a loop over all pairs"
import pytest
import numpy as np, pandas as pd
from dmlfast.data import MetricDataset
from dmlfast.retrieval import Embedded

def data(role=False, n=60):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(path=[f'{i}.png' for i in range(n)], label=[f'c{i//4}' for i in range(n)],
        split=['train']*28+['val']*16+['test']*16))
    if role: df['role'] = ['']*44+['query','gallery']*8
    ds = MetricDataset(df, 'nowhere', check_files=False)
    x = rng.normal(size=(n,6))
    for a,b in ((0,30),(1,50),(2,3),(45,29),(50,51),(46,48),(4,31),(4,59)): x[b] = x[a]+.05*rng.normal(size=6)
    return ds,x/np.linalg.norm(x, axis=1, keepdims=True)

@pytest.mark.parametrize('role', [False,True])
def test_all_pairs_across_parts(role):
    ds,x = data(role)
    part = ds.df.split+(ds.df.role if role else '')
    order = ['train','val','testquery','test','testgallery']
    want = {tuple(sorted((i,j), key=lambda o: (order.index(part[o]),o))) for i in range(60) for j in range(i) if part[i]!=part[j] and
        x[i]@x[j]>=.95}
    got = ds.leaks(Embedded(x, items=ds.items()), .95)
    assert set(zip(got.a, got.b))==want and len(got)==len(want)>=4 and ((50,51) in want)==role
    np.testing.assert_allclose(got.similarity, (x[got.a]*x[got.b]).sum(1), atol=1e-6)
    assert (got.similarity.diff().dropna()<=0).all() and (got.path_a==[f'{i}.png' for i in got.a]).all()

def test_without():
    ds,x = data(True)
    got = ds.leaks(Embedded(x, items=ds.df.path), .95)
    clean = ds.without(got)
    assert len(ds)==60 and sorted({*ds.df.path}-{*clean.df.path})==sorted({*got.path_a})
    keep = np.isin(ds.df.path, clean.df.path)
    assert not len(clean.leaks(Embedded(x[keep], items=clean.items()), .95))
    assert len(ds.without([0,5]))==58 and list(ds.without([0,5]).df.path[:2])==['1.png','2.png']

def test_a_part_of_the_images():
    ds,x = data()
    rows = np.r_[50,0:10,30]
    got = ds.leaks(Embedded(x[rows], items=[ds.df.path[i] for i in rows]), .95)
    assert set(zip(got.a, got.b))=={(0,30),(1,50)}

def test_refused():
    ds,x = data()
    with pytest.raises(ValueError, match='have no names'): ds.leaks(Embedded(x))
    with pytest.raises(ValueError, match="60 of 60 embeddings are of no image of images, such as 'x'"):
        ds.leaks(Embedded(x, items=['x']*60))
    none = ds.leaks(Embedded(np.eye(60), items=ds.items()))
    assert not len(none) and len(ds.without(none))==60
    with pytest.raises(ValueError, match='no leaks to draw'): ds.plot_leaks(none)
