"""Which recipe learns more from the same tokens: hybrid against causal and masked, Muon against AdamW; 3 seeds, with intervals

    python bench/quality.py [--tokens 400000] [--batch 8] [--share 0.5] [--only masked] [--out results.jsonl]

Text: Hindi Wikipedia and Premchand's stories, and for every run alike 10 % (of the characters) of text in pocket Hindi, so that the vocabulary of the
minimal pairs is known; pairs whose good sentence stands in the training text are left out. Akshara BPE of 8,000, a transformer of 4 layers of 128,
rows of 128 tokens, a linear schedule. One thread a process, two processes at a time.

Every finished run is a line of the results file, with what each text and each pair cost; it is not done again. Each mode has a sweep of the rates of its
own (seed 0): a rate that is right for a causal model can leave a masked one on the plateau of token frequencies. Then come the seeds. Muon moves the matrices of the
layers only; everything else keeps AdamW and AdamW's best rate. Each mode then uses the optimiser that did better on it.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pretraining import CACHE, SMALL, tokenizer_of

SEEDS, LENGTH, VOCAB, LOOKS = (0, 1, 2), 128, 3000 if SMALL in sys.argv else 8000, 20
RATES = {'causal': {'adamw': (3e-3, 6e-3, 1.2e-2), 'muon': (1.5e-3, 3e-3, 6e-3)}, 'masked': {'adamw': (7.5e-4, 1.5e-3, 3e-3), 'muon': (1.5e-3, 3e-3, 6e-3)},
         'hybrid': {'adamw': (1.5e-3, 3e-3, 6e-3), 'muon': (1.5e-3, 3e-3, 6e-3)}}
SHAPE = dict(layers=4, width=128, heads=4)


def corpus():
    "Training texts, held-out texts (whole stories and one paragraph in twenty), and pairs"
    from lab_lm.core.paths import shared_data
    from lab_lm.text.sources import read_records
    from lab_lm.text.tiny import pocket_corpus, pocket_pairs
    parts = [shared_data(f'text/{name}') for name in ('wiki_hi.txt.gz', 'premchand_hi.jsonl.gz')]
    if None in parts: raise SystemExit('wiki_hi.txt.gz and premchand_hi.jsonl.gz are absent; set LAB_LM_SHARED to the folder that holds text/')
    held, train = [], []
    for record in (r for part in parts for r in read_records(part, 'hi')):
        lines = [line.strip() for line in record.text.splitlines() if len(line.strip()) > 40]
        (held if zlib.crc32(record.text.encode()) % 20 == 0 else train).extend(lines)
    pocket, room = [], sum(map(len, train)) / 9
    for record in pocket_corpus('hi', int(room / 150), seed=1):
        if room > 0: pocket.append(record.text); room -= len(record.text)
    joined = '\n'.join(pocket)
    pairs = [p for p in pocket_pairs('hi', 660, seed=2) if p.good not in joined]
    held = sorted(held, key=lambda t: zlib.crc32(t.encode()))[:300]
    return (train[::40] + pocket[::40], held[:10], pairs[:22]) if SMALL in sys.argv else (train + pocket, held, pairs)


def key(run): return json.dumps(run, sort_keys=True)


# ---- one run in its process

def objective(run, tokenizer):
    from lab_lm.train.objectives import Causal, Hybrid, Masked, MaskedNext
    if run['mode'] == 'causal': return Causal()
    masked = Masked(tokenizer, .3, split=(1., 0., 0.))
    return masked if run['mode'] == 'masked' else Hybrid(MaskedNext(masked), run['share'])


class Next:
    "A hybrid model, which predicts hidden tokens one place to the left, read as if it did so in place"
    def __init__(self, inner): self.inner, self.config = inner, getattr(inner, 'config', None)
    def __getattr__(self, name): return getattr(self.inner, name)

    def __call__(self, **inputs):
        out = self.inner(**inputs)
        out.logits = out.logits.roll(1, 1)
        return out


def readers(model, mode):
    "The ways of reading that a model has"
    from lab_lm.evals.causal import in_mode
    ways = {'causal': in_mode(model, causal=True)} if mode != 'masked' else {}
    if mode != 'causal': ways['masked'] = in_mode(model, causal=False) if mode == 'masked' else Next(in_mode(model, causal=False))
    return ways


def measure(model, mode, tokenizer, held, pairs):
    "What every text and every pair costs in each way of reading that the model has"
    from lab_lm.evals.causal import causal_nats, causal_rows, text_sums
    from lab_lm.evals.lm import masked_nats, masked_rows
    from lab_lm.evals.pairs import pair_nats
    from lab_lm.evals.scorers import scorer
    out, ways = {}, readers(model, mode)
    if 'causal' in ways:
        rows = causal_rows(tokenizer, held)
        sums = np.array([text_sums(*each) for each in zip(rows, *causal_nats(ways['causal'], tokenizer, rows, LENGTH))])
        out['causal'] = dict(nats=sums[:, 0].tolist(), bytes=sums[:, 3].tolist())
        out['pairs_causal'] = pair_nats(scorer(ways['causal'], tokenizer), pairs).tolist()
    if 'masked' in ways:
        rows = masked_rows(tokenizer, held, max_length=LENGTH)
        nats, size = np.zeros(len(held)), np.zeros(len(held))
        for row, cost in zip(rows, masked_nats(ways['masked'], tokenizer, rows)): nats[row.text] += cost.sum(); size[row.text] += row.bytes.sum()
        out['masked'] = dict(nats=nats.tolist(), bytes=size.tolist())
        out['pairs_masked'] = pair_nats(scorer(ways['masked'], tokenizer, 'masked'), pairs).tolist()
    return out


def watching(mode, tokenizer, texts):
    "From a model to its held-out loss: nats a token, the mean over its ways of reading"
    from lab_lm.evals.causal import causal_nats, causal_rows
    from lab_lm.evals.lm import masked_nats, masked_rows
    lines, holes = causal_rows(tokenizer, texts), masked_rows(tokenizer, texts, max_length=LENGTH)
    cost = dict(causal=lambda net: causal_nats(net, tokenizer, lines, LENGTH)[0], masked=lambda net: masked_nats(net, tokenizer, holes))
    return lambda net: dict(held_out=float(np.mean([np.concatenate(cost[way](read)).mean() for way, read in readers(net, mode).items()])))


def one(run):
    "In the child: train, look at the held-out loss on the way, measure; the result is one line"
    import torch
    from lab_lm.nets.transformer import NATIVE, NetConfig, Transformer
    from lab_lm.text.batches import read_stream, write_stream
    from lab_lm.text.rows import PackedRows, tokens_of
    from lab_lm.train.feed import Feed
    from lab_lm.train.learner import Learner
    from lab_lm.train.optim import make_optimizer
    from lab_lm.train.schedules import Schedule
    from lab_lm.train.training import Training
    torch.set_num_threads(1)
    train, held, pairs = corpus()
    tokenizer = tokenizer_of(train, VOCAB)
    torch.manual_seed(run['seed'])
    model = Transformer(NetConfig(vocab_size=len(tokenizer), mode=run['mode'], positions='rotary', max_length=LENGTH, pad_id=tokenizer.pad_token_id,
                                  init=SHAPE['width'] ** -.5, **SHAPE, **NATIVE['masked']))
    steps = max(LOOKS, round(run['tokens'] / run['batch'] / LENGTH))
    rest = {n: run['rest'] / run['lr'] for n, p in model.named_parameters() if not n.startswith('blocks.') or p.ndim < 2}
    with tempfile.TemporaryDirectory() as folder:
        rows = PackedRows(*read_stream(write_stream(tokens_of(train, tokenizer), f'{folder}/stream', len(tokenizer))), LENGTH)
        training = Training(steps=steps, lr=run['lr'], optimizer=run['optimizer'], weight_decay=.1, schedule=Schedule(name='linear', warmup=.1), seed=run['seed'],
                            evaluate_every=max(1, steps // LOOKS))
        log = Learner(model, Feed(rows, objective(run, tokenizer), run['batch'], seed=run['seed']), training, evaluate=watching(run['mode'], tokenizer, held[:60]),
                      optimizer=make_optimizer(run['optimizer'], model, run['lr'], weight_decay=.1, rates=rest)).fit()
    looks = [[row['step'] + 1, row['held_out']] for row in log if 'held_out' in row]
    print(json.dumps(dict(run=run, steps=steps, looks=looks, **measure(model, run['mode'], tokenizer, held, pairs))))


# ---- the parent

class Results:
    "The lines of finished runs; what is missing is run, two at a time"
    def __init__(self, path):
        self.path, self.lock = Path(path), threading.Lock()
        lines = self.path.read_text(encoding='utf-8').splitlines() if self.path.exists() else []
        self.found = {key(r['run']): r for r in map(json.loads, (line for line in lines if line.endswith('}')))}

    def need(self, runs):
        "The results of these runs, in order"
        missing = [r for r in {key(r): r for r in runs}.values() if key(r) not in self.found]
        with ThreadPoolExecutor(2) as pool: list(pool.map(self._do, missing))
        return [self.found[key(r)] for r in runs]

    def _do(self, run):
        began = time.perf_counter()
        environment = dict(os.environ, OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1', IN_TEST='1')
        done = subprocess.run([sys.executable, __file__, '--one', json.dumps(run), *([SMALL] if SMALL in sys.argv else [])], capture_output=True, text=True, env=environment)
        if done.returncode: raise RuntimeError(done.stderr[-3000:])
        line = done.stdout.splitlines()[-1]
        with self.lock:
            self.found[key(run)] = json.loads(line)
            with open(self.path, 'a', encoding='utf-8') as file: file.write(line + '\n')
            print(f"  {time.perf_counter() - began:4.0f} s  {' '.join(f'{k}={v}' for k, v in run.items())}", flush=True)


def relative(a, b, part, draws=4000):
    "Bits per byte of runs `a` over those of `b`, less one, in per cent: value, and interval over texts and seeds drawn together"
    cost = np.array([[r[part]['nats'] for r in some] for some in (a, b)])  # [2, seeds, texts]
    rng, (_, seeds, texts) = np.random.default_rng(0), cost.shape
    ratio = lambda some: 100 * (some[0].sum() / some[1].sum() - 1)  # The bytes are the same
    drawn = [ratio(cost[:, rng.integers(0, seeds, seeds)][:, :, rng.integers(0, texts, texts)]) for _ in range(draws)]
    return ratio(cost), *np.quantile(drawn, [.025, .975])


def bits(runs, part):
    "Bits per byte of each seed"
    return [sum(r[part]['nats']) / np.log(2) / sum(r[part]['bytes']) for r in runs]


def accuracy(runs, *parts):
    "[seeds, pairs]: 1, one half for a tie, 0; costs of several ways of reading are added"
    from lab_lm.evals.pairs import pair_credit
    return np.array([pair_credit(sum(np.array(r[p]) for p in parts)) for r in runs])


def gain(a, b, draws=4000):
    "Difference of two accuracies in points: value, and interval over pairs and seeds drawn together"
    rng, (seeds, pairs) = np.random.default_rng(0), a.shape
    drawn = [100 * (a - b)[rng.integers(0, seeds, seeds)][:, rng.integers(0, pairs, pairs)].mean() for _ in range(draws)]
    return 100 * (a - b).mean(), *np.quantile(drawn, [.025, .975])


def steps_to(looks, loss):
    "Steps until a loss, on the line between two looks; None if never"
    for (s0, l0), (s1, l1) in zip(looks, looks[1:]):
        if l1 <= loss: return s0 + (l0 - loss) / (l0 - l1) * (s1 - s0)
    return None


SHARES = dict(causal=1., masked=0.)


def optimisers(results, mode, tokens, batch, share):
    "Muon against AdamW on one mode, both at their best rates; returned is what did better"
    base, best = dict(mode=mode, tokens=tokens, batch=batch, share=SHARES.get(mode, share)), {}
    for o, rates in RATES[mode].items():
        every = results.need([base | dict(optimizer=o, lr=lr, rest=best.get('adamw', lr), seed=0) for lr in rates])
        final = {r['run']['lr']: r['looks'][-1][1] for r in every}
        best[o] = min(final, key=final.get)
        print(f"  {mode}, {o}: held-out loss by rate: {', '.join(f'{lr:g}: {loss:.3f}' for lr, loss in final.items())}" + (' (best at the edge of the sweep)' if best[o] in (rates[0], rates[-1]) else ''), flush=True)
    def seeds(optimizer, tokens): return results.need([base | dict(optimizer=optimizer, lr=best[optimizer], rest=best['adamw'], seed=s, tokens=tokens) for s in SEEDS])
    adamw, muon = (seeds(o, tokens) for o in RATES[mode])
    for a, m in zip(adamw, muon):
        at = steps_to(m['looks'], a['looks'][-1][1])
        print(f"  seed {a['run']['seed']}: AdamW ends at {a['looks'][-1][1]:.4f} after {a['steps']} steps; Muon ends at {m['looks'][-1][1]:.4f} and "
              + (f"passes AdamW's end after {at:.0f} steps, {at / a['steps']:.0%}" if at else "does not reach AdamW's end"))
    part = 'masked' if mode == 'masked' else 'causal'
    better = relative(muon, adamw, part)[0] < 0
    for name, less in (('as many steps', 1.), *([('80 % of the steps, its own whole schedule', .8)] if better else [])):
        print('  Muon with {}: bits per byte {:+.2f} % against AdamW [{:+.2f}, {:+.2f}]'.format(name, *relative(seeds('muon', round(less * tokens)), adamw, part)), flush=True)
    return dict(optimizer='muon' if better else 'adamw', lr=best['muon' if better else 'adamw'], rest=best['adamw'])


def modes(results, tokens, batch, share, rates):
    "Hybrid against its parents, each with the optimiser and the rate that suit it"
    runs = results.need([dict(mode=m, tokens=tokens, batch=batch, share=SHARES.get(m, share), seed=s, **rates[m]) for m in rates for s in SEEDS])
    causal, masked, hybrid = (runs[i:i + len(SEEDS)] for i in range(0, len(runs), len(SEEDS)))
    for part, parent in (('causal', causal), ('masked', masked)):
        shown = lambda runs: ' '.join(f'{b:.4f}' for b in bits(runs, part))
        print('  {} mode, bits per byte by seed: parent {}; hybrid {}; hybrid {:+.2f} % [{:+.2f}, {:+.2f}]'.format(part, shown(parent), shown(hybrid), *relative(hybrid, parent, part)))
    scores = {'causal': accuracy(causal, 'pairs_causal'), 'masked': accuracy(masked, 'pairs_masked'), 'hybrid read causally': accuracy(hybrid, 'pairs_causal'),
              'hybrid read masked': accuracy(hybrid, 'pairs_masked'), 'hybrid, both costs added': accuracy(hybrid, 'pairs_causal', 'pairs_masked')}
    print('  pairs in pocket Hindi: ' + '; '.join(f'{k} {s.mean():.1%}' for k, s in scores.items()))
    for name in list(scores)[2:]:
        for parent in ('causal', 'masked'): print('  {} less {}: {:+.1f} points [{:+.1f}, {:+.1f}]'.format(name, parent, *gain(scores[name], scores[parent])))


def floors(tokens):
    "What counting achieves on the same texts and pairs"
    from lab_lm.evals.causal import causal_rows, causal_scores, floor_costs, text_sums
    from lab_lm.evals.pairs import pair_floors, pair_scores
    train, held, pairs = corpus()
    tokenizer = tokenizer_of(train, VOCAB)
    ids, rows = tokenizer(train, add_special_tokens=False).input_ids, causal_rows(tokenizer, held)
    print(f'{sum(map(len, ids)):,} tokens of training text, {len(held)} held-out texts, {len(pairs)} pairs; runs of {tokens:,} tokens')
    of = {k: causal_scores([text_sums(*each) for each in zip(rows, *c)])['bits_per_byte'].value for k, c in floor_costs(ids, rows, len(tokenizer)).items()}
    print('  counting all the training text, bits per byte: ' + ', '.join(f'{k} {v:.4f}' for k, v in of.items()))
    print('  counting, pairs: ' + ', '.join(f'{k} {pair_scores(f, pairs)["accuracy"].value:.1%}' for k, f in pair_floors(tokenizer, pairs, ids).items()), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tokens', type=int, default=400_000, help='tokens of training in each run')
    parser.add_argument('--batch', type=int, default=8, help='rows of 128 tokens in a step')
    parser.add_argument('--only', choices=list(RATES), help="Muon against AdamW on this mode, and nothing else")
    parser.add_argument('--share', type=float, default=.5, help='of the rows of the hybrid that are causal')
    parser.add_argument('--out', default=str(CACHE / 'quality.jsonl'))
    parser.add_argument(SMALL, action='store_true', help='few texts and pairs, to see that everything runs')
    parser.add_argument('--one', type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one: return one(given.one)
    began = time.perf_counter()
    Path(given.out).parent.mkdir(parents=True, exist_ok=True)
    results = Results(given.out)
    floors(given.tokens)
    print('Muon against AdamW', flush=True)
    rates = {mode: optimisers(results, mode, given.tokens, given.batch, given.share) for mode in ([given.only] if given.only else RATES)}
    if not given.only:
        print('hybrid against its parents')
        modes(results, given.tokens, given.batch, given.share, rates)
    print(f'  {(time.perf_counter() - began) / 60:.1f} minutes; every run: {given.out}')


if __name__ == '__main__': main()
