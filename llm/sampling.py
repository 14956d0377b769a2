"""Sampling n lists of each prompt: a tree grows, one token a branch at each step.

The prompt is read once as the trunk, and kept once, not n times; what all prompts begin with is
read once for all. A branch attends to its trunk and to itself, as in tree rows (logps.py). A seed
gives a prompt the same lists, whatever is decoded beside it.

    python -m benchmarks.sampling   # beside transformers' generate, which draws the same tokens

Departure: of the top_k likeliest tokens only the smallest set that holds top_p is drawn from; to
sort a vocabulary of 150,000 at each step would take longer than the model.

Legend: B prompts with an open sample, n samples of each, Q slots of open samples, V vocabulary,
T new tokens at most, t of them so far, P tokens of a trunk, H hidden, d of a head; each of K heads
with keys serves G heads with queries.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from files import digest, progress
from llm.logps import tree_mask
from llm.model import decoder_and_head
from llm.prompts import Ids


@dataclass(frozen=True)
class Prefix:
    """The first tokens of every prompt, and what each layer keeps of them."""

    ids: Ids  # (P,)
    layers: list[tuple[Tensor, Tensor]]  # keys and values, (1, heads, P, d) each


NO_PREFIX = Prefix([], [])
WORTH_READING = 32  # tokens: what shorter common beginnings save, a pass of their own costs


def sample(model, tokenizer, prompts: list[Ids], n: int, whole="", **settings) -> list[list[str]]:
    """Token ids of prompts -> n completions of each, as text; settings as of sample_ids.
    whole: stands behind those that max_new_tokens did not cut short."""
    drawn = sample_ids(model, tokenizer, prompts, n, **settings)
    ends = end_tokens(model, tokenizer) | {tokenizer.pad_token_id}
    texts = (tokenizer.batch_decode(tokens, skip_special_tokens=True) for tokens in drawn)
    return [[text + whole * (ids[-1].item() in ends) for text, ids in zip(row, tokens, strict=True)]
            for row, tokens in zip(texts, drawn, strict=True)]


@torch.no_grad()
def sample_ids(
    model, tokenizer, prompts: list[Ids], n: int, *, max_new_tokens: int, seed: int,
    temperature: float, top_p: float, top_k: int = 0,  # temperature 0: greedy; top_k 0: all tokens
    rows: int = 256,  # completions that are decoded together
    stop: str = "</sug>",  # this text ends a completion, as an end token does
    numbers: Sequence[int] | None = None,  # of the prompts, for their random numbers: 0, 1, 2, ...
    prefix: Prefix = NO_PREFIX,  # of all prompts, if it was read before; else read here
    watch: Callable[[Tensor], Tensor] | None = None,
    draw=None,  # tests and benchmarks: in place of a Draw by temperature, top_p, top_k and seed
) -> list[Tensor]:
    """Token ids of n completions of each prompt, (n, T) each, with pads behind each end.

    watch: called after each step with the ids so far, (b, n, steps), of the b <= rows / n prompts
    decoded together; samples for which it returns True, (b, n), are given up.
    Raises ValueError for an empty prompt or n < 1.
    """
    if n < 1 or not all(prompts):
        raise ValueError("sample: n >= 1, no empty prompt")
    numbers, order, size = numbers or range(len(prompts)), [*range(len(prompts))], max(1, rows // n)
    if len(order) > size:  # like lengths together: less padding
        order.sort(key=lambda i: len(prompts[i]))
    if not prefix.ids and len(shared := _common_start(prompts)) >= WORTH_READING:
        prefix = read_prefix(model, shared)
    draw, ends = draw or Draw(temperature, top_p, top_k, seed), Ends(model, tokenizer, stop)
    drawn: dict[int, Tensor] = {}
    for start in progress(range(0, len(order), size), "sample"):
        batch = order[start : start + size]
        draw.begin([numbers[i] for i in batch], n, max_new_tokens)
        tree = Tree(model, [prompts[i] for i in batch], n, max_new_tokens, ends.pad, prefix)
        while tree.is_open:
            tree.write(draw(tree.logits, tree.prompt, tree.sample, tree.steps))
            ended = ends(tree)
            if watch:
                given_up = F.pad(watch(tree.tokens[:, :n, : tree.steps]), (0, 1))  # not nobody's
                ended |= given_up.to(ended.device)[tree.prompt[:, None], tree.sample]
            tree.step(ended)
        drawn.update(zip(batch, tree.tokens[:, :n], strict=True))
    return [drawn[i] for i in range(len(prompts))]


@torch.no_grad()
def read_prefix(model, ids: Ids) -> Prefix:
    """Read tokens with which prompts begin; it holds as long as the model's weights do."""
    decoder, head = decoder_and_head(model, len(ids))
    cache = DynamicCache()
    row = torch.tensor([ids], device=head.weight.device)
    decoder(input_ids=row, past_key_values=cache, use_cache=True)
    return Prefix(ids, [(layer.keys, layer.values) for layer in cache.layers])


