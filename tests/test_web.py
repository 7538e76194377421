"Hostile and broken sites against a server on this machine: nothing hangs, fills the disk, or leaves its folder"
import gzip
import http.server
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

httpx = pytest.importorskip('httpx', reason='needs httpx: pip install "lab_lm[web]"')
pytest.importorskip('protego', reason='needs protego: pip install "lab_lm[web]"')
pytest.importorskip('trafilatura', reason='needs trafilatura: pip install "lab_lm[web]"')

from lab_lm.text import fetch, web  # noqa: E402
from lab_lm.text.fetch import Fetcher, Manners  # noqa: E402
from lab_lm.text import gather as gathering  # noqa: E402
from lab_lm.text.gather import gather  # noqa: E402
from lab_lm.text.guard import Refused, page_text  # noqa: E402
from lab_lm.text.web import RETRY, category_titles, main_text, pages, stories  # noqa: E402

HINDI = 'बारिश के बाद सारे खेत हरे हो गए और किसान बहुत ख़ुश हुए। '
TAMIL = 'மழைக்குப் பிறகு வயல்கள் எல்லாம் பசுமையாக மாறின. '
def article(text, extra=''): return f'<html><head><title>पन्ना</title></head><body><article><p>{text * 4}</p>{extra}</article></body></html>'.encode()


class Site:
    "A server whose answers are written down as functions of the handler"
    def __init__(self): self.routes, self.asked = {'/robots.txt': lambda h: self.send(h, b'', 404)}, []

    @staticmethod
    def send(h, body, status=200, kind='text/html; charset=utf-8', **headers):
        h.send_response(status)
        for k, v in {'Content-Type': kind, 'Content-Length': str(len(body)), **{k.replace('_', '-'): v for k, v in headers.items()}}.items():
            if v is not None: h.send_header(k, v)
        h.end_headers()
        h.wfile.write(body)

    def page(self, path, body, **kw): self.routes[path] = lambda h: self.send(h, body, **kw)

    def start(self):
        site = self
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                site.asked.append(self.path)
                answer = site.routes.get(self.path) or site.routes.get(self.path.split('?')[0]) or (lambda h: site.send(h, b'', 404))
                try: answer(self)
                except OSError: pass
            def log_message(self, *args): pass
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.base = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, args=(.05,), daemon=True).start()
        return self


@pytest.fixture
def site():
    try:
        one = Site().start()
        socket.create_connection(one.server.server_address, timeout=5).close()
    except OSError as e: pytest.skip(f'this machine has no loopback network: {e}')
    yield one
    one.server.shutdown()
    one.server.server_close()


def fetcher(cache=None, sleep=lambda s: None, resolve=socket.getaddrinfo, **kw):
    manners = dict(delay=0, pause=0, tries=2, read_timeout=.5, total_timeout=.8, max_bytes=200_000, inner=('127.0.0.1',)) | {k: kw.pop(k) for k in list(kw) if k in Manners.__dataclass_fields__}
    return Fetcher(Manners(**manners), cache, sleep=sleep, resolve=resolve, **kw)


def refusal(f, *args, **kw):
    with pytest.raises(Refused) as e: f(*args, **kw)
    return e.value


# --- size and time -------------------------------------------------------------------------------------------------------------------------

def test_a_bomb_is_not_unpacked(site):
    site.page('/bomb', gzip.compress(bytes(100_000_000)), Content_Encoding='gzip')
    site.page('/twice', gzip.compress(gzip.compress(bytes(50_000_000))), Content_Encoding='gzip, gzip')
    site.page('/brotli', b'x', Content_Encoding='br')
    site.page('/torn', gzip.compress(article(HINDI))[:-10], Content_Encoding='gzip')
    site.page('/good', gzip.compress(article(HINDI)), Content_Encoding='gzip')
    reader = fetcher()
    tracemalloc.start()
    assert refusal(reader.get, site.base + '/bomb').reason == 'too large'
    assert [refusal(reader.get, site.base + p).reason for p in ('/twice', '/brotli', '/torn')] == ['packing not accepted', 'packing not accepted', 'cut off']
    assert reader.get(site.base + '/good').body == article(HINDI)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000, f'{peak:,} bytes were taken'


