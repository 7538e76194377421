"Files written here: the same numbers in llama.cpp as in transformers, whole or not at all, and read back by our own reader"
import json
import math
import multiprocessing
import os
import random
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lab_lm.core.paths import shared_data
from lab_lm.gen.architectures import rope_divisors
from lab_lm.gen.companions import chat_shape, in_shape, renderer, write_companions
from lab_lm.gen.gguf import QUANTS, write_gguf
from lab_lm.gen.read import diff_gguf, gguf_contents, gguf_tensor, read_gguf
from lab_lm.gen.weights import Weights
from lab_lm.nets.pretrained import quiet
from lab_lm.nets.tiny import tiny_gemma_tokenizer

SEED, FORK = random.randrange(1 << 30), multiprocessing.get_context('fork' if hasattr(os, 'fork') else None)
TEXTS = ['नदी के किनारे एक पुराना गाँव है।', 'மழை பெய்தது. மழை நின்றது.', 'The river is old. The village is old.'] * 3


@pytest.fixture(scope='module')
def tokenizer(): return tiny_gemma_tokenizer(TEXTS, 400)


def saved(folder, tokenizer, kind=LlamaForCausalLM, **fields):
    "A model with random weights of a size that matters, saved"
    common = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                  max_position_embeddings=512, bos_token_id=2, eos_token_id=[1, 6], pad_token_id=0)
    if kind is Gemma3ForCausalLM: common |= dict(query_pre_attn_scalar=fields.get('head_dim', 16), sliding_window=8, tie_word_embeddings=True,
                                                 layer_types=['sliding_attention', 'full_attention', 'sliding_attention'])
    torch.manual_seed(SEED)
    model = kind((LlamaConfig if kind is LlamaForCausalLM else Gemma3TextConfig)(**common | fields)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters(): p.copy_(torch.randn_like(p) * (.2 if p.ndim == 1 else 1 / math.sqrt(p.shape[1])) + (1 if 'Llama' in kind.__name__ and p.ndim == 1 and 'norm' in name else 0))
    with quiet(): model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return model


def apart(model, file, least=1e-3):
    "The largest difference of log-probabilities above `least` between transformers and llama.cpp, at every place of prompts of several lengths"
    from lab_lm.gen.llama import Llama, llama_logprobs
    rng, worst = random.Random(SEED), 0.
    with Llama(file) as llama, torch.no_grad():
        for length in (1, 6, 80):
            ids = [2, *rng.choices(range(263, model.config.vocab_size), k=length)]
            mine = model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
            worst = max(worst, float(np.abs(mine - llama_logprobs(llama, ids))[mine > math.log(least)].max()))
    return worst


SCALED = dict(linear=dict(rope_type='linear', factor=3.), yarn=dict(rope_type='yarn', factor=4., original_max_position_embeddings=32),
              llama3=dict(rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=64))
LLAMAS = dict(plain={}, tied=dict(tie_word_embeddings=True), one_key=dict(num_key_value_heads=1), every_key=dict(num_key_value_heads=4), wide_heads=dict(head_dim=24),
              biases=dict(attention_bias=True, mlp_bias=True), **{k: dict(rope_parameters=dict(rope_theta=5e4, **v)) for k, v in SCALED.items()})


@pytest.mark.parametrize('shape', LLAMAS)
def test_llama_gives_the_same_numbers_in_llama_cpp(shape, tokenizer, tmp_path):
    pytest.importorskip('xllamacpp')
    model = saved(tmp_path, tokenizer, **LLAMAS[shape])
    assert apart(model, write_gguf(tmp_path, tmp_path / 'm.gguf', 'f32')) < 1e-3, SEED
    if shape == 'plain': assert apart(model, write_gguf(tmp_path, tmp_path / 'h.gguf', 'f16')) < 1e-2, SEED


@pytest.mark.parametrize('shape', [{}, dict(tie_word_embeddings=False), dict(head_dim=32), dict(rope_parameters=dict(
    full_attention=dict(rope_type='linear', factor=8., rope_theta=1e6), sliding_attention=dict(rope_type='default', rope_theta=1e4)))])
def test_gemma_gives_the_same_numbers_in_llama_cpp(shape, tokenizer, tmp_path):
    pytest.importorskip('xllamacpp')
    from lab_lm.gen.arithmetic import llama_arithmetic
    model = saved(tmp_path, tokenizer, Gemma3ForCausalLM, **shape)
    with llama_arithmetic(model): assert apart(model, write_gguf(tmp_path, tmp_path / 'm.gguf', 'f32')) < 2e-3, SEED


def llama2c(path):
    "A checkpoint of llama2.c as a Llama of transformers: seven integers, then matrices in float32 (its own export.py, version 0)"
    raw = path.read_bytes()
    width, inner, layers, heads, keys, vocab, length = struct.unpack('<7i', raw[:28])
    values, at = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32), 0
    def take(*shape):
        nonlocal at
        at += math.prod(shape)
        return values[at - math.prod(shape):at].reshape(shape).clone()
    kv = width // heads * keys
    def halves(w): return w.reshape(-1, width // heads // 2, 2, width).transpose(1, 2).reshape(w.shape) # Neighbours, as llama.cpp's, to halves
    out = {'model.embed_tokens.weight': take(vocab, width)}
    for name, shape in dict(input_layernorm=(width,), q=(width, width), k=(kv, width), v=(kv, width), o=(width, width), post_attention_layernorm=(width,),
                            gate=(inner, width), down=(width, inner), up=(inner, width)).items():
        full = name if 'norm' in name else f'self_attn.{name}_proj' if name in 'qkvo' else f'mlp.{name}_proj'
        for i, w in enumerate(take(layers, *shape)): out[f'model.layers.{i}.{full}.weight'] = halves(w) if name in ('q', 'k') else w
    out['model.norm.weight'] = take(width)
    assert vocab > 0 and len(values) - at == length * (width // heads), 'what is left are the tables of rotary angles'
    config = LlamaConfig(vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=keys,
                         max_position_embeddings=length, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(config).eval()
    missing, unknown = model.load_state_dict(out, strict=False)
    assert missing == ['lm_head.weight'] and not unknown
    return model


def plain_tokenizer(size):
    "A tokenizer of `size` pieces in Llama's form: three specials, bytes, and made-up pieces that every text can do without"
    names = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), '▁', *map(chr, range(33, 127))]
    pairs = [(a, b) for a in 'etaoinsh▁' for b in 'etaoinshrdlucmfwypvbgk'][:size - len(names)]
    vocab = {piece: i for i, piece in enumerate([*names, *(a + b for a, b in pairs)])}
    backend = Tokenizer(models.BPE(vocab, pairs, unk_token='<unk>', byte_fallback=True))
    backend.normalizer = normalizers.Replace(' ', '▁')
    backend.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token='<s>', eos_token='</s>', unk_token='<unk>')


