"Callbacks in a real run: the order of events, early stopping across a resume, the line, the clock's file, the curve, the trackers"
import json
import math
import random
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from lab_lm.core.config import Config
from lab_lm.core.files import read_lines
from lab_lm.core.seed import seeded
from lab_lm.nets.transformer import NetConfig, Transformer
from lab_lm.train import progress
from lab_lm.train.callbacks import Callback, Callbacks, EarlyStopping, find, flat
from lab_lm.train.debug import anomaly, fast_dev_run, least_loss, overfit, profile
from lab_lm.train.learner import Learner
from lab_lm.train.training import Training
from lab_lm.train.objectives import Causal
from lab_lm.train.progress import Clock, LiveCurve, Printer, Smooth, Throughput
from lab_lm.train.trackers import Tracking, flat_settings

torch.set_num_threads(1)


class Random:
    "Batches as a function of the step; the second half of each row is padding"
    resumable = True
    def fingerprint(self): return dict(kind='random')
    def __getitem__(self, k): return self.step(k)

    def step(self, k):
        ids = torch.randint(5, 40, (4, 16), generator=torch.Generator().manual_seed(k))
        return Causal()(dict(input_ids=ids, attention_mask=(torch.arange(16) < 8).long().expand(4, 16)))


def net():
    with seeded(0): return Transformer(NetConfig(vocab_size=40, width=16, layers=1, heads=2, hidden=32, dropout=.1))


def learner(folder=None, callbacks=(), evaluate=None, **training):
    if folder: folder.mkdir(exist_ok=True, parents=True)
    return Learner(net(), Random(), Training(**dict(steps=12) | training), folder, evaluate, callbacks)


class Diary(Callback):
    def __init__(self): self.told = []
    def begin(self, learner): self.told.append('begin')
    def stepped(self, learner, facts): self.told.append(f"step {facts['step']}"); self.facts = facts
    def evaluated(self, learner, scores): self.told.append(f'scores at {learner.step}')
    def saved(self, learner, path): self.told.append(f'saved {path.name}')
    def end(self, learner): self.told.append('end')


def test_events_come_in_order(tmp_path):
    diary = Diary()
    learner(tmp_path / 'run', [diary], lambda m: dict(held=1.), steps=4, evaluate_every=2, save_every=2).fit()
    assert diary.told == ['begin', 'step 0', 'step 1', 'scores at 2', 'saved step-00000002', 'step 2', 'step 3', 'scores at 4', 'saved step-00000004', 'end']
    assert {'step', 'loss', 'lr', 'grad_norm', 'tokens', 'labels'} <= diary.facts.keys()
    assert diary.facts['tokens'] == 4 * 8 and diary.facts['labels'] == 4 * 7


def test_the_end_reaches_everybody_when_a_run_breaks():
    diary, second = Diary(), Diary()
    diary.end = lambda learner: 1 / 0
    def evaluate(model): raise ConnectionError('no scores')
    with pytest.raises(ZeroDivisionError) as error: learner(None, [diary, second], evaluate, evaluate_every=1).fit()
    assert isinstance(error.value.__context__, ConnectionError) and second.told[-1] == 'end'


def test_paths_of_scores():
    rng = random.Random()
    for _ in range(50):
        def grow(depth): return {f'k{i}': grow(depth - 1) if depth and rng.random() < .5 else rng.random() for i in range(rng.randrange(1, 4))}
        scores = grow(3)
        for path, value in flat(scores).items():
            inside = scores
            for part in path.split('.'): inside = inside[part]
            assert find(scores, path) == value == inside
    with pytest.raises(ValueError, match='known: a.b, c'): find(dict(a=dict(b=1), c=2), 'a.c')


def test_early_stopping_by_a_nested_metric_goes_on_after_a_resume(tmp_path):
    values = [.5, .6, .55, .58, .61, .605, .6, .61, .6, .62, .1, .1]
    def run(folder, pull=None):
        stopping = EarlyStopping('pairs.accuracy', 'max', patience=3, min_delta=.005)
        class Puller(Callback):
            def saved(self, learner, path):
                if learner.step == pull: raise EOFError
        one = learner(folder, [stopping, Puller()], None, evaluate_every=1, save_every=1)
        one.evaluate = lambda m: dict(pairs=dict(accuracy=values[one.step - 1]))
        try: one.fit()
        except EOFError: return None
        return one.step, one.stopped
    whole = run(tmp_path / 'whole')
    assert whole == (8, 'early stopping: pairs.accuracy has not been better than 0.61 (step 5) in 3 evaluations')
    for cut in (5, 6, 7):
        assert run(tmp_path / str(cut), cut) is None
        assert run(tmp_path / str(cut)) == whole, cut


