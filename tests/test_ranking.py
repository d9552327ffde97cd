"Self-supervised ranking: its views, its loss, and what it does to a fit"
import math, pickle, random
import numpy as np, pytest, torch
from fastai.vision.all import *
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image
from dmlfast.all import *

mean,std = torch.tensor([.485,.456,.406]),torch.tensor([.229,.224,.225])
def norm(x): return (x-mean[:,None,None])/std[:,None,None]
def denorm(x): return x*std[:,None,None]+mean[:,None,None]

@pytest.fixture(scope='module')
def photos():
    "Sixteen parts of two photos, 48 pixels to a side, colours from 0 to 1"
    ims = [torch.tensor(load_sample_image(f)).permute(2,0,1)[:,:400,:600]/255 for f in ('flower.jpg','china.jpg')]
    parts = torch.cat([o.unfold(1, 200, 200).unfold(2, 150, 150).flatten(1, 2).transpose(0, 1) for o in ims])
    return F.interpolate(parts, 48, mode='area')

def make_ssr(**kwargs): return SelfSupervisedRanking(**{**dict(m=8, p=1.), **kwargs})

# views

def test_views_grow_with_the_level(photos):
    "In pixels and in the features of a network, on average over images, for every kind of transform by itself and for all"
    torch.manual_seed(0)
    net = Embedder('test_resnet', 16, pretrained=False).eval()
    x = norm(photos)
    off = dict(crop=0., perspective=0., jitter=0.)
    for only in ({}, dict(off, crop=1.), dict(off, perspective=1.), dict(off, jitter=.5)):
        views = GradedViews(n=6, **only)
        v = torch.cat([views(x, mean, std) for _ in range(8)])
        pixels = (denorm(v[:,1:])-denorm(v[:,:1])).pow(2).mean((2,3,4)).sqrt().mean(0)
        with torch.no_grad(): f = net.features(v.flatten(0,1)).unflatten(0, v.shape[:2])
        feats = (f[:,1:]-f[:,:1]).norm(dim=-1).mean(0)
        assert (pixels.diff()>0).all() and (feats.diff()>0).all(), only

def test_jitter_grows_in_every_image(photos):
    "No image has a level that is nearer in colour than the one before"
    v = GradedViews(crop=0., perspective=0.)(norm(photos.clamp(.3,.6)), mean, std) # no colour meets black or white
    dist = (v[:,1:]-v[:,:1]).pow(2).mean((2,3,4)).sqrt()
    assert (dist.diff(dim=1)>0).all()

def test_strengths_are_exact():
    "The part of the picture that a view shows, measured on a picture of its own coordinates"
    h = 64
    ys,xs = torch.meshgrid(*[(2*torch.arange(h)+1)/h-1]*2, indexing='ij')
    at = torch.stack([xs,ys,torch.zeros(h,h)]).expand(200,-1,-1,-1)/4+.5 # coordinates as colours
    v = (GradedViews(jitter=0.)(at, 0*mean, 0*std+1)[:,:,:2]-.5)*4
    du,dv = v[...,1:-1,2:]-v[...,1:-1,:-2],v[...,2:,1:-1]-v[...,:-2,1:-1]
    area = (du[:,:,0]*dv[:,:,1]-du[:,:,1]*dv[:,:,0]).mean((2,3))*(h/4)**2
    tau = torch.tanh(.2*torch.arange(5))
    assert torch.allclose(area[:,1:], (1-tau[1:]).expand(200,4), atol=.02)
    assert v.abs().max()<=1 # nothing from outside the picture

def test_crops_are_nested():
    "Without a tilt, what a level shows lies inside what the level before shows"
    at = ((2*torch.arange(64)+1)/128).expand(50,1,64,64)
    v = GradedViews(perspective=0., jitter=0.)(at, torch.zeros(1), torch.ones(1))[:,:,0,32]
    assert (v[...,0].diff(dim=1)>=-1e-6).all() and (v[...,-1].diff(dim=1)<=1e-6).all()

def test_colours_are_those_of_pil(photos):
    "Brightness, contrast and saturation against PIL's `ImageEnhance`, where nothing is clipped"
    from PIL import Image, ImageEnhance
    x = (photos[:4].clamp(.35,.6)*255).round()/255
    views = GradedViews(n=2, crop=0., perspective=0.)
    state = views.rng.get_state()
    _,factors = views.draw(4)
    views.rng.set_state(state)
    v = denorm(views(norm(x), mean, std))
    for i in range(4):
        for n in range(2):
            b,c,s = factors[i,n].tolist()
            im = Image.fromarray((x[i]*255).round().byte().permute(1,2,0).numpy())
            for enhance,o in ((ImageEnhance.Brightness,b), (ImageEnhance.Contrast,c), (ImageEnhance.Color,s)): im = enhance(im).enhance(o)
            off = (torch.tensor(np.array(im)).permute(2,0,1)/255-v[i,n+1]).abs().max().item()*255
            assert off<4, (off,b,c,s) # PIL rounds three times

def test_normalisation_is_undone_and_redone(photos):
    "Views of a normalised batch are the normalised views of the images, and view 0 is what the batch has, bit for bit"
    x = norm(photos)
    a,b = GradedViews()(x, mean, std),GradedViews()(photos, 0*mean, 0*std+1)
    assert (a[:,0]==x).all() and torch.allclose(a, norm(b), atol=1e-5)
    lo,hi = norm(torch.zeros(3,1,1)),norm(torch.ones(3,1,1))
    assert (a>=lo-1e-6).all() and (a<=hi+1e-6).all()
    assert torch.equal(a, GradedViews()(x, mean[None,:,None,None], std[None,:,None,None])) # the shape that `Normalize` has

