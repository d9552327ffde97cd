"""Does direction regularisation help when the head starts well? Does ranking? Every loss, on heads that are trained on the features of a frozen body.

    python benchmarks/heads.py FOLDER --weights WEIGHTS --cache CACHE    # FOLDER/cub100/images, FOLDER/cars/images, FOLDER/emoji/images
    python benchmarks/heads.py FOLDER --weights WEIGHTS --cache CACHE --plan     # how long what is left takes
    python benchmarks/heads.py FOLDER --weights WEIGHTS --cache CACHE --check    # the loop here against `fit_head`
    python benchmarks/heads.py FOLDER --weights WEIGHTS --cache CACHE --defaults # without searches, at the defaults of the library: fast
    python benchmarks/heads.py --table                                   # what is in benchmarks/heads.jsonl; with --defaults, in heads_defaults.jsonl

A row is one data set, body, partition of its classes into halves (train and test), start of the head and loss. It has five arms. Two have a search
of their own, of 50 trials on two class-disjoint folds of the training classes: the loss without the method (`plain`) and with it (`method`). A third,
`control`, has the settings of `method` with a weight of 0. `default` and `default_method` have the defaults of the library, without the method and with
it. Each arm is then trained on all training classes with four seeds, and scored on the test classes. The method is the loss's `gamma`, or for `MarginLoss + ranking` the weight of the ranking loss, on the embeddings of graded views.

The images are read once: features are kept in CACHE. A fit is a loop without fastai, since there are hundreds of thousands of them. `--check` shows that it
gives the weights that `fit_head` gives. Rows that are there are not made again, and several processes may share the work."""
import argparse, inspect, json, math, time, warnings
from itertools import product
from pathlib import Path
warnings.simplefilter('ignore')
import filelock, numpy as np, pandas as pd, torch, torch.nn.functional as F
from torch import nn
from fastai.torch_core import set_seed
from dmlfast.all import *
from dmlfast.data.batches import BalancedSampler
from dmlfast.losses.base import lr_mults
from dmlfast.study.comparison import mean_interval
from dmlfast.study.tuning import load_optuna, suggest, trial_report
from dmlfast.train.baseline import start_head
from dmlfast.train.features import body_features, collect, measured_dl
from dmlfast.train.ssr import GradedViews, RankingLoss
import transfer
from transfer import bodies, metrics, rows

sets = {k:transfer.sets[k] for k in ('cars','cub100','emoji')}
starts = 'lda','pca','random'
ranking = 'MarginLoss + ranking'
first = 'TripletLoss','ProxyNCALoss','MultiSimilarityLoss',ranking # the losses of the two systems
emb_sz,bs,per_class,epochs,n_trials,n_seeds,n_partitions = 128,64,4,5,50,4,5

# ---- features ----
def features(folder, weights, cache, name, body, views=False):
    "Features `(n,d)`, labels `(n,)`, and those of graded views `(n,levels,d)` if asked for; read once"
    file,more = cache/f'{name}-{body}.npz',cache/f'{name}-{body}-views.npy'
    if not file.is_file() or views and not more.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        ds = MetricDataset.from_folder(folder/name/'images', name=name, **sets[name])
        dls = ds.dataloaders(num_workers=0, seed=0)
        learn = metric_learner(dls, body, ContrastiveLoss(), weights=weights and weights/f'{body}.safetensors', model_kwargs=bodies[body])
        dl = dls.test_dl(sorted(ds.path/o for o in ds.df.path))
        model,norm = learn.model,[o for o in dl.after_batch.fs if hasattr(o, 'mean')][0]
        graded = GradedViews(4, seed=0)
        def viewed(x): return model.features(graded(x, norm.mean, norm.std)[:,1:].flatten(0, 1)).unflatten(0, (len(x),4)).half()
        if not file.is_file():
            X,_ = collect(model, dl, model.features)
            np.savez(file, X=X.numpy(), y=np.unique([o.parent.name for o in dl.items], return_inverse=True)[1])
        if views and not more.is_file(): np.save(more, collect(model, dl, lambda x: viewed(x))[0].half().numpy())
    data = np.load(file)
    return torch.from_numpy(data['X']),torch.from_numpy(data['y']),torch.from_numpy(np.load(more)) if views else None

