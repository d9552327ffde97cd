"Sphinx configuration; `python docs/nbsite.py` builds the site into `docs/_build/html`"
import inspect, re, sys
from importlib.util import find_spec
from pathlib import Path
from nbdev.config import get_config

cfg = get_config(__file__)
sys.path.insert(0, str(Path(__file__).parent))
project,author,copyright,release = cfg.title, 'the dmlfast authors', '2026, the dmlfast authors', cfg.version
extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx.ext.linkcode']
myst_enable_extensions = ['dollarmath', 'amsmath', 'attrs_inline', 'colon_fence']
myst_heading_anchors = 3
nb_render_markdown_format = 'myst' # tables that cells display
nb_code_prompt_show,nb_code_prompt_hide = 'The code','The code'
nb_execution_mode = 'off'  # outputs are stored in the notebooks; `make prepare` refreshes them
smartquotes_action = 'qe' # `--resume` stays what one types
suppress_warnings = ['myst.header', 'mystnb.unknown_mime_type']
add_module_names = False # a card says `TripletLoss`, not `dmlfast.losses.triplet.TripletLoss`: users import from `dmlfast.all`
toc_object_entries_show_parents = 'hide'
html_show_sourcelink = False # it would be the processed notebook, which nobody has written

def linkcode_resolve(domain, info):
    "Where the code of a card is in the repository"
    from cards import Symbol
    fn = Symbol(info['fullname'], info['module']).fn
    try: file,line = Path(inspect.getsourcefile(fn)).relative_to(cfg.config_path),inspect.getsourcelines(fn)[1]
    except (TypeError, ValueError, OSError): return # a value, or a class that has no source of its own
    return f'{cfg.git_url}/blob/{cfg.branch}/{file.as_posix()}#L{line}'

html_theme = "furo"
html_title = cfg.title
mathjax = Path(find_spec('sphinx-mathjax-offline').origin).parent/'static'/'mathjax' # one file of it, so that the site works offline
html_static_path = ['_static', str(mathjax/'tex-svg.js')]
mathjax_path = 'tex-svg.js'
html_css_files,html_js_files = ['site.css'],['site.js']
html_search_scorer = str(Path(__file__).parent/'_static'/'scorer.js')
card = f'{cfg.doc_host}{cfg.doc_baseurl}/_images/emoji.png'
myst_html_meta = {'description lang=en':cfg.description, 'property=og:title':cfg.title, 'property=og:description':cfg.description, # the card that chats and mails show
    'property=og:image':card, 'property=og:type':'website', 'name=twitter:card':'summary_large_image'}
html_favicon = '_static/favicon.svg'
html_theme_options = dict(light_logo='logo-light.svg', dark_logo='logo-dark.svg', sidebar_hide_name=True,
    light_css_variables={'font-stack': 'Inter, system-ui, sans-serif', 'color-brand-primary': '#0b6e4f', 'color-brand-content': '#0b6e4f'},
    dark_css_variables={'color-brand-primary': '#5fd3a6', 'color-brand-content': '#5fd3a6'})

def breaks(app, pagename, templatename, context, doctree):
    "Code ends a line after brackets, commas and dots, and never within a name"
    def cut(m): return re.sub(r'(?<=[(=,/|[])(?=[^\s)\]])|(?<=\.)(?=[A-Za-z_]\w{3}|[a-z]+\()', '</span><wbr/><span class="pre">', m[0])
    def code(m): return re.sub(r'(?<=<span class="pre">)[^<]{13,}', cut, m[0]) # what is shorter stays on a line
    context['body'] = re.sub(r'<code class="[^"]*\bliteral\b[^"]*">.*?</code>', code, context.get('body') or '', flags=re.S)

def setup(app): app.connect('html-page-context', breaks)
