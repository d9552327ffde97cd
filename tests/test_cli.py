"The commands, as a shell runs them"
import json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest

def run(*args, cwd):
    "Exit status, and the lines of standard output and error"
    res = subprocess.run([str(o) for o in (Path(sys.executable).parent/'dmlfast-demo', *args)], capture_output=True, text=True, cwd=cwd,
        timeout=300)
    return res.returncode,res.stdout,res.stderr.strip().splitlines()

@pytest.fixture
def folder(few, tmp_path):
    "A folder with eight classes of images"
    for c in sorted(set(few.df.label))[:8]:
        (tmp_path/'own'/c).mkdir(parents=True)
        for f in few.items().filter(lambda o: o.parent.name==c): (tmp_path/'own'/c/f.name).write_bytes(f.read_bytes())
    return tmp_path/'own'

def test_demo_on_a_folder(folder, tmp_path):
    status,out,err = run('--data', folder, '--arch', 'test_resnet', '--weights', _weights(tmp_path), '--epochs', 1, '--size', 32, '--bs',
        16, '--out', 'res', cwd=tmp_path)
    assert status==0, err
    assert 'Queries with their nearest neighbours: res/neighbours.png' in out
    scores = json.loads((tmp_path/'res'/'scores.json').read_text())
    assert list(scores)==['raw pixels','features','start','trained','sentence']
    assert f"{scores['trained']['recall@1']:.3f}" in out.splitlines()[-5] and scores['sentence'] in out.splitlines()
    rows = [next(i for i,o in enumerate(out.splitlines()) if o.startswith(k)) for k in ('raw pixels','features','start','trained')]
    assert rows==sorted(rows) # each as it comes
    assert (tmp_path/'res'/'neighbours.png').stat().st_size>10_000
    assert scores['raw pixels']['recall@1']==pytest.approx(_recall_of_pixels(folder), abs=1e-6)

def _recall_of_pixels(folder):
    "Share of the test images whose nearest other one, by the correlation of their pixels, is of their class"
    import numpy as np
    from dmlfast.data import MetricDataset
    x,y = zip(*((x.flatten(1).numpy(), y.numpy()) for x,
        y in MetricDataset.from_folder(folder).dataloaders(16, valid='test', size=32, num_workers=0).valid))
    y,s = np.concatenate(y),np.corrcoef(np.concatenate(x))
    np.fill_diagonal(s, -2)
    return (y[s.argmax(1)]==y).mean()

def _weights(path):
    import timm, torch
    from safetensors.torch import save_file
    torch.manual_seed(0)
    save_file(timm.create_model('test_resnet', num_classes=0).state_dict(), path/'w.safetensors')
    return path/'w.safetensors'

def test_bad_input_gets_one_sentence(folder, tmp_path):
    "Faults that are found before anything is trained, all in one process because starting one is slow"
    from dmlfast.cli import run_demo
    from dmlfast.cli.commands import sentence
    (tmp_path/'empty').mkdir()
    def said(**kwargs):
        with pytest.raises((ValueError,RuntimeError)) as e:
            run_demo(**{**dict(data=folder, bs=16, size=32, arch='test_resnet', out=tmp_path/'res'), **kwargs})
        assert '\n' not in sentence(e.value)
        return sentence(e.value)
    assert 'There is no folder' in said(data=tmp_path/'nowhere')
    assert 'There are no images in' in said(data=tmp_path/'empty')
    one = folder/sorted(o.name for o in folder.iterdir())[0]
    assert f"of one class ('{one.name}')" in said(data=one)
    assert "no timm model 'resnett'" in said(arch='resnett', weights='x')
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
    assert status==2 and err==[f"dmlfast-demo: There is no folder '{tmp_path}/nowhere'."]
    from dmlfast.cli import dmlfast_demo
    assert said(dmlfast_demo, '--epoch', 3)=="dmlfast-demo: There is no argument '--epoch'; the nearest is '--epochs'."

# The commands for runs: in this process where possible, because starting one is slow.

small = '--arch test_resnet --no-pretrained --emb-sz 16 --size 24 --bs 32 --per-class 4 --workers 0 --lr 6e-3 --loss dr_triplet'.split()

def do(func, *args):
    "Exit status, and what a command writes to standard output and error, in this process"
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO
    from dmlfast.cli import run_command
    out,err = StringIO(),StringIO()
    with redirect_stdout(out), redirect_stderr(err): status = run_command(func, [str(o) for o in args])
    return status,out.getvalue(),err.getvalue()

def said(func, *args, status=2):
    "The sentence of a command that is refused, or fails"
    res = do(func, *args)
    assert res[0]==status, res
    lines = [o for o in res[2].splitlines() if o.startswith(func.__name__.replace('_', '-'))]
    assert len(lines)==1, res
    return lines[0]

def shell(func, *args, first='', **kwargs):
    "A command as a shell runs it, after some code"
    code = f'{first}\nfrom dmlfast.cli import {func.__name__} as f; f()'
    return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, **kwargs)

@pytest.fixture
def table(few, tmp_path):
    "A table of the images, all of it in one file"
    df = few.df.assign(path=[str(few.path/o) for o in few.df.path])
    df[['path','label','split']].to_csv(tmp_path/'few.csv', index=False)
    return tmp_path/'few.csv'

@pytest.fixture
def trained(table, tmp_path):
    "A run on the table, and what was said; with the strides of its embedder, whose numbers are then the same to the last bit"
    from dmlfast.cli import dmlfast_train
    status,out,err = do(dmlfast_train, '--data', table, *small, '--set', 'fit.channels_last=false', '--epochs', 1, '--out', tmp_path/'run',
        '--json')
    assert status==0, err
    return json.loads(out)

def options():
    "Rows of the table of the two systems' options in the notebook: script, option, and the words of the command line here"
    import shlex
    from fastcore.nbio import read_nb
    text = '\n'.join(c.source for c in read_nb(Path(__file__).parent.parent/'nbs'/'api'/'cli'/'00_arguments.ipynb').cells
        if c.cell_type=='markdown')
    return [(script,option,shlex.split(here)) for script,option,
        here in re.findall(r'^\| (`\S+\.py`|Baselines) \| (.+?) \| `(.+?)` \|', text, re.M)]

