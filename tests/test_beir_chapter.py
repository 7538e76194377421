"The beir command and its recipe: what it loads, how fast, what it keeps, and that it goes on where it was cut off"
import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest

from lab_lm.core.paths import shared_data
from lab_lm.core.runs import RunFolder
from lab_lm.recipes.beir import SYSTEMS, BeirConfig, run
from lab_lm.text.beir import read_beir
from lab_lm.text.pairs import Triplet, write_triplets
from lab_lm.text.tiny import pocket_facts, write_pocket

QUICK = dict(steps=2, tune=4, batch_size=8)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A task of forty pocket passages, and pairs about others with two questions of the test among them"
    folder = tmp_path_factory.mktemp('pocket')
    write_pocket(folder / 'hi', 'hi', 40)
    facts, asked = pocket_facts('hi', 60, seed=1), list(read_beir(folder / 'hi').queries.values())[:2]
    pairs = [Triplet(str(i), f.question, f.passage) for i, f in enumerate(facts) if f.question not in asked]
    write_triplets(pairs + [Triplet(f'leak{i}', q, pairs[i].positive) for i, q in enumerate(asked)], folder / 'pairs.jsonl')
    return folder


def config(place, name, **more):
    return BeirConfig(**dict(name=name, data=str(place / 'hi'), lang='hi', pairs=str(place / 'pairs.jsonl')) | QUICK | more)


def weights(run):
    return (run.model_dir / 'model.safetensors').read_bytes()


