"""The picture of the tutorial about birds, drawn of emoji, since research photos may not be shown.

    python docs/pictures/birds.py FOLDER --weights mobilenetv2_035.safetensors

`FOLDER` is that of `emoji.py`. It trains the network of the tutorial with its loss and rate on half of the names (three minutes on two cores), and writes
`nbs/images/birds.png`: birds by one artist, each with the nearest by two others."""
import argparse
from pathlib import Path
import emoji
from dmlfast.all import *
from fastai.vision.all import set_seed

emoji.shown = 'owl','parrot','penguin','swan'
emoji.out = emoji.out.with_name('birds.png')

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('folder', type=Path)
    p.add_argument('--weights')
    args = p.parse_args()
    ds = MetricDataset.from_df(emoji.table(args.folder), args.folder, size=96, whole=True)
    set_seed(0, reproducible=True)
    learn = metric_learner(ds.dataloaders(bs=64, per_class=4, num_workers=0), 'mobilenetv2_035', DRTripletLoss(), emb_sz=128,
        weights=args.weights, model_kwargs=dict(pad_type='same'))
    learn.fit_one_cycle(4)
    df = ds.df[ds.df.split=='test'].reset_index()
    labels,files = df.label.to_numpy(),df.path.to_numpy()
    q,near,said = emoji.found(learn.embedded('test').embs, labels, files)
    print(said)
    emoji.draw(args.folder, q, near, labels, files, s=112, gap=14)

if __name__=='__main__': main()
