"Causal scores against transformers, hand counts and planted faults"
import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForMaskedLM

from lab_lm.evals.causal import MEASURES, CausalRow, begin_token, causal_eval, causal_nats, causal_rows, causal_scores, in_mode, text_sums, windows
from lab_lm.evals.lm import masked_nats, masked_rows
from lab_lm.nets.transformer import NATIVE, NetConfig, Transformer
from lab_lm.text.tiny import pocket_corpus
from lab_lm.text.tokenize import train_tokenizer

TEXTS = [r.text for r in pocket_corpus('hi', 200, seed=random.randrange(10**6))]
TOKENIZER = train_tokenizer(TEXTS, 'akshara_bpe', 900)
IDS = TOKENIZER(TEXTS, add_special_tokens=False).input_ids
SHAPE = dict(vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, initializer_range=.3)


def llama(positions=512): return LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=positions)).eval()


def roberta(): return RobertaForMaskedLM(RobertaConfig(**SHAPE, max_position_embeddings=300, pad_token_id=TOKENIZER.pad_token_id)).eval()


def ours(mode): return Transformer(NetConfig(vocab_size=len(TOKENIZER), mode=mode, layers=2, width=32, heads=2, init=.3, **NATIVE['masked'])).eval()


class Even(torch.nn.Module):
    "All tokens alike"
    def __init__(self, size=len(TOKENIZER)): super().__init__(); self.size = size
    def forward(self, input_ids, attention_mask=None): return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.size))


@pytest.mark.parametrize('model', [llama(), GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=2, n_positions=256)).eval(), ours('causal')],
                         ids=['llama', 'gpt2', 'ours'])
def test_costs_are_those_of_the_prefixes(model):
    rows = causal_rows(TOKENIZER, TEXTS[:3])
    nats, right = causal_nats(model, TOKENIZER, rows)
    for row, cost, hit in zip(rows, nats, right):
        ids = torch.tensor([[TOKENIZER.bos_token_id, *row.ids]])
        for i in random.sample(range(1, ids.shape[1]), 6):
            with torch.inference_mode(): logp = model(ids[:, :i]).logits[0, -1].double().log_softmax(-1)
            assert -logp[ids[0, i]].item() == pytest.approx(cost[i - 1], abs=1e-4)
            assert (logp.argmax() == ids[0, i]).item() == hit[i - 1]


def test_loss_is_that_of_transformers_and_of_ours():
    text = TEXTS[0]
    ids = torch.tensor([[TOKENIZER.bos_token_id, *TOKENIZER(text, add_special_tokens=False).input_ids]])
    hub, own = llama(), ours('causal')
    with torch.inference_mode(): theirs = hub(ids, labels=ids).loss.item()
    assert causal_eval(hub, TOKENIZER, [text], IDS)['loss'].value == pytest.approx(theirs, abs=1e-5)
    labels = torch.cat([ids[:, 1:], torch.tensor([[-100]])], 1)
    with torch.inference_mode(): loss = own(ids, labels=labels).loss.item()
    scores = causal_eval(own, TOKENIZER, [text], IDS)
    assert scores['loss'].value == pytest.approx(loss, abs=1e-5)
    assert scores['perplexity'].value == pytest.approx(math.exp(loss), rel=1e-4)
    assert scores['bits_per_byte'].value == pytest.approx(loss * (ids.shape[1] - 1) / math.log(2) / len(text.encode()), rel=1e-5)


def test_the_batch_and_the_order_of_the_texts_do_not_matter():
    model, texts = llama(), TEXTS[:20] + ['', 'क', ' '.join(TEXTS[20:26])]
    runs = [causal_eval(model, TOKENIZER, texts, IDS, max_length=64, batch_size=b) for b in (1, 32)]
    for k in MEASURES: assert runs[0][k].value == pytest.approx(runs[1][k].value, rel=1e-6)
    shuffled = causal_eval(model, TOKENIZER, texts[::-1], IDS, max_length=64)
    assert shuffled['bits_per_byte'].value == pytest.approx(runs[0]['bits_per_byte'].value, rel=1e-6)


