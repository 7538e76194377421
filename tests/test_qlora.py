"Fine-tuning in 4 bits: rows of chats against loops, labels against transformers, 8-bit Adam against a reading of its paper, adapters through the door, exact resume, over-fitting"
import copy
import hashlib
import json
import multiprocessing
import pickle
import random
import signal
import time
from collections import Counter

import pytest
import torch

from lab_lm.core.seed import seeded
from lab_lm.evals.answers import answer_scores, answers, question
from lab_lm.nets.adapters import add_lora
from lab_lm.nets.door import Door, can_pack, checkpoint_layers
from lab_lm.nets.pretrained import four_bit, quiet
from lab_lm.nets.tiny import save_tiny_gemma, tiny_gemma
from lab_lm.text.chat import collate, encode_chats
from lab_lm.text.chat_rows import ChatRows, best_fit, flat_chats
from lab_lm.train.checkpoint import checkpoints, frozen_mark, read_newest, remembered, remind
from lab_lm.train.estimate import shape_of, with_adapter
from lab_lm.train.feed import Feed
from lab_lm.train.learner import Learner, Training
from lab_lm.train.objectives import Answers, LengthWarmup
from lab_lm.train.optim import make_optimizer
from lab_lm.train.schedules import Schedule

WORDS = 'घर पानी किताब लड़का लड़की शहर नदी पेड़ आम दूध வீடு நீர் மரம் நதி ஊர் பால் பூ கல்'.split()


def chat_rows(n, longest=60, vocab=90):
    "Encoded chats of random tokens, the last half or so of each an answer"
    out = []
    for i in range(n):
        size = random.randrange(2, longest + 1)
        ids, begin = [random.randrange(5, vocab) for _ in range(size)], random.randrange(1, size)
        out.append(dict(id=f'c{i}', input_ids=ids, labels=[-100] * begin + ids[begin:]))
    return out


def chats_of(n):
    "Questions and answers, none twice"
    asked = random.sample([(a, b) for a in WORDS for b in WORDS if a != b], n)
    return [dict(id=str(i), messages=[dict(role='user', content=f'{a} {b}?'), dict(role='assistant', content=' '.join(random.choices(WORDS, k=random.randrange(2, 5))))])
            for i, (a, b) in enumerate(asked)]


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "A tiny Gemma 3 on the disk"
    folder = tmp_path_factory.mktemp('base')
    return save_tiny_gemma(folder, [' '.join(WORDS)] * 3 + ['system user model'], 420)


def four_bit_with_adapter(folder, rank=8, alpha=16, dropout=0., seed=0):
    "The 4-bit base with a fresh adapter, and the tokenizer"
    model, tokenizer = four_bit(str(folder))
    with seeded(seed): return add_lora(model, rank, alpha, dropout), tokenizer


# ---------------------------------------------------------------------------------------------------------------- rows of chats

@pytest.mark.parametrize('packed', [True, False])
def test_every_chat_once_in_a_pass_whole_and_alone(packed):
    for _ in range(12):
        some, length, size, seed = chat_rows(random.randrange(1, 40)), random.randrange(60, 130), random.randrange(1, 9), random.randrange(99)
        rows = ChatRows(some, length, pad=3, packed=packed)
        one = 1 if packed else size
        seen = Counter()
        for k in range(rows.batches(one)):
            batch = rows.batch(k, one, seed)
            assert len({v.shape for v in batch.values()}) == 1 and batch['input_ids'].dtype == torch.int64 and batch['learned'].dtype == torch.bool
            for r, chats in enumerate(rows.chats(k, one, seed)):
                end = 0
                for number, c in enumerate(chats, 1):
                    ids, labels = some[c]['input_ids'], some[c]['labels']
                    here = slice(end, end := end + len(ids))
                    seen[c] += 1
                    assert batch['input_ids'][r, here].tolist() == ids
                    assert torch.where(batch['learned'][r, here], batch['input_ids'][r, here], -100).tolist() == labels
                    if packed: assert (batch['texts'][r, here] == number).all() and batch['position_ids'][r, here].tolist() == list(range(len(ids)))
                    else: assert (batch['attention_mask'][r, here] == 1).all()
                there = batch.get('texts', batch.get('attention_mask'))[r, end:]
                assert not there.any() and (batch['input_ids'][r, end:] == 3).all() and not batch['learned'][r, end:].any()
        assert seen == Counter(range(len(some)))


