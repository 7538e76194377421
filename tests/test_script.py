"""text.script on real treebanks and on random strings of ten scripts: nothing is lost, nothing is cut."""
import ast
import gzip
import random
from pathlib import Path
from unicodedata import category

import pytest
import regex

from lab_lm.core.paths import shared_data
from lab_lm.text.morph import read_conllu
from lab_lm.text.script import (BLOCKS, LANG_SCRIPT, VIRAMA, aksharas, code_mix, graphemes, romanised, romanised_words, script_fraction,
                                script_of, script_runs, sentences, word_spans, words)

ROOT = Path(__file__).resolve().parent.parent
TEN = ('deva', 'beng', 'guru', 'gujr', 'orya', 'taml', 'telu', 'knda', 'mlym', 'sinh')
EMOJI = ['👨\u200d👩\u200d👧', '🏳\ufe0f\u200d🌈', '👍🏽', '🇮🇳', '🇮', '❤\ufe0f', '1\ufe0f\u20e3', '🏴\U000e0067\U000e0062\U000e007f', '🙂']
OTHER = [*' ,.!?-\'’()0123abcXYZéß।॥', '\n', '\r\n', '\t', '\u200b', '\u0301', '\u0951', '中', 'ก', 'ํ', 'म']
CONTROL = regex.compile(r'[\p{Cc}\p{Zl}\p{Zp}\p{Cf}--[\u200c\u200d\U000e0020-\U000e007f]]', regex.V1)


def assigned(script):
    return [chr(c) for low, high in BLOCKS[script] for c in range(low, high + 1) if category(chr(c))[0] in 'LMNP']


def strings(count, rng):
    "Random strings, each mostly of one script with a virama and joiners far oftener than in text"
    alphabets = {s: (assigned(s), [c for c in assigned(s) if regex.match(r'\p{InSC=Virama}', c)]) for s in TEN}
    for i in range(count):
        letters, virama = alphabets[TEN[i % 10]]
        kinds = rng.choices((letters, virama, '\u200c\u200d', EMOJI, OTHER), (10, 4, 2, 1, 2), k=rng.randrange(1, 13))
        yield ''.join(map(rng.choice, kinds))


def starts_badly(pieces):
    "Pieces, but for the first, that start with a mark though the piece before ends in something it could join"
    return [b for a, b in zip(pieces, pieces[1:]) if category(b[0])[0] == 'M' and not CONTROL.match(a[-1])]


def test_hundred_thousand_strings():
    for text in strings(100_000, random.Random()):
        small, large = graphemes(text), aksharas(text)
        assert ''.join(small) == text and ''.join(large) == text
        assert not starts_badly(small) and not starts_badly(large), ascii(text)
        ends, at = set(), 0
        for piece in small: ends.add(at := at + len(piece))
        at = 0
        for piece in large: assert (at := at + len(piece)) in ends, ascii(text)


def test_words_never_cut_a_grapheme_and_keep_everything():
    for text in strings(30_000, random.Random()):
        spans = word_spans(text)
        assert [text[a:b] for a, b in spans] == words(text)
        inside = {i for a, b in spans for i in range(a, b)}
        lost = [c for i, c in enumerate(text) if i not in inside and category(c)[0] in 'LMN' and not '\ufe00' <= c <= '\ufe0f']
        assert not lost, (ascii(text), lost)
        at = 0
        for piece in graphemes(text):
            cut = any(at < edge < at + len(piece) for span in spans for edge in span)
            stray = category(piece[0])[0] not in 'LN' or piece[0] == '\u0d4e' # a mark on a sign or emoji; a dot reph, which joins even an emoji
            assert not cut or stray, (ascii(text), ascii(piece))
            at += len(piece)