def test_padding_and_the_future_are_not_seen():
    model = llama()
    alone, beside = (causal_nats(model, TOKENIZER, causal_rows(TOKENIZER, t))[0][0] for t in ([TEXTS[0]], [TEXTS[0], TEXTS[1] * 3]))
    assert np.allclose(alone, beside, atol=1e-5)
    row = causal_rows(TOKENIZER, [TEXTS[0]])[0]
    changed = CausalRow(row.text, np.append(row.ids[:-1], 7), row.bytes, row.scored)
    assert np.allclose(causal_nats(model, TOKENIZER, [changed])[0][0][:-1], alone[:-1], atol=1e-5)
    assert model.train().training and causal_nats(model, TOKENIZER, [row]) and model.training  # As it was


@pytest.mark.parametrize('stride', [1, 5, 11])
def test_windows_give_each_token_its_context(stride):
    model, row = llama(), causal_rows(TOKENIZER, [' '.join(TEXTS[:3])])[0]
    ids = np.append(TOKENIZER.bos_token_id, row.ids)
    got = causal_nats(model, TOKENIZER, [row], max_length=12, stride=stride)[0][0]
    owner = {i: (start, stop) for start, stop, first in windows(len(ids), 12, stride) for i in range(first, stop)}
    assert sorted(owner) == list(range(1, len(ids)))
    for i, (start, stop) in owner.items(): assert stop - start <= 12 and (start == 0 or i - start >= 12 - stride)
    for i in random.sample(sorted(owner), 8):
        with torch.inference_mode(): logp = model(torch.tensor([ids[owner[i][0]:i].tolist()])).logits[0, -1].double().log_softmax(-1)
        assert -logp[ids[i]].item() == pytest.approx(got[i - 1], abs=1e-4)
    with pytest.raises(ValueError, match='between 1 and 11'): causal_nats(model, TOKENIZER, [row], max_length=12, stride=12)
    with pytest.raises(ValueError, match='max_length=512'): causal_nats(model, TOKENIZER, [row], max_length=513)


@pytest.mark.parametrize('kind', ['akshara_bpe', 'bpe', 'unigram', 'wordpiece', 'gpt2', 'byte', 'char'])
def test_uniform_is_log2_of_the_vocabulary_and_bytes_are_those_of_the_text(kind):
    tokenizer = train_tokenizer(TEXTS, kind, 900)
    held = ['राम घर  गया । ', TEXTS[0], 'zebra ஃ 🦓', '\u0958']  # Two spaces, letters never seen, one that NFC takes apart
    scores = causal_eval(Even(len(tokenizer)), tokenizer, held, [[]])
    assert scores['loss'].value == pytest.approx(math.log(len(tokenizer)), abs=1e-12)
    assert scores['bits_per_byte'].value == pytest.approx(scores['bits_per_byte'].baselines['uniform'], rel=1e-12)
    for text, row in zip(held, causal_rows(tokenizer, held)): assert row.bytes.sum() == pytest.approx(len(text.encode()))
    known = [t for t, row in zip(held, causal_rows(tokenizer, held)) if row.scored.all()]
    tokens = sum(len(i) for i in tokenizer(known, add_special_tokens=False).input_ids)
    assert causal_eval(Even(len(tokenizer)), tokenizer, known, [[]])['bits_per_byte'].value == pytest.approx(
        math.log2(len(tokenizer)) * tokens / sum(len(t.encode()) for t in known))


def test_unknown_tokens_cost_nothing_and_count_for_nothing():
    tokenizer = train_tokenizer(['राम घर गया'] * 5, 'wordpiece', 300)
    row = causal_rows(tokenizer, ['राम zz गया'])[0]
    assert (row.ids == tokenizer.unk_token_id).sum() == (~row.scored).sum() > 0
    sums = text_sums(row, np.ones(len(row.ids)), np.ones(len(row.ids), bool))
    assert sums[1] == row.scored.sum() and sums[3] == pytest.approx(row.bytes[row.scored].sum()) and sums[3] < row.bytes.sum()


