"Saved here, loaded by plain transformers: the same logits"
import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, LlamaConfig, LlamaForCausalLM, ModernBertConfig, ModernBertForMaskedLM

from lab_lm.nets.layers import Cache
from lab_lm.nets.native import TWINS, from_twin, load, masked_lm, save, special_ids, to_twin, twin_of
from lab_lm.nets.transformer import NATIVE, PRESETS, NetConfig, Transformer, preset
from lab_lm.text.tokenize import train_tokenizer

VOCAB = 60
AUTO = dict(modernbert=AutoModelForMaskedLM, llama=AutoModelForCausalLM, decoder=AutoModelForCausalLM)


def net(mode='causal', **fields):
    "A small model of a shape with a twin, every weight off its first value"
    model = Transformer(NetConfig(**dict(vocab_size=VOCAB, width=32, layers=2, init=.1, mode=mode) | NATIVE[mode] | fields)).eval()
    with torch.no_grad():
        for p in model.parameters(): p += .1 * torch.randn_like(p)
    return model


def padded(rows=3, length=12):
    "Tokens, and a mask that leaves out the ends of some rows"
    ids, seen = torch.randint(1, VOCAB, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    seen[1, 7:], seen[2, 11:] = 0, 0
    return ids, seen


def agree(model, twin, atol=1e-4, **how):
    "Logits at all real places; the pad token under the padding of the twin's input"
    ids, seen = padded()
    with torch.no_grad():
        a, b = model(ids, attention_mask=seen, **how).logits, twin(input_ids=ids * seen, attention_mask=seen).logits
        torch.testing.assert_close(a[seen == 1], b[seen == 1], atol=atol, rtol=0)
        torch.testing.assert_close(model(ids, **how).logits, twin(input_ids=ids).logits, atol=atol, rtol=0)


@pytest.mark.parametrize('name', PRESETS)
@pytest.mark.parametrize('mode', NATIVE)
def test_presets_load_in_plain_transformers(name, mode, tmp_path):
    fields = preset(name, 2000, mode).model_dump() | dict(vocab_size=VOCAB, width=32, heads=2, hidden=64, init=.1)
    model = net(**fields)
    save(model, tmp_path / 'm')
    form = 'llama' if mode == 'causal' else 'modernbert'
    twin, how = AUTO[form].from_pretrained(tmp_path / 'm'), dict(causal=False) if mode == 'hybrid' else {}
    assert type(twin).__name__ == TWINS[form] == json.loads((tmp_path / 'm/config.json').read_text())['architectures'][0]
    agree(model, twin, **how)
    if mode == 'hybrid':
        writer = AutoModelForCausalLM.from_pretrained(tmp_path / 'm/causal')
        assert type(writer).__name__ == TWINS['decoder']
        agree(model, writer, causal=True)


@pytest.mark.parametrize('mode, fields', [
    ('causal', dict(heads=4, kv_heads=2)), ('causal', dict(heads=4, kv_heads=1, tied=False, rope_theta=500.)), ('causal', NATIVE['masked']), ('causal', dict(eps=1e-3)),
    ('masked', dict(tied=False)), ('masked', dict(rope_theta=160_000., eps=1e-3)), ('hybrid', dict(tied=False, rope_theta=77.))])
def test_other_shapes_with_a_twin(mode, fields, tmp_path):
    model = net(mode, **fields)
    form = twin_of(model.config)[0]
    agree(model, to_twin(model), **(dict(causal=False) if mode == 'hybrid' else {}))
    save(model, tmp_path / 'm')
    twin = AUTO[form].from_pretrained(tmp_path / 'm')
    agree(model, twin, **(dict(causal=False) if mode == 'hybrid' else {}))
    for again in (load(tmp_path / 'm'), from_twin(twin), from_twin(to_twin(model))):
        assert again.config == model.config and all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_llama_twin_has_no_parts_llama_lacks():
    twin = to_twin(net())
    assert not any(name.endswith('bias') or 'embed_norm' in name for name, _ in twin.named_parameters())
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


@pytest.mark.parametrize('mode, form', [('causal', 'llama'), ('hybrid', 'decoder')])
def test_writing_with_a_cache_gives_the_same_text(mode, form):
    model, cache, ids = net(mode), Cache(), torch.randint(1, VOCAB, (2, 5))
    theirs = to_twin(model, form).generate(ids, max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(ids))
    new, out = ids, [ids]
    with torch.no_grad():
        for _ in range(20):
            new = model(new, causal=True, cache=cache).logits[:, -1:].argmax(-1)
            out.append(new)
    assert torch.equal(torch.cat(out, 1), theirs) and cache.length == 24


@pytest.mark.parametrize('fields', [
    dict(positions='alibi'), dict(positions='relative'), dict(positions='learned'), dict(positions='sinusoidal'), dict(positions='none'), dict(norm='layer'), dict(activation='gelu'),
    NATIVE['causal'] | dict(mode='masked'), NATIVE['masked'] | dict(mode='masked', norm='rms'), NATIVE['hybrid'] | dict(mode='hybrid', kv_heads=2)])
def test_what_has_no_twin_keeps_our_form_and_says_why(fields, tmp_path):
    model = net(**fields)
    said = save(model, tmp_path / 'm')
    assert said.startswith('saved in our own form') and 'would need' in said
    assert json.loads((tmp_path / 'm/config.json').read_text())['architectures'] == ['LabLMTransformer']
    again = load(tmp_path / 'm')
    assert again.config == model.config and all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    ids, seen = padded()
    how = dict(attention_mask=seen, **(dict(causal=True) if fields.get('mode') == 'hybrid' else {}))
    with torch.no_grad(): assert torch.equal(again(ids, **how).logits, model(ids, **how).logits)
    with pytest.raises(ValueError, match='would need'): to_twin(model)


def test_models_made_elsewhere_come_in():
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=48)).eval()
    bert = dict(vocab_size=VOCAB, hidden_size=32, num_attention_heads=4, num_hidden_layers=3, intermediate_size=48, pad_token_id=0, bos_token_id=0, eos_token_id=0, cls_token_id=0, sep_token_id=0)
    full = ModernBertForMaskedLM(ModernBertConfig(layer_types=['full_attention'] * 3, **bert)).eval()
    for twin in (llama, full): agree(from_twin(twin), twin)
    assert from_twin(full).config.rope_theta == 160_000 and from_twin(llama).config.kv_heads == 2 and not from_twin(llama).config.tied
    for wrong, words in ((ModernBertForMaskedLM(ModernBertConfig(**bert)), 'nothing like layer_types'),
                         (ModernBertForMaskedLM(ModernBertConfig(layer_types=['full_attention'] * 3, norm_bias=True, **bert)), 'nothing like norm_bias'),
                         (LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=32, num_attention_heads=4, num_hidden_layers=1, attention_bias=True)), 'nothing like attention_bias'),
                         (torch.nn.Linear(2, 2), 'cannot read architecture Linear')):
        with pytest.raises(ValueError, match=words): from_twin(wrong)


