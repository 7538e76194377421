"""Claim: writing a model as a GGUF file takes at most 1.3 times as long as copying the same bytes (16-bit types), and never holds more than
1.5 times the largest tensor plus 300 MB. Peer: a plain copy of the finished file, in the same run; llama.cpp's own converter where its script is given.

    python bench/export.py --small                     # 40M parameters, some seconds
    python bench/export.py                             # Gemma 3 1B by its shape, random weights in bf16, 262,144 pieces; 8 GB of disk in --folder
    python bench/export.py --quants f16,q8_0,q4_k_m --converter path/to/convert_hf_to_gguf.py --pieces path/to/gemma.spm

The folder is made tensor by tensor and kept between runs. Every file is written by a process of its own, whose peak memory is the one the system
reports, Python, torch and transformers included; times are taken inside it, from the call to the last byte on the disk (fsync), and so are the copy's. The tokenizer is a fixed cost of its own (a Gemma's 262,144
pieces are loaded, checked against what llama.cpp will do with them, and written), so it is timed apart; cpu is processor time, which a busy machine changes less.
"""
import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

ONE_B = dict(vocab_size=262_144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1, head_dim=256)
SMALL = dict(vocab_size=32_768, hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=1, head_dim=128)


def pieces(size):
    "A tokenizer of Gemma's form and size: specials, bytes, and words of up to four letters with every way to build them"
    from transformers import GemmaTokenizer

    from lab_lm.nets.tiny import GEMMA_CHAT, GEMMA_SPECIALS
    letters = 'abcdefghijklmnopqrstuvwxyz'
    names = [*GEMMA_SPECIALS, *(f'<0x{b:02X}>' for b in range(256)), '▁', *letters]
    words = [''.join(w) for n in (2, 3, 4) for w in product(letters, repeat=n)][:size - len(names)]
    known = set(names) | set(words)
    merges = [(w[:i], w[i:]) for w in words for i in range(1, len(w)) if w[:i] in known and w[i:] in known]
    return GemmaTokenizer(vocab={p: i for i, p in enumerate(names + words)}, merges=merges, add_bos_token=True, chat_template=GEMMA_CHAT,
                          extra_special_tokens=list(GEMMA_SPECIALS[5:]))


def make(folder, shape):
    "A Gemma 3 folder with random weights in bf16, written one tensor at a time"
    import numpy as np
    from transformers import Gemma3TextConfig

    from lab_lm.gen.architectures import ARCHITECTURES, places
    config = Gemma3TextConfig(**shape, query_pre_attn_scalar=shape['head_dim'], sliding_window=512, bos_token_id=2, eos_token_id=[1, 6], pad_token_id=0,
                              layer_types=['full_attention' if (i + 1) % 6 == 0 else 'sliding_attention' for i in range(shape['num_hidden_layers'])])
    config.architectures = ['Gemma3ForCausalLM']
    config.save_pretrained(folder), pieces(shape['vocab_size']).save_pretrained(folder)
    kind, rng, header, at = ARCHITECTURES['Gemma3ForCausalLM'], np.random.default_rng(0), {}, 0
    sizes = {'model.embed_tokens.weight': (config.vocab_size, config.hidden_size), 'model.norm.weight': (config.hidden_size,)}
    sizes |= {f'model.layers.{i}.{p.source}': p.shape for i in range(config.num_hidden_layers) for p in kind.layer(config)}
    table = places(config, sizes, kind)
    for place in table:
        size = 2 * int(np.prod(place.shape))
        header[place.source], at = dict(dtype='BF16', shape=list(place.shape), data_offsets=[at, at + size]), at + size
    head = json.dumps(header).encode()
    head += b' ' * (-len(head) % 8)
    with open(folder / 'model.safetensors', 'wb') as out:
        out.write(len(head).to_bytes(8, 'little') + head)
        for place in table:
            for row in range(0, place.shape[0], 8192):
                part = (min(8192, place.shape[0] - row), *place.shape[1:])
                out.write((rng.standard_normal(part, np.float32) * .02).view(np.uint32).__rshift__(16).astype(np.uint16).tobytes())


