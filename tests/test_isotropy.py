"Numbers of isotropy against loops, published steps and scikit-learn; the Gaussian test's level and power on fresh draws; the faults of the ancestors, planted; pictures"
import math

import numpy as np
import pytest
import torch

from lab_lm.evals.isotropy import FORMS, MEASURES, effective_rank, gaussian_test, isoscore, isotropy, moments, null_draws
from lab_lm.evals.maps import embedding_map, isotropy_panels, neighbourhoods, pair_cosines, principal, shadows
from lab_lm.nets.sigreg import covariance_term, expected, sigreg

rng = np.random.default_rng()


def cloud(n, d):
    "Correlated vectors away from the origin"
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 3 * rng.normal(size=d)


def fresh(): return int(rng.integers(10**6))


def cone(n, d, cosine):
    "Unit vectors whose average cosine is about `cosine`"
    x = rng.normal(size=(n, d))
    x[:, rng.integers(d)] += (cosine * d / (1 - cosine)) ** .5
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# ---- numbers

@pytest.mark.parametrize('n, d', [(7, 3), (3, 9), (60, 5), (2, 1)])
def test_numbers_against_loops(n, d):
    x = cloud(n, d)
    found, centred = isotropy(x), x - x.mean(0)
    cosines = [x[i] @ x[j] / math.hypot(*x[i]) / math.hypot(*x[j]) for i in range(n) for j in range(n) if i != j]
    c = np.array([[sum(centred[k, i] * centred[k, j] for k in range(n)) / n for j in range(d)] for i in range(d)])
    norms = [math.hypot(*row) for row in x]
    assert found['cosine'] == pytest.approx(np.mean(cosines), abs=1e-9)
    assert found['mean'] == pytest.approx(math.sqrt(sum(m * m for m in x.mean(0)) / d))
    assert [found['norm'], found['norm_std'], found['norm_min'], found['norm_max']] == pytest.approx([np.mean(norms), np.std(norms), min(norms), max(norms)])
    assert [found['std'], found['std_spread']] == pytest.approx([np.sqrt(np.diag(c)).mean(), np.sqrt(np.diag(c)).std()])
    if d > 1: assert found['off_diagonal'] == pytest.approx(np.mean([abs(c[i, j]) for i in range(d) for j in range(d) if i != j]) / np.diag(c).mean())
    assert found.keys() == MEASURES.keys() and (found['n'], found['dims']) == (n, d)


def test_rank_and_isoscore_as_published():
    "Roy & Vetterli on the matrix itself; Rudman et al. in their four steps, principal components included"
    x = cloud(80, 12)
    centred, found = x - x.mean(0), isotropy(x)
    s = np.linalg.svd(centred, compute_uv=False)
    p = s / s.sum()
    assert found['effective_rank'] == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)), rel=1e-6)
    turned = centred @ np.linalg.svd(centred)[2].T
    diagonal, n = np.diag(np.cov(turned.T)), 12
    defect = np.linalg.norm(math.sqrt(n) * diagonal / np.linalg.norm(diagonal) - np.ones(n)) / math.sqrt(2 * (n - math.sqrt(n)))
    share = (n - defect ** 2 * (n - math.sqrt(n))) ** 2 / n ** 2
    assert found['isoscore'] == pytest.approx((n * share - 1) / (n - 1), rel=1e-6)
    assert found['eigenvalue_ratio'] == pytest.approx((s[-1] / s[0]) ** 2, rel=1e-6)


def test_what_scale_and_rotation_leave_alone():
    x = cloud(50, 6)
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    a, b, c = isotropy(x), isotropy(x * 37), isotropy(x @ turn)
    for name in ('effective_rank', 'isoscore', 'eigenvalue_ratio', 'cosine'): assert a[name] == pytest.approx(b[name], rel=1e-6) == pytest.approx(c[name], rel=1e-6)
    assert a['off_diagonal'] == pytest.approx(b['off_diagonal'], rel=1e-6) and b['norm'] == pytest.approx(37 * a['norm'])


def test_flat_and_dead_directions():
    x = np.zeros((40, 10))
    x[:, :4] = rng.normal(size=(40, 4))
    found = isotropy(x)
    assert found['dead'] == 6 and found['effective_rank'] <= 4 + 1e-9 and found['isoscore'] <= 3 / 9 + 1e-9 and found['eigenvalue_ratio'] == 0
    assert isotropy(x[:3])['effective_rank'] <= 2 + 1e-6 # Three points span a plane
    assert effective_rank([1] * 4 + [0] * 6) == pytest.approx(4) and isoscore([1] * 4 + [0] * 6) == pytest.approx(3 / 9)
    assert effective_rank([]) == isoscore([]) == effective_rank([-1e-18, 0]) == 0