@pytest.mark.parametrize('packed', [True, False])
def test_batches_are_a_function_of_their_number(packed):
    some = chat_rows(50)
    rows, other = (ChatRows(some, 64, packed=packed) for _ in range(2))
    order = random.sample(range(40), 40)
    late = {k: rows.batch(k, 4, 7) for k in order}
    for k in range(40):
        again = pickle.loads(pickle.dumps(other)).batch(k, 4, 7)
        assert all(torch.equal(again[name], late[k][name]) for name in again)
    assert rows.chats(0, 4, 7) != rows.chats(0, 4, 8)
    turn = rows.batches(4)
    flat = lambda b: [tuple(c) for c in b]
    assert any(flat(rows.chats(k, 4, 7)) != flat(rows.chats(k + turn, 4, 7)) for k in range(turn)) # Another pass, another order
    assert rows.fingerprint() == other.fingerprint() and json.loads(json.dumps(rows.fingerprint())) == rows.fingerprint()
    changed = copy.deepcopy(some)
    changed[7]['labels'][-1 if changed[7]['labels'][-2] != -100 else -2] = -100 if changed[7]['labels'][-2] != -100 else changed[7]['input_ids'][-2]
    assert ChatRows(changed, 64, packed=packed).fingerprint() != rows.fingerprint() # The same tokens, another mark


