"Runs as plain settings, searches and experiments"

from importlib import import_module

# loaded when one of their names is asked for: the help of the commands needs only `settings`, which knows nothing heavy
_rooms = ['settings', 'checks', 'runs', 'tuning', 'plans', 'comparison', 'experiments']

def __getattr__(name):
    if name.startswith('_') and name!='__all__': raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    mods = [import_module(f'.{o}', __name__) for o in _rooms]
    names = {k:getattr(m, k) for m in mods for k in m.__all__}
    globals().update(names, __all__=[*names])
    if name not in globals(): raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]