def reference_aksharas(text):
    "The rule again, slowly and letter by letter"
    out = []
    for piece in graphemes(text):
        before, virama_then_zwj = (out[-1] if out else ''), r'[\u0dca]\u200d$|\u200d\u0dca$'
        consonant = bool(regex.match(r'\p{InSC=Consonant}', piece))
        joins = consonant and (regex.search(rf'[{VIRAMA}]\u200d?$', before) or regex.search(virama_then_zwj, before))
        joins = joins or before.endswith('க்') and piece[0] == 'ஷ' or before.endswith(('ஸ்', 'ஶ்')) and piece[:2] == 'ரீ'
        if joins: out[-1] += piece
        else: out.append(piece)
    return out


def test_aksharas_follow_their_rule():
    for text in strings(10_000, random.Random()): assert aksharas(text) == reference_aksharas(text), ascii(text)


@pytest.mark.parametrize('text, expected', [
    ('क्\u200dष', ['क्\u200dष']), ('क्\u200cष', ['क्\u200c', 'ष']), ('क्ष', ['क्ष']), ('र्\u200dय', ['र्\u200dय']),
    ('ক্\u200cষ', ['ক্\u200c', 'ষ']), ('র\u200d্য', ['র\u200d্য']), ('অ্যা', ['অ্যা']), ('ৎস', ['ৎ', 'স']),
    ('ക്ഷ', ['ക്ഷ']), ('ൻ്റെ', ['ൻ്റെ']), ('ൻറെ', ['ൻ', 'റെ']), ('ൎക', ['ൎക']), ('ಕ್ಷ', ['ಕ್ಷ']), ('ರ್ಕ', ['ರ್ಕ']),
    ('ਪ੍ਰ', ['ਪ੍ਰ']), ('ਪੱਕ', ['ਪੱ', 'ਕ']), ('ශ්\u200dරී', ['ශ්\u200dරී']), ('ශ්රී', ['ශ්', 'රී']), ('ක\u200d්ෂ', ['ක\u200d්ෂ']),
    ('க்ஷ', ['க்ஷ']), ('ஶ்ரீ', ['ஶ்ரீ']), ('ஸ்ரி', ['ஸ்', 'ரி']), ('க்க', ['க்', 'க']), ('ன்று', ['ன்', 'று']),
    ('क्a', ['क्', 'a']), ('', []), ('्क', ['्क']), ('\n्क', ['\n', '्क'])])
def test_akshara_table(text, expected):
    assert aksharas(text) == expected


def treebanks():
    folder = shared_data('treebanks')
    if folder is None: pytest.skip('the treebanks are absent; set LAB_LM_SHARED to the folder that holds them')
    return sorted(folder.glob('*.conllu.gz'))


def test_treebank_tokens_come_back_whole():
    for path in treebanks():
        tokens = [t.form for s in read_conllu(path) for t in s.tokens if regex.fullmatch(r'\p{L}[\p{L}\p{M}\u200c\u200d]*', t.form)]
        assert len(tokens) > 200
        whole = sum(words(f'«{form}», {form}।') == [form, form] for form in tokens)
        assert whole / len(tokens) >= .999, (path.name, whole, len(tokens))


def test_treebank_text_keeps_every_letter_mark_and_digit():
    for path in treebanks():
        for sentence in read_conllu(path):
            text = sentence.text
            assert [c for w in words(text) for c in w if category(c)[0] in 'LMN'] == [c for c in text if category(c)[0] in 'LMN']
            assert ''.join(''.join(sentences(text)).split()) == ''.join(text.split())


def test_treebank_sentences_are_found():
    "Two hundred treebank sentences joined by spaces come apart again where they end as sentences do"
    for path in treebanks():
        texts = [s.text for s in read_conllu(path)]
        texts = [t for t in texts if t.endswith(('।', '.')) and not regex.search(r'[।.!?…]["\'”’)\]]*\s', t)][:200]
        if len(texts) < 50: continue
        found = set(sentences(' '.join(texts)))
        assert sum(t in found for t in texts) / len(texts) >= .95, path.name