def test_a_share_is_a_prefix_and_packing_is_tight():
    some = chat_rows(80)
    for packed in (True, False):
        rows = ChatRows(some, 64, packed=packed)
        for share in (0., .1, .5, 1.):
            n = max(1, int(80 * share + 1e-9))
            assert {c for k in range(120) for row in rows.chats(k, 2, 3, share) for c in row} == set(range(n))
    for _ in range(20):
        sizes = sorted((random.randrange(1, 101) for _ in range(random.randrange(1, 200))), reverse=True)
        bins = best_fit(sizes, 100)
        assert sorted(i for b in bins for i in b) == list(range(len(sizes))) and all(sum(sizes[i] for i in b) <= 100 for b in bins)
        assert len(bins) <= 11 / 9 * max(-(-sum(sizes) // 100), sum(s > 50 for s in sizes)) + 1 # Johnson's bound, above the least that is possible


def test_planted_faults_in_rows_are_named():
    good = dict(id='x', input_ids=[5, 6, 7, 8], labels=[-100, -100, 7, 8])
    cases = [([], 'no chats'), ([dict(good, labels=[-100, 7, 8, -100])], 'chat x has a label that is not the token'), ([dict(good, labels=[-100] * 4)], 'no token to learn'),
             ([dict(good, labels=[-100, 7, 8])], '4 tokens and 3 labels'), ([good, dict(good, id='long', input_ids=[5] * 9, labels=[5] * 9)], 'chat long has 9 tokens, a row 8')]
    for rows, said in cases:
        with pytest.raises(ValueError, match=said): flat_chats(rows, 8)
    with pytest.raises(ValueError, match='make its rows with ChatRows'): Answers()(dict(input_ids=torch.ones(1, 2)))


def test_labels_are_those_of_transformers():
    "The loss of packed and padded rows is the mean over the answers' tokens that transformers computes chat by chat"
    model, some = tiny_gemma(90).eval(), chat_rows(8, 30)
    own = []
    for row in some:
        out = model(**collate([row], 0))
        own.append((out.loss.item(), sum(label != -100 for label in row['labels'])))
    wanted = sum(loss * n for loss, n in own) / sum(n for _, n in own)
    for packed in (True, False):
        rows, door = ChatRows(some, 64, packed=packed), Door(model)
        losses = []
        for k in range(rows.batches(1 if packed else 5)):
            batch = Answers()(rows.batch(k, 1 if packed else 5, 1))
            assert (batch['labels'] != -100).any()
            losses.append((door(**batch).loss.item(), int((batch['labels'] != -100).sum())))
        assert sum(n for _, n in losses) == sum(n for _, n in own)
        assert abs(sum(loss * n for loss, n in losses) / sum(n for _, n in losses) - wanted) < 1e-5


def test_rows_can_be_warmed_up_in_length():
    rows = ChatRows(chat_rows(30, 16), 64)
    feed = Feed(rows, Answers(), 4, lengths=LengthWarmup((32, 64), (.5, .5)), steps=10)
    assert feed.step(0)['input_ids'].shape == (8, 32) and feed.step(9)['input_ids'].shape == (4, 64) and 'learned' not in feed.step(0)


# ---------------------------------------------------------------------------------------------------------------- 8-bit Adam

def test_eight_bit_adam_is_adam_with_rounded_memory():
    "Against a loop that rounds both averages to the nearest of 256 values, per block of 256"
    import bitsandbytes.functional as B
    weight, rate, steps = torch.randn(32, 256), 3e-3, 6
    net = torch.nn.Linear(256, 32, bias=False)
    net.weight.data = weight.clone()
    optimizer = make_optimizer('adamw8bit', net, rate, weight_decay=.1)
    p, m, v, tables = weight.double(), torch.zeros(32, 256).double(), torch.zeros(32, 256).double(), (B.create_dynamic_map(True), B.create_dynamic_map(False))
    def rounded(x, table):
        blocks = x.reshape(-1, 256)
        top = blocks.abs().amax(1, keepdim=True)
        near = (blocks / top.clamp(min=1e-30)).unsqueeze(-1).sub(table.double()).abs().argmin(-1)
        return (table.double()[near] * top).reshape(x.shape)
    for step in range(1, steps + 1):
        grad = torch.randn(32, 256)
        net.weight.grad = grad.clone()
        optimizer.step()
        m, v = .9 * m + .1 * grad, .999 * v + .001 * grad.double() ** 2
        p = p * (1 - rate * .1) - rate / (1 - .9 ** step) * m / (v.sqrt() / (1 - .999 ** step) ** .5 + 1e-8)
        m, v = rounded(m, tables[0]), rounded(v, tables[1])
    apart, way = (net.weight.detach().double() - p).abs(), (p - weight).abs()
    assert apart.norm() < .02 * way.norm() and (apart < .001 * way.max()).double().mean() > .98 # A value halfway between two codes may fall to either side
    assert optimizer.state[net.weight]['state1'].dtype == torch.uint8


def test_eight_bit_memory_goes_to_the_disk_and_back(tmp_path):
    def made(): return torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 128))
    def steps(net, optimizer, inputs):
        for x in inputs: optimizer.zero_grad(); net(x).square().mean().backward(); optimizer.step()
    net, data = made(), torch.randn(6, 16, 128)
    twin = copy.deepcopy(net)
    one, two = (make_optimizer('adamw8bit', n, 1e-2) for n in (net, twin))
    steps(net, one, data)
    steps(twin, two, data[:3])
    from safetensors.torch import load_file, save_file
    tensors, numbers = remembered(twin, two)
    save_file(tensors, tmp_path / 'x.safetensors') # Refuses entries that share memory, as the tables of bitsandbytes do
    fresh = make_optimizer('adamw8bit', twin, 1e-2)
    remind(twin, fresh, load_file(tmp_path / 'x.safetensors'), numbers)
    steps(twin, fresh, data[3:])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters()))


def test_paged_memory_is_put_back_as_paged_memory():
    "Without a card: an optimiser that says it is paged is asked for its own buffers"
    class Paged(torch.optim.SGD):
        is_paged, asked = True, 0
        def get_state_buffer(self, p, dtype): self.asked += 1; return torch.zeros_like(p, dtype=dtype)
    net = torch.nn.Linear(3, 2)
    optimizer = Paged(net.parameters(), lr=1.)
    tensors = {f'{n}/{key}': torch.randint(255, p.shape, dtype=torch.uint8) for n, p in net.named_parameters() for key in ('state1', 'state2')}
    remind(net, optimizer, tensors, {'weight/step': 3})
    assert optimizer.asked == 4 and torch.equal(optimizer.state[net.weight]['state2'], tensors['weight/state2'])


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a card')
def test_paged_adam_says_what_it_needs():
    with pytest.raises(ValueError, match='there is no card here; use adamw8bit or adamw'): make_optimizer('paged_adamw8bit', torch.nn.Linear(2, 2), 1e-3)
    with pytest.raises(ValueError, match="did you mean 'adamw8bit'"): make_optimizer('adam8bit', torch.nn.Linear(2, 2), 1e-3)


