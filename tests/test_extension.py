"What someone adds in a few lines of their own, without touching the package, is known everywhere"
import contextlib, io, json, math, pytest, shlex, torch
from fastai.vision.all import *
from dmlfast.all import *
from dmlfast.losses import Miner, MetricLoss, all_triplets, as_triplets, register_loss, register_miner
from dmlfast.retrieval.embedded import register_reranker
import dmlfast.study.settings as schema

def run(command, *words):
    "Status, output and errors of a command"
    from dmlfast.cli import run_command
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = run_command(command, shlex.split(' '.join(map(str, words))))
    return status,out.getvalue(),err.getvalue()

@pytest.fixture(scope='module')
def added(few):
    "A loss, a miner, a metric, a reader of data, a re-ranking step and a setting"
    patch = pytest.MonkeyPatch()
    patch.setattr(schema, '_registered', {})

    @register_miner
    class MineMiner(Miner):
        "The first triplet of each anchor"
        def mine(self, embs, labels, d2):
            a,p,n = all_triplets(labels)
            first = torch.cat([a.new_ones(1).bool(), a[1:]!=a[:-1]])
            return a[first],p[first],n[first]

    @register_loss
    class MineLoss(MetricLoss):
        "Hinge of similarities"
        space = {'width':(.1, .5)}
        def __init__(self,
            width:float=.3, # How much nearer a positive must be
            miner=None, # Chooses the triplets; all of them if not given
        ):
            super().__init__()
            self.width,self.miner = width,miner
        def hinges(self, embs, labels):
            a,p,n = as_triplets(self.miner(embs, labels)) if self.miner else all_triplets(labels)
            return (self.width - (embs[a]*embs[p]).sum(1) + (embs[a]*embs[n]).sum(1)).relu()
        def compute(self, embs, labels):
            h = self.hinges(embs, labels)
            return h.sum()/max(len(h), 1)
        def active(self, embs, labels): return (self.hinges(embs, labels)>0).float().mean()

    @register_metric(depth=3, says='share of the 3 nearest that are right')
    def mine(ranks, there): return ((ranks<=3) & there).sum(1)/3

    @register_reader
    def mine_data(
        path=few.path, # Folder
        size:int=24, # Pixels to a side
    ): return MetricDataset(few.df, path, 'mine', size=size, flip=False)

    @register_reranker
    def backwards(scores, idx, embedded, queries): return scores.flip(1),idx.flip(1)

    @schema.register_setting('fit', least=0)
    def noise(
        learn, # New learner
        value:float, # Noise on each embedding, in units of its length; none if not given
    ): learn.noise = value

    yield SimpleNamespace(loss=MineLoss, miner=MineMiner)
    patch.undo()
    for registry,name in ((register_miner,'MineMiner'), (register_loss,'MineLoss'), (register_metric,'mine'), (register_reader,'mine_data'),
            (register_reranker,'backwards')): registry.remove(name)

@pytest.fixture(scope='module')
def trained(added, tmp_path_factory):
    "Folder of a run with all of it"
    from dmlfast.cli import dmlfast_train
    out = tmp_path_factory.mktemp('mine')/'run'
    status,text,err = run(dmlfast_train, '--data mine_data --data-args size=24 --arch test_resnet --no-pretrained --emb-sz 16 --bs 32 '
        '--workers 0',
        '--epochs 1 --lr 1e-3 --loss mine --loss-args width=.4 --miner mine --noise .1 --report --out', out)
    assert status==0, err
    return out,text

def test_the_command_trains_with_it(trained):
    out,_ = trained
    text = (out/'settings.toml').read_text()
    for o in ('name = "mine"', 'width = 0.4', 'noise = 0.1', 'reader = "mine_data"'): assert o in text

def test_its_report_and_doctor_show_the_active_share(trained, make_learner, added):
    learn = make_learner(added.loss(width=.4), cbs=TrainingDoctor(every=1, say=False))
    learn.fit(1, 1e-3)
    steps = [o['active'] for o in learn.training_doctor.steps]
    assert steps and all(0<=o<=1 for o in steps)
    assert any('triplets or pairs' in o.get_legend_handles_labels()[1] for o in learn.training_doctor.plot().axes)
    assert 'MineLoss(width=0.4' in (trained[0]/'report'/'index.html').read_text()

def test_batches_without_pairs_are_said(make_learner, added):
    learn = make_learner(added.loss())
    learn.dls.train.__class__ = TfmdDL # shuffled, and each class as often as it comes
    with pytest.warns(UserWarning, match='no two images of one class, so that MineLoss has nothing to compare'):
        learn.check_pairs(torch.arange(8))

def test_a_search_knows_its_space(added, few):
    from dmlfast.study.tuning import settings_space
    assert 'loss.width' in str(settings_space(dict(loss=dict(name='mine'))))

def test_the_metric_is_a_column_an_interval_and_a_line(make_learner, trained, tmp_path):
    learn = make_learner(metrics=['mine','map@r'])
    learn.fit(1, 1e-3)
    res = learn.evaluate(metrics=['mine'])
    assert learn.recorder.values[-1][2]==pytest.approx(res['mine'], abs=1e-6)
    low,high = RetrievalResult.interval(learn.evaluate('test', ['mine']), 'mine') or (0, 1)
    assert 0<=low<=high<=1
    page = learn.report(tmp_path/'page').read_text()
    assert 'share of the 3 nearest that are right' in page

def test_eval_takes_the_metric_and_the_reader(trained, tmp_path):
    from dmlfast.cli import dmlfast_eval
    status,text,err = run(dmlfast_eval, trained[0], '--split test --workers 0 --metrics mine map@r --json')
    assert status==0, err
    assert set(json.loads(text)['scores']['metrics'])=={'mine','map@r'}

def test_the_setting_is_an_argument_with_help(added):
    from dmlfast.cli import dmlfast_train
    status,text,_ = run(dmlfast_train, '--help')
    assert status==0 and '--noise' in text
    assert 'Noise on each embedding, in units of its length; none if not given' in ' '.join(text.split())

def test_a_step_of_re_ranking(added):
    e = Embedded([[1.,0],[.9,.1],[.2,1],[0,1]], [0,0,1,1])
    plain,turned = e.neighbours(2),e.neighbours(2, rerank='backwards')
    assert torch.equal(turned[1], plain[1].flip(1)) and torch.equal(turned[0], plain[0].flip(1))
    with pytest.raises(ValueError, match="There is no reranker 'backward'; the nearest is 'backwards'"): e.neighbours(2, rerank='backward')
