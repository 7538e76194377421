"Tasks: real fields, files in every form, hidden labels, the project's own items, probes and heads, SIB-200; oracles, guessing and planted faults"
import csv
import gzip
import json
import math
import random
import unicodedata
from collections import Counter

import numpy as np
import pytest

from lab_lm.core.paths import data_dir, shared_data
from lab_lm.core.seed import seeded
from lab_lm.evals.choices import choice_credit, choice_scores
from lab_lm.evals.tasks import class_scores, guesses, probe_guesses, task_scores
from lab_lm.nets.heads import Classifier
from lab_lm.nets.transformer import NetConfig, Transformer
from lab_lm.text.labelled import LabelledRows, encode_labelled, shuffled_labels
from lab_lm.text.script import LANG_SCRIPT, script_fraction
from lab_lm.text.task_files import hub_task, read_rows, read_task, sample_task
from lab_lm.text.task_sets import task_data, task_item, task_names, task_sets
from lab_lm.text.tokenize import train_tokenizer
from lab_lm.train.feed import Feed
from lab_lm.train.learner import Learner, Training
from lab_lm.train.objectives import Given

SETS = task_sets()
SAMPLES = [(n, l) for l in ('hi', 'ta') for n, s in SETS.items() if not sample_task(n, l).reason]


# --- the sets ---

def test_every_set_says_what_reading_it_needs():
    assert sorted(task_names('indicglue,more,relatives')) == sorted(SETS)
    for s in SETS.values():
        if s.absent: continue
        assert s.kind in ('choice', 'class', 'pair', 'tags') and s.source and s.licence and s.configs and s.about
        need = dict(choice={'options', 'answer'}, pair={'first', 'second', 'label'}, tags={'words', 'tags'})
        assert set(s.fields) == need.get(s.kind, {'text', 'label'}) and (s.kind != 'choice' or s.answers in ('text', 'number'))
        assert set(s.sizes) <= set(s.configs) and all(len(n) == 3 for n in s.sizes.values())
        for how in (*s.prompts.values(), *s.ask.values()): assert {'context', 'domain'} <= set(how)
        for how in s.ask.values(): assert set(how['words']) == set(s.labels) and len(set(how['words'].values())) == len(s.labels)
        assert len(set(s.labels)) == len(s.labels)


def test_the_facts_an_ancestor_had_wrong():
    "Titles and gaps are choices among four, not four classes; genre has more than three classes; a choice is not argmax over class ids"
    assert {SETS[n].kind for n in ('wstp', 'csqa', 'copa', 'xcopa')} == {'choice'} and SETS['wstp'].chance == SETS['csqa'].chance == .25
    assert SETS['wstp'].fields['options'] == ['titleA', 'titleB', 'titleC', 'titleD'] and SETS['wnli'].hidden == ('None',)
    assert SETS['bbca'].labels == () and SETS['iitp-mr'].labels == ('negative', 'neutral', 'positive') and len(SETS['sib200'].labels) == 7
    assert SETS['copa'].sizes['hi'] == [362, 88, 449] and SETS['wnli'].sizes['hi'] == [635, 71, 146] and SETS['csqa'].sizes['ta'] == [0, 0, 38590]
    assert SETS['headline'].absent and hub_task('headline', 'hi').items == []


# --- files ---

def write(path, rows, form, header=True):
    if form == 'jsonl': text = ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows)
    elif form == 'json': text = json.dumps(rows, ensure_ascii=False)
    else: text = None
    if text is not None: path.write_text(text, encoding='utf-8')
    elif form == 'gz':
        with gzip.open(path, 'wt', encoding='utf-8') as f: f.write(''.join(json.dumps(r) + '\n' for r in rows))
    elif form == 'parquet':
        import pandas as pd
        pd.DataFrame(rows).to_parquet(path)
    else:
        with open(path, 'w', newline='', encoding='utf-8') as f:
            out = csv.writer(f, delimiter='\t', quoting=csv.QUOTE_NONE, quotechar=None) if form == 'tsv' else csv.writer(f)
            if header: out.writerow(rows[0])
            out.writerows(r.values() for r in rows)


