"Minimal pairs: files as they are published, costs against brute force, rules against the harnesses' own lines, planted faults"
import csv
import gzip
import io
import json
import math
import random

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForMaskedLM

from lab_lm.core.paths import shared_data
from lab_lm.evals.ngrams import NgramFloor
from lab_lm.evals.pair_rules import RULES, pair_sums, rule_credit, rule_table
from lab_lm.evals.pairs import compare_pairs, pair_credit, pair_eval, pair_floors, pair_gaps, pair_nats, pair_records, pair_scores, pair_tokens, summed
from lab_lm.evals.scorers import ngram_scorer, scorer, uniform_scorer
from lab_lm.text.pair_files import balanced, length_table, read_pairs, sentence_columns, swapped, write_pairs
from lab_lm.text.pocket import Pair
from lab_lm.text.script import word_spans
from lab_lm.text.tiny import pocket_corpus, pocket_pairs
from lab_lm.text.tokenize import train_tokenizer

TEXTS = [r.text for r in pocket_corpus('hi', 200, seed=random.randrange(10**6))]
TOKENIZER = train_tokenizer(TEXTS, 'akshara_bpe', 900)
IDS = TOKENIZER(TEXTS, add_special_tokens=False).input_ids
SHAPE = dict(vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, initializer_range=.3, max_position_embeddings=300)


def model(kind): return (LlamaForCausalLM(LlamaConfig(**SHAPE)) if kind == 'causal' else RobertaForMaskedLM(RobertaConfig(**SHAPE, pad_token_id=TOKENIZER.pad_token_id))).eval()


def shared(part):
    found = shared_data(f'pairs/{part}')
    if found is None: pytest.skip(f'{part} is not beside the project')
    return found


class Written:
    "A scorer whose costs are written down: text to costs of its tokens"
    name, protocol, tokenizer = 'written', 'as written', TOKENIZER
    def __init__(self, costs): self.costs = costs
    def nats(self, texts): return [np.array(self.costs[t], float) for t in texts]
    def rows(self, texts): return [type('Row', (), dict(text=t, ids=np.array([*t.encode()])))() for t in texts]


# ---- files

def test_multiblimp_as_it_is_published():
    "Names of the rules, and quotation marks that belong to the file and not to the sentence"
    for name, n in (('eng', 770), ('nld', 2331)):
        file = shared(f'multiblimp_{name}.tsv.gz')
        with gzip.open(file, 'rt', encoding='utf-8', newline='') as f: rows = list(csv.DictReader(f, delimiter='\t'))
        pairs = read_pairs(file)
        assert [(p.good, p.bad) for p in pairs] == [(r['sen'], r['wrong_sen']) for r in rows] and len(pairs) == n
        assert {p.phenomenon for p in pairs} == {'subject-verb number', 'subject-verb person'}
        assert {p.phenomenon for p in read_pairs(file, by='grammatical_feature')} <= {'SG', 'PL', '1', '2', '3'}
    with gzip.open(file, 'rt', encoding='utf-8') as f: split = [line.split('\t')[0] for line in f][1:]
    quoted = [(a, p.good) for a, p in zip(split, pairs) if a != p.good]
    assert len(quoted) > 10 and all(a.startswith('"') and a.count('"') == b.count('"') * 2 + 2 for a, b in quoted), 'splitting at tabs is what this reader must not do'


def test_blimp_as_it_is_published(capfd):
    folder, total = shared('blimp'), 0
    for file in sorted(folder.iterdir()):
        pairs, uid = read_pairs(file), file.name.partition('.')[0]
        total += len(pairs)
        assert len(pairs) == (998 if uid == 'passive_1' else 1000) and {p.phenomenon for p in pairs} == {uid}
        assert len(read_pairs(file, identical='keep')) == 1000
    assert capfd.readouterr().err.count('both sentences are the same in line') == 2
    assert total == 9998 == len(read_pairs(folder)) and len({p.phenomenon for p in read_pairs(folder, by='linguistics_term')}) == 8
    with pytest.raises(ValueError, match=r'passive_1\.jsonl\.gz: both sentences are the same in line \d+, line \d+'): read_pairs(folder / 'passive_1.jsonl.gz', identical='refuse')
    with pytest.raises(ValueError, match="has no 'rule'"): read_pairs(folder / 'passive_1.jsonl.gz', by='rule')