def test_a_trained_llama2c_checkpoint_gives_the_same_logits(tmp_path):
    pytest.importorskip('xllamacpp')
    if shared_data() is None: pytest.skip('the shared data is not there')
    model, tokenizer = llama2c(shared_data() / 'gguf' / 'llama2c' / 'stories260K.bin'), plain_tokenizer(512)
    assert len(tokenizer) == model.config.vocab_size == 512
    with quiet(): model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    told = [1]
    with torch.no_grad():
        while len(told) < 60: told.append(int(model(torch.tensor([told])).logits[0, -1].argmax()))
        logits = model(torch.tensor([told])).logits[0].log_softmax(-1)
    assert float(-logits[:-1].max(-1).values.mean()) < 1., 'a checkpoint read in the wrong order would not be so sure of itself'
    file = write_gguf(tmp_path, tmp_path / 'stories.gguf', 'f32')
    from lab_lm.gen.llama import Llama, llama_greedy, llama_logprobs
    with Llama(file) as llama:
        theirs, said = llama_logprobs(llama, told), llama_greedy(llama, told[:1], 40)
    assert said == told[1:41] and np.abs(theirs - logits.numpy())[logits.numpy() > math.log(1e-4)].max() < 1e-3


def test_divisors_are_those_transformers_uses():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    rng = random.Random(SEED)
    for _ in range(20):
        low = rng.uniform(.5, 2)
        rope = dict(rope_type='llama3', rope_theta=rng.choice([1e4, 5e5]), factor=rng.uniform(2, 32), low_freq_factor=low, high_freq_factor=low + rng.uniform(.5, 4),
                    original_max_position_embeddings=rng.choice([64, 512, 8192]))
        config = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=rng.choice([16, 64, 128]), rope_parameters=rope)
        plain = config.rope_parameters['rope_theta'] ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        torch.testing.assert_close(plain / rope_divisors(config), ROPE_INIT_FUNCTIONS['llama3'](config, 'cpu')[0], rtol=1e-4, atol=0)


