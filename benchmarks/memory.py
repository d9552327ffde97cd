"""Many negatives: from a memory of the last steps, or from a large batch in chunks? On the built-in characters, with a small network that begins with
random weights.

    python benchmarks/memory.py            # rows in benchmarks/memory.jsonl; those that are there are not made again
    python benchmarks/memory.py --table    # what is in it

All rows of a seed begin with the same weights and see about the same number of images: batches of 64, the same with a memory of 2,048 that is
used after a tenth or a half of the steps, and batches of 512 in chunks of 64. Scores are of the test classes, once, after the last epoch. Nothing was
tuned."""
import argparse, json, os, time, warnings
from pathlib import Path
warnings.simplefilter('ignore')
import pandas as pd
from fastai.torch_core import set_seed
from dmlfast.all import *

out = Path(__file__).with_suffix('.jsonl')
losses = dict(MultiSimilarityLoss=MultiSimilarityLoss)
ways = {'64':(64,None), '64 and memory of 2,048':(64,lambda n: BatchMemory(2048, start=n//10)),
    'memory from half':(64,lambda n: BatchMemory(2048, start=n//2)), '512 in chunks':(512,lambda n: LargeBatch(64))}
seeds,n_epoch = (0,1,2),8

def rows(): return [json.loads(o) for o in out.read_text().splitlines()] if out.is_file() else []

def measure(ds, loss, seed, way):
    "One row"
    bs,cb = ways[way]
    set_seed(seed, reproducible=True)
    dls = ds.dataloaders(bs=bs, per_class=4, valid=None, seed=seed, num_workers=0)
    learn = metric_learner(dls, 'test_resnet', losses[loss](), emb_sz=64, pretrained=False, freeze_bn=True)
    n,began = n_epoch*len(dls.train),time.process_time()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n_epoch, 3e-3, cbs=cb and cb(n))
    seconds = time.process_time()-began
    res = learn.evaluate('test', ['recall@1','map@r'])
    return dict(loss=loss, way=way, seed=seed, steps=n, images=n*bs, **{o:round(res[o], 5) for o in res.keys()}, seconds=round(seconds, 1))

def table():
    "Means over seeds, what a way has more than batches of 64 with the same seed, and the spread of that"
    df = pd.DataFrame(rows()).set_index(['loss','way','seed'])
    scores = df[['recall@1','map@r']]
    diff = scores-scores.xs('64', level='way').reindex(df.index.droplevel('way')).set_index(df.index)
    return df.groupby(level=[0,1], sort=False).mean().join(diff.groupby(level=[0,1]).agg(['mean','min','max']).set_axis(
        [f'{a} {b}' for a in scores for b in ('more','least','most')], axis=1)).round(4)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--table', action='store_true')
    if not p.parse_args().table:
        ds = glyphs(size=24)
        for loss in losses:
            for seed in seeds:
                for way in ways:
                    if any((o['loss'],o['way'],o['seed'])==(loss,way,seed) for o in rows()): continue
                    row = measure(ds, loss, seed, way)
                    with out.open('a') as f: f.write(json.dumps(row)+'\n')
                    print(row, f'load {os.getloadavg()[0]:.0f}', flush=True)
    print(table().to_string())
