"""text.normalise: idempotent for every choice of rules, harmless to clean text, and linear in the length of hostile text."""
import gzip
import time
from collections import Counter
from unicodedata import category, is_normalized

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_lm.core.paths import presets, shared_data
from lab_lm.text.morph import read_conllu
from lab_lm.text.normalise import RULES, Changes, changed, mojibake, native_digits, normalise, profile
from lab_lm.text.script import words

LANGS = sorted(p.stem for p in (presets() / 'lang').glob('*.yaml'))
NAMES = tuple(RULES)
INDIC = [chr(c) for c in range(0x900, 0xE00) if category(chr(c)) != 'Cn']
PIECES = [*'कनरऩअआइउए\u093c\u093e\u0947\u0945\u094d\u0902\u0901ङञचमब३।॥|', *'ঙগতে\u09be\u09bc\u09cdড',
          *'ਸਅ\u0a3c\u0a3f\u0a3e', *'ഇനഎ\u0d57\u0d46\u0d3e\u0d4d', *'ஒஅ\u0bd7\u0bc2\u0bc6\u0bbe௩', *'ಕ\u0cbc\u0cc6\u0cc2\u0cd5',
          *'\u200c\u200d\u200b\ufeff\u00ad\u2060', *'\x00\x07\x1c\x85\u2028\t\r\n  \u00a0', *'“”‘’`´"\'«.,:;!?()3a@/',
          '\ud800', '\u0301', '\u0951', 'é', 'e\u0301', '👩', '❤\ufe0f', '🏽',
          'https://', 'www.', 'a@b.c', 'http://x.y/z', '||', '।।', '\r\n', 'ന്\u200d', 'त्\u200d', 'र्इ', 'ङ्क']
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.sampled_from(INDIC), st.characters()), max_size=25).map(''.join)
SUBSET = st.sets(st.sampled_from(NAMES)).map(tuple)


@settings(max_examples=500, deadline=None)
@given(TEXT, st.sampled_from(LANGS), SUBSET, SUBSET)
def test_idempotent_for_every_subset_of_rules(text, lang, without, also):
    once = normalise(text, lang, without=without, also=also)
    assert normalise(once, lang, without=without, also=also) == once, ascii(text)


@settings(max_examples=250, deadline=None)
@given(TEXT, st.integers(0, len(NAMES) - 1), st.integers(0, len(NAMES) - 1))
def test_a_later_rule_does_not_undo_an_earlier_one(text, i, j):
    first, second = (RULES[NAMES[k]].run for k in sorted((i, j)))
    done = second(first(text))
    assert first(done) == done, (ascii(text), NAMES[min(i, j)], NAMES[max(i, j)])


@settings(max_examples=250, deadline=None)
@given(TEXT, st.sampled_from(NAMES))
def test_a_rule_that_is_skipped_would_have_changed_nothing(text, name):
    rule = RULES[name]
    if not regex.search(rule.when, text): assert rule.run(text) == text, (name, ascii(text))


@settings(max_examples=250, deadline=None)
@given(TEXT, st.sampled_from(LANGS))
def test_what_comes_out_is_nfc_and_free_of_dirt(text, lang):
    out = normalise(text, lang)
    assert is_normalized('NFC', out)
    assert not regex.search(r'[\p{Cc}\p{Cs}\u200b\ufeff--\n]|  |\A\s|\s\z|[\u200c\u200d]{2}', out, regex.V1), ascii(out)
    out.encode('utf-8')


@settings(max_examples=250, deadline=None)
@given(TEXT, st.sampled_from(LANGS))
def test_storage_rules_lose_no_letter_and_no_digit(text, lang):
    "All but links, nukta and vowels leave letters, marks and digits as they are, up to NFC and chillus"
    out = normalise(text, lang, without=('links', 'nukta', 'vowels', 'chillu', 'nfc'))
    kept = [c for c in text if category(c)[0] in 'LMN']
    assert [c for c in out if category(c)[0] in 'LMN'] == kept, ascii(text)


@pytest.mark.parametrize('lang', LANGS)
def test_profiles_list_the_rules_of_their_script(lang):
    p = profile(lang)
    assert p['rules'] == [n for n, r in RULES.items() if r.default and (not r.scripts or p['script'] in r.scripts)]
    assert all(p['script'] in RULES[n].scripts and not RULES[n].default for n in p['matching'])


def test_every_rule_has_its_papers():
    for name, rule in RULES.items(): assert rule.does and (rule.loses or name == 'chillu'), name
    assert normalise('ന്\u200d', 'ml') == 'ൻ' and len({*'ണനരലളക'}) == 6


