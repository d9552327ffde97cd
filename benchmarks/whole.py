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

sizes = dict(cars=dict(size=96), cub100=dict(size=96), emoji=dict(size=96, whole=True))
recipe_of = {'TripletLoss':('triplet','dr_triplet'), 'ProxyNCALoss':('proxynca','dr_proxynca'), 'MultiSimilarityLoss':('ms','dr_ms'),
    ranking:('margin','ssr_margin')}
arms,n_epoch = ('plain','method'),3
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
    res = dict(seed=1+seed, model=dict(arch=body, timm=bodies[body], emb_sz=128, init='lda', freeze_bn=True), batch=dict(num_workers=0, size=sizes[name]['size']),
        fit=dict(n_epoch=n_epoch))
    if weights: res['model']['weights'] = str(weights/f'{body}.safetensors')
    if source=='recipe': return dict(res, recipe=recipe_of[loss][arms.index(arm)], fit=dict(n_epoch=n_epoch, patience=0))
    res['fit']['sched'] = 'one_cycle'
    res['loss'] = dict(name=loss.split(' ')[0], **(found(name, partition, loss, arm) if source=='found' else {}))
    if source=='default' and arm=='method' and loss!=ranking: res['loss']['gamma'] = .3
    if loss==ranking and arm=='method': res['ssr'] = dict(m=10)
    return res

def measure(ds, weights, name, body, partition, source, loss, arm, seed):
    "What a row holds beside its key"
    s = settings_of(weights, name, body, partition, source if source!='start' else 'default', 'TripletLoss' if source=='start' else loss, arm, seed)
    if source=='start': s['fit']['n_epoch'] = 0
    began = time.process_time()
    embs,labels,_ = train_run(s, ds, 'test')
    seconds = round(time.process_time()-began)
    res = evaluate_retrieval(embs, labels, metrics=metrics, n_boot=1)
    return dict(scores=[round(res[k], 5) for k in metrics], seconds=seconds)

def plan(n_seeds=5, n_partitions=2):
    "All rows, the ones that answer the question first: three seeds, then what is special, then the other seeds"
    small,larger = list(bodies)[:2]
    def _runs(names, body, partitions, source, seeds, losses=first):
        for seed,p,name,loss,arm in product(seeds, partitions, names, losses, arms): yield name,body,p,source,loss,arm,seed
    both = range(n_partitions)
    for p,name in product(both, sets): yield name,small,p,'start','','plain',0
    for p in both: yield 'cars',larger,p,'start','','plain',0
    yield from _runs(sets, small, both, 'found', range(min(1, n_seeds)))
    yield from _runs(sets, small, both, 'default', range(min(3, n_seeds)), first[:1])
    yield from _runs(sets, small, both, 'found', range(1, min(3, n_seeds)))
    yield from _runs(sets, small, [0], 'recipe', [0])
    yield from _runs(['cars'], larger, both, 'found', [0])
    yield from _runs(['cars'], larger, both, 'default', range(min(3, n_seeds)), first[:1])
    yield from _runs(sets, small, both, 'found', range(3, n_seeds))
    yield from _runs(sets, small, both, 'default', range(n_seeds)) # those of the triplet loss are there
    yield from _runs(['cars'], larger, both, 'found', [1])

def paired(rows, settings='found'):
    "Rows as `heads.differences` takes them: the scores of the seeds that both arms have"
    df = pd.DataFrame(rows)
    starts = {(o.data,o.body,o.partition):o.scores for o in df[df.settings=='start'].itertuples()}
    res = []
    for k,o in df[df.settings==settings].groupby(['data','body','partition','loss'], sort=False):
        both = o.pivot(index='seed', columns='arm', values='scores').reindex(columns=list(arms)).dropna()
        if len(both): res.append(dict(zip(('data','body','partition','loss'), k), start='lda', start_scores=[starts[k[:3]]],
            **{a:both[a].tolist() for a in arms}))
    return res

def table(rows, settings='found', metric='recall@1', keep=False):
    "The start and both arms in per cent, and their difference in points: of each partition, and with an interval over runs; `p` is Holm's of all lines"
    at,res = metrics.index(metric),[]
    for (data,body,loss),o in pd.DataFrame(paired(rows, settings)).groupby(['data','body','loss'], sort=False):
        a,b = ([100*np.array(x)[:,at] for x in o[k]] for k in arms)
        d = np.concatenate(b)-np.concatenate(a)
        mean,low,high,p = interval(d)
        res.append(dict(data=data, body=body, loss=loss, start=100*np.mean([x[0][at] for x in o.start_scores]), plain=np.concatenate(a).mean(),
            method=np.concatenate(b).mean(), difference=mean, low=low, high=high, p=p, d=list(d), runs=len(d),
            **{f'partition {i}':(y-x).mean() for i,x,y in zip(o.partition, a, b)}))
    res = pd.DataFrame(res)
    return res.assign(holm=holm(res.p.fillna(1))).drop(columns=['p'] if keep else ['p','d'])

def main():
    p = argparse.ArgumentParser()
    p.add_argument('folder', type=Path, nargs='?')
    p.add_argument('--weights', type=Path, help="folder with a .safetensors file for each body; timm's weights if not given")
    p.add_argument('--only', nargs='*', default=[], help='names that a row has: of data, bodies, settings, losses, or numbers of partitions and seeds', type=lambda o: int(o) if o.isdigit() else o)
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.jsonl'))
    for o in ('plan','table'): p.add_argument(f'--{o}', action='store_true')
    args = p.parse_args()
    if args.table: return print('\n\n'.join(table(rows(args.out), o).round(2).to_string(index=False) for o in ('found','default','recipe') if any(r['settings']==o for r in rows(args.out))))
    todo = [o for o in dict.fromkeys(plan(args.seeds)) if all(k in o for k in args.only)]
    if args.plan:
        have = rows(args.out)
        left,each = [o for o in todo if o not in {tuple(r[k] for k in cols) for r in have}],np.mean([o['seconds'] for o in have] or [50])
        return print(f'{len(todo)} rows, {len(left)} of them left: {len(left)*each/3600:.1f} hours of one core, at {each:.0f} seconds a row')
    torch.set_num_threads(1)
    held = {}
    def _made(*o):
        name,body,p = o[:3]
        if (name,p) not in held: held[name,p] = dataset(args.folder, name, p)
        return measure(held[name,p], args.weights, *o)
    work(todo, args.out, cols, _made)

if __name__=='__main__': main()
