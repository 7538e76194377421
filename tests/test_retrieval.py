"Retrieval tasks and measures against trec_eval, definitions by brute force, and files that are wrong"
import gzip
import itertools
import json
import math
import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_lm.core.paths import shared_data
from lab_lm.evals.compare import holm, paired_permutation
from lab_lm.evals.retrieval import METRICS, card, evaluate, per_query, protocol, ranking, read_run, retrieval_score, write_run
from lab_lm.evals.stats import bootstrap, paired_bootstrap
from lab_lm.evals.systems import compare, corrected, differing, hardest, over_sets, per_answer, query_records, with_published
from lab_lm.text.beir import Beir, ict, read_beir, read_tasks, write_beir
from lab_lm.text.corpus import Record
from lab_lm.text.corpus_file import CorpusFile, corpus_lines
from lab_lm.text.script import graphemes

SEED = random.SystemRandom().randrange(1 << 30)


def a_task(rng):
    "Graded judgements and a run full of ties; ids of several scripts; queries without judgements, results or right answers; some queries are documents"
    stem = rng.choice(['d', 'दस्तावेज़-', 'ஆ', 'D_', ''])
    names = [f'{stem}{i}' for i in range(rng.randint(2, 60))]
    queries = [rng.choice([f'q{i}', names[i % len(names)]]) for i in range(rng.randint(1, 6))]
    grades = rng.choice([(0, 1), (1,), (-1, 0, 1, 2, 3), (0,)])
    qrels = {q: {d: rng.choice(grades) for d in rng.sample(names, rng.randint(1, len(names)))} for q in queries}
    scores = rng.choice([(.5,), (.1, .5, .5 + 1e-9, 2.), tuple(rng.gauss(0, 1) for _ in range(100)), (-math.inf, -1e30, 0., 1e30)])
    run = {q: {d: rng.choice(scores) for d in rng.sample(names, rng.choice([0, 1, len(names), rng.randint(0, len(names))]))} for q in queries}
    for q in list(run):
        if rng.random() < .1: del run[q]
    return qrels, run | {'asked but not judged': {names[0]: 1.}}


def trec(qrels, run, cuts, drop):
    "Metric -> values by pytrec_eval; recip_rank has no cutoff there, so the run is cut before, in an order made here"
    pytrec_eval = pytest.importorskip('pytrec_eval', reason='needs the oracle: pip install pytrec-eval-terrier')
    if drop: run = {q: {d: s for d, s in found.items() if d != q} for q, found in run.items()}
    order = {q: sorted(found, key=lambda d: (np.float32(found[d]), d.encode()), reverse=True) for q, found in run.items()}
    ks = ','.join(map(str, cuts))
    names = {'ndcg': 'ndcg_cut', 'map': 'map_cut', 'recall': 'recall', 'precision': 'P'}
    got = pytrec_eval.RelevanceEvaluator(qrels, {f'{name}.{ks}' for name in names.values()}).evaluate(run)
    out = {f'{m}@{k}': [got.get(q, {}).get(f'{name}_{k}', 0.) for q in qrels] for m, name in names.items() for k in cuts}
    for k in cuts:
        first = pytrec_eval.RelevanceEvaluator(qrels, {'recip_rank'}).evaluate({q: {d: run[q][d] for d in ids[:k]} for q, ids in order.items()})
        out[f'mrr@{k}'] = [first.get(q, {}).get('recip_rank', 0.) for q in qrels]
    return out


def test_a_thousand_random_runs_agree_with_trec_eval():
    rng, worst = random.Random(SEED), 0.
    for _ in range(1000):
        (qrels, run), drop = a_task(rng), rng.random() < .5
        expected = trec(qrels, run, rng.sample([1, 2, 3, 5, 10, 30, 100, 1000], 2), drop)
        ours = evaluate(run, qrels, expected, drop)
        for metric, values in expected.items():
            worst = max(worst, np.abs(ours[metric] - values).max())
            assert worst < 1e-9, (SEED, metric, qrels, run)