def test_files_tensors_and_parts_give_the_same(tmp_path):
    x = rng.normal(size=(9001, 8)).astype(np.float32) + 2
    np.save(tmp_path / 'x.npy', x)
    found = [isotropy(v) for v in (x, np.load(tmp_path / 'x.npy', mmap_mode='r', allow_pickle=False), torch.tensor(x, requires_grad=True), x[rng.permutation(9001)])]
    for other in found[1:]: assert other == pytest.approx(found[0], rel=1e-6)
    assert isotropy(torch.tensor(x).bfloat16())['norm'] == pytest.approx(found[0]['norm'], rel=.01)
    assert isotropy(x.astype(np.float16))['norm'] == pytest.approx(found[0]['norm'], rel=.01)
    assert np.allclose(moments(x).covariance, np.cov(x.T.astype(float), ddof=0)) and isotropy([[1, 2], [3, 4]])['norm_min'] == pytest.approx(math.sqrt(5))


def test_bad_vectors_are_named():
    x = rng.normal(size=(5000, 4))
    x[[4321, 4400], 2] = np.nan, np.inf
    for act in (isotropy, principal, lambda v: gaussian_test(v, most=5000)):
        with pytest.raises(ValueError, match='NaN or infinite'): act(x)
    with pytest.raises(ValueError, match='vector 4321 of 5000.*2 of the 904'): isotropy(x)
    for shape in ((0, 3), (3, 0), (4,), (2, 2, 2)):
        with pytest.raises(ValueError, match='matrix'): isotropy(np.zeros(shape))
    for bad, told in ((dict(form='cone'), 'known: auto, raw, sphere, shape'), (dict(draws=18), '19 or more')):
        with pytest.raises(ValueError, match=told): gaussian_test(x[:50], **bad)
    with pytest.raises(ValueError, match='1 vector'): gaussian_test(x[:1])


# ---- an ancestor's loss, which saw second moments and no scale

def test_collapse_is_seen():
    "The legacy term is near 0 for collapsed vectors; every number here tells them"
    tiny, equal = .014 * rng.normal(size=(256, 16)), np.full((256, 16), .3)
    assert covariance_term(torch.tensor(tiny)) < 1e-4 and covariance_term(torch.tensor(equal)) < 1e-20
    assert gaussian_test(tiny, directions=32, draws=199).p == gaussian_test(equal, directions=32, draws=199).p == .005
    assert gaussian_test(equal, 'shape', directions=32, draws=199).p == .005
    found = isotropy(equal)
    assert (found['effective_rank'], found['isoscore'], found['dead'], found['off_diagonal']) == (0, 0, 16, 0) and found['cosine'] == pytest.approx(1)
    assert isotropy(np.zeros((4, 3)))['dead'] == 3 and math.isnan(isotropy(np.zeros((4, 3)))['cosine'])


# ---- the test

@pytest.mark.parametrize('form', ['raw', 'sphere'])
def test_statistic_is_the_loss(form):
    for n, d in ((2, 3), (300, 24), (40, 200)):
        x, seed = torch.tensor(cloud(n, d)).float() / 3, fresh()
        ours = gaussian_test(x, form, directions=17, draws=19, seed=seed).statistic
        assert ours == pytest.approx(float(sigreg(x, 17, seed=seed, scale=form)), rel=2e-4, abs=1e-4)


def test_mean_under_the_null():
    for form in FORMS:
        null = null_draws(80, 20, form, directions=24, draws=499, seed=fresh())
        assert len(null) == 499 and (np.diff(null) >= 0).all()
        assert abs(null.mean() - expected()) < .15 if form != 'shape' else .3 < null.mean() < .9 # A mean that is estimated fits better


@pytest.mark.parametrize('form, tables, sets, within', [('raw', 10, 150, .028), ('sphere', 6, 100, .042), ('shape', 6, 100, .042)])
def test_false_alarms(form, tables, sets, within):
    "5 % of the sets drawn from N(0, I), and p-values evenly spread; directions, null and data are new every time"
    p = np.array([gaussian_test(torch.randn(40, 6), form, directions=12, seed=seed).p for seed in (fresh() for _ in range(tables)) for _ in range(sets)])
    assert abs((p <= .05).mean() - .05) < within and abs((p <= .5).mean() - .5) < .08 and p.min() >= .001 and p.max() <= 1