def test_views_are_not_noise(photos):
    "Eight-bit conversion of a normalised tensor wraps around; a view here looks like its image, at every level"
    v = GradedViews(crop=0., perspective=0.)(norm(photos), mean, std)
    a,b = v[:,:1].expand_as(v[:,1:]).flatten(2),v[:,1:].flatten(2)
    assert ((a*b).sum(-1)/(a.norm(dim=-1)*b.norm(dim=-1))).min()>.5
    corr = torch.stack([torch.corrcoef(torch.stack([p,q]))[0,1] for p,q in zip(a.flatten(0,1), b.flatten(0,1))])
    assert corr.min()>.8

def test_weakest_views_are_the_image(photos):
    assert torch.allclose(GradedViews(strength=1e-6)(photos), photos[:,None].expand(-1,5,-1,-1,-1), atol=1e-4)

@pytest.mark.parametrize('shape', [(1,3,1,1),(2,3,5,9),(3,1,32,17),(1,1,300,40),(2,3,256,256)])
def test_any_size_and_channels(shape):
    v = GradedViews(n=3)(torch.rand(shape))
    assert v.shape==(shape[0],4,*shape[1:]) and v.isfinite().all() and v.min()>=0 and v.max()<=1

def test_blocks_of_images_change_nothing(photos):
    "However many images are worked on at a time, each gets what it would get alone"
    x = F.interpolate(photos, 200)
    v = GradedViews()(x) # one at a time
    views = GradedViews()
    assert torch.allclose(v, torch.cat([views(o[None]) for o in x]), atol=1e-5)
    small = GradedViews()(photos)
    views = GradedViews()
    assert torch.allclose(small[:3], views(photos[:3]), atol=1e-5)

def test_own_range(photos):
    "Without statistics black and white are those of the data"
    for lo,hi in ((0,255), (-1,1)):
        x = photos*(hi-lo)+lo
        v = GradedViews(crop=0., perspective=0.)(x)
        assert v.min()>=x.min() and v.max()<=x.max() and v[:,1:].std()>.1*(hi-lo)
    constant = torch.full((2,3,8,8), 7.)
    assert GradedViews()(constant).isfinite().all()

def test_half_precision_and_autocast(photos):
    x = norm(photos)
    want = GradedViews()(x, mean, std)
    assert GradedViews()(x.half(), mean, std).dtype==torch.float16
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(GradedViews()(x, mean, std), want)

def test_views_are_seeded(photos):
    a,b,other = (GradedViews(seed=s) for s in (0,0,1))
    state = torch.random.get_rng_state()
    one,two = a(photos),a(photos)
    assert torch.equal(one, b(photos)) and torch.equal(two, b(photos))
    assert not torch.equal(one, two) and not torch.equal(one, other(photos))
    assert torch.equal(torch.random.get_rng_state(), state)
    rest = pickle.loads(pickle.dumps(a))
    assert torch.equal(a(photos), rest(photos))
    a.show(photos, max_n=2)
    assert torch.equal(a(photos), rest(photos)) # drawing pictures is not a step

def test_one_direction_for_all_levels():
    "Signs, the way of the tilt, and the place in what is left"
    quads,factors = GradedViews().draw(100)
    assert ((factors>1)==(factors[:,:1]>1)).all()
    tilt = F.normalize(quads[:,:,2,:2], dim=-1)
    assert torch.allclose(tilt, tilt[:,:1].expand_as(tilt), atol=1e-5)
    quads,_ = GradedViews(perspective=0.).draw(100)
    place = quads[:,:,:2,2]/(1-quads[:,:,0,0,None])
    assert torch.allclose(place, place[:,:1].expand_as(place), atol=1e-4) and place.abs().max()<=1

def test_directions_are_uniform():
    quads,factors = GradedViews().draw(4000)
    signs = (factors[:,0]>1).float()
    assert (signs.mean(0)-.5).abs().max()<.03 and (torch.corrcoef(signs.T)-torch.eye(3)).abs().max()<.06
    tilt = quads[:,0,2,:2]
    assert torch.allclose(tilt.norm(dim=-1), torch.full((4000,), math.tanh(.2)/2), atol=1e-6) and tilt.mean(0).abs().max()<.005

@pytest.mark.parametrize('x', [torch.rand(3,8,8), torch.rand(2,2,8,8), torch.zeros(2,3,8,8, dtype=torch.uint8), [1,2], torch.rand(4,10)])
def test_views_of_no_images(x):
    with pytest.raises(ValueError, match="Graded views are made of images"): GradedViews()(x)

@pytest.mark.parametrize('kw,said', [(dict(n=1),'2 or more; got 1'), (dict(n=2.5),'got 2.5'), (dict(strength=0),'greater than 0'),
    (dict(crop=1.2),'`crop`'),
    (dict(perspective=-1),'`perspective`'), (dict(jitter=2),'`jitter`'), (dict(seed=None),'`seed` is a whole number')])
def test_views_arguments(kw, said):
    with pytest.raises(ValueError, match=said): GradedViews(**kw)

# loss

def literal(z, s=12., alpha=.05, beta=.5, lam=1.):
    "The formula, one number after the other"
    total = 0.
    for zi in z.tolist():
        dot = lambda a,b: sum(p*q for p,q in zip(a,b))
        sims = [dot(zi[0],o)/math.sqrt(dot(zi[0],zi[0])*dot(o,o)) for o in zi[1:]]
        sort = math.log(1+sum(math.exp(s*(b-a+alpha)) for a,b in zip(sims, sims[1:])))/s
        pos = math.log(1+sum(math.exp(-s*(o-beta)) for o in sims))/s
        total += sort+lam*pos
    return total/len(z)