def test_the_gguf_package_reads_the_same_numbers(tokenizer, tmp_path):
    import gguf
    model = saved(tmp_path, tokenizer, hidden_size=256, intermediate_size=256, head_dim=16, num_hidden_layers=2, tie_word_embeddings=True)
    weights = {k: v.numpy() for k, v in model.state_dict().items()}
    for quant in QUANTS:
        file = write_gguf(tmp_path, tmp_path / 'm.gguf', quant)
        assert not list(tmp_path.glob('.*part')) and file.stat().st_size % 32 == 0
        reader, ours = gguf.GGUFReader(file), gguf_contents(file)
        assert {t.name: (t.tensor_type.name, tuple(map(int, reversed(t.shape))), t.data_offset, t.n_bytes) for t in reader.tensors} == {n: tuple(t) for n, t in ours.tensors.items()}
        for t in reader.tensors:
            theirs = gguf.quants.dequantize(t.data, t.tensor_type)
            np.testing.assert_array_equal(gguf_tensor(file, t.name), theirs.reshape(gguf_tensor(file, t.name).shape))
            if t.name == 'blk.1.ffn_down.weight': assert np.linalg.norm(theirs - weights['model.layers.1.mlp.down_proj.weight']) <= .1 * np.linalg.norm(theirs)
        assert reader.fields['general.file_type'].contents() == ours.fields['general.file_type']
        assert {k: f.contents() for k, f in reader.fields.items() if not k.startswith('GGUF.')} == ours.fields


@pytest.mark.parametrize('kind', [LlamaForCausalLM, Gemma3ForCausalLM])
def test_shards_and_types_make_the_same_file(kind, tokenizer, tmp_path):
    model = saved(tmp_path / 'one', tokenizer, kind)
    whole = write_gguf(tmp_path / 'one', tmp_path / 'one.gguf', 'f32').read_bytes()
    with quiet(): model.save_pretrained(tmp_path / 'two' / 'one', max_shard_size='60KB'), tokenizer.save_pretrained(tmp_path / 'two' / 'one')
    assert len(list((tmp_path / 'two' / 'one').glob('*.safetensors'))) > 3
    assert write_gguf(tmp_path / 'two' / 'one', tmp_path / 'two.gguf', 'f32').read_bytes() == whole
    with quiet(): model.to(torch.bfloat16).save_pretrained(tmp_path / 'three'), tokenizer.save_pretrained(tmp_path / 'three')
    half = write_gguf(tmp_path / 'three', tmp_path / 'three.gguf', 'bf16')
    for name, place in gguf_contents(half).tensors.items():
        assert place.kind == ('BF16' if len(place.shape) > 1 else 'F32')
        np.testing.assert_allclose(gguf_tensor(half, name), gguf_tensor(tmp_path / 'one.gguf', name), rtol=.01, atol=.01 if kind is Gemma3ForCausalLM else 1e-30)


