"Choices by likelihood: order, ties, rules, padding, gaps, empty options, NaN; classes asked as choices; XCOPA; overlap with references"
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest

from lab_lm.core.paths import data_dir, shared_data
from lab_lm.core.seed import seeded
from lab_lm.evals.choices import RULES, choice_costs, choice_credit, choice_eval, class_choices, option_nats
from lab_lm.evals.ngrams import NgramFloor
from lab_lm.evals.overlap import bleu, chrf, rouge_l
from lab_lm.evals.scorers import ngram_scorer, scorer, uniform_scorer
from lab_lm.nets.transformer import NetConfig, Transformer
from lab_lm.text.script import script_fraction, words
from lab_lm.text.sources import read_records
from lab_lm.text.task_files import read_rows, read_task, sample_task
from lab_lm.text.task_sets import task_data, task_sets
from lab_lm.text.tokenize import train_tokenizer

SETS = task_sets()


def letters(cost):
    "A stand-in for a scorer: a token is a code point, and `cost(text, i)` is what it costs"
    def row(t):
        sizes = np.array([len(c.encode()) for c in t], float)
        return SimpleNamespace(text=t, ids=np.array([*map(ord, t)]), bytes=sizes, scored=np.ones(len(t), bool))
    def nats(texts): return [np.array([cost(t, i) for i in range(len(t))]) for t in texts]
    return SimpleNamespace(name='letters', protocol='letters', rows=lambda texts: [row(t) for t in texts], nats=nats)


@pytest.fixture(scope='module')
def models():
    "A tokenizer of Hindi passages, and small models with random weights that read with it"
    texts = [r.text for r in read_records('data/samples', 'hi')][:60]
    tok = train_tokenizer(texts, 'bpe', 700)
    with seeded(random.randrange(10**6)):
        made = {kind: Transformer(NetConfig(vocab_size=len(tok), width=32, layers=2, mode=mode, init=.3, max_length=64)).eval()
                for kind, mode in (('causal', 'causal'), ('masked', 'masked'))}
    return tok, made, texts


def rows_of(*rows): return [(f'row {i}', r) for i, r in enumerate(rows, 1)]


# --- choices ---

def shuffled(row, rng):
    "The same choice with its options in another order"
    options = [row['choice1'], row['choice2']]
    swap = rng.random() < .5
    return row | dict(choice1=options[swap], choice2=options[not swap], label=row['label'] ^ swap)


def test_the_order_of_options_changes_nothing(models):
    rng, (tok, made, _) = random.Random(), models
    for name in ('copa', 'wstp', 'csqa'):
        rows = [r for _, r in read_rows(data_dir() / 'samples' / 'hi' / 'tasks' / f'{name}.hi.jsonl')][:5]
        if name == 'copa': other = [shuffled(r, rng) for r in rows]
        elif name == 'csqa': other = [r | dict(options=rng.sample(r['options'], 4)) for r in rows]
        else: other = [r | dict(zip(SETS['wstp'].fields['options'], rng.sample([r[k] for k in SETS['wstp'].fields['options']], 4))) for r in rows]
        a, b = ([i for i in task_data(SETS[name], 'hi', 'test', rows_of(*some)).items] for some in (rows, other))
        assert [{k: v for k, v in i.items() if k != 'place'} for i in a] == [{k: v for k, v in i.items() if k != 'place'} for i in b]
        one = scorer(made['causal'], tok)
        assert all(choice_eval(one, a, rule)['accuracy'] == choice_eval(one, b, rule)['accuracy'] for rule in RULES)
        turned = [i | dict(options=i['options'][::-1], answer=len(i['options']) - 1 - i['answer']) for i in a] # Items turned round by hand
        assert choice_eval(one, a)['accuracy'].value == choice_eval(one, turned)['accuracy'].value


def test_a_constant_model_gets_exactly_chance():
    rng = random.Random()
    items = [dict(id=str(n), context='', domain='', tail='', options=[chr(0x915 + k) for k in range(rng.randint(2, 6))]) for n in range(60)]
    for i in items: i['answer'] = rng.randrange(len(i['options']))
    found = choice_eval(letters(lambda text, i: 1.), items)['accuracy']
    assert found.value == pytest.approx(found.baselines['chance'], abs=1e-12) and '60 shared by options that tie' in found.protocol
    first = [[0.] * len(i['options']) for i in items] # A rule that takes the first of equals would give it what stands there
    assert np.allclose(choice_credit(first, items), [1 / len(i['options']) for i in items])


