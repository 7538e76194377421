"The Hindi suite of minimal pairs: balanced, sourced, and wrong where it says wrong"
import gzip
import os
import random
import subprocess
import sys
import unicodedata
from collections import Counter, defaultdict

import pytest

from lab_lm.core.paths import shared_data
from lab_lm.text import pocket_hi, suites
from lab_lm.text.breaks_hi import break_subject
from lab_lm.text.inflect_hi import inflect, participle
from lab_lm.text.phrases_hi import form_of, respelt, role_of, root_of
from lab_lm.text.pocket import Node, Pair, load_lexicon
from lab_lm.text.suites import longer_side, notes, suite

FOURTEEN = {'subject-verb number', 'subject-verb person', 'subject-verb gender', 'split ergativity', 'accusative', 'dative', 'adjective gender', 'verb gender',
            'honorific', 'negation', 'binding', 'control', 'word order', 'number'}
SEED = random.SystemRandom().randrange(10**9)
POST = {'ने', 'को', 'से', 'में', 'पर', 'का', 'के', 'की'}


@pytest.fixture(scope='module')
def pairs(): return suite('hi', 12, SEED)


def words(text): return text[:-1].split()


def of(pairs, name): return [p for p in pairs if p.phenomenon == name]


def test_all_fourteen_are_there_and_balanced(pairs):
    assert FOURTEEN < set(pocket_hi.PHENOMENA) and len(set(pairs)) == len(pairs) == 12 * len(pocket_hi.PHENOMENA), SEED
    for name in pocket_hi.PHENOMENA:
        mine = of(pairs, name)
        assert len(mine) == 12 and all(p.good != p.bad and p.good[-1] == p.bad[-1] for p in mine), (SEED, name)
        shorter = sum(.5 * (len(p.good) == len(p.bad)) + (len(p.good) < len(p.bad)) for p in mine)
        assert shorter == 6, (SEED, name) # always choosing the shorter sentence: exactly one half


def test_no_wrong_sentence_is_one_that_the_grammar_makes(pairs):
    rng = random.Random(SEED)
    made = {pocket_hi.sentence(rng).text for _ in range(2500)} | {p.good for p in pairs}
    assert not made & {p.bad for p in pairs}, SEED


def test_what_native_speakers_say_is_never_wrong():
    "Readings that earlier suites overlooked: each would make a correct sentence the wrong one"
    for p in suite('hi', 30, SEED, ('split ergativity', 'negation', 'word order', 'honorific', 'dative')):
        good, bad = words(p.good), words(p.bad)
        assert bad[-1] != 'नहीं' and sorted(good) != sorted(bad) or p.phenomenon == 'word order', (SEED, p) # वह आया नहीं, and orders of subject and object
        if p.phenomenon == 'split ergativity' and 'वह' in bad and 'उसने' in good: assert {'को', 'से'} & set(bad) or any(w in bad for w in ('मुझे', 'हमें', 'तुम्हें', 'आपको')), (SEED, p)
        if p.phenomenon == 'negation' and 'मत' in bad: assert not (bad[bad.index('मत') + 1:] == bad[-1:] and bad[-1].endswith('ा') and not bad[-1].endswith('गा') and
                                                                  bad[-1] not in ('था',) and not bad[-1].endswith('ता')), (SEED, p) # चोट मत लगा
        if p.phenomenon == 'dative' and 'मुझे' in bad and 'मैं' in good: assert bad[-1].endswith(('हूँ', 'ूँगा', 'ूँगी', 'ऊँगा', 'ऊँगी')), (SEED, p) # the verb says who acts
        if p.phenomenon == 'honorific' and good[0] == 'आप' == bad[0]: assert not bad[-1].endswith(('ो', 'ओ')), (SEED, p) # आप सुनो, आप जाते हो


def test_a_wrong_number_is_no_wish():
    "दौड़े may be 'may he run': as the wrong twin of दौड़ा it would be correct"
    wishes = {participle(e['lemma'], 'Perf', 'Masc', 'Plur') for e in load_lexicon('hi') if e['upos'] in ('VERB', 'AUX') and e['lemma'].endswith('ना')}
    for p in suite('hi', 40, SEED, ('subject-verb number',)): assert words(p.bad)[-1] not in wishes or words(p.good)[-1] == words(p.bad)[-1], (SEED, p)


