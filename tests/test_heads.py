"Class and tag tasks: draws and places against word_ids and loops, heads on every kind of body, the common Learner with exact resume, scores against scikit-learn, planted faults"
import json
import random
import shutil

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch.nn import functional as F

from lab_lm.core.seed import seeded
from lab_lm.evals.tasks import class_scores, entities, guesses, tag_scores
from lab_lm.nets.adapters import add_lora
from lab_lm.nets.door import Door, checkpoint_layers
from lab_lm.nets.heads import Classifier, Tagger, load_head, save_head
from lab_lm.nets.tiny import tiny_gemma, tiny_gemma_tokenizer
from lab_lm.nets.transformer import NetConfig, Transformer, preset
from lab_lm.text.labelled import LabelledRows, classes_of, encode_labelled, few_shot, shuffled_labels
from lab_lm.text.tiny import pocket_sentences
from lab_lm.text.tokenize import train_tokenizer
from lab_lm.train.checkpoint import learnt
from lab_lm.train.feed import Feed
from lab_lm.train.learner import Learner, Training
from lab_lm.train.objectives import Given, Smoothed
from lab_lm.train.schedules import Schedule


def tense(s): return next((t.feats['Tense'] for t in s.tokens if t.head == 0 and 'Tense' in t.feats), None)


@pytest.fixture(scope='module')
def task():
    "Tamil sentences by tense, and by the part of speech of their words, with a tokenizer"
    sentences = list({s.text: s for s in pocket_sentences('ta', 700, seed=random.randrange(10**6))}.values())
    whole = [dict(id=s.id, text=s.text, label=tense(s)) for s in sentences if tense(s)]
    words = [dict(id=s.id, words=[t.form for t in s.tokens], tags=[t.upos for t in s.tokens]) for s in sentences]
    return whole, words, train_tokenizer([s.text for s in sentences], 'akshara_bpe', 900)


def hub_model(kind):
    "A small model of transformers with random weights"
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, XLMRobertaConfig, XLMRobertaForMaskedLM
    shape = dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    if kind == 'gpt2': return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2))
    return BertForMaskedLM(BertConfig(**shape)) if kind == 'bert' else XLMRobertaForMaskedLM(XLMRobertaConfig(**shape, pad_token_id=1))


def masked_lora(model):
    "An adapter on a masked model, straight from peft"
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model, LoraConfig(r=4, target_modules=['query', 'value']))


BODIES = {'masked': lambda: Transformer(preset('tiny', 300, 'masked')), 'hybrid': lambda: Transformer(preset('tiny', 300, 'hybrid')),
          'causal': lambda: Transformer(preset('tiny', 300, 'causal', tied=False)), 'door': lambda: Door(hub_model('bert')), 'xlm-r': lambda: hub_model('xlm-r'),
          'gpt2': lambda: hub_model('gpt2'), 'gemma': lambda: tiny_gemma(300, layers=1), 'gemma with LoRA': lambda: add_lora(tiny_gemma(300, layers=1), rank=4),
          'bert with LoRA': lambda: masked_lora(hub_model('bert')), 'frozen': lambda: tiny_gemma(300, layers=1).requires_grad_(False)}


# --- texts ---

def test_few_shot_is_exact_nested_and_free_of_the_order():
    items = [dict(text=f'text {i}', label=random.choice('aaabbc')) for i in range(300)] + [dict(text=f'rare {i}', label='d') for i in range(20)]
    seed, before = random.randrange(100), []
    for shots in (1, 16, 32, 64):
        some = few_shot(items, shots, seed)
        for c in 'abcd': assert sum(x['label'] == c for x in some) == min(shots, sum(x['label'] == c for x in items))
        assert all(x in some for x in before)
        mixed = random.sample(items, len(items))
        assert {x['text'] for x in few_shot(mixed, shots, seed)} == {x['text'] for x in some}
        before = some
    assert few_shot(items, 16, seed) != few_shot(items, 16, seed + 1)


def test_a_class_with_too_few_is_said(capsys, monkeypatch):
    monkeypatch.delenv('IN_TEST', raising=False)
    few_shot([dict(text=str(i), label='ab'[i > 3]) for i in range(40)], 16)
    assert "only 4 of 'a'" in capsys.readouterr().err


