"The rules of the house: who may import whom, and how large a room is"
import ast, re, sys
from pathlib import Path
import pytest

root = Path(__file__).parent.parent
sys.path.insert(0, str(root/'docs'))
from nbsite import wings # the lowest first
above_the_line = wings[:6] # these do not know fastai
rooms = [f'{w}.{re.sub(r"^[0-9]+_", "", f.stem)}' for w in wings for f in sorted((root/'nbs'/'api'/w).glob('[0-9]*.ipynb'))]

def source(room): return (root/'dmlfast'/f"{room.replace('.', '/')}.py").read_text(encoding='utf-8')

def imported(room):
    "Module and names of what a room imports from the package, and modules that it imports from elsewhere"
    ours,others = [],[]
    for o in ast.walk(ast.parse(source(room))):
        if isinstance(o, ast.Import): names = [(a.name, [], 0) for a in o.names]
        elif isinstance(o, ast.ImportFrom): names = [(o.module or '', [a.name for a in o.names], o.level)]
        else: continue
        for mod,what,level in names:
            if level: ours.append((mod if level==2 else f"{room.split('.')[0]}.{mod}", what))
            elif mod.startswith('dmlfast.'): ours.append((mod.removeprefix('dmlfast.'), what))
            elif mod!='dmlfast': others.append(mod)
    return ours,others

def test_every_room_has_a_module():
    assert len(set(rooms))==len(rooms)>25
    files = {f'{o.parent.name}.{o.stem}' for o in (root/'dmlfast').glob('*/*.py') if o.stem!='__init__'}
    assert files==set(rooms)
    assert [o.parent.name for o in (root/'dmlfast').glob('*/__init__.py') if o.parent.name not in wings]==[]

@pytest.mark.parametrize('room', rooms)
def test_a_room_knows_only_what_stands_below_it(room):
    ours,others = imported(room)
    for mod,_ in ours:
        if mod in wings: assert wings.index(mod)<wings.index(room.split('.')[0]), f'{room} imports {mod}'
        elif mod: assert rooms.index(mod)<rooms.index(room), f'{room} imports {mod}'
    if room.split('.')[0] in above_the_line: assert not [o for o in others if o.split('.')[0] in ('fastai','fastprogress')], room

@pytest.mark.parametrize('room', rooms)
def test_nothing_of_others_is_replaced(room):
    "Methods are patched into our classes alone, and no attribute of an imported module or class is assigned"
    import importlib
    mod,tree = importlib.import_module(f'dmlfast.{room}'),ast.parse(source(room))
    theirs = {a.asname or a.name.split('.')[0] for o in ast.walk(tree) if isinstance(o, ast.Import) or isinstance(o, ast.ImportFrom)
        and not o.level for a in o.names}
    for o in ast.walk(tree):
        targets = o.targets if isinstance(o, ast.Assign) else [o.target] if isinstance(o, ast.AugAssign) else []
        for t in ast.walk(ast.Tuple(targets)):
            assert not (isinstance(t, ast.Attribute) and isinstance(t.ctx, ast.Store) and isinstance(t.value, ast.Name)
                and t.value.id in theirs), f'{room}:{o.lineno}'
        if not isinstance(o, ast.FunctionDef) or not any(getattr(d, 'id', '')=='patch' for d in o.decorator_list): continue
        cls = o.args.args[0].annotation
        assert getattr(mod, cls.id).__module__.startswith('dmlfast.'), f'{room}: {o.name} is patched into {cls.id}'

def test_wings_give_the_names_of_their_rooms():
    import importlib
    for w in wings[1:-1]:
        wing = importlib.import_module(f'dmlfast.{w}')
        for room in rooms:
            if room.startswith(f'{w}.'): assert set(importlib.import_module(f'dmlfast.{room}').__all__)<=set(wing.__all__), room

# ---- size ----
# What is still over, and shrinks: lines over 140 columns in rooms and in tests, rooms that take others' private names, large rooms
wide_rooms = []
wide_tests = []
private = []
large = []

def is_wide(text): return any(len(o)>140 for o in text.splitlines())
def n_lines(room): return sum(o.strip()!='' for o in source(room).splitlines())

@pytest.mark.parametrize('room', rooms)
def test_lines_end_at_140_columns(room): assert is_wide(source(room))<=(room in wide_rooms)

def test_no_two_rooms_have_a_number():
    "It says which one may know the other"
    for wing in (root/'nbs'/'api').iterdir():
        numbers = [o.name[:2] for o in wing.glob('[0-9]*.ipynb')] if wing.is_dir() else []
        assert len(set(numbers))==len(numbers), wing.name

def test_lines_of_tests_end_at_140_columns():
    assert [o.stem for o in sorted((root/'tests').glob('*.py')) if is_wide(o.read_text(encoding='utf-8')) and o.stem not in wide_tests]==[]

@pytest.mark.parametrize('room', rooms)
def test_no_private_name_crosses_rooms(room):
    assert [n for _,names in imported(room)[0] for n in names if n.startswith('_')]==[] or room in private

@pytest.mark.parametrize('room', rooms)
def test_a_room_reads_in_one_sitting(room): assert n_lines(room)<=450 or room in large

def test_the_lists_name_only_what_is_still_over():
    "A name that is no longer over leaves its list, and so does one that is gone"
    assert [o for o in wide_rooms if o in rooms and not is_wide(source(o))]==[]
    assert [o for o in large if o in rooms and n_lines(o)<=450]==[]
    assert [o for o in private if o in rooms and not [n for _,names in imported(o)[0] for n in names if n.startswith('_')]]==[]
    assert [o for o in wide_tests if not is_wide((root/'tests'/f'{o}.py').read_text(encoding='utf-8'))]==[]
