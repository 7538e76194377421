"Corpus statistics, markers, samples, windows, pairs and segments against hand counts, oracles and planted faults"
import gzip
import json
import math
import random
import tracemalloc
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import regex
import torch
from scipy.optimize import minimize_scalar

from lab_lm.core.paths import shared_data
from lab_lm.text.batches import Windows, pack, read_stream, write_stream
from lab_lm.text.corpus import Record
from lab_lm.text.markers import load_markers, marker_counts, marker_table, pair_markers, word_markers
from lab_lm.text.morph import read_conllu
from lab_lm.text.pairs import document_pairs, from_marco, passages, subset, with_negatives
from lab_lm.text.sampling import sampled
from lab_lm.text.script import sentences, words
from lab_lm.text.segments import Lines, class_weights, from_stanzas, read_segments, segment_table, write_segments
from lab_lm.text.statistics import (UNICODE_BLOCKS, Counts, block_shares, corpus_table, count_corpus, heaps, moving_ttr, oov, overlap, power,
                                    quality_table, readability, richness, sentence_lengths, signs, zipf, zipf_fit)

FIVE = ['राम आया।', 'राम घर गया।', 'सीता घर आई।', 'क्या राम आया?', 'नहीं।']
ODD = 'कखगतनयरलवसहािीुूेैोौ्ंँ़\u200c\u200dகஙதநமயரலவாிீுூெேைொோௌ்ab12.,!?।॥… \n\t“”\'éह़ß'


def needs(part):
    found = shared_data(part)
    if found is None: pytest.skip(f'{part} is not beside the project')
    return found


def wiki(lang, n=1500):
    with gzip.open(needs(f'text/wiki_{lang}.txt.gz'), 'rt', encoding='utf-8') as f: return [line.strip() for _, line in zip(range(n), f) if line.strip()]


def odd_texts(n=300): return [''.join(random.choices(ODD, k=random.randrange(60))) for _ in range(n)]


def counted(texts):
    c = Counts()
    for t in texts: c.add(t)
    return c


def test_five_lines_by_hand():
    c = counted(FIVE)
    assert c.words == {'राम': 3, 'आया': 2, 'घर': 2, 'गया': 1, 'सीता': 1, 'आई': 1, 'क्या': 1, 'नहीं': 1} and c.texts == 5 and c.lengths == {1: 1, 2: 1, 3: 3}
    expected = dict(words=12, types=8, hapax=5, dis=2, ttr=8 / 12, root_ttr=8 / math.sqrt(12), corrected_ttr=8 / math.sqrt(24), log_ttr=math.log(8) / math.log(12),
                    hapax_share=5 / 8, yule_k=1e4 * (9 + 4 + 4 + 5 - 12) / 144)
    assert richness(c.words) == pytest.approx(expected)
    assert sentence_lengths(c.lengths) == dict(sentences=5, mean=2.4, p10=1, median=3, p90=3, longest=3)
    assert readability(c, long=1) == pytest.approx(dict(words_per_sentence=2.4, aksharas_per_word=23 / 12, long_words=11 / 12))
    assert signs(c.words) == pytest.approx(dict(aksharas=23, vowel_signs=1000 / 23, viramas=100 / 23, nasals=100 / 23, nuktas=0, conjuncts=100 / 23))
    assert block_shares(c.characters) == pytest.approx({'Devanagari': 40 / 41, 'Basic Latin': 1 / 41})
    assert zipf(FIVE) == (list(range(1, 9)), [3, 2, 2, 1, 1, 1, 1, 1])
    assert heaps(FIVE) == (list(range(13)), [0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 7, 7, 8])
    assert moving_ttr([w for t in FIVE for w in words(t)], 4) == pytest.approx((3 + 4 + 4 + 3 + 4 + 4 + 4 + 4 + 4) / 9 / 4)
    a, b = counted(FIVE[:3]).words, counted(FIVE[3:]).words
    assert overlap(a, b) == dict(shared=2, jaccard=.25, a_covered=3 / 8, b_covered=.5) and oov(a, b) == dict(types=.5, words=.5)
    row, = corpus_table([Record(str(i), t, 's', 'hi') for i, t in enumerate(FIVE)])
    assert (row['texts'], row['sentences'], row['words'], row['types'], row['type_token_ratio'], row['root_ttr'], row['hapax_share'], row['aksharas_per_word']) == (5, 5, 12, 8, .667, 2.3, .625, 1.92)
    row, = quality_table([Record(str(i), t, 's', 'hi') for i, t in enumerate(FIVE)])
    assert (row['shortest'], row['longest'], row['different'], row['lowest_share']) == (5, 13, 5, 1.)
    assert counted(['… !', '']).lengths == {} and sentence_lengths(Counter({1: 1, 2: 8, 30: 1})) == dict(sentences=10, mean=4.7, p10=1, median=2, p90=2, longest=30)
    marked = marker_counts(FIVE, 'hi')
    assert (marked['negation', 'not'], marked['question', 'question_word'], marked['tense_aspect', 'perfective_go'], marked['', 'words']) == (1, 1, 1, 12)
    assert {r['marker']: r['per_1000'] for r in marker_table(marked)}['not'] == pytest.approx(1000 / 12)