# ---------------------------------------------------------------------------------------------------------------- 4-bit bases and adapters

def test_the_door_lets_adapters_on_four_bits_through(base):
    model, tokenizer = four_bit_with_adapter(base)
    for n, p in model.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.05)
    door, whole = Door(model, tokenizer, 64), Door(model)
    assert door.sparse and can_pack(model)
    whole.sparse = False
    batch = Answers()(ChatRows(encode_chats(chats_of(8), tokenizer)[0], 64).batch(0, 2))
    trained = {n: p for n, p in door.named_parameters() if p.requires_grad}
    assert trained and all('lora' in n for n in trained)
    grads = {}
    for name, one, again in (('sparse', door, False), ('whole', whole, False), ('twice', door, True)):
        checkpoint_layers(one, again)
        loss = one.train()(**batch).loss
        grads[name] = loss, torch.autograd.grad(loss, list(trained.values()))
    checkpoint_layers(door, False)
    for name in ('whole', 'twice'):
        assert abs(grads[name][0] - grads['sparse'][0]) < 1e-5
        for a, b in zip(grads[name][1], grads['sparse'][1]): assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max()) + 1e-9)
    with model.disable_adapter(): without = door(**batch).loss
    assert abs(without - grads['sparse'][0]) > 1e-4 # The adapter does take part in the sparse way


def test_the_mark_of_a_base_sees_its_scales(base):
    (one, _), (two, _) = (four_bit_with_adapter(base) for _ in range(2))
    assert frozen_mark(one) == frozen_mark(two)
    layer = next(m for m in two.modules() if type(m).__name__ == 'Linear4bit')
    layer.weight.quant_state.state2.absmax *= 2 # The same codes, twice the weights
    assert frozen_mark(one) != frozen_mark(two)


def test_shape_and_memory_of_a_four_bit_base(base):
    model, _ = four_bit_with_adapter(base)
    plain = shape_of(tiny_gemma(420))
    shape, thought = shape_of(model), with_adapter(plain, 8)
    assert (shape.quantised, shape.trained, sorted(shape.adapters), sorted(shape.matrices)) == (thought.quantised, thought.trained, sorted(thought.adapters), sorted(thought.matrices))
    assert shape.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = sum(p.nbytes + p.quant_state.absmax.nbytes + p.quant_state.state2.absmax.nbytes for p in model.parameters() if getattr(p, 'quant_state', None) is not None)
    assert abs(packed / shape.quantised - .516) < .03


# ---------------------------------------------------------------------------------------------------------------- exact resume

STEPS = 8


def learner(folder, base, optimizer='adamw8bit', alpha=16, lr=5e-3):
    "Dropout in the adapter, accumulation, checkpointed layers, 8-bit Adam, on packed chats"
    torch.set_num_threads(1)
    random.seed(11)
    model, tokenizer = four_bit_with_adapter(base, alpha=alpha, dropout=.1)
    feed = Feed(ChatRows(encode_chats(chats_of(24), tokenizer)[0], 64, tokenizer.pad_token_id), Answers(), batch=2, seed=3)
    training = Training(steps=STEPS, lr=lr, optimizer=optimizer, accumulate=2, save_every=3, checkpointing=True, schedule=Schedule(warmup=.2))
    return Learner(Door(model, tokenizer, 64), feed, training, folder)


def train(folder, base): learner(folder, base).fit()


def ends(folder):
    last = checkpoints(folder / 'checkpoints')[-1]
    assert last.name == f'step-{STEPS:08d}'
    return [hashlib.sha256(p.read_bytes()).hexdigest() for p in (last / 'weights.safetensors', last / 'optimizer.safetensors', folder / 'metrics.jsonl')]


def start(folder, base):
    child = multiprocessing.get_context('fork').Process(target=train, args=(folder, base))
    child.start()
    return child


def rows_in(folder): return (folder / 'metrics.jsonl').read_bytes().count(b'\n') if (folder / 'metrics.jsonl').exists() else 0