def test_every_form_gives_back_what_was_written(tmp_path):
    "Random sentences full of quotation marks, commas and signs of several scripts"
    letters = 'क ख,"\'aé்த।:{}[]\\'
    def sentence(): return 'x' + ''.join(random.choice(letters) for _ in range(random.randint(1, 12))).strip() + 'y'
    pairs = [Pair(sentence() + '1', sentence() + '2', random.choice(('a', 'b'))) for _ in range(60)]
    for names in (('good', 'bad', 'phenomenon'), ('sen', 'wrong_sen', 'phenomenon'), ('sentence_good', 'sentence_bad', 'UID')):
        rows = [dict(zip(names, (p.good, p.bad, p.phenomenon))) for p in pairs]
        for ending, delimiter in (('tsv', '\t'), ('csv', ',')):
            out = io.StringIO()
            writer = csv.DictWriter(out, names, delimiter=delimiter, lineterminator=random.choice(('\n', '\r\n')))
            writer.writeheader(); writer.writerows(rows)
            (tmp_path / f'p.{ending}').write_bytes(b'\xef\xbb\xbf' + out.getvalue().encode())
            (tmp_path / f'p.{ending}.gz').write_bytes(gzip.compress(out.getvalue().encode()))
        (tmp_path / 'p.json').write_text(json.dumps(rows, ensure_ascii=False), encoding='utf-8')
        (tmp_path / 'p.jsonl').write_text('\n\n'.join(map(json.dumps, rows)) + '\n', encoding='utf-8')
        for file in tmp_path.iterdir(): assert read_pairs(file) == pairs, file.name
    assert len(read_pairs(tmp_path)) == 6 * len(pairs)
    plain = tmp_path / 'plain.tsv'
    plain.write_text('good\tbad\n' + ''.join(f'{p.good}\t{p.bad}\n' for p in pairs), encoding='utf-8')
    assert [(p.good, p.bad, p.phenomenon) for p in read_pairs(plain, quotes=False)] == [(p.good, p.bad, 'plain') for p in pairs]
    assert read_pairs(write_pairs(tmp_path / 'ours.jsonl', pairs)) == pairs


@pytest.mark.parametrize('name, content, told', [
    ('a.tsv', 'good\tbad\nx\ty\n\tz\n', "a.tsv, line 3: the correct sentence is ''"),
    ('a.jsonl', '{"good": "x", "bad": null}\n', 'a.jsonl, line 1: the wrong sentence is None'),
    ('a.jsonl', '\n{"good": "x", "bad": "y"}\n{"good": "x"}\n', 'a.jsonl, line 3: no pair of columns'),
    ('a.jsonl', '["x", "y"]\n', 'a.jsonl, line 1: a list where a pair'),
    ('a.csv', 'good;bad\nx;y\n', 'a.csv, line 1: no pair of columns with the two sentences; it has: good;bad'),
    ('a.csv', 'good,bad\nx,y,z\n', 'a.csv, line 2: 3 fields where the first line names 2'),
    ('a.tsv', 'good\tbad\n"x\ty\nu\tv\n', 'a.tsv, line 2'),
    ('a.json', '{"r": [{"good": "x", "bad": "y"}, {"good": "x", "bad": " "}]}', "a.json, item 2 of 'r': the wrong sentence"),
    ('a.json', '"x"', 'a.json: a str where the list of pairs'),
    ('a.json', '[{]', 'a.json: not JSON'),
    ('a.txt', 'x', r"needed is one that exists and ends in \.tsv"),
    ('a.tsv.gz', 'good\tbad\n', 'a.tsv.gz is not a whole gzip file')])
def test_faults_are_named_with_file_and_line(tmp_path, name, content, told):
    (tmp_path / name).write_text(content, encoding='utf-8')
    with pytest.raises(ValueError, match=told.replace('(', r'\(')): read_pairs(tmp_path / name)


def test_odd_files(tmp_path, capfd):
    (tmp_path / 'e.tsv').write_text('good\tbad\n', encoding='utf-8')
    assert read_pairs(tmp_path / 'e.tsv') == []
    (tmp_path / 'e.json').write_text('[]', encoding='utf-8')
    assert read_pairs(tmp_path / 'e.json') == []
    (tmp_path / 's.jsonl').write_text('{"good": "क़ ख", "bad": "क़  ख"}\n{"good": "a", "bad": "b"}\n', encoding='utf-8')  # The same up to normal form and spaces
    assert [p.good for p in read_pairs(tmp_path / 's.jsonl')] == ['a']
    (tmp_path / 'folder').mkdir()
    with pytest.raises(ValueError, match="no files of pairs in 'folder'"): read_pairs(tmp_path / 'folder')
    with pytest.raises(ValueError, match='unknown identical'): read_pairs(tmp_path / 's.jsonl', identical='drop')
    with pytest.raises(ValueError, match='more than one'): sentence_columns(['good', 'bad', 'sen', 'wrong_sen'])


