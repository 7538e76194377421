"Smaller models against torch's own tools, and model cards as the Hub reads them"
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lab_lm.core.runs import Score
from lab_lm.nets.transformer import NetConfig, Transformer
from lab_lm.train.card import Card, write_card
from lab_lm.train.compress import Int8Linear, compare, holdings, int8, pruned, read_weights, rounded, token_time, write_weights

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::UserWarning') # Torch's own tools say that they will go


def relative(a, b): return float((a - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize('rows, inputs, outputs', [(16, 64, 200), (37, 256, 300), (512, 384, 1536)])
def test_an_int8_layer_is_as_near_as_torchs_own(rows, inputs, outputs):
    quantize = pytest.importorskip('torch.ao.quantization')
    layer, x = nn.Linear(inputs, outputs), torch.randn(rows, inputs)
    layer.weight.data *= torch.logspace(-2, 1, outputs)[:, None]
    fast = Int8Linear(*rounded(layer.weight), layer.bias.detach())
    theirs = quantize.quantize_dynamic(nn.Sequential(layer), {nn.Linear: quantize.per_channel_dynamic_qconfig}, inplace=False)
    ours, torchs = relative(fast(x), layer(x)), relative(theirs(x), layer(x))
    assert ours < .04 and ours < 1.2 * torchs
    assert relative(F.linear(x, fast.weight, fast.bias), layer(x)) < ours, 'what is left is the rounding of the inputs'


def test_half_a_step_of_the_scale_bounds_every_weight():
    weight = torch.randn(50, 40) * torch.logspace(-6, 6, 50)[:, None]
    weight[7] = 0
    small, scale = rounded(weight)
    assert small.abs().max() == 127 and small[7].eq(0).all()
    assert ((small * scale[:, None] - weight).abs() <= .5001 * scale[:, None]).all()


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('mode', ['causal', 'masked'])
def test_our_models_in_eight_bits_come_back_from_the_disk(tmp_path, tied, mode):
    config = NetConfig(vocab_size=90, width=64, layers=2, heads=2, mode=mode, tied=tied, positions='learned', max_length=32)
    model, ids = Transformer(config).eval(), torch.randint(90, (3, 20))
    small = int8(model)
    with torch.no_grad():
        assert relative(small(ids).logits, model(ids).logits) < .1
        size = write_weights(small, tmp_path / 'w.safetensors')
        assert size < .4 * write_weights(model, tmp_path / 'plain.safetensors')
        assert torch.equal(read_weights(Transformer(config), tmp_path / 'w.safetensors')(ids).logits, small(ids).logits)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert sum(r['numbers'] for r in holdings(small) if r['type'] == 'int8') == matrices
    assert next(model.parameters()).dtype == torch.float32 and not any(isinstance(m, Int8Linear) for m in model.modules()), 'the model itself is unchanged'


@pytest.mark.parametrize('name', ['GPT2LMHeadModel', 'XLMRobertaForMaskedLM', 'LlamaForCausalLM', 'ModernBertForMaskedLM'])
def test_models_of_transformers(tmp_path, name):
    import transformers
    shape = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    shape |= dict(cls_token_id=1, sep_token_id=2) if 'Modern' in name else {}
    if 'GPT2' in name: shape = dict(vocab_size=99, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    cls = getattr(transformers, name)
    def make(): return cls(cls.config_class(**shape)).eval()
    model, ids = make(), torch.randint(3, 99, (2, 9))
    small = int8(model)
    kinds = {m.weight.data_ptr() for m in model.modules() if type(m).__name__ in ('Linear', 'Conv1D') or type(m) is nn.Embedding}
    left = [type(m).__name__ for m in small.modules() if type(m).__name__ in ('Linear', 'Conv1D') or type(m) is nn.Embedding]
    assert not left and sum(r['type'] == 'int8' for r in holdings(small)) and len(kinds) > 5
    with torch.no_grad():
        assert relative(small(ids).logits, model(ids).logits) < .1
        write_weights(small, tmp_path / 'w.safetensors')
        assert torch.equal(read_weights(make(), tmp_path / 'w.safetensors')(ids).logits, small(ids).logits)
    zeros = pruned(model, .5)
    embedded = {id(m.weight) for m in zeros.modules() if isinstance(m, nn.Embedding)}
    inside = {id(m.weight): m.weight for m in zeros.modules() if type(m).__name__ in ('Linear', 'Conv1D') and id(m.weight) not in embedded}
    assert sum(int((w == 0).sum()) for w in inside.values()) == round(.5 * sum(w.numel() for w in inside.values()))
    assert type(zeros.get_output_embeddings().weight) is nn.Parameter and (zeros.get_output_embeddings().weight is zeros.get_input_embeddings().weight) == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize('each', [False, True])
def test_the_share_of_zeros_is_exactly_as_asked(each):
    model = Transformer(NetConfig(vocab_size=50, width=48, layers=3, heads=3))
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for share in (0, .1, 1 / 3, .77, 1):
        new = pruned(model, share, each)
        counts = [(int((new.get_submodule(n).weight == 0).sum()), new.get_submodule(n).weight.numel()) for n in layers]
        if each: assert all(zeros == round(share * n) for zeros, n in counts)
        else: assert sum(z for z, _ in counts) == round(share * sum(n for _, n in counts))
        for (name, old), value in zip(model.state_dict().items(), new.state_dict().values()):
            kept = value != 0
            assert torch.equal(old[kept], value[kept]), name
            if each and value.ndim == 2 and 'embed' not in name and 0 < share < 1: assert old[~kept].abs().max() <= old[kept].abs().min()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), pruned(model, 0, each).state_dict().values()))


