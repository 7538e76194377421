"""BM25 against bm25s (Lù 2024): the same terms, the same scores, and how long each takes.

Claim: on the protocol of the MTEB leaderboard (default pattern, English stop words, English Snowball stemmer) our index gives bm25s' scores, is made
in no more time than bm25s needs to tokenise and index, and answers no slower. Both run in this process, one after the other, on one thread; medians of
several rounds, and the ratio ours / bm25s.

    python bench/bm25.py [--small] [--rounds 3]

Without --small: SciFact (5,183 abstracts, 809 claims) beside the project, and 50,000 made-up passages. With it: 2,000 made-up passages alone.
"""
import argparse
import json
import os
import random
import statistics
import time

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ['IN_TEST'] = '1' # No progress bars
import numpy as np
from lab_lm.core.paths import shared_data
from lab_lm.text.bm25 import BM25


def made_up(passages, questions, seed=0):
    "Texts whose words follow Zipf's law"
    rng, words = random.Random(seed), [f'w{i}x' for i in range(30_000)]
    weights = np.cumsum([1 / (i + 10) for i in range(30_000)])
    text = lambda n: ' '.join(rng.choices(words, cum_weights=weights, k=n))
    return {f'd{i}': text(rng.randint(30, 120)) for i in range(passages)}, {f'q{i}': text(8) for i in range(questions)}


def scifact():
    "The corpus and the train claims, or None where they are absent"
    folder = shared_data('retrieval/scifact')
    if folder is None: return None
    rows = lambda name: [json.loads(line) for line in open(folder / name, encoding='utf-8')]
    judged = {line.split('\t')[0] for line in open(folder / 'qrels/train.tsv', encoding='utf-8')}
    corpus = {r['_id']: f"{r['title']} {r['text']}" for r in rows('corpus.jsonl')}
    return corpus, {r['_id']: r['text'] for r in rows('queries.jsonl') if r['_id'] in judged}


def ours(corpus, queries, k):
    "(seconds to index, seconds to search, query -> document -> score)"
    start = time.perf_counter()
    index = BM25(corpus, analyser='mteb')
    ready = time.perf_counter()
    run = index.search(queries, k)
    return ready - start, time.perf_counter() - ready, run


def theirs(corpus, queries, k):
    "The same by bm25s with PyStemmer, as MTEB calls it"
    import bm25s, Stemmer
    stemmer, quiet = Stemmer.Stemmer('english'), dict(show_progress=False)
    tokens = lambda texts: bm25s.tokenize(list(texts), stopwords='en', stemmer=stemmer, **quiet)
    start = time.perf_counter()
    index = bm25s.BM25()
    index.index(tokens(corpus.values()), **quiet)
    ready = time.perf_counter()
    ids = list(corpus)
    places, scores = index.retrieve(tokens(queries.values()), k=min(k, len(ids)), **quiet)
    run = {q: {ids[i]: float(s) for i, s in zip(*row) if s > 0} for q, *row in zip(queries, places, scores)}
    return ready - start, time.perf_counter() - ready, run


def compare(name, corpus, queries, rounds, k=100):
    "One line of the table"
    runs = [(ours(corpus, queries, k), theirs(corpus, queries, k)) for _ in range(rounds)]
    (_, _, a), (_, _, b) = runs[-1]
    apart = max((abs(s - t) for q in queries for s, t in zip(a[q].values(), b[q].values())), default=0.)
    row = {'corpus': name, 'passages': len(corpus), 'questions': len(queries), 'largest difference of a score': f'{apart:.1e}'}
    for i, what in enumerate(('index', 'search')):
        mine, other = (statistics.median(r[side][i] for r in runs) for side in (0, 1))
        ratio = statistics.median(r[0][i] / r[1][i] for r in runs)
        row |= {f'{what}, s': f'{mine:.2f}', f'{what}, bm25s, s': f'{other:.2f}', f'{what}, ratio': f'{ratio:.2f}'}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--small', action='store_true', help='2,000 made-up passages alone')
    parser.add_argument('--rounds', type=int, default=3, help='rounds, of which the medians are told')
    args = parser.parse_args()
    sets = {'made up': made_up(2000 if args.small else 50_000, 500)}
    if not args.small and (real := scifact()): sets = {'SciFact': real} | sets
    for name, (corpus, queries) in sets.items(): print(json.dumps(compare(name, corpus, queries, args.rounds), ensure_ascii=False), flush=True)


if __name__ == '__main__': main()
