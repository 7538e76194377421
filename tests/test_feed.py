"Rows and feeds against slow oracles on random streams: coverage, seams, purity, prefixes, workers, devices, memory"
import gzip
import itertools
import json
import os
import pickle
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lab_lm.core.paths import shared_data
from lab_lm.text import rows as rows_module
from lab_lm.text.batches import read_stream, write_stream
from lab_lm.text.rows import PackedRows, TextRows, mixed, permuted, tokens_of
from lab_lm.text.tokenize import train_tokenizer
from lab_lm.train.curriculum import PerformancePacing, Pacing
from lab_lm.train.feed import Endless, Feed, loader, part
from lab_lm.train.objectives import Causal, Hybrid, LengthWarmup, Masked


def stream(texts=60, longest=40, empty=.2):
    "Ids that are all different, and bounds with empty texts among them"
    lengths = [0 if random.random() < empty else random.randrange(1, longest) for _ in range(texts)] + [longest]
    bounds = np.cumsum([0, *lengths])
    return np.arange(bounds[-1]) + 10, bounds


def on_disk(folder, n, mean=200, vocabulary=16000):
    "A mapped stream of n tokens, written at once"
    folder.mkdir()
    bounds = np.append(np.arange(0, n, mean), n)
    np.save(folder / 'ids.npy', (np.arange(n) * 7919 % vocabulary).astype('<u2'))
    np.save(folder / 'bounds.npy', bounds)
    return np.load(folder / 'ids.npy', mmap_mode='r'), np.load(folder / 'bounds.npy', mmap_mode='r')


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# The permutation

def test_a_permutation_of_every_size():
    for n in [*range(1, 40), *(random.randrange(40, 30000) for _ in range(8))]:
        assert (np.bincount(permuted(np.arange(n), n, mixed(random.randrange(2**60))), minlength=n) == 1).all(), n


def test_sizes_and_keys_of_each_place():
    sizes = np.array([random.randrange(1, 50) for _ in range(200)])
    keys = np.array([mixed(random.randrange(2**40)) for _ in range(200)], np.uint64)
    places = np.array([random.randrange(n) for n in sizes])
    assert permuted(places, sizes, keys).tolist() == [int(permuted([p], n, k)[0]) for p, n, k in zip(places, sizes, keys)]


def test_large_sizes_stay_inside_and_apart():
    for n in (2**31 + 11, 10**12 + 39, 2**50):
        images = permuted(np.random.default_rng().integers(0, n, 5000), n, mixed(random.randrange(2**40)))
        again = permuted(np.arange(5000), n, 9)
        assert 0 <= images.min() and images.max() < n and len(set(again.tolist())) == 5000
        assert again.std() > .2 * n # Neighbours go far apart


def test_neighbours_do_not_stay_neighbours():
    n, keys = 50, [mixed(3, random.randrange(2**40)) for _ in range(2000)]
    images = permuted(np.tile(np.arange(n), len(keys)), n, np.repeat(np.array(keys, np.uint64), n)).reshape(-1, n)
    beside = (np.abs(np.diff(images, axis=1)) == 1).mean()
    assert abs(beside - 2 / n) < 5 * (2 / n / images.size) ** .5
    assert (np.abs(np.diff(np.arange(n))) == 1).mean() == 1 # What no shuffling would give


# Packed rows

@pytest.mark.parametrize('_', range(5))
def test_packed_rows_equal_a_slow_reading(_):
    ids, bounds = stream()
    length, size, seed = random.randrange(2, 30), random.randrange(1, 9), random.randrange(2**31)
    packed, n = PackedRows(ids, bounds, length), len(ids)
    text_of = [t for t in range(len(bounds) - 1) for _ in range(bounds[t], bounds[t + 1])]
    for k in random.sample(range(500), 10):
        got, starts = packed.batch(k, size, seed), packed.starts(k, size, seed)
        for row, start in enumerate(starts.tolist()):
            places = [(start + i) % n for i in range(length)]
            assert got['input_ids'][row].tolist() == [p + 10 for p in places]
            new = [i == 0 or text_of[places[i]] != text_of[places[i - 1]] or places[i] == 0 for i in range(length)]
            assert got['texts'][row].tolist() == list(itertools.accumulate(new))
            assert got['position_ids'][row].tolist() == [i - max(j for j in range(i + 1) if new[j]) for i in range(length)]
        assert all(v.dtype == torch.int64 for v in got.values())


