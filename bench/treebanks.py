"""What a small masked encoder knows of real treebanks, against the letters of the word and its own random weights

    python bench/treebanks.py [--lang hi] [--steps 600] [--layers 4] [--width 128] [--small]

Claim to be checked: for the trained encoder, the probes of part of speech and of case beat the word-identity baseline with p < .01 (whole sentences
swapped, all features of the treebank allowed for by Holm's rule); for the same network with its first, random weights they do not. The last lines say
plainly what held.

The encoder is trained here, on Wikipedia paragraphs (and, in Hindi, stories) that lie beside the project, with none of the treebank's text: Hindi is tested
on UD PUD, Tamil on UD MWTT. Linear probes at every layer, the layer chosen on validation sentences, whole sentences apart, in five turns so that every word is tested.
One run, one thread.
"""
import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

BANKS = dict(hi='hi_pud', ta='ta_mwtt')


def texts(lang, small):
    "Paragraphs to train on: Wikipedia, and in Hindi stories"
    from lab_lm.core.paths import shared_data
    from lab_lm.text.sources import read_records
    names = [f'text/wiki_{lang}.txt.gz'] + (['text/premchand_hi.jsonl.gz'] if lang == 'hi' else [])
    found = [file for file in map(shared_data, names) if file]
    if not found: sys.exit(f'skipped: no {names[0]} beside the project (LAB_LM_SHARED)')
    out = [part for file in found for r in read_records(file, lang) for part in r.text.split('\n') if part.strip()]
    return out[:300] if small else out


def models(lang, args):
    "The trained model, the same before training, and the tokenizer; kept in a temporary folder, by the settings"
    from lab_lm.nets.pretrained import load_model, quiet
    facts = [f'{key}{getattr(args, key):g}' for key in ('steps', 'batch', 'layers', 'width', 'vocab', 'seed', 'lr')]
    folder = Path(tempfile.gettempdir()) / 'lab_lm_bench' / '-'.join(['treebanks', lang, *facts, *(['small'] if args.small else [])])
    if not folder.is_dir():
        part = folder.with_name(f'{folder.name}.{os.getpid()}')
        model, twin, tokenizer = train(lang, args)
        with quiet():
            for net, name in ((model, 'model'), (twin, 'twin')): net.save_pretrained(part / name), tokenizer.save_pretrained(part / name)
        part.rename(folder)
    else: print(f'{lang}: trained before, in {folder.name}')
    with quiet(): (model, tokenizer), (twin, _) = (load_model(folder / name, 'masked') for name in ('model', 'twin'))
    return model.eval(), twin.eval(), tokenizer


