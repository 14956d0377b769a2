"""Log-probabilities of lists under the generator, for instruction tuning and DPO.

Preference lists of one user share a long prompt, so log-probabilities are computed on *tree rows*,
`[prompt | list 0 | list 1 | ...]`: a mask lets each list see the prompt and itself only, positions
restart after the prompt, and the result equals one sequence at a time (tests/test_llm.py).

    python -m benchmarks.dpo   # beside TRL's trainer: the same loss and gradient

Legend: B rows, T tokens of a row, Q queries and K keys of attention, C completions of a prompt,
S scored positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from config import processes
from llm.model import decoder_and_head

# ------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class TreeRows:
    """Trees in rows: prompt p with lists a and b; prompts q and r, of a list each, share a row.

    ids        p0 p1 p2 a0 a1 b0 | q0 q1 c0 r0 d0 pad
    position    0  1  2  3  4  3 |  0  1  2  0  1  0    # a list goes on where its prompt ends
    branch      0  0  0  1  1  2 |  0  0  1  2  3 -1    # a number for each prompt and each list
    trunk       0  0  0  0  0  0 |  0  0  0  2  2 -1    # the branch of its prompt
    source               2  3  2 |        7     9       # a0 is predicted from p2, a1 from a0, ...
    """

    ids: Tensor  # (B, T)
    position: Tensor  # (B, T)
    branch: Tensor  # (B, T)
    trunk: Tensor  # (B, T)
    source: Tensor  # (S,), indices into the flattened rows, in the order of prompts and lists
    target: Tensor  # (S,), the list tokens that are predicted from there


def tree_rows(prompts: list[list[int]], completions: list[list[list[int]]]) -> TreeRows:
    """One tree a prompt, several short ones packed into a row: none outgrows the longest tree."""
    sizes = [len(p) + sum(map(len, lists)) for p, lists in zip(prompts, completions, strict=True)]
    width = max(sizes)
    packed = _first_fit(sizes, width)
    rows = torch.zeros(4, len(packed), width, dtype=torch.long)  # ids, position, branch, trunk
    rows[2:] = -1  # of pads, which see each other and are seen by nothing else
    source: list[list[int]] = [[] for _ in prompts]
    for r, members in enumerate(packed):
        at = branch = 0  # the next free place and branch of this row
        for i in members:
            trunk, last = branch, r * width + at + len(prompts[i]) - 1  # `last` predicts each list
            for part in (prompts[i], *completions[i]):
                begin, n = (0 if branch == trunk else len(prompts[i])), len(part)
                place = rows[:, r, at : at + n]  # a view: it is written through
                place[0], place[1] = torch.tensor(part), torch.arange(begin, begin + n)
                place[2], place[3] = branch, trunk
                if branch > trunk:
                    source[i] += [last, *range(r * width + at, r * width + at + n - 1)]
                at, branch = at + n, branch + 1
    targets = [token for lists in completions for tokens in lists for token in tokens]
    sources = [place for places in source for place in places]
    return TreeRows(*rows, torch.tensor(sources), torch.tensor(targets))


def _first_fit(sizes: list[int], width: int) -> list[list[int]]:
    """Which trees share a row of `width` tokens, longest first."""
    packed: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = (row for row in packed if sum(sizes[j] for j in row) + sizes[i] <= width)
        if (row := next(fits, None)) is None:
            packed.append(row := [])
        row.append(i)
    return packed


def tree_mask(branch: Tensor, trunk: Tensor, key_branch: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive bias of SDPA, (B, 1, Q, K): 0 where a key is seen, else the least number.

    A key is seen if it is no later than the query and lies on its branch or its trunk.
    branch, trunk (B, Q) of the queries, which are the last Q of the keys; key_branch (B, K).
    """
    q, k = branch.shape[1], key_branch.shape[1]
    keys = key_branch[:, None]  # (B, 1, K)
    same = (keys == branch[..., None]) | (keys == trunk[..., None])  # (B, Q, K)
    visible = same & same.new_ones(q, k).tril(k - q)
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    # Not -inf: where no key at all is seen it would give NaN.
    return bias.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


# ----------------------------------------------------------------------------- log-probabilities