def test_every_option_of_the_two_systems():
    import dmlfast.cli as cli
    theirs = dict(
        train='''loss mvr_reg margin ms_thresh batch_size images_per_class balanced_sampler_train balanced_sampler_validation lr wdecay
            emb_dim bn_freeze patience seed gpu_id tnsrbrd_dir model_save_dir exp_name''',
        test='model_save_dir exp_name', hyper_train='gpu_id',
        Standard_Training='''dataset lr fc_lr_mul n_epochs kernels bs samples_per_class seed scheduler gamma decay tau p_task loss sampling
            multitask_loss_gamma margin beta_lr beta nu beta_constant l2npair ranking_bs ranking_distortion_strength ranking_N ranking_s
            ranking_alfa ranking_beta ranking_lambda k_vals embed_dim g_net_hidden_layer_dim arch not_pretrained num_frozen_submodules
            gpu savename source_path save_path tensorboard_save_path''',
        Baselines='proxy_lr grad_measure dist_measure')
    have = {(s.strip('`').removesuffix('.py'),o.strip('`').removeprefix('--')) for s,o,_ in options()}
    assert {(k,o) for k,v in theirs.items() for o in v.split()}<=have
    known = cli.parse_command(cli.dmlfast_train, [])
    for _,option,(name,*argv) in options():
        args = cli.parse_command(getattr(cli, name.replace('-', '_')), argv)
        if name!='dmlfast-eval': cli.run_settings(**{k:v for k,v in args.items() if k in known and (name=='dmlfast-train' or k!='epochs')})

def test_options_mean_what_the_table_says():
    from dmlfast.cli import dmlfast_train, parse_command, run_settings
    def _s(words): return run_settings(**parse_command(dmlfast_train, words.split()))
    assert _s('--sched step --factor .5 --steps 30 50')['fit']==dict(sched='step', factor=.5, steps=[30,50])
    assert _s('--ssr --ssr-args p=.8,per=epoch,views.strength=.2,loss.alpha=.05')['ssr']==dict(p=.8, per='epoch', views=dict(strength=.2),
        loss=dict(alpha=.05))
    assert _s('--loss margin --miner distance_weighted --loss_lr .5 --loss_args learn_beta=false')['loss']==dict(name='margin',
        miner=dict(name='distance_weighted'), lr_mult=.5, learn_beta=False)
    assert _s('--freeze-bn affine --half fp16 --no-pretrained --arch-args pad_type=same')==dict(loss=dict(name='dr_triplet'),
        model=dict(freeze_bn='affine', pretrained=False, timm=dict(pad_type='same')), fit=dict(precision='fp16'))
    assert _s('--set loss.name=ms --set loss.lam=.3 seed=4')==dict(loss=dict(name='ms', lam=.3), seed=4)

def test_arguments_win_over_the_file(tmp_path):
    from dmlfast.cli import dmlfast_train, parse_command, run_settings
    (tmp_path/'c.toml').write_text('recipe = "margin"\n[loss]\nname = "DRTripletLoss"\nmargin = 0.1\ngamma = 0.5\n[data]\nreader = '
        '"cub200"\npath = "birds"\nval_pct = 0.3\n[fit]\nlr = 0.01\n')
    def _s(words): return run_settings(**parse_command(dmlfast_train, ['--config',str(tmp_path/'c.toml'),*words.split()]))
    assert _s('--loss dr_triplet --loss-args gamma=.1')['loss']==dict(name='dr_triplet', margin=.1, gamma=.1)
    assert _s('--loss ms')['loss']==dict(name='ms')
    assert _s('--path elsewhere')['data']==dict(reader='cub200', path='elsewhere', val_pct=.3)
    assert _s('--data glyphs')['data']==dict(reader='glyphs') and _s('--data glyphs')['fit']==dict(lr=.01)

def test_help_names_what_there_is():
    "It is there before the losses are read, so that it cannot ask them"
    from dmlfast.losses import register_loss, register_miner
    from dmlfast.study.settings import declared_settings
    from dmlfast.train.recipe import recipes
    def words(path): return re.findall(r'\w+', declared_settings()[path].help.partition("; the")[0].partition(', for losses')[0])
    for path,registry in {'loss.name':register_loss, 'loss.miner.name':register_miner}.items():
        assert {registry.full_name(o) for o in words(path) if o!='or'}=={*registry}
    assert {*recipes}<={*words('recipe')}

def test_help_is_there_at_once(tmp_path):
    import dmlfast.cli as cli
    for f in (cli.dmlfast_train, cli.dmlfast_eval, cli.dmlfast_tune, cli.dmlfast_bench, cli.dmlfast_explore, cli.dmlfast_serve):
        code = f'''
import sys, resource
from dmlfast.cli import {f.__name__} as f
sys.argv.append('--help')
try: f()
finally:
    u = resource.getrusage(resource.RUSAGE_SELF)
    heavy = [o for o in ('torch','fastai','timm','pandas','matplotlib','optuna') if o in sys.modules]
    print('heavy', heavy, u.ru_utime+u.ru_stime)
'''
        out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
        assert 'heavy []' in out and float(out.split()[-1])<1
        shown = set(re.findall(r'(?:^|\s)--([a-z-]+)', out))
        p = cli.parse_command(f, ['x'] if f not in (cli.dmlfast_train, cli.dmlfast_tune) else [])
        assert {k.lower().replace('_', '-') for k in p}-{'run','plan','folder'}<=shown