def test_a_length_that_lies_changes_nothing(site):
    def endless(h, length):
        h.send_response(200); h.send_header('Content-Type', 'text/html')
        if length: h.send_header('Content-Length', length)
        h.end_headers()
        for _ in range(16_000): h.wfile.write(b'x' * 65536)
    site.routes['/honest'] = lambda h: endless(h, '1000000000')
    site.routes['/none'] = lambda h: endless(h, None)
    site.routes['/digits'] = lambda h: endless(h, '9' * 5000)
    site.routes['/short'] = lambda h: Site.send(h, b'x' * 100, Content_Length='50')
    site.routes['/long'] = lambda h: Site.send(h, b'x' * 100, Content_Length='500')
    start = time.monotonic()
    reader = fetcher()
    assert [refusal(reader.get, site.base + p).reason for p in ('/honest', '/none')] == ['too large', 'too large']
    assert refusal(reader.get, site.base + '/digits').reason in ('too large', 'broken answer')
    assert len(reader.get(site.base + '/short').body) == 50
    assert refusal(reader.get, site.base + '/long').reason == 'broken answer'
    assert time.monotonic() - start < 5


def test_a_body_or_a_header_that_drips_is_left_when_time_is_over(site):
    def drip(h, opening):
        h.wfile.write(opening)
        for _ in range(1000):
            h.wfile.write(b'x'); h.wfile.flush(); time.sleep(.1)
    site.routes['/body'] = lambda h: drip(h, b'HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n')
    site.routes['/header'] = lambda h: drip(h, b'HTTP/1.1 200 OK\r\nX-Slow: ')
    site.routes['/silent'] = lambda h: time.sleep(2)
    for path, limit in (('/body', 1.4), ('/header', 1.4), ('/silent', 1.1)):
        start = time.monotonic()
        assert refusal(fetcher(tries=1).get, site.base + path, api=True).reason == 'too slow'
        assert time.monotonic() - start < limit, path
    start = time.monotonic()
    assert refusal(fetcher(tries=1, total_timeout=.3, read_timeout=60.).get, site.base + '/silent', api=True).reason == 'too slow'
    assert time.monotonic() - start < 1


def test_a_page_built_to_be_slow_is_stopped():
    attributes = '<p ' + ' '.join(f'a{n}=1' for n in range(150_000)) + f'>{HINDI * 10}</p>'
    start = time.monotonic()
    assert refusal(main_text, attributes, seconds=1.).reason == 'parsing took too long'
    assert time.monotonic() - start < 4


# --- where a request may go -----------------------------------------------------------------------------------------------------------------

def test_nothing_private_is_asked_by_name_address_or_redirect(site):
    port, reader = site.server.server_port, fetcher()
    for n, target in enumerate((f'http://localhost:{port}/secret', f'http://127.0.0.2:{port}/secret', f'http://[::1]:{port}/secret', 'http://169.254.169.254/latest/meta-data', f'http://2130706433:{port}/secret')):
        site.page(f'/{n}', b'', status=302, Location=target)
        assert refusal(reader.get, f'{site.base}/{n}', api=True).reason in ('private address', 'no such host'), target
    for n, target in enumerate(('file:///etc/passwd', 'gopher://x/', 'http://u:p@example.org/', 'http://[::1', 'http://x:99999/')):
        site.page(f'/bad{n}', b'', status=302, Location=target)
        assert refusal(reader.get, f'{site.base}/bad{n}', api=True).reason in ('not a web address', 'password in the address', 'broken answer'), target
    assert refusal(fetcher(inner=()).get, site.base + '/0').reason == 'private address'
    assert '/secret' not in site.asked


def test_a_name_that_changes_its_address_is_connected_to_where_it_was_checked(site):
    "The name server says a public address first and ours later; the socket must go to the checked one"
    answers, connected = [['203.0.113.7'], ['8.8.8.8'], ['127.0.0.1']], []
    def resolve(host, port, type): return [(None, None, None, '', (a, port)) for a in answers.pop(0)]
    import httpcore
    class Backend:
        def connect_tcp(self, host, *args): connected.append(host); raise httpcore.ConnectError('nobody there')
    real, httpcore.SyncBackend = httpcore.SyncBackend, Backend
    try:
        assert refusal(fetcher(resolve=resolve, tries=1).get, 'http://rebind.example/', api=True).reason == 'private address' # 203.0.113.0/24 is for documentation
        assert refusal(fetcher(resolve=resolve, tries=2).get, 'http://rebind.example/', api=True).reason == 'private address'
    finally: httpcore.SyncBackend = real
    assert connected == ['8.8.8.8'] and not answers