def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(what, source, target):
    "One measured run, told as JSON"
    import os
    found = dict(tokenizer=0.)
    if what == 'copy':
        start, cpu = time.perf_counter(), time.process_time()
        shutil.copyfile(source, target)
        with open(target, 'rb') as file: os.fsync(file.fileno())
    else:
        import transformers  # noqa: F401

        from lab_lm.gen import gguf as writer
        fields = writer._fields
        def timed(*parts):
            before = time.perf_counter()
            out = fields(*parts)
            found['tokenizer'] = time.perf_counter() - before
            return out
        writer._fields = timed
        start, cpu = time.perf_counter(), time.process_time()
        writer.write_gguf(source, target, what)
    print(json.dumps(dict(found, seconds=time.perf_counter() - start, cpu=time.process_time() - cpu, peak=peak())))


def measured(what, source, target, times=2):
    "The fastest of some runs"
    found = [json.loads(subprocess.run([sys.executable, __file__, '--child', what, str(source), str(target)], check=True, stdout=subprocess.PIPE).stdout) for _ in range(times)]
    return min(found, key=lambda f: f['seconds'])


def converter(script, pieces, folder, target):
    "llama.cpp's own converter, F16, on the same weights; it reads a Gemma's tokenizer as a SentencePiece model only, and fills it up to the vocabulary"
    with tempfile.TemporaryDirectory() as there:
        for file in folder.iterdir(): (Path(there) / file.name).symlink_to(file.resolve())
        shutil.copyfile(pieces, Path(there) / 'tokenizer.model')
        return converted(script, there, target)


def converted(script, folder, target):
    start = time.perf_counter()
    subprocess.run([sys.executable, str(script), str(folder), '--outfile', str(target), '--outtype', 'f16'], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return dict(seconds=time.perf_counter() - start, peak=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--small', action='store_true')
    parser.add_argument('--folder', type=Path, default=Path(tempfile.gettempdir()) / 'lab_lm-export')
    parser.add_argument('--quants', default='bf16,f16,q8_0')
    parser.add_argument('--times', type=int, default=2)
    parser.add_argument('--converter', type=Path)
    parser.add_argument('--pieces', type=Path, help='a SentencePiece model with the specials of Gemma 3, for the converter')
    parser.add_argument('--child', nargs=3)
    args = parser.parse_args()
    if args.child: return child(args.child[0], Path(args.child[1]), Path(args.child[2]))
    shape = SMALL if args.small else ONE_B
    folder = args.folder / ('small' if args.small else '1b')
    if not (folder / 'model.safetensors').exists():
        folder.mkdir(parents=True, exist_ok=True)
        make(folder, shape)
    largest = 2 * shape['vocab_size'] * shape['hidden_size']
    print(f"{'':10} {'MB':>8} {'seconds':>8} {'tokenizer':>9} {'weights':>8} {'copy':>8} {'weights/copy':>12} {'all/copy':>8} {'cpu':>6} {'cpu copy':>8} {'peak MB':>8} {'limit':>6}")
    for quant in args.quants.split(','):
        target = folder / f'{quant}.gguf'
        ours = measured(quant, folder, target, args.times)
        copy = measured('copy', target, folder / 'copy.gguf', args.times)
        rest = ours['seconds'] - ours['tokenizer']
        print(f"{quant:10} {target.stat().st_size / 1e6:8.1f} {ours['seconds']:8.2f} {ours['tokenizer']:9.2f} {rest:8.2f} {copy['seconds']:8.2f} "
              f"{rest / copy['seconds']:12.2f} {ours['seconds'] / copy['seconds']:8.2f} {ours['cpu']:6.1f} {copy['cpu']:8.1f} {ours['peak'] / 1e6:8.0f} {(1.5 * largest + 300e6) / 1e6:6.0f}")
        (folder / 'copy.gguf').unlink(), target.unlink()
    if args.converter:
        found = converter(args.converter, args.pieces, folder, folder / 'theirs.gguf')
        print(f"{'converter':10} {(folder / 'theirs.gguf').stat().st_size / 1e6:8.1f} {found['seconds']:8.2f} {'':8} {'':6} {found['peak'] / 1e6:8.0f}")
        (folder / 'theirs.gguf').unlink()


if __name__ == '__main__': main()
