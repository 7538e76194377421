"Search by vectors: against scoring everything, against FAISS, and against planted faults"
import math
import tracemalloc

import numpy as np
import pytest
import torch

from lab_lm.nets import search as module
from lab_lm.nets.search import METRICS, Best, kth_largest, nearest, pair_scores, search
from lab_lm.text.ranking import ranking

RNG = np.random.default_rng()


def sorted_scores(queries, vectors, k, metric, order=None):
    "Every pair scored, everything sorted"
    every = np.stack([pair_scores(np.broadcast_to(q, vectors.shape), vectors, metric) for q in queries]) if len(queries) else np.zeros((0, len(vectors)))
    rank = np.arange(len(vectors)) if order is None else order
    places = np.lexsort((np.broadcast_to(-rank, every.shape), -every))[:, :k]
    return np.take_along_axis(every, places, 1), places


def same(found, wanted):
    "Scores and places, to the last bit"
    assert np.array_equal(found[1], wanted[1]) and np.array_equal(found[0], wanted[0])


def close(n, width, spread=1e-7):
    "Vectors that differ in their last digits only, so that every order of summation ranks them otherwise"
    return (RNG.normal(size=(1, width)) * (1 + spread * RNG.normal(size=(n, width)))).astype(np.float32)


def kinds():
    "Queries and vectors of every odd kind"
    normal = lambda n, d: RNG.normal(size=(n, d)).astype(np.float32)
    yield 'normal', normal(9, 33), normal(700, 33)
    yield 'whole numbers, many ties', RNG.integers(-2, 3, (5, 6)).astype(np.float32), RNG.integers(-2, 3, (900, 6)).astype(np.float32)
    yield 'last digits', close(4, 64), close(600, 64)
    yield 'far from zero', normal(4, 20) + 300, normal(500, 20) + 300
    yield 'every vector twice', normal(3, 8), np.repeat(normal(200, 8), 2, 0)
    yield 'one and the same', normal(3, 8), np.repeat(normal(1, 8), 300, 0)
    yield 'without length', np.concatenate((normal(2, 5), np.zeros((1, 5), np.float32))), np.where(RNG.random((400, 1)) < .5, 0, normal(400, 5))
    yield 'lengths of all sizes', normal(5, 12) * 10. ** RNG.integers(-17, 17, (5, 1)), normal(500, 12) * 10. ** RNG.integers(-17, 17, (500, 1))
    yield 'vanishing', normal(3, 12) * 1e-30, normal(300, 12) * 10. ** RNG.uniform(-44, -20, (300, 1))
    yield 'one dimension', normal(3, 1), normal(50, 1)
    yield 'one vector', normal(3, 4), normal(1, 4)


@pytest.mark.parametrize('metric', METRICS)
def test_the_same_as_scoring_everything(metric):
    for kind, queries, vectors in kinds():
        queries, vectors = queries.astype(np.float32), vectors.astype(np.float32)
        for k in (1, 10, len(vectors) + 5):
            wanted = sorted_scores(queries, vectors, k, metric)
            for chunk in (None, 3, int(RNG.integers(1, 400))): same(nearest(queries, vectors, k, metric, chunk), wanted)
            same(nearest(queries, torch.tensor(vectors), k, metric, engine='torch', chunk=130), wanted)


@pytest.mark.parametrize('metric', METRICS)
def test_faiss_selects_the_same(metric):
    pytest.importorskip('faiss')
    for kind, queries, vectors in kinds():
        queries, vectors = queries.astype(np.float32), vectors.astype(np.float32)
        if 'of all sizes' in kind or kind == 'vanishing': continue # Its own sums overflow or vanish there
        for chunk in (None, 150): same(nearest(queries, vectors, 7, metric, chunk, engine='faiss'), sorted_scores(queries, vectors, 7, metric))


def test_the_distance_is_the_root_and_faiss_agrees():
    faiss = pytest.importorskip('faiss')
    queries, vectors = RNG.normal(size=(20, 16)).astype(np.float32), RNG.normal(size=(3000, 16)).astype(np.float32)
    index = faiss.IndexFlatL2(16)
    index.add(vectors)
    squares, ids = index.search(queries, 5)
    scores, places = nearest(queries, vectors, 5, 'l2')
    assert np.allclose(scores, -np.sqrt(squares), atol=1e-4) and (places == ids).mean() > .98
    mine, itself = nearest(vectors[:50], vectors, 1, 'l2')
    assert (mine == 0).all() and np.array_equal(itself[:, 0], np.arange(50))


