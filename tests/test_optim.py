"Schedules, optimisers and estimates against torch, transformers and real steps"
import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.optim._muon as torch_muon
from torch import nn
from torch.optim import lr_scheduler as lrs

from lab_lm.nets.transformer import NetConfig, Transformer
from lab_lm.train.estimate import largest_batch, matrix_rate, memory, shape_of, training_flops
from lab_lm.train.muon import NEWTON_SCHULZ, MuonAdamW, orthogonalise, quintics
from lab_lm.train.optim import OPTIMIZERS, embedding_names, freeze, layer_rates, make_optimizer, matching, parameter_groups, stack
from lab_lm.train.schedules import Plateau, Schedule, in_steps

ROOT = Path(__file__).resolve().parent.parent
NAMES = [name for name in Schedule.model_fields['name'].annotation.__args__]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_torch(make, steps):
    "Factors that a stateful scheduler gives"
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.)
    schedule, seen = make(optimizer), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        schedule.step()
    return seen


def close(a, b, eps=1e-9): assert len(a) == len(b) and all(abs(x - y) < eps for x, y in zip(a, b))


# ---------------------------------------------------------------------------------------------------------------- schedules

@pytest.mark.parametrize('name', NAMES)
def test_no_step_is_wasted_and_the_warmup_is_one(name):
    for warmup in (0, .05, .1, .3, 1, 7, 40):
        for steps in (1, 2, 3, 10, 100, 1001):
            schedule = Schedule(name=name, warmup=warmup)
            factors, rise = schedule.curve(steps), in_steps(warmup, steps)
            assert all(0 < f <= 1 for f in factors), 'an ancestor began with a step at rate 0'
            low = .04 if name == 'onecycle' else 0
            close(factors[:rise], [low + (1 - low) * (k + 1) / rise for k in range(min(rise, steps))])
            if rise < steps: assert factors[rise] == 1
            assert factors == [schedule.at(k, steps) for k in reversed(range(steps))][::-1], 'a pure function of the step'


@pytest.mark.parametrize('name', ['linear', 'cosine', 'restarts', 'polynomial', 'wsd', 'onecycle'])
def test_the_floor_is_reached_right_after_the_last_step(name):
    steps, floor = random.randrange(50, 500), random.choice([0, .01, .03])
    schedule = Schedule(name=name, floor=floor)
    assert schedule.at(steps, steps) == pytest.approx(floor, abs=1e-9) == schedule.at(2 * steps, steps)
    assert schedule.at(steps - 1, steps) > floor


def test_against_torch():
    n, floor = random.randrange(60, 120), random.random() / 2
    start = Schedule(name='cosine', warmup=0, floor=floor)
    close(start.curve(n), by_torch(lambda o: lrs.CosineAnnealingLR(o, n, floor), n))
    close(Schedule(name='linear', warmup=0, floor=floor).curve(n), by_torch(lambda o: lrs.LinearLR(o, 1., floor, n), n))
    close(Schedule(name='step', warmup=0, gamma=.3, every=17).curve(n), by_torch(lambda o: lrs.StepLR(o, 17, .3), n))
    close(Schedule(name='exponential', warmup=0, gamma=.9, every=1).curve(n), by_torch(lambda o: lrs.ExponentialLR(o, .9), n))
    close(Schedule(name='polynomial', warmup=0, power=1.7).curve(n), by_torch(lambda o: lrs.PolynomialLR(o, n, 1.7), n))
    for first, cycles in ((10, 4), (13, 3)):
        total = first * (2 ** cycles - 1)
        close(Schedule(name='restarts', warmup=0, cycles=cycles, floor=floor).curve(total), by_torch(lambda o: lrs.CosineAnnealingWarmRestarts(o, first, 2, floor), total))
    W, N, low, final = 20, 150, .05, .002
    def onecycle(o): return lrs.OneCycleLR(o, 1., total_steps=N + 1, pct_start=(W + 1) / (N + 1), anneal_strategy='linear', div_factor=1 / low, final_div_factor=low / final, three_phase=True)
    ours, theirs = Schedule(name='onecycle', warmup=W, low=low, floor=final).curve(N), by_torch(onecycle, N)
    close(ours[:W], theirs[1:W + 1])  # Torch's warm-up begins one step earlier, at the low end itself
    close(ours[W:], theirs[W:])


