"Rankings, stems and BM25 against their oracles, by hand, and with faults planted"
import gzip
import json
import math
import random
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from lab_lm.core.paths import shared_data
from lab_lm.evals.retrieval import per_query
from lab_lm.text.beir import read_beir
from lab_lm.text.analysers import ANALYSERS, analyser, broken_words, letters_kept, terms
from lab_lm.text.bm25 import BM25, VARIANTS
from lab_lm.text.morph import read_conllu
from lab_lm.text.normalise import normalise, profile
from lab_lm.text.ranking import fuse, ranking, top
from lab_lm.text.script import VIRAMA, aksharas, words
from lab_lm.text.stems import beginning, light_stemmer, stem_data, stemmer, stop_words

RNG = random.Random()


def beside(part):
    "A part of the shared data, or a skip that says what is missing"
    path = shared_data(part)
    if path is None: pytest.skip(f'{part} is absent; set LAB_LM_SHARED to the folder that holds it')
    return path


def lines(lang, n):
    "Lines of Wikipedia"
    with gzip.open(beside(f'text/wiki_{lang}.txt.gz'), 'rt', encoding='utf-8') as f: return [line.strip() for line in islice(f, n)]


def texts(passages, vocabulary=40, longest=30, empty=False):
    "Random passages of few words, so that repetitions and ties are many"
    word = lambda: f'w{min(RNG.randrange(vocabulary), RNG.randrange(vocabulary))}'
    return {f'd{i}': ' '.join(word() for _ in range(RNG.randint(0 if empty else 1, longest))) for i in range(passages)}


# Rankings

def test_the_order_is_that_of_trec_eval():
    pytrec_eval = pytest.importorskip('pytrec_eval')
    for _ in range(200):
        ids = RNG.sample(['d1', 'd10', 'd9', 'D9', 'é', 'z', 'क', 'ा', '1', '-', 'd', '\U0001f600', '￿'], RNG.randint(1, 13))
        scores = {d: RNG.choice([0., 1., 1. + 1e-9, 1. + 1e-6, -2.5, 1e30, 1 / 3]) for d in ids}
        for place, doc in enumerate(ranking(scores), 1):
            found = pytrec_eval.RelevanceEvaluator({'q': {doc: 1}}, {'recip_rank'}).evaluate({'q': scores})['q']['recip_rank']
            assert found == pytest.approx(1 / place), (scores, doc)


def test_the_best_k_are_the_first_k_of_the_ranking():
    for _ in range(300):
        n, k = RNG.randint(1, 60), RNG.randint(1, 70)
        names = sorted((f'd{i}' for i in range(n)), reverse=True)
        scores = np.array([RNG.choice([0, 1, 2, 3, .1 + .2, .3]) for _ in names])
        above = RNG.choice([-math.inf, 0., 1.])
        want = ranking({d: s for d, s in zip(names, scores) if np.float32(s) > above})[:k]
        assert list(top(names, scores, k, above)) == want
    assert top(['a'], np.array([-math.inf]), 3) == {} and top([], np.array([]), 3) == {}
    for bad in (dict(k=0), dict(scores=np.array([1., math.nan]))):
        with pytest.raises(ValueError): top(['b', 'a'], **dict(scores=np.ones(2), k=1) | bad)


def test_fusion_by_hand_and_what_it_must_not_depend_on():
    for _ in range(100):
        some = lambda: {d: RNG.choice([1., 2., 3.5]) for d in RNG.sample('abcdefgh', RNG.randint(0, 8))}
        runs = [{q: some() for q in RNG.sample('xyz', 2)} for _ in range(3)]
        k, weights = RNG.choice([0, 60, 7.5]), [RNG.choice([1, .5, 3]) for _ in range(3)]
        got, want = fuse(runs, k, weights), {}
        for run, w in zip(runs, weights):
            for q, scores in run.items():
                want.setdefault(q, Counter())
                for place, d in enumerate(ranking(scores), 1): want[q][d] += w / (k + place)
        assert got.keys() == want.keys()
        for q in want:
            assert list(got[q]) == ranking(got[q]) and got[q] == pytest.approx(dict(want[q]), rel=1e-6)
        assert fuse([runs[2], runs[0], runs[1]], k, [weights[2], weights[0], weights[1]]) == got
        assert fuse([{q: {d: math.exp(s) for d, s in scores.items()} for q, scores in run.items()} for run in runs], k, weights) == got
    assert list(fuse([{'q': {f'd{i}': -i for i in range(50)}}], depth=3)['q']) == ['d0', 'd1', 'd2']
    for bad in (dict(weights=[1, 1]), dict(weights=[-1]), dict(weights=[math.nan]), dict(k=-1), dict(depth=0)):
        with pytest.raises(ValueError, match='systems; give one|starts at'): fuse([{'q': {'a': 1.}}], **bad)