def test_loss_values():
    "Those of the table of test values, and the formula on random vectors of any length"
    angles = torch.tensor([0,.3,.5,.7,.9], dtype=torch.float64)
    z = torch.stack([angles.cos(),angles.sin()], -1)[None]
    i = torch.arange(120, dtype=torch.float64).reshape(15,8)
    many = F.normalize(torch.sin(.37*i+.2), dim=1).reshape(3,5,8)
    for z_,sort,pos,total in ((z, .0768367913, .0211597777, .0979965689), (many, 1.9688629887, 1.4992045953, 3.4680675840)):
        assert RankingLoss()(z_).item()==pytest.approx(total, abs=1e-9)
        assert RankingLoss(lam=0.)(z_).item()==pytest.approx(sort, abs=1e-9)
        assert (RankingLoss()(z_)-RankingLoss(lam=0.)(z_)).item()==pytest.approx(pos, abs=1e-9)
    z = torch.randn(4,4,7, dtype=torch.float64)
    args = dict(s=5., alpha=.1, beta=.2, lam=3.)
    assert RankingLoss(**args)(z).item()==pytest.approx(literal(z, **args), abs=1e-9)

def test_loss_properties():
    torch.manual_seed(0)
    z = torch.randn(3,5,8, dtype=torch.float64, requires_grad=True)
    loss = RankingLoss()
    assert torch.autograd.gradcheck(loss, z)
    assert loss(7*z).item()==pytest.approx(loss(z).item()) # cosines have no length
    q = torch.linalg.qr(torch.randn(8,8, dtype=torch.float64))[0]
    assert loss(z@q).item()==pytest.approx(loss(z).item())
    same = torch.randn(1,1,8).expand(2,5,8).clone().requires_grad_()
    loss(same).backward()
    assert same.grad.isfinite().all()
    big = torch.tensor([[[1.,0],[-1,0],[1,0]]])
    assert RankingLoss(s=1e4, alpha=.1)(big).item()==pytest.approx(2.1+1.5, rel=1e-3) # no overflow

def test_loss_in_half_precision():
    z = torch.randn(3,5,8)
    with torch.autocast('cpu', torch.bfloat16): out = RankingLoss()(z)
    assert out.dtype==torch.float32 and out.item()==RankingLoss()(z).item()
    assert RankingLoss()(z.half()).item()==pytest.approx(RankingLoss()(z.half().float()).item(), abs=1e-6)

def test_loss_arguments():
    with pytest.raises(ValueError, match=r"\(n-1\)·alpha must be at most 1-beta, and 0.6 is more than 0.5"):
        RankingLoss(alpha=.2)(torch.randn(2,5,3))
    assert RankingLoss(alpha=.125)(torch.randn(2,6,3)).isfinite() # 4·0.125 is just 0.5
    with pytest.raises(ValueError, match="nothing to rank with 1 level:"): RankingLoss()(torch.randn(2,2,3))
    with pytest.raises(ValueError, match="view 0 first"): RankingLoss()(torch.randn(2,3))
    with pytest.raises(ValueError, match="`s` is the sharpness"): RankingLoss(s=0)

# callback

def weights(learn):
    return torch.cat([p.detach().flatten() for n,p in learn.model.named_parameters() if 'ranking_head' not in n]
        + [b.detach().flatten().float() for b in learn.model.buffers()])

@pytest.mark.parametrize('how', ['creation','add_cb','fit'])
def test_without_luck_nothing_changes(make_learner, how):
    "p=0 trains bit for bit as without, however the callback is added, and leaves every generator where it would be"
    def states(): return torch.random.get_rng_state().tolist(),random.getstate(),np.random.get_state()[1].tolist()
    plain = make_learner()
    plain.fit_one_cycle(2, 3e-3)
    want = states()
    cb = make_ssr(p=0.)
    learn = make_learner(cbs=cb if how=='creation' else None)
    if how=='add_cb': learn.add_cb(cb)
    learn.fit_one_cycle(2, 3e-3, cbs=cb if how=='fit' else None)
    assert states()==want
    assert torch.equal(weights(learn), weights(plain))
    assert [o[:2]+o[3:] for o in learn.recorder.values]==plain.recorder.values
    assert all(math.isnan(o[2]) for o in learn.recorder.values)

@pytest.mark.parametrize('how', ['creation','class','add_cb','add_cb later','fit'])
@pytest.mark.parametrize('opt', ['adam','torch','lookahead'])
def test_head_is_trained_at_the_last_groups_rate(make_learner, how, opt):
    "Its weights are in the last group, and follow plain gradient descent there"
    funcs = dict(adam=Adam, torch=partial(OptimWrapper, opt=torch.optim.SGD),
        lookahead=lambda p, lr: Lookahead(SGD(p, lr, mom=0.), k=10**6))
    cb = make_ssr()
    learn = make_learner(opt_func=funcs[opt], cbs=cb if how=='creation' else SelfSupervisedRanking if how=='class' else None)
    if how=='add_cb': learn.add_cb(cb)
    if how=='add_cb later':
        learn.fit(1, slice(1e-4, 1e-2))
        learn.add_cb(cb)
    if how!='fit': assert 'ranking_head' in dict(learn.model.named_children())
    class Look(Callback):
        def before_step(self):
            self.old,self.g = (o.detach().clone() for o in (self.model.ranking_head[2].weight, self.model.ranking_head[2].weight.grad))
        def after_step(self): self.moved = self.old-self.model.ranking_head[2].weight.detach()
    look = Look()
    learn.fit(1, slice(1e-4, 1e-2), wd=0., cbs=[look]+([cb] if how=='fit' else []))
    groups = [[id(p) for p in o] for o in learn.opt.param_lists]
    head = [id(p) for p in learn.model.ranking_head.parameters()]
    assert len(groups)==2 and all(o in groups[1] for o in head) and not set(head)&set(groups[0])
    assert len(groups[0]+groups[1])==len(set(groups[0]+groups[1]))==len(list(learn.model.parameters()))
    assert learn.opt.hypers[-1]['lr']==1e-2
    if opt!='adam': assert torch.allclose(look.moved, 1e-2*look.g, rtol=1e-3, atol=1e-7)
    assert look.moved.abs().max()>0

