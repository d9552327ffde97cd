"What a user writes, as the design promises it; this file grows and is never weakened"
import pytest
from fastai.vision.all import *
from dmlfast.all import *

columns = ['epoch','train_loss','valid_loss','ssr_loss','recall@1','recall@2','recall@4','recall@8','map@r','time']

def test_a_named_data_set(glyph_dir, tmp_path):
    set_seed(0)
    dls   = glyphs(glyph_dir.parent, size=24).dataloaders(bs=128, per_class=16, num_workers=0)   # class-disjoint train and valid
    learn = metric_learner(dls, 'test_resnet', DRTripletLoss(margin=0.28, gamma=0.49), emb_sz=128, cbs=SelfSupervisedRanking(),
        pretrained=False, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
    assert list(learn.recorder.metric_names)==columns
    assert all(0<=o<=1 for o in learn.recorder.values[-1][3:])
    assert learn.recorder.values[-1][2]<learn.recorder.values[0][2] # the order of views is being learned
    seen,unseen = ({f.parent.name for f in o.dataset.items} for o in dls)
    assert seen and unseen and not seen & unseen
    with learn.no_bar():
        assert learn.show_results(max_n=2, k=3).axes
        res = learn.evaluate('test')
    assert res['recall@1']>0.05 # chance is below 0.005
    assert dls.source.summary().loc['test'].images==len(res.labels)
    with pytest.warns(UserWarning, match='pairs of one class are missed'): # of two short epochs
        learn.export_embedder(tmp_path/'chars', gallery='train', fmr=1e-2)
    finder,item = load_embedder(tmp_path/'chars'),dls.source.items('test')[0]
    assert all(o.score>=finder.threshold for o in finder.search(item, unknown=True)) # of a class that is not there
    assert finder.classify(item).label in finder.labels

def test_a_published_data_set(cub_dir, tmp_path):
    set_seed(0)
    dls   = cub200(cub_dir).dataloaders(bs=128, per_class=16, size=24, num_workers=0)
    learn = metric_learner(dls, 'test_resnet', DRTripletLoss(margin=0.28, gamma=0.49), emb_sz=128, cbs=SelfSupervisedRanking(),
        pretrained=False, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2)
    assert list(learn.recorder.metric_names)==columns
    seen,unseen = ({int(f.parent.name[:3]) for f in o.dataset.items} for o in dls)
    assert seen==set(range(1,51)) and unseen==set(range(51,101))
    with learn.no_bar(): res = learn.evaluate('test')
    assert len(res.labels)==800 and res['recall@1']>0.05 # chance is 0.009
    published = dls.source.dataloaders(bs=128, per_class=16, valid='test', size=24, num_workers=0)
    seen,unseen = ({int(f.parent.name[:3]) for f in o.dataset.items} for o in published)
    assert seen==set(range(1,101)) and unseen==set(range(101,201))

def test_from_parts(glyph_dir, tmp_path):
    dblock = DataBlock(blocks=(ImageBlock, ClassBlock), get_items=get_image_files, get_y=parent_label,
                       splitter=ClassSplitter(parent_label, valid_pct=0.5), item_tfms=RandomResizedCrop(24), batch_tfms=aug_transforms())
    dls    = dblock.dataloaders(glyph_dir, bs=128, dl_type=BalancedDL, per_class=4, num_workers=0)
    x,y = dls.one_batch()
    assert x.shape==(128,3,24,24) and (y.view(32,4)==y.view(32,4)[:,:1]).all()
    learn = metric_learner(dls, 'test_resnet', DRTripletLoss(), pretrained=False, path=tmp_path)
    x,y = dls.valid.one_batch()
    assert (y>=dls.n_train_classes).all()
    assert torch.allclose(learn.model.cpu()(x.cpu()).norm(dim=1), torch.ones(len(x)), atol=1e-5)

def test_several_processes(make_learner):
    "Where a launcher began one process, the line is what a fit is; `test_distributed.py` has it in two"
    import pytest
    pytest.importorskip('accelerate')
    learn = make_learner()
    with learn.distrib_ctx(): learn.fit_one_cycle(1, 1e-2)
    assert len(learn.recorder.values)==1

def test_a_gallery_that_changes(glyph_dir, tmp_path):
    ds = glyphs(glyph_dir.parent, size=24)
    learn = metric_learner(ds.dataloaders(bs=32, num_workers=0), 'test_resnet', emb_sz=16, pretrained=False, path=tmp_path)
    with learn.no_bar(): learn.export_embedder(tmp_path/'birds', gallery='val')
    photos,finder = ds.items('test')[:3],load_embedder(tmp_path/'birds')
    old,n = finder.labels[0],len(finder)
    finder.add(photos, 'a new species'); finder.remove(label=old)
    assert finder.search(photos[0], k=1)[0].label=='a new species' and old not in finder.labels and 3<len(finder)<n
    finder.to_lancedb(tmp_path/'birds.lance')
    assert load_embedder(tmp_path/'birds', gallery=tmp_path/'birds.lance').search(photos[0], k=1)[0].label=='a new species'

def test_large_batches_and_memories(make_learner):
    learn = make_learner(freeze_bn=True)
    learn.fit_one_cycle(1, 1e-3, cbs=[LargeBatch(chunk=8)])
    learn.fit_one_cycle(1, 1e-3, cbs=[BatchMemory(64, start=1)])
    assert len(learn.recorder.values)==1
