"""The funnel on Hindi text of growing size, and datatrove with the same steps on the smallest of them, in one run

    python bench/funnel.py [TEXT] [sizes in MB …]      TEXT: a Hindi file of paragraphs, one a line; 50 100 200 400 MB by default

The text is made longer by repeating its paragraphs, each time with a third of the words replaced by others from the same text, and one document
in twenty is a near copy of an earlier one. The peer needs `pip install datatrove orjson ftfy nltk indic-nlp-library "xxhash<4"`. Reported: seconds, MB/s, the exponent of time over size, and the peak memory of the main process and of the largest worker.
"""
import json
import math
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from loky import get_reusable_executor

from lab_lm.core.paths import shared_data

WORKERS = 2
BANDS, ROWS = 20, 6 # Of both


def make(paragraphs, folder, megabytes, seed=0):
    "JSONL shards of about 25 MB in a folder, `megabytes` in all"
    rng, vocabulary = random.Random(seed), [w for p in paragraphs for w in p.split()]
    folder.mkdir(parents=True)
    size, number, last = 0, 0, ''
    shard = None
    while size < megabytes * 1e6:
        if shard is None or shard.tell() > 25e6: shard = open(folder / f'part-{size // 25_000_000:03.0f}-{number:08d}.jsonl', 'wb')
        words = paragraphs[number % len(paragraphs)].split()
        text = ' '.join(rng.choice(vocabulary) if rng.random() < .33 else w for w in words)
        if last and number % 20 == 0: text = last + ' ' + rng.choice(vocabulary)
        line = (json.dumps(dict(id=f'doc-{number:08d}', text=text, lang='hi'), ensure_ascii=False) + '\n').encode()
        shard.write(line)
        size, number, last = size + len(line), number + 1, text
    shard.close()
    return size


def ours(folder, out):
    from lab_lm.text.funnel import funnel
    from lab_lm.text.sources import iter_records
    ledger = funnel(iter_records(folder, 'hi'), out, workers=WORKERS)
    return {what: ledger.total(what) for what in ('kept', 'dropped', 'merged')}


def theirs(folder, out):
    "datatrove: read, clean symbols and encoding, filter by length and script, MinHash in four stages, split, write; two processes"
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.filters import LambdaFilter
    from datatrove.pipeline.formatters import FTFYFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers.jsonl import JsonlWriter
    from datatrove.utils.hashing import HashConfig
    config, mid = MinhashConfig(n_grams=3, num_buckets=BANDS, hashes_per_bucket=ROWS, hash_config=HashConfig(precision=64)), out / 'mid'

    def keep(doc):
        letters = [c for c in doc.text if c.isalpha() or '\u0900' <= c <= '\u097f']
        return 10 <= len(doc.text) <= 100_000 and sum('\u0900' <= c <= '\u097f' for c in letters) >= .8 * max(1, len(letters))
    tasks = len(list(folder.iterdir()))
    def run(steps, tasks, name): LocalPipelineExecutor(pipeline=steps, tasks=tasks, workers=WORKERS, logging_dir=str(out / 'logs' / name)).run()
    run([JsonlReader(str(folder)), FTFYFormatter(), LambdaFilter(keep), JsonlWriter(str(mid), compression=None)], tasks, 'a')
    run([JsonlReader(str(mid)), MinhashDedupSignature(str(out / 'sig'), config=config, language='hin_Deva')], tasks, 'b')
    run([MinhashDedupBuckets(str(out / 'sig'), str(out / 'buckets'), config=config)], BANDS, 'c')
    run([MinhashDedupCluster(str(out / 'buckets'), str(out / 'remove'), config=config)], 1, 'd')
    run([JsonlReader(str(mid)), MinhashDedupFilter(str(out / 'remove')), JsonlWriter(str(out / 'end'), output_filename='${rank}.jsonl', compression=None)], tasks, 'e')
    return dict(kept=sum(line.count(b'\n') for p in (out / 'end').iterdir() for line in [p.read_bytes()]))


def measured(which, folder):
    "Seconds, peaks in MB and counts of one run in a process of its own"
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run([sys.executable, __file__, '--one', which, str(folder), f'{out}/out'], capture_output=True, text=True)
        if done.returncode: sys.exit(done.stderr[-3000:])
        return json.loads(done.stdout.splitlines()[-1])


def main():
    file = Path(sys.argv[1]) if sys.argv[1:] else shared_data('text') / 'wiki_hi.txt.gz'
    sizes = [float(s) for s in sys.argv[2:]] or [50, 100, 200, 400]
    from lab_lm.text.streams import read_text_lines
    paragraphs = [text for _, text in read_text_lines(file) if len(text) > 100]
    points = []
    with tempfile.TemporaryDirectory() as scratch:
        for megabytes in sizes:
            folder = Path(scratch) / 'texts'
            size = make(paragraphs, folder, megabytes)
            row = measured('ours', folder)
            points.append((size, row['seconds']))
            print(f"lab_lm     {size / 1e6:4.0f} MB {row['seconds']:7.1f} s {size / 1e6 / row['seconds']:6.2f} MB/s  peak {row['main']:.0f} MB, a worker {row['worker']:.0f} MB  {row['counts']}", flush=True)
            if megabytes == sizes[0] and not find_spec('datatrove'): print('datatrove  skipped, because it is not installed')
            elif megabytes == sizes[0]:
                peer = measured('theirs', folder)
                print(f"datatrove  {size / 1e6:4.0f} MB {peer['seconds']:7.1f} s {size / 1e6 / peer['seconds']:6.2f} MB/s  {peer['counts']}  takes {peer['seconds'] / row['seconds']:.2f} times as long", flush=True)
            shutil.rmtree(folder)
    if len(points) > 1: print(f"time grows as size ** {math.log(points[-1][1] / points[0][1]) / math.log(points[-1][0] / points[0][0]):.2f}")


if __name__ == '__main__':
    if sys.argv[1:2] == ['--one']:
        start = time.perf_counter()
        counts = dict(ours=ours, theirs=theirs)[sys.argv[2]](Path(sys.argv[3]), Path(sys.argv[4]))
        seconds = time.perf_counter() - start
        if sys.argv[2] == 'ours': get_reusable_executor().shutdown(wait=True)  # So that the workers' memory is counted
        peak = {who: resource.getrusage(which).ru_maxrss / 1000 for who, which in (('main', resource.RUSAGE_SELF), ('worker', resource.RUSAGE_CHILDREN))}
        print(json.dumps(dict(seconds=seconds, counts=counts, **peak)))
    else: main()
