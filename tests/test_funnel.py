"The funnel on real sentences, planted faults at random places, and a leak on the command line"
import os
import random
import subprocess
import sys
from collections import Counter

import pytest

from lab_lm.core.paths import shared_data
from lab_lm.text.clean import reject
from lab_lm.text.corpus import Record, to_jsonl
from lab_lm.text.funnel import Steps, clean, funnel
from lab_lm.text.morph import read_conllu
from lab_lm.text.normalise import normalise
from lab_lm.text.sources import read_records


@pytest.mark.parametrize('name, lang', [('hi_pud', 'hi'), ('ta_mwtt', 'ta')])
def test_clean_sentences_pass(name, lang):
    folder = shared_data('treebanks')
    if folder is None: pytest.skip('the shared treebanks are not here')
    texts = [s.text for s in read_conllu(folder / f'{name}.conllu.gz')]
    reasons = Counter(reject(Record('x', normalise(t, lang), 'ud', lang)) for t in texts)
    assert reasons[None] >= .98 * len(texts), reasons
    spoilt = [t.encode().decode('latin-1') for t in texts]
    assert not any(reject(Record('x', normalise(t, lang), 'ud', lang)) is None for t in spoilt)
    assert not any(reject(Record('x', normalise(t, lang), 'ud', lang)) is None for t in ['Read more about this on the next page.', 'vah ghar gaya aur so gaya'])


@pytest.mark.parametrize('text', ['ब्याज 3.5% हुआ और 1,200 रुपये मिले।', 'यह क्\u200dष है और यह क्ष।', 'திரு. குமார் ரூ. 1,200.50 தந்தார்.'])
def test_what_must_survive_does(text):
    lang = 'ta' if 'ரூ' in text else 'hi'
    (parts, ledger) = clean([Record('a', text, 's', lang)])
    assert [r.text for part in parts.values() for r in part] == [text]


def test_planted_faults_are_all_accounted_for():
    rng = random.Random()
    samples = read_records('data/samples')
    faults, fate = [], {}
    for k, r in enumerate(rng.sample(samples, 40)):
        kind = rng.choice(['exact duplicate', 'other script', 'too short', 'near duplicate'])
        other = 'ta' if r.lang != 'ta' else 'hi'
        text = {'exact duplicate': r.text, 'other script': next(s.text for s in samples if s.lang == other), 'too short': r.text[:3], 'near duplicate': r.text + r.text.split()[0]}[kind]
        faults.append(Record(f'zz-{k}', text, 'planted', r.lang))
        fate[f'zz-{k}', r.lang] = kind
    parts, ledger = clean(rng.sample(samples + faults, len(samples) + len(faults)))
    lost = {(row['id'], row['lang']): row['rule'] for row in _losses(samples + faults)}
    near = [k for k, kind in fate.items() if kind == 'near duplicate']
    assert sum(ledger.counts.values()) == ledger.read == len(samples) + len(faults)
    assert {k: v for k, v in lost.items() if k in fate and k not in near} == {k: v for k, v in fate.items() if k not in near}
    assert len([k for k in lost if k[0][:3] != 'zz-']) == sum(k not in lost for k in near)  # The longer of two stays, so some planted ones replace the sample


def _losses(records):
    import tempfile
    from pathlib import Path
    with tempfile.TemporaryDirectory() as folder: return list(funnel(records, Path(folder) / 'c').losses())


def test_held_out_texts_keep_their_place(tmp_path):
    samples = read_records('data/samples', lang='hi')
    rng = random.Random()
    chosen = rng.sample(samples, 10)
    held = [Record(f'held-{r.id}', r.text, 'exam', 'hi', meta=dict(split='test')) for r in chosen]
    parts, _ = clean(samples + held, Steps(seed=rng.randrange(1000)))
    assert {r.id for r in held} <= {r.id for r in parts['test']}
    assert not {r.text for r in held} & {r.text for part in (parts['train'], parts['validation']) for r in part}


def test_a_leak_stops_the_command_and_names_itself(tmp_path):
    samples = read_records('data/samples', lang='ta')
    leaked = random.Random().choice(samples)
    folder = tmp_path / 'corpus'
    folder.mkdir()
    (folder / 'train.jsonl').write_text(to_jsonl([*samples, Record('leak-1', f'முன்னுரை. {leaked.text}', 's', 'ta')]), encoding='utf-8')
    (tmp_path / 'exam.jsonl').write_text(to_jsonl([Record('q9', leaked.text, 'exam', 'ta')]), encoding='utf-8')
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(LAB_LM_MODELS=str(tmp_path / 'models'), OMP_NUM_THREADS='1')
    words = ['explore', f'data={folder}', 'lang=ta', f'against={tmp_path / "exam.jsonl"}', 'name=t']
    done = subprocess.run([sys.executable, '-m', 'lab_lm', *words], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and 'q9' in done.stderr and 'leaks=remove' in done.stderr
    assert not (tmp_path / 'models' / 't').exists()


def test_a_track_mixes_by_kind_and_checks_every_text(tmp_path, monkeypatch):
    from lab_lm.recipes.explore import ExploreConfig, run
    monkeypatch.setenv('LAB_LM_MODELS', str(tmp_path / 'models'))
    samples, rng = read_records('data/samples', lang='hi'), random.Random()
    sources = ['web-crawl', 'wikipedia', 'stories']
    records = [Record(f'{k}-{r.id}', f'{r.text} {k}', rng.choice(sources), 'hi') for k in range(2) for r in samples]
    (tmp_path / 'mixed.jsonl').write_text(to_jsonl(records), encoding='utf-8')
    done = run(ExploreConfig(name='t', data=str(tmp_path / 'mixed.jsonl'), lang='hi', track='1M', vocab_size=1500))
    story = ' '.join(str(row) for row in done.story)
    assert "'wikipedia'" in story and '1M track' in story
    held = read_records(done.path / 'export' / 'corpus')
    assert {r.source for r in held} == set(sources) and len({r.text for r in held}) == len(held)
    leaked = next(iter(read_records(done.path / 'export' / 'corpus' / 'test.jsonl'))).text
    (tmp_path / 'exam.jsonl').write_text(to_jsonl([Record('q', leaked, 'exam', 'hi')]), encoding='utf-8')
    with pytest.raises(ValueError, match='exam'): run(ExploreConfig(name='u', data=str(tmp_path / 'mixed.jsonl'), lang='hi', track='1M', against=str(tmp_path / 'exam.jsonl')))


def test_a_list_of_sources_is_read_and_a_failing_one_is_told(tmp_path, monkeypatch):
    from lab_lm.recipes.explore import ExploreConfig, run
    monkeypatch.setenv('LAB_LM_MODELS', str(tmp_path / 'models'))
    monkeypatch.setattr('lab_lm.text.gather.data_dir', lambda: tmp_path / 'data')
    (tmp_path / 's.yaml').write_text('sources:\n- {name: good, kind: files, lang: ta, path: data/samples/ta}\n- {name: bad, kind: files, lang: ta, path: nowhere}\n')
    done = run(ExploreConfig(name='t', data=str(tmp_path / 's.yaml'), lang='ta', vocab_size=1500))
    assert any('source bad' in str(row) and 'nowhere' in str(row) for row in done.story)
    assert len(read_records(done.path / 'export' / 'corpus')) == len(read_records('data/samples', lang='ta'))
