"""Chats against transformers' own masks, forms against each other, limits against brute force, and every fault a preflight must find."""
import copy
import json
import random
from collections import Counter

import pytest

from lab_lm.core.paths import data_dir
from lab_lm.nets.tiny import GEMMA_CHAT, tiny_gemma, tiny_gemma_tokenizer
from lab_lm.text.chat import chat_parts, collate, control_tokens, encode_chat, encode_chats, render, split_chats
from lab_lm.text.chat_forms import gather_chats, read_chats, to_chat
from lab_lm.text.preflight import id_findings, preflight, row_findings, template_findings
from lab_lm.text.script import graphemes
from lab_lm.text.tokenize import train_tokenizer

WORDS = ('घर', 'नदी', 'क्षत्रिय', 'किताबें', 'कौआ', 'प्यासा', 'था।', 'வீடு', 'நதி', 'ஸ்ரீ', 'எங்கே?', 'மூன்று', 'the', 'river', '42', 'x=1;', 'क्\u200dष', '🙂')
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.fixture(scope='module')
def gemma(): return tiny_gemma_tokenizer([' '.join(WORDS)] * 4 + [' '.join(reversed(WORDS))] * 3, 700)


@pytest.fixture
def rng(record_property):
    seed = random.randrange(2**32)
    record_property('seed', seed)
    print('seed', seed)
    return random.Random(seed)


def said(rng, most=12): return ' '.join(rng.choices(WORDS, k=rng.randint(1, most)))


def talk(rng, pairs=4, most=12):
    turns = [dict(role=r, content=said(rng, most)) for _ in range(rng.randint(1, pairs)) for r in ('user', 'assistant')]
    return dict(id=str(rng.random()), messages=([dict(role='system', content=said(rng))] if rng.random() < .4 else []) + turns)


def one(question, answer): return dict(messages=[dict(role='user', content=question), dict(role='assistant', content=answer)])


def with_template(tokenizer, template, **fields):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    for name, value in fields.items(): setattr(other, name, value)
    return other


def ends_of(tokenizer): return [control_tokens(tokenizer)[t] for t in ('<eos>', '<end_of_turn>')]


# Labels

def test_labels_are_those_of_transformers(gemma, rng):
    "Its own mask, from a template that says what the assistant generates"
    said_by = "{{ (system if loop.first else '') + turn['content'] | trim + '<end_of_turn>\n' }}"
    marked = GEMMA_CHAT.replace(said_by, "{% if turn['role'] == 'assistant' %}{% generation %}{{ turn['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}"
                                         "{% else %}" + said_by + "{% endif %}")
    assert marked != GEMMA_CHAT
    oracle = with_template(gemma, marked)
    for _ in range(60):
        chat = talk(rng)
        theirs = oracle.apply_chat_template(chat['messages'], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        mine = encode_chat(chat, gemma, None, learn='all')
        n = len(mine['input_ids'])
        assert theirs['input_ids'][:n] == mine['input_ids'] and gemma.decode(theirs['input_ids'][n:]) == '\n'
        assert [int(label != -100) for label in mine['labels']] == theirs['assistant_masks'][:n]
        last = encode_chat(chat, gemma, None)
        answer = gemma(chat['messages'][-1]['content'] + '<end_of_turn>', add_special_tokens=False)['input_ids']
        assert last['input_ids'] == mine['input_ids'] and [label for label in last['labels'] if label != -100] == answer


def test_parts_are_the_rendered_chat(gemma, rng):
    for learn in ('last', 'all'):
        chat = talk(rng)
        assert ''.join(chat_parts(chat, gemma, learn)) == gemma.apply_chat_template(chat['messages'], tokenize=False).rstrip()


def test_an_end_that_only_the_token_table_knows_is_not_doubled(gemma):
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast
    backend = copy.deepcopy(gemma.backend_tokenizer)
    backend.add_special_tokens([AddedToken('<|im_start|>', special=True), AddedToken('<|im_end|>', special=True)])
    hidden = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token='<pad>', eos_token='<eos>', unk_token='<unk>', chat_template=CHATML)
    assert '<|im_end|>' not in hidden.all_special_tokens and '<|im_end|>' in control_tokens(hidden)
    assert render(one('नदी?', 'वहाँ।'), hidden)[1] == 'वहाँ।<|im_end|>'


