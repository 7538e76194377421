"""100,000 random strings through every lossless kind of tokenizer."""
import pytest
from test_tokenizers import KINDS, SEED, made, many


@pytest.mark.parametrize('kind', [k for k in KINDS if k != 'wordpiece'])
def test_100_000_random_strings_come_back(kind):
    (texts, whole), inside = many(), made(kind).backend_tokenizer
    ids = [e.ids for e in inside.encode_batch_fast(texts, add_special_tokens=False)]
    lost = [(ascii(w), ascii(b)) for w, b in zip(whole, inside.decode_batch(ids, skip_special_tokens=False)) if w != b]
    assert not lost, (SEED, len(lost), lost[:3])
    assert not any(1 in row for row in ids), 'a lossless kind made an unknown token'
