"What fastai users do after a fit, with a loss that has weights, with and without self-supervised ranking"
import pytest, re, torch
from matplotlib import pyplot as plt
from fastai.vision.all import *
from dmlfast.all import *
from dmlfast.train.compat import TensorEmbedding, plot_top_losses

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
    with pytest.raises(ValueError, match='MultiSimilarityLoss gives one number for a batch'):
        make_learner(Theirs()).get_preds(with_loss=True)

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
    assert any('proxies' in o for o in before)
    assert any('ranking_head' in o for o in before)==any(isinstance(o, SelfSupervisedRanking) for o in learn.cbs)

def test_export_and_predict(learn):
    item = learn.dls.valid.items[1]
    emb,near = learn.predict(item)
    learn.export()
    other = load_learner(learn.path/'export.pkl')
    emb2,none = other.predict(item)
    assert torch.allclose(emb, emb2, atol=1e-6) and len(near)==5 and none==[]
    assert [o.item for o in other.predict(item, gallery='train')[1]]==[o.item for o in near]
    a,b = (o.evaluate('test') for o in (learn,other)) # a split has its name there too
    assert a['map@r']==pytest.approx(b['map@r'], abs=1e-6) and '_source' not in vars(learn) and '_source' not in vars(other)
    with pytest.raises(ValueError, match="a loaded learner has none until it is given a split's name or a loader"): other.evaluate()
    assert not any('ranking' in k or 'proxies' in k for k in learn.export_embedder(learn.path/'e', overwrite=True).model.state_dict())

def test_what_is_shown(learn):
    learn.dls.show_batch(max_n=8)
    assert learn.show_results(max_n=2, k=3).axes
    assert 'Total params' in repr(learn.summary())
    learn.recorder.plot_loss()
    learn.recorder.plot_sched() if hasattr(learn.recorder, 'hps') else None
    plt.close('all')

def test_interpretation(make_learner):
    learn = make_learner(MultiSimilarityLoss())
    interp = Interpretation.from_learner(learn)
    losses,idxs = interp.top_losses(4)
    want = learn.get_preds(with_loss=True)[2]
    assert torch.allclose(losses, want.topk(4)[0], atol=1e-6) and torch.allclose(want[idxs], losses, atol=1e-6)
    interp.plot_top_losses(2, figsize=(4,2))
    axs = [o for o in plt.gcf().axes if o.images]
    labels = learn.embed()[1][idxs]
    assert [o.get_title() for o in axs]==[f'{learn.dls.vocab[int(y)]} / {l:.2f}' for y,l in zip(labels[:2], losses[:2])]
    assert plt.gcf()._suptitle.get_text()=='Actual/Loss'
    ims = [np.asarray(o.images[0].get_array()).astype(int) for o in axs]
    for im,i in zip(ims, idxs): assert np.abs(im-np.asarray(learn.dls.valid_ds[int(i)][0])).max()<=1
    plt.close('all')
    interp.show_results(idxs[:3].tolist())
    assert {o.get_title() for o in plt.gcf().axes if o.images}=={learn.dls.vocab[int(y)] for y in labels[:3]}
    plt.close('all')

def test_interpretation_without_losses(learn):
    "A loss with weights for training classes only has none for others: said with what to do instead, and training images have them"
    with pytest.raises(ValueError, match=r"`RetrievalInterpretation.from_learner\(learn\)` and `learn.show_results\(\)`"):
        Interpretation.from_learner(learn).plot_top_losses(2)
    Interpretation.from_learner(learn, ds_idx=0).plot_top_losses(2)
    plt.close('all')

def test_interpretations_of_classes_are_refused(learn):
    "fastai's compare predicted classes, and there are none; a classifier of fastai's has them still"
    for cls in (ClassificationInterpretation,SegmentationInterpretation):
        for kwargs in ({}, dict(dl=learn.dls.valid)):
            says = rf'{cls.__name__} compares predicted classes.*`RetrievalInterpretation.from_learner\(learn\)`'
            with pytest.raises(ValueError, match=says): cls.from_learner(learn, **kwargs)
    dls = learn.dls.valid.new(shuffle=False),learn.dls.valid.new(shuffle=False)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, len(learn.dls.vocab)))
    cm = ClassificationInterpretation.from_learner(Learner(DataLoaders(*dls), net, CrossEntropyLossFlat())).confusion_matrix()
    assert cm.sum()==len(learn.dls.valid.items)

