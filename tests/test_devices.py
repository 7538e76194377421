"Two processes are one; job scripts that save before their time is up"
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lab_lm.train.devices import Job, launch_env, launch_words, slurm_script, spread

TRAIN = '''
import os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from lab_lm.core.seed import seeded
from lab_lm.nets.transformer import NetConfig, Transformer
from lab_lm.train.checkpoint import checkpoints, learnt
from lab_lm.train.learner import Learner
from lab_lm.train.training import Training
torch.set_num_threads(1)
out, tasks, rank = Path(sys.argv[1]), sys.argv[2].split(','), int(os.environ.get('RANK', 0))

def tell(*words): os.write(1, (' '.join(map(str, words)) + '\\n').encode()) # In one piece, for two processes write here

class Rows:
    "Eight rows of random tokens a step, with very unequal numbers of labels"
    resumable = True
    def step(self, k):
        g = torch.Generator().manual_seed(k)
        ids = torch.randint(1, 40, (8, 12), generator=g)
        keep = torch.rand(ids.shape, generator=g) < torch.linspace(.1, .9, 8)[:, None]
        return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.where(keep, ids.roll(-1, 1), -100))
    def __getitem__(self, k): return self.step(k)
    def fingerprint(self): return dict(kind='rows')

class Ends:
    def __init__(self, at, how): self.at, self.how = at, how
    def stepped(self, learner, facts):
        if facts['step'] < self.at: return
        if self.how == 'dies': raise SystemError('no power')
        if rank == 1: os.kill(os.getpid(), signal.SIGUSR1)

def train(name, optimizer, *callbacks, double=False, **changes):
    with seeded(0): model = Transformer(NetConfig(vocab_size=40, width=32, layers=2, heads=2))
    if double: model = model.double()
    training = Training(**dict(steps=5, lr=.003, optimizer=optimizer, precision='fp32', save_every=2, evaluate_every=3) | changes)
    learner = Learner(model, Rows(), training, out / name, lambda m: dict(held=float(m(**Rows().step(10**6)).loss)), callbacks)
    try: learner.fit()
    except (SystemError, KeyboardInterrupt) as e: tell(rank, type(e).__name__, e)
    return learner

def sharded():
    "Let Accelerate shard on processors, which by itself it does on accelerators only"
    import accelerate
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    plain = accelerate.Accelerator
    def make(**how):
        acc = plain(**how)
        acc.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy='transformer_based_wrap', transformer_cls_names_to_wrap=['Block'], reshard_after_forward=True)
        acc.state.distributed_type = PartialState._shared_state['distributed_type'] = DistributedType.FSDP
        return acc
    accelerate.Accelerator = make

for task in tasks:
    kind = 'adamw' if 'adamw' in task else 'muon'
    if 'fsdp' in task: sharded()
    if 'resume' in task: train(task, kind, Ends(3, 'dies'))
    if 'signal' in task:
        stopped = train(task, kind, Ends(2, 'signal'), save_every=100)
        tell(rank, 'stopped after', stopped.step, 'with', [p.name for p in checkpoints(out / task / 'checkpoints')])
    done = train(task, kind, double='double' in task, accumulate=2 if 'parts' in task else 1, save_every=100 if 'signal' in task else 2)
    tell(rank, task, type(next(done.model.parameters())).__name__)
    weights = learnt(done.model)
    if rank == 0: save_file(weights, out / task / 'weights.safetensors')
'''


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "The same trainings by one process and by two"
    folder = tmp_path_factory.mktemp('trained')
    (folder / 'train.py').write_text(TRAIN)
    env = os.environ | launch_env(2, cpu=True) | dict(PYTHONPATH=str(Path(__file__).parent.parent), IN_TEST='1', OMP_NUM_THREADS='1')
    def start(name, tasks, devices):
        words = launch_words([str(folder / 'train.py'), str(folder / name), ','.join(tasks)], devices, python=sys.executable)
        return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    one = start('one', ['adamw', 'adamw_double', 'muon'], 1)
    two = start('two', ['adamw', 'adamw_parts', 'adamw_double', 'muon_resume', 'muon_signal', 'fsdp_adamw', 'fsdp_muon_resume'], 2)
    told = {name: p.communicate(timeout=300)[0] for name, p in dict(one=one, two=two).items()}
    return folder, told


def apart(trained, task, reference):
    folder, told = trained
    assert (folder / 'two' / task / 'weights.safetensors').exists(), told['two'][-3000:]
    a, b = (load_file(folder / where / name / 'weights.safetensors') for where, name in (('two', task), ('one', reference)))
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.mark.parametrize('task, reference, most', [('adamw', 'adamw', 1e-5), ('adamw_parts', 'adamw', 1e-5), ('adamw_double', 'adamw_double', 1e-12), ('muon_resume', 'muon', 1e-5)])
def test_two_processes_give_the_parameters_of_one(trained, task, reference, most): assert apart(trained, task, reference) < most


def test_a_signal_to_one_process_stops_both_with_a_checkpoint_and_the_same_call_goes_on(trained):
    assert apart(trained, 'muon_signal', 'muon') < 1e-5
    for rank in (0, 1): assert f"{rank} stopped after 3 with ['step-00000003']" in trained[1]['two']


