"Losses against hand-written loops, gradients of chunks against those of the whole batch, rows, frozen bases and rates"
import math
import pickle
import random
from collections import Counter

import pytest
import torch
from torch import nn

from lab_lm.nets.sentence import SentenceEncoder
from lab_lm.nets.transformer import NetConfig, Transformer
from lab_lm.text.pair_rows import PairRows, TextTable
from lab_lm.text.pairs import Triplet
from lab_lm.text.tiny import pocket_facts
from lab_lm.text.tokenize import train_tokenizer
from lab_lm.train.contrastive import METRICS, Contrastive, Paired, infonce, similarity, text_keys, triplet_loss, unfit
from lab_lm.train.feed import Feed, part
from lab_lm.train.learner import Learner
from lab_lm.train.optim import make_optimizer
from lab_lm.train.schedules import Schedule
from lab_lm.train.training import Training

# ---- Losses

def near(a, b, metric):
    if metric == 'l2': return -math.dist(a, b)
    dot = sum(x * y for x, y in zip(a, b))
    return dot if metric == 'dot' else dot / math.hypot(*a) / math.hypot(*b)


@pytest.mark.parametrize('metric', METRICS)
def test_infonce_is_the_cross_entropy_of_the_right_passage(metric):
    for _ in range(20):
        n, more, d, heat = random.randrange(1, 6), random.randrange(4), random.randrange(1, 5), random.uniform(.05, 2)
        q, p, skip = torch.randn(n, d, dtype=torch.float64), torch.randn(n + more, d, dtype=torch.float64), torch.rand(n, n + more) < .3
        skip[:, :n].fill_diagonal_(False)
        rows = []
        for i in range(n):
            z = [near(q[i].tolist(), p[j].tolist(), metric) / heat for j in range(n + more) if not skip[i, j]]
            rows.append(math.log(sum(math.exp(v) for v in z)) - near(q[i].tolist(), p[i].tolist(), metric) / heat)
        assert float(infonce(q, p, heat, metric, skip)) == pytest.approx(sum(rows) / n, abs=1e-8)


def test_triplets_in_the_batch_and_with_negatives_of_their_own():
    for _ in range(40):
        n, m, d, margin = random.randrange(1, 6), random.randrange(4), random.randrange(1, 5), random.uniform(0, 3)
        q, p = torch.randn(2, n, d, dtype=torch.float64)
        own = torch.randn(n, m, d, dtype=torch.float64) if m else None
        skip, rows = torch.rand(n, n + n * m) < .4, []
        for i in range(n):
            wrong = [math.dist(q[i], own[i, j]) for j in range(m) if not skip[i, n + i * m + j]] or [math.dist(q[i], p[j]) for j in range(n) if j != i and not skip[i, j]]
            rows.append(max(0., margin + math.dist(q[i], p[i]) - min(wrong)) if wrong else 0.)
        assert float(triplet_loss(q, p, own, margin, skip)) == pytest.approx(sum(rows) / n, abs=1e-9)


@pytest.mark.parametrize('both', [False, True])
def test_loss_and_gradient_are_those_of_sentence_transformers(both):
    losses = pytest.importorskip('sentence_transformers.sentence_transformer.losses')
    def gradient(loss, vectors):
        value = loss(*vectors)
        return value.item(), torch.cat([g.flatten() for g in torch.autograd.grad(value, vectors)])
    for _ in range(10):
        n, d, heat = random.randrange(2, 12), random.randrange(2, 20), random.uniform(.02, 1)
        vectors = [torch.randn(n, d, dtype=torch.float64, requires_grad=True) for _ in range(2 if both else 3)]
        how = dict(directions=('query_to_doc', 'doc_to_query'), partition_mode='per_direction') if both else {}
        theirs = losses.MultipleNegativesRankingLoss(nn.Identity(), scale=1 / heat, **how)
        def ours(q, *p): return (infonce(q, torch.cat(p), heat) + infonce(p[0], q, heat)) / 2 if both else infonce(q, torch.cat(p), heat)
        (a, ga), (b, gb) = gradient(ours, vectors), gradient(lambda *v: theirs.compute_loss_from_embeddings(list(v), None), vectors)
        assert a == pytest.approx(b, rel=1e-9) and torch.allclose(ga, gb, rtol=1e-7, atol=1e-12)


def test_the_in_batch_triplet_has_finite_gradients_at_distance_zero():
    q = torch.randn(6, 4, requires_grad=True)
    triplet_loss(q, q.detach().clone()[[0, 1, 2, 0, 0, 0]]).backward() # Right passages at distance 0, wrong ones too
    assert q.grad.isfinite().all() and q.grad.abs().sum() > 0