@pytest.mark.parametrize('text, lang', [
    ('3.5%', 'hi'), ('1,200', 'hi'), ('3.5% | 1,200 | 7', 'hi'), ('क्\u200dष', 'hi'), ('क्\u200cष', 'hi'), ('दर्\u200dया', 'mr'),
    ('ரூ. 500', 'ta'), ('GST और AI', 'hi'),
    ('మాట: ఇది', 'te'), ('అది: 5', 'te'), ('समय 5:30, अतः', 'hi'), ('ಸಾಫ್ಟ್\u200cವೇರ್', 'kn'), ('సాఫ్ట్\u200cవేర్', 'te'), ('র\u200d্যা', 'bn'),
    ('👨\u200d👩\u200d👧 ❤\ufe0f\u200d🔥 👍🏽 🇮🇳', 'hi'),
    ('दस्त\u200cखत', 'ne'), ('हिन्दी हिंदी अङ्क हूँ हूं', 'hi'), ('२४ ௨௪', 'hi'), ('घर | समाचार | खेल', 'hi'), ('॥ १ ॥', 'sa'),
    ('ශ්\u200dරී', 'si'), ('mera naam hai, nahi?', 'hi-Latn'), ('a_b #tag 50%', 'ta-Latn'), ('', 'hi'), ('₹ 1,200/-', 'hi')])
def test_this_survives(text, lang):
    assert normalise(text, lang) == text


@pytest.mark.parametrize('text, lang, expected', [
    ('वह आया| ', 'hi', 'वह आया।'), ('वह आया |', 'hi', 'वह आया।'), ('श्लोक|| दो ||', 'sa', 'श्लोक॥ दो॥'), ('आया।।', 'hi', 'आया॥'),
    ('বলল|', 'bn', 'বলল।'), ('வந்தான்|', 'ta', 'வந்தான்|'),
    ('\u0958', 'hi', 'क\u093c'), ('न\u093c', 'hi', '\u0929'), ('ज\u093f\u093c', 'hi', 'ज\u093c\u093f'), ('ज\u093c\u093c', 'hi', 'ज\u093c'),
    ('न\u093e\u093c', 'hi', '\u0929\u093e'), ('ਸ\u0a3f\u0a3c', 'pa', 'ਸ\u0a3c\u0a3f'),
    ('\u09dc', 'bn', 'ড\u09bc'), ('ত্\u200d', 'bn', 'ৎ'), ('അവന്\u200dറെ', 'ml', 'അവൻറെ'), ('\u0bc6\u0bbe', 'ta', '\u0bca'),
    ('க\u0bc6\u200b\u0bbe', 'ta', 'க\u0bca'), ('अ\u093e', 'mr', 'आ'), ('भार्इ', 'hi', 'भाई'), ('ਅ\u0a3e', 'pa', 'ਆ'), ('அ\u0bc2', 'ta', 'ஆ'),
    ('यह https://a.b/भारत?x=1|2। और x@y.in, ठीक', 'hi', 'यह । और , ठीक'), ('(WWW) www.a.b.', 'en', '(WWW) .'), ('a\ud800b', 'en', 'a b'),
    ('a\r\n \r\nb\u2028c', 'en', 'a\nb\nc'), ('घर\u200d\u200c ', 'hi', 'घर'), ('a\u200db', 'en', 'ab')])
def test_this_changes(text, lang, expected):
    assert normalise(text, lang) == expected


@pytest.mark.parametrize('a, b, lang', [('हिन्दी', 'हिंदी', 'hi'), ('अङ्क', 'अंक', 'hi'), ('हूँ', 'हूं', 'hi'), ('ज़रा', 'जरा', 'hi'), ('२४', '24', 'hi'),
                                        ('సంబంధం', 'సమ్బన్ధం', 'te'), ('అంక', 'అఙ్క', 'te'), ('ಅಂಕ', 'ಅಙ್ಕ', 'kn'),
                                        ('অংক', 'অঙ্ক', 'bn'), ('ଅଙ୍କ', 'ଅଂକ', 'or'), ('અંક', 'અઙ્ક', 'gu'), ('സംബന്ധം', 'സമ്ബന്ധം', 'ml'),
                                        ('௨௪', '24', 'ta')])
def test_matching_rules_make_spellings_equal(a, b, lang):
    also = profile(lang)['matching']
    assert normalise(a, lang) != normalise(b, lang)
    assert normalise(a, lang, also=also) == normalise(b, lang, also=also)


