"""What each part of the library is worth: one row each, with an interval over partitions of the classes, and its cost.

    python benchmarks/parts.py FOLDER --weights WEIGHTS --cache CACHE    # as heads.py, whose features and partitions these are
    python benchmarks/parts.py --table                                   # what is in benchmarks/parts.jsonl

Everything has the defaults of the library: a head of 128 numbers that starts by LDA, rate 1e-4, five epochs of batches of 64. Nothing is chosen. A row
is a part, a data set, a body, a partition and one of three seeds (of what has no seed there is one), with a score with the part and without it.
Rows that are there are not made again."""
import argparse, json, tempfile, time
from heads import *
from whole import dataset
from dmlfast.retrieval.indexes import Index
from dmlfast.retrieval.verify import pair_scores
from dmlfast.losses.base import CombinedLoss

def head_of(part, loss, seed, lr=1e-4, **kwargs): return train(part, 'lda', loss, lr, 1+seed, **kwargs)
def embs(head, x):
    with torch.no_grad(): return F.normalize(head(x))
def recall(z, y, k='recall@1'): return evaluate_retrieval(z, y, metrics=[k], n_boot=1)[k]
def timed(f, *args, **kwargs):
    began = time.process_time()
    return f(*args, **kwargs),time.process_time()-began

# ---- a part is a function of the images to train on and to score, two folds of the training classes, and a seed; it gives rows ----
def start(whole, folds, seed):
    "Recall@1 of the head before any training, and of PCA and a random head, beside the features"
    base = whole.score(None)[0]
    for o in starts: yield f'a head that starts by {o}' if o!='random' else 'a head that starts at random',base,whole.score(new_head(whole, o, seed))[0],None

def sizes(whole, folds, seed):
    "Recall@1 of a head of more or fewer numbers than 128, before any training"
    for d in (64,256,512):
        head = nn.Linear(whole.X.shape[1], d)
        start_head(head, whole.X, whole.y, 'lda')
        yield f'LDA head of {d} numbers instead of 128',whole.score(new_head(whole, 'lda', 0))[0],whole.score(head)[0],None

def training(whole, folds, seed):
    "Five epochs of the default loss at the default rate, beside the start"
    head,s = timed(head_of, whole, DRTripletLoss(), seed)
    yield 'training the head with the defaults, beside its start',whole.score(new_head(whole, 'lda', 0))[0],whole.score(head)[0],(0,s)

def matryoshka(whole, folds, seed):
    "Recall@1 of the first numbers of an embedding, trained to be shortened or not"
    a,s = timed(head_of, whole, MultiSimilarityLoss(), seed)
    b,t = timed(head_of, whole, MatryoshkaLoss(MultiSimilarityLoss(), dims=(16,32,64,128)), seed)
    for d in (16,32,64,128): yield f'Matryoshka, {d} of 128 numbers',*(recall(embs(o, whole.Z)[:,:d], whole.t) for o in (a,b)),(s,t)