@pytest.mark.parametrize('metric, habit', [
    ('map@5', lambda order, judged: sum(sum(judged.get(d, 0) > 0 for d in order[:i + 1]) / (i + 1) for i in range(5) if judged.get(order[i], 0) > 0)
     / min(5, sum(g > 0 for g in judged.values()))),
    ('mrr@5', lambda order, judged: next((1 / (i + 1) for i, d in enumerate(order) if judged.get(d, 0) > 0), 0)),
    ('ndcg@5', lambda order, judged: sum((2 ** judged.get(d, 0) - 1) / math.log2(i + 2) for i, d in enumerate(order[:5]))
     / sum((2 ** g - 1) / math.log2(i + 2) for i, g in enumerate(sorted(judged.values(), reverse=True)[:5])))])
def test_other_habits_give_other_numbers(metric, habit):
    "MAP over min(R, k), a reciprocal rank without a cutoff and exponential gains are other metrics: the examples would catch a mix-up"
    qrels = {'q': {f'd{i}': 1 + i % 3 for i in range(0, 20, 2)}}
    order = ['x1', 'x2', 'x3', 'x4', 'd1', 'd2', 'd4'] if metric.startswith('mrr') else ['d0', 'x', 'd4', 'd2', 'y', 'd6']
    run = {'q': {d: -float(i) for i, d in enumerate(order)}}
    expected = trec(qrels, run, [5], True)[metric][0]
    assert per_query(run, qrels, metric)[0] == pytest.approx(expected, abs=1e-12)
    assert abs(habit(order, qrels['q']) - expected) > .05


def test_ties_go_by_falling_id_and_the_other_way_is_another_number():
    qrels, run = {'q': {'b': 1}}, {'q': {'a': 1., 'b': 1. + 1e-12, 'c': 1.}}
    assert per_query(run, qrels, 'mrr@10')[0] == .5 == trec(qrels, run, [10], True)['mrr@10'][0]
    assert ranking(run['q']) == ['c', 'b', 'a']


def test_odd_input_has_a_defined_answer():
    assert per_query({}, {'q': {'d': 1}}).tolist() == [0.] and per_query({'q': {}}, {'q': {'d': 1}}).tolist() == [0.]
    assert per_query({'q': {'d': 1.}}, {}).shape == (0,)
    for metric, function in METRICS.items(): # No results, nothing judged, nothing relevant
        assert function(np.zeros(0), np.ones(2), 3) == 0 and function(np.zeros(3), np.zeros(0), 3) == 0, metric
        assert function(np.zeros((2, 0)), np.ones((2, 1)), 3).tolist() == [0, 0], metric
    for bad in ('ndcg', 'ndcg@0', 'ndcg@-1', 'ndcg@x', 'ndcg@²', 'bleu@3', '@3', None):
        with pytest.raises(ValueError, match="such as 'ndcg@10'"): per_query({}, {}, bad)
    with pytest.raises(ValueError, match='NaN'): per_query({'q': {'d': 1., 'e': float('nan')}}, {'q': {'d': 1}})
    with pytest.raises(ValueError, match='no query has a relevant passage'): retrieval_score(Beir({'d': 'x'}, {'q': 'x'}, {'q': {'d': 0}}, 'none'), {}, 'x')


def test_means_count_queries_that_found_nothing_and_leave_out_those_without_an_answer():
    task = Beir({'a': 'x', 'b': 'y'}, {'1': 'x', '2': 'y', '3': 'z'}, {'1': {'a': 1}, '2': {'b': 2}, '3': {'a': 0}}, 'three')
    score = retrieval_score(task, {'1': {'a': 1.}, '3': {'b': 1.}}, 'by hand')
    assert (score.value, score.n) == (.5, 2) and '2 queries (1 without an answer left out), 1 found nothing and count 0' in score.protocol


# identical ids

