"Turn the notebooks of an nbdev project into pages that Sphinx (myst-nb) can render, without Quarto"
import hashlib, os, re, shutil, sys
from base64 import b64decode
from html import unescape
from importlib.metadata import version
from pathlib import Path
from fastcore.nbio import mk_cell, read_nb, write_nb
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import nbglob
from nbdev.processors import (FilterDefaults, add_links, clean_magics, filter_stream_, hide_, hide_line, populate_language,
    rm_export, rm_header_dash, strip_ansi, strip_hidden_metadata)

explanations = { # groups of the navigation, and the pages of `nbs/explanations` in them
    'Decide': 'which_loss which_rate bodies costs',
    'Look up': 'faq cheat_sheet fastai gallery',
    'Understand': 'transfer metrics measuring unknown direction_regularization ranking large_batches evidence evidence_details design'}
wings = ['files','losses','models','retrieval','deploy','web','data','train','look','study','cli'] # folders of `nbs/api`, the lowest first: one imports only from those before it
folded = 'evidence','evidence_details' # pages whose code draws stored results: it opens with a click
project_pages = dict(CONTRIBUTING='contributing', CHANGELOG='changelog')

_symbol = r'\[(`[^`]+`)\]\([^()\s]+\)'
_link = r'\[((?:[^\[\]]|\[`[^`]+`\]\([^()\s]+\))+)\](?=\([^()\s]+\))'
def link_symbols(cell):
    "nbdev's links of symbols, but for those within the text of another link"
    add_links(cell)
    if cell.cell_type=='markdown': cell.source = re.sub(_link, lambda m: '['+re.sub(_symbol, r'\1', m[1])+']', cell.source)

def drop_stderr(cell):
    "Warnings are for the author, not for the reader"
    if cell.cell_type=='code': cell.outputs = [o for o in cell.outputs if o.get('name')!='stderr']

def keep_together(cell):
    "In tables, no line ends within a mean with its interval but before the bracket"
    for o in cell.outputs if cell.cell_type=='code' else []:
        d = o.get('data', {})
        if 'text/html' in d: d['text/html'] = re.sub(r'(?<=\d) (±|to) (?=[-+\d])', r'&nbsp;\1&nbsp;', ''.join(d['text/html']))

