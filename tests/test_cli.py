"The commands, as a shell runs them"
import json, subprocess, sys
from pathlib import Path
import pytest

def run(*args, cwd):
    "Exit status, and the lines of standard output and error"
    res = subprocess.run([str(o) for o in (Path(sys.executable).parent/'dmlfast-demo', *args)], capture_output=True, text=True, cwd=cwd, timeout=300)
    return res.returncode,res.stdout,res.stderr.strip().splitlines()

@pytest.fixture
def folder(few, tmp_path):
    "A folder with eight classes of images"
    for c in sorted(set(few.df.label))[:8]:
        (tmp_path/'own'/c).mkdir(parents=True)
        for f in few.items().filter(lambda o: o.parent.name==c): (tmp_path/'own'/c/f.name).write_bytes(f.read_bytes())
    return tmp_path/'own'

def test_demo_on_a_folder(folder, tmp_path):
    status,out,err = run('--data', folder, '--arch', 'test_resnet', '--weights', _weights(tmp_path), '--epochs', 1, '--size', 32, '--bs', 16, '--out', 'res', cwd=tmp_path)
    assert status==0, err
    assert 'Queries with their nearest neighbours: res/neighbours.png' in out
    scores = json.loads((tmp_path/'res'/'scores.json').read_text())
    assert list(scores)==['raw pixels','untrained','trained']
    assert f"{scores['trained']['recall@1']:.3f}" in out.splitlines()[-3]
    assert (tmp_path/'res'/'neighbours.png').stat().st_size>10_000

def _weights(path):
    import timm
    from safetensors.torch import save_file
    save_file(timm.create_model('test_resnet', num_classes=0).state_dict(), path/'w.safetensors')
    return path/'w.safetensors'

def test_bad_input_gets_one_sentence(folder, tmp_path):
    "Faults that are found before anything is trained, all in one process because starting one is slow"
    from dmlfast.cli import _sentence, run_demo
    (tmp_path/'empty').mkdir()
    def said(**kwargs):
        with pytest.raises((ValueError,RuntimeError)) as e: run_demo(**{**dict(data=folder, bs=16, size=32, arch='test_resnet', out=tmp_path/'res'), **kwargs})
        assert '\n' not in _sentence(e.value)
        return _sentence(e.value)
    assert 'There is no folder' in said(data=tmp_path/'nowhere')
    assert 'There are no images in' in said(data=tmp_path/'empty')
    one = folder/sorted(o.name for o in folder.iterdir())[0]
    assert f"of one class ('{one.name}')" in said(data=one)
    assert "timm has no model 'resnett'" in said(arch='resnett', weights='x')
    assert 'do not fit a ResNet: ' in said(arch='resnet10t', weights=_weights(tmp_path))
    assert "There is no file of weights 'x.pth'" in said(weights='x.pth')
    assert '1 or more; got 0' in said(emb_sz=0, weights=_weights(tmp_path))
    assert 'bs=17 and per_class=4' in said(bs=17)
    assert 'needs 16 classes and there are 4: take bs=16' in said(bs=64)
    assert 'must be positive; got 0' in said(epochs=0, weights=_weights(tmp_path))
    assert "given as name=value,name=value; got 'same'" in said(arch_args='same')
    cut = next(one.glob('*.png'))
    cut.write_bytes(cut.read_bytes()[:100])
    assert f"1 of {len(list(folder.rglob('*.png')))} images cannot be read: '{cut}'" in said()
    assert not (tmp_path/'res').exists()

def test_the_sentence_reaches_the_shell(tmp_path):
    status,out,err = run('--data', tmp_path/'nowhere', cwd=tmp_path)
    assert status==1 and err==[f"dmlfast-demo: There is no folder '{tmp_path}/nowhere'."]