def test_redirects_end(site):
    site.page('/a', b'', status=301, Location='/b')
    site.page('/b', b'', status=302, Location='/a')
    for n in range(20): site.page(f'/n{n}', b'', status=307, Location=f'/n{n + 1}')
    site.page('/n4', article(HINDI))
    assert refusal(fetcher().get, site.base + '/a').reason == 'redirect loop'
    assert fetcher().get(site.base + '/n0').final == site.base + '/n4'
    site.page('/n4', b'', status=307, Location='/n5')
    assert refusal(fetcher().get, site.base + '/n0').reason == 'too many redirects'


def test_nothing_is_written_outside_the_cache(site, tmp_path):
    names = ['/../../outside', '/%2e%2e/%2e%2e/outside', '/a/../../../b', '/x?f=../../outside', '/nul%00', '/' + 'l' * 1500]
    for name in names: site.page(name, article(HINDI), Content_Disposition='attachment; filename="../../../outside.html"')
    site.routes['/outside'] = site.routes['/b'] = site.routes[names[0]]
    reader = fetcher(tmp_path / 'in' / 'cache')
    for name in names: reader.get(site.base + name)
    files = [p for p in tmp_path.rglob('*') if p.is_file()]
    assert files and all(p.parent.parent == tmp_path / 'in' / 'cache' and len(p.name) == 67 and p.suffix == '.gz' for p in files)
    assert not list(tmp_path.rglob('*outside*')) and not list(tmp_path.rglob('*.part'))


def test_cookies_and_passwords_of_the_environment_stay_at_home(site, tmp_path, monkeypatch):
    seen = []
    def note(h): seen.append(dict(h.headers)); Site.send(h, article(HINDI), Set_Cookie='id=1')
    site.routes['/1'] = site.routes['/2'] = note
    (tmp_path / 'netrc').write_text('machine 127.0.0.1 login me password secret\n'); (tmp_path / 'netrc').chmod(0o600)
    monkeypatch.setenv('NETRC', str(tmp_path / 'netrc')); monkeypatch.setenv('HTTP_PROXY', 'http://127.0.0.1:9')
    reader = fetcher(contact='https://example.org/crawl')
    for n in (1, 2): reader.get(f'{site.base}/{n}')
    assert len(seen) == 2 and not any({'cookie', 'authorization', 'referer'} & {k.lower() for k in h} for h in seen)
    assert seen[0]['User-Agent'].startswith('lab_lm/') and 'example.org/crawl' in seen[0]['User-Agent']


# --- robots.txt, turns and second tries --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('text, path, allowed', [
    ('User-agent: *\nDisallow: /', '/page', False), ('User-agent: lab_lm\nDisallow: /page\n\nUser-agent: *\nAllow: /', '/page', False),
    ('User-agent: other\nDisallow: /', '/page', True), ('User-agent: *\nDisallow: /p*e$', '/page', False), ('User-agent: *\nDisallow: /\nAllow: /page', '/page', True),
    ('\0\x01\xff binary \xfe', '/page', True), ('<html>Disallow: /</html>', '/page', True), ('\ufeffUser-agent: *\nDisallow: /', '/page', False),
    ('User-agent: *\nCrawl-delay: soon\nDisallow: /page', '/page', False), ('# x\n' * 120_000 + 'User-agent: *\nAllow: /' + 'x' * 1_000_000, '/page', True),
    ('User-agent: *\nDisallow: /page\n' + '# x\n' * 200_000, '/page', False), ('User-agent: *\nDisallow: /' + 'a*' * 5000 + '\n', '/page', True)])
def test_robots_are_read_and_broken_ones_survived(site, text, path, allowed):
    site.page('/robots.txt', text.encode('utf-8', 'surrogateescape'), kind='text/plain')
    site.page('/page', article(HINDI))
    if allowed: assert fetcher().get(site.base + path).body
    else: assert refusal(fetcher().get, site.base + path).reason == 'forbidden by robots.txt' and path not in site.asked


