"""Muon against AdamW, each over a sweep of rates, and what a step of each optimiser costs: `python bench/optim.py [steps]`.

A causal model of width 128 and 3 layers learns Hindi Wikipedia, 16 rows of 64 tokens a step. Printed: nats a token of the validation text, seconds in all, seconds inside the optimiser.
"""
import gzip
import sys
import time

import torch
from torch import nn

from lab_lm.core.paths import shared_data
from lab_lm.nets.transformer import NetConfig, Transformer
from lab_lm.text.tokenize import train_tokenizer
from lab_lm.train.muon import NEWTON_SCHULZ, quintics
from lab_lm.train.optim import make_optimizer
from lab_lm.train.schedules import Schedule

LENGTH = 64


def corpus(vocab=2000):
    "Rows of tokens: for training, and the last 64 for validation"
    with gzip.open(shared_data() / 'text/wiki_hi.txt.gz', 'rt') as lines: texts = [line for line in lines if len(line) > 200][:6000]
    tokenizer = train_tokenizer(texts, 'bpe', vocab)
    ids = torch.tensor([i for text in texts for i in tokenizer(text)['input_ids']])
    rows = ids[:len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows[:-64], rows[-64:], len(tokenizer)


def shifted(rows): return torch.cat((rows[:, 1:], torch.full((len(rows), 1), -100)), 1)


def train(name, lr, rows, held, vocab, steps, seed=0, heads=False, width=128, **options):
    "Validation loss, seconds, seconds of the optimiser"
    torch.manual_seed(seed)
    model = Transformer(NetConfig(vocab_size=vocab, width=width, layers=3, heads=4))
    for block in model.blocks: block.attention.qkv.parts = (width // 4,) * 12 if heads else (width,) * 3
    optimizer, schedule = make_optimizer(name, model, lr, .1, betas=(.9, .95), **options), Schedule(name='linear', warmup=.05)
    generator, begin, inside = torch.Generator().manual_seed(seed), time.perf_counter(), 0.
    for step in range(steps):
        for group in optimizer.param_groups: group['lr'] = group['base'] * schedule.at(step, steps)
        batch = rows[torch.randint(len(rows), (16,), generator=generator)]
        optimizer.zero_grad()
        model(batch, labels=shifted(batch)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        before = time.perf_counter()
        optimizer.step()
        inside += time.perf_counter() - before
    with torch.no_grad(): loss = model.eval()(held, labels=shifted(held)).loss.item()
    return loss, time.perf_counter() - begin, inside


def median_cpu(act, repeats=5):
    "Median seconds of CPU time, after one call to warm up"
    times = []
    for _ in range(repeats + 1):
        before = time.process_time()
        act()
        times.append(time.process_time() - before)
    return sorted(times[1:])[repeats // 2]


def step_cost(width=384, layers=6, inner=1024):
    "CPU time of one optimiser step for a model of this width, and as a share of forward and backward pass with 2,048 and 8,192 tokens"
    model = Transformer(NetConfig(vocab_size=8000, width=width, layers=layers, heads=6, hidden=inner))
    ids = torch.randint(8000, (16, 128))
    def learn(): model(ids, labels=shifted(ids)).loss.backward()
    small = median_cpu(learn, 3)
    print(f'forward and backward, 2,048 tokens: {small:.2f} s', flush=True)
    for name, heads, options in (('adamw', False, dict(foreach=False)), ('adamw', False, {}), ('muon', False, dict(coefficients=NEWTON_SCHULZ)), ('muon', False, {}),
                                 ('muon', True, {}), ('muon', True, dict(coefficients=quintics(2, .03)))):
        for block in model.blocks: block.attention.qkv.parts = (64,) * 18 if heads else (width,) * 3
        took = median_cpu(make_optimizer(name, model, 1e-3, **options).step)
        kind = f"{len(options.get('coefficients', quintics()))} iterations{', by heads' if heads else ''}" if name == 'muon' else 'fused' if not options else 'not fused'
        print(f'{name}, {kind}: {took * 1000:.0f} ms; {took / small:.1%} at 2,048 tokens, {took / small / 4:.1%} at 8,192', flush=True)


if __name__ == '__main__':
    torch.set_num_threads(1)
    step_cost()
    if shared_data() is None: raise SystemExit('skipped the comparison, because the shared texts are not here')
    data, steps = corpus(), int(sys.argv[1]) if len(sys.argv) > 1 else 300
    for name, rates, options in (('adamw', (.003, .006, .012), {}), ('muon', (.006, .012, .024), {}), ('muon', (.012,), dict(coefficients=NEWTON_SCHULZ)),
                                 ('muon', (.012,), dict(coefficients=quintics(2, .03))), ('muon', (.012,), dict(heads=True))):
        for lr in rates: print(name, lr, list(options), ['%.3f' % x for x in train(name, lr, *data, steps, **options)], flush=True)
