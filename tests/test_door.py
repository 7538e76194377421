"Nine families of transformers through the door: packed against apart, sparse against whole, labels, windows, hybrids, wrong pairs"
import random

import pytest
import torch
from torch.nn import functional as F
from transformers import (CONFIG_MAPPING, AlbertConfig, AlbertForMaskedLM, BertConfig, BertForMaskedLM, BertForSequenceClassification, DebertaV2Config, DebertaV2ForMaskedLM,
                          Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, ModernBertConfig,
                          ModernBertForMaskedLM, XLMRobertaConfig, XLMRobertaForMaskedLM)

from lab_lm.nets.door import OVERFLOWS, Door, can_be_sparse, can_pack, check_length, check_tokenizer, fp16_refusal, inputs_for, kind_of, positions_of
from lab_lm.nets.transformer import NetConfig, Transformer
from lab_lm.text.rows import PackedRows, TextRows
from lab_lm.text.tokenize import train_tokenizer
from lab_lm.train.feed import part

SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=80, initializer_range=.3)
HALF = {**SIZE, 'num_key_value_heads': 2}
IDS = dict(bos_token_id=2, eos_token_id=3, pad_token_id=0)
FAMILIES = {
    'xlm-r': lambda: XLMRobertaForMaskedLM(XLMRobertaConfig(vocab_size=200, **SIZE)),
    'bert': lambda: BertForMaskedLM(BertConfig(vocab_size=200, **SIZE)),
    'albert': lambda: AlbertForMaskedLM(AlbertConfig(vocab_size=200, embedding_size=16, **SIZE)),
    'deberta': lambda: DebertaV2ForMaskedLM(DebertaV2Config(vocab_size=200, relative_attention=True, pos_att_type=['c2p', 'p2c'], position_biased_input=False, **SIZE)),
    'modernbert': lambda: ModernBertForMaskedLM(ModernBertConfig(vocab_size=200, local_attention=10, **{**SIZE, 'num_hidden_layers': 4}, **IDS)),
    'gpt2': lambda: GPT2LMHeadModel(GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=4, n_positions=80, initializer_range=.3)),
    'llama': lambda: LlamaForCausalLM(LlamaConfig(vocab_size=200, **HALF, **IDS)),
    'mistral': lambda: MistralForCausalLM(MistralConfig(vocab_size=200, sliding_window=9, **HALF, **IDS)),
    'gemma3': lambda: Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=200, head_dim=8, sliding_window=9, layer_types=['sliding_attention', 'full_attention'],
                                                         query_pre_attn_scalar=8, **HALF, **IDS))}
PACKED = [name for name in FAMILIES if name != 'deberta']


@pytest.fixture(scope='module')
def models(): return {name: make().eval() for name, make in FAMILIES.items()}


def texts_of(n, longest):
    "Random texts of random lengths, without the padding tokens 0 and 1"
    return [torch.randint(5, 200, (random.randrange(1, longest),)) for _ in range(n)]


def lesson(model, text):
    "Labels of one text, where they stand"
    if kind_of(model) == 'causal': return torch.cat([text[1:], torch.tensor([-100])])
    return torch.where(torch.rand(len(text)) < .4, text, -100)


def packed_batch(texts, labels, length):
    "Texts one after the other in rows, with padding at the end of each row"
    rows, row = [], []
    for t, l in zip(texts, labels):
        if sum(len(x) for x, _ in row) + len(t) > length: rows.append(row); row = []
        row.append((t, l))
    rows.append(row)
    out = {k: torch.full((len(rows), length), v) for k, v in dict(input_ids=1, labels=-100, texts=0, position_ids=0).items()}
    for r, row in enumerate(rows):
        at = 0
        for i, (t, l) in enumerate(row):
            place = slice(at, at := at + len(t))
            out['input_ids'][r, place], out['labels'][r, place], out['texts'][r, place], out['position_ids'][r, place] = t, l, i + 1, torch.arange(len(t))
    return out


