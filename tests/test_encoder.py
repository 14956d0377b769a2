"""The packaged encoder, its cache, and special tokens as text."""

import pytest
import torch

from llm.encoder import Encoder


def test_packaged_encoder_is_the_original_and_caches(tmp_path):
    encoder = Encoder(cache=tmp_path / "cache.safetensors")
    rows = encoder(["chess openings", "Kyoto", "chess openings"])
    assert rows.shape == (3, 384) and torch.equal(rows[0], rows[2])
    assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-5)
    encoder.save()
    again = Encoder(cache=tmp_path / "cache.safetensors")
    assert torch.equal(again(["Kyoto"])[0], rows[1]) and "model" not in vars(again)


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