def completion_logps(
    model, prompts: list[list[int]], completions: list[list[list[int]]], head_chunk: int = 256
) -> list[Tensor]:
    """Summed log-probability of each completion of each prompt: a tensor (C,) for every prompt.

    Differentiable. head_chunk: positions whose vocabulary row exists at once.
    Raises ValueError if there is no completion, or an empty prompt or completion.
    """
    lengths = [len(c) for lists in completions for c in lists]
    if not lengths or not all(prompts) or not all(lengths):
        raise ValueError("completion_logps: some completion, and no empty prompt or completion")
    logps = row_logps(model, tree_rows(prompts, completions), head_chunk)  # (S,)
    # Summed one by one: a segmented sum would add in another order, hence to other last digits.
    sums = torch.stack([part.sum() for part in logps.split(lengths)])
    return list(sums.split([len(lists) for lists in completions]))


def row_logps(model, rows: TreeRows, head_chunk: int = 256) -> Tensor:
    """Log-probability of every list token, (S,), in the order of rows.source; differentiable."""
    decoder, head = decoder_and_head(model, int(rows.position.max()) + 1)
    device, dtype = head.weight.device, decoder.get_input_embeddings().weight.dtype
    branch, trunk = rows.branch.to(device), rows.trunk.to(device)
    with _recomputing(decoder):
        hidden = decoder(
            input_ids=rows.ids.to(device), position_ids=rows.position.to(device),
            attention_mask=tree_mask(branch, trunk, branch, dtype), use_cache=False,
        ).last_hidden_state  # (B, T, H)
    # Prompt tokens are never scored, so no vocabulary row is made for them.
    scored = hidden.flatten(0, 1)[rows.source.to(device)]  # (S, H)
    return _token_logps(head, scored, rows.target.to(device), head_chunk)


@contextlib.contextmanager
def _recomputing(decoder):
    """Let gradient checkpointing act without switching dropout on."""
    # transformers asks each layer for training mode, which the modules below it (dropout) must
    # not be in where log-probabilities are compared.
    layers = [m for m in decoder.modules() if getattr(m, "gradient_checkpointing", False)]
    before = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = torch.is_grad_enabled()  # the flag alone; train() would go below
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training


def averaged_gradients(model) -> Callable[..., list[Tensor]]:
    """completion_logps of a model whose gradients DDP averages over the processes of a torchrun."""
    if processes()[1] == 1:
        return functools.partial(completion_logps, model)
    # The base and the adapters were loaded alike everywhere, so nothing need be sent at the start.
    return torch.nn.parallel.DistributedDataParallel(_Logps(model), init_sync=False)


class _Logps(torch.nn.Module):
    """completion_logps as the forward of a module, which is what DDP wraps."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args) -> list[Tensor]:
        return completion_logps(self.model, *args)


# --------------------------------------------------------------------------------------- the head


def _token_logps(head, hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """log p(target | hidden), (S,): at most `chunk` vocabulary rows exist at once."""
    frozen = not any(p.requires_grad for p in head.parameters())
    if frozen and type(head) is torch.nn.Linear:  # not a subclass of 4 bit
        return _FrozenHeadLogps.apply(hidden, head.weight, head.bias, targets, chunk)

    def chunk_logps(h: Tensor, y: Tensor) -> Tensor:
        return -F.cross_entropy(head(h).float(), y, reduction="none")

    chunks = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if not torch.is_grad_enabled() or len(targets) <= chunk:
        return torch.cat([chunk_logps(h, y) for h, y in chunks])
    # The logits of a chunk are computed again in backward, or autograd would keep those of all.
    return torch.cat([checkpoint(chunk_logps, h, y, use_reentrant=False) for h, y in chunks])


class _FrozenHeadLogps(torch.autograd.Function):
    """log p(target | hidden), (S,), under a head W (V, H) that LoRA leaves as it is.

    d log p(y) / d hidden = W[y] - sum_v p(v) W[v] is known as soon as the logits are. They are
    dropped at once, and backward need not compute them again.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets, chunk: int):
        logps, slopes = [], []
        for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            p = F.linear(h, weight, bias).float()  # logits, (chunk, V); changed in place below
            p -= p.amax(1, keepdim=True)  # so that exp cannot overflow
            target = p.gather(1, y[:, None])
            total = p.exp_().sum(1, keepdim=True)
            logps.append((target - total.log()).squeeze(1))
            if ctx.needs_input_grad[0]:
                # One-hot of y minus p(v), in the memory of the logits.
                p.div_(-total).scatter_add_(1, y[:, None], torch.ones_like(target))
                slopes.append(p.to(weight.dtype) @ weight)  # (chunk, H)
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(logps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (slope,) = ctx.saved_tensors
        return grad[:, None].to(slope) * slope, None, None, None, None
