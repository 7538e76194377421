"""Thirteen layers and ten tasks of 5,000 words: probes fitted together, against a loop over scikit-learn.

    python bench/probes.py [--width 128] [--steps 200] [--repeats 3] [--small]

Words of UD Hindi PUD (`LAB_LM_SHARED`), ten of its features as tasks, hidden vectors of a masked model of 12 layers and the embedding table, trained for `--steps` steps on Hindi Wikipedia.
Four fifths of the words train, one fifth is test. The peer is `StandardScaler` and `LogisticRegression(C=.1, max_iter=300)` with their other defaults, for each layer and task by itself,
on the same float32 vectors, on one thread like ours. With their default tolerances the peer ends some 1e-5 to 5e-5 nats a word above the minimum, ours 2e-4 in the mean.
Printed: the median CPU seconds of several rounds of both in turn, their ratio, test accuracy of both (points), and the peer's fits that stopped at 300 steps.
"""
import argparse
import gzip
import statistics
import time
import warnings

import numpy as np
import torch

from lab_lm.core.paths import shared_data
from lab_lm.core.seed import seeded
from lab_lm.evals.fits import fit_linear_grid
from lab_lm.nets.encoder import word_states
from lab_lm.nets.native import NATIVE, NetConfig, Transformer, to_twin
from lab_lm.text.batches import masked_batches, rows
from lab_lm.text.morph import read_conllu
from lab_lm.text.tokenize import train_tokenizer
from lab_lm.train.learner import fit

TASKS = ['upos', 'deprel', 'Case', 'Gender', 'Number', 'Person', 'Aspect', 'direction', 'Tense', 'distance']


def label(sentence, number, task):
    "The label of one word, or nothing"
    word = sentence.tokens[number]
    if task == 'direction': return None if word.head <= 0 else 'before' if word.head - 1 < number else 'after'
    if task == 'distance': return None if word.head <= 0 else str(int(np.clip(word.head - 1 - number, -4, 4)))
    return getattr(word, task) if task in ('upos', 'deprel') else word.feats.get(task)


def labels(sentences, words):
    "Whole numbers [tasks, words], -1 for none"
    out = []
    for task in TASKS:
        found = [label(s, i, task) for s in sentences for i in range(len(s.tokens))][:words]
        names = {name: i for i, name in enumerate(sorted({f for f in found if f}))}
        out.append([names.get(f, -1) for f in found])
    return np.array(out)


def model_states(sentences, words, width, layers, steps):
    "float32 [layers + 1, words, width]"
    with gzip.open(shared_data('text/wiki_hi.txt.gz'), 'rt', encoding='utf-8') as lines: texts = [line.strip() for line in lines if len(line) > 100][:2000]
    tokenizer = train_tokenizer(texts, 'bpe', 4000)
    config = NetConfig(vocab_size=len(tokenizer), mode='masked', width=width, layers=layers, heads=width // 64, hidden=width * 3 // 2, init=width ** -.5,
                       pad_id=tokenizer.pad_token_id, max_length=256, **NATIVE['masked'])
    with seeded(0):
        model = to_twin(Transformer(config), ids=dict(bos_token_id=2, cls_token_id=2, eos_token_id=3, sep_token_id=3)).train()
        if steps: fit(model, masked_batches(rows(texts, tokenizer, 64), tokenizer, 16, rate=.3), steps, lr=2e-3 * (128 / width) ** .5)
    states = word_states(model.eval(), tokenizer, [[t.form for t in s.tokens] for s in sentences])
    return np.concatenate(states, 1)[:, :words]


def loop(x, y, train):
    "Guesses [layers, tasks, words] of scikit-learn, one fit after another, and how many stopped early"
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    out, early = np.full((len(x), *y.shape), -1), 0
    for layer, vectors in enumerate(x):
        for task, marks in enumerate(y):
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=.1, max_iter=300)).fit(vectors[train & (marks >= 0)], marks[train & (marks >= 0)])
            out[layer, task], early = probe.predict(vectors), early + (probe[-1].n_iter_.max() >= 300)
    return out, early


def timed(act):
    "What it gives, and its seconds of CPU time, which other programs on the machine disturb least"
    before = time.process_time()
    return act(), time.process_time() - before


def main(width, layers, words, steps, repeats):
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    sentences = [s for s in read_conllu(shared_data('treebanks/hi_pud.conllu.gz'))]
    sentences = sentences[:next(i for i in range(len(sentences)) if sum(len(s.tokens) for s in sentences[:i + 1]) >= words) + 1]
    x, y = model_states(sentences, words, width, layers, steps), labels(sentences, words)
    train = np.random.default_rng(0).random(words) < .8
    print(f'{len(x)} layers x {len(y)} tasks, {words} words, width {width}, {steps} training steps; labels {[int(t.max()) + 1 for t in y]}, words with one {[int((t >= 0).sum()) for t in y]}', flush=True)
    fit_linear_grid(x[:1], y, most=5)
    ours, theirs = [], []
    for _ in range(repeats):
        grid, seconds = timed(lambda: fit_linear_grid(x, y, train))
        ours.append(seconds)
        (guess, early), seconds = timed(lambda: loop(x, y, train))
        theirs.append(seconds)
        print(f'together {ours[-1]:.2f} s, loop {theirs[-1]:.2f} s, {theirs[-1] / ours[-1]:.1f} times', flush=True)
    there = (y >= 0) & ~train
    mine = grid.predict(x)
    points = np.array([[100 * ((m[h] == t[h]).mean() - (g[h] == t[h]).mean()) for m, g, t, h in zip(a, b, y, there)] for a, b in zip(mine, guess)])
    right = [100 * np.mean([(a[t][h] == y[t][h]).mean() for a in some for t, h in enumerate(there)]) for some in (mine, guess)]
    print(f'median: {statistics.median(ours):.2f} s against {statistics.median(theirs):.2f} s: {statistics.median(b / a for a, b in zip(ours, theirs)):.1f} times')
    print(f'mean accuracy {right[0]:.2f} against {right[1]:.2f}; differences of the {points.size} probes: mean {points.mean():+.2f}, '
          f'mean size {abs(points).mean():.2f}, largest {abs(points).max():.2f} points; '
          f'converged: {grid.converged.mean():.0%} (evaluations {np.nanmean(grid.steps):.0f} in the mean), the loop stopped {early} at its limit')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(width=128, layers=12, words=5000, steps=200, repeats=3).items(): parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--small', action='store_true', help='3 layers, 1,500 words, no training, one round')
    args = vars(parser.parse_args())
    if args.pop('small'): args |= dict(layers=2, words=1500, steps=0, repeats=1)
    main(**args)
