"""What each quantisation takes from a trained model, measured in llama.cpp on held-out Hindi and Tamil; and our quantiser beside llama.cpp's own

    python bench/quants.py train [--minutes 12]   a Llama of 12 million weights on Wikipedia paragraphs, kept in a
                                                  temporary folder; a second call trains on
    python bench/quants.py loss [--tokens 1500]   Kullback-Leibler divergence from the F16 file, with and without an importance matrix,
                                                  with our blocks and with those of llama.cpp's quantiser
    python bench/quants.py speed                  MB of fp32 weights a second on one thread, and the error, beside llama.cpp's quantiser
    python bench/quants.py all                    one after the other

`--small` makes everything tiny: it shows that the script runs, and its numbers mean nothing.

Claim: KL in nats a token, Q8_0 <= 0.003, Q6_K <= 0.01, Q5_K_M <= 0.02, Q4_K_M <= 0.06. Peer: llama.cpp's own quantiser, block by block in the same
process, through the library inside the package xllamacpp (the same code that its command line tool calls).
"""
import argparse
import ctypes
import json
import sys
import tempfile
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np

SMALL = '--small' in sys.argv
HOME = Path(tempfile.gettempdir()) / 'lab_lm_bench' / ('quants-small' if SMALL else 'quants')
SHAPE = dict(width=256, layers=2, heads=4, kv_heads=2, hidden=256) if SMALL else dict(width=256, layers=12, heads=4, kv_heads=4, hidden=768)
VOCAB, LENGTH, ROWS = (1200, 64, 4) if SMALL else (8000, 128, 8)
BARS = dict(q8_0=.003, q6_k=.01, q5_k_m=.02, q4_k_m=.06)
LANGS = 'hi', 'ta'


def texts():
    "Training and held-out paragraphs of each language; one in twenty is held out, by its checksum"
    from lab_lm.core.paths import shared_data
    from lab_lm.text.sources import read_records
    from lab_lm.text.streams import read_text_lines
    held, out = lambda text: zlib.crc32(text.encode()) % 20 == 0, {}
    for lang in LANGS:
        file = None if SMALL else shared_data(f'text/wiki_{lang}.txt.gz')
        every = [t for _, t in read_text_lines(file) if t.strip()] if file else [r.text for r in read_records('data/samples', lang)]
        out[lang] = [t for t in every if not held(t)], [t for t in every if held(t)]
    return out


# ---- a model that has learned something

def train(minutes):
    "Train for about so long, from what an earlier call left if there is something; save the model as a Llama"
    from lab_lm.core.files import append_line, read_lines
    from lab_lm.nets.native import load, save
    from lab_lm.text.batches import read_stream
    from lab_lm.text.rows import PackedRows
    from lab_lm.train.feed import Feed
    from lab_lm.train.learner import Learner
    from lab_lm.train.objectives import Causal
    from lab_lm.train.schedules import Schedule
    from lab_lm.train.training import Training
    tokenizer, fresh = beginning()
    rounds, stream = len(read_lines(HOME / 'rounds.jsonl')), PackedRows(*read_stream(HOME / 'tokens'), LENGTH)

    def learn(model, steps):
        how = Training(steps=steps, lr=1e-2, optimizer='muon', weight_decay=.1, schedule=Schedule(name='cosine'))
        return Learner(model, Feed(stream, Causal(), ROWS, seed=rounds), how).fit()

    learn(fresh(), 2) # Warm
    clock = time.perf_counter()
    learn(fresh(), 4) # To know how many steps there is time for
    steps = max(8, int(60 * minutes / ((time.perf_counter() - clock) / 4)))
    model = load(HOME / 'model') if rounds else fresh()
    print(f'{sum(p.numel() for p in model.parameters()):,} weights, {len(stream.ids):,} tokens, round {rounds}: {steps} steps of {ROWS * LENGTH} tokens', flush=True)
    losses = [row['loss'] for row in learn(model, steps)]
    print(f'loss {losses[0]:.2f} at first, {np.mean(losses[-20:]):.2f} in the last 20 steps')
    print(save(model, HOME / 'model', tokenizer))
    append_line(HOME / 'rounds.jsonl', json.dumps(dict(steps=steps, tokens=steps * ROWS * LENGTH, loss=float(np.mean(losses[-20:])))))


