"What several tests share: data that is drawn once, and a small learner"
import os, subprocess, sys
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1') # networks this small gain nothing from threads, and on a busy machine they lose a lot by them
import matplotlib
matplotlib.use('agg')
import pytest

@pytest.fixture(scope='session')
def glyph_dir(tmp_path_factory):
    "A folder with the images of `glyphs`, 24 pixels to a side"
    from dmlfast.data.datasets import glyphs
    return glyphs(tmp_path_factory.mktemp('data'), size=24).path

@pytest.fixture(scope='session')
def few(glyph_dir):
    "Images of every twelfth glyph, a `MetricDataset`"
    from dmlfast.data.datasets import MetricDataset
    df = MetricDataset.from_folder(glyph_dir, seed=0).df
    return MetricDataset(df[df.label.isin(sorted(set(df.label))[::12])], glyph_dir, 'few glyphs', size=None, flip=False)

@pytest.fixture(scope='session')
def cub_dir(glyph_dir, tmp_path_factory):
    "Two hundred glyphs in the layout of the CUB-200-2011 download, eight images of each"
    path = tmp_path_factory.mktemp('cub')/'CUB_200_2011'
    names,images = {},[]
    for c,folder in enumerate(sorted(glyph_dir.iterdir())[:200], 1):
        names[c] = f'{c:03}.Glyph_{folder.name}'
        (path/'images'/names[c]).mkdir(parents=True)
        for o in sorted(folder.iterdir())[:8]:
            images.append((c, f'{names[c]}/{o.name}'))
            (path/'images'/images[-1][1]).symlink_to(o)
    for fn,rows in dict(images=[o for _,o in images], image_class_labels=[c for c,_ in images], classes=names.values()).items():
        (path/f'{fn}.txt').write_text('\n'.join(f'{i} {o}' for i,o in enumerate(rows, 1)))
    return path.parent

@pytest.fixture
def make_learner(few, tmp_path):
    "Function that makes a small learner on `few`"
    from fastai.torch_core import set_seed
    from dmlfast.all import TripletLoss, metric_learner
    def _make(loss=None, seed=0, bs=32, **kwargs):
        set_seed(seed)
        dls = few.dataloaders(bs=bs, per_class=4, seed=seed, num_workers=0)
        learn = metric_learner(dls, loss_func=loss or TripletLoss(),
            **{**dict(arch='test_resnet', emb_sz=16, pretrained=False, path=tmp_path), **kwargs})
        learn.remove_cbs([o for o in learn.cbs if type(o).__name__=='ProgressCallback'])
        learn.logger = lambda *a: None
        return learn
    return _make

@pytest.fixture(scope='session')
def harm():
    "Callback that ruins a head after each epoch's training: one number is left, so that no processor's roundings decide what is found"
    from fastai.callback.core import Callback
    class Harm(Callback):
        def after_train(self): self.learn.model.head.weight.data[1:] = self.learn.model.head.bias.data[1:] = 0
    return Harm()

def pytest_addoption(parser):
    parser.addoption('--save', action='store_true', help='store the outputs of the notebooks that pass')

@pytest.fixture(scope='session')
def site():
    "Folder of the built site; what is there is taken if it is up to date, so that `make docs` afterwards has nothing left to do"
    pytest.importorskip('sphinx', reason="the site is built with the packages of `pip install -e '.[docs]'`")
    root = Path(__file__).parent.parent
    res = subprocess.run([sys.executable, root/'docs'/'nbsite.py'], capture_output=True, text=True, timeout=600)
    assert res.returncode==0, res.stdout+res.stderr
    return root/'docs'/'_build'/'html'

def pytest_pycollect_makeitem(collector, name, obj):
    "`from fastai.vision.all import *` brings functions called `test_...`, which are no tests"
    if callable(obj) and hasattr(collector, 'obj') and getattr(obj, '__module__', None)!=getattr(collector.obj, '__name__', None): return []