def test_a_tokenizer_that_closes_every_text_does_not_close_the_prompt():
    own = train_tokenizer([' '.join(WORDS)] * 5, 'akshara_bpe', 400)
    own.chat_template = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    row = encode_chat(one('नदी कहाँ है?', 'वहाँ।'), own)
    assert own('नदी')['input_ids'][-1] == own.eos_token_id # What the tokenizer does by itself
    assert row['input_ids'][0] == own.bos_token_id and row['input_ids'].count(own.bos_token_id) == 1
    assert [i for i, t in enumerate(row['input_ids']) if t == own.eos_token_id] == [len(row['input_ids']) - 1]


def test_padding_changes_no_loss(gemma, rng):
    import torch
    model, rows = tiny_gemma(len(gemma)), encode_chats([talk(rng, 1) for _ in range(4)], gemma, 10**6)[0]
    def loss(batch): return float(model(**batch).loss) * int((batch['labels'] != -100).sum())
    with torch.no_grad():
        together = [loss(collate(rows, pad)) for pad in (0, 9)]
        alone = sum(loss(collate([row], 0)) for row in rows)
    assert together[0] == pytest.approx(alone, rel=1e-5) and together[1] == pytest.approx(alone, rel=1e-5)


# Chats that are too long

def fits(messages, gemma, most): return len(gemma.apply_chat_template(messages, tokenize=True, return_dict=True)['input_ids']) - 1 <= most # Less the last newline


def test_what_is_cut_is_the_oldest(gemma, rng):
    seen = Counter()
    for _ in range(80):
        chat, most = talk(rng), rng.randint(12, 60)
        whole = encode_chat(chat, gemma, None)
        try: (row,), dropped = encode_chats([chat], gemma, most, 'cut')
        except ValueError: row = None
        messages = chat['messages']
        head, turns = (messages[:1], messages[1:]) if messages[0]['role'] == 'system' else ([], messages)
        kept = [messages] + [head + turns[i:] for i in range(2, len(turns), 2)] + [turns[-2:]]
        first = next((k for k in kept if fits(k, gemma, most)), None)
        if first is not None:
            assert row['input_ids'] == encode_chat(dict(messages=first), gemma, None)['input_ids']
            assert row['cut'] == len(whole['input_ids']) - len(row['input_ids'])
            seen['whole' if first is messages else 'turns'] += 1
            continue
        question, answer = turns[-2]['content'], turns[-1]
        clusters = graphemes(question)
        if row is None: # Not even the last letter with the answer
            assert not fits([dict(role='user', content=clusters[-1]), answer], gemma, most)
            seen['left out'] += 1
            continue
        assert len(row['input_ids']) <= most and row['labels'][-1] == gemma.convert_tokens_to_ids('<end_of_turn>')
        assert [t for t in row['labels'] if t != -100] == [t for t in whole['labels'] if t != -100]
        left = gemma.decode(row['input_ids']).split('<start_of_turn>user\n')[1].split('<end_of_turn>')[0]
        assert gemma.decode(row['input_ids']).startswith('<bos><start_of_turn>user\n') and question.endswith(left) and 0 < len(left) < len(question)
        words = question.split(' ')
        at_word = next((i for i in range(1, len(words)) if ' '.join(words[i:]) == left), None)
        if at_word: assert not fits([dict(role='user', content=' '.join(words[at_word - 1:])), answer], gemma, most) or at_word == 1
        else: assert left in {''.join(clusters[i:]) for i in range(len(clusters))} # Never within a letter
        seen['question'] += 1
    assert len(seen) == 4, seen


def test_a_script_without_spaces_is_cut_at_a_letter(gemma):
    (row,), _ = encode_chats([one('கொக்கு' * 60, 'நதி.')], gemma, 60, 'cut')
    left = gemma.decode(row['input_ids']).split('user\n')[1].split('<end_of_turn>')[0]
    assert ('கொக்கு' * 60).endswith(left) and graphemes('கொக்கு' * 60)[-len(graphemes(left)):] == graphemes(left) and row['cut'] > 0


def test_drop_and_error(gemma, rng):
    chats = [one(said(rng), said(rng)) for _ in range(8)] + [dict(one('नदी ' * 200, 'घर'), id='long')]
    rows, dropped = encode_chats(chats, gemma, 200)
    assert (len(rows), dropped, {r['cut'] for r in rows}) == (8, 1, {0})
    with pytest.raises(ValueError, match="1 of 9 chats .* chat 'long' with"): encode_chats(chats, gemma, 200, 'error')
    assert encode_chats(chats, gemma, 10**6, 'error')[1] == 0


