"""Batches of classes that look alike: do they help? On the built-in characters, with a small network that begins with random weights.

    python benchmarks/hard.py            # rows in benchmarks/hard.jsonl; those that are there are not made again
    python benchmarks/hard.py --table    # what is in it

All rows of a loss and a seed begin with the same weights, of four epochs with batches of random classes. Then come six epochs with a share of each
batch drawn as neighbours, found once with what was learned until then; share 0 is the plain batches. Scores are of the test classes, once, after
the last epoch. Nothing was tuned."""
import argparse, json, time, warnings
from pathlib import Path
warnings.simplefilter('ignore')
import pandas as pd
from fastai.torch_core import set_seed
from dmlfast.all import *

out = Path(__file__).with_suffix('.jsonl')
losses = dict(TripletLoss=TripletLoss, MultiSimilarityLoss=MultiSimilarityLoss)
shares,seeds = (0,.5),(0,1,2)

def rows(): return [json.loads(o) for o in out.read_text().splitlines()] if out.is_file() else []

def learner(ds, loss, seed):
    "A small network that begins with random weights; nothing is measured while it is trained"
    set_seed(seed, reproducible=True)
    dls = ds.dataloaders(bs=64, per_class=4, valid=None, seed=seed, num_workers=0)
    return metric_learner(dls, 'test_resnet', losses[loss](), emb_sz=64, pretrained=False)

def measure(ds, loss, seed, warm=4, n_epoch=6, k=5):
    "A row for each share, all from the same weights"
    first = learner(ds, loss, seed)
    with first.no_bar(), first.no_logging():
        first.fit(warm, 1e-3)
        near = hard_pairs(first.embedded(first.dls.train), k)
    for share in shares:
        began,learn = time.time(),learner(ds, loss, seed)
        learn.model.load_state_dict(first.model.state_dict())
        learn.dls.train.set_neighbours(near, share)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(n_epoch, 1e-3)
            res = learn.evaluate('test', ['recall@1','map@r'])
        yield dict(loss=loss, share=share, seed=seed, **{o:round(res[o], 5) for o in res.keys()}, seconds=round(time.time()-began, 1))

def table():
    "Means over seeds, what a share has more than plain batches with the same seed, and the spread of that"
    df = pd.DataFrame(rows()).set_index(['loss','share','seed'])[['recall@1','map@r']]
    diff = df-df.xs(0, level='share').reindex(df.index.droplevel('share')).set_index(df.index)
    res = df.groupby(level=[0,1]).mean().join(diff.groupby(level=[0,1]).agg(['mean','min','max']).set_axis(
        [f'{a} {b}' for a in df for b in ('more','least','most')], axis=1))
    return res.round(4)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--table', action='store_true')
    if not p.parse_args().table:
        ds = glyphs(size=24)
        for seed in seeds:
            for loss in losses:
                if any((o['loss'],o['seed'])==(loss,seed) for o in rows()): continue
                for row in list(measure(ds, loss, seed)):
                    with out.open('a') as f: f.write(json.dumps(row)+'\n')
                    print(row, flush=True)
    print(table().to_string())
