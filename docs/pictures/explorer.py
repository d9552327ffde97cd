"""The pictures of the explorer: `python docs/pictures/explorer.py FINDER IMAGES`, with Chromium.

`IMAGES` is the folder that `emoji.py` trains on, and `FINDER` an embedder of such a training, with the test emoji in its gallery. Openmoji are left out."""
import sys, tempfile
from base64 import b64decode
from pathlib import Path
from PIL import Image

root = Path(__file__).parents[2]
sys.path.insert(0, str(root/'tests'))
from browser import Browser
from dmlfast.deploy import load_embedder
from emoji import table

def shot(b, name):
    "What the browser shows, in light and in dark, as small files"
    for file,dark in ((f'{name}.png', False), (f'{name}_dark.png', True)):
        b.look(1280, 860, dark)
        b.eval('new Promise(o => setTimeout(o, 1500))')
        file = root/'nbs'/'images'/file
        file.write_bytes(b64decode(b.call('Page.captureScreenshot', format='png')['data']))
        Image.open(file).convert('RGB').quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)

def main(finder, images, query='oncoming-taxi/noto.png'):
    finder = load_embedder(finder)
    val = table(Path(images)).query("split=='val' and not path.str.contains('openmoji')")
    finder.calibrate(finder.embedded([Path(images)/o for o in val.path], labels=[*val.label]), 1e-3)
    finder.remove(item=lambda o: 'openmoji' in o)
    served = finder.explore(images, name='emoji', browser=False)
    with tempfile.TemporaryDirectory() as profile, Browser(profile, 1280, 860) as b:
        b.go(served.url)
        home = b.eval('location.origin')
        b.go(f'{home}/?q={finder.items.index(query)}&k=12')
        shot(b, 'explorer_search')
        b.go(f'{home}/map')
        b.wait('document.querySelector("canvas")!=null', 90)
        b.wait('!document.body.innerText.includes("Arranging")', 300)
        for _ in range(2): b.eval('[...document.querySelectorAll("button")].find(o => o.textContent.trim()=="+").click()')
        b.eval('new Promise(o => setTimeout(o, 30000))') # photos come one after the other
        shot(b, 'explorer_map')
        assert not b.faults, b.faults
    served.stop()

if __name__=='__main__': main(*sys.argv[1:])
