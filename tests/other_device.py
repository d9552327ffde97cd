"A second device for machines that have one: its tensors hold real numbers, do not meet those of the CPU, and count what waits for them"
import contextlib, torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

there = torch.device('meta') # what such tensors say, as PyTorch knows no other that needs no hardware
waits = '_local_scalar_dense','nonzero','_unique2','unique_dim','bincount','masked_select','equal'

class Elsewhere(Tensor):
    "A tensor on the second device"
    @staticmethod
    def __new__(cls, x):
        how = dict(strides=x.stride(), storage_offset=x.storage_offset(), dtype=x.dtype, device=there)
        res = Tensor._make_wrapper_subclass(cls, x.shape, **how)
        res.x = x
        return res
    __torch_function__ = torch._C._disabled_torch_function_impl
    def as_subclass(self, cls): return self
    def numpy(self, *args, **kwargs): raise TypeError("can't convert a tensor of another device to numpy. Use Tensor.cpu()")
    __array__ = numpy
    def tolist(self): return self.detach().x.tolist()
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return _run(func, args, kwargs or {}, [])

def _run(func, args, kwargs, seen):
    name,device = func.overloadpacket.__name__,kwargs.get('device')
    flat,_ = tree_flatten((args, kwargs))
    theirs = [o for o in flat if isinstance(o, Elsewhere)]
    ours = [o for o in flat if isinstance(o, Tensor) and not isinstance(o, Elsewhere)]
    if name in ('index','index_put','index_put_','_index_put_impl_','_unsafe_index'): # numbers of rows may come from the CPU
        if theirs and not isinstance(args[0], Elsewhere): raise RuntimeError(f'{name}: a tensor of the CPU, by indices of another device')
    elif theirs and any(o.ndim for o in ours) and name not in ('_to_copy','copy_','detach','alias','set_'):
        raise RuntimeError(f'{name}: tensors of two devices')
    if theirs and name in waits: seen.append(name)
    def plain(o): return o.x if isinstance(o, Elsewhere) else torch.device('cpu') if isinstance(o, torch.device) and o==there else o
    args_,kwargs_ = tree_map(plain, (args, kwargs))
    res = func(*args_, **kwargs_)
    if name in ('_local_scalar_dense','equal','is_same_size'): return res
    away = there==torch.device(device) if device is not None else bool(theirs)
    res = tree_map(lambda o: Elsewhere(o) if away and isinstance(o, Tensor) and not isinstance(o, Elsewhere) else o, res)
    return return_and_correct_aliasing(func, args, kwargs, res) if theirs else res

class _Mode(TorchDispatchMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return _run(func, args, kwargs or {}, self.seen)

class _Autocast(torch.autocast):
    def __init__(self, device_type, *args, **kwargs): super().__init__('cpu' if device_type=='meta' else device_type, *args, **kwargs)

@contextlib.contextmanager
def two_devices(monkeypatch):
    "A context in which `elsewhere` tensors may be used; gives the list of what waited for them"
    monkeypatch.setattr(torch, 'autocast', _Autocast)
    with _Mode(seen := []): yield seen

def elsewhere(x):
    "A copy on the second device"
    return Elsewhere(x.detach().clone())