def test_moved_words_break_a_phrase(pairs):
    for p in suite('hi', 40, SEED, ('word order',)):
        bad, good = words(p.bad), words(p.good)
        assert sorted(bad) == sorted(good) and bad != good
        i = next(i for i, (g, b) in enumerate(zip(good, bad)) if g != b)
        stranded = bad[0] in POST - {'पर'} or any(a in POST and b in POST for a, b in zip(bad, bad[1:])) or set(good[i:i + 2]) & POST
        stem = bad[i].startswith(('रह', 'सक')) and len(good[i]) < len(good[i + 1]) + 3
        assert stranded or stem, (SEED, p)


def test_reflexives_have_nothing_to_refer_to():
    for p in suite('hi', 30, SEED, ('binding',)):
        bad = words(p.bad)
        me, own = {'मैं': 'मुझे', 'मैंने': 'मुझे', 'तुम': 'तुम्हें', 'तुमने': 'तुम्हें', 'हम': 'हमें', 'हमने': 'हमें'}, set(bad)
        twice = any(a in own and b in own for a, b in me.items())
        each = 'एक-दूसरे' in own and (bad[bad.index('एक-दूसरे') + 1] == 'ने' or 'मैंने' in own or 'उसने' in own or not any(w.endswith(('ों', 'ओं')) and bad[k + 1] == 'ने' for k, w in enumerate(bad[:-1])))
        assert twice or each, (SEED, p)


def test_a_planted_rule_that_breaks_nothing_is_seen(monkeypatch):
    "The balance, on a grammar whose pairs are known: one direction only, one length only, too few"
    class Toy:
        PHENOMENA = ('long', 'same', 'both', 'few')
        def pair(self, rng, name):
            x = str(rng.randrange(10**6))
            return {'long': Pair(x + 'aa', x, name), 'same': Pair(x + 'a', x + 'b', name), 'few': Pair('a', rng.choice('bc'), name),
                    'both': Pair(x + 'a' * rng.choice([1, 1, 1, 3]), x + 'bb', name)}[name]
    monkeypatch.setattr(suites, 'pocket', lambda lang: Toy())
    sides = lambda name, n: Counter(longer_side(p) for p in suite('toy', n, SEED, (name,)))
    assert sides('long', 10) == {1: 10} and sides('same', 7) == {0: 7} and sides('both', 20) == {1: 10, -1: 10}
    assert abs(sides('both', 7)[1] - sides('both', 7)[-1]) == 1
    with pytest.raises(ValueError, match="has only 2 pairs of 'few'; asked for 3"): suite('toy', 3, SEED, ('few',))
    assert len(suite('toy', 2, SEED, ('few',))) == 2


def test_every_phenomenon_has_a_note_and_the_file_is_checked(monkeypatch, tmp_path):
    told = notes('hi')
    assert list(told) == list(pocket_hi.PHENOMENA)
    for name, x in told.items():
        assert len(x.rule.split()) > 8 and any(c.isdigit() for c in x.source) and x.good != x.bad and x.good.endswith('।') and x.bad.endswith('।'), name
        assert x.gloss.count("'") >= 2 and len(x.gloss.split("'")[0].split()) >= len(words(x.good)) - 1, name # word for word, then the meaning
    (tmp_path / 'pocket' / 'phenomena').mkdir(parents=True)
    (tmp_path / 'pocket' / 'phenomena' / 'hi.yaml').write_text('tone: {rule: x, source: x, good: x, bad: y, gloss: x}\n', encoding='utf-8')
    monkeypatch.setattr(suites, 'presets', lambda: tmp_path)
    notes.cache_clear()
    with pytest.raises(ValueError, match='different phenomena'): notes('hi')
    notes.cache_clear()


