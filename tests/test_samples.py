"What the samples promise, checked on the files"
import unicodedata

import pytest

from lab_lm.evals.retrieval import read_beir
from lab_lm.core.paths import find
from lab_lm.text.funnel import clean
from lab_lm.text.sources import read_records
from lab_lm.text.statistics import quality_table


@pytest.mark.parametrize('lang', ['hi', 'ta', 'en'])
def test_samples(lang):
    records = read_records('data/samples', lang)
    row, = quality_table(records)
    assert row['texts'] >= 150 and row['different'] == row['texts'] and row['lowest_share'] > .99 and 60 <= row['shortest'] and row['longest'] <= 1500
    assert all(r.meta['title'] and r.meta['genre'] and r.text == unicodedata.normalize('NFC', r.text) for r in records)
    assert len({r.meta['genre'] for r in records}) >= 6 and clean(records)[1].total('kept') == len(records)
    task = read_beir(find('data/samples') / lang)
    assert len(task.queries) >= 100 and set(task.qrels) == set(task.queries)
    assert {d for grades in task.qrels.values() for d in grades} <= set(task.corpus)