def test_damage_grows_with_the_share_on_a_trained_model():
    order = torch.randperm(60)
    model = Transformer(NetConfig(vocab_size=60, width=48, layers=2, heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        ids = torch.randint(60, (8, 12))
        optimizer.zero_grad(); model(ids, labels=order[ids]).loss.backward(); optimizer.step()
    ids = torch.randint(60, (40, 12))
    def measure(m):
        with torch.no_grad(): return [(float(m(row[None], labels=order[row][None]).loss) * 12 / math.log(2), 12) for row in ids]
    rows = compare(model.eval(), {str(s): pruned(model, s) for s in (0, .3, .6, .9)} | {'int8': int8(model)}, measure, dict(input_ids=ids))
    costs = [r['bits_per_byte'] for r in rows]
    assert costs[0] == costs[1] and costs[1] <= costs[2] < costs[3] < costs[4]
    assert rows[4]['more'].low > 0 and abs(rows[5]['more'].value) < .05
    assert rows[1]['bytes'] == rows[0]['bytes'] > 2 * rows[5]['bytes'] and all(r['microseconds'] > 0 for r in rows)
    assert rows[4]['more'].value == pytest.approx(costs[4] - costs[0])


def test_padding_is_not_counted_in_the_time():
    class Waits(nn.Module):
        def forward(self, input_ids, **_): __import__('time').sleep(.01)
    ids = torch.ones(4, 10, dtype=torch.long)
    half = torch.cat([torch.ones(4, 5), torch.zeros(4, 5)], 1).long()
    assert token_time(Waits(), dict(input_ids=ids, attention_mask=half)) > 1.5 * token_time(Waits(), dict(input_ids=ids))


def test_what_torch_keeps_in_objects_is_named_not_pickled(tmp_path):
    quantize = pytest.importorskip('torch.ao.quantization')
    theirs = quantize.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match='cannot be saved without a pickle'): write_weights(theirs, tmp_path / 'x.safetensors')
    assert not list(tmp_path.iterdir())


def test_the_hub_reads_the_card(tmp_path):
    from huggingface_hub import ModelCard
    model = Transformer(NetConfig(vocab_size=50, width=32, layers=1, heads=1))
    from lab_lm.nets.native import save
    save(model, tmp_path)
    card = Card('हिन्दी: a "test"\n---\n# x', text='![a](http://x.y) <b>', languages=('hi', 'ta'), licence='cc-by-4.0', tested_on='held-out: वाक्य')
    scores = {'bits_per_byte': Score(1.5, 9, 1.4, 1.6), 'a: b\n': Score(.5, 1, -math.inf, math.inf), 'lost': Score(math.nan, 0, 0, 0)}
    page = write_card(tmp_path, card, scores).read_text(encoding='utf-8')
    read = ModelCard(page).data
    assert read.language == ['hi', 'ta'] and read.license == 'cc-by-4.0' and read.pipeline_tag == 'text-generation' and read.library_name == 'transformers'
    assert [r.metric_value for r in read.eval_results] == [1.5, .5] and read.eval_results[0].dataset_name == 'held-out: वाक्य'
    body = page.split('---\n', 2)[2]
    assert body.count('\n# ') == 1 and '![' not in body and '<b>' not in body and 'AutoModelForCausalLM' in body
    parameters = int(body.split('| parameters | ')[1].split(' |')[0].replace(',', ''))
    assert parameters == sum(p.numel() for p in model.parameters())
