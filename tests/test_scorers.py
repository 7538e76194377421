"Scorers, floors and language scores against minicons, transformers, llama.cpp, definitions written out, and planted faults"
import itertools
import math
import random
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from transformers.utils import logging

from lab_lm.core.paths import shared_data
from lab_lm.evals.logits import by_length, head_spot, in_mode, logits_at, token_nats
from lab_lm.evals.ngrams import KneserNey, NgramFloor, discounts
from lab_lm.evals.scores import floor_scorers, language_scores
from lab_lm.evals.scorers import KINDS, logits_scorer, masked_windows, scorer, uniform_scorer
from lab_lm.nets.transformer import NATIVE, NetConfig, Transformer
from lab_lm.text.script import sentences
from lab_lm.text.sources import read_records
from lab_lm.text.tokenize import train_tokenizer

logging.set_verbosity_error()


def real_sentences():
    "Sentences of the samples, and of the Universal Declaration of Human Rights in Hindi where it is there"
    path = shared_data('text/udhr/hin.txt')
    texts = [*([path.read_text(encoding='utf-8')] if path else []), *(r.text for r in read_records('data/samples', 'hi'))]
    return [s for s in dict.fromkeys(s for t in texts for s in sentences(t)) if 8 < len(s) < 160][:700]


TEXTS = real_sentences()
TOKENIZER = train_tokenizer(TEXTS, 'akshara_bpe', 1200)
V = len(TOKENIZER)
SHAPE = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, initializer_range=.3)


def llama(**more): return hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE | more)).eval()


def roberta(): return hf.RobertaForMaskedLM(hf.RobertaConfig(**SHAPE, max_position_embeddings=300, pad_token_id=TOKENIZER.pad_token_id)).eval()


def ours(mode): return Transformer(NetConfig(vocab_size=V, mode=mode, layers=2, width=32, heads=2, init=.3, **NATIVE['masked'])).eval()


MODELS = {'causal': llama(), 'masked': roberta(), 'masked_word': roberta()}


# ---- counting

def witten_bell(texts, order, size):
    "The definition, with dictionaries"
    followers = defaultdict(Counter)
    for ids in map(tuple, texts):
        for i, w in enumerate(ids):
            for n in range(min(order, i + 1)): followers[ids[i - n:i]][w] += 1
    def p(context, w):
        out = 1 / size
        for n in range(min(order, len(context) + 1)):
            h = tuple(context[len(context) - n:])
            if h not in followers: break
            f = followers[h]
            out = (f[w] + len(f) * out) / (f.total() + len(f))
        return out
    return p


def kneser_ney(texts, order, size):
    "The definition, with dictionaries: counts of the longest n-grams, numbers of tokens to the left of the others"
    mark, grams = (('^',) if order > 1 else ()), [Counter() for _ in range(order + 1)]
    for ids in texts:
        ids = (*mark, *ids)
        for n in range(1, order + 1): grams[n].update(ids[i:i + n] for i in range(len(ids) - n + 1))
    counts = [None, *[Counter() for _ in range(order)]]
    counts[order] = grams[order]
    for n in range(1, order):
        for g in grams[n + 1]: counts[n][g[1:]] += 1
        counts[n] |= Counter({g: c for g, c in grams[n].items() if g[0] == '^' and n > 1})
    off = [None, *[discounts(np.array(list(c.values()))) for c in counts[1:]]]
    def p(context, w):
        context, out = (*mark, *context), 1 / size
        for n in range(1, min(order, len(context) + 1) + 1):
            h = context[len(context) - n + 1:]
            inside = {g[-1]: c for g, c in counts[n].items() if g[:-1] == h and g[-1] != '^'}
            if not inside: continue
            total, taken = sum(inside.values()), sum(off[n][min(c, 3)] for c in inside.values())
            out = (inside.get(w, 0) - off[n][min(inside.get(w, 0), 3)]) / total + taken / total * out
        return out
    return p


def some_texts(size, n=40): return [[min(int(random.expovariate(.5)), size - 2) for _ in range(random.randrange(12))] for _ in range(n)]