@pytest.mark.parametrize('task, reference', [('fsdp_adamw', 'adamw'), ('fsdp_muon_resume', 'muon')])
def test_sharded_training_gives_the_parameters_of_one_process(trained, task, reference):
    assert apart(trained, task, reference) < 1e-5
    assert f'0 {task} DTensor' in trained[1]['two']


def test_only_the_main_process_logs_and_saves(trained):
    folder = trained[0] / 'two'
    for run in ('adamw', 'muon_resume', 'fsdp_muon_resume'):
        assert len((folder / run / 'metrics.jsonl').read_text().splitlines()) == 5
        assert sorted(p.name for p in (folder / run / 'checkpoints').iterdir()) == ['step-00000004', 'step-00000005']
    one, two = ([line.split('"grad_norm"')[0] for line in (trained[0] / who / 'adamw_double' / 'metrics.jsonl').read_text().splitlines()] for who in ('one', 'two'))
    assert [line[:30] for line in one] == [line[:30] for line in two]


def test_spread_keeps_the_batch_for_every_number_of_devices():
    for batch in range(1, 200):
        for devices in range(1, 20):
            if batch % devices:
                with pytest.raises(ValueError) as told: spread(batch, devices, 7)
                near = [int(w) for w in str(told.value).split('do are ')[1].split(' and ')]
                assert all(spread(n, devices, 7) for n in near) and near[-1] - devices < batch < near[-1]
            else:
                s = spread(batch, devices, 7)
                assert s.devices * s.micro * s.accumulation == batch and s.micro <= 7
                assert not any(batch // devices % m == 0 for m in range(s.micro + 1, min(7, batch // devices) + 1))


SRUN = '''#!{python}
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith('--'): words.pop(0)
tasks = [subprocess.Popen(words, env=os.environ | dict(SLURM_PROCID=str(i), SLURM_LOCALID=str(i))) for i in range(int(os.environ['SLURM_NTASKS']))]
signal.signal(signal.SIGUSR1, lambda *_: [t.send_signal(signal.SIGUSR1) for t in tasks])
sys.exit(max(t.wait() for t in tasks))
'''
SCONTROL = '''#!/bin/bash
if [ "$1" = show ]; then printf 'node one\\nnode2\\n' | sed 's/ one/1/'; else echo "$@" >> requeued; fi
'''
WORK = '''
import os, signal, sys, time
from pathlib import Path
rank, told, name, wrong = os.environ['RANK'], [], sys.argv[1], len(sys.argv) > 2
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
assert os.environ['WORLD_SIZE'] == '2' and os.environ['MASTER_ADDR'] == 'node1' and os.environ['WHERE'] == "it's; $HOME"
if wrong: sys.exit(3)
kept = Path(f'{name}-{rank}')
start = int(kept.read_text()) if kept.exists() else 0
Path(f'started-{rank}').write_text(str(start))
for k in range(start, start + 20):
    time.sleep(.05)
    if told: kept.write_text(str(k + 1)); sys.exit(75)
kept.write_text('done')
'''


def test_a_job_saves_when_told_goes_back_into_the_queue_and_ends(tmp_path):
    for name, text in dict(srun=SRUN.format(python=sys.executable), scontrol=SCONTROL).items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / 'work.py').write_text(WORK)
    job = Job('night', nodes=1, gpus=0, tasks=2, cpus=1, environment=dict(WHERE="it's; $HOME"), before=('set -u',))
    def run(words, send=None, seeds=(), **env):
        script = slurm_script(job, [sys.executable, 'work.py', *words], seeds)
        assert not subprocess.run(['bash', '-n'], input=script, text=True, capture_output=True).stderr
        (tmp_path / 'job.sh').write_text(script)
        for old in [*tmp_path.glob('started-*'), *tmp_path.glob('requeued')]: old.unlink()
        slurm = dict(SLURM_JOB_ID='7', SLURM_JOB_NODELIST='node[1-2]', SLURM_NTASKS='2', SLURM_CPUS_PER_TASK='1', SLURM_ARRAY_TASK_ID='1', PATH=f"{tmp_path}:{os.environ['PATH']}")
        shell = subprocess.Popen(['bash', 'job.sh'], cwd=tmp_path, env=os.environ | slurm | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if send:
            while len(list(tmp_path.glob('started-*'))) < 2 and shell.poll() is None: time.sleep(.02)
            shell.send_signal(send)
        shell.communicate(timeout=60)
        return shell.returncode, (tmp_path / 'requeued').exists()
    words, seeds = ['run-{seed}'], (4, 13)
    assert run(words, signal.SIGUSR1, seeds) == (75, True)
    saved = [int((tmp_path / f'run-13-{rank}').read_text()) for rank in (0, 1)]
    assert min(saved) > 0 and (tmp_path / 'requeued').exists()
    assert run(words, signal.SIGTERM, seeds) == (75, False), 'a cancelled job stays cancelled'
    assert [int((tmp_path / f'started-{rank}').read_text()) for rank in (0, 1)] == saved, 'it goes on from what it saved'
    assert run(words, signal.SIGUSR1, seeds, SLURM_RESTART_COUNT='50') == (75, False)
    assert run(['other', 'wrong']) == (3, False), 'a mistake is not repeated'
    assert run(['whole']) == (0, False)
    assert (tmp_path / 'whole-1').read_text() == 'done'