def _columns(m):
    "A table whose columns of words are `words`, and those of long ones `long`; the others are numbers"
    rows = [re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', o, re.S) for o in re.findall(r'<tr.*?</tr>', m[0], re.S)]
    if re.search('(row|col)span', m[0]) or len({len(o) for o in rows})!=1: return m[0]
    texts = [[unescape(re.sub('<.*?>', '', o)) for o in col] for col in zip(*rows[1:])]
    def kind(col):
        if max(map(len, col), default=0)>28 and any(' ' in o for o in col): return 'long'
        return 'words' if any(re.search(r'(?!nan|True|False)[^\W\d_]{3}', o) for o in col) else ''
    kinds = [kind(o) for o in texts]
    return re.sub(r'<tr.*?</tr>', lambda r: _marked(r[0], iter(kinds)), m[0], flags=re.S)

def _marked(row, kinds): return re.sub(r'<(t[hd])(?=[ >])', lambda m: f'<{m[1]} class="{next(kinds)}"', row)

def align_columns(cell):
    "In tables of pandas, words are at the left and numbers at the right"
    for o in cell.outputs if cell.cell_type=='code' else []:
        d = o.get('data', {})
        if 'text/html' in d: d['text/html'] = re.sub(r'<table.*?</table>', _columns, ''.join(d['text/html']), flags=re.S)

def drop_empty(cells):
    "Leave out headings that have nothing below them, because what was there is not shown"
    def level(line): return len(m[1]) if (m := re.match(r'(#+) ', line)) else 9
    cells = [c for c in cells if c.source.strip()]
    for c,after in zip(cells, [*cells[1:], None]):
        *lines,last = c.source.rstrip().split('\n')
        first = level(after.source) if after and after.cell_type=='markdown' else 9*bool(after)
        if c.cell_type=='markdown' and first<=level(last)<9: c.source = '\n'.join(lines)
    return [c for c in cells if c.source.strip()]

class SiteFilter(FilterDefaults):
    "nbdev's own documentation processors, with cards of our own and without those that write Quarto syntax"
    def base_procs(self):
        from cards import cards
        return [populate_language, strip_ansi, hide_line, filter_stream_, rm_header_dash, link_symbols, cards,
            rm_export, clean_magics, hide_, strip_hidden_metadata, drop_stderr, align_columns, keep_together]

def page(nb_path, root):
    "Where the page of `nb_path` goes below `root`, named as nbdev names it: `00_core.ipynb` -> `core.ipynb`"
    rel = Path(nb_path).relative_to(root)
    return nbpath2html(rel).with_suffix('.ipynb')

def toctree(caption, docs): return f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n' + '\n'.join(docs) + '\n```'

def navigation(files, root):
    "Cell with the navigation: tutorials, the groups of explanations, the wings, and the project's own pages"
    def docs(folder): return [page(f, root).with_suffix('').as_posix() for f in sorted(files) if f.parent.name==folder]
    groups = {k:[f'explanations/{o}' for o in v.split() if f'explanations/{o}' in docs('explanations')] for k,v in explanations.items()}
    if left := set(docs('explanations'))-set(sum(groups.values(), [])): raise ValueError(f"{min(left)} is in no group of the navigation: see `explanations` in docs/nbsite.py.")
    groups = dict(Tutorials=docs('tutorials'), **groups, Reference=[*docs('api'), *(f'api/{w}/index' for w in wings), 'reference'], Project=project_pages.values())
    return mk_cell('\n\n'.join(toctree(k, v) for k,v in groups.items() if v), 'markdown')

def rooms_of(wing, files, root):
    "Cell with the navigation within a wing"
    docs = [page(f, root).stem for f in sorted(files) if f.parent.name==wing and f.stem!='index']
    return mk_cell('```{toctree}\n:hidden:\n\n' + '\n'.join(docs) + '\n```', 'markdown')

def title_of(nb):
    "The heading and the sentence below it"
    m = re.match(r'# (.+?)\n+(?:> (.+))?', nb.cells[0].source)
    return m[1],m[2] or ''

def reference(rooms):
    "Page of all public names: page -> its title, what it is about, and its symbols"
    from cards import contents
    parts = [f'## [{t}]({k})\n\n{about}\n\n{contents(room)}' for k,(t,about,room) in rooms.items()]
    return '# All names\n\n> What each module has for users, from the lowest module to the highest: one uses only those before it on this page. `from dmlfast.all import *` gives what one calls, about a hundred names; helpers are imported from their rooms.\n\n' + '\n\n'.join(parts) + '\n'

def build_pages(dest):
    "Write the processed notebooks to `dest`"
    from cards import contents
    cfg = get_config()
    root,base = cfg.nbs_path,f"{cfg.doc_host}{cfg.doc_baseurl}/"
    shutil.rmtree(dest, ignore_errors=True)
    nbs = sorted((Path(f) for f in nbglob(root)), key=str)
    done,rooms,full = {},{},{}
    for f in sorted(nbs, key=lambda f: (wings.index(f.parent.name) if f.parent.name in wings else -1, str(f))):
        done[f] = nb = read_nb(f)
        SiteFilter()(nb)
        if room := nb.pop('room', None):
            out = page(f, root).as_posix()
            rooms[out] = (*title_of(nb),room)
            full.update({f'{out.removesuffix(".ipynb")}.html#{o.name.lower()}':o.full for o in room})
            nb.cells.insert(1, mk_cell(contents(room), 'markdown'))
    def symbol(m): return f'[{m[1]}](#{full[m[2]]})' if m[2] in full else m[1] # a private name has no card to go to
    def in_dark(m):
        "A picture that is there a second time for dark pages, in both"
        dark = m[2].replace('.png', '_dark.png')
        return f'{m[0]}{{.only-light}}![{m[1]}]({dark}){{.only-dark}}' if (root/'images'/Path(dark).name).exists() else m[0]
    def mend(src):
        "Links to symbols and to notebooks, as Sphinx has them, and pictures for light and dark"
        src = re.sub(r'!\[(.*?)\]\(([^()\s]+\.png)\)', in_dark, src)
        src = re.sub(rf'\[(`[^`]+`)\]\({re.escape(base)}([^)#]*#[^)]+)\)', symbol, src)
        return re.sub(r'\]\(([^():]*?)([^/()\s:]+\.ipynb)', lambda m: f']({m[1]}{nbpath2html(m[2]).with_suffix(".ipynb")}', src)
    for f,nb in done.items():
        out = page(f, root)
        if f.stem=='index' and f.parent==root: nb.cells.append(navigation(nbs, root))
        if f.stem=='index' and f.parent.name in wings: nb.cells.append(rooms_of(f.parent.name, nbs, root))
        for c in nb.cells:
            c.metadata.pop('execution', None)
            if f.stem in folded and c.cell_type=='code': c.metadata['tags'] = ['hide-input']
            c.source = mend(c.source) if c.cell_type=='markdown' else re.sub(r'^#\| .*\n?', '', c.source, flags=re.M)
        nb.cells = drop_empty(nb.cells)
        nb.metadata = dict(kernelspec=dict(display_name='python3', language='python', name='python3'), language_info=dict(name='python'))
        (dest/out).parent.mkdir(parents=True, exist_ok=True)
        write_nb(nb, dest/out)
    for f in root.rglob('*'):
        if f.suffix in ('.png','.jpg','.svg','.gif','.md'):
            (dest/f.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(f, dest/f.relative_to(root))
    (dest/'reference.md').write_text(mend(reference(rooms)), encoding='utf-8')
    for a,b in project_pages.items(): shutil.copy2(cfg.config_path/f'{a}.md', dest/f'{b}.md')

def readme():
    "Write README.md from `index.ipynb`, as `nbdev-readme` would with Quarto: markdown, code, text outputs and images"
    cfg = get_config()
    nb,base,imgs = read_nb(cfg.nbs_path/cfg.readme_nb),f"{cfg.doc_host}{cfg.doc_baseurl}/",cfg.config_path/'index_files'
    raw = f'{cfg.git_url}/raw/{cfg.branch}'
    shutil.rmtree(imgs, ignore_errors=True)
    out = ['<!-- WARNING: THIS FILE WAS AUTOGENERATED FROM nbs/index.ipynb. DO NOT EDIT! -->']
    for i,c in enumerate(nb.cells):
        if 'hide' in c.directives: continue
        link_symbols(c)
        drop_stderr(c)
        if c.cell_type=='markdown':
            src = re.sub(r'!\[(.*?)\]\((?!\w+:)(.+?)\)', lambda m: f'<img src="{raw}/nbs/{m[2]}"{"" if m[2].endswith(".svg") else " width=720"} alt="{m[1]}">', c.source)
            out.append(re.sub(r'\]\(([^():]+\.ipynb)', lambda m: f']({base}{nbpath2html(Path(m[1])).as_posix()}', src))
        elif c.cell_type=='code':
            out.append(f'```python\n{c.source.strip()}\n```')
            for o in c.outputs:
                d = o.get('data', {})
                if 'image/png' in d:
                    imgs.mkdir(exist_ok=True)
                    (imgs/f'cell-{i}.png').write_bytes(b64decode(''.join(d['image/png'])))
                    out.append(f'<img src="{raw}/index_files/cell-{i}.png" width="640" alt="output of the cell above">')
                elif 'text/markdown' in d: out.append(''.join(d['text/markdown']))
                elif txt := ''.join(d.get('text/plain', o.get('text', ''))): out.append(f'```\n{txt.rstrip()}\n```')
    (cfg.config_path/'README.md').write_text('\n\n'.join(out)+'\n', encoding='utf-8')

def fingerprint(root):
    "Hash of all that a site is made of, and of what makes it"
    files = [f for o in ('nbs','docs','dmlfast','settings.ini','pyproject.toml','README.md',*(f'{p}.md' for p in project_pages))
        for f in ([root/o] if (root/o).is_file() else (root/o).rglob('*')) if f.is_file() and not {'_build','_pages','__pycache__','.ipynb_checkpoints'} & set(f.parts)]
    h = hashlib.sha256(repr([version(o) for o in ('sphinx','myst-nb','furo','nbdev','fastcore')]).encode())
    for f in sorted(files): h.update(f'{f.relative_to(root)} {hashlib.sha256(f.read_bytes()).hexdigest()}\n'.encode())
    return h.hexdigest()

def main():
    "`nbsite.py` builds the site into `docs/_build/html` unless it is there already; `nbsite.py readme` writes README.md"
    if sys.argv[1:]==['readme']: return readme()
    here = Path(__file__).parent.resolve()
    pages,html = here/'_pages',here/'_build'/'html'
    stamp,now = html/'.fingerprint',fingerprint(here.parent)
    if stamp.exists() and stamp.read_text()==now: return print(f'{html.relative_to(here.parent)} is up to date')
    from sphinx.cmd.build import main as sphinx
    from links import dead_links
    shutil.rmtree(html, ignore_errors=True)
    build_pages(pages)
    if status := sphinx(['-q', '-W', '--keep-going', '-E', '-c', str(here), str(pages), str(html), *sys.argv[1:]]): return status
    if dead := dead_links(html, here.parent): return '\n'.join(dead)
    stamp.write_text(now)

if __name__ == '__main__':
    os.chdir(get_config(Path(__file__).parent).config_path)
    sys.path.insert(0, '.')
    sys.exit(main())
