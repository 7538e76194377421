"""Time and memory of QLoRA fine-tuning here, against peft with transformers' Trainer: same 4-bit base, same adapter, same chats, one run

    python bench/qlora.py              # on a CUDA card: a Gemma 3 1B by configuration, random weights
    python bench/qlora.py --small      # on any machine: four layers of 256
    python bench/qlora.py --steps 40 --checkpointing

The claim: for the same tokens of chats, a step here takes less time and less memory at its peak, because chats are packed, and the vocabulary is asked only where there is an answer. The base is random, so nothing is said about what is
learnt; that both sides compute the same loss is printed, as the loss of the first batch. Peers: the Trainer with padded rows in random order, as most recipes run it, and the same grouped by length. Both have fused AdamW and the fast type
of the machine. A chat has 16 to 512 tokens (log-normal, median 150), 40 % of them answer. Each side runs in a process of its own. Time is per real token of chats, padding not counted, after three steps of warm-up:
the clock's on a card, the process's own on the CPU, which other work on the machine disturbs less; the memory is what torch held at most on a card, and on the CPU the highest resident size of the process above that before the base was loaded.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

os.environ |= dict(TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1')
LENGTH, WARM = 512, 3
SIDES = ('Trainer, random order', 'Trainer, grouped by length', 'lab_lm, padded', 'lab_lm, packed')


def base(folder, small):
    "A Gemma 3 with random weights on the disk, written in bf16 and layer by layer kept in memory only once"
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    size = dict(vocab_size=16384, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=1, head_dim=64, query_pre_attn_scalar=64) if small else dict(
        vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Gemma3ForCausalLM(Gemma3TextConfig(**size, sliding_window=512, max_position_embeddings=1024)).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    return size['vocab_size']


def chats(n, vocab):
    "Encoded chats of random tokens"
    rng, out = np.random.default_rng(0), []
    for size in rng.lognormal(np.log(150), .6, n).clip(16, LENGTH).astype(int):
        ids = rng.integers(5, vocab, size).tolist()
        out.append(dict(input_ids=ids, labels=[-100] * int(.6 * size) + ids[int(.6 * size):]))
    return out


def resident(key): return 1024 * int(re.search(key + r':\s+(\d+)', Path('/proc/self/status').read_text())[1])


def loaded(folder, checkpointing):
    "The base in 4 bits with an adapter of rank 16 on every matrix of the layers"
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from lab_lm.nets.pretrained import compute_dtype, quiet
    kind = compute_dtype()
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, quantization_config=config, device_map={'': 'cuda:0' if torch.cuda.is_available() else 'cpu'})
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=dict(use_reentrant=False) if checkpointing else None)
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules='all-linear', task_type='CAUSAL_LM')), kind


class Clock:
    "When each step ended, and how many real tokens it had"
    def __init__(self): self.ends, self.tokens = [], []

    def end(self):
        if torch.cuda.is_available(): torch.cuda.synchronize()
        self.ends.append(time.perf_counter() if torch.cuda.is_available() else time.process_time())

    def result(self):
        took = [(b - a) / n for a, b, n in zip(self.ends[WARM - 1:], self.ends[WARM:], self.tokens[WARM:])]
        total = sum(self.tokens[WARM:len(self.ends)])
        return dict(micro=1e6 * (self.ends[-1] - self.ends[WARM - 1]) / total, median=1e6 * statistics.median(took), tokens=total / (len(self.ends) - WARM))


def trainer(model, kind, rows, args, grouped, clock):
    "transformers' Trainer on padded rows"
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from lab_lm.text.chat import collate

    class Ticks(TrainerCallback):
        def on_step_end(self, *_, **__): clock.end()

    def counted(some):
        batch = collate(some, 0)
        clock.tokens.append(int(batch['attention_mask'].sum()))
        return batch
    with tempfile.TemporaryDirectory() as folder:
        how = TrainingArguments(output_dir=folder, per_device_train_batch_size=args.batch, max_steps=args.steps, learning_rate=2e-4, bf16=kind == torch.bfloat16, optim='adamw_torch_fused',
                                train_sampling_strategy='group_by_length' if grouped else 'random', report_to='none', save_strategy='no', logging_steps=1, disable_tqdm=True, remove_unused_columns=False,
                                gradient_checkpointing=args.checkpointing, gradient_checkpointing_kwargs=dict(use_reentrant=False), use_cpu=not torch.cuda.is_available(), label_names=['labels'])
        one = Trainer(model, how, data_collator=counted, train_dataset=rows, callbacks=[Ticks()])
        one.remove_callback(__import__('transformers').trainer_callback.PrinterCallback)
        one.train()


def ours(model, rows, args, packed, clock):
    "The learner of this house"
    from lab_lm.nets.door import Door
    from lab_lm.text.chat_rows import ChatRows
    from lab_lm.train.callbacks import Callback
    from lab_lm.train.feed import Feed
    from lab_lm.train.learner import Learner, Training
    from lab_lm.train.objectives import Answers

    class Ticks(Callback):
        def stepped(self, learner, facts): clock.tokens.append(facts['tokens']), clock.end()
    mean = statistics.fmean(len(r['input_ids']) for r in rows)
    size = max(1, round(args.batch * mean / LENGTH)) if packed else args.batch # About the same tokens in a step
    training = Training(steps=args.steps, lr=2e-4, checkpointing=args.checkpointing)
    Learner(Door(model), Feed(ChatRows(rows, LENGTH, packed=packed), Answers(), size), training, callbacks=[Ticks()]).fit()


def first_loss(model, rows, kind, side):
    "The loss of the first sixteen chats, as each side computes it"
    from lab_lm.nets.door import Door
    from lab_lm.text.chat import collate
    from lab_lm.text.chat_rows import ChatRows
    from lab_lm.train.objectives import Answers
    device, some = next(model.parameters()).device, rows[:16]
    with torch.no_grad(), torch.autocast(device.type, kind, enabled=kind == torch.bfloat16):
        if side.startswith('Trainer'): return model(**{k: v.to(device) for k, v in collate(some, 0).items()}).loss.item()
        packed = ChatRows(some, LENGTH, packed='packed' in side)
        size = packed.batches(1) if packed.packed else 16
        return Door(model)(**{k: v.to(device) for k, v in Answers()(packed.batch(0, size)).items()}).loss.item()


def child(args):
    "One side: its figures as a line of JSON"
    rows, clock = chats(400, args.vocab), Clock()
    torch.ones(2, requires_grad=True).sum().backward()
    import accelerate, bitsandbytes, peft, transformers  # noqa: E401, F401
    before = resident('VmRSS')
    model, kind = loaded(args.base, args.checkpointing)
    if args.loss: return print(json.dumps(first_loss(model, rows, kind, args.side)))
    if args.side.startswith('Trainer'): trainer(model, kind, rows, args, 'grouped' in args.side, clock)
    else: ours(model, rows, args, 'packed' in args.side, clock)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident('VmHWM') - before
    print(json.dumps(clock.result() | dict(peak=peak)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--small', action='store_true'), parser.add_argument('--steps', type=int, default=20), parser.add_argument('--batch', type=int, default=16, help='chats in a step')
    parser.add_argument('--checkpointing', action='store_true'), parser.add_argument('--side'), parser.add_argument('--base'), parser.add_argument('--vocab', type=int), parser.add_argument('--loss', action='store_true')
    args = parser.parse_args()
    if args.side: return child(args)
    if not args.small and not torch.cuda.is_available(): print('no CUDA card here: the small model on the CPU instead'); args.small = True
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads'
    with tempfile.TemporaryDirectory() as folder:
        args.vocab = base(folder, args.small)
        print(f"{'four layers of 256' if args.small else 'Gemma 3 1B'}, {where}, {args.batch} chats a step{', layers computed twice' if args.checkpointing else ''}")
        print(f"{'':28}{'µs/token':>10}{'median':>9}{'tokens/step':>13}{'peak MiB':>10}{'first loss':>12}", flush=True)
        for side in SIDES:
            call = [sys.executable, __file__, '--side', side, '--base', folder, '--vocab', str(args.vocab), '--steps', str(args.steps), '--batch', str(args.batch)]
            found = []
            for more in ([], ['--loss']): # The first batch is looked at in a process of its own, so that it does not count in the memory
                done = subprocess.run(call + ['--checkpointing'] * args.checkpointing + more, capture_output=True, text=True)
                if done.returncode: raise SystemExit(done.stderr[-3000:])
                found.append(json.loads(done.stdout.splitlines()[-1]))
            figures, loss = found
            print(f"{side:28}{figures['micro']:>10.1f}{figures['median']:>9.1f}{figures['tokens']:>13.0f}{figures['peak'] / 2**20:>10.0f}{loss:>12.5f}", flush=True)


if __name__ == '__main__': main()