def test_a_misspelt_metric_is_told_with_the_known_ones():
    with pytest.raises(ValueError, match="no score 'pairs'; known: pairs.accuracy"):
        learner(None, [EarlyStopping('pairs')], lambda m: dict(pairs=dict(accuracy=.5)), evaluate_every=1).fit()


def test_watching_changes_no_bit_of_the_metrics(tmp_path):
    told = []
    watched = [Printer(0., tell=told.append), Throughput(tmp_path / 'a', every=5), LiveCurve('held'), Diary()]
    def evaluate(m): return dict(held=float(m(**Random().step(999)).loss))
    learner(tmp_path / 'a', watched, evaluate, evaluate_every=4).fit()
    learner(tmp_path / 'b', (), evaluate, evaluate_every=4).fit()
    assert (tmp_path / 'a' / 'metrics.jsonl').read_bytes() == (tmp_path / 'b' / 'metrics.jsonl').read_bytes()
    rows = read_lines(tmp_path / 'a' / 'timing.jsonl')
    assert [(r['step'], r['tokens']) for r in rows] == [(4, 5 * 32), (9, 5 * 32)] and all(r['rate'] > 0 for r in rows)
    assert told[0].startswith('step 3/12, loss') and 'took' in told[-1] and 'validation held' in told[-1]
    assert len(watched[2].train[0]) == 12 and watched[2].held[0] == [4, 8, 12]


def test_only_the_first_process_talks_and_writes(tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    told, clock = [], Throughput(tmp_path, every=1)
    for one in (Printer(0., tell=told.append), clock):
        one.begin(SimpleNamespace(training=SimpleNamespace(steps=5)))
        for k in range(5): one.stepped(None, dict(step=k, loss=1., tokens=3))
        one.end(None)
    assert not told and not list(tmp_path.iterdir()) and len(clock.rows) == 5
    Tracking('none').begin(None)


def test_the_curve_and_the_line_are_redrawn_in_a_notebook(monkeypatch):
    import IPython.display
    shown, updated = [], []
    def display(what, **more): shown.append(type(what).__name__); return SimpleNamespace(update=lambda what, **more: updated.append(type(what).__name__))
    monkeypatch.setattr(IPython.display, 'display', display)
    monkeypatch.setattr(progress, 'in_notebook', lambda: True)
    learner(None, [LiveCurve('held'), Printer(0.)], lambda m: dict(held=1.), steps=6, evaluate_every=2).fit()
    assert sorted(shown) == ['Figure', 'dict'] and updated.count('Figure') == 2
    from matplotlib import pyplot as plt
    assert not plt.get_fignums()


def test_forecasts_are_honest_for_random_runs():
    rng, now = random.Random(), [0.]
    for _ in range(30):
        now[0], steps, every, pause = 0., 600, rng.randrange(5, 40), rng.random() * 20
        clock, told = Clock(steps, now=lambda: now[0]), []
        for k in range(1, steps + 1):
            now[0] += rng.uniform(.9, 1.1) + (50 if k == 1 else 0) + (30 if rng.random() < .002 else 0)
            clock.tick()
            told.append((now[0], clock.left(k)))
            if k % every == 0: now[0] += pause; clock.pause()
        assert told[0][1] is None and told[1][1] is None and told[-1][1] == 0
        for at, left in told[200:]: assert abs(at + left - told[-1][0]) < .15 * told[-1][0] + 60


def test_the_smoothed_loss_equals_the_weighted_mean():
    for _ in range(20):
        beta, values = random.random() * .99, [random.gauss(0, 1) for _ in range(random.randrange(1, 40))]
        smooth = Smooth(beta)
        for v in values: smooth.add(v)
        weights = [beta ** (len(values) - 1 - i) for i in range(len(values))]
        assert smooth.value == pytest.approx(sum(w * v for w, v in zip(weights, values)) / sum(weights))


def test_a_callback_that_is_gone_is_told_and_one_that_came_starts_anew():
    class Stateful(Callback):
        def __init__(self): self.n = 0
        def state(self): return dict(n=self.n)
        def load(self, state): self.n = state['n']
    a, b = Stateful(), Stateful()
    a.n, b.n = 3, 5
    again = Callbacks([Stateful(), Diary(), Stateful(), Stateful()])
    again.load(json.loads(json.dumps(Callbacks([a, b]).state())))
    assert [one.n for one in again if hasattr(one, 'n')] == [3, 5, 0]
    Callbacks().load(Callbacks([a]).state())


# Debugging

def test_least_loss_is_reached_and_not_beaten():
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 6, 3], [2, 5, 9, 3, 0]])
    batch = Causal()(dict(input_ids=ids, attention_mask=(ids > 0).long()))
    by_hand = (3 * math.log(3) - 2 * math.log(2) + 2 * math.log(2)) / 11 # After 2: two of three 5s; after 2 5: 6 or 9
    assert least_loss(batch) == pytest.approx(by_hand)
    found = overfit(net(), batch, steps=400, near=.02, lr=1e-2)
    assert found['ok'] and found['losses'][-1] > by_hand - 1e-3


