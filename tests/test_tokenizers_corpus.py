"""Tokenizers trained on Wikipedia, measured on treebanks and on UniMorph's paradigms."""
import gzip
from collections import Counter
from functools import lru_cache

import pytest
import regex
from test_tokenizers import made, nfc

from lab_lm.core.paths import shared_data
from lab_lm.text.fertility import boundary_scores, compare, paradigm_cuts, token_counts
from lab_lm.text.tokenize import CLUSTER, train_tokenizer


def bank(name):
    folder = shared_data('treebanks')
    if folder is None: pytest.skip('no treebanks beside the project')
    with gzip.open(folder / f'{name}.conllu.gz', 'rt', encoding='utf-8') as lines: return [nfc(line[9:].strip()) for line in lines if line.startswith('# text = ')]


def wiki(lang):
    folder = shared_data('text')
    if folder is None: pytest.skip('no Wikipedia paragraphs beside the project')
    with gzip.open(folder / f'wiki_{lang}.txt.gz', 'rt', encoding='utf-8') as lines: return [nfc(line.strip()) for line in lines]


@pytest.mark.parametrize('lang,name', [('hi', 'hi_pud'), ('ta', 'ta_mwtt')])
def test_akshara_bpe_is_cheap_and_whole_on_text_it_never_saw(lang, name):
    train, test = wiki(lang), bank(name)
    three = {kind: train_tokenizer(train, kind, 8000) for kind in ('gpt2', 'bpe', 'akshara_bpe')}
    words, tokens, torn = ([token_counts(tok, test).sum(0)[i] for tok in three.values()] for i in (0, 1, 8))
    assert tokens[0] / tokens[2] >= 2.2, 'against the GPT-2 pattern'
    assert tokens[2] / tokens[1] <= 1.03, 'against plain mark-safe BPE'
    text = Counter(c for t in test for c in CLUSTER.findall(t))
    clusters = {c for t in train for c in CLUSTER.findall(t)}
    cut = [c for c, n in text.items() if len(c) > 1 and c[0].isalpha() and three['akshara_bpe'].tokenize(c) != [c]]
    assert torn[2] <= sum(text[c] for c in cut) <= .0002 * text.total() and not clusters & set(cut), cut
    assert torn[1] > 100 * max(1, torn[2]) and torn[0] > torn[1]
    value, low, high = compare(three, test[:300], against='gpt2', metrics=['tokens_per_word'], n=200)['akshara_bpe']['tokens_per_word']
    assert low < value < high < .5


@lru_cache(None)
def unimorph():
    folder = shared_data('treebanks')
    if folder is None: pytest.skip('no UniMorph beside the project')
    paradigms = {}
    with gzip.open(folder / 'unimorph_hin.tsv.gz', 'rt', encoding='utf-8') as lines:
        for line in lines:
            if line.count('\t') == 2 and ' ' not in line.replace('\t', '').strip() and '-' not in line: lemma, form, _ = line.split('\t'); paradigms.setdefault(lemma, set()).add(form)
    return [forms for forms in paradigms.values() if len(forms) > 1]


def test_a_gold_list_from_real_paradigms_can_be_won_and_lost():
    everything = [(w, c) for w, c in paradigm_cuts(unimorph()) if regex.fullmatch(r'[\p{L}\p{M}]+', w)]
    gold = [(w, c) for w, c in everything if not regex.search(r'[ािीुूेैोौ][ािीुूेैोौ]', w)] # UniMorph lists some forms that no Hindi writer knows: two vowel signs in a row
    assert len(everything) * .8 < len(gold) > 500 and sum(len(c) for _, c in gold) > .5 * len(gold)
    scores = {kind: boundary_scores(made(kind), gold) for kind in ('char', 'byte', 'akshara_bpe', 'grapheme')}
    assert scores['char']['recall'][0] == scores['byte']['recall'][0] == 1 and scores['char']['precision'][0] < .6
    assert 0 < scores['akshara_bpe']['f1'][0] < 1 and len({s['f1'][0] for s in scores.values()}) >= 3
    bare = boundary_scores(made('akshara_bpe'), gold, snap=False)
    assert bare['recall'][0] < scores['akshara_bpe']['recall'][0]
