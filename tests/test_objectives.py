"What is asked of a model and how its answers are counted: against loops, torch, hand formulas and planted faults"
import pickle
import random
from types import SimpleNamespace

import pytest
import torch
from test_masking import SEED, draws, made, packed
from torch.nn import functional as F

from lab_lm.nets.transformer import NetConfig, Transformer
from lab_lm.text.batches import pack
from lab_lm.text.masking import Ramp
from lab_lm.train.objectives import (Causal, Distilled, Hybrid, LengthWarmup, Masked, MaskedNext, Penalised, PlainLoss, Smoothed, ahead, causal_rows,
                                     label_logits, shorter, token_loss)

def test_the_next_token_by_a_loop():
    for _ in range(20):
        lens = [random.randrange(1, 9) for _ in range(12)]
        batch = pack([[random.randrange(5, 99) for _ in range(n)] for n in lens], 10, 0)
        wanted = torch.full_like(batch['input_ids'], -100)
        for r in range(len(wanted)):
            for i in range(9):
                if batch['texts'][r, i] and batch['texts'][r, i] == batch['texts'][r, i + 1]: wanted[r, i] = batch['input_ids'][r, i + 1]
        made_of = {k: v for k, v in batch.items() if k != 'labels'}
        assert torch.equal(Causal()(made_of, 0, None)['labels'], wanted)
        assert torch.equal(ahead(batch['input_ids'], dict(texts=batch['texts'])), wanted)
        back = F.pad(wanted, (1, 0), value=-100)[:, :-1] # `pack` puts a label where the token stands, as hub models want it
        assert torch.equal(back, batch['labels'])


def test_nothing_under_padding_or_in_other_texts_is_asked():
    batch = packed()
    for objective in (Causal(), Masked(made('akshara_bpe'), unit='span'), MaskedNext(Masked(made('akshara_bpe'))), Hybrid(Masked(made('akshara_bpe')), .4)):
        lesson = objective(batch, 3, draws(SEED))
        assert (lesson['labels'][batch['texts'] == 0] == -100).all()
        asked = lesson['labels'] != -100
        ends = F.pad(batch['texts'][:, 1:] != batch['texts'][:, :-1], (0, 1), value=True)
        if not isinstance(objective, (Masked, Hybrid)): assert not asked[ends].any()
        changed = lesson['input_ids'] != batch['input_ids']
        assert isinstance(objective, Causal) == (not changed.any())


def test_masked_next_moves_every_answer_left():
    tok, batch = made('akshara_bpe'), packed()
    plain, moved = Masked(tok, unit='word')(batch, 0, draws(SEED)), MaskedNext(Masked(tok, unit='word'))(batch, 0, draws(SEED))
    assert torch.equal(plain['input_ids'], moved['input_ids'])
    first = F.pad(batch['texts'][:, 1:] != batch['texts'][:, :-1], (1, 0), value=True)
    hidden = (plain['labels'] != -100) & ~first
    wanted = torch.full_like(plain['labels'], -100)
    r, c = hidden.nonzero().T
    wanted[r, c - 1] = batch['input_ids'][r, c]
    assert torch.equal(moved['labels'], wanted)