def halves(labels, seed):
    "Two random halves of the classes, as masks"
    classes = np.random.default_rng(seed).permutation(int(labels.max())+1)
    mask = torch.isin(labels, torch.from_numpy(classes[:len(classes)//2]))
    return mask,~mask

class Part:
    "Images of some classes to train on, and of others to score"
    def __init__(self, X, labels, views, train, test):
        self.X,self.Z = X[train],X[test]
        self.y,self.t = labels[train].unique(return_inverse=True)[1],labels[test]
        self.views,self.heads = None if views is None else views[train],{}

    def begin(self, head, start):
        "Let a head start from these images; the linear algebra is done once"
        if start not in self.heads:
            start_head(head, self.X, self.y, start)
            self.heads[start] = {k:v.clone() for k,v in head.state_dict().items()}
        head.load_state_dict(self.heads[start])

    def score(self, head):
        with torch.no_grad(): z = F.normalize(head(self.Z)) if head else F.normalize(self.Z)
        res = evaluate_retrieval(z, self.t, metrics=metrics, n_boot=1)
        return [round(res[k], 5) for k in metrics]

# ---- a fit ----
# fastai's `combined_cos`, in double precision: the rows that are there were made so, and a rounding can move a seed from a random head by half a point
def cos(a, b, pct): return a+(1-math.cos(math.pi*pct))*(b-a)/2
def one_cycle(pct, lo, mid, hi): return cos(lo, mid, pct/.25) if pct<.25 else cos(mid, hi, (pct-.25)/.75)

def new_head(part, start, seed):
    torch.manual_seed(seed)
    head = nn.Linear(part.X.shape[1], emb_sz)
    if start!='random': part.begin(head, start)
    return head

def train(part, start, loss, lr, seed, n_epoch=epochs, rank_weight=0, begin=None, bs=bs, memory=None, **batches):
    "A head, as `fit_head` trains it; it may `begin` with the states of a head and a loss, and have a `BatchMemory`"
    head = new_head(part, start, seed)
    loss.setup(int(part.y.max())+1, emb_sz).train()
    if begin: head.load_state_dict(begin[0]); loss.load_state_dict(begin[1])
    elif start!='random':
        with torch.no_grad(): loss.start(F.normalize(head(part.X)), part.y)
    mults = lr_mults(loss)
    groups = [dict(params=[head.weight], mult=1), dict(params=[head.bias], mult=1, weight_decay=0)]
    groups += [dict(params=[p], mult=mults.get(p, 1)) for p in loss.parameters()]
    opt = torch.optim.AdamW(groups, lr=lr, eps=1e-5, weight_decay=.01, betas=(.95,.99))
    sampler,rank,rng = BalancedSampler(part.y.numpy(), bs, per_class, seed, **batches),RankingLoss(),torch.Generator().manual_seed(seed)
    step,total = 0,len(sampler)*n_epoch
    for epoch in range(n_epoch):
        for idx in torch.from_numpy(sampler.idxs(epoch)):
            now,mom = one_cycle(step/total, lr/25, lr, lr/1e5),one_cycle(step/total, .95, .85, .95)
            for g in opt.param_groups: g['lr'],g['betas'] = now*g['mult'],(mom,.99)
            x = part.X[idx]
            z = F.normalize(head(x))
            out = loss(z, part.y[idx], *(memory.others() if memory else ()))
            if memory: memory.remember(z.detach(), part.y[idx])
            if rank_weight:
                pick = torch.randperm(bs, generator=rng)[:20]
                out = out + rank_weight*rank(head(torch.cat([x[pick,None], part.views[idx[pick]].float()], 1)))
            opt.zero_grad()
            out.backward()
            opt.step()
            step += 1
    return head

# ---- search and runs ----
def fit(part, start, name, params, seed):
    "A head by the name of its loss and its settings"
    p = dict(params)
    lr,weight = p.pop('lr'),p.pop('ranking', 0)
    return train(part, start, register_loss[name.split(' ')[0]](**p), lr, seed, rank_weight=weight)

def defaults(name, start, method):
    "The defaults of the library"
    cls = register_loss[name.split(' ')[0]]
    own = {k:p.default for k,p in inspect.signature(cls.__init__).parameters.items() if k in cls.space and k!='gamma'}
    return dict(lr=1e-3 if start=='random' else 1e-4, **own, **({} if not method else dict(ranking=.8) if name==ranking else dict(gamma=.3)))

def space(name, method):
    "Where a search looks"
    own = {k:o for k,o in register_loss[name.split(' ')[0]].space.items() if k!='gamma'}
    return dict(lr=(1e-5,1e-2,'log'), **own, **({} if not method else dict(ranking=(.1,1.6,'log')) if name==ranking else dict(gamma=(.0,.6))))

def off(params): return {k:0. if k in ('gamma','ranking') else v for k,v in params.items()}

def search(folds, start, name, method):
    "The settings with the best mean map@r of the folds, and that score; it begins with the defaults at four rates"
    optuna,where = load_optuna(),space(name, method)
    study = optuna.create_study(direction='maximize', pruner=optuna.pruners.MedianPruner(n_startup_trials=8),
        sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=16, multivariate=True))
    for lr in (1e-4,3e-5,3e-4,1e-3): study.enqueue_trial(defaults(name, start, method)|dict(lr=lr))
    def objective(trial):
        params,report,done = suggest(trial, where),trial_report(trial),[]
        for i,part in enumerate(folds):
            score = part.score(fit(part, start, name, params, 0))[1]
            done.append(score if score==score else 0.)
            report(i, sum(done)/len(done))
        return sum(done)/len(done)
    study.optimize(objective, n_trials=n_trials)
    return {k:float(f'{v:.4g}') for k,v in study.best_params.items()},round(study.best_value, 5)

def measure(parts, start, name, searched=True):
    "What a row holds beside its key"
    part,folds = parts
    began,arms,seen = time.process_time(),dict(default=defaults(name, start, False), default_method=defaults(name, start, True)),{}
    if searched:
        plain,method = (search(folds, start, name, o) for o in (False,True))
        arms = dict(plain=plain[0], method=method[0], control=off(method[0]), **arms)
        seen = dict(chosen=dict(plain=plain[0], method=method[0]), folds=[plain[1],method[1]])
    scores = {k:[part.score(fit(part, start, name, o, 1+seed)) for seed in range(n_seeds)] for k,o in arms.items()}
    began_at = [part.score(new_head(part, start, 1+seed)) for seed in range(n_seeds if start=='random' else 1)]
    return dict(**seen, features=part.score(None), start_scores=began_at, **scores,
        seconds=round(time.process_time()-began))

def parts_of(data, partition):
    "One partition: the part for the runs, and the two folds for the searches"
    X,labels,views = data
    train,test = halves(labels, partition)
    whole = Part(X, labels, views, train, test)
    ids = torch.zeros(len(labels), dtype=torch.long)
    ids[train] = whole.y
    a,b = (train&torch.isin(ids, whole.y[o].unique()) for o in halves(whole.y, 100+partition))
    return whole,[Part(X, labels, views, *o) for o in ((a,b),(b,a))]

# ---- what it comes to ----
def interval(d):
    "Mean, its 95 % interval and p of no difference, by Student's t"
    from scipy import stats
    return *mean_interval(d),math.nan if len(d)<2 else stats.ttest_1samp(d, 0).pvalue if np.std(d) else 1.

def holm(p):
    "p corrected for so many comparisons, by Holm's steps"
    p = np.asarray(p, dtype=float)
    order,res = np.argsort(p),np.empty(len(p))
    res[order] = np.maximum.accumulate(np.minimum(1, p[order]*np.arange(len(p), 0, -1)))
    return res

def differences(rows, metric='recall@1', a='method', b='plain', by=('data','body','start','loss'), keep=False):
    "Points that arm `a` has more than arm `b`: means over seeds, then over partitions, whose spread makes the interval; `p` is Holm's of all lines"
    at,df = metrics.index(metric),pd.DataFrame({key(o):o for o in rows}.values())
    df['d'] = [100*np.mean([x[at]-y[at] for x,y in zip(p, q)]) for p,q in zip(df[a], df[b])]
    df['seed_sd'] = [100*np.std([x[at]-y[at] for x,y in zip(p, q)], ddof=1) for p,q in zip(df[a], df[b])]
    res = df.groupby(list(by), sort=False).agg(d=('d', list), seeds=('seed_sd', 'mean'))
    res[['difference','low','high','p']] = [interval(o) for o in res.d]
    return res.assign(partitions=res.d.map(len), holm=holm(res.p.fillna(1))).drop(columns=['p'] if keep else ['d','p']).reset_index()

def levels(rows, metric='recall@1'):
    "Mean scores of the arms, in per cent, beside the features and the start"
    at,df = metrics.index(metric),pd.DataFrame({key(o):o for o in rows}.values())
    cols = dict(features=df.features.map(lambda o: 100*o[at]), started=df.start_scores.map(lambda o: 100*np.mean(o, axis=0)[at]))
    cols |= {k:df[k].map(lambda o: 100*np.mean(o, axis=0)[at]) for k in ('plain','method','control','default','default_method') if k in df}
    return df[list(names)].assign(**cols).groupby(['data','body','start','loss'], sort=False)[list(cols)].mean().reset_index()

def table(rows, defaults=False):
    pairs = [('default_method','default')] if defaults else [('method','plain'),('method','control'),('default_method','default')]
    return '\n\n'.join(o.round(2).to_string(index=False) for o in (levels(rows), *(differences(rows, a=a, b=b).assign(arm=a, minus=b) for a,b in pairs)))

# ---- rows ----
names = 'data','body','partition','start','loss'
def key(o): return tuple(o[k] for k in names)

def work(todo, out, names, make):
    "Make the rows of some keys that are not in `out`, each by one of the processes that share the work"
    def _done(): return {tuple(r[k] for k in names) for r in rows(out)}
    for o in todo:
        lock = filelock.FileLock(out.with_name(f".{out.stem}-{'-'.join(map(str, o)).replace(' ', '')}.lock"), timeout=0)
        if o in _done(): continue
        try: lock.acquire()
        except filelock.Timeout: continue # another process makes this row
        try:
            if o in _done(): continue
            row = dict(zip(names, o), **make(*o))
            with filelock.FileLock(f'{out}.lock'), out.open('a') as f: f.write(json.dumps(row)+'\n')
            print({k:row[k] for k in (*names,'seconds')}, flush=True)
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)

def viewed(body, loss): return loss!=ranking or body==list(bodies)[0] # views are kept for the small network alone

def plan(defaults=False):
    "All rows, the ones that answer the question first; a search begins from LDA or from a random head"
    others = [o for o in register_loss if o not in first and not o.startswith('DR')]
    for losses in (first,others):
        for body,p,start in product(bodies, range(n_partitions), starts if defaults else starts[::2]):
            for name,loss in product(sets, losses):
                if viewed(body, loss): yield name,body,p,start,loss

def wanted(todo, only, *kinds):
    "The keys that have, of each kind of names that `only` has some of, one of these"
    groups = [o for o in ([k for k in only if k in kind] for kind in kinds) if o]
    return [o for o in todo if all(any(k in o for k in group) for group in groups)]

def print_plan(todo, have, names, guess, what='rows'):
    "How many rows are left, and how long they take as those did that are there"
    done = {tuple(o[k] for k in names) for o in have}
    left,each = [o for o in todo if o not in done],np.mean([o['seconds'] for o in have] or [guess])
    print(f'{len(todo)} {what}, {len(left)} of them left: {len(left)*each/3600:.1f} hours of one core, at {each:.0f} seconds a row'
        f"{' (a guess)'*(not have)}")

def check(folder, weights, cache):
    "Largest difference between embeddings of this loop and of `fit_head`, for a few losses"
    name,body = 'cub100','mobilenetv2_035'
    ds = MetricDataset.from_folder(folder/name/'images', name=name, **sets[name])
    for start,loss in product(starts, ('TripletLoss','ProxyNCALoss','ArcFaceLoss')):
        set_seed(1, reproducible=True)
        learn = metric_learner(ds.dataloaders(bs=bs, per_class=per_class, seed=1, num_workers=0), body, register_loss[loss](), emb_sz=emb_sz,
            weights=weights and weights/f'{body}.safetensors', model_kwargs=bodies[body], init=start)
        with learn.no_bar(), learn.no_logging():
            learn.start_head()
            X,y = body_features(learn.model, measured_dl(learn.dls))
            begin = {k:v.clone() for k,v in learn.model.head.state_dict().items()}
            own = {k:v.clone() for k,v in learn.loss_func.state_dict().items()}
            learn.fit_head(2, 1e-3)
        part = Part(X, y, None, slice(None), slice(0))
        mine = train(part, start, register_loss[loss](), 1e-3, 1, 2, begin=(begin,own))
        with torch.no_grad(): print(start, loss, f'{(F.normalize(mine(X))-learn.model.eval()(X)).abs().max():.1e}')

def main():
    p = argparse.ArgumentParser()
    p.add_argument('folder', type=Path, nargs='?')
    p.add_argument('--weights', type=Path, help="folder with a .safetensors file for each body; timm's weights if not given")
    p.add_argument('--cache', type=Path, default=Path('features'), help='folder for features')
    p.add_argument('--only', nargs='*', default=[], help='names that a row has: of data, bodies, starts or losses')
    p.add_argument('--partitions', type=int, default=n_partitions)
    p.add_argument('--out', type=Path, help='heads.jsonl beside this file, or heads_defaults.jsonl')
    p.add_argument('--defaults', action='store_true', help='without searches: only the arms with the defaults of the library')
    for o in ('plan','check','table'): p.add_argument(f'--{o}', action='store_true')
    args = p.parse_args()
    args.out = args.out or Path(__file__).with_name(f"heads{'_defaults'*args.defaults}.jsonl")
    if args.check: return check(args.folder, args.weights, args.cache)
    todo = wanted([o for o in plan(args.defaults) if o[2]<args.partitions], args.only, sets, bodies, starts, [ranking,*register_loss])
    fits = 2*n_seeds if args.defaults else 2*n_trials+5*n_seeds
    if args.plan: return print_plan(todo, rows(args.out), names, 5 if args.defaults else 75, f'rows of about {fits} fits each')
    if args.table: return print(table(rows(args.out), args.defaults))
    torch.set_num_threads(1)
    done,held = {key(o) for o in rows(args.out)},{}
    graded = {o[1] for o in todo if o[4]==ranking and o not in done} # views take longer to read than all else, and only ranking needs them
    def _made(name, body, partition, start, loss):
        if (name,body,partition) not in held:
            if len(held)>=len(sets): held.clear()
            held[name,body,partition] = parts_of(features(args.folder, args.weights, args.cache, name, body, body in graded), partition)
        return measure(held[name,body,partition], start, loss, not args.defaults)
    work(todo, args.out, names, _made)

if __name__=='__main__': main()
