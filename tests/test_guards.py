"Guards: every planted fault is found, healthy training is left alone, and a resumed run judges as if it had not been interrupted"
import hashlib
import json
import math
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import entropy, median_abs_deviation

from lab_lm.core.seed import seeded
from lab_lm.nets.transformer import NetConfig, Transformer
from lab_lm.text.rows import PackedRows
from lab_lm.train.callbacks import Callback
from lab_lm.train.feed import Feed
from lab_lm.train.guards import GuardConfig, Guards
from lab_lm.train.learner import Learner
from lab_lm.train.training import Training
from lab_lm.train.objectives import Causal, Hybrid, Masked
from lab_lm.train.schedules import Schedule
from lab_lm.train.signs import confidence_gap, effective_rank, labelled, prediction_entropies, robust_limit

torch.set_num_threads(1)
SIZE = 60
QUICK = dict(after=10, window=20, every=5)


class Specials:
    "As much of a tokenizer as an objective asks for"
    mask_token_id, pad_token_id, all_special_ids = 4, 0, [0, 1, 2, 3, 4]
    def __len__(self): return SIZE


def feed(objective=Causal(), seed=0, batch=4):
    "Texts of a language in which every token has a few successors"
    rng = np.random.default_rng(seed)
    after = rng.integers(5, SIZE, (SIZE, 3))
    texts = []
    for _ in range(200):
        text = [int(rng.integers(5, SIZE))]
        for _ in range(rng.integers(8, 30)): text.append(int(after[text[-1], rng.integers(3)]))
        texts.append(text)
    return Feed(PackedRows(np.concatenate(texts), np.cumsum([0] + [len(t) for t in texts]), 32), objective, batch, seed)


def net(seed=0, **more):
    with seeded(seed): return Transformer(NetConfig(**dict(vocab_size=SIZE, width=32, layers=1, heads=2, hidden=32, max_length=64) | more))


def run(guards, feed, model=None, steps=60, folder=None, callbacks=(), **training):
    if folder: folder.mkdir(exist_ok=True)
    setting = Training(**dict(steps=steps, lr=5e-3, save_every=10 if folder else 0, schedule=Schedule(warmup=.1)) | training)
    learner = Learner(model or net(), feed, setting, folder, callbacks=[*callbacks, guards])
    learner.fit()
    return learner


class Poisoned:
    "A feed whose batches teach nonsense where it is told to"
    resumable = True
    def __init__(self, inner, bad): self.inner, self.bad = inner, bad
    def fingerprint(self): return self.inner.fingerprint()
    def __getitem__(self, k): return self.step(k)

    def step(self, k):
        batch = self.inner.step(k)
        if not self.bad(k): return batch
        return batch | dict(labels=torch.where(batch['labels'] == -100, -100, 5))


class Spoiler(Callback):
    "Does something to the model after a step"
    def __init__(self, at, what): self.at, self.what = at, what
    def stepped(self, learner, facts):
        if facts['step'] >= self.at:
            with torch.no_grad(): self.what(learner.model)


# What is measured

def test_measures_equal_their_oracles():
    rng = np.random.default_rng()
    for _ in range(50):
        x = rng.normal(3, 2, rng.integers(2, 60))
        assert robust_limit(x.tolist(), 5.) == pytest.approx(np.median(x) + 5 * max(median_abs_deviation(x) / .6745, .02 * abs(np.median(x)), .01))
        p, t = torch.randn(40, 9).softmax(-1), torch.randint(9, (40,))
        assert prediction_entropies(p, t) == pytest.approx((entropy(p.mean(0)), entropy(np.bincount(t))), abs=1e-5)
        assert confidence_gap(p, t) == pytest.approx((p.amax(1).mean().item(), np.mean(p.numpy().argmax(1) == t.numpy())))
        k = int(rng.integers(1, 6))
        assert .999 <= effective_rank(torch.randn(80, k) @ torch.randn(k, 20)) <= k + 1e-3


def test_labels_are_sampled_evenly_and_without_a_generator():
    before = torch.get_rng_state()
    for n in (0, 1, 31, 256, 257, 5000):
        p, t = labelled(SimpleNamespace(logits=torch.randn(n, 3, generator=torch.Generator().manual_seed(0)), targets=torch.arange(n)), 256)
        assert len(p) == len(t) == min(n, 256) and len(t.unique()) == len(t)
        assert not n or t[-1] >= n - 1 - n // 256
    assert torch.equal(before, torch.get_rng_state())


