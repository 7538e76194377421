"Probes fitted together: against scikit-learn, against each other, with planted features and random labels"
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lab_lm.evals.codes import online_code
from lab_lm.evals.fits import fit_linear_grid
from lab_lm.evals.lbfgs import lbfgs
from lab_lm.evals.mlp_fits import fit_mlp_grid

SIZES = [2, 3, 7, 2, 12]


def planted(words=1500, width=40, layers=2, seed=None):
    "Vectors of uneven spread [layers, words, width]; labels of five tasks drawn from them, three with gaps"
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(words, width)) * np.arange(1, width + 1) ** -.7
    x = np.stack([base @ np.linalg.qr(rng.normal(size=(width, width)))[0] + rng.normal(size=width) for _ in range(layers)])
    y = np.stack([(base @ rng.normal(size=(width, k)) * 2 + rng.gumbel(size=(words, k)) - .3 * np.arange(k)).argmax(1) for k in SIZES])
    return x, np.where(rng.random(y.shape) < np.array([1, .6, 1, .2, .5])[:, None], y, -1), rng


def peer(x, marks, c=.1, **how):
    "Scikit-learn on the labelled words, with our standardisation (all words)"
    return LogisticRegression(C=c, **how).fit(((x - x.mean(0)) / x.std(0))[marks >= 0], marks[marks >= 0])


def test_same_weights_and_loss_as_scikit_learn():
    "At the minimum, for two classes and for many, with words without a label"
    x, y, _ = planted(700, 20)
    grid = fit_linear_grid(x, y, tol=1e-13, most=2000)
    assert grid.converged.all() and grid.loss.shape == (2, 5)
    for layer in range(2):
        rows = np.cumsum([0, *map(len, grid.labels)])
        for task in range(5):
            other = peer(x[layer], y[task], tol=1e-10, max_iter=5000)
            np.testing.assert_array_equal(grid.labels[task], other.classes_)
            mine, bias = (t.numpy()[rows[task]:rows[task + 1]] for t in (grid.parts[layer].weights, grid.parts[layer].bias))
            if len(mine) == 2: mine, bias = mine[1:] - mine[:1], bias[1:] - bias[:1]
            np.testing.assert_allclose(mine, other.coef_, atol=2e-4)
            np.testing.assert_allclose(bias - bias.mean() * (len(bias) > 1), other.intercept_ - other.intercept_.mean() * (len(bias) > 1), atol=5e-4)
            p = np.exp(grid.log_probs(x)[layer, task][:, grid.labels[task]])
            np.testing.assert_allclose(p, other.predict_proba((x[layer] - x[layer].mean(0)) / x[layer].std(0)), atol=2e-4)


def test_weights_of_words_are_repetitions():
    "A word that counts three times is a word that stands there three times; one that counts nothing is not there"
    x, y, rng = planted(300, 8, 1)
    times = rng.integers(0, 4, 300)
    a = fit_linear_grid(x, y, weights=times, tol=1e-13, standardise=False, most=2000)
    b = fit_linear_grid(x.repeat(times, 1), y.repeat(times, 1), tol=1e-13, standardise=False, most=2000)
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-8)
    np.testing.assert_allclose(a.log_probs(x), b.log_probs(x), atol=1e-4)


def test_company_changes_nothing():
    "A task of the grid equals the task alone, and so does a layer"
    x, y, _ = planted(600, 30)
    together = fit_linear_grid(x, y, tol=1e-14, standardise=False, most=2000)
    alone = fit_linear_grid(x[1:], y[2], tol=1e-14, standardise=False, most=2000)
    np.testing.assert_allclose(together.log_probs(x)[1:, 2:3, :, :alone.size], alone.log_probs(x[1:]), atol=1e-4)


def test_order_of_layers_changes_nothing():
    "A layer begins at the scores of the one before, and ends at its own minimum"
    x, y, rng = planted(600, 30, 2)
    x = np.stack([x[0], rng.normal(size=x[0].shape), x[1]])
    a, b = (fit_linear_grid(some, y, tol=1e-14, most=2000) for some in (x, x[::-1]))
    np.testing.assert_allclose(a.loss, b.loss[::-1], rtol=1e-8)
    np.testing.assert_allclose(a.log_probs(x), b.log_probs(x[::-1])[::-1], atol=1e-4)


@pytest.mark.parametrize('words', [1, 3, 300])
def test_no_penalty_and_hardly_any_words(words):
    "Without a penalty, with one word, with vectors of zeros: finite, and every layer has an answer"
    x, y, _ = planted(300, 10, 3)
    x[1] = 0
    for l2 in (0., 10.):
        grid = fit_linear_grid(x.astype(np.float32), y[[0, 2]], np.arange(300) < words, l2=l2, most=30)
        assert np.isfinite(grid.loss).all() and (grid.predict(x) >= 0).all()


def test_accuracy_of_scikit_learn_by_default():
    "Within half a point in the mean, in float32 and with the tolerances of both left alone"
    x, y, rng = planted(4000, 64, 2)
    x, train = x.astype(np.float32), rng.random(4000) < .5
    guess, gaps = fit_linear_grid(x, y, train).predict(x), []
    for layer in range(2):
        for task in range(5):
            some, held = train & (y[task] >= 0), ~train & (y[task] >= 0)
            scale = StandardScaler().fit(x[layer][some])
            other = LogisticRegression(C=.1, max_iter=500).fit(scale.transform(x[layer][some]), y[task][some])
            gaps.append((guess[layer, task] == y[task])[held].mean() - other.score(scale.transform(x[layer][held]), y[task][held]))
    assert abs(np.mean(gaps)) < .005 and np.abs(gaps).max() < .02, gaps