def test_pair_scores_by_hand_and_in_more_digits():
    for width in (1, 3, 40, 385, 4096):
        a, b = (RNG.normal(size=(30, width)).astype(np.float32) for _ in range(2))
        for i in range(30):
            x, y = a[i].tolist(), b[i].tolist()
            dot, far = math.fsum(p * q for p, q in zip(x, y)), math.sqrt(math.fsum((p - q) ** 2 for p, q in zip(x, y)))
            size = math.sqrt(math.fsum(p * p for p in x) * math.fsum(q * q for q in y))
            for metric, value in dict(cosine=dot / size, dot=dot, l2=-far).items():
                assert abs(float(pair_scores(a[i:i + 1], b[i:i + 1], metric)[0]) - value) <= 1.01 * float(np.spacing(np.float32(abs(value)))) / 2


def test_a_score_does_not_depend_on_its_neighbours():
    a, b = (RNG.normal(size=(500, 61)).astype(np.float32) for _ in range(2))
    for metric in METRICS:
        whole = pair_scores(a, b, metric)
        for _ in range(20):
            some = RNG.permutation(500)[:RNG.integers(1, 40)]
            assert np.array_equal(pair_scores(a[some], b[some], metric), whole[some])


def test_without_the_margin_near_ties_are_lost(monkeypatch):
    queries, vectors = close(8, 384), close(4000, 384)
    wanted = sorted_scores(queries, vectors, 10, 'dot')
    same(nearest(queries, vectors, 10, 'dot'), wanted)
    monkeypatch.setattr(module, 'margin', lambda sizes, *_: np.zeros_like(sizes))
    assert not np.array_equal(nearest(queries, vectors, 10, 'dot')[1], wanted[1])


def test_the_kth_largest_by_sorting():
    for _ in range(30):
        n, size, k = (int(x) for x in RNG.integers(1, (9, 200, 12)))
        group = RNG.integers(0, n, size)
        values = (RNG.integers(-3, 4, size) * 10. ** RNG.integers(-40, 38, size)).astype(np.float32)
        wanted = [np.sort(v)[-k] if len(v := values[group == g]) >= k else -np.inf for g in range(n)]
        assert np.array_equal(kth_largest(group, values, n, k), wanted)


def test_parts_merge_into_the_whole():
    queries, vectors = RNG.integers(-1, 2, (6, 5)).astype(np.float32), RNG.integers(-1, 2, (400, 5)).astype(np.float32)
    order = RNG.permutation(400)
    best = Best(6, 12, order)
    for at in np.split(RNG.permutation(400), [50, 51, 300]):
        scores, places = nearest(queries, vectors[at], 12, order=order[at])
        rows = np.repeat(np.arange(6), scores.shape[1])
        best.merge(rows, at[places.ravel()], scores.ravel())
    same((best.scores, best.places), sorted_scores(queries, vectors, 12, 'cosine', order))


def test_files_half_precision_and_tensors(tmp_path):
    queries, vectors = RNG.normal(size=(4, 30)).astype(np.float32), RNG.normal(size=(900, 30)).astype(np.float32)
    for kind in (np.float16, np.float32, np.float64):
        np.save(tmp_path / 'v.npy', vectors.astype(kind))
        mapped = np.load(tmp_path / 'v.npy', mmap_mode='r', allow_pickle=False)
        same(nearest(queries, mapped, 8), sorted_scores(queries, vectors.astype(kind).astype(np.float32), 8, 'cosine'))
        assert isinstance(mapped, np.memmap) and not mapped.flags.writeable
    half = torch.tensor(vectors, requires_grad=True).bfloat16()
    for engine in ('auto', 'torch'): same(nearest(torch.tensor(queries), half, 8, engine=engine), sorted_scores(queries, half.detach().float().numpy(), 8, 'cosine'))
    same(nearest(queries[:, ::-1], vectors[:, ::-1], 8, 'dot'), nearest(queries, vectors, 8, 'dot'))