def argued():
    "Arguments that are documents, and their counter-arguments"
    corpus = {f'a{i}': f'argument {i}' for i in range(8)}
    task = Beir(corpus, {d: text for d, text in corpus.items()}, {f'a{i}': {f'a{i ^ 1}': 1} for i in range(8)}, 'argued')
    return task, {q: {q: 9., f'a{int(q[1]) ^ 1}': 5., f'a{int(q[1]) ^ 2}': 1.} for q in corpus}


def test_both_numbers_are_told_where_queries_are_documents():
    task, run = argued()
    dropped, kept = (retrieval_score(task, run, 'by hand', drop_identical=d) for d in (True, False))
    assert dropped.value == 1. and kept.value == pytest.approx(1 / math.log2(3))
    for score, word in ((dropped, 'dropped'), (kept, 'kept')):
        assert f"8 query ids are document ids (8 with the query's text), {word};" in score.protocol
        assert '1.0000 with them dropped, the standard of BEIR, 0.6309 with them kept' in score.protocol
    assert 'no query id is a document id' in retrieval_score(Beir({'d': 'x'}, {'q': 'x'}, {'q': {'d': 1}}), {'q': {'d': 1.}}, 'x').protocol


def test_ids_that_coincide_by_numbering_are_told_apart():
    task = Beir({'1': 'tea', '2': 'milk'}, {'1': 'what is green?', '2': 'what is white?'}, {'1': {'1': 1}, '2': {'2': 1}}, 'numbered')
    told = card(task, 'by hand', run={'1': {'1': 1.}, '2': {'2': 1.}})['identical ids']
    assert "(0 with the query's text)" in told and '2 of them are right answers, so ids coincide by numbering and should be kept' in told
    assert '0.0000 with them dropped, the standard of BEIR, 1.0000 with them kept' in told


def test_the_card_tells_every_rule():
    task, run = argued()
    told = card(task, 'encoder', 'recall@100', True, run, 'first 256 tokens')
    assert told['truncation'] == 'first 256 tokens' and 'truncation not told' in protocol(task, 'encoder')
    assert 'whole texts' in retrieval_score(task, run, 'BM25', truncation='whole texts').protocol and 'whole' in compare(task, {'x': run}, truncation={'x': 'whole'})[0]['protocol']
    assert set(told) == {'metric', 'set', 'text', 'passages', 'queries', 'system', 'truncation', 'ties', 'identical ids', 'depth'}
    assert told['depth'] == '3 results a query, fewer than the 100 that are measured' and told['text'] == 'text not told'
    assert protocol(task, 'BM25', run=run).startswith('ndcg@10; argued; ') and '\n' not in protocol(task, 'BM25')
    absent = Beir({'d': 'x'}, {'q': 'x'}, {'q': {'d': 1, 'gone': 1}}, partial=True)
    assert '1 passages (1 judged ones are absent, and count)' in protocol(absent, 'x')
    assert per_query({'q': {'d': 1.}}, absent.qrels, 'recall@10')[0] == .5


# statistics

def test_holm_is_the_closed_test_over_all_subsets():
    "A hypothesis is rejected where every set of hypotheses with it is rejected by Bonferroni: Holm's procedure without its shortcut"
    rng = np.random.default_rng(SEED)
    for _ in range(60):
        p = rng.choice([rng.random(rng.integers(1, 8)) ** 3, rng.choice([.01, .02, .04, 1.], rng.integers(1, 8))][rng.integers(2)], rng.integers(1, 8))
        subsets = [s for k in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), k)]
        expected = [max(min(1., len(s) * min(p[list(s)])) for s in subsets if i in s) for i in range(len(p))]
        np.testing.assert_allclose(holm(p), expected, atol=1e-12)
    assert holm({'a': .5, 'b': .01}) == {'a': .5, 'b': .02} and holm([]) == []
    for bad in ([1.5], [-.1], [float('nan')]):
        with pytest.raises(ValueError, match='between 0 and 1'): holm(bad)