def test_what_cannot_be_predicted_or_measured_is_said(learn):
    files = learn.dls.valid.items[:2]
    for f,says in ((lambda: learn.predict(files), r'takes one image.*`learn.get_preds\(dl=dls.test_dl\(images\)\)`'),
        (lambda: learn.get_preds(dl=files), r'not a list of files: pass `dls.test_dl\(files\)`'),
        (lambda: learn.validate(2), 'no loader 2: a split has a name'), (lambda: learn.get_preds(5), 'no loader 5'),
        (lambda: learn.validate(dl=learn.dls.test_dl(files)), r'no labels to measure with: pass `dls.test_dl\(items, with_labels=True\)`')):
        with pytest.raises(ValueError, match=says): f()
    assert len(learn.get_preds(dl=learn.dls.test_dl(files))[0])==2

def test_a_classifier_has_fastais_pictures():
    "Theirs are for predictions, ours for embeddings alone"
    im = TensorImage(torch.zeros(3,4,4))
    plot_top_losses(im[None], TensorCategory(torch.tensor([0])), [(im,'a')], [('b',)], torch.tensor([[.3,.7]]), torch.tensor([.5]))
    assert [o.get_title() for o in plt.gcf().axes if o.images]==['b/a / 0.50 / 0.70']
    plt.close('all')

def test_splits_by_name(learn):
    "Wherever a loader may be given"
    want,ys = learn.embed('test')
    for args,kwargs in ((['test'],{}), ([],dict(dl='test')), ([],dict(dl='test', with_decoded=True, with_loss=True)),
        ([],dict(ds_idx='test', with_input=True))):
        res = learn.get_preds(*args, **kwargs)
        embs,labels = res[kwargs.get('with_input', 0):][:2]
        assert type(embs) is TensorEmbedding and torch.allclose(embs, want, atol=1e-6) and labels.tolist()==ys.tolist()
    assert len(learn.tta(dl='test', n=1)[0])==len(want)==len(learn.tta('test', n=1)[0])
    for args,kwargs in ((['test'],{}), ([],dict(dl='test'))):
        scores = learn.validate(*args, **kwargs)
        assert dict(zip(learn.recorder.metric_names[2:], scores))['recall@1']==pytest.approx(
            learn.evaluate('test', metrics=['recall@1'])['recall@1'], abs=1e-6)
    for args,kwargs in ((['test'],{}), ([],dict(dl='test'))):
        fig = learn.show_results(*args, max_n=2, k=2, **kwargs)
        assert {o.get_title() for o in fig.axes[::3]}<={learn.dls.vocab[int(y)] for y in ys}
    plt.close('all')
    for f in (learn.get_preds,learn.show_results,learn.tta,learn.validate,learn.embed,learn.evaluate):
        with pytest.raises(ValueError, match="no split 'tset'; its splits are train, val, test"): f('tset')
    res = learn.get_preds(with_preds=False, with_loss=True)
    assert res[0] is None and len(res[2])==len(learn.dls.valid.items)
    with pytest.raises(ValueError, match='no labels, so what they find is neither right nor wrong'):
        learn.show_results(dl=learn.dls.test_dl(learn.dls.valid.items))

def test_a_loaded_learner_without_a_data_set(few, tmp_path):
    dblock = DataBlock(blocks=(ImageBlock, ClassBlock), get_items=lambda o: few.items('train'), get_y=parent_label,
        splitter=ClassSplitter(parent_label))
    learn = metric_learner(dblock.dataloaders(tmp_path, bs=16, dl_type=BalancedDL, per_class=4, num_workers=0), 'test_resnet',
        pretrained=False, path=tmp_path)
    learn.export()
    other = load_learner(tmp_path/'export.pkl')
    with pytest.raises(ValueError, match=r"not made by a `MetricDataset`, so they know no split 'test': pass a loader, such as "
        r"`dls.test_dl\(items, with_labels=True\)`"):
        other.evaluate('test')

def test_tta(learn):
    embs,ys = learn.tta(n=2)
    assert embs.shape==(len(ys),16) and embs.isfinite().all()