def test_only_the_option_is_counted(models):
    "What a context costs does not matter, only what it does to the option; and the tail of a gap counts"
    item = dict(id='1', context='कखग ', domain='घ ', options=['आम', 'केला'], tail=' है', answer=0)
    seen = []
    costly = letters(lambda text, i: 1000. if i < text.rstrip().find(' ') else seen.append(text[i]) or 1.)
    assert [len(' आम है'), len(' केला है')] == option_nats(costly, [item])[0].tolist() and 'क' not in seen[:4]
    tok, made, texts = models
    unigram = ngram_scorer(NgramFloor(1, len(tok)).fit(tok(texts, add_special_tokens=False)['input_ids']), tok)
    contexts = ['राम ने ', 'बहुत दिनों पहले की बात है कि राम ने ', 'दुकान पर ताला लगा था ']
    costs = [option_nats(unigram, [item | dict(context=c)])[0] for c in contexts]
    assert np.allclose(costs, costs[0], atol=1e-9)


def test_the_cost_of_an_option_is_that_of_the_whole_less_that_of_the_context(models):
    tok, made, _ = models
    one, rng = scorer(made['causal'], tok), random.Random()
    some = words('राम सीता घर पेड़ पानी रोटी आज कल नदी गाँव')
    drawn = lambda least, most: ' '.join(rng.sample(some, rng.randint(least, most)))
    items = [dict(id='1', context=drawn(4, 4) + ' ', domain='', options=[drawn(1, 3) for _ in range(3)], tail='', answer=0) for _ in range(20)]
    for item, costs in zip(items, option_nats(one, items)):
        for option, cost in zip(item['options'], costs):
            whole, context = item['context'] + option, item['context'].rstrip()
            a, b = (tok(t, add_special_tokens=False)['input_ids'] for t in (whole, context))
            if a[:len(b)] != b: continue # The tokens of the context are others when it goes on
            assert cost == pytest.approx(one.totals([whole])[0] - one.totals([context])[0], abs=1e-4)


@pytest.mark.parametrize('kind', ['causal', 'masked', 'masked_word'])
def test_padding_and_company_change_no_score(models, kind):
    tok, made, _ = models
    model = made['causal' if kind == 'causal' else 'masked'].double()
    items = sample_task('copa', 'hi').items[:12 if kind == 'causal' else 3]
    items = items + [items[0] | dict(id='long', context='एक समय की बात है ' * (6 if kind == 'causal' else 2) + items[0]['context'])]
    alone = [option_nats(scorer(model, tok, kind, batch_size=1), [i])[0] for i in items]
    together = option_nats(scorer(model, tok, kind, batch_size=64), items)
    model.float()
    for a, b in zip(alone, together): assert np.allclose(a, b, atol=1e-9)


def test_empty_options_never_win_and_nan_is_told():
    common = dict(context='क ', domain='क ', tail='')
    items = [common | dict(id='7', options=['', '  ', 'आम'], answer=2), common | dict(id='8', options=['', 'आम'], answer=0)]
    for rule in RULES:
        assert choice_credit(choice_costs(letters(lambda t, i: 9.), items, rule), items).tolist() == [1, 0]
    assert '3 empty options never chosen' in choice_eval(letters(lambda t, i: 9.), items)['accuracy'].protocol
    with pytest.raises(ValueError, match="item '7', option 'आम' costs NaN"): option_nats(letters(lambda t, i: math.nan), items)
    with pytest.raises(ValueError, match="item '7' costs NaN"): choice_credit([[1, 1, math.nan], [1, 2]], items)
    with pytest.raises(ValueError, match='3 options and 2 costs'): choice_credit([[1, 2], [1, 2]], items)


def test_what_each_rule_corrects():
    "Costs grow with letters, and one option is likely anywhere: planted, so that each rule has its own answer"
    price = {'अ': 1., 'आ': 1., 'इ': 3.}
    plain = letters(lambda text, i: price.get(text[i], 0.) * (.5 if text[i] == 'इ' and text.startswith('क') else 1))
    item = dict(id='1', context='क ', domain='ख ', tail='', options=['अ', 'आआआआ', 'इ'], answer=0)
    pick = {rule: int(np.argmin(choice_costs(plain, [item], rule)[0])) for rule in RULES}
    assert pick['sum'] == 0 and pick['pmi'] == 2
    by_byte = choice_costs(plain, [item], 'byte')[0]
    assert np.allclose(by_byte, [1 / 3, 4 / 12, 1.5 / 3])
    longer = [i | dict(options=[o * 50 for o in i['options']]) for i in [item]]
    assert np.allclose(choice_costs(plain, longer, 'byte')[0], by_byte)


