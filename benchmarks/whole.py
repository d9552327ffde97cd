"""Does direction regularisation help when the whole network is trained from a good start? Does ranking?

    python benchmarks/whole.py FOLDER --weights WEIGHTS          # FOLDER/cub100/images, FOLDER/cars/images, FOLDER/emoji/images
    python benchmarks/whole.py FOLDER --weights WEIGHTS --plan   # how long what is left takes
    python benchmarks/whole.py --table                           # what is in benchmarks/whole.jsonl

Body and head are trained for three epochs of one cycle at the default rates of the library, from LDA, with batch norm frozen. A row is a data set,
body, partition of its classes (as in heads.py), source of the settings, loss, arm (`plain`, or `method` with direction regularisation or ranking) and seed.

- `found`: what the searches of heads.py chose on the training classes of that partition, for the loss alone and for it with the method. The rate is
  the default of whole networks, and so is the weight of ranking, which acts on the body here and not on the embeddings as there. The settings are
  those found for the small network, for the larger one too.
- `default`: the library's defaults, γ=0.3 with the method.
- `recipe`: the settings of the two reproductions by the names of the library's recipes, batches and rates included, with this body in place of
  theirs, from LDA.

The row `start` has the scores before training. Rows that are there are not made again, and several processes may share the work."""
import argparse, time
from heads import *
from dmlfast.study.plans import train_run

sizes = {k:dict(o, size=96) for k,o in sets.items()}
recipe_of = {'TripletLoss':('triplet','dr_triplet'), 'ProxyNCALoss':('proxynca','dr_proxynca'), 'MultiSimilarityLoss':('ms','dr_ms'),
    ranking:('margin','ssr_margin')}
arms,sources,n_epoch = ('plain','method'),('found','default','recipe'),3
cols = 'data','body','partition','settings','loss','arm','seed'

def dataset(folder, name, partition, how=sizes):
    "A data set with the classes of a partition of heads.py, without validation"
    ds = MetricDataset.from_folder(folder/name/'images', name=name, val_pct=0, **how[name])
    classes = sorted(ds.df.label.unique())
    train = {c for c,o in zip(classes, halves(torch.arange(len(classes)), partition)[0]) if o}
    return MetricDataset(ds.df.assign(split=['train' if o in train else 'test' for o in ds.df.label]), ds.path, name, **how[name])

def found(name, partition, loss, arm):
    "What a search of heads.py chose for the small network"
    rows_ = {key(o):o for o in rows(Path(__file__).with_name('heads.jsonl'))}
    k = name,list(bodies)[0],partition,'lda',loss
    if k not in rows_: raise ValueError(f'There is no search for {k} in heads.jsonl: make it first, with heads.py.')
    res = dict(rows_[k]['chosen'][arm if loss!=ranking else 'plain'])
    return {k:v for k,v in res.items() if k not in ('lr','ranking')}

def settings_of(weights, name, body, partition, source, loss, arm, seed):
    "Settings of a run, for `train_run`"
    res = dict(seed=1+seed, model=dict(arch=body, timm=bodies[body], emb_sz=128, init='lda', freeze_bn=True),
        batch=dict(num_workers=0, size=sizes[name]['size']), fit=dict(n_epoch=n_epoch))
    if weights: res['model']['weights'] = str(weights/f'{body}.safetensors')
    if source=='start': return dict(res, fit=dict(n_epoch=0))
    if source=='recipe': return dict(res, recipe=recipe_of[loss][arms.index(arm)], fit=dict(n_epoch=n_epoch, patience=0))
    res['fit']['sched'] = 'one_cycle'
    res['loss'] = dict(name=loss.split(' ')[0], **(found(name, partition, loss, arm) if source=='found' else {}))
    if source=='default' and arm=='method' and loss!=ranking: res['loss']['gamma'] = .3
    if loss==ranking and arm=='method': res['ssr'] = dict(m=10)
    return res

