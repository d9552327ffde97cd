"Reference cards: an exported cell of a notebook becomes what Sphinx says of a class, a function or a method, with a table of its arguments"
import ast, inspect, re
from dataclasses import MISSING, fields, is_dataclass
from functools import cached_property
from importlib import import_module
from fastcore.basics import AttrDict
from fastcore.docments import docments
from fastcore.script import store_true
from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor
from nbdev.showdoc import showdoc_nm
from sphinx.util.typing import stringify_annotation

empty = inspect.Parameter.empty
re_plumbing = re.compile(r'_(?!_call__)|(before|after)_|forward_|(load_)?state_dict$|extra_repr$|encodes$|setups$|train$') # what Python, PyTorch, timm and fastai call, and users do not

def type_name(o):
    "`pandas.DataFrame|None` as `DataFrame|None`"
    o = getattr(o, '__origin__', o) if hasattr(o, '__metadata__') else o # of `Annotated`, which is for the shell
    if o in (empty, type(None), None): return ''
    if o is store_true: return 'bool'
    return re.sub(r'(?<![\w.])~?(\w+\.)+(?=\w)', '', o if isinstance(o, str) else stringify_annotation(o, 'smart')).replace(' | ', '|')

def value_name(o): return '' if o is empty else getattr(o, '__name__', None) or repr(o)

def in_cell(s): return ' '.join(s.replace('|', '\\|').split())

def linkify(s): return NbdevLookup().linkify(s) if s else ''

def code_of(o):
    "The function behind a method, a class method (Python's or fastcore's) or a property; other things as they are"
    inner = next((a for a in ('fget','__func__') if hasattr(o, a)), None) or {'_clsmethod':'f', 'cached_property':'func'}.get(type(o).__name__)
    return inspect.unwrap(getattr(o, inner) if inner else o)