@pytest.mark.parametrize('status, allowed', [(404, True), (401, True), (403, True), (500, False), (503, False), (429, False)])
def test_robots_out_of_order(site, status, allowed):
    site.page('/robots.txt', b'', status=status); site.page('/page', article(HINDI))
    if allowed: assert fetcher().get(site.base + '/page').body
    else: assert refusal(fetcher().get, site.base + '/page').reason == 'robots.txt out of reach' and '/page' not in site.asked


def test_robots_are_asked_again_after_a_day_and_after_a_failure(site):
    now = [0.]
    site.page('/robots.txt', b'', status=500); site.page('/page', article(HINDI))
    reader = fetcher(clock=lambda: now[0], tries=1)
    assert refusal(reader.get, site.base + '/page').later
    site.page('/robots.txt', b'User-agent: *\nDisallow:')
    assert refusal(reader.get, site.base + '/page').reason == 'robots.txt out of reach'
    now[0] = 601
    reader.get(site.base + '/page'); reader.get(site.base + '/page')
    now[0] += 86_401
    reader.get(site.base + '/page')
    assert site.asked.count('/robots.txt') == 3


def test_a_redirect_does_not_lead_around_robots(site):
    site.page('/robots.txt', b'User-agent: *\nDisallow: /secret'); site.page('/open', b'', status=302, Location='/secret')
    assert refusal(fetcher().get, site.base + '/open').reason == 'forbidden by robots.txt' and '/secret' not in site.asked


def test_second_tries(site):
    left = {'/busy': 2, '/full': 1, '/never': 10**6}
    def answer(path, status, **headers):
        def send(h):
            left[path] -= 1
            if left[path] >= 0: Site.send(h, b'', status, **headers)
            else: Site.send(h, article(HINDI))
        return send
    site.routes.update({'/busy': answer('/busy', 500), '/full': answer('/full', 429, Retry_After='4'), '/never': answer('/never', 502)})
    now, waits = [0.], []
    def sleep(seconds): waits.append(seconds); now[0] += seconds
    reader = fetcher(tries=4, pause=1, delay=0, sleep=sleep, clock=lambda: now[0])
    assert reader.get(site.base + '/busy').body and site.asked.count('/busy') == 3
    assert 1 <= waits[0] <= 1.5 and 2 <= waits[1] <= 3 and len(waits) == 2
    waits.clear()
    assert reader.get(site.base + '/full').body and waits == [4.]
    error = refusal(reader.get, site.base + '/never')
    assert (error.reason, error.later, site.asked.count('/never')) == ('status 502', True, 4)
    site.page('/hours', b'', status=503, Retry_After='99999')
    assert refusal(reader.get, site.base + '/hours').reason == 'asked to wait too long' and site.asked.count('/hours') == 1
    site.page('/gone', b'', status=410)
    assert not refusal(reader.get, site.base + '/gone').later and site.asked.count('/gone') == 1


def test_one_host_is_asked_in_turn(site):
    at, now = [], [0.]
    def sleep(seconds): now[0] += seconds
    def note(h): at.append(now[0]); Site.send(h, article(HINDI))
    for n in range(4): site.routes[f'/{n}'] = note
    site.page('/robots.txt', b'User-agent: *\nCrawl-delay: 5')
    reader = fetcher(delay=2, sleep=sleep, clock=lambda: now[0])
    for n in range(4): reader.get(f'{site.base}/{n}')
    assert [b - a for a, b in zip(at, at[1:])] == [5., 5., 5.]
    site.page('/robots.txt', b'User-agent: *\nCrawl-delay: 100000')
    assert refusal(fetcher().get, site.base + '/0').reason == 'crawl-delay too long'


# --- what pages hold ------------------------------------------------------------------------------------------------------------------------------