# Healthy training

@pytest.mark.parametrize('mode, optimizer, lr', [('causal', 'adamw', 5e-3), ('masked', 'adamw', 1e-2), ('hybrid', 'muon', 1e-2), ('causal', 'sgd', .3)])
def test_healthy_training_is_left_alone(mode, optimizer, lr):
    masked = Masked(Specials(), .3)
    objective = dict(causal=Causal(), masked=masked, hybrid=Hybrid(masked, .5))[mode]
    guards, told = Guards(GuardConfig(after=0, window=20, every=5), tell=lambda text: told.append(text)), []
    seed = random.randrange(1000)
    tied = seed % 2 == 0 and optimizer != 'sgd' # A tied model begins by repeating its input, too surely, and SGD is slow to leave that
    learner = run(guards, feed(objective, seed), net(seed, mode=mode, dropout=.1, tied=tied), steps=100, lr=lr, optimizer=optimizer)
    assert not told and not learner.stopped and not guards.events, (seed, guards.events)
    assert np.mean([r['loss'] for r in learner.rows[-10:]]) < np.mean([r['loss'] for r in learner.rows[:10]]) - .1


def test_heavy_tailed_noise_is_no_fault():
    rng = np.random.default_rng()
    for _ in range(3):
        guards, asked = Guards(), []
        learner = SimpleNamespace(output=None, model=torch.nn.Linear(1, 1), optimizer=None, stop=asked.append, roll_back=asked.append)
        noise, norms = rng.standard_t(3, 1500), np.exp(rng.normal(0, 1, 1500))
        for k in range(1500): guards.stepped(learner, dict(step=k, loss=3 + 4 * math.exp(-k / 100) + .1 * noise[k], grad_norm=norms[k]))
        assert not asked and not guards.events


# Planted faults

def only(name, action, **more): return GuardConfig(**{k: 'off' for k in ('not_a_number', 'spike', 'explosion', 'collapse', 'overconfidence', 'dead_rows')} | {name: action} | QUICK | more)


FAULTS = dict(
    overconfidence=lambda model: model.final_norm.weight.mul_(1.5),
    collapse=lambda model: model.bias.copy_(40. * (torch.arange(SIZE) == 7)),
    spike=lambda model: [p.add_(.5 * torch.randn_like(p)) for p in model.parameters()],
    explosion=lambda model: model.final_norm.weight.register_hook(lambda g: 3 * g),
    dead_rows=lambda model: model.embed.weight[5:30].zero_(),
)


@pytest.mark.parametrize('name', FAULTS)
def test_a_planted_fault_is_found_by_its_guard(name):
    guards = Guards(only(name, 'stop'))
    learner = run(guards, feed(), net(form='modernbert', tied=False) if name == 'collapse' else net(tied=name != 'dead_rows'), callbacks=[Spoiler(30, FAULTS[name])])
    assert [e['guard'] for e in guards.events] == [name] and 30 <= guards.events[0]['step'] < 55
    assert learner.stopped.startswith(f'{name} at step') and '; try ' in learner.stopped


def test_rows_without_a_gradient_are_found_and_unread_ones_are_not():
    for first, last, dead in ((5, 40, True), (1, 4, False)): # Tokens 1 to 4 never come
        model = net(tied=False)
        model.embed.weight.register_hook(lambda g: g.index_fill(0, torch.arange(first, last), 0.))
        guards = Guards(only('dead_rows', 'stop'))
        run(guards, feed(), model, steps=40)
        assert bool(guards.events) == dead


def test_a_number_that_is_none_is_found_at_once():
    guards = Guards(only('not_a_number', 'stop'))
    learner = run(guards, feed(), callbacks=[Spoiler(30, lambda model: model.embed.weight.fill_(math.nan))])
    assert guards.events[0]['step'] == 31 and learner.step <= 32


def test_everything_off_says_nothing():
    guards = Guards(GuardConfig(**{k: 'off' for k in ('not_a_number', 'spike', 'explosion', 'collapse', 'overconfidence', 'dead_rows')}))
    run(guards, Poisoned(feed(), lambda k: k > 20), steps=30)
    assert not guards.events and not guards.guards


# Returning to a checkpoint

def digest(folder): return hashlib.sha256((folder / 'metrics.jsonl').read_bytes()).hexdigest()