def measure(ds, *run):
    "What a row holds beside its key"
    began = time.process_time()
    embs,labels,_ = train_run(settings_of(*run), ds, 'test')
    seconds = round(time.process_time()-began)
    res = evaluate_retrieval(embs, labels, metrics=metrics, n_boot=1)
    return dict(scores=[round(res[k], 5) for k in metrics], seconds=seconds)

def plan(n_seeds=5, n_partitions=2):
    "All rows, the ones that answer the question first: three seeds, then what is special, then the other seeds"
    small,*larger = bodies
    def _runs(names, body, partitions, source, seeds, losses=first):
        for seed,p,name,loss,arm in product(seeds, partitions, names, losses, arms): yield name,body,p,source,loss,arm,seed
    both = range(n_partitions)
    for body,p,name in product(bodies, both, sets): yield name,body,p,'start','','plain',0
    yield from _runs(sets, small, both, 'found', range(min(1, n_seeds)))
    yield from _runs(sets, small, both, 'default', range(min(3, n_seeds)), first[:1])
    yield from _runs(sets, small, both, 'found', range(1, min(3, n_seeds)))
    yield from _runs(sets, small, [0], 'recipe', [0])
    for seed,body in product(range(min(3, n_seeds)), larger): yield from _runs(sets, body, both, 'default', [seed], first[:1])
    yield from _runs(['cars'], larger[0], both, 'found', [0])
    yield from _runs(sets, small, both, 'default', range(n_seeds)) # those of the triplet loss are there
    yield from _runs(sets, small, both, 'found', range(3, n_seeds))
    yield from _runs(['cars'], larger[0], both, 'found', [1])

def table(rows, settings='found', metric='recall@1', keep=False):
    "The start and both arms in per cent, and their difference in points: of each partition, and with an interval over runs; `holm` is p for all lines"
    df,by,res = pd.DataFrame(rows),['data','body','loss'],[]
    df['score'] = [100*o[metrics.index(metric)] for o in df.scores]
    starts = df[df.settings=='start'].set_index(['data','body','partition']).score
    runs = df[df.settings==settings].pivot_table(index=[*by,'partition','seed'], columns='arm', values='score', aggfunc='first', sort=False)
    runs = runs.dropna().assign(d=lambda o: o.method-o.plain) # the seeds that both arms have
    for k,o in runs.groupby(by, sort=False):
        parts = o.groupby('partition').d.mean()
        mean,low,high,p = interval(o.d)
        res.append(dict(zip(by, k), start=np.mean([starts[(*k[:2],i)] for i in parts.index]), plain=o.plain.mean(), method=o.method.mean(),
            difference=mean, low=low, high=high, p=p, d=o.d.tolist(), runs=len(o), **{f'partition {i}':v for i,v in parts.items()}))
    res = pd.DataFrame(res).sort_values('body', kind='stable', ignore_index=True)
    return res.assign(holm=holm(res.p.fillna(1))).drop(columns=['p'] if keep else ['p','d'])

def main():
    p = argparse.ArgumentParser()
    p.add_argument('folder', type=Path, nargs='?')
    p.add_argument('--weights', type=Path, help="folder with a .safetensors file for each body; timm's weights if not given")
    p.add_argument('--only', nargs='*', default=[], help='names that a row has: of data, bodies, settings or losses')
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.jsonl'))
    for o in ('plan','table'): p.add_argument(f'--{o}', action='store_true')
    args = p.parse_args()
    have = rows(args.out)
    there = [o for o in sources if any(r['settings']==o for r in have)]
    if args.table: return print('\n\n'.join(table(have, o).round(2).to_string(index=False) for o in there))
    todo = wanted(dict.fromkeys(plan(args.seeds)), args.only, sets, bodies, ['start',*sources], first)
    if args.plan: return print_plan(todo, have, cols, 50)
    torch.set_num_threads(1)
    held = {}
    def _made(*o):
        name,body,p = o[:3]
        if (name,p) not in held: held[name,p] = dataset(args.folder, name, p)
        return measure(held[name,p], args.weights, *o)
    work(todo, args.out, cols, _made)

if __name__=='__main__': main()