def test_a_folder_made_elsewhere_comes_in(tmp_path):
    twin = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48, tie_word_embeddings=True)).eval()
    twin.save_pretrained(tmp_path, max_shard_size='10kB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 1
    agree(load(tmp_path), twin)


def test_the_tokenizers_special_ids_go_along(tmp_path):
    tokenizer = train_tokenizer(['नदी के किनारे एक गाँव है।', 'மழை பெய்தது.'] * 9, 'bpe', 300)
    for mode, folders in (('causal', ['']), ('hybrid', ['', 'causal'])):
        save(net(mode, vocab_size=len(tokenizer), pad_id=tokenizer.pad_token_id), tmp_path / mode, tokenizer)
        for folder in folders:
            config = transformers.AutoConfig.from_pretrained(tmp_path / mode / folder)
            assert {k: getattr(config, k) for k in ('bos_token_id', 'eos_token_id', 'pad_token_id')} == {k: special_ids(tokenizer)[k] for k in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
            assert transformers.AutoTokenizer.from_pretrained(tmp_path / mode / folder)('नदी').input_ids == tokenizer('नदी').input_ids
    assert special_ids(tokenizer)['eos_token_id'] == special_ids(tokenizer)['sep_token_id'] is not None
    with pytest.raises(ValueError, match='give the tokenizer the model was made for'): save(net(), tmp_path / 'x', tokenizer)


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    old, new = net('hybrid'), net('hybrid')
    save(old, tmp_path / 'm')
    def full(self, folder, **options): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(transformers.ModernBertDecoderForCausalLM, 'save_pretrained', full)
    with pytest.raises(OSError): save(new, tmp_path / 'm')
    assert torch.equal(load(tmp_path / 'm').embed.weight, old.embed.weight) and [p.name for p in tmp_path.iterdir()] == ['m']


def test_only_safetensors_and_json_are_written(tmp_path):
    for name, model in dict(twin=net('hybrid'), own=net(positions='alibi')).items(): save(model, tmp_path / name)
    assert {p.suffix for p in tmp_path.rglob('*') if p.is_file()} == {'.safetensors', '.json'}


@pytest.mark.parametrize('fields', [dict(), dict(positions='alibi')])
def test_torn_and_missing_files_are_named(fields, tmp_path):
    with pytest.raises(ValueError, match='no model in'): load(tmp_path)
    save(net(**fields), tmp_path / 'm')
    weights = tmp_path / 'm/model.safetensors'
    whole = weights.read_bytes()
    weights.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match='model.safetensors is not a whole safetensors file'): load(tmp_path / 'm')
    save(net(**fields), tmp_path / 'm')
    config = json.loads((tmp_path / 'm/config.json').read_text())
    config['lab_lm']['layers'] = 3
    (tmp_path / 'm/config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='the weights have no .*layer|the weights have no .*block'): load(tmp_path / 'm')
    config['lab_lm']['layers'], config['lab_lm']['width'] = 2, 64
    (tmp_path / 'm/config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='of another shape'): load(tmp_path / 'm')


def test_a_twin_is_a_copy_and_costs_no_random_numbers(tmp_path):
    model = net('hybrid')
    before, state = model.embed.weight.clone(), torch.random.get_rng_state()
    twin = to_twin(model)
    save(model, tmp_path / 'm'), load(tmp_path / 'm'), from_twin(twin)
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad(): [p.zero_() for p in twin.parameters()]
    assert torch.equal(model.embed.weight, before)


def test_half_precision_stays_half_precision(tmp_path):
    model = net().to(torch.bfloat16)
    save(model, tmp_path / 'm')
    again, twin = load(tmp_path / 'm'), AutoModelForCausalLM.from_pretrained(tmp_path / 'm')
    assert again.embed.weight.dtype == twin.dtype == torch.bfloat16 and torch.equal(again.embed.weight, model.embed.weight)


def test_the_masked_model_of_the_chapters():
    model = masked_lm('tiny', VOCAB, pad_id=1, seed=4, max_length=99)
    assert type(model).__name__ == TWINS['modernbert'] and model.training and model.config.sparse_prediction
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.max_position_embeddings, config.pad_token_id, config.eos_token_id) == (128, 192, 2, 99, 1, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), masked_lm('tiny', VOCAB, 1, 4, 99).parameters()))
    agree(from_twin(model), model.eval())