def test_permutation_is_exact_for_few_items_and_near_for_many():
    from scipy.stats import permutation_test
    rng = np.random.default_rng(SEED)
    mean = lambda a, b, axis: (a - b).mean(axis)
    assert paired_permutation([1.], [0.]) == 1. # Either sign is as extreme
    for m in (2, 5, 9):
        for step in (1e-6, .25): # Without and with equal sums
            a, b = (np.round(rng.random(m) / step) * step for _ in range(2))
            if (a == b).all(): a[0] += step
            expected = permutation_test((a, b), mean, permutation_type='samples', vectorized=True, n_resamples=np.inf).pvalue
            assert paired_permutation(a, b) == pytest.approx(expected, abs=1e-12), (SEED, a, b)
    for _ in range(50): # Sums of tenths are equal or not whatever binary fractions make of them
        tenths = rng.integers(-4, 5, 7)
        sums = [abs(sum(s * int(t) for s, t in zip(signs, tenths))) for signs in itertools.product((1, -1), repeat=7)]
        assert paired_permutation(tenths * .1, np.zeros(7)) == pytest.approx(np.mean([s >= abs(int(tenths.sum())) for s in sums])), (SEED, tenths)
    a, b = rng.random(14), rng.random(14)
    exact, drawn = paired_permutation(a, b), paired_permutation(a, b, seed=SEED, exact=0)
    assert abs(exact - drawn) < 6 * math.sqrt(.25 / 10_000) + 1e-3
    assert paired_permutation(a, b) == paired_permutation(b, a) and paired_permutation(a, a) == 1. and paired_permutation(a, a + 1, exact=0) == pytest.approx(2 ** -13, abs=1e-3)
    assert paired_permutation(np.zeros(500), np.ones(500)) == 1 / 10_001
    with pytest.raises(ValueError, match='NaN'): paired_permutation([float('nan')], [1.])


def test_permutation_raises_false_alarms_as_often_as_it_says():
    "Differences that are skewed in size but not in sign: 5 in 100 at the 5 % level"
    rng = np.random.default_rng(SEED)
    alarms = np.mean([paired_permutation(rng.exponential(1, 40) * rng.choice([-1, 1], 40), np.zeros(40), seed=i, n=500) <= .05 for i in range(1500)])
    assert .02 < alarms < .085, (SEED, alarms)


# tables of systems

def made(seed=0, n=60):
    "A task and three systems: the right passage first, third or tenth, now and then elsewhere"
    rng = random.Random(seed)
    corpus = {f'd{i}': f'पाठ {i}' for i in range(80)}
    task = Beir(corpus, {f'q{i}': f'प्रश्न {i}' for i in range(n)}, {f'q{i}': {f'd{i}': 1} for i in range(n)}, 'made', 'test', 'text', 'hi')
    def run(place):
        out = {}
        for q, judged in task.qrels.items():
            docs = rng.sample([d for d in corpus if d not in judged], 20)
            docs.insert(min(20, max(0, place + rng.randint(-1, 1))), next(iter(judged)))
            out[q] = {d: -float(i) for i, d in enumerate(docs)}
        return out
    return task, {'third': run(3), 'first': run(0), 'tenth': run(10)}