# Stems

@pytest.mark.parametrize('lang', ['hi', 'ta'])
def test_a_stem_is_whole_letters_and_long_enough(lang):
    stem, least = stemmer(lang), stem_data(lang)['least']
    changes = tuple(stem_data(lang).get('endings', {}).values())
    known = {w for t in lines(lang, 400) for w in terms(t, lang)}
    assert len(known) > 3000
    for w in known:
        s = stem(w)
        assert s and (w.startswith(s) or changes and s.endswith(changes) and w.startswith(s[:-1])), (w, s)
        if s == w: continue
        assert len(aksharas(s)) >= least and s[-1] not in VIRAMA and not s[-1].isspace(), (w, s)
    assert sum(stem(w) != w for w in known) > .3 * len(known)


def test_stems_survive_random_marks():
    for lang in ('hi', 'ta', 'en', 'xx'):
        stem = stemmer(lang)
        for _ in range(2000):
            w = ''.join(RNG.choice('कतनरयलडाेोीिुंँ़्ओईएகதரளவைாிுேோ்மabs1\u200d') for _ in range(RNG.randint(1, 9)))
            assert isinstance(stem(w), str) and (stem(w) or lang == 'en')
            assert ''.join(aksharas(w)).startswith(beginning(w, RNG.randint(1, 6)))


def same_stem(forms, stem):
    "Over pairs of forms: how many of one lemma meet in one stem, and how many that meet are of one lemma"
    pairs = lambda keys: sum(n * (n - 1) / 2 for n in Counter(keys).values())
    both = pairs((lemma, stem(form)) for form, lemma in forms.items())
    return both / pairs(forms.values()), both / max(pairs(map(stem, forms)), 1)


def test_hindi_verb_forms_meet_in_their_stem():
    fold = lambda w: normalise(w, 'hi', also=tuple(profile('hi')['matching']))
    with gzip.open(beside('treebanks/unimorph_hin.tsv.gz'), 'rt', encoding='utf-8') as f:
        rows = [line.split('\t')[:2] for line in f if line.strip()]
    forms = {fold(form): fold(lemma) for lemma, form in sorted(rows) if ' ' not in lemma + form}
    recall, precision = same_stem(forms, stemmer('hi'))
    assert recall > .85 and precision > .85 and same_stem(forms, lambda w: beginning(w, 4))[0] < .3


def test_tamil_nouns_and_verbs_meet_more_often_than_whole_words():
    forms = {t.form: t.lemma for s in read_conllu(beside('treebanks/ta_mwtt.conllu.gz')) for t in s.tokens if t.upos in ('NOUN', 'PROPN', 'VERB')}
    recall, precision = same_stem(forms, stemmer('ta'))
    assert recall > .4 and precision > .8 and same_stem(forms, str)[0] == 0


def test_a_cut_that_would_strand_a_virama_is_refused():
    careless = {'least': 1, 'layers': [{'suffixes': 'या य ता'}]}
    stem = light_stemmer(careless)
    assert [stem(w) for w in ('क्या', 'सत्य', 'गया', 'माता')] == ['क्या', 'सत्य', 'ग', 'मा']


def test_english_is_snowball_with_or_without_its_fast_form():
    from snowballstemmer.english_stemmer import EnglishStemmer
    assert {stemmer('en')(w) for w in ('connect', 'connected', 'connecting', 'connections')} == {'connect'}
    known = sorted({w for t in lines('en', 300) for w in terms(t)})[:3000]
    assert list(map(stemmer('en'), known)) == EnglishStemmer().stemWords(known)
    bm25s_words = pytest.importorskip('bm25s.stopwords').STOPWORDS_EN
    assert stop_words('en') == set(bm25s_words) and not stop_words('hi') and not stop_words('xx')


# Analysers