def batches(whole, folds, seed):
    "Large batches against small ones, of as many images"
    for name in ('RecallAtKLoss','MultiSimilarityLoss'):
        for lr in (1e-4,3e-4): # fewer steps ask for a greater rate
            size = min(512, int(whole.y.max()+1)*per_class//per_class*per_class)
            a,s = timed(head_of, whole, register_loss[name](), seed)
            b,t = timed(head_of, whole, register_loss[name](), seed, lr, bs=size)
            yield f'{name}, batches of up to 512 instead of 64, rate {lr:g}',whole.score(a)[0],whole.score(b)[0],(s,t)

def memory(whole, folds, seed):
    "Embeddings of the last steps as further negatives, after half of the steps"
    a,s = timed(head_of, whole, MultiSimilarityLoss(), seed)
    n = epochs*len(BalancedSampler(whole.y.numpy(), bs, per_class, 0))
    b,t = timed(head_of, whole, MultiSimilarityLoss(), seed, memory=BatchMemory(2048, start=n//2))
    yield 'a memory of 2,048 embeddings',whole.score(a)[0],whole.score(b)[0],(s,t)

def hard(whole, folds, seed):
    "Classes that look alike in one batch"
    near = hard_pairs(Embedded(whole.X, whole.y))
    a,s = timed(head_of, whole, DRTripletLoss(), seed)
    b,t = timed(head_of, whole, DRTripletLoss(), seed, neighbours=near)
    yield 'hard classes',whole.score(a)[0],whole.score(b)[0],(s,t)

def terms(whole, folds, seed):
    "Terms beside a loss"
    a,s = timed(head_of, whole, MultiSimilarityLoss(), seed)
    for term in (ThresholdConsistency(),AntiCollapse()):
        b,t = timed(head_of, whole, CombinedLoss([MultiSimilarityLoss(),term]), seed)
        yield type(term).__name__,whole.score(a)[0],whole.score(b)[0],(s,t)

def reranked(whole, folds, seed):
    "A second look at what was found"
    e = Embedded(embs(new_head(whole, 'lda', 0), whole.Z), whole.t)
    for metric in ('recall@1','map@r'):
        base,s = timed(e.evaluate, [metric], n_boot=1)
        for name in ('qe','dba','k-reciprocal'):
            res,t = timed(e.evaluate, [metric], n_boot=1, rerank=name)
            yield f'{name}, {metric}',base[metric],res[metric],(s,t)

def thresholds(whole, folds, seed):
    "A threshold of classes that were not trained on, used on others: the rate of false matches that it promises and keeps, and what it misses"
    part = folds[0] # trained on one half of the training classes, calibrated on the other
    head = head_of(part, DRTripletLoss(), seed)
    cal,new = (pair_scores(embs(head, x), y, n_boot=1) for x,y in ((part.Z,part.t),(whole.Z,whole.t)))
    at = cal.threshold(1e-3)
    yield 'threshold for 1 in 1,000: false matches in 1,000',1.,1000*float(new.fmr_at(at)),None
    yield 'threshold for 1 in 1,000: pairs missed',new.fnmr(1e-3),float(new.fnmr_at(at)),None

def indexes(whole, folds, seed):
    "Recall@1 of classes by a search in fewer bytes"
    z = embs(new_head(whole, 'lda', 0), whole.Z)
    base = recall(z, whole.t)
    for kind in ('int8','bits','hnsw','ivf'):
        _,i = Index(z, kind).search(z, 2)
        near = torch.where(i[:,0]==torch.arange(len(z)), i[:,1], i[:,0])
        yield f'index {kind}',base,float((whole.t[near]==whole.t).float().mean()),None

def int8(whole, folds, seed):
    "The network in 8 bits; recall@1 of images of classes that were not trained on"
    folder,weights,name,body,partition = whole.origin
    ds = dataset(folder, name, partition, sets)
    learn = metric_learner(ds.dataloaders(valid=None, num_workers=0, seed=0), body, ContrastiveLoss(), emb_sz=emb_sz, weights=weights and weights/f'{body}.safetensors',
        model_kwargs=bodies[body])
    with learn.no_bar(), learn.no_logging(), tempfile.TemporaryDirectory() as tmp:
        learn.start_head()
        learn.export_embedder(f'{tmp}/model')
        facts = load_embedder(f'{tmp}/model').save_onnx(f'{tmp}/onnx', int8=True, data=ds, split='test').facts['int8']
    yield 'network in 8 bits',facts['recall_float32'],facts['recall_int8'],None

parts = dict(start=(start,1), sizes=(sizes,1), training=(training,3), matryoshka=(matryoshka,3), batches=(batches,3), memory=(memory,3), hard=(hard,3), terms=(terms,3),
    reranked=(reranked,1), thresholds=(thresholds,3), indexes=(indexes,1), int8=(int8,1))

def table(rows):
    "Means over seeds, then over partitions with a 95 % interval, in points; p is corrected for the number of lines"
    df = pd.DataFrame(rows)
    df[['base','value']] *= np.where(df.what.str.contains('in 1,000$'), 1, 100)[:,None]
    df['d'] = df.value-df.base
    by = df.groupby(['what','data','body','partition'], sort=False)[['base','value','d']].mean().groupby(['what','data','body'], sort=False)
    res = by[['base','value']].mean()
    res[['difference','low','high','p']] = [interval(o.d.tolist()) for _,o in by]
    cost = df.groupby(['what','data','body'], sort=False).seconds.agg(lambda o: np.median([b/a for a,b in o.dropna() if a] or [math.nan]))
    return res.assign(partitions=by.size(), holm=holm(res.p.fillna(1)), cost=cost).drop(columns='p').reset_index()

def main():
    p = argparse.ArgumentParser()
    p.add_argument('folder', type=Path, nargs='?')
    p.add_argument('--weights', type=Path, help="folder with a .safetensors file for each body; timm's weights if not given")
    p.add_argument('--cache', type=Path, default=Path('features'), help='folder for features')
    p.add_argument('--only', nargs='*', default=list(parts))
    p.add_argument('--bodies', nargs='*', default=list(bodies)[:1])
    p.add_argument('--partitions', type=int, default=n_partitions)
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.jsonl'))
    p.add_argument('--table', action='store_true')
    args = p.parse_args()
    if args.table: return print(table(rows(args.out)).round(2).to_string(index=False))
    torch.set_num_threads(1)
    cols = 'part','data','body','partition','seed'
    done = {tuple(o[k] for k in cols) for o in rows(args.out)}
    for body,name,partition in product(args.bodies, sets, range(args.partitions)):
        todo = [(o,name,body,partition,seed) for o in args.only for seed in range(parts[o][1])]
        if done.issuperset(todo): continue
        whole,folds = parts_of(features(args.folder, args.weights, args.cache, name, body), partition)
        whole.origin = args.folder,args.weights,name,body,partition
        for o in todo:
            if o in done: continue
            made = [dict(zip(cols, o), what=w, base=round(a, 5), value=round(b, 5), seconds=s and [round(v, 2) for v in s])
                for w,a,b,s in parts[o[0]][0](whole, folds, o[-1])]
            with filelock.FileLock(f'{args.out}.lock'), args.out.open('a') as f: f.writelines(json.dumps(r)+'\n' for r in made)
            print(*o, {r['what']:[r['base'],r['value']] for r in made}, flush=True)

if __name__=='__main__': main()
