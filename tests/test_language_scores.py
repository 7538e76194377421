"Causal scores and minimal pairs against transformers, brute force, hand counts and planted faults"
import gzip
import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForMaskedLM

from lab_lm.core.paths import shared_data
from lab_lm.evals.causal import MEASURES, CausalRow, begin_token, causal_eval, causal_nats, causal_rows, causal_scores, in_mode, text_sums, windows
from lab_lm.evals.lm import masked_nats, masked_rows
from lab_lm.evals.pairs import compare_pairs, later_in_word, mcnemar, pair_credit, pair_eval, pair_floors, pair_nats, pair_scores, pseudo_nats
from lab_lm.nets.transformer import NATIVE, NetConfig, Transformer
from lab_lm.text.pocket import Pair
from lab_lm.text.script import word_spans
from lab_lm.text.tiny import pocket_corpus, pocket_pairs
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


# ---- pairs

def test_causal_pairs_are_sums_not_means():
    "A wrong sentence that shatters into many easy pieces stays wrong"
    class Easy(torch.nn.Module):
        "From the fifth token on everything is easy"
        def forward(self, input_ids, attention_mask=None):
            wanted = torch.nn.functional.one_hot(input_ids.roll(-1, 1), len(TOKENIZER)) * 6.
            wanted[:, :4] = 0
            return SimpleNamespace(logits=wanted)
    pair = Pair('कककक', 'कककककककक', 'x')
    n = [len(TOKENIZER(t, add_special_tokens=False).input_ids) for t in (pair.good, pair.bad)]
    nats = pair_nats(Easy(), TOKENIZER, [pair])[0]
    assert n == [4, 8] and nats[0] / n[0] > nats[1] / n[1] and pair_credit(nats).tolist() == [1.]
    easy = math.log(1 + (len(TOKENIZER) - 1) * math.exp(-6))
    assert nats.tolist() == pytest.approx([4 * math.log(len(TOKENIZER)), 4 * math.log(len(TOKENIZER)) + 4 * easy], abs=1e-4)
    model, pairs = llama(), pocket_pairs('hi', 10)
    for p, (a, b) in zip(pairs, pair_nats(model, TOKENIZER, pairs)):
        for text, cost in ((p.good, a), (p.bad, b)):
            ids = torch.tensor([TOKENIZER(text).input_ids[:-1]])
            with torch.inference_mode(): assert cost == pytest.approx(model(ids, labels=ids).loss.item() * (ids.shape[1] - 1), rel=1e-4)


@pytest.mark.parametrize('whole', [False, True])
def test_pseudo_likelihood_by_brute_force(whole):
    model, text = roberta(), 'लड़कियाँ किताब-घर में 3.5 zqx पढ़ेंगी।'
    enc = TOKENIZER(text, return_offsets_mapping=True)
    inner, spans = range(1, len(enc.input_ids) - 1), word_spans(text)
    expected = []
    for i in inner:
        hidden, a = torch.tensor([enc.input_ids]), enc.offset_mapping[i]
        word = next((w for w in spans if w[0] < a[1] and a[0] < w[1]), None)
        for j in inner:
            b = enc.offset_mapping[j]
            if j == i or whole and word and j > i and word[0] < b[1] and b[0] < word[1]: hidden[0, j] = TOKENIZER.mask_token_id
        with torch.inference_mode(): expected.append(-model(hidden).logits[0, i].double().log_softmax(-1)[enc.input_ids[i]].item())
    got = pseudo_nats(model, TOKENIZER, [TEXTS[0], text], whole)[1]
    assert np.allclose(got, expected, atol=1e-4)
    assert whole is False or any(later_in_word(text, enc.offset_mapping[1:-1]))


@pytest.mark.parametrize('kind', ['causal', 'masked', 'masked_word'])
def test_pairs_do_not_depend_on_the_batch_and_a_constant_model_gets_exactly_one_half(kind):
    pairs = pocket_pairs('hi', 11, seed=random.randrange(10**6))
    model = llama() if kind == 'causal' else roberta()
    few = pairs[:8]
    assert np.allclose(pair_nats(model, TOKENIZER, few, kind, 1), pair_nats(model, TOKENIZER, few, kind, 32), rtol=1e-6)
    floors = pair_floors(TOKENIZER, pairs, IDS)
    equal = [p for p, (a, b) in zip(pairs, floors['length']) if a == b]
    score = pair_eval(Even(), TOKENIZER, equal, IDS, kind)['accuracy']
    assert score.value == .5 and f'{len(equal)} ties' in score.protocol
    assert pair_eval(Even(), TOKENIZER, pairs, IDS, kind)['accuracy'].value == pair_credit(floors['length']).mean()
    same = [Pair(p.good, p.good, 'x') for p in few]
    assert pair_eval(model, TOKENIZER, same, IDS, kind)['accuracy'].value == .5
    turned = [Pair(p.bad, p.good, p.phenomenon) for p in few]
    assert pair_credit(pair_nats(model, TOKENIZER, turned, kind)).tolist() == (1 - pair_credit(pair_nats(model, TOKENIZER, few, kind))).tolist()