# Forms

def written(rng, chat):
    "The chat in a form that can hold it, with other names for keys and speakers"
    messages, system = chat['messages'], ''
    if messages[0]['role'] == 'system': system, messages = messages[0]['content'], messages[1:]
    names = dict(user=rng.choice(['human', 'user', 'Human']), assistant=rng.choice(['gpt', 'assistant', 'model']))
    pairs = list(zip(messages[::2], messages[1::2]))
    form = rng.choice(['messages', 'sharegpt', 'alpaca', *(['prompt', 'parts'] if len(pairs) == 1 and not system else [])])
    more = {'system': system} if system else {}
    question, answer = (m['content'] for m in pairs[-1])
    if form == 'messages': row = dict(messages=chat['messages'])
    elif form == 'sharegpt': row = dict(conversations=[{'from': names[m['role']], 'value': m['content']} for m in messages], **more)
    elif form == 'alpaca': row = dict(zip(('instruction', rng.choice(['input', 'context'])), question.partition('\n\n')[::2]), output=answer,
                                  history=[[a['content'], b['content']] for a, b in pairs[:-1]], **more)
    elif form == 'prompt':
        keys = rng.choice([('prompt', 'response'), ('prompt', 'completion'), ('question', 'answer'), ('input', 'output')])
        row = dict(zip(keys, (question, answer)))
    else: row = dict(prompt=messages[:1], completion=messages[1:])
    return {'parts': 'prompt'}.get(form, form), dict(row, id=chat['id'], topic='t')


def test_every_form_gives_the_same_chats(tmp_path, rng):
    chats = [talk(rng, 3) for _ in range(120)]
    for c in chats: c['messages'][-2]['content'] += rng.choice(['', '\n\n' + said(rng)])
    forms, rows = zip(*(written(rng, c) for c in chats))
    (tmp_path / 'a.jsonl').write_text('\ufeff' + '\r\n'.join(json.dumps(r, ensure_ascii=rng.random() < .5) for r in rows), encoding='utf-8')
    (tmp_path / 'a.json').write_text(json.dumps(rows, ensure_ascii=False), encoding='utf-8')
    for name in ('a.jsonl', 'a.json'):
        got = read_chats(tmp_path / name)
        assert [(c['id'], c['messages'], c['form'], c['topic']) for c in got] == [(c['id'], c['messages'], f, 't') for c, f in zip(chats, forms)]
    assert set(forms) == {'messages', 'sharegpt', 'alpaca', 'prompt'}


def test_hostile_records_raise_nothing_but_a_value_error(rng):
    keys = ['messages', 'conversations', 'instruction', 'input', 'output', 'prompt', 'response', 'history', 'system', 'role', 'content', 'from', 'value',
            'id', 'type', 'text']
    def any_json(depth):
        kind = rng.randrange(9 if depth else 6)
        if kind < 6: return [None, True, 7, 1e400, 'user', 'क'][kind]
        if kind < 8: return {rng.choice(keys): any_json(depth - 1) for _ in range(rng.randrange(4))}
        return [any_json(depth - 1) for _ in range(rng.randrange(4))]
    known = 0
    for _ in range(4000):
        row = any_json(5)
        try: known += bool(to_chat(row)['messages'])
        except ValueError as error: assert str(error)
    good = dict(conversations=[{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}])
    for _ in range(400): # One field of a good record broken
        row = json.loads(json.dumps(good))
        rng.choice([row, *row['conversations']])[rng.choice(['from', 'value', 'conversations', 'system'])] = any_json(2)
        try: to_chat(row)
        except ValueError as error: assert str(error)


def test_bad_records_are_named_by_file_and_line(tmp_path):
    path = tmp_path / 'bad.jsonl'
    good = json.dumps(one('a', 'b'))
    for line, said_why in [('{"messages": []}', 'given none'), ('{"messages": [{"role": "user", "content": "a"}]}', 'last question has no answer'),
                           ('[1]', 'expected a JSON object'),
                           ('{"prompt": "a"', 'is no JSON'), ('{"prompt": "a", "response": " "}', 'no content'), ('{"text": "a"}', 'known forms: messages'),
                           ('{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}', 'given assistant, user'),
                           ('{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}', "spoken by 'tool'")]:
        path.write_text(f'{good}\n\n{line}\n{good}', encoding='utf-8')
        with pytest.raises(ValueError, match='bad.jsonl, line 3: .*' + said_why): read_chats(path)
        report = Counter()
        assert len(read_chats(path, 'skip', report)) == 2 and report.total() == 1
    path.write_bytes(good.encode() + b'\n\xff\xfe{}')
    with pytest.raises(ValueError, match='bad.jsonl, line 2'): read_chats(path)