class Pulled(Exception): "The plug"


class Puller(Callback):
    "Pulls the plug after a step"
    def __init__(self, at): self.at = at
    def stepped(self, learner, facts):
        if facts['step'] == self.at: self.at = -1; raise Pulled


def test_a_spike_is_passed_over_and_a_resumed_run_does_the_same(tmp_path):
    cfg = only('spike', 'roll_back')
    def poisoned(): return Poisoned(feed(), lambda k: 62 <= k < 70)
    whole = Guards(cfg)
    learner = run(whole, poisoned(), steps=90, folder=tmp_path / 'whole')
    assert {e['action'] for e in whole.events} == {'roll_back'} and whole.events[0]['step'] == 64
    assert learner.step == 90 and len(learner.rows) == 90 and learner.skip > 0
    assert max(r['loss'] for r in learner.rows[70:]) < learner.rows[0]['loss'] + .5
    for at in (63, random.randrange(65, 88)):
        folder, puller = tmp_path / f'cut {at}', Puller(at)
        with pytest.raises(Pulled): run(Guards(cfg), poisoned(), steps=90, folder=folder, callbacks=[puller])
        resumed = Guards(cfg)
        run(resumed, poisoned(), steps=90, folder=folder, callbacks=[puller])
        assert digest(folder) == digest(tmp_path / 'whole') and resumed.events == whole.events, at


def test_a_fault_that_stays_ends_the_run_with_advice(tmp_path):
    guards = Guards(only('not_a_number', 'roll_back', rollbacks=2))
    def break_it(model): model.embed.weight[5:] = math.nan
    learner = run(guards, feed(), folder=tmp_path / 'run', callbacks=[Spoiler(30, break_it)])
    assert [e['action'] for e in guards.events] == ['roll_back', 'roll_back', 'stop']
    assert 'after 2 returns to a checkpoint; try a lower lr' in learner.stopped


def test_a_checkpoint_is_not_made_in_doubt(tmp_path):
    guards, saved = Guards(only('spike', 'roll_back', in_a_row=6)), []
    class Saved(Callback):
        def saved(self, learner, path): saved.append((learner.step, guards.doubts()))
    learner = run(guards, Poisoned(feed(), lambda k: 58 <= k < 70), steps=80, folder=tmp_path / 'run', callbacks=[Saved()])
    assert guards.events[0]['step'] == 63 and not any(doubt for _, doubt in saved)
    assert learner.step == 80


# State

def test_states_pass_through_json_at_any_moment():
    rng = random.Random()
    for _ in range(10):
        facts = []
        for k in range(160):
            bad = rng.random() < .06
            facts += [dict(loss=rng.gauss(3, .1) + (9 if bad else 0), grad_norm=rng.choice([1., 1.2, 60.] if bad else [1., 1.2]))] * (rng.choice([1, 3, 4]) if bad else 1)
        facts.insert(rng.randrange(160), dict(loss=math.nan, grad_norm=1.))
        cfg = GuardConfig(not_a_number='warn', spike='warn', **(QUICK | dict(after=0)))
        def play(guards, some, start):
            learner = SimpleNamespace(output=None, model=torch.nn.Linear(1, 1), optimizer=None)
            for k, row in enumerate(some, start): guards.stepped(learner, dict(step=k) | row)
            return guards
        whole, cut = play(Guards(cfg, tell=str), facts, 0), rng.randrange(len(facts))
        resumed = Guards(cfg, tell=str)
        resumed.load(json.loads(json.dumps(play(Guards(cfg, tell=str), facts[:cut], 0).state())))
        play(resumed, facts[cut:], cut)
        assert resumed.state() == whole.state() and whole.events


def test_guards_of_another_choice_read_what_they_know():
    guards = Guards(only('spike', 'warn'))
    guards.load(Guards().state())
    assert list(guards.guards) == ['spike']


def test_looking_is_cheap():
    guards, targets = Guards(), torch.randint(8000, (4000,))
    learner = SimpleNamespace(output=SimpleNamespace(logits=torch.randn(4000, 8000), targets=targets), model=torch.nn.Linear(1, 1), optimizer=None)
    start = time.process_time()
    for k in range(100): guards.stepped(learner, dict(step=k, loss=3., grad_norm=1.))
    assert (time.process_time() - start) / 100 < .02 # Seconds a step; a step with such logits takes 50 times as long
