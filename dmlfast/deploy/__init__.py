"An embedder with its gallery, without its training"
from importlib import import_module

# loaded when one of their names is asked for; what needs neither PyTorch nor fastcore is loaded without the rest
_light,_rooms = ['finder', 'runtime'],['gallery', 'embedder', 'lance', 'journal', 'folder', 'hub', 'onnx']

def __getattr__(name):
    if name.startswith('_') and name!='__all__': raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    names = {}
    for rooms in (_light, _rooms):
        mods = [import_module(f'.{o}', __name__) for o in rooms]
        names |= {k:getattr(m, k) for m in mods for k in m.__all__}
        if rooms is _rooms: import_module('dmlfast.web') # which gives an embedder its `explore`
        if name in names: break
    else: names['__all__'] = [*names]
    globals().update(names)
    if name not in globals(): raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]