def test_scripts_are_neither_run_nor_kept(site, tmp_path):
    extra = f'<script>document.write("EVIL")</script><img src=x onerror="EVIL()"><style>EVIL</style><iframe src="EVIL"></iframe><!-- EVIL --><noscript>EVIL</noscript><template>EVIL</template><p hidden>EVIL</p><p>{HINDI}</p>'
    site.page('/page', article(HINDI, extra)); site.page('/xml', b'<?xml version="1.0" encoding="latin-1"?>' + article(HINDI), kind='application/xhtml+xml')
    site.page('/entity', b'<!DOCTYPE html [<!ENTITY a SYSTEM "file:///etc/passwd"><!ENTITY b "&a;&a;&a;&a;">]>' + article(HINDI, '<p>&b;</p>'))
    found = list(pages([site.base + p for p in ('/page', '/xml', '/entity')], fetcher(), 'hi', report=Counter()))
    assert len(found) == 3 and not any('EVIL' in r.text or 'root:' in r.text or '<' in r.text for r in found) and found[0].text.count('किसान') == 5


def test_charsets(site):
    site.page('/latin', article(TAMIL), kind='text/html; charset=iso-8859-1')
    site.page('/meta', article(TAMIL).replace(b'<head>', b'<head><meta charset="windows-1252">'), kind='text/html')
    site.page('/utf16', article(TAMIL).decode().encode('utf-16'), kind='text/html; charset=utf-16')
    old = bytes(random.randrange(0xA1, 0xFF) for _ in range(600))
    site.page('/tscii', b'<p>' + old, kind='text/html; charset=tscii'); site.page('/iscii', b'<p>' + old, kind='text/html; charset=x-iscii-de')
    site.page('/none', b'<p>' + old, kind='text/html'); site.page('/user', b'<meta charset=x-user-defined><p>' + old, kind='text/html'); site.page('/lied', b'<p>' + old * 3, kind='text/html; charset=iso-8859-1')
    report = Counter()
    found = list(pages([site.base + p for p in ('/latin', '/meta', '/utf16', '/tscii', '/iscii', '/none', '/user', '/lied')], fetcher(), 'ta', report=report, min_chars=20))
    assert len({r.text for r in found}) == 1 and len(found) == 3 and TAMIL.strip() in found[0].text
    assert report['encoding not decodable'] >= 4 and sum(report.values()) == 5 and not report[RETRY]


def test_random_bytes_and_random_html_never_raise():
    for _ in range(60):
        body = random.randbytes(random.randrange(2000))
        answer = fetch.Answer('u', 'u', 'text/html', random.choice(['', 'utf-8', 'latin-1', 'utf-16', 'big5', 'zlib', 'idna']), '', body)
        try: main_text(page_text(answer))
        except Refused: pass
        tags = ''.join(random.choice(['<p>', '</p', '<table><tr>', '<!--', '-->', '<script>', '&#', '&amp;', '\0', '<div a="', '>', HINDI, '<![CDATA[', '\ud7ff', '<svg>', '<h1>']) for _ in range(200))
        assert isinstance(main_text(tags)[1], str) and isinstance(web.visible_text(tags), str)


def test_hostile_answers_of_a_story_service(site):
    listing = {'data': [dict(id=1, slug='../../etc/passwd'), dict(id=2, slug='good'), 'x', None, dict(id=3), dict(id=4, slug={'a': 1}), dict(id=5, slug='shape')], 'metadata': {'hits': 10**12}}
    site.page('/api/v1/books-search', json.dumps(listing).encode(), kind='application/json') # the same page for ever
    site.page('/api/v1/stories/good/read', json.dumps({'data': {'pages': [dict(html=f'<p>{HINDI}</p>'), 7, dict(html=None)]}}).encode(), kind='application/json')
    site.page('/api/v1/stories/shape/read', b'[' * 100_000, kind='application/json')
    report = Counter()
    found = list(stories('hi', fetcher(), base=site.base + '/api/v1', report=report))
    assert [r.id for r in found] == ['story-2'] and sum(report.values()) - report[RETRY] == 3
    assert not any('etc/passwd' in a for a in site.asked) and len([a for a in site.asked if 'books-search' in a]) == 2
    site.page('/api/v1/books-search', b'', status=500)
    assert list(stories('hi', fetcher(), base=site.base + '/api/v1', report=report)) == [] and report['listing: status 500'] == 1


