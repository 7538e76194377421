"Probing: features of treebanks, word vectors, planted features, controls, baselines; faults that older probes had, planted again"
import gzip
import random
from collections import Counter
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

from lab_lm.core.paths import shared_data
from lab_lm.evals.guesses import accuracy_gain, confusion_counts, gain_p, label_scores
from lab_lm.evals.probe_words import SIDES, ProbeWords, control_labels, divisions, fit_linear, gather_words, identity_features, identity_guesses, look_up
from lab_lm.evals.probing import gather, probe, probe_all
from lab_lm.nets.encoder import POOLED, word_pieces, word_states
from lab_lm.nets.native import masked_lm
from lab_lm.text.features import FEATURES, enough_words, feature_table, ud_features
from lab_lm.text.morph import read_conllu
from lab_lm.text.tokenize import train_tokenizer

WORDS = dict(hi='लड़की किताबें पढ़ती है और उसके भाई ने पुराने घर को देखा था क्योंकि नदियों में पानी बहुत कम था ।'.split(),
             ta='பணத்துக்குத்தான் அவன் வேலை செய்கிறான் என்று என் பையன்கள் வீடுகளுக்கு வந்தார்கள் .'.split())
BANKS = ('hi_pud', 'ta_mwtt', 'mr_ufal-train', 'te_mtg-train', 'bn_bru')


read = lru_cache(read_conllu)


def bank(name):
    file = shared_data(f'treebanks/{name}.conllu.gz')
    if not file: pytest.skip('no treebanks beside the project (LAB_LM_SHARED)')
    return file


# ---- text.features

@pytest.mark.parametrize('name', BANKS)
def test_features_of_treebanks_equal_a_count_of_the_columns(name):
    "Case, number, part of speech and relation against the raw lines; then without the words written as one with others"
    file, counts = bank(name), {key: Counter() for key in ('Case', 'Number', 'UPOS', 'deprel')}
    with gzip.open(file, 'rt', encoding='utf-8') as lines: rows = [cols for line in lines if len(cols := line.rstrip('\n').split('\t')) == 10 and cols[0].isdigit()]
    for cols in rows:
        counts['UPOS'][cols[3]] += 1
        counts['deprel'][cols[7].split(':')[0]] += 1
        for part in cols[5].split('|'):
            key, _, value = part.partition('=')
            if key in ('Case', 'Number') and ',' not in value: counts[key][value] += 1
    sentences = read(file)
    got, own = ud_features(sentences, fused=True), ud_features(sentences)
    for key, want in counts.items():
        if len(want) != 1: assert Counter(label for *_, label in got[key]) == want, key
    inside = sum(last - first + 1 for s in sentences for first, last, *_ in s.ranges if last > first)
    assert len(got['UPOS']) - len(own['UPOS']) == inside


@pytest.mark.parametrize('name,least', [('hi_pud', 12), ('ta_mwtt', 12), ('mr_ufal-train', 12), ('te_mtg-train', 5), ('bn_bru', 5)])
def test_what_treebanks_offer(name, least):
    "Enough features to ask, none with a rare label, a reason for every other"
    features = ud_features(read(bank(name)))
    kept, reasons = enough_words(features)
    assert len(kept) >= least and kept.keys() | reasons.keys() == features.keys() and FEATURES.keys() <= features.keys()
    for labelled in kept.values(): assert min(Counter(label for *_, label in labelled).values()) >= 20
    assert all(reasons.values()) and len(feature_table(features)) == len(features)


HOSTILE = '''# sent_id = odd
1-2	du	_	_	_	_	_	_	_	_
1	de	de	ADP	_	Case=Gen	3	case	_	_
2	le	le	DET	_	Case=Acc,Nom|Number=Sing	3	det	_	_
3	pain	pain	NOUN	_	Case=Nom|Number=Plur	0	root	_	SpaceAfter=No
3.1	est	est	AUX	_	Case=Abl	_	_	3:cop	_
4	.	.	PUNCT	_	_	3	punct	_	_

1	x	x	_	_	_	2	dep	_	_
2	y	y	NOUN	_	Case=Acc	1	dep	_	_
3	z	z	NOUN	_	_	_	_	_	_

1	!	!	PUNCT	_	_	0	root	_	_
'''.split('\n')


