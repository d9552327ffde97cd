"The wheel, installed outside the tree, works without it"
import os, shutil, subprocess, sys, sysconfig
from pathlib import Path
import pytest

root = Path(__file__).parent.parent
example = """
import sys, dmlfast
from fastai.vision.all import *
from dmlfast.all import *
assert Path(dmlfast.__file__).is_relative_to(sys.prefix), dmlfast.__file__
dls = MetricDataset.from_folder(sys.argv[1], seed=0, size=None, flip=False).dataloaders(bs=128, per_class=16, num_workers=0)
learn = metric_learner(dls, 'test_resnet', DRTripletLoss(margin=0.28, gamma=0.49), emb_sz=128, pretrained=False)
with learn.no_bar(): learn.fit_one_cycle(1, 1e-4)
"""

def _run(*args, **kwargs):
    res = subprocess.run([str(o) for o in args], capture_output=True, text=True, **kwargs)
    assert res.returncode==0, res.stdout+res.stderr
    return res.stdout

@pytest.fixture(scope='module')
def env(tmp_path_factory):
    "Folder of an environment that has the wheel, and sees the dependencies of this one"
    tmp = tmp_path_factory.mktemp('wheel')
    src = tmp/'src'
    shutil.copytree(root/'dmlfast', src/'dmlfast', ignore=shutil.ignore_patterns('__pycache__'))
    for o in ('setup.py','settings.ini','pyproject.toml','MANIFEST.in','README.md','LICENSE'): shutil.copy(root/o, src)
    _run(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '--no-index', '-w', tmp, src)
    _run(sys.executable, '-m', 'venv', '--without-pip', tmp/'env')
    py = tmp/'env'/'bin'/'python'
    site = Path(_run(py, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip())
    _run(sys.executable, '-m', 'pip', '-q', '--python', py, 'install', '--no-deps', '--no-index', next(tmp.glob('*.whl')))
    (site/'dependencies.pth').write_text(sysconfig.get_path('purelib')) # its own .pth files, the editable install among them, are not read
    return tmp/'env'

def test_example(env, glyph_dir, tmp_path):
    out = _run(env/'bin'/'python', '-W', 'ignore', '-c', example, glyph_dir, cwd=tmp_path)
    assert out.startswith('[0, ')

def test_command(env, tmp_path):
    out = _run(env/'bin'/'dmlfast-demo', '--help', cwd=tmp_path)
    assert '--data' in out and 'default: 0' in out
    for o in ('train','eval','tune','bench','explore','serve'):
        assert _run(env/'bin'/f'dmlfast-{o}', '--help', cwd=tmp_path).startswith(f'usage: dmlfast-{o} ')

def test_files_of_the_browser(env, tmp_path):
    code = "from dmlfast.web.app import package_files; print(sorted(package_files()))"
    out = _run(env/'bin'/'python', '-W', 'ignore', '-c', code, cwd=tmp_path)
    assert all(o in out for o in ("'map.js'","'map.css'","'icon.svg'"))

def test_help_imports_nothing_heavy(env, tmp_path):
    code = "import sys, dmlfast.cli; sys.exit(any(o in sys.modules for o in ('torch','fastai','timm','pandas','matplotlib')))"
    _run(env/'bin'/'python', '-c', code, cwd=tmp_path)