def test_blocks_of_any_size_make_the_same_file(tokenizer, tmp_path, monkeypatch):
    saved(tmp_path, tokenizer, hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1, tie_word_embeddings=True)
    files, blocks = {}, Weights.blocks
    for most in (1 << 20, 256 * random.randrange(5, 90)):
        monkeypatch.setattr(Weights, 'blocks', lambda self, name, _, group=1: blocks(self, name, most, group))
        files[most] = [write_gguf(tmp_path, tmp_path / 'm.gguf', quant).read_bytes() for quant in ('f16', 'q8_0', 'q4_k_m')]
    assert len(set(map(tuple, files.values()))) == 1


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tokenizer, tmp_path):
    saved(tmp_path, tokenizer)
    config, weights = json.loads((tmp_path / 'config.json').read_text()), load_file(tmp_path / 'model.safetensors')
    def says(words, quant='f16', weights=weights, **changes):
        (tmp_path / 'config.json').write_text(json.dumps({**config, **changes}))
        save_file(weights, tmp_path / 'model.safetensors', metadata=dict(format='pt'))
        with pytest.raises(ValueError, match=words): write_gguf(tmp_path, tmp_path / 'm.gguf', quant)
        assert [p.name for p in tmp_path.iterdir() if 'gguf' in p.name] == []
    says('known: Gemma3ForCausalLM, LlamaForCausalLM', architectures=['GPT2LMHeadModel'])
    says('rope_type=longrope', rope_parameters=dict(rope_type='longrope', rope_theta=1e4, factor=2., short_factor=[1.] * 8, long_factor=[1.] * 8, original_max_position_embeddings=64))
    says('hidden_act=gelu', hidden_act='gelu')
    says('only 300 rows|by the configuration 300', vocab_size=300)
    says('lm_head.weight', weights={n: w for n, w in weights.items() if n != 'lm_head.weight'})
    says('have no place in llama.cpp: model.layers.0.self_attn.q_norm.weight', weights=weights | {'model.layers.0.self_attn.q_norm.weight': torch.ones(16)})
    middle = 'model.layers.2.mlp.down_proj.weight'
    for value, quant, words in [(math.nan, 'q8_0', 'no finite number'), (math.inf, 'f32', 'no finite number'), (7e4, 'f16', 'none that F16 can hold'), (-math.inf, 'bf16', 'no finite')]:
        odd = weights[middle].clone()
        odd[5, 7] = value
        says(f'{middle} .*{words}', quant, weights | {middle: odd})
    says('saved as I8', weights=weights | {middle: torch.zeros(64, 96, dtype=torch.int8)})
    raw = (tmp_path / 'model.safetensors').read_bytes()
    (tmp_path / 'model.safetensors').write_bytes(raw[:len(raw) // 2])
    with pytest.raises(ValueError, match='cut off'): write_gguf(tmp_path, tmp_path / 'm.gguf')
    (tmp_path / 'model.safetensors').unlink(), (tmp_path / 'config.json').unlink(), (tmp_path / 'adapter_config.json').write_text('{}')
    with pytest.raises(ValueError, match='holds an adapter'): write_gguf(tmp_path, tmp_path / 'm.gguf')


def slowly(folder, pipe):
    "Write a file, telling of every block"
    read = Weights.read
    def slow(self, *how):
        pipe.send('block'), time.sleep(.05)
        return read(self, *how)
    Weights.read = slow
    write_gguf(folder, folder / 'm.gguf', 'f32')


def in_small_rooms(folder, pipe):
    "How much memory a larger model takes; then what happens where files may not grow beyond 150 kB"
    import resource
    def peak(): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_gguf(folder, folder / 'warm.gguf', 'f16')
    before = peak()
    write_gguf(folder / 'big', folder / 'big.gguf', 'f16')
    pipe.send(peak() - before)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
    try: write_gguf(folder, folder / 'm.gguf', 'f32')
    except OSError as error: pipe.send(str(error))


def apart_from_us(work, folder):
    "A process of its own that does some work, and what it tells"
    here, there = FORK.Pipe()
    process = FORK.Process(target=work, args=(folder, there))
    process.start(), there.close()
    return process, here


@pytest.mark.skipif(not hasattr(os, 'fork') or sys.platform == 'darwin', reason='processes are forked here')
def test_a_full_disk_a_kill_and_a_small_memory(tokenizer, tmp_path, monkeypatch):
    saved(tmp_path, tokenizer), saved(tmp_path / 'big', tokenizer, hidden_size=512, intermediate_size=4096, num_hidden_layers=1, vocab_size=40_000)
    old = write_gguf(tmp_path, tmp_path / 'm.gguf', 'q8_0').read_bytes()
    process, told = apart_from_us(slowly, tmp_path)
    for _ in range(8): assert told.recv() == 'block'
    process.kill(), process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / 'm.gguf').read_bytes() == old, 'the file that was there is still whole'
    left = list(tmp_path.glob('.m.gguf.*part'))
    assert len(left) == 1, 'what a kill cannot clean up'
    process, told = apart_from_us(in_small_rooms, tmp_path)
    assert told.recv() < 75e6, 'the largest tensor has 82 MB, the model 110'
    assert 'too large' in told.recv() and (tmp_path / 'm.gguf').read_bytes() == old and list(tmp_path.glob('.m.gguf.*part')) == left
    process.join()
    monkeypatch.setattr('shutil.disk_usage', lambda path: type('Usage', (), dict(free=1000)))
    with pytest.raises(OSError, match='no room on the disk: the file needs'): write_gguf(tmp_path, tmp_path / 'n.gguf')
    assert not list(tmp_path.glob('*n.gguf*'))


def test_any_damage_to_a_file_is_told_in_one_sentence(tokenizer, tmp_path):
    saved(tmp_path, tokenizer, num_hidden_layers=1)
    whole, rng, cut = write_gguf(tmp_path, tmp_path / 'm.gguf', 'q8_0').read_bytes(), random.Random(SEED), tmp_path / 'cut.gguf'
    head = min(t.start for t in gguf_contents(tmp_path / 'm.gguf').tensors.values())
    for length in [0, 3, 4, 8, 23, 24, len(whole) - 200, *rng.choices(range(len(whole) - 200), k=60)]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match='cut.gguf is not a whole GGUF file'): gguf_contents(cut)
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.choices(range(head), k=3): damaged[at] = rng.randrange(256)
        cut.write_bytes(damaged)
        try: diff_gguf(tmp_path / 'm.gguf', cut)
        except ValueError as error: assert 'cut.gguf is not a whole GGUF file' in str(error), (SEED, error)


