"Files that are made to harm: each is answered in time, in little memory, and leaves nothing behind"
import bz2
import gzip
import lzma
import random
import subprocess
import sys
import textwrap
import zlib
from collections import Counter

import pytest

from lab_lm.text.dumps import read_dump
from lab_lm.text.sources import read_records
from lab_lm.text.streams import read_blocks

zstandard = pytest.importorskip('zstandard')
PACK = {'.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress, '.zst': zstandard.compress}


def apart(code, folder, seconds=30):
    "Run code in a process of its own; what it says, and by how many MiB its memory peaked beyond the imports"
    program = '''
        import re, sys, time
        from collections import Counter
        from pathlib import Path
        from lab_lm.text.sources import iter_records
        from lab_lm.text.streams import Bounds, read_text_lines
        def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) // 1024
        folder, before, said = Path(sys.argv[1]), peak(), []
        def attempt(act):
            try: said.append(repr(act()))
            except ValueError as e: said.append(str(e))
    ''' + code + '''
        print(peak() - before, *said, sep='\\n')
    '''
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(program), str(folder)], capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr
    grown, *said = done.stdout.splitlines()
    assert int(grown) < 200, f'memory grew by {grown} MiB'
    return said


def dump(text, lang='hi', head=''):
    return (f'{head}<mediawiki xml:lang="{lang}"><siteinfo><dbname>{lang}wiki</dbname><base>https://{lang}.wikipedia.org/wiki/M</base></siteinfo>'
            f'<page><title>क</title><ns>0</ns><id>1</id><revision><text>{text}</text></revision></page></mediawiki>')


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    rng, frames = random.Random(), []
    for _ in range(4): frames.append(zstandard.compress(''.join(''.join(rng.choices('कखगघ ிாு', k=rng.randrange(1, 900))) + '\n' for _ in range(4000)).encode()))
    (tmp_path / 'long.txt.zst').write_bytes(b''.join(frames * 6))
    said = apart('''
        attempt(lambda: sum(len(r.text) for r in iter_records(folder / 'long.txt.zst', 'hi')) > 30e6)
    ''', tmp_path)
    assert said == ['True']


BOMBS = {'.gz': (16, 640), '.zst': (64, 160), '.bz2': (4, 2560), '.xz': (16, 640)} # MiB, how often


def test_a_bomb_of_ten_gigabytes_is_stopped_at_once(tmp_path):
    for packed, (size, times) in BOMBS.items():
        (tmp_path / f'bomb.txt{packed}').write_bytes(PACK[packed]('नमस्ते\n'.encode() * 1000) + PACK[packed]((b'namaste ' * 63 + b'shanti \n') * (size << 11)) * times)
    (tmp_path / 'mixed').mkdir()
    (tmp_path / 'mixed' / 'bomb.txt.zst').write_bytes((tmp_path / 'bomb.txt.zst').read_bytes())
    (tmp_path / 'mixed' / 'sound.txt').write_text('एक वाक्य')
    before = sorted(tmp_path.rglob('*'))
    *strict, skipped = apart(f'''
        for packed in {list(BOMBS)}: attempt(lambda: sum(1 for _ in iter_records(folder / f'bomb.txt{{packed}}', 'hi')))
        attempt(lambda: [r.text for r in iter_records(folder / 'mixed', 'hi', 'skip', Counter()) if 'namaste' not in r.text][-1])
    ''', tmp_path, 60)
    assert len(strict) == 4 and all('unpacks to more than 200 times its size' in said for said in strict) and 'एक वाक्य' in skipped
    assert sorted(tmp_path.rglob('*')) == before


def test_a_line_of_a_gigabyte_is_never_held(tmp_path):
    (tmp_path / 'line.txt.gz').write_bytes(gzip.compress('पहली\n'.encode() * 2000) + gzip.compress(b'x' * (16 << 20)) * 64 + gzip.compress('\nआख़िरी\n'.encode()))
    with open(tmp_path / 'sparse.txt', 'wb') as f: f.write(b'x' * 10_000); f.truncate(1 << 30)
    strict, skipped, sparse, binary = apart('''
        loose, left = Bounds(ratio=10**6), Counter()
        attempt(lambda: sum(1 for _ in read_text_lines(folder / 'line.txt.gz', bounds=loose)))
        attempt(lambda: (list(read_text_lines(folder / 'line.txt.gz', 'skip', left, loose))[-1], dict(left)))
        attempt(lambda: list(read_text_lines(folder / 'sparse.txt')))
        attempt(lambda: list(read_text_lines(folder / 'sparse.txt', 'skip', left)))
    ''', tmp_path, 60)
    assert 'line.txt.gz, line 2001: longer than 32 MiB' in strict and skipped == "((2002, 'आख़िरी'), {'lines that are too long': 1})"
    assert 'binary' in sparse and 'binary' in binary


def test_entities_are_refused_before_they_unfold(tmp_path):
    laughs = ''.join(f'<!ENTITY {b} "{("&" + a + ";") * 10}">' for a, b in zip('abcdefghijklm', 'bcdefghijklmn'))
    for name, head in {'laughs': f'<!DOCTYPE x [<!ENTITY a "ha">{laughs}]>', 'outside': '<!DOCTYPE x [<!ENTITY n SYSTEM "file:///etc/hostname">]>', 'remote': '<!DOCTYPE x SYSTEM "http://127.0.0.1:9/x.dtd">'}.items():
        (tmp_path / f'{name}.xml').write_text(dump('&n;', head=head))
        with pytest.raises(ValueError, match=f'{name}.xml: declares a document type'): list(read_dump(tmp_path / f'{name}.xml'))


