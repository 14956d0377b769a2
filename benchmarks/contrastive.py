"""A contrastive step of the text encoder beside sentence-transformers' ranking losses.

    python -m benchmarks.contrastive

Anchor: a user's history as one text; a later summary stands for its positive, the latest for a hard
negative (time is measured here, not quality). Four rows a user repeat the anchor and the negative:
each text is encoded once here, in mini-batches of like length, whose activations a CPU's caches
hold better than those of the whole batch. Texts come from the simulated platform; both sides
compute the same loss.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import batch_to_device
from torch.utils.checkpoint import checkpoint

import icebreaker as ib
from benchmarks.common import Row, prepare, report, same_step, seconds
from config import WorldConfig
from llm.encoder import packaged_minilm
from world import people

SCALE, MINI_BATCH = 20.0, 8


def triplets(users: int, rows_per_user: int) -> list[tuple[str, str, str]]:
    """(history, positive, negative) texts of simulated users."""
    logs = people.World(WorldConfig(users=400, impressions_per_user=1, starter_pool=200))
    rows = []
    for user in logs.users:
        texts = list(dict.fromkeys(s.summary for s in user.sessions if s.summary))
        if 10 <= len(texts) <= 40:
            anchor, negative = "; ".join(texts[:-5]), texts[-1]
            rows += [(anchor, y, negative) for y in texts[-5 : -5 + rows_per_user]]
        if len(rows) == users * rows_per_user:
            return rows
    raise AssertionError("too few users")


def embed(model, texts: list[str], batch_size: int, recompute: bool = False) -> torch.Tensor:
    """Unit vectors (n, D) of a sentence-transformers model, differentiable.

    Each distinct text is encoded once, texts of like length together. recompute: gradient caching
    (Gao et al., 2021): the activations of one mini-batch exist at a time, and are computed again
    in backward, when the gradient of the loss in the vectors is known.
    """
    distinct = sorted(set(texts), key=lambda text: (len(text), text))

    def encode(batch: list[str]) -> torch.Tensor:
        features = batch_to_device(model.preprocess(batch), model.device)
        return F.normalize(model(features)["sentence_embedding"], dim=-1)

    batches = [distinct[i : i + batch_size] for i in range(0, len(distinct), batch_size)]
    if recompute:
        vectors = torch.cat([checkpoint(encode, batch, use_reentrant=False) for batch in batches])
    else:
        vectors = torch.cat([encode(batch) for batch in batches])
    number = {text: i for i, text in enumerate(distinct)}
    return vectors[[number[text] for text in texts]]


def compare(rows, cached: bool):
    """Median CPU seconds of both, and how far our gradient differs."""
    ours_model = SentenceTransformer(packaged_minilm()).eval()
    peer_model = copy.deepcopy(ours_model)
    n, texts = len(rows), [text for column in zip(*rows, strict=True) for text in column]

    def ours() -> float:
        ours_model.zero_grad()
        e = embed(ours_model, texts, MINI_BATCH, recompute=cached)  # anchors, positives, ...
        scores = e[:n] @ e[n:].T  # (n, 2 n): each anchor against every positive and negative
        others = torch.ones_like(scores, dtype=torch.bool)
        others[range(n), range(n)] = False
        positives = scores.diagonal()[:, None]  # (n, 1)
        ordered = torch.cat([positives, scores[others].view(n, -1)], 1)  # (n, 2 n)
        loss = ib.contrastive_loss(ordered, 1 / SCALE).mean()
        loss.backward()
        return loss.item()

    criterion = (
        CachedMultipleNegativesRankingLoss(peer_model, SCALE, mini_batch_size=MINI_BATCH)
        if cached
        else MultipleNegativesRankingLoss(peer_model, SCALE)
    )

    def peer() -> float:
        peer_model.zero_grad()
        features = [peer_model.preprocess(list(column)) for column in zip(*rows, strict=True)]
        loss = criterion(features, None)
        loss.backward()
        return loss.item()

    note = same_step(ours, peer, ours_model, peer_model)
    return seconds({"ours": ours, "peer": peer}), note


def main() -> None:
    prepare()
    repeated, distinct = triplets(8, 4), triplets(32, 1)
    rows = []
    for name, data, cached, asked in (
        ("32 rows of 8 users", repeated, False, 3),
        ("32 rows, no text repeated", distinct, False, 1),
        ("32 rows of 8 users, gradient caching", repeated, True, None),
    ):
        peer = "CachedMultipleNegativesRankingLoss" if cached else "MultipleNegativesRankingLoss"
        times, note = compare(data, cached)
        rows.append(
            Row(f"contrastive step, {name}", peer, times["ours"], times["peer"], asked, note=note)
        )
    report("Contrastive step", rows)


if __name__ == "__main__":
    main()
