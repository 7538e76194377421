"Public retrieval sets against a server on this machine: breaks, wrong files and hostile archives leave nothing half-done"
import hashlib
import http.server
import io
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import yaml

from lab_lm.core.paths import presets
from lab_lm.evals.retrieval import retrieval_score
from lab_lm.text.beir_sets import BeirSet, beir_folder, beir_sets, find_tasks, published, read_set, set_names
from lab_lm.text.download import digest, download, unzip

BODY = random.Random(5).randbytes(300_000)
SUMS = dict(md5=hashlib.md5(BODY).hexdigest(), sha256=hashlib.sha256(BODY).hexdigest())


class Site:
    "A server that sends a file in the ways a test writes down; `asked` holds (path, first byte)"
    def __init__(self, body=BODY): self.body, self.asked, self.answers = body, [], []

    def send(self, h, status=200, body=None, start=0, upto=None, **headers):
        "The body from a byte on; `upto` breaks the line after so many bytes of it"
        body = self.body if body is None else body
        told = {'Content-Length': len(body) - start} | ({'Content-Range': f'bytes {start}-{len(body) - 1}/{len(body)}'} if status == 206 else {})
        h.send_response(status)
        for k, v in (told | {k.replace('_', '-'): v for k, v in headers.items()}).items():
            if v is not None: h.send_header(k, str(v))
        h.end_headers()
        h.wfile.write(body[start:len(body) if upto is None else start + upto])

    def usual(self, h, start, upto=None):
        if start >= len(self.body): self.send(h, 416, b'', Content_Range=f'bytes */{len(self.body)}')
        else: self.send(h, 206 if start else 200, start=start, upto=upto)

    def __enter__(self):
        site = self
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                start = int(self.headers.get('Range', 'bytes=0-')[6:-1])
                site.asked.append((self.path, start))
                answer = site.answers.pop(0) if site.answers else site.usual
                try: answer(self, start)
                except OSError: pass
            def log_message(self, *args): pass
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(.02,), daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server.server_port}/x.zip'
        return self

    def __exit__(self, *_): self.server.shutdown(); self.server.server_close()


def fetch(site, tmp_path, urls=None, sums=SUMS, **how): return download(urls or [site.url], tmp_path / 'x.zip', sleep=lambda s: None, **{'size': len(BODY), **sums, **how})
def left(tmp_path): return sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith('.lock'))
def starts(site): return [start for _, start in site.asked]


def test_a_break_is_continued_where_it_happened(tmp_path):
    with Site() as site:
        site.answers = [lambda h, s: site.usual(h, s, 100_000), lambda h, s: site.usual(h, s, 50_000)]
        assert fetch(site, tmp_path).read_bytes() == BODY and starts(site) == [0, 100_000, 150_000]
        assert fetch(site, tmp_path) and len(site.asked) == 3, 'a file that is right is not fetched again'
        (tmp_path / 'x.zip').write_bytes(BODY[:-1] + b'?')
        assert fetch(site, tmp_path).read_bytes() == BODY and starts(site)[3:] == [0], 'a file that is wrong is'
    assert left(tmp_path) == ['x.zip']


def test_a_program_that_gave_up_goes_on_another_time(tmp_path):
    with Site() as site:
        site.answers = [lambda h, s: site.usual(h, s, 70_000)]
        with pytest.raises(ValueError, match='x.zip cannot be fetched') as told: fetch(site, tmp_path, tries=1)
        assert '\n' not in str(told.value) and left(tmp_path) == ['.x.zip.part']
        assert fetch(site, tmp_path).read_bytes() == BODY and starts(site) == [0, 70_000]


def test_a_whole_part_file_is_not_fetched_again(tmp_path):
    (tmp_path / '.x.zip.part').write_bytes(BODY)
    with Site() as site: assert fetch(site, tmp_path).read_bytes() == BODY and starts(site) == [len(BODY)]