def test_adding_it_later_keeps_what_the_optimiser_knows(make_learner):
    learn = make_learner()
    learn.fit(1, slice(1e-4, 1e-3), wd=.03)
    p = learn.model.head.weight
    avg = learn.opt.state[p]['grad_avg'].clone()
    learn.add_cb(make_ssr())
    assert torch.equal(learn.opt.state[p]['grad_avg'], avg) and learn.opt.hypers[-1]['wd']==.03
    assert [learn.opt.state[o].get('do_wd') for o in learn.model.ranking_head.parameters()]==[None,False,None,False] # no decay of biases
    learn.export() # the optimiser is made anew there, and takes back its state
    assert torch.equal(learn.opt.state[p]['grad_avg'], avg)

@pytest.mark.parametrize('before', ['lr_find','load','export'])
def test_adding_it_after_the_optimiser_was_loaded(make_learner, before):
    "fastai's optimisers know no further weights then"
    learn = make_learner()
    if before=='lr_find': learn.lr_find(num_it=20, show_plot=False, stop_div=False)
    else:
        learn.fit(1, 1e-3)
        learn.save('x')
        learn.load('x') if before=='load' else learn.export()
    learn.fit(1, 1e-3, cbs=SelfSupervisedRanking(n=2, m=4))
    assert np.isfinite(learn.recorder.values[-1]).all() and all(learn.opt.state[p] for p in learn.model.ranking_head.parameters())

def test_one_backward_and_one_step_of_the_joint_loss(make_learner):
    "The gradient of a step is that of metric loss + γ · ranking loss"
    counts = dict(backward=0, step=0)
    class Count(Callback):
        def before_backward(self): counts['backward'] += 1; self.joint = self.learn.loss_grad.item()
        def after_step(self): counts['step'] += 1
    ssr,count = make_ssr(gamma=.3),Count()
    learn = make_learner(cbs=[ssr,count])
    learn.fit(1, 1e-3)
    assert counts==dict(backward=9, step=9)
    assert count.joint==pytest.approx(ssr.metric_losses[-1]+.3*ssr.ssr_losses[-1], rel=1e-5)

def test_gradients_add_up(make_learner):
    "Against a step by hand: the metric loss of the batch, and the ranking loss of its views, backward together"
    class Keep(Callback):
        order,run_valid = -5,False
        def before_batch(self):
            if self.iter==0:
                self.x,self.y = (o.clone() for o in (self.learn.x,self.learn.y))
                self.state = {k:v.clone() for k,v in self.model.state_dict().items()}
        def before_step(self):
            if self.iter==0: self.grads = [p.grad.clone() for p in self.model.parameters()]
    keep,gamma = Keep(),.7
    learn = make_learner(cbs=[make_ssr(gamma=gamma, m=32, seed=5),keep], opt_func=partial(SGD, mom=0.))
    learn.fit(1, 1e-3)
    model = learn.model.train()
    model.load_state_dict(keep.state)
    model.zero_grad()
    x,rng = keep.x.as_subclass(Tensor),torch.Generator().manual_seed(5)
    torch.rand(1, generator=rng) # the coin
    pick = torch.randperm(32, generator=rng)
    nrm = learn.dls.after_batch.fs.filter(risinstance(Normalize))[0]
    v = GradedViews(seed=5)(x[pick], nrm.mean, nrm.std)
    z = model.ranking_head(model.features(v.flatten(0,1))).view(32, 5, -1)
    (learn.loss_func(model(x), keep.y)+gamma*RankingLoss()(z)).backward()
    for p,g in zip(model.parameters(), keep.grads): assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-5)

def test_coin(make_learner):
    "It is tossed for each step, and falls as often as p says; per epoch, all steps of an epoch have the same"
    ssr = SelfSupervisedRanking(p=.8)
    tosses = []
    for _ in range(4000): ssr.toss(); tosses.append(ssr.due)
    tosses = np.array(tosses)
    assert abs(tosses.mean()-.8)<.02 and abs(np.corrcoef(tosses[1:], tosses[:-1])[0,1])<.05
    for p,want in ((0.,0),(1.,1)):
        ssr = SelfSupervisedRanking(p=p)
        for _ in range(100):
            ssr.toss()
            assert ssr.due==want
    batch,epoch = make_ssr(p=.5, m=1),make_ssr(p=.5, m=1, per='epoch')
    make_learner(cbs=batch).fit(1, 1e-3)
    assert 0<sum(map(math.isnan, batch.ssr_losses))<9
    make_learner(cbs=epoch).fit(4, 1e-3)
    per_epoch = np.isnan(epoch.ssr_losses).reshape(4,9)
    assert (per_epoch==per_epoch[:,:1]).all() and 0<per_epoch[:,0].sum()<4