def test_training_on_a_table(trained, table, tmp_path):
    from dmlfast.cli import dmlfast_train
    out = tmp_path/'run'
    assert sorted(o.name for o in out.iterdir())==['checkpoint','embedder','history.csv','results.json','settings.toml']
    assert trained=={'out':str(out), **json.loads((out/'results.json').read_text())}
    assert trained['scores']['val']['n_classes']==4 and trained['data']=='few'
    assert 'holds a finished run' in said(dmlfast_train, '--data', table, *small, '--out', out)
    status,text,_ = do(dmlfast_train, '--config', out/'settings.toml', '--out', tmp_path/'again', '--json')
    assert status==0 and json.loads(text)['scores']==trained['scores'] # the file that a run writes repeats it
    assert (tmp_path/'again'/'settings.toml').read_text()==(out/'settings.toml').read_text()
    before = (out/'history.csv').stat().st_mtime_ns
    status,text,_ = do(dmlfast_train, '--out', out, '--resume', '--json')
    assert status==0 and json.loads(text)==trained and (out/'history.csv').stat().st_mtime_ns==before
    assert not (out/'report').exists()
    status,text,err = do(dmlfast_train, '--out', out, '--resume', '--report', '--json') # which was forgotten
    assert status==0 and json.loads(text)['scores']==trained['scores'] and (out/'report'/'index.html').stat().st_size>50_000, err
    embedder = (out/'embedder'/'embedder.json').stat().st_mtime_ns
    shutil.rmtree(out/'report')
    (out/'checkpoint'/'checkpoint.pt').rename(tmp_path/'kept.pt')
    assert 'its page needs it: `dmlfast-eval' in said(dmlfast_train, '--out', out, '--resume', '--report')
    (tmp_path/'kept.pt').rename(out/'checkpoint'/'checkpoint.pt')
    assert (out/'embedder'/'embedder.json').stat().st_mtime_ns==embedder
    assert '`fit` was' in said(dmlfast_train, '--out', out, '--resume', '--lr', .5)
    assert '--resume goes on' in said(dmlfast_train, '--out', out, '--resume', '--wd', 0) # 0 is said, and not left out
    status,_,err = do(dmlfast_train, '--data', table, *small, '--epochs', 1, '--seed', 2, '--out', out, '--overwrite', '--tensorboard',
        tmp_path/'tb', '--report', '--monitor', 'map@r', '--patience', 3, '--ssr', '--ssr-args', 'm=4,n=2')
    assert status==0 and (out/'report'/'index.html').stat().st_size>50_000, err
    assert (out/'best.pth').exists() and _steps(tmp_path/'tb')
    assert 'ssr_loss' in (out/'history.csv').read_text()

def _steps(folder):
    "Steps of the curve of the training loss in a folder of TensorBoard"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    return [o.step for o in EventAccumulator(str(folder)).Reload().Scalars('train_loss')]

def test_the_curves_are_those_of_the_fit(table, tmp_path):
    "And not also of the head, which is trained before it, at the same steps"
    from dmlfast.cli import dmlfast_train
    status,_,err = do(dmlfast_train, '--data', table, *small, '--epochs', 1, '--head-epochs', 2, '--tensorboard', tmp_path/'tb', '--out',
        tmp_path/'run')
    assert status==0, err
    steps = _steps(tmp_path/'tb')
    assert len(steps)>1 and steps==sorted(steps) and steps.count(1)==1

def test_a_search_space_in_words():
    from dmlfast.cli.studies import _space
    assert _space(['model.arch=hf-hub:timm/x,resnet18', 'loss.margin=0:1', 'fit.lr=1e-4:1e-2:log', 'model.emb_sz=64']) == {
        'model.arch':['hf-hub:timm/x','resnet18'], 'loss.margin':(0,1), 'fit.lr':(1e-4,1e-2,'log'), 'model.emb_sz':[64]}

def test_a_loss_of_ones_own_by_name(table, tmp_path):
    "A script that registers a loss and a miner and then calls the command"
    from dmlfast.cli import dmlfast_train
    from dmlfast.losses import Miner, MetricLoss, TripletLoss, all_triplets, register_loss, register_miner
    @register_miner
    class EveryMiner(Miner):
        def mine(self, embs, labels, d2): return all_triplets(labels)
    @register_loss
    class MineLoss(MetricLoss):
        def __init__(self, width:float=.2, miner=None):
            super().__init__()
            self.width,self.miner = width,miner
        def compute(self, embs, labels): return TripletLoss(self.width, miner=self.miner)(embs, labels)
    at = small.index('--loss')
    args = ['--data', table, *small[:at], *small[at+2:], '--epochs', 1, '--miner', 'every', '--json']
    try:
        status,out,err = do(dmlfast_train, *args, '--loss', 'mine', '--loss-args', 'width=.4', '--out', tmp_path/'run')
        assert status==0, err
        assert '[loss]\nname = "mine"\nwidth = 0.4\n' in (tmp_path/'run'/'settings.toml').read_text()
        assert "the nearest is 'MineLoss'" in said(dmlfast_train, *args, '--loss', 'minee', '--out', tmp_path/'x')
    finally:
        register_loss.remove('MineLoss')
        register_miner.remove('EveryMiner')
    assert "There is no loss 'mine'" in said(dmlfast_train, *args, '--loss', 'mine', '--out', tmp_path/'y')

def test_published_protocol_on_a_folder(folder, tmp_path):
    from dmlfast.cli import dmlfast_train
    args = ['--data', folder, *small, '--bs', 16][:-2] + ['--set', 'batch.bs=16']
    assert "'batch.bs' is given twice" in said(dmlfast_train, *args)
    args = ['--data', folder, *[16 if o=='32' else o for o in small], '--epochs', 1]
    status,_,err = do(dmlfast_train, *args, '--valid', 'test', '--out', tmp_path/'run')
    assert status==0, err
    assert list(json.loads((tmp_path/'run'/'results.json').read_text())['scores'])==['test']
    status,_,err = do(dmlfast_train, *args, '--valid', 'none', '--out', tmp_path/'none')
    assert status==0 and json.loads((tmp_path/'none'/'results.json').read_text())['scores']=={}, err