def test_the_mteb_analyser_is_that_of_bm25s():
    bm25s, Stemmer = pytest.importorskip('bm25s'), pytest.importorskip('Stemmer')
    some = lines('en', 300) + lines('hi', 100) + ['', '...', 'A b c', "don't"]
    want = bm25s.tokenize(some, stopwords='en', stemmer=Stemmer.Stemmer('english'), return_ids=False, show_progress=False)
    assert [analyser('mteb', 'hi')(t) for t in some] == [[w for w in row if w] for row in want]


@pytest.mark.parametrize('lang', ['hi', 'ta', 'bn', 'te', 'kn', 'mr', 'en'])
def test_terms_keep_marks_with_their_letters(lang):
    some = lines(lang, 60)
    assert letters_kept(some, words) == 1.
    for t in some:
        for name in ('marksafe', 'whole words'):
            for term in analyser(name, lang)(t): assert term and not unicodedata.category(term[0]).startswith('M') and ' ' not in term, (t, term)
    if lang != 'en': assert letters_kept(some, broken_words) < .75


def test_spellings_of_one_word_are_one_term():
    for name in ('marksafe', 'whole words'):
        same = [('हिन्दी', 'हिंदी'), ('सज़ा', 'सजा'), ('१९४७', '1947'), ('चाँद', 'चांद'), ('क\u093cलम', 'क़लम'), ('वि\u200bज्ञान', 'विज्ञान')]
        for a, b in same:
            assert analyser(name, 'hi')(a) == analyser(name, 'hi')(b), (name, a, b)
        assert analyser(name, 'ta')('௧௯௪௭') == analyser(name, 'ta')('1947')
        assert analyser(name)('Don’t') == analyser(name)("don't") and 'org' in analyser(name)('see https://example.org/a')


# BM25

@pytest.mark.parametrize('variant', VARIANTS)
def test_scores_equal_bm25s_on_the_same_tokens(variant):
    bm25s = pytest.importorskip('bm25s')
    for _ in range(8):
        corpus, queries = texts(RNG.randint(5, 120)), texts(20)
        k1, b, delta = RNG.uniform(.3, 3), RNG.random(), RNG.random()
        oracle = bm25s.BM25(k1=k1, b=b, delta=delta, method=variant)
        oracle.index([t.split() for t in corpus.values()], show_progress=False)
        run = BM25(corpus, analyser=str.split, k1=k1, b=b, delta=delta, variant=variant).search(queries, len(corpus))
        for q, text in queries.items():
            asked = [w for w in text.split() if w in oracle.vocab_dict]
            if not asked: continue
            want = dict(zip(corpus, oracle.get_scores(asked)))
            assert run[q] == pytest.approx({d: want[d] for d in run[q]}, abs=1e-4, rel=1e-5)
            least = max((want[d] for d in corpus if d not in run[q]), default=-math.inf) # Those left out have none of the words, or words of no weight
            assert not run[q] or min(run[q].values()) > least - 1e-4


def by_hand(corpus, query, variant, k1, b, delta):
    "BM25 as Kamphuis et al. write it, with nothing shared"
    N, size = len(corpus), {d: len(t.split()) for d, t in corpus.items()}
    mean, out = sum(size.values()) / N, {}
    for d, t in corpus.items():
        out[d] = 0
        for w in query.split():
            df, f = sum(w in x.split() for x in corpus.values()), t.split().count(w)
            if not df: continue
            norm = 1 - b + b * size[d] / mean
            scaled = f / norm if f else 0
            out[d] += {'lucene': lambda: math.log(1 + (N - df + .5) / (df + .5)) * f / (f + k1 * norm),
                       'robertson': lambda: max(0, math.log((N - df + .5) / (df + .5))) * f / (f + k1 * norm),
                       'atire': lambda: math.log(N / df) * (k1 + 1) * f / (f + k1 * norm),
                       'bm25l': lambda: math.log((N + 1) / (df + .5)) * (k1 + 1) * (scaled + delta) / (k1 + scaled + delta),
                       'bm25+': lambda: math.log((N + 1) / df) * (delta + (k1 + 1) * f / (f + k1 * norm))}[variant]()
    return out