def test_tags_stand_at_the_first_token_of_their_words(task):
    "The oracle is word_ids: of the pre-split words where the tokenizer takes a space in front of each, and of transformers' own pre-tokenizer for WordPiece"
    _, items, tokenizer = task
    texts = [' '.join(x['words']) for x in items]
    for tok in (tokenizer, tiny_gemma_tokenizer(texts, 600), train_tokenizer(texts, 'wordpiece', 600)):
        for item, row in list(zip(items, encode_labelled(items, tok, classes_of(items))))[:60]:
            words = item['words']
            enc = tok([words[0], *(f' {w}' for w in words[1:])], is_split_into_words=True)
            assert enc['input_ids'] == row['input_ids'] == tok(' '.join(words))['input_ids']
            said = enc.word_ids()
            begins = [said.index(i) for i in range(len(words))]
            lone = [p + (tok.convert_ids_to_tokens(row['input_ids'][p]) == '▁') for p in begins] # A space that is a token of its own belongs to no word
            assert row['places'] == lone


def test_rows_hold_every_label_once_and_count_what_was_cut(task):
    whole, items, tokenizer = task
    classes, n = classes_of(items), random.randrange(5, 12)
    rows = encode_labelled(items, tokenizer, classes, max_length=n)
    data = LabelledRows(rows, classes, tokenizer.pad_token_id)
    batch = data.batch(0, len(rows), seed=3)
    assert int((batch['labels'] != -100).sum()) + data.lost == sum(len(x['words']) for x in items) and data.lost > 0
    for at, i in enumerate(data.chosen(0, len(rows), 3)):
        ids, labels, mask = (batch[k][at] for k in ('input_ids', 'labels', 'attention_mask'))
        assert ids[mask > 0].tolist() == rows[i]['input_ids'] and (labels[mask == 0] == -100).all()
        kept = [classes.index(t) for t, p in zip(items[i]['tags'], rows[i]['places']) if p >= 0]
        assert labels[labels != -100].tolist() == kept and kept == [classes.index(t) for t in items[i]['tags'][:len(kept)]]
    other = LabelledRows(encode_labelled(whole, tokenizer, classes_of(whole)), classes_of(whole))
    for share, some in ((1., len(whole)), (.25, len(whole) // 4)):
        assert sorted(i for k in range(some) for i in other.chosen(k, 3, 9, share)) == sorted([*range(some)] * 3)
    a, b = json.dumps(other.fingerprint()), LabelledRows(encode_labelled(shuffled_labels(whole), tokenizer, classes_of(whole)), classes_of(whole)).fingerprint()
    assert a == json.dumps(json.loads(a)) and json.loads(a)['sha256'] != b['sha256']


@pytest.mark.parametrize('items, words', [
    ([dict(id='x', words=['a', 'b'], tags=['N'])], "item 'x' has 2 words and 1 tags"), ([dict(id='x', text='a', label='')], "'x' is labelled ''"),
    ([dict(id='x', text='a', label='1'), dict(id='y', text='b', label=1)], "'y' is labelled 1"), ([dict(id='x', text='a', label='p')] * 3, 'at least two classes'),
    ([dict(id='x', text='a', label='p'), dict(id='y', text='b')], "item 'y' has 'id', 'text'")])
def test_wrong_items_are_named(items, words):
    with pytest.raises(ValueError, match=words.replace('(', r'\(')): classes_of(items)


def test_unknown_labels_are_named(task):
    whole, _, tokenizer = task
    with pytest.raises(ValueError, match="'odd' has the unknown label 'Perf'; known: Fut, Past, Pres"): encode_labelled([whole[0] | dict(id='odd', label='Perf')], tokenizer, classes_of(whole))


# --- heads ---

@pytest.mark.parametrize('kind', BODIES)
def test_heads_on_every_body(kind, tmp_path):
    torch.manual_seed(seed := random.randrange(10**6))
    def body_again(): torch.manual_seed(seed); return BODIES[kind]()
    body = body_again()
    ids, mask = torch.randint(5, 300, (3, 8)), torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6])
    labels, tags = torch.tensor([2, -100, 0]), torch.randint(0, 3, (3, 8)).masked_fill(torch.rand(3, 8) < .4, -100).masked_fill(mask == 0, -100)
    for make, wanted, pools in ((Classifier, labels, ('mean', 'first', 'last')), (Tagger, tags, (None,))):
        for pool in pools:
            model = make(body, ['x', 'y', 'z'], *([pool] if pool else []), dropout=0.).eval()
            out = model(ids, mask, wanted)
            logits = out.logits.flatten(0, -2)
            torch.testing.assert_close(out.loss, F.cross_entropy(logits, wanted.flatten()))
            torch.testing.assert_close(Smoothed(0.)(model, dict(input_ids=ids, attention_mask=mask, labels=wanted))[0], out.loss)
            wide = model(F.pad(ids, (0, 4), value=7), F.pad(mask, (0, 4))).logits # What stands in the padding is of no account
            torch.testing.assert_close(wide if pool else wide[:, :8][mask > 0], out.logits if pool else out.logits[mask > 0], atol=1e-5, rtol=1e-4)
        model.train()(ids, mask, wanted).loss.backward()
        for name, p in model.named_parameters(): assert (p.grad is not None) == p.requires_grad, name
        with torch.no_grad():
            for p in model.parameters(): p.add_(torch.randn_like(p) * .05) if p.requires_grad else None
        save_head(model, tmp_path / 'head')
        again = load_head(tmp_path / 'head', body_again())
        assert type(again) is make and again.classes == ['x', 'y', 'z'] and torch.equal(again(ids, mask).logits, model.eval()(ids, mask).logits)
        body = body_again()
    assert sorted(p.name for p in (tmp_path / 'head').iterdir()) == ['head.json', 'head.safetensors']


