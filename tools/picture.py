"Six figures of the demo run in one picture, for the README: `python tools/picture.py` after `make run`"
from pathlib import Path

import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
SHOWN = {'explore/figures/words.png': '01 · words left whole', 'explore/figures/tokenizers.png': '01 · what tokenizers cost',
         'mlm/figures/bits_per_byte.png': '02 · a masked model and its floors', 'qlora/figures/files.png': '03 · what a smaller file costs',
         'beir/figures/ndcg.png': '04 · search', 'probes/figures/layers.png': '05 · what the layers know'}

images = [(plt.imread(ROOT / 'models' / 'demo' / name), title) for name, title in SHOWN.items()]
rows = [images[i:i + 2] for i in (0, 2, 4)]
heights = [1 / sum(im.shape[1] / im.shape[0] for im, _ in row) for row in rows] # of a row as wide as the page
fig = plt.figure(figsize=(11, 11 * sum(heights) + 1.2))
page, top, gap = 11 * sum(heights) + 1.2, 1., .4
for row, height in zip(rows, heights):
    left, tall = 0., 11 * height / page
    for im, title in row:
        wide = height * im.shape[1] / im.shape[0]
        ax = fig.add_axes([left, top - gap / page - tall, wide * .98, tall * .98])
        ax.imshow(im)
        ax.set_title(title, fontsize=11, loc='left', weight='bold')
        ax.axis('off')
        left += wide
    top -= tall + gap / page
fig.savefig(ROOT / 'nbs' / 'images' / 'run.png', dpi=85)
