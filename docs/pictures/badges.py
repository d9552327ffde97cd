"The badges and the logo: `python docs/pictures/badges.py` writes them to `nbs/images` and `docs/_static`"
from pathlib import Path
from PIL import ImageFont
import matplotlib

root = Path(__file__).parents[2]
font = ImageFont.truetype(str(Path(matplotlib.get_data_path())/'fonts'/'ttf'/'DejaVuSans.ttf'), 11)
badges = dict(github=('GitHub','dmlfast/dmlfast','#24292f'), licence=('licence','Apache 2.0','#0b6e4f'), python=('Python','3.11+','#0b6e4f'), fastai=('built on','fastai, timm, faiss','#0b6e4f'))

def badge(left, right, colour):
    a,b = (int(font.getlength(o))+14 for o in (left,right))
    def text(s, x, w): return f'<text x="{x+w/2}" y="14" textLength="{w-14}" text-anchor="middle">{s}</text>'
    return f'''<svg xmlns="http://www.w3.org/2000/svg" width="{a+b}" height="20" role="img" aria-label="{left}: {right}"><clipPath id="r"><rect width="{a+b}" height="20" rx="4"/></clipPath>
<g clip-path="url(#r)"><rect width="{a}" height="20" fill="#57606a"/><rect x="{a}" width="{b}" height="20" fill="{colour}"/></g>
<g fill="#fff" font-family="DejaVu Sans,Verdana,Geneva,sans-serif" font-size="11">{text(left, 0, a)}{text(right, a, b)}</g></svg>
'''

dots = '<circle cx="9" cy="22" r="6" fill="#0b6e4f"/><circle cx="19" cy="25" r="5" fill="#5fd3a6"/><circle cx="24" cy="8" r="5" fill="#c8553d"/>'

for k,o in badges.items(): (root/'nbs'/'images'/f'badge-{k}.svg').write_text(badge(*o), encoding='utf-8')
(root/'docs'/'_static'/'favicon.svg').write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">\n  {dots}\n</svg>\n', encoding='utf-8')
for mode,ink in dict(light='#1b1f24', dark='#e6e8eb').items():
    (root/'docs'/'_static'/f'logo-{mode}.svg').write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 132 36" role="img" aria-label="dmlfast">{dots}'
        f'<text x="38" y="27" font-family="Inter,system-ui,sans-serif" font-size="24" font-weight="650" fill="{ink}" textLength="90">dmlfast</text></svg>\n', encoding='utf-8')
