"""The packaged encoder, its cache, and special tokens as text."""

import pickle
import shutil

import pytest
import torch

from files import UserError, write_tensors
from llm.encoder import Encoder, packaged_minilm


def test_packaged_encoder_is_the_original_and_caches(tmp_path):
    encoder = Encoder(cache=tmp_path / "cache.safetensors")
    rows = encoder(["chess openings", "Kyoto", "chess openings"])
    assert rows.shape == (3, 384) and torch.equal(rows[0], rows[2])
    assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-5)
    encoder.save()
    again = Encoder(cache=tmp_path / "cache.safetensors")
    assert torch.equal(again(["Kyoto"])[0], rows[1]) and "model" not in vars(again)


@pytest.mark.parametrize("tensors", [
    {"vectors": torch.ones(1, 4)}, {"keys": torch.ones(2, 16)}, {"a": torch.ones(1)},
    {"keys": torch.ones(2, 16, dtype=torch.uint8), "vectors": torch.ones(1, 4)}])
def test_a_file_that_is_no_cache_is_one_line(tmp_path, tensors):
    write_tensors(tmp_path / "cache.safetensors", tensors)
    with pytest.raises(UserError, match="cache.safetensors: no cache of embeddings") as told:
        Encoder(cache=tmp_path / "cache.safetensors")
    assert "\n" not in str(told.value)


class Planted:
    def __reduce__(self):
        return print, ("it was run",)


def test_a_planted_pickle_is_not_run_and_one_line(tmp_path, capsys):
    folder = shutil.copytree(packaged_minilm(), tmp_path / "encoder",
                             ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(UserError, match="encoder.name=.*encoder: cannot be loaded") as told:
        Encoder(str(folder))(["a text"])
    assert "\n" not in str(told.value) and "it was run" not in capsys.readouterr().out


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