def test_evaluation(trained, folder, tmp_path, monkeypatch):
    from dmlfast.cli import dmlfast_eval
    run = tmp_path/'run'
    status,text,err = do(dmlfast_eval, run, '--split', 'val', '--workers', 0, '--json')
    assert status==0, err
    got = json.loads(text)
    assert got['scores']['metrics']['map@r']['mean']==pytest.approx(trained['scores']['val']['metrics']['map@r']['mean'], abs=1e-6)
    assert got['data_hash']==trained['data_hash']
    status,text,err = do(dmlfast_eval, run, '--workers', 0, '--metrics', 'recall@1', 'map@r')
    assert status==0 and 'few, test' in text and 'recall@1' in text and 'nmi' not in text, err
    assert 'fnmr@fmr=0.001' in text and 'impostor pairs of' in text
    status,text,err = do(dmlfast_eval, run, '--workers', 0, '--metrics', 'map@r', 'nmi', '--rerank', 'qe')
    assert status==0 and re.search(r'metric +plain +qe +difference', text) and 'clusters or pairs, which have no ranking: nmi' in text, err
    status,text,err = do(dmlfast_eval, run/'embedder', '--data', folder, '--workers', 0, '--out', tmp_path/'scores', '--report')
    assert status==0 and 'own, all' in text, err
    assert sorted(o.name for o in (tmp_path/'scores').iterdir())==['curves.png','neighbours.png','report','results.json','worst.png']
    assert json.loads((tmp_path/'scores'/'results.json').read_text())['scores']['n_queries']==len(list(folder.rglob('*.png')))
    rates = json.loads((tmp_path/'scores'/'results.json').read_text())['verification']['rates']
    assert [o['fmr'] for o in rates]==[1e-3,1e-2,1e-1] and rates[0]['threshold']>rates[2]['threshold']
    page = (tmp_path/'scores'/'report'/'index.html').read_text(encoding='utf-8')
    for o in ('measured on own, all','DRTripletLoss(','<th scope="row">trained on</th><td>few</td>',
        '<th scope="row">fit.n_epoch</th><td>1</td>','hash of the splits'):
        assert o in page, o
    for i,f in enumerate(sorted(folder.rglob('*.png'))[:5]): # classes of one image each
        (tmp_path/'singles'/str(i)).mkdir(parents=True)
        (tmp_path/'singles'/str(i)/'1.png').write_bytes(f.read_bytes())
    with pytest.warns(UserWarning, match='have one image only'):
        status,text,err = do(dmlfast_eval, run/'embedder', '--data', tmp_path/'singles', '--workers', 0, '--out', tmp_path/'s', '--report')
    assert status==0 and 'No class has two items' in text, err
    assert sorted(o.name for o in (tmp_path/'s').iterdir())==['neighbours.png','report','results.json']
    assert 'nothing to find, and neither curves nor worst queries' in (tmp_path/'s'/'report'/'index.html').read_text(encoding='utf-8')
    assert 'optimiser' not in page and 'No fit is known' not in page
    def no(*args): return said(dmlfast_eval, *args)
    assert 'holds scores' in no(run, '--out', tmp_path/'scores')
    assert 'is the folder of a run' in no(run, '--out', run)
    assert '--data' in no(run/'embedder')
    assert 'is neither a run' in no(tmp_path/'nowhere')
    assert "has no split 'tset'" in no(run, '--split', 'tset')
    assert "no metric 'recal'; the nearest is 'recall'" in no(run, '--metrics', 'recal')
    assert "no reranker 'k-recip'; the nearest is 'k-reciprocal'" in no(run, '--rerank', 'k-recip')
    (tmp_path/'my_metrics.py').write_text("from dmlfast.retrieval.metrics import register_metric\n@register_metric(depth=1)\ndef "
        "first(ranks, there): return ranks[:,0]==1\n")
    monkeypatch.syspath_prepend(tmp_path)
    from dmlfast.retrieval.metrics import register_metric
    try:
        got = json.loads(do(dmlfast_eval, run, '--workers', 0, '--metrics', 'recall@1', 'my_metrics:first',
            'fnmr@fmr=1e-2', '--json')[1])['scores']['metrics']
    finally: register_metric.remove('first')
    assert got['first']==got['recall@1'] and 0<=got['fnmr@fmr=1e-2']['mean']<=1
    assert 'classes or queries' in no(run, '--ci', 'images')
    assert 'numbers are shortened to 1 to' in no(run, '--dims', 4096)
    with monkeypatch.context() as m:
        m.chdir(tmp_path)
        # as the other commands have a folder
        assert do(dmlfast_eval, run, '--split', 'val', '--workers', 0, '--n-boot', 10, '--report')[0]==0
        assert (tmp_path/'dmlfast-eval'/'report'/'index.html').exists()
    (run/'embedder'/'weights.safetensors').write_bytes(b'')
    assert 'changed or cut off' in no(run)

def test_evaluation_beside_the_features(table, tmp_path):
    "Those that the run began with, with the numbers that the run itself found, in the scores and on the page"
    from dmlfast.cli import dmlfast_eval, dmlfast_train
    args = [o for o in small if o!='--no-pretrained']+['--weights', _weights(tmp_path), '--plain', '--epochs', 1, '--out', tmp_path/'run',
        '--json']
    status,text,err = do(dmlfast_train, '--data', table, *args)
    assert status==0, err
    want = json.loads(text)['gain']['val']
    status,text,err = do(dmlfast_eval, tmp_path/'run', '--split', 'val', '--workers', 2, '--bs', 16, '--out', tmp_path/'scores',
        '--report', '--json')
    assert status==0, err
    got = json.loads(text)['gain']
    for part in ('features','trained'):
        assert got[part]['map@r']==pytest.approx(want[part]['map@r'], abs=1e-6) and got[part]['recall@1']==want[part]['recall@1']
    page = (tmp_path/'scores'/'report'/'index.html').read_text(encoding='utf-8')
    assert 'id="gain"' in page and f"<td>{want['features']['map@r']:.4f}</td>" in page
    assert str(tmp_path) not in re.sub(r'<h2 id="repeat">.*', '', page, flags=re.S)