def train(lang, args):
    "The trained model, the same before training, and the tokenizer"
    import copy
    import torch
    from lab_lm.nets.native import to_twin
    from lab_lm.nets.start import start_from, token_frequencies
    from lab_lm.nets.transformer import NATIVE, NetConfig, Transformer
    from lab_lm.text.batches import read_stream, write_stream
    from lab_lm.text.rows import PackedRows, tokens_of
    from lab_lm.text.tokenize import train_tokenizer
    from lab_lm.train.feed import Feed
    from lab_lm.train.learner import Learner
    from lab_lm.train.objectives import Masked
    from lab_lm.train.schedules import Schedule
    from lab_lm.train.training import Training
    some = texts(lang, args.small)
    tokenizer = train_tokenizer(some, 'akshara_bpe', args.vocab)
    torch.manual_seed(args.seed)
    shape = dict(vocab_size=len(tokenizer), mode='masked', max_length=512, pad_id=tokenizer.pad_token_id, layers=args.layers, width=args.width, heads=args.width // 32)
    model = Transformer(NetConfig(positions='rotary', init=args.width ** -.5, **shape, **NATIVE['masked']))
    twin = to_twin(copy.deepcopy(model)).eval()
    with tempfile.TemporaryDirectory() as folder:
        rows = PackedRows(*read_stream(write_stream(tokens_of(some, tokenizer), f'{folder}/stream', len(tokenizer))), 128)
        start_from(model, token_frequencies(rows.ids, len(tokenizer), tokenizer.all_special_ids))
        feed = Feed(rows, Masked(tokenizer, .3, split=(1., 0., 0.), multiple=64), args.batch, seed=args.seed)
        training = Training(steps=args.steps, lr=args.lr, optimizer='muon', weight_decay=.1, schedule=Schedule(name='linear', warmup=.1), seed=args.seed, precision='fp32')
        begin = time.time()
        losses = [row['loss'] for row in Learner(model, feed, training, label=f'training, {lang}').fit()]
    last = losses[-50:]
    print(f'{lang}: {len(some):,} paragraphs, {len(rows.ids):,} tokens; {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; {args.steps} steps of '
          f'{args.batch} x 128 tokens in {(time.time() - begin) / 60:.1f} min; loss {losses[0]:.2f} -> {sum(last) / len(last):.2f} nats', flush=True)
    return to_twin(model).eval(), twin, tokenizer


def verdicts(lang, found):
    "Does the trained encoder beat word identity, and does its twin?"
    from lab_lm.evals.compare import holm
    from lab_lm.evals.guesses import accuracy_gain, gain_p
    right = lambda r, who: [row[who] == row['label'] for row in r.records]
    units = lambda r: [row['sentence'] for row in r.records]
    theirs = holm({name: gain_p(right(r, 'random weights'), right(r, 'word identity'), units(r)) for name, r in found.results.items()})
    for name in ('UPOS', 'Case'):
        if name not in found.results:
            print(f'{lang}, {name}: skipped, {found.skipped.get(name, "not in this treebank")}')
            continue
        r = found.results[name]
        twin = accuracy_gain(right(r, 'random weights'), right(r, 'word identity'), units(r))
        gain, p = r.gains['word identity'], found.p['word identity'][name]
        say = lambda gain, p: 'beats word identity' if gain.value > 0 and p < .01 else 'is below word identity' if gain.value < 0 and p < .01 else 'does not differ from word identity'
        print(f'{lang}, {name}: the trained encoder {say(gain, p)}: gain {gain} p={p:.2g}; its random twin {say(twin, theirs[name])}: gain {twin} p={theirs[name]:.2g}; '
              f'trained over twin {r.gains["random weights"]} p={found.p["random weights"][name]:.2g}')


def run(lang, args):
    "Train, read the treebank, probe, tell"
    from lab_lm.core.paths import shared_data
    from lab_lm.evals.probe_words import gather_words
    from lab_lm.evals.probing import probe_all
    from lab_lm.evals.tables import Table, to_markdown
    from lab_lm.nets.encoder import word_states
    from lab_lm.text.features import enough_words, ud_features
    from lab_lm.text.morph import read_conllu
    file = shared_data(f'treebanks/{BANKS[lang]}.conllu.gz')
    if not file: return print(f'skipped: no {BANKS[lang]} beside the project (LAB_LM_SHARED)')
    bank = read_conllu(file)[:200 if args.small else None]
    features, reasons = enough_words(ud_features(bank))
    model, twin, tokenizer = models(lang, args)
    begin = time.time()
    mine, theirs = (gather_words(word_states(m, tokenizer, bank, pooling=args.pooling), bank, features) for m in (model, twin))
    read = time.time()
    found = probe_all(mine, theirs, seed=args.seed, turns=args.turns)
    turned = f', {args.turns} turns' * (args.turns > 1)
    print(f'{lang}: {len(bank):,} sentences of {BANKS[lang]}, {len(mine.forms):,} labelled words; reading twice {read - begin:.0f} s, '
          f'{len(found.results)} features at {args.layers + 1} layers, twice, with controls{turned} {time.time() - read:.0f} s')
    print(to_markdown(Table(found.table(), p={'accuracy': 'p over word identity'}, against='word identity, whole sentences swapped, Holm')))
    for name, reason in (reasons | found.skipped).items(): print(f'  left out: {name}: {reason}')
    verdicts(lang, found)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--lang', choices=[*BANKS, 'all'], default='all')
    for name, value in dict(steps=600, batch=32, layers=4, width=128, vocab=4000, turns=5, seed=0).items(): parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--lr', type=float, default=1e-2)
    parser.add_argument('--pooling', default='mean')
    parser.add_argument('--small', action='store_true', help='seconds instead of minutes; shows that it runs, nothing more')
    args = parser.parse_args()
    if args.small: args.steps, args.layers, args.width, args.vocab = 10, 2, 64, 1200
    import torch
    torch.set_num_threads(1)
    for lang in BANKS if args.lang == 'all' else [args.lang]: run(lang, args)