@pytest.mark.parametrize('variant', VARIANTS)
def test_scores_by_hand_with_empty_passages_and_words_nobody_wrote(variant):
    corpus = texts(25, 12, 6, empty=True) | {'none': ''}
    index = BM25(corpus, analyser=str.split, variant=variant, k1=1.2, b=.6, delta=.7)
    for query in [*texts(20, 14, 6, empty=True).values(), 'w1 w1 w1 never']:
        found, want = index.search({'q': query}, 30)['q'], by_hand(corpus, query, variant, 1.2, .6, .7)
        assert found == pytest.approx({d: want[d] for d in found}, abs=1e-5)
        shares = {d for d in corpus if set(corpus[d].split()) & set(query.split())}
        assert found.keys() <= shares and (variant in ('robertson', 'atire') or found.keys() == shares)


def test_ties_at_the_cut_go_by_falling_id():
    corpus = {d: RNG.choice(['a b', 'a b', 'a c', 'b']) for d in map(str, RNG.sample(range(1000), 200))}
    index = BM25(RNG.sample(list(corpus.items()), 200), analyser=str.split)
    for query in ('a', 'b a', 'c a'):
        every = index.search({'q': query}, 200)['q']
        for k in (1, 2, 17, 100): assert list(index.search({'q': query}, k)['q']) == ranking(every)[:k]


def test_passages_added_in_any_order_and_parts_make_the_same_index():
    corpus = texts(300, empty=True)
    whole, parts, rows = BM25(corpus, analyser=str.split), BM25(analyser=str.split), RNG.sample(list(corpus.items()), 300)
    for start in range(0, 300, 70): parts.add(iter(rows[start:start + 70]))
    queries = texts(50)
    assert parts.search(queries, 300).keys() == whole.search(queries, 300).keys()
    for q, found in parts.search(queries, 300).items(): assert found == pytest.approx(whole.search(queries, 300)[q], rel=1e-6)
    before = parts.search(queries)
    for bad in ([('new', 'w1'), ('d7', 'w2')], [('new', 'w1'), ('other', 3)], [('x', 'w1'), ('x', 'w1')], [(5, 'w1')]):
        with pytest.raises(ValueError, match='there twice|must be strings'): parts.add(bad)
    assert parts.search(queries) == before and len(parts) == 300


def test_blocks_do_not_show(monkeypatch):
    from lab_lm.text import bm25
    corpus, queries, count = texts(200, empty=True), texts(20), bm25._count
    whole = BM25(corpus, analyser=str.split).search(queries)
    monkeypatch.setattr(bm25, '_count', lambda *args: count(*args, block=RNG.randint(1, 50)))
    assert BM25(corpus, analyser=str.split).search(queries) == whole


def test_a_streamed_corpus_is_not_held_in_memory():
    stream = ((f'd{i}', f'w{i % 50} w{i % 7} ' + 'x' * 20_000) for i in range(4000))
    tracemalloc.start()
    index = BM25(stream, analyser=lambda text: text[:9].split())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(index) == 4000 and peak < 16e6 < 4000 * 20_000 / 4


def test_odd_questions():
    index = BM25(dict(enumerate_ids(lines('hi', 300))), 'hi')
    long = ' '.join(lines('hi', 400))[:100_000]
    began = time.process_time()
    found = index.search({'long': long, 'empty': '', 'marks': '।।॥ ...', 'virama': '्', 'zero': '\u200b', 'surrogate': '\ud800 भारत'}, 10)
    assert time.process_time() - began < 10 and len(found['long']) == 10
    assert found['empty'] == found['marks'] == found['zero'] == {} and found['surrogate']
    for bad in (None, 3, b'x'):
        with pytest.raises(ValueError, match='a question is'): index.search({'q': bad})
    for bad in (dict(variant='okapi'), dict(analyser='lucene'), dict(b=1.1), dict(k1=math.nan), dict(delta=-1)):
        with pytest.raises(ValueError, match='known|k1='): BM25({}, **bad)
    for k1, b in ((0, 0), (0, 1), (3, 0)): assert all(map(math.isfinite, BM25({'a': 'cat', 'b': ''}, k1=k1, b=b).search({'q': 'cat'})['q'].values()))


def enumerate_ids(rows):
    "(d0, first), (d1, second), ..."
    return ((f'd{i}', t) for i, t in enumerate(rows))


# On disk