NAMES = ['iitp-mr.hi/test.jsonl', 'iitp-mr.hi/test-00000-of-00001.parquet', 'iitp-mr.hi/hi-test.csv', 'iitp-mr.hi-test.tsv', 'iitp-mr/hi/test.json',
         'iitp-mr_hi_test.jsonl', 'iitp-mr.hi.jsonl', 'iitp-mr.hi/test.jsonl.gz']


@pytest.mark.parametrize('name', NAMES)
def test_the_same_items_from_every_form(tmp_path, name):
    rng = random.Random()
    some = ['फ़िल्म', 'कहानी,', '"अच्छी"', "क्या'", 'थी ।']
    rows = [dict(label=rng.randrange(3), text=' '.join(rng.choices(some, k=rng.randint(1, 9)))) for _ in range(40)]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, rows, path.suffix[1:], header=rng.random() < .5)
    found = read_task('iitp-mr', 'hi', tmp_path)
    assert [(i['text'], i['label']) for i in found.items] == [(r['text'], SETS['iitp-mr'].labels[r['label']]) for r in rows], found
    assert found.origin == path.name and [i['id'] for i in found.items][:2] == ['iitp-mr.hi-00001', 'iitp-mr.hi-00002']
    assert 'no file of its train part' in read_task('iitp-mr', 'hi', tmp_path, 'train').reason


def test_pieces_of_parquet_are_read_in_order(tmp_path):
    for k in (2, 0, 1): write(tmp_path / f'test-0000{k}-of-00003.parquet', [dict(text=f'{k}', label=k)], 'parquet')
    folder = tmp_path / 'iitp-pr.hi'
    folder.mkdir()
    for p in sorted(tmp_path.glob('*.parquet')): p.rename(folder / p.name)
    assert [i['text'] for i in read_task('iitp-pr', 'hi', tmp_path).items] == ['0', '1', '2']


def test_what_is_missing_is_skipped_and_nothing_stands_in(tmp_path):
    for name in SETS:
        for lang in ('hi', 'ta', 'te'):
            found = read_task(name, lang, tmp_path)
            assert found.items == [] and found.reason and 'skipped, because' in repr(found)
            if SETS[name].kind != 'choice':
                with pytest.raises(ValueError, match='nothing to score'): task_scores(found, [])
    assert 'hf download --repo-type dataset ai4bharat/indic_glue' in read_task('wstp', 'ta', tmp_path).reason


def test_the_hub_gives_items_or_a_reason(monkeypatch):
    import datasets
    rows, asked = [dict(premise='क।', choice1='ख', choice2='ग', question='cause', label=k % 2) for k in range(4)], []
    monkeypatch.setattr(datasets, 'load_dataset', lambda *where, split: asked.append((*where, split)) or rows)
    assert len(hub_task('copa', 'hi', 'validation').items) == 4 and asked == [('ai4bharat/indic_glue', 'copa.hi', 'validation')]
    def absent(*where, split): raise ConnectionError('no\nroute')
    monkeypatch.setattr(datasets, 'load_dataset', absent)
    found = hub_task('xcopa', 'ta')
    assert found.items == [] and found.reason.startswith('cambridgeltl/xcopa cannot be had: no route; where there is a network: hf download')


def test_a_wrong_row_is_named_by_file_and_line(tmp_path):
    (tmp_path / 'wnli.hi-test.csv').write_text('hypothesis,premise,label\nक,ख,0\nक,ख,7\n', encoding='utf-8')
    told = "wnli.hi-test.csv, line 3: '7' is not a label of wnli; known: not_entailment, entailment, None"
    with pytest.raises(ValueError, match=told): read_task('wnli', 'hi', tmp_path)
    (tmp_path / 'copa.hi.jsonl').write_text('{"premise": "a"}\n')
    with pytest.raises(ValueError, match="copa.hi.jsonl, line 1: no field 'choice1'; it has: premise"): read_task('copa', 'hi', tmp_path)
    left = read_task('wnli', 'hi', tmp_path, errors='skip')
    assert left.left == {'rows that are no items': 1} and left.reason # One label is left, which tells nothing
    (tmp_path / 'a.jsonl').write_text('[1]\n')
    with pytest.raises(ValueError, match='not an object'): list(read_rows(tmp_path / 'a.jsonl'))
    (tmp_path / 'a.parquet').write_bytes(b'PAR1 no')
    with pytest.raises(ValueError, match='not a whole Parquet'): list(read_rows(tmp_path / 'a.parquet'))


