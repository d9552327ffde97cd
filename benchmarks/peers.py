"""Beside the others: PyTorch Metric Learning (PML) and Open Metric Learning (OML) in their own documented loops, and dmlfast, on the same
data, body, epochs and processor: recall and map@r of unseen classes after each epoch, processor seconds, memory.

    python benchmarks/peers.py FOLDER --weights FILE --oml PYTHON  # rows in benchmarks/peers.jsonl; none is made twice
    python benchmarks/peers.py FOLDER --plan                       # what is left, and the processor's minutes it takes
    python benchmarks/peers.py --table                             # what is in it

FOLDER has cars/images and emoji/images, a folder for each class; FILE has the weights of mobilenetv2_035; PYTHON is a Python with
`open-metric-learning` and `omegaconf` (it wants NumPy 1, so that it needs an environment of its own), torch, timm and what dmlfast needs.

The first half of the classes is trained on, the second half measured. Each row is made in a process of its own on one thread, without
processes that read images. Seconds are of the processor and of training (reading images and the head's start included, measuring and
imports not); memory is the most that was resident when the first epoch ended, before its end was measured. Test images are read and
cropped once, by dmlfast, and all are measured on these by `evaluate_retrieval`. An epoch shows about as many images as there are to train
on: OML's sampler shows each class once in a pass, so that some passes make an epoch. The body is laid out channels last for all.

- `own`: PML as its notebook MetricLossOnly: triplet margin 0.1, MultiSimilarityMiner, batches of 32 with 4 a class, a random head of 64,
  Adam at 1e-5 (head 1e-4), crops from 0.16. OML as the loop of its README: triplet margin 0.1 of all triplets, Adam at 1e-4, no head,
  embeddings not scaled, no augmentation; in batches of 64 with 4 a class, since its 2 times 2 is for a data set of a few images. `as for
  cars` has the loss and the rate of its configuration for Cars-196: the margin's soft form, and 1e-5.
- `same`: dmlfast's settings in their loops: triplet margin 0.2 of all triplets, embeddings of 128 numbers and length 1, batches of 64 with
  4 a class, AdamW with one cycle to 1e-4 (body a third), crops from 0.2 (emoji 0.5).
- dmlfast: `metric_learner` as it comes, with `fit_one_cycle`, and with `fit_head` (10 epochs on features, body not trained).

Batch-norm statistics of the body are frozen unless a row says otherwise. The other rows try reasons for differences, one change in each."""
import argparse, json, os, random, resource, subprocess, sys, tempfile, time, warnings
from pathlib import Path

sets = dict(emoji=dict(size=96, whole=True), cars=dict(size=128))
settings = ['features', 'dmlfast, fit_head', 'dmlfast, fit_one_cycle', 'PML, own', 'PML, same', 'OML, same', 'OML, own']
reasons = ['dmlfast, no head, body at 1e-4', 'dmlfast, body at 1e-4', 'PML, same, head from the data', 'dmlfast, random head',
    'dmlfast, plain tensors', 'OML, own, as for cars', 'OML, own, hardest triplets',
    'PML, own, batch norm not frozen']
epochs,head_epochs,metrics = 4,10,('recall@1','map@r')

def rows(out): return [json.loads(o) for o in out.read_text().splitlines()] if out.is_file() else []

def key(o): return o['data'],o['setting'],o['seed']

def todo(out, seeds, names, which):
    "Keys of rows that are not there: a seed of everything, of the reasons on emoji only, and then further seeds"
    keys = [('emoji',s,0) for s in settings+reasons] + [('cars',s,0) for s in settings+reasons[:1]+['OML, own, as for cars']]
    keys += [(d,s,i) for d in sets for i in range(1, seeds) for s in settings[1:]]
    done = set(map(key, rows(out)))
    return [o for o in keys if o not in done and o[0] in names and o[1] in which]

# What all share

def most_resident(): return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)

class Clock:
    "The curve of a run: seconds of training and scores after each epoch"
    def __init__(self, test): self.test,self.curve,self.spent,self.peak = test,[],0,None
    def start(self): self.before,self.began = most_resident(),time.process_time()
    def __call__(self, embed):
        "An epoch has ended: stop, measure, go on; `embed` makes embeddings of images that are normalised"
        self.spent += time.process_time()-self.began
        if self.curve and self.peak is None: self.peak = most_resident()
        E = self.test.embeddings(embed)
        self.curve.append(dict(seconds=round(self.spent, 2), **self.test.scores(E)))
        self.began = time.process_time()
        return E