@pytest.mark.parametrize('name', PACKED)
def test_packed_loss_is_that_of_texts_on_their_own(name, models):
    model, texts = models[name], texts_of(12, 40)
    labels = [lesson(model, t) for t in texts]
    alone = torch.cat([F.cross_entropy(model(input_ids=t[None]).logits[0], l, ignore_index=-100, reduction='none')[l != -100] for t, l in zip(texts, labels)])
    got = Door(model)(**packed_batch(texts, labels, 48))
    assert abs(got.loss.item() - alone.mean().item()) < 1e-5 * max(1, alone.mean().item())
    torch.testing.assert_close(F.cross_entropy(got.logits, got.targets, reduction='none'), alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('name', FAMILIES)
def test_padded_loss_is_that_of_texts_on_their_own(name, models):
    model, texts = models[name], texts_of(6, 30)
    labels, width = [lesson(model, t) for t in texts], max(map(len, texts))
    pad = lambda rows, v: torch.stack([F.pad(r, (0, width - len(r)), value=v) for r in rows])
    batch = dict(input_ids=pad(texts, random.randrange(200)), attention_mask=pad([torch.ones_like(t) for t in texts], 0), labels=pad(labels, -100))
    alone = torch.cat([F.cross_entropy(model(input_ids=t[None]).logits[0], l, ignore_index=-100, reduction='none')[l != -100] for t, l in zip(texts, labels)])
    assert abs(Door(model)(**batch).loss.item() - alone.mean().item()) < 1e-5 * max(1, alone.mean().item())


@pytest.mark.parametrize('name', FAMILIES)
def test_which_families_pack(name, models):
    for length in (7, 40, 79): assert can_pack(models[name], length, seed=random.randrange(2**31)) is (name in PACKED)


@pytest.mark.parametrize('name', ['bert', 'xlm-r', 'gpt2', 'modernbert', 'gemma3'])
def test_plain_attention_and_sixteen_bits_pack_as_well(name):
    model = FAMILIES[name]().eval()
    model.set_attn_implementation('eager')
    assert can_pack(model, 60)
    assert can_pack(model.to(torch.bfloat16), 60)


def test_attention_without_masks_is_refused(models):
    model = FAMILIES['bert']()
    model.config._attn_implementation = 'flash_attention_2'
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"): inputs_for(model, dict(input_ids=torch.ones(1, 4).long(), texts=torch.ones(1, 4).long()))


def test_trials_disturb_nothing():
    model = FAMILIES['xlm-r']().train()
    torch.manual_seed(5)
    before, weights = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    assert can_pack(model, 30) and can_be_sparse(model) and model.training and all(m.training for m in model.modules())
    assert torch.equal(before, torch.get_rng_state()) and all(torch.equal(v, model.state_dict()[k]) for k, v in weights.items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('name', FAMILIES)
def test_the_sparse_head_has_the_gradients_of_the_whole_one(name, models):
    sparse, whole = Door(models[name]), Door(models[name])
    assert sparse.sparse
    whole.sparse = False
    ids = torch.randint(5, 200, (3, 20))
    labels = torch.where(torch.rand(ids.shape) < .2, ids, -100)
    labels[0, -1] = 7 # A causal label of the token after the row
    a, b = sparse(ids, labels=labels), whole(ids, labels=labels)
    trained = [p for p in models[name].parameters() if p.requires_grad]
    for x, y in zip(*(torch.autograd.grad(out.loss, trained, allow_unused=True) for out in (a, b))):
        assert (x is None) == (y is None) and (x is None or (x - y).abs().max() <= 1e-5 * y.abs().max().clamp_min(1e-3))
    assert abs(a.loss - b.loss).item() < 1e-5 and a.logits.shape == (int((labels != -100).sum()), 200)


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'gemma3'])
def test_labels_of_causal_models_go_back_one_place(name, models):
    texts = texts_of(5, 20)
    batch = packed_batch(texts, [lesson(models[name], t) for t in texts], 24)
    theirs = models[name](**inputs_for(models[name], batch)).loss
    assert abs(theirs.item() - Door(models[name])(**batch).loss.item()) < 1e-5
    wrong = models[name](**inputs_for(models[name], batch) | dict(labels=batch['labels'])).loss # The fault: labels moved twice
    assert abs(wrong - theirs).item() > 1e-3


def test_positions_end_where_the_model_ends(models):
    for name in ('bert', 'xlm-r', 'albert', 'gpt2'):
        model, most = models[name], positions_of(models[name])
        rows = lambda n: inputs_for(model, dict(input_ids=torch.full((1, n), 7), texts=torch.ones(1, n).long()))
        model(**rows(most))
        with pytest.raises((IndexError, RuntimeError)): model(**rows(most + 1))
        check_length(model, most)
        with pytest.raises(ValueError, match=f'longer than the {most} positions'): check_length(model, most + 1)
    own = Transformer(NetConfig(vocab_size=50, width=16, heads=2, layers=1, positions='learned', max_length=20))
    with pytest.raises(ValueError, match='20 positions'): check_length(own, 21)
    check_length(Transformer(NetConfig(vocab_size=50, width=16, heads=2, layers=1, max_length=20)), 21)