def test_the_causal_share_is_exact_and_fair():
    for _ in range(30):
        rows_of, share = random.randrange(1, 40), random.choice([0., 1., 1 / 16, random.random()])
        flags = torch.stack([causal_rows(Ramp(share), k, rows_of) for k in range(60)])
        running = flags.flatten().cumsum(0)
        exact = share * torch.arange(1, len(running) + 1, dtype=torch.float64)
        assert (running - exact).abs().max() <= .5 + 1e-6 # At every row, not only at the ends of steps
        halves = flags[:, :rows_of // 2].sum(), flags[:, rows_of // 2:rows_of // 2 * 2].sum()
        if rows_of > 1 and share == .5: assert abs(halves[0] - halves[1]) <= 60
    share = Ramp(.9, .1, 150)
    n = torch.stack([causal_rows(share, k, 24) for k in range(250)]).sum(1)
    assert n.sum() == round(24 * share.total(250)) and n[0] > 20 and n[200] < 4
    assert torch.equal(causal_rows(share, 77, 24), causal_rows(share, 77, 24))


def test_a_hybrid_batch_is_its_two_parts():
    tok, batch = made('akshara_bpe'), packed()
    lesson = Hybrid(Masked(tok, .2, 'word'), Ramp(.1, .6, 20))(batch, 11, draws(SEED))
    causal = lesson['causal']
    assert causal.dtype == torch.bool and int(causal.sum()) in (17, 18, 19) and lesson['labels'].shape == batch['texts'].shape
    part = Masked(tok, .2, 'word')({k: v[~causal] for k, v in batch.items()}, 11, draws(SEED))
    for k in ('input_ids', 'labels'): assert torch.equal(lesson[k][~causal], part[k])
    assert torch.equal(lesson['labels'][causal], Causal()(batch)['labels'][causal]) and torch.equal(lesson['input_ids'][causal], batch['input_ids'][causal])


@pytest.mark.parametrize('make', [Causal, lambda: Masked(made('bpe'), Ramp(.4, .1, 9), 'span'), lambda: MaskedNext(Masked(made('bpe'))), lambda: Hybrid(Masked(made('bpe')), .3)])
def test_objectives_are_pure_and_can_be_sent(make):
    objective, batch = make(), packed('bpe')
    copies = [objective, pickle.loads(pickle.dumps(objective)), make()]
    random.shuffle(copies)
    for k in (5, 0, 5): # The order of steps does not matter
        lessons = [o(batch, k, draws(k)) for o in copies]
        assert all(torch.equal(lessons[0][key], one[key]) for one in lessons for key in one)
    assert len({repr(o) for o in copies}) == 1 and len(repr(objective)) < 600 and len(pickle.dumps(objective)) < 200_000
    assert repr(Masked(made('bpe'), unit='word')) != repr(Masked(made('akshara_bpe'), unit='word'))


def test_shorter_rows_by_a_loop():
    for _ in range(20):
        batch = pack([[random.randrange(5, 99) for _ in range(random.randrange(1, 25))] for _ in range(9)], 24, 0)
        del batch['labels']
        length = random.choice([2, 3, 4, 6, 8, 12, 24])
        cut = shorter(batch, length)
        flat = [(int(i), int(t)) for i, t in zip(batch['input_ids'].flatten(), batch['texts'].flatten())]
        for r, row in enumerate(cut['input_ids']):
            piece = flat[r * length:(r + 1) * length]
            number, position = 0, -1
            for i, (token, text) in enumerate(piece):
                new = i == 0 or text != piece[i - 1][1]
                position = 0 if new or not text else position + 1
                number += new and text > 0
                assert (int(row[i]), int(cut['texts'][r, i]), int(cut['position_ids'][r, i])) == (token, number if text else 0, position)
    with pytest.raises(ValueError, match='lengths that fit: 2, 3'): shorter(batch, 5)
    with pytest.raises(ValueError, match='packed rows'): shorter(dict(input_ids=batch['input_ids'], attention_mask=batch['texts']), 12)


def test_length_warmup():
    grows = LengthWarmup((8, 16, 64), (.1, .25, .65))
    batch = packed()
    at = [grows.at(k, 200) for k in range(200)]
    assert [at.count(n) for n in (8, 16, 64)] == [20, 50, 130] and at == sorted(at) and grows.at(500, 200) == 64
    for k in (0, 30, 190): assert grows(batch, k, 200)['input_ids'].numel() == batch['input_ids'].numel()
    assert grows(batch, 190, 200) is batch
    for wrong in (((8, 8), (.5, .5)), ((8, 16), (1.,)), ((), ())):
        with pytest.raises(ValueError): LengthWarmup(*wrong)


def net(seed=0, vocab=2500, **how):
    torch.manual_seed(seed)
    return Transformer(NetConfig(vocab_size=vocab, width=32, layers=1, heads=2, max_length=64, **how)).eval()


@pytest.fixture(scope='module')
def lesson():
    return Masked(made('akshara_bpe'))({k: v[:8] for k, v in packed().items()}, 0, draws(3))


def test_losses_against_torch_and_by_hand(lesson):
    model, teacher = net(1, mode='masked'), net(2, mode='masked')
    out, other = model(**lesson), teacher(**lesson)
    z, y, t = out.logits.double(), out.targets, other.logits.double()
    assert torch.equal(y, lesson['labels'][lesson['labels'] != -100])
    weights = torch.rand(2500).double()
    p = z.softmax(-1)
    wanted = {
        PlainLoss(): F.cross_entropy(z, y),
        Smoothed(.15): F.cross_entropy(z, y, label_smoothing=.15),
        Smoothed(0., tuple(weights.tolist())): (F.cross_entropy(z, y, reduction='none') * weights[y]).mean(),
        Penalised(.2): F.cross_entropy(z, y) + .2 * (p * p.log()).sum(-1).mean(),
        Penalised(0., 3., .0004): F.cross_entropy(z, y) + 3 * (p.max(-1).values - .0004).clamp(min=0).square().mean(),
        Distilled(teacher, .4, 2.5): .4 * 2.5**2 * ((t / 2.5).softmax(-1) * ((t / 2.5).log_softmax(-1) - (z / 2.5).log_softmax(-1))).sum(-1).mean() + .6 * F.cross_entropy(z, y),
        Distilled(teacher, 0.): F.cross_entropy(z, y),
        Distilled(teacher, .5, 1., Smoothed(.15)): .5 * (t.softmax(-1) * (t.log_softmax(-1) - z.log_softmax(-1))).sum(-1).mean() + .5 * F.cross_entropy(z, y, label_smoothing=.15)}
    for loss, value in wanted.items():
        got, output = loss(model, lesson)
        assert got.item() == pytest.approx(value.item(), rel=1e-5), loss
        assert torch.equal(output.logits, out.logits)


def test_losses_of_parts_add_up(lesson):
    model, teacher = net(1, mode='masked'), net(2, mode='masked')
    n = int((lesson['labels'] != -100).sum())
    parts = [{k: v[i:j] for k, v in lesson.items()} for i, j in ((0, 1), (1, 5), (5, 8))]
    for loss in (PlainLoss(), Smoothed(.1, tuple(torch.rand(2500).tolist())), Penalised(.1, 1., .0), Distilled(teacher)):
        sums = sum(int((p['labels'] != -100).sum()) / n * loss(model, p)[0] for p in parts)
        assert sums.item() == pytest.approx(loss(model, lesson)[0].item(), rel=1e-5)


def test_no_labels_give_a_zero_with_a_gradient(lesson):
    empty = lesson | dict(labels=torch.full_like(lesson['labels'], -100))
    for loss in (PlainLoss(), Smoothed(), Penalised(), Distilled(net(2, mode='masked'))):
        model = net(1, mode='masked')
        got = loss(model, empty)[0]
        got.backward()
        assert got.item() == 0. and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_hub_model_that_answers_everywhere_or_sparsely(lesson):
    z = torch.randn(8, 64, 50)
    labels = torch.where(lesson['labels'] != -100, lesson['labels'] % 50, -100)
    keep = labels != -100
    everywhere, targets = label_logits(SimpleNamespace(logits=z), dict(labels=labels))
    sparse, same = label_logits(SimpleNamespace(logits=z[keep]), dict(labels=labels))
    assert torch.equal(everywhere, z[keep]) and torch.equal(sparse, z[keep]) and torch.equal(targets, labels[keep]) and torch.equal(same, targets)
    assert float(token_loss(everywhere, targets)) == pytest.approx(float(F.cross_entropy(z.flatten(0, 1), labels.flatten())))


def test_the_teacher_is_left_alone(lesson):
    model, teacher = net(1, mode='masked', dropout=.1), net(2, mode='masked', dropout=.5).train()
    before = [p.clone() for p in teacher.parameters()]
    loss = Distilled(teacher, 1., 2.)
    assert not teacher.training and loss(model, lesson)[0].item() == loss(model, lesson)[0].item()
    loss(model, lesson)[0].backward()
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(teacher.parameters(), before)) and model.embed.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match='share places and vocabulary'): Distilled(net(3, 2600, mode='masked'))(model, lesson)
    for wrong in (dict(share=1.1), dict(temperature=0.)):
        with pytest.raises(ValueError, match='temperature above 0'): Distilled(teacher, **wrong)