@pytest.mark.parametrize('name', ANALYSERS)
def test_an_index_comes_back_as_it_was(tmp_path, name):
    corpus, settings = dict(enumerate_ids(lines('ta', 80))), dict(lang='ta', analyser=name, k1=.9, b=.4, variant='bm25+', delta=1.)
    index = BM25(corpus, **settings)
    again = BM25.load(index.save(tmp_path / 'index'))
    queries = {d: t[:200] for d, t in islice(corpus.items(), 20)} | {'none': ''}
    assert again.search(queries) == index.search(queries) and again.settings == settings and again.ids == index.ids
    again.add({'x': 'மழை'}).save(tmp_path / 'index')
    assert BM25.load(tmp_path / 'index').search({'q': 'மழை'}) == BM25(corpus | {'x': 'மழை'}, **settings).search({'q': 'மழை'})
    assert sorted(p.name for p in tmp_path.iterdir()) == ['index']
    with np.load(tmp_path / 'index/index.npz', allow_pickle=False) as arrays: assert all(a.dtype.kind == 'i' for a in arrays.values())


def test_every_damage_to_an_index_is_told(tmp_path):
    index = BM25({'a': 'cat', 'b': 'dog'})
    for file in ('index.npz', 'ids.json', 'terms.json'):
        for fault in ('flip', 'cut', 'gone'):
            path = index.save(tmp_path / 'i') / file
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            if fault == 'gone': path.unlink()
            else: path.write_bytes(content if fault == 'flip' else path.read_bytes()[:-3])
            with pytest.raises(ValueError, match=f'{file} is missing or damaged'): BM25.load(tmp_path / 'i')
    about = index.save(tmp_path / 'i') / 'bm25.json'
    good = json.loads(about.read_text())
    for change, said in ((dict(version=2), 'of version 2'), (dict(probe='0'), 'other terms'), ('{', 'holds no index')):
        about.write_text(change if isinstance(change, str) else json.dumps(good | change))
        with pytest.raises(ValueError, match=said): BM25.load(tmp_path / 'i')
    BM25({'a': 'x'}, analyser=str.split).save(tmp_path / 'own')
    with pytest.raises(ValueError, match='function of its own'): BM25.load(tmp_path / 'own')
    with pytest.raises(ValueError, match='other terms'): BM25.load(tmp_path / 'own', list)
    assert BM25.load(tmp_path / 'own', str.split).search({'q': 'x'})['q']
    (tmp_path / 'mine').mkdir(); (tmp_path / 'mine/letter.txt').write_text('dear')
    with pytest.raises(ValueError, match='holds no index; give a new folder'): index.save(tmp_path / 'mine')
    assert (tmp_path / 'mine/letter.txt').read_text() == 'dear'


# What it is worth, and what it costs

def score(task, lang, name, metric='ndcg@10', k=100):
    "The mean of a measure over the answerable questions"
    qrels = {q: task.qrels[q] for q in task.answerable}
    return per_query(BM25(task.corpus, lang, name).search({q: task.queries[q] for q in qrels}, k), qrels, metric).mean()


def test_hindi_questions_and_the_english_control():
    hindi, english = read_beir(beside('retrieval/xquad_hi_dev')), read_beir(beside('retrieval/xquad_en'))
    began = time.process_time()
    assert score(hindi, 'hi', 'marksafe') > .957
    assert time.process_time() - began < 5
    assert score(hindi, 'hi', 'marksafe', 'recall@100') > .998 and score(hindi, 'hi', 'usual pattern') < .78
    assert score(english, 'en', 'marksafe') > score(english, 'en', 'usual pattern') - .003


def test_scifact_under_the_protocol_of_the_leaderboard():
    task = read_beir(beside('retrieval/scifact'), split='train')
    qrels = {q: task.qrels[q] for q in task.answerable}
    run = BM25(task.corpus, 'en', 'mteb').search(task.queries, 100)
    assert abs(per_query(run, qrels, 'ndcg@10').mean() - .696) < .003
    assert abs(per_query(run, qrels, 'recall@100').mean() - .928) < .003


def test_words_alone_need_no_torch():
    code = ("import sys, lab_lm.text.bm25 as b; b.BM25({'a': 'cats'}, 'hi').search({'q': 'cat'}); "
            "print([m for m in ('torch', 'transformers', 'scipy', 'pandas', 'matplotlib', 'bm25s') if m in sys.modules])")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