def test_a_category_that_never_ends_its_list_does(site):
    answer = {'continue': {'cmcontinue': 'same'}, 'query': {'categorymembers': [dict(ns=0, title='एक'), dict(ns=14, title='Category:x'), dict(ns=0, title='एक')]}}
    site.page('/w/api.php', json.dumps(answer).encode(), kind='application/json')
    assert list(category_titles('x', fetcher(), site.base + '/w/api.php', 3)) == ['एक']
    assert len(site.asked) == 2


def test_the_cache_holds_no_answer_that_was_an_error(site, tmp_path):
    site.page('/w/api.php', json.dumps({'error': {'code': 'maxlag'}}).encode(), kind='application/json')
    reader = fetcher(tmp_path)
    assert refusal(list, category_titles('x', reader, site.base + '/w/api.php')).reason == 'not the expected JSON'
    site.page('/w/api.php', json.dumps({'query': {'categorymembers': [dict(ns=0, title='एक')]}}).encode(), kind='application/json')
    assert list(category_titles('x', reader, site.base + '/w/api.php')) == ['एक']


def test_a_damaged_cache_file_is_read_anew(site, tmp_path):
    site.page('/page', article(HINDI))
    fetcher(tmp_path).get(site.base + '/page')
    file = next(tmp_path.rglob('*.gz'))
    whole = file.read_bytes()
    for bad in (b'', whole[:-5], whole[:20], b'x' + whole[1:], whole[:40] + bytes([whole[40] ^ 255]) + whole[41:]):
        file.write_bytes(bad)
        assert refusal(fetcher(tmp_path, offline=True).get, site.base + '/page').reason == 'not in the cache'
        assert fetcher(tmp_path).get(site.base + '/page').body == article(HINDI)


# --- interruption -------------------------------------------------------------------------------------------------------------------------------

KILLED = '''
import sys
from lab_lm.text.fetch import Fetcher, Manners
from lab_lm.text.web import pages
base, log, cache = sys.argv[1:]
reader = Fetcher(Manners(delay=0, pause=0, inner=('127.0.0.1',)), cache)
for n, record in enumerate(pages([f'{base}/{n}' for n in range(12)], reader, 'hi', log), 1): print(n, flush=True)
'''

def test_a_killed_run_taken_up_again_gives_the_records_of_one_go(site, tmp_path):
    for n in range(12): site.page(f'/{n}', article(HINDI + f'पन्ना {n}। ') if n % 4 else b'<p>no', status=200 if n % 3 else 404)
    urls = [f'{site.base}/{n}' for n in range(12)]
    whole = Counter()
    expected = list(pages(urls, fetcher(), 'hi', report=whole))
    assert len(expected) == 6
    env = dict(os.environ, IN_TEST='1', PYTHONPATH=str(Path(__file__).resolve().parent.parent))
    run = subprocess.Popen([sys.executable, '-c', KILLED, site.base, str(tmp_path / 'log.jsonl'), str(tmp_path / 'cache')], stdout=subprocess.PIPE, env=env)
    for line in run.stdout:
        if line.strip() == b'3': break
    run.kill(); run.wait(); run.stdout.close()
    with open(tmp_path / 'log.jsonl', 'ab') as f: f.write(b'{"url": "torn')
    before, report = len(site.asked), Counter()
    assert list(pages(urls, fetcher(), 'hi', tmp_path / 'log.jsonl', report)) == expected and report == whole
    assert len(site.asked) - before <= 7, 'the three records came from the first six pages, which are not asked for again'
    before = len(site.asked)
    assert list(pages(urls, fetcher(tmp_path / 'cache', offline=True), 'hi', tmp_path / 'log.jsonl')) == expected and len(site.asked) == before


def test_a_site_that_is_away_does_not_cost_every_page_its_patience():
    asked, report = [], Counter()
    def away(request): asked.append(request.url.path); raise httpx.ConnectError('no network')
    reader = Fetcher(Manners(delay=0, pause=0, tries=1), transport=httpx.MockTransport(away), sleep=lambda s: None, clock=iter(range(0, 10**9, 1000)).__next__)
    assert list(pages([f'http://example.org/{n}' for n in range(500)], reader, 'hi', report=report)) == []
    assert len(asked) == 10 and report[RETRY] == 500 and report['out of reach'] == 490