def test_length_table_by_hand():
    pairs = [Pair('a', 'aa', 'x'), Pair('aa', 'a', 'x'), Pair('a', 'b', 'x'), Pair('a', 'aa', 'x')]
    assert length_table(pairs) == [dict(phenomenon='x', pairs=4, shorter=2, longer=1, even=1, shorter_wins=2.5 / 4)]
    assert length_table(swapped(pairs))[0]['shorter_wins'] == 1 - 2.5 / 4


def test_balanced_pairs_tell_nothing_by_length():
    pairs = pocket_pairs('hi', 300, seed=random.randrange(10**6)) + pocket_pairs('ta', 200, seed=random.randrange(10**6))
    for length in (len, lambda text: len(TOKENIZER(text).input_ids), lambda text: len(text.split())):
        some = balanced(pairs, length)
        gain = {}
        for p in some: gain.setdefault(p.phenomenon, []).append(np.sign(length(p.bad) - length(p.good)))
        assert all(sum(g) == 0 for g in gain.values()) and 0 < len(some) <= len(pairs) and [p for p in pairs if p in some] == some
        assert len(some) >= sum(length(p.good) == length(p.bad) for p in pairs) and set(balanced(pairs[::-1], length)) == set(some)


# ---- costs

@pytest.mark.parametrize('kind', ['causal', 'masked', 'masked_word'])
def test_costs_do_not_depend_on_the_batch_and_labels_turn_the_score(kind):
    pairs, net = pocket_pairs('hi', 11, seed=random.randrange(10**6)), model(kind)
    few = pairs[:5]
    assert np.allclose(pair_nats(scorer(net, TOKENIZER, kind, batch_size=1), few), pair_nats(scorer(net, TOKENIZER, kind, batch_size=64), few), rtol=1e-6)
    one = scorer(net, TOKENIZER, kind)
    assert pair_credit(pair_nats(one, swapped(few))).tolist() == (1 - pair_credit(pair_nats(one, few))).tolist()
    same = [Pair(p.good, p.good, 'x') for p in few]
    score = pair_eval(one, same, IDS)['accuracy']
    assert score.value == .5 and f'{len(few)} pairs are the same to the tokenizer' in score.protocol and f'{len(few)} ties' in score.protocol


def test_causal_costs_are_sums_of_transformers_own_loss():
    net, pairs = model('causal'), pocket_pairs('hi', 10, seed=random.randrange(10**6))
    for p, (a, b) in zip(pairs, pair_nats(scorer(net, TOKENIZER, 'causal'), pairs)):
        for text, cost in ((p.good, a), (p.bad, b)):
            ids = torch.tensor([TOKENIZER(text).input_ids[:-1]])
            with torch.inference_mode(): assert cost == pytest.approx(net(ids, labels=ids).loss.item() * (ids.shape[1] - 1), rel=1e-4)


@pytest.mark.parametrize('kind', ['masked', 'masked_word'])
def test_pseudo_likelihood_of_a_pair_by_brute_force(kind):
    net, pair = model('masked'), Pair('लड़कियाँ किताब-घर में 3.5 zqx पढ़ेंगी।', 'लड़कियाँ किताब-घर में 3.5 zqx पढ़ेगा।', 'x')
    wanted = []
    for text in (pair.good, pair.bad):
        enc, cost = TOKENIZER(text, return_offsets_mapping=True), 0.
        inner, spans = range(1, len(enc.input_ids) - 1), word_spans(text)
        for i in inner:
            hidden, a = torch.tensor([enc.input_ids]), enc.offset_mapping[i]
            word = next((w for w in spans if w[0] < a[1] and a[0] < w[1]), None)
            for j in inner:
                b = enc.offset_mapping[j]
                if j == i or kind == 'masked_word' and word and j > i and word[0] < b[1] and b[0] < word[1]: hidden[0, j] = TOKENIZER.mask_token_id
            with torch.inference_mode(): cost -= net(hidden).logits[0, i].double().log_softmax(-1)[enc.input_ids[i]].item()
        wanted.append(cost)
    assert pair_nats(scorer(net, TOKENIZER, kind), [pair])[0] == pytest.approx(wanted, abs=1e-3)