@pytest.mark.parametrize('name, answer, expected', [
    ('no ranges', lambda site: lambda h, s: site.send(h), [80_000]),
    ('another range', lambda site: lambda h, s: site.send(h, 206, start=7), [80_000, 0]),
    ('range refused', lambda site: lambda h, s: site.send(h, 416, b''), [80_000, 0]),
    ('busy', lambda site: lambda h, s: site.send(h, 503, b''), [80_000, 80_000]),
])
def test_servers_that_treat_ranges_otherwise(tmp_path, name, answer, expected):
    (tmp_path / '.x.zip.part').write_bytes(BODY[:80_000])
    with Site() as site:
        site.answers = [answer(site)]
        assert fetch(site, tmp_path).read_bytes() == BODY and starts(site) == expected


def test_a_beginning_of_another_file_is_thrown_away_once(tmp_path):
    (tmp_path / '.x.zip.part').write_bytes(b'?' * 80_000)
    with Site() as site: assert fetch(site, tmp_path).read_bytes() == BODY and starts(site) == [80_000, 0]


@pytest.mark.parametrize('answer, told', [
    (lambda site: lambda h, s: site.send(h, body=b'<html>moved</html>'), '18 bytes instead of 300,000'),
    (lambda site: lambda h, s: site.send(h, body=BODY[:-1] + b'?'), 'another md5 than published'),
    (lambda site: lambda h, s: site.send(h, body=BODY + b'more', Content_Length=None), 'more than 300,000 bytes'),
    (lambda site: lambda h, s: site.send(h, Content_Encoding='gzip'), 'packing not accepted'),
    (lambda site: lambda h, s: site.send(h, 404, b''), 'status 404'),
    (lambda site: lambda h, s: site.send(h, 302, b'', Location='ftp://elsewhere/x.zip'), 'cannot be fetched'),
])
def test_the_wrong_file_is_refused_and_the_next_address_tried(tmp_path, answer, told):
    with Site() as site:
        site.answers = [answer(site)]
        with pytest.raises(ValueError, match=told): fetch(site, tmp_path)
        assert 'x.zip' not in left(tmp_path) and len(site.asked) == 1
        site.answers = [answer(site)]
        assert fetch(site, tmp_path, [site.url, site.url + '?mirror']).read_bytes() == BODY


def test_without_a_checksum_halves_are_never_joined(tmp_path):
    with Site() as site:
        site.answers = [lambda h, s: site.usual(h, s, 100_000)]
        assert fetch(site, tmp_path, sums={}, size=0).read_bytes() == BODY and starts(site) == [0, 0]
    with Site() as site, pytest.raises(ValueError, match='more than 1,000 bytes'): fetch(site, tmp_path / 'b', sums={}, size=0, most=1000)


def test_no_network_is_one_line(tmp_path):
    with Site() as site: url = site.url
    known = BeirSet('gone', addresses=(url,), bytes=10, sha256='0')
    with pytest.raises(ValueError) as told: beir_folder(known, tmp_path, tries=2, sleep=lambda s: None)
    assert '\n' not in str(told.value) and 'no connection' in str(told.value) and 'copy a BEIR folder to' in str(told.value)
    assert not (tmp_path / 'gone').exists()
    with pytest.raises(ValueError, match='no address.*copy a BEIR folder to .*/miracl-hi'): beir_folder('miracl-hi', tmp_path)


PROGRAM = """
import sys
from lab_lm.text.download import download
print('ready', flush=True)
download([sys.argv[1]], sys.argv[2], int(sys.argv[3]), sha256=sys.argv[4])
print('done', flush=True)
"""