def test_killed_runs_end_with_the_same_adapter(base, tmp_path):
    straight = start(tmp_path / 'straight', base)
    straight.join()
    assert straight.exitcode == 0
    wanted = ends(tmp_path / 'straight')
    for trial in range(2):
        folder, enough = tmp_path / str(trial), random.randrange(1, STEPS - 2)
        child = start(folder, base)
        while rows_in(folder) < enough and child.exitcode is None: time.sleep(.001)
        time.sleep(random.uniform(0, .02))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, 'the run was over before it could be killed'
        again = start(folder, base)
        again.join()
        assert again.exitcode == 0 and ends(folder) == wanted
    weights, _, state = read_newest(tmp_path / 'straight' / 'checkpoints')
    assert weights and all('lora' in name for name in weights), 'a checkpoint holds the adapter only'
    assert sum(t.nbytes for t in weights.values()) < 4 * 40_000 and state['made_by']['adapter']['default']['lora_alpha'] == 16
    for change, said in ((dict(alpha=32), 'adapter.default.lora_alpha: 16 there, 32 here'), (dict(lr=1e-3), 'training.lr'), (dict(optimizer='adamw'), 'training.optimizer')):
        with pytest.raises(ValueError, match=said): learner(tmp_path / 'straight', base, **change).fit()
    other = save_tiny_gemma(tmp_path / 'other', [' '.join(WORDS)] * 3 + ['system user model'], 420, seed=1)
    with pytest.raises(ValueError, match='frozen'): learner(tmp_path / 'straight', other).fit()


# ---------------------------------------------------------------------------------------------------------------- learning and answering

@pytest.fixture(scope='module')
def read(base, tmp_path_factory):
    "The tiny Gemma 3 after it has read other chats, every token of them"
    from transformers import AutoModelForCausalLM, AutoTokenizer
    class Everything(Answers):
        def __call__(self, batch, step=0, generator=None): return super().__call__(batch | dict(learned=batch['texts'] > 0))
    torch.set_num_threads(1)
    with quiet(): model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    rows = ChatRows(encode_chats(chats_of(120), tokenizer)[0], 128)
    Learner(Door(model), Feed(rows, Everything(), 4), Training(steps=110, lr=1e-2)).fit()
    folder = tmp_path_factory.mktemp('read')
    with quiet(): model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return folder


def test_twenty_chats_are_learnt_by_heart(read):
    "After over-fitting, at least 95 % of the answers end as the template ends a turn and repeat the right one"
    torch.set_num_threads(1)
    model, tokenizer = four_bit_with_adapter(read, rank=32, alpha=32)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    chats = chats_of(20)
    feed = Feed(ChatRows(encode_chats(chats, tokenizer)[0], 128, tokenizer.pad_token_id), Answers(), batch=4)
    rows = Learner(Door(model, tokenizer, 128), feed, Training(steps=70, lr=1e-2, schedule=Schedule(warmup=.05), weight_decay=0.)).fit()
    assert rows[0]['loss'] > 1.5 and rows[-1]['loss'] < .2, 'the loss falls'
    said = answers(model, tokenizer, chats)
    scores = answer_scores(said)
    assert scores['ended'].value >= .95 and scores['exact'].value >= .95 and abs(scores['script'].value - scores['script'].baselines['wanted']) < .05, scores
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before), 'only the adapter changes'
    with model.disable_adapter(): without = answer_scores(answers(model, tokenizer, chats))
    assert without['exact'].value < .1


def test_answers_do_not_depend_on_their_neighbours(base):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    with quiet(): model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    chats = chats_of(9)
    chats[0]['messages'][0]['content'] *= 12 # Longer than the window of the sliding layers
    model.generation_config.update(do_sample=True, temperature=2., top_k=3) # A model's own settings must not make answers random
    together = answers(model, tokenizer, chats, max_tokens=10, batch_size=4)
    assert together == answers(model, tokenizer, chats, max_tokens=10, batch_size=9)
    for chat, row in zip(chats, together):
        ids = question(chat, tokenizer)[0]
        said = []
        with torch.no_grad():
            while len(said) < 10 and not (said and said[-1] in (1, 6)): said.append(int(model(torch.tensor([ids + said])).logits[0, -1].argmax()))
        assert len(said) == row['tokens']
        assert tokenizer.decode(said[:-1] if said[-1] in (1, 6) else said, skip_special_tokens=True) == row['given']