@pytest.mark.parametrize('name', ['xlm-r', 'bert', 'llama'])
def test_rows_of_one_batch_are_read_both_ways(name, models):
    door, ids = Door(models[name]), torch.randint(5, 200, (4, 16))
    causal, at = torch.tensor([True, False, True, False]), random.randrange(4, 14)
    for facts in (dict(attention_mask=torch.ones_like(ids)), dict(texts=torch.ones_like(ids))):
        other = ids.clone(); other[:, at] = (ids[:, at] - 5 + random.randrange(1, 190)) % 195 + 5
        moved = (door(ids, causal=causal, **facts).logits - door(other, causal=causal, **facts).logits)[:, :at].abs().amax((1, 2))
        assert (moved[causal] < 1e-5).all() and (moved[~causal] > 1e-3).all()
    by_itself = door(ids).logits
    given = door(ids, causal=torch.full((4,), door.kind == 'causal'), attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(given, by_itself, atol=1e-4, rtol=1e-4)


def test_parts_of_a_batch_add_up(models):
    texts = texts_of(40, 14)
    batch = packed_batch(texts, [lesson(models['modernbert'], t) for t in texts], 16)
    batch = {k: v[:len(v) // 4 * 4] for k, v in batch.items()}
    door, count = Door(models['modernbert']), lambda b: int((b['labels'] != -100).sum())
    whole = door(**batch).loss
    parts = sum(door(**p).loss * count(p) / count(batch) for r in range(2) for p in part(batch, r, 2, 2))
    assert abs(whole - parts).item() < 1e-5


def test_ours_goes_through_untouched():
    own = Transformer(NetConfig(vocab_size=200, width=32, layers=2, mode='hybrid')).eval()
    texts = texts_of(6, 20)
    batch = packed_batch(texts, [torch.where(torch.rand(len(t)) < .5, t, -100) for t in texts], 24)
    batch['causal'] = torch.rand(len(batch['texts'])) < .5
    a, b = own(**batch), Door(own)(**batch)
    assert torch.equal(a.loss, b.loss) and torch.equal(a.logits, b.logits) and inputs_for(own, batch) is batch
    assert kind_of(Door(own)) == 'hybrid' and not fp16_refusal(own)
    assert can_pack(Transformer(NetConfig(vocab_size=200, width=32, layers=2)))


def test_an_adapter_around_the_model():
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(FAMILIES['llama'](), LoraConfig(r=4, target_modules=['q_proj', 'v_proj'], task_type='CAUSAL_LM')).eval()
    door, texts = Door(model), texts_of(8, 20)
    assert kind_of(door) == 'causal' and can_pack(model, 40) and door.sparse
    batch = packed_batch(texts, [lesson(model, t) for t in texts], 24)
    loss = door(**batch).loss
    loss.backward()
    assert abs(loss.item() - Door(model.get_base_model())(**batch).loss.item()) < 1e-5
    assert {n for n, p in door.named_parameters() if p.grad is not None} == {n for n, p in door.named_parameters() if 'lora' in n}


@pytest.mark.parametrize('name', ['deberta', 'xlm-r'])
def test_training_from_rows(name):
    ids = torch.randint(5, 200, (600,)).numpy()
    bounds = list(range(0, 601, 12))
    door = Door(FAMILIES[name]()).train()
    rows = PackedRows(ids, bounds, 24) if can_pack(door, 24) else TextRows(ids, bounds, 24)
    assert isinstance(rows, TextRows) is (name == 'deberta')
    batch = rows.batch(0, 8)
    labels = torch.where(torch.rand(batch['input_ids'].shape) < .3, batch['input_ids'], -100)
    optimizer, losses = torch.optim.SGD(door.parameters(), lr=.3), []
    for _ in range(20):
        losses.append(door(**batch, labels=labels).loss)
        losses[-1].backward(); optimizer.step(); optimizer.zero_grad()
    assert losses[-1] < .8 * losses[0]


def test_wrong_pairs():
    tok = train_tokenizer(['यह एक छोटा वाक्य है'] * 20, 'bpe', 300, min_frequency=1)
    fits = dict(vocab_size=len(tok), **SIZE)
    check_tokenizer(BertForMaskedLM(BertConfig(**fits)), tok)
    for config, said in ((dict(vocab_size=5000, **SIZE), 'the model was trained with'), (dict(vocab_size=100, **SIZE), 'only 100 rows'), (dict(**fits, pad_token_id=1), 'pad_token_id=0'),
                         (dict(**fits, eos_token_id=9), 'eos_token_id=3')):
        with pytest.raises(ValueError, match=said): check_tokenizer(BertForMaskedLM(BertConfig(**config)), tok)
        with pytest.raises(ValueError, match=said): Door(BertForMaskedLM(BertConfig(**config)), tok)
    many = LlamaConfig(**fits | dict(num_key_value_heads=2), pad_token_id=0, bos_token_id=2, eos_token_id=[7, 3])
    check_tokenizer(LlamaForCausalLM(many), tok)
    tok.mask_token = None
    check_tokenizer(LlamaForCausalLM(many), tok) # A causal model needs no mask
    with pytest.raises(ValueError, match='no mask token'): check_tokenizer(BertForMaskedLM(BertConfig(**fits)), tok)
    with pytest.raises(ValueError, match='no masked or causal'): Door(BertForSequenceClassification(BertConfig(**fits)))


def test_families_that_overflow_in_fp16_have_names_that_exist():
    class Stub:
        def __init__(self, kind): self.config = type('Config', (), dict(model_type=kind))
    known = set(CONFIG_MAPPING)
    for stem in OVERFLOWS: assert stem in known or stem == 'byt5', stem # ByT5 is loaded as T5
    for kind in ('gemma2', 'gemma3', 'gemma3_text', 'gemma3n', 'gemma3n_text', 'mt5', 't5', 'pegasus'): assert 'fp16' in fp16_refusal(Stub(kind))
    for kind in ('bert', 'xlm-roberta', 'llama', 'gpt2', 'gemma', 'modernbert', 'qwen2', 'speecht5'): assert fp16_refusal(Stub(kind)) == ''
