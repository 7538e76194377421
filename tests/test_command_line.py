"The command line as a user meets it: what it prints, where, and how it ends"
import gzip
import json
import os
import resource
import subprocess
import sys

import pytest

from lab_lm.core.runs import run_status


@pytest.fixture
def models(tmp_path):
    "A models folder of this test's own"
    return tmp_path / 'models'


def lab(models, *words, file_limit=None):
    "Run the command line; a file limit stands in for a full disk"
    def limit(): resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(LAB_LM_MODELS=str(models), OMP_NUM_THREADS='1')
    return subprocess.run([sys.executable, '-m', 'lab_lm', *map(str, words)], capture_output=True, text=True, env=env, preexec_fn=limit if file_limit else None)


def test_version_and_help(models):
    assert lab(models, '--version').stdout.startswith('lab_lm 0.')
    keys = lab(models, 'explore', '--help').stdout
    assert 'vocab_size=3000' in keys and 'Entries of each tokenizer' in keys


def test_json_is_alone_on_standard_output(models):
    done = lab(models, 'explore', 'lang=ta', 'name=t', '--json')
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {'run', 'scores'} and run_status(found['run']) == 'completed'
    for score in found['scores'].values(): assert set(score) == {'value', 'n', 'low', 'high'} and score['low'] <= score['value'] <= score['high']
    assert 'texts read' in done.stderr


def test_dry_run_writes_nothing_and_explains(models, tmp_path):
    file = tmp_path / 'night.yaml'
    file.write_text('seed: 4\nmlm:\n  steps: 9\n')
    done = lab(models, 'all', 'lang=hi', '--config', file, '--dry-run', '--explain')
    assert done.returncode == 0, done.stderr
    assert 'steps = 9' in done.stdout and 'seed = 4' in done.stdout and 'report.html' in done.stdout
    assert not list(models.glob('*'))


def bad_inputs(folder):
    "Words that cannot be followed, each with what the complaint must say"
    (folder / 'empty').mkdir()
    (folder / 'splits').mkdir()
    (folder / 'splits' / 'val.jsonl').write_text('{"text": "क", "lang": "hi"}\n')
    (folder / 'photo.txt').write_bytes(bytes(range(256)) * 20)
    (folder / 'middle.txt').write_bytes('एक\n'.encode() * 50 + b'\xe0\xa4\xff\n' + 'दो\n'.encode() * 50)
    (folder / 'rows.jsonl').write_text('{"text": "एक", "lang": "hi"}\n{"text": \n')
    (folder / 'cut.txt.gz').write_bytes(gzip.compress('வணக்கம்\n'.encode() * 99)[:-10])
    (folder / 'list.yaml').write_text('- a\n')
    return {
        'lnag=hi': "did you mean 'lang'?", 'seed=three': 'valid integer', 'size=huge': "'tiny', 'small' or 'base'", 'seed': 'expected key=value',
        f'data={folder}/none': 'nothing found', f'data={folder}/empty': 'holds no texts', f'data={folder}/photo.txt lang=hi': 'binary',
        f'data={folder}/middle.txt lang=hi': 'line 51', f'data={folder}/rows.jsonl': 'line 2', f'data={folder}/splits': 'rename it to validation.jsonl',
        f'data={folder}/cut.txt.gz lang=ta': 'not a whole gzip', 'name=../up': 'cannot name a run', f'--config {folder}/list.yaml': 'key: value lines',
        '--config nowhere.yaml': 'nothing found'}


def test_every_misuse_is_one_line_and_exit_2(models, tmp_path):
    kept = models / 'explore' / 'model' / 'precious.txt'
    kept.parent.mkdir(parents=True)
    kept.write_text('still here')
    for words, complaint in bad_inputs(tmp_path).items():
        done = lab(models, 'explore', *words.split())
        assert done.returncode == 2, (words, done.stderr)
        assert complaint in done.stderr and 'Traceback' not in done.stderr and done.stdout == '', (words, done.stderr)
    assert kept.read_text() == 'still here'


def test_bad_rows_can_be_skipped_and_are_counted(models, tmp_path):
    bad_inputs(tmp_path)
    text = [f'यह {n} नंबर का वाक्य है जिसमें {n * n} लिखा है।' for n in range(60)]
    (tmp_path / 'mixed.txt').write_bytes('\n'.join(text).encode() + b'\n\xff\xfe\xff\n')
    done = lab(models, 'explore', f'data={tmp_path}/mixed.txt', 'lang=hi', 'errors=skip', 'vocab_size=400', '--json')
    assert done.returncode == 0, done.stderr
    assert 'bytes that are not UTF-8' in (models / 'explore' / 'story.jsonl').read_text()


@pytest.mark.parametrize('words, limit, status', [(['explore'], 40_000, 'absent'), (['mlm', 'steps=1', 'vocab_size=900'], 400_000, 'failed')])
def test_a_full_disk_is_said_and_leaves_nothing_half_written(models, words, limit, status):
    done = lab(models, *words, 'lang=hi', file_limit=limit)
    assert done.returncode == 2 and 'the disk is full' in done.stderr and 'Traceback' not in done.stderr, done.stderr
    assert run_status(models / words[0]) == status
    assert not list(models.rglob('*.part'))


def test_what_training_leaves_out_is_told(models, tmp_path):
    text = [f'यह {n} नंबर का वाक्य है जिसमें {n * n} लिखा है।' for n in range(60)]
    (tmp_path / 'mixed.txt').write_bytes('\n'.join([*text, 'only Latin letters in this line']).encode() + b'\n\xff\xfe\xff\n')
    done = lab(models, 'mlm', f'data={tmp_path}/mixed.txt', 'lang=hi', 'errors=skip', 'vocab_size=400', 'steps=1', '--json')
    assert done.returncode == 0, done.stderr
    story = (models / 'mlm' / 'story.jsonl').read_text(encoding='utf-8')
    assert '1 left out before training: bytes that are not UTF-8' in story and '1 left out before training: other script' in story
    done = lab(models, 'beir', f'data={tmp_path}/mixed.txt', 'lang=hi', 'errors=skip', 'model=bm25')
    assert '1 bytes that are not UTF-8' in done.stderr