def test_every_planted_difference_is_found_and_no_other(tokenizer, tmp_path):
    import gguf
    saved(tmp_path, tokenizer)
    a, b = (write_gguf(tmp_path, tmp_path / f'{n}.gguf', 'f16') for n in 'ab')
    assert diff_gguf(a, b) == []
    rng = random.Random(SEED)
    for name, tensor in rng.sample(list(gguf_contents(a).tensors.items()), 6):
        for plant in ('zero', 'noise', 'transposed'):
            reader = gguf.GGUFReader(b, 'r+')
            data = next(t.data for t in reader.tensors if t.name == name)
            kept = data.copy()
            if plant == 'zero': data[:] = 0
            elif plant == 'noise': data[-1] *= 1.01
            elif data.ndim == 2: data.reshape(-1)[:] = kept.reshape(data.shape[::-1]).T.reshape(-1)
            changed = not np.array_equal(data, kept)
            reader.data.flush()
            found = diff_gguf(a, b)
            assert [r['name'] for r in found] == ([name] if changed else [])
            if changed: assert found[0]['how far'] == pytest.approx(np.linalg.norm(data.astype(float) - kept) / np.linalg.norm(kept.astype(float)), rel=1e-5)
            data[:] = kept
            reader.data.flush()
    ours, other = gguf_contents(a).fields, tmp_path / 'other'
    tokens = tiny_gemma_tokenizer(TEXTS[::-1] + ['एक दो तीन चार'], 400)
    saved(other, tokens, rms_norm_eps=1e-5)
    found = diff_gguf(a, write_gguf(other, tmp_path / 'o.gguf', 'f16'))
    def rows(fields): return list(zip(*(fields[f'tokenizer.ggml.{k}'] for k in ('tokens', 'scores', 'token_type'))))
    pairs = list(zip(rows(ours), rows(gguf_contents(tmp_path / 'o.gguf').fields)))
    assert {r['name'] for r in found if r['what'] == 'setting'} >= {'llama.attention.layer_norm_rms_epsilon', 'general.name'}
    assert [r['name'] for r in found if r['what'] == 'piece'][:5] == [i for i, (x, y) in enumerate(pairs) if x != y][:5]