def test_parts_merge_to_the_whole_in_any_order():
    texts = odd_texts() + FIVE
    whole = counted(texts)
    for _ in range(10):
        parts = [counted(texts[i::4]) for i in range(4)]
        random.shuffle(parts)
        merged = Counts()
        for p in parts: merged.merge(p)
        assert merged == whole and richness(merged.words) == richness(whole.words) and signs(merged.words) == signs(whole.words)
        assert zipf_fit(merged.words.values()) == zipf_fit(whole.words.values())
    before = counted(texts[:5])
    counted(texts[5:9]).merge(before)
    assert before == counted(texts[:5])


def test_parts_counted_by_processes():
    texts = wiki('hi', 400)
    with ProcessPoolExecutor(2) as pool: one, two = pool.map(counted, [texts[::2], texts[1::2]])
    assert one.merge(two) == counted(texts)
    with ProcessPoolExecutor(2) as pool: one, two = pool.map(marker_counts, [texts[::2], texts[1::2]], ['hi', 'hi'])
    assert one + two == marker_counts(texts, 'hi')


def test_words_are_those_of_the_whole_text():
    for text in odd_texts(3000): assert counted([text]).words == Counter(words(text.lower())), repr(text)


def test_memory_is_the_vocabulary():
    texts = wiki('hi', 100)
    def peak(times):
        tracemalloc.start()
        count_corpus(Record(str(i), t, 's', 'hi') for i in range(times) for t in texts)
        heaps(t for _ in range(times) for t in texts)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size
    assert peak(8) < 1.2 * peak(2)


def test_curves_against_plain_code():
    for _ in range(50):
        running = random.choices('abcdefghij', k=random.randrange(1, 200))
        texts = [' '.join(running[i:i + 7]) for i in range(0, len(running), 7)]
        xs, ys = heaps(texts, random.randrange(1, 30))
        assert ys == [len(set(running[:x])) for x in xs] and xs[-1] == len(running)
        window = random.randrange(1, 30)
        plain = [len(set(running[i:i + window])) / window for i in range(len(running) - window + 1)]
        assert moving_ttr(running, window) == (pytest.approx(sum(plain) / len(plain)) if plain else None)


def test_zipf_against_an_optimiser():
    for _ in range(5):
        s = random.uniform(.5, 1.8)
        p = np.arange(1, 3001)**-s
        f = np.sort(np.random.multinomial(50_000, p / p.sum()))[::-1]
        f = f[f > 0]
        first, last = random.randrange(1, 10), random.randrange(200, 1000)
        got = zipf_fit(np.random.permutation(f), first, last)
        used, ranks = f[first - 1:last], np.arange(first, first + len(f[first - 1:last]))
        loss = lambda s: s * (used * np.log(ranks)).sum() + used.sum() * np.log((ranks**-s).sum())
        assert got['likelihood'] == pytest.approx(minimize_scalar(loss, bounds=(0, 5), method='bounded', options=dict(xatol=1e-9)).x, abs=1e-5)
        assert got['least_squares'] == pytest.approx(-power(ranks, used), abs=1e-9) and got['ranks'] == (first, ranks[-1])


def test_blocks_are_those_of_the_standard():
    for name, (low, high) in UNICODE_BLOCKS.items():
        inside = regex.compile(rf'\p{{Block={name}}}')
        assert all(inside.match(chr(c)) for c in range(low, high + 1)), name
        assert not any(0 <= c < 0x110000 and inside.match(chr(c)) for c in (low - 1, high + 1)), name
    assert block_shares(Counter('ᚠ')) == {'other': 1.}


def test_negation_is_never_found_inside_words():
    "The ancestor's 4.96 million negations were letters inside other words"
    inside = [t for t in words(' '.join(wiki('hi', 600))) if 'न' in t and t not in ('न', 'ना', 'नहीं')]
    assert len(inside) > 1000
    found = marker_counts([' '.join(inside)], 'hi')
    assert {name for group, name in found if group == 'negation'} <= {'without'}
    assert marker_counts([' '.join([*inside, 'न', 'नहीं'])], 'hi')['negation', 'not'] == 2
    assert sum(t.count('न') for t in inside) > len(inside)


