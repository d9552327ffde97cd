"""What `sample=.1` saves and costs: ArcFace over 30,000 classes and 512 dimensions on the CPU, and its accuracy on glyphs: writes partial_fc.md

python benchmarks/partial_fc.py [steps|glyphs]: a part of it only, printed.
"""
import os, sys, time
os.environ.setdefault('OMP_NUM_THREADS', '1')
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
import subprocess, torch
from torch.nn.functional import normalize
from dmlfast.losses import ArcFaceLoss
from losses import status

N,D,B,SHARES = 30_000,512,128,(1.,.1)

def steps(sample, opt, n=15):
    "Median milliseconds of the loss forward and backward and of the optimiser's step, and MiB at the peak on top of the weights"
    from fastai.optimizer import Adam, SGD
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    x,y = normalize(torch.randn(B, D, generator=g), dim=1),torch.randint(N, (B,), generator=g)
    loss = ArcFaceLoss(N, D, sample=sample)
    before = status('VmRSS')
    opt = dict(adam=partial(Adam, lr=1e-3), sgd=partial(SGD, lr=1e-3, mom=.9))[opt](loss.parameters())
    took = []
    for _ in range(n):
        t = [time.process_time()]
        loss(x.requires_grad_(), y).backward(); t.append(time.process_time())
        opt.step(); t.append(time.process_time())
        opt.zero_grad()
        took.append([1e3*(b-a) for a,b in zip(t, t[1:])])
    return [median(o) for o in zip(*took[3:])]+[status('VmHWM')-before]

def fresh(sample, opt):
    "`steps` in a process of its own"
    args = [sys.executable, __file__, 'one', str(sample), opt]
    return [float(o) for o in subprocess.run(args, capture_output=True, text=True, check=True).stdout.split()[-3:]]

def steps_table():
    rows = ['| optimiser | sample | forward and backward, ms | step, ms | together | of the whole | memory, MiB |', '|---|---|---|---|---|---|---|']
    for opt in ('adam','sgd'):
        res = {s:fresh(s, opt) for s in SHARES}
        for s,(f,o,m) in res.items(): rows.append(f'| {opt} | {s:g} | {f:.0f} | {o:.0f} | {f+o:.0f} | {(f+o)/sum(res[1.][:2]):.2f} | {m:.0f} |')
    return '\n'.join(rows)

def glyphs_score(sample, seed, epochs=6):
    "recall@1 and map@r on the classes of the test, which training has not seen, and how many classes it has seen"
    from fastai.vision.all import set_seed
    from fastai.callback.core import Callback, CancelValidException
    from dmlfast.all import glyphs, metric_learner
    class NoValidation(Callback):
        def before_validate(self): raise CancelValidException
    set_seed(seed, reproducible=True)
    dls = glyphs(size=32).dataloaders(bs=128, per_class=4, size=32, seed=seed, num_workers=0)
    learn = metric_learner(dls, 'test_resnet', ArcFaceLoss(sample=sample), emb_sz=32, pretrained=False)
    learn.add_cb(NoValidation())
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, 5e-3)
        res = learn.evaluate('test', metrics=['recall','map@r'])
    return res['recall@1'],res['map@r'],dls.n_train_classes

def glyphs_table(seeds=3):
    rows = ['| sample | recall@1 of each seed | mean | map@r, mean |', '|---|---|---|---|']
    res = {s:[] for s in SHARES}
    for k in range(seeds):
        for s in SHARES:
            res[s].append(glyphs_score(s, k))
            print(s, k, *res[s][-1], flush=True)
    for s,o in res.items():
        r,m,n = zip(*o)
        rows.append(f'| {s:g} | {", ".join(f"{o:.3f}" for o in r)} | {mean(r):.3f} ± {stdev(r):.3f} | {mean(m):.3f} |')
    return '\n'.join(rows),n[0]

def main():
    if sys.argv[1:2]==['one']: return print(*steps(float(sys.argv[2]), sys.argv[3]))
    if sys.argv[1:2]==['steps']: return print(steps_table())
    if sys.argv[1:2]==['glyphs']: return print(*glyphs_table())
    table,n = glyphs_table()
    text = (f'# A sample of many classes\n\n`python benchmarks/partial_fc.py`, torch {torch.__version__}, {os.cpu_count()} cores, one thread, load {os.getloadavg()[0]:.1f}. '
        f'`ArcFaceLoss(sample=...)`, {N:,} classes, {D} dimensions, batch {B}, with the optimisers of fastai. CPU times, medians of twelve steps in a process of its own; '
        f'memory is the peak on top of the weights (59 MiB) and the libraries.\n\n{steps_table()}\n\n## Accuracy\n\nGlyphs, {n} classes in training, `test_resnet` from random weights, 6 epochs, batch 128 of 4 a class; test classes, three seeds.\n\n{table}\n')
    Path(__file__).with_suffix('.md').write_text(text)

if __name__=='__main__': main()