def test_bm25_alone_loads_neither_torch_nor_transformers(place, tmp_path):
    code = ("import sys; from lab_lm.app.cli import main; sys.argv = ['lab_lm', 'beir', *sys.argv[1:]]\n"
            "try: main()\nexcept SystemExit as e: assert not e.code, e.code\n"
            "print([m for m in ('torch', 'transformers', 'accelerate', 'tokenizers') if m in sys.modules])")
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(LAB_LM_MODELS=str(tmp_path))
    done = subprocess.run([sys.executable, '-c', code, f'data={place}/hi', 'lang=hi', 'model=bm25', '--json'], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    scores, loaded = done.stdout.splitlines()
    assert loaded == '[]' and json.loads(scores)['scores']['ndcg@10']['n'] == 40


def test_hindi_xquad_reaches_its_bar(tmp_path):
    folder = shared_data('retrieval/xquad_hi_dev')
    if not folder: pytest.skip('the third-party set retrieval/xquad_hi_dev is not here')
    found = run(BeirConfig(name='xquad-bar', data=str(folder), lang='hi', model='bm25'))
    assert found.scores['ndcg@10'].value >= .95 and found.scores['ndcg@10'].n == 591
    assert found.scores['ndcg@10 gain over usual pattern'].low > .15


@pytest.fixture(scope='module')
def hybrid(place):
    "A run that was never cut off"
    return run(config(place, 'beir-whole', model='hybrid'))


@pytest.fixture(scope='module')
def taken(place, hybrid):
    "The encoder which that run tuned, measured as it is"
    return run(config(place, 'beir-taken', model='encoder', encoder=str(hybrid.model_dir)))


def results(done): return next(p['rows'] for p in done.story if p.get('name') == 'results')


def records(done): return [json.loads(line) for line in (done.path / 'records' / 'queries-hi.jsonl').read_text(encoding='utf-8').splitlines()]


def test_every_model_measures_its_systems(hybrid, taken):
    for model, done in dict(hybrid=hybrid, encoder=taken).items():
        assert [r['system'] for r in results(done)] == list(SYSTEMS[model])
        assert done.scores['ndcg@10'].n == 40 and 'truncation not told' not in done.scores['ndcg@10'].protocol
        assert abs(sum(r[model] for r in records(done)) / 40 - done.scores['ndcg@10'].value) < 1e-3


def test_questions_of_the_test_are_never_trained_on(hybrid):
    notes = [p['text'] for p in hybrid.story if p['kind'] == 'note']
    assert any(n.startswith('2 pairs left out before tuning: a question of the test') for n in notes), notes


def test_the_tuned_encoder_is_one_that_the_recipe_takes_again(hybrid, taken):
    tuned = next(r['ndcg@10'] for r in results(hybrid) if r['system'] == 'tuned')
    assert abs(taken.scores['ndcg@10'].value - tuned) < 2e-3


def test_cut_off_in_the_middle_it_goes_on_to_the_same_weights(place, hybrid, monkeypatch):
    cfg, steps = config(place, 'beir-cut', model='hybrid'), []
    from lab_lm.train.learner import Learner
    save = Learner.save
    def cut(learner):
        save(learner)
        steps.append(learner.step)
        if len(steps) == 2: raise KeyboardInterrupt
    monkeypatch.setattr(Learner, 'save', cut)
    with pytest.raises(KeyboardInterrupt): run(cfg)
    monkeypatch.setattr(Learner, 'save', save)
    stopped = {p.name for p in (RunFolder.open('beir-cut').path / 'checkpoints').iterdir()}
    assert stopped == {'pocket', 'tuned'} and steps == [1, 2]
    again = run(cfg)
    rows = (again.path / 'checkpoints' / 'tuned' / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(row)['step'] for row in rows] == list(range(4)) and weights(again) == weights(hybrid)
    assert {k: s.value for k, s in again.scores.items()} == {k: s.value for k, s in hybrid.scores.items()}


def test_prompts_reach_questions_and_passages(place, hybrid, taken):
    told = run(config(place, 'beir-prompts', model='encoder', encoder=str(hybrid.model_dir), query_prompt='प्रश्न: ', passage_prompt='उत्तर: '))
    assert [r['encoder'] for r in records(taken)] != [r['encoder'] for r in records(told)]
    known = json.loads((told.model_dir / 'config_sentence_transformers.json').read_text(encoding='utf-8'))['prompts']
    assert known == {'query': 'प्रश्न: ', 'document': 'उत्तर: '}


def test_several_languages_and_packed_files(place, tmp_path):
    for lang in ('hi', 'ta'): write_pocket(tmp_path / lang, lang, 20)
    with open(tmp_path / 'ta' / 'corpus.jsonl', 'rb') as plain, gzip.open(tmp_path / 'ta' / 'corpus.jsonl.gz', 'wb') as packed: shutil.copyfileobj(plain, packed)
    (tmp_path / 'ta' / 'corpus.jsonl').unlink()
    done = run(BeirConfig(name='beir-two', data=str(tmp_path), model='bm25'))
    assert {'ndcg@10/hi', 'ndcg@10/ta'} <= set(done.scores)
    assert {p.name for p in (done.path / 'records').iterdir()} == {'queries-hi.jsonl', 'queries-ta.jsonl'}


def test_misuse_is_told_before_anything_is_written(place):
    for more, complaint in (dict(pairs='nowhere.jsonl'), "nothing found at 'nowhere.jsonl'"), (dict(split='dev'), "no qrels for the split 'dev'"), (dict(data='no-such-set'), 'no set or suite'):
        with pytest.raises(ValueError, match=complaint): run(config(place, 'beir-misuse', **more))
    with pytest.raises(ValueError, match='no run'): RunFolder.open('beir-misuse')


def test_frozen_but_for_the_projection_and_with_mined_negatives(place):
    from safetensors.torch import load_file
    done = run(config(place, 'beir-frozen', model='hybrid', freeze='all', projection='linear', dims=8, negatives=1))
    assert (done.model_dir / '2_Dense').is_dir()
    assert any('negatives mined by BM25' in p['text'] for p in done.story if p['kind'] == 'note')
    before, after = (load_file(folder / 'model.safetensors') for folder in (done.path / 'checkpoints' / 'pocket', done.model_dir))
    assert before.keys() == after.keys() and all((before[k] == after[k]).all() for k in before)
