"""What one gets for doing nothing clever: a trained body, the defaults of the library, no search by hand.

    python benchmarks/transfer.py FOLDER            # FOLDER/cub100/images, FOLDER/cars/images and FOLDER/emoji/images, a folder for each class
    python benchmarks/transfer.py FOLDER --table    # what is in benchmarks/transfer.jsonl

For each data set, body, loss and seed a row is written with the scores on test classes of the frozen features, of the head's start, and after `fit_head`,
`fit_one_cycle` and `fit_transfer`, with the paired difference to the features and its 95 % interval over classes. Epochs, weights and regimes are
chosen by `fit_transfer` on the classes of `train` and `val` alone, and `fit_one_cycle` chooses nothing. The plan of `fit_transfer` is found with seed 0 and used for all seeds of a loss.
Rows that are there are not made again; several processes may share the work (--shard 0/2, --shard 1/2)."""
import argparse, json, time, warnings
from pathlib import Path
warnings.simplefilter('ignore')
from fastai.callback.channelslast import ChannelsLast
from fastai.torch_core import set_seed
from fastcore.all import *
import filelock
from dmlfast.all import *

sets = dict(cub100=dict(size=128), cars=dict(size=128), emoji=dict(size=96, whole=True))
bodies = dict(mobilenetv2_035=dict(pad_type='same'), mobilenetv2_100=dict(pad_type='same'), tf_efficientnet_lite0={})
losses = dict(DRTripletLoss=DRTripletLoss, ProxyNCALoss=ProxyNCALoss, MultiSimilarityLoss=MultiSimilarityLoss, ProxyAnchorLoss=ProxyAnchorLoss)
metrics = 'recall@1','map@r'

def rows(out): return [json.loads(o) for o in out.read_text().splitlines()] if out.is_file() else []

def key(o): return o['data'],o['body'],o['loss'],o['seed'],o['what']

def write(out, row):
    "One line, whole"
    with filelock.FileLock(f'{out}.lock'), out.open('a') as f: f.write(json.dumps(row)+'\n')
    print({k:v for k,v in row.items() if k in ('data','body','loss','seed','what','recall@1','map@r','seconds')}, flush=True)

def scores(res): return {k:round(res[k], 5) for k in metrics}

def difference(a, b):
    "Differences with their intervals"
    d = a-b
    return {k:[round(o, 5) for o in (d[k], *d.interval(k))] for k in metrics}

def measure(ds, name, body, weights, loss, seed, whats, out, num_workers):
    "All rows of a loss and a seed that are not there"
    done = {key(o) for o in rows(out)}
    def _new():
        set_seed(seed, reproducible=True)
        return metric_learner(ds.dataloaders(seed=seed, num_workers=num_workers), body, losses[loss](), weights=weights, model_kwargs=bodies[body], cbs=ChannelsLast())
    for what in whats:
        row = dict(data=name, body=body, loss=loss, seed=seed, what=what)
        plain = what in ('features','start')
        if plain: row |= dict(loss=None, seed=0)
        if key(row) in done: continue
        learn,began,seen = _new(),time.time(),{}
        with learn.no_bar(), learn.no_logging():
            base = learn.baseline('test', metrics)
            if plain:
                learn.start_head()
                res = base if what=='features' else learn.evaluate('test', metrics)
                seen = dict(said=learn.head_start.said)
            else:
                began = time.time()
                if what=='fit_transfer':
                    old = next((o['plan'] for o in rows(out) if o['what']==what and (o['data'],o['body'],o['loss'])==(name,body,loss) and o['seed']==0), None)
                    if seed and old is None: continue
                    learn.fit_transfer(plan=dict(old) if old else None)
                    seen = dict(plan=learn.transfer)
                else: getattr(learn, what)(10 if what=='fit_head' else 3)
                seconds = time.time()-began
                res = learn.evaluate('test', metrics)
        if plain: seconds = time.time()-began
        write(out, {**row, **scores(res), 'gain':difference(res, base), 'seconds':round(seconds, 1), **seen})
        done.add(key(row))

def main():
    p = argparse.ArgumentParser()
    p.add_argument('folder', type=Path)
    p.add_argument('--weights', type=Path, help='folder with a .safetensors file for each body; timm\'s weights if not given')
    p.add_argument('--bodies', nargs='*', default=list(bodies)[:1])
    p.add_argument('--sets', nargs='*', default=list(sets))
    p.add_argument('--losses', nargs='*', default=list(losses))
    p.add_argument('--what', nargs='*', default=['features','start','fit_head','fit_one_cycle','fit_transfer'])
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--shard', default='0/1', help='which share of the rows, such as 0/2')
    p.add_argument('--workers', type=int, default=0, help='processes that read images')
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.jsonl'))
    p.add_argument('--table', action='store_true')
    args = p.parse_args()
    if args.table: return print(table(rows(args.out)))
    i,n = map(int, args.shard.split('/'))
    todo = [(seed,name,body,loss) for seed in range(args.seeds) for body in args.bodies for name in args.sets for loss in args.losses]
    for seed,name,body,loss in [o for j,o in enumerate(todo) if (j+j//len(args.losses))%n==i]: # a loss and its seeds may go to any process
        ds = MetricDataset.from_folder(args.folder/name/'images', name=name, **sets[name])
        measure(ds, name, body, args.weights and args.weights/f'{body}.safetensors', loss, seed, args.what, args.out, args.workers)

def table(rows):
    "Means over seeds, with how many intervals lie above and below 0"
    import pandas as pd
    df = pd.DataFrame({key(o):o for o in rows}.values())
    for k in metrics:
        df[f'gain of {k}'] = df.gain.map(lambda o: o[k][0])
        df[f'{k} above'],df[f'{k} below'] = df.gain.map(lambda o: o[k][1]>0),df.gain.map(lambda o: o[k][2]<0)
    df['loss'] = df.loss.fillna('')
    by = df.groupby(['data','body','loss','what'], sort=False)
    res = by[['recall@1','map@r','gain of recall@1','gain of map@r']].mean().round(3)
    for k in metrics: res[f'{k} > 0'],res[f'{k} < 0'] = by[f'{k} above'].sum(),by[f'{k} below'].sum()
    return res.assign(seeds=by.size(), seconds=by.seconds.median().round(0)).to_string()

if __name__=='__main__': main()