def test_the_table_is_made_of_the_parts():
    task, runs = made(SEED)
    rows = {row['system']: row for row in compare(task, runs, 'third', about={'first': 'the good one'}, seed=3)}
    for system, row in rows.items():
        a, b = per_query(runs[system], task.qrels), per_query(runs['third'], task.qrels)
        score = bootstrap(a, 3)
        assert (row['ndcg@10'], row['low'], row['high'], row['n']) == (score.value, score.low, score.high, 60)
        assert row['recall@100'] == per_query(runs[system], task.qrels, 'recall@100').mean()
        if system == 'third': assert row['p'] is row['gain'] is row['p (Holm)'] is None
        else:
            gain = paired_bootstrap(a, b, 3)
            assert (row['gain'], row['gain low'], row['gain high'], row['p']) == (gain.value, gain.low, gain.high, paired_permutation(a, b, 3))
    assert [rows['first']['p (Holm)'], rows['tenth']['p (Holm)']] == holm([rows['first']['p'], rows['tenth']['p']])
    assert rows['first']['gain'] > 0 > rows['tenth']['gain'] and 'the good one' in rows['first']['protocol']
    assert [r['system'] for r in compare(task, runs)] == list(runs) and all(r['baseline'] == 'third' for r in compare(task, runs))
    json.dumps(list(rows.values()))
    with pytest.raises(ValueError, match='known: none'): compare(task, {})


def test_correction_over_several_tables_counts_every_comparison():
    task, runs = made(SEED)
    one = compare(task, runs, 'third')
    both = corrected([*one, *one])
    assert [r['p (Holm)'] for r in both if r['p'] is not None] == holm([r['p'] for r in [*one, *one] if r['p'] is not None])
    assert all(after['p (Holm)'] >= before['p (Holm)'] for before, after in zip(one, both) if before['p'] is not None)


def test_published_numbers_are_marked_and_never_tested():
    task, runs = made(SEED)
    rows = compare(task, runs, 'third')
    table = with_published(rows, {'theirs': (.5, 'a paper')})
    assert table[:3] == rows and [set(r) for r in table] == [set(rows[0])] * 4
    assert table[3]['from'] == 'published: a paper' and table[3]['p'] is table[3]['low'] is table[3]['n'] is None and table[3]['ndcg@10'] == .5
    assert corrected(table)[3]['p (Holm)'] is None and with_published([], {'theirs': (.5, 'a paper')})[0]['system'] == 'theirs'
    other = [{**row, 'set': 'other'} for row in rows]
    means = {row['system']: row for row in over_sets([*table, *other])}
    assert means['theirs']['sets'] == 1 and means['first']['sets'] == 2 and means['first']['ndcg@10'] == pytest.approx(rows[1]['ndcg@10'])


def test_the_hardest_questions_are_those_on_which_even_the_best_fails():
    corpus = {f'd{i}': 'कि' * 100 for i in range(9)}
    task = Beir(corpus, dict.fromkeys('abc', 'प्रश्न'), {'a': {'d1': 1}, 'b': {'d2': 1, 'd3': 0}, 'c': {'d4': 2}}, 'hard')
    runs = {'x': {'a': {'d1': 1.}, 'b': {'d3': 2., 'd2': 1.}, 'c': {'d5': 1.}}, 'y': {'a': {'d2': 2., 'd1': 1.}, 'b': {'d2': 1.}, 'c': {}}}
    rows = hardest(task, runs, n=3, width=7)
    assert [r['id'] for r in rows] == ['c', 'a', 'b'] or [r['id'] for r in rows] == ['c', 'b', 'a']
    assert rows[0]['rank by x'] is None and rows[0]['y put first'] == 'nothing' and rows[0]['answer'] == 'कि' * 7 + ' …'
    assert len(hardest(task, runs, n=1)) == 1 and hardest(task, {'x': {'a': {'zzz': 1.}}}, 9)[0]['x put first']
    assert per_answer(task, runs['x']) == pytest.approx({'a': 1., 'b': 1 / math.log2(3), 'c': 0.})
    assert [r['id'] for r in differing(task, runs, 'x', 'y')] == ['a', 'b']
    with pytest.raises(ValueError, match="no system 'z'"): differing(task, runs, 'x', 'z')


def test_records_hold_what_the_means_are_made_of():
    task, runs = made(SEED)
    records = query_records(task, runs, ['ndcg@10', 'recall@3'])
    for system in runs:
        assert np.mean([r[system]['ndcg@10'] for r in records]) == pytest.approx(per_query(runs[system], task.qrels).mean())
        assert np.mean([(r[system]['rank'] or 99) <= 3 for r in records]) == pytest.approx(per_query(runs[system], task.qrels, 'recall@3').mean())
        assert all(r[system]['first'] == ranking(runs[system][r['id']])[0] for r in records)
    json.dumps(records)


