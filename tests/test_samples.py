"What the samples promise, checked on the files"
import json
import unicodedata
from collections import Counter

import pytest

from lab_lm.core.paths import find
from lab_lm.text.beir import read_beir
from lab_lm.text.chat import check_chat
from lab_lm.text.funnel import clean
from lab_lm.text.script import LANG_SCRIPT, script_fraction, words
from lab_lm.text.sources import read_records
from lab_lm.text.statistics import quality_table


@pytest.mark.parametrize('lang', ['hi', 'ta', 'en'])
def test_samples(lang):
    records = read_records('data/samples', lang)
    row, = quality_table(records)
    assert row['texts'] >= 150 and row['different'] == row['texts'] and row['lowest_share'] > .99 and 60 <= row['shortest'] and row['longest'] <= 1500
    assert all(r.meta['title'] and r.meta['genre'] and r.text == unicodedata.normalize('NFC', r.text) for r in records)
    assert len({r.meta['genre'] for r in records}) >= 6 and clean(records)[1].total('kept') == len(records)
    task = read_beir(find('data/samples') / lang)
    assert len(task.queries) >= 100 and set(task.qrels) == set(task.queries)
    assert {d for grades in task.qrels.values() for d in grades} <= set(task.corpus)


def chats(lang):
    "The records of one language, read by nothing but json"
    return [json.loads(line) for line in (find('data/samples') / lang / 'chats.jsonl').read_text(encoding='utf-8').splitlines()]


def said(chat, role): return [m['content'] for m in chat['messages'] if m['role'] == role]


def trigrams(text):
    "Runs of three words; the words themselves where a text is shorter"
    found = words(text)
    return {tuple(found[i:i + 3]) for i in range(max(1, len(found) - 2))}


LANGS = pytest.mark.parametrize('lang', ['hi', 'ta'])


@LANGS
def test_chats_have_their_form(lang):
    rows = chats(lang)
    assert len(rows) == 60 and [r['id'] for r in rows] == [f'{lang}-c{i:03}' for i in range(1, 61)]
    assert all(set(r) == {'id', 'lang', 'messages', 'meta'} and r['lang'] == lang and check_chat(r) for r in rows)
    assert all(set(m) == {'role', 'content'} and m['content'] == m['content'].strip() for r in rows for m in r['messages'])
    assert 8 <= sum(len(said(r, 'user')) > 1 for r in rows) <= 10 and sum(bool(said(r, 'system')) for r in rows) >= 4


@LANGS
def test_chats_cover_the_tasks_in_many_lengths(lang):
    rows = chats(lang)
    tasks = Counter(r['meta']['task'] for r in rows)
    assert set(tasks) == {'everyday', 'explain', 'rewrite', 'list', 'correct', 'translate', 'poem', 'arithmetic', 'refusal'} and min(tasks.values()) >= 5
    lengths = sorted(len(a) for r in rows for a in said(r, 'assistant'))
    assert lengths[len(lengths) // 10] < 50 and lengths[-len(lengths) // 10] > 250 and lengths[-1] < 600


@LANGS
def test_chats_are_clean_text_in_their_script(lang):
    script = LANG_SCRIPT[lang]
    for r in chats(lang):
        for m in r['messages']:
            text = m['content']
            assert text == unicodedata.normalize('NFC', text) and not any(unicodedata.category(c) in ('Cc', 'Cf', 'Co', 'Cn') and c != '\n' for c in text), r['id']
            foreign = m['role'] == 'user' and r['meta']['task'] == 'translate'
            assert foreign or script_fraction(text, script) == 1, (r['id'], text)
            assert lang == 'hi' or not set(text) & set('।॥') or foreign, r['id']


@LANGS
def test_no_chat_says_what_another_text_says(lang):
    rows, folder = chats(lang), find('data/samples') / lang
    whole = {r['id']: ' '.join(said(r, 'user') + said(r, 'assistant')) for r in rows}
    assert len({q for r in rows for q in said(r, 'user')}) == sum(len(said(r, 'user')) for r in rows)
    passages = {r.id: r.text for r in read_records('data/samples', lang)}
    questions = {f'q{i}': ' '.join((row['text'], row['metadata']['answer'])) for i, row in
                 enumerate(map(json.loads, (folder / 'queries.jsonl').read_text(encoding='utf-8').splitlines()))}
    grams = {name: trigrams(text) for name, text in {**whole, **passages, **questions}.items()}
    for a in whole:
        for b in grams:
            if a != b: assert len(grams[a] & grams[b]) <= .2 * min(len(grams[a]), len(grams[b])), (a, b)