def test_against_transformers():
    from transformers import optimization as hf
    W, N = random.randrange(5, 20), random.randrange(80, 120)
    pairs = {'constant': lambda o: hf.get_constant_schedule_with_warmup(o, W), 'linear': lambda o: hf.get_linear_schedule_with_warmup(o, W, N),
             'cosine': lambda o: hf.get_cosine_schedule_with_warmup(o, W, N), 'inverse_sqrt': lambda o: hf.get_inverse_sqrt_schedule(o, W)}
    options = {}
    pairs['restarts'], options['restarts'] = lambda o: hf.get_cosine_with_hard_restarts_schedule_with_warmup(o, W, N, 3), dict(cycles=3, stretch=1)
    pairs['polynomial'], options['polynomial'] = lambda o: hf.get_polynomial_decay_schedule_with_warmup(o, W, N, lr_end=.1, power=2.5), dict(power=2.5, floor=.1)
    for name, make in pairs.items():
        ours, theirs = Schedule(name=name, warmup=W, **options.get(name, {})).curve(N), by_torch(make, N + 1)
        close(ours[:W], theirs[1:W + 1])
        close(ours[W:], theirs[W:N])
    for fall in ('linear', '1-sqrt'):
        ours = Schedule(name='wsd', warmup=W, decay=30, fall=fall, floor=.1).curve(N)
        theirs = by_torch(lambda o: hf.get_wsd_schedule(o, W, 30, N, decay_type=fall, min_lr_ratio=.1), N)
        close(ours[W:], theirs[W:])
        assert Schedule(name='wsd', warmup=W, decay=30 / N, fall=fall, floor=.1).curve(N) == ours


def test_plateau_counts_as_torch_does():
    for _ in range(20):
        mode, patience, delta = random.choice(['min', 'max']), random.randrange(4), random.choice([0., .1])
        ours = Plateau(Schedule(name='plateau', warmup=0, mode=mode, patience=patience, delta=delta, gamma=.5, floor=.1))
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.)
        theirs = lrs.ReduceLROnPlateau(optimizer, mode, .5, patience, delta, 'abs', min_lr=.1, eps=0)
        for k in range(40):
            score = random.choice([random.random(), float('nan')] if k else [random.random()])
            ours.report(score)
            theirs.step(score)
            if k == 20:
                state, ours = json.loads(json.dumps(ours.state())), Plateau(ours.schedule)
                ours.load(state)
            assert ours.at(k, 100) == pytest.approx(optimizer.param_groups[0]['lr'])


def test_settings_are_numbers_and_names_are_checked():
    assert Schedule(floor='1e-4', warmup='0.06', power='3').floor == 1e-4
    for wrong in (dict(name='cos'), dict(warmup=-1), dict(warmup=2.5), dict(floor=2), dict(warmpu=.1), dict(cycles=0)):
        with pytest.raises(ValueError): Schedule(**wrong)


# --------------------------------------------------------------------------------------------------------------- the models

def models():
    "Small models of every family, untied and tied"
    import transformers as t
    small = dict(vocab_size=90, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, max_position_embeddings=64, pad_token_id=0)
    yield 'ours', Transformer(NetConfig(vocab_size=90, width=32, layers=3, heads=2))
    yield 'ours masked', Transformer(NetConfig(vocab_size=90, width=32, layers=3, heads=2, mode='masked', form='modernbert', norm='layer', activation='geglu', positions='learned', tied=False))
    yield 'bert', t.BertForMaskedLM(t.BertConfig(**small))
    yield 'xlm-r', t.XLMRobertaForMaskedLM(t.XLMRobertaConfig(**small))
    yield 'modernbert', t.ModernBertForMaskedLM(t.ModernBertConfig(**small, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2))
    yield 'llama', t.LlamaForCausalLM(t.LlamaConfig(**small, num_key_value_heads=1))
    yield 'gpt2', t.GPT2LMHeadModel(t.GPT2Config(vocab_size=90, n_embd=32, n_layer=3, n_head=2, n_positions=64))


@pytest.fixture(scope='module')
def families(): return dict(models())


NORMS = {'ours': '*norm', 'ours masked': '*norm', 'bert': 'LayerNorm', 'xlm-r': 'LayerNorm', 'modernbert': '*norm', 'llama': '*norm', 'gpt2': 'ln_*'}


