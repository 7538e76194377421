"Quantised blocks against the gguf package, torch and llama.cpp's own quantiser; mixtures; importance against a second way to measure it"
import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from lab_lm.gen.blocks import BLOCKS, quantise
from lab_lm.gen.importance import importance, load_importance, save_importance
from lab_lm.gen.mixtures import FILE_TYPES, QUANTS, fitting, more_bits, size_of, types_for
from lab_lm.nets.tiny import tiny_gemma_tokenizer

CODED = [kind for kind, (block, _) in BLOCKS.items() if block > 1]
FINE = dict(Q8_0=.01, Q6_K=.025, Q5_1=.05, Q5_0=.06, Q5_K=.05, Q4_K=.09) # Largest error allowed, as a share of the spread of the weights


def read(data, kind): return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])


def kinds_of_weights(rng, rows=24, cols=1024):
    "Matrices as they occur: bell-shaped, heavy-tailed, with large columns, with rows of very different size, one-sided"
    bell = rng.normal(size=(rows, cols))
    return {'bell': bell, 'heavy': rng.standard_t(4, size=(rows, cols)), 'columns': bell * rng.lognormal(0, 1, cols),
            'rows': bell * 10. ** rng.uniform(-4, 2, (rows, 1)), 'one-sided': np.abs(bell) + .5}


def error(data, kind, values, weight=1.):
    return float(np.sqrt(np.mean(weight * (read(data, kind) - values) ** 2)))


@pytest.fixture
def rng(): return np.random.default_rng()