def test_every_pass_has_every_token_once_but_a_remainder_that_changes():
    ids, bounds = stream(200)
    packed, left = PackedRows(ids, bounds, 16), []
    rows_in_pass = len(ids) // 16
    for passes in range(4): # Batches of one row, so that passes begin with a batch
        starts = np.concatenate([packed.starts(k, 1, 77) for k in range(passes * rows_in_pass, (passes + 1) * rows_in_pass)])
        seen = np.bincount(((starts[:, None] + np.arange(16)) % len(ids)).ravel(), minlength=len(ids))
        assert seen.max() == 1 and (seen == 0).sum() == len(ids) % 16
        left.append((frozenset(np.flatnonzero(seen == 0).tolist()), int(starts[0] % 16)))
    assert len({cut for _, cut in left}) > 1 # Cuts fall elsewhere


def test_a_text_longer_than_the_corpus_of_one_row_wraps_as_a_new_text():
    packed = PackedRows(np.arange(10), [0, 10], 10)
    for seed in range(20):
        got = packed.batch(0, 1, seed)
        at = int((got['input_ids'][0] == 0).nonzero()[0, 0])
        assert got['texts'][0].tolist() == ([1] * at + [2] * (10 - at) if at else [1] * 10)
        assert got['position_ids'][0].tolist() == [*range(at), *range(10 - at)]


def test_the_admitted_prefix():
    ids, bounds = stream(300)
    packed = PackedRows(ids, bounds, 8)
    for share in (.05, .2, .5, .99, 1.):
        n = max(int(bounds[max(1, int(share * 301 + 1e-9))]), 4 * 8)
        seen = np.concatenate([packed.batch(k, 4, 5, share)['input_ids'].numpy().ravel() - 10 for k in range(packed.batches(4, share))])
        assert seen.max() < n and packed.tokens(4, share) == n
        assert len(set(seen.tolist())) >= n - 8 # All of it, but a remainder
    assert packed.texts(0.) == 1 and packed.texts(.3) == 90


def test_bad_streams_are_named():
    for ids, bounds, length, said in ((np.arange(3), [0, 3], 4, 'no row of 4'), (np.arange(0), [0], 4, 'no tokens'), (np.arange(9), [0, 8], 4, 'number of tokens'),
                                      (np.arange(9), [1, 9], 4, 'number of tokens'), (np.arange(9), [0, 9], 1, 'at least 2')):
        with pytest.raises(ValueError, match=said): PackedRows(ids, bounds, length)
    with pytest.raises(ValueError, match='from 0'): PackedRows(np.arange(9), [0, 9], 4).batch(-1, 2)


# Padded rows

@pytest.mark.parametrize('_', range(5))
def test_text_rows_have_every_piece_in_every_pass(_):
    ids, bounds = stream(120)
    length, size, seed = random.randrange(2, 50), random.randrange(1, 9), random.randrange(2**31)
    padded = TextRows(ids, bounds, length, pad=3)
    want = sorted(int(s) + i for s, e in itertools.pairwise(bounds) for i in range(0, int(e - s), length))
    n = padded.batches(size)
    for passes in range(2):
        firsts = []
        for k in range(passes * n, (passes + 1) * n):
            got = padded.batch(k, size, seed)
            inside = got['attention_mask'] == 1
            assert len(inside) >= size and inside.numel() <= max(size * length, size * inside.shape[1])
            assert inside.any(0).all() and (inside.long().diff(dim=1) <= 0).all() and (got['input_ids'][~inside] == 3).all()
            for row, m in zip(got['input_ids'], inside):
                piece = row[m].tolist()
                start = piece[0] - 10
                assert piece == list(range(start + 10, start + 10 + len(piece))) # Ids are places, so a piece is a run
                end = bounds[np.searchsorted(bounds, start, 'right')]
                assert len(piece) == min(length, end - start)
                firsts.append(start)
        assert set(firsts) == set(want) and len(firsts) - len(want) < size


