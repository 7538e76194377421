"""Does a model that has learned a language pass its minimal pairs, and does one that has learned nothing fail to?

    python bench/pairs.py [--lang hi,ta] [--sentences 50000] [--steps 1600] [--looks 8] [--seeds 4] [--small]

Claim: a small causal model trained on sentences of a pocket language answers at least 95 % of its minimal pairs, at most 5 % of the same pairs with exchanged
labels, and the interval of untrained models (over seeds and pairs) covers 50 % where the two sentences have as many tokens on average. The peers stand in the
same table: what length, a unigram and a trigram of the same training text answer, and the same trained model under the rules of other harnesses. Pairs whose
good or bad sentence stands in the training text are left out and counted. Half of the training sentences are as the grammar draws them, half are good sides of other
pairs, so that no construction is too rare to be learned; wrong sentences are never seen. One thread, rows of 64 tokens packed from single sentences.
"""
import argparse
import os
import random
import tempfile
import time

for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(name, '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

import numpy as np  # noqa: E402
import torch  # noqa: E402

from lab_lm.evals.pair_rules import rule_table  # noqa: E402
from lab_lm.evals.pairs import pair_credit, pair_floors, pair_gaps, pair_scores, pair_tokens, summed  # noqa: E402
from lab_lm.evals.scorers import scorer  # noqa: E402
from lab_lm.evals.stats import bootstrap_grid  # noqa: E402
from lab_lm.nets.transformer import NATIVE, NetConfig, Transformer  # noqa: E402
from lab_lm.text.batches import read_stream, write_stream  # noqa: E402
from lab_lm.text.pair_files import balanced, length_table, swapped  # noqa: E402
from lab_lm.text.rows import PackedRows, tokens_of  # noqa: E402
from lab_lm.text.suites import suite  # noqa: E402
from lab_lm.text.tiny import pocket_pairs, pocket_sentences  # noqa: E402
from lab_lm.text.tokenize import train_tokenizer  # noqa: E402
from lab_lm.train.feed import Feed  # noqa: E402
from lab_lm.train.learner import Learner  # noqa: E402
from lab_lm.train.objectives import Causal  # noqa: E402
from lab_lm.train.schedules import Schedule  # noqa: E402
from lab_lm.train.training import Training  # noqa: E402


def net(tokenizer, args, seed):
    "A causal model with the weights it is born with"
    torch.manual_seed(seed)
    return Transformer(NetConfig(vocab_size=len(tokenizer), layers=args.layers, width=args.width, heads=4, max_length=64, pad_id=tokenizer.pad_token_id, **NATIVE['causal']))


def train(texts, tokenizer, args, look, seed=0):
    "The trained model; `look(model)` now and then"
    model = net(tokenizer, args, seed)
    with tempfile.TemporaryDirectory() as folder:
        rows = PackedRows(*read_stream(write_stream(tokens_of(texts, tokenizer), f'{folder}/stream', len(tokenizer))), 64)
        training = Training(steps=args.steps, lr=args.lr, optimizer=args.optimizer, weight_decay=.01, schedule=Schedule(warmup=.1), precision='fp32', seed=seed,
                            evaluate_every=max(1, args.steps // args.looks))
        Learner(model, Feed(rows, Causal(), args.batch, seed), training, evaluate=look).fit()
    return model


def sentences(lang, args):
    "Different correct sentences, in random order: as the grammar draws them, and as many good sides of pairs of every phenomenon, since some constructions are rare"
    own = [s.text for s in pocket_sentences(lang, args.sentences // 2, seed=args.text_seed)]
    texts = list(dict.fromkeys(own + [p.good for p in pocket_pairs(lang, args.sentences // 2, seed=args.text_seed + 1000)]))
    random.Random(0).shuffle(texts)
    return texts


def measured(lang, args):
    "Everything about one language, printed"
    texts = sentences(lang, args)
    every = suite(lang, n=args.pairs, seed=1)
    seen = set(texts)
    pairs = [p for p in every if p.good not in seen and p.bad not in seen]
    tokenizer = train_tokenizer(texts, 'akshara_bpe', args.vocab)
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    print(f'{lang}: {len(texts):,} different sentences, {sum(map(len, ids)):,} tokens, vocabulary {len(tokenizer)}; {len(pairs)} pairs of {len({p.phenomenon for p in pairs})} phenomena, '
          f'{len(every) - len(pairs)} with a side in the training text left out', flush=True)
    floors = pair_floors(tokenizer, pairs, ids)
    def scored(model, some=pairs, floors=floors): return pair_scores(summed(pair_tokens(scorer(model, tokenizer, 'causal'), some)), some, floors)
    even = set(balanced(pairs, lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)))
    stays = np.array([p in even for p in pairs])
    born = np.array([pair_credit(summed(pair_tokens(scorer(net(tokenizer, args, seed), tokenizer, 'causal'), pairs))) for seed in range(args.seeds)])
    print(f'  {args.seeds} untrained models, all pairs: {bootstrap_grid(born)}; balanced in tokens: {bootstrap_grid(born[:, stays])}', flush=True)
    print('  ' + ', '.join(f'{k} {pair_credit(f).mean():.1%}' for k, f in floors.items()), flush=True)

    def look(model):
        now = scored(model)
        poor = sorted((s.value, k.removeprefix('accuracy/')) for k, s in now.items() if '/' in k and s.value < .9)
        print(f"  {time.perf_counter() - began:4.0f} s: {now['accuracy']}, macro {now['macro'].value:.3f}; below .9: {', '.join(f'{k} {v:.2f}' for v, k in poor) or 'none'}", flush=True)
        return dict(accuracy=now['accuracy'].value)

    began = time.perf_counter()
    model = train(texts, tokenizer, args, look)
    tokens = pair_tokens(scorer(model, tokenizer, 'causal'), pairs)
    done, turned = scored(model), scored(model, swapped(pairs), {})
    print(f"  trained {args.steps} steps of {args.batch * 64} tokens: {done['accuracy']}; labels exchanged: {turned['accuracy']}")
    shorter = {r['phenomenon']: r['shorter_wins'] for r in length_table(pairs)}
    for row in pair_gaps(summed(tokens), pairs):
        s = done[f"accuracy/{row['phenomenon']}"]
        print(f"    {row['phenomenon']:<24} {s}  shorter {shorter[row['phenomenon']]:.2f} unigram {s.baselines['unigram']:.2f} trigram {s.baselines['trigram']:.2f}  "
              f"gap {row['mean'].value:5.1f} sd {row['sd']:4.1f} nats")
    for row in rule_table(tokens, pairs): print(f"    {row['rule']:<16} {row['accuracy']:.3f}, labels exchanged {row['swapped']:.3f}")
    worst = np.argsort([b - a for a, b in summed(tokens)])[:args.worst]
    for i in worst: print(f'    wrong: {pairs[i].phenomenon}: {pairs[i].good} / {pairs[i].bad}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(sentences=50_000, steps=1600, batch=16, vocab=2500, width=128, layers=2, looks=8, seeds=4, pairs=50, text_seed=0, worst=5).items():
        parser.add_argument(f'--{name.replace("_", "-")}', type=int, default=default)
    parser.add_argument('--lang', default='hi,ta', help='pocket languages')
    parser.add_argument('--lr', type=float, default=5e-3)
    parser.add_argument('--optimizer', default='adamw')
    parser.add_argument('--small', action='store_true', help='seconds instead of minutes; shows that it runs')
    args = parser.parse_args()
    if args.small: args.sentences, args.steps, args.width, args.layers, args.looks, args.seeds, args.pairs = 1500, 40, 32, 1, 2, 2, 10
    torch.set_num_threads(1)
    for lang in args.lang.split(','): measured(lang, args)


if __name__ == '__main__': main()
