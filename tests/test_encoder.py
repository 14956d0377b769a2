"""The packaged encoder, its cache, its differentiable form, and special tokens as text."""

import pytest
import torch
from sentence_transformers import SentenceTransformer

from encoder import Encoder, embed, packaged_minilm


def test_packaged_encoder_is_the_original_and_caches(tmp_path):
    encoder = Encoder(cache=tmp_path / "cache.safetensors")
    rows = encoder(["chess openings", "Kyoto", "chess openings"])
    assert rows.shape == (3, 384) and torch.equal(rows[0], rows[2])
    assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-5)
    encoder.save()
    again = Encoder(cache=tmp_path / "cache.safetensors")
    assert torch.equal(again(["Kyoto"])[0], rows[1]) and again._model is None


def test_embed_reads_each_text_once_and_recomputation_changes_no_gradient():
    model = SentenceTransformer(packaged_minilm()).eval()
    texts = ["chess openings", "Kyoto in autumn, by train and on foot", "chess openings", "bread"]
    expected = torch.from_numpy(model.encode(texts, normalize_embeddings=True))
    read, weight = [], model[0].auto_model.encoder.layer[0].output.dense.weight
    model.preprocess = lambda batch, own=model.preprocess: read.extend(batch) or own(batch)
    slopes = []
    for recompute in (False, True):
        read.clear()
        vectors = embed(model, texts, 2, recompute)
        assert torch.allclose(vectors, expected, atol=1e-5) and torch.equal(vectors[0], vectors[2])
        assert sorted(read) == sorted(set(texts))
        model.zero_grad()
        (vectors[0] @ vectors[1] - vectors[2] @ vectors[3]).backward()
        assert len(read) == (6 if recompute else 3)
        slopes.append(weight.grad.clone())
    assert torch.allclose(*slopes, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("form", ["{}", "Dune {} film", "age: {}", "{0}{0}", "x{}", "{}."])
def test_special_tokens_in_a_text_are_text(form):
    """Summaries and profile fields: none of [PAD], [UNK], [CLS], [SEP], [MASK] comes out as an id,
    but the one at the beginning and the one at the end that the encoder itself sets."""
    model = Encoder().model
    tokenizer = model.tokenizer
    names, special = tokenizer.all_special_tokens, set(tokenizer.all_special_ids)
    assert {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} <= {*names} and len(names) == len(special)
    for name in names:
        (ids,) = model.preprocess([form.format(name)])["input_ids"].tolist()
        assert special.isdisjoint(ids[1:-1]) and len(ids) > 4
        assert [ids[0], ids[-1]] == [tokenizer.cls_token_id, tokenizer.sep_token_id]
