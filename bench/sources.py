"""Reading records from JSONL and text files, and the plain loops and datatrove's reader on the same files in the same run

    python bench/sources.py [MB]      100 MB of Hindi paragraphs by default

Reported: MB/s of unpacked bytes, the median of three, in one process; and the peak memory of our reader beyond that of the imports.
"""
import gzip
import json
import resource
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import zstandard

from lab_lm.core.paths import shared_data
from lab_lm.text.sources import iter_records


def files(folder, megabytes):
    "The same paragraphs as text and as JSONL, plain and packed"
    with gzip.open(shared_data('text/wiki_hi.txt.gz'), 'rt', encoding='utf-8') as f: lines = [line.strip() for line in f if line.strip()]
    lines *= int(megabytes * 1e6 / sum(len(line.encode()) + 1 for line in lines)) + 1
    rows = (json.dumps(dict(id=f'd{i}', text=line, lang='hi'), ensure_ascii=False) for i, line in enumerate(lines))
    (folder / 'a.txt').write_text('\n'.join(lines), encoding='utf-8')
    (folder / 'a.jsonl').write_text('\n'.join(rows), encoding='utf-8')
    for name in ('a.txt', 'a.jsonl'):
        data = (folder / name).read_bytes()
        (folder / f'{name}.gz').write_bytes(gzip.compress(data, 6))
        (folder / f'{name}.zst').write_bytes(zstandard.compress(data))


def lines_loop(path): return sum(1 for line in open(path, encoding='utf-8') if line.strip())


def json_loop(path): return sum(1 for line in open(path, encoding='utf-8') if json.loads(line)['text'])


def datatrove(path):
    "datatrove's reader, which parses with orjson"
    from datatrove.pipeline.readers import JsonlReader
    return sum(1 for _ in JsonlReader(str(path.parent), glob_pattern=path.name).run())


def ours(path): return sum(1 for _ in iter_records(path, 'hi'))


def speed(reader, path, size, times=3):
    "MB/s and the number of texts"
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        texts = reader(path)
        taken.append(time.perf_counter() - start)
    return size / 1e6 / statistics.median(taken), texts


if __name__ == '__main__':
    if shared_data('text/wiki_hi.txt.gz') is None: raise SystemExit('the Hindi paragraphs are not here; see LAB_LM_SHARED')
    with tempfile.TemporaryDirectory() as folder:
        folder, megabytes = Path(folder), float(sys.argv[1]) if len(sys.argv) > 1 else 100
        files(folder, megabytes)
        size = {kind: (folder / f'a.{kind}').stat().st_size for kind in ('txt', 'jsonl')}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        jobs = [(ours, f'a.{kind}{packed}') for kind in size for packed in ('', '.gz', '.zst')] + [(lines_loop, 'a.txt'), (json_loop, 'a.jsonl'), (datatrove, 'a.jsonl')]
        if not find_spec('orjson'): jobs = jobs[:-1]; print('datatrove is left out: its reader needs orjson')
        for reader, name in jobs:
            rate, texts = speed(reader, folder / name, size[name.split('.')[1]])
            print(f'{reader.__name__:>12} {name:<12} {rate:7.1f} MB/s {texts:>8} texts', flush=True)
            if name == 'a.jsonl.zst': print(f'{"":>12} peak memory grew by {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:.0f} MiB')
