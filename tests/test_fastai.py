"What fastai users do after a fit, with a loss that has weights, with and without self-supervised ranking"
import pytest, torch
from fastai.vision.all import *
from dmlfast.all import *

@pytest.fixture(scope='module', params=['proxies', 'proxies and ranking'])
def learn(request, few, tmp_path_factory):
    "A learner after a fit"
    set_seed(0)
    dls = few.dataloaders(bs=32, per_class=4, seed=0, num_workers=0)
    cbs = SelfSupervisedRanking(n=2, m=4) if 'ranking' in request.param else None
    learn = metric_learner(dls, 'test_resnet', ProxyNCALoss(), emb_sz=16, pretrained=False, path=tmp_path_factory.mktemp('run'), cbs=cbs)
    learn.remove_cbs([o for o in learn.cbs if type(o).__name__=='ProgressCallback'])
    learn.logger = noop
    learn.fit(1, 1e-2)
    return learn

def test_get_preds(learn):
    n = len(learn.dls.valid.items)
    embs,ys = learn.get_preds()
    want,labels = learn.embed()
    assert torch.allclose(embs, want, atol=1e-6) and ys.tolist()==labels.tolist() and len(embs)==n
    *_,losses = learn.get_preds(with_loss=True)
    assert losses.shape==(n,) and losses.isnan().all() # no proxy for a class that is not trained on
    x,*_ = learn.get_preds(with_input=True, with_decoded=True)
    assert len(x)==n
    *_,losses = learn.get_preds(ds_idx=0, with_loss=True)
    assert losses.shape==(len(learn.dls.train.items),) and losses.isfinite().all()
    assert learn.loss_func.reduction=='mean'

def test_a_loss_for_each_item_agrees_with_the_mean(make_learner):
    learn = make_learner(MultiSimilarityLoss())
    *_,losses = learn.get_preds(with_loss=True)
    assert learn.validate()[0]==pytest.approx(losses.mean().item(), abs=1e-5)

def test_a_loss_from_elsewhere_has_none_for_each_item(make_learner):
    from pytorch_metric_learning.losses import MultiSimilarityLoss as Theirs
    with pytest.raises(ValueError, match=r"reduction 'none' is none of \('mean',\)"): make_learner(Theirs()).get_preds(with_loss=True)

def test_validate_and_lr_find_leave_the_weights(learn):
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    scores = learn.validate()
    scores = dict(zip(learn.recorder.metric_names[2:], scores))
    assert scores['recall@1']==pytest.approx(learn.evaluate(metrics='recall@1')['recall@1'], abs=1e-6)
    learn.lr_find(num_it=4, stop_div=False, show_plot=False)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())

def test_save_and_load(learn):
    path = learn.save('x')
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    for p in learn.model.parameters(): p.data.zero_()
    learn.load('x')
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    assert any('proxies' in o for o in before) and any('ranking_head' in o for o in before)==any(isinstance(o, SelfSupervisedRanking) for o in learn.cbs)

def test_export_and_predict(learn):
    item = learn.dls.valid.items[1]
    emb,near = learn.predict(item)
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        other = load_learner(learn.path/'export.pkl')
    emb2,none = other.predict(item)
    assert torch.allclose(emb, emb2, atol=1e-6) and len(near)==5 and none==[]
    assert not any('ranking' in k or 'proxies' in k for k in learn.export_embedder(learn.path/'e', overwrite=True).model.state_dict())

def test_what_is_shown(learn):
    from matplotlib import pyplot as plt
    learn.dls.show_batch(max_n=8)
    assert learn.show_results(max_n=2, k=3).axes
    assert 'Total params' in repr(learn.summary())
    learn.recorder.plot_loss()
    learn.recorder.plot_sched() if hasattr(learn.recorder, 'hps') else None
    plt.close('all')

def test_interpretation(make_learner):
    from matplotlib import pyplot as plt
    learn = make_learner(MultiSimilarityLoss())
    interp = Interpretation.from_learner(learn)
    losses,idxs = interp.top_losses(4)
    want = learn.get_preds(with_loss=True)[2]
    assert torch.allclose(losses, want.topk(4)[0], atol=1e-6) and torch.allclose(want[idxs], losses, atol=1e-6)
    interp.plot_top_losses(2)
    plt.close('all')

def test_tta(learn):
    embs,ys = learn.tta(n=2)
    assert embs.shape==(len(ys),16) and embs.isfinite().all()

@pytest.mark.parametrize('how', ['to_fp16','to_bf16','to_channelslast'])
def test_callbacks_that_change_the_loop(make_learner, how):
    learn = getattr(make_learner(ProxyNCALoss(), cbs=SelfSupervisedRanking(n=2, m=4)), how)()
    learn.fine_tune(1, 1e-3)
    learn.fit_flat_cos(1, slice(1e-4,1e-3), cbs=[GradientAccumulation(64), GradientClip(), EarlyStoppingCallback('recall@1'), CSVLogger('log.csv')])
    log = pd.read_csv(learn.path/'log.csv')
    assert 'ssr_loss' in log.columns and np.isfinite(learn.recorder.values[-1][0])

def test_tensorboard_with_everything(make_learner, tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = make_learner(ProxyNCALoss(), cbs=SelfSupervisedRanking(n=2, m=4))
    learn.fit(2, 1e-3, cbs=TensorBoardCallback(tmp_path/'tb', projector=True))
    events = EventAccumulator(str(tmp_path/'tb'), size_guidance=dict(tensors=0))
    events.Reload()
    tags = events.Tags()
    assert {'train_loss','recall@1','ssr_loss'}<=set(tags['scalars']) and tags['images'] and tags['graph']
    assert [o.value for o in events.Scalars('ssr_loss')]==pytest.approx([o[learn.recorder.metric_names.index('ssr_loss')-1] for o in learn.recorder.values])
    vecs = next((tmp_path/'tb').rglob('tensors.tsv'))
    assert np.loadtxt(vecs).shape==(len(learn.dls.valid.items),16)

@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_mixed_images_are_refused(make_learner, cb):
    with pytest.raises(ValueError, match=f'{cb.__name__} mixes images of two classes'): make_learner().fit(1, cbs=cb())
