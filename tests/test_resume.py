"""Exact resume: a run that is killed at random moments ends with the same weights and the same metrics, to the last bit"""
import hashlib
import multiprocessing
import random
import signal
import time

import numpy as np
import pytest
import torch

from lab_lm.core.seed import seeded
from lab_lm.nets.transformer import NetConfig, Transformer
from lab_lm.text.rows import PackedRows
from lab_lm.train.checkpoint import checkpoints
from lab_lm.train.curriculum import PerformancePacing
from lab_lm.train.feed import Feed
from lab_lm.train.guards import GuardConfig, Guards
from lab_lm.train.learner import Learner, Training
from lab_lm.train.objectives import Hybrid, Masked
from lab_lm.train.schedules import Schedule

STEPS = 24


class Specials:
    "As much of a tokenizer as an objective asks for"
    mask_token_id, pad_token_id, all_special_ids = 4, 0, [0, 1, 2, 3, 4]
    def __len__(self): return 60


def learner(folder, workers, steps=STEPS):
    "Dropout, accumulation, a hybrid objective, a curriculum that learns, a plateau, guards: everything that could go astray"
    rng = np.random.default_rng(5)
    lengths = rng.integers(3, 40, 300)
    ids = rng.integers(5, 60, lengths.sum())
    rows = PackedRows(ids, np.concatenate([[0], np.cumsum(lengths)]), 32)
    feed = Feed(rows, Hybrid(Masked(Specials(), .3), .5), batch=8, seed=3, pacing=PerformancePacing(), steps=steps)
    with seeded(1): model = Transformer(NetConfig(vocab_size=60, width=32, layers=2, heads=2, hidden=64, mode='hybrid', dropout=.2, max_length=64))
    held = feed.step(10**6)
    training = Training(steps=steps, lr=3e-3, optimizer='muon', accumulate=2, evaluate_every=4, save_every=5, metric='held', workers=workers,
                        schedule=Schedule(name='plateau', patience=0))
    return Learner(model, feed, training, folder, lambda m: dict(held=float(m(**held).loss)), [Guards(GuardConfig(after=5, every=3, window=10))])


def train(folder, workers):
    torch.set_num_threads(1)
    learner(folder, workers).fit()


def ends(folder):
    "SHA-256 of the last checkpoint's weights and optimiser, and of the metrics"
    last = checkpoints(folder / 'checkpoints')[-1]
    assert last.name == f'step-{STEPS:08d}'
    return [hashlib.sha256(p.read_bytes()).hexdigest() for p in (last / 'weights.safetensors', last / 'optimizer.safetensors', folder / 'metrics.jsonl')]


def start(folder, workers):
    child = multiprocessing.get_context('fork').Process(target=train, args=(folder, workers), daemon=False)
    child.start()
    return child


def rows(folder):
    "How many steps a run has noted"
    metrics = folder / 'metrics.jsonl'
    return metrics.read_bytes().count(b'\n') if metrics.exists() else 0


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    "What an undisturbed run gives"
    folder = tmp_path_factory.mktemp('straight')
    child = start(folder, 0)
    child.join()
    assert child.exitcode == 0
    return ends(folder)


@pytest.mark.parametrize('workers', [0, 2])
def test_ten_runs_killed_at_random_moments(straight, tmp_path, workers):
    for trial in range(10):
        folder, enough = tmp_path / str(trial), random.randrange(STEPS - 3)
        folder.mkdir()
        child = start(folder, workers)
        while rows(folder) < enough and child.exitcode is None: time.sleep(.001)
        time.sleep(random.uniform(0, .02)) # Somewhere in a step, an evaluation or a checkpoint
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, f'the run was over before it could be killed at step {enough}'
        again = start(folder, workers)
        again.join()
        assert again.exitcode == 0 and ends(folder) == straight