def beginning():
    "The tokenizer, and a function that makes the untrained model; tokens on the disk"
    from lab_lm.core.seed import seeded
    from lab_lm.nets.transformer import NetConfig, Transformer
    from lab_lm.text.batches import write_stream
    from lab_lm.text.rows import tokens_of
    from lab_lm.text.tokenize import load_tokenizer, train_tokenizer
    HOME.mkdir(parents=True, exist_ok=True)
    lines = [t for first, _ in texts().values() for t in first]
    if not (HOME / 'tokenizer').is_dir(): train_tokenizer(lines, 'akshara_bpe', VOCAB).save_pretrained(HOME / 'tokenizer')
    tokenizer = load_tokenizer(HOME / 'tokenizer')
    with seeded(0): np.random.shuffle(lines)
    if not (HOME / 'tokens').is_dir(): write_stream(tokens_of(lines, tokenizer), HOME / 'tokens', len(tokenizer))

    def fresh():
        with seeded(0): return Transformer(NetConfig(vocab_size=len(tokenizer), mode='causal', pad_id=tokenizer.pad_token_id, max_length=512, **SHAPE))
    return tokenizer, fresh


# ---- what quantisation takes

def rows_of(tokens):
    "Held-out token ids of each language, one row a text, about `tokens` in all"
    from lab_lm.text.tokenize import load_tokenizer
    tokenizer, out = load_tokenizer(HOME / 'model'), {}
    for lang, (_, held) in texts().items():
        rows, left = [], tokens // len(LANGS)
        for ids in sorted((tokenizer(t).input_ids[:LENGTH] for t in held), key=lambda ids: zlib.crc32(bytes(str(ids), 'ascii'))):
            if left > 0 and len(ids) > 16: rows.append(ids); left -= len(ids) - 1
        out[lang] = rows
    return out


def log_probabilities(path, rows):
    "What llama.cpp expects at every place of every row: float32 [places, vocabulary]"
    from lab_lm.gen.llama import Llama, llama_logprobs
    with Llama(path, context=512) as llama: return np.concatenate([llama_logprobs(llama, ids[:-1]) for ids in rows])


def kl(first, other):
    "Mean KL in nats a token, the half width of its 95 % interval, and the share of places with the same favourite"
    each = (np.exp(first.astype(np.float64)) * (first.astype(np.float64) - other)).sum(1)
    return each.mean(), 1.96 * each.std() / len(each) ** .5, float((first.argmax(1) == other.argmax(1)).mean())


def loss(tokens):
    "A table: quantisation, importance, size, KL by language"
    from lab_lm.gen.gguf import write_gguf
    from lab_lm.gen.importance import importance
    from lab_lm.nets.pretrained import load_model
    if not (HOME / 'model').is_dir(): train(.2 if SMALL else 12)
    model, tokenizer = load_model(HOME / 'model')
    spoken = {lang: first[:400] for lang, (first, _) in texts().items()}
    clock = time.perf_counter()
    found = importance(model, tokenizer, [t for pair in zip(*spoken.values()) for t in pair], length=LENGTH, tokens=20_000)
    print(f'importance from 20,000 tokens of training text: {time.perf_counter() - clock:.0f} s')
    rows = rows_of(tokens)
    whole = {lang: log_probabilities(write_gguf(HOME / 'model', HOME / 'f16.gguf', 'f16'), r) for lang, r in rows.items()}
    for lang, r in rows.items():
        truth = np.concatenate([np.array(ids[1:]) for ids in r])
        print(f'{lang}: {len(truth)} places, loss of the F16 file {-whole[lang][np.arange(len(truth)), truth].mean():.3f} nats a token')
    size = (HOME / 'f16.gguf').stat().st_size
    for quant, bar in BARS.items():
        for name, given in (('none', None), ('hi + ta', found))[:1 if quant == 'q8_0' else 2]:
            for side in ('ours', 'llama.cpp'):
                path = HOME / f'{quant}.gguf'
                with blocks_by(side): write_gguf(HOME / 'model', path, quant, importance=given)
                cells = [kl(whole[lang], log_probabilities(path, r)) for lang, r in rows.items()]
                mean = np.mean([c[0] for c in cells])
                words = ', '.join(f'{lang} {c[0]:.6f} +- {c[1]:.6f} (same favourite {c[2]:.1%})' for lang, c in zip(rows, cells))
                print(f'{quant:7} importance {name:8} blocks by {side:9} {path.stat().st_size / size:4.0%} of F16  {words}  '
                      f'mean {mean:.6f}, bar {bar}: {"met" if mean <= bar else "MISSED"}', flush=True)


