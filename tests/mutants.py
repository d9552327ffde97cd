"Small mistakes in the hot paths, each of which a test must find: `make mutants`, or `python tests/mutants.py losses.geometry` for a room"
import os, shlex, shutil, subprocess, sys, tempfile, time
from pathlib import Path

root = Path(__file__).parent.parent
mutants = [ # room, what its code says, what it says instead, tests
    ('losses.geometry', "return g+g.T if n==g.shape[1]", "return g+g if n==g.shape[1]", 'test_losses.py'), # the transpose is forgotten
    # a remembered positive and an anchor are no pair
    ('losses.geometry', "(g[:,:n]*~anchor).T", "(g[:,:n]*0).T", 'test_memory.py -k square'),
    ('losses.geometry', "by_d2[:,:len(g)].sum(0)", "by_d2[:,-len(g):].sum(0)", 'test_memory.py -k square'), # other rows than the anchors
    ('losses.geometry', "(ap + (an-pn))", "(ap + (an+pn))", 'test_geometry.py'),
    # a negative as near as the positive
    ('losses.miners', "torch.searchsorted(far, edges, right=True)",
        "torch.searchsorted(far, edges)", "test_losses.py -k 'miner or semi_hard'"),
    # one negative is never drawn
    ('losses.miners', "order[(end+(r*(len(labels)-m)).long())%len(labels)]",
        "order[(end+(r*(len(labels)-m-1)).long())%len(labels)]", 'test_losses.py'),
    # the gradient goes through the choice
    ('losses.miners', "args = (embs.detach(), labels)", "args = (embs, labels)", "test_losses.py -k miner"),
    ('losses.pairs', "self.margin-dn+beta[a2]", "self.margin-dn-beta[a2]", 'test_losses.py'),
    # the mean of all for that of those above 0
    ('losses.base', "(terms.detach().sign() if reduction=='active' else mask)",
        "(mask if reduction=='active' else mask)", 'test_losses.py'),
    ('losses.proxies', "if inv.ndim else own.new_ones(())", "if not inv.ndim else own.new_ones(())", 'test_losses.py -k proxy'),
    ('files.images', "6:'ROTATE_270'", "6:'ROTATE_90'", 'test_images.py'),
    # what is hidden shows
    ('files.images', "return Image.alpha_composite(Image.new('RGBA', im.size, background), im).convert(mode)",
        "return im.convert(mode)", 'test_images.py'),
    ('data.batches', "rng = np.random.default_rng([self.seed, epoch])", "rng = np.random.default_rng([0, epoch])", 'test_data.py'),
    ('data.batches', "np.divmod(epoch*(len(self)//self.round)+nth", "np.divmod(0*epoch+nth", 'test_data.py'), # images are left out
    ('data.batches', "CategoryMap(seen+other, sort=False)", "CategoryMap(other+seen, sort=False)", 'test_data.py'),
    # held-out classes are trained on
    ('data.tables', "return seen & ~self.df.label.isin(self.df.label[held]),held", "return seen,held", 'test_datasets.py -k subset'),
    # running statistics move
    ('models.embedder', "and (self.freeze_bn or m.weight is not None", "and (m.weight is not None", 'test_models.py -k bn'),
    # classes count alike
    ('models.heads', "self.total-(means*n[:,None]).T@means/len(X)", "self.total-means.T@means/len(means)", 'test_transfer.py -k lda'),
    # judged on what it was fitted to
    ('train.baseline', "for fit,score in (parts,parts[::-1]):", "for fit,score in zip(parts, parts):", 'test_transfer.py -k shrinkage'),
    ('retrieval.metrics', "return (ranks<=there.sum(1)[:,None]) & there",
        "return (ranks<there.sum(1)[:,None]) & there", 'test_retrieval.py'),
    # pairs of an item with itself
    ('retrieval.verify', "there = there.triu_(1)", "there = there.triu_(0)", 'test_verify.py -k "brute or scikit or draw"'),
    # a score at an edge is below it
    ('retrieval.results', "np.searchsorted(self.values, t)", "np.searchsorted(self.values, t, side='right')", 'test_verify.py -k scikit'),
    # a pair counts as if both of its classes were drawn independently of its weight
    ('retrieval.verify', "n = (w@above-above.sum(0)/2)[:,1:]", "n = (w@above)[:,1:]", 'test_verify.py -k draw'),
    # what is unknown gets a label
    ('deploy.finder', "res = [o if hits[0].score>=least else Label(None, hits[0].score)",
        "res = [o if True else Label(None, hits[0].score)", 'test_verify.py -k "find_nothing or labels_from"'),
    # the first item finds itself
    ('retrieval.search', "has = (own>=0).nonzero()[:,0]", "has = (own>0).nonzero()[:,0]", 'test_retrieval.py'),
    ('models.lora', "self.frozen = list(dict.fromkeys([*self.frozen, *own]))", "pass", 'test_lora.py -k two_groups'), # the body is trained
    ('models.lora', "lora['base']!=weights_hash(own_state(model)):", "False:", 'test_lora.py -k save_and_load'), # LoRA of another body
    ('train.lora', "o.origin |= {", "_ = {", 'test_lora.py -k features_before'), # what was trained is measured against itself
    ('train.compat', "p.grad = p.grad if p.requires_grad else None", "pass", 'test_lora.py -k two_groups'), # what is frozen decays
    ('train.columns', "(epoch+1)%self.every==0", "epoch%self.every==0", 'test_learner.py -k every_other'),
    ('train.distributed', "return g[r*ctx.n:(r+1)*ctx.n]*n", "return g[r*ctx.n:(r+1)*ctx.n]", 'test_distributed.py -k one_process'),
    ('train.compat', "bar.update(0)", "pass", 'test_checkpoint.py -k progress_bars'), # a run does not go on in a terminal
    ('train.memory', "'size','embs','labels','at','steps'", "'size','at','steps'", 'test_distributed.py -k a_memory_is'), # not resumed
    ('study.plans', "dl.bs //= n", "pass", 'test_distributed.py -k test_an_experiment'), # batches are larger than the plan's
    ('data.batches', ".reshape(len(self), -1, self.bs)[:,self.shard[0]]", ".reshape(len(self), self.bs, -1)[...,self.shard[0]]",
        'test_distributed.py -k share'), # a class is in two processes
    # any size is fetched
    ('files.fetching', "if n>(most := min(self.left, most or self.left)):", "if False:", 'test_hub.py -k agreed'),
    ('files.described', "if hash_of(fn)!=sha256[name]:", "if False:", "test_hub.py -k 'changed_on'"), # what was changed is taken
    ('deploy.hub', "if private and not api.repo_info(repo).private:", "if False:", 'test_hub.py -k private'), # everybody sees it
    ('deploy.runtime', "if _elsewhere in data:", "if False:", 'test_onnx.py -k networks'), # another file is read
    ('deploy.runtime', "np.lexsort((best, -scores[best]))", "np.lexsort((best, scores[best]))", 'test_onnx.py -k many'), # farthest first
    ('files.resizing', "m = min(w/tw, h/th)", "m = max(w/tw, h/th)", 'test_deploy.py'),
    # what was added later is not found
    ('deploy.gallery', "self.embs is not None and self._ready[0] is self.embs", "self._ready[0] is not None", 'test_deploy.py'),
    ('deploy.lance', "elif at: res,at = [*res,tuple(at)],None", "elif at: pass", 'test_gallery.py -k lance'), # ranges hold others
    ('deploy.journal', "read_text(encoding='utf-8')!=self.text:", "read_text(encoding='utf-8')=='':", 'test_gallery.py -k changed'),
    ('deploy.journal', "write_whole(self._list, text)", "self._list.write_text(text)", 'test_gallery.py -k kill'), # half a list
    ('train.ssr', "self.soft(sim.diff(dim=1)+self.alpha)", "self.soft(sim.diff(dim=1)-self.alpha)", 'test_ranking.py -k loss'),
    ('train.ssr', "torch.randperm(len(x), generator=self.rng)", "torch.randperm(len(x))", 'test_ranking.py -k gradients_add_up'),
    ('train.rates', "return slice(lr*self.body_share, lr)", "return slice(lr, lr*self.body_share)", 'test_transfer.py -k rate'),
    ('train.recipe', "isdisjoint(source.items('test'))", "isdisjoint(source.items('val'))", 'test_learner.py -k patience'),
    # a resumed run begins with the first batches
    ('data.batches', "def load_state_dict(self, d): self.n = d['n']",
        "def load_state_dict(self, d): self.n = 0", 'test_checkpoint.py -k killed'),
    ('train.checkpoint', "('seed','neighbours','near_share')", "('neighbours','near_share')", 'test_checkpoint.py -k killed'),
    # judged on what was trained on
    ('train.transfer', "dls.valid.new(_of_items(ds, (~seen)", "dls.valid.new(_of_items(ds, seen", 'test_transfer.py -k halves'),
    # chance with the query in its own gallery
    ('look.pictures', "n,r = len(g)-_count(self.ids[q], self.ids[g])",
        "n,r = len(g)-0*_count(self.ids[q], self.ids[g])", 'test_interpret.py'),
    ('losses.wrappers', "labels, d, n) for d,w in", "labels, embs.shape[1], n) for d,w in", 'test_wrappers.py -k matryoshka'),
    ('losses.wrappers', "gram*(d/(n*self.distortion))", "gram*(n/(d*self.distortion))", 'test_wrappers.py -k anti_collapse'),
    # classes with many neighbours come more often
    ('data.batches', "if j>=p-n_near and not full else ()", "if j>=p-n_near else ()", 'test_data.py -k neighbours'),
    ('study.tuning', "report(i*n_epoch+epoch,", "report(epoch,", 'test_tune.py'), # folds report the same steps to the pruner
    # a trial that was interrupted counts
    ('study.tuning', "return _in_state(study, 'COMPLETE', 'PRUNED')",
        "return _in_state(study, 'COMPLETE', 'PRUNED', 'FAIL')", 'test_tune.py'),
    ('study.tuning', "firsts.count(firsts[-1])>1", "firsts.count(firsts[-1])>2", 'test_tune.py'), # two processes have the same first trial
    # one that was given up is chosen
    ('study.comparison', "done = [o for o in trials if o['state']=='COMPLETE']", "done = trials", 'test_protocol.py'),
    ('study.runs', "set_seed(seed, reproducible=True)", "set_seed(0, reproducible=True)", 'test_runs.py -k seed'),
    # of training images
    ('cli.training', "evaluate_retrieval(*_raw_pixels(test), metrics=names)",
        "evaluate_retrieval(*_raw_pixels(dls.train), metrics=names)", 'test_cli.py -k demo_on_a_folder'),
    # ---- who is let in, and what is kept ----
    ('web.app', "if h.get('host', '').lower() not in self.hosts:", "if False:", 'test_explorer.py -k name_from_elsewhere'),
    ('web.app', "if site not in ('same-origin','none') and not opened:", "if site=='cross-site' and not opened:",
        'test_explorer.py -k from_other_pages'),
    ('web.app', "if method in ('GET','HEAD') or 'origin' in h:", "if True:", 'test_explorer.py -k without_the_token'),
    ('web.app', "            if n>self.max_bytes: raise Refused(413, self.too_large)", "            pass",
        'test_explorer.py -k so_many_bytes'),
    ('web.app', "while self.n>self.max_bytes and len(self.kept)>1:", "while False:", 'test_explorer.py -k kept_within_bounds'),
    ('web.items', "if file.parent.resolve()!=self.folder.resolve()/'photos':", "if False:", 'test_explorer.py -k outside_the_folder'),
    ('web.items', "if re.fullmatch(r'photos/[0-9a-f]{24}\\.jpg', o):", "if o.startswith('photos/'):",
        'test_explorer.py -k touches_no_file_of_others'),
    ('web.items', "if (n := self.numbers[i])!=q.number][:k]", "if (n := self.numbers[i]) is not None][:k]",
        'test_explorer.py -k those_of_the_finder'),
    ('web.server', "for (_,res),emb in zip(part, found):", "for (_,res),emb in zip(part, found[::-1]):", 'test_explorer.py -k two_hundred'),
]

