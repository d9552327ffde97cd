"""Which loss for which data? Every loss of the library at its defaults, on heads that are trained on the features of a frozen body.

    python benchmarks/which_loss.py FOLDER --weights WEIGHTS   # FOLDER/cub100/images, FOLDER/cars/images and FOLDER/emoji/images
    python benchmarks/which_loss.py --table                    # what is in benchmarks/which_loss.jsonl

The training classes come as they are (`all`), with four images each (`few`), or with sizes that fall from class to class (`tail`). Nothing is chosen:
rate, epochs and arguments are the library's defaults. Scores are those of the test classes, which are the same in all three. A row is written for each data
set, situation, loss and seed, with the paired difference to the head's start (LDA of the same training images) and its 95 % interval over classes.
Rows that are there are not made again."""
import argparse, json, time, warnings
from pathlib import Path
warnings.simplefilter('ignore')
import filelock, numpy as np, pandas as pd, torch
from fastai.torch_core import set_seed
from dmlfast.all import *
from dmlfast.train.features import body_features

sets = dict(cub100=dict(size=96), cars=dict(size=96), emoji=dict(size=96, whole=True))
body,kwargs = 'mobilenetv2_035',dict(pad_type='same')
metrics = 'recall@1','map@r'

def few(sizes): return {k:4 for k in sizes}
def tail(sizes):
    "Sizes that fall to 2 as 1, 1/2, 1/3, ... do, the classes in a random order"
    order = np.random.default_rng(0).permutation(sorted(sizes))
    return {k:max(2, round(sizes[k]/(1+i/5))) for i,k in enumerate(order)}
situations = dict(all=lambda sizes: sizes, few=few, tail=tail)

def dataset(folder, name, situation):
    "A data set with fewer images of its training classes"
    ds = MetricDataset.from_folder(folder/name/'images', name=name, **sets[name])
    train = ds.df[ds.df.split=='train']
    sizes = situations[situation](train.label.value_counts().to_dict())
    drawn = train.sample(frac=1, random_state=0)
    keep = drawn[drawn.groupby('label').cumcount()<drawn.label.map(sizes)].index
    return MetricDataset(
        ds.df.loc[ds.df.index.isin(keep)|(ds.df.split!='train')], ds.path, name, **sets[name])

def rows(out): return [json.loads(o) for o in out.read_text().splitlines()] if out.is_file() else []
def key(o): return o['data'],o['situation'],o['loss'],o['seed']

def measure(folder, weights, name, situation, loss, seed):
    "One row"
    set_seed(seed, reproducible=True)
    dls = dataset(folder, name, situation).dataloaders(bs=64, per_class=4, seed=seed, num_workers=0)
    learn = metric_learner(dls, body, register_loss[loss](), emb_sz=128, weights=weights and weights/f'{body}.safetensors',
        model_kwargs=kwargs)
    def scores(): # of features that are computed once for all losses
        with torch.no_grad(): z = learn.model.eval()(X)
        return evaluate_retrieval(z, y, metrics=metrics)
    with learn.no_bar(), learn.no_logging():
        learn.start_head()
        X,y = body_features(learn.model, learn.split_dl('test'))
        start,began = scores(),time.process_time()
        learn.fit_head(10)
        seconds = time.process_time()-began
        res = scores()
    more = res-start
    gain = {k:[round(o, 5) for o in (more[k], *more.interval(k))] for k in metrics}
    return dict(data=name, situation=situation, loss=loss, seed=seed, images=len(dls.train_ds), classes=dls.n_train_classes,
        start={k:round(start[k], 5) for k in metrics}, gain=gain, seconds=round(seconds, 1), **{k:round(res[k], 5) for k in metrics})

def table(rows):
    "Mean map@r over seeds, and the spread of the seeds"
    df = pd.DataFrame({key(o):o for o in rows}.values())
    df['gain'] = df.gain.map(lambda o: o['map@r'][0])
    by = df.groupby(['data','situation','loss'], sort=False)
    res = by[['recall@1','map@r','gain']].mean().assign(spread=by['map@r'].agg(lambda o: o.max()-o.min()), seeds=by.size(),
        seconds=by.seconds.median())
    return res.reset_index().sort_values(['data','situation','map@r'], ascending=[True,True,False]).round(4).to_string(index=False)

def main():
    p = argparse.ArgumentParser()
    p.add_argument('folder', type=Path, nargs='?')
    p.add_argument('--weights', type=Path, help="folder with a .safetensors file for each body; timm's weights if not given")
    p.add_argument('--sets', nargs='*', default=list(sets))
    p.add_argument('--situations', nargs='*', default=list(situations))
    p.add_argument('--losses', nargs='*', default=None)
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.jsonl'))
    p.add_argument('--table', action='store_true')
    args = p.parse_args()
    if args.table: return print(table(rows(args.out)))
    done = {key(o) for o in rows(args.out)}
    losses = args.losses or list(register_loss)
    for todo in [(name,s,loss,seed) for name in args.sets for s in args.situations for loss in losses for seed in range(args.seeds)]:
        if todo in done: continue
        row = measure(args.folder, args.weights, *todo)
        with filelock.FileLock(f'{args.out}.lock'), args.out.open('a') as f: f.write(json.dumps(row)+'\n')
        print({k:row[k] for k in ('data','situation','loss','seed','recall@1','map@r','seconds')}, flush=True)

if __name__=='__main__': main()