def test_killed_in_the_middle_and_called_twice_at_once(tmp_path):
    def start(): return subprocess.Popen([sys.executable, '-c', PROGRAM, site.url, str(tmp_path / 'x.zip'), str(len(BODY)), SUMS['sha256']], stdout=subprocess.PIPE, text=True,
                                         env={**os.environ, 'IN_TEST': '1'})
    with Site() as site:
        def slow(h, s): site.usual(h, s, 120_000); h.wfile.flush(); time.sleep(20)
        site.answers = [slow]
        first, part = start(), tmp_path / '.x.zip.part'
        for _ in range(600):
            if part.exists() and part.stat().st_size == 120_000: break
            time.sleep(.05)
        first.send_signal(signal.SIGKILL); first.wait(); first.stdout.close()
        assert part.stat().st_size == 120_000 and not (tmp_path / 'x.zip').exists()
        both = [start(), start()]
        assert [p.communicate(timeout=60)[0].split() for p in both] == [['ready', 'done']] * 2 and [p.returncode for p in both] == [0, 0]
        assert starts(site) == [0, 120_000] and (tmp_path / 'x.zip').read_bytes() == BODY, 'one of the two waited and found it there'


# archives

def zipped(files, **how):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, body in files.items() if isinstance(files, dict) else files: z.writestr(name, body)
    return out.getvalue()


def link(name, to):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return zipped([(info, to)])


def locked(body):
    "The same archive with the bit set that says a file is encrypted"
    at = body.index(b'PK\x01\x02')
    return body[:6] + bytes([body[6] | 1]) + body[7:at + 8] + bytes([body[at + 8] | 1]) + body[at + 9:]


def twisted(body):
    "One bit of the content changed"
    at = body.index(b'PK\x01\x02') - 3
    return body[:at] + bytes([body[at] ^ 4]) + body[at + 1:]


@pytest.mark.parametrize('body, told', [
    (zipped({'../out.txt': 'x'}), 'leaves the folder'), (zipped({'/out.txt': 'x'}), 'leaves the folder'), (zipped({'a/../../out.txt': 'x'}), 'leaves the folder'),
    (zipped({'..\\out.txt': 'x'}), 'leaves the folder'), (zipped({'c:out.txt': 'x'}), 'leaves the folder'), (zipped({'a\nb': 'x'}), 'leaves the folder'),
    (link('in.txt', '/etc/passwd'), 'a link'), (locked(zipped({'in.txt': 'x' * 50})), 'a locked file'),
    (zipped({'in.txt': b'0' * 2_000_000}), 'more than 1,000,000'), (zipped({'in.txt': 'x'})[:-9], 'no whole zip file'), (b'<html>', 'no whole zip file'),
    (twisted(zipped({'in.txt': bytes(range(256))})), 'no whole zip file'),
])
def test_hostile_archives_write_nothing_outside(tmp_path, body, told):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'x.zip').write_bytes(body)
    with pytest.raises(ValueError, match=told): unzip(tmp_path / 'x.zip', tmp_path / 'in' / 'deep', most=1_000_000)
    assert left(tmp_path) == ['in', 'x.zip'] and left(tmp_path / 'in') in ([], ['deep'])


def test_a_size_that_lies_is_met_while_unpacking(tmp_path):
    body = bytearray(zipped({'in.txt': b'0' * 5_000_000}))
    for at, where in ((0, 22), (bytes(body).index(b'PK\x01\x02'), 24)): body[at + where:at + where + 4] = (10).to_bytes(4, 'little')
    (tmp_path / 'x.zip').write_bytes(body)
    with pytest.raises(ValueError, match='no whole zip file'): unzip(tmp_path / 'x.zip', tmp_path / 'in', most=1000)
    assert sum(p.stat().st_size for p in (tmp_path / 'in').rglob('*') if p.is_file()) <= 10


def rows(texts): return ''.join(json.dumps({'_id': k, 'title': '', 'text': v}, ensure_ascii=False) + '\n' for k, v in texts.items())
def beir_zip(*parts, root='set'):
    "An archive in BEIR form: one task, or one for each part"
    files = {'__MACOSX/._x': 'x', f'{root}/notes.pdf': 'x'}
    for part in parts or ('',):
        at = f'{root}/{part}/' if part else f'{root}/'
        files |= {f'{at}corpus.jsonl': rows({'d1': 'एक', 'd2': 'दो'}), f'{at}queries.jsonl': rows({'q1': 'क्या', 'q2': 'कौन'}), f'{at}qrels/test.tsv': 'query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\tgone\t1\n',
                  f'{at}qrels/dev.tsv': 'q1\td2\t1\n'}
    return zipped(files)


