"Runs that are killed, and runs that meet"
import json
import os
import random
import signal
import subprocess
import sys
import time

from lab_lm.core.runs import run_status

CHILD = '''
import json, sys
from lab_lm.core.config import Config
from lab_lm.core.files import whole_folder
from lab_lm.core.runs import Run, Score
class Settings(Config):
    name:str='k'
    seed:int=0
with Run.start(Settings(), 'lesson') as run:
    for step in range(100000):
        run.log(step, loss=step / 3)
        run.score('accuracy', Score(.5, step, .4, .6))
        run.record('rows', [dict(step=step, text='मेघ ' * 200)] * 20)
        with whole_folder(run.model_dir) as folder: (folder / 'a').write_text('x' * 9000), (folder / 'b').write_text('x' * 9000)
'''


def child(models):
    env = os.environ | dict(LAB_LM_MODELS=str(models))
    return subprocess.Popen([sys.executable, '-c', CHILD], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_kill_at_random_moments_leaves_no_half_file(tmp_path):
    rng = random.Random()
    for attempt in range(8):
        process = child(tmp_path)
        metrics = tmp_path / 'k' / 'metrics.jsonl'
        while process.poll() is None and not (metrics.exists() and run_status(tmp_path / 'k') == 'running'): time.sleep(.01)
        time.sleep(rng.random() * .4)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert run_status(tmp_path / 'k') in ('unfinished', 'absent')
        for line in metrics.read_bytes().split(b'\n')[:-1] if metrics.exists() else []: json.loads(line)
        for file in (tmp_path / 'k').glob('*.json'): json.loads(file.read_text(encoding='utf-8'))
        for file in (tmp_path / 'k').glob('records/*.jsonl'): assert len([json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()]) == 20
        for folder in (tmp_path / 'k').glob('model'): assert {p.name: p.stat().st_size for p in folder.iterdir()} == dict(a=9000, b=9000)


def test_two_runs_with_one_name_do_not_mix(tmp_path):
    first = child(tmp_path)
    while not (tmp_path / 'k' / 'metrics.jsonl').exists(): time.sleep(.01)
    second = child(tmp_path)
    _, complaint = second.communicate(timeout=60)
    assert second.returncode != 0 and 'is being written by another process' in complaint
    assert first.poll() is None
    first.kill()
    first.wait()
    assert json.loads((tmp_path / 'k' / 'RUNNING').read_text())['pid'] == first.pid
