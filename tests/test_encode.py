"Encoding a corpus: one vector for a text in every batch of every body, budgets, killed and gone on with, misuse"
import copy
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from bodies import body, same, some_texts, tokenizer_of, vectors

from lab_lm.nets.encode import encode, token_batches
from lab_lm.nets.encoder import embed
from lab_lm.nets.native import masked_lm
from lab_lm.nets.sentence import SentenceEncoder, load_encoder, pad_rows, save_encoder


@pytest.fixture(scope='module')
def texts(): return some_texts()


@pytest.fixture(scope='module')
def tokenizer(texts): return tokenizer_of(texts)


@pytest.mark.parametrize('kind', ['bert', 'xlmr', 'modernbert', 'llama', 'gemma', 'masked', 'hybrid'])
def test_a_text_has_one_vector_in_every_batch_of_every_body(kind, texts, tokenizer):
    for pooling in ('mean', 'last'):
        model = SentenceEncoder(body(kind, tokenizer), tokenizer, pooling, max_length=60)
        expected = np.concatenate([vectors(model, [t]) for t in texts])
        assert np.isfinite(expected).all() and np.abs(expected).max() > .01
        for max_tokens in (1, 300, 10**6): same(encode(model, texts, max_tokens=max_tokens, part=17), expected)


def test_the_simple_door_is_the_mean(texts, tokenizer):
    model = masked_lm('tiny', len(tokenizer), tokenizer.pad_token_id).eval()
    same(embed(model, tokenizer, texts, max_length=60), encode(SentenceEncoder(model, tokenizer, max_length=60), texts))


def test_encoding_leaves_the_model_as_it_was_and_computes_texts_once(texts, tokenizer):
    model = SentenceEncoder(body('bert', tokenizer), tokenizer, max_length=60, dims=8, projection='mlp', dropout=.9).train()
    seen, forward = [], model.base.forward
    model.base.forward = lambda *a, **k: (seen.append(int(k['attention_mask'].sum())), forward(*a, **k))[1]
    twice = [*texts, *texts]
    found = encode(model, twice)
    assert model.training and np.array_equal(found[:len(texts)], found[len(texts):])
    assert sum(seen) == sum(len(r) for r in model.ids(list(dict.fromkeys(texts))))


def test_batches_hold_the_budget():
    for _ in range(20):
        lengths, most = np.random.default_rng().integers(0, 300, random.randint(0, 200)), random.randint(1, 2000)
        batches = token_batches(lengths, most)
        assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
        assert all(len(b) == 1 or max(1, lengths[b].max()) * len(b) <= most for b in batches)


WORKER = '''
import sys, time
from lab_lm.nets.encode import encode
from lab_lm.nets.sentence import load_encoder
model = load_encoder(sys.argv[1])
real = model.ids
def slow(texts, prompt):
    time.sleep(.15)
    return real(texts, prompt)
model.ids = slow
encode(model, open(sys.argv[2], encoding='utf-8').read().splitlines(), part=3, out=sys.argv[3])
'''


def test_killed_and_gone_on(tokenizer, texts, tmp_path):
    some = [t for t in texts if t and '\n' not in t]
    model = SentenceEncoder(body('bert', tokenizer), tokenizer, max_length=60)
    save_encoder(model, tmp_path / 'model'), (tmp_path / 'texts').write_text('\n'.join(some), encoding='utf-8')
    out, journal = tmp_path / 'v.npy', tmp_path / 'v.npy.journal.jsonl'
    worker = subprocess.Popen([sys.executable, '-c', WORKER, *map(str, (tmp_path / 'model', tmp_path / 'texts', out))], env=os.environ | dict(OMP_NUM_THREADS='1'))
    until = time.time() + 600
    while time.time() < until and (not journal.exists() or len(journal.read_text().splitlines()) < 4): time.sleep(.02)
    worker.send_signal(signal.SIGKILL); worker.wait()
    kept = len(journal.read_text().splitlines()) - 1
    assert 3 <= kept < -(-len(some) // 3)
    model, computed = load_encoder(tmp_path / 'model'), []
    real, model.ids = model.ids, lambda part, prompt: (computed.append(part), real(part, prompt))[1]
    found = encode(model, some, part=3, out=out)
    assert len(computed) == -(-len(some) // 3) - kept and isinstance(found, np.memmap) and not found.flags.writeable
    same(found, encode(model, some))
    before = out.read_bytes()
    for change, told in ((dict(texts=some[:-1]), 'was begun with texts'), (dict(part=4), 'was begun with part 3'), (dict(prompt=''), 'was begun with prompt'),
                         (dict(texts=some[:-1] + ['y']), 'part .* has changed')):
        with pytest.raises(ValueError, match=told): encode(model, **dict(texts=some, part=3, out=out) | change)
    other = copy.deepcopy(model)
    with torch.no_grad(): next(other.base.parameters())[0, 0] += 1
    with pytest.raises(ValueError, match='was begun with model'): encode(other, some, part=3, out=out)
    journal.unlink()
    with pytest.raises(ValueError, match='has no journal'): encode(model, some, part=3, out=out)
    assert out.read_bytes() == before


def test_padding_a_batch_with_empty_rows(): assert pad_rows([[], [5, 6]], 9)['input_ids'].tolist() == [[9, 9], [5, 6]] and pad_rows([[]])['attention_mask'].tolist() == [[0]]
