"""PyTorch Metric Learning's triplet and multi-similarity losses in a bare PyTorch loop: the same images, crops, network, batches, schedule and number of steps as the other methods of the experiment."""
import random
import numpy as np, timm, torch
from PIL import Image
from pytorch_metric_learning.losses import MultiSimilarityLoss, TripletMarginLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from dmlfast.retrieval.metrics import evaluate_retrieval

class Images(Dataset):
    def __init__(self, ds, splits, tfms):
        df = ds.df[ds.df.split.isin(splits)]
        self.files,self.tfms = [ds.path/o for o in df.path],tfms
        names = sorted(set(df.label))
        self.labels = [names.index(o) for o in df.label]
    def __len__(self): return len(self.files)
    def __getitem__(self, i): return self.tfms(Image.open(self.files[i]).convert('RGB')),self.labels[i]

class Net(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.body = timm.create_model(model['arch'], num_classes=0, **model.get('timm', {}))
        from safetensors.torch import load_file
        self.body.load_state_dict({k:v for k,v in load_file(model['weights']).items() if not k.startswith('classifier')})
        self.head = nn.Linear(self.body.num_features, model['emb_sz'])
    def forward(self, x): return nn.functional.normalize(self.head(self.body(x)))
    def train(self, mode=True):
        super().train(mode)
        for o in self.modules():
            if isinstance(o, nn.BatchNorm2d): o.eval()
        return self

@torch.no_grad()
def embed(net, dl):
    net.eval()
    xs,ys = zip(*[(net(x.to(memory_format=torch.channels_last)),y) for x,y in dl])
    return torch.cat(xs),torch.cat(ys)

def loop(settings, ds, valid, report, loss, miner=None):
    "Train as the settings say, and embed the split `valid`"
    seed,batch,fit,pml = settings['seed'],settings['batch'],settings['fit'],settings['pml']
    for f in (random.seed,np.random.seed,torch.manual_seed): f(seed)
    size,n_epoch = batch['size'],fit['n_epoch']
    norm = T.Normalize([.485,.456,.406], [.229,.224,.225])
    train = Images(ds, ['train'] if valid=='val' else ['train','val'], T.Compose([T.RandomResizedCrop(size, (.2,1)),T.RandomHorizontalFlip(),T.ToTensor(),norm]))
    test = DataLoader(Images(ds, [valid], T.Compose([T.Resize(round(size*256/224)),T.CenterCrop(size),T.ToTensor(),norm])), 128)
    bs = batch['bs']
    sampler = MPerClassSampler(train.labels, batch['per_class'], bs, len(train)//bs*bs)
    net = Net(settings['model']).to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW([dict(params=net.body.parameters(), lr=pml['lr']*fit['body_lr']), dict(params=net.head.parameters(), lr=pml['lr'])], weight_decay=fit['wd'])
    steps = n_epoch*(len(train)//bs)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, [o['lr'] for o in opt.param_groups], total_steps=steps, pct_start=.25)
    for epoch in range(n_epoch):
        net.train()
        for x,y in DataLoader(train, bs, sampler=sampler, drop_last=True):
            embs = net(x.to(memory_format=torch.channels_last))
            value = loss(embs, y, miner(embs, y)) if miner else loss(embs, y)
            opt.zero_grad()
            value.backward()
            opt.step()
            sched.step()
        if report: report(epoch, evaluate_retrieval(*embed(net, test), metrics=['map@r'])['map@r'])
    return *embed(net, test),{}

def triplet(settings, ds, valid, report, **kwargs): return loop(settings, ds, valid, report, TripletMarginLoss(margin=settings['pml']['margin']))

def ms(settings, ds, valid, report, **kwargs):
    p = settings['pml']
    return loop(settings, ds, valid, report, MultiSimilarityLoss(alpha=p['alpha'], beta=p['beta'], base=p['lam']), MultiSimilarityMiner(epsilon=.1))