def test_what_may_not_count_as_wrong():
    for _ in range(50):
        n, more = random.randrange(1, 7), random.randrange(5)
        q, p, extra = ([random.randrange(6) for _ in range(k)] for k in (n, n, more))
        rights = [{p[k] for k in range(n) if q[k] == q[i]} | {q[i]} for i in range(n)]
        wanted = [[i != j and c in rights[i] for j, c in enumerate(p + extra)] for i in range(n)]
        assert unfit(torch.tensor(q), torch.tensor(p), torch.tensor(extra, dtype=torch.long)).tolist() == wanted


def test_keys_tell_texts_apart_and_do_not_see_padding():
    texts = [tuple(random.randrange(50_000) for _ in range(random.randrange(1, 12))) for _ in range(3000)] + [(7,) * k for k in range(1, 12)] + [(1, 2), (2, 1)]
    keys = {}
    for text in texts:
        before, after = random.randrange(5), random.randrange(5)
        ids = torch.tensor([[random.randrange(9) for _ in range(before)] + [*text] + [0] * after])
        keys.setdefault(text, set()).add(int(text_keys(ids, torch.tensor([[0] * before + [1] * len(text) + [0] * after]))))
    assert all(len(k) == 1 for k in keys.values()) and len({*map(min, keys.values())}) == len(keys)


def test_a_doubled_passage_pulls_instead_of_pushing():
    "Two rows with one passage: without the mask the gradient would push each question from its own answer"
    table = nn.Embedding(9, 8)
    class Bag(nn.Module):
        def forward(self, ids, mask): return (table(ids) * mask[..., None]).sum(1)
    mask = torch.ones(2, 1, dtype=torch.long)
    twins = dict(query_ids=torch.tensor([[1], [2]]), positive_ids=torch.tensor([[3], [3]]), query_mask=mask, positive_mask=mask)
    assert Contrastive(Bag())(**twins).loss == 0 and Contrastive(Bag(), loss='triplet')(**twins).loss == 0
    assert Contrastive(Bag())(**twins | dict(positive_ids=torch.tensor([[3], [4]]))).loss > 0

# ---- A model, its rows and its learner

FACTS = pocket_facts('hi', 60)
TOKENIZER = train_tokenizer([f.passage for f in FACTS] + [f.question for f in FACTS], 'bpe', 400, 1)


def triplets(count=60):
    "Some have a negative, some share a passage, some share a question"
    rows = [Triplet(str(i), f.question, f.passage, FACTS[i - 1].passage if i % 3 == 0 else '', str(i)) for i, f in enumerate(FACTS[:count])]
    return rows + [Triplet(f'{i}-again', rows[i].query, rows[i + 1].positive) for i in range(0, count - 1, 7)]


def encoder(dropout=0., predictor=True, **how):
    body = Transformer(NetConfig(vocab_size=len(TOKENIZER), width=32, layers=2, heads=2, hidden=48, mode='masked', dropout=dropout, max_length=64))
    return SentenceEncoder(body, TOKENIZER, projection='mlp', dims=16, predictor=predictor, dropout=dropout, max_length=48, **how)


def feed(batch=8, **how): return Feed(PairRows(triplets(), TOKENIZER, 48, 24), Paired(), batch, **how)


ALL_TERMS = dict(sigreg=.02, covariance=.1, variance=.1, predict=.5)


@pytest.mark.parametrize('settings', [ALL_TERMS, dict(both=True, metric='l2', temperature=1.), dict(loss='triplet', margin=5.)])
def test_chunks_give_the_gradient_of_the_whole_batch(settings):
    torch.manual_seed(random.randrange(10**6))
    net, batch = encoder(), feed(16).step(random.randrange(1000))
    found = {}
    for chunk in (0, 1, 5, 16):
        model = Contrastive(net, chunk=chunk, **settings)
        model.zero_grad(set_to_none=True)
        out = model(**batch)
        out.loss.backward()
        found[chunk] = out.loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert found[0][1].norm() > 0
    for chunk in (1, 5, 16):
        assert torch.allclose(found[chunk][0], found[0][0], rtol=1e-5)
        assert (found[chunk][1] - found[0][1]).norm() < 1e-5 * found[0][1].norm()