def test_begin_tokens():
    some = lambda **ids: SimpleNamespace(**{f'{k}_token_id': ids.get(k) for k in ('bos', 'cls', 'eos')})
    assert [begin_token(some(bos=0, cls=5)), begin_token(some(cls=5, eos=6)), begin_token(some(eos=6)), begin_token(some())] == [0, 5, 6, None]
    none = train_tokenizer(TEXTS, 'bpe', 600)
    none.bos_token = none.eos_token = None
    rows = causal_rows(none, [TEXTS[0], 'क'])
    nats, _ = causal_nats(Even(len(none)), none, rows)
    assert np.isnan(nats[0][0]) and not np.isnan(nats[0][1:]).any() and not rows[0].scored[0]
    scores = causal_eval(Even(len(none)), none, [TEXTS[0], 'क'], [[]])
    assert scores['loss'].value == pytest.approx(math.log(len(none))) and scores['loss'].n == 1 and 'not scored for want of a begin token' in scores['loss'].protocol


def test_scores_by_hand_and_groups():
    sums = np.array([[6., 3, 1, 12, 5, 2, 4], [2., 1, 1, 4, 3, 0, 0]])
    scores = causal_scores(sums, {'unigram': 2 * sums})
    hand = {'bits_per_byte': .5 / math.log(2), 'loss': 2., 'perplexity': math.exp(2), 'accuracy': .5, 'bits_per_character': 1 / math.log(2),
            'perplexity_per_word': math.exp(3), 'perplexity_per_akshara': math.exp(1.5)}
    assert {k: s.value for k, s in scores.items()} == pytest.approx(hand)
    assert scores['perplexity_per_word'].n == 1 and scores['loss'].baselines == {'unigram': 2.}
    model, texts = llama(), TEXTS[:6]
    both = causal_eval(model, TOKENIZER, texts, IDS, groups=list('ababab'))
    alone = causal_eval(model, TOKENIZER, texts[::2], IDS)
    for k in MEASURES: assert both[f'{k}/a'].value == pytest.approx(alone[k].value, rel=1e-6) and both[f'{k}/a'].baselines == pytest.approx(alone[k].baselines)


def test_a_hybrid_model_reads_both_ways():
    net = ours('hybrid')
    causal, masked = ours('causal'), ours('masked')
    causal.load_state_dict(net.state_dict()), masked.load_state_dict(net.state_dict())
    rows = causal_rows(TOKENIZER, TEXTS[:3])
    assert np.allclose(causal_nats(in_mode(net, causal=True), TOKENIZER, rows)[0][0], causal_nats(causal, TOKENIZER, rows)[0][0], atol=1e-5)
    hidden = masked_rows(TOKENIZER, TEXTS[:3])
    assert np.allclose(masked_nats(in_mode(net, causal=False), TOKENIZER, hidden)[1], masked_nats(masked, TOKENIZER, hidden)[1], atol=1e-5)
    with pytest.raises(ValueError, match='hybrid'): causal_nats(net, TOKENIZER, rows)
    net.train(), causal_nats(in_mode(net, causal=True), TOKENIZER, rows)
    assert net.training


def test_bits_do_not_depend_on_the_tokenizer():
    "The same true distribution, cut to letters or to groups of letters"
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    p = np.random.default_rng().dirichlet(np.ones(4))
    text = ''.join(np.random.choice(list('abcd'), 60, p=p))
    found = []
    for n in (1, 2, 3):
        groups = list(itertools.product(range(4), repeat=n))
        inner = Tokenizer(models.WordLevel({'<s>': 0, '<unk>': 1, **{''.join('abcd'[i] for i in g): k for k, g in enumerate(groups, 2)}}, unk_token='<unk>'))
        inner.pre_tokenizer = pre_tokenizers.Split(Regex('.' * n), 'isolated')
        logits = torch.tensor([-np.inf, -np.inf, *(math.log(np.prod(p[list(g)])) for g in groups)], dtype=torch.float64)

        class True_(torch.nn.Module):
            def forward(self, input_ids, attention_mask=None, logits=logits): return SimpleNamespace(logits=logits.expand(*input_ids.shape, -1))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token='<s>', unk_token='<unk>')
        scores = causal_eval(True_(), tokenizer, [text], [[]])
        found.append(scores['bits_per_byte'].value)
    assert found == pytest.approx([-sum(math.log2(p['abcd'.index(c)]) for c in text) / 60] * 3, rel=1e-9)
