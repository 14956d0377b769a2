"""Log-probabilities of lists under the generator, for instruction tuning, DPO and GRPO.

Preference lists of one user share a long prompt, so log-probabilities are computed on *tree rows*,
`[prompt | list 0 | list 1 | ...]`: a mask lets each list see the prompt and itself only, positions
restart after the prompt, and the result equals one sequence at a time (tests/test_llm.py).

    python -m benchmarks.dpo   # beside TRL's trainer: the same loss and gradient

Legend: B rows, T tokens of a row, Q queries and K keys of attention, C completions of a prompt,
S scored positions, R completions of all prompts, H hidden, V vocabulary.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from files import processes
from llm.model import decoder_and_head
from llm.prompts import Ids

HEAD_CHUNK = 256  # positions whose vocabulary row exists at once: V is 150,000 in Qwen2.5


@dataclass(frozen=True)
class TreeRows:
    """Trees in rows: prompt p with lists a and b; prompts q and r, of a list each, share a row.

    ids        p0 p1 p2 a0 a1 b0 | q0 q1 c0 r0 d0 pad
    position    0  1  2  3  4  3 |  0  1  2  0  1  0    # a list goes on where its prompt ends
    branch      0  0  0  1  1  2 |  0  0  1  2  3 -1    # a number for each prompt and each list
    trunk       0  0  0  0  0  0 |  0  0  0  2  2 -1    # the branch of its prompt
    source               2  3  2 |        7     9       # a0 is predicted from p2, a1 from a0, ...
    last                    4  5 |        8    10       # where a list ends
    """

    ids: Tensor  # (B, T)
    position: Tensor  # (B, T)
    branch: Tensor  # (B, T)
    trunk: Tensor  # (B, T)
    source: Tensor  # (S,), indices into the flattened rows, in the order of prompts and lists
    target: Tensor  # (S,), the list tokens that are predicted from there
    last: Tensor  # (lists,), index of each list's last token, in the same order


def tree_rows(prompts: list[Ids], completions: list[list[Ids]]) -> TreeRows:
    """One tree a prompt, several short ones packed into a row: none outgrows the longest tree.

    Raises ValueError if there is no completion, or an empty prompt or completion.
    """
    # An empty one would be scored at the place of what stands before it.
    branches = [tokens for some in completions for tokens in some]
    if not branches or not all(prompts) or not all(branches):
        raise ValueError("tree_rows: some completion, and no empty prompt or completion")
    sizes = [len(p) + sum(map(len, lists)) for p, lists in zip(prompts, completions, strict=True)]
    width = max(sizes)
    rows: list[list[tuple[int, int, int, int]]] = []  # id, position, branch and trunk of each token
    sources: list[list[int]] = [[] for _ in prompts]
    ends: list[list[int]] = [[] for _ in prompts]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # first fit, the longest first
        r = next((r for r, row in enumerate(rows) if len(row) + sizes[i] <= width), len(rows))
        if r == len(rows):
            rows.append([])
        row, prompt = rows[r], prompts[i]
        trunk = row[-1][2] + 1 if row else 0
        row += [(token, t, trunk, trunk) for t, token in enumerate(prompt)]
        last = r * width + len(row) - 1  # the place from which each list is predicted
        for branch, tokens in enumerate(completions[i], trunk + 1):
            first = r * width + len(row)
            sources[i] += [last, *range(first, first + len(tokens) - 1)]
            row += [(token, t, branch, trunk) for t, token in enumerate(tokens, len(prompt))]
            ends[i].append(r * width + len(row) - 1)
    pad = (0, 0, -1, -1)  # pads see each other and are seen by nothing else
    cells = torch.tensor([row + [pad] * (width - len(row)) for row in rows])  # (B, T, 4)
    source, last = (torch.tensor([i for part in parts for i in part]) for parts in (sources, ends))
    target = torch.tensor([token for lists in completions for tokens in lists for token in tokens])
    return TreeRows(*cells.permute(2, 0, 1).contiguous(), source, target, last)


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


def completion_logps(model, prompts: list[Ids], completions: list[list[Ids]],
                     head_chunk: int = HEAD_CHUNK) -> list[Tensor]:
    """Summed log-probability of each completion of each prompt: a tensor (C,) for every prompt.

    Differentiable. Raises ValueError if there is no completion, or an empty prompt or completion.
    """
    logps = row_logps(model, tree_rows(prompts, completions), head_chunk)  # (S,)
    lengths = [len(c) for lists in completions for c in lists]
    # Summed one by one: a segmented sum would add in another order, hence to other last digits.
    sums = torch.stack([part.sum() for part in logps.split(lengths)])
    return list(sums.split([len(lists) for lists in completions]))


def token_logps(model, prompts: list[Ids], completions: list[list[Ids]]) -> tuple[Tensor, Tensor]:
    """(R, T) log-probability of each token of each completion, padded; and where one stands, bool.

    R completions of all prompts in turn; T tokens of the longest one. Differentiable.
    """
    lengths = torch.tensor([len(c) for lists in completions for c in lists])
    logps = row_logps(model, tree_rows(prompts, completions))  # (S,)
    padded = torch.nn.utils.rnn.pad_sequence(logps.split(lengths.tolist()), batch_first=True)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return padded, mask.to(padded.device)


def last_hidden(model, prompts: list[Ids], completions: list[list[Ids]]) -> Tensor:
    """The decoder's state (R, H) at the last token of each completion; differentiable."""
    rows = tree_rows(prompts, completions)
    hidden, _ = _hidden(model, rows)
    return hidden.flatten(0, 1)[rows.last.to(hidden.device)]