def test_a_bag_of_words_ties_on_order():
    "Costs that come in another order add up to the same double"
    class Bag(torch.nn.Module):
        weights = torch.randn(len(TOKENIZER))
        def forward(self, input_ids, attention_mask=None): return SimpleNamespace(logits=self.weights.expand(*input_ids.shape, -1))
    words = ['राम', 'घर', 'में', 'किताब', 'पढ़ता', 'है']
    pairs = [Pair(' '.join(['क', *random.sample(words, 5)]), ' '.join(['क', *words[1:], words[0]]), 'order') for _ in range(10)]
    pairs = [p for p in pairs if sorted(TOKENIZER(p.good).input_ids) == sorted(TOKENIZER(p.bad).input_ids)] or [Pair('क राम घर', 'क घर राम', 'order')]
    assert set(pair_credit(pair_nats(Bag(), TOKENIZER, pairs))) == {.5}
    assert set(pair_credit(pair_floors(TOKENIZER, pairs, IDS)['unigram'])) == {.5}


def test_phenomena_ties_and_nan():
    nats = np.array([[1., 2.], [1., 1.], [3., 2.], [np.inf, np.inf]])
    assert pair_credit(nats[:3]).tolist() == [1., .5, 0.]
    pairs = [Pair('a', 'b', k) for k in 'xxy']
    scores = pair_scores(nats[:3], pairs, {'length': [[1, 2]] * 3})
    assert {k: s.value for k, s in scores.items()} == {'accuracy': .5, 'accuracy/x': .75, 'accuracy/y': 0.}
    assert scores['accuracy/x'].baselines == {'length': 1.} and '1 ties' in scores['accuracy'].protocol and scores['accuracy'].n == 3
    with pytest.raises(ValueError, match='1 of 2 pairs cost NaN'): pair_credit([[1, 2], [np.nan, 1]])
    with pytest.raises(ValueError, match='2 pairs need as many'): pair_scores(nats[:3], pairs[:2])
    no_mask = train_tokenizer(TEXTS, 'bpe', 600)
    no_mask.mask_token = None
    with pytest.raises(ValueError, match='no mask token'): pair_nats(Even(len(no_mask)), no_mask, pairs, 'masked')


def test_mcnemar_and_comparison():
    for a, b in [(0, 0), (1, 0), (5, 5), *((random.randrange(60), random.randrange(60)) for _ in range(20)), (900, 1100)]:
        assert mcnemar(a, b) == pytest.approx(binomtest(a, a + b, .5).pvalue if a + b else 1., rel=1e-9)
    a, b = np.array([[0., 1.]] * 9 + [[1., 0.]]), np.array([[1., 0.]] * 8 + [[0., 0.], [1., 0.]])
    found = compare_pairs(a, b)
    assert (found.only_a, found.only_b, found.difference.value) == (9, 0, pytest.approx(.85)) and found.p == mcnemar(9, 0)
    back = compare_pairs(b, a)
    assert (back.only_b, back.p, back.difference.value) == (9, found.p, pytest.approx(-.85))


def test_multiblimp_file_through_the_floors():
    "English agreement: a trigram that has counted the good sentences knows them, length alone does not"
    file = shared_data('pairs/multiblimp_eng.tsv.gz')
    if file is None: pytest.skip('multiblimp_eng.tsv.gz is not beside the project')
    with gzip.open(file, 'rt', encoding='utf-8') as f: head, *lines = (line.rstrip('\n').split('\t') for line in f)
    columns = [head.index(name) for name in ('sen', 'wrong_sen', 'phenomenon')]
    pairs = [Pair(*(row[c] for c in columns)) for row in lines]
    tokenizer = train_tokenizer([p.good for p in pairs], 'bpe', 1500)
    floors = pair_floors(tokenizer, pairs, tokenizer([p.good for p in pairs], add_special_tokens=False).input_ids)
    scores = pair_scores(floors['trigram'], pairs, floors)
    assert scores['accuracy'].n == len(pairs) == 770 and scores['accuracy'].value > .9  # It has seen the answers
    assert .3 < scores['accuracy'].baselines['length'] < .8


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
