"""Intervals, tests, effect sizes and power against SciPy, statsmodels and counting; how often intervals hold the truth; the cache of results."""
import itertools
import json
import math
import random
import textwrap

import numpy as np
import pytest
import scipy.stats as sps
import torch

from lab_lm.core.runs import Score
from lab_lm.evals import stats
from lab_lm.evals.cache import Cache
from lab_lm.evals.compare import benjamini_hochberg, compare, holm, mcnemar, paired_permutation, wilcoxon
from lab_lm.evals.effects import cliffs_delta, cohens_d, odds_ratio, size_name
from lab_lm.evals.fingerprint import fingerprint
from lab_lm.evals.power import items_needed, power_numbers, power_pairs
from lab_lm.evals.stats import bca, bca_sums, bootstrap, bootstrap_grid, bootstrap_ratio, grid_error, paired_bootstrap, share_score

SEED = random.randrange(2**31)
rng = np.random.default_rng(SEED)


def test_intervals_are_those_of_scipy_given_the_same_draws():
    for m in (15, 40, 333): # With fewer items a draw can be the sample itself, and rounding decides whether SciPy takes it for equal
        values, under, seed = rng.gamma(.7, 2, m), rng.uniform(1, 9, m), int(rng.integers(1000))
        for method, ours in (('percentile', bootstrap(values, seed, 999)), ('BCa', bca(values, seed, 999))):
            there = sps.bootstrap((values,), np.mean, n_resamples=999, method=method, rng=np.random.default_rng(seed)).confidence_interval
            assert [ours.low, ours.high] == pytest.approx(list(there), rel=1e-9), (SEED, m, method)
        ratio = lambda x, y, axis: x.sum(axis) / y.sum(axis)
        ours = bca_sums(np.stack([values, under], 1), lambda s: s[:, 0] / s[:, 1], seed, 999, .9)
        there = sps.bootstrap((values, under), ratio, paired=True, n_resamples=999, method='BCa', confidence_level=.9, rng=np.random.default_rng(seed)).confidence_interval
        assert [ours.low, ours.high] == pytest.approx(list(there), rel=1e-9), (SEED, m)
        assert ours.value == bootstrap_ratio(values, under).value


def test_intervals_of_odd_data_are_defined():
    assert [(s.low, s.high) for s in (bca([2.]), bca([.1] * 7))] == [(2., 2.), (pytest.approx(.1), pytest.approx(.1))]
    spike = bca([0.] * 30 + [1.]) # Few draws lie below the mean, none is lower than 0
    assert 0 <= spike.low < spike.value < spike.high <= 1
    best = bca_sums(np.eye(9)[:, :1] + 1, lambda s: (s[:, 0] > 9.5).astype(float)) # A value that half of the draws reach
    assert 0 <= best.low <= best.high <= 1
    for odd, said in (([], 'no items'), ([1., math.inf], '1 of 2')):
        with pytest.raises(ValueError, match=said): bca(odd)
    with pytest.raises(ValueError, match='has no value on'), np.errstate(all='ignore'): stats.bootstrap_sums([[0., 0.], [0., 1.]], lambda s: s[:, 0] / s[:, 1])
    with pytest.raises(ValueError, match='between 0 and 1'): bca([1., 2.], level=0)
    same = stats._bca_levels(np.array([1., 2., 3.]), 2., np.array([1., 1., 1.]), .95)
    assert same == pytest.approx([.025, .975])


def test_wilson_is_that_of_scipy_and_statsmodels():
    for k, n in ((0, 20), (20, 20), (13, 17), (1, 1), (480, 1000)):
        ours, there = share_score([i < k for i in range(n)], level=.9), sps.binomtest(k, n).proportion_ci(.9, 'wilson')
        assert (ours.value, ours.low, ours.high) == pytest.approx((k / n, *there))
    statsmodels = pytest.importorskip('statsmodels.stats.proportion', reason='needs the oracle: pip install statsmodels')
    k, n = int(rng.integers(1, 99)), 99
    ours = share_score([i < k for i in range(n)])
    assert (ours.low, ours.high) == pytest.approx(statsmodels.proportion_confint(k, n, method='wilson'))