@pytest.mark.parametrize('text, expected', [
    ('वह है. मैं हूँ.', ['वह है.', 'मैं हूँ.']), ('डॉ. ए.पी.जे. कलाम आए.', ['डॉ. ए.पी.जे. कलाम आए.']),
    ('दर 3.5 है। 1,200. ठीक.', ['दर 3.5 है।', '1,200.', 'ठीक.']),
    ('तो आहे. तो जा. मग ये.', ['तो आहे.', 'तो जा.', 'मग ये.']), ('கி.பி. 1947 இல் வந்தார். போ. வா', ['கி.பி. 1947 இல் வந்தார்.', 'போ.', 'வா']),
    ('एक।दो।तीन', ['एक।', 'दो।', 'तीन']), ('श्लोक ॥ १ ॥ दूसरा ॥ २ ॥', ['श्लोक ॥ १ ॥', 'दूसरा ॥ २ ॥']),
    ('वह बोला, "चलो।" फिर गया।', ['वह बोला, "चलो।"', 'फिर गया।']),
    ('see https://a.b/c?d=e now? Yes.', ['see https://a.b/c?d=e now?', 'Yes.']), ('a\n\nb\u2028c', ['a', 'b', 'c']), (' \n ', []),
    ('Fig. 3 shows it. No. 5 is it. He said No. Then left.', ['Fig. 3 shows it.', 'No. 5 is it.', 'He said No.', 'Then left.'])])
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_runs_partition_the_text_and_keep_its_words():
    for text in strings(10_000, random.Random()):
        runs = script_runs(text)
        assert [a for _, a, _ in runs] + [len(text)] == [0] + [b for *_, b in runs]
        assert all(x[0] != y[0] for x, y in zip(runs, runs[1:]))
        for script, a, b in runs: assert {script_of(c) for c in text[a:b] if category(c)[0] == 'L'} <= {script}


def test_each_language_tag_has_a_script():
    assert {LANG_SCRIPT[f'{lang}-Latn'] for lang in ('hi', 'ta', 'te', 'kn', 'ml', 'mr', 'bn', 'gu', 'pa', 'or', 'as', 'ne', 'sa')} == {'latn'}
    assert set(LANG_SCRIPT.values()) <= BLOCKS.keys()
    assert script_fraction('cafe\u0301 ❤️', 'latn') == 1.0


def test_english_is_not_taken_for_romanised():
    file = shared_data('text/wiki_en.txt.gz')
    if file is None: pytest.skip('wiki_en.txt.gz is absent; set LAB_LM_SHARED to the folder that holds text/')
    with gzip.open(file, 'rt', encoding='utf-8') as lines: texts = [t for t, _ in zip(lines, range(2000)) if len(words(t)) >= 5]
    for lang in ('hi', 'ta'): assert sum(romanised(t, lang) >= .2 for t in texts) / len(texts) < .002
    assert not romanised_words('hi') & romanised_words('ta')


def test_code_mix_by_hand():
    assert code_mix('एक two மூன்று') == pytest.approx(100 * 2 / 3) and code_mix('12 ! ?') == 0.0


ALLOWED = {'core/provenance.py': 'shapes of secrets, which are ASCII',
           'text/analysers.py': 'broken_words, the named baseline', 'recipes/explore.py': 'says in words what was counted', 'recipes/beir.py': 'the same'}


def test_no_word_pattern_that_breaks_marks():
    "No string in lab_lm holds \\w or \\b, in a pattern or otherwise, but for those named above"
    found = set()
    for path in sorted((ROOT / 'lab_lm').rglob('*.py')):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        documented = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(n)]
        docstrings = {id(n.body[0].value) for n in documented}
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings else ''
            if regex.search(r'\\[wWbB](?![A-Za-z]{2})|\x08', text):
                found.add(str(path.relative_to(ROOT / 'lab_lm')))
    assert found <= ALLOWED.keys(), f'word patterns that cut at vowel signs: {sorted(found - ALLOWED.keys())}'
    assert 'text/analysers.py' in found