class Symbol:
    "A public class, function, method or value of a module, by its name there"
    def __init__(self, name, module):
        self.name,self.module,self.full = name,module,f'{module}.{name}'
        self.owner,_,self.last = name.rpartition('.')
        self.obj = import_module(module)
        for o in name.split('.'): self.parent,self.obj = self.obj,inspect.getattr_static(self.obj, o) if isinstance(self.obj, type) else getattr(self.obj, o)

    @cached_property
    def fn(self):
        "What has the code"
        return code_of(self.obj)

    @property
    def kind(self):
        if not (callable(self.obj) or self.owner): return 'data'
        if isinstance(self.obj, type): return 'class'
        if not self.owner: return 'function'
        return 'property' if isinstance(self.obj, (property,cached_property)) else 'method'

    @property
    def is_classmethod(self): return isinstance(self.obj, classmethod) or type(self.obj).__name__=='_clsmethod'

    @property
    def doc(self): return (inspect.getdoc(self.fn) or '').split('\n')[0] if self.kind!='data' else self._data_doc

    @property
    def _data_doc(self):
        "What a value is: the line of its class, where that is one of ours"
        return (type(self.obj).__doc__ or '').split('\n')[0] if type(self.obj).__module__.startswith('dmlfast.') else f'`{type(self.obj).__name__}`'

    @cached_property
    def _bases(self):
        "The same in the classes it derives from, itself first"
        if self.kind=='class': return [o for o in self.obj.__mro__ if o.__module__.startswith('dmlfast.') and '__init__' in vars(o)]
        cls = self.parent if isinstance(self.parent, type) else type
        return [self.fn, *(code_of(vars(o)[self.last]) for o in cls.__mro__[1:] if self.last in vars(o) and o.__module__.startswith('dmlfast.'))]

    @cached_property
    def args(self):
        "Arguments that can be given, and `return`, with `docment`, `anno`, `default` and `kind`; what is not said here is said where it is inherited from"
        if self.kind=='class' and hasattr(self.obj, '_fields'): return self._fields
        if self.kind in ('data','property') or not self._bases: return {}
        args,*more = [docments(o, full=True, args_kwargs=True) for o in self._bases]
        for k,o in args.items():
            if not o.docment: o.docment = next((b[k].docment for b in more if k in b and b[k].docment), None)
        for f in fields(self.obj) if is_dataclass(self.obj) else ():
            if f.default_factory is not MISSING: args[f.name].default = f.default_factory()
        return {k:o for k,o in args.items() if k not in ('self','cls')}

    @property
    def _fields(self):
        "Those of a named tuple, with the comments of their lines"
        types = self.obj.__annotations__ if '__annotations__' in vars(self.obj) else {}
        said = dict(re.findall(r'^\s+(\w+)\s*:[^#\n]*# *(.*)$', inspect.getsource(self.obj), re.M)) if types else {}
        return {o:AttrDict(docment=said.get(o), anno=types.get(o, empty), default=empty, kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for o in self.obj._fields}

    @property
    def signature(self):
        "Names and defaults of the arguments that are explained; the others are behind `**kwargs`"
        if self.kind in ('data','property'): return ''
        known = {k:o for k,o in self.args.items() if k!='return'}
        ps = [inspect.Parameter(k, o.kind, default=o.default) for k,o in known.items() if o.docment or o.default is empty]
        if len(ps)<len(known) and not any(o.kind==o.VAR_KEYWORD for o in ps): ps.append(inspect.Parameter('kwargs', inspect.Parameter.VAR_KEYWORD))
        res,star = [],False
        for o in ps:
            if o.kind==o.KEYWORD_ONLY and not star: res.append('*')
            star = star or o.kind in (o.KEYWORD_ONLY,o.VAR_POSITIONAL)
            res.append({o.VAR_POSITIONAL:'*', o.VAR_KEYWORD:'**'}.get(o.kind, '')+o.name+(f'={value_name(o.default)}' if o.default is not empty else ''))
        return f"({', '.join(res)})"

    @property
    def table(self):
        "Markdown of what the arguments mean"
        def code(s): return f'`{in_cell(s)}`' if s else ''
        rows = [(code(k), code(type_name(o.anno)), code(value_name(o.default)), linkify(in_cell(o.docment)))
            for k,o in self.args.items() if k!='return' and o.docment]
        if (r := self.args.get('return')) and (r.docment or type_name(r.anno)): rows.append(('*returns*', code(type_name(r.anno)), '', linkify(in_cell(r.docment or ''))))
        return '\n'.join('| '+' | '.join(o)+' |' for o in [('argument','type','default','meaning'), ('---',)*4, *rows]) if rows else ''

    def card(self):
        "Markdown: an anchor under nbdev's own id, which README and other projects link to, and what Sphinx makes a card of"
        how = ':classmethod:\n' if self.is_classmethod else ''
        return f'<a id="{self.name.lower()}"></a>\n\n::::{{py:{self.kind}}} {self.name}{self.signature}\n:module: {self.module}\n{how}\n{linkify(self.doc)}\n\n{self.table}\n::::'

    @property
    def link(self): return f'[`{self.name}`](#{self.full})'

def public_names(source, module):
    "Names that an exported cell defines for others: functions, classes with their methods, values in `__all__`"
    res = []
    for o in ast.parse(source).body:
        if isinstance(o, ast.Assign): res += [t.id for t in o.targets if isinstance(t, ast.Name) and t.id in import_module(module).__all__]
        if not isinstance(o, (ast.FunctionDef,ast.ClassDef)): continue
        nm = showdoc_nm(o)
        for n in nm if isinstance(nm, list) else [nm]:
            if n.startswith('_') or re_plumbing.match(n.rpartition('.')[2]) and '.' in n: continue
            res.append(n)
            if isinstance(o, ast.ClassDef): res += [f'{n}.{f.name}' for f in o.body if isinstance(f, ast.FunctionDef) and not re_plumbing.match(f.name) and ast.get_docstring(f)]
    return res

class cards(Processor):
    "Replace each exported cell by the cards of its public names, and list them below the title"
    def begin(self):
        nb = self.nb
        exp = next((c.directives_['default_exp'] for c in nb.cells if c.cell_type=='code' and 'default_exp' in c.directives_), None)
        if not exp: return
        nb.room = room = []
        for c in nb.cells:
            if c.cell_type!='code' or not {'export','exports'} & c.directives_.keys(): continue
            syms = [Symbol(o, f'dmlfast.{exp}') for o in public_names(c.source, f'dmlfast.{exp}')]
            if not syms: continue
            room += syms
            c.cell_type,c.source,c.metadata = 'markdown','\n\n'.join(o.card() for o in syms),{}
            for k in ('outputs','execution_count'): c.pop(k, None)

def contents(room):
    "Markdown table of the names in `room`: classes with their methods, then functions"
    heads = [o for o in room if not o.owner or o.owner not in {p.name for p in room}]
    heads.sort(key=lambda o: ('class','method','property','function','data').index(o.kind))
    def row(o):
        methods = [f'[`{p.last}`](#{p.full})' for p in room if p.owner==o.name]
        return f'| {o.link} | {linkify(in_cell(o.doc))}{"<br>" if methods else ""}{", ".join(methods)} |'
    return '\n'.join(['::::{container} names', '| name | what it is |', '|---|---|', *map(row, heads), '::::'])