def test_xml_that_never_ends_is_bounded(tmp_path):
    inside = dump('@').split('@')
    (tmp_path / 'deep.xml').write_text(inside[0] + '<a>' * 100_000)
    for name, piece in {'page': b'x' * (1 << 20), 'comment': b'<!--' + b'x' * (1 << 20), 'tag': b'<a b="' + b'x' * (1 << 20)}.items():
        (tmp_path / f'{name}.xml.zst').write_bytes(zstandard.compress(inside[0].encode() + piece) + zstandard.compress(b'x' * (1 << 20)) * 60 + zstandard.compress(inside[1].encode()))
    deep, page, comment, tag = apart('''
        for name in ('deep.xml', 'page.xml.zst', 'comment.xml.zst', 'tag.xml.zst'): attempt(lambda: list(iter_records(folder / name, bounds=Bounds(ratio=10**6))))
    ''', tmp_path)
    assert '20 deep' in deep and 'longer than 32 MiB' in page and 'one piece of markup' in comment and 'one piece of markup' in tag


def test_nothing_leads_out_of_the_folder(tmp_path):
    (tmp_path / 'secret.txt').write_text('गुप्त')
    (tmp_path / 'data' / 'hi').mkdir(parents=True)
    (tmp_path / 'data' / 'fine.txt').write_text('ठीक')
    (tmp_path / 'data' / 'hi' / 'up.txt').symlink_to('../../secret.txt')
    (tmp_path / 'data' / 'ta').symlink_to(tmp_path)
    (tmp_path / 'data' / 'self.txt').symlink_to('self.txt')
    with pytest.raises(ValueError, match='leads out of data, or nowhere'): read_records(tmp_path / 'data', 'hi')
    report = Counter()
    assert [r.text for r in read_records(tmp_path / 'data', 'hi', 'skip', report)] == ['ठीक'] and report['links that lead out of the folder'] == 3
    named = gzip.compress('पंक्ति\n'.encode())
    header = named[:3] + bytes([8]) + named[4:10] + b'../../../escaped.txt\0'
    (tmp_path / 'data' / 'named.txt.gz').write_bytes(header + named[10:])
    assert read_records(tmp_path / 'data' / 'named.txt.gz', 'hi')[0].id == 'named-0000001' and not list(tmp_path.rglob('escaped*'))


@pytest.mark.parametrize('packed', PACK)
def test_a_damaged_file_is_a_value_error_and_nothing_else(tmp_path, packed):
    rng = random.Random()
    raw = '\n'.join(''.join(rng.choices('कखगघ ிாு', k=rng.randrange(1, 200))) for _ in range(300)).encode()
    whole = PACK[packed](raw)
    for _ in range(60):
        cut, flipped = whole[:rng.randrange(1, len(whole))], bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (tmp_path / f'cut.txt{packed}').write_bytes(cut)
        with pytest.raises(ValueError, match='is not a whole'): list(read_blocks(tmp_path / f'cut.txt{packed}'))
        (tmp_path / f'cut.txt{packed}').write_bytes(flipped)
        try: read_records(tmp_path / f'cut.txt{packed}', 'hi', 'skip', Counter())
        except ValueError: pass


def test_tables_made_to_harm(tmp_path):
    pa, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    with open(tmp_path / 'field.csv', 'wb') as f: f.write(b'text\nfine\n"' + (b'x' * 1000 + b'\n') * 20_000 + b'"\n')
    parquet.write_table(pa.table({'text': pa.DictionaryArray.from_arrays(pa.array([0] * 2_000, pa.int32()), pa.array(['क' * 300_000]))}), tmp_path / 'bomb.parquet')
    parquet.write_table(pa.table({'body': ['क'], 'n': [1]}), tmp_path / 'none.parquet')
    field, bomb, none = apart('''
        attempt(lambda: list(iter_records(folder / 'field.csv', 'hi')))
        attempt(lambda: sum(1 for _ in iter_records(folder / 'bomb.parquet', 'hi', limit=400)))
        attempt(lambda: list(iter_records(folder / 'none.parquet', 'hi')))
    ''', tmp_path)
    assert 'field.csv, line 3: not CSV' in field and (bomb == '400' or 'times its size' in bomb) and "no column 'text'; it has: body, n" in none


def test_a_pdf_made_to_harm(tmp_path):
    pypdf = pytest.importorskip('pypdf')
    from pypdf.generic import DecodedStreamObject, NameObject
    writer = pypdf.PdfWriter()
    page = writer.add_blank_page(100, 100)
    stream = DecodedStreamObject()
    packer = zlib.compressobj(9)
    stream.set_data(b''.join(packer.compress(b' ' * (16 << 20)) for _ in range(12)) + packer.flush())
    stream[NameObject('/Filter')] = NameObject('/FlateDecode')
    page[NameObject('/Contents')] = writer._add_object(stream)
    writer.write(tmp_path / 'bomb.pdf')
    said, = apart('''
        attempt(lambda: list(iter_records(folder / 'bomb.pdf', 'en')))
    ''', tmp_path, 60)
    assert 'bomb.pdf' in said