def test_text_rows_admit_a_prefix_and_change_company():
    ids, bounds = stream(400, longest=12)
    padded = TextRows(ids, bounds, 16)
    for share in (.1, .5, 1.):
        seen = {int(p) for k in range(padded.batches(4, share)) for p in padded.pieces(k, 4, 1, share)}
        assert seen == set(range(int(padded.firsts[padded.texts(share)])))
    n = padded.batches(8)
    passes = [{frozenset(padded.pieces(p * n + k, 8, 1).tolist()) for k in range(n)} for p in range(2)]
    assert len(passes[0] & passes[1]) < n / 4
    assert padded.firsts.nbytes + padded.order.nbytes <= 8 * len(bounds) + 4


def test_padding_is_little_where_texts_are_sorted():
    rng = np.random.default_rng()
    bounds = np.cumsum([0, *rng.geometric(1 / 40, 5000)])
    padded = TextRows(np.zeros(bounds[-1], np.uint16), bounds, 128)
    masks = [padded.batch(k, 32)['attention_mask'] for k in range(padded.batches(32))]
    assert sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks) > .95


# Purity

def feeds():
    ids, bounds = stream(150)
    words = train_tokenizer(['यह एक छोटा वाक्य है'] * 20, 'bpe', 300, min_frequency=1)
    few = PackedRows(ids % 280 + 5, bounds, 32)
    return [Feed(few, Masked(words), 6, 3), Feed(few, Causal(), 6, 3, pacing=Pacing('root', .1), lengths=LengthWarmup((8, 32), (.5, .5)), steps=40),
            Feed(few, Hybrid(Masked(words)), 6, 3), Feed(TextRows(ids % 280 + 5, bounds, 32), Masked(words), 6, 3)]


@pytest.mark.parametrize('which', range(4))
def test_a_step_depends_on_its_number_only(which):
    feed, states = feeds()[which], lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    before = states()
    first = [feed.step(k) for k in range(30)]
    order = random.Random().sample(range(30), 30)
    fresh = pickle.loads(pickle.dumps(feed))
    assert states() == before
    for k in order: assert same(first[k], fresh.step(k)) and same(first[k], feed[k])
    assert sum(same(first[0], other) for other in first) == 1
    assert all((b['labels'] != -100).any() for b in first)


def test_an_objective_with_its_own_dice_is_caught():
    loose = lambda batch, step, generator: batch | dict(labels=torch.randint(9, batch['input_ids'].shape))
    feed = Feed(feeds()[0].rows, loose, 6)
    assert not same(feed.step(3), feed.step(3))