def test_overfit_says_what_is_wrong():
    wrong = torch.optim.SGD(net().parameters(), 1.) # Moves nothing of the model that is trained
    found = overfit(net(), Random(), steps=20, lr=1e-9)
    assert not found['ok'] and 'NOT learnt' in found['said'] and wrong
    empty = Random().step(0)
    assert overfit(net(), empty | dict(labels=torch.full_like(empty['labels'], -100)), steps=3)['said'].startswith('one batch of 0 labels')


def test_fast_dev_run_finds_a_metric_that_is_missing():
    one = learner(None, [EarlyStopping('accuracy')], lambda m: dict(held=1.))
    with pytest.raises(ValueError, match="no score 'accuracy'; known: held"): fast_dev_run(one)
    def broken(model): raise KeyError('no such file')
    with pytest.raises(KeyError): fast_dev_run(learner(None, (), broken))
    rows = fast_dev_run(learner())
    assert [r['what'] for r in rows] == ['two steps', 'checkpoint', 'resume'] and one.step == 0


def test_the_profile_counts_calls():
    table = profile(lambda: torch.ones(8, 8) @ torch.ones(8, 8), steps=4, top=100)
    assert next(r['calls'] for r in table if r['operation'] == 'aten::mm') == 1
    assert abs(sum(r['share'] for r in table) - 1) < .02


def test_an_anomaly_names_the_line():
    x = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match=r'(?s)SqrtBackward0 is NaN; it comes from test_callbacks.py, line \d+: bad = '), anomaly():
        bad = (x * x).sqrt() * 0
        bad.sum().backward()
    assert not torch.is_anomaly_enabled()


# Trackers

class Settings(Config):
    "Settings with a secret"
    width:int = 3
    api_key:str = 'PLANTED-IN-SETTINGS'


@pytest.mark.parametrize('name', ['tensorboard', 'wandb', 'trackio'])
def test_real_trackers_get_numbers_and_no_secrets(name, tmp_path, monkeypatch):
    if find_spec(name) is None: pytest.skip(f'{name} is not installed')
    monkeypatch.setenv('SOME_API_KEY', 'PLANTED-IN-ENVIRONMENT')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    learner(None, [Tracking(name, folder=tmp_path, config=Settings(), every=2, run='first')], lambda m: dict(held=.5), steps=4, evaluate_every=2).fit()
    start, content = time.monotonic(), []
    while not any(b'evaluation/held' in c for c in content) and time.monotonic() - start < 15: # W&B writes from a process of its own
        time.sleep(.1)
        content = [p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()]
    assert any(b'evaluation/held' in c for c in content) and any(b'training/loss' in c for c in content)
    assert not any(b'PLANTED' in c for c in content)
    if name == 'tensorboard':
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(str(tmp_path / 'lab_lm')).Reload()
        assert [e.step for e in events.Scalars('training/loss')] == [2, 4] and events.Scalars('evaluation/held')[0].value == .5


def test_settings_are_flat_and_clean():
    found = flat_settings(dict(a=dict(b=[1, 2], auth_token='x' * 20), tokens=3, none=None, settings=Settings()))
    assert found == {'a.b': '[1, 2]', 'a.auth_token': '<left out>', 'tokens': 3, 'none': 'None', 'settings.width': 3, 'settings.api_key': '<left out>'}