def test_a_seed_repeats_a_run(make_learner):
    runs = []
    for seed in (0,0,1):
        learn = make_learner(cbs=SelfSupervisedRanking(m=4, seed=seed))
        learn.fit(1, 1e-3)
        runs.append((learn.recorder.values, learn.self_supervised_ranking.ssr_losses[0]))
    assert runs[0]==runs[1] and runs[0][0]!=runs[2][0]

def test_predictions_before_any_fit(make_learner):
    assert make_learner(cbs=make_ssr()).get_preds()[0].isfinite().all()

def test_a_search_for_a_rate_leaves_coin_and_views(make_learner):
    runs = []
    for find in (False,True):
        learn = make_learner(cbs=SelfSupervisedRanking(m=4, p=.5))
        if find: learn.lr_find(num_it=8, show_plot=False)
        set_seed(1)
        learn.fit(1, 1e-3)
        runs.append((learn.recorder.values, learn.self_supervised_ranking.ssr_losses))
    np.testing.assert_equal(*runs)

def test_running_statistics_are_those_of_the_images(make_learner):
    "Views go through batch norm in training mode and leave no trace in its statistics; frozen batch norm stays frozen"
    def buffers(learn): return torch.cat([b.flatten().float() for b in learn.model.buffers()])
    runs = [make_learner(cbs=cbs) for cbs in (None, make_ssr())]
    for learn in runs: learn.fit(1, 0.)
    assert torch.equal(*map(buffers, runs))
    learn = make_learner(cbs=make_ssr(), freeze_bn=True)
    before = buffers(learn)
    learn.fit(1, 1e-3)
    assert torch.equal(buffers(learn), before)
    bns = [m for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert bns and all(m.track_running_stats for m in bns)

def test_views_normalise_with_their_own_statistics(make_learner):
    "In the extra pass batch norm does not use the running statistics"
    learn = make_learner(cbs=make_ssr(m=32))
    learn.fit(1, 0.)
    ssr,x = learn.self_supervised_ranking,learn.dls.train.one_batch()[0]
    def value(train):
        ssr.rng.manual_seed(0); ssr.views.rng.manual_seed(0)
        learn.model.train(train)
        with torch.no_grad(): return ssr.ranking(x).item()
    for m in learn.model.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean += 1
    a = value(True)
    for m in learn.model.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean += 1
    assert value(True)==a and value(False)!=a

def test_validation_has_no_views(make_learner, monkeypatch):
    calls = []
    ssr = make_ssr()
    monkeypatch.setattr(ssr, 'ranking', lambda x: calls.append(ssr.learn.training) or x.sum()*0)
    learn = make_learner(cbs=ssr)
    learn.fit(1, 1e-3)
    learn.validate(); learn.evaluate(); learn.get_preds()
    assert calls==[True]*9
    assert math.isnan(learn.validate()[1]) and len(ssr.ssr_losses)==9

def test_embeddings_take_no_notice_of_the_head(make_learner, tmp_path):
    learn = make_learner(cbs=make_ssr())
    learn.fit(1, 1e-3)
    before = learn.embed(bar=False)[0]
    for p in learn.model.ranking_head.parameters(): p.data.fill_(float('nan'))
    assert torch.equal(learn.embed(bar=False)[0], before)
    x = learn.dls.valid.one_batch()[0].as_subclass(Tensor).cpu()
    alone = Embedder('test_resnet', 16, pretrained=False).eval() # an embedder has no head, and leaves it out
    alone.load_state_dict({k:v for k,v in learn.model.state_dict().items() if not k.startswith('loss_func.')})
    out = learn.export_embedder(tmp_path/'out')
    for model in (alone,out.model):
        assert torch.equal(model(x), learn.model.eval()(x)) and not hasattr(model, 'ranking_head')
    assert not [k for k in load_file(tmp_path/'out'/'weights.safetensors') if 'rank' in k]

def test_checkpoints_with_and_without_the_head(make_learner):
    a,b = make_learner(cbs=make_ssr()),make_learner(seed=1)
    a.fit(1, 1e-3); b.fit(1, 1e-3)
    a.save('with'); b.save('without', with_opt=False)
    other = make_learner(seed=2)
    other.load('with')
    assert torch.equal(weights(other), weights(a)) and not hasattr(other.model, 'ranking_head')
    head = a.model.ranking_head[0].weight.detach().clone()
    a.load('without', with_opt=False)
    assert torch.equal(weights(a), weights(b)) and torch.equal(a.model.ranking_head[0].weight, head)
    fresh = make_learner(seed=3)
    fresh.add_cb(make_ssr(seed=9))
    fresh.load('with') # before any fit
    assert torch.equal(fresh.model.ranking_head[0].weight, head)
    fresh.fit(1, 1e-3)
    bad = {**a.model.state_dict()}
    del bad['ranking_head.0.bias']
    with pytest.raises(RuntimeError, match='ranking_head.0.bias'): a.model.load_state_dict(bad)

def test_best_model_lr_find_and_export(make_learner, tmp_path):
    learn = make_learner(cbs=make_ssr())
    head = learn.model.ranking_head[0].weight
    before = head.detach().clone()
    learn.lr_find(num_it=12, show_plot=False)
    assert torch.equal(head, before) and head.requires_grad
    learn.fit(3, 3e-3, cbs=[SaveModelCallback(monitor='recall@1'), EarlyStoppingCallback(monitor='ssr_loss', patience=9)])
    learn.export()
    other = load_learner(tmp_path/'export.pkl')
    fns = learn.dls.source.items('test')[:5]
    dl = other.dls.test_dl(fns)
    assert torch.allclose(other.get_preds(dl=dl)[0], learn.embed(learn.dls.test_dl(fns), bar=False)[0], atol=1e-6)
    assert torch.equal(other.model.ranking_head[0].weight, learn.model.ranking_head[0].weight)
    learn.fit(1, 1e-3)
    assert np.isfinite(learn.recorder.values[-1][2])

def test_fits_freezes_and_series(make_learner, tmp_path):
    "Successive fits go on with one head; the column, the series and the log agree"
    ssr = make_ssr(p=.7, m=4)
    learn = make_learner()
    for i in range(2):
        learn.fit(2, 1e-3, cbs=[ssr, CSVLogger(fname=tmp_path/'log.csv')])
        steps = np.array(ssr.ssr_losses).reshape(2, 9)
        assert np.allclose([o[2] for o in learn.recorder.values], np.nanmean(steps, 1))
        assert learn.recorder.metric_names[3]=='ssr_loss' and len(ssr.metric_losses)==18
        assert np.allclose(pd.read_csv(tmp_path/'log.csv').ssr_loss, np.nanmean(steps, 1))
        if i==0: head = learn.model.ranking_head
        assert learn.model.ranking_head is head and not learn.metrics
    first = steps[0,0]
    learn.fit(1, 1e-3)
    assert len(learn.recorder.values[0])==7 # without it, no column
    body = [p.detach().clone() for p in learn.model.body.parameters() if p.ndim==4]
    h = head[0].weight.detach().clone()
    learn.freeze()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn.fit(1, 1e-3, wd=0., cbs=ssr); learn.fit(1, 1e-3, wd=0., cbs=ssr)
    assert sum('The body is frozen' in str(o.message) for o in said)==1
    assert all(torch.equal(a,b) for a,b in zip(body, [p for p in learn.model.body.parameters() if p.ndim==4]))
    assert not torch.equal(h, head[0].weight)
    learn.unfreeze()
    learn.fit(1, 1e-3, cbs=ssr)
    assert not any(torch.equal(a,b) for a,b in zip(body, [p for p in learn.model.body.parameters() if p.ndim==4]))

def test_fine_tune(make_learner):
    learn = make_learner(cbs=make_ssr())
    with pytest.warns(UserWarning, match='The body is frozen'): learn.fine_tune(1, 1e-3)
    assert np.isfinite(learn.recorder.values[-1][2])

def test_gradient_accumulation(make_learner):
    "Four batches of eight are one of 32: the sum of both losses is divided, and there is a step for each four backwards"
    class Count(Callback):
        order = 20
        def before_fit(self): self.n,self.scaled = [0,0],[]
        def before_backward(self): self.n[0] += 1; self.scaled.append(self.learn.loss_grad.item())
        def after_step(self): self.n[1] += 1
    ssr,count = make_ssr(gamma=2., m=4),Count()
    learn = make_learner(bs=8, cbs=[ssr,count,GradientAccumulation(32)])
    learn.fit(1, 1e-3)
    assert count.n[0]//4==count.n[1]>0
    joint = [a+2*b for a,b in zip(ssr.metric_losses, ssr.ssr_losses)]
    assert np.allclose(count.scaled, np.array(joint)*8/32, rtol=1e-5)

def test_half_precision_in_the_loop(make_learner):
    "With autocast on, as mixed precision has it, the network runs in half precision and the loss does not"
    seen = {}
    class Autocast(Callback):
        order,run_valid = MixedPrecision.order,False
        def before_batch(self): self.ctx = torch.autocast('cpu', torch.bfloat16); self.ctx.__enter__()
        def after_pred(self): self.learn.pred = self.learn.pred.float()
        def after_loss(self): self.ctx.__exit__(None, None, None)
    class Loss(RankingLoss):
        def forward(self, z):
            out = super().forward(z)
            seen.update(z=z.dtype, out=out.dtype)
            return out
    ssr = make_ssr(loss=Loss())
    learn = make_learner(cbs=[ssr,Autocast()])
    learn.fit(1, 1e-3)
    assert seen==dict(z=torch.bfloat16, out=torch.float32) and np.isfinite(ssr.ssr_losses).all()

def test_replicas(make_learner, tmp_path):
    "Data parallel training waits for a gradient of every weight, those of the head included, however the coin falls"
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    class Wrap(Callback):
        order = 40
        def before_fit(self): self.learn.model = DistributedDataParallel(self.learn.model)
        def after_fit(self): self.learn.model = self.learn.model.module
    dist.init_process_group('gloo', init_method=f'file://{tmp_path/"store"}', rank=0, world_size=1)
    try:
        runs = []
        for wrap in (True,False):
            learn = make_learner(cbs=make_ssr(p=.5)).remove_cb(RetrievalMetrics)
            learn.fit(1, 1e-3, cbs=Wrap() if wrap else None)
            runs.append((weights(learn), learn.self_supervised_ranking.ssr_losses))
        assert torch.allclose(runs[0][0], runs[1][0], atol=1e-5) and np.allclose(runs[0][1], runs[1][1], equal_nan=True, atol=1e-5)
        assert 0<np.isnan(runs[0][1]).sum()<9
    finally: dist.destroy_process_group()

def test_the_embedding_learns_the_order(make_learner):
    "After training, similarities to view 0 in the head's space fall from level to level, on images it has not seen"
    learn = make_learner(cbs=make_ssr(m=16))
    x = learn.dls.valid.one_batch()[0].as_subclass(Tensor)
    v = GradedViews(seed=7)(x, *learn.self_supervised_ranking.stats())
    def ordered():
        with torch.no_grad():
            z = F.normalize(learn.model.eval().ranking_head(learn.model.features(v.flatten(0,1))), dim=-1).view(len(x), 5, -1)
        sims = (z[:,1:]*z[:,:1]).sum(-1)
        return (sims.diff(dim=1)<0).float().mean().item(),sims.mean(0)
    before,_ = ordered()
    learn.fit(3, 3e-3)
    after,sims = ordered()
    assert after>before and (sims.diff()<0).all()

def test_tensorboard(make_learner, tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = make_learner(cbs=make_ssr())
    learn.fit(2, 1e-3, cbs=TensorBoardCallback(tmp_path/'tb', trace_model=False, log_preds=False))
    events = EventAccumulator(str(tmp_path/'tb'))
    events.Reload()
    assert np.allclose([o.value for o in events.Scalars('ssr_loss')], [o[2] for o in learn.recorder.values])

def test_pictures(make_learner):
    ssr = make_ssr(p=.5)
    learn = make_learner(cbs=ssr)
    learn.fit(2, 1e-3)
    ax = ssr.plot(beta=0.)
    lines = {o.get_label():np.array(o.get_ydata()) for o in ax.lines}
    assert np.allclose(lines['metric'], ssr.metric_losses)
    on = ~np.isnan(ssr.ssr_losses)
    assert np.allclose(lines['ranking'][on], np.array(ssr.ssr_losses)[on])
    assert len(ssr.show(max_n=3).axes)==15
    plt.close('all')

def test_pictures_of_several_classes_are_no_step(make_learner):
    "Those of a batch's classes, not of its first; and neither a generator, the loader nor the next fit takes notice"
    class Keep(GradedViews):
        def show(self, x, *args, **kwargs):
            self.shown = x
            return super().show(x, *args, **kwargs) if len(x)<4 else None # many small plots take long
    def state(learn):
        dl,ssr = learn.dls.train,learn.self_supervised_ranking
        ours = dl.rng.getstate(),dl.epoch,ssr.rng.get_state().tolist(),ssr.views.rng.get_state().tolist()
        return torch.get_rng_state().tolist(),random.getstate(),str(np.random.get_state()),*ours
    plain,learn = make_learner(cbs=make_ssr(views=Keep())),make_learner(cbs=make_ssr(views=Keep()))
    before = state(learn)
    ssr = learn.self_supervised_ranking
    ssr.show(max_n=2)
    ssr.show(max_n=8)
    assert state(learn)==before
    x,y = learn.dls.train.one_batch() # what was drawn from, but for a random crop or flip
    assert len(ssr.views.shown)==8 and len(y.unique())==8
    near = torch.cdist(ssr.views.shown.flatten(1), x.as_subclass(Tensor).flatten(1)).argmin(1)
    assert len(y[near].unique())==8
    for o in (plain,learn):
        set_seed(1)
        o.fit(1, 1e-3)
    assert torch.equal(weights(plain), weights(learn))
    ssr.show(max_n=100)
    assert len(ssr.views.shown)==32
    plt.close('all')

def test_it_says_how_it_was_made():
    assert repr(SelfSupervisedRanking())=="SelfSupervisedRanking(m=20, gamma=0.8, p=0.8, per='batch', n=4)"
    for make in (lambda: SelfSupervisedRanking(seed=3, hidden=64), lambda: SelfSupervisedRanking(gamma=.5, p=1., per='epoch', emb_sz=8,
        views=GradedViews(3, strength=.3, seed=2), loss=RankingLoss(alpha=.1))):
        a,b = make(),eval(repr(make()))
        assert repr(a)==repr(b) and repr(a.views)==repr(b.views) and repr(a.rank_loss)==repr(b.rank_loss)
        assert [getattr(a, o)==getattr(b, o) for o in ('m','gamma','p','per','hidden','emb_sz','seed')]==[True]*7
    assert 'GradedViews(n=3, strength=0.3' in repr(make()) and "per='epoch'" in repr(make()) and 'alpha=0.1' in repr(make())

@pytest.mark.parametrize('loss', [ProxyNCALoss, DRMultiSimilarityLoss, MarginLoss, ContrastiveLoss])
def test_any_loss(make_learner, loss):
    learn = make_learner(loss(), cbs=make_ssr())
    learn.fit(1, 1e-3)
    assert np.isfinite([learn.recorder.values[-1][0],learn.recorder.values[-1][2]]).all()
    assert not any(p in lr_mults(learn.model) for p in learn.model.ranking_head.parameters())

def test_plain_learner_and_a_model_of_ones_own(few):
    "Any `Learner` will do, and any model with pooled features; data without `Normalize` are taken in their own range"
    class Net(nn.Module):
        n_features = 12
        def __init__(self): super().__init__(); self.conv,self.out = nn.Conv2d(3,12,3),nn.Linear(12,4)
        def features(self, x): return self.conv(x).relu().mean((2,3))
        def forward(self, x): return F.normalize(self.out(self.features(x)), dim=-1)
    dls = few.dataloaders(bs=32, per_class=4, seed=0, num_workers=0)
    learn = Learner(dls, Net(), TripletLoss(), cbs=make_ssr())
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.self_supervised_ranking.stats()==(None,None) and learn.model.ranking_head.widths==(12,512,128)
    assert np.isfinite(learn.self_supervised_ranking.ssr_losses).all()

def test_statistics_are_those_of_the_loader(few):
    "The views that the network gets are those of images from 0 to 1, normalised as the batch is"
    class Keep(GradedViews):
        def __call__(self, x, *stats):
            self.state = self.rng.get_state()
            self.x,self.seen = x,super().__call__(x, *stats)
            return self.seen
    views = Keep()
    dls = few.dataloaders(bs=32, per_class=4, seed=0, num_workers=0, batch_tfms=Normalize.from_stats(mean.tolist(), std.tolist()))
    learn = Learner(dls, Embedder('test_resnet', 16, pretrained=False), TripletLoss(), cbs=make_ssr(views=views))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    again = GradedViews()
    again.rng.set_state(views.state)
    want = norm(again(denorm(views.x.cpu()), 0*mean, 0*std+1))
    assert torch.allclose(views.seen.cpu(), want, atol=1e-4)

def test_widths(make_learner):
    learn = make_learner(cbs=make_ssr(hidden=64))
    assert learn.model.ranking_head.widths==(learn.model.n_features,64,16)
    assert make_learner(cbs=make_ssr(emb_sz=7)).model.ranking_head.widths[-1]==7
    learn.remove_cb(SelfSupervisedRanking)
    with pytest.raises(ValueError, match="has a ranking head of widths"): learn.fit(1, 1e-3, cbs=make_ssr(hidden=32))
    learn.fit(1, 1e-3) # and the learner is as it was

def test_small_batches(make_learner):
    ssr = make_ssr(m=100)
    learn = make_learner(cbs=ssr)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn.fit(2, 1e-3)
    assert [str(o.message) for o in said if 'fewer than' in str(o.message)]==["The batch has 32 images, fewer than m=100: self-supervised "
        "ranking uses all of them."]
    assert np.isfinite(ssr.ssr_losses).all()

def test_bad_arguments(make_learner, few):
    for kw,said in ((dict(n=1),'`n` is the number of levels'), (dict(m=0),'`m` is the number of images'), (dict(p=1.1),'`p` is a share'),
        (dict(per='step'),"per 'batch' or per 'epoch'"),
        (dict(gamma=-.1),'`gamma` is the weight of the ranking loss, 0 or more; got -0.1'), (dict(gamma=math.nan),'`gamma` is'),
        (dict(hidden=0),"`hidden` is the number of units in the head's hidden layer, 1 or more; got 0"),
        (dict(hidden=None),'`hidden` is'), (dict(emb_sz=0),"`emb_sz` is .*, 1 or more; got 0"), (dict(emb_sz=.5),'got 0.5'),
        (dict(views=4),'`views` are made by a `GradedViews`.*got 4'), (dict(views=GradedViews),'`views` are made by'),
        (dict(seed=None),'`seed` is a whole number.*got None'), (dict(seed=1.5),'got 1.5'),
        (dict(loss=3),r'`loss` is a function of the vectors of views, such as `RankingLoss\(\)`; got 3'),
        (dict(loss=RankingLoss),'`loss` is'),
        (dict(n=12),'12 levels with 0.05 between neighbours do not fit above 0.5')):
        with pytest.raises(ValueError, match=said): SelfSupervisedRanking(**kw)
    dls = few.dataloaders(bs=32, per_class=4, seed=0, num_workers=0)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3*24*24, 8))
    with pytest.raises(ValueError, match=r"the model needs a method `features\(x\)` that gives them, \(n,n_features\), and an attribute "
        r"`n_features`"):
        metric_learner(dls, flat, TripletLoss(), cbs=SelfSupervisedRanking())
    learn = make_learner(cbs=[make_ssr(),make_ssr()])
    with pytest.raises(ValueError, match="There are two columns"): learn.fit(1)
    class Maps(nn.Module):
        n_features = 12
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(3,12,3)
        def features(self, x): return self.conv(x)
        def forward(self, x): return self.features(x).mean((2,3))
    learn = Learner(dls, Maps(), TripletLoss(), cbs=make_ssr())
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match=r"`features` of Maps gives \(40, 12, 22, 22\)"): learn.fit(1)