def test_a_run_file_gives_the_same_numbers(tmp_path):
    rng = random.Random(SEED)
    for i in range(30):
        qrels, run = a_task(rng)
        if not all(len(name.split()) == 1 for q, found in run.items() for name in (q, *found)): continue
        again = read_run(write_run(run, tmp_path / f'{i}.run', 'x'))
        assert again == {q: found for q, found in run.items() if found}
        assert all((a == b).all() for a, b in zip(evaluate(run, qrels).values(), evaluate(again, qrels).values()))
    for body, told in (('q Q0 d 1 x y', 'line 1: needs query'), ('q Q0 d 1 1.0 s\nq Q0 d 2 0.5 s', "line 2: 'q' found 'd' twice"), ('q Q0 d 1 1.0', 'line 1')):
        (tmp_path / 'bad.run').write_text(body)
        with pytest.raises(ValueError, match=f'bad.run, {told}'): read_run(tmp_path / 'bad.run')
    with pytest.raises(ValueError, match='a space'): write_run({'q': {'d 1': 1.}}, tmp_path / 'bad.run')


# files

WORDS = st.text(st.characters(exclude_categories=['Cs']), max_size=30)
IDS = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\t\r\n'), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(IDS, WORDS, min_size=1, max_size=5), st.dictionaries(IDS, WORDS, min_size=1, max_size=4), st.data())
def test_any_task_is_written_and_read_back(tmp_path_factory, corpus, queries, data):
    tidy = lambda texts: {k: v.strip() for k, v in texts.items()}
    qrels = {q: {d: data.draw(st.integers(-2, 3)) for d in data.draw(st.lists(st.sampled_from(sorted(corpus)), min_size=1, unique=True))} for q in queries}
    folder = tmp_path_factory.mktemp('beir') / 'task'
    write_beir(Beir(corpus, queries, qrels), folder, 'dev')
    for stream in (False, True):
        task = read_beir(folder, 'dev', stream=stream)
        assert (dict(task.corpus.items()), task.queries, task.qrels) == (tidy(corpus), tidy(queries), qrels)


def folder_of(path, corpus='{"_id": "d1", "title": "क", "text": "ख"}\n{"_id": "d2", "text": ""}\n', queries='{"_id": "q", "text": "ग"}\n{"_id": "r", "text": "घ"}\n',
              qrels='query-id\tcorpus-id\tscore\nq\td1\t1\n', split='test'):
    (path / 'qrels').mkdir(parents=True, exist_ok=True)
    for name, body in (('corpus.jsonl', corpus), ('queries.jsonl', queries), (f'qrels/{split}.tsv', qrels)):
        if body is not None: (path / name).write_bytes(body if isinstance(body, bytes) else body.encode())
    return path


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('parts, told', [
    (dict(corpus=None), 'corpus.jsonl is missing'),
    (dict(queries=None), 'queries.jsonl is missing'),
    (dict(split='train'), "no qrels for the split 'test'; found: train"),
    (dict(qrels=None), "no qrels for the split 'test'; found: none"),
    (dict(qrels='q\td1\t1\nq\td9\t1\n'), r"t/qrels/test.tsv, line 2: the document 'd9' is not in corpus.jsonl"),
    (dict(qrels='q\td1\t1\n\nz\td1\t1\n'), r"t/qrels/test.tsv, line 3: the query 'z' is not in queries.jsonl"),
    (dict(qrels='q\td1\t1\nq\td1\t0\n'), "line 2: 'q' and 'd1' are judged twice"),
    (dict(qrels='q\td1\t1.5\n'), 'line 1: needs query id, document id and a whole number'),
    (dict(qrels='q d1 1\n'), 'line 1: needs query id'),
    (dict(corpus='{"_id": "d1", "text": "x"}\n{"_id": "d1", "text": "y"}\n'), "t/corpus.jsonl, line 2: the id 'd1' is there twice"),
    (dict(queries='{"_id": "q", "text": "x"}\n' * 2), "t/queries.jsonl, line 2: the id 'q' is there twice"),
    (dict(corpus='{"_id": "d1"}\n'), 't/corpus.jsonl, line 1: needs a JSON object'),
    (dict(corpus='["d1"]\n'), 'line 1: needs a JSON object'),
    (dict(corpus='{"_id": "d1", "text": ["x"]}\n'), 'line 1: needs a JSON object'),
    (dict(corpus='{"_id": "d1", "text": "x"\n'), 'line 1: needs a JSON object'),
    (dict(corpus='{"_id": "d1", "text": "\\ud83d x"}\n'), 'line 1: half of a surrogate pair'),
    (dict(corpus=b'{"_id": "d1", "text": "x"}\n\xff\xfe\n'), 't/corpus.jsonl, line 2: not UTF-8'),
    (dict(corpus='[' * 100_000), 'line 1: needs a JSON object'),
])
def test_what_is_wrong_is_told_with_file_and_line(tmp_path, parts, told, stream):
    with pytest.raises(ValueError, match=told): read_beir(folder_of(tmp_path / 't', **parts), stream=stream)


