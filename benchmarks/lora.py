"""LoRA beside full fine-tuning: processor seconds and memory of a step, and bytes of a checkpoint.

    python benchmarks/lora.py

`vit_tiny_patch16_224` and `vit_small_patch16_224` with random weights (they change neither time nor memory) at 112 pixels, batches of 16, one thread.
Steps of all three alternate in one process; median of five, least and greatest in brackets, and the median ratio to the full step beside it.
Memory: bytes that autograd keeps for the backward pass of a step, each tensor once and weights not counted; and gradients and the two moments of Adam.
Files: the weights as `learn.save(with_opt=False)` writes them."""
import os, platform, statistics, tempfile, time, warnings
os.environ['OMP_NUM_THREADS'] = '1'
warnings.simplefilter('ignore')
import torch
from pathlib import Path
from dmlfast.all import *
from dmlfast.models.lora import add_lora, as_filed

archs,size,bs = ('vit_tiny_patch16_224','vit_small_patch16_224'),112,16
y = torch.arange(bs)//4

def model_of(arch, how):
    "A model to train whole (`'full'`), or with LoRA on `'qkv'` or on all `'linear'` layers"
    torch.manual_seed(0)
    model = Embedder(arch, 128, pretrained=False, img_size=size)
    return model if how=='full' else add_lora(model, 8, 16, how)

def stepper(arch, how):
    "A function that makes one step, and what it trains"
    model,loss = model_of(arch, how),DRTripletLoss()
    params = [p for p in model.parameters() if p.requires_grad]
    opt,x = torch.optim.AdamW(params, 1e-5),torch.randn(bs, 3, size, size)
    def step():
        opt.zero_grad()
        loss(model(x), y).backward()
        opt.step()
    return step,model,params

def seconds(f):
    t = time.process_time()
    f()
    return time.process_time()-t

def kept(step, model):
    "Bytes that autograd keeps in a step"
    own,seen = {p.untyped_storage().data_ptr() for p in model.parameters()},{}
    def pack(t):
        if (s := t.untyped_storage()).data_ptr() not in own: seen[s.data_ptr()] = s.nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): step()
    return sum(seen.values())

def filed(arch, how):
    "Bytes of the model's weights in a file"
    model = model_of(arch, how)
    with tempfile.TemporaryDirectory() as tmp, as_filed(model):
        torch.save(model.state_dict(), fn := Path(tmp)/'model.pth')
        return fn.stat().st_size

def mb(n): return f'{n/2**20:,.1f}'

if __name__=='__main__':
    torch.set_num_threads(1)
    print(f'{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, 1 thread, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n')
    print('| body | trained | weights trained | CPU s a step | of full | kept for backward, MB | gradients and moments, MB | weights in a file, MB |')
    print('|---|---|---|---|---|---|---|---|')
    for arch in archs:
        runs = {how:stepper(arch, how) for how in ('full','qkv','linear')}
        for step,*_ in runs.values(): step()
        times = {how:[] for how in runs}
        for _ in range(5):
            for how,(step,*_) in runs.items(): times[how].append(seconds(step))
        for how,(step,model,params) in runs.items():
            n,t = sum(p.numel() for p in params),times[how]
            ratio = statistics.median(a/b for a,b in zip(t, times['full']))
            print(f"| {arch} | {'all' if how=='full' else f'LoRA, {how}'} | {n:,} | {statistics.median(t):.2f} ({min(t):.2f} to {max(t):.2f}) | {ratio:.2f} | "
                f'{mb(kept(step, model))} | {mb(12*n)} | {mb(filed(arch, how))} |', flush=True)