@pytest.mark.parametrize('word, lang', [('जन्म', 'hi'), ('वाङ्मय', 'hi'), ('अन्न', 'hi'), ('ছন্দ', 'bn'), ('விந்து', 'ta'), ('అన్న', 'te')])
def test_nasals_stay_where_no_stop_of_their_row_follows(word, lang):
    assert normalise(word, lang, also=profile(lang)['matching']) == word


def test_reports_count_and_add_up():
    report, other, counts = Changes(), Changes(), Counter()
    for t in ('“एक” दो  तीन', '“एक”', 'एक'): normalise(t, 'hi', report=report)
    normalise('“क', 'hi', report=other), normalise('“क', 'hi', report=counts)
    assert dict(report.characters) == {'quotes': 4, 'spaces': 1} and dict(report.texts) == {'quotes': 2, 'spaces': 1}
    assert (report + other).texts['quotes'] == 3 and dict(counts) == {'quotes': 1}
    assert [row['rule'] for row in report.table()] == ['quotes', 'spaces']
    assert (changed('abc', 'abc'), changed('abc', 'acb'), changed('aab', 'b')) == (0, 1, 2)


def test_misuse_is_told():
    with pytest.raises(ValueError, match='unknown rules'): normalise('x', 'hi', also=('nukta_folds',))
    with pytest.raises(ValueError, match='known: deva'): native_digits('1', 'Deva')
    assert profile('../../etc') == profile('en') | {'script': ''}


def wiki(lang, characters=200_000):
    file = shared_data(f'text/wiki_{lang}.txt.gz')
    if file is None: pytest.skip(f'wiki_{lang}.txt.gz is absent; set LAB_LM_SHARED to the folder that holds text/')
    with gzip.open(file, 'rt', encoding='utf-8') as f: return f.read(characters).split('\n')


@pytest.mark.parametrize('lang', ['hi', 'ta', 'te', 'kn', 'mr', 'bn', 'en'])
def test_real_text_is_hardly_touched(lang):
    for paragraph in wiki(lang):
        out = normalise(paragraph, lang, without=('links',))
        assert normalise(out, lang, without=('links',)) == out
        if is_normalized('NFC', paragraph) and not regex.search(r'[\u200b-\u200f\ufeff]', paragraph): assert len(words(out)) == len(words(paragraph))
        assert mojibake(paragraph) < .02


def test_treebank_text_is_clean_already():
    "Of manual treebank text nothing but quotation marks, invisible characters and typing errors changes"
    folder = shared_data('treebanks')
    if folder is None: pytest.skip('the treebanks are absent; set LAB_LM_SHARED to the folder that holds them')
    for path in sorted(folder.glob('*.conllu.gz')):
        texts = [s.text for s in read_conllu(path)]
        same = sum([c for c in normalise(t, path.name[:2]) if c.isalnum()] == [c for c in t if c.isalnum()] for t in texts)
        assert same / len(texts) >= .98, (path.name, same, len(texts))


@pytest.mark.parametrize('lang', ['hi', 'ta', 'te', 'kn', 'mr', 'bn'])
@pytest.mark.parametrize('wrong', ['latin-1', 'cp1252'])
def test_mojibake_is_found(lang, wrong):
    for paragraph in [p for p in wiki(lang, 20_000) if len(p) > 50 and not regex.search('[A-Za-z]{3}', p)][:20]:
        damaged = paragraph.encode().decode(wrong, 'replace')
        assert mojibake(damaged) > .6 and mojibake(normalise(damaged, lang)) > .5, ascii(damaged[:80])


HOSTILE = {'spaces': ' ', 'bars': 'क|', 'space and bar': ' |', 'joiners': 'क\u200d',
           'nuktas': '\u093c', 'signs': 'ा', 'vowels': 'अा', 'at signs': 'a@',
           'dots': 'a.', 'www': 'www..', 'dandas': '।', 'breaks': ' \n', 'mojibake': 'Ð\x80', 'nasals': 'ङ्', 'late nukta': 'क\u093e\u093c'}


@pytest.mark.parametrize('name', HOSTILE)
def test_time_is_linear(name):
    def cost(n):
        text, best = HOSTILE[name] * n + 'क @।\u200d', []
        for _ in range(3):
            start = time.process_time()
            normalise(text, 'hi', also=NAMES), mojibake(text)
            best.append(time.process_time() - start)
        return min(best)
    small, large = cost(4_000), cost(32_000)
    assert large < 24 * small + .02, f'8 times the text took {large / small:.0f} times as long'