def test_lengths_that_a_run_was_trained_with(table, tmp_path):
    "Measured without a word, each as the first numbers of the embeddings are; others by name"
    from dmlfast.cli import dmlfast_eval, dmlfast_train
    from dmlfast.deploy import load_embedder
    from dmlfast.data.datasets import MetricDataset
    run = tmp_path/'run'
    status,_,err = do(dmlfast_train, '--data', table, *small, '--dims', 16, 4, '--epochs', 1, '--out', run)
    assert status==0, err
    args = '--split','val','--workers',0,'--metrics','recall@1','map@r'
    status,text,err = do(dmlfast_eval, run, *args, '--json')
    assert status==0, err
    got,emb = json.loads(text),load_embedder(run/'embedder').embedded(MetricDataset.from_csv(table), 'val')
    assert list(got['lengths'])==['16','4'] and got['lengths']['16']['metrics']==got['scores']['metrics']
    import torch
    from dmlfast.retrieval.metrics import evaluate_retrieval
    want = evaluate_retrieval(torch.nn.functional.normalize(emb.embs[:,:4]), emb.labels, metrics=['recall@1','map@r'])
    for k in ('recall@1','map@r'): assert got['lengths']['4']['metrics'][k]['mean']==pytest.approx(want[k], abs=1e-6)
    text = do(dmlfast_eval, run, *args, '--dims', 8, '--n-boot', 10)[1]
    assert re.search(r'^8 +[01]\.', text, re.M) and not re.search(r'^4 +[01]\.', text, re.M)

def test_refused_before_any_work(folder, tmp_path):
    from dmlfast.cli import dmlfast_bench, dmlfast_train, dmlfast_tune
    def no(*args): return said(dmlfast_train, *args, '--out', tmp_path/'x')
    assert "There is no argument '--margn'" in no('--margn', 1)
    assert "nearest is '--loss-args'" in no('--loss_arg', 'margin=1')
    assert "invalid int value: 'many'" in no('--epochs', 'many')
    assert '--lr is given twice' in no('--lr', .1, '--lr', .2)
    assert 'unrecognized arguments: birds' in no('birds')
    assert "nearest is 'loss.margin'" in no('--loss', 'triplet', '--loss-args', 'margn=.1')
    assert "nearest is 'loss.margin'" in no('--loss-args', 'margn=.1') and 'needs --ssr' in no('--ssr-args', 'm=1')
    assert "There is no data set, folder or table 'folder'" in no('--data', 'folder')
    assert 'given as name=value' in no('--set', 'loss')
    assert '--path is the folder' in no('--data', folder, '--path', 'x')
    assert 'take one of them' in no('--resume', '--overwrite') and 'no run to resume' in no('--resume')
    assert 'take one of them' in no('--no-pretrained', '--weights', 'w.pth')
    assert "for the schedule 'step'" in no('--steps', 3)
    assert 'would choose an epoch' in no('--valid', 'test', '--monitor', 'recall@1')
    assert "There is no file 'c.toml'" in no('--config', 'c.toml')
    assert '`fit.fmr`' in no('--fmr', 1.5)
    assert no('--set', 'data.reader=folder').endswith("The data set 'folder' cannot be made without `path`, which is not set.")
    (tmp_path/'file').write_text('')
    assert "file' is a file" in no('--data', folder, '--tensorboard', tmp_path/'file'/'tb')
    assert "'fit.lr' is given twice" in said(dmlfast_tune, '--space', 'fit.lr=1e-3', 'fit.lr=1e-4:1e-3', '--out', tmp_path/'x')
    few = '--arch test_resnet --no-pretrained --bs 8 --per-class 4 --size 24 --workers 0 --epochs 1 --fmr .01'.split()
    with pytest.warns(UserWarning, match='All validation images are of one class'):
        # which no option changes
        assert no('--data', folder, *few).endswith('calibrated on 20 validation classes or more, and there are 1.')
    assert not (tmp_path/'x').exists()
    assert "no timm model 'resnett'" in said(dmlfast_train, '--data', folder, '--arch', 'resnett', '--bs', 8, '--out', tmp_path/'x')
    assert not (tmp_path/'x').exists()
    assert "'fit.n_epoch' cannot be searched for" in said(dmlfast_tune, '--space', 'fit.n_epoch=1:5', '--out', tmp_path/'x')
    assert "no setting 'loss.magin'" in said(dmlfast_tune, '--loss', 'triplet', '--space', 'loss.magin=.1:.5', '--out', tmp_path/'x')
    assert 'no file' in said(dmlfast_bench, tmp_path/'no.toml') and not (tmp_path/'x').exists()

odd = ['', 'None', '-3', 'nan', 'inf', 'word', '1'+'0'*30, 'a=(1,(2,3))']

def commands():
    "Functions of all console scripts"
    import configparser, importlib
    ini = configparser.ConfigParser(delimiters='=')
    ini.read(Path(__file__).parent.parent/'settings.ini', encoding='utf-8')
    for o in ini['DEFAULT']['console_scripts'].split():
        yield getattr(importlib.import_module(o.split('=')[1].split(':')[0]), o.split(':')[1])

def arguments(func):
    "The arguments of a command that take a value, by the option or, where there is none, by the name"
    from dmlfast.cli.commands import _parser
    return [(a.option_strings or [a.dest])[-1] for a in _parser(func)._actions if a.nargs!=0 and a.dest not in ('pdb','xtra')]

@pytest.fixture
def begins(tmp_path, monkeypatch):
    "Function that says how a command ends that does not train: the sentence that refuses it, or '' where its work begins"
    import shutil, torch
    import dmlfast.cli.measuring as measuring, dmlfast.cli.training as training
    import dmlfast.study.experiments as protocol, dmlfast.study.tuning as tune
    from dmlfast.train.learner import MetricLearner
    def _cut(*args, **kwargs): raise KeyboardInterrupt
    for o,k in ((MetricLearner,'_do_fit'), (MetricLearner,'baseline'), (measuring,'_pictures'), (protocol.Experiment,'hours_left')):
        monkeypatch.setattr(o, k, _cut)
    monkeypatch.setattr('dmlfast.web.app.Serving.wait', lambda self: self.stop())
    monkeypatch.setattr(training, '_raw_pixels', lambda dl: (torch.eye(4), torch.tensor([0,0,1,1])))
    storage = tune._storage
    # a search in memory, as SQLite waits for the disk
    monkeypatch.setattr(tune, '_storage', lambda o: None if Path(str(o)).name=='study.db' else storage(o))
    work = tmp_path/'work'
    work.mkdir()
    monkeypatch.chdir(work)
    def _f(func, args):
        words = [str(o) for k,v in args.items() for o in ([k]*k.startswith('-')+([] if v is None else [v]))]
        status,_,err = do(func, *words)
        left,lines = [o.name for o in work.iterdir()],[o for o in err.splitlines() if o]
        assert status in (0,130) or status==2 and not left and len(lines)==1, (words, status, left, err)
        for o in work.iterdir(): shutil.rmtree(o) if o.is_dir() else o.unlink()
        return lines[0] if status==2 else ''
    return _f