@pytest.mark.parametrize('kind, definition', [(NgramFloor, witten_bell), (KneserNey, kneser_ney)], ids=['witten_bell', 'kneser_ney'])
@pytest.mark.parametrize('order', [1, 2, 3, 5])
def test_ngrams_are_their_definitions(kind, definition, order):
    size, texts = 9, some_texts(9)
    model, p = kind(order, size).fit(texts), definition(texts, order, size)
    for ids in [*some_texts(9, 6), texts[0], [size - 1, 0, 0]]:
        assert np.exp(model.logprob(ids)) == pytest.approx([p(ids[:i], w) for i, w in enumerate(ids)], rel=1e-12)
        assert model.probs(ids) == pytest.approx([p(ids, w) for w in range(size)], rel=1e-12)
    whole = kind(order, size).fit(texts[:15]).fit(texts[15:])
    assert whole.logprob(texts[3]).tolist() == model.logprob(texts[3]).tolist()


@pytest.mark.parametrize('order', [1, 2, 3, 4, 5])
def test_probabilities_sum_to_one_after_every_context(order):
    size, texts = 6, some_texts(6, 60)
    for kind in (NgramFloor, KneserNey):
        model = kind(order, size).fit(texts)
        for context in itertools.chain.from_iterable(itertools.product(range(size), repeat=k) for k in range(4)):
            p = model.probs(context)
            assert p.min() > 0 and p.sum() == pytest.approx(1, abs=1e-12)
        ids = random.choice([t for t in texts if len(t) > 3])
        assert model.logprob(ids) == pytest.approx([np.log(model.probs(ids[:i])[w]) for i, w in enumerate(ids)])


def test_discounts_follow_the_counts_of_counts():
    "40 n-grams came once, 20 twice, 10 three times, 5 four times: Y = 40 / 80"
    assert discounts(np.repeat([1, 2, 3, 4, 9], [40, 20, 10, 5, 3])) == pytest.approx([0, 1 - 20 / 40, 2 - 3 * .5 * 10 / 20, 3 - 4 * .5 * 5 / 10])
    assert discounts(np.array([1, 1, 1])).tolist() == [0, .5, 1, 1.5]
    assert discounts(np.repeat([1, 2, 3, 4], [10, 100, 5, 500])).tolist() == [0, .5, 1, 1.5]  # D3 would be negative


def test_a_token_that_follows_one_other_is_no_likely_guess_elsewhere():
    "Kneser-Ney's San Francisco: 1 comes as often as 2, but always after 0"
    texts = [[0, 1]] * 12 + [[k, 2] for k in range(3, 9)] * 2
    after_new, p = KneserNey(2, 12).fit(texts).probs([9]), NgramFloor(2, 12).fit(texts).probs([9])
    assert after_new[2] > 3 * after_new[1] and p[1] == pytest.approx(p[2])


def test_longer_contexts_help_on_real_text():
    coded = TOKENIZER(TEXTS, add_special_tokens=False).input_ids
    train, held = [t for i, t in enumerate(coded) if i % 6], coded[::6]
    cost = {(k, n): -np.concatenate([m.logprob(t) for t in held]).mean() for k in (NgramFloor, KneserNey) for n in (1, 2, 3) for m in [k(n, V).fit(train)]}
    for k in (NgramFloor, KneserNey): assert cost[k, 3] < cost[k, 1] < math.log(V) and cost[k, 2] < cost[k, 1]
    assert cost[KneserNey, 3] < cost[NgramFloor, 3]


def test_bad_ids_and_nothing_counted():
    for ids in ([3, 10], [-1]):
        with pytest.raises(ValueError, match='between 0 and 9'): KneserNey(2, 10).fit([ids])
    with pytest.raises(ValueError, match='between 0 and 9'): NgramFloor(2, 10).fit([[1]]).logprob([10])
    for model in (NgramFloor(3, 10), NgramFloor(0, 10).fit([[1, 2]]), KneserNey(3, 10).fit([]), KneserNey(2, 10).fit([[], []])):
        assert np.exp(model.logprob([1, 2, 3])) == pytest.approx([.1] * 3) and model.probs([4]) == pytest.approx([.1] * 10) and len(model.logprob([])) == 0


# ---- logits