def test_the_same_suite_in_another_process():
    code = "from lab_lm.text.suites import suite; import hashlib; print(hashlib.sha256(repr(suite('hi', 3, 5)).encode()).hexdigest())"
    runs = {subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONHASHSEED': seed}, capture_output=True, text=True, check=True).stdout for seed in ('1', '2')}
    assert len(runs) == 1


def test_the_lexicon():
    entries = load_lexicon('hi')
    assert len({e['lemma'] for e in entries}) >= 400
    text = ' '.join(e['lemma'] for e in entries)
    assert text == unicodedata.normalize('NFC', text)
    twice = [k for k, n in Counter((e['lemma'], e['upos'], e.get('number')) for e in entries if e['upos'] != 'VERB').items() if n > 1]
    assert not twice
    assert all(e.get('gender') in ('Masc', 'Fem') and e.get('kind') for e in entries if e['upos'] in ('NOUN', 'PROPN'))
    known = {k for e in entries for k in (e['lemma'], *e.get('kind', ()))}
    asked = {(e['lemma'], k) for e in entries for f in ('who', 'obj', 'to', 'from', 'at', 'go', 'how', 'of', 'when', 'theme') for k in e.get(f, ())}
    assert not [a for a in asked if a[1] not in known]


def unimorph():
    "UniMorph Hindi: lemma, form without its pronoun, tags"
    path = shared_data('treebanks/unimorph_hin.tsv.gz')
    if path is None: pytest.skip('UniMorph Hindi is not here; set LAB_LM_SHARED')
    table = defaultdict(lambda: defaultdict(list))
    for line in gzip.open(path, 'rt', encoding='utf-8'):
        if line.count('\t') != 2: continue
        lemma, form, tags = line.rstrip('\n').split('\t')
        table[lemma][' '.join(w for w in form.split() if w not in ('मैं', 'तू', 'तुम', 'हम', 'आप', 'वह', 'वे', 'यह', 'ये'))].append(set(tags.split(';')))
    return table


def test_unimorph_licenses_right_verbs_and_no_wrong_one():
    "Every reading that UniMorph knows of a verb group, the subjunctive too, against the person, number and gender of the subject"
    table, rng, right, wrong = unimorph(), random.Random(SEED), Counter(), []
    while right.total() < 900:
        nodes, _ = pocket_hi._clause(rng, (pocket_hi.statement,))
        s, root = role_of(nodes, 'nsubj'), root_of(nodes)
        if s is None or s.feats.get('Case') != 'Nom' or not s.feats.get('Gender') or root.lemma not in table: continue
        many, polite = s.feats['Number'] == 'Plur', s.feats.get('Polite') == 'Form'
        who, sex = {'3' if polite else s.feats['Person'], 'PL' if many or polite else 'SG'}, {'Masc': 'MASC', 'Fem': 'FEM'}[s.feats['Gender']]
        readings = lambda ws: [t for t in table[root.lemma][' '.join(ws[nodes.index(root):])] if who <= t and (sex in t or not t & {'MASC', 'FEM'})]
        good = respelt(nodes, {})
        right[bool(readings(good))] += 1
        if not readings(good): continue
        new = [w for name in ('subject-verb number', 'subject-verb person', 'subject-verb gender') for w in break_subject(nodes, name) if w != good]
        assert not [w for w in new if readings(w)], (SEED, good)
        wrong += new
    assert right[True] > 600 and len(wrong) > 500, (right, len(wrong)) # the rest are forms that UniMorph does not list


def test_infinitives_and_modals_inflect():
    inf = lambda **f: inflect('जाना', 'VERB', {'VerbForm': 'Inf', **f})
    assert (inf(), inf(Case='Acc'), inf(Gender='Fem')) == ('जाना', 'जाने', 'जानी')
    assert inflect('चाहिए', 'AUX', {}) == 'चाहिए' and form_of(Node('', 'सकना', 'AUX', {'Aspect': 'Perf', 'Gender': 'Fem', 'Number': 'Sing', 'VerbForm': 'Fin'})) == 'सकी'
    assert form_of(Node('', 'मैं', 'PRON', {'Case': 'Dat', 'Number': 'Sing'})) == 'मुझे' and form_of(Node('', 'एक-दूसरा', 'PRON', {'Case': 'Acc'})) == 'एक-दूसरे'