@pytest.mark.parametrize('which', (1, 3))
def test_workers_change_nothing(which):
    feed = feeds()[which]
    torch.manual_seed(11)
    before = torch.get_rng_state()
    got = [list(loader(feed, 4, 13, workers)) for workers in (0, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    for one in got: assert len(one) == 9 and all(same(a, feed.step(4 + i)) for i, a in enumerate(one))


def test_a_loader_can_be_left_early():
    feed = feeds()[0]
    stream_of = loader(feed, 0, 10**9, 1)
    assert same(next(stream_of), feed.step(0))
    began = time.perf_counter()
    stream_of.close()
    assert time.perf_counter() - began < 10


def test_a_share_that_learns():
    feed = feeds()[0]
    feed.pacing, feed.steps = PerformancePacing(.2, .3), 100
    at_first = feed.step(50)
    feed.pacing.report(2.); feed.pacing.report(1.)
    later = feed.step(50)
    assert not same(at_first, later) and same(later, next(iter(loader(feed, 50, 51, 0))))


# Fingerprints

def test_fingerprints():
    feed = feeds()[1]
    words = json.dumps(feed.fingerprint())
    assert len(words) < 2000 and ' at 0x' not in words and json.loads(words) == feed.fingerprint()
    assert feed.fingerprint() == pickle.loads(pickle.dumps(feed)).fingerprint()
    ids, bounds = feed.rows.ids, feed.rows.bounds
    others = dict(order=Feed(PackedRows(ids[::-1].copy(), bounds, 32), feed.objective, 6, 3), seams=Feed(PackedRows(ids, [0, len(ids)], 32), feed.objective, 6, 3),
                  length=Feed(PackedRows(ids, bounds, 31), feed.objective, 6, 3), kind=Feed(TextRows(ids, bounds, 32), feed.objective, 6, 3),
                  batch=Feed(feed.rows, feed.objective, 7, 3), seed=Feed(feed.rows, feed.objective, 6, 4), lesson=Feed(feed.rows, print, 6, 3))
    plain = Feed(feed.rows, feed.objective, 6, 3).fingerprint()
    assert all(other.fingerprint() != plain for other in others.values()) and feed.fingerprint() != plain
    class Odd: pass
    assert 'object' in Feed(feed.rows, Odd(), 6).fingerprint()['objective'] and '0x' not in Feed(feed.rows, Odd(), 6).fingerprint()['objective']


# Devices and parts

def test_parts_are_the_whole():
    for _ in range(30):
        world, parts, each = (random.randrange(1, 5) for _ in range(3))
        n = world * parts * each
        batch = dict(input_ids=torch.rand(n, 3), texts=torch.rand(n, 3), causal=torch.rand(n) < .5, name='x')
        pieces = [part(batch, rank, world, parts) for rank in range(world)]
        assert all(len(of_one) == parts and all(len(p['texts']) == each and p['name'] == 'x' for p in of_one) for of_one in pieces)
        for key in ('input_ids', 'texts', 'causal'):
            together = torch.stack([torch.cat([p[key] for p in of_one]) for of_one in pieces], 1).flatten(0, 1)
            assert torch.equal(together, batch[key])


def test_parts_of_uneven_batches():
    for _ in range(30):
        world, parts, n = random.randrange(1, 5), random.randrange(1, 5), random.randrange(5, 40)
        batch = dict(input_ids=torch.arange(n)[:, None], attention_mask=torch.ones(n, 1))
        pieces = [part(batch, rank, world, parts) for rank in range(world)]
        assert sorted(int(i) for of_one in pieces for p in of_one for i in p['input_ids']) == list(range(n))
        assert max(len(p['input_ids']) for of_one in pieces for p in of_one) - min(len(p['input_ids']) for of_one in pieces for p in of_one) <= 2
        assert all(len(p['input_ids']) for of_one in pieces for p in of_one)


@pytest.mark.parametrize('n, world, parts, said', [(10, 4, 1, '8 or 12'), (10, 2, 3, '6 or 12'), (3, 4, 1, 'of 4 rows')])
def test_parts_that_do_not_fit_name_what_does(n, world, parts, said):
    batch = dict(input_ids=torch.zeros(n, 2), texts=torch.ones(n, 2))
    with pytest.raises(ValueError, match=said): part(batch, 0, world, parts)
    sizes = [int(w) for w in said.replace('of', '').replace('rows', '').split(' or ')]
    for size in sizes: assert len(part(dict(texts=torch.ones(size, 2)), 0, world, parts)) == parts


def test_tensors_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match='one number of rows'): part(dict(a=torch.ones(4, 1), b=torch.ones(5, 1)))


def test_ready_batches():
    def few(): yield from range(3)
    assert list(loader(Endless(list(few())), 0, 7)) == [0, 1, 2, 0, 1, 2, 0]
    with pytest.raises(ValueError, match='ended before step 3'): list(loader(Endless(few()), 0, 7))
    feed = Endless(few())
    feed.step(4)
    with pytest.raises(ValueError, match='step 4 was asked for where 5 is next'): feed.step(4)


# Files and memory

def resident(): return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='resident memory is read from /proc')
def test_resident_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    ids, bounds = on_disk(tmp_path / 'big', 6_000_000)
    packed = PackedRows(ids, bounds, 128)
    def growth():
        before, most = resident(), 0
        for k in range(packed.batches(512)): packed.batch(k, 512); most = max(most, resident())
        return (most - before) / ids.nbytes
    packed.batch(0, 512)
    kept = growth()
    monkeypatch.setattr(rows_module, '_release', lambda array: None) # The fault: pages stay
    grown = growth()
    print(f'resident memory after a pass: {kept:.0%} of the corpus, {grown:.0%} where pages are kept')
    assert kept < .25 and grown > .6