def test_a_wrong_sentence_in_many_easy_pieces_stays_wrong():
    "The trap of the mean over tokens"
    pair, costs = [Pair('good', 'bad', 'x')], {'good': [3., 3.], 'bad': [3., 3., .1, .1, .1, .1]}
    tokens = pair_tokens(Written(costs), pair)
    assert pair_credit(summed(tokens)).tolist() == [1.] and rule_credit('mean_per_token', tokens, pair).tolist() == [0.]


def test_lost_numbers_are_told_and_a_first_token_without_a_begin_token_is_not():
    pair = [Pair('a', 'b', 'x')]
    assert pair_nats(Written({'a': [math.nan, 1., 2.], 'b': [math.nan, 4.]}), pair).tolist() == [[3., 4.]]
    for lost in ([1., math.nan], [math.nan, math.nan]):
        with pytest.raises(ValueError, match='1 of 1 pairs cost NaN'): pair_eval(Written({'a': lost, 'b': [1., 1.]}), pair, IDS)
    net = model('causal')
    with torch.no_grad(): next(net.parameters())[:] = math.nan
    with pytest.raises(ValueError, match='(?i)nan'): pair_eval(scorer(net, TOKENIZER, 'causal'), pocket_pairs('hi', 3), IDS)


def test_the_order_of_the_costs_does_not_break_a_tie():
    "In doubles as they come, .1 + .2 + .3 is not .3 + .2 + .1"
    costs = np.random.default_rng().uniform(0, 9, 30)
    pair = [Pair('a', 'b', 'x')]
    assert pair_credit(pair_nats(Written({'a': costs, 'b': np.random.default_rng().permutation(costs)}), pair)).tolist() == [.5]


def test_unknown_tokens_count():
    "A wrong form that the tokenizer does not know must not become the cheaper one for that"
    letters, pair = train_tokenizer(TEXTS, 'wordpiece', 600), [Pair('लड़का आया।', 'लड़का ☃।', 'x')]
    assert letters.unk_token_id in letters(pair[0].bad).input_ids
    (good, bad), = pair_tokens(uniform_scorer(letters), pair)
    counts = [len(letters(t, add_special_tokens=False).input_ids) for t in (pair[0].good, pair[0].bad)]
    assert [len(good), len(bad)] == counts and good.sum() + bad.sum() == pytest.approx(sum(counts) * math.log(len(letters)))


def test_floors_are_the_scorers_that_count():
    pairs = pocket_pairs('hi', 22, seed=random.randrange(10**6))
    floors = pair_floors(TOKENIZER, pairs, iter(IDS))
    for name, order in (('unigram', 1), ('trigram', 3)):
        assert np.allclose(floors[name], pair_nats(ngram_scorer(NgramFloor(order, len(TOKENIZER)).fit(IDS), TOKENIZER), pairs))
    assert (floors['length'] * math.log(len(TOKENIZER)) == pytest.approx(pair_nats(uniform_scorer(TOKENIZER), pairs)))
    assert floors['characters'].tolist() == [[len(p.good), len(p.bad)] for p in pairs]
    uniform = pair_eval(uniform_scorer(TOKENIZER), pairs, IDS)['accuracy']
    assert uniform.value == uniform.baselines['length'] and set(uniform.baselines) == {'characters', 'length', 'unigram', 'trigram'}
    assert {k: f.shape for k, f in pair_floors(TOKENIZER, [], IDS).items()} == dict.fromkeys(('characters', 'length', 'unigram', 'trigram'), (0, 2))


# ---- scores

