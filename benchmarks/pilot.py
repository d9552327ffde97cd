"""Does direction regularisation move anything on real photos? Triplet and multi-similarity losses with and without it, on cars.

python benchmarks/pilot.py CARS_FOLDER WEIGHTS OUT.jsonl [SHARE]

CARS_FOLDER holds a folder of images for each of the 196 classes; 1-49 are trained on and 50-98 measured, so that the test classes of the published protocol, 99-196, are not touched.
WEIGHTS is a file for timm's mobilenetv2_035 with pad_type='same'. SHARE, as 0/2 or 1/2, runs a part of the plan. One line of JSON is written for each run; a run that is there is not repeated.
"""
import json, sys, time, warnings
from pathlib import Path
warnings.simplefilter('ignore')
import torch
from fastai.vision.all import *
from fastai.callback.channelslast import ChannelsLast
from dmlfast.all import *

epochs,lr = 4,1e-3
plan = [(name, seed, make) for seed in range(3) for name,make in {
    **{f'triplet m={m} γ={g}': partial(TripletLoss, margin=m, gamma=g) for m in (.1,.2) for g in (0.,.3)},
    **{f'ms λ={l} γ={g}': partial(MultiSimilarityLoss, lam=l, gamma=g) for l in (.5,.7) for g in (0.,.3)}}.items()]
plan = [('frozen features', 0, None)] + plan

class NoValidation(Callback):
    "The score is taken once, at the end"
    def before_validate(self): raise CancelValidException

def cars(path):
    "The first 98 classes: 49 for training and 49 to measure on"
    df = MetricDataset.from_folder(path).df
    n = df.label.str[:3].astype(int)
    return MetricDataset(df.assign(split=np.where(n<50, 'train', 'val'))[n<99], path, 'cars 1-98')

def run(ds, weights, make, seed):
    "Scores on the 49 unseen classes"
    set_seed(seed, reproducible=True)
    dls = ds.dataloaders(bs=64, per_class=4, size=128, seed=seed, num_workers=0)
    learn = metric_learner(dls, 'mobilenetv2_035', make and make(), emb_sz=128, weights=weights, model_kwargs=dict(pad_type='same'), freeze_bn=True, cbs=[NoValidation(), ChannelsLast()])
    t = time.time()
    with learn.no_bar(), learn.no_logging():
        if make: learn.fit_one_cycle(epochs, slice(lr/10, lr), wd=1e-2)
        else: learn.model.head = nn.Identity()
        res = learn.evaluate(metrics=['recall','map@r'])
    return dict(recall1=res['recall@1'], recall8=res['recall@8'], mapr=res['map@r'], seconds=round(time.time()-t))

if __name__=='__main__':
    path,weights,out = sys.argv[1:4]
    i,n = map(int, sys.argv[4].split('/')) if len(sys.argv)>4 else (0,1)
    torch.set_num_threads(1)
    ds,out = cars(Path(path)),Path(out)
    done = {(o['name'],o['seed']) for o in map(json.loads, out.read_text().splitlines())} if out.exists() else set()
    for name,seed,make in plan[i::n]:
        if (name,seed) in done: continue
        with out.open('a') as f: f.write(json.dumps(dict(name=name, seed=seed, **run(ds, weights, make, seed)), ensure_ascii=False)+'\n')