# --- labels that are hidden ---

def rows_of(*rows): return [(f'row {i}', r) for i, r in enumerate(rows, 1)]


def test_hidden_labels_are_seen():
    pair = lambda label: dict(premise='क', hypothesis='ख', label=label)
    for labels in ([2] * 30, ['None'] * 3, [-1, None, ''], ['-1'] * 5, [0] * 30, ['entailment'] * 4):
        found = task_data(SETS['wnli'], 'hi', 'test', rows_of(*map(pair, labels)))
        assert not found.items and ('hidden' in found.reason or 'placeholder' in found.reason)
    part = task_data(SETS['wnli'], 'hi', 'test', rows_of(*map(pair, [0, 1, 2, 1])))
    assert [i['label'] for i in part.items] == ['not_entailment', 'entailment', 'entailment'] and part.left['items whose label is hidden'] == 1
    choice = lambda label: dict(premise='क।', choice1='ख', choice2='ग', question='cause', label=label)
    for answers in ([0] * 10, [-1] * 3): assert task_data(SETS['copa'], 'hi', 'test', rows_of(*map(choice, answers))).reason
    assert len(task_data(SETS['copa'], 'hi', 'test', rows_of(*map(choice, [0] * 9 + [1]))).items) == 10
    tags = lambda *t: dict(tokens=['a'] * len(t), ner_tags=list(t))
    for some in ([tags(6, 6), tags(6)], [tags(-1, -1)]): assert task_data(SETS['wiki-ner'], 'hi', 'test', rows_of(*some)).reason
    assert len(task_data(SETS['wiki-ner'], 'hi', 'test', rows_of(tags(6, 2, 5), tags(-1, 6))).items) == 1
    title = dict(sectionText='क', titleA='ख', titleB='ग', titleC='घ', titleD='च', correctTitle='ख', url='')
    assert len(task_data(SETS['wstp'], 'hi', 'test', rows_of(*[title] * 20)).items) == 20 # A title's place is not its label


@pytest.mark.parametrize('name, row, match', [
    ('copa', dict(premise='क', choice1='ख', choice2='ख', question='cause', label=0), 'only one option'),
    ('copa', dict(premise='क', choice1='', choice2='ख', question='cause', label=0), 'the right option is empty'),
    ('copa', dict(premise='क', choice1='ग', choice2='ख', question='cause', label='x'), "the answer 'x'"),
    ('csqa', dict(question='क <MASK>', options='ख', answer='ख'), 'not a list'),
    ('iitp-mr', dict(text='  ', label=0), "the field 'text' is empty"),
    ('wiki-ner', dict(tokens=[], ner_tags=[]), 'at least one'),
    ('wiki-ner', dict(tokens=['a'], ner_tags=['B-GPE']), "'B-GPE' is not a label"),
    ('xnli', dict(premise='a', hypothesis='b', label=3), 'is not a label')])
def test_rows_that_are_no_items(name, row, match):
    with pytest.raises(ValueError, match=match): task_item(SETS[name], row, 'ta' if name == 'xnli' else 'hi')


def test_text_of_a_row_cannot_pose_as_a_field():
    row = dict(premise='{choice1} {question}', choice1='ख', choice2='ग', question='cause', label=0)
    assert task_item(SETS['copa'], row, 'hi')['context'] == '{choice1} {question} क्योंकि '


# --- the project's own items ---