def test_another_body_is_refused(tmp_path):
    frozen = lambda seed: tiny_gemma(300, seed, layers=1).requires_grad_(False)
    save_head(Classifier(frozen(0), ['a', 'b']), tmp_path / 'h')
    load_head(tmp_path / 'h', frozen(0))
    for other in (frozen(1), tiny_gemma(300, layers=1, hidden=32), tiny_gemma(300, layers=2).requires_grad_(False)):
        with pytest.raises(ValueError, match='another body'): load_head(tmp_path / 'h', other)
    save_head(Classifier(add_lora(tiny_gemma(300, layers=1)), ['a', 'b']), tmp_path / 'lora')
    with pytest.raises(ValueError, match='another body'): load_head(tmp_path / 'lora', tiny_gemma(300, layers=1))
    with pytest.raises(ValueError, match='at least two different classes'): Tagger(frozen(0), ['a'])


# --- the common Learner ---

def trained(items, classes, tokenizer, body, steps, folder=None, save=0, make=Classifier):
    "A head that the common Learner trained"
    rows = LabelledRows(encode_labelled(items, tokenizer, classes), classes, tokenizer.pad_token_id)
    with seeded(0): model = make(body(), classes)
    training = Training(steps=steps, lr=1e-2, schedule=Schedule(warmup=.1), precision='fp32', save_every=save)
    return Learner(model, Feed(rows, Given(), 24), training, folder), model


def test_sixty_four_examples_beat_the_majority_and_random_labels_do_not(task):
    whole, words, tokenizer = task
    net = lambda: Transformer(NetConfig(vocab_size=len(tokenizer), width=64, layers=1, mode='masked', init=.1, pad_id=tokenizer.pad_token_id))
    test, pool = whole[:150], whole[150:]
    true, said = [x['label'] for x in test], {}
    for name, some in dict(right=few_shot(pool, 64), random=shuffled_labels(few_shot(pool, 64))).items():
        learner, model = trained(some, classes_of(whole), tokenizer, net, 30)
        rows = learner.fit()
        assert rows[-1]['loss'] < rows[0]['loss']
        said[name] = guesses(model, encode_labelled(test, tokenizer, model.classes), pad=tokenizer.pad_token_id)
    score, control = (class_scores(true, said[name])['accuracy'] for name in ('right', 'random'))
    assert score.low > score.baselines['majority'] >= control.low
    learner, model = trained(few_shot(words[150:], 32), classes_of(words), tokenizer, net, 30, make=Tagger)
    learner.fit()
    tags = tag_scores([x['tags'] for x in words[:150]], guesses(model, encode_labelled(words[:150], tokenizer, model.classes), pad=tokenizer.pad_token_id))
    assert tags['accuracy'].low > tags['accuracy'].baselines['majority']