def test_hostile_treebank():
    "Multiword tokens, empty nodes, no features, commas, circles, missing heads, a sentence of one stop"
    sentences = read_conllu(HOSTILE)
    got = ud_features(sentences)
    assert got['Case'] == [(0, 2, 'Nom'), (1, 1, 'Acc')]
    assert ud_features(sentences, ['Case'], fused=True)['Case'] == [(0, 0, 'Gen'), (0, 2, 'Nom'), (1, 1, 'Acc')]
    assert got['UPOS'][-1] == (2, 0, 'PUNCT') and (1, 0) not in {(i, j) for i, j, _ in got['UPOS']}
    assert got['depth'] == [(0, 2, '0')]
    assert [row for row in got['direction'] if row[0] == 1] == [(1, 0, 'head after'), (1, 1, 'head before')]
    assert ud_features([]).keys() == FEATURES.keys() and not any(ud_features([]).values())
    for sentence in sentences: assert all(0 <= j < len(sentence.tokens) for labelled in got.values() for i, j, _ in labelled if sentences[i] is sentence)


def test_one_value_becomes_a_question():
    "A feature with one value is asked against the unmarked words of the same kind, and only of that kind"
    found = ud_features(read(bank('hi_pud')), ['Polite', 'Voice'])
    assert {label for *_, label in found['Polite']} == {'Form', 'unmarked'}
    assert Counter(label for *_, label in found['Polite'])['Form'] == 54
    assert {label for *_, label in found['Voice']} == {'Act', 'Pass'}


# ---- word vectors

@pytest.fixture(scope='module')
def reader():
    "A tokenizer and a small model with random weights"
    tokenizer = train_tokenizer([' '.join(random.sample(words, len(words))) for words in WORDS.values()] * 3, 'bpe', 360)
    return masked_lm('tiny', len(tokenizer), tokenizer.pad_token_id, seed=random.randrange(10**6), max_length=64).eval(), tokenizer


def test_word_vectors_are_those_of_their_own_pieces(reader):
    "An older probe took the number of the word for the number of the subword. Against the hidden states of one sentence, each pooling by hand"
    model, tokenizer = reader
    for words in WORDS.values():
        words = random.sample(words, 8)
        enc = tokenizer(' '.join(words), return_offsets_mapping=True, return_tensors='pt')
        with torch.no_grad(): hidden = torch.stack(model.base_model(enc['input_ids'], output_hidden_states=True).hidden_states)[:, 0].numpy()
        pieces = word_pieces(words, enc['offset_mapping'][0].tolist())
        assert any(len(p) > 1 for p in pieces) and sum(map(len, pieces)) <= hidden.shape[1]
        got = {name: word_states(model, tokenizer, [words], pooling=name)[0] for name in POOLED}
        for w, p in enumerate(pieces):
            by_hand = dict(mean=hidden[:, p].mean(1), first=hidden[:, p[0]], last=hidden[:, p[-1]], max=hidden[:, p].max(1))
            for name in POOLED: assert np.allclose(got[name][:, w], by_hand[name], atol=1e-5)


def test_words_beyond_the_model_are_nan_and_counted(reader):
    "A sentence longer than the model has positions for, among short ones; a word without letters; the count of what was lost"
    model, tokenizer = reader
    words = random.choices(WORDS['hi'], k=200)
    short = words[:3]
    long, other, empty = word_states(model, tokenizer, [words, short, ['', 'घर']])
    gone = np.isnan(long).any((0, 2))
    assert 0 < (~gone).sum() < 64 and (np.diff(gone.astype(int)) >= 0).all() and not np.isnan(other).any()
    assert np.isnan(empty[:, 0]).all() and not np.isnan(empty[:, 1]).any()
    data = gather_words([long, other], [words, short], {'UPOS': [(0, j, 'X') for j in range(len(words))] + [(1, 0, 'Y')]})
    assert data.lost == {'UPOS': int(gone.sum())} and len(data.forms) == (~gone).sum() + 1


