"Adapters: what is trained, saved, refused and merged, against peft and bitsandbytes; one line for each thing that stands in the way of loading"
import errno
import json
import random
import sys

import pytest
import torch
from tokenizers import Tokenizer, models as token_models
from transformers import (AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)

import lab_lm.nets.merge as merge_module
from lab_lm.evals.causal import causal_rows, windows
from lab_lm.evals.divergence import best_of, compared_rows, divergence, divergence_sums, divergences
from lab_lm.nets.adapters import add_lora, base_mark, linear_names, load_adapter, read_adapter, save_adapter, trainable_share
from lab_lm.nets.merge import merge_lora
from lab_lm.nets.pretrained import compute_dtype, four_bit, four_bit_refusal, keep_packing, load_model, model_folder, nf4_error, nf4_round, quiet, tuning_base
from lab_lm.nets.tiny import tiny_gemma_tokenizer
from lab_lm.text.tiny import pocket_corpus

SIZE = dict(vocab_size=150, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=.1)
MAKE = {'gemma': lambda **k: Gemma3ForCausalLM(Gemma3TextConfig(head_dim=16, query_pre_attn_scalar=16, **SIZE | k)),
        'llama': lambda **k: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, attention_bias=True, **SIZE | k)),
        'gpt2': lambda **k: GPT2LMHeadModel(GPT2Config(vocab_size=150, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=.1))}


def saved(where, kind='gemma', **how):
    "A base of random weights in a folder, with a tokenizer"
    with quiet():
        MAKE[kind]().save_pretrained(where, **how)
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(token_models.BPE()), unk_token='<unk>').save_pretrained(where)
    return where


def adapted(model, **how):
    "A model with an adapter that does something"
    tuned = add_lora(model, **dict(rank=random.choice([2, 4, 6]), alpha=random.uniform(2, 20)) | how)
    for name, p in tuned.named_parameters():
        if p.requires_grad: torch.nn.init.normal_(p, 1. if 'magnitude' in name else 0., .05)
    return tuned.eval()


@pytest.fixture(scope='module')
def base(tmp_path_factory): return saved(tmp_path_factory.mktemp('m') / 'base')


@pytest.fixture(scope='module')
def four(base): return four_bit(base)[0]


def ids(rows=2, width=17): return torch.randint(3, 150, (rows, width))


# --- what is trained

@pytest.mark.parametrize('bits', [4, 16])
def test_training_changes_the_adapter_and_nothing_else(base, bits):
    model, _, said = tuning_base(base, bits)
    tuned, batch = add_lora(model, rank=4).train(), ids(4)
    assert ('4 bits (NF4' in said) == (bits == 4)
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    optimiser, losses = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(6):
        loss = tuned(input_ids=batch, labels=batch).loss
        loss.backward(), optimiser.step(), optimiser.zero_grad(), losses.append(loss.item())
        tuned.eval()(batch), tuned.train()  # An evaluation in the middle must not stop the learning
    assert losses[-1] < losses[0] - .1
    for name, p in tuned.named_parameters(): assert torch.equal(p, before[name]) != ('lora_' in name), name


def test_targets_variants_and_misuse(base):
    fresh = lambda: load_model(base)[0]
    assert linear_names(fresh()) == dict.fromkeys(('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'), 2)
    sits = lambda m: {n.split('.')[-4] for n, p in m.named_parameters() if 'lora_A' in n}
    assert sits(add_lora(fresh(), targets='q_proj, v_proj')) == sits(add_lora(fresh(), targets=['v_proj', 'q_proj'])) == {'q_proj', 'v_proj'}
    assert sits(add_lora(fresh())) == set(linear_names(fresh()))
    assert add_lora(fresh(), rank=9, alpha=6, rslora=True).base_model.model.model.layers[0].mlp.up_proj.scaling['default'] == 2
    assert sum(p.requires_grad for p in add_lora(fresh(), dora=True).parameters()) == 14 * 3
    for wrong, says in ((dict(rank=0), 'at least 1'), (dict(alpha=0), 'above 0'), (dict(dropout=1.), 'below 1'), (dict(targets='lm_head'), 'known: '), (dict(targets=''), "''")):
        with pytest.raises(ValueError, match=says): add_lora(fresh(), **wrong)
    with pytest.raises(ValueError, match='carries an adapter already'): add_lora(add_lora(fresh()))
    with pytest.raises(ValueError, match='no model of transformers'): add_lora(torch.nn.Linear(2, 2))
    assert trainable_share(torch.nn.Identity()) == 0