def _common_start(prompts: list[Ids]) -> Ids:
    """The tokens with which several prompts begin and after which each of them goes on."""
    if len(prompts) < 2:
        return []
    first, last = min(prompts), max(prompts)  # in the order of a dictionary: all others lie between
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return first[: min(len(list(shared)), min(map(len, prompts)) - 1)]


class Tree:
    """Prompts as trunks, each with n branches (samples) that a step makes one token longer."""

    # A slot grows a sample; it is dropped with its sample, a prompt with its last one. Of 3 prompts
    # with 3 samples, where prompt 1 is done and sample 1 of prompt 0 has ended:
    # prompt   0, 2              # (B,)
    # sample   0 2 3 | 0 1 2     # (B, Q), the one that each slot grows; 3 = n is nobody's
    # token    the one that each slot has just written, (B, Q); logits (B, Q, V) of the next one
    # tokens   of all samples of all prompts, and a row for nobody, (prompts, n + 1, T)

    def __init__(self, model, prompts: list[Ids], n: int, most: int, pad: int, prefix=NO_PREFIX):
        """Read the prompts, from the end of `prefix` on; most: T, the tokens a sample may have."""
        b, width, past = len(prompts), max(map(len, prompts)), len(prefix.ids)
        if any(p[:past] != prefix.ids or len(p) == past for p in prompts):
            raise ValueError("sample: a prompt does not go on from the prefix")
        self.decoder, self.head = decoder_and_head(model, width + most)
        device, dtype = self.head.weight.device, self.decoder.get_input_embeddings().weight.dtype
        self.n, self.most, self.steps = n, most, 0
        self.length = torch.tensor([len(p) for p in prompts], device=device)  # (prompts,)
        self.prompt = torch.arange(b, device=device)
        self.sample = torch.arange(n, device=device).expand(b, n)
        self.tokens = torch.full((b, n + 1, most), pad, device=device)
        # Not `pad`, which may lie beyond the embedding: what the mask hides may be any token.
        ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)
        position = torch.arange(width, device=device).expand(b, width)
        beyond = position >= self.length[:, None]
        branch = -beyond.long()  # that of tree rows: 0 the trunk, -1 pads
        cache = DynamicCache()
        for i, parts in enumerate(prefix.layers):
            cache.update(*(part.expand(b, *part.shape[1:]) for part in parts), i)
        hidden = self.decoder(
            input_ids=ids[:, past:], position_ids=position[:, past:], past_key_values=cache,
            attention_mask=tree_mask(branch[:, past:], branch[:, past:], branch, dtype),
            use_cache=True).last_hidden_state
        last = hidden[self.prompt, self.length - 1 - past]  # (B, H): pads stand behind it
        # One vocabulary row a prompt: all its samples begin alike.
        self.logits = self.head(last).float()[:, None].expand(b, n, -1)
        bias = None  # most prompts are decoded alone or beside others of their length
        if beyond.any():
            bias = torch.zeros(b, 1, 1, width, dtype=dtype, device=device)
            bias.masked_fill_(beyond[:, None, None], -math.inf)
        self.layers = [_Layer(c.keys, c.values, bias, n, most) for c in cache.layers]

    @property
    def is_open(self) -> bool:
        return self.steps < self.most and bool((self.sample < self.n).any())

    def write(self, token: Tensor) -> None:  # (B, Q), the next one of each slot
        self.tokens[self.prompt[:, None], self.sample, self.steps] = token
        self.token, self.steps = token, self.steps + 1

    def step(self, ended: Tensor) -> None:
        """End the samples of these slots, (B, Q); read what the others have just written."""
        self.sample = self.sample.masked_fill(ended, self.n)
        if not self.is_open:  # nobody needs the next logits
            return
        self._drop_closed()
        # The first new token stands right behind the prompt, whatever the padding.
        position = (self.length[self.prompt] + self.steps - 1)[:, None].expand_as(self.token)
        config = self.decoder.config  # the public set_attn_implementation walks all modules
        before, config._attn_implementation = config._attn_implementation, "tree"
        try:
            hidden = self.decoder(
                input_ids=self.token, position_ids=position, use_cache=False, layers=self.layers)
        finally:
            config._attn_implementation = before
        self.logits = self.head(hidden.last_hidden_state).float()

    def _drop_closed(self) -> None:
        """Drop slots that no prompt needs, and prompts that are done."""
        going = self.sample < self.n  # (B, Q)
        rows = going.any(1)
        if rows.float().mean() >= 0.75:  # dropping a prompt copies its trunk: once it saves enough
            rows = torch.ones_like(rows)
        rows, going = rows.nonzero(), going[rows]  # (B, 1): they index together with the slots
        slots = going.sort(dim=1, descending=True, stable=True).indices  # the open ones first
        slots = slots[:, : int(going.sum(1).max())]
        if slots.shape != self.sample.shape:
            self.prompt = self.prompt[rows[:, 0]]
            self.sample, self.token = self.sample[rows, slots], self.token[rows, slots]
            for layer in self.layers:
                layer.keep(rows, slots)


