"Records, mixtures and data cards, against oracles and planted faults"
import json
import math
import random
import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import permutations

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from lab_lm.core.paths import presets, shared_data
from lab_lm.text.balance import Survey, balanced_splits, share_out, split_table
from lab_lm.text.card import About, Tally, card, escape, export
from lab_lm.text.corpus import SPLITS, Record, split_corpus, text_key, to_jsonl, to_record
from lab_lm.text.mixing import kind_of, marker_counts, merge_corpora, mix, registers, strategy, track, unique_ids
from lab_lm.text.script import words
from lab_lm.text.sources import read_records

LETTERS = st.text(st.characters(exclude_categories=['Cs']))
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | LETTERS,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LETTERS, inner, max_size=3), max_leaves=6)
RECORDS = st.builds(Record, LETTERS, LETTERS, LETTERS, LETTERS, LETTERS, st.none() | st.floats(0, 1), st.dictionaries(LETTERS, JSON, max_size=3))


@settings(deadline=None, max_examples=150)
@given(st.lists(RECORDS, max_size=4))
def test_jsonl_round_trip_is_exact(records):
    text = to_jsonl(records)
    text.encode('utf-8')
    assert len(text.splitlines()) == len(records)
    assert [to_record(json.loads(line)) for line in text.splitlines()] == records


@pytest.mark.parametrize('row, why', [([1], 'JSON object'), ({}, "'text'"), ({'text': 5}, "'text'"), ({'text': 'x', 'meta': [1]}, "'meta'"), ({'text': 'x', 'quality': 'good'}, "'quality'"),
                                      ({'text': 'x', 'quality': float('nan')}, "'quality'"), ({'text': 'x', 'quality': True}, "'quality'"), ({'text': 'x', 'quality': 3}, "'quality'")])
def test_a_bad_row_is_named_with_its_line(tmp_path, row, why):
    with pytest.raises(ValueError, match=why): to_record(row)
    (tmp_path / 'rows.jsonl').write_text(json.dumps({'text': 'अच्छी पंक्ति', 'lang': 'hi'}, ensure_ascii=False) + '\n' + json.dumps(row) + '\n', encoding='utf-8')
    with pytest.raises(ValueError, match='line 2'): read_records(tmp_path / 'rows.jsonl')


def test_a_zero_is_an_id_and_a_quality():
    assert to_record({'id': 0, 'text': 'x', 'quality': 0}) == Record('0', 'x', '', '', quality=0)


def corpus(rng, sources, texts, longest, repeats=0):
    "Random records of every source, some texts in two of them"
    out = [Record(f'{s}-{i}', ' '.join(f'{s}{i}' for _ in range(rng.randint(1, longest))), s, 'hi', quality=rng.choice([None, rng.random()]))
           for s in sources for i in range(texts[s])]
    out += [replace(r, id=f'copy-{i}', source=rng.choice(list(sources))) for i, r in enumerate(rng.choices(out, k=repeats))]
    return rng.sample(out, len(out))


def test_unnamed_copies_follow_a_named_text():
    rng = random.Random()
    named = [Record(f'n{i}', f'text {i}', 's', 'hi', meta={'split': rng.choice(SPLITS)}) for i in range(100)]
    copies = [Record(f'c{i}', f'text {i}', 's', 'hi') for i in range(100)]
    parts = split_corpus(rng.sample(named + copies, 200), seed=rng.randrange(99))
    for name, rs in parts.items():
        assert {r.meta['split'] for r in rs if r.meta} <= {name}
        assert all({r.text for r in rs}.isdisjoint(r.text for r in parts[other]) for other in SPLITS if other != name)


def pour(budget, ratios, available, step):
    "The oracle of `share_out`: pour the budget drop by drop, each to the wanted group that lags most"
    got = dict.fromkeys(ratios, 0.)
    while budget > step / 2:
        thirsty = [g for g, r in ratios.items() if r > 0 and got[g] < available.get(g, 0) - step / 2]
        if not thirsty: break
        got[min(thirsty, key=lambda g: got[g] / ratios[g])] += step
        budget -= step
    return got


def test_share_out_against_pouring_drop_by_drop():
    rng = random.Random()
    for _ in range(60):
        groups = 'abcde'[:rng.randint(1, 5)]
        ratios = {g: rng.choice([0, 1, 2, 5]) for g in groups} | {'a': 1}
        available = {g: rng.randint(0, 300) for g in groups if rng.random() > .2}
        budget = rng.randint(0, 600)
        got = share_out(budget, ratios, available)
        assert all(abs(got[g] - v) <= 1.0001 for g, v in pour(budget, ratios, available, .25).items())
        assert math.isclose(sum(got.values()), min(budget, sum(available.get(g, 0) for g in groups if ratios[g])), abs_tol=1e-6)