def test_a_student_learns_its_teacher(lesson):
    teacher, student = net(2, mode='masked'), net(1, mode='masked')
    with torch.no_grad():
        for p in teacher.parameters(): p.mul_(1.3)
    loss, optimizer = Distilled(teacher, 1., 2.), torch.optim.Adam(student.parameters(), .01)
    losses = []
    for _ in range(10):
        got = loss(student, lesson)[0]
        optimizer.zero_grad(); got.backward(); optimizer.step()
        losses.append(got.item())
    assert losses[-1] < .7 * losses[0]


def test_cut_rows_are_the_pieces_by_themselves():
    "A model sees in shorter rows exactly the pieces, each from position 0"
    model, batch = net(4, mode='causal', positions='learned'), {k: v[:4] for k, v in packed().items()}
    cut = shorter(batch, 16)
    with torch.no_grad(): together = model(**cut).logits
    for r in range(0, 16, 5):
        for text in set(cut['texts'][r].tolist()) - {0}:
            place = cut['texts'][r] == text
            with torch.no_grad(): alone = model(cut['input_ids'][r][place][None]).logits[0]
            assert (alone - together[r][place]).abs().max() < 1e-4


def test_both_objectives_fall_on_one_set_of_weights():
    tok = made('akshara_bpe')
    model, batch = net(5, mode='hybrid'), {k: v[:16, :32] for k, v in packed().items()}
    objective, optimizer = Hybrid(MaskedNext(Masked(tok, .3)), .5), torch.optim.Adam(model.parameters(), 5e-3)
    lesson = objective(batch, 0, draws(0))
    causal = lesson['causal']
    parts = lambda: [model(**{k: v[rows_] for k, v in lesson.items()}).loss.item() for rows_ in (causal, ~causal)]
    before = parts()
    for _ in range(25):
        loss, _ = PlainLoss()(model, lesson)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    assert all(b < .7 * a for a, b in zip(before, parts()))