@pytest.mark.parametrize('how', ['to_fp16','to_bf16','to_channelslast'])
@pytest.mark.filterwarnings('ignore:The body is frozen')
def test_callbacks_that_change_the_loop(make_learner, how):
    learn = getattr(make_learner(ProxyNCALoss(), cbs=SelfSupervisedRanking(n=2, m=4)), how)()
    learn.fine_tune(1, 1e-3)
    learn.fit_flat_cos(1, slice(1e-4,1e-3), cbs=[GradientAccumulation(64), GradientClip(), EarlyStoppingCallback('recall@1'),
        CSVLogger('log.csv')])
    log = pd.read_csv(learn.path/'log.csv')
    assert 'ssr_loss' in log.columns and np.isfinite(learn.recorder.values[-1][0])

def test_tensorboard_with_everything(make_learner, tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback import tensorboard
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = make_learner(ProxyNCALoss(), cbs=SelfSupervisedRanking(n=2, m=4))
    theirs = dict(vars(tensorboard))
    learn.fit(2, 1e-3, cbs=TensorBoardCallback(tmp_path/'tb', projector=True))
    assert vars(tensorboard)==theirs # nothing of theirs is replaced
    events = EventAccumulator(str(tmp_path/'tb'), size_guidance=dict(tensors=0))
    events.Reload()
    tags = events.Tags()
    assert {'train_loss','recall@1','ssr_loss'}<=set(tags['scalars']) and tags['images'] and tags['graph']
    assert [o.value for o in events.Scalars('ssr_loss')]==pytest.approx(
        [o[learn.recorder.metric_names.index('ssr_loss')-1] for o in learn.recorder.values])
    vecs = next((tmp_path/'tb').rglob('tensors.tsv'))
    assert np.loadtxt(vecs).shape==(len(learn.dls.valid.items),16)

def test_tensorboard_draws_labels_and_no_numbers(make_learner, tmp_path, monkeypatch):
    "Each embedding was drawn as text into a title, which took minutes; and a graph cannot be drawn in mixed precision"
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from torch.utils.tensorboard import SummaryWriter
    titles = []
    monkeypatch.setattr(SummaryWriter, 'add_figure', lambda self, tag, fig, step: titles.append([a.get_title() for a in fig.axes]))
    learn = make_learner(emb_sz=64)
    learn.fit(1, 1e-3, cbs=TensorBoardCallback(tmp_path/'tb', trace_model=False))
    assert len(titles)==1 and len(titles[0])==9 and {*titles[0]}<={*learn.dls.vocab}
    for cbs,l in ((MixedPrecision(),learn),((),make_learner().to_fp16())):
        with pytest.raises(ValueError, match='TensorBoardCallback cannot draw the graph of a model in mixed precision.*trace_model=False'):
            l.fit(1, 1e-3, cbs=[*L(cbs),TensorBoardCallback(tmp_path/'tc')])

@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_mixed_images_are_refused(make_learner, cb):
    with pytest.raises(ValueError, match=f'{cb.__name__} mixes images of two classes'): make_learner().fit(1, cbs=cb())

def test_each_bridge_has_its_reason_its_test_and_a_place_to_report_it():
    "A section of the page says what fastai does and where that is known or to be reported, and holds the bridge and a test of it"
    import json
    cells = json.loads((Path(__file__).parent.parent/'nbs/api/train/00_compat.ipynb').read_text(encoding='utf-8'))['cells']
    sections = []
    for kind,text in ((o['cell_type'],''.join(o['source'])) for o in cells):
        if kind=='markdown' and text.startswith('## '): sections.append((text.splitlines()[0],[text],[]))
        elif sections: sections[-1][1 if kind=='markdown' else 2].append(text)
    assert len(sections)>10
    for name,texts,codes in sections:
        assert re.search(r'\(https://github.com/fastai/fastai/(issues|pull/\d+)(/\d+)?\)', texts[0]), name
        assert re.search(r'fastai|`Learner|`[a-z_]+\(?', texts[0]) and len(texts[0].split())>30, name
        bridge,tests = ([o for o in codes if o.startswith('#| export')==is_bridge] for is_bridge in (True,False))
        assert bridge and any(re.search(r'\btest_(eq|is|fail|close)\(|\bassert ', o) for o in tests), name