class _Layer:
    """Keys and values of a layer: (B, K, P, d) of the trunks, (B, Q, K, T, d) of the branches.

    A token sees its trunk and its own branch: the scores of either share a softmax. The keys of
    branches lie the other way round, (.., d, T), for which products in bfloat16 are twice as fast.
    """

    def __init__(self, keys: Tensor, values: Tensor, bias: Tensor | None, slots: int, most: int):
        self.trunk, self.bias, self.length = [keys, values], bias, 0  # bias (B, 1, 1, P)
        b, heads = keys.shape[:2]
        self.branch = [keys.new_empty(b, slots, heads, keys.shape[-1], most),
                       values.new_empty(b, slots, heads, most, values.shape[-1])]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """The next token of each branch: queries (B, heads, Q, d) -> (B, Q, heads, d)."""
        keys, values = self.branch
        keys[..., self.length] = key.transpose(1, 2)
        values[..., self.length, :] = value.transpose(1, 2)
        self.length += 1
        keys, values = keys[..., : self.length], values[..., : self.length, :]
        # Queries of all slots meet the trunk in one product a key head, those of a slot its branch.
        query = (query * scaling).transpose(1, 2).unflatten(2, (key.shape[1], -1))
        by_head = query.transpose(1, 2)  # (B, K, Q, G, d)
        trunk = by_head.flatten(2, 3) @ self.trunk[0].transpose(2, 3)  # (B, K, Q G, P)
        if self.bias is not None:
            trunk += self.bias
        branch = query @ keys  # (B, Q, K, G, t)
        scores = torch.cat([trunk.view(*by_head.shape[:4], -1), branch.transpose(1, 2)], -1)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)  # (B, K, Q, G, P + t)
        trunk, branch = weights.split([trunk.shape[-1], self.length], -1)
        trunk = (trunk.flatten(2, 3) @ self.trunk[1]).view(*by_head.shape[:4], -1)
        return (trunk.transpose(1, 2) + branch.transpose(1, 2) @ values).flatten(2, 3)

    def keep(self, rows: Tensor, slots: Tensor) -> None:  # (B, 1), (B, Q)
        self.branch = [x[rows, slots] for x in self.branch]
        if len(rows) < len(self.trunk[0]):
            self.trunk = [x[rows[:, 0]] for x in self.trunk]
            self.bias = self.bias if self.bias is None else self.bias[rows[:, 0]]