# --- what is saved

@pytest.mark.parametrize('how', [{}, dict(rslora=True), dict(dora=True), dict(targets='o_proj,up_proj')])
def test_a_reloaded_adapter_is_the_same(base, tmp_path, how):
    from peft import PeftModel
    tuned, x = adapted(four_bit(base)[0], **how), ids()
    save_adapter(tuned, tmp_path / 'a')
    assert {p.name for p in (tmp_path / 'a').iterdir()} == {'adapter_config.json', 'adapter_model.safetensors', 'base.json'}
    again = load_adapter(four_bit(base)[0], tmp_path / 'a', trainable=True)
    parts = lambda m: {n: p for n, p in m.named_parameters() if 'lora_' in n}
    assert parts(again).keys() == parts(tuned).keys() and all(torch.equal(p, parts(again)[n]) and parts(again)[n].requires_grad for n, p in parts(tuned).items())
    assert torch.equal(again(x).logits, tuned(x).logits)
    with quiet(): by_peft = PeftModel.from_pretrained(four_bit(base)[0], tmp_path / 'a')
    torch.testing.assert_close(by_peft.eval()(x).logits, tuned(x).logits)


def test_an_adapter_that_does_not_fit_is_refused(base, tmp_path):
    from safetensors.torch import load_file, save_file
    save_adapter(adapted(load_model(base)[0], rank=4), tmp_path / 'a')
    file = tmp_path / 'a' / 'adapter_model.safetensors'
    tensors = load_file(file)
    save_file(dict(list(tensors.items())[1:]), file)
    with pytest.raises(ValueError, match="does not fit: 1 tensors"): load_adapter(load_model(base)[0], tmp_path / 'a')
    with pytest.raises(ValueError, match='a matrix is missing'): merge_lora(base, tmp_path / 'a', tmp_path / 'x')
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] * float('nan')}, file)
    with pytest.raises(ValueError, match='not finite'): merge_lora(base, tmp_path / 'a', tmp_path / 'x')
    file.unlink()
    (tmp_path / 'a' / 'adapter_model.bin').write_bytes(b'')
    with pytest.raises(ValueError, match='pickles are not read'): load_adapter(load_model(base)[0], tmp_path / 'a')
    assert not (tmp_path / 'x').exists()


# --- which base it belongs to

def test_the_mark_knows_a_base_wherever_it_lies(base, tmp_path, four):
    import shutil
    model, mark = load_model(base)[0], base_mark(base)
    shutil.copytree(base, tmp_path / 'moved')
    with quiet():
        model.save_pretrained(tmp_path / 'sharded', max_shard_size='40KB')
        load_model(base, dtype='bfloat16')[0].save_pretrained(tmp_path / 'half')
    assert len(list((tmp_path / 'sharded').glob('*.safetensors'))) > 3
    assert {base_mark(x) for x in (model, four, tmp_path / 'moved', tmp_path / 'sharded', tmp_path / 'half', adapted(four_bit(base)[0]))} == {mark}
    assert base_mark(saved(tmp_path / 'twin')) != mark
    batch = ids()
    optimiser = torch.optim.SGD(model.parameters(), lr=.05)
    model(input_ids=batch, labels=batch).loss.backward(), optimiser.step()
    assert base_mark(model) != mark


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    adapter = save_adapter(adapted(four_bit(base)[0], rank=4), tmp_path / 'a')
    other, merged = saved(tmp_path / 'other'), merge_lora(base, adapter, tmp_path / 'merged')
    for wrong in (other, merged):  # A twin of the same shape; the merged model, which would take the adapter twice
        for act in (lambda: merge_lora(wrong, adapter, tmp_path / 'x'), lambda: load_adapter(load_model(wrong)[0], adapter), lambda: load_adapter(four_bit(wrong)[0], adapter)):
            with pytest.raises(ValueError, match=f"belongs to another base than .*{wrong.name}.*trained on .*base"): act()
    (adapter / 'base.json').unlink()
    load_adapter(load_model(other)[0], adapter)  # Without a mark only the shapes can tell
    with quiet(): MAKE['gemma'](hidden_size=32).save_pretrained(other)
    for act in (lambda: merge_lora(other, adapter, tmp_path / 'x'), lambda: load_adapter(load_model(other)[0], adapter)):
        with pytest.raises(ValueError, match='belongs to another base'): act()
    assert not (tmp_path / 'x').exists()