@pytest.fixture(scope='module')
def llama():
    "llama.cpp's own quantiser, from the library inside xllamacpp"
    import xllamacpp
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob('xllamacpp*.so'))))
    if not hasattr(library, 'ggml_quantize_chunk'): pytest.skip('this build of xllamacpp does not show ggml_quantize_chunk')
    chunk = library.ggml_quantize_chunk
    chunk.restype, chunk.argtypes = ctypes.c_size_t, [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def ask(values, kind, weights=None):
        (rows, cols), (block, size) = values.shape, BLOCKS[kind]
        out = np.zeros((rows, cols // block * size), np.uint8)
        number = int(gguf.GGMLQuantizationType[kind])
        assert chunk(number, values.ctypes.data, out.ctypes.data, 0, rows, cols, None if weights is None else weights.ctypes.data) == out.size
        return out
    return ask


# ---- blocks

@pytest.mark.parametrize('kind', CODED)
def test_error_is_small_and_no_larger_than_llama_cpps(kind, rng, llama):
    for name, values in kinds_of_weights(rng).items():
        values = values.astype('float32')
        ours, theirs = quantise(values, kind), llama(values, kind)
        assert ours.shape == theirs.shape and ours.dtype == np.uint8
        shares = np.sqrt(((read(ours, kind) - values) ** 2).mean(1)) / values.std(1)
        assert np.median(shares) < FINE[kind] * (2 if name in ('columns', 'one-sided') else 1), name
        assert error(ours, kind, values) <= 1.002 * error(theirs, kind, values), name


@pytest.mark.parametrize('kind', [k for k in CODED if k != 'Q8_0'])
def test_importance_lowers_the_weighted_error_as_far_as_llama_cpps(kind, rng, llama):
    for name, values in kinds_of_weights(rng).items():
        if name == 'rows': continue # The mean over rows of such different size measures one row only
        values, weight = values.astype('float32'), rng.gamma(.5, size=1024).astype('float32')
        ours = error(quantise(values, kind, weight), kind, values, weight)
        assert ours < .985 * error(quantise(values, kind), kind, values, weight), name
        assert ours <= 1.01 * error(llama(values, kind, weight), kind, values, weight), name


def test_q8_0_is_llama_cpps_byte_by_byte(rng, llama):
    values = rng.normal(size=(64, 512)).astype('float32') # No ties among them, at which the two might round differently
    assert (quantise(values, 'Q8_0') == llama(values, 'Q8_0')).all()
    assert (quantise(values, 'Q8_0') == gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)).all()


def test_types_without_blocks_are_torchs(rng):
    values = (rng.normal(size=(7, 33)) * 10. ** rng.integers(-9, 5, (7, 33))).clip(-65000, 65000).astype('float32')
    values[0, :4] = 0, -0., 1.00390625, 1.01171875 # Two ties of bf16
    for kind, dtype in (('F32', torch.float32), ('F16', torch.float16), ('BF16', torch.bfloat16)):
        wanted = torch.from_numpy(values).to(dtype).view(torch.uint8).numpy()
        assert (quantise(values, kind) == wanted).all(), kind


@pytest.mark.parametrize('kind', CODED)
def test_values_that_fit_come_back_exactly(kind, rng):
    "Multiples of a power of two, with a group that uses all codes: scales and minimum are exact in half precision"
    first, last = dict(Q8_0=(-127, 127), Q6_K=(-32, 31), Q5_1=(-3, 28), Q5_0=(-16, 15), Q5_K=(-13, 18), Q4_K=(-5, 10))[kind]
    values = rng.integers(first, last + 1, (3, 512)).astype('float32')
    size = 16 if kind == 'Q6_K' else 32
    values.reshape(-1, size)[:, 0], values.reshape(-1, size)[:, 1] = first, last
    # Shares of 63 make the shared numbers of the K formats exact
    values *= dict(Q4_K=.25, Q5_K=.25).get(kind, .5)
    got = read(quantise(values, kind), kind)
    assert np.abs(got - values).max() <= np.abs(values).max() * (2e-3 if kind.endswith('K') else 5e-4)


@pytest.mark.parametrize('kind', CODED)
def test_rows_do_not_depend_on_each_other(kind, rng):
    values, weight = rng.normal(size=(700, 512)).astype('float32'), rng.gamma(1, size=512)
    for w in (None, weight):
        whole = quantise(values, kind, w)
        assert (whole == np.concatenate([quantise(values[a:b], kind, w) for a, b in ((0, 1), (1, 250), (250, 700))])).all()
    assert (quantise(values[0], kind) == quantise(values[:1], kind)).all()
    assert quantise(values[:0], kind).shape == (0, 512 // BLOCKS[kind][0] * BLOCKS[kind][1])


@pytest.mark.parametrize('kind', CODED)
def test_odd_rows(kind, rng):
    bell = rng.normal(size=512)
    odd = {'zeros': 0 * bell, 'one value': 0 * bell + .37, 'one negative value': 0 * bell - 2.5, 'one weight': np.eye(1, 512, 100)[0] * 3, 'negative': -np.abs(bell) - 1,
           'half of it zero': bell * (np.arange(512) < 256), 'small': bell * 1e-2, 'large': bell * 1e3}
    for name, row in odd.items():
        got = read(quantise(row.astype('float32')[None], kind), kind)[0]
        assert np.isfinite(got).all() and np.abs(got - row).max() <= .13 * np.abs(row).max(), name
    tiny = (bell[None] * 3e-5).astype('float32') # Near the end of half precision, where steps are coarse
    assert error(quantise(tiny, kind), kind, tiny) < (.05 if kind.endswith('_K') or kind == 'Q8_0' else .15) * tiny.std() * (2 if kind == 'Q4_K' else 1)
    assert not read(quantise(np.full((1, 512), 1e-12, np.float32), kind), kind).any() # Below half precision: nothing is left
    edge = rng.choice([-65504., 65504., 65000., 0.], (1, 512)).astype('float32') # The largest that is taken
    assert np.abs(read(quantise(edge, kind), kind) - edge).max() < 5000
    outlier = np.where(np.arange(512) == 5, 1e4, bell).astype('float32')[None]
    got = read(quantise(outlier, kind), kind)[0]
    assert abs(got[5] - 1e4) < 60 and np.abs(got[256:] - outlier[0, 256:]).max() < .3


@pytest.mark.parametrize('kind', [k for k in CODED if k != 'Q8_0'])
def test_what_importance_means(kind, rng):
    values = rng.normal(size=(200, 512)).astype('float32')
    plain, same = quantise(values, kind), quantise(values, kind, np.full(512, 7.))
    assert (plain == same).all() and (plain == quantise(values, kind, np.zeros(512))).all()
    column, weight = int(rng.integers(512)), np.ones(512)
    weight[column] = 300
    off = lambda data: np.abs(read(data, kind) - values)[:, column].mean()
    assert off(quantise(values, kind, weight)) < .5 * off(plain)
    unseen = np.where(np.arange(512) < 256, 1., 0.) # A K block of which nothing was ever seen
    assert np.abs(read(quantise(values, kind, unseen), kind) - values)[:, 256:].max() < .6


def test_misuse(rng):
    values = rng.normal(size=(4, 256)).astype('float32')
    for call, words in ((lambda: quantise(values, 'Q3_K'), 'known: F32'), (lambda: quantise(values[:, :100], 'Q4_K'), 'multiple of 256, these have 100'),
                        (lambda: quantise(values, 'Q4_K', np.ones(255)), '256 numbers'), (lambda: quantise(values, 'Q4_K', -np.ones(256)), 'negative'),
                        (lambda: quantise(values * 1e6, 'F16'), 'more than F16 holds')):
        with pytest.raises(ValueError, match=words): call()
    for kind in BLOCKS:
        for bad in (np.nan, np.inf, -np.inf):
            broken = values.copy()
            broken[2, 7] = bad
            with pytest.raises(ValueError, match='largest weight is'): quantise(broken, kind)


# ---- mixtures

def llama_shapes(layers, width=512, inner=1536, tied=False):
    "Names and shapes of a Llama"
    part = dict(attn_q=(width, width), attn_k=(width // 4, width), attn_v=(width // 4, width), attn_output=(width, width),
                ffn_gate=(inner, width), ffn_up=(inner, width), ffn_down=(width, inner))
    shapes = {f'blk.{i}.{p}.weight': s for i in range(layers) for p, s in part.items()} | {f'blk.{i}.attn_norm.weight': (width,) for i in range(layers)}
    return shapes | {'token_embd.weight': (1000, width), 'output_norm.weight': (width,)} | ({} if tied else {'output.weight': (1000, width)})


def test_q4_k_m_of_a_known_model():
    "Llama 2 7B in Q4_K_M, as published files have it: 32 layers, six bits in 0-3, 6, 9, 12, 15, 18, 21, 24, 27 and 28-31; 291 tensors: 65 F32, 193 Q4_K, 33 Q6_K"
    shapes = llama_shapes(32, 4096, 11008)
    shapes |= {f'blk.{i}.ffn_norm.weight': (4096,) for i in range(32)} | {'token_embd.weight': (32000, 4096), 'output.weight': (32000, 4096)}
    shapes |= {f'blk.{i}.{p}.weight': (4096, 4096) for i in range(32) for p in ('attn_k', 'attn_v')}
    types = types_for(shapes, 'q4_k_m')
    assert [i for i in range(32) if types[f'blk.{i}.ffn_down.weight'] == 'Q6_K'] == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert {k: list(types.values()).count(k) for k in set(types.values())} == dict(F32=65, Q4_K=193, Q6_K=33)
    assert round(size_of(shapes, types) / 1e9, 2) == 4.08 # The published file has 4.08 GB, vocabulary included


@pytest.mark.parametrize('quant', QUANTS)
def test_every_recipe_is_whole(quant):
    for tied in (True, False):
        shapes = llama_shapes(3, tied=tied)
        types = types_for(shapes, quant)
        assert types.keys() == shapes.keys()
        assert all(types[n] == 'F32' for n, s in shapes.items() if len(s) == 1)
        head = types['token_embd.weight' if tied else 'output.weight']
        assert head == ('Q6_K' if QUANTS[quant].endswith('_K') else QUANTS[quant])
        if not tied: assert types['token_embd.weight'] == QUANTS[quant]
        assert all(s[-1] % BLOCKS[types[n]][0] == 0 for n, s in shapes.items())
    gguf.LlamaFileType[FILE_TYPES[quant]]
    assert set(types_for(llama_shapes(2, 72, 72), quant).values()) <= {'F32', 'F16', 'BF16'}


def test_order_of_the_tensors_is_no_matter(rng):
    shapes = llama_shapes(13)
    mixed = dict(rng.permutation(np.array(list(shapes.items()), dtype=object)).tolist())
    assert types_for(mixed, 'q5_k_m') == types_for(shapes, 'q5_k_m')
    assert [more_bits(i, 13) for i in range(13)] == [types_for(shapes, 'q5_k_m')[f'blk.{i}.attn_v.weight'] == 'Q6_K' for i in range(13)]


def test_rows_that_do_not_fit():
    assert [fitting(k, 1152) for k in ('Q4_K', 'Q5_K', 'Q6_K', 'Q8_0')] == ['Q5_0', 'Q5_1', 'Q8_0', 'Q8_0']
    assert {fitting(k, 72) for k in CODED} == {'F16'} and fitting('BF16', 72) == 'BF16'
    with pytest.raises(ValueError, match="did you mean 'q4_k_m'"): types_for(llama_shapes(2), 'q4_k_s')


# ---- importance

TEXTS = ['नदी के किनारे एक पुराना गाँव है। लोग नदी का पानी पीते हैं।', 'மழை பெய்தது. மழை நின்றது. ஆறு ஓடுகிறது.', '', 'गाँव में एक कुआँ है।'] * 2


@pytest.fixture(scope='module')
def tokenizer(): return tiny_gemma_tokenizer(TEXTS, 400)


def models(size):
    "A tied Gemma 3 and a Llama with a head of its own"
    common = dict(vocab_size=size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                  max_position_embeddings=256, initializer_range=.1)
    return (Gemma3ForCausalLM(Gemma3TextConfig(query_pre_attn_scalar=16, sliding_window=16, **common)),
            LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **common)))


def test_importance_is_the_mean_square_of_the_inputs(tokenizer):
    for model in models(len(tokenizer)):
        found = importance(model.train(), tokenizer, TEXTS)
        assert model.training
        weights = dict(model.named_parameters(remove_duplicate=False))
        assert set(found) == {n for n, w in weights.items() if w.dim() == 2 and ('embed' not in n or model.config.tie_word_embeddings)}
        assert all(one.shape == (weights[n].shape[1],) and one.dtype == np.float32 for n, one in found.items())
        hidden = torch.cat([model.eval().model(input_ids=torch.tensor([tokenizer(t).input_ids])).last_hidden_state[0] for t in TEXTS if t])
        assert np.allclose(found['lm_head.weight'], hidden.detach().square().mean(0).numpy(), rtol=1e-4)
        first = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor([i for t in TEXTS if t for i in tokenizer(t).input_ids])))
        for part in 'qkv':
            assert np.allclose(found[f'model.layers.0.self_attn.{part}_proj.weight'], first.detach().square().mean(0).numpy(), rtol=1e-4)
        assert not any(m._forward_pre_hooks for m in model.modules())


