"""The export gate over tiny models of all shapes: no false alarm, and how far llama.cpp is from transformers.

Claim: over 20 models (Gemma 3 and Llama; layers, heads, kv heads, head sizes, tied or not, windows shorter and longer than the prompts, four
tokenizers) every F32 file is within 0.001 and every F16 file within 0.01 of transformers in fp32 on 50 prompts, token ids of 1,000 strings are the same, and
greedy continuations of 64 tokens are the same in F32. Peer: transformers itself.

    python bench/gate.py            # 20 models, F32 and F16, full depth: some minutes
    python bench/gate.py --small    # 3 models, quick depth
"""
import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import torch

from lab_lm.core.paths import data_dir
from lab_lm.gen.gguf import write_gguf
from lab_lm.gen.prove import prove
from lab_lm.nets.tiny import save_tiny


def dials(rng, model):
    "A random shape"
    heads = rng.choice([1, 2, 4, 8])
    out = dict(hidden=rng.choice([64, 96, 128]), layers=rng.randint(1, 6), heads=heads, kv_heads=rng.choice([k for k in (1, 2, 4, 8) if heads % k == 0]),
               head_dim=rng.choice([16, 32, 64]), tied=rng.random() < .5, rope_base=rng.choice([1e4, 1e5, 1e6]))
    if out['hidden'] % heads: out['hidden'] = 64
    if model == 'gemma': out |= dict(window=rng.choice([8, 16, 64, 512]), period=rng.randint(1, 6), local_base=rng.choice([2e3, 1e4]))
    return out


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument('--small', action='store_true')
    arguments.add_argument('--seed', type=int, default=0)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    rng, worst, alarms, parted = random.Random(given.seed), {}, 0, 0
    texts = [json.loads(line)['text'] for lang in ('hi', 'ta') for line in (data_dir() / 'samples' / lang / 'corpus.jsonl').read_text(encoding='utf-8').splitlines()[:40]]
    for i in range(3 if given.small else 20):
        model, kind = ('gemma', 'llama')[i % 2], ('gemma', 'akshara_bpe', 'bpe', 'gpt2')[i // 2 % 4]
        shape = dials(rng, model)
        with tempfile.TemporaryDirectory() as here:
            folder = save_tiny(Path(here) / 'm', texts, model, kind, 1200, given.seed + i, **shape)
            for quant in ('f32', 'f16'):
                start = time.perf_counter()
                r = prove(write_gguf(folder, folder / f'{quant}.gguf', quant), folder, texts, 'quick' if given.small else 'full', strict=False)
                worst[quant] = max(worst.get(quant, 0), r['tail'])
                alarms += not r['passed']
                parted += quant == 'f32' and r['equal'] != r['tokens']
                print(f"{model} {kind} {quant} {shape}: passed={r['passed']} strings={r['strings']} greedy {r['equal']}/{r['tokens']} tail={r['tail']:.5f} "
                      f"unexplained={r['unexplained']:.5f} kl={r['kl']:.1e} {time.perf_counter() - start:.1f} s {r['refused_for'] or ''}", flush=True)
    print(f"false alarms {alarms}; F32 models whose greedy continuations part {parted}; largest difference of log-probabilities: {worst}")


if __name__ == '__main__': main()