def test_only_some_take_part():
    queries, vectors = RNG.normal(size=(4, 10)).astype(np.float32), RNG.normal(size=(600, 10)).astype(np.float32)
    among = RNG.random(600) < .3
    scores, places = sorted_scores(queries, vectors[among], 20, 'l2')
    for engine in ('numpy', 'torch'): same(nearest(queries, vectors, 20, 'l2', 64, among=among, engine=engine), (scores, np.flatnonzero(among)[places]))
    assert nearest(queries, vectors, 20, among=np.zeros(600, bool))[0].shape == (4, 0)


def test_memory_is_bounded():
    queries, vectors = RNG.normal(size=(100, 64)).astype(np.float32), RNG.normal(size=(150_000, 64)).astype(np.float32)
    for data, most in ((vectors, 30e6), (np.repeat(vectors[:1], 20_000, 0), 300e6)): # The second: nothing but ties
        tracemalloc.start()
        try:
            scores, places = nearest(queries, data, 50)
            peak = tracemalloc.get_traced_memory()[1]
        finally: tracemalloc.stop()
        print(peak)
        assert peak < most
    assert np.array_equal(places, np.tile(np.arange(20_000)[::-1][:50], (100, 1)))


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf, 3e38])
def test_spoilt_vectors_are_named(value):
    for _ in range(5):
        queries, vectors, row = RNG.normal(size=(40, 7)).astype(np.float32), RNG.normal(size=(400, 7)).astype(np.float32), int(RNG.integers(400))
        vectors[row, RNG.integers(7)] = value
        for metric in METRICS:
            with pytest.raises(ValueError, match=f'vector {row} holds NaN'): nearest(queries, vectors, 5, metric, 64)
            with pytest.raises(ValueError, match=f'query {row} holds NaN'): nearest(vectors, queries, 5, metric)
        with pytest.raises(ValueError, match=f"passage 'd{row}' holds"): search({'q': queries[0]}, ([f'd{i}' for i in range(400)], vectors))
        with pytest.raises(ValueError, match=f'vector {row} holds NaN'): nearest(queries, torch.tensor(vectors), 5, engine='torch')


def test_misuse_is_told(monkeypatch):
    queries, vectors = np.ones((2, 3)), np.ones((4, 3))
    for wrong, said in ((dict(k=0), 'start at 1'), (dict(chunk=0), 'start at 1'), (dict(metric='euclid'), 'known: cosine, dot, l2'), (dict(engine='annoy'), 'known: auto'),
                        (dict(order=np.arange(3)), 'one value a vector'), (dict(among=[True]), 'one value a vector')):
        with pytest.raises(ValueError, match=said): nearest(queries, vectors, **wrong)
    with pytest.raises(ValueError, match='one encoder for both'): nearest(queries, vectors[:, :2])
    with pytest.raises(ValueError, match='give .q, d.'): nearest(queries[0], vectors)
    with pytest.raises(ValueError, match='3 ids for 4 vectors of passages'): search({'q': queries[0]}, (['a', 'b', 'c'], vectors))
    with pytest.raises(ValueError, match="'b' of the passages is there twice"): search({'q': queries[0]}, (['a', 'b', 'b', 'c'], vectors))
    monkeypatch.setitem(__import__('sys').modules, 'faiss', None)
    with pytest.raises(ValueError, match='engine=numpy gives the same ranking'): nearest(queries, vectors, engine='faiss')


def test_runs_are_ranked_as_trec_eval_ranks_them():
    for _ in range(10):
        ids = list(dict.fromkeys(''.join(RNG.choice(list('ab1९ञ'), RNG.integers(1, 4))) for _ in range(60)))
        queries, vectors = RNG.integers(-1, 2, (5, 3)).astype(float), RNG.integers(-1, 2, (len(ids), 3)).astype(float)
        whole = search((list('vwxyz'), queries), (ids, vectors), len(ids))
        cut = search((list('vwxyz'), queries), dict(zip(ids, vectors)), 7, chunk=4)
        for q in 'vwxyz':
            assert list(whole[q]) == ranking(whole[q]) and len(whole[q]) == len(ids)
            assert list(cut[q].items()) == list(whole[q].items())[:7]
    assert search({}, {'a': [1.]}) == {} and search({'q': [1.]}, {}) == {'q': {}}
