"The funnel on a local Ray cluster with two workers writes the same bytes as the funnel in this process and in two"
import random
import socket

import pytest

from lab_lm.text.corpus import to_jsonl
from lab_lm.text.funnel import funnel
from lab_lm.text.sources import iter_records, read_records


def contents(folder): return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob('*.json*'))}


@pytest.fixture
def shards(tmp_path):
    "The samples in twelve files, with copies and dirt, shuffled"
    records = [r for r in read_records('data/samples')]
    rng = random.Random()
    lines = to_jsonl(rng.sample(records, len(records))).splitlines()
    extra = [line.replace('"id": "', '"id": "copy-', 1) for line in rng.sample(lines, 60)] + ['{"id": "dirt-1", "text": "Click to read all of it", "lang": "hi", "source": "web"}']
    lines = rng.sample(lines + extra, len(lines) + len(extra))
    folder = tmp_path / 'shards'
    folder.mkdir()
    for k in range(12): (folder / f'{k:02d}.jsonl').write_text('\n'.join(lines[k::12]) + '\n', encoding='utf-8')
    return folder


def test_processes_change_nothing(shards, tmp_path, monkeypatch):
    import lab_lm.text.funnel as module
    monkeypatch.setattr(module.batches, '__defaults__', (20_000,))
    one, two = funnel(iter_records(shards), tmp_path / 'one'), funnel(iter_records(shards), tmp_path / 'two', workers=2)
    assert one.counts == two.counts and one.total('merged') == 60 and one.total('dropped') == 1
    assert contents(tmp_path / 'one') == contents(tmp_path / 'two')
    named = sorted(shards.iterdir())
    for file, other in zip(named, random.Random().sample(named, len(named))): file.rename(file.with_name(f'{other.name}.x'))
    for file in shards.iterdir(): file.rename(file.with_suffix(''))
    funnel(iter_records(shards), tmp_path / 'three')
    assert contents(tmp_path / 'three') == contents(tmp_path / 'one')


def loopback():
    try:
        with socket.create_server(('127.0.0.1', 0)) as s: socket.create_connection(s.getsockname(), timeout=2).close()
    except OSError: return False
    return True


@pytest.fixture
def ray():
    "A local cluster with two workers; a busy machine may need a second try to start it"
    if not loopback(): pytest.skip('Ray needs the loopback network, which is not there')
    ray = pytest.importorskip('ray', reason='Ray is not installed: pip install "lab_lm[ray]"')
    for _ in range(3):
        try: ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        except Exception as e:
            ray.shutdown()
            if 'timed out during startup' not in str(e): raise
        else: break
    else: pytest.skip('Ray did not start within 30 seconds, three times')
    yield ray
    ray.shutdown()


@pytest.mark.filterwarnings('ignore')
def test_ray_writes_the_same_bytes(shards, tmp_path, ray):
    from lab_lm.text.cluster import funnel_on_ray
    funnel(iter_records(shards), tmp_path / 'here')
    files = sorted(shards.iterdir())
    funnel_on_ray(random.Random().sample(files, len(files)), tmp_path / 'there')
    assert contents(tmp_path / 'there') == contents(tmp_path / 'here')