@pytest.mark.parametrize('name, lang', [('sib200', 'hi'), ('sib200', 'ta'), ('iitp-mr', 'hi'), ('sentiment', 'ta'), ('inltkh', 'ta')])
def test_classes_asked_as_choices(name, lang):
    data = sample_task(name, lang)
    items = class_choices(data)
    ask = data.task.ask[lang]
    for item, source in zip(items, data.items):
        assert item['options'][item['answer']] == ask['words'][source['label']]
        assert item['context'] == ask['context'].replace('{text}', source['text'])
    knows = letters(lambda text, i: 0. if any(text.endswith(f"{i['text']}\n{ask['domain']}{ask['words'][i['label']]}") for i in data.items) else 1.)
    assert choice_eval(knows, items)['accuracy'].value == 1
    with pytest.raises(ValueError, match='no words for its classes'): class_choices(sample_task('md', 'hi'))


# --- overlap ---

def test_bleu_equals_its_definition():
    rng = random.Random()
    some = words('राम सीता घर में पानी रोटी आज कल नदी गाँव था थी')
    refs = [' '.join(rng.choices(some, k=rng.randint(6, 15))) for _ in range(60)]
    told = [' '.join(w for k, w in enumerate(r.split()) if k < 4 or rng.random() < .8) + ' ' + rng.choice(some) for r in refs]
    logs, lengths = 0., [sum(len(words(t)) for t in side) for side in (told, refs)]
    for n in range(1, 5):
        hits = total = 0
        for t, r in zip(map(words, told), map(words, refs)):
            runs, there = [' '.join(t[i:i + n]) for i in range(len(t) - n + 1)], [' '.join(r[i:i + n]) for i in range(len(r) - n + 1)]
            total += len(runs)
            for run in runs:
                if run in there: there.remove(run); hits += 1
        logs += math.log(hits / total) / 4
    assert bleu(told, refs).value == pytest.approx(100 * math.exp(logs + min(0, 1 - lengths[1] / lengths[0])), abs=1e-9)


def test_chrf_equals_its_definition():
    rng = random.Random()
    refs = [''.join(rng.choices('கங்சஞ்டண்த ', k=rng.randint(0, 20))) for _ in range(30)]
    told = [''.join(rng.choices('கங்சஞ்டண்த ', k=rng.randint(0, 20))) for _ in range(30)]
    precision, recall = [], []
    for n in range(1, 7):
        a = b = both = 0
        for t, r in zip(told, refs):
            t, r = (s.replace(' ', '') for s in (t, r))
            x, y = [t[i:i + n] for i in range(len(t) - n + 1)], [r[i:i + n] for i in range(len(r) - n + 1)]
            a, b, both = a + len(x), b + len(y), both + sum(min(x.count(g), y.count(g)) for g in set(x))
        precision.append(both / a); recall.append(both / b)
    p, r = np.mean(precision), np.mean(recall)
    assert chrf(told, refs).value == pytest.approx(100 * 5 * p * r / (4 * p + r), abs=1e-9)
    assert chrf(refs[:1] + ['கக'], refs[:1] + ['கக']).value == pytest.approx(100)


def test_rouge_l_equals_its_definition():
    rng = random.Random()
    texts = [' '.join(rng.choices('क ख ग घ'.split(), k=rng.randint(0, 7))) for _ in range(60)]
    def longest(a, b): return 0 if not a or not b else 1 + longest(a[1:], b[1:]) if a[0] == b[0] else max(longest(a[1:], b), longest(a, b[1:]))
    told, meant = texts[:30], texts[30:]
    f = [200 * longest(a, b) / (len(a) + len(b)) if a or b else 100 for a, b in ((t.split(), m.split()) for t, m in zip(told, meant))]
    assert rouge_l(told, meant).value == pytest.approx(np.mean(f), abs=1e-9)


# --- XCOPA ---

def test_xcopa_tamil():
    file = shared_data('tasks/xcopa_ta_val.jsonl')
    if file is None: pytest.skip('tasks/xcopa_ta_val.jsonl is not in the shared data')
    data = read_task('xcopa', 'ta', file.parent, 'validation')
    raw = [r for _, r in read_rows(file)]
    assert len(data.items) == 100 and data.chance == .5 and not data.left
    for item, row in zip(data.items, raw):
        assert item['options'][item['answer']] == ' '.join(row[f"choice{row['label'] + 1}"].split())
        assert item['context'].startswith(row['premise'].strip().rstrip('.'))
        assert item['domain'].strip() in ('ஏனென்றால்', 'அதனால்') and script_fraction(item['context'], 'taml') > .9
    texts = [r.text for r in read_records('data/samples', 'ta')]
    tok = train_tokenizer(texts, 'bpe', 1500)
    floor = ngram_scorer(NgramFloor(3, len(tok)).fit(tok(texts, add_special_tokens=False)['input_ids']), tok)
    for rule in RULES:
        found = choice_eval(floor, data.items, rule)['accuracy']
        assert .3 < found.value < .7 and set(found.baselines) == {'chance', 'shortest option', 'longest option', 'without context'}
    assert choice_eval(uniform_scorer(tok), data.items, 'pmi')['accuracy'].value == .5