def test_a_task_in_any_clothing_is_the_same(tmp_path):
    plain = read_beir(folder_of(tmp_path / 'plain'))
    assert (plain.corpus, plain.queries, plain.qrels) == ({'d1': 'क ख', 'd2': ''}, {'q': 'ग'}, {'q': {'d1': 1}})
    marked = folder_of(tmp_path / 'marked')
    for name in ('corpus.jsonl', 'queries.jsonl', 'qrels/test.tsv'): # BOM, Windows line ends, empty lines
        (marked / name).write_bytes(b'\xef\xbb\xbf' + (marked / name).read_bytes().replace(b'\n', b'\r\n\r\n'))
    packed = folder_of(tmp_path / 'packed')
    for name in ('corpus.jsonl', 'queries.jsonl', 'qrels/test.tsv'):
        (packed / f'{name}.gz').write_bytes(gzip.compress((packed / name).read_bytes())); (packed / name).unlink()
    bare = folder_of(tmp_path / 'bare', qrels='q\td1\t1\n')
    for folder, stream in itertools.product((marked, packed, bare), (False, True)):
        task = read_beir(folder, stream=stream)
        assert (dict(task.corpus.items()), task.queries, task.qrels) == (plain.corpus, plain.queries, plain.qrels), (folder, stream)
        assert all(task.corpus[d] == text for d, text in plain.corpus.items()) and 'd3' not in task.corpus
    (packed / 'corpus.jsonl.gz').write_bytes((packed / 'corpus.jsonl.gz').read_bytes()[:-12])
    with pytest.raises(ValueError, match='packed/corpus.jsonl: the packed file is damaged or cut off'): read_beir(packed)


def test_absent_documents_are_an_error_left_out_or_counted(tmp_path):
    folder = folder_of(tmp_path / 't', qrels='q\td1\t1\nq\tgone\t1\nr\tgone\t1\n')
    run = {'q': {'d1': 1.}, 'r': {'d1': 1.}}
    dropped, kept = read_beir(folder, absent='drop'), read_beir(folder, absent='keep')
    assert per_query(run, dropped.qrels, 'recall@10').tolist() == [1.] and per_query(run, kept.qrels, 'recall@10').tolist() == [.5, 0.]
    assert kept.absent == ['gone'] and dropped.absent == [] and dropped.queries == {'q': 'ग'}
    with pytest.raises(ValueError, match='known'): read_beir(folder, absent='ignore')
    with pytest.raises(ValueError, match="fields is 'body'"): read_beir(folder, fields='body')
    with pytest.raises(ValueError, match="fields is 'body'"): CorpusFile(folder, 'body')
    assert read_beir(folder, absent='drop', fields='text').corpus == {'d1': 'ख', 'd2': ''}


