"""What the trained embeddings look like on unseen classes: views by level, triplets by angle. Writes a line of JSON for each model.

Run after `dmlfast-bench cars.toml`, in the same folder: python why.py cars.toml cars.jsonl"""
import argparse, json, math, warnings
from pathlib import Path
warnings.simplefilter('ignore')
import torch, torch.nn.functional as F
from PIL import Image
from dmlfast.all import *
from dmlfast.losses.geometry import dir_cos, label_masks, sqdist

def triplets(x, y):
    "Mean similarity of items of one class and of different ones; and of each item with its farthest positive and its nearest negative: similarities, and the angle in degrees at the anchor between the directions of the two"
    pos,neg = label_masks(y, torch.bool)
    d2 = sqdist(x.double())
    p,n = d2.where(pos, -1.).argmax(1),d2.where(neg, math.inf).argmin(1)
    a = torch.arange(len(x))
    cos = dir_cos(d2[a,p], d2[a,n], d2[p,n])
    means = dict(same=1-d2[pos].mean()/2, other=1-d2[neg].mean()/2, farthest_same=1-d2[a,p].mean()/2, nearest_other=1-d2[a,n].mean()/2, angle=cos.acos().rad2deg().mean())
    return {k:round(float(o), 4) for k,o in means.items()}

def levels(emb, images):
    "Mean similarity of images to their views, by level"
    x = torch.stack([emb.preprocess(o) for o in images])
    v = GradedViews(4, seed=0)(x, torch.tensor(emb.preprocess.mean), torch.tensor(emb.preprocess.std))
    e = F.normalize(emb.embed(v.flatten(0, 1)), dim=-1).view(len(x), 5, -1)
    return (e[:,:1]*e[:,1:]).sum(-1).mean(0).double().round(decimals=4).tolist()

def look(folder, ds, n_classes=40, per_class=15, n_views=200):
    emb = load_embedder(folder)
    df = ds.df[ds.df.split=='test']
    df = df[df.label.isin(sorted(df.label.unique())[:n_classes])].groupby('label').head(per_class)
    files = [Image.open(ds.path/o).convert('RGB') for o in df.path]
    x = F.normalize(emb.embed(files), dim=-1)
    return triplets(x, torch.tensor(df.label.astype('category').cat.codes.to_numpy(copy=True)).long()) | dict(levels=levels(emb, files[::max(1, len(files)//n_views)][:n_views]))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('plan'), p.add_argument('results', type=Path)
    a = p.parse_args()
    torch.set_num_threads(1)
    exp,out = Experiment(a.plan, a.results),a.results.with_name(f'{a.results.stem}-why.jsonl')
    done = {(o['method'],o['seed']) for o in map(json.loads, out.read_text().splitlines())} if out.exists() else set()
    for o in exp.rows('run'):
        folder = a.results.with_name(f'{a.results.stem}-models')/f"{o['method']}-{o['seed']}"
        if (o['method'],o['seed']) in done or not folder.exists(): continue
        row = dict(method=o['method'], seed=o['seed'], **look(folder, exp.ds))
        with out.open('a') as f: f.write(json.dumps(row, ensure_ascii=False)+'\n')
        print(row)