def test_plain_texts_are_not_taken_for_chats(tmp_path):
    from lab_lm.text.corpus import Record
    (tmp_path / 'corpus.jsonl').write_text('{"id": "a", "text": "एक कौआ था। वह प्यासा था।"}\n', encoding='utf-8')
    chats, what = gather_chats(tmp_path / 'corpus.jsonl', [Record('a', 'एक कौआ था। वह प्यासा था।', 's', 'hi')])
    assert len(chats) == 1 and 'first halves' in what


# Preflight

@pytest.mark.parametrize('size', [300, 500, 1200])
def test_nothing_is_found_where_nothing_is_wrong(size, rng):
    tokenizer = tiny_gemma_tokenizer([said(rng, 40) for _ in range(40)], size)
    model = tiny_gemma(len(tokenizer))
    ends = model.generation_config.eos_token_id or model.config.eos_token_id
    chats = [talk(rng) for _ in range(40)]
    for c in chats: c['messages'][-1]['content'] += '!' # No answer is its question by chance
    for learn in ('last', 'all'): assert preflight(tokenizer, chats, ends, 10**6, model.get_input_embeddings().weight.shape[0], learn) == []


def test_nothing_is_refused_with_other_templates(gemma, rng):
    "ChatML on a tokenizer with its turn tokens; Llama 2's [INST] without any; our own tokenizers"
    chats = [one(said(rng), said(rng)) for _ in range(20)]
    turns = copy.deepcopy(gemma)
    turns.add_tokens(['<|im_start|>', '<|im_end|>'], special_tokens=True)
    turns.chat_template = CHATML.replace('{% for', '{{ bos_token }}{% for', 1)
    assert preflight(turns, chats, [1, turns.convert_tokens_to_ids('<|im_end|>')]) == []
    inst = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST] ' if m['role'] == 'user' else m['content'] + eos_token }}{% endfor %}"
    for kind in ('akshara_bpe', 'bpe', 'unigram', 'char'):
        own = train_tokenizer([' '.join(WORDS)] * 5, kind, 400)
        own.chat_template = inst
        assert all(f['level'] == 'remark' for f in preflight(own, chats, own.eos_token_id, rows=len(own), strict=False)), kind


def without_special(gemma, name):
    "The same tokenizer, one token typed as text"
    from transformers import PreTrainedTokenizerFast
    from tokenizers import Tokenizer
    data = json.loads(gemma.backend_tokenizer.to_str())
    for added in data['added_tokens']: added['special'] &= added['content'] != name
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), pad_token='<pad>', eos_token='<eos>', bos_token='<bos>', unk_token='<unk>',
                                   chat_template=gemma.chat_template)


