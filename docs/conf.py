"Sphinx configuration; `python docs/nbsite.py` builds the site into `docs/_build/html`"
from importlib.util import find_spec
from pathlib import Path
from nbdev.config import get_config

cfg = get_config(__file__)
project,author,copyright,release = cfg.title, 'the dmlfast authors', '2026, the dmlfast authors', cfg.version
extensions = ['myst_nb', 'sphinx_copybutton']
myst_enable_extensions = ['dollarmath', 'amsmath', 'attrs_inline', 'colon_fence']
myst_heading_anchors = 3
nb_render_markdown_format = 'myst' # tables that cells display
nb_execution_mode = 'off'  # outputs are stored in the notebooks; `nbdev-test --save` refreshes them
suppress_warnings = ['myst.header', 'mystnb.unknown_mime_type']

html_theme = "furo"
html_title = cfg.title
mathjax = Path(find_spec('sphinx-mathjax-offline').origin).parent/'static'/'mathjax' # one file of it, so that the site works offline
html_static_path = ['_static', str(mathjax/'tex-svg.js')]
mathjax_path = 'tex-svg.js'
html_css_files = ['site.css']
html_theme_options = dict(
    light_css_variables={'font-stack': 'Inter, system-ui, sans-serif', 'color-brand-primary': '#0b6e4f', 'color-brand-content': '#0b6e4f'},
    dark_css_variables={'color-brand-primary': '#5fd3a6', 'color-brand-content': '#5fd3a6'})