def test_groups_partition_the_parameters(families):
    for family, model in families.items():
        named, tables = dict(model.named_parameters()), {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        for muon in (False, True):
            groups = parameter_groups(model, 1e-3, .1, {NORMS[family]: 2.}, muon=muon)
            seen = [id(p) for g in groups for _, p in g['params']]
            assert len(seen) == len(set(seen)) and set(seen) == {id(p) for p in named.values()}, family
            for g in groups:
                assert g['base'] == g['lr']
                for name, p in g['params']:
                    assert (g['weight_decay'] > 0) == (p.ndim > 1 and id(p) not in tables), (family, name)
                    assert g['base'] == (2e-3 if name in matching(NORMS[family], named) else 1e-3)
                    if muon: assert g['muon'] == (p.ndim == 2 and name.startswith(stack(model)[0])), (family, name)
        rate = {name: g['base'] for g in parameter_groups(model, 1., rates=layer_rates(model, .5)) for name, _ in g['params']}
        top, prefix = len(stack(model)[1]), stack(model)[0]
        for name, factor in rate.items():
            depth = int(name[len(prefix) + 1:].split('.')[0]) if name.startswith(prefix + '.') else None
            expected = .5 ** (top - 1 - depth) if depth is not None else .5 ** top if name in embedding_names(model) else 1.
            assert factor == expected, (family, name)


def test_fused_matrices_are_known(families):
    for family, name, expected in (('modernbert', 'Wqkv', (32, 32, 32)), ('modernbert', 'Wi', (48, 48)), ('gpt2', 'c_attn', (32, 32, 32)), ('llama', 'q_proj', None)):
        group = next(g for g in parameter_groups(families[family], muon=True) if g['muon'])
        found = [parts for (n, _), parts in zip(group['params'], group['parts']) if f'.{name}.' in n]
        assert found == [expected] * 3, (family, found)
    assert all(make_optimizer('muon', m, 1e-3) for m in families.values())


def test_frozen_parameters_do_not_move(families):
    for family, model in families.items():
        for what in (0, 2, [f'{stack(model)[0]}.1', NORMS[family]]):
            tuned = copy.deepcopy(model)
            frozen = freeze(tuned, what)
            if what == 2: assert {n for n, _ in tuned.named_parameters() if n.startswith((f'{stack(model)[0]}.0.', f'{stack(model)[0]}.1.'))} <= set(frozen)
            if isinstance(what, int): assert any('embed' in n or 'wte' in n for n in frozen)
            before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
            optimizer, ids = make_optimizer('muon', tuned, .01, .1), torch.randint(3, 90, (2, 8))
            tuned(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            moved = {n for n, p in tuned.named_parameters() if not torch.equal(p, before[n])}
            assert not moved & set(frozen) and any(n.startswith(f'{stack(model)[0]}.2.') for n in moved), family
        tuned = copy.deepcopy(model)
        assert len(freeze(tuned, 'all')) == len(list(tuned.parameters()))
        with pytest.raises(ValueError, match='freeze less'): parameter_groups(tuned)


def test_misspelt_names(families):
    model = families['llama']
    with pytest.raises(ValueError, match="did you mean 'self_attn'"): freeze(model, ['self_atn'])
    with pytest.raises(ValueError, match="no parameter is named as in 'layers.7'"): freeze(model, ['layers.7'])
    with pytest.raises(ValueError, match='3 layers; asked to freeze 4'): freeze(model, 4)
    with pytest.raises(ValueError, match='lm_head.weight is tied'): freeze(families['gpt2'], 'lm_head')
    with pytest.raises(ValueError, match='ModuleList'): freeze(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="did you mean 'adamw'"): make_optimizer('adamW2', model, 1e-3)
    with pytest.raises(ValueError, match="sgd has no option 'betas'"): make_optimizer('sgd', model, 1e-3, betas=(.9, .95))
    assert matching('layers.1', ['layers.1.w', 'layers.10.w', 'model.layers.1.b']) == ['layers.1.w', 'model.layers.1.b']


# --------------------------------------------------------------------------------------------------------------------- Muon

def in_fp32(grad, *rest):
    "Torch's own iterations, which always run in bfloat16, in the type they were given"
    with patch.object(torch.Tensor, 'bfloat16', lambda t: t.clone()): return torch_muon_iterations(grad, *rest)

torch_muon_iterations = torch_muon._zeropower_via_newtonschulz


def steps(params, others, optimizer, other, n):
    "The largest difference after n steps with the same gradients"
    for _ in range(n):
        for p, q in zip(params, others): p.grad = torch.randn_like(p); q.grad = p.grad.clone()
        optimizer.step(); other.step()
    return max((p - q).abs().max().item() for p, q in zip(params, others))


def test_muon_is_torchs_muon():
    shapes = [(40, 20), (20, 40), (40, 20), (16, 16), (1, 7), (64, 3)]
    ours = [nn.Parameter(torch.randn(s)) for s in shapes]
    for nested, momentum in ((5, .95), (3, .8)):
        mine, theirs = [nn.Parameter(p.detach().clone()) for p in ours], [nn.Parameter(p.detach().clone()) for p in ours]
        one = MuonAdamW([dict(params=mine, muon=True)], lr=.02, weight_decay=.1, momentum=momentum, coefficients=NEWTON_SCHULZ[:nested])
        two = torch.optim.Muon(theirs, lr=.02, weight_decay=.1, momentum=momentum, ns_steps=nested, adjust_lr_fn='match_rms_adamw')
        with patch.object(torch_muon, '_zeropower_via_newtonschulz', in_fp32): assert steps(mine, theirs, one, two, 12) < 1e-5
    mine, theirs = [nn.Parameter(p.detach().clone()) for p in ours[:4]], [nn.Parameter(p.detach().clone()) for p in ours[:4]]
    one, two = MuonAdamW([dict(params=mine, muon=True)], lr=.02, dtype=torch.bfloat16, coefficients=NEWTON_SCHULZ), torch.optim.Muon(theirs, lr=.02, adjust_lr_fn='match_rms_adamw')
    assert 0 < steps(mine, theirs, one, two, 2) < .02 * .2 * 40 ** .5 / 5


def test_the_rest_is_torchs_adamw():
    ours = [nn.Parameter(torch.randn(s)) for s in ((30, 20), (7,), (3, 4, 5))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options = dict(lr=.02, weight_decay=.1, betas=(.8, .97), eps=1e-6)
    assert steps(ours, theirs, MuonAdamW(ours, **options), torch.optim.AdamW(theirs, **options, fused=True), 10) == 0


def test_orthogonal_steps():
    for shape in ((8, 8), (3, 50), (50, 3), (2, 5, 30, 20)):
        found = orthogonalise(torch.randn(shape) * 10 ** random.uniform(-6, 6))
        assert found.shape == shape and (torch.linalg.svdvals(found)[..., 0] < 1.3).all()
    for each in (quintics(2, .03), quintics(3), quintics(5, .001), NEWTON_SCHULZ):
        for dtype in (torch.float32, torch.bfloat16):
            low_rank = torch.randn(40, 4) @ torch.randn(4, 30) + 1e-4 * torch.randn(40, 30)
            values = torch.linalg.svdvals(orthogonalise(low_rank.to(dtype), each).float())
            assert .6 < values[3] and values[0] < 1.45
    p = nn.Parameter(torch.zeros(6, 4))
    optimizer = MuonAdamW([dict(params=[p], muon=True)])
    optimizer.step()
    assert not optimizer.state[p], 'no gradient, no state'
    p.grad = torch.zeros(6, 4)
    optimizer.step()
    assert torch.equal(p, torch.zeros(6, 4)) and optimizer.state[p].keys() == {'momentum_buffer'}


def train(model, optimizer, steps, start=0):
    for k in range(start, start + steps):
        torch.manual_seed(k)
        ids = torch.randint(3, 90, (2, 10))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_state_goes_through_a_state_dict(name, families):
    whole, options = copy.deepcopy(families['gpt2']).eval(), dict(weight_decay=.1, rates={'wte': .5})
    optimizer = make_optimizer(name, whole, 1e-3, **options)
    train(whole, optimizer, 2)
    half, state = copy.deepcopy(whole), copy.deepcopy(optimizer.state_dict())
    assert all(torch.is_tensor(v) for s in state['state'].values() for v in s.values() if v is not None)
    train(whole, optimizer, 2, 2)
    again = make_optimizer(name, half, 1e-3, **options)
    again.load_state_dict(state)
    train(half, again, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), half.parameters()))
    assert [g['base'] for g in again.param_groups] == [g['base'] for g in optimizer.param_groups]


SHARDED = '''
import os, sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from lab_lm.train.muon import MuonAdamW
torch.set_num_threads(1)
child = os.fork()
dist.init_process_group('gloo', init_method='file://' + sys.argv[1], rank=int(child == 0), world_size=2)
mesh = init_device_mesh('cpu', (2,))
torch.manual_seed(0)
whole = [torch.nn.Parameter(torch.randn(s)) for s in ((9, 4), (4, 6), (5,))]
shared = [torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in whole]
groups = lambda ps: [dict(params=ps[:2], muon=True), dict(params=ps[2:])]
one, two = MuonAdamW(groups(whole), lr=.02), MuonAdamW(groups(shared), lr=.02)
for step in range(4):
    for p, q in zip(whole, shared):
        p.grad = torch.randn_like(p)
        q.grad = distribute_tensor(p.grad.clone(), mesh, [Shard(0)])
    one.step(); two.step()
assert shared[0].to_local().shape[0] == (5 if child else 4)
assert max((p - q.full_tensor()).abs().max().item() for p, q in zip(whole, shared)) < 1e-6
dist.destroy_process_group()
if child: sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
'''


def test_muon_where_two_devices_share_the_rows(tmp_path):
    if sys.platform != 'linux': pytest.skip('the two processes are forked')
    done = subprocess.run([sys.executable, '-c', SHARDED, str(tmp_path / 'meet')], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------- estimates

MEASURED = '''
import json, os, re, sys, torch
from lab_lm.nets.transformer import NetConfig, Transformer
from lab_lm.train.optim import make_optimizer
from lab_lm.train.estimate import memory, shape_of
torch.set_num_threads(1)
def resident(key): return 1024 * int(re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1])
for tokens, optimizer, checkpointing, share in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        x = torch.nn.Linear(64, 64); x(torch.randn(64, 64)).sum().backward(); torch.optim.AdamW(x.parameters(), fused=True).step() # What torch loads on first use
        open('/proc/self/clear_refs', 'w').write('5') # The peak counts from here
        before = resident('VmRSS')
        model = Transformer(NetConfig(vocab_size=3000, width=256, layers=3, heads=4, checkpointing=checkpointing))
        steps = make_optimizer(optimizer, model, 1e-3)
        for step in range(2):
            ids = torch.randint(3000, (tokens // 128, 128))
            labels = torch.where(torch.rand(ids.shape) < share, ids, -100)
            model(ids, labels=labels).loss.backward()
            steps.step(); steps.zero_grad()
        print(resident('VmHWM') - before, memory(shape_of(model), tokens, share, optimizer=optimizer, checkpointing=checkpointing)['total'], flush=True)
        os._exit(0)
    os.waitpid(child, 0)
'''


def test_memory_is_right_within_a_factor_of_two():
    if sys.platform != 'linux': pytest.skip('the peak of resident memory is read as on Linux')
    cases = [(1024, 'adamw', False, 1), (1024, 'muon', True, .15), (128, 'muon', False, 1)]
    done = subprocess.run([sys.executable, '-c', MEASURED, json.dumps(cases)], cwd=ROOT, capture_output=True, text=True, timeout=200)
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(found) == len(cases), done.stderr
    for case, (measured, estimated) in zip(cases, found): assert .5 < measured / estimated < 2, (case, measured / 2**20, estimated / 2**20)


def test_shapes_and_work(families):
    for family, model in families.items():
        shape = shape_of(model)
        assert (shape.layers, shape.width, shape.vocab) == (3, 32, 90) and shape.parameters == sum(p.numel() for p in model.parameters()), family
        assert largest_batch(shape, memory(shape, 640)['total'], 64) == 10
    shape = shape_of(families['ours'])
    ids = torch.randint(90, (4, 16))
    from torch.utils.flop_counter import FlopCounterMode
    model = copy.deepcopy(families['ours'])
    with FlopCounterMode(display=False) as counter: model(ids, labels=ids).loss.backward()
    assert .85 < counter.get_total_flops() / (ids.numel() * training_flops(shape, 16)) < 1.15
    assert matrix_rate(seconds=.05) > 1e8
