"Data sets of the Hub: what stands in the way is one line, and nothing that comes with a data set is run"
import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lab_lm.text.hub import hub_records

HERE = Path(__file__).resolve().parent.parent


def fill(folder, name, rows):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows), encoding='utf-8')
    return str(folder)


def test_rows_are_streamed_and_not_gathered(tmp_path):
    "A broken row behind the limit is never met, so no more than the limit was read"
    folder = fill(tmp_path / 'a', 'train.jsonl', [dict(text=f'पंक्ति {n}') for n in range(5)])
    with gzip.open(tmp_path / 'a' / 'train-2.jsonl.gz', 'wb') as f: f.write(b'{"text": ')
    (tmp_path / 'a' / 'train.jsonl').rename(tmp_path / 'a' / 'train-1.jsonl')
    assert [r.text for r in hub_records(folder, lang='hi', limit=5)] == [f'पंक्ति {n}' for n in range(5)]
    with pytest.raises(ValueError, match='cannot be read'): list(hub_records(folder, lang='hi', limit=6))


def test_odd_rows_are_counted(tmp_path):
    report = Counter()
    folder = fill(tmp_path / 'a', 'train.jsonl', [dict(text='एक'), dict(text=None), dict(text='  '), dict(text='दो'), dict(text='')])
    assert [r.text for r in hub_records(folder, lang='hi', report=report)] == ['एक', 'दो'] and report == {'rows without text': 3}
    folder = fill(tmp_path / 'b', 'train.jsonl', [dict(text=1), dict(text=2)])
    assert list(hub_records(folder, lang='hi', report=report)) == [] and report['rows without text'] == 5


def test_splits_and_folders_inside_a_data_set(tmp_path):
    fill(tmp_path / 'a', 'train.jsonl', [dict(text='सीख')]); fill(tmp_path / 'a', 'test.jsonl', [dict(text='परख')])
    assert [[r.text for r in hub_records(str(tmp_path / 'a'), split=s, lang='hi')] for s in ('train', 'test')] == [['सीख'], ['परख']]
    (tmp_path / 'b').mkdir(); (tmp_path / 'b' / 'verified').mkdir()
    for lang, text in (('hin', 'हिन्दी'), ('tam', 'தமிழ்')): fill(tmp_path / 'b' / 'verified' / lang, 'data.jsonl', [dict(doc_id=lang, text=text)])
    assert [(r.id, r.text) for r in hub_records(str(tmp_path / 'b'), data_dir='verified/tam', lang='ta')] == [('tam', 'தமிழ்')]


def test_broken_files_of_a_data_set_take_one_line(tmp_path):
    cases = {'parquet': b'PAR1 not really', 'jsonl': b'{"text": "a"}\n{"text": \n', 'jsonl.gz': gzip.compress(b'{"text": "a"}\n' * 1000)[:-20], 'csv': b'\xff\xfe\x00'}
    for ending, body in cases.items():
        (folder := tmp_path / ending.replace('.', '-')).mkdir()
        (folder / f'train.{ending}').write_bytes(body)
        with pytest.raises(ValueError) as e: list(hub_records(str(folder), lang='hi'))
        assert '\n' not in str(e.value) and ('cannot be read' in str(e.value) or 'no such column' in str(e.value)), ending


def test_a_program_in_a_data_set_is_not_run(tmp_path):
    (tmp_path / 'a').mkdir(); (tmp_path / 'a' / 'a.py').write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding='utf-8')
    with pytest.raises(ValueError, match='a program and not data'): list(hub_records(str(tmp_path / 'a'), lang='hi'))
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('name', ['wikimedia/wikipedia', 'ai4bharat/sangraha', 'no-such-thing'])
def test_offline_is_one_line(name):
    code = f"from lab_lm.text.hub import hub_records\ntry: list(hub_records({name!r}, lang='hi'))\nexcept ValueError as e: print(e)"
    env = dict(os.environ, HF_HUB_OFFLINE='1', PYTHONPATH=str(HERE))
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0 and done.stdout.count('\n') == 1 and 'HF_HUB_OFFLINE is set' in done.stdout and name in done.stdout
    assert 'Traceback' not in done.stderr