def test_there_are_samples_for_every_kind_in_both_languages():
    for lang in ('hi', 'ta'):
        assert {SETS[n].kind for n, l in SAMPLES if l == lang} == {'choice', 'class', 'pair', 'tags'}
    assert {'wstp', 'csqa', 'copa', 'wnli', 'bbca', 'iitp-mr', 'md', 'wiki-ner', 'sib200'} <= {n for n, l in SAMPLES if l == 'hi'}
    assert {'wstp', 'csqa', 'xcopa', 'xnli', 'inltkh', 'sentiment', 'wiki-ner', 'sib200'} <= {n for n, l in SAMPLES if l == 'ta'}


@pytest.mark.parametrize('name, lang', SAMPLES)
def test_samples_are_clean_balanced_and_scorable(name, lang):
    data = sample_task(name, lang)
    rows = [r for _, r in read_rows(data_dir() / 'samples' / lang / 'tasks' / f'{name}.{lang}.jsonl')]
    assert 12 <= len(data.items) <= 20 and not data.left and 'not the benchmark' in data.origin
    said = [' '.join(map(str, i['words'] if 'words' in i else [i['context'], *i['options']] if 'options' in i else [i['text']])) for i in data.items]
    assert len(set(said)) == len(said)
    for text in said:
        assert text == unicodedata.normalize('NFC', text) and script_fraction(text, LANG_SCRIPT[lang]) == 1, text
        assert not any(unicodedata.category(c) in ('Cc', 'Cf', 'Co', 'Cn') and c != '\n' for c in text)
        assert lang == 'hi' or not set(text) & set('।॥')
    if data.task.kind == 'choice':
        places = Counter(i['place'] for i in data.items)
        assert max(places.values()) - min(places.values()) <= 2 and {len(i['options']) for i in data.items} == {round(1 / SETS[name].chance)}
    elif data.task.kind != 'tags': assert len(set(Counter(i['label'] for i in data.items).values())) == 1
    assert set(rows[0]) >= {f for v in data.task.fields.values() for f in ([v] if isinstance(v, str) else v)}


@pytest.mark.parametrize('name, lang', SAMPLES)
def test_an_oracle_gets_one_and_guessing_gets_chance(name, lang):
    data, rng = sample_task(name, lang), np.random.default_rng()
    n = len(data.items)
    if data.task.kind == 'choice':
        right = [np.where(np.arange(len(i['options'])) == i['answer'], 0., 1.) for i in data.items]
        oracle = choice_scores(right, data.items)['accuracy']
        draws = np.array([choice_credit([rng.random(len(i['options'])) for i in data.items], data.items).mean() for _ in range(500)])
        scored = [choice_scores([rng.random(len(i['options'])) for i in data.items], data.items, seed=k)['accuracy'] for k in range(40)]
        assert choice_scores([-c for c in right], data.items)['accuracy'].value == 0
    elif data.task.kind == 'tags':
        perfect = task_scores(data, [i['tags'] for i in data.items])
        assert all(s.value == 1 for s in perfect.values()) and perfect['f1'].baselines == {'majority': 0}
        blind = [task_scores(data, [list(rng.choice(data.classes, len(i['words']))) for i in data.items])['f1'].value for _ in range(10)]
        assert np.mean(blind) < .3
        return
    else:
        labels = [i['label'] for i in data.items]
        oracle = task_scores(data, labels)['accuracy']
        draws = np.array([np.mean(rng.choice(data.classes, n) == labels) for _ in range(500)])
        scored = [task_scores(data, list(rng.choice(data.classes, n)), seed=k)['accuracy'] for k in range(40)]
    chance = data.chance
    assert (oracle.value, oracle.low, oracle.high) == (1, 1, 1) and oracle.baselines['chance'] == pytest.approx(chance)
    assert abs(draws.mean() - chance) < 5 * math.sqrt(chance * (1 - chance) / n / len(draws)) # What guessing gives
    assert sum(s.low <= chance <= s.high for s in scored) >= 26 # Of 40; 12 items with a rare right answer give short intervals


# --- classes and tags from a model ---

