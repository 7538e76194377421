"""What sentences cost under causal and masked models: `scorer` against minicons, the same model, sentences and sums.

    python bench/scoring.py [--sentences 200] [--width 128] [--layers 4] [--vocab 8000] [--rows 0] [--repeats 3] [--small]

Sentences of Hindi Wikipedia (`LAB_LM_SHARED`; the samples where it is absent), random weights: speed does not depend on what they know. One thread, float32.
minicons 0.3 reads batches of 1, 8 and 32 sentences in the order given; ours keeps its defaults. Masked models are asked for the pseudo-log-likelihood
(Salazar et al. 2020) and for that within words from left to right (Kauf & Ivanova 2023). `--rows` is the vocabulary of the models where it is larger than that of the
tokenizer: with `--rows 32000` the head takes about the share of the work that it takes in XLM-R base (2.3 times the layers below it).
Printed: median seconds of processor time of several rounds of both in turn, their ratio to the best and to each batch size, and the largest difference of a
sentence's sum. Causal models leave little to gain: head and softmax at every token are needed by both. Then the time to count a million tokens.
"""
import argparse
import gzip
import statistics
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForMaskedLM

from lab_lm.core.paths import shared_data
from lab_lm.evals.ngrams import KneserNey, NgramFloor
from lab_lm.evals.scorers import KINDS, scorer
from lab_lm.text.script import sentences
from lab_lm.text.sources import read_records
from lab_lm.text.tokenize import train_tokenizer


class Asked:
    "A tokenizer as minicons wants it: by an older name, and for causal models without the end token"
    def __init__(self, inner, ends): self.inner, self.ends, self.cls_token_id, self.sep_token_id = inner, ends, inner.bos_token_id, inner.eos_token_id
    def __getattr__(self, name): return getattr(self.inner, name)
    def __call__(self, texts, **how):
        enc = self.inner(texts, **how)
        if not self.ends and 'return_tensors' in how: enc['attention_mask'].scatter_(1, enc['attention_mask'].sum(1, keepdim=True) - 1, 0)
        return enc
    batch_encode_plus = __call__


def hindi():
    "Paragraphs"
    path = shared_data('text/wiki_hi.txt.gz')
    if path is None: return [r.text for r in read_records('data/samples', 'hi')]
    with gzip.open(path, 'rt', encoding='utf-8') as lines: return [line.strip() for line in lines]


def minicons_of(model, tokenizer, kind):
    "From sentences and a batch size to sums of log-probabilities"
    from minicons import scorer as oracle
    asked = (oracle.IncrementalLMScorer if kind == 'causal' else oracle.MaskedLMScorer)(model, 'cpu', tokenizer=Asked(tokenizer, kind != 'causal'))
    how = {} if kind == 'causal' else dict(PLL_metric='original' if kind == 'masked' else 'within_word_l2r')
    def ask(texts, batch): return [x for i in range(0, len(texts), batch) for x in asked.sequence_score(texts[i:i + batch], reduction=lambda x: x.double().sum().item(), **how)]
    return ask


def timed(act):
    "What it gives, and its seconds of processor time"
    before = time.process_time()
    return act(), time.process_time() - before


def main(sentences_, width, layers, vocab, rows, repeats, tokens):
    torch.set_num_threads(1)
    texts = hindi()
    tokenizer = train_tokenizer(texts[:3000], 'akshara_bpe', vocab)
    held = [s for t in texts[-800:] for s in sentences(t) if 20 < len(s) < 160][:sentences_]
    shape = dict(vocab_size=max(rows, len(tokenizer)), hidden_size=width, intermediate_size=width * 3, num_hidden_layers=layers, num_attention_heads=max(1, width // 32))
    torch.manual_seed(0)
    models = {'causal': LlamaForCausalLM(LlamaConfig(**shape)).eval(), 'masked': RobertaForMaskedLM(RobertaConfig(**shape, max_position_embeddings=400, pad_token_id=tokenizer.pad_token_id)).eval()}
    lengths = [len(i) for i in tokenizer(held, add_special_tokens=False).input_ids]
    print(f'{len(held)} sentences of {statistics.mean(lengths):.0f} tokens ({min(lengths)} to {max(lengths)}), vocabulary {shape["vocab_size"]}, {layers} layers of {width}', flush=True)
    for kind in KINDS:
        model = models[kind.split('_')[0]]
        mine, ask = scorer(model, tokenizer, kind, words='tokenizer'), minicons_of(model, tokenizer, kind)
        ours, theirs = [], {b: [] for b in (1, 8, 32)}
        for _ in range(repeats):
            found, seconds = timed(lambda: mine.totals(held))
            ours.append(seconds)
            for b in theirs: answer, seconds = timed(lambda: ask(held, b)); theirs[b].append(seconds)
        gap, ratio = np.abs(found + answer).max(), {b: statistics.median(t / o for o, t in zip(ours, times)) for b, times in theirs.items()}
        best = min(ratio, key=ratio.get)
        print(f'  {kind}: {statistics.median(ours):.2f} s, minicons {statistics.median(theirs[best]):.2f} s at its best (batches of {best}): {ratio[best]:.1f} times; '
              + ', '.join(f'batches of {b}: {r:.1f} times' for b, r in ratio.items()) + f'; largest difference of a sentence {gap:.0e} nats', flush=True)
    coded = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    while sum(map(len, coded)) < tokens: coded = coded + [c[::-1] for c in coded] # Where the text is short of a million tokens, it comes again, backwards
    total, kept = 0, []
    for ids in coded:
        if total >= tokens: break
        kept.append(ids); total += len(ids)
    for kind in (KneserNey, NgramFloor):
        model, counting = timed(lambda: kind(5, len(tokenizer)).fit(kept))
        _, reading = timed(lambda: [model.logprob(ids) for ids in kept[:2000]])
        print(f'  {kind.__name__} of order 5: {total:,} tokens counted in {counting:.1f} s; {sum(map(len, kept[:2000])) / reading:,.0f} tokens read a second', flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(sentences=200, width=128, layers=4, vocab=8000, rows=0, repeats=3, tokens=1_000_000).items(): parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--small', action='store_true', help='20 sentences, a small model, one round')
    args = vars(parser.parse_args())
    if args.pop('small'): args |= dict(sentences=20, width=32, layers=2, vocab=3000, repeats=1, tokens=100_000)
    args['sentences_'] = args.pop('sentences')
    main(**args)