def test_a_busy_source_is_finished_by_the_next_call(site, tmp_path):
    for n in range(3): site.page(f'/{n}', article(HINDI + str(n)))
    good = site.routes['/1']
    site.page('/1', b'', status=503)
    rows = [dict(name='news', kind='web', lang='hi', urls=[f'{site.base}/{n}' for n in range(3)])]
    assert len(list(gather(rows, tmp_path, fetcher=fetcher(tmp_path / '.web')).records())) == 2
    site.routes['/1'] = good
    assert len(list(gather(rows, tmp_path, fetcher=fetcher(tmp_path / '.web')).records())) == 3
    before = len(site.asked)
    assert len(list(gather(rows, tmp_path, fetcher=fetcher(tmp_path / '.web')).records())) == 3 and len(site.asked) == before


# --- gathering ---------------------------------------------------------------------------------------------------------------------

def test_the_second_call_does_not_call_the_loader_and_force_does(tmp_path, monkeypatch):
    calls = []
    def loader(name, lang, fetcher, report, path, errors='strict'):
        calls.append(name)
        return gathering.from_files(name, lang, fetcher, report, path, errors)
    monkeypatch.setitem(gathering.LOADERS, 'files', loader)
    file = tmp_path / 'texts.jsonl'
    file.write_text(json.dumps(dict(id='1', text=HINDI, lang='hi'), ensure_ascii=False) + '\n', encoding='utf-8')
    (tmp_path / 'all.yaml').write_text(f'sources:\n- {{name: mine, kind: files, path: {file}}}\n', encoding='utf-8')
    def run(**kw): return list(gather(tmp_path / 'all.yaml', tmp_path / 'raw', **kw).records())
    first = run()
    assert run() == first and calls == ['mine'] and (first[0].id, first[0].text, first[0].lang) == ('mine:1', HINDI, 'hi')
    assert run(force=True) == first and len(calls) == 2
    file.write_text(file.read_text(encoding='utf-8').replace('"1"', '"2"').replace('खेत', 'खेत और बाग़'), encoding='utf-8')
    assert run()[0].id == 'mine:2' and len(calls) == 3, 'an edited file is noticed'
    assert sorted(p.name for p in (tmp_path / 'raw' / 'mine').iterdir()) == ['manifest.json', 'records.jsonl.gz']


@pytest.mark.parametrize('error', [ValueError('bad row'), OSError('disk'), TypeError('a fault of ours'), KeyError('x'), MemoryError(), RecursionError()])
def test_a_failing_source_is_named_and_leaves_nothing_half_done(tmp_path, monkeypatch, error):
    def loader(name, lang, fetcher, report, path):
        yield from gathering.from_files(name, lang, fetcher, report, path)
        if name == 'bad': raise error
    monkeypatch.setitem(gathering.LOADERS, 'files', loader)
    (tmp_path / 'a.txt').write_text(HINDI, encoding='utf-8')
    rows = [dict(name=n, kind='files', lang='hi', path=str(tmp_path / 'a.txt')) for n in ('bad', 'good')]
    found = gather(rows, tmp_path / 'raw')
    assert list(found.failed) == ['bad'] and len(list(found.records())) == 1
    assert [p.name for p in (tmp_path / 'raw').iterdir()] == ['good']
    with pytest.raises(ValueError, match='every source failed: bad'): gather(rows[:1], tmp_path / 'raw')


def test_a_stopped_gathering_leaves_what_was_there(tmp_path, monkeypatch):
    def loader(name, lang, fetcher, report, path):
        yield from gathering.from_files(name, lang, fetcher, report, path)
        if stop: raise KeyboardInterrupt
    monkeypatch.setitem(gathering.LOADERS, 'files', loader)
    (tmp_path / 'a.txt').write_text(HINDI, encoding='utf-8')
    rows, stop = [dict(name='a', kind='files', lang='hi', path=str(tmp_path / 'a.txt'))], False
    first = list(gather(rows, tmp_path / 'raw').records())
    stop = True
    with pytest.raises(KeyboardInterrupt): gather(rows, tmp_path / 'raw', force=True)
    stop = False
    assert list(gather(rows, tmp_path / 'raw').records()) == first and [p.name for p in (tmp_path / 'raw').iterdir()] == ['a']