def test_vectors_are_no_images():
    "Data that is not images is refused by name, at the first batch"
    class Net(nn.Module):
        n_features = 4
        def __init__(self): super().__init__(); self.lin = nn.Linear(4,4)
        def features(self, x): return self.lin(x)
        def forward(self, x): return self.features(x)
    ds = [(torch.randn(4),torch.tensor(i%2)) for i in range(16)]
    dls = DataLoaders(DataLoader(ds, bs=8, num_workers=0), DataLoader(ds, bs=8, num_workers=0))
    learn = Learner(dls, Net(), TripletLoss(), cbs=make_ssr())
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match=r"Graded views are made of images, \(m,c,h,w\) floats with 1 "
        r"or 3 channels; got \(8, 4\)"):
        learn.fit(1)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu(make_learner, photos):
    "Views are made there without a copy to the host, and half precision trains"
    torch.cuda.set_sync_debug_mode('error')
    try: v = GradedViews()(norm(photos).pin_memory().cuda(non_blocking=True), mean.cuda(), std.cuda())
    finally: torch.cuda.set_sync_debug_mode('default')
    assert torch.allclose(v.cpu(), GradedViews()(norm(photos), mean, std), atol=1e-4)
    learn = make_learner(cbs=make_ssr()).to_fp16()
    learn.fit(2, 1e-3)
    assert np.isfinite(learn.self_supervised_ranking.ssr_losses).all()