class Test:
    "Test images of a data set as dmlfast crops them, in a file"
    def __init__(self, cache, name): self.pixels,self.labels,self.l2 = cache/f'{name}.npy',cache/f'{name}_labels.npy',False
    def embeddings(self, embed):
        import numpy as np, torch
        mean,std = torch.tensor([.485,.456,.406])[:,None,None],torch.tensor([.229,.224,.225])[:,None,None]
        def _block(i): return torch.from_numpy(np.load(self.pixels, mmap_mode='r')[i:i+64].copy()) # and no more stays in memory
        with torch.no_grad(): return torch.cat([embed((_block(i)/255-mean)/std) for i in range(0, len(self.y), 64)]).float()
    @property
    def y(self):
        import numpy as np
        return np.load(self.labels)
    def scores(self, E):
        from dmlfast.retrieval.metrics import evaluate_retrieval
        res = evaluate_retrieval(E, self.y, metrics=metrics, n_boot=1)
        res = {k:round(float(res[k]), 5) for k in metrics}
        if self.l2:
            l2 = evaluate_retrieval(E, self.y, metrics=metrics[0], metric='l2', n_boot=1)
            res[f'{metrics[0]} by l2'] = round(float(l2[metrics[0]]), 5)
        return res

def images(folder, half):
    "Paths and class numbers of a half of the classes"
    classes = sorted(o for o in folder.iterdir() if o.is_dir() and any(o.iterdir()))
    n = len(classes)-round(len(classes)/2)
    classes = classes[:n] if half=='train' else classes[n:]
    both = [(p,i) for i,o in enumerate(classes) for p in sorted(o.iterdir())]
    return [p for p,_ in both],[i for _,i in both]

def body_of(weights):
    import timm, torch
    from safetensors.torch import load_file
    body = timm.create_model('mobilenetv2_035', num_classes=0, pad_type='same')
    body.load_state_dict(load_file(weights))
    return body.to(memory_format=torch.channels_last)

def crops(size, least, ratio=(3/4,4/3), first=()):
    "Random crops and flips of torchvision, with the normalisation of ImageNet"
    from torchvision import transforms as T
    return T.Compose([*first, T.RandomResizedCrop(size, (least,1), ratio), T.RandomHorizontalFlip(), T.ToTensor(),
        T.Normalize([.485,.456,.406], [.229,.224,.225])])

def still(m):
    "Keep the statistics of batch norm"
    import torch
    for o in m.modules():
        if isinstance(o, torch.nn.BatchNorm2d): o.eval()

def one_cycle(opt, steps):
    "fastai's schedule"
    from torch.optim.lr_scheduler import OneCycleLR
    return OneCycleLR(opt, [o['lr'] for o in opt.param_groups], steps, pct_start=.25, div_factor=25, final_div_factor=1e5/25)

# The three libraries

def data_of(folder, name):
    from dmlfast.all import MetricDataset
    return MetricDataset.from_folder(folder, val_pct=0, name=name, **sets[name])

def learner(folder, name, weights, seed, loss=None, **kwargs):
    import torch
    from dmlfast.all import metric_learner
    dls = data_of(folder, name).dataloaders(valid=None, seed=seed, num_workers=0)
    learn = metric_learner(dls, 'mobilenetv2_035', loss, weights=weights, model_kwargs=dict(pad_type='same'), **kwargs)
    learn.model.to(memory_format=torch.channels_last)
    return learn

def features(folder, name, weights, seed, what, clock):
    "Test images are read and kept; the body as it comes is measured"
    import numpy as np
    ds,test = data_of(folder, name),clock.test
    assert set(map(str, ds.items('train')))==set(map(str, images(folder, 'train')[0]))
    dl = ds.dataloaders(valid=None, num_workers=0).test_dl(ds.items('test'), with_labels=True)
    both = [((x*255).round().byte().numpy(), y.numpy()) for x,y in dl]
    for path,o in zip((test.pixels, test.labels), zip(*both)): np.save(path, np.concatenate(o))
    test.l2 = True
    clock.start()
    clock(body_of(weights).eval())
    return {}