# --- merging

@pytest.mark.parametrize('kind, how', [('gemma', {}), ('gemma', dict(dora=True)), ('llama', dict(rslora=True)), ('gpt2', {}), ('gpt2', dict(dora=True))])
def test_merged_is_base_plus_ba(tmp_path, kind, how):
    base = saved(tmp_path / 'base', kind, max_shard_size='60KB')
    tuned, x = adapted(load_model(base)[0], **how), ids()
    wanted = tuned(x).logits
    merged, _ = load_model(merge_lora(base, save_adapter(tuned, tmp_path / 'a'), tmp_path / 'm'))
    torch.testing.assert_close(merged(x).logits, wanted, atol=1e-4, rtol=1e-4)
    layers = {n.removeprefix('base_model.model.'): m for n, m in tuned.named_modules() if hasattr(m, 'lora_A')}
    seen = 0
    for name, p in merged.named_parameters():
        layer = layers.get(name.removesuffix('.weight'))
        seen += layer is not None
        if layer is None: assert torch.equal(p, dict(load_model(base)[0].named_parameters())[name]), name
        elif not how.get('dora'):
            delta = (layer.lora_B['default'].weight @ layer.lora_A['default'].weight) * layer.scaling['default']
            assert torch.equal(p, layer.base_layer.weight + (delta.T if kind == 'gpt2' else delta)), name
    assert seen == len(layers) > 0
    with quiet(): by_peft = dict(tuned.merge_and_unload().named_parameters())
    for name, p in merged.named_parameters(): torch.testing.assert_close(p, by_peft[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('kind', MAKE)
def test_the_second_path_is_the_model_that_was_trained(tmp_path, kind):
    from bitsandbytes.functional import dequantize_4bit
    base = saved(tmp_path / 'base', kind)
    tuned, x = adapted(four_bit(base)[0], targets={'gpt2': 'c_attn'}.get(kind, 'q_proj,down_proj')), ids()
    merged = load_model(merge_lora(base, save_adapter(tuned, tmp_path / 'a'), tmp_path / 'm', path='nf4'))[0]
    torch.testing.assert_close(merged(x).logits, tuned(x).logits, atol=1e-4 if compute_dtype() == torch.float32 else .1, rtol=1e-3)
    here, quantised = dict(merged.named_modules()), 0
    for name, layer in tuned.named_modules():
        if type(layer).__name__ != 'Linear4bit' or 'base_layer' in name or hasattr(layer, 'lora_A'): continue
        held = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        weight = here[name.removeprefix('base_model.model.')].weight
        quantised += 1
        assert torch.equal(weight.T if kind == 'gpt2' else weight, held), name
    assert quantised == {'gpt2': 6}.get(kind, 10)
    full = load_model(merge_lora(base, tmp_path / 'a', tmp_path / 'f'))[0]
    assert (full(x).logits - tuned(x).logits).abs().mean() > 10 * (merged(x).logits - tuned(x).logits).abs().mean()


def test_the_third_path_and_types(base, tmp_path):
    adapter, x = save_adapter(adapted(load_model(base)[0], rank=4), tmp_path / 'a'), ids()
    with quiet(): apart = AutoModelForCausalLM.from_pretrained(merge_lora(base, adapter, tmp_path / 'apart', path='apart')).eval()
    full = load_model(merge_lora(base, adapter, tmp_path / 'f'))[0]
    torch.testing.assert_close(apart(x).logits, full(x).logits, atol=1e-4, rtol=1e-4)
    half = load_model(merge_lora(base, adapter, tmp_path / 'h', dtype='bfloat16'), dtype='auto')[0]
    assert half.dtype == torch.bfloat16
    for a, b in zip(half.parameters(), full.parameters()): assert torch.equal(a, b.bfloat16())
    assert (tmp_path / 'h' / 'tokenizer.json').is_file() and (tmp_path / 'apart' / 'tokenizer.json').is_file()
    with pytest.raises(ValueError, match='known: float32, bfloat16'): merge_lora(base, adapter, tmp_path / 'x', dtype='float16')


def test_settings_of_other_tools(base, tmp_path):
    from peft import IA3Config, LoraConfig, get_peft_model
    def other(config, n):
        with quiet():
            tuned = get_peft_model(load_model(base)[0], config)
            for p in tuned.parameters():
                if p.requires_grad: torch.nn.init.normal_(p, 0, .05)
            tuned.save_pretrained(tmp_path / n)
        return tuned.eval()
    kept = other(LoraConfig(r=4, lora_alpha=8, target_modules=['q_proj', 'up_proj'], rank_pattern={'up_proj': 6}, alpha_pattern={'layers.1.self_attn.q_proj': 40}), 'kept')
    x = ids()
    merged = load_model(merge_lora(base, tmp_path / 'kept', tmp_path / 'm'))[0]
    torch.testing.assert_close(merged(x).logits, kept(x).logits, atol=1e-4, rtol=1e-4)
    for n, config in dict(e=LoraConfig(target_modules=['q_proj', 'embed_tokens']), s=LoraConfig(target_modules=['q_proj'], modules_to_save=['norm'])).items():
        other(config, n)
        with pytest.raises(ValueError, match='more than LoRA on linear layers'): merge_lora(base, tmp_path / n, tmp_path / 'x')
    other(IA3Config(target_modules=['k_proj'], feedforward_modules=[]), 'ia3')
    with pytest.raises(ValueError, match='type IA3; known: LORA'): read_adapter(tmp_path / 'ia3')
    config = json.loads((base / 'config.json').read_text())
    adapter = save_adapter(adapted(load_model(base)[0]), tmp_path / 'a')
    try:
        (base / 'config.json').write_text(json.dumps({**config, 'quantization_config': {'load_in_4bit': True, 'quant_method': 'bitsandbytes'}}))
        with pytest.raises(ValueError, match='holds quantised weights'): merge_lora(base, adapter, tmp_path / 'x')
    finally: (base / 'config.json').write_text(json.dumps(config))
    assert not (tmp_path / 'x').exists()


def test_nothing_is_half_written(base, tmp_path, monkeypatch):
    adapter = save_adapter(adapted(load_model(base)[0]), tmp_path / 'a')
    (tmp_path / 'm').mkdir()
    (tmp_path / 'm' / 'old').write_text('kept')
    def full(*args):
        args[1].write_bytes(b'half a file')
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(merge_module, '_write', full)
    with pytest.raises(OSError, match='No space'): merge_lora(base, adapter, tmp_path / 'm')
    assert (tmp_path / 'm' / 'old').read_text() == 'kept' and {p.name for p in tmp_path.iterdir()} == {'a', 'm'}


# --- bitsandbytes

def test_the_repacking_trap(base, tmp_path, monkeypatch):
    "On CPUs with bf16 an inference pass re-packs 4-bit layers; what is trained or merged from them afterwards is wrong"
    import bitsandbytes.nn.modules as bnb
    def repack(data, state):
        state.packing_format_for_cpu = True
        return data.flip(0), state
    monkeypatch.setattr(bnb, 'has_avx512bf16', lambda: True)
    monkeypatch.setattr(bnb, '_convert_weight_packed_for_cpu', repack)
    held, x = four_bit(base)[0], ids()
    before = {n: p.detach().clone() for n, p in held.named_parameters()}
    with torch.no_grad(): held(x)
    assert all(torch.equal(p, before[n]) for n, p in held.named_parameters())
    config = dict(quantization_config=held.config.quantization_config, device_map={'': 'cpu'})
    with quiet(): careless = AutoModelForCausalLM.from_pretrained(base, dtype=compute_dtype(), **config).eval()
    assert any(m.support_avx512bf16_for_cpu for m in careless.modules() if type(m).__name__ == 'Linear4bit')
    with torch.no_grad(): careless(x)
    assert any(not torch.equal(p, before[n]) for n, p in careless.named_parameters())  # The trap is real
    for act in (lambda: keep_packing(careless), lambda: add_lora(careless)):
        with pytest.raises(ValueError, match='re-packed'): act()
    with quiet(): fresh = AutoModelForCausalLM.from_pretrained(base, dtype=compute_dtype(), **config).eval()
    tuned = adapted(fresh)  # `add_lora` forbids it for models that others loaded
    wanted = tuned(x).logits
    assert all(torch.equal(p, before[n.removeprefix('base_model.model.').replace('base_layer.', '')]) for n, p in tuned.named_parameters() if 'lora_' not in n)
    merged = load_model(merge_lora(base, save_adapter(tuned, tmp_path / 'a'), tmp_path / 'm', path='nf4'))[0]
    torch.testing.assert_close(merged(x).logits, wanted, atol=1e-4 if compute_dtype() == torch.float32 else .1, rtol=1e-3)


def test_nf4_of_odd_shapes():
    for shape in ((3, 5), (1, 64), (7, 129), (2, 1)):
        w = torch.randn(shape)
        assert nf4_round(w).shape == shape and (nf4_round(w) - w).abs().max() <= .2 * w.abs().max()
        assert len(nf4_error(w)[0]) == w.numel()
    assert torch.equal(nf4_round(torch.zeros(4, 64)), torch.zeros(4, 64))


def test_without_bitsandbytes(base, monkeypatch):
    monkeypatch.setitem(sys.modules, 'bitsandbytes', None)
    assert 'pip install bitsandbytes' in four_bit_refusal()
    with pytest.raises(RuntimeError, match='no 4 bits here: bitsandbytes is not installed'): four_bit(base)
    model, _, said = tuning_base(base)
    assert model.dtype == compute_dtype() and 'not in 4 bits: bitsandbytes is not installed' in said
    assert add_lora(model)(ids()).logits.isfinite().all()


def test_a_library_that_fails_is_named(monkeypatch):
    import bitsandbytes.functional as functional
    def broken(*args, **how): raise RuntimeError('no library for this machine\nand a long tail')
    monkeypatch.setattr(functional, 'quantize_4bit', broken)
    assert four_bit_refusal() == 'bitsandbytes has no 4-bit code for this machine (RuntimeError: no library for this machine)'


def test_a_card_without_bf16(base, monkeypatch):
    import lab_lm.nets.pretrained as module
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda *a: 'Tesla T4')
    monkeypatch.setattr(module, '_device', lambda: 'cpu')
    assert compute_dtype() == torch.float32
    assert tuning_base(base, 16)[2] == 'The base is held in float32, because Tesla T4 has no bf16 and fp16 overflows.'


# --- one line for what stands in the way

def failing(monkeypatch, error):
    def fail(*args, **how):
        try: raise error
        except type(error) as e: raise OSError('a long message\nof many lines') from e
    monkeypatch.setattr(AutoModelForCausalLM, 'from_pretrained', fail)


def test_gated_missing_offline_and_full(monkeypatch):
    import httpx
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    answer = httpx.Response(403, request=httpx.Request('GET', 'https://huggingface.co'))
    for error, kind, says in ((GatedRepoError('gated', response=answer), PermissionError, 'accept its licence on its page, then run `hf auth login`'),
                              (RepositoryNotFoundError('missing', response=answer), PermissionError, 'check the name'),
                              (LocalEntryNotFoundError('offline'), ConnectionError, 'hf download google/gemma-3-1b-it'),
                              (OSError(errno.ENOSPC, 'No space left on device'), OSError, 'the disk is full')):
        failing(monkeypatch, error)
        with pytest.raises(kind, match=says) as found: load_model('google/gemma-3-1b-it')
        assert '\n' not in str(found.value)
    with pytest.raises(ConnectionError, match='hf download google/gemma-3-1b-it'): model_folder('google/gemma-3-1b-it')
    with pytest.raises(ValueError, match='no model folder'): model_folder('nowhere')


def test_half_precision_and_pickles(base, tmp_path):
    with pytest.raises(ValueError, match='65,504'): load_model(base, dtype='float16')
    with quiet(): load_model(base)[0].half().save_pretrained(tmp_path / 'half')
    (tmp_path / 'half' / 'tokenizer.json').write_text((base / 'tokenizer.json').read_text())
    assert load_model(tmp_path / 'half', dtype='auto')[0].dtype == torch.float32
    file = tmp_path / 'half' / 'model.safetensors'
    file.rename(file.with_name('pytorch_model.bin'))
    with pytest.raises(ValueError, match='holds no whole'): load_model(tmp_path / 'half')
    with pytest.raises(ValueError, match='no .safetensors'): base_mark(tmp_path / 'half')


# --- how far two models are from each other

@pytest.fixture(scope='module')
def text():
    texts = [r.text for r in pocket_corpus('ta', 14)]
    return tiny_gemma_tokenizer(texts, 400), texts


def pair(n, sigma):
    "Two models that are a little different"
    one, two = MAKE['gemma'](vocab_size=n).eval(), MAKE['gemma'](vocab_size=n).eval()
    two.load_state_dict({k: v + sigma * torch.randn_like(v) for k, v in one.state_dict().items()})
    return one, two


def test_divergence_against_torch(text):
    tokenizer, texts = text
    one, two = pair(len(tokenizer), .02)
    rows, kl, same, n = compared_rows(tokenizer, texts), 0., 0., 0
    with torch.no_grad():
        for r in rows:
            for start, stop, first in windows(len(r.ids), 24, 12):  # Token by token, without batches
                x = torch.tensor([r.ids[start:stop]])
                p, q = (m(x).logits[0, first - 1 - start:-1].double().log_softmax(-1) for m in (one, two))
                kl += float(torch.nn.functional.kl_div(q, p, reduction='sum', log_target=True))
                same, n = same + int((p.argmax(-1) == q.argmax(-1)).sum()), n + len(p)
    found = divergence(one, two, tokenizer, texts, max_length=24, batch_size=3)
    assert n == sum(len(r.ids) for r in causal_rows(tokenizer, texts))
    assert found['kl'].value == pytest.approx(kl / n, rel=1e-5) and found['agreement'].value == pytest.approx(same / n)
    assert found['kl'].low <= found['kl'].value <= found['kl'].high
    assert found['loss_added'].value == pytest.approx(found['loss'].value - found['loss'].baselines['reference'], abs=1e-9)


def test_divergence_restores_and_refuses(text, monkeypatch):
    tokenizer, texts = text
    one, two = pair(len(tokenizer), .02)
    one.train()
    whole = divergence_sums(one, two, compared_rows(tokenizer, texts))
    assert one.training and not two.training
    monkeypatch.setattr('lab_lm.evals.divergence.CHUNK', 1)
    torch.testing.assert_close(torch.tensor(divergence_sums(one, two, compared_rows(tokenizer, texts), batch_size=2)), torch.tensor(whole), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='one tokenizer'): divergence(one, MAKE['gemma'](vocab_size=9), tokenizer, texts)
    with pytest.raises(ValueError, match='none of 1'): divergence(one, two, tokenizer, [''])
    with pytest.raises(ValueError, match='no models'): divergences(one, {}, tokenizer, texts)


def test_merge_paths_compared(text, tmp_path):
    "The path through 4 bits is the trained model; an adapter that was not merged is far from it"
    tokenizer, texts = text
    with quiet(): MAKE['gemma'](vocab_size=len(tokenizer)).save_pretrained(tmp_path / 'b'), tokenizer.save_pretrained(tmp_path / 'b')
    tuned = adapted(four_bit(tmp_path / 'b')[0], rank=4, alpha=16)
    adapter = save_adapter(tuned, tmp_path / 'a')
    load = lambda path: lambda: load_model(merge_lora(tmp_path / 'b', adapter, tmp_path / path, path=path))[0]
    found = divergences(tuned, {'full': load('full'), 'nf4': load('nf4'), 'not merged': lambda: load_model(tmp_path / 'b')[0]}, tokenizer, texts)
    kl = {k: f['kl'].value for k, f in found.items()}
    assert abs(kl['nf4']) < 1e-7 or compute_dtype() == torch.bfloat16
    assert kl['nf4'] < kl['full'] < kl['not merged'] and best_of(found) in found


def test_a_masked_model_takes_an_adapter():
    from transformers import BertConfig, BertForMaskedLM
    model = BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
    tuned = add_lora(model, rank=2, targets='query,value')
    assert {n.split('.')[-3] for n, p in tuned.named_parameters() if p.requires_grad} == {'lora_A', 'lora_B'}
    assert tuned(input_ids=torch.arange(6)[None]).logits.shape == (1, 6, 50)
