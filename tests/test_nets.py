"Identities of the transformer, on fresh random inputs each time"
import math
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.t5.modeling_t5 import T5Attention, T5Config

from lab_lm.nets.layers import Cache, alibi_slopes, rotary_angles, rotate, visible
from lab_lm.nets.transformer import NATIVE, PRESETS, NetConfig, Transformer, count_parameters, preset

POSITIONS = ('rotary', 'learned', 'sinusoidal', 'alibi', 'relative', 'none')
VOCAB = 37


def net(mode='causal', **fields):
    "A small model in evaluation mode"
    return Transformer(NetConfig(**dict(vocab_size=VOCAB, width=32, heads=4, layers=2, max_length=64, init=.1, mode=mode) | fields)).eval()


def tokens(rows, length): return torch.randint(VOCAB, (rows, length))


def same(a, b, atol=1e-5): torch.testing.assert_close(a, b, atol=atol, rtol=0)


def changed(ids, row, place):
    "Another token at one place"
    other = ids.clone()
    other[row, place] = (ids[row, place] + 1 + torch.randint(VOCAB - 1, ())) % VOCAB
    return other


@pytest.mark.parametrize('positions', POSITIONS)
@pytest.mark.parametrize('mode', ['causal', 'hybrid'])
def test_a_causal_model_does_not_look_ahead(positions, mode):
    model, ids, t = net(mode, positions=positions), tokens(2, 12), int(torch.randint(1, 11, ()))
    with torch.no_grad(): apart = (model(ids, causal=True).logits - model(changed(ids, 1, t), causal=True).logits).abs().amax(-1)
    assert apart[:, :t].max() == 0 and apart[0].max() == 0 and apart[1, t:].min() > 0


@pytest.mark.parametrize('positions', POSITIONS)
def test_a_masked_model_looks_both_ways(positions):
    model, ids = net('masked', positions=positions), tokens(1, 12)
    with torch.no_grad(): assert (model(ids).logits - model(changed(ids, 0, 6)).logits).abs().amax(-1).min() > 0


@pytest.mark.parametrize('positions', POSITIONS)
@pytest.mark.parametrize('mode', ['causal', 'masked'])
def test_what_lies_under_the_padding_changes_nothing(positions, mode):
    model, ids = net(mode, positions=positions), tokens(3, 12)
    right, left = torch.ones_like(ids), torch.ones_like(ids)
    right[1, 7:], left[1, :5] = 0, 0
    for seen in (right, left):
        other = torch.where(seen == 0, tokens(3, 12), ids)
        with torch.no_grad(): a, b, alone = model(ids, attention_mask=seen).logits, model(other, attention_mask=seen).logits, model(ids[1:2, seen[1] == 1]).logits
        same(a[seen == 1], b[seen == 1])
        same(a[1, seen[1] == 1], alone[0])
        assert a.isfinite().all()


@pytest.mark.parametrize('positions', POSITIONS)
@pytest.mark.parametrize('mode', ['causal', 'masked'])
@pytest.mark.parametrize('kv_heads', [0, 2])
def test_packed_equals_unpacked(positions, mode, kv_heads):
    model, lengths = net(mode, positions=positions, kv_heads=kv_heads), [5, 9, 3]
    rows = [tokens(1, n) for n in lengths]
    ids = torch.cat((*rows, tokens(1, 4)), 1)
    texts = torch.tensor([[number for number, n in enumerate(lengths, 1) for _ in range(n)] + [0] * 4])
    places = torch.cat([torch.arange(n) for n in [*lengths, 4]])[None]
    with torch.no_grad():
        alone = torch.cat([model(row).logits for row in rows], 1)
        for given in (None, places): same(model(ids, texts=texts, position_ids=given).logits[:, :17], alone)
        assert (model(ids).logits[:, 5:17] - alone[:, 5:17]).abs().max() > 1e-3 # Without `texts` they do mix


