"Duplicates and leaks at the size where shortcuts would show: planted corpora, permuted input, hostile clusters, real text"
import pickle
import random
import subprocess
import sys
import time
import unicodedata
from itertools import combinations

import numpy as np
import pytest

from lab_lm.core.paths import shared_data
from lab_lm.text.duplicates import band_keys, duplicates, merge, near_duplicates, near_duplicates_lsh, rows_for, signatures
from lab_lm.text.leaks import evaluation_texts, held_out
from lab_lm.text.shingles import jaccard, piece_hashes, plain_words, shingle_hashes, shingles
from lab_lm.text.sources import read_records
from lab_lm.text.tiny import pocket_corpus

LANGS = ('hi', 'ta')


def planted(n, rng):
    "Half originals in two languages, half copies with words replaced, dropped, doubled or moved, so that similarities from 0.5 to 1 occur"
    originals = [r.text for lang in LANGS for r in pocket_corpus(lang, n // 4, seed=rng.randrange(10**6))]
    vocabulary = sorted({w for t in originals for w in t.split()})
    def copy(text):
        ws, share = text.split(), rng.random()**2 * .15
        kind = rng.choice(('replace', 'drop', 'double', 'move'))
        if kind == 'replace': return ' '.join(rng.choice(vocabulary) if rng.random() < share else w for w in ws)
        if kind == 'drop': return ' '.join(w for w in ws if rng.random() >= share)
        if kind == 'double': return ' '.join(w for w in ws for _ in range(1 + (rng.random() < share)))
        k = rng.randrange(len(ws))
        return ' '.join(ws[k:] + ws[:k])
    texts = originals + [copy(rng.choice(originals)) for _ in range(n - len(originals))]
    return rng.sample(texts, len(texts))


@pytest.fixture(scope='module')
def corpus(): return planted(5000, random.Random())


@pytest.fixture(scope='module')
def groups(corpus): return [shingle_hashes(t) for t in corpus]


@pytest.mark.parametrize('threshold', [.6, .8, .9])
def test_recall_and_precision(corpus, threshold):
    exact = {(i, j): s for i, j, s in near_duplicates(corpus, threshold)}
    fast = {(i, j): s for i, j, s in near_duplicates_lsh(corpus, threshold, seed=random.randrange(2**32))}
    right = fast.keys() & exact.keys()
    print(f'{threshold}: {len(exact)} pairs, recall {len(right) / len(exact):.4f}, precision {len(right) / len(fast):.4f}')
    assert len(exact) > 300 and len(right) >= .95 * len(exact) and len(right) >= .98 * len(fast)
    assert all(fast[pair] == exact[pair] for pair in right)


def test_exact_pairs_are_those_of_comparing_all_with_all(corpus):
    texts = random.sample(corpus, 250)
    sets = [shingles(t) for t in texts]
    for threshold in (.3, .5, .8, 1.):
        brute = [(i, j) for i, j in combinations(range(250), 2) if sets[i] and sets[j] and len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= threshold]
        assert sorted(p[:2] for p in near_duplicates(texts, threshold)) == brute


def greedy(groups, threshold):
    "Merging as it is defined: each into an earlier kept one that is similar enough"
    merged = set()
    owners = {}
    for j, group in enumerate(groups):
        near = {i for h in group.tolist() for i in owners.get(h, ())}
        if any(jaccard(groups[i], group) >= threshold for i in near): merged.add(j); continue
        for h in group.tolist(): owners.setdefault(h, []).append(j)
    return merged


def test_merging_is_the_greedy_one(groups):
    part = groups[:1200]
    found = duplicates(band_keys(signatures(part)), lambda i, j: jaccard(part[i], part[j]))
    expected = greedy(part, .8)
    assert len(found.keys() ^ expected) <= .02 * len(expected) and len(expected) > 50
    for j, (i, s) in found.items(): assert i < j and i not in found and s == jaccard(part[i], part[j]) >= .8


def test_any_order_any_shards_any_process(corpus):
    "By id: the arrival is shuffled, the keys are made in shards, the priority is the id"
    rng, texts = random.Random(), dict(enumerate(corpus[:1500]))
    expected = merge(list(texts.values()))
    for _ in range(3):
        order = rng.sample(sorted(texts), len(texts))
        groups = {i: shingle_hashes(texts[i]) for i in order}
        cuts = sorted(rng.sample(range(1, len(order)), 7))
        shards = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)])]
        keys = np.concatenate([band_keys(signatures([groups[i] for i in shard])) for shard in shards])[np.argsort(order)]
        found = duplicates(keys, lambda i, j: jaccard(groups[i], groups[j]))
        near = {j: row[:2] for j, row in expected.items() if row[2] == 'near duplicate'}
        equal = expected.keys() - near.keys()
        assert {j: row for j, row in found.items() if j not in equal} == near and equal <= found.keys()


