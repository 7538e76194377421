"""Claim: merging a LoRA adapter tensor by tensor needs less memory and no more time than loading the model, peft's merge_and_unload and save_pretrained.

    python bench/adapters.py                 # Gemma 3 1B by configuration, random bf16 weights, rank 16 on all linear layers
    python bench/adapters.py --small         # a twentieth of it

Each way runs in a process of its own. Memory is what the process holds privately (RssAnon), sampled every 5 ms, above what it holds after its imports; the pages of the base's own file, which the system can drop at any time, are
not counted for either. Both write fp32, and their files are compared number by number.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

SIZES = dict(whole=dict(vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1, head_dim=256),
             small=dict(vocab_size=65536, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=1, head_dim=128))


def make(folder, size):
    "A base of random bf16 weights, a file a layer, and an adapter"
    from safetensors.torch import save_file
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    config = Gemma3TextConfig(query_pre_attn_scalar=SIZES[size]['head_dim'], architectures=['Gemma3ForCausalLM'], **SIZES[size])
    config.save_pretrained(folder / 'base')
    with torch.device('meta'): model = Gemma3ForCausalLM(config)
    parts, adapter = {}, {}
    for name, p in model.named_parameters(): parts.setdefault('.'.join(name.split('.')[:3]), {})[name] = p.shape
    for i, (part, shapes) in enumerate(parts.items()):
        save_file({n: torch.randn(s, dtype=torch.bfloat16) * .02 for n, s in shapes.items()}, folder / 'base' / f'model-{i:05}-of-{len(parts):05}.safetensors', {'format': 'pt'})
    where = {n: f'model-{i:05}-of-{len(parts):05}.safetensors' for i, shapes in enumerate(parts.values()) for n in shapes}
    (folder / 'base' / 'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map=where)))
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != 'lm_head':
            for x, shape in dict(A=(16, layer.in_features), B=(layer.out_features, 16)).items(): adapter[f'base_model.model.{name}.lora_{x}.weight'] = torch.randn(shape) * .02
    (folder / 'adapter').mkdir()
    save_file(adapter, folder / 'adapter' / 'adapter_model.safetensors', {'format': 'pt'})
    names = sorted({n.split('.')[-3] for n in adapter})
    (folder / 'adapter' / 'adapter_config.json').write_text(json.dumps(dict(peft_type='LORA', task_type='CAUSAL_LM', r=16, lora_alpha=32, target_modules=names)))
    return sum(p.numel() for p in model.parameters())


def ours(base, adapter, out, path):
    from lab_lm.nets.merge import merge_lora
    merge_lora(base, adapter, out, path=path)


def theirs(base, adapter, out):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


def held():
    "Private memory of this process in MB"
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('RssAnon')) / 1024


def child(way, folder):
    "One way, timed, its memory watched"
    import bitsandbytes, peft, transformers  # noqa: F401 (loaded before the clock starts)
    from transformers import Gemma3ForCausalLM  # noqa: F401
    torch.set_num_threads(1)
    before, most, done = held(), [0.], threading.Event()
    def watch():
        while not done.wait(.005): most[0] = max(most[0], held())
    watcher = threading.Thread(target=watch)
    watcher.start()
    start, base, adapter, out = time.perf_counter(), folder / 'base', folder / 'adapter', folder / way
    theirs(base, adapter, out) if way == 'peft' else ours(base, adapter, out, way)
    seconds = time.perf_counter() - start
    done.set(), watcher.join()
    print(json.dumps(dict(way=way, seconds=round(seconds, 1), peak_mb=round(most[0] - before))))


def differences(one, two):
    "The largest difference between two folders of weights"
    from safetensors import safe_open
    read = lambda folder: {k: f for p in sorted(folder.glob('*.safetensors')) for f in [safe_open(p, 'pt')] for k in f.keys()}
    a, b = read(one), read(two)
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max(float((a[k].get_tensor(k) - b[k].get_tensor(k)).abs().max()) for k in a)


if __name__ == '__main__':
    ask = argparse.ArgumentParser()
    ask.add_argument('--small', action='store_true')
    ask.add_argument('--child', nargs=2)
    ask = ask.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    if ask.child: child(ask.child[0], Path(ask.child[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{make(Path(folder), 'small' if ask.small else 'whole') / 1e6:.0f} M weights")
            for way in ('peft', 'full', 'nf4'): print(subprocess.run([sys.executable, __file__, '--child', way, folder], check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1], flush=True)
            print('largest difference of a merged weight, full against peft:', differences(Path(folder) / 'full', Path(folder) / 'peft'))