def code_of(room, folder=root):
    "The file of a room"
    return Path(folder)/'dmlfast'/f"{room.replace('.', '/')}.py"

def copy_of_repository(folder):
    "A copy whose package may be changed; the tests' own files are copied, and all else is linked"
    for o in root.iterdir():
        if o.name in ('dmlfast','tests'): shutil.copytree(o, folder/o.name, ignore=shutil.ignore_patterns('__pycache__'))
        elif not o.name.startswith('.'): (folder/o.name).symlink_to(o)

def found(folder, room, old, new, tests):
    "Do the tests fail with the mistake? Raises `ValueError` where it cannot be made, or where there is nothing to run"
    file = code_of(room, folder)
    code = file.read_text(encoding='utf-8')
    if code.count(old)!=1: raise ValueError(f"{room}: {old!r} is there {code.count(old)} times, and must be once.")
    file.write_text(code.replace(old, new), encoding='utf-8')
    # bytecode is told from other bytecode by time and size alone
    env = {**os.environ, 'PYTHONPATH':str(folder), 'PYTHONDONTWRITEBYTECODE':'1'}
    try:
        res = subprocess.run([sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', *shlex.split(tests)],
            cwd=folder/'tests', env=env, capture_output=True, text=True)
    finally: file.write_text(code, encoding='utf-8')
    if res.returncode not in (0,1):
        raise ValueError(f"{room}: `pytest {tests}` ended with {res.returncode}.\n{res.stdout[-2000:]}{res.stderr[-2000:]}")
    return res.returncode==1,next((o for o in res.stdout.splitlines() if o.startswith(('FAILED','ERROR'))), '')

def main(rooms):
    "Print what became of each mistake; exit with 1 where one was not found"
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        copy_of_repository(folder := Path(folder))
        for room,old,new,tests in mutants:
            if rooms and room not in rooms: continue
            began = time.time()
            try: dead,why = found(folder, room, old, new, tests)
            except ValueError as e: dead,why = False,str(e)
            bad += not dead
            print(f"{'found' if dead else 'SURVIVED':<9}{time.time()-began:>5.0f} s  {room:<17}{new}  {why}", flush=True)
    print(f'{bad} were not found.' if bad else 'All were found.')
    return int(bad>0)

if __name__=='__main__': sys.exit(main(sys.argv[1:]))