FAULTS = {
    'no template': lambda g, c, e: (with_template(g, None), c, e, {}),
    'no turn tokens': lambda g, c, e: (with_template(g, "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"), c, e, {}),
    'mark is no token': lambda g, c, e: (with_template(g, CHATML), c, e, {}),
    'mark is text': lambda g, c, e: (without_special(g, '<end_of_turn>'), c, e, {}),
    'padding is an end': lambda g, c, e: (with_template(g, g.chat_template, pad_token='<eos>'), c, e, {}),
    'no padding': lambda g, c, e: (with_template(g, g.chat_template, pad_token=None), c, e, {}),
    'answers do not end': lambda g, c, e: (g, c, e[:1], {}),
    'end is no control token': lambda g, c, e: (g, c, [*e, 400], {}),
    'no end': lambda g, c, e: (g, c, [], {}),
    'begins twice': lambda g, c, e: (with_template(g, '{{ bos_token }}' + g.chat_template), c, e, {}),
    'tokenizer of another model': lambda g, c, e: (g, c, e, dict(rows=len(g) - 5)),
    'prompt changes': lambda g, c, e: (with_template(g, g.chat_template.replace('{{ bos_token }}', '{{ bos_token }}{{ messages | length }}', 1)), c, e, {}),
    'answers copy': lambda g, c, e: (g, [one(m := chat['messages'][0]['content'], m) for chat in c], e, {}),
    'too long': lambda g, c, e: (g, c, e, dict(max_length=3)),
    'no chats': lambda g, c, e: (g, [], e, {}),
    'chats cannot be encoded': lambda g, c, e: (g, [*c, dict(messages=c[0]['messages'][:1])], e, {}),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_every_fault_is_refused_by_its_name(fault, gemma, rng):
    tokenizer, chats, ends, more = FAULTS[fault](gemma, [one(said(rng), said(rng) + '!') for _ in range(6)], ends_of(gemma))
    with pytest.raises(ValueError, match=fault): preflight(tokenizer, chats, ends, **more)
    found = preflight(tokenizer, chats, ends, strict=False, **more)
    assert fault in {f['finding'] for f in found if f['level'] == 'refused'} and len([f for f in found if f['level'] == 'refused']) <= 3


def test_labels_of_other_collators_are_seen_through(gemma, rng):
    "Padding masked by its id when padding is the end (the quiet fault), answers cut off, the prompt learned, labels moved"
    ends, rows = ends_of(gemma), encode_chats([talk(rng) for _ in range(10)], gemma, 10**6)[0]
    def broken(change): return [dict(input_ids=(pair := change(r['input_ids'], r['labels']))[0], labels=pair[1]) for r in rows]
    planted = {'end is not learned': lambda ids, labels: (ids, [-100 if t == ends[1] else t for t in labels]),
               'nothing learned': lambda ids, labels: (ids[:4], labels[:4]),
               'prompt is learned': lambda ids, labels: (ids, list(ids)),
               'labels are moved': lambda ids, labels: (ids, labels[1:] + [-100]),
               'padding is learned': lambda ids, labels: ([*ids, 0, 0, ends[0]], [*labels, 0, 0, ends[0]]),
               'begins twice': lambda ids, labels: (ids[:1] + ids, [-100] + labels)}
    assert row_findings(rows, gemma, ends) == []
    for name, change in planted.items():
        found = row_findings(broken(change), gemma, ends, len(gemma))
        assert name in {f['finding'] for f in found} and '10 of 10' in found[0]['told'], (name, found)
    cut = [dict(input_ids=r['input_ids'][:-1], labels=r['labels'][:-1]) for r in rows if r['labels'][-2] != -100]
    assert {f['finding'] for f in row_findings(cut, gemma, ends)} == {'end is not learned'}


def test_conversations_that_a_template_forgets_are_remarked(gemma):
    forgets = with_template(gemma, "{{ bos_token }}{% for m in messages[-2:] if m.role != 'system' %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}")
    names = {f['finding'] for f in template_findings(forgets, ends_of(gemma))}
    assert names == {'no conversations', 'no system turn', 'no opening'}
    assert not id_findings(gemma, ends_of(gemma), len(gemma))


def test_the_samples_pass():
    folder = data_dir() / 'samples'
    chats, _ = gather_chats(folder)
    tokenizer = tiny_gemma_tokenizer([m['content'] for c in chats for m in c['messages']], 2048)
    assert len(chats) > 50 and preflight(tokenizer, chats, ends_of(tokenizer), 10**6) == []


def test_padding_is_suggested_from_what_the_tokenizer_has(gemma):
    "The shape of Qwen's table: padding among the ends, and tokens made for padding of other kinds"
    turns = copy.deepcopy(gemma)
    turns.add_tokens(['<|im_start|>', '<|im_end|>', '<|vision_pad|>'], special_tokens=True)
    turns.pad_token = '<eos>'
    told = id_findings(turns, [1])[0]['told']
    assert "set tokenizer.pad_token to another, such as '<pad>'" in told
    from transformers import PreTrainedTokenizerFast
    bare = PreTrainedTokenizerFast(tokenizer_object=turns.backend_tokenizer, eos_token='<eos>')
    assert "'<pad>'" in id_findings(bare, [1])[0]['told'] or "'<|vision_pad|>'" in id_findings(bare, [1])[0]['told']


def test_chats_of_one_system_turn_are_still_divided(rng):
    chats = [dict(id=str(i), messages=[dict(role='system', content='Be brief.'), *one(f'{i}? {said(rng)}', 'So.')['messages']]) for i in range(30)]
    parts = split_chats(chats, rng.randrange(1000))
    assert all(len(part) >= 3 for part in parts.values()) and sum(map(len, parts.values())) == 30
