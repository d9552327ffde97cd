"""What makes a page hard to read: `python docs/readability.py` prints what falls short, and ends with 1 if anything does.

A page is a notebook of `nbs/`. Its prose is its markdown without code, formulas, tables and headings, and the docstrings of what it exports."""
import json, re, sys
from pathlib import Path

longest = 21 # words in a sentence, on average over a page
first_code = 150 # words before the first code, on pages that teach or describe code
avoid = { # a word, and what to say instead
    'reckoned':'computed', 'told from luck':'significant, or within noise', 'heaps':'clusters', 'whoever':'who', 'wherein':'in which', 'whence':'from where',
    'amongst':'among', 'utilise':'use', 'in order to':'to', 'as well as':'and', 'respectively':'name each', 'aforementioned':'name it', 'thereby':'so',
    'hitherto':'until now', 'notwithstanding':'in spite of', 'henceforth':'from here on', 'told apart':'separated, or differ beyond noise', 'makes good':'makes up for',
    'comes up to':'reaches', 'came up to':'reached', 'leverage':'use', 'very much':'much', 'it should be noted':'leave it out', 'simply':'leave it out', 'obviously':'leave it out',
    'as much so':'as much', 'nor do':'start a sentence with the subject', 'nor does':'start a sentence with the subject',
    'is another matter':'say how it differs', 'may well':'may', 'as it were':'leave it out',
    'of which the':'name it', 'cannot be told':'is unknown, or within noise', 'is wanted':'name who wants it', 'at all events':'leave it out', 'save for':'except',
    'whither':'where', 'as ever':'as usual', 'in the place of':'instead of', 'anew':'again', 'whichever':'the one that', 'as it came':'original', 'be had':'is available', 'of theirs':'their',
    'come to its end':'finish', 'takes away':'removes'}

def prose(text):
    "Sentences of markdown: no code, formulas, tables, headings, links' addresses"
    text = re.sub(r'```.*?```|\$\$.*?\$\$', '\n\n', text, flags=re.S)
    lines = [o for o in text.splitlines() if not re.match(r'\s*(\||#|!\[|\[!\[|:::)', o)]
    text = re.sub(r'\n\s*(?=[-*] |\d+\. )', '\n\n', '\n'.join(lines))
    text = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', text)
    text = re.sub(r'`[^`]*`|\$[^$]*\$', 'x', text)
    parts = [re.sub(r'^\s*(>|[-*]|\d+\.)\s+', '', o.strip()) for o in re.split(r'\n\s*\n', text)]
    return [s for o in parts for s in re.split(r'(?<=[.!?])["\')*_]*\s+(?=[^a-z])|:\s*$', ' '.join(o.split())) if s and len(s.split())>2]

def faults(nb, teaches):
    "What falls short on a page"
    cells = [(c['cell_type'], ''.join(c['source'])) for c in nb['cells']]
    sentences = [s for kind,src in cells if kind=='markdown' for s in prose(src)]
    docs = [s for kind,src in cells if kind=='code' and re.search(r'^#\| *export', src, re.M) for o in re.findall(r'^\s+"([A-Z][^"\n]+)"$', src, re.M) for s in prose(o)]
    words = sum(len(s.split()) for s in sentences)
    if len(sentences)>4 and words/len(sentences)>longest: yield f'{words/len(sentences):.1f} words to a sentence'
    for s in sentences+docs:
        for o,instead in avoid.items():
            if re.search(rf'\b{o}\b', s, re.I): yield f'"{o}" ({instead}): {s[:110]}'
    if not teaches: return
    before = 0
    for kind,src in cells:
        if kind=='markdown' and '```' in src: return (yield from _late(before+len(src.split('```')[0].split())))
        if kind=='markdown': before += len(src.split())
        elif not re.search(r'^#\| *(hide|default_exp)', src, re.M): return (yield from _late(before))

def _late(n):
    if n>first_code: yield f'the first code comes after {n} words'

def main():
    root = Path(__file__).parents[1]/'nbs'
    pages = [o for o in sorted(root.rglob('*.ipynb')) if '.ipynb_checkpoints' not in o.parts]
    found = [(o.relative_to(root), f) for o in pages for f in faults(json.loads(o.read_text(encoding='utf-8')), o.parent.name!='explanations' and o.stem!='index')]
    for o,f in found: print(f'{o}: {f}')
    print(f'{len(pages)} pages, {len(found)} things to mend')
    return min(len(found), 1)

if __name__=='__main__': sys.exit(main())