@pytest.mark.parametrize('words', [12, 39, 41])
def test_fewer_words_than_dimensions(words):
    "The axes of few words give the same fit; labels not met are impossible"
    x, y, _ = planted(200, 40, 1)
    train = np.arange(200) < words
    grid = fit_linear_grid(x, y, train, tol=1e-12, most=2000)
    marks = np.where(train, y[2], -1)
    scaled = (x[0] - x[0][train].mean(0)) / x[0][train].std(0)
    other = LogisticRegression(C=.1, tol=1e-9, max_iter=5000).fit(scaled[marks >= 0], marks[marks >= 0])
    np.testing.assert_allclose(np.exp(grid.log_probs(x)[0, 2][:, other.classes_]), other.predict_proba(scaled), atol=1e-3)
    unseen = np.setdiff1d(np.arange(grid.size), other.classes_)
    assert np.isneginf(grid.log_probs(x)[0, 2][:, unseen]).all()


def test_constant_and_doubled_columns():
    "A column without spread and a copy of another leave the fit finite"
    x, y, _ = planted(300, 10, 1)
    x = np.concatenate([x, x[..., :1], np.full((1, 300, 1), 7.)], 2).astype(np.float32)
    grid = fit_linear_grid(x, y)
    assert grid.converged.all() and np.isfinite(grid.loss).all() and (grid.predict(x) >= 0).all()


def test_a_task_with_one_label_disturbs_no_other():
    "Nor does one without any"
    x, y, _ = planted(300, 10, 1)
    more = np.concatenate([y, np.full((1, 300), 4), np.full((1, 300), -1)])
    grid, plain = (fit_linear_grid(x, t, tol=1e-12, most=2000) for t in (more, y))
    assert grid.converged[:, :-1].all() and not grid.converged[:, -1].any()
    np.testing.assert_allclose(grid.loss[:, :5], plain.loss, rtol=1e-9)
    assert (grid.predict(x)[:, 5] == 4).all() and (grid.predict(x)[:, 6] == -1).all()


def test_convergence_is_told():
    x, y, _ = planted(300, 20, 1)
    assert not fit_linear_grid(x, y, most=2, tol=1e-12).converged.any()
    at = lbfgs(lambda at, _: ((at ** 4).sum(1).double(), 4 * at ** 3), torch.ones(3, 2, dtype=torch.float64), torch.arange(3), tol=1e-12, most=500)
    assert at.converged.all() and at.value.max() < 1e-6


def test_hidden_layer_reads_what_a_line_cannot():
    rng = np.random.default_rng()
    x = rng.normal(size=(2, 1000, 8)).astype(np.float32)
    y, train = ((x[1, :, 0] > 0) ^ (x[1, :, 1] > 0)).astype(int), np.arange(1000) < 700
    right = {f.__name__: (f(x, y, train).predict(x)[:, 0] == y)[:, ~train].mean(1) for f in (fit_linear_grid, fit_mlp_grid)}
    assert right['fit_mlp_grid'][1] > .85 > .62 > max(right['fit_mlp_grid'][0], *right['fit_linear_grid']), right


def test_online_code_equals_its_definition():
    "Block by block with scikit-learn, one strength"
    x, y, rng = planted(160, 6, 1)
    y, order = y[2:3], rng.permutation(160)
    code = online_code(x, y, order, fits=[lambda *a, **k: fit_linear_grid(*a, **k, tol=1e-12, most=2000)], portions=(.2, .5, 1))
    scaled, marks = ((x[0] - x[0].mean(0)) / x[0].std(0))[order], y[0][order]
    k, bits = marks.max() + 1, 32 * np.log2(y.max() + 1)
    for n, end in ((32, 80), (80, 160)):
        other = LogisticRegression(C=.1, tol=1e-9, max_iter=5000).fit(scaled[:n], marks[:n])
        p = np.zeros((end - n, k))
        p[:, other.classes_] = other.predict_proba(scaled[n:end])
        bits -= np.log2((n * p[np.arange(end - n), marks[n:end]] + 1 / k) / (n + 1)).sum()
    np.testing.assert_allclose(code.bits, [[bits]], rtol=1e-4)
    np.testing.assert_allclose(code.uniform, [160 * np.log2(k)])


@pytest.mark.parametrize('fits', [None, [fit_mlp_grid]])
def test_random_labels_do_not_compress(fits):
    "At most 1.02, whatever the probe; a planted label does"
    rng = np.random.default_rng()
    x = rng.normal(size=(2, 400, 24)).astype(np.float32)
    y = np.stack([rng.integers(0, 5, 400), rng.integers(0, 2, 400), rng.integers(0, 3, 400)])
    x[0, np.arange(400), y[2]] += 5
    code = online_code(x, y, rng.permutation(400), **({'fits': fits} if fits else {}))
    assert code.compression[:, :2].max() <= 1.02 and code.compression[1, 2] <= 1.02
    assert code.compression[0, 2] > 1.3


def test_mixture_is_near_the_best_strength():
    "The code of several strengths is at most log2 of their number longer than the best"
    x, y, rng = planted(200, 8, 1)
    order, fits = rng.permutation(200), [lambda *a, l2=l2, **k: fit_linear_grid(*a, **k, l2=l2) for l2 in (3., 300.)]
    single = np.stack([online_code(x, y, order, fits=[fit]).bits for fit in fits])
    mixed = online_code(x, y, order, fits=fits).bits
    assert (mixed <= single.min(0) + 1.001).all() and (mixed >= single.min(0) - .001).all()