def _tree_attention(module, query, key, value, mask, scaling=None, layers=None, **more):
    """As transformers' interface wants it; layers: what the caller of the decoder handed it."""
    if any(more.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise ValueError("its scores are changed on their way to the softmax")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layers[module.layer_idx].attend(query, key, value, scaling), None


AttentionInterface.register("tree", _tree_attention)


class Draw:
    """One uniform number a sample and step, drawn on the CPU: the same on every device."""

    def __init__(self, temperature: float, top_p: float, top_k: int, seed: int):
        self.temperature, self.top_p, self.top_k, self.seed = temperature, top_p, top_k, seed

    def begin(self, numbers: list[int], n: int, steps: int) -> None:
        """A new batch: the numbers of its prompts, samples of each, tokens of each at most."""
        seeds = (int(digest(self.seed, number), 16) for number in numbers)  # one for each prompt
        uniform = [torch.rand(n, steps, generator=torch.Generator().manual_seed(s)) for s in seeds]
        self.uniform = F.pad(torch.stack(uniform), (0, 0, 0, 1))  # (prompts, n + 1, T)

    def __call__(self, logits: Tensor, prompt: Tensor, sample: Tensor, step: int) -> Tensor:
        """logits (B, Q, V) of slots with these prompts (B,) and samples (B, Q) -> tokens (B, Q)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        self.uniform = self.uniform.to(logits.device)
        value, token = logits.topk(min(self.top_k or logits.shape[-1], logits.shape[-1]))
        p = (value / self.temperature).softmax(-1)  # likeliest first
        mass = p.cumsum(-1)
        p = p.masked_fill(mass - p >= self.top_p, 0)  # the token that reaches top_p stays
        mass = p.cumsum(-1)
        u = self.uniform[prompt[:, None], sample, step]  # (B, Q)
        place = torch.searchsorted(mass, u[..., None] * mass[..., -1:])
        return token.gather(-1, place.clamp_max(p.shape[-1] - 1)).squeeze(-1)


def end_tokens(model, tokenizer) -> set[int]:
    """Tokens that end a completion: the tokenizer's, and those of the model's generation_config."""
    settings = getattr(model, "generation_config", None)
    more = settings.eos_token_id if settings else None  # one, several (Llama 3) or none
    return {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}


@functools.lru_cache(maxsize=4)  # a large vocabulary takes longer to walk than a step
def _completing(tokenizer, stop: str) -> list[int]:
    return sorted(i for text, i in tokenizer.get_vocab().items() if stop and stop[-1] in text)


class Ends:
    """Which samples end with the token just written: an end token, or one that completes `stop`."""

    def __init__(self, model, tokenizer, stop: str):
        device = next(model.parameters()).device
        self.ends = torch.tensor(sorted(end_tokens(model, tokenizer)), device=device)
        self.last = torch.tensor(_completing(tokenizer, stop), device=device)  # only these can
        self.tokenizer, self.stop, self.pad = tokenizer, stop, tokenizer.pad_token_id

    def __call__(self, tree: Tree) -> Tensor:  # bool (B, Q), of the tree's slots
        done = torch.isin(tree.token, self.ends)
        row, slot = torch.isin(tree.token, self.last).nonzero(as_tuple=True)
        if len(row):
            # `stop` lies within as many tokens as it has bytes, whatever they are.
            begin = max(0, tree.steps - len(self.stop.encode()))
            ids = tree.tokens[tree.prompt[row], tree.sample[row, slot], begin : tree.steps]
            texts = [self.stop in text for text in self.tokenizer.batch_decode(ids)]
            done[row, slot] |= torch.tensor(texts, device=done.device)
        return done