def test_scores_by_hand():
    nats = np.array([[1., 2.], [1., 1.], [3., 2.]])
    pairs = [Pair('a', 'b', k) for k in 'xxy']
    scores = pair_scores(nats, pairs, {'length': [[1, 2]] * 3}, 'as told')
    assert {k: s.value for k, s in scores.items()} == {'accuracy': .5, 'macro': .375, 'accuracy/x': .75, 'accuracy/y': 0.}
    assert scores['accuracy/x'].baselines == {'length': 1.} == scores['macro'].baselines and scores['accuracy'].n == 3
    assert '3 pairs, 1 ties' in scores['accuracy'].protocol and 'as told' in scores['macro'].protocol
    for n in (1, 7, 50):
        for right in {0, n // 2, n}:
            score, oracle = pair_scores([[0., 1.]] * right + [[1., 0.]] * (n - right), [Pair('a', 'b', 'x')] * n)['accuracy'], binomtest(right, n).proportion_ci(method='wilson')
            assert (score.low, score.high) == pytest.approx((oracle.low, oracle.high), abs=1e-6)
    with pytest.raises(ValueError, match='1 of 2 pairs cost NaN'): pair_credit([[1, 2], [np.nan, 1]])
    with pytest.raises(ValueError, match='2 pairs need as many costs, given 3'): pair_scores(nats, pairs[:2])
    with pytest.raises(ValueError, match="given 2 for 'length'"): pair_scores(nats, pairs, {'length': nats[:2]})


def test_macro_interval_holds_what_it_promises():
    "Rules of different size and difficulty; the mean of their true shares lies inside in about 95 of 100 samples"
    rng, sizes = np.random.default_rng(), (20, 50, 50, 120)
    true, inside = rng.uniform(.05, .98, len(sizes)), 0
    pairs = [Pair('a', 'b', str(k)) for k, n in enumerate(sizes) for _ in range(n)]
    for _ in range(400):
        right = np.concatenate([rng.random(n) < p for p, n in zip(true, sizes)])
        macro = pair_scores(np.stack([~right, right], 1), pairs)['macro']
        inside += macro.low <= true.mean() <= macro.high
    assert .90 < inside / 400 <= .995
    perfect = pair_scores([[0., 1.]] * len(pairs), pairs)['macro']
    assert perfect.value == perfect.high == 1 and .9 < perfect.low < 1


def test_gaps_and_records():
    rng = np.random.default_rng()
    nats, pairs = rng.uniform(0, 50, (60, 2)), [Pair(f'g{i}', f'b{i}', 'xy'[i % 2]) for i in range(60)]
    x, y = pair_gaps(nats, pairs)
    gaps = (nats[:, 1] - nats[:, 0])[::2]
    assert x['mean'].value == pytest.approx(gaps.mean()) and x['sd'] == pytest.approx(gaps.std(ddof=1)) and x['mean'].low < gaps.mean() < x['mean'].high
    assert [x[f'q{q:02d}'] for q in (5, 25, 50, 75, 95)] == pytest.approx(np.percentile(gaps, [5, 25, 50, 75, 95])) and y['pairs'] == 30
    records = json.loads(json.dumps(pair_records(nats, pairs)))
    assert [r['credit'] for r in records] == pair_credit(nats).tolist() and records[3]['good'] == 'g3' and records[3]['nats_bad'] == nats[3, 1]


def test_comparison():
    a, b = np.array([[0., 1.]] * 9 + [[1., 0.]]), np.array([[1., 0.]] * 8 + [[0., 0.], [1., 0.]])
    found = compare_pairs(a, b)
    assert (found.only_a, found.only_b, found.difference.value) == (9, 0, pytest.approx(.85)) and found.p == pytest.approx(2 / 2**9)
    back = compare_pairs(b, a)
    assert (back.only_b, back.p, back.difference.value) == (9, found.p, pytest.approx(-.85))


# ---- rules

def harness(nats): return float(np.argmax([-c for c in nats]) == 0)  # lm-evaluation-harness: np.argmax(lls), doc_to_target 0


def babylm(nats): return float(torch.max(torch.stack([torch.tensor([-c], dtype=torch.float32) for c in nats], dim=1), dim=1)[1].item() == 0)  # rank_and_evaluate


def test_rules_are_those_of_the_harnesses():
    "Random costs with ties and NaN among them, against the lines the harnesses decide with"
    rng = np.random.default_rng()
    tokens = [tuple(rng.integers(0, 3, rng.integers(1, 4)).astype(float) for _ in range(2)) for _ in range(300)]
    tokens += [(np.array([a]), np.array([b])) for a in (1., math.nan) for b in (1., math.nan)]
    pairs = [Pair('a' * rng.integers(1, 9), 'b' * rng.integers(1, 9), 'x') for _ in tokens]
    sums = pair_sums(tokens, pairs, 'float32').nats
    assert (sums[:, 0] == sums[:, 1]).sum() > 20
    assert rule_credit('lm_eval', tokens, pairs).tolist() == [harness(s) for s in sums]
    assert rule_credit('babylm_2025', tokens, pairs).tolist() == [babylm(s) for s in sums]
    assert rule_credit('lm_eval_norm', tokens, pairs).tolist() == [harness(s / [len(p.good), len(p.bad)]) for s, p in zip(sums, pairs)]
    assert rule_credit('strictly_less', tokens, pairs).tolist() == [float(a < b) for a, b in sums]
    assert rule_credit('mean_per_token', tokens, pairs).tolist() == [float(a.mean() < b.mean()) for a, b in tokens]
    assert rule_credit('ours', tokens[:300], pairs[:300]).tolist() == [(a.sum() < b.sum()) + .5 * (a.sum() == b.sum()) for a, b in tokens[:300]]
    with pytest.raises(ValueError, match='cost NaN'): rule_credit('ours', tokens, pairs)
    with pytest.raises(ValueError, match='unknown rule'): rule_credit('argmax', tokens, pairs)
    with pytest.raises(ValueError, match='need as many'): rule_credit('ours', tokens[:3], pairs)


@pytest.mark.parametrize('kind', ['uniform', 'causal', 'masked', 'masked_word'])
def test_a_constant_model_gets_one_half_here_and_all_there(kind):
    "All weights 0: the same logits whatever is read"
    pairs = pocket_pairs('hi', 220, seed=random.randrange(10**6))
    pairs = [p for p, (a, b) in zip(pairs, pair_floors(TOKENIZER, pairs, [])['length']) if a == b][:40]
    net = model('causal' if kind == 'causal' else 'masked')
    with torch.no_grad():
        for p in net.parameters(): p.zero_()
    constant = uniform_scorer(TOKENIZER) if kind == 'uniform' else scorer(net, TOKENIZER, kind)
    table = {row['rule']: row for row in rule_table(pair_tokens(constant, pairs), pairs)}
    assert len(pairs) > 10 and {k: table[k]['accuracy'] for k in ('ours', 'lm_eval', 'babylm_2025', 'strictly_less')} == dict(ours=.5, lm_eval=1., babylm_2025=1., strictly_less=0.)
    assert {k: table[k]['present'] for k in ('ours', 'lm_eval', 'babylm_2025', 'strictly_less')} == dict(ours=0., lm_eval=1., babylm_2025=1., strictly_less=-1.)
    assert all(row['ties'] == 1. for row in table.values()) and set(table) == set(RULES)


def test_the_present_of_the_harnesses_is_the_share_of_ties():
    "On real files: a model that finds all tokens alike, and what each rule makes of it"
    for name in ('multiblimp_eng.tsv.gz', 'multiblimp_nld.tsv.gz', 'blimp/adjunct_island.jsonl.gz'):
        pairs = read_pairs(shared(name))
        pairs = random.sample(pairs, 200)
        tokenizer = train_tokenizer([p.good for p in pairs], 'bpe', 600)
        rows = {r['rule']: r for r in rule_table(pair_tokens(uniform_scorer(tokenizer), pairs), pairs)}
        ties = rows['ours']['ties']
        assert ties > .05 and rows['ours']['present'] == pytest.approx(0) and rows['lm_eval']['present'] == pytest.approx(ties) == -rows['strictly_less']['present']
        assert rows['lm_eval']['accuracy'] - rows['ours']['accuracy'] == pytest.approx(ties / 2) == rows['babylm_2025']['accuracy'] - rows['ours']['accuracy']


def test_low_precision_makes_ties():
    rng = np.random.default_rng()
    tokens = [(c := rng.uniform(4, 8, 10), c + rng.normal(0, 1e-3, 10)) for _ in range(200)]
    pairs = [Pair('a', 'b', 'x')] * 200
    rows = {d: {r['rule']: r for r in rule_table(tokens, pairs, d)} for d in ('float64', 'bfloat16')}
    assert rows['float64']['ours']['ties'] == 0 and rows['bfloat16']['lm_eval']['accuracy'] > .8
    assert .35 < rows['bfloat16']['ours']['accuracy'] < .65
    for dtype in ('float16', 'bfloat16', 'float32'):
        assert pair_sums(tokens[:5], pairs[:5], dtype).nats[:, 0].tolist() == [torch.tensor(a).to(getattr(torch, dtype)).sum().item() for a, _ in tokens[:5]]


def test_a_trigram_that_has_seen_the_answers_knows_them():
    pairs = read_pairs(shared('multiblimp_eng.tsv.gz'))
    tokenizer = train_tokenizer([p.good for p in pairs], 'bpe', 1500)
    floors = pair_floors(tokenizer, pairs, tokenizer([p.good for p in pairs], add_special_tokens=False).input_ids)
    scores = pair_scores(floors['trigram'], pairs, floors)
    assert scores['accuracy'].n == 770 and scores['accuracy'].value > .9 and .3 < scores['accuracy'].baselines['length'] < .8
