"""The picture of the front page: emoji by one artist, each with the nearest by two others.

    python docs/pictures/emoji.py FOLDER --weights tf_efficientnet_lite0.safetensors

`FOLDER` has a folder for each emoji, with `noto.png`, `fluent.png`, `twemoji.png` and `openmoji.png` in it. It trains on half of the names (five minutes on
two cores), prints what share of Noto's other half has the right one first, and writes `nbs/images/emoji.png`, without Openmoji. The queries are chosen by hand."""
import argparse
from pathlib import Path
from PIL import Image, ImageDraw
import numpy as np, pandas as pd
from fastai.vision.all import set_seed
from dmlfast.all import *
from dmlfast.deploy import ImageEmbedder

shown = 'oncoming-taxi','sad-but-relieved-face','maple-leaf','yin-yang'
out = Path(__file__).parents[2]/'nbs'/'images'/'emoji.png'
green,red,grey = '#2da562','#d9603b','#8a8f98'

def table(path):
    "All emoji; names in order, the second half for test"
    files = sorted(path.glob('*/*.png'))
    names = {o:i for i,o in enumerate(sorted({f.parent.name for f in files}))}
    df = pd.DataFrame([dict(path=str(f.relative_to(path)), label=f.parent.name, i=names[f.parent.name]) for f in files])
    df['split'] = np.where(df.i>=len(names)//2, 'test', np.where(df.i%8==3, 'val', 'train'))
    return df.drop(columns='i')

def trained(ds, weights):
    set_seed(0, reproducible=True)
    dls = ds.dataloaders(bs=64, per_class=4, num_workers=0)
    learn = metric_learner(dls, 'tf_efficientnet_lite0', MultiSimilarityLoss(), weights=weights, emb_sz=256)
    learn.fit_one_cycle(3)
    return learn.embedded('test')

def found(embs, labels, files, k=6):
    "Queries by Noto, and the nearest by Fluent and Twemoji"
    by = np.array([Path(o).stem for o in files])
    q,g = np.flatnonzero(by=='noto'),np.flatnonzero(np.isin(by, ['fluent','twemoji']))
    near = g[(embs[q]@embs[g].T).topk(k).indices.numpy()]
    right = (labels[near[:,0]]==labels[q]).mean()
    return q,near,f'{right:.3f} of {len(q)} have the right one first, among {len(g):,}'

def tile(canvas, x, y, s, im, colour):
    "One emoji on a light tile with a coloured edge"
    d = ImageDraw.Draw(canvas)
    d.rounded_rectangle((x, y, x+s, y+s), s//8, fill='#fbfbf9', outline=colour, width=max(2, s//32))
    m = s//8
    im = im.convert('RGBA').resize((s-2*m,)*2, Image.LANCZOS)
    canvas.alpha_composite(im, (x+m, y+m))

def draw(path, q, near, labels, files, s=148, gap=20):
    k = near.shape[1]
    rows = [np.flatnonzero(labels[q]==o)[0] for o in shown]
    canvas = Image.new('RGBA', ((k+1)*(s+gap)+2*gap, len(rows)*(s+gap)-gap+2))
    for r,i in enumerate(rows):
        y = r*(s+gap)
        tile(canvas, 0, y, s, Image.open(path/files[q[i]]), grey)
        for c,j in enumerate(near[i]):
            tile(canvas, (c+1)*(s+gap)+2*gap, y, s, Image.open(path/files[j]), green if labels[j]==labels[q[i]] else red)
    ImageDraw.Draw(canvas).line([(s+gap+gap//2, 4), (s+gap+gap//2, canvas.height-4)], fill='#8a8f9880', width=2)
    canvas.quantize(200, method=Image.Quantize.FASTOCTREE).save(out, optimize=True)

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('folder', type=Path)
    p.add_argument('--weights')
    p.add_argument('--embedded', help='what was saved of a training, instead of one')
    args = p.parse_args()
    ds = MetricDataset.from_df(table(args.folder), args.folder, size=96, whole=True)
    df = ds.df[ds.df.split=='test'].reset_index()
    labels,files = df.label.to_numpy(),df.path.to_numpy()
    plain = ImageEmbedder.from_body('tf_efficientnet_lite0', 96, weights=args.weights).embed(ds.items('test'))
    print('features:', found(plain, labels, files)[2])
    e = Embedded.load(args.embedded) if args.embedded else trained(ds, args.weights)
    q,near,said = found(e.embs, labels, files)
    print('trained: ', said)
    draw(args.folder, q, near, labels, files)

if __name__=='__main__': main()
