"Six figures of the demo run in one picture, for the README: `python tools/picture.py` after `make run`"
from pathlib import Path

import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
SHOWN = {'explore/figures/words.png': '01 · what the usual pattern leaves whole', 'explore/figures/tokenizers.png': '01 · what tokenizers cost',
         'mlm/figures/bits_per_byte.png': '02 · a masked model and its floors', 'qlora/figures/nf4.png': '03 · what 4 bits do to weights',
         'beir/figures/ndcg.png': '04 · search', 'probes/figures/layers.png': '05 · what the layers know'}

fig, axes = plt.subplots(3, 2, figsize=(11, 8.4), layout='constrained')
for ax, (name, title) in zip(axes.flat, SHOWN.items()):
    ax.imshow(plt.imread(ROOT / 'models' / 'demo' / name))
    ax.set_title(title, fontsize=10, loc='left')
    ax.axis('off')
fig.savefig(ROOT / 'nbs' / 'images' / 'run.png', dpi=80)