def row_logps(model, rows: TreeRows, head_chunk: int = HEAD_CHUNK) -> Tensor:
    """Log-probability of every list token, (S,), in the order of rows.source; differentiable."""
    hidden, head = _hidden(model, rows)
    # Prompt tokens are never scored, so no vocabulary row is made for them.
    scored = hidden.flatten(0, 1)[rows.source.to(hidden.device)]  # (S, H)
    return _token_logps(head, scored, rows.target.to(hidden.device), head_chunk)


def _hidden(model, rows: TreeRows) -> tuple[Tensor, torch.nn.Module]:
    """What the decoder makes of every token, (B, T, H), and the head that would read it."""
    decoder, head = decoder_and_head(model, int(rows.position.max()) + 1)
    device, dtype = head.weight.device, decoder.get_input_embeddings().weight.dtype
    branch, trunk = rows.branch.to(device), rows.trunk.to(device)
    # Only layers in training mode are checkpointed. The flag alone is set, as train() would switch
    # on the dropout below them, and log-probabilities are to compare.
    layers = [m for m in decoder.modules() if getattr(m, "gradient_checkpointing", False)]
    for layer in layers:
        layer.training = torch.is_grad_enabled()
    try:
        return decoder(
            input_ids=rows.ids.to(device), position_ids=rows.position.to(device), use_cache=False,
            attention_mask=tree_mask(branch, trunk, branch, dtype)).last_hidden_state, head
    finally:
        for layer in layers:
            layer.training = False


def averaged_gradients(model, function: Callable = completion_logps) -> Callable:
    """`function` of a model whose gradients DDP averages over the processes of a torchrun."""
    logps = torch.nn.Module()  # DDP wraps nothing else
    logps.model, logps.forward = model, functools.partial(function, model)
    if processes()[1] == 1:
        return logps
    # The base and the adapters were loaded alike everywhere, so nothing need be sent at the start.
    return torch.nn.parallel.DistributedDataParallel(logps, init_sync=False)


def _token_logps(head, hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """log p(target | hidden), (S,): at most `chunk` vocabulary rows exist at once."""
    frozen = not any(p.requires_grad for p in head.parameters())
    if frozen and type(head) is torch.nn.Linear:  # not a subclass of 4 bit
        return _FrozenHeadLogps.apply(hidden, head.weight, head.bias, targets, chunk)

    def chunk_logps(h: Tensor, y: Tensor) -> Tensor:
        return -F.cross_entropy(head(h).float(), y, reduction="none")

    if len(targets) <= chunk:
        return chunk_logps(hidden, targets)
    chunks = zip(hidden.split(chunk), targets.split(chunk), strict=True)
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