def test_a_vocabulary_file_of_llama_cpp_is_read():
    if shared_data() is None: pytest.skip('the shared data is not there')
    path = shared_data() / 'gguf' / 'ggml-vocab-llama-spm.gguf'
    fields, short = gguf_contents(path).fields, read_gguf(path)
    assert len(fields['tokenizer.ggml.tokens']) == len(fields['tokenizer.ggml.scores']) == 32_000 and short['weights'] == 0
    assert short['specials'] == {'<s>': 'CONTROL', '</s>': 'CONTROL'} and fields['tokenizer.ggml.tokens'][3:5] == ['<0x00>', '<0x01>']


GEMMA = tiny_gemma_tokenizer(TEXTS, 300).chat_template
TEMPLATES = dict(
    gemma=GEMMA, chatml="{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    llama3="{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    plain="{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: {{' + m.content + '}}\n' }}{% elif m.role == 'assistant' %}{{ 'A: ' + m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}")


@pytest.mark.parametrize('name', TEMPLATES)
def test_a_chat_in_shape_is_the_chat_of_the_template(name, tokenizer):
    tokenizer.chat_template, rng = TEMPLATES[name], random.Random(SEED)
    render = renderer(tokenizer, False)
    shape = chat_shape(render)
    for _ in range(20):
        turns = [dict(role=('user', 'assistant')[i % 2], content=''.join(rng.choices('कखग {}"\'\\$abc', k=8)).strip() or 'x') for i in range(rng.choice([1, 3, 5]))]
        if (shape.system or shape.glue is not None) and rng.random() < .5: turns.insert(0, dict(role='system', content='छोटा {{ }} "उत्तर"'))
        assert in_shape(shape, turns) == render(turns, True), (SEED, turns)
    assert (shape.glue is not None) == (name == 'gemma') and (shape.system is not None) == (name in ('chatml', 'llama3'))


def read_modelfile(text):
    "Instructions of a Modelfile by Ollama's documented rules: a word, then the rest of the line or what stands between triple quotes"
    out, lines = [], text.split('\n')
    while lines:
        line = lines.pop(0)
        if not line or line.startswith('#'): continue
        word, rest = line.split(' ', 1)
        name, rest = rest.split(' ', 1) if word == 'PARAMETER' else ('', rest)
        if rest.startswith('"""'):
            while rest.count('"""') < 2: rest += '\n' + lines.pop(0)
            rest = rest[3:-3]
        elif rest.startswith('"'): rest = rest[1:-1]
        out.append((word, name, rest))
    return out


def test_companions_hold_what_the_file_holds(tokenizer, tmp_path):
    tokenizer.chat_template = GEMMA
    folder = tmp_path / "it's a $(folder) named `x`"
    saved(folder, tokenizer)
    (folder / 'generation_config.json').write_text(json.dumps(dict(do_sample=True, temperature=.7, top_k=64, eos_token_id=[1, 6])))
    system = 'कहो "हाँ"; $HOME `ls` \\n\nया नहीं'
    made = write_companions(write_gguf(folder, folder / "it's mine.gguf", 'q8_0'), folder, system)
    said = read_modelfile(made['modelfile'].read_text())
    assert dict((w, v) for w, n, v in said if not n) == dict(FROM="./it's mine.gguf", TEMPLATE=made['template'], SYSTEM=system)
    assert [(n, v) for _, n, v in said if n] == [('stop', '<eos>'), ('stop', '<end_of_turn>'), ('num_ctx', '512'), ('temperature', '0.7'), ('top_k', '64')]
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'llama-cli').write_text('#!/bin/sh\nfor w in "$@"; do printf "%s\\0" "$w"; done\nls -d -- "$2" >/dev/null || exit 3\n')
    (tmp_path / 'bin' / 'llama-cli').chmod(0o755)
    ran = subprocess.run(['sh', str(made['script']), 'more words'], env=dict(os.environ, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}"), capture_output=True, check=True, cwd='/')
    assert ran.stdout.decode().split('\0')[:-1] == ['-m', "./it's mine.gguf", '-c', '512', '--temp', '0.7', '--top-k', '64', '--jinja', '-sys', system, 'more words']
    with pytest.raises(ValueError, match='three quotes'): write_companions(folder / "it's mine.gguf", folder, 'a """ b')
