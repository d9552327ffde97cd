"""Many negatives: from a memory of the last steps, or from a large batch in chunks? On the built-in characters, with a small network that
begins with random weights, and on cars, with a trained body.

    python benchmarks/memory.py                                 # glyphs: rows in benchmarks/memory.jsonl; none is made twice
    python benchmarks/memory.py --cars FOLDER --weights WEIGHTS # FOLDER has a folder of images for each class; of mobilenetv2_035
    python benchmarks/memory.py --table                         # what is in it

All rows of a seed begin with the same weights and see about the same number of images: batches of 64, the same with a memory that is used
after half (on glyphs also a tenth) of the steps, and batches of 512 in chunks of 64. Cars are trained twice: body and head for 3 epochs,
and the head alone on features for 10. Scores are of the test classes, once, after the last epoch, and on cars before the first. Nothing was
tuned: on cars, the rates, the head's start and frozen batch norm are the library's defaults."""
import argparse, functools, json, os, time, warnings
from pathlib import Path
warnings.simplefilter('ignore')
import pandas as pd, torch
from fastai.callback.channelslast import ChannelsLast
from fastai.torch_core import set_seed
from dmlfast.all import *
from dmlfast.train.features import body_features

out = Path(__file__).with_suffix('.jsonl')
def memory(share): return lambda n: BatchMemory(2048, start=int(n*share))
def chunks(n): return LargeBatch(64)
ways = {'64':(64,None), 'memory from half':(64,memory(.5)), '512 in chunks':(512,chunks), '64 and memory of 2,048':(64,memory(.1))}
of_data = {'glyphs':list(ways), 'cars':list(ways)[:3], 'cars, head':list(ways)[:3]}
epochs = {'glyphs':8, 'cars':3, 'cars, head':10}
seeds = 0,1,2
metrics = 'recall@1','map@r'

def rows(): return [json.loads(o) for o in out.read_text().splitlines()] if out.is_file() else []

def glyph_learner(bs, seed):
    "A small network with random weights"
    dls = glyphs(size=24).dataloaders(bs=bs, per_class=4, valid=None, seed=seed, num_workers=0)
    return metric_learner(dls, 'test_resnet', MultiSimilarityLoss(), emb_sz=64, pretrained=False, freeze_bn=True)

@functools.cache
def cars(folder):
    "Classes 1 to 98 are trained on, 99 to 196 measured"
    df = MetricDataset.from_folder(folder).df
    return MetricDataset(df.assign(split=['train' if int(o[:3])<99 else 'test' for o in df.label]), folder, 'cars')

def car_learner(bs, seed, folder, weights):
    "A trained body, and a head that starts from the training images by LDA"
    dls = cars(folder).dataloaders(bs=bs, per_class=8 if bs>64 else 4, valid=None, size=96, seed=seed, num_workers=0)
    return metric_learner(dls, 'mobilenetv2_035', MultiSimilarityLoss(), emb_sz=128, weights=weights, model_kwargs=dict(pad_type='same'),
        cbs=ChannelsLast())

def scores(learn, data):
    "Of the test classes; for heads alone, of features that are made once for all rows"
    if data!='cars, head': return learn.evaluate('test', metrics)
    X,y = body_features(learn.model, learn.split_dl('test'))
    with torch.no_grad(): return evaluate_retrieval(learn.model.eval()(X), y, metrics=metrics)

def measure(data, seed, way, *where):
    "One row"
    set_seed(seed, reproducible=True)
    bs,cb = ways[way]
    if bs==512 and data=='cars, head': cb = None # features need no chunks
    learn = car_learner(bs, seed, *where) if where else glyph_learner(bs, seed)
    lr = slice(1e-4/3, 1e-4) if where else 3e-3
    n,before = epochs[data]*len(learn.dls.train),{}
    with learn.no_bar(), learn.no_logging():
        if where and way=='64': # the same for all ways of a seed
            learn.start_head()
            res = scores(learn, data)
            before = {f'start {o}':round(res[o], 5) for o in metrics}
        began,fit = time.process_time(),learn.fit_head if data=='cars, head' else learn.fit_one_cycle
        fit(epochs[data], lr.stop if data=='cars, head' else lr, cbs=cb and cb(n))
        seconds = time.process_time()-began
        res = scores(learn, data)
    return dict(data=data, loss='MultiSimilarityLoss', way=way, seed=seed, steps=n, images=n*bs, **before,
        **{o:round(res[o], 5) for o in metrics}, seconds=round(seconds, 1))

def table():
    "Means over seeds, what a way has more than batches of 64 with the same seed, and the spread of that"
    df = pd.DataFrame(rows()).set_index(['data','way','seed'])
    scores = df[list(metrics)]
    diff = scores-scores.xs('64', level='way').reindex(df.index.droplevel('way')).set_index(df.index)
    names = [f'{a} {b}' for a in scores for b in ('more','least','most')]
    more = diff.groupby(level=[0,1]).agg(['mean','min','max']).set_axis(names, axis=1)
    return df.drop(columns='loss').groupby(level=[0,1], sort=False).mean().join(more).round(4)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--cars', type=Path)
    p.add_argument('--weights', type=Path)
    p.add_argument('--table', action='store_true')
    args = p.parse_args()
    for data in () if args.table else ('cars','cars, head') if args.cars else ('glyphs',):
        for seed in seeds:
            for way in of_data[data]:
                if any((o['data'],o['way'],o['seed'])==(data,way,seed) for o in rows()): continue
                row = measure(data, seed, way, *((args.cars,args.weights) if args.cars else ()))
                with out.open('a') as f: f.write(json.dumps(row)+'\n')
                print(row, f'load {os.getloadavg()[0]:.0f}', flush=True)
    print(table().to_string())
