"Sweeps that are killed, and rules that give trials up"
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import stats

from lab_lm.train.sweep import Between, Halving, Median, best, draws, grid, over_seeds, paired, read_trials, summary, sweep

CHILD = '''
import sys, time
from pathlib import Path
from lab_lm.train.sweep import sweep
home = Path(sys.argv[1])
def one(config, seed, report):
    with open(home / 'calls', 'a') as f: f.write(f"{config['x']} {seed}\\n")
    for step in range(4): report(step, config['x'] * (4 - step)); time.sleep(.02)
    return config['x'] + seed / 10
sweep(one, dict(x=[1, 2, 3, 4]), [0, 1], home / 'sweep')
'''


def test_a_killed_sweep_goes_on_and_repeats_only_what_was_under_way(tmp_path):
    for attempt in range(6):
        child = subprocess.Popen([sys.executable, '-c', CHILD, str(tmp_path)], stderr=subprocess.PIPE)
        seen = len(read_trials(tmp_path / 'sweep'))
        while attempt < 2 and child.poll() is None and len(read_trials(tmp_path / 'sweep')) < seen + 2: time.sleep(.01)
        if attempt < 2: time.sleep(np.random.default_rng().random() * .05); child.send_signal(signal.SIGKILL)
        child.wait()
        if child.returncode == 0: break
    trials = read_trials(tmp_path / 'sweep')
    assert [(t['config']['x'], t['seed'], t['value'], len(t['reports'])) for t in trials] == [(x, s, x + s / 10, 4) for s in (0, 1) for x in (1, 2, 3, 4)]
    assert len((tmp_path / 'calls').read_text().splitlines()) <= 8 + 2


def test_two_sweeps_in_one_folder_do_not_mix(tmp_path):
    def one(config, seed, report):
        with pytest.raises(ValueError, match='another process sweeps'): sweep(lambda *_: 0, dict(x=1), [0], tmp_path)
        return 1
    assert sweep(one, dict(x=1), [0], tmp_path)[0]['value'] == 1


@pytest.mark.parametrize('mode', ['min', 'max'])
def test_rules_spare_steps_and_keep_the_best(tmp_path, mode):
    sign = 1 if mode == 'min' else -1
    floors = np.random.default_rng().permutation(20)
    def one(config, seed, report):
        for step in range(1, 28): report(step, sign * (floors[config['i']] + 10 / step))
        return sign * floors[config['i']]
    spent = {}
    for rule in (None, Median(), Halving()):
        trials = sweep(one, dict(i=list(range(20))), [0], tmp_path / str(rule)[:5], rule=rule, mode=mode)
        spent[str(rule)[:5]] = sum(len(t['reports']) for t in trials)
        assert floors[best(trials, mode)['i']] == 0
        assert {t['state'] for t in trials} <= {'finished', 'pruned'}
    assert spent['None'] == 20 * 27 and max(spent['Media'], spent['Halvi']) < .8 * spent['None']


def test_a_pruned_setting_is_not_tried_with_other_seeds(tmp_path):
    def one(config, seed, report):
        for step in range(1, 4): report(step, config['x'])
        return config['x']
    trials = sweep(one, dict(x=[1, 2, 3, 9]), [0, 1, 2], tmp_path, rule=Median())
    assert [t['seed'] for t in trials if t['config']['x'] == 9] == [0] and summary(trials)[-1]['others'] == ['pruned']


def test_nan_is_worse_than_anything(tmp_path):
    def one(config, seed, report):
        report(1, config['x'])
        return config['x']
    trials = sweep(one, dict(x=[1., 2., 3., float('inf')]), [0], tmp_path, rule=Median())
    assert [t['state'] for t in trials] == ['finished', 'finished', 'finished', 'pruned']
    for line in (tmp_path / 'trials.jsonl').read_text().splitlines(): json.loads(line)


def test_intervals_are_scipys():
    values = np.random.default_rng().normal(3, 2, 6)
    low, high = stats.t.interval(.95, 5, values.mean(), stats.sem(values))
    score = over_seeds(values)
    assert (score.low, score.high) == pytest.approx((low, high)) and score.value == pytest.approx(values.mean())
    other = values + np.random.default_rng().normal(0, .1, 6)
    trials = [dict(config=dict(a=k), seed=i, state='finished', value=v) for k, some in enumerate((values, other)) for i, v in enumerate(some)]
    rel = stats.ttest_rel(values, other).confidence_interval()
    assert (paired(trials, dict(a=0), dict(a=1)).low, paired(trials, dict(a=0), dict(a=1)).high) == pytest.approx((rel.low, rel.high))


def test_draws_do_not_depend_on_the_order_of_names():
    a, b = dict(lr=Between(1e-4, 1., log=True), n=Between(1, 5, whole=True)), dict(n=Between(1, 5, whole=True), lr=Between(1e-4, 1., log=True))
    assert draws(a, 20, 3) == [dict(lr=s['lr'], n=s['n']) for s in draws(b, 20, 3)] and draws(a, 5, 3) != draws(a, 5, 4)
    found = {s['n'] for s in draws(a, 200)}
    assert found == {1, 2, 3, 4, 5} and all(1e-4 <= s['lr'] <= 1 for s in draws(a, 200))
    with pytest.raises(ValueError, match='has no values'): grid(dict(x=[]))
