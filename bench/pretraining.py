"""How fast a masked model learns here, against transformers' Trainer: same texts, same tokenizer, same size, same evaluation, one run

    python bench/pretraining.py speed [--minutes 6]     real tokens a second, alternating segments; memory; profile; distance to the matrix rate
    python bench/pretraining.py time [--minutes 4]      wall time to the peers' final validation losses; the default peers train --minutes each
    python bench/pretraining.py all                     both

Peers: (1) the Trainer as transformers' example script `run_mlm.py` runs it, in both of its data modes: texts joined end to end and cut to blocks (its
default), and one text a row, cut at the length and padded (`--line_by_line`); batch 8, rate 5e-5 falling linearly, dropout 0.1, 15 % masked, fp32.
(2) the Trainer well set: a rate and a batch found by short runs, warm-up, no dropout, rows grouped by length or blocks, the fast type of the machine,
the allocator told not to give memory back; and for comparison the same with our head start. Our side starts from counted token frequencies
(`nets.start`), and in runs as short as these that is most of the distance: read the two peers with and without it together. All: RoBERTa of 6 layers of 384 or ours of the same size, akshara BPE of 16,000, rows of 128 tokens.

Real tokens are those that are not padding. The validation loss is in nats per hidden token, on masks that are the same for every model (15 %), measured
while the clock stands still. The clock counts training steps with their data; starting Python, tokenising and building a model are outside for all.
Every side runs in a process of its own, so that memory and allocator are its own; while one trains, the others wait.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections import deque
from pathlib import Path

SMALL = '--small'
LENGTH, VOCAB, SHAPE = (128, 1000, dict(layers=2, width=64, heads=2)) if SMALL in sys.argv else (128, 16_000, dict(layers=6, width=384, heads=6))
TUNABLES = 'glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1'
CACHE = Path(tempfile.gettempdir()) / 'lab_lm_bench'
DEFAULT = dict(kind='trainer', lr=5e-5, batch=8, dropout=.1, warmup=0., grouped=False, start=False, tuned=False)
WELL_SET = dict(kind='trainer', lr=1e-3, batch=16, dropout=0., warmup=.1, grouped=True, start=False, tuned=True)
SIDES = {'Trainer, run_mlm.py (blocks)': DEFAULT | dict(mode='blocks'), 'Trainer, run_mlm.py --line_by_line': DEFAULT | dict(mode='lines'),
         'Trainer, well set (blocks)': WELL_SET | dict(mode='blocks'), 'Trainer, well set (grouped by length)': WELL_SET | dict(mode='lines'),
         'lab_lm': dict(kind='ours', optimizer='muon', lr=1e-2, batch=32, accumulate=4, mask=.3, warmup=.1, start=True, tuned=True)}


# ---- the same for everybody: texts, tokenizer, evaluation

def texts():
    "Training and validation texts: Hindi Wikipedia paragraphs, else the project's samples; one text in twenty is held out, by its checksum"
    from lab_lm.core.paths import shared_data
    from lab_lm.text.sources import read_records
    from lab_lm.text.streams import read_text_lines
    file = None if SMALL in sys.argv else shared_data('text/wiki_hi.txt.gz')
    every = [text for _, text in read_text_lines(file) if text.strip()] if file else [r.text for r in read_records('data/samples', 'hi')]
    held = lambda text: zlib.crc32(text.encode()) % 20 == 0
    return [t for t in every if not held(t)], [t for t in every if held(t)]


def tokenizer_of(train, size):
    "The tokenizer, trained once and kept in a temporary folder"
    from transformers import PreTrainedTokenizerFast
    from lab_lm.text.tokenize import train_tokenizer
    folder = CACHE / f'akshara_bpe-{size}-{zlib.crc32("".join(train).encode()):08x}'
    if not folder.is_dir():
        part = folder.with_name(f'{folder.name}.{os.getpid()}')
        train_tokenizer(train, 'akshara_bpe', size).save_pretrained(part)
        part.rename(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


class Judge:
    "Nats per hidden token on fixed masks"
    def __init__(self, tokenizer, held):
        from lab_lm.evals.lm import masked_rows
        self.tokenizer, self.rows = tokenizer, masked_rows(tokenizer, held, seed=0, rate=.15, max_length=LENGTH)

    def __call__(self, model):
        import numpy as np
        from lab_lm.evals.lm import masked_nats
        return float(np.concatenate(masked_nats(model, self.tokenizer, self.rows)).mean())


# ---- one side in its process

class Gate:
    "Lets training run in stretches, counts its tokens, and stops the clock while something else is done"
    def __init__(self, begin, full): self.begin, self.full, self.elapsed, self.steps, self.tokens, self.started = begin, full, 0., 0, 0, None

    def start(self):
        "Before the first step"
        self.begin(self)
        self.started = time.perf_counter()

    def step(self, tokens, model):
        "After every step; True when training shall stop"
        now = time.perf_counter()
        self.elapsed, self.steps, self.tokens = self.elapsed + now - self.started, self.steps + 1, self.tokens + tokens
        stop = self.full(self, model)
        self.started = time.perf_counter()
        return stop


def rows_for_trainer(train, tokenizer, mode):
    "What the example script feeds its collator: texts joined and cut to blocks, 1,000 texts at a time, or one cut text a row"
    options = dict(return_special_tokens_mask=True, verbose=False)
    if mode == 'lines':
        enc = tokenizer(train, truncation=True, max_length=LENGTH, **options)
        return [dict(zip(enc, row)) for row in zip(*enc.values())]
    rows = []
    for i in range(0, len(train), 1000):
        joined = {k: sum(v, []) for k, v in tokenizer(train[i:i + 1000], **options).items()}
        whole = len(joined['input_ids']) // LENGTH * LENGTH
        rows += [{k: v[j:j + LENGTH] for k, v in joined.items()} for j in range(0, whole, LENGTH)]
    return rows


def same_start(model, rows, tokenizer):
    "Give RoBERTa the head start that ours has, see `lab_lm.nets.start`"
    import numpy as np
    import torch
    from lab_lm.nets.start import token_frequencies
    known = token_frequencies(np.concatenate([row['input_ids'] for row in rows]), len(tokenizer), tokenizer.all_special_ids)
    with torch.no_grad(): model.lm_head.bias.copy_(torch.from_numpy(known).log()), model.lm_head.layer_norm.weight.mul_(.1)


def trainer(side, train, tokenizer, steps, gate):
    "transformers' Trainer, told what the example script tells it or what `side` says"
    import torch
    from transformers import DataCollatorForLanguageModeling, RobertaConfig, RobertaForMaskedLM, Trainer, TrainerCallback, TrainingArguments
    from lab_lm.nets.pretrained import compute_dtype
    torch.manual_seed(side.get('seed', 0))
    model = RobertaForMaskedLM(RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=SHAPE['width'], num_hidden_layers=SHAPE['layers'], num_attention_heads=SHAPE['heads'], intermediate_size=4 * SHAPE['width'],
        max_position_embeddings=LENGTH + 2, type_vocab_size=1, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, hidden_dropout_prob=side['dropout'], attention_probs_dropout_prob=side['dropout']))
    rows, collate, counts = rows_for_trainer(train, tokenizer, side['mode']), DataCollatorForLanguageModeling(tokenizer, mlm_probability=.15), deque()
    if side['start']: same_start(model, rows, tokenizer)

    def counted(rows):
        counts.append(sum(map(lambda row: len(row['input_ids']), rows)))
        return collate(rows)

    class Stretches(TrainerCallback):
        def on_train_begin(self, args, state, control, **kw): gate.start()
        def on_step_end(self, args, state, control, model=None, **kw): control.should_training_stop |= gate.step(counts.popleft(), model)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=side['batch'], learning_rate=side['lr'], warmup_steps=side['warmup'], use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy='group_by_length' if side['grouped'] and side['mode'] == 'lines' else 'random',
            bf16=side['tuned'] and compute_dtype() == torch.bfloat16, save_strategy='no', report_to='none', disable_tqdm=True, seed=side.get('seed', 0))
        Trainer(model, arguments, data_collator=counted, train_dataset=rows, callbacks=[Stretches()]).train()
    return model


def ours(side, train, tokenizer, steps, gate):
    "lab_lm: packed rows, a head only where something is hidden, and the optimiser that `side` names; this is the one place that says how"
    import torch
    from lab_lm.nets.start import start_from, token_frequencies
    from lab_lm.nets.transformer import NATIVE, NetConfig, Transformer
    from lab_lm.text.batches import read_stream, write_stream
    from lab_lm.text.rows import PackedRows, tokens_of
    from lab_lm.train.feed import Feed
    from lab_lm.train.learner import Learner
    from lab_lm.train.objectives import Masked
    from lab_lm.train.schedules import Schedule
    from lab_lm.train.training import Training

    class Stretches:
        def begin(self, learner): gate.start()
        def stepped(self, learner, facts):
            if gate.step(facts['tokens'], learner.model): learner.stop('enough')
    torch.manual_seed(side.get('seed', 0))
    shape = dict(vocab_size=len(tokenizer), mode='masked', max_length=LENGTH, pad_id=tokenizer.pad_token_id, **SHAPE, **NATIVE['masked'])
    model = Transformer(NetConfig(positions='rotary', init=SHAPE['width'] ** -.5, **shape))
    with tempfile.TemporaryDirectory() as folder:
        rows = PackedRows(*read_stream(write_stream(tokens_of(train, tokenizer), f'{folder}/stream', len(tokenizer))), LENGTH)
        if side['start']: start_from(model, token_frequencies(rows.ids, len(tokenizer), tokenizer.all_special_ids))
        feed = Feed(rows, Masked(tokenizer, side['mask'], split=(1., 0., 0.), multiple=64), side['batch'], seed=side.get('seed', 0))
        training = Training(steps=steps, lr=side['lr'], optimizer=side['optimizer'], weight_decay=.1, accumulate=side['accumulate'], schedule=Schedule(name='linear', warmup=side['warmup']), seed=side.get('seed', 0))
        Learner(model, feed, training, callbacks=[Stretches()]).fit()
    return model


def child(side, threads):
    "What a side's process does: obey the parent, one JSON line an answer"
    parent = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # What libraries print goes to the log
    import torch
    import transformers
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    train, held = texts()
    tokenizer = tokenizer_of(train, VOCAB)
    act, judge = dict(trainer=trainer, ours=ours)[side['kind']], Judge(tokenizer, held)
    tell = lambda **answer: print(json.dumps(answer), file=parent, flush=True)
    order = lambda: json.loads(sys.stdin.readline() or '{"do": "end"}')
    tell(ready=True)
    if side['task'] == 'speed': segments(act, side, train, tokenizer, tell, order)
    else: whole_run(act, side, train, tokenizer, judge, tell)
    tell(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, before=before)


def segments(act, side, train, tokenizer, tell, order):
    "Train without end, a segment at a time"
    wanted = {}

    def ask(gate):
        wanted.update(dict(seconds=0) | order())
        gate.elapsed = gate.steps = gate.tokens = 0

    def full(gate, model):
        if gate.elapsed < wanted['seconds']: return False
        tell(tokens=gate.tokens, seconds=gate.elapsed, steps=gate.steps, parameters=sum(p.numel() for p in model.parameters()))
        ask(gate)
        return wanted['do'] == 'end'
    act(side, train, tokenizer, 10**6, Gate(ask, full))


def whole_run(act, side, train, tokenizer, judge, tell):
    "Find how long a step takes, then train for the seconds asked for, judged now and then"
    trial = Gate(lambda gate: None, lambda gate, model: gate.elapsed > min(8., .2 * side['seconds']) and gate.steps > 3)
    act(side, train, tokenizer, 10**6, trial)
    steps, seen = max(4, round(side['seconds'] / (trial.elapsed / trial.steps))), []

    def full(gate, model):
        if gate.steps < steps and gate.elapsed < (len(seen) + 1) * side['seconds'] / side['looks']: return False
        seen.append(dict(seconds=gate.elapsed, steps=gate.steps, tokens=gate.tokens, loss=judge(model)))
        return False
    act(side, train, tokenizer, steps, Gate(lambda gate: None, full))
    tell(seen=seen)


def command(what, value, threads):
    "The words that start a child"
    return [sys.executable, __file__, what, json.dumps(value), '--threads', str(threads), *([SMALL] if SMALL in sys.argv else [])]


class Side:
    "A side's process, as the parent sees it"
    def __init__(self, side, task, threads):
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1', IN_TEST='1')
        environment.pop('GLIBC_TUNABLES', None)
        if side['tuned']: environment['GLIBC_TUNABLES'] = TUNABLES
        self.log = tempfile.TemporaryFile('w+')
        self.process = subprocess.Popen(command('--child', side | dict(task=task), threads), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment)
        self.hear()

    def hear(self):
        line = self.process.stdout.readline()
        if line: return json.loads(line)
        self.log.seek(0)
        sys.exit(self.log.read()[-3000:])

    def ask(self, **order):
        self.process.stdin.write(json.dumps(order) + '\n')
        self.process.stdin.flush()
        return self.hear()

    def end(self):
        "Peak and starting memory in MB"
        out = self.ask(do='end') if self.process.poll() is None else self.hear()
        self.process.wait()
        return out


def one_run(side, seconds, threads, looks=12):
    "A whole training run: what was seen on the way, and the memory"
    running = Side(side | dict(seconds=seconds, looks=looks), 'run', threads)
    seen, memory = running.hear()['seen'], running.hear()
    running.process.wait()
    return seen, memory


# ---- the two measurements

def matrix_rate(threads, seconds=2.):
    "The machine's rate for a matrix product of a layer's shape, GFLOP/s, the best of several"
    import torch
    from lab_lm.nets.pretrained import compute_dtype
    torch.set_num_threads(threads)
    a, b = torch.randn(2048, SHAPE['width'], dtype=compute_dtype()), torch.randn(SHAPE['width'], 4 * SHAPE['width'], dtype=compute_dtype())
    began, best = time.perf_counter(), 0.
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        for _ in range(10): a @ b
        best = max(best, 10 * 2 * a.shape[0] * a.shape[1] * b.shape[1] / (time.perf_counter() - start) / 1e9)
    return best, str(compute_dtype()).removeprefix('torch.')


def flops_per_token(side):
    "Multiplications and additions that a step of ours must do for a token, Newton-Schulz iterations of Muon included"
    from lab_lm.train.muon import muon_flops
    w, layers, inner = SHAPE['width'], SHAPE['layers'], 2 * 32 * round(SHAPE['width'] * 8 / 3 / 64)
    blocks = layers * (4 * w * w + 3 * w * inner)
    attention, head = layers * 2 * LENGTH * w, side['mask'] * (VOCAB * w + w * w)
    muon = layers * muon_flops([(w, w)] * 4 + [(w, inner)] * 3) / (side['batch'] * LENGTH) if side['optimizer'] == 'muon' else 0
    return 6 * (blocks + attention + head) + muon


def profile(side, threads, steps=6):
    "Where our time goes: shares of the CPU time by kind of operation, in a process of its own"
    done = subprocess.run(command('--profile', side | dict(steps=steps), threads), capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS=str(threads), GLIBC_TUNABLES=TUNABLES, IN_TEST='1'))
    if done.returncode: sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


KINDS = {'matrix products': ('mm', 'addmm', 'bmm', 'baddbmm', 'linear', 'mkldnn'), 'attention': ('attention',), 'optimiser (other)': ('adam', '_foreach', 'lerp', 'norm_'),
         'cross-entropy': ('log_softmax', 'nll_loss'), 'activations and norms': ('gelu', 'silu', 'layer_norm', 'rms'), 'embedding': ('embedding', 'index'),
         'copies': ('copy', 'cat', 'clone', 'contiguous', 'fill', 'zero')}


def profiled(side, threads):
    "In the child: profile some steps after two for warming up"
    import torch
    torch.set_num_threads(threads)
    train, _ = texts()
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def full(gate, model):
        if gate.steps == 2: profiler.start()
        if gate.steps == 2 + side['steps']: profiler.stop(); return True
        return False
    ours(side, train, tokenizer_of(train, VOCAB), 10**6, Gate(lambda gate: None, full))
    spent = {}
    for event in profiler.key_averages():
        name = event.key.removeprefix('aten::')
        kind = next((kind for kind, words in KINDS.items() if any(w in name for w in words)), 'all else')
        spent[kind] = spent.get(kind, 0.) + event.self_cpu_time_total
    step = next((e.cpu_time_total for e in profiler.key_averages() if e.key.startswith('Optimizer.step')), 0.)
    total = sum(spent.values())
    print(json.dumps({k: v / total for k, v in sorted(spent.items(), key=lambda kv: -kv[1])} | {'of these, inside the optimiser': step / total}))


def speed(minutes, threads, rounds=5):
    "Real tokens a second of every side, in alternating segments, and their ratios to ours round by round"
    sides = {name: Side(side, 'speed', threads) for name, side in SIDES.items()}
    for side in sides.values(): side.ask(seconds=min(3., minutes * 60 / len(sides) / rounds / 4), do='go')  # To warm up
    seconds = minutes * 60 / len(sides) / (rounds + 1)
    rates = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            answer = side.ask(seconds=seconds, do='go')
            rates[name].append(answer['tokens'] / answer['seconds'])
            side.parameters = answer['parameters']
    memory = {name: side.end() for name, side in sides.items()}
    print(f'\nreal tokens a second, median of {rounds} segments of {seconds:.0f} s, {threads} threads; memory: peak of the process, with {min(m["before"] for m in memory.values()):.0f} MB before the data')
    for name, rate in rates.items():
        ratio = statistics.median(o / r for o, r in zip(rates['lab_lm'], rate))
        print(f'  {name:<40} {statistics.median(rate):8,.0f} ({min(rate):,.0f} to {max(rate):,.0f})  lab_lm {ratio:5.2f} x  {memory[name]["peak"]:6,.0f} MB  {sides[name].parameters / 1e6:.1f} M parameters')
    (peak, dtype), need, own = matrix_rate(threads), flops_per_token(SIDES['lab_lm']), statistics.median(rates['lab_lm'])
    print(f'  matrix products run at {peak:,.0f} GFLOP/s in {dtype}; lab_lm needs {need / 1e6:.0f} MFLOP a token and so uses {own * need / 1e9 / peak:.0%} of that rate')
    print('  where the time of lab_lm goes: ' + ', '.join(f'{k} {v:.0%}' for k, v in profile(SIDES['lab_lm'], threads).items()))


def reached(seen, loss):
    "Seconds until a loss, on the line between two looks; None if never"
    for a, b in zip([None, *seen], seen):
        if b['loss'] <= loss:
            if a is None: return b['seconds']
            share = (a['loss'] - loss) / (a['loss'] - b['loss'])
            return a['seconds'] + share * (b['seconds'] - a['seconds'])
    return None


def well_set(minutes, threads):
    "The Trainer's best rate, then batch, then data mode, by short runs"
    name = lambda s: f"{s['mode']}, rate {s['lr']:g}, batch {s['batch']}"
    tried, seconds = {}, minutes * 60 / 4

    def final(s):
        if name(s) not in tried:
            tried[name(s)] = one_run(s, seconds, threads, looks=1)[0][-1]['loss']
            print(f'  short run of {seconds:.0f} s: {name(s)}: {tried[name(s)]:.3f}', flush=True)
        return tried[name(s)]
    best = WELL_SET | dict(mode='blocks')
    best = min((best | dict(lr=lr) for lr in (3e-4, 7e-4, 1.5e-3)), key=final)
    best = min((best | dict(batch=b) for b in (8, 16, 32)), key=final)
    return min((best, best | dict(mode='lines')), key=final)


def to_loss(minutes, threads):
    "Wall time that ours needs to the final validation loss of each peer"
    peers, rows = {n: s for n, s in SIDES.items() if 'run_mlm' in n}, []
    print(f'\nvalidation loss, nats per hidden token on fixed masks; {threads} threads')
    best = well_set(minutes, threads)
    peers[f"Trainer, well set ({best['mode']}, rate {best['lr']:g}, batch {best['batch']})"] = best
    peers['the same, given our head start'] = best | dict(start=True)
    for name, side in peers.items():
        seen, memory = one_run(side, minutes * 60, threads)
        rows.append((name, seen, 2.5 if side['tuned'] else 10))
        print(f"  {name:<52} {seen[-1]['loss']:.3f} after {seen[-1]['seconds']:.0f} s, {seen[-1]['steps']} steps, {seen[-1]['tokens']:,} tokens; {memory['peak']:,.0f} MB", flush=True)
    for name, seen, part in rows:
        budget, target = seen[-1]['seconds'] / part, seen[-1]['loss']
        own, memory = one_run(SIDES['lab_lm'], budget, threads, looks=48)
        at = reached(own, target)
        said = f'reaches it after {at:.1f} s, {seen[-1]["seconds"] / at:.1f} times as fast' if at else 'does not reach it'
        print(f"  lab_lm, a run of 1/{part:g} of that time ({own[-1]['seconds']:.0f} s), against {name}: {said}; ends at {own[-1]['loss']:.3f} ({target:.3f} wanted); {memory['peak']:,.0f} MB", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', nargs='?', default='all', choices=['speed', 'time', 'all'])
    parser.add_argument('--minutes', type=float, help='speed: of all segments together (6); time: of a default peer (4), all together five times as long')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument(SMALL, action='store_true', help='a toy model on the samples, to see that everything runs')
    parser.add_argument('--ours', type=json.loads, default={}, help='what to change of our side, such as \'{"batch": 32, "lr": 0.002}\'')
    parser.add_argument('--child', type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument('--profile', type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child: return child(given.child, given.threads)
    if given.profile: return profiled(given.profile, given.threads)
    SIDES['lab_lm'].update(given.ours)
    began = time.perf_counter()
    tokenizer_of(texts()[0], VOCAB)
    if given.what in ('speed', 'all'): speed(given.minutes or 6, given.threads)
    if given.what in ('time', 'all'): to_loss(given.minutes or 4, given.threads)
    print(f'  {(time.perf_counter() - began) / 60:.1f} minutes in all')


if __name__ == '__main__': main()
