"Mined negatives against a brute-force search; nothing that is right, or equal to it, is ever among them"
import random
import unicodedata
from collections import Counter

import pytest

from lab_lm.core.paths import shared_data
from lab_lm.text.bm25 import BM25
from lab_lm.text.mining import judged_pairs, mine, refused
from lab_lm.text.pairs import Triplet, check_triplets

WORDS = ['घर', 'नदी', 'कवि', 'पुस्तक', 'नगर', 'वर्ष', 'राजा', 'जल', 'क़िला', 'शहर']


def spoilt(text):
    "The same text with other white space, or in another normal form"
    return random.choice([text, f' {text}', text.replace(' ', '  '), unicodedata.normalize('NFD', text), unicodedata.normalize('NFC', text)])


def world():
    "Passages of few words, so that many are equal; pairs that share questions, passages and documents"
    texts = [' '.join(random.choices(WORDS, k=random.randrange(1, 4))) for _ in range(30)]
    passages = {f'p{i}': spoilt(random.choice(texts)) for i in range(60)}
    pairs = [Triplet(f't{i}', spoilt(random.choice(texts)), spoilt(random.choice([*passages.values(), 'कुछ और'])), '', random.choice(['', 'p3', 'book', 'other'])) for i in range(40)]
    return passages, pairs[:25], pairs[25:]


def plain(text): return unicodedata.normalize('NFC', ' '.join(text.split()))


def forbidden(t, pairs, passages):
    "As the definition says, pair by pair"
    rights = {plain(p.positive) for p in pairs if plain(p.query) == plain(t.query)} | {plain(t.query)}
    homes = {plain(p.positive) for p in pairs if t.document and p.document == t.document}
    return {d for d, text in passages.items() if plain(text) in rights | homes or t.document == d}


def test_what_may_not_serve_is_what_the_definition_says():
    for _ in range(30):
        passages, pairs, known = world()
        assert refused(pairs, passages, known) == [forbidden(t, pairs + known, passages) for t in pairs]
        assert refused([], passages) == []


def test_negatives_are_of_the_ranks_asked_for():
    for _ in range(15):
        passages, pairs, known = world()
        lo = random.randrange(1, 6)
        hi, each, report = lo + random.randrange(8), random.randrange(1, 4), Counter()
        run = BM25(passages, 'hi').search({t.id: t.query for t in pairs}, k=len(passages))
        found, at = mine(pairs, 'hi', passages, lo, hi, each, known=known, report=report), 0
        for t in pairs:
            ranks = [d for d in run[t.id] if d not in forbidden(t, pairs + known, passages)][lo - 1:hi]
            allowed = {plain(passages[d]) for d in ranks}
            rows = found[at:at + max(1, min(each, len(allowed)))]
            at += len(rows)
            assert [r.id for r in rows] == [t.id, f'{t.id}#2', f'{t.id}#3'][:len(rows)] and all((r.query, r.positive) == (t.query, t.positive) for r in rows)
            if not allowed: assert rows == [t]; continue
            assert len({plain(r.negative) for r in rows}) == len(rows) and {plain(r.negative) for r in rows} <= allowed
        assert at == len(found) and sum(report.values()) == len(pairs)


def test_the_order_of_the_pairs_does_not_matter_and_all_ranks_are_used():
    passages, pairs, known = world()
    one, two = mine(pairs, 'hi', lo=1, known=known), mine(random.sample(pairs, len(pairs)), 'hi', lo=1, known=known)
    assert {t.id: t.negative for t in one} == {t.id: t.negative for t in two}
    drawn = {mine(pairs[:1], 'hi', {f'{i:02}': f'{pairs[0].query} {w}' for i, w in enumerate('abcdefgh')}, 1, 8, seed=seed)[0].negative for seed in range(60)}
    assert len(drawn) == 8


def test_real_questions_get_negatives_that_share_their_words():
    path = shared_data('retrieval/xquad_hi_dev')
    if path is None: pytest.skip('the shared data are not here')
    from lab_lm.text.beir import read_beir
    task = read_beir(path)
    pairs = judged_pairs(task)
    assert len(pairs) == sum(g > 0 for judged in task.qrels.values() for g in judged.values())
    half, report = pairs[::2], Counter()
    found = mine(half, 'hi', task.corpus, 2, 10, known=pairs, report=report)
    assert report['found'] > .99 * len(half) and len(check_triplets(found)) == len(half)
    texts = {text: d for d, text in task.corpus.items()}
    run = BM25(task.corpus, 'hi').search({t.id: t.query for t in half}, k=20)
    for t in found:
        if not t.negative: continue
        assert texts[t.negative] != t.document and task.qrels[t.id.split('/')[0]].get(texts[t.negative], 0) <= 0
        assert texts[t.negative] in [*run[t.id]][:12]


def test_bad_wishes_are_refused():
    passages, pairs, _ = world()
    for how in (dict(lo=0), dict(lo=5, hi=4), dict(each=0)):
        with pytest.raises(ValueError, match='1 <= lo <= hi'): mine(pairs, 'hi', passages, **how)
    assert mine([], 'hi') == []
