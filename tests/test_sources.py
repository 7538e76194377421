"Reading files that people have, and files that are made to harm"
import bz2
import gzip
import json
import lzma
import random
import re
import time
from collections import Counter

import pytest

from lab_lm.core.paths import shared_data
from lab_lm.text import streams
from lab_lm.text.corpus import Record, to_jsonl
from lab_lm.text.dumps import wiki_sections, wiki_text
from lab_lm.text.sources import SeenIds, iter_records, read_records
from lab_lm.text.streams import Bounds, read_text_lines

zstandard = pytest.importorskip('zstandard')
PACK = {'': bytes, '.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress, '.zst': zstandard.compress}
LETTERS = 'कखगघङचछजझञािीुूेैोौ्ंँ़கஙசஞடணதநபமயரலவழளறனாிீுூெேைொோௌ்abc xyz 0123।,.?"\'\t{}[]\\\u200c\u200d😀'


def some_text(rng, most=60): return ''.join(rng.choices(LETTERS, k=rng.randrange(1, most))).strip() or 'क'


def dump(text, lang='hi', head=''):
    return (f'{head}<mediawiki xml:lang="{lang}"><siteinfo><dbname>{lang}wiki</dbname><base>https://{lang}.wikipedia.org/wiki/M</base></siteinfo>'
            f'<page><title>क</title><ns>0</ns><id>1</id><revision><text>{text}</text></revision></page></mediawiki>')


# What people have


@pytest.mark.parametrize('packed', PACK)
def test_records_come_back_as_they_were_written(tmp_path, packed):
    rng = random.Random()
    records = [Record(f'r{i}', some_text(rng, 300), rng.choice('ab'), rng.choice(['hi', 'ta']), rng.choice(['', 'https://a.b/c']), rng.choice([None, .5]), rng.choice([{}, {'title': some_text(rng)}])) for i in range(200)]
    (tmp_path / f'rows.jsonl{packed}').write_bytes(PACK[packed](to_jsonl(records).encode()))
    assert read_records(tmp_path / f'rows.jsonl{packed}') == records


def kinds(folder):
    "The same two Tamil texts in every local form"
    pa, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    texts = ['மழை பெய்தது.', 'ஆறு நிறைந்தது.']
    (folder / 'a.txt').write_text('\n'.join(texts))
    (folder / 'a.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    (folder / 'a.csv').write_text('n,text\n1,"{}"\n2,{}\n'.format(*texts))
    (folder / 'a.tsv').write_text('n\ttext\n1\t{}\n2\t{}\n'.format(*texts))
    (folder / 'a.conllu').write_text(''.join(f'# sent_id = s{i}\n' + ''.join(f'{n}\t{w}\t_\tX\t_\t_\t0\troot\t_\t{"SpaceAfter=No" if n == 2 else "_"}\n' for n, w in enumerate([*t[:-1].split(), '.'], 1)) + '\n' for i, t in enumerate(texts)))
    (folder / 'a.xml').write_text(dump(f"'''{texts[0]}'''\n{texts[1]}", 'ta'))
    parquet.write_table(pa.table({'text': texts}), folder / 'a.parquet')
    return texts


def test_every_local_form_gives_the_same_texts_in_the_same_order(tmp_path):
    texts = kinds(tmp_path)
    for file in sorted(tmp_path.glob('a.*')):
        found = [t for r in iter_records(file, 'ta') for t in r.text.split('\n')]
        assert found == texts, file.name
        if file.suffix == '.parquet': continue
        for packed, pack in list(PACK.items())[1:]:
            (tmp_path / f'b{file.suffix}{packed}').write_bytes(pack(file.read_bytes()))
            assert [t for r in iter_records(tmp_path / f'b{file.suffix}{packed}', 'ta') for t in r.text.split('\n')] == texts


def test_a_bad_row_names_its_file_and_line_and_can_be_skipped(tmp_path):
    kinds(tmp_path)
    plant = {'a.txt': (b'\xe0\xa4\n', 3), 'a.jsonl': (b'{"text": \n', 3), 'a.csv': (b'1,2,3\n', 4), 'a.tsv': (b'1\t2\t3\n', 4), 'a.conllu': (b'1\tx\n\n', 11)}
    for name, (bad, line) in plant.items():
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole + (b'' if whole.endswith(b'\n') else b'\n') + bad + (whole if name in ('a.txt', 'a.jsonl') else b''))
        with pytest.raises(ValueError, match=re.escape(name) + rf'.*line {line}'): read_records(tmp_path / name, 'ta')
        report = Counter()
        assert len(read_records(tmp_path / name, 'ta', 'skip', report)) == (4 if name in ('a.txt', 'a.jsonl') else 2) and report.total() == 1, name
    deep = tmp_path / 'deep.jsonl'
    deep.write_text('{"text": "x", "lang": "hi"}\n' + '[' * 200_000 + '\n')
    with pytest.raises(ValueError, match='deep.jsonl, line 2: not JSON'): read_records(deep)


def test_a_source_that_fails_does_not_stop_the_others(tmp_path):
    kinds(tmp_path)
    (tmp_path / 'a.xml').write_text(dump('க', 'ta')[:-30])
    (tmp_path / 'b.txt.gz').write_bytes(gzip.compress('வரி\n'.encode() * 9000)[:-9])
    (tmp_path / 'c.pdf').write_bytes(b'%PDF-1.7 nothing')
    (tmp_path / 'd.txt').write_text('கடைசி')
    with pytest.raises(ValueError, match='not well-formed XML'): read_records(tmp_path / 'a.xml', 'ta')
    report = Counter()
    found = list(iter_records(tmp_path, 'ta', 'skip', report))
    assert report['files that could not be read to the end'] >= 2 and found[-1].text == 'கடைசி'
    with pytest.raises(ValueError, match='b.txt.gz is not a whole gzip file'): list(iter_records(tmp_path / 'b.txt.gz', 'ta'))


def test_reading_streams(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "एक", "lang": "hi"}\n' * 1 + '{broken')
    assert next(iter_records(tmp_path / 'a.jsonl')).text == 'एक'
    assert len(read_records(tmp_path / 'a.jsonl', limit=1)) == 1


def test_lines_are_those_of_python_whatever_the_blocks(tmp_path, monkeypatch):
    rng = random.Random()
    monkeypatch.setattr(streams, '_BLOCK', 64)
    for _ in range(300):
        lines = [some_text(rng, rng.choice([3, 40, 200])) if rng.random() < .9 else '' for _ in range(rng.randrange(1, 30))]
        end, bound = rng.choice(['', '\n', '\r\n']), rng.randrange(64, 400)
        data = (rng.choice(['', '\ufeff']) + rng.choice(['\n', '\r\n']).join(lines) + end).encode()
        (tmp_path / 'a.txt').write_bytes(data)
        with open(tmp_path / 'a.txt', encoding='utf-8-sig', newline='\n') as f: true = [(n, line) for n, line in enumerate(f, 1)]
        want = [(n, line.rstrip('\r\n')) for n, line in true if len(line.removesuffix('\n').encode()) <= bound]
        report = Counter()
        assert list(read_text_lines(tmp_path / 'a.txt', 'skip', report, Bounds(line=bound))) == want
        assert report.total() == len(true) - len(want)


def test_seen_ids_agree_with_a_set():
    rng, seen, known = random.Random(), SeenIds(), set()
    for _ in range(60_000):
        key = rng.choice(['hi', 'ta']), f'id-{rng.randrange(40_000)}'
        assert seen.add(key) == (key not in known)
        known.add(key)
    assert seen.count == len(known) and len(seen.table) * 8 / seen.count < 28


def test_treebanks_give_their_texts():
    folder = shared_data('treebanks')
    if folder is None: pytest.skip('no shared treebanks here; see LAB_LM_SHARED')
    for file in sorted(folder.rglob('*.conllu*')):
        with (gzip.open if file.suffix == '.gz' else open)(file, 'rt', encoding='utf-8') as f: said = [line.split('=', 1)[1].strip() for line in f if line.startswith('# text =')]
        found = [r.text for r in iter_records(file, 'hi')]
        assert len(found) == len(said) and sum(a.split() == b.split() for a, b in zip(found, said)) / len(said) > .98, file.name


# Wikitext


def by_library(wikitext):
    "The prose by mwparserfromhell, with the same choices"
    from mwparserfromhell import parse
    def prose(code): return ''.join(map(node_prose, code.nodes)) if code else ''
    def node_prose(node):
        match type(node).__name__:
            case 'Text': return node.value
            case 'Wikilink': return '' if str(node.title).startswith(('चित्र:', 'श्रेणी:', 'File:', 'படிமம்:')) else prose(node.text) or str(node.title)
            case 'ExternalLink': return prose(node.title)
            case 'HTMLEntity': return node.normalize()
            case 'Tag': return '' if str(node.tag) in ('table', 'ref', 'math') else '\n' if str(node.tag) == 'br' else prose(node.contents)
        return ''
    return prose(parse(wikitext, skip_style_tags=True))


def some_wikitext(rng, depth=0):
    "Well-formed wikitext of nested markup"
    word = lambda: ''.join(rng.choices('कखगनमािीुேோர்்தலப', k=rng.randrange(1, 6))) + 'क'
    inner = lambda: some_wikitext(rng, depth + 1)
    plain = [lambda: word() + ' '] * 6 + [lambda: '। ', lambda: '&nbsp;', lambda: "'''" + word() + "''' "]
    rich = [lambda: f'[[{word()}]]', lambda: f'[[{word()}|{word()}]] ', lambda: f'[[चित्र:{word()}|thumb|{inner()}]]', lambda: f'{{{{{word()}|{word()}={inner()}|{inner()}}}}}', lambda: f'<ref name="a">{word()}</ref>',
            lambda: f'[http://a.b/{rng.randrange(9)} {word()}]', lambda: f'<!-- {word()} -->', lambda: f'<b>{inner()}</b>', lambda: '<br/>', lambda: f'<ref name="{rng.randrange(9)}" />', lambda: f'\n{{| class="x"\n| {word()} || {word()}\n|}}\n' if not depth else '']
    return ''.join(rng.choice(plain if depth > 2 or rng.random() < .7 else rich)() for _ in range(rng.randrange(1, 12)))


def test_prose_is_that_of_the_reference_parser():
    pytest.importorskip('mwparserfromhell')
    rng = random.Random()
    def flat(text): return re.sub(r"\s+|'{2,}", '', text)
    for _ in range(500):
        source = some_wikitext(rng)
        assert flat(' '.join(text for _, text in wiki_sections(source))) == flat(by_library(source)), source


def test_no_wikitext_takes_long():
    for mark in ('{{a|', '[[', '[[a|', '{|\n|', '<div>', '<ref>', '<a b="', "''", '[http://a ', '{{{a|', '<!--', '(', '(,', '*', '=', '\n==a==', '&amp', 'http://', '__a', '{{[[<ref>{|\n', ' ', '\n', ',', '{{a|[[b|', '<nowiki>', '<math>'):
        for source in (mark * 12_000, mark * 4_000 + '}}]]|}' * 4_000):
            start = time.process_time()
            wiki_text(source)
            assert time.process_time() - start < 2, mark