def test_workers_get_names_of_files_and_not_the_corpus(tmp_path):
    sizes = [len(pickle.dumps(PackedRows(*on_disk(tmp_path / str(n), n), 64))) for n in (10_000, 1_000_000)]
    assert max(sizes) < 2000
    ids, bounds = on_disk(tmp_path / 'again', 5000)
    again = pickle.loads(pickle.dumps(PackedRows(ids, bounds, 64)))
    assert isinstance(again.ids, np.memmap) and same(again.batch(7, 4), PackedRows(np.array(ids), np.array(bounds), 64).batch(7, 4))
    part_of = pickle.loads(pickle.dumps(PackedRows(ids[1000:], np.array(bounds[5:]) - 1000, 64))) # A slice of a mapped file is not the file
    assert same(part_of.batch(3, 4), PackedRows(np.array(ids[1000:]), np.array(bounds[5:]) - 1000, 64).batch(3, 4))


def test_pages_of_arrays_in_memory_are_left_alone(tmp_path):
    ids, bounds = on_disk(tmp_path / 'copy', 5000)
    changed = np.load(tmp_path / 'copy' / 'ids.npy', mmap_mode='c')
    changed[:] = 9
    PackedRows(changed, bounds, 64).batch(0, 4)
    assert (changed == 9).all()


def test_tokens_of_real_text(tmp_path):
    file = shared_data('text/wiki_hi.txt.gz')
    if file is None: pytest.skip('the shared texts are not here')
    with gzip.open(file, 'rt', encoding='utf-8') as f: texts = [line.strip() for line in itertools.islice(f, 600)]
    tok = train_tokenizer(texts[:200], 'bpe', 1000)
    ids, bounds = read_stream(write_stream(tokens_of(iter(texts), tok, group=97), tmp_path / 's', len(tok)))
    assert len(bounds) == len(texts) + 1
    for i in random.sample(range(len(texts)), 40): assert ids[bounds[i]:bounds[i + 1]].tolist() == tok(texts[i])['input_ids']
    batch = PackedRows(ids, bounds, 64).batch(3, 16)
    ends, inside = batch['input_ids'] == tok.eos_token_id, batch['texts'][:, 1:] == batch['texts'][:, :-1]
    assert not (ends[:, :-1] & inside).any() # Nothing of a text comes after its end
    begins = batch['input_ids'] == tok.bos_token_id
    assert (batch['position_ids'][begins] == 0).all()


def test_tokenizers_without_an_end_get_one():
    from tokenizers.processors import TemplateProcessing
    tok = train_tokenizer(['यह एक छोटा वाक्य है'] * 20, 'bpe', 300, min_frequency=1)
    tok._tokenizer.post_processor = TemplateProcessing(single='$A', special_tokens=[])
    got = list(tokens_of(['यह', '', 'है यह'], tok, group=2))
    assert [g[-1] for g in got] == [tok.eos_token_id] * 3 and got[1] == [tok.eos_token_id] and all(g.count(tok.eos_token_id) == 1 for g in got)
    read = []
    def texts():
        for i in range(10): read.append(i); yield {'text': 'यह'}
    some = tokens_of(texts(), tok, group=3)
    next(some)
    assert len(read) == 3 # One group is in memory
