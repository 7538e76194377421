"""Speed of text.script and text.normalise on 1 MB of Hindi and Tamil in documents of 1 KB, one core, against named peers in the same run.

Peers: the default pattern of scikit-learn and bm25s (re), and the IndicNLP library (normaliser, word and sentence tokenizer; `pip install indic-nlp-library`).
CPU time, median of five rounds; MB are UTF-8.
"""
import gzip
import re
import statistics
import time

from lab_lm.core.paths import shared_data
from lab_lm.text.normalise import Changes, mojibake, normalise, profile
from lab_lm.text.script import LANG_SCRIPT, aksharas, code_mix, graphemes, romanised, script_fraction, script_runs, sentences, words


def documents(lang):
    "1 MB of Wikipedia text in pieces of about 1 KB"
    file = shared_data(f'text/wiki_{lang}.txt.gz')
    if file is None: raise SystemExit(f'wiki_{lang}.txt.gz is absent; set LAB_LM_SHARED to the folder that holds text/')
    with gzip.open(file, 'rt', encoding='utf-8') as f: text = f.read(1_000_000).encode()[:1_000_000].decode(errors='ignore')
    step = len(text) // 1000
    return [text[i:i + step] for i in range(0, len(text), step)]


def peers(lang):
    "What others offer, by the task of ours it stands against"
    pattern = re.compile(r'(?u)\b\w\w+\b')
    out = {'words': {'re \\b\\w\\w+\\b (breaks words)': pattern.findall}}
    try:
        from indicnlp.normalize.indic_normalize import IndicNormalizerFactory
        from indicnlp.tokenize.indic_tokenize import trivial_tokenize
        from indicnlp.tokenize.sentence_tokenize import sentence_split
    except ImportError:
        print('IndicNLP: skipped, because it is not installed')
        return out
    out['words']['IndicNLP'] = lambda t: trivial_tokenize(t, lang)
    return out | {'normalise': {'IndicNLP': IndicNormalizerFactory().get_normalizer(lang).normalize}, 'sentences': {'IndicNLP': lambda t: sentence_split(t, lang)}}


def seconds(run, docs):
    "CPU seconds for all documents"
    began = time.process_time()
    for doc in docs: run(doc)
    return time.process_time() - began


for lang in ('hi', 'ta'):
    docs, script, matching = documents(lang), LANG_SCRIPT[lang], tuple(profile(lang)['matching'])
    ours = {'words': words, 'sentences': sentences, 'graphemes': graphemes, 'aksharas': aksharas, 'script_fraction': lambda t: script_fraction(t, script),
            'script_runs': script_runs, 'code_mix': code_mix, 'romanised': lambda t: romanised(t, lang), 'mojibake': mojibake, 'normalise': lambda t: normalise(t, lang),
            'normalise, reported': lambda t, r=Changes(): normalise(t, lang, report=r), 'normalise for matching': lambda t: normalise(t, lang, also=matching)}
    others, megabytes = peers(lang), sum(len(d.encode()) for d in docs) / 1e6
    named = {**ours, **{f'{task}: {name}': run for task, rows in others.items() for name, run in rows.items()}}
    took = {name: statistics.median(seconds(run, docs) for _ in range(5)) for name, run in named.items()}
    for name in named:
        ratio = f", {took[name] / took[name.split(': ')[0]]:.2f} times our time" if ': ' in name else ''
        print(f"{lang}  {name:<40} {megabytes / took[name]:7.1f} MB/s{ratio}", flush=True)