@contextmanager
def blocks_by(side):
    "Inside the block files are written with our blocks or with those of llama.cpp's quantiser"
    from lab_lm.gen import gguf
    before, theirs = gguf.quantise, llama_quantiser()
    if side != 'ours': gguf.quantise = lambda values, kind, importance=None: theirs(np.ascontiguousarray(values), kind, importance)
    try: yield
    finally: gguf.quantise = before


# ---- speed

def llama_quantiser():
    "A function from values, type and importance to bytes: llama.cpp's own"
    import gguf
    import xllamacpp
    from lab_lm.gen.blocks import BLOCKS
    chunk = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob('xllamacpp*.so')))).ggml_quantize_chunk
    chunk.restype, chunk.argtypes = ctypes.c_size_t, [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def ask(values, kind, weights=None):
        (rows, cols), (block, size) = values.shape, BLOCKS[kind]
        out = np.empty((rows, cols // block * size), np.uint8)
        chunk(int(gguf.GGMLQuantizationType[kind]), values.ctypes.data, out.ctypes.data, 0, rows, cols, None if weights is None else weights.ctypes.data)
        return out
    return ask


def speed():
    "A table: type, MB/s and error of both quantisers"
    import gguf
    from lab_lm.gen.blocks import BLOCKS, quantise
    theirs, rng = llama_quantiser(), np.random.default_rng(0)
    values = rng.standard_t(6, (64 if SMALL else 2048, 1024)).astype('float32') * np.float32(.02)
    weight = rng.gamma(.5, size=1024).astype('float32')
    print(f'{values.nbytes / 1e6:.0f} MB of fp32, heavy-tailed; best of 3, alternating, processor time of one thread')
    for kind in (k for k, (block, _) in BLOCKS.items() if block > 1):
        for name, given in (('none', None), ('random', weight))[:1 if kind == 'Q8_0' else 2]:
            best, errors = {}, {}
            for _ in range(3):
                for side, do in (('ours', quantise), ('llama.cpp', theirs)):
                    clock = time.thread_time()
                    data = do(values, kind, given)
                    best[side] = min(best.get(side, 1e9), time.thread_time() - clock)
                    off = (gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]) - values) ** 2
                    errors[side] = float(np.mean(off if given is None else off * given)) ** .5
            rates = {side: values.nbytes / 1e6 / t for side, t in best.items()}
            print(f'{kind:5} importance {name:7} ours {rates["ours"]:6.0f} MB/s, llama.cpp {rates["llama.cpp"]:6.0f} MB/s; '
                  f'error {errors["ours"] / errors["llama.cpp"]:.3f} of llama.cpp\'s', flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['train', 'loss', 'speed', 'all'])
    parser.add_argument('--minutes', type=float, default=.2 if SMALL else 12)
    parser.add_argument('--tokens', type=int, default=200 if SMALL else 1500)
    parser.add_argument('--small', action='store_true')
    given = parser.parse_args()
    if given.what in ('train', 'all'): train(given.minutes)
    if given.what in ('loss', 'all'): loss(given.tokens)
    if given.what in ('speed', 'all'): speed()