def test_a_corpus_in_its_file_finds_every_passage(tmp_path):
    rng = random.Random(SEED)
    texts = {f'{rng.randrange(10 ** 9)}-{i}': ''.join(rng.choices('कखग\n" ம்', k=rng.randint(0, 40))).strip() for i in range(3000)}
    folder = tmp_path / 'c'
    folder.mkdir()
    (folder / 'corpus.jsonl').write_text(''.join(json.dumps({'_id': k, 'text': v}, ensure_ascii=rng.random() < .5) + '\n' for k, v in texts.items()), encoding='utf-8')
    lazy = CorpusFile(folder)
    assert dict(lazy.items()) == texts == dict(corpus_lines(folder)) and list(lazy.values()) == list(texts.values()) and list(lazy) == list(texts) and len(lazy) == 3000
    for key in rng.sample(list(texts), 200): assert lazy[key] == texts[key] and key in lazy and f'{key}x' not in lazy
    with pytest.raises(KeyError): lazy['nobody']
    empty = folder_of(tmp_path / 'e', corpus='\n')
    assert len(CorpusFile(empty)) == 0 and 'd' not in CorpusFile(empty)


def test_a_task_is_not_written_over_another(tmp_path):
    task = Beir({'d': 'x'}, {'q': 'y'}, {'q': {'d': 1}})
    write_beir(task, tmp_path / 't')
    with pytest.raises(ValueError, match='there already'): write_beir(task, tmp_path / 't')
    with pytest.raises(ValueError, match='a tab or a line break'): write_beir(Beir({'d\tx': 'x'}, {'q': 'y'}, {'q': {'d\tx': 1}}), tmp_path / 'u')
    assert not (tmp_path / 'u').exists() and sorted(p.name for p in tmp_path.iterdir()) == ['t']


def test_inverse_cloze_does_not_depend_on_the_order():
    records = [Record(f'r{i}', ' '.join(f'वाक्य {i} {j} है।' for j in range(i % 6)), 'x', 'hi') for i in range(40)]
    one, two = ict(records, 5), ict(random.Random(SEED).sample(records, 40), 5)
    assert one.queries == {q: two.queries[q] for q in one.queries} and dict(sorted(one.corpus.items())) == dict(sorted(two.corpus.items()))
    assert ict(records, 6).queries != one.queries and all(len(r.text) > len(one.corpus[r.id]) for r in records if f'ict-{r.id}' in one.queries)
    for q, judged in one.qrels.items():
        (d,) = judged
        assert one.queries[q] not in one.corpus[d] and one.queries[q] in next(r.text for r in records if r.id == d)
    assert len(one.queries) == sum(i % 6 >= 3 for i in range(40)) and one.lang == 'hi'
    with pytest.raises(ValueError, match='there twice'): ict([records[3], records[3]])


def test_shared_sets_are_read_whole():
    if not (folder := shared_data('retrieval')): pytest.skip('the shared retrieval sets are not on this machine')
    scifact = read_beir(folder / 'scifact', 'train', stream=True)
    assert (len(scifact.corpus), len(scifact.queries), sum(map(len, scifact.qrels.values()))) == (5183, 809, 919) and scifact.absent == []
    (hindi,) = read_tasks(folder / 'xquad_hi_dev').values()
    assert (hindi.lang, len(hindi.corpus), len(hindi.queries)) == ('hi', 240, 591)
    rows = hardest(hindi, {'nothing': {}}, 5, width=9)
    assert all(not unicodedata.category(row['question'].removesuffix(' …')[-1]).startswith('Mc') or len(graphemes(row['question'].removesuffix(' …'))) <= 9 for row in rows)