def test_a_chunk_drops_the_same_numbers_when_it_is_computed_again():
    net, batch = encoder(.3).train(), feed(12).step(0)
    model, seed = Contrastive(net, chunk=4), random.randrange(10**6)
    def gradient(encode):
        model.encode, _ = encode, torch.manual_seed(seed)
        model.zero_grad(set_to_none=True); model(**batch).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    def kept(ids, mask): # Chunk after chunk, and nothing is computed again
        first = torch.arange(mask.shape[1]) == 0
        mask = torch.where(mask.any(1, keepdim=True), mask, first.long())
        return torch.cat([net(*some) for some in zip(ids.split(4), mask.split(4))])
    again, once = gradient(lambda *text: Contrastive.encode(model, *text)), gradient(kept)
    assert once.norm() > 0 and (again - once).norm() < 1e-5 * once.norm()


def held_bytes(model, batch):
    "What a forward pass keeps for the backward one, apart from parameters"
    seen, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}
    def note(t):
        if (place := t.untyped_storage().data_ptr()) not in own: seen[place] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): loss = model(**batch).loss
    loss.backward()
    return sum(seen.values())


def test_chunks_keep_vectors_only():
    batch, net = feed(48).step(0), encoder()
    whole, chunks = (held_bytes(Contrastive(net, chunk=chunk), batch) for chunk in (0, 8))
    assert chunks < whole / 10


def test_missing_negatives_and_long_rows_of_nothing():
    "A body of transformers, whose attention would answer NaN for a row without any token"
    from transformers import BertConfig, BertModel
    torch.manual_seed(0)
    body = BertModel(BertConfig(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, max_position_embeddings=64))
    net = SentenceEncoder(body, TOKENIZER, max_length=48).eval()
    rows = PairRows([Triplet('a', FACTS[0].question, FACTS[0].passage, FACTS[2].passage), Triplet('b', FACTS[1].question, FACTS[1].passage)], TOKENIZER, 48)
    batch, model = rows.batch(0, 2), Contrastive(net)
    loss = model(**batch).loss
    loss.backward()
    with torch.no_grad(): q, p, n = net(**net.inputs([FACTS[0].question, FACTS[1].question])), net(**net.inputs([FACTS[0].passage, FACTS[1].passage])), net(**net.inputs([FACTS[2].passage]))
    assert loss.item() == pytest.approx(float(infonce(q, torch.cat([p, n]))), abs=1e-4)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    one, several = rows.batch(0, 2), {k: v[:, None].repeat(1, 3, 1) if 'negative' in k else v for k, v in batch.items()}
    assert several['negative_ids'].shape[1] == 3 and torch.isfinite(model(**several).loss) and model(**several).loss > model(**one).loss


def test_half_precision_stops_at_the_encoder():
    class Half(nn.Module):
        def forward(self, ids, mask): return nn.functional.one_hot(ids[:, 0], 40).to(torch.bfloat16) * 7
    ids, mask = torch.randint(0, 40, (9, 1)), torch.ones(9, 1, dtype=torch.long)
    model, batch = Contrastive(Half(), temperature=.7, metric='l2', variance=1.), dict(query_ids=ids, query_mask=mask, positive_ids=(ids + 1) % 40, positive_mask=mask)
    plain = model(**batch).loss
    with torch.autocast('cpu', torch.bfloat16): mixed = model(**batch).loss
    assert mixed.dtype == torch.float32 and mixed == plain

# ---- Rows

def test_rows_are_the_tokenizers_and_go_through_processes():
    some = triplets()
    rows = PairRows(some, TOKENIZER, 48, 24, prefixes=('क ', 'ख '))
    for k in range(20):
        batch, chosen = rows.batch(k, 7, 5), rows.chosen(k, 7, 5)
        for name, most, front in (('query', 24, 'क '), ('positive', 48, 'ख '), ('negative', 48, 'ख ')):
            for row, i in enumerate(chosen):
                text = getattr(some[i], name)
                wanted = TOKENIZER(front + text, truncation=True, max_length=most)['input_ids'] if text else []
                if f'{name}_ids' not in batch: assert not wanted; continue
                mask = batch[f'{name}_mask'][row].bool()
                assert batch[f'{name}_ids'][row][mask].tolist() == wanted
    again = pickle.loads(pickle.dumps(rows))
    assert again.fingerprint() == rows.fingerprint() and all((again.batch(3, 9)[k] == v).all() for k, v in rows.batch(3, 9).items())
    seen = Counter(i for k in range(rows.batches(8)) for i in rows.chosen(k, 8))
    assert len(seen) == len(some) and max(seen.values()) <= 2
    assert TextTable(['a', ' ', ''], TOKENIZER).lengths.tolist()[1:] == [0, 0]


def test_parts_of_a_batch_are_refused_and_batches_count_their_rows():
    model, batch = Contrastive(encoder()), feed(8).step(3)
    assert batch['step'] == 3 and batch['rows'] == 8
    for piece in part(batch, parts=2):
        with pytest.raises(ValueError, match="4 of the step's 8 rows"): model(**piece)
    with pytest.raises(ValueError, match='keep accumulate=1 and give chunk=4'): Learner(model, feed(8), Training(steps=1, accumulate=2, precision='fp32')).fit()