@pytest.mark.parametrize('kind', ['frozen', 'adapter', 'checkpointed'])
def test_a_cut_run_goes_on_exactly(kind, task, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv('IN_TEST', raising=False)
    whole, _, tokenizer = task
    gemma = lambda: tiny_gemma(len(tokenizer), layers=1)
    body = dict(frozen=lambda: gemma().requires_grad_(False), adapter=lambda: add_lora(gemma(), dropout=.1), checkpointed=gemma)[kind]
    def run(folder):
        learner, model = trained(few_shot(whole, 16), classes_of(whole), tokenizer, body, 8, folder, save=4)
        if kind == 'checkpointed': checkpoint_layers(model)
        rows = learner.fit()
        return {n: t.clone() for n, t in learnt(model).items()}, rows
    straight, rows = run(tmp_path)
    shutil.rmtree(sorted((tmp_path / 'checkpoints').iterdir())[-1]) # As if cut off after step 4
    again, more = run(tmp_path)
    assert more == rows and 'going on from step 4' in capsys.readouterr().err
    assert straight.keys() == again.keys() and all(torch.equal(straight[n], again[n]) for n in straight)
    assert {n.split('.')[0] for n in straight} == ({'out'} if kind == 'frozen' else {'body', 'out'})


# --- scores ---

def test_scores_are_scikit_learns():
    names = ['a', 'b', 'c', 'd']
    for _ in range(20):
        true, guess = (random.choices(names[:k], k=60) for k in (3, 4))
        scores = class_scores(true, guess)
        assert scores['accuracy'].value == pytest.approx(accuracy_score(true, guess))
        assert scores['macro_f1'].value == pytest.approx(f1_score(true, guess, average='macro', zero_division=0))
        each = f1_score(true, guess, average=None, labels=sorted(set(true)), zero_division=0)
        assert [scores[f'f1 {c}'].value for c in sorted(set(true))] == pytest.approx(list(each))
        assert scores['accuracy'].low <= scores['accuracy'].value <= scores['accuracy'].high
        cuts = [0, 10, 25, 31, 60]
        parted = [[side[a:b] for a, b in zip(cuts, cuts[1:])] for side in (true, guess)]
        for name, score in tag_scores(*parted).items(): assert (score.value, score.n) == (pytest.approx(scores[name].value), scores[name].n)
        most = max(map(true.count, names)) / 60
        assert scores['accuracy'].baselines['majority'] == pytest.approx(most)


def test_words_without_a_guess_count_as_wrong():
    true = [random.choices('abc', k=12) for _ in range(9)]
    cut = [[t if i < 6 else '' for i, t in enumerate(tags)] for tags in true]
    scores = tag_scores(true, cut)
    assert scores['accuracy'].value == .5 and 0 < scores['macro_f1'].value < 1
    flat = [[t for tags in side for t in tags] for side in (true, cut)]
    assert scores['macro_f1'].value == pytest.approx(f1_score(*flat, labels=list('abc'), average='macro'))


def test_names_are_found_whole_or_not_at_all():
    for _ in range(200):
        spans, tags, at = set(), [], 0
        while at < 20:
            size, kind = random.randrange(1, 4), random.choice(['', 'PER', 'LOC'])
            tags += [f'B-{kind}'] + [f'I-{kind}'] * (size - 1) if kind else ['O'] * size
            if kind: spans.add((kind, at, at + size))
            at += size
        assert entities(tags) == spans
    true = [['B-PER', 'I-PER', 'O', 'B-LOC', 'I-LOC']]
    assert tag_scores(true, true, entity=True)['f1'].value == 1
    assert tag_scores(true, [['B-PER', 'O', 'O', 'B-LOC', 'I-LOC']], entity=True)['f1'].value == .5


def test_given_passes_on_and_asks_for_labels():
    batch = dict(input_ids=torch.ones(1, 2), labels=torch.tensor([1]))
    assert Given()(batch, 3, None) is batch
    with pytest.raises(ValueError, match='LabelledRows'): Given()(dict(input_ids=batch['input_ids']))
    assert repr(Given()) == 'Given()' # In the fingerprint of a feed