@pytest.mark.parametrize('positions', POSITIONS)
@pytest.mark.parametrize('mode, kv_heads', [('causal', 0), ('causal', 2), ('hybrid', 1)])
def test_cached_equals_uncached(positions, mode, kv_heads):
    model, ids, cache, steps = net(mode, positions=positions, kv_heads=kv_heads), tokens(2, 20), Cache(), [7, 1, 1, 4, 1, 6]
    seen = torch.ones_like(ids)
    seen[0, :3] = 0 # A shorter prompt, padded on the left
    with torch.no_grad():
        whole = model(ids, attention_mask=seen, causal=True).logits
        parts = [model(i, attention_mask=s, causal=True, cache=cache).logits for i, s in zip(ids.split(steps, 1), seen.split(steps, 1))]
    same(torch.cat(parts, 1)[seen == 1], whole[seen == 1])
    assert cache.length == 20


def test_a_cache_takes_the_next_token_as_part_of_the_text():
    model, ids, cache = net(), tokens(1, 8), Cache()
    with torch.no_grad():
        whole = model(ids).logits
        same(torch.cat([model(i, cache=cache).logits for i in ids.split(1, 1)], 1), whole)


@pytest.mark.parametrize('positions', POSITIONS)
def test_checkpointing_changes_neither_loss_nor_gradients(positions):
    model, ids = net('masked', positions=positions, dropout=.2, **{k: v for k, v in NATIVE['masked'].items()}).train(), tokens(3, 10)
    labels, seen = torch.where(torch.rand(3, 10) < .4, ids, -100), []
    labels[0, 0] = 1
    for model.checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(7)
        loss = model(ids, labels).loss
        loss.backward()
        seen.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*seen): same(a, b, 1e-6)


@pytest.mark.parametrize('norm, activation, form', [('rms', 'swiglu', 'llama'), ('layer', 'geglu', 'modernbert'), ('layer', 'gelu', 'llama'), ('rms', 'relu', 'modernbert')])
@pytest.mark.parametrize('positions', POSITIONS)
@pytest.mark.parametrize('tied', [True, False])
def test_every_parameter_gets_a_gradient(norm, activation, form, positions, tied):
    model, ids = net('hybrid', norm=norm, activation=activation, form=form, positions=positions, tied=tied, kv_heads=2).train(), tokens(4, 12)
    model(ids, ids, causal=torch.tensor([True, False, True, False])).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or p.grad.abs().max() == 0] == []


def test_all_combinations_build_and_learn():
    for norm, positions, activation, mode in product(('rms', 'layer'), POSITIONS, ('gelu', 'relu', 'swiglu', 'geglu'), NATIVE):
        model, ids = net(mode, norm=norm, positions=positions, activation=activation, layers=1).train(), tokens(2, 8)
        causal = torch.tensor([True, False]) if mode == 'hybrid' else None
        before = model(ids, ids, causal=causal).loss
        before.backward()
        with torch.no_grad():
            for p in model.parameters(): p -= .01 * p.grad
            assert model(ids, ids, causal=causal).loss < before, (norm, positions, activation, mode)


def test_a_shift_of_all_places_changes_nothing_for_rotary():
    model, ids, places = net('masked'), tokens(2, 12), torch.arange(12)[None].expand(2, 12)
    with torch.no_grad(): same(model(ids, position_ids=places).logits, model(ids, position_ids=places + 300).logits, 1e-4)
    x, shift = torch.randn(1, 1, 1, 8), int(torch.randint(1, 50, ()))
    turned = rotate(x, rotary_angles(torch.tensor([[shift]]), 8))
    assert not torch.allclose(turned, x) and torch.allclose(turned.norm(), x.norm())


def by_the_authors(n):
    "get_slopes of Press et al. (2022), as published with the paper"
    def power(n): return [2 ** (-(2 ** -(math.log2(n) - 3))) * (2 ** (-(2 ** -(math.log2(n) - 3)))) ** i for i in range(n)]
    if math.log2(n).is_integer(): return power(n)
    closest = 2 ** math.floor(math.log2(n))
    return power(closest) + by_the_authors(2 * closest)[0::2][:n - closest]


def test_alibi_slopes_are_the_papers():
    for heads in range(1, 34): same(alibi_slopes(heads), torch.tensor(by_the_authors(heads)), 1e-6)


def test_alibi_takes_slope_times_distance_from_the_score():
    model = net('hybrid', positions='alibi')
    bias = model.positions.bias(5)[0]
    assert bias[1, 4, 1] == -3 * alibi_slopes(4)[1] and bias[1, 1, 4] == bias[1, 4, 1] and bias.diagonal(dim1=1, dim2=2).abs().max() == 0