def test_treebank_sentences_are_read_as_written(reader):
    "Words written as one share a vector, and the text has no space before its comma"
    model, tokenizer = reader
    sentences = [s for s in read(bank('ta_mwtt')) if s.ranges][:5]
    for s, x in zip(sentences, word_states(model, tokenizer, sentences)):
        first, last, *_ = s.ranges[0]
        assert x.shape[1] == len(s.tokens) and np.array_equal(x[:, first - 1], x[:, last - 1], equal_nan=True)
        alone, = word_states(model, tokenizer, [s])
        assert np.allclose(alone, x, atol=1e-5, equal_nan=True)


# ---- the instrument

def made_up(n=2400, planted=2, layers=5, width=24, labels=('a', 'b', 'c'), seed=None):
    "Random vectors with a label planted in one layer"
    rng = np.random.default_rng(seed)
    y = rng.choice(labels, n)
    states = rng.normal(size=(layers, n, width)).astype(np.float32)
    for i, label in enumerate(labels): states[planted, y == label, i] += 6
    return ProbeWords(states, {'planted': y.tolist()}, [f'w{i}' for i in rng.integers(0, 250, n)], (np.arange(n) // 6).tolist())


@pytest.mark.parametrize('turns', [1, 4])
def test_a_planted_feature_is_found_in_its_layer_and_nowhere_else(turns):
    planted = random.randrange(5)
    words = made_up(planted=planted)
    found = probe_all(words, twin=replace(words, states=np.random.default_rng().normal(size=words.states.shape)), turns=turns, seed=random.randrange(99))
    r = found.results['planted']
    assert r.layer == planted and r.scores['accuracy'].value > .95 and r.scores['selectivity'].low > .3
    assert all(abs(row['test'] - 1 / 3) < .15 for row in r.by_layer if row['layer'] != planted)
    assert all(abs(row['random weights'] - 1 / 3) < .15 and abs(row['control'] - 1 / 3) < .2 for row in r.by_layer)
    assert all(p['planted'] < .01 for p in found.p.values()) and r.gains['random weights'].low > .4


def test_random_labels_are_not_found():
    "Twenty features without any sense: most selectivities cover 0, few raw p-values are small, none after Holm"
    rng, words = np.random.default_rng(), made_up(layers=3)
    words = replace(words, labels={f'f{i}': rng.choice(['x', 'y'], len(words.forms)).tolist() for i in range(20)})
    found = probe_all(words)
    assert sum(r.scores['selectivity'].low <= 0 <= r.scores['selectivity'].high for r in found.results.values()) >= 13
    assert sum(r.p['majority'] < .05 for r in found.results.values()) <= 6 and sum(p < .0025 for p in found.p['majority'].values()) <= 1


def test_the_layer_is_not_chosen_on_test_words():
    "An older probe reported the best layer on test words. Other labels for the test words change neither layer nor guess"
    words = made_up(n=600, seed=random.randrange(10**6))
    words = replace(words, states=words.states * .3)
    sides, rng = divisions(words)[0], np.random.default_rng()
    other = [rng.choice(['a', 'b', 'c']) if side == 'test' else label for label, side in zip(words.labels['planted'], sides)]
    first, again = (probe_all(w).results['planted'] for w in (words, replace(words, labels={'planted': other})))
    assert first.layer == again.layer and [r['guess'] for r in first.records] == [r['guess'] for r in again.records]
    assert [r['word identity'] for r in first.records] == [r['word identity'] for r in again.records]


def test_learned_by_heart_gains_nothing():
    "Vectors and labels that belong to the type: high accuracy, no selectivity, nothing over word identity"
    rng = np.random.default_rng()
    which, vectors, names = rng.integers(0, 100, 2000), rng.normal(size=(100, 128)), rng.choice(['x', 'y'], 100)
    words = ProbeWords(vectors[which][None], {'type': names[which].tolist()}, [f'w{i}' for i in which], (np.arange(2000) // 5).tolist())
    r = probe_all(words).results['type']
    assert r.scores['accuracy'].value > .95 and abs(r.scores['selectivity'].value) < .05 and abs(r.gains['word identity'].value) < .05


def test_one_feature_equals_its_part_of_all_and_scikit_learn():
    words = made_up(n=1500, layers=2, planted=1)
    words = replace(words, states=words.states * .5)
    r = probe_all(words).results['planted']
    alone = probe(gather([words.states[:, i:i + 6] for i in range(0, 1500, 6)], [words.forms[i:i + 6] for i in range(0, 1500, 6)],
                         [(i // 6, i % 6, label) for i, label in enumerate(words.labels['planted'])], 'planted'))
    assert alone.scores == r.scores and alone.records == r.records
    sides, y = divisions(words)[0], np.array(words.labels['planted'])
    for row in r.by_layer:
        x = words.states[row['layer']]
        guess = fit_linear(x[sides == 'train'], y[sides == 'train'], .1)(x[sides == 'test'])
        assert abs((guess == y[sides == 'test']).mean() - row['test']) <= max(.005, 4.5 / (sides == 'test').sum()) # A few words lie at the border of two labels


def test_what_cannot_be_probed_is_skipped_with_its_reason():
    words = made_up(n=600)
    lonely = [None] * 600
    lonely[:3] = 'a', 'b', 'a'
    found = probe_all(replace(words, labels=words.labels | {'one label': ['a'] * 600, 'lonely': lonely, 'nothing': [None] * 600}))
    assert found.results.keys() == {'planted'} and found.skipped.keys() == {'one label', 'lonely', 'nothing'}
    assert all('a probe needs two labels' in reason for reason in found.skipped.values())
    nothing = probe_all(replace(words, labels={'nothing': [None] * 600}))
    assert not nothing.results and nothing.table() == []
    with pytest.raises(ValueError, match='other words'): probe_all(words, twin=made_up(n=594))


def test_turns_test_every_word_once():
    words = made_up(n=900)
    for by in ('sentence', 'type'):
        turned = np.stack(divisions(words, random.randrange(99), by, 5))
        assert ((turned == 'test').sum(0) == 1).all() and ((turned == 'validation').sum(0) == 1).all() and set(turned.flat) == set(SIDES)
        for sides in turned:
            keys = np.array(words.sentences if by == 'sentence' else words.forms)
            assert all(len(set(sides[keys == key])) == 1 for key in set(keys.tolist()))
    r = probe_all(words, turns=5).results['planted']
    assert r.scores['accuracy'].n == 900 and sorted((row['sentence'], row['form']) for row in r.records) == sorted(zip(words.sentences, words.forms))


def test_control_labels_belong_to_the_type_and_keep_the_frequencies():
    rng = np.random.default_rng()
    forms, labels = [f'w{i}' for i in range(6000)], rng.choice(['a', 'b', None], 6000, p=[.7, .2, .1]).tolist()
    drawn = control_labels(forms * 2, labels * 2, random.randrange(99))
    assert drawn[:6000] == drawn[6000:] and [d is None for d in drawn[:6000]] == [label is None for label in labels]
    assert abs(Counter(drawn)['a'] / Counter(labels)['a'] / 2 - 1) < .05


def test_word_identity_is_no_straw_man():
    "It is at least as good as either of its two forms on validation words, and on real words far above the majority"
    sentences = read(bank('hi_pud'))[:200]
    labelled = enough_words(ud_features(sentences, ['UPOS']))[0]['UPOS']
    forms, labels = [sentences[i].tokens[j].form for i, j, _ in labelled], np.array([label for *_, label in labelled])
    sides = np.array(SIDES)[[0 if i < 120 else 1 if i < 160 else 2 for i, *_ in labelled]]
    train, check, test = (sides == s for s in SIDES)
    letters = identity_features(forms)
    both = [(g == labels)[check].mean() for g in (look_up(forms, labels, train), fit_linear(letters[train], labels[train])(letters))]
    guess = identity_guesses(forms, labels, sides)
    assert (guess == labels)[check].mean() == max(both) and (guess == labels)[test].mean() > .7


# ---- guesses

def test_scores_and_confusion_equal_scikit_learn():
    from sklearn.metrics import confusion_matrix, f1_score
    rng = np.random.default_rng()
    for _ in range(20):
        k, n = rng.integers(2, 9), rng.integers(5, 400)
        true, guess = rng.choice(list('abcdefghi')[:k], (2, n))
        got = label_scores(true, guess, rng.integers(0, 9, n), n and 0)
        assert np.isclose(got['macro_f1'].value, f1_score(true, guess, average='macro')) and np.isclose(got['accuracy'].value, (true == guess).mean())
        names, counts = confusion_counts(true.tolist(), guess.tolist())
        assert (counts == confusion_matrix(true, guess, labels=names)).all()


def test_gains_are_tested_over_whole_units():
    "Equally good guessers whose errors come in whole sentences: false alarms near their level over sentences, far above over words"
    rng, alarms = np.random.default_rng(), []
    for _ in range(100):
        a, b, units = *np.repeat(rng.random((2, 30)) < .7, 10, axis=1), np.repeat(np.arange(30), 10)
        alarms.append((gain_p(a, b, units) < .05, gain_p(a, b, np.arange(300)) < .05))
    over_sentences, over_words = np.mean(alarms, 0)
    assert over_sentences < .16 and over_words > .25
    gain = accuracy_gain(a, b, units)
    assert gain.low <= gain.value <= gain.high and np.isclose(gain.value, a.mean() - b.mean())


# ---- other kinds of probes, and description length

def test_a_hidden_layer_finds_what_no_line_finds():
    "The sign of a product: at chance for a linear probe, found by one with a hidden layer, in its layer only"
    rng, words = np.random.default_rng(), made_up(n=2400, layers=3, width=6)
    states = words.states.copy()
    states[1] = rng.normal(size=states[1].shape)
    y = np.where(states[1, :, 0] * states[1, :, 1] > 0, 'yes', 'no')
    words = replace(words, states=states, labels={'product': y.tolist()})
    straight, bent = (probe_all(words, kind=kind).results['product'] for kind in ('linear', 'mlp'))
    assert straight.by_layer[1]['test'] < .65 and bent.layer == 1 and bent.scores['accuracy'].value > .8 and bent.by_layer[0]['test'] < .65
    assert 'L2' in straight.scores['accuracy'].protocol and 'L2' not in bent.scores['accuracy'].protocol
    with pytest.raises(ValueError, match='known: linear, mlp'): probe_all(words, kind='deep')


def test_random_labels_do_not_compress_and_a_planted_feature_does():
    words = made_up(n=900, layers=3, width=12)
    words = replace(words, labels=words.labels | {'random': np.random.default_rng().choice(['x', 'y', 'z'], 900).tolist()})
    probes = probe_all(words, code=True)
    found = probes.results
    assert max(row['compression'] for row in found['random'].by_layer) <= 1.02
    planted = found['planted']
    assert planted.code['compression'] > 2.5 and planted.code['control compression'] < 1.2 and planted.by_layer[2]['compression'] == planted.code['compression']
    assert np.isclose(planted.code['uniform'], 900 * np.log2(3)) and all(row['compression'] < 1.05 for row in planted.by_layer[:2])
    assert all('compression' in row for row in probes.table())