def precision_recall(pairs):
    hits, said, true = (sum(map(bool, column)) for column in zip(*((g and p, p, g) for g, p in pairs)))
    return hits / said, hits / true


def test_hindi_markers_against_pud():
    tokens = [t for s in read_conllu(needs('treebanks/hi_pud.conllu.gz')) for t in s.tokens]
    listed = set('ने को से में पर का की के तक'.split())
    case = lambda t: word_markers(t.form, 'hi').get('case')
    reached = {'postpositions': (precision_recall([(t.upos == 'ADP', case(t)) for t in tokens if t.form in listed])[0],
                                 precision_recall([(t.upos == 'ADP' and 'Case' in t.feats, case(t)) for t in tokens])[1]),
               'ergative': precision_recall([(t.feats.get('Case') == 'Erg', case(t) == 'ergative') for t in tokens if t.upos not in ('PRON', 'DET')]),
               'negation': precision_recall([(t.feats.get('Polarity') == 'Neg', 'negation' in word_markers(t.form, 'hi')) for t in tokens]),
               'future': precision_recall([(t.feats.get('Tense') == 'Fut', word_markers(t.form, 'hi').get('tense_aspect') == 'future') for t in tokens])}
    pairs = [(b.deprel == 'aux:pass', pair_markers(a.form, b.form, 'hi')) for s in read_conllu(needs('treebanks/hi_pud.conllu.gz')) for a, b in zip(s.tokens, s.tokens[1:])]
    reached['passive'] = precision_recall(pairs)
    print({k: tuple(round(v, 3) for v in pr) for k, pr in reached.items()})
    floors = dict(postpositions=(.97, .95), ergative=(.99, .99), negation=(.94, .98), future=(.95, .93), passive=(.72, .95))
    for name, (p, r) in floors.items(): assert reached[name][0] >= p and reached[name][1] >= r, (name, reached[name])


def test_tamil_markers_against_mwtt():
    surface = []
    for s in read_conllu(needs('treebanks/ta_mwtt.conllu.gz')):
        for first, last, form, _ in s.pieces(): surface.append((form, {f'{k}={v}' for t in s.tokens[first - 1:last] for k, v in t.feats.items()}))
    case = dict(Acc='accusative', Dat='dative', Loc='locative', Gen='genitive', Com='sociative', Abl='ablative')
    reached = {name: precision_recall([(f'Case={c}' in feats, word_markers(form, 'ta').get('case') == name) for form, feats in surface]) for c, name in case.items()}
    reached['any'] = precision_recall([(any(f.startswith('Case=') and f != 'Case=Nom' for f in feats), 'case' in word_markers(form, 'ta')) for form, feats in surface])
    for tense, name in dict(Pres='present', Past='past', Fut='future').items():
        reached[name] = precision_recall([(f'Tense={tense}' in feats, word_markers(form, 'ta').get('tense_aspect') == name) for form, feats in surface])
    print({k: tuple(round(v, 3) for v in pr) for k, pr in reached.items()})
    floors = dict(any=(.95, .95), accusative=(.97, .97), dative=(.97, .93), locative=(.86, .98), genitive=(.95, .88), present=(.97, .94), past=(.94, .92), future=(.97, .35))
    for name, (p, r) in floors.items(): assert reached[name][0] >= p and reached[name][1] >= r, (name, reached[name])


def test_marker_files_hold_what_they_should():
    for lang in ('hi', 'ta'):
        for group, markers in load_markers(lang)['groups'].items():
            taken = [w for rule in markers.values() for w in rule['words']]
            assert len(taken) == len(set(taken)), (lang, group, [w for w, n in Counter(taken).items() if n > 1])
            assert all(words(w) == [w] for w in taken), (lang, group)
    assert word_markers('प\u095cता', 'hi') == word_markers('पड\u093cता', 'hi') == {'tense_aspect': 'obligation'}
    assert marker_counts(['वह कल लड़ाई में पड़ेगा'], 'hi') == marker_counts(['वह कल लड\u093cाई में पड\u093cेगा'], 'hi') == marker_counts(['वह कल ल\u095cाई में प\u095cेगा'], 'hi')


