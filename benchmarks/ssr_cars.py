"""Does self-supervised ranking move anything on real photos? Margin loss with and without it, on cars.

python benchmarks/ssr_cars.py CARS_FOLDER WEIGHTS OUT.jsonl [--share 0/2]

CARS_FOLDER holds a folder of images for each of the 196 classes, WEIGHTS is a file for timm's mobilenetv2_035 with pad_type='same'. First the weight of the ranking loss is chosen: classes 1-49 are trained on and 50-98 measured.
With the weight that has the best mean map@r there, 1-98 are trained on and 99-196, which nothing was chosen by, measured: once for each seed, with and without. One line of JSON is written for each run; a run that is there
is not repeated. With shares 0/2 and 1/2 two processes do a half each, and the second part begins when both have finished the first. OUT.md is written at the end.
"""
import argparse, json, time, warnings
from pathlib import Path
warnings.simplefilter('ignore')
import torch
from fastai.vision.all import *
from fastai.callback.channelslast import ChannelsLast
from dmlfast.all import *

lr,bs,gammas = 1e-3,64,(.1,.3,.8)
measures = 'recall@1','recall@8','map@r'

class NoValidation(Callback):
    "The score is taken once, at the end"
    def before_validate(self): raise CancelValidException

def cars(path, part, most):
    "The first 98 classes, halved, or all of them, the others for test; at most so many images of a class"
    df = MetricDataset.from_folder(path).df
    n = df.label.str[:3].astype(int)
    df = df.assign(split=np.where(n<50, 'train', 'val'))[n<99] if part=='choose' else df.assign(split=np.where(n<99, 'train', 'test'))
    return MetricDataset(df.groupby('label').head(most), path, 'cars')

def run(args, part, gamma, seed):
    "Scores on unseen classes; a weight of 0 is the margin loss alone"
    set_seed(seed, reproducible=True)
    split = 'val' if part=='choose' else 'test'
    dls = cars(args.path, part, args.most).dataloaders(bs=bs, per_class=4, size=args.size, seed=seed, valid=split, num_workers=0)
    cbs = [NoValidation(), ChannelsLast()]
    if gamma: cbs.append(SelfSupervisedRanking(m=10, gamma=gamma, seed=seed))
    learn = metric_learner(dls, 'mobilenetv2_035', MarginLoss(), emb_sz=128, weights=args.weights, model_kwargs=dict(pad_type='same'), freeze_bn=True, cbs=cbs)
    t = time.time()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(args.epochs, slice(lr/10, lr), wd=1e-2)
        seconds = round(time.time()-t)
        res = learn.evaluate(split, metrics=['recall','map@r'])
    ranked = [o for o in learn.self_supervised_ranking.ssr_losses if o==o] if gamma else []
    return dict(part=part, gamma=gamma, seed=seed, epochs=args.epochs, seconds=seconds, **{o:res[o] for o in measures},
        **(dict(ssr_first=ranked[0], ssr_last=float(np.mean(ranked[-20:]))) if ranked else {}))

def rows(out): return [json.loads(o) for o in out.read_text().splitlines()] if out.exists() else []

def finish(args, part, plan):
    "Do what is this process's share of the plan and is not done, then wait for the others; all rows of the part"
    i,n = map(int, args.share.split('/'))
    for gamma,seed in plan[i::n]:
        if any((o['part'],o['gamma'],o['seed'])==(part,gamma,seed) for o in rows(args.out)): continue
        res = json.dumps(run(args, part, gamma, seed))
        with args.out.open('a') as f: f.write(res+'\n')
    while True:
        done = [o for o in rows(args.out) if o['part']==part and (o['gamma'],o['seed']) in plan]
        if len({(o['gamma'],o['seed']) for o in done})==len(plan): return done
        time.sleep(10)

def means(done, gamma):
    "Mean of each measure over the seeds of one setting, in per cent, and the standard deviation"
    vals = 100*np.array([[o[k] for k in measures] for o in sorted(done, key=lambda o: o['seed']) if o['gamma']==gamma])
    return vals.mean(0),vals.std(0, ddof=1) if len(vals)>1 else vals.std(0),vals

def line(name, done, gamma):
    mean,sd,_ = means(done, gamma)
    secs = np.mean([o['seconds'] for o in done if o['gamma']==gamma])
    return f'| {name} | ' + ' | '.join(f'{a:.2f} ± {b:.2f}' for a,b in zip(mean, sd)) + f' | {secs:.0f} |'

def report(args, chosen, first, last):
    "Both parts as tables, and the differences of runs with the same seed"
    head = '| margin loss | recall@1 | recall@8 | map@r | seconds to train |\n|---|---|---|---|---|'
    diff = means(last, chosen)[2]-means(last, 0.)[2]
    n = len({o['seed'] for o in last})
    each = '\n'.join('| ' + ' | '.join([str(i)]+[f'{v:+.2f}' for v in o]) + ' |' for i,o in enumerate(diff))
    return f'''# Self-supervised ranking on cars

`python benchmarks/ssr_cars.py`: `mobilenetv2_035` with ImageNet weights, 128-d, {args.size} px, {args.epochs} epochs, batches of {bs} (4 per class), M=10, N=4, p=0.8, batch norm frozen; per cent, mean ± standard deviation over {n} seeds ({len({o['seed'] for o in first})} for the choice).

## The choice, on classes 50-98 (trained on 1-49)

{head}
''' + '\n'.join(line('alone' if not g else f'with ranking, γ={g}', first, g) for g in (0.,*gammas)) + f'''

The weight with the best mean map@r: γ={chosen}.

## The measurement, on classes 99-196 (trained on 1-98)

{head}
{line('alone', last, 0.)}
{line(f'with ranking, γ={chosen}', last, chosen)}

Difference of runs with the same seed, in points:

| seed | recall@1 | recall@8 | map@r |
|---|---|---|---|
{each}
'''

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for o in ('path','weights','out'): ap.add_argument(o, type=Path)
    ap.add_argument('--share', default='0/1', help='which part of the plan this process does')
    ap.add_argument('--epochs', type=int, default=6)
    ap.add_argument('--seeds', type=int, default=3)
    ap.add_argument('--tries', type=int, default=3, help='seeds for the choice')
    ap.add_argument('--size', type=int, default=128)
    ap.add_argument('--most', type=int, default=10**6, help='images of a class, for a trial')
    args = ap.parse_args()
    torch.set_num_threads(1)
    def plan(seeds, *gs): return [(g,s) for s in range(seeds) for g in gs[::1-2*(s%2)]] # turned round each time, so that two shares take as long
    first = finish(args, 'choose', plan(args.tries, 0., *gammas))
    chosen = max(gammas, key=lambda g: means(first, g)[0][-1])
    last = finish(args, 'measure', plan(args.seeds, 0., chosen))
    args.out.with_suffix('.md').write_text(report(args, chosen, first, last))

if __name__=='__main__': main()