def test_balanced_splits():
    for _ in range(10):
        rng = random.Random()
        sources = {s: rng.randint(200, 900) for s in 'abc'}
        records = corpus(rng, sources, sources, 20, repeats=100)
        limits = dict(train=rng.randint(1500, 4000), validation=rng.randint(100, 400), test=rng.randint(100, 400))
        ratios, seed = {s: rng.randint(1, 5) for s in sources}, rng.randrange(1000)
        parts = balanced_splits(records, limits, ratios, seed)
        assert parts == balanced_splits(lambda: iter(records[::-1]), limits, ratios, seed)
        texts = [r.text for rs in parts.values() for r in rs]
        assert len(texts) == len(set(texts))
        have = Counter()
        for r in {r.text: r for r in records}.values(): have[r.source] += len(words(r.text))
        for name, limit in limits.items():
            got = Counter()
            for r in parts[name]: got[r.source] += len(words(r.text))
            assert limit - 20 < got.total() <= limit
            if name != 'train': assert all(-20 < got[s] - limit / 3 < 60 for s in sources)
        assert parts != balanced_splits(records, limits, ratios, seed + 1)


def test_balanced_splits_keep_to_named_splits_and_better_copies():
    records = [Record(f'{s}{i}', f'{s} {i} शब्द', s, 'hi', meta={'split': rng}) for s in 'ab' for i, rng in enumerate(['test'] * 40 + ['train'] * 200)]
    parts = balanced_splits(records + [replace(r, id=f'x{r.id}', meta={}, quality=1) for r in records], dict(train=900, validation=60, test=60), dict(a=1, b=1))
    assert {name: {r.meta.get('split') for r in rs} for name, rs in parts.items()} == dict(train={'train'}, validation=set(), test={'test'})
    twice = [Record('1', 'एक दो', 'a', 'hi', quality=.2), Record('2', 'एक दो', 'b', 'hi', quality=.8)]
    assert [r.id for r in balanced_splits(twice, dict(train=9), dict(a=1, b=1))['train']] == ['2']


def test_a_source_too_small_is_divided_between_validation_and_test():
    rng = random.Random()
    records = [r for s, n in dict(big=2000, tiny=30).items() for r in corpus(rng, [s], {s: n}, 1)]
    rows = {(r['split'], r['source']): r['words'] for r in split_table(balanced_splits(records, dict(train=500, validation=200, test=100), dict(big=9, tiny=1)))}
    assert rows == {('train', 'big'): 500, ('validation', 'big'): 180, ('validation', 'tiny'): 20, ('test', 'big'): 90, ('test', 'tiny'): 10}


def test_mixed_ratios_are_within_one_percent_or_reported():
    for _ in range(8):
        rng = random.Random()
        texts = {s: rng.randint(20, 3000) for s in 'abcd'}
        records = corpus(rng, texts, texts, 15, repeats=50)
        ratios = {s: rng.randint(1, 6) for s in 'abcde'}
        budget = rng.randint(3000, 30_000)
        mixed = mix(records, ratios, budget, rng.randrange(1000))
        rows, total = {row['source']: row for row in mixed.table}, sum(row['words'] for row in mixed.table)
        open_ = [s for s, row in rows.items() if not row['exhausted']]
        assert rows['e']['exhausted'] and total <= budget and (not open_ or total > budget - 15)
        for s in open_:
            assert abs(rows[s]['words'] / sum(rows[t]['words'] for t in open_) - ratios[s] / sum(ratios[t] for t in open_)) < max(.01, 60 / sum(rows[t]['words'] for t in open_))
        kept = list(mixed)
        assert len({r.text for r in kept}) == len(kept) == len(mixed) and sum(len(words(r.text)) for r in kept) == total
        assert sum(row['read'] for row in mixed.table) == len(records)
        if not open_: assert sum(row['documents'] + row['copies'] for row in mixed.table) == len(records)
        assert {r.id for r in mix(records[::-1], ratios, budget, mixed.found.salt and int(mixed.found.salt[4:-1]))} == {r.id for r in kept}


def test_what_is_mixed_is_still_split_by_chance():
    records = [Record(str(i), f'वाक्य {i}', 's', 'hi') for i in range(8000)]
    parts = split_corpus(list(mix(records, dict(s=1), 4000)))
    assert abs(len(parts['test']) - 200) < 70 and abs(len(parts['validation']) - 200) < 70