def test_intervals_cover_the_truth_and_see_documents():
    texts = wiki('hi', 1200)
    truth = sampled(texts, len(texts), ['words_per_sentence', 'characters_per_word'])
    lengths = {t: (len(words(t)), len(sentences(t))) for t in texts}
    measure = dict(words_per_sentence=lengths.get)
    hits = [r['low'] <= truth[0]['value'] <= r['high'] for seed in random.sample(range(10**6), 150) for r in sampled(texts, 100, measure, seed=seed, draws=300)]
    assert .84 < np.mean(hits) < .995
    alike = [' '.join([random.choice(('राम आया।', 'सीता और राम कल शाम को घर से चले।'))] * 40) for _ in range(200)]
    row, = sampled(alike, 60, ['words_per_sentence'])
    independent = 2 * 1.96 * 3 / math.sqrt(60 * 40) # The width of an interval that takes sentences of one document for independent
    assert row['high'] - row['low'] > 3 * independent


def test_windows_on_disk_are_those_in_memory(tmp_path):
    for trial in range(20):
        texts = [[random.randrange(70_000) for _ in range(random.randrange(40))] for _ in range(random.randrange(1, 12))] + [list(range(30))]
        mapped, bounds = read_stream(write_stream(iter(texts), tmp_path / f's{trial}', 70_000))
        memory = np.concatenate([np.array(t, int) for t in texts])
        length, stride = random.randrange(1, 12), random.randrange(0, 15)
        assert mapped.dtype == np.uint32 and (mapped == memory).all()
        inside = Windows(mapped, length, stride, bounds)
        rows = [(x.tolist(), y.tolist()) for x, y in (inside[i] for i in range(len(inside)))]
        assert rows == [(t[i:i + length], t[i + 1:i + 1 + length]) for t in texts for i in range(0, len(t), stride or length) if i + length + 1 <= len(t)]
        across = Windows(mapped, length, stride)
        assert len(across) == max(0, (len(memory) - 1 - length) // (stride or length) + 1)
    assert all(np.load(p, allow_pickle=False).ndim == 1 for p in tmp_path.rglob('*.npy'))
    loader = torch.utils.data.DataLoader(across, batch_size=2)
    assert sum(len(x) for x, _ in loader) == len(across)
    with pytest.raises(IndexError): across[len(across)]


def test_a_stream_that_fails_leaves_the_old_one(tmp_path):
    write_stream([[1, 2, 3]], tmp_path / 's', 10)
    def torn():
        yield [4, 5]
        raise OSError('the disk is gone')
    with pytest.raises(OSError): write_stream(torn(), tmp_path / 's', 10)
    assert read_stream(tmp_path / 's')[0].tolist() == [1, 2, 3] and [p.name for p in tmp_path.iterdir()] == ['s']


def test_packing_loses_and_mixes_nothing():
    for _ in range(30):
        length = random.randrange(3, 40)
        rows = [[random.randrange(5, 99) for _ in range(random.randrange(1, length + 1))] for _ in range(random.randrange(0, 60))]
        packed = pack(rows, length, 0)
        for i, row in enumerate(rows):
            here = packed['texts'] == i + 1
            assert packed['input_ids'][here].tolist() == row and packed['position_ids'][here].tolist() == list(range(len(row)))
            assert packed['labels'][here].tolist() == [-100, *row[1:]] and here.any(1).sum() == 1
        assert (packed['labels'][packed['texts'] == 0] == -100).all() and len(packed['texts']) <= max(2 * math.ceil(sum(map(len, rows)) / length), 1)


def test_marco_in_any_order_and_spelling():
    rows = []
    for i in range(200):
        texts, picked = [f'गद्यांश {random.random()}' for _ in range(5)], [random.randrange(2) for _ in range(5)]
        hub, plain = dict(passage_text=texts, is_selected=picked), [dict(passage_text=t, is_selected=s) for t, s in zip(texts, picked)]
        rows.append(dict(query_id=i, query=f'प्रश्न {i}', passages=random.choice((hub, plain)), picked=dict(zip(texts, picked))))
    report = Counter()
    made = list(from_marco(rows, 3, report=report))
    assert len(made) + report.total() == 200
    assert all(rows[int(t.id)]['picked'][t.positive] and not rows[int(t.id)]['picked'][t.negative] for t in made)
    assert all(t.positive == next(p for p, s in rows[int(t.id)]['picked'].items() if s) for t in made)
    assert sorted(from_marco(random.sample(rows, 200), 3), key=lambda t: t.id) == sorted(made, key=lambda t: t.id)
    assert Counter(list(rows[int(t.id)]['picked']).index(t.negative) for t in made).most_common()[-1][1] > 5
    twice = dict(query='क', passages=dict(passage_text=['उत्तर', 'उत्तर', 'अन्य'], is_selected=[1, 0, 0]))
    assert {next(from_marco([twice], seed)).negative for seed in range(30)} == {'अन्य'}
    assert 0 < len(subset(made, .3, 1)) < len(subset(made, .6, 1)) and set(subset(made, .3, 1)) < set(subset(made, .6, 1)) and subset(made[::-1], .3, 1) == subset(made, .3, 1)[::-1]


def test_passages_and_pairs_of_an_encyclopedia():
    for lang in ('hi', 'ta'):
        records = [Record(str(i), t, 'w', lang) for i, t in enumerate(wiki(lang, 400))]
        for r in records:
            cut = passages(r.text, 300, 1)
            assert all(len(p) <= 300 for p in cut) and ''.join(''.join(cut).split()) == ''.join(r.text.split())
            assert all(len(p) + 1 + len(sentences(q)[0]) > 300 or len(q.split()[0]) + len(p) + 1 > 300 for p, q in zip(cut, cut[1:]))
        pairs = list(document_pairs(records, keep=0))
        by_id = lambda found: sorted(found, key=lambda t: t.id)
        joined = lambda *texts: sorted(c for t in texts for c in t if not c.isspace())
        whole = {f'{r.id}-{i}': p for r in records for i, p in enumerate(passages(r.text))}
        assert len(pairs) > 100 and all(joined(t.query, t.positive) == joined(whole[t.id]) for t in pairs)
        assert by_id(document_pairs(records[::-1], keep=0)) == by_id(pairs) != by_id(document_pairs(records, seed=1, keep=0))
        assert with_negatives(pairs, 1) == with_negatives(random.sample(pairs, len(pairs)), 1)


def test_danda_ends_a_sentence_for_pairs():
    "The ancestor split at '.' and made nothing out of Hindi"
    text = 'यह पहली बात है। यह दूसरी बात है। डॉ. राव ने 3.5 किलो आम लिए॥'
    assert [t.query for t in document_pairs([Record('1', text, 's', 'hi')], 'first', shortest=5)] == ['यह पहली बात है।']
    drawn = {next(document_pairs([Record('1', text, 's', 'hi')], seed=s, keep=0, shortest=5)).query for s in range(60)}
    assert drawn == set(sentences(text)) and len(drawn) == 3


def test_segments_survive_files_and_stanzas(tmp_path):
    songs = []
    for i in range(50):
        stanzas = [dict(label=random.choice(('verse', 'Chorus ')), lines=[f'पंक्ति {random.random()}' for _ in range(random.randrange(1, 6))]) for _ in range(random.randrange(1, 7))]
        song = from_stanzas([s | dict(lines=['', *s['lines'], ' ']) for s in stanzas], str(i))
        assert song.lines == [t for s in stanzas for t in s['lines']] and song.labels == [int(s['label'] == 'Chorus ') for s in stanzas for _ in s['lines']]
        assert [song.labels[a:a + n] for _, a, n in song.segments] == [[label] * n for label, _, n in song.segments] and sum(n for *_, n in song.segments) == len(song.lines)
        songs.append(song)
    assert read_segments(write_segments(songs, tmp_path / 'a.jsonl')) == songs
    table = segment_table(songs)
    changes = sum(a != b for s in songs for a, b in zip(s.labels, s.labels[1:]))
    assert table['boundaries'] == changes and table['segments'] == changes + 50 and sum(table['shares'].values()) == pytest.approx(1)
    rows = (tmp_path / 'a.jsonl').read_text(encoding='utf-8').splitlines()
    bad = json.loads(rows[7]) | {'labels': []}
    (tmp_path / 'a.jsonl').write_text('\n'.join([*rows[:7], json.dumps(bad), *rows[8:]]), encoding='utf-8')
    with pytest.raises(ValueError, match=r'a\.jsonl, line 8: .* but 0 labels'): read_segments(tmp_path / 'a.jsonl')
    report = Counter()
    assert read_segments(tmp_path / 'a.jsonl', strict=False, report=report) == songs[:7] + songs[8:] and report.total() == 1


def test_class_weights_balance_up_to_the_cap():
    for _ in range(50):
        counts = [random.randrange(1, 200) for _ in range(random.randrange(2, 6))]
        labels = [c for c, n in enumerate(counts) for _ in range(n)]
        free, capped = class_weights(labels, len(counts), 1e9), class_weights(labels, len(counts), 2)
        assert free == pytest.approx([len(labels) / (len(counts) * n) for n in counts])
        assert max(capped) / min(capped) <= 2 + 1e-9 and np.mean([capped[c] for c in labels]) == pytest.approx(1)
        assert capped == pytest.approx(free) or max(free) / min(free) > 2
    with pytest.raises(ValueError): Lines('x', ['a'], ['0'])