# ---- Training

class Rates:
    "Notes the rate of every group at every step"
    def __init__(self): self.seen = []
    def stepped(self, learner, facts): self.seen.append([g['lr'] for g in learner.optimizer.param_groups])


@pytest.mark.parametrize('freeze', ['all', 1])
def test_what_is_frozen_does_not_change_by_a_bit_and_every_rate_is_reached(freeze):
    model = Contrastive(encoder(.1, freeze=freeze), sigreg=.01, predict=.1)
    before, noted = {n: p.detach().clone() for n, p in model.state_dict().items()}, Rates()
    rates = model.encoder.rates(base=.02) if freeze != 'all' else model.encoder.rates()
    optimizer = make_optimizer('adamw', model, 5e-4, weight_decay=.1, rates=rates)
    training = Training(steps=12, lr=5e-4, weight_decay=.1, precision='fp32', schedule=Schedule(warmup=.25))
    found = Learner(model, feed(8), training, optimizer=optimizer, callbacks=[noted]).fit()
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert changed == trained and any('projection' in n for n in trained) and any('predictor' in n for n in trained)
    assert any('.base.' in n for n in trained) is (freeze != 'all')
    asked = sorted({g['base'] for g in optimizer.param_groups})
    assert asked == pytest.approx([5e-4] if freeze == 'all' else [1e-5, 5e-4])
    tops = [max(column) for column in zip(*noted.seen)]
    assert tops == pytest.approx([g['base'] for g in optimizer.param_groups]) and max(row['lr'] for row in found) == pytest.approx(5e-4)
    first = noted.seen[0][0] / tops[0]
    assert first < 1 and [row[0] / tops[0] for row in noted.seen[:3]] == sorted(row[0] / tops[0] for row in noted.seen[:3])


def test_a_predictor_without_a_weight_stands_still():
    model = Contrastive(encoder())
    assert not any(p.requires_grad for p in model.encoder.predictor.parameters())
    assert all(p.requires_grad for p in Contrastive(encoder(), predict=1.).encoder.predictor.parameters())


def test_the_predictor_does_not_move_the_passage():
    class Bag(nn.Module):
        def __init__(self): super().__init__(); self.table, self.predictor = nn.Embedding(9, 4), nn.Linear(4, 4)
        def forward(self, ids, mask): return self.table(ids)[:, 0]
    net, mask = Bag(), torch.ones(3, 1, dtype=torch.long)
    model = Contrastive(net, predict=1., loss='triplet', margin=0., temperature=1.)
    batch = dict(query_ids=torch.tensor([[1], [2], [3]]), positive_ids=torch.tensor([[4], [5], [6]]), query_mask=mask, positive_mask=mask)
    with torch.no_grad(): net.table.weight[4:7] = net.table.weight[1:4] # At distance 0 the hinge has no gradient
    model(**batch).loss.backward()
    assert net.table.weight.grad[1:4].abs().sum() > 0 and net.table.weight.grad[4:7].abs().sum() == 0


def test_training_finds_more_on_held_out_questions():
    from lab_lm.evals.retrieval import evaluate
    facts = pocket_facts('hi', 260, seed=7)
    tokenizer = train_tokenizer([f.passage for f in facts[100:]], 'bpe', 500, 1)
    class Bag(nn.Module):
        def __init__(self): super().__init__(); self.table = nn.Embedding(len(tokenizer), 64)
        def forward(self, ids, mask): return (self.table(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.manual_seed(0)
    net = Bag()
    held = PairRows([Triplet(str(i), f.question, f.passage) for i, f in enumerate(facts[:100])], tokenizer)
    def score():
        rows, order = held.batch(0, 100), held.chosen(0, 100)
        with torch.no_grad(): near = similarity(*(net(rows[f'{k}_ids'], rows[f'{k}_mask']) for k in ('query', 'positive')))
        run = {f'q{q}': {f'd{d}': float(near[i, j]) for j, d in enumerate(order)} for i, q in enumerate(order)}
        return evaluate(run, {f'q{q}': {f'd{q}': 1} for q in order}, ['ndcg@10'])['ndcg@10'].mean()
    before = score()
    rows = PairRows([Triplet(str(i), f.question, f.passage) for i, f in enumerate(facts[100:])], tokenizer)
    Learner(Contrastive(net), Feed(rows, Paired(), 32), Training(steps=30, lr=.01, precision='fp32')).fit()
    assert score() > before + .05
