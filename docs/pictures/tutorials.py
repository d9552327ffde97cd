"""The pictures on top of the tutorials: outputs of their own cells, as they are stored.

    python docs/pictures/tutorials.py

writes them to `nbs/images`. Run it after the outputs of a tutorial were stored anew."""
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from PIL import Image
from fastcore.nbio import read_nb

tops = { # a tutorial, and how the cell begins whose picture is on its top
    '01_quick_start':'learn.show_results(', '02_your_own_images':'asked = ', '04_choosing_a_loss':'assert study.best_value',
    '05_self_supervised_ranking':'ssr = ', '06_reading_results':'interp.plot_most_confused(', '08_reproducing':'pairs = ', '10_which_one_or_none':'photo = '}

def picture(nb, begins):
    "The first picture that a cell has stored"
    cell, = [c for c in nb.cells if c.cell_type=='code' and c.source.startswith(begins)]
    return next(b64decode(''.join(v)) for o in cell.outputs for k,v in o.get('data', {}).items() if k=='image/png')

def main():
    nbs = Path(__file__).parents[2]/'nbs'
    for name,begins in tops.items():
        im = Image.open(BytesIO(picture(read_nb(nbs/'tutorials'/f'{name}.ipynb'), begins))).convert('RGBA')
        im.thumbnail((1200,1200))
        im.quantize(128, method=Image.Quantize.FASTOCTREE).save(nbs/'images'/f'{name[3:]}.png', optimize=True)

if __name__=='__main__': main()