def test_costs_are_those_of_double_precision():
    logits = torch.randn(500, 3000) * random.choice([1, 10, 50])
    targets = torch.randint(3000, (500,))
    nats, right = token_nats(logits, targets)
    exact = -logits.double().log_softmax(-1)[range(500), targets].numpy()
    assert nats.dtype == np.float64 and np.abs(nats - exact).max() < 1e-5 and np.abs(nats - exact).mean() < 1e-6
    assert (right == (logits.argmax(-1) == targets).numpy()).all()
    assert np.abs(token_nats(logits.bfloat16(), targets)[0] + logits.bfloat16().double().log_softmax(-1)[range(500), targets].numpy()).max() < 1e-5
    assert (token_nats(torch.zeros(3, V), torch.arange(3))[0] == math.log(V)).all() and len(token_nats(torch.zeros(0, 5), torch.zeros(0).long())[0]) == 0


ARCHITECTURES = dict(
    llama=lambda: llama(), gpt2=lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=2)), roberta=roberta,
    gemma3=lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SHAPE, num_key_value_heads=1, head_dim=16, sliding_window=8)),
    bert=lambda: hf.BertForMaskedLM(hf.BertConfig(**SHAPE)), modernbert=lambda: hf.ModernBertForMaskedLM(hf.ModernBertConfig(**SHAPE, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    deberta=lambda: hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**SHAPE)), albert=lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**SHAPE, embedding_size=16)),
    electra=lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**SHAPE, embedding_size=16)), ours=lambda: ours('masked'), hybrid=lambda: in_mode(ours('hybrid'), causal=True))


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_the_head_works_at_chosen_places_only(name):
    model, ids = ARCHITECTURES[name]().eval(), torch.randint(5, V, (3, 11))
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    inputs['attention_mask'][1, 7:] = 0
    spot = head_spot(model)
    assert spot is not None
    for chosen in (2, 25):
        rows, places = zip(*random.sample([(r, p) for r in range(3) for p in range(7)] + [(r, p) for r in (0, 2) for p in range(7, 11)], chosen))
        rows, places = torch.tensor(rows), torch.tensor(places)
        with torch.inference_mode(): whole, some = model(**inputs).logits[rows, places], logits_at(model, inputs, rows, places, spot)
        assert torch.allclose(whole, some, atol=1e-4 * whole.abs().max())
    with torch.inference_mode(): assert model(**inputs).logits.shape == (3, 11, V)  # Nothing is left behind


def test_a_model_that_cannot_be_asked_so_is_asked_for_everything():
    class Mixed(hf.LlamaForCausalLM):
        "A head that looks at other places"
        def forward(self, **inputs):
            out = super().forward(**inputs)
            out.logits = out.logits.cumsum(1)
            return out
    mixed = Mixed(hf.LlamaConfig(**SHAPE)).eval()
    assert head_spot(mixed) is None and head_spot(torch.nn.Linear(2, 2)) is None
    text = TEXTS[0]
    ids = torch.tensor([[TOKENIZER.bos_token_id, *TOKENIZER(text, add_special_tokens=False).input_ids]])
    with torch.inference_mode(): logp = mixed(input_ids=ids).logits[0].double().log_softmax(-1)
    assert scorer(mixed, TOKENIZER).nats([text])[0] == pytest.approx(-logp[range(ids.shape[1] - 1), ids[0, 1:]].numpy(), abs=1e-4)


def test_batches_hold_each_row_once_and_no_more_than_they_may():
    lengths = [random.randrange(1, 90) for _ in range(200)]
    batches = list(by_length(lengths, rows=7, tokens=300))
    assert sorted(itertools.chain(*batches)) == list(range(200))
    for b in batches: assert len(b) <= 7 and (max(lengths[i] for i in b) * len(b) <= 300)


# ---- scorers against the oracle

class Asked:
    "A tokenizer as minicons wants it: by an older name, and for causal models without the end token"
    def __init__(self, inner, ends): self.inner, self.ends, self.cls_token_id, self.sep_token_id = inner, ends, inner.bos_token_id, inner.eos_token_id
    def __getattr__(self, name): return getattr(self.inner, name)
    def __call__(self, texts, **how):
        enc = self.inner(texts, **how)
        if self.ends or 'return_tensors' not in how: return enc
        last = enc['attention_mask'].sum(1, keepdim=True) - 1
        enc['attention_mask'].scatter_(1, last, 0)
        return enc
    batch_encode_plus = __call__


