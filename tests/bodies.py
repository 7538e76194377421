"Small bodies of every family with random weights, and texts to encode"
import random

import numpy as np
import torch
import transformers

from lab_lm.nets.native import masked_lm
from lab_lm.nets.tiny import tiny_gemma, tiny_llama
from lab_lm.nets.transformer import Transformer, preset
from lab_lm.text.tiny import pocket_sentences
from lab_lm.text.tokenize import train_tokenizer

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=80)


def some_texts(): return [s.text for s in pocket_sentences('hi', 40, seed=random.randrange(10**6))] + ['', 'x', 'The house ' * 60]


def tokenizer_of(texts): return train_tokenizer(texts * 2, 'bpe', 400)


def body(kind, tokenizer):
    "A small body with random weights, every one off its first value"
    size, ids = len(tokenizer), dict(pad_token_id=tokenizer.pad_token_id)
    made = dict(
        bert=lambda: transformers.BertModel(transformers.BertConfig(vocab_size=size, **SMALL, **ids)),
        xlmr=lambda: transformers.XLMRobertaModel(transformers.XLMRobertaConfig(vocab_size=size, **SMALL, **ids)),
        modernbert=lambda: masked_lm('tiny', size, tokenizer.pad_token_id),
        llama=lambda: tiny_llama(size, **ids), gemma=lambda: tiny_gemma(size, **ids),
        masked=lambda: Transformer(preset('tiny', size, 'masked')), hybrid=lambda: Transformer(preset('tiny', size, 'hybrid')))[kind]()
    with torch.no_grad():
        for p in made.parameters(): p += .05 * torch.randn_like(p)
    return made.eval()


def vectors(model, texts): return torch.cat([model(**model.inputs([t])) for t in texts]).detach().numpy()


def same(a, b, atol=2e-5): np.testing.assert_allclose(a, b, atol=atol * max(1, np.abs(b).max()), rtol=0)
