"""Near duplicates against datasketch 2 (MinHash.update_batch, MinHashLSH) in one process, and the speed of each step in MB/s.

Same 5,000 documents, same shingles of three words, 120 permutations, 20 bands of 6, single-threaded; CPU seconds, medians of five rounds, in turn.
The peer is timed twice: from the text, and from shingles that are ready as bytes, which leaves its own work only. Ours is timed from the text
and includes the exact comparison of every candidate, which the peer leaves to its user.
"""
import gzip
import os
import random
import statistics
import time

for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[name] = '1'

from datasketch import MinHash, MinHashLSH  # noqa: E402

from lab_lm.core.paths import shared_data  # noqa: E402
from lab_lm.text.duplicates import BANDS, ROWS, band_keys, duplicates, near_duplicates, signatures  # noqa: E402
from lab_lm.text.leaks import evaluation_texts, held_out  # noqa: E402
from lab_lm.text.shingles import jaccard, plain_words, shingle_hashes  # noqa: E402
from lab_lm.text.tiny import pocket_corpus  # noqa: E402


def planted(n, rng):
    "Half originals, half copies with some words replaced"
    originals = [r.text for r in pocket_corpus('hi', n // 2, seed=rng.randrange(10**6))]
    vocabulary = sorted({w for t in originals for w in t.split()})
    def copy(text):
        share = rng.random()**2 * .15
        return ' '.join(rng.choice(vocabulary) if rng.random() < share else w for w in text.split())
    return rng.sample(texts := originals + [copy(rng.choice(originals)) for _ in range(n // 2)], len(texts))


def ours(texts):
    "Pairs merged, from the text"
    groups = [shingle_hashes(t) for t in texts]
    return duplicates(band_keys(signatures(groups)), lambda i, j: jaccard(groups[i], groups[j]))


def peer_shingles(texts):
    "Distinct shingles as bytes"
    out = []
    for t in texts:
        ws = plain_words(t)
        out.append(list({' '.join(ws[i:i+3]).encode() for i in range(max(1, len(ws) - 2))}))
    return out


def peer(groups):
    "Documents that have an earlier candidate, as datasketch finds them"
    index, merged = MinHashLSH(threshold=.8, num_perm=BANDS * ROWS, params=(BANDS, ROWS)), set()
    for j, group in enumerate(groups):
        sketch = MinHash(num_perm=BANDS * ROWS)
        sketch.update_batch(group)
        if index.query(sketch): merged.add(j)
        else: index.insert(j, sketch)
    return merged


def seconds(act, *args):
    began = time.process_time()
    act(*args)
    return time.process_time() - began


def speed(name, act, texts, rounds=5):
    "Megabytes of UTF-8 a CPU second, the median of rounds after one to warm up"
    size, times = sum(len(t.encode()) for t in texts) / 1e6, [seconds(act, texts) for _ in range(rounds + 1)][1:]
    print(f"  {name:<44} {size / statistics.median(times):6.1f} MB/s  ({size:.1f} MB, {len(texts)} texts)")


def sketches(texts): return band_keys(signatures([shingle_hashes(t) for t in texts]))


def main():
    texts = planted(5000, random.Random(1))
    ready = peer_shingles(texts)
    rounds = [dict(ours=seconds(ours, texts), text=seconds(lambda: peer(peer_shingles(texts))), ready=seconds(peer, ready)) for _ in range(6)][1:]
    middle = {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}
    exact = {(i, j) for i, j, _ in near_duplicates(texts, .8)}
    mine = {(i, j) for j, (i, _) in ours(texts).items()}
    print(f"5,000 documents: ours {middle['ours']:.2f} s; datasketch {middle['text']:.2f} s from the text, {middle['ready']:.2f} s from ready shingles")
    for name in ('text', 'ready'): print(f"  datasketch from {name}: {statistics.median(r[name] / r['ours'] for r in rounds):.1f} times as long as ours (median of {len(rounds)} rounds)")
    print(f"  merged: ours {len(mine)}, all of them right: {mine <= exact}; datasketch {len(peer(ready))}, unverified")
    folder = shared_data()
    if folder is None: return print('speed on real text: skipped, because the shared data is absent')
    for lang in ('hi', 'ta'):
        lines = [line for line in gzip.open(folder / f'text/wiki_{lang}.txt.gz', 'rt', encoding='utf-8') if len(line) > 40]
        speed(f'{lang}: shingles, signatures, band keys', sketches, lines)
        speed(f'{lang}: shingles alone', lambda texts: [shingle_hashes(t) for t in texts], lines)
    guard = held_out({'xquad': evaluation_texts(folder / 'retrieval/xquad_hi_dev'), 'scifact': evaluation_texts(folder / 'retrieval/scifact')})
    lines = [line for line in gzip.open(folder / 'text/wiki_hi.txt.gz', 'rt', encoding='utf-8') if len(line) > 40]
    speed(f'hi: leaks, guard of {len(guard.texts)} texts, scan', lambda texts: [guard.scan(texts[i:i+256]) for i in range(0, len(texts), 256)], lines)
    speed('hi: the same, one check at a time', lambda texts: [guard.check(t) for t in texts], lines, 3)


if __name__ == '__main__': main()