def ours(folder, name, weights, seed, what, clock):
    import torch
    from dmlfast.all import TripletLoss
    from fastai.callback.core import Callback
    other = dict(loss=TripletLoss(.2), init='random', lr=slice(1e-4/3, 1e-4)) if what=='random head' else {}
    if '1e-4' in what: other = dict(lr=slice(1e-4, 1e-4), head='identity' if 'no head' in what else None)
    learn = learner(folder, name, weights, seed, **other)
    if what=='fit_head':
        X = clock.test.embeddings(learn.model.eval().features)
        clock.test.embeddings = lambda embed: embed(X).detach()
    def measure(): clock(learn.model.eval())
    class Plain(Callback):
        "Images are tensors, and no longer fastai's class of them"
        def before_batch(self): self.learn.xb = tuple(o.as_subclass(torch.Tensor) for o in self.xb)
    if what=='plain tensors': learn.add_cb(Plain())
    class Measure(Callback):
        def after_epoch(self): measure()
    with learn.no_bar(), learn.no_logging():
        clock.start()
        learn.start_head()
        measure()
        learn.fit_head(head_epochs, cbs=Measure()) if what=='fit_head' else learn.fit_one_cycle(epochs, cbs=Measure())
        res = learn.evaluate('test', metrics)
    return dict(batches=len(learn.dls.train), own={k:round(res[k], 5) for k in metrics})