def test_odd_values_of_every_argument(table, folder, make_learner, tmp_path, begins):
    "Nothing, None, below 0, nan, infinity, a word, a number out of all range: one sentence and nothing left behind, or the work begins"
    (tmp_path/'plan.toml').write_text(f'seeds = 1\nsettings = {{data = {{reader = "csv", path = "{table}"}}, model = {{arch = '
        f'"test_resnet", pretrained = false}}, fit = {{n_epoch = 1}}}}\n[methods.a]\nloss = {{name = "ms"}}\nspace = {{}}\n')
    learn = make_learner()
    learn.export_embedder(tmp_path/'embedder', gallery=learn.dls.valid)
    net = {'--data':table, '--arch':'test_resnet', '--no-pretrained':None, '--emb-sz':16, '--size':24, '--bs':32, '--workers':0,
        '--loss':'dr_triplet', '--out':'x'}
    base = dict(dmlfast_train={**net, '--lr':6e-3}, dmlfast_tune={**net, '--trials':1, '--space':'loss.gamma=.1:.6'},
        dmlfast_bench={'plan':tmp_path/'plan.toml', '--out':'x/r.jsonl'},
        dmlfast_demo={'--data':folder, '--arch':'test_resnet', '--weights':_weights(tmp_path), '--epochs':1, '--size':32, '--bs':16,
        '--out':'x'},
        dmlfast_eval={'run':tmp_path/'embedder', '--data':table, '--workers':0, '--n-boot':10, '--split':'val', '--metrics':'recall@1',
        '--out':'x'}, dmlfast_explore={'folder':tmp_path/'embedder', '--no-browser':None, '--workers':0},
        dmlfast_serve={'folder':tmp_path/'embedder', '--port':0})
    for func in commands():
        args = base[func.__name__]
        assert begins(func, args)==''
        for k in arguments(func):
            ends = [begins(func, {**args, k:o}) for o in odd]
            assert ends[0] and any(o in ends[0] for o in ('is empty','invalid')), (func, k, ends[0])

def test_odd_values_of_every_setting(table, tmp_path, begins):
    from dmlfast.cli import dmlfast_train
    from dmlfast.study.checks import allowed_settings, save_settings
    s = dict(data=dict(reader='csv', path=table), batch=dict(num_workers=0), model=dict(arch='test_resnet', pretrained=False, emb_sz=16),
        loss=dict(name='margin', miner=dict(name='distance_weighted')),
        ssr=dict(views={}, loss={}), fit=dict(n_epoch=1))
    save_settings(s, tmp_path/'s.toml')
    args = {'--config':tmp_path/'s.toml', '--out':'x'}
    assert begins(dmlfast_train, args)==''
    # which asks for the network
    for k in ['seed','recipe',*s,*(f'{table}.{k}' for table,known in allowed_settings(s).items() for k in known if k!='pretrained')]:
        ends = [begins(dmlfast_train, {**args, '--set':f'{k}={v}'}) for v in ('None','-3','nan','word','1'+'0'*30,'(1,(2,3))','{}','true')]
        assert sum(map(bool, ends))>3, (k, ends) # hardly anything is right for a setting

def test_what_was_left_behind(table, folder, tmp_path, begins):
    "Commands that were refused with a traceback, or left a folder that was in the way of the next one"
    from dmlfast.cli import dmlfast_train, dmlfast_tune
    net = {'--data':table, '--arch':'test_resnet', '--no-pretrained':None, '--workers':0, '--size':24, '--out':tmp_path/'x'}
    for more,said in [({'--set':'batch.per_class=None'}, '`batch.per_class` is a whole number, 1 or more; got None'),
        ({'--set':'seed=None'}, '`seed` is a whole number'), ({'--arch-args':'bogus=1'}, "timm cannot make 'test_resnet' with"),
            ({'--arch-args':'a=(1,(2,3))'}, "timm cannot make 'test_resnet' with"),
            ({'--set':'loss.reduction=avg'}, "reduction 'avg' is none of"),
            ({'--set':'loss.reduction=none'}, 'one finite number for a batch'),
            ({'--lr':'inf'}, '--lr is too large'), ({'--lr':-1}, 'greater than 0'), ({'--set':'fit.lr=inf'}, '`fit.lr` is a number'),
            ({'--data':''}, '--data is empty')]:
        assert said in begins(dmlfast_train, {**net, **more}) and not (tmp_path/'x').exists(), more
    assert '`folds` is between 2 and the 24 training classes' in begins(dmlfast_tune, {**net, '--folds':99}) and not (tmp_path/'x').exists()
    (tmp_path/'x').mkdir()
    assert 'between 2 and' in begins(dmlfast_tune, {**net, '--folds':99}) and not list((tmp_path/'x').iterdir()) # it was there before
    (tmp_path/'file').write_text('')
    for func in (dmlfast_train,dmlfast_tune): assert "file' is a file" in begins(func, {**net, '--out':tmp_path/'file'/'x'})

def test_without_a_network(table, tmp_path, monkeypatch):
    "The sentence has the words of the command"
    import socket
    import dmlfast.models.bodies as models
    from dmlfast.cli import dmlfast_train
    def _no_name(*args, **kwargs): raise socket.gaierror(-2, 'Name or service not known')
    monkeypatch.setattr(socket, 'getaddrinfo', _no_name)
    monkeypatch.setattr(models, 'try_to_load_from_cache', lambda *args, **kwargs: None)
    monkeypatch.setattr(models, 'get_hf_file_metadata', lambda *args: _no_name())
    assert 'pass a file as `--weights`, or `--no-pretrained` to begin' in said(dmlfast_train, '--data', table, '--arch', 'test_resnet',
        '--size', 24, '--out', tmp_path/'x', status=1)
    assert not (tmp_path/'x').exists()