def test_a_probe_finds_what_is_there_and_its_control_does_not():
    rng = np.random.default_rng()
    label = rng.integers(0, 4, 800)
    items, train = [dict(id=str(i), text='', label='abcd'[n]) for i, n in enumerate(label)], np.arange(800) < 400
    x = rng.normal(size=(800, 24)) + 3 * np.eye(24)[label]
    guess, control = probe_guesses(x, items, train)
    right = [i['label'] for i in items[400:]]
    scores = class_scores(right, guess, control)
    assert scores['accuracy'].value > .85 and scores['accuracy'].baselines['shuffled labels'] < .5
    x[700] = np.nan
    x[3] = np.nan
    assert probe_guesses(x, items, train)[0][300] == ''
    noise = class_scores(right, probe_guesses(rng.normal(size=(800, 24)), items, train)[0])['accuracy']
    assert abs(noise.value - .25) < 6 * math.sqrt(.25 * .75 / 400)
    mixed = shuffled_labels(items)
    assert abs(class_scores([i['label'] for i in mixed[400:]], probe_guesses(x, mixed, train)[0])['accuracy'].value - .25) < .15


# --- real data ---

def need(part):
    folder = shared_data(part)
    if folder is None: pytest.skip(f'{part} is not in the shared data')
    return folder


def sib(lang):
    folder = need('tasks/sib200').parent
    return [read_task('sib200', lang, folder, split) for split in ('train', 'validation')]


def test_sib200():
    parts = {lang: sib(lang) for lang in ('hi', 'ta', 'en')}
    for train, dev in parts.values():
        assert (len(train.items), len(dev.items)) == tuple(SETS['sib200'].sizes['hi'][:2])
        assert train.classes == dev.classes == list(SETS['sib200'].labels)
    same = [[i['label'] for part in two for i in part.items] for two in parts.values()]
    assert same[0] == same[1] == same[2] # The same sentences in three languages
    assert 'no file of its test part' in read_task('sib200', 'hi', need('tasks/sib200').parent).reason


@pytest.mark.parametrize('lang', ['hi', 'ta'])
def test_a_probe_on_letters_beats_the_majority_on_sib200(lang):
    from sklearn.feature_extraction.text import TfidfVectorizer
    train, dev = sib(lang)
    items = train.items + dev.items
    seen = np.arange(len(items)) < len(train.items)
    letters = TfidfVectorizer(analyzer='char_wb', ngram_range=(2, 4), max_features=800).fit([i['text'] for i in train.items])
    guess, control = probe_guesses(letters.transform([i['text'] for i in items]).toarray(), items, seen)
    scores = task_scores(dev, guess, control, protocol='logistic regression on letter runs')
    top = scores['accuracy']
    assert top.low > max(top.baselines.values()) and top.baselines['chance'] == 1 / 7 and top.baselines['majority'] > .2
    print(lang, top, top.baselines)


def test_a_fine_tuned_head_beats_the_majority_on_sib200():
    train, dev = sib('hi')
    tok = train_tokenizer([i['text'] for i in train.items], 'bpe', 1500)
    parts = dict(train=train.items, shuffled=shuffled_labels(train.items), dev=dev.items)
    encoded = {k: encode_labelled(some, tok, train.classes, 48) for k, some in parts.items()}
    found = {}
    for what in ('train', 'shuffled'):
        net = NetConfig(vocab_size=len(tok), width=64, layers=1, mode='masked', init=.1, max_length=48)
        with seeded(0): model = Classifier(Transformer(net), train.classes)
        rows = LabelledRows(encoded[what], train.classes, tok.pad_token_id)
        Learner(model, Feed(rows, Given(), 24), Training(steps=60, lr=6e-3, precision='fp32')).fit()
        found[what] = guesses(model, encoded['dev'], pad=tok.pad_token_id)
    top = task_scores(dev, found['train'], found['shuffled'])['accuracy']
    print(top, top.baselines)
    assert top.low > top.baselines['majority'] and top.value > top.baselines['shuffled labels']
