"""Cost of a training batch against the size of the corpus: time per token, resident memory and index, from 1 to 20 million tokens

    python bench/feed.py

Token ids are Zipf-distributed over 16,000 entries, text lengths geometric with mean 180; the stream is written once per size with `write_stream` and mapped with `read_stream`.
Each size runs in a process of its own: one whole pass in batches of 64 x 128 tokens. Time is CPU time, the median over batches; memory is the highest resident size during the pass
(file pages included) above that before the rows were made. The peer is the usual way: all rows in a list of lists, shuffled, collated with torch, on the same data.
"""
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[name] = '1'

import numpy as np  # noqa: E402
import torch  # noqa: E402

from lab_lm.text.batches import read_stream, write_stream  # noqa: E402
from lab_lm.text.rows import PackedRows, TextRows  # noqa: E402

LENGTH, SIZE, MILLIONS = 128, 64, (1, 5, 20)


def resident(): return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6


def texts(n, rng):
    "Arrays of ids, about n tokens in all"
    while n > 0:
        row = (rng.zipf(1.2, 1 + rng.geometric(1 / 180)) - 1) % 15995 + 5
        n -= len(row)
        yield row


class Lists:
    "All rows as lists in memory, a shuffled order, tensors made by torch"
    def __init__(self, ids, bounds, length):
        ids = ids.tolist()
        self.rows = [ids[i:i + length] for i in range(0, len(ids) - length + 1, length)]
        random.Random(0).shuffle(self.rows)

    def batches(self, size): return len(self.rows) // size

    def batch(self, k, size): return dict(input_ids=torch.tensor(self.rows[k * size:(k + 1) * size]))


def one(folder, kind):
    "Figures of one size and kind"
    ids, bounds = read_stream(folder)
    np.load(Path(folder) / 'ids.npy', mmap_mode='r')[::2048].sum() # What is read once comes from the system's cache
    kinds, before = dict(packed=PackedRows, texts=TextRows, lists=Lists), resident()
    rows = kinds[kind](ids, bounds, LENGTH)
    rows.batch(0, SIZE)
    times, most = [], resident()
    for k in range(rows.batches(SIZE)):
        began = time.process_time()
        batch = rows.batch(k, SIZE)
        times.append((time.process_time() - began) / batch['input_ids'].numel())
        most = max(most, resident())
    return dict(micro=statistics.median(times) * 1e6, grown=most - before, bounds=bounds.nbytes / 1e6)


def main():
    print(f"{'tokens':>8} {'kind':>7} {'CPU µs/token':>13} {'resident MB':>12} {'bounds MB':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for millions in MILLIONS:
            stream = write_stream(texts(millions * 10**6, np.random.default_rng(millions)), Path(folder) / str(millions), 16000)
            for kind in ('packed', 'texts', 'lists'):
                found = json.loads(subprocess.run([sys.executable, __file__, str(stream), kind], capture_output=True, text=True, check=True).stdout)
                print(f"{millions:>6} M {kind:>8} {found['micro']:>13.3f} {found['grown']:>12.1f} {found['bounds']:>10.2f}", flush=True)


if __name__ == '__main__': print(json.dumps(one(*sys.argv[1:]))) if sys.argv[1:] else main()