def test_a_demo_looks_at_its_folder_first(folder, tmp_path, begins):
    from dmlfast.cli import dmlfast_demo
    args = {'--data':folder, '--arch':'test_resnet', '--weights':_weights(tmp_path), '--size':32, '--bs':16}
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'scores.json').write_text('[1, 2]')
    (tmp_path/'file').write_text('years of work')
    for o in ('mine','file'): assert 'exists already and holds no demo' in begins(dmlfast_demo, {**args, '--out':tmp_path/o})
    assert (tmp_path/'mine'/'scores.json').read_text()=='[1, 2]' and (tmp_path/'file').read_text()=='years of work'
    (tmp_path/'mine'/'scores.json').write_text('{"raw pixels": {}}') # what a demo wrote is replaced
    assert begins(dmlfast_demo, {**args, '--out':tmp_path/'mine'})==''

def test_a_command_in_a_notebook_is_a_function(monkeypatch):
    "The words of the process are the kernel's there, and no console is to be ended"
    import dmlfast.cli.commands as cli
    asked = []
    f = cli.command(lambda lr=1.: asked.append(lr))
    f.__name__ = 'dmlfast_f'
    def call(code='f()', **names): exec(code, {'__name__':'__main__', 'f':f, **names})
    for argv in (['/lib/ipykernel_launcher.py','-f','kernel.json'], ['/bin/ipython'], ['']):
        monkeypatch.setattr(sys, 'argv', argv)
        call(), call('f(lr=2.)')
    assert asked==[1.,2.]*3
    monkeypatch.setattr(cli, 'run_command', lambda func, argv: argv)
    for names,argv in ((dict(__file__='/bin/dmlfast-f'),['/bin/dmlfast-f','--lr','3']), ({},['-c','--lr','3'])):
        monkeypatch.setattr(sys, 'argv', argv)
        with pytest.raises(SystemExit) as e: call(**names)
        assert e.value.code==['--lr','3']
    assert len(asked)==6

def test_ctrl_c_and_resume(table, tmp_path):
    from dmlfast.cli import dmlfast_train
    args = ['--data', table, *small, '--epochs', 6, '--sched', 'flat']
    press = '''
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's background job is born deaf to Ctrl-C
from dmlfast.train.ssr import Callback
from dmlfast.train.learner import defaults
class Press(Callback):
    "Ctrl-C in the third epoch, whatever the speed of the machine"
    def after_batch(self):
        if self.training and self.epoch==2: os.kill(os.getpid(), signal.SIGINT)
defaults.callbacks = [*defaults.callbacks,Press]'''
    p = shell(dmlfast_train, *args, '--report', '--out', tmp_path/'cut', cwd=tmp_path, first=press)
    history = tmp_path/'cut'/'history.csv'
    out,err = p.communicate(timeout=120)
    assert p.returncode==130, (out,err)
    last = err.strip().splitlines()
    assert len(last)==1 and str(tmp_path/'cut'/'checkpoint'/'checkpoint.pt') in last[0] and '--resume --report`' in last[0]
    assert 'epoch' in out and (tmp_path/'cut'/'checkpoint'/'checkpoint.pt').exists()
    n = len(history.read_text().splitlines())-1
    assert n==2
    assert 'interrupted run' in said(dmlfast_train, *args, '--out', tmp_path/'cut')
    assert do(dmlfast_train, '--out', tmp_path/'cut', '--resume')[0]==0
    assert do(dmlfast_train, *args, '--out', tmp_path/'whole')[0]==0
    cut,whole = (json.loads((tmp_path/o/'results.json').read_text()) for o in ('cut','whole'))
    assert cut['epochs']==6 and cut['scores']==whole['scores']

def test_a_search_goes_on(table, tmp_path, monkeypatch):
    import dmlfast.study.tuning as tune
    from dmlfast.cli import dmlfast_train, dmlfast_tune
    args = ['--data', table, *small, '--trials', 3, '--epochs', 1, '--space', 'loss.gamma=.1:.6', 'fit.lr=1e-3:1e-2:log']
    whole = do(dmlfast_tune, *args, '--out', tmp_path/'whole', '--json')
    assert whole[0]==0, whole[2]
    real,calls = tune.suggest,[]
    def _suggest(*a):
        calls.append(1)
        if len(calls)==2: raise KeyboardInterrupt
        return real(*a)
    with monkeypatch.context() as m:
        m.setattr(tune, 'suggest', _suggest)
        status,_,err = do(dmlfast_tune, *args, '--out', tmp_path/'cut')
    assert status==130 and '--resume' in err
    assert (tmp_path/'cut'/'best.toml').exists() # of the one trial that is finished
    assert '--resume goes on' in said(dmlfast_tune, *args, '--out', tmp_path/'cut')
    assert '--epochs was 1 and is 2' in said(dmlfast_tune, '--out', tmp_path/'cut', '--resume', '--epochs', 2)
    status,out,err = do(dmlfast_tune, '--out', tmp_path/'cut', '--resume', '--json')
    assert status==0, err
    res = json.loads(out)
    assert len(res['trials'])==3
    assert res['trials'][0]['params']==json.loads(whole[1])['trials'][0]['params']=={'loss.gamma':.3, 'fit.lr':6e-3}
    assert {'best.toml','results.json','search.json','settings.toml','study.db','study.png'}=={o.name for o in (tmp_path/'cut').iterdir()}
    own,storage = {o:o.read_bytes() for o in (tmp_path/'cut').iterdir()},tmp_path/'cut'/'study.db'
    assert 'give the new one another --name' in said(dmlfast_tune, *args, '--out', tmp_path/'cut', '--overwrite', '--storage', storage)
    assert {o:o.read_bytes() for o in (tmp_path/'cut').iterdir()}==own
    status,_,err = do(dmlfast_train, '--config', tmp_path/'cut'/'best.toml', '--epochs', 1, '--out', tmp_path/'run')
    assert status==0, err
    import tomllib
    s = tomllib.loads((tmp_path/'run'/'settings.toml').read_text())
    assert (s['loss']['gamma'],s['fit']['lr'])==(res['best']['loss.gamma'],res['best']['fit.lr']) and 'valid' not in s['batch']