def theirs(model, kind, texts, batch=8):
    "minicons' sums of log-probabilities"
    minicons = pytest.importorskip('minicons.scorer')
    asked = (minicons.IncrementalLMScorer if kind == 'causal' else minicons.MaskedLMScorer)(model, 'cpu', tokenizer=Asked(TOKENIZER, kind != 'causal'))
    how = {} if kind == 'causal' else dict(PLL_metric='original' if kind == 'masked' else 'within_word_l2r')
    return [x for i in range(0, len(texts), batch) for x in asked.sequence_score(texts[i:i + batch], reduction=lambda x: x.double().sum().item(), **how)]


@pytest.mark.parametrize('kind', KINDS)
def test_sentences_cost_what_minicons_says(kind):
    texts = random.sample([t for t in TEXTS if len(t) < 75], 200) if kind != 'causal' else random.sample(TEXTS, 200)
    mine = scorer(MODELS[kind], TOKENIZER, kind, words='tokenizer').totals(texts)
    assert np.abs(mine + theirs(MODELS[kind], kind, texts)).max() < 1e-4


@pytest.mark.parametrize('kind', ['masked_word'])
def test_words_of_the_script_and_of_the_tokenizer(kind):
    "A sign that stands at a word is no part of it, though a tokenizer may have it so"
    pieces = hf.PreTrainedTokenizerFast(tokenizer_object=_by_spaces(), mask_token='[M]', unk_token='[U]', pad_token='[P]', cls_token='[C]', sep_token='[S]')
    model = hf.RobertaForMaskedLM(hf.RobertaConfig(**SHAPE | dict(vocab_size=len(pieces)), max_position_embeddings=60, pad_token_id=pieces.pad_token_id)).eval()
    script, tokens = (scorer(model, pieces, kind, words=w).nats(['घर है।', 'घर है']) for w in ('script', 'tokenizer'))
    assert script[1] == pytest.approx(tokens[1]) and np.flatnonzero(np.abs(script[0] - tokens[0]) > 1e-6).tolist() == [2, 3]


def _by_spaces():
    "Letters as tokens, words cut at spaces"
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    letters = Tokenizer(models.BPE({c: i for i, c in enumerate(['[P]', '[C]', '[S]', '[M]', '[U]', *'घरहै।'])}, [], unk_token='[U]'))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r'\s'), 'removed')
    letters.post_processor = processors.TemplateProcessing(single='[C] $A [S]', special_tokens=[('[C]', 1), ('[S]', 2)])
    return letters


# ---- scorers by definition