def test_the_same_numbers_in_another_process():
    text = 'कल शाम को हम सब नदी पर गए थे। மாலையில் மழை பெய்தது.'
    code = f'from lab_lm.text.duplicates import *; from lab_lm.text.shingles import *; print(band_keys(signatures([shingle_hashes({text!r})])).tolist())'
    out = subprocess.run([sys.executable, '-c', code], env={'PYTHONHASHSEED': str(random.randrange(1000)), 'PYTHONPATH': ':'.join(sys.path)}, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(band_keys(signatures([shingle_hashes(text)])).tolist())
    assert all(pickle.loads(pickle.dumps(f)) is f for f in (shingle_hashes, signatures, band_keys, duplicates, piece_hashes))


def test_a_hundred_thousand_copies_take_seconds():
    rng = np.random.default_rng()
    base = rng.integers(0, 2**63, 60, dtype=np.uint64)
    groups = [np.sort(np.append(base, rng.integers(0, 2**63, dtype=np.uint64))) for _ in range(500)] * 200
    keys, calls = np.tile(band_keys(signatures(groups[:500])), (200, 1)), []
    def similarity(i, j): calls.append(i); return jaccard(groups[i], groups[j])
    began = time.process_time()
    found = duplicates(keys, similarity)
    assert len(found) == 99_999 and set(calls) == {0} and len(calls) == 99_999
    assert time.process_time() - began < 20


def test_a_shared_template_does_not_go_quadratic():
    "Different pages around one template, in part the same template: all are kept, and comparisons grow with the pages, not with their pairs"
    rng, counts = np.random.default_rng(), {}
    template = rng.integers(0, 2**63, 150, dtype=np.uint64)
    groups = [np.sort(np.concatenate([template, rng.integers(0, 2**63, 50, dtype=np.uint64)])) for _ in range(2000)]
    keys = band_keys(signatures(groups))
    for n in (1000, 2000):
        calls = []
        def similarity(i, j): calls.append(i); return jaccard(groups[i], groups[j])
        assert duplicates(keys[:n], similarity, most=16) == {}
        counts[n] = len(calls)
    assert counts[2000] <= 2000 * 16 and counts[2000] < 2.6 * counts[1000]
    twin = np.sort(np.append(groups[1500][1:], np.uint64(7)))
    both = np.concatenate([keys, band_keys(signatures([twin]))])
    all_groups = [*groups, twin]
    assert duplicates(both, lambda i, j: jaccard(all_groups[i], all_groups[j]), most=16)[2000][0] == 1500


def test_one_band_that_all_share_is_compared_with_its_first_only():
    keys, calls = np.arange(1, 60_001, dtype=np.uint64).reshape(20_000, 3), []
    keys[:, 1] = 5
    def similarity(i, j): calls.append(i); return 0.
    began = time.process_time()
    assert duplicates(keys, similarity, most=16) == {} and set(calls) == set(range(16)) and len(calls) < 16 * 20_000
    assert time.process_time() - began < 5


def test_texts_without_words_are_never_compared(corpus):
    texts = [t for pair in zip(corpus[:200], ['', ' ।', '—', '…'] * 50) for t in pair]
    groups, calls = [shingle_hashes(t) for t in texts], []
    keys = band_keys(signatures(groups))
    def similarity(i, j): calls.extend((i, j)); return jaccard(groups[i], groups[j])
    found = duplicates(keys, similarity)
    assert calls and all(len(groups[i]) for i in calls) and not any(k % 2 for k in found) and not keys[1::2].any()
    assert merge(texts).keys() >= set(range(9, 400, 2)) # equal ones are merged by their digest, the first four stay


def test_recall_follows_the_promise_of_the_bands():
    rng = np.random.default_rng()
    for threshold in (.5, .7, .8, .9):
        size = 450
        shared = round(2 * size * threshold / (1 + threshold))
        pairs = []
        for _ in range(400):
            draw = rng.integers(0, 2**63, 2 * size - shared, dtype=np.uint64)
            pairs += [np.sort(draw[:size]), np.sort(draw[size - shared:])]
        keys = band_keys(signatures(pairs, seed=int(rng.integers(2**32))), rows_for(threshold))
        assert (keys[::2] == keys[1::2]).any(1).mean() >= .97


def test_no_form_of_writing_hides_a_word():
    rng = random.Random()
    letters = 'कखगि्ाी़ंகஙிொோ்ക്യাਂ\u0958\u0931\u0bca\u200c\u200d\u200b\ufeff\u00ad AÀéİßΣσς\u0301\u030709.,’\'-। \n\u00a0\u2009'
    for _ in range(1500):
        text = ''.join(rng.choices(letters, k=rng.randrange(50)))
        expected = plain_words(text)
        assert expected == plain_words(unicodedata.normalize('NFD', text)) == plain_words(unicodedata.normalize('NFC', text))
        assert len(piece_hashes(text)) == len(expected) and len(set(piece_hashes(text).tolist())) == len(set(expected))
        assert plain_words(' '.join(expected)) == expected
        assert (piece_hashes(text) == piece_hashes(' '.join(expected))).all()


# ---------------------------------------------------------------- leaks

def disguise(text, rng):
    "The same words in another dress"
    ws = [w.upper() if rng.random() < .3 else w for w in plain_words(text)]
    text = ''.join(w + rng.choice((' ', ', ', '\n', ' — ', '… ', '\u00a0', '! ')) for w in ws)
    return unicodedata.normalize(rng.choice(('NFC', 'NFD')), text)


@pytest.fixture(scope='module')
def samples(): return {lang: [r.text for r in read_records('data/samples', lang)] for lang in ('hi', 'ta', 'en')}


def longest_run(a, b):
    "The most words in a row that both have, by dynamic programming"
    best, row = 0, [0] * (len(b) + 1)
    for x in a:
        new = [0] * (len(b) + 1)
        for k, y in enumerate(b):
            if x == y: new[k + 1] = row[k] + 1; best = max(best, new[k + 1])
        row = new
    return best


@pytest.mark.parametrize('lang', ['hi', 'ta', 'en'])
def test_a_planted_run_of_thirteen_is_found_and_one_of_twelve_is_not(samples, lang):
    rng = random.Random()
    held, train = samples[lang][::2], samples[lang][1::2]
    guard = held_out({'exam': [(str(i), t) for i, t in enumerate(held)]})
    long = [i for i, t in enumerate(held) if len(plain_words(t)) > 20]
    for _ in range(60):
        i, other = rng.choice(long), plain_words(rng.choice(train))
        ws = plain_words(held[i])
        at = rng.randrange(len(ws) - 13)
        for length in (12, 13):
            text = disguise(' '.join([*other[:9], 'xyzzy', *ws[at:at+length], 'xyzzy', *other[9:]]), rng)
            leak, = guard.scan([text])
            assert leak == guard.check(text)
            if length == 12: assert leak is None
            else: assert (leak.set, leak.id, leak.kind, leak.value) == ('exam', str(i), 'shared run', 13) and leak.shared == ' '.join(ws[at:at+13])


@pytest.mark.parametrize('lang', ['hi', 'ta', 'en'])
def test_short_texts_are_found_whole_or_not_at_all(samples, lang):
    rng = random.Random()
    pool = [w for t in samples[lang] for w in plain_words(t)]
    short = {str(k): ' '.join(rng.choices(pool, k=rng.randrange(1, 13))) for k in range(200)}
    guard = held_out({'questions': short.items()})
    assert guard.unchecked.get('questions', 0) == sum(len(plain_words(t)) < 5 for t in short.values())
    for id, question in short.items():
        ws, other = plain_words(question), rng.choice(samples[lang])
        leak = guard.check(disguise(f'{other} qwx {question} qwx {other}', rng))
        assert (leak and leak.id) == (id if len(ws) >= 5 else None)
        at_the_end = guard.check(f'{other} qwx {question}')
        assert (at_the_end and at_the_end.id) == (id if len(ws) >= 5 else None)
        assert guard.check(f'{other} qwx {" ".join(ws[:-1])} qwx {other}') is None


def test_every_finding_is_true_and_none_is_missed():
    "Against an oracle that compares words, on texts of few words so that everything nearly happens"
    rng, seen = random.Random(), set()
    pool = 'क ख ग घ च छ ज झ ट ठ'.split()
    for _ in range(60):
        held = [rng.choices(pool, k=rng.choice((rng.randrange(30), 6))) for _ in range(5)] + [rng.choices(pool, k=5)]
        guard = held_out({'e': [(str(i), ' '.join(t)) for i, t in enumerate(held)]}, n=6, threshold=.6)
        texts = [' '.join([*rng.choices(pool, k=3), *held[-1], *rng.choices(pool, k=9)])]
        for _ in range(20):
            piece = rng.choice(held)
            a = rng.randrange(len(piece) + 1)
            piece = [w if rng.random() > .05 else rng.choice(pool) for w in piece[a:a + rng.randrange(30)]]
            if rng.random() < .3: texts.append(' '.join(rng.choice(held)[:rng.choice((-1, -2, 7, 8))])); continue
            texts.append(' '.join([*rng.choices(pool, k=rng.randrange(4)), *piece, *rng.choices(pool, k=rng.randrange(4))]))
        for text, leak in zip(texts, guard.scan(texts)):
            assert leak == guard.check(text)
            ws, mine, kinds = text.split(), shingles(text), set()
            for t in held:
                theirs = shingles(' '.join(t))
                if longest_run(t, ws) >= 6: kinds.add('shared run')
                if len(t) == 5 and longest_run(t, ws) == 5: kinds.add('whole text')
                if len(t) >= 5 and mine and len(mine & theirs) / len(mine | theirs) >= .6: kinds.add('near duplicate')
            assert (leak is None) == (not kinds) and (leak is None or leak.kind in kinds), (text, held, leak, kinds)
            seen.add(leak and leak.kind)
    assert seen == {None, 'shared run', 'whole text', 'near duplicate'}


def test_random_text_raises_no_alarm(samples):
    rng = random.Random()
    for lang in ('hi', 'ta', 'en'):
        vocabulary = sorted({w for t in samples[lang] for w in plain_words(t)})
        def noise(): return ' '.join(rng.choices(vocabulary, k=rng.randrange(3, 60)))
        guard = held_out({'samples': enumerate(samples[lang]), 'noise': ((str(i), noise()) for i in range(500))})
        assert not any(guard.scan([noise() for _ in range(700)]))


def test_collisions_accuse_nobody():
    "A guard whose hashes are those of other words finds the hash and not the words"
    for n in (5, 12, 20):
        held, innocent = ' '.join(f'w{i}' for i in range(n)), ' '.join(f'v{i}' for i in range(n))
        guard = held_out({'e': [('1', held)]})
        forged = type(guard)(**(vars(held_out({'e': [('1', innocent)]})) | dict(texts=guard.texts)))
        assert guard.check(held) and forged.check(innocent) is None and forged.scan([f'u {innocent} u']) == [None]


def test_real_evaluation_sets_are_read_and_wikipedia_is_clean():
    folder = shared_data()
    if folder is None or not (folder / 'pairs').exists(): pytest.skip('the shared evaluation sets are absent')
    import gzip
    count = {part: len(dict(evaluation_texts(folder / part))) for part in ('retrieval/xquad_hi_dev', 'pairs', 'tasks/xcopa_ta_val.jsonl', 'tasks/sib200', 'treebanks/ta_mwtt.conllu.gz')}
    assert count == {'retrieval/xquad_hi_dev': 240 + 591, 'pairs': 2 * (10_000 + 770 + 2331), 'tasks/xcopa_ta_val.jsonl': 400, 'tasks/sib200': 2400, 'treebanks/ta_mwtt.conllu.gz': 534}
    guard = held_out({'xquad': evaluation_texts(folder / 'retrieval/xquad_hi_dev'), 'sib': evaluation_texts(folder / 'tasks/sib200/hin_Deva')})
    lines = [line for line in gzip.open(folder / 'text/wiki_hi.txt.gz', 'rt', encoding='utf-8') if len(line) > 40]
    found = [leak for i in range(0, len(lines), 256) for leak in guard.scan(lines[i:i+256]) if leak]
    assert len(found) <= 2, found
    passage = next(text for id, text in evaluation_texts(folder / 'retrieval/xquad_hi_dev') if id.startswith('corpus/'))
    assert guard.check('नमस्ते। ' + passage.replace('।', '\n')).set == 'xquad'