def known(site, name='set', **how): return BeirSet(name, addresses=(site.url,), sha256=hashlib.sha256(site.body).hexdigest(), **{'lang': 'hi', **how})


def test_a_set_is_fetched_unpacked_and_read(tmp_path):
    with Site(beir_zip()) as site:
        tasks = read_set(known(site, documents=2, queries=2), cache=tmp_path)
        task = tasks['set']
        assert (task.lang, task.split, task.absent, len(task.corpus)) == ('hi', 'test', ['gone'], 2)
        assert '2 passages (1 judged ones are absent, and count)' in retrieval_score(task, {}, 'nothing').protocol
        assert len(read_set(known(site), 'dev', cache=tmp_path, stream=True)['set'].qrels) == 1 and len(site.asked) == 1
    source = json.loads((tmp_path / 'set' / 'source.json').read_text())
    assert source['sha256'] == hashlib.sha256(site.body).hexdigest() and source['checked'] == ['sha256'] and source['addresses'] == [site.url]
    assert sorted(p.relative_to(tmp_path / 'set').as_posix() for p in (tmp_path / 'set').rglob('*') if p.is_file()) == ['corpus.jsonl', 'qrels/dev.tsv', 'qrels/test.tsv', 'queries.jsonl', 'source.json']
    assert not [p for p in tmp_path.rglob('*') if p.suffix in ('.zip', '.part')]


def test_an_archive_of_several_tasks_gives_each(tmp_path):
    with Site(beir_zip('android', 'english')) as site:
        tasks = read_set(known(site, 'stack', documents=4, queries=4), cache=tmp_path)
    assert list(tasks) == ['stack/android', 'stack/english'] and all(t.name == n for n, t in tasks.items())


def test_a_copy_by_hand_serves_and_is_counted(tmp_path):
    with Site(beir_zip()) as site: beir_folder(known(site), tmp_path)
    (tmp_path / 'set' / 'source.json').unlink()
    assert read_set(BeirSet('set', documents=2), cache=tmp_path)
    with pytest.raises(ValueError, match='has 2 documents instead of 5,183'): read_set(BeirSet('set', documents=5183), cache=tmp_path)
    assert read_set(BeirSet('set', documents=2, queries=300), 'dev', cache=tmp_path), 'published counts are on the published split'


def test_an_archive_without_a_task_leaves_no_folder(tmp_path):
    with Site(zipped({'set/readme.txt': 'x'})) as site, pytest.raises(ValueError, match='holds no corpus.jsonl'): beir_folder(known(site), tmp_path)
    assert not (tmp_path / 'set').exists() and not list(tmp_path.glob('.*.part'))


