"""A large contrastive batch through chunks: memory, time and gradient against the whole batch at once and against sentence-transformers' cached loss

    python bench/contrastive.py --small
    python bench/contrastive.py

The claim: with `chunk` a step needs a fraction of the memory of the whole batch, gives its gradient, and takes about a third more time. The peer that does the same is CachedMultipleNegativesRankingLoss
(GradCache, Gao et al. 2021); its backward pass runs inside the loss, which needs less memory still, where ours is one graph that a data-parallel wrapper can follow.
A BERT of random weights without dropout, random tokens of 16 to 64, all rows padded to 64, one thread. Each system runs in a process of its own, one step after the other in turn,
so that a busy machine slows all alike; time is CPU time of a step, the median; memory is the highest resident size above that before the first step, after a step of four pairs.
"""
import json
import os
import resource
import statistics
import subprocess
import sys
import time

for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[name] = '1'
os.environ |= dict(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', IN_TEST='1')

SYSTEMS = ('whole', 'chunks', 'cached')


def world(rows):
    "An encoder and a batch, the same in every process"
    import torch
    from transformers import BertConfig, BertModel
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = dict(vocab_size=2000, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512, max_position_embeddings=64)
    body = BertModel(BertConfig(**shape, hidden_dropout_prob=0., attention_probs_dropout_prob=0.), add_pooling_layer=False).train()
    lengths, batch = torch.randint(16, 65, (2, rows)), {}
    for name, some in zip(('query', 'positive'), lengths):
        mask = (torch.arange(64) < some[:, None]).long()
        batch |= {f'{name}_ids': torch.randint(5, 2000, (rows, 64)) * mask, f'{name}_mask': mask}
    return body, batch


def mean(body, ids, mask): return (body(input_ids=ids, attention_mask=mask)[0] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def stepper(system, rows, chunk):
    "A function that does one step and returns the loss, and the parameters"
    import torch
    body, batch = world(rows)
    if system == 'cached':
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
        class Model(torch.nn.Module):
            def __init__(self): super().__init__(); self.body = body
            def forward(self, features): return dict(sentence_embedding=mean(body, features['input_ids'], features['attention_mask']))
        loss = CachedMultipleNegativesRankingLoss(torch.nn.Sequential(Model()), mini_batch_size=chunk)
        features = lambda: [dict(input_ids=batch[f'{k}_ids'], attention_mask=batch[f'{k}_mask']) for k in ('query', 'positive')]
        def run(): return loss(features(), None)
    else:
        from lab_lm.train.contrastive import Contrastive
        class Encoder(torch.nn.Module):
            def __init__(self): super().__init__(); self.body = body
            def forward(self, ids, mask): return mean(body, ids, mask)
        model = Contrastive(Encoder(), chunk=chunk if system == 'chunks' else 0)
        def run(): return model(**batch).loss
    def step():
        body.zero_grad(set_to_none=True)
        loss = run()
        loss.backward()
        return loss.item()
    return step, body


def serve(system, rows, chunk):
    "One step for each line of the input; at the end the gradient, on the disk"
    import torch
    stepper(system, 4, 2)[0]() # What is imported and set up at the first use counts for nobody
    step, body = stepper(system, rows, chunk)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print('ready', flush=True)
    for line in sys.stdin:
        start = time.process_time()
        loss = step()
        print(json.dumps(dict(seconds=time.process_time() - start, loss=loss, megabytes=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)), flush=True)
    torch.save(torch.cat([p.grad.flatten() for p in body.parameters() if p.grad is not None]), f'{sys.argv[5]}/{system}.pt')


def main(rows, chunk, steps):
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        words = lambda system: [sys.executable, __file__, 'serve', system, str(rows), str(chunk), folder]
        running = {s: subprocess.Popen(words(s), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for s in SYSTEMS}
        for process in running.values():
            while process.stdout.readline().strip() != 'ready':
                if process.poll() is not None: sys.exit('a process ended before it was ready; is sentence-transformers installed?')
        seen = {s: [] for s in SYSTEMS}
        for _ in range(steps):
            for system, process in running.items():
                process.stdin.write('\n'); process.stdin.flush()
                seen[system].append(json.loads(process.stdout.readline()))
        for process in running.values(): process.stdin.close(); process.wait()
        import torch
        gradient = {s: torch.load(f'{folder}/{s}.pt', weights_only=True) for s in SYSTEMS}
    time_of, memory = {s: statistics.median(r['seconds'] for r in seen[s][1:]) for s in SYSTEMS}, {s: max(r['megabytes'] for r in seen[s]) for s in SYSTEMS}
    print(f'{rows} pairs, chunks of {chunk}, {steps - 1} steps after the first')
    for s in SYSTEMS:
        apart = float((gradient[s] - gradient['whole']).norm() / gradient['whole'].norm())
        print(f"  {s:7} {time_of[s]:6.2f} s ({time_of[s] / time_of['whole']:.2f} of whole)  {memory[s]:7.0f} MB ({memory[s] / memory['whole']:.2f} of whole)  "
              f"loss {seen[s][-1]['loss']:.6f}  gradient {apart:.1e} from whole")
    print(f"  chunks against cached: {time_of['chunks'] / time_of['cached']:.2f} of its time, {memory['chunks'] / memory['cached']:.2f} of its memory")


if __name__ == '__main__':
    if sys.argv[1:2] == ['serve']: serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else: main(*((128, 16, 4) if '--small' in sys.argv else (512, 32, 6)))