def pml(folder, name, weights, seed, what, clock):
    import torch
    from dmlfast.files.images import open_image
    from pytorch_metric_learning import losses, miners, samplers, trainers
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from torchvision.transforms import Resize
    size,(paths,labels),own = sets[name]['size'],images(folder, 'train'),what.startswith('own')
    tfm = crops(size, .16, (.75,1.33), [Resize(size)]) if own else crops(size, .5 if name=='emoji' else .2)
    class Data(torch.utils.data.Dataset):
        def __len__(self): return len(paths)
        def __getitem__(self, i): return tfm(open_image(paths[i])),labels[i]
    bs,n = 32 if own else 64,len(paths)
    trunk,embedder = body_of(weights),torch.nn.Linear(1280, 64 if own else 128)
    if 'data' in what:
        learn = learner(folder, name, weights, seed)
        clock.start()
        learn.start_head()
        embedder = learn.model.head
    models = dict(trunk=trunk, embedder=embedder)
    Opt,lrs,wd = (torch.optim.Adam,(1e-5,1e-4),1e-4) if own else (torch.optim.AdamW,(1e-4/3,1e-4),1e-2)
    opts = {f'{k}_optimizer':Opt(m.parameters(), lr, weight_decay=wd, eps=1e-8 if own else 1e-5) for (k,m),lr in zip(models.items(), lrs)}
    sampler = samplers.MPerClassSampler(labels, 4, length_before_new_iter=n)
    steps = epochs*(len(sampler)//bs)
    scheds = {} if own else {k.replace('optimizer', 'scheduler_by_iteration'):one_cycle(o, steps) for k,o in opts.items()}
    last = []
    def embed(x): return torch.nn.functional.normalize(embedder(trunk(x)), dim=-1)
    def hook(trainer):
        trainer.set_to_eval()
        last[:] = [clock(embed)]
    trainer = trainers.MetricLossOnly(models, opts, bs, dict(metric_loss=losses.TripletMarginLoss(margin=.1 if own else .2)), Data(),
        mining_funcs=dict(tuple_miner=miners.MultiSimilarityMiner(epsilon=.1)) if own else {}, sampler=sampler, dataloader_num_workers=0,
        lr_schedulers=scheds, freeze_trunk_batchnorm='not frozen' not in what, end_of_epoch_hook=hook)
    if 'data' not in what: clock.start()
    hook(trainer)
    trainer.train(num_epochs=epochs)
    y = torch.from_numpy(clock.test.y)
    theirs = AccuracyCalculator(('precision_at_1','mean_average_precision_at_r'), k='max_bin_count', device=torch.device('cpu'))
    res = theirs.get_accuracy(last[0], y)
    return dict(batches=trainer.iterations_per_epoch, own={k:round(float(res[o]), 5) for k,o in
        zip(metrics, ('precision_at_1','mean_average_precision_at_r'))})

def oml(folder, name, weights, seed, what, clock):
    import pandas as pd, torch
    from dmlfast.files.images import open_image
    from oml import datasets as d
    from oml.interfaces.models import IExtractor
    from oml.losses import TripletLossWithMiner
    from oml.metrics import calc_retrieval_metrics_rr
    from oml.miners import AllTripletsMiner, HardTripletsMiner
    from oml.retrieval import RetrievalResults
    from oml.samplers import BalanceSampler
    from oml.transforms.images.torchvision import get_normalisation_resize_hypvit, get_normalisation_resize_torch
    size,(paths,labels),own = sets[name]['size'],images(folder, 'train'),what.startswith('own')
    plain = get_normalisation_resize_torch(size) if name=='emoji' else get_normalisation_resize_hypvit(round(size*256/224), size)
    class Extractor(IExtractor):
        def __init__(self):
            super().__init__()
            self.body,self.head = body_of(weights),None if own else torch.nn.Linear(1280, 128)
        @property
        def feat_dim(self): return 1280 if own else 128
        def forward(self, x): return self.body(x) if own else torch.nn.functional.normalize(self.head(self.body(x)), dim=-1)
    model,clock.test.l2 = Extractor(),own
    def table(paths, labels, **cols): return pd.DataFrame(dict(label=labels, path=list(map(str, paths)), **cols))
    tfm = plain if own else crops(size, .5 if name=='emoji' else .2)
    train = d.ImageLabeledDataset(table(paths, labels), transform=tfm, f_imread=open_image)
    margin,lr = (None,1e-5) if 'as for cars' in what else (.1 if own else .2,1e-4)
    loss = TripletLossWithMiner(margin, HardTripletsMiner() if 'hard' in what else AllTripletsMiner(), need_logs=True)
    sampler = BalanceSampler(train.get_labels(), n_labels=16, n_instances=4)
    passes = max(1, round(len(paths)/64/len(sampler)))
    if own: opt,sched = torch.optim.Adam(model.parameters(), lr),None
    else:
        groups = [dict(params=m.parameters(), lr=lr) for m,lr in ((model.body,1e-4/3), (model.head,1e-4))]
        opt = torch.optim.AdamW(groups, weight_decay=1e-2, eps=1e-5)
        sched = one_cycle(opt, epochs*passes*len(sampler))
    clock.start()
    clock(model.eval())
    for _ in range(epochs):
        still(model.train())
        for _ in range(passes):
            for batch in torch.utils.data.DataLoader(train, batch_sampler=sampler):
                loss(model(batch['input_tensors']), batch['labels']).backward()
                opt.step()
                opt.zero_grad()
                if sched: sched.step()
        E = clock(model.eval())
    df = table(*images(folder, 'test'), is_query=True, is_gallery=True, split='validation')
    test = d.ImageQueryGalleryLabeledDataset(df, transform=plain)
    test.get_labels = lambda: clock.test.y # in the order of the images that all are measured on
    res = calc_retrieval_metrics_rr(RetrievalResults.from_embeddings(E, test, n_items=10), cmc_top_k=(1,), map_top_k=(), precision_top_k=())
    return dict(batches=passes*len(sampler), own={'recall@1 by l2' if own else 'recall@1':round(float(res['cmc'][1]), 5)})

# One row, all rows, the table

def one(folder, name, setting, seed, weights, cache):
    "A row, in this process"
    warnings.simplefilter('ignore')
    import numpy as np, torch
    torch.set_num_threads(1)
    for o in (random.seed, np.random.seed, torch.manual_seed): o(seed)
    library,_,what = setting.partition(', ')
    clock = Clock(Test(cache, name))
    rest = dict(features=features, dmlfast=ours, PML=pml, OML=oml)[library](folder/name/'images', name, weights, seed, what, clock)
    return dict(data=name, setting=setting, seed=seed, epochs=len(clock.curve)-1, seconds=clock.curve[-1]['seconds'], peak_mib=clock.peak,
        before_mib=clock.before, **rest, curve=clock.curve)

def minutes(keys, have):
    "Processor's minutes, as far as a setting of a data set has a row"
    took = {key(o)[:2]:o['total'] for o in have}
    known = [took[o[:2]] for o in keys if o[:2] in took]
    return sum(known)/60,len(keys)-len(known)

def main():
    p = argparse.ArgumentParser()
    p.add_argument('folder', type=Path, nargs='?')
    p.add_argument('--weights', type=Path)
    p.add_argument('--oml', default=sys.executable, help='Python that has open-metric-learning')
    p.add_argument('--sets', nargs='*', default=list(sets), help='so that two processes may share the work')
    p.add_argument('--settings', nargs='*', default=settings+reasons)
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--cache', type=Path, default=Path(tempfile.gettempdir())/'dmlfast_peers', help='folder for the test images')
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.jsonl'))
    p.add_argument('--plan', action='store_true')
    p.add_argument('--table', action='store_true')
    p.add_argument('--one', nargs=3, help='data set, setting and seed: print this row')
    a = p.parse_args()
    if a.table: return print(table(rows(a.out)).to_string())
    if a.one: return print(json.dumps(one(a.folder, *a.one[:2], int(a.one[2]), a.weights, a.cache)))
    keys = todo(a.out, a.seeds, a.sets, a.settings)
    known,unknown = minutes(keys, rows(a.out))
    print(f'{len(keys)} rows, {known:.0f} minutes and {unknown} rows whose time is not known yet', flush=True)
    if a.plan: return
    a.cache.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':str(Path(__file__).resolve().parents[1])}
    for name,setting,seed in keys:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        python = a.oml if setting.startswith('OML') else sys.executable
        cmd = [python,__file__,a.folder,'--weights',a.weights,'--cache',a.cache,'--one',name,setting,seed]
        res = subprocess.run(list(map(str, cmd)), env=env, capture_output=True, text=True)
        if res.returncode:
            print(name, setting, seed, res.stderr[-2000:], flush=True)
            continue
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        row = json.loads(res.stdout.splitlines()[-1])
        row['total'] = round(after.ru_utime+after.ru_stime-before.ru_utime-before.ru_stime, 1)
        with a.out.open('a') as f: f.write(json.dumps(row)+'\n')
        print(name, setting, seed, row['curve'][-1], row['total'], flush=True)

def reached(curve, k, v):
    "Seconds until a curve reaches a value"
    return next((o['seconds'] for o in curve if o[k]>=v), None)

def table(rows):
    "Means over seeds: last scores, seconds of training, of an epoch and to two recalls, memory"
    import pandas as pd
    k,by = metrics[0],{}
    for o in {key(o):o for o in rows}.values(): by.setdefault((o['data'],o['setting']), []).append(o)
    def _mean(v):
        v = list(v)
        return None if None in v else sum(v)/len(v)
    last = {o:_mean(r['curve'][-1][k] for r in rs) for o,rs in by.items()}
    res = []
    for (name,setting),rs in by.items():
        base,best = last.get((name,'features')),max(v for (n,_),v in last.items() if n==name)
        if setting=='features': rs = [{**r, 'seconds':0, 'peak_mib':None} for r in rs]
        spread = [r['curve'][-1][k] for r in rs]
        res.append({'data':name, 'setting':setting, 'seeds':len(rs), 'start':_mean(r['curve'][0][k] for r in rs), k:_mean(spread),
            'least':min(spread), 'most':max(spread), metrics[1]:_mean(r['curve'][-1][metrics[1]] for r in rs),
            'seconds':_mean(r['seconds'] for r in rs), 'to features':_mean(reached(r['curve'], k, base) for r in rs),
            'to 95 %':_mean(reached(r['curve'], k, .95*best) for r in rs), 'MiB':_mean(r['peak_mib'] for r in rs)})
    order = {o:i for i,o in enumerate(settings+reasons)}
    df = pd.DataFrame(sorted(res, key=lambda o: (o['data'], order[o['setting']])))
    for o in ('seconds','to features','to 95 %','MiB'): df[o] = df[o].map(lambda v: '' if v is None or v!=v else f'{v:.0f}')
    return df.round(3).set_index(['data','setting'])

if __name__=='__main__': main()
