"Dead links of a built site: to pages, files and anchors, and to lines of the repository's files; other sites are not asked"
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
from nbdev.config import get_config

class Page(HTMLParser):
    "Links and ids of a page"
    def __init__(self, text):
        super().__init__()
        self.links,self.ids = [],set()
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        self.links += [d[k] for k in ('href','src') if d.get(k)]
        self.ids |= {d[k] for k in ('id','name') if d.get(k)}

@cache
def parsed(file): return Page(file.read_text(encoding='utf-8'))

def fault(url, page, site, root, cfg):
    "What is wrong with `url` on `page`, or nothing"
    source,own = re.escape(cfg.git_url),f'{cfg.doc_host}{cfg.doc_baseurl}/'
    if m := re.match(rf'{source}/(?:blob|raw)/{cfg.branch}/([^#]+)(?:#L(\d+))?', url):
        file = root/unquote(m[1])
        if not file.is_file(): return 'there is no such file'
        if m[2] and int(m[2])>len(file.read_text(encoding='utf-8').splitlines()): return 'the file has no such line'
    if url.startswith(own): url = urljoin(site.as_uri()+'/', url.removeprefix(own))
    url,anchor = urldefrag(urljoin(page.as_uri(), url))
    if urlsplit(url).scheme!='file': return
    file = Path(unquote(urlsplit(url).path))
    if file.is_dir(): file = file/'index.html'
    if not file.is_file(): return 'there is no such page'
    if anchor and file.suffix=='.html' and unquote(anchor) not in parsed(file).ids: return 'there is no such anchor'

def left_as_text(html):
    "Addresses of links that a page shows as they were written; what is in blocks of code is meant to be"
    return re.findall(r'\]\((https?://[^)\s]*|[^)\s]*\.ipynb[^)\s]*)\)', re.sub(r'<pre.*?</pre>', '', html, flags=re.S))

def dead_links(site, root):
    "A line for each dead link on the pages of `site` and in README.md of the repository at `root`"
    cfg,site = get_config(root),Path(site).resolve()
    parsed.cache_clear()
    links = [(f, o) for f in sorted(site.rglob('*.html')) for o in parsed(f).links]
    text = (Path(root)/'README.md').read_text(encoding='utf-8')
    links += [(site/'README.md', o) for o in re.findall(r'(?:\]\(|src=")(https?://[^)"\s]+)', text)]
    dead = {f'dead link: {f.relative_to(site)}: {o}: {bad}' for f,o in links if (bad := fault(o, f, site, Path(root), cfg))}
    return sorted(dead | {f'dead link: {f.relative_to(site)}: {o}: it stayed text' for f in site.rglob('*.html') for o in left_as_text(f.read_text(encoding='utf-8'))})