def test_questions_and_paragraphs_become_a_task(tmp_path):
    paragraphs = [{'context': 'गंगा', 'qas': [{'id': 'a', 'question': 'नदी?'}, {'id': 'b', 'question': 'कौन?'}]}, {'context': 'यमुना', 'qas': [{'id': 'c', 'question': 'कौन?'}]}]
    with Site(json.dumps({'data': [{'paragraphs': paragraphs}]}).encode()) as site: task = read_set(known(site, form='squad'), cache=tmp_path)['set']
    assert task.corpus == {'d0': 'गंगा', 'd1': 'यमुना'} and task.queries == {'q0': 'नदी?', 'q1': 'कौन?'} and task.qrels == {'q0': {'d0': 1}, 'q1': {'d0': 1, 'd1': 1}}
    lines = ''.join(json.dumps({'link': 'x', 'question_number': n, 'flores_passage': p, 'question': q, 'dialect': 'tam_Taml'}, ensure_ascii=False) + '\n'
                    for n, p, q in ((1, 'காடு', 'எது?'), (2, 'காடு', 'யார்?'), (1, 'கடல்', 'எங்கே?')))
    with Site(zipped({'Belebele/hin_Deva.jsonl': '', 'Belebele/tam_Taml.jsonl': lines, '__MACOSX/Belebele/._tam_Taml.jsonl': 'x'})) as site:
        task = read_set(known(site, 'ta', form='belebele', lang='ta', member='tam_Taml'), cache=tmp_path)['ta']
        assert list(task.corpus.values()) == ['காடு', 'கடல்'] and len(task.queries) == 3 and task.lang == 'ta'
        with pytest.raises(ValueError, match='not in the form of belebele'): read_set(known(site, 'te', form='belebele', member='tel_Telu'), cache=tmp_path)
        assert len(site.asked) == 1, 'the archive of many languages is fetched once'
    assert not (tmp_path / 'te').exists()


# names

def test_the_presets_hold_together():
    told, sets = yaml.safe_load((presets() / 'beir.yaml').read_text(encoding='utf-8')), beir_sets()
    assert set(told) == {'suites', 'sources', 'systems', 'addresses', 'sets'}
    assert all(name in sets for suite in told['suites'].values() for name in suite) and not set(told['suites']) & set(sets)
    assert set(told['suites']['quick']) < set(told['suites']['standard']) < set(told['suites']['full'])
    assert all(source in told['sources'] for source, _ in told['systems'].values())
    for name, s in sets.items():
        assert s.licence and s.about and s.documents and (s.addresses or s.form == 'hand') and all(a.startswith('https://') and '{' not in a for a in s.addresses), name
        assert not s.md5 or len(s.md5) == 32 and int(s.md5, 16) >= 0
        assert not s.sha256 or len(s.sha256) == 64 and int(s.sha256, 16) >= 0
        assert s.form != 'beir' or s.md5 and s.bytes and s.queries, name
        assert all(system in told['systems'] and 1 < value < 100 for system, value in s.published.items()), name
        assert all(0 < value < 1 and source for value, source in published(name).values())


def test_published_numbers_are_those_of_the_sources():
    "Spot checks against the tables they were copied from"
    assert {s: published(s)['bm25s'][0] for s in ('scifact', 'nfcorpus', 'arguana', 'xquad-hi', 'belebele-ta')} == \
        {'scifact': .6874, 'nfcorpus': .3208, 'arguana': .4928, 'xquad-hi': .7511, 'belebele-ta': .5496}
    assert published('arguana')['BM25 flat'] == (.397, 'Pyserini, 2cr/beir.yaml') and published('scifact')['all-MiniLM-L6-v2'][0] == .6451


def test_names_stand_for_sets(tmp_path):
    assert set_names('quick') == ['scifact', 'nfcorpus'] and set_names('nfcorpus, quick') == ['nfcorpus', 'scifact']
    for bad, told in (('nfcorpsu', "did you mean 'nfcorpus'"), ('', "no set or suite ''"), ('quick,zzz', "no set or suite 'zzz'")):
        with pytest.raises(ValueError, match=told): set_names(bad)
    with Site(beir_zip()) as site:
        beir_folder(known(site, 'belebele-hi'), tmp_path)
        beir_folder(known(site, 'belebele-ta'), tmp_path)
    for name in ('belebele-hi', 'belebele-ta'): assert digest(tmp_path / name / 'corpus.jsonl')
    tasks = find_tasks('belebele-hi,belebele-ta', lang='ta', cache=tmp_path)
    assert list(tasks) == ['belebele-ta'] and tasks['belebele-ta'].lang == 'ta'
    with pytest.raises(ValueError, match="no set of 'quick' is in 'kn'"): find_tasks('quick', lang='kn')
    with pytest.raises(ValueError, match='nothing found at'): find_tasks('data/nothing')