def test_modern_share_is_reached_when_it_can_be():
    for _ in range(20):
        rng = random.Random()
        texts = {s: rng.randint(50, 600) for s in ('news', 'social', 'wiki', 'web')}
        records, plan = corpus(rng, texts, texts, 25), strategy('rebalanced')
        budget = rng.randint(500, 6000)
        table = mix(records, plan.weights, budget, group=kind_of, modern=plan.modern, target=plan.target).table
        modern, total = sum(r['words'] for r in table if r['source'] in plan.modern), sum(r['words'] for r in table)
        have = sum(len(words(r.text)) for r in records if r.source in ('news', 'social'))
        everything = sum(len(words(r.text)) for r in records)
        if have >= .6 * budget: assert modern >= .6 * total and total > min(budget, everything) - 120
        else: assert modern == have


def inclusion(weights, k):
    "The chance of each item to be among the first k, drawn one after the other by weight"
    out = [0.] * len(weights)
    for order in permutations(range(len(weights)), k):
        p, left = 1., sum(weights)
        for i in order: p *= weights[i] / left; left -= weights[i]
        for i in order: out[i] += p
    return out


def test_merging_draws_like_one_after_the_other():
    rng = random.Random()
    weights = [5, 3, 1, 1, .5]
    records = [Record(str(i), f'text {i} {rng.random()}', 's', 'hi') for i in range(5)]
    hits, n = Counter(), 4000
    for seed in range(n): hits.update(r.id for r in merge_corpora(records[:2], records[2:], lambda r: weights[int(r.id)], 2, seed))
    for i, p in enumerate(inclusion(weights, 2)):
        assert abs(hits[str(i)] / n - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_merging_never_draws_twice():
    for _ in range(20):
        rng = random.Random()
        a, b = corpus(rng, 'ab', dict(a=60, b=60), 4, repeats=30), corpus(rng, 'bc', dict(b=60, c=60), 4, repeats=30)
        target, best = rng.randint(0, 250), {}
        for r in a + b: best[r.text] = max(best.get(r.text, -1), -1 if r.quality is None else r.quality)
        merged = merge_corpora(a, b, lambda r: 1 + (r.source == 'b'), target)
        assert len(merged) == len({r.text for r in merged}) == min(target, len(best))
        assert all((-1 if r.quality is None else r.quality) == best[r.text] for r in merged)
        assert merged == merge_corpora(b[::-1], lambda: iter(a[::-1]), lambda r: 1 + (r.source == 'b'), target)
        parts = split_corpus(merged)
        assert {r.text for r in parts['train']}.isdisjoint(r.text for r in parts['test'])


def test_merging_holds_no_more_than_it_gives():
    def many(n): return (Record(str(i), f'text {i} ' * 20, 'web', 'hi') for i in range(n))
    peaks = []
    for n in (2000, 20_000):
        tracemalloc.start()
        assert len(merge_corpora(lambda: many(n), [], {}, 200)) == 200
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_ids_are_told_apart():
    records = [Record('1', 'एक', 'a', 'hi'), Record('1', 'दो', 'b', 'hi'), Record('1', 'ஒன்று', 'c', 'ta')]
    ids = [(r.lang, r.id) for r in unique_ids(records)]
    assert len(set(ids)) == 3 and ids[2] == ('ta', '1')


@pytest.mark.parametrize('lang', ['hi', 'ta'])
def test_markers_are_words_and_every_one_is_found(lang):
    content = yaml.safe_load((presets() / 'registers' / f'{lang}.yaml').read_text(encoding='utf-8'))
    for side, found in (('modern', (1, 0, 3)), ('formal', (0, 1, 3))):
        assert len(content[side]) == len(set(content[side])) and len(registers(lang)[side]) >= 30
        for marker in content[side]:
            assert marker_counts(f'क, {marker}! 7', lang) == found, marker
            assert marker_counts(f'ப{marker}ப', lang) == (0, 0, 1)


def test_markers_in_real_texts_are_not_substrings():
    folder = shared_data('text')
    if folder is None: pytest.skip('needs the shared texts')
    import gzip
    text = gzip.open(folder / 'wiki_hi.txt.gz', 'rt', encoding='utf-8').read(2_000_000)
    inside, whole = text.count('यार'), sum(w == 'यार' for w in words(text))
    assert inside > 20 * max(1, whole)
    assert marker_counts(text, 'hi')[0] < sum(text.count(m) for m in registers('hi')['modern']) / 2


def test_tracks_differ_in_limits_and_ratios_only():
    for file in (presets() / 'tracks').glob('*.yaml'):
        assert set(yaml.safe_load(file.read_text(encoding='utf-8'))) == {'words', 'ratios'} and track(file.stem)
    for name in ('balanced', 'modern', 'rebalanced'): assert strategy(name)


@given(LETTERS)
def test_escaped_text_is_one_inert_line(text):
    out = escape(text, 0)
    assert len(out.splitlines()) <= 1 and not set(out) & set('<>|`*_[]()!"~\\\u202e')


def test_a_hostile_card_is_the_card():
    tally, bad = Tally(), 'a|b <img src=x onerror=alert(1)> `c`\n# d [e](javascript:f) \u202e'
    tally.add('train', Record('1', 'एक', bad, 'hi'))
    page = card(tally, About(bad, bad, licences={bad: bad}, ledger=[{bad: bad, 'n': 1}], near_duplicates=bad, contamination=bad, limits=bad, date=bad))
    body = page.split('---\n', 2)[2]
    assert '<' not in body and '](' not in body and '\u202e' not in page
    plain = Tally(); plain.add('train', Record('1', 'एक', 'a', 'hi'))
    quiet = card(plain, About('a', 'a', licences={'a': 'a'}, ledger=[{'a': 'a', 'n': 1}], near_duplicates='a', contamination='a', limits='a', date='a')).split('---\n', 2)[2]
    shape = lambda t: [(line[:1] in '|#', line.count('|'), line.startswith('## ')) for line in t.splitlines()]
    assert shape(body) == shape(quiet)
    assert yaml.safe_load(page.split('---\n', 2)[1])['pretty_name'].startswith('a|b <img')


def test_what_was_not_checked_is_not_claimed():
    tally = Tally()
    tally.add('train', Record('1', 'एक', 's', 'hi'))
    assert card(tally).count('not checked') == 2 and 'No ledger was given.' in card(tally) and 'not stated' in card(tally)
    told = card(tally, About(near_duplicates='none above 0.8', contamination='none in PUD'))
    assert 'not checked' not in told and 'none above 0.8' in told
    tally.add('test', Record('2', 'एक', 's', 'hi'))
    assert '1 stand in two splits' in card(tally)


def test_datasets_reads_the_same_rows(tmp_path):
    import datasets
    rng, datasets_on = random.Random(), datasets.are_progress_bars_disabled()
    odd = [Record('1', 'एक\u2028दो\x85\n"', 'wiki', 'hi'), Record('2', '2024-05-01', 'wiki', 'hi', quality=rng.random(), meta={'date': '2024-05-01', 'n': 1}),
           Record('3', '', 'wiki', 'no', url='https://a.example', meta={'n': ['x', {'y': None}], 'title': 'क्\u200dष'})]
    odd += [Record(f'w{i}', f'{"शब्द " * rng.randint(1, 9)}{i}', 'web', 'hi') for i in range(30)]
    parts = dict(train=odd[2:] + odd[:1], test=[odd[1], Record('z', 'ज़', 'wiki', 'hi')])
    tally = export(parts, tmp_path / 'c', About('no', date='2026-01-01'), arrow=True)
    datasets.disable_progress_bars()
    for read in (datasets.load_dataset(str(tmp_path / 'c'), cache_dir=str(tmp_path / 'cache')), datasets.load_from_disk(str(tmp_path / 'c' / 'arrow'))):
        assert set(read) == set(parts)
        for name, records in parts.items():
            rows = [to_record({k: v for k, v in row.items() if v is not None}) for row in read[name]]
            assert [replace(r, quality=None) for r in rows] == [replace(r, quality=None) for r in records]
            assert [r.quality and round(r.quality, 9) for r in rows] == [r.quality and round(r.quality, 9) for r in records]
    if not datasets_on: datasets.enable_progress_bars()
    assert tally.files['test'][0] == (tmp_path / 'c' / 'test.jsonl').stat().st_size and not (tmp_path / 'c' / 'validation.jsonl').exists()
    assert sum(tally.words.values()) == sum(len(words(r.text)) for rs in parts.values() for r in rs)


def test_an_export_takes_streams_and_leaves_nothing_half_done(tmp_path):
    def stream():
        yield Record('1', 'एक', 's', 'hi')
        raise OSError('the source broke off')
    export(dict(train=iter([Record('0', 'शून्य', 's', 'hi')])), tmp_path / 'c')
    before = (tmp_path / 'c' / 'README.md').read_bytes()
    with pytest.raises(OSError): export(dict(train=stream()), tmp_path / 'c')
    assert (tmp_path / 'c' / 'README.md').read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['c']


def test_a_survey_keeps_one_copy_of_each_text():
    rng = random.Random()
    records = corpus(rng, 'ab', dict(a=40, b=40), 5, repeats=60)
    found = Survey(records, 'x')
    assert int(found.first.sum()) == len({r.text for r in records})
    assert len({text_key(r.text, 'x') for r, f in zip(records, found.first) if f}) == int(found.first.sum())
