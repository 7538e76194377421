"A retriever's training goes on to the last bit, and two processes give what one gives"
import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import accelerate  # noqa: F401, here so that no child has to import it
import torch
from safetensors.torch import load_file
from test_contrastive import ALL_TERMS, encoder, feed

from lab_lm.train.checkpoint import checkpoints
from lab_lm.train.contrastive import Contrastive
from lab_lm.train.devices import launch_env, launch_words
from lab_lm.train.learner import Learner
from lab_lm.train.schedules import Schedule
from lab_lm.train.training import Training

STEPS = 14


def train(folder, workers, steps=STEPS):
    "Dropout, chunks, all terms, negatives in some rows"
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = Contrastive(encoder(.2), chunk=5, **ALL_TERMS)
    training = Training(steps=steps, lr=2e-3, save_every=3, precision='fp32', workers=workers, schedule=Schedule(warmup=.2))
    Learner(model, feed(8, seed=3), training, folder).fit()


def start(folder, workers):
    child = multiprocessing.get_context('fork').Process(target=train, args=(folder, workers), daemon=False)
    child.start()
    return child


def ends(folder):
    last = checkpoints(folder / 'checkpoints')[-1]
    assert last.name == f'step-{STEPS:08d}'
    return [hashlib.sha256(p.read_bytes()).hexdigest() for p in (last / 'weights.safetensors', last / 'optimizer.safetensors', folder / 'metrics.jsonl')]


def test_runs_killed_at_random_moments_end_in_the_same_bits(tmp_path):
    with torch.no_grad(): Contrastive(encoder(), chunk=5)(**feed(8).step(0)) # What torch imports on the first use of checkpoints, the children have by then
    whole = start(tmp_path / 'whole', 0)
    whole.join()
    assert whole.exitcode == 0
    for trial in range(4):
        folder, enough, workers = tmp_path / str(trial), random.randrange(STEPS - 3), trial % 2 * 2
        child, metrics = start(folder, workers), folder / 'metrics.jsonl'
        while (metrics.read_bytes().count(b'\n') if metrics.exists() else 0) < enough and child.exitcode is None: time.sleep(.001)
        time.sleep(random.uniform(0, .02))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, f'the run was over before it could be killed at step {enough}'
        again = start(folder, workers)
        again.join()
        assert again.exitcode == 0 and ends(folder) == ends(tmp_path / 'whole')

TWO = '''
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import torch
from safetensors.torch import save_file
from test_contrastive import ALL_TERMS, encoder, feed
import lab_lm.train.contrastive as module
from lab_lm.train.checkpoint import learnt
from lab_lm.train.contrastive import Contrastive
from lab_lm.train.learner import Learner
from lab_lm.train.training import Training
torch.set_num_threads(1)
out, tasks = Path(sys.argv[1]), sys.argv[2].split(',')
KINDS = dict(all=ALL_TERMS, triplet=dict(loss='triplet', margin=3.), chunk=ALL_TERMS | dict(chunk=3), both=dict(both=True))
for task in tasks:
    kind, _, how = task.partition('-')
    torch.manual_seed(0)
    model = Contrastive(encoder(), **KINDS[kind])
    if how == 'alone': module.everyone = lambda rows: rows; module._complete = lambda *facts: None
    rows = 7 if 'odd' in how else 8
    learner = Learner(model, feed(rows), Training(steps=4, lr=.01, optimizer='sgd', precision='fp32', evaluate_every=2), out / task, lambda m: dict(held=float(m(**feed(6).step(99)).loss)))
    learner.fit()
    if learner.accelerator.is_main_process: save_file(learnt(model), out / task / 'weights.safetensors')
'''


def test_two_processes_give_the_parameters_of_one(tmp_path):
    (tmp_path / 'two.py').write_text(TWO)
    env = os.environ | launch_env(2, cpu=True) | dict(PYTHONPATH=str(Path(__file__).parent.parent), IN_TEST='1', OMP_NUM_THREADS='1')
    def run(name, tasks, devices):
        words = launch_words([str(tmp_path / 'two.py'), str(tmp_path / name), ','.join(tasks), str(Path(__file__).parent)], devices, python=sys.executable)
        return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    tasks = ['all', 'all-odd', 'triplet', 'chunk', 'both']
    runs = run('one', tasks, 1), run('two', [*tasks, 'all-alone'], 2)
    told = [r.communicate(timeout=300)[0] for r in runs]
    assert not any(r.returncode for r in runs), told[0][-2000:] + told[1][-3000:]
    def apart(task, reference):
        a, b = (load_file(tmp_path / who / name / 'weights.safetensors') for who, name in (('two', task), ('one', reference)))
        assert a.keys() == b.keys()
        return max(float((a[k] - b[k]).abs().max()) for k in a)
    assert max(apart(task, task) for task in tasks) < 1e-6
    assert apart('chunk', 'all') < 1e-6
    assert apart('all-alone', 'all') > 1e-4 # Without the gathering the negatives of the other process are missing, and it shows
