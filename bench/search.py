"""Exact search against FAISS flat: `python bench/search.py [--small] [--threads 2] [--repeats 3] [--metrics dot cosine l2]`.

The claim: among 1,000,000 x 384 random vectors, the 100 best of 1,000 queries by dot product take at most 1.3 times as long as `faiss.IndexFlatIP` with as many
threads, and the process needs at most 1.3 times the memory of the vectors, whether they are an array or a file. Both searches run in turn in one process; printed
are medians of seconds and of CPU seconds (all threads; the number to read on a machine that others use), and of their ratios. Memory is the peak of a process of
its own that makes or maps the vectors and searches them. 10 GB of memory and 2 GB of disk; a minute or two on two idle cores. `--small`: a tenth of the vectors,
where what the program itself takes weighs more.
"""
import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

THREADS = sys.argv[sys.argv.index('--threads') + 1] if '--threads' in sys.argv else '2'
for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[name] = THREADS # Before NumPy is imported

import numpy as np

from lab_lm.nets.search import nearest

WIDTH, ASKED, K = 384, 1000, 100


def made(n, seed=0):
    "Random vectors, without the double-precision copies that would count as memory"
    return np.random.default_rng(seed).standard_normal((n, WIDTH), dtype=np.float32)


def seconds(act):
    "Seconds and CPU seconds of a call, and what it gives"
    begin, cpu = time.perf_counter(), time.process_time()
    result = act()
    return np.array([time.perf_counter() - begin, time.process_time() - cpu]), result


def memory(form, path, n):
    "In a process of its own: peak memory over the bytes of the vectors"
    vectors = np.load(path, mmap_mode='r', allow_pickle=False) if form == 'file' else made(n)
    nearest(made(ASKED, 1), vectors, K, 'dot')
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    print(f'memory, vectors in a {form}: peak {peak / 2**20:,.0f} MiB = {peak / (n * WIDTH * 4):.3f} times the vectors', flush=True)


def speed(n, metrics, repeats):
    "Ours and FAISS in turn"
    import faiss
    faiss.omp_set_num_threads(int(THREADS))
    vectors, queries = made(n), made(ASKED, 1)
    index = faiss.IndexFlatIP(WIDTH)
    index.add(vectors)
    times, ratios = {}, {}
    for _ in range(repeats):
        peer, (scores, ids) = seconds(lambda: index.search(queries, K))
        times.setdefault('faiss', []).append(peer)
        for metric in metrics:
            ours, (mine, places) = seconds(lambda: nearest(queries, vectors, K, metric))
            times.setdefault(metric, []).append(ours), ratios.setdefault(metric, []).append(ours / peer)
            if metric == 'dot': print(f'{(places == ids).mean():.4%} of the places as FAISS has them, scores within {np.abs(mine - scores).max():.1e} (its sums are of float32)', flush=True)
    for name, each in times.items():
        wall, cpu = np.median(each, 0)
        print(f'{name}: {wall:.2f} s, {cpu:.2f} CPU s' + ('; {:.2f} times FAISS, {:.2f} in CPU time'.format(*np.median(ratios[name], 0)) if name in ratios else ''), flush=True)


def main():
    "Memory in processes of their own, then speed"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--small', action='store_true')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--metrics', nargs='+', default=['dot'])
    parser.add_argument('--only', choices=('memory', 'speed'))
    parser.add_argument('--memory', nargs=2, help=argparse.SUPPRESS)
    told = parser.parse_args()
    n = 100_000 if told.small else 1_000_000
    if told.memory: return memory(*told.memory, n)
    print(f'{n:,} x {WIDTH}, top {K} of {ASKED:,} queries, {THREADS} threads', flush=True)
    if told.only != 'speed':
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / 'vectors.npy')
            np.save(path, made(n))
            for form in ('array', 'file'): subprocess.run([sys.executable, __file__, '--threads', THREADS, *['--small'] * told.small, '--memory', form, path], check=True)
    if told.only != 'memory': speed(n, told.metrics, told.repeats)


if __name__ == '__main__': main()