@pytest.mark.parametrize('kind', KINDS)
def test_batches_do_not_matter(kind):
    texts = [*random.sample(TEXTS, 3), '', 'क', TEXTS[0] + ' ' + TEXTS[1][:30]]
    one, many = (scorer(MODELS[kind], TOKENIZER, kind, batch_size=b).totals(texts) for b in (1, 64))
    assert one == pytest.approx(many, rel=1e-6)
    MODELS[kind].double()
    exact = [scorer(MODELS[kind], TOKENIZER, kind, batch_size=b).totals(texts) for b in (1, 64)]
    MODELS[kind].float()
    assert np.abs(exact[0] - exact[1]).max() < 1e-9 and one == pytest.approx(exact[0], rel=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_a_model_is_left_as_it_was_and_equal_texts_cost_the_same_to_the_last_bit(kind):
    model = MODELS[kind].train()
    nats = scorer(model, TOKENIZER, kind).nats([TEXTS[5], TEXTS[0], TEXTS[5]])
    assert model.training and nats[0].tolist() == nats[2].tolist() and all(x.dtype == np.float64 for x in nats)
    model.eval()


@pytest.mark.parametrize('kind', ['masked', 'masked_word'])
def test_masked_texts_longer_than_the_model(kind):
    "Every token hidden once, in its window, by hand"
    model, text = roberta(), ' '.join(TEXTS[:4])
    s = scorer(model, TOKENIZER, kind, max_length=14, stride=5)
    row, got, expected = s.rows([text])[0], s.nats([text])[0], {}
    for start, stop, first, last in masked_windows(len(row.ids), 12, 5):
        for i in range(first, last):
            assert i - start >= min(3, i) and stop - 1 - i >= min(3, len(row.ids) - 1 - i) and stop - start == 12
            if i in expected or random.random() > .2: expected.setdefault(i, None); continue
            hidden = np.array([TOKENIZER.bos_token_id, *row.ids[start:stop], TOKENIZER.eos_token_id])
            later = [j for j in range(i + 1, stop) if kind == 'masked_word' and _word_of(text, row.spans[j]) == _word_of(text, row.spans[i]) is not None]
            hidden[[j - start + 1 for j in (i, *later)]] = TOKENIZER.mask_token_id
            with torch.inference_mode(): logp = model(torch.tensor(hidden[None])).logits[0, i - start + 1].double().log_softmax(-1)
            expected[i] = -logp[row.ids[i]].item()
    assert sorted(expected) == list(range(len(row.ids)))
    for i, cost in expected.items():
        if cost is not None: assert got[i] == pytest.approx(cost, abs=1e-4)


def _word_of(text, span):
    from lab_lm.text.script import word_spans
    return next((w for w in word_spans(text) if w[0] < span[1] and span[0] < w[1]), None)


def test_a_hybrid_model_is_its_two_parents():
    net, causal, masked = ours('hybrid'), ours('causal'), ours('masked')
    causal.load_state_dict(net.state_dict()), masked.load_state_dict(net.state_dict())
    for kind, parent in (('causal', causal), ('masked', masked), ('masked_word', masked)):
        mine = scorer(in_mode(net, causal=kind == 'causal'), TOKENIZER, kind).totals(TEXTS[:10])
        assert mine == pytest.approx(scorer(parent, TOKENIZER, kind).totals(TEXTS[:10]), rel=1e-5)
    assert scorer(net, TOKENIZER, 'causal') is not None
    with pytest.raises(ValueError, match='hybrid'): scorer(net, TOKENIZER).nats(TEXTS[:1])


@pytest.mark.parametrize('kind', KINDS)
def test_lost_numbers_are_told_with_the_text(kind):
    bad = TOKENIZER(TEXTS[0], add_special_tokens=False).input_ids[-1]
    class Broken(torch.nn.Module):
        def forward(self, input_ids, attention_mask): return SimpleNamespace(logits=torch.where((input_ids == bad).any(1)[:, None, None], torch.nan, 0.).expand(*input_ids.shape, V))
    well = [t for t in TEXTS if bad not in TOKENIZER(t).input_ids][:3]
    with pytest.raises(ValueError, match=r'text 3 \(.*costs NaN at .*float32'): scorer(Broken(), TOKENIZER, kind).nats([*well, TEXTS[0]])
    assert np.unique(np.concatenate(scorer(Broken(), TOKENIZER, kind).nats(well))).tolist() == [math.log(V)]


def test_tokenizers_without_begin_or_mask_token():
    none = train_tokenizer(TEXTS, 'bpe', 700)
    none.bos_token = none.eos_token = none.mask_token = None
    small = llama(vocab_size=len(none))
    s, floor = scorer(small, none), uniform_scorer(none)
    nats = s.nats([TEXTS[0], '', TEXTS[1]])
    assert np.isnan(nats[0][0]) and not np.isnan(nats[0][1:]).any() and np.isfinite(s.totals([TEXTS[0], ''])).all() and not s.rows([TEXTS[0]])[0].scored[0]
    assert 'left out' in s.protocol and language_scores(s, [TEXTS[0]], {'uniform': floor})['loss'].baselines == pytest.approx({'uniform': math.log(len(none))})
    ask = logits_scorer(lambda ids: small(torch.tensor([ids])).logits[0].detach().numpy(), none, max_length=20)
    assert np.isnan(ask.nats(TEXTS[:1])[0][0]) and ask.totals(TEXTS[:2]) == pytest.approx(scorer(small, none, max_length=20).totals(TEXTS[:2]), rel=1e-5)
    with pytest.raises(ValueError, match="kind='causal'"): scorer(small, none, 'masked')
    with pytest.raises(ValueError, match='max_length=2048 or less'): scorer(small, none, max_length=5000)


def test_a_gguf_file_is_a_scorer(tmp_path):
    "The wiring: llama.cpp's log-probabilities as the function from ids to logits"
    pytest.importorskip('xllamacpp')
    from lab_lm.gen.gguf import write_gguf
    from lab_lm.gen.llama import Llama, llama_logprobs
    from lab_lm.nets.pretrained import quiet
    model = llama(hidden_size=64, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=TOKENIZER.bos_token_id, eos_token_id=TOKENIZER.eos_token_id)
    with quiet(): model.save_pretrained(tmp_path), TOKENIZER.save_pretrained(tmp_path)
    with Llama(write_gguf(tmp_path, tmp_path / 'm.gguf', 'f32')) as opened:
        s = logits_scorer(lambda ids: llama_logprobs(opened, ids), TOKENIZER, 'llama.cpp', max_length=40)
        assert s.totals(TEXTS[:8]) == pytest.approx(scorer(model, TOKENIZER, max_length=40).totals(TEXTS[:8]), abs=1e-2)
        assert language_scores(s, TEXTS[:8])['bits_per_byte'].protocol.startswith('llama.cpp: -ln p')


# ---- scores

@pytest.mark.parametrize('kind', ['akshara_bpe', 'bpe', 'unigram', 'wordpiece', 'byte', 'char'])
def test_uniform_is_exactly_log2_of_the_vocabulary(kind):
    tokenizer = train_tokenizer(TEXTS, kind, 1200)
    class Even(torch.nn.Module):
        def forward(self, input_ids, attention_mask): return SimpleNamespace(logits=torch.zeros(*input_ids.shape, len(tokenizer)))
    held = [TEXTS[0], 'zebra ஃ 🦓', ' दो  ख़ाली । ', '']
    for s in (uniform_scorer(tokenizer), *(scorer(Even(), tokenizer, k) for k in KINDS)):
        assert {x for nats in s.nats(held) for x in nats} == {math.log(len(tokenizer))}
        assert language_scores(s, held)['loss'].value / math.log(2) == pytest.approx(math.log2(len(tokenizer)), rel=1e-14)


def test_scores_are_sums_over_sums_beside_the_floors():
    train, held = TEXTS[60:], TEXTS[:30]
    floors, s = floor_scorers(TOKENIZER, train, (1, 2, 3, 4, 5)), scorer(MODELS['masked'], TOKENIZER, 'masked')
    found, nats, rows = language_scores(s, held, floors, groups=['a', 'b'] * 15), s.nats(held), s.rows(held)
    scored = [r.scored for r in rows]
    bits = sum(n[k].sum() for n, k in zip(nats, scored)) / math.log(2)
    assert found['bits_per_byte'].value == pytest.approx(bits / sum(r.bytes[k].sum() for r, k in zip(rows, scored)), rel=1e-9)
    base = found['bits_per_byte'].baselines
    assert list(base) == ['uniform', 'unigram', 'bigram', 'trigram', '4-gram', '5-gram'] and base['trigram'] < base['unigram'] < base['uniform']
    by_hand = KneserNey(3, V).fit(TOKENIZER(train, add_special_tokens=False).input_ids)
    assert base['trigram'] == pytest.approx(-sum(by_hand.logprob(r.ids)[k].sum() for r, k in zip(rows, scored)) / math.log(2) / sum(r.bytes[k].sum() for r, k in zip(rows, scored)))
    assert list(found['accuracy'].baselines) == ['unigram'] and found['accuracy'].low <= found['accuracy'].value <= found['accuracy'].high
    assert found['loss/a'].value == pytest.approx(language_scores(s, held[::2], floors)['loss'].value, rel=1e-6)
    assert 'accuracy' not in language_scores(floors['trigram'], held)


def test_two_tokenizers_meet_in_bits_per_byte():
    train, held = [t for i, t in enumerate(TEXTS) if i % 5], TEXTS[::5]
    found = [language_scores(floor_scorers(t, train, (n,))[name], held) for t, n, name in
             ((train_tokenizer(train, 'char', 300), 5, '5-gram'), (train_tokenizer(train, 'akshara_bpe', 1200), 3, 'trigram'), (train_tokenizer(train, 'unigram', 1200), 3, 'trigram'))]
    bits, perplexities = ([f[k].value for f in found] for k in ('bits_per_byte', 'perplexity'))
    assert max(bits) / min(bits) < 1.35 and max(perplexities) / min(perplexities) > 4