@pytest.mark.parametrize('mode', ['causal', 'masked'])
def test_relative_bias_is_t5s(mode):
    model = net(mode, positions='relative')
    theirs = T5Attention(T5Config(num_heads=4, is_decoder=mode == 'causal'), has_relative_attention_bias=True)
    theirs.relative_attention_bias.weight = model.positions.ranges.weight
    with torch.no_grad(): same(model.positions.bias(200), theirs.compute_bias(200, 200), 0)


def test_a_tied_head_is_the_embedding():
    tied, free, ids = net(), net(tied=False), tokens(1, 6)
    assert tied.num_parameters() + VOCAB * 32 == free.num_parameters()
    ids[ids == 3] = 4
    with torch.no_grad():
        for model, moves in ((tied, True), (free, False)):
            before = model(ids).logits
            model.embed.weight[3] += 1 # A token that is not in the text
            assert ((model(ids).logits - before).abs().amax((0, 1)) > 1e-4).nonzero().flatten().tolist() == ([3] if moves else [])


@pytest.mark.parametrize('form', ['llama', 'modernbert'])
def test_the_loss_is_only_where_labels_are(form):
    model, ids = net('masked', form=form), tokens(3, 11)
    labels = torch.where(torch.rand(3, 11) < .3, tokens(3, 11), -100)
    labels[1, 4] = 2
    here = labels != -100
    with torch.no_grad(): whole, out = model(ids), model(ids, labels)
    same(out.logits, whole.logits[here])
    same(out.hidden, whole.hidden[here])
    assert torch.equal(out.targets, labels[here])
    same(out.loss, -whole.logits[here].log_softmax(-1).gather(-1, labels[here][:, None]).mean())


def test_no_labels_give_no_loss_but_a_gradient():
    model, ids = net().train(), tokens(2, 5)
    out = model(ids, torch.full_like(ids, -100))
    out.loss.backward()
    assert out.loss == 0 and out.logits.shape == (0, VOCAB)
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.parameters())