def test_an_experiment(table, tmp_path):
    from dmlfast.cli import dmlfast_bench
    (tmp_path/'toy.py').write_text('import os, torch\ndef train(settings, ds, valid, report):\n    y = '
        'ds.df.label[ds.df.split==valid].astype("category").cat.codes.to_numpy(copy=True)\n'
        '    return torch.randn(len(y), 4, generator=torch.Generator().manual_seed(settings["seed"])), torch.tensor(y).long(), '
        'dict(pid=os.getpid())\n')
    (tmp_path/'p.toml').write_text(f'seeds = 6\nmeasures = ["recall@1"]\nsettings = {{data = {{reader = "csv", path = "{table}"}}, fit = '
        f'{{n_epoch = 1}}}}\n[methods.a]\ntrainer = "toy.py:train"\nspace = {{}}\n[methods.b]\ntrainer = "toy.py:train"\ntwin = '
        f'"a"\nspace = {{}}\n')
    status,out,err = do(dmlfast_bench, tmp_path/'p.toml', '--out', tmp_path/'r.jsonl', '--dry-run')
    assert status==0 and 'a         0/0  0/6' in out and '12 trials and runs are left' in out and not (tmp_path/'r.jsonl').exists(), err
    assert "p.toml' is a file" in said(dmlfast_bench, tmp_path/'p.toml', '--out', tmp_path/'p.toml'/'r.jsonl')
    p = shell(dmlfast_bench, tmp_path/'p.toml', '--out', tmp_path/'r.jsonl', '--workers', 2, '--json', cwd=tmp_path)
    out,err = p.communicate(timeout=400)
    assert p.returncode==0, err
    res = json.loads(out)
    assert res['left']==0 and sorted((o['method'],o['seed']) for o in res['runs'])==[(m,i) for m in 'ab' for i in range(6)]
    lines = (tmp_path/'r.jsonl').read_text()
    status,out,err = do(dmlfast_bench, tmp_path/'p.toml', '--out', tmp_path/'r.jsonl')
    assert status==0 and 'All of it is done.' in out and '+0.0' in out and (tmp_path/'r.jsonl').read_text()==lines, err
    (tmp_path/'r.jsonl').write_text(''.join(lines.splitlines(True)[:-1]))
    status,out,err = do(dmlfast_bench, tmp_path/'p.toml', '--out', tmp_path/'r.jsonl')
    rows = [json.loads(o) for o in (tmp_path/'r.jsonl').read_text().splitlines()]
    # one worker is a process of its own too, which keeps its memory
    assert status==0 and len(rows)==12 and rows[-1]['seen']['pid']!=os.getpid(), err

def test_what_is_not_measured_in_each_commands_words(few):
    from dmlfast.cli import dmlfast_train, dmlfast_tune
    from dmlfast.cli.commands import _as_options
    from dmlfast.data import MetricDataset
    with pytest.raises(ValueError, match='or `valid=None` to') as e: MetricDataset(few.df[few.df.split!='val'], few.path).dataloaders(16)
    assert _as_options(dmlfast_train, str(e.value)).endswith('take another one, or `--valid none` to measure on nothing.')
    assert _as_options(dmlfast_tune, str(e.value)).endswith('to measure on: take another one.')

def test_what_to_do_without_a_network_in_each_commands_words(monkeypatch, tmp_path, folder):
    from dmlfast.cli import dmlfast_bench, dmlfast_demo, dmlfast_train, run_demo
    from dmlfast.cli.commands import _as_options
    from dmlfast.models.bodies import _no_weights
    msg = str(_no_weights('resnet18', OSError('no network')))
    assert _as_options(dmlfast_train, msg).endswith('Without a network, pass a file as `--weights`, or `--no-pretrained` to begin with '
        'random ones.')
    assert _as_options(dmlfast_demo, msg).endswith('Without a network, pass a file as `--weights`.')
    assert _as_options(dmlfast_bench, msg).endswith('Without a network, pass a file as `model.weights`, or `model.pretrained = false` to '
        'begin with random ones.')
    monkeypatch.setattr('dmlfast.cli.training._raw_pixels', lambda dl: pytest.fail('the first row was computed'))
    for o in (dict(arch='resnett'), dict(weights='x.pth'), dict(arch='test_resnet', weights=_weights(tmp_path), arch_args='chanels=3')):
        with pytest.raises(ValueError, match='timm|no file of weights'): run_demo(folder, bs=16, size=32, out=tmp_path/'res', **o)

def test_a_device_that_is_not_there(table, tmp_path, make_learner):
    from dmlfast.cli import dmlfast_eval, dmlfast_train
    for o in ('cuda:77','meta','mps:5'):
        assert f"This machine has no device {o!r}; it has 'cpu'" in said(dmlfast_train, '--data', table, '--arch', 'test_resnet',
            '--no-pretrained', '--bs', 16, '--workers', 0, '--device', o, '--out', tmp_path/'x')
    make_learner().export_embedder(tmp_path/'e')
    assert "no device 'cuda:77'" in said(dmlfast_eval, tmp_path/'e', '--data', table, '--workers', 0, '--device', 'cuda:77')
    assert not (tmp_path/'x').exists()

def test_a_run_is_explored(trained, tmp_path):
    "Its embedder, with the items and pictures of its own data set"
    from dmlfast.cli.exploring import explored
    from dmlfast.web import Items
    finder,image,where = explored(trained['out'], None, None, None, 'val', None, 64, 0, 'cpu', False)
    items = Items(finder, image)
    assert where==Path(trained['out'])/'embedder' and len(items)>10 and len(items.classes)>=4
    assert all(items.pictures.image(n) is not None for n in items.numbers)