def columns_held(draw, truth, m, sets=2000, n=1000):
    "How often the percentile and the BCa interval hold the truth: one data set a column, all with the same draws of items"
    sets_of = draw(rng, (m, sets))
    draws, mean = stats._resampled_sums(sets_of, int(rng.integers(2**31)), n) / m, sets_of.mean(0)
    low, high = np.quantile(draws, [.025, .975], axis=0)
    one = bootstrap(sets_of[:, 0], 7, n) # The columns are what the function does
    assert [one.low, one.high] == pytest.approx(np.quantile(stats._resampled_sums(sets_of, 7, n)[:, 0] / m, [.025, .975]))
    levels = [stats._bca_levels(draws[:, i], mean[i], (sets_of[:, i].sum() - sets_of[:, i]) / (m - 1), .95) for i in range(sets)]
    ends = np.array([np.quantile(draws[:, i], level) for i, level in enumerate(levels)])
    return ((low <= truth) & (truth <= high)).mean(), ((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean()


def test_intervals_hold_the_truth_as_often_as_they_say():
    "2,000 data sets each; 93 to 97 % is the bar, and the bounds below add two standard errors of the count itself"
    close = lambda share: .93 - .01 <= share <= .97 + .01
    for draw, truth, m in ((lambda r, size: r.normal(.7, 1, size), .7, 120), (lambda r, size: (r.random(size) < .7) * 1., .7, 120), (lambda r, size: r.exponential(1, size), 1., 200)):
        assert all(map(close, columns_held(draw, truth, m))), (SEED, m)
    right = rng.random((2000, 60)) < .85
    assert close(np.mean([s.low <= .85 <= s.high for s in map(share_score, right.tolist())])), SEED
    plain, better = columns_held(lambda r, size: np.exp(r.normal(0, 1, size)), math.exp(.5), 60) # Very skewed: neither keeps its word, BCa hardly better
    assert plain < .93 and better > plain - .01, (SEED, plain, better)


def test_crossed_intervals_hold_the_truth_where_those_over_items_do_not():
    held, items_only, sets = [], [], 1000
    for _ in range(sets):
        cells = rng.normal(0, .3, (5, 1)) + rng.normal(0, 1, (1, 50)) + rng.normal(0, 1, (5, 50))
        score, mean = bootstrap_grid(cells, n=200), cells.mean(0)
        held.append(score.low <= 0 <= score.high)
        items_only.append(abs(mean.mean()) <= 1.96 * mean.std(ddof=1) / math.sqrt(50))
    assert .915 <= np.mean(held) <= .985 and np.mean(items_only) < .905, (SEED, np.mean(held), np.mean(items_only))


def test_the_error_of_a_grid_is_that_of_the_two_way_table():
    cells = rng.normal(0, 1, (4, 1)) + rng.normal(0, 1, (1, 9)) + rng.normal(0, .3, (4, 9))
    seeds, items = cells.mean(1, keepdims=True) - cells.mean(), cells.mean(0, keepdims=True) - cells.mean()
    rest = cells - cells.mean() - seeds - items
    ms = [9 * (seeds**2).sum() / 3, 4 * (items**2).sum() / 8, (rest**2).sum() / 24] # Mean squares of the table
    error, free = grid_error(cells)
    assert error**2 == pytest.approx((ms[0] + ms[1] - ms[2]) / 36)
    assert free == pytest.approx((ms[0] + ms[1] - ms[2])**2 / (ms[0]**2 / 3 + ms[1]**2 / 8 + ms[2]**2 / 24))
    assert grid_error(cells[:1]) == pytest.approx((cells[0].std(ddof=1) / 3, 8)) # One seed: Student's over items
    other = rng.normal(0, 1, (2, 9))
    assert grid_error(cells, other) == pytest.approx(grid_error(other, cells)) and grid_error(np.ones((3, 3))) == (0., math.inf)
    one, two = bootstrap_grid(cells, 3), bootstrap_grid(cells, 3, other=other)
    assert one.n == 9 and '4 seeds' in one.protocol and '4 seeds against 2 seeds' in two.protocol and two.value == pytest.approx(cells.mean() - other.mean())
    assert bootstrap_grid(cells, 3) == one != bootstrap_grid(cells, 4)
    assert bootstrap_grid(cells, other=cells).value == 0
    with pytest.raises(ValueError, match='1 of 2 items'): bootstrap_grid([[1., math.nan], [1., 1.]])


def test_corrections_are_those_of_statsmodels():
    multitest = pytest.importorskip('statsmodels.stats.multitest', reason='needs the oracle: pip install statsmodels')
    for m in (1, 2, 13, 130):
        p = rng.choice([*rng.random(m) ** 2, .04, .04, 0., 1.], m)
        for ours, name in ((holm, 'holm'), (benjamini_hochberg, 'fdr_bh')):
            np.testing.assert_allclose(ours(p), multitest.multipletests(p, method=name)[1], atol=1e-12, err_msg=str(SEED))
        np.testing.assert_allclose(benjamini_hochberg(p), sps.false_discovery_control(p), atol=1e-12)
    for bad in ([-.1], [1.1], [math.nan]):
        with pytest.raises(ValueError, match='between 0 and 1'): benjamini_hochberg(bad)


def test_mcnemar_is_that_of_scipy_and_statsmodels_and_of_the_sign_flips():
    tables = pytest.importorskip('statsmodels.stats.contingency_tables', reason='needs the oracle: pip install statsmodels')
    for a, b in ((0, 0), (1, 0), (3, 9), (7, 7), (60, 31), (700, 600)):
        there = sps.binomtest(a, a + b).pvalue if a + b else 1.
        assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(there), (a, b)
        if a + b: assert mcnemar(a, b) == pytest.approx(tables.mcnemar([[5, a], [b, 5]], exact=True).pvalue)
        if a + b <= 16: assert mcnemar(a, b) == pytest.approx(paired_permutation([1] * a + [0] * b + [1], [0] * a + [1] * b + [1]))
    with pytest.raises(ValueError, match='not below 0'): mcnemar(-1, 2)


def test_wilcoxon_counts_ties_as_enumeration_does_and_is_scipys_elsewhere():
    for n in (1, 4, 11, 40):
        a, b = rng.normal(.3, 1, n), rng.normal(0, 1, n)
        assert wilcoxon(a, b) == pytest.approx(sps.wilcoxon(a, b, method='exact').pvalue), (SEED, n)
    for _ in range(20):
        d = rng.integers(-3, 4, 10) * .1 # Ties that rounding would break: .1 + .2 is not .3
        base = rng.choice([.1, .2, .7], 10)
        there = d[d != 0]
        ranks = sps.rankdata(np.round(abs(there), 6))
        sums = np.array([sum(r for r, s in zip(ranks, signs) if s) for signs in itertools.product((0, 1), repeat=len(ranks))])
        seen = ranks[there > 0].sum()
        expected = min(1., 2 * min((sums <= seen).mean(), (sums >= seen).mean())) if len(there) else 1.
        assert wilcoxon(base + d, base) == pytest.approx(expected), (SEED, d)
    a, b = rng.integers(0, 9, 800), rng.integers(0, 9, 800)
    assert wilcoxon(a, b) == pytest.approx(sps.wilcoxon(a, b, method='asymptotic', correction=False).pvalue)
    a, b = rng.normal(.1, 1, 280), rng.normal(0, 1, 280)
    assert wilcoxon(a, b) == pytest.approx(wilcoxon(a, b, exact=0), abs=.01) and wilcoxon(a, a) == 1.


def test_effects_are_what_the_t_and_the_rank_tests_rest_on():
    a, b = rng.normal(.4, 1, 30), rng.normal(0, 1, 30)
    assert cohens_d(a, b) * math.sqrt(30) == pytest.approx(sps.ttest_rel(a, b).statistic)
    assert cohens_d(a, b[:20], paired=False) / math.sqrt(1 / 30 + 1 / 20) == pytest.approx(sps.ttest_ind(a, b[:20]).statistic)
    x, y = rng.integers(0, 5, 40), rng.integers(1, 6, 25)
    assert cliffs_delta(x, y) == pytest.approx(2 * sps.mannwhitneyu(x, y).statistic / (40 * 25) - 1) == pytest.approx(-cliffs_delta(y, x))
    for only_a, only_b in ((9, 3), (0, 4), (5, 5)):
        there = sps.binomtest(only_a, only_a + only_b).proportion_ci(.95, 'exact')
        score = odds_ratio(only_a, only_b)
        assert (score.low / (1 + score.low), score.high / (1 + score.high) if score.high < math.inf else 1.) == pytest.approx(tuple(there))
        assert (score.low <= 1 <= score.high) == (mcnemar(only_a, only_b) >= .05) # Interval and test say the same
    assert [size_name(d) for d in (.19, .2, .5, -.8)] == ['negligible', 'small', 'medium', 'large']
    with pytest.raises(ValueError, match='NaN'): size_name(math.nan)
    with pytest.raises(ValueError, match='same items'): cohens_d([1], [1, 2])


def test_power_is_that_of_enumeration_of_statsmodels_and_of_simulation():
    n, pa, pb = 12, .4, .15
    exact = sum(sps.multinomial.pmf([i, j, n - i - j], n, [pa, pb, 1 - pa - pb]) for i in range(n + 1) for j in range(n + 1 - i) if mcnemar(i, j) <= .05)
    assert power_pairs(n, pa, pb) == pytest.approx(exact) == pytest.approx(power_pairs(n, pb, pa))
    counts = rng.multinomial(300, [.14, .06, .8], 4000)
    found = np.mean([mcnemar(int(i), int(j)) <= .05 for i, j, _ in counts])
    assert power_pairs(300, .14, .06) == pytest.approx(found, abs=.04), SEED
    assert power_pairs(20_000, .05, .05) == pytest.approx(.05, abs=.01)
    power = pytest.importorskip('statsmodels.stats.power', reason='needs the oracle: pip install statsmodels').TTestPower()
    for size, items in ((.1, 50), (.5, 10), (-.8, 25), (2., 60)): assert power_numbers(items, size) == pytest.approx(power.power(abs(size), items, .05), abs=1e-7)
    need = items_needed(lambda k: power_numbers(k, .23), .9)
    assert need == math.ceil(power.solve_power(.23, power=.9, alpha=.05))
    need = items_needed(lambda k: power_pairs(k, .3, .1))
    assert power_pairs(need, .3, .1) >= .8 > power_pairs(need - 1, .3, .1)


def test_paired_tests_find_what_unpaired_ones_miss():
    paired, unpaired, wrong = [], [], []
    for i in range(100):
        hard = rng.normal(0, .3, 80)
        a, b = .74 + hard + rng.normal(0, .06, 80), .71 + hard + rng.normal(0, .06, 80)
        paired.append(compare(a, b, i).p < .05); unpaired.append(sps.ttest_ind(a, b).pvalue < .05)
        wrong.append(paired_bootstrap(a, b, i, 500).low > 0 and bootstrap(a, i, 500).low > bootstrap(b, i, 500).high)
    assert np.mean(paired) > .75 and np.mean(unpaired) < .2 and not np.mean(wrong) > .1, (SEED, np.mean(paired), np.mean(unpaired))


def test_a_comparison_is_made_of_its_parts():
    a, b = (rng.random(150) < .8) * 1., (rng.random(150) < .6) * 1.
    both = compare(a, b, 5)
    assert both.difference == paired_bootstrap(a, b, 5) and both.p == mcnemar(int((a > b).sum()), int((a < b).sum())) and both.effect == cohens_d(a, b) and both.n == 150
    assert compare(a, b, test='permutation').p == paired_permutation(a, b) and compare(a, b, test='wilcoxon').p == wilcoxon(a, b)
    halves = compare(np.where(a == b, .5, a), b, 5) # A tie counts one half: no longer right or wrong
    assert halves.test == 'paired permutation'
    seeds = compare(np.stack([a, a, b]), np.stack([b, b]), 5)
    error, free = grid_error(np.stack([a, a, b]), np.stack([b, b]))
    assert seeds.p == pytest.approx(2 * sps.t.sf(abs(seeds.difference.value) / error, free)) and seeds.n == 150 and '3 seeds against 2 seeds' in seeds.difference.protocol
    one = compare(a[None], b[None])
    assert one.p == pytest.approx(sps.ttest_rel(a, b).pvalue) # One seed a side: the paired t-test
    assert compare(np.ones((2, 3)), np.ones((2, 3))).p == 1 and compare(np.ones((2, 3)), np.zeros((2, 3))).p == 0
    with pytest.raises(ValueError, match='over items alone'): compare(a[None], b[None], test='wilcoxon')


def test_recipes_that_are_equally_good_look_different_as_often_as_promised():
    "Differences of recipes with few seeds: the p-value over seeds and items keeps its level where that over items does not"
    over_both, over_items, sets = 0, 0, 400
    for i in range(sets):
        hard = rng.normal(0, 1, (1, 60))
        a, b = (hard + rng.normal(0, .3, (4, 1)) + rng.normal(0, .5, (4, 60)) for _ in range(2))
        error, free = grid_error(a, b)
        over_both += 2 * sps.t.sf(abs(a.mean() - b.mean()) / error, free) < .05
        over_items += sps.ttest_rel(a.mean(0), b.mean(0)).pvalue < .05
    assert over_both / sets < .1 and over_items / sets > .3, (SEED, over_both, over_items)


# The cache of results

def test_fingerprints_are_of_content():
    t = torch.randn(3, 4)
    assert fingerprint(t) == fingerprint(t.clone()) == fingerprint(t.T.contiguous().T) != fingerprint(t.T)
    assert len({fingerprint(x) for x in (t, t.double(), t.bfloat16(), t.reshape(-1), t.numpy(), t + 1e-6, torch.empty(0), torch.empty(0, 1), torch.tensor(1.), torch.tensor(True))}) == 10
    assert fingerprint(np.float64(.1)) == fingerprint(.1) and fingerprint({2, 1}) == fingerprint({1, 2}) != fingerprint([1, 2])
    dropped, kept = torch.nn.Dropout(.1), torch.nn.Dropout(.2)
    assert fingerprint(dropped) != fingerprint(kept) # No weights, other behaviour
    assert fingerprint(Score(1., 1, 0., 1.)) != fingerprint(Score(1., 1, 0., 1., protocol='x'))
    for odd in ((x for x in 'ab'), object()):
        with pytest.raises(ValueError, match='no fingerprint'): fingerprint(odd)
    with pytest.raises(ValueError, match='cannot be read'): fingerprint(eval('lambda x: x + 1'))


def module_of(folder, name, text):
    "A fresh module from source"
    import importlib.util
    (folder / f'{name}.py').write_text(textwrap.dedent(text), encoding='utf-8')
    import linecache
    linecache.checkcache()
    spec = importlib.util.spec_from_file_location(name, folder / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    import sys
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


SOURCE = '''
import math
LIMIT = .5
class Rule:
    scale = 2
    def apply(self, x): return inner(x) * self.scale
def inner(x): return math.sqrt(x)
def unused(x): return 1
def measure(x, add=0): return {'value': Rule().apply(x) + add > LIMIT}
'''


def test_a_change_anywhere_in_the_code_is_seen_and_one_that_does_not_matter_is_not(tmp_path):
    was = fingerprint(module_of(tmp_path, 'measured', SOURCE).measure)
    changes = {'math.sqrt(x)': 'math.sqrt(x) + 0', 'LIMIT = .5': 'LIMIT = .6', 'scale = 2': 'scale = 3', '* self.scale': '/ self.scale', 'add=0': 'add=1'}
    for before, after in changes.items():
        assert fingerprint(module_of(tmp_path, 'measured', SOURCE.replace(before, after)).measure) != was, before
    assert fingerprint(module_of(tmp_path, 'measured', SOURCE.replace('return 1', 'return 2')).measure) == was
    assert fingerprint(module_of(tmp_path, 'measured', '\n\n' + SOURCE).measure) == was


def test_hits_and_misses(tmp_path, monkeypatch):
    count = []
    monkeypatch.setattr(torch.nn.Linear, 'forward', lambda self, x, was=torch.nn.Linear.forward: (count.append(1), was(self, x))[1])
    def score(model, texts, scale=1.): return {'score': bootstrap([model(torch.full((4,), float(len(t)))).sum().item() * scale for t in texts]), 'pair': (1, None)}
    cache, model, texts = Cache(tmp_path), torch.nn.Linear(4, 2), ['क', 'கி க']
    first = cache.run(score, model=model, texts=texts)
    made = len(count)
    twin = torch.nn.Linear(4, 2)
    twin.load_state_dict(model.state_dict())
    assert cache.run(score, model=twin, texts=tuple(texts)) == first and len(count) == made and first['pair'] == [1, None] and isinstance(first['score'], Score)
    assert Cache(tmp_path).run(score, model=model, texts=texts) == first and len(count) == made # Another process
    with torch.no_grad(): twin.weight[0, 0] = torch.nextafter(twin.weight[0, 0], torch.tensor(9.))
    for given in (dict(model=twin, texts=texts), dict(model=model, texts=texts[:1]), dict(model=model, texts=texts[::-1]), dict(model=model, texts=texts, scale=1.), dict(model=model, texts=texts, scale=1)):
        before = len(count)
        cache.run(score, **given)
        assert len(count) > before, given
    assert cache.stats() == {'hits': 1, 'misses': 6, 'too old': 0, 'damaged': 0, 'entries': 6, 'bytes': sum(p.stat().st_size for p in tmp_path.iterdir())}
    assert cache.changed(score, model=twin, texts=texts) == [] and cache.changed(score, model=twin, texts=[]) == ['given texts'] and cache.changed(len) == ['never run']


def test_age_invalidation_damage_and_what_cannot_be_kept(tmp_path, monkeypatch):
    from lab_lm.evals import cache as module
    clock = [1000.]
    monkeypatch.setattr(module, '_now', lambda: clock[0])
    def double(x): return 2 * x
    def triple(x): return 3 * x
    cache = Cache(tmp_path, max_age=60)
    for now, hits, misses, old in ((1000, 0, 1, 0), (1060, 1, 1, 0), (1061, 1, 2, 1), (1100, 2, 2, 1)):
        clock[0] = float(now)
        assert cache.run(double, x=2) == 4
        assert [cache.counts[k] for k in ('hits', 'misses', 'too old')] == [hits, misses, old], now
    cache.run(triple, x=2), cache.run(double, x=3)
    assert cache.invalidate(older=30) == 1 and cache.invalidate(triple) == 1 and cache.stats()['entries'] == 1 and cache.invalidate() == 1
    cache.run(double, x=2)
    for spoilt in (b'{', b'\xff\xfe', b'[]', b'{"result": 5}'):
        [file] = tmp_path.iterdir()
        file.write_bytes(spoilt)
        before = cache.counts['damaged']
        assert cache.run(double, x=2) == 4 and cache.counts['damaged'] == before + 1
    assert all(json.loads(p.read_text(encoding='utf-8'))['result'] == 4 for p in tmp_path.iterdir())
    for result, said in (({1: 2}, 'has the key 1'), (np.ones(2), 'is a ndarray'), ([{'a': {1, 2}}], r"result\[0\]\['a'\] is a set"), ({'$score': 1}, 'score'), (np.float32(1), 'is a float32')):
        with pytest.raises(ValueError, match=said): cache.run(give, result=[result])
    assert len(list(tmp_path.iterdir())) == 1 # Nothing half-written, nothing kept of a refused result
    assert math.isnan(cache.run(give, result=[math.nan])) and cache.run(give, result=[math.inf]) == math.inf


def give(result): return result[0]