def test_power_on_a_cone():
    "Every one of 120 cones is found, unit vectors and others; unit vectors are named"
    seed = fresh()
    found = [gaussian_test(cone(150, 32, .1), directions=64, draws=199, seed=seed) for _ in range(60)]
    assert {t.form for t in found} == {'sphere'} and np.mean([t.p <= .05 for t in found]) > .99 and 'unit vectors' in str(found[0])
    free = [gaussian_test(rng.normal(size=(150, 32)) + 1.5 * np.eye(32)[3], directions=64, draws=199, seed=seed) for _ in range(60)]
    assert {t.form for t in free} == {'raw'} and np.mean([t.p <= .05 for t in free]) > .99
    assert isotropy(cone(20, 8, .1))['unit_norm'] == 1 and isotropy(1.1 * cone(20, 8, .1))['unit_norm'] == 0


def test_even_sphere_passes_where_the_raw_number_is_blind():
    "The trap of length 1: read raw, even unit vectors and a cone look the same"
    even, narrow = cone(200, 128, 0), cone(200, 128, .9)
    raw = [gaussian_test(x, 'raw', directions=32, draws=19).statistic for x in (even, narrow)]
    told = [gaussian_test(x, directions=32, draws=199) for x in (even, narrow)]
    assert abs(raw[0] / raw[1] - 1) < .1 and told[0].statistic < 2 and told[1].statistic > 20 and told[1].p == .005


def test_forms_and_scale():
    x = rng.normal(size=(300, 12))
    assert gaussian_test(9 * x + 4, 'shape', directions=16, draws=199).statistic == pytest.approx(gaussian_test(x, 'shape', directions=16, draws=199).statistic, rel=1e-3)
    assert gaussian_test(9 * x, directions=16, draws=199).p == gaussian_test(x + 4, directions=16, draws=199).p == .005
    flat = x * [3] * 1
    flat[:, :8] *= .05
    assert gaussian_test(flat, 'shape', directions=16, draws=199).p == .005 # Rank 4 of 12


def test_rows_in_any_order_and_choice_by_seed():
    x = rng.normal(size=(120, 10))
    a, b = gaussian_test(x, directions=16, draws=99), gaussian_test(x[::-1].copy(), directions=16, draws=99)
    assert a.statistic == pytest.approx(b.statistic, rel=1e-5) and tuple(a) == (a.statistic, a.p) and (a.n, a.dims) == (120, 10)
    some = [gaussian_test(x, directions=16, draws=99, most=50, seed=s) for s in (1, 1, 2)]
    assert some[0] == some[1] != some[2] and some[0].n == 50
    assert gaussian_test(rng.normal(size=(60, 1)) * 5, directions=4, draws=99).p <= .02


# ---- pictures

def test_principal_against_scikit_learn():
    from sklearn.decomposition import PCA
    x = cloud(40, 7)
    points, shares = principal(x, 3)
    model = PCA(3).fit(x)
    assert np.allclose(np.abs(points), np.abs(model.transform(x)), atol=1e-8) and np.allclose(shares, model.explained_variance_ratio_)
    assert np.allclose(principal(x + 5, 3)[0], points) and principal(x[:1])[0].tolist() == [[0, 0]] and principal(x[:, :1])[0][:, 1].tolist() == [0] * 40


def test_pairs_and_shadows():
    assert (pair_cosines(np.eye(30), 5000, fresh()) == 0).all() # Never a vector with itself
    x = cloud(30, 4)
    assert abs(pair_cosines(x, 20_000, fresh()).mean() - isotropy(x)['cosine']) < .05
    assert len(shadows(x, 9)) == 270 and np.isfinite(shadows(np.zeros((3, 4)))).all()


def test_figures():
    import matplotlib
    matplotlib.use('agg')
    from matplotlib import pyplot as plt
    x = cloud(60, 5)
    fig = isotropy_panels({'before': x, 'after': rng.normal(size=(30, 8)), 'collapsed': np.ones((10, 3)), 'zero': np.zeros((2, 2))})
    assert len(fig.axes) == 4 and [t.get_text() for t in fig.legends[0].get_texts()] == ['before', 'after', 'collapsed', 'zero']
    groups = [f'topic {i % 9}' for i in range(60)]
    ax = embedding_map(x, groups, names={3: 'हिन्दी', 59: 'last'})
    assert sum(len(c.get_offsets()) for c in ax.collections) == 60 and len(ax.collections) == 9 and len(ax.texts) == 2
    assert '% of the variance' in ax.get_xlabel()
    few = embedding_map(x, most=20, method='tsne')
    assert sum(len(c.get_offsets()) for c in few.collections) == 20 and few.get_xlabel() == ''
    for bad, told in ((dict(groups=['a']), '1 groups for 60'), (dict(method='umap'), 'known: pca, tsne')):
        with pytest.raises(ValueError, match=told): embedding_map(x, **bad)
    with pytest.raises(ValueError, match='at least 4'): neighbourhoods(x[:2])
    with pytest.raises(ValueError, match='at least one set'): isotropy_panels({})
    plt.close('all')