class Largest(TorchDispatchMode):
    "Remembers the size of the largest tensor made inside the block"
    def __init__(self): super().__init__(); self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple) else [out]: self.size = max(self.size, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


def test_one_label_needs_no_table_of_all_logits():
    model, ids = net('masked', vocab_size=5000), tokens(4, 40)
    labels = torch.full_like(ids, -100)
    labels[2, 3] = 1
    sizes = []
    for given in (labels, None):
        with torch.no_grad(), Largest() as largest: model(ids, given)
        sizes.append(largest.size)
    assert sizes[0] <= 5000 * 32 < sizes[1] == 4 * 40 * 5000 # Nothing larger than the embedding


@pytest.mark.parametrize('positions', POSITIONS)
def test_rows_of_a_hybrid_are_what_they_would_be_alone(positions):
    model, ids, causal = net('hybrid', positions=positions), tokens(4, 10), torch.tensor([True, False, False, True])
    seen = torch.ones_like(ids)
    seen[2, 6:] = 0
    for given in (dict(), dict(attention_mask=seen)):
        with torch.no_grad(): mixed, back, both = (model(ids, causal=c, **given).logits for c in (causal, True, False))
        same(mixed[causal], back[causal])
        same(mixed[~causal], both[~causal])
        assert (back - both).abs().max() > 1e-3


def test_misuse_says_what_to_do():
    learned, ids = net(positions='learned'), tokens(1, 65)
    with pytest.raises(ValueError, match='64 positions, given a text of 65 tokens; cut texts to 64, or choose'): learned(ids)
    learned(ids, texts=torch.tensor([[1] * 30 + [2] * 35])) # Each text is short enough
    net()(ids) # Rotary has no end
    with pytest.raises(ValueError, match='say causal=True'): net('hybrid')(ids)
    with pytest.raises(ValueError, match="make one with mode='hybrid'"): net('masked')(ids, causal=True)
    with pytest.raises(ValueError, match='a cache needs'): net('masked')(ids, cache=Cache())
    cache = Cache()
    learned(ids[:, :60], cache=cache)
    with pytest.raises(ValueError, match='given a text of 65'): learned(ids[:, :5], cache=cache)


@pytest.mark.parametrize('fields, words', [
    (dict(width=100, heads=7), 'heads that do: 5 or 10; widths for 7 heads: 98 or 112'), (dict(width=64, heads=64), 'heads that do: 32'),
    (dict(heads=4, kv_heads=3), 'numbers that can: 2 or 4'), (dict(vocab_size=9, pad_id=9), 'one of the 9 tokens'), (dict(mode='both'), "'causal', 'masked' or 'hybrid'"),
    (dict(dropout=1), 'less than 1'), (dict(layer=3), "did you mean 'layers'")])
def test_a_wrong_shape_names_the_nearest_right_one(fields, words):
    with pytest.raises(ValueError, match=words): NetConfig(**dict(vocab_size=50) | fields)


def test_every_suggested_shape_is_valid():
    for width, heads in ((100, 7), (96, 5), (50, 3)):
        with pytest.raises(ValueError) as error: NetConfig(vocab_size=9, width=width, heads=heads)
        words = str(error.value).split('that do: ')[1].split(';')
        for n in words[0].split(' or '): NetConfig(vocab_size=9, width=width, heads=int(n))
        for n in words[1].split(': ')[1].split(',')[0].split(' or '): NetConfig(vocab_size=9, width=int(n), heads=heads)


def real(config, wanted):
    "The parameters of the model itself, not of the formula"
    with torch.device('meta'): there = Transformer(config).num_parameters()
    assert there == count_parameters(config) and abs(there / wanted - 1) <= .01


@pytest.mark.parametrize('mode', NATIVE)
def test_presets_hold_what_their_names_say(mode):
    for name, vocab in product(('10M', '50M', '110M', '350M'), (2_000, 8_000, 16_000, 32_000, 50_000, 64_000)):
        config = preset(name, vocab, mode)
        assert abs(count_parameters(config) / (float(name[:-1]) * 1e6) - 1) <= .01, (name, vocab)
        assert config.width % (64 if config.width >= 256 else 32) == 0 and config.hidden % 32 == 0 and config.width // config.heads in (32, 64)
    for name in ('10M', '110M'): real(preset(name, 16_000, mode), float(name[:-1]) * 1e6)
    for changes in (dict(positions='learned', max_length=1024), dict(tied=False), dict(activation='gelu'), dict(kv_heads=2), dict(layers=8)):
        real(preset('50M', 8_000, mode, **changes), 50e6)


def test_a_preset_that_cannot_be_says_why():
    with pytest.raises(ValueError, match='a vocabulary of 250,000 leaves no room for 6 layers in 10M'): preset('10M', 250_000)
    with pytest.raises(ValueError, match='known: tiny, 10M'): preset('base', 2000)
    with pytest.raises(ValueError, match='finds width, heads and hidden itself, given width'): preset('10M', 2000, width=64)
    assert set(PRESETS) == {'tiny', '10M', '50M', '110M', '350M'}


def test_first_weights_are_gpt2s():
    model = net(layers=8, width=128, init=.05)
    assert abs(model.embed.weight.std() - .05) < .005 and abs(model.blocks[3].attention.qkv.weight.std() - .05) < .002
    assert abs(model.blocks[3].mlp.down.weight.std() - .05 / 4) < .001 and abs(model.blocks[5].attention.out.weight.std() - .05 / 4) < .001


def test_dropout_is_off_in_evaluation():
    model, ids = net(dropout=.5), tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


def test_half_precision_runs_and_stays_near():
    for mode in ('causal', 'masked'):
        model, ids = net(mode, **NATIVE[mode]), tokens(2, 9)
        with torch.no_grad():
            exact = model(ids, attention_mask=torch.ones_like(ids)).logits
            with torch.autocast('cpu', torch.bfloat16): cast = model(ids, attention_mask=torch.ones_like(ids)).logits
            half = model.to(torch.bfloat16)(ids, attention_mask=torch.ones_like(ids)).logits
        assert cast.dtype == half.dtype == torch.bfloat16
        same(cast.float(), exact, .15), same(half.float(), exact, .25)


def test_the_mask_lets_padding_see_only_padding():
    texts = torch.randint(0, 3, (5, 9)).sort(-1).values
    mask = visible(9, torch.rand(5) < .5, texts)[:, 0]
    assert mask.diagonal(dim1=1, dim2=2).all() and not (mask & (texts[:, :, None] != texts[:, None])).any()
