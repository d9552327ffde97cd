"What `from dmlfast.all import *` gives, and what a module costs to import"
import builtins, subprocess, sys

def _public(module):
    ns = {}
    exec(f'from {module} import *', ns)
    return {k for k in ns if not k.startswith('__')}

def test_nothing_is_shadowed():
    ours = _public('dmlfast.all')
    assert not ours & set(dir(builtins))
    theirs = _public('fastai.vision.all')
    import fastai.vision.all as fv
    import dmlfast.all as da
    assert not [o for o in ours & theirs if getattr(fv, o) is not getattr(da, o)]

def test_names_are_there():
    assert {'metric_learner', 'DRTripletLoss', 'BalancedDL', 'ClassBlock', 'ClassSplitter', 'RetrievalMetrics', 'MetricDataset', 'glyphs',
        'cub200', 'cars196', 'online_products', 'inshop', 'vehicle_id',
        'Embedder', 'stage_splitter', 'bn_inception', 'recipes', 'neighbours', 'evaluate_retrieval',
        'show_neighbours'} <= _public('dmlfast.all')

def test_all_gives_what_one_calls():
    "Losses, miners and data sets that are registered, and not the helpers of rooms"
    from dmlfast.losses.base import register_loss
    from dmlfast.losses.miners import register_miner
    names = _public('dmlfast.all')
    assert len(names)<=110 and not any(o.startswith('_') for o in names)
    assert {o.__name__ for table in (register_loss,register_miner) for _,o in table.items() if o.__module__.startswith('dmlfast.')}<=names
    assert not {'sqdist','class_index','reduce_terms','WithinClass','body_key'} & names

def test_lower_rooms_do_without_fastai():
    rooms = 'files.images','losses.proxies','models.embedder','models.bninception','retrieval.embedded','files.drawing'
    code = f"import sys, {', '.join(f'dmlfast.{o}' for o in rooms)}; sys.exit('fastai' in sys.modules)"
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code]).returncode==0
    code = "import sys, dmlfast.files.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code]).returncode==0

def test_the_cheat_sheet_names_what_is_there():
    "Every call on it, with every argument that it names"
    import ast, inspect, json, re
    from pathlib import Path
    from dmlfast.deploy import ImageEmbedder
    names = {}
    exec('from fastai.vision.all import *\nfrom dmlfast.all import *', names)
    kinds = dict(learn='MetricLearner', ds='MetricDataset', dls='TfmdDL', a='Embedded', b='Embedded')
    of = dict(finder=ImageEmbedder) | {k:names[o] for k,o in kinds.items()}
    text = json.loads((Path(__file__).parent.parent/'nbs'/'explanations'/'cheat_sheet.ipynb').read_text(encoding='utf-8'))
    code = [o for c in text['cells'] for o in re.findall(r'(?<!`)`([^`\n]+)`', ''.join(c['source'])) if '(' in o]
    calls = 0
    for o in code:
        o = re.sub(r'^with (.*?): .*', r'\1', o.removeprefix('cbs='))
        for call in [n for n in ast.walk(ast.parse(o)) if isinstance(n, ast.Call)]:
            path = ast.unparse(call.func).split('.')
            if '(' in ast.unparse(call.func): continue # the result of another call
            f = of.get(path[0], names.get(path[0]))
            assert f is not None, o
            for p in path[1:]: f = getattr(f, p)
            kinds = inspect.signature(f).parameters
            loose = any(k.kind is k.VAR_KEYWORD for k in kinds.values())
            assert loose or {k.arg for k in call.keywords}<=set(kinds), o
            calls += 1
    assert calls>35