def test_importance_stops_and_cuts(tokenizer):
    model, seen = models(len(tokenizer))[1].eval(), []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda m, given: seen.append(given[0].numel()))
    importance(model, tokenizer, TEXTS, length=10, tokens=37)
    hook.remove()
    assert sum(seen) == 37 and max(seen) == 10
    with pytest.raises(ValueError, match='no text'): importance(model, tokenizer, [])


def test_importance_lowers_the_harm_to_the_outputs(tokenizer, rng):
    "The error that counts: of what the matrix puts out for inputs of very different size"
    inputs = rng.normal(size=(400, 256)) * rng.lognormal(0, 1.2, 256)
    weights = rng.normal(size=(64, 256)).astype('float32')
    harm = lambda data: float(np.square(inputs @ (read(data, 'Q4_K') - weights).T).mean())
    assert harm(quantise(weights, 'Q4_K', (inputs[:300] ** 2).mean(0))) < .8 * harm(quantise(weights, 'Q4_K'))


def test_importance_of_a_model_with_an_adapter_is_refused(tokenizer):
    model = models(len(tokenizer))[1]
    model.peft_config = {} # What peft marks its models with
    with pytest.raises(ValueError, match='merge it first'): importance(model, tokenizer, TEXTS)


def test_importance_file(tmp_path, tokenizer):
    found = importance(models(len(tokenizer))[0], tokenizer, TEXTS)
    path = save_importance(found, tmp_path / 'new' / 'hi.safetensors', 'हिन्दी')
    again = load_importance(path)
    assert again.keys() == found.keys() and all((again[n] == one).all() for n, one in found.items())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match='not a whole safetensors file'): load_importance(path)
    with pytest.raises(ValueError, match='no file'): load_importance(tmp_path / 'none')
    assert [p.name for p in path.parent.iterdir()] == ['hi.safetensors']
