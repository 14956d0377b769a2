"""The generator: loading, LoRA, 4-bit, prompts, log-probabilities, sampling.

    python train.py --stage sit generator.model=Qwen/Qwen2.5-0.5B-Instruct

Preference lists of one user share a long prompt, so log-probabilities are computed on *tree rows*,
`[prompt | list 0 | list 1 | ...]`: a mask lets each list see the prompt and itself only, positions
restart after the prompt, and the result equals one sequence at a time (tests/test_llm.py). Sampling
grows the same tree, one token a branch at each step.

Legend: B rows, C completions of a prompt, T tokens of a row, S scored positions, H hidden,
V vocabulary; in sampling B prompts, n samples of each, Q those still open.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicLayer

import data
from config import UserError, atomic_path, digest, processes


def quiet_libraries() -> None:
    """Silence notes of libraries about which a reader of the log can do nothing."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")


# ---------------------------------------------------------------------------------------- loading


def _load(loader, path: str, revision: str, **kwargs):
    try:
        return loader(path, revision=revision or "main", trust_remote_code=False, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a file may be broken in as many ways as there are readers
        reason = " ".join(str(error).split())[:200]
        if "bitsandbytes" in reason:
            advice = "set generator.load_in_4bit=false"
        else:
            advice = (
                "name a local folder (where a hub can be reached: hf download MODEL --local-dir "
                "FOLDER), or leave it empty for the embedded model"
            )
        raise UserError(f"generator.model={path}: cannot be loaded ({reason}); {advice}") from None


def load_tokenizer(path: str, revision: str = ""):
    """The tokenizer; pad differs from the end token, or the end would never be learned."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer.from_pretrained, path, revision)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        others = [t for t in tokenizer.all_special_ids if t != tokenizer.eos_token_id]
        if not others:
            raise UserError(f"generator.model={path}: needs a special token besides the end token")
        tokenizer.pad_token_id = others[0]
    return tokenizer


def load_generator(
    path: str,
    load_in_4bit: bool = False,
    gradient_checkpointing: bool = False,
    revision: str = "",
):
    """A causal LM from safetensors; float32 on a CPU, bfloat16 on a GPU, NF4 if asked for.

    path: a local folder or a hub id, of which `revision` is taken. Raises UserError with what to
    do where it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    gpu = torch.cuda.is_available()
    if load_in_4bit and not gpu:
        _refuse_giants(path, revision)
    dtype = torch.bfloat16 if gpu else torch.float32
    quantisation = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        if load_in_4bit
        else None
    )
    model, info = _load(
        AutoModelForCausalLM.from_pretrained,
        path,
        revision,
        use_safetensors=True,
        dtype=dtype,
        quantization_config=quantisation,
        device_map={"": torch.cuda.current_device() if gpu else "cpu"},
        output_loading_info=True,
    )
    if absent := sorted(info["missing_keys"]):
        raise UserError(
            f"generator.model={path}: {len(absent)} weights are missing, {absent[0]} the first; "
            f"download it again"
        )
    for module in model.modules():
        # On a CPU with AVX512-BF16, bitsandbytes repacks the weights at the first eval-mode
        # forward, and training after it is silently wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def check_model(path: str, revision: str = "") -> None:
    """Raise UserError now, before hours of other work, if there is no such model."""
    from transformers import AutoConfig

    _load(AutoConfig.from_pretrained, path, revision)
    load_tokenizer(path, revision)


def _refuse_giants(path: str, revision: str, most: float = 2e9) -> None:
    """Raise UserError, before any weight is read, for a model that would take days on a CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _load(AutoConfig.from_pretrained, path, revision)
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > most:
        raise UserError(
            f"generator.model={path}: {size / 1e9:.1f} billion parameters in 4 bit need a GPU, and "
            f"there is none; name a model of at most {most / 1e9:.0f} billion"
        )


def add_lora(model, rank: int, alpha: int, seed: int):
    """LoRA on all linear layers but the head; no dropout, so log-probabilities compare."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings).eval()


def save_adapter(model, folder: str | Path) -> None:
    """A vanilla PEFT folder, written whole or not at all."""
    with atomic_path(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)


def merge_adapter(model, adapter: str | Path, tokenizer, folder: str | Path, card: str) -> None:
    """Write the model with the adapter added into its weights in 16 bit, tokenizer and model card.

    model: in 16 or 32 bit. Into a 4-bit base the sum would be rounded to 4 bit again.
    """
    merged = load_adapter(model, adapter, trainable=False).merge_and_unload().bfloat16()
    with atomic_path(folder) as temporary:
        merged.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def load_adapter(model, folder: str | Path, trainable: bool):
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable).eval()


# ---------------------------------------------------------------------------------------- prompts


def encode_prompt(
    tokenizer, interests: list[str], n: int, instruction: str, max_tokens: int
) -> list[int]:
    """Chat template + instruction + one line an interest -> ids.

    The template is encoded apart from the user's text, whose control tokens are never parsed.
    Lines that do not fit into max_tokens are left out from the end: callers order by importance.
    """
    head, tail = user_turn(tokenizer, instruction.format(n=n))
    return head + _encode_lines(tokenizer, interests, max_tokens - len(head) - len(tail)) + tail


def prompt_text(
    tokenizer, interests: list[str], n: int, instruction: str, max_tokens: int
) -> str:
    """The user's turn of encode_prompt, for a server that applies the chat template itself.

    It would parse control tokens, so none is left whole.
    """
    begin = instruction.format(n=n)
    room = max_tokens - sum(map(len, user_turn(tokenizer, begin)))
    lines = tokenizer.decode(_encode_lines(tokenizer, interests, room))
    for token in tokenizer.added_tokens_decoder.values():
        lines = lines.replace(token.content, f"{token.content[0]} {token.content[1:]}")
    return begin + lines


def user_turn(tokenizer, begin: str = "") -> tuple[list[int], list[int]]:
    """Ids of the chat template before and behind what a user says, which starts with `begin`."""
    mark = "\x00"
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
        )
    else:
        text = f"{mark}\n"
    before, after = text.split(mark)
    return tuple(tokenizer.encode(x, add_special_tokens=False) for x in (before + begin, after))


def _encode_lines(tokenizer, interests: list[str], room: int) -> list[int]:
    if room < 1 and interests:
        raise UserError(
            "generator.max_prompt_tokens: the chat template and the instruction leave no room for "
            "an interest; raise it"
        )
    body: list[int] = []
    for interest in interests:
        line = encode_text(tokenizer, f"\n- {data.plain(interest)}")
        if len(body) + len(line) > room:
            body += line[:room] if not body else []  # one interest, even if it must be cut
            break
        body += line
    return body


def encode_text(tokenizer, text: str) -> list[int]:
    """Ids of somebody's text, among which is no added token, whatever the text says.

    split_special_tokens leaves out special tokens only, not the others that were added (<tool_call>
    of Qwen2.5): a text with one of these is encoded a character at a time.
    """
    encode = functools.partial(
        tokenizer.encode, add_special_tokens=False, split_special_tokens=True
    )
    ids = encode(text)
    if tokenizer.added_tokens_decoder.keys().isdisjoint(ids):
        return ids
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return [i for c in text if c not in added for i in encode(c)]


def encode_completion(tokenizer, starters: list[str]) -> list[int]:
    """Ids of `<sug> a && b </sug>` and the end token."""
    return encode_text(tokenizer, data.list_text(starters)) + [tokenizer.eos_token_id]


# ----------------------------------------------------------------------------------- tree of tokens


def _parts(model, length: int):
    """(decoder, head) below PEFT's and the causal LM's wrappers, for texts of `length` tokens.

    Raises UserError where a linear head on full attention is not what the model computes.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = causal.config
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(config, name, None) not in (None, 1.0):
            raise UserError(f"generator.model: {name} of this architecture is not supported")
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None) or 0
    if other - {"sliding_attention"} or (other and length > window):
        raise UserError(
            f"generator.model: {', '.join(sorted(other))} layers see less than a text of {length} "
            f"tokens; lower generator.max_prompt_tokens or name a model of full attention"
        )
    return causal.get_decoder(), causal.get_output_embeddings()


def _use_attention(decoder, name: str) -> None:
    if decoder.config._attn_implementation != name:
        decoder.set_attn_implementation(name)


def _tree_mask(query_branch, query_trunk, key_branch, past: int):
    """A key is seen if it is no later than the query and lies on its branch or its trunk.

    query_branch, query_trunk (B, Q), key_branch (B, past + Q) -> a function of index tensors, in
    the form that FlexAttention compiles; `_dense` evaluates it everywhere.
    """

    def seen(b, head, q, k):
        branch = key_branch[b, k]
        return (k <= q + past) & ((branch == query_branch[b, q]) | (branch == query_trunk[b, q]))

    return seen


def _dense(seen, b: int, q: int, k: int, like: Tensor) -> Tensor:
    """A tree mask as the additive bias of SDPA, (B, 1, Q, K)."""
    rows, queries, keys = (torch.arange(size, device=like.device) for size in (b, q, k))
    visible = seen(rows[:, None, None, None], 0, queries[:, None], keys)
    bias = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
    return bias.masked_fill_(~visible, torch.finfo(like.dtype).min)


# ----------------------------------------------------------------------------- log-probabilities


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


def tree_rows(
    prompts: list[list[int]], completions: list[list[list[int]]], multiple: int = 1
) -> TreeRows:
    """One tree a prompt, several short ones packed into a row: none outgrows the longest tree.

    The width T is a multiple of `multiple`.
    """
    size = [len(p) + sum(map(len, cs)) for p, cs in zip(prompts, completions, strict=True)]
    width = -(-max(size) // multiple) * multiple
    packed: list[list[int]] = []
    for i in sorted(range(len(size)), key=lambda i: -size[i]):  # first fit, longest first
        row = next((r for r in packed if sum(size[j] for j in r) + size[i] <= width), None)
        if row is None:
            packed.append([i])
        else:
            row.append(i)
    rows = torch.zeros(4, len(packed), width, dtype=torch.long)  # ids, position, branch, trunk
    rows[2:] = -1
    source: list[list[int]] = [[] for _ in prompts]
    for r, members in enumerate(packed):
        at = number = 0  # the next free place and branch of this row
        for i in members:
            trunk, last = number, r * width + at + len(prompts[i]) - 1
            for part in (prompts[i], *completions[i]):
                begin, n = (0 if number == trunk else len(prompts[i])), len(part)
                place = rows[:, r, at : at + n]
                place[0], place[1] = torch.tensor(part), torch.arange(begin, begin + n)
                place[2], place[3] = number, trunk
                if number > trunk:
                    source[i] += [last, *range(r * width + at, r * width + at + n - 1)]
                at, number = at + n, number + 1
    targets = [x for cs in completions for c in cs for x in c]
    return TreeRows(*rows, torch.tensor([s for own in source for s in own]), torch.tensor(targets))


def completion_logps(
    model,
    prompts: list[list[int]],
    completions: list[list[list[int]]],
    head_chunk: int = 256,
    attention: str = "sdpa",
) -> list[Tensor]:
    """Summed log-probability of each completion of each prompt: a tensor [C_i] for every prompt.

    Differentiable. head_chunk: positions whose vocabulary row exists at once; attention: "sdpa"
    (a dense mask, everywhere) or "flex_attention" (a block mask; its backward needs a GPU).
    Raises ValueError if there is no completion, or an empty prompt or completion.
    """
    if any(not p for p in prompts) or any(not c for cs in completions for c in cs):
        raise ValueError("completion_logps: prompts and completions hold at least one token")
    if not any(completions):
        raise ValueError("completion_logps: no completion")
    block = 128 if attention == "flex_attention" else 1  # of its mask
    logps = row_logps(model, tree_rows(prompts, completions, block), head_chunk, attention)  # (S,)
    lengths = [len(c) for cs in completions for c in cs]
    sums = torch.stack([part.sum() for part in logps.split(lengths)])
    return list(sums.split([len(cs) for cs in completions]))


def row_logps(model, rows: TreeRows, head_chunk: int = 256, attention: str = "sdpa") -> Tensor:
    """Log-probability of every list token, (S,), in the order of rows.source.

    Differentiable; head_chunk and attention as of completion_logps.
    """
    decoder, head = _parts(model, int(rows.position.max()) + 1)
    _use_attention(decoder, attention)
    device, (b, t) = head.weight.device, rows.ids.shape
    branch = rows.branch.to(device)
    seen = _tree_mask(branch, rows.trunk.to(device), branch, 0)
    if attention == "flex_attention":
        mask = _compiled_block_mask()(seen, b, None, t, t, device=device)
    else:
        mask = _dense(seen, b, t, t, like=decoder.get_input_embeddings().weight)
    with _recomputing(decoder):
        hidden = decoder(
            input_ids=rows.ids.to(device),
            position_ids=rows.position.to(device),
            attention_mask=mask,
            use_cache=False,
        ).last_hidden_state  # (B, T, H)
    scored = hidden.flatten(0, 1)[rows.source.to(device)]  # (S, H)
    return _token_logps(head, scored, rows.target.to(device), head_chunk)


class _Logps(torch.nn.Module):
    """completion_logps as the forward of a module, which is what DDP wraps."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args) -> list[Tensor]:
        return completion_logps(self.model, *args)


def averaged_gradients(model) -> Callable[..., list[Tensor]]:
    """completion_logps of a model whose gradients DDP averages over the processes of a torchrun."""
    if processes()[1] == 1:
        return functools.partial(completion_logps, model)
    # The base and the adapters were loaded alike everywhere, so nothing need be sent at the start.
    return torch.nn.parallel.DistributedDataParallel(_Logps(model), init_sync=False)


@functools.cache
def _compiled_block_mask():
    """Compiled once; without it the mask would be made as a dense one first."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask, dynamic=True)


@contextlib.contextmanager
def _recomputing(decoder):
    """Let gradient checkpointing act: transformers asks each layer for training mode, which the
    modules below it (dropout) must not be in where log-probabilities are compared."""
    layers = [m for m in decoder.modules() if getattr(m, "gradient_checkpointing", False)]
    before = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = torch.is_grad_enabled()
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training


def _token_logps(head, hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """log p(target | hidden), (S,): at most `chunk` vocabulary rows exist at once."""
    frozen = not any(p.requires_grad for p in head.parameters())
    if frozen and type(head) is torch.nn.Linear:
        return _FrozenHeadLogps.apply(hidden, head.weight, head.bias, targets, chunk)

    def chunk_logps(h: Tensor, y: Tensor) -> Tensor:
        return -F.cross_entropy(head(h).float(), y, reduction="none")

    chunks = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if not torch.is_grad_enabled() or len(targets) <= chunk:
        return torch.cat([chunk_logps(h, y) for h, y in chunks])
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
            p -= p.amax(1, keepdim=True)
            target = p.gather(1, y[:, None])
            total = p.exp_().sum(1, keepdim=True)
            logps.append((target - total.log()).squeeze(1))
            if ctx.needs_input_grad[0]:
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


# --------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample(
    model,
    tokenizer,
    prompts: list[str] | list[list[int]],
    n: int,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int = 0,
    seed: int,
    rows: int = 256,
    sampler: str = "fast",
    stop: str = "</sug>",
    numbers: Sequence[int] | None = None,
    prefix: Prefix | None = None,
    watch: Callable[[Tensor], Tensor] | None = None,
) -> list[list[str]]:
    """n completions of each prompt, as text; temperature 0 is greedy. Deterministic for a seed.

    numbers: of each prompt, 0, 1, 2, ... if left out. The random numbers of the "fast" sampler are
    a prompt's own, by seed and number, whatever prompts are decoded beside it.

    sampler "fast" draws from the top_k likeliest tokens only (0: all), of these from the smallest
    set that holds top_p: not the distribution of top_p alone. "generate" uses the random numbers
    of transformers' generate(num_return_sequences=n) after torch.manual_seed(seed), as long as
    `rows` lets all prompts into one batch: the same tokens, but where logits tie within rounding.
    A completion ends with the end token or with the text `stop`. Prompts given as text are encoded
    plainly: control tokens in them are not parsed.
    prefix: read once for all prompts, where they begin with it.
    watch: called after each step with the token ids so far, (B, n, steps), B <= rows / n; samples
    for which it returns True, (B, n), are given up.
    Raises ValueError for an empty prompt, n < 1 or an unknown sampler.
    """
    encoded = [encode_text(tokenizer, p) if isinstance(p, str) else p for p in prompts]
    if n < 1 or sampler not in SAMPLERS or not all(encoded):
        raise ValueError(f"sample: n >= 1, no empty prompt, sampler of {', '.join(SAMPLERS)}")
    size = max(1, rows // n)
    numbers, order = numbers or range(len(encoded)), list(range(len(encoded)))
    if len(order) > size:  # like lengths together
        order.sort(key=lambda i: len(encoded[i]))
    result: list[list[str]] = [[] for _ in encoded]
    draw = SAMPLERS[sampler](temperature, top_p, top_k, seed)
    ended = _Ends(model, tokenizer, stop)
    for start in tqdm(range(0, len(order), size), "sample", disable=None, leave=False):
        batch = order[start : start + size]
        own = [encoded[i] for i in batch]
        draw.begin([numbers[i] for i in batch], n, max_new_tokens)
        tokens = _decode(
            model, own, n, max_new_tokens, draw, ended, tokenizer.pad_token_id, prefix, watch
        )
        texts = tokenizer.batch_decode(tokens.flatten(0, 1), skip_special_tokens=True)
        for j, i in enumerate(batch):
            result[i] = texts[j * n : (j + 1) * n]
    return result


@dataclass(frozen=True)
class Prefix:
    """The first tokens of every prompt, and what each layer keeps of them."""

    ids: list[int]  # (P,)
    layers: list[tuple[Tensor, Tensor]]  # keys and values, (1, heads, P, d) each


@torch.no_grad()
def read_prefix(model, ids: list[int]) -> Prefix:
    """Read tokens with which prompts begin; it holds as long as the model's weights do."""
    decoder, head = _parts(model, len(ids))
    _use_attention(decoder, "sdpa")
    cache = Cache([_Buffer(len(ids)) for _ in range(decoder.config.num_hidden_layers)])
    row = torch.tensor([ids], device=head.weight.device)
    decoder(input_ids=row, past_key_values=cache, use_cache=True)
    return Prefix(ids, [(layer.keys, layer.values) for layer in cache.layers])


def _decode(
    model, prompts, n: int, max_new_tokens: int, draw, ended, pad: int, prefix=None, watch=None
) -> Tensor:
    """Token ids (B, n, new) with pads behind each end.

    A tree grows: the prompt is read once as trunk, and each step adds one token to each of its n
    branches. The cache holds the prompt once, not n times.
    """
    b, width = len(prompts), max(map(len, prompts))
    decoder, head = _parts(model, width + max_new_tokens)
    _use_attention(decoder, "sdpa")
    weight, device = decoder.get_input_embeddings().weight, head.weight.device
    layers = range(decoder.config.num_hidden_layers)
    cache = Cache([_Buffer(width + n * max_new_tokens) for _ in layers])
    known = len(prefix.ids) if prefix else 0
    if known:
        if any(p[:known] != prefix.ids or len(p) == known for p in prompts):
            raise ValueError("sample: a prompt does not go on from the prefix")
        for layer, parts in zip(cache.layers, prefix.layers, strict=True):
            layer.update(*(x.expand(b, *x.shape[1:]) for x in parts))

    def read(ids: Tensor, position: Tensor, seen) -> Tensor:
        """ids, position (B, Q), which the cache takes in -> hidden states (B, Q, H)."""
        past = cache.get_seq_length()
        return decoder(
            input_ids=ids,
            position_ids=position,
            attention_mask=_dense(seen, *ids.shape, past + ids.shape[1], weight),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    length = torch.tensor([len(p) for p in prompts], device=device)
    ids = torch.tensor([p + [pad] * (width - len(p)) for p in prompts], device=device)  # (B, T)
    position = torch.arange(width, device=device).expand(b, width)
    branch = -(position >= length[:, None]).long()  # (B, T): 0 prompt, -1 pad; samples from 1
    own = branch[:, known:]
    hidden = read(ids[:, known:], position[:, known:], _tree_mask(own, own, branch, known))
    last = hidden[torch.arange(b, device=device), length - 1 - known]  # (B, H)
    logits = head(last).float()[:, None].expand(b, n, -1)  # (B, n, V)
    prompt = torch.arange(b, device=device)  # (B,): those with an open sample
    sample = torch.arange(n, device=device).expand(b, n)  # (B, Q): the one that each slot grows
    tokens = torch.full((b, n + 1, max_new_tokens), pad, device=device)  # sample n is nobody's
    for i in range(max_new_tokens):
        token = draw(logits, prompt, sample, i)  # (B, Q)
        tokens[prompt[:, None], sample, i] = token
        sample = sample.masked_fill(ended(token, tokens[..., : i + 1], prompt, sample), n)
        if watch:
            given_up = F.pad(watch(tokens[:, :n, : i + 1]), (0, 1)).to(device)  # (prompts, n + 1)
            sample = sample.masked_fill(given_up[prompt[:, None], sample], n)
        going = sample < n  # (B, Q)
        if not going.any() or i + 1 == max_new_tokens:
            break
        slots = int(going.sum(1).max())
        if slots < sample.shape[1]:  # open slots first, the rest of the columns away
            kept = going.sort(dim=1, descending=True, stable=True).indices[:, :slots]
            sample, token = sample.gather(1, kept), token.gather(1, kept)
        rows = going.any(1)
        if rows.float().mean() < 0.75:  # dropping a prompt copies the cache: once it saves enough
            cache.batch_select_indices(rows.nonzero().flatten())
            prompt, sample, token, branch = (x[rows] for x in (prompt, sample, token, branch))
        past, branch = branch.shape[1], torch.cat([branch, sample + 1], 1)
        seen = _tree_mask(sample + 1, torch.zeros_like(sample), branch, past)
        logits = head(read(token, (length[prompt] + i)[:, None].expand_as(token), seen)).float()
    return tokens[:, :n]


class _Buffer(DynamicLayer):
    """Keys and values of a layer, with room for `size` tokens: no copy of the past at each step."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.length = size, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        b, heads, t, d = key_states.shape
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys = key_states.new_empty(b, heads, self.size, d)
            self.values = value_states.new_empty(b, heads, self.size, value_states.shape[-1])
        begin, self.length = self.length, self.length + t
        self.keys[:, :, begin : self.length] = key_states
        self.values[:, :, begin : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length


@functools.lru_cache(maxsize=4)  # a large vocabulary takes longer to walk than a step
def _tokens_with(tokenizer, character: str) -> list[int]:
    return sorted(i for text, i in tokenizer.get_vocab().items() if character in text)


class _Ends:
    """Which samples end with the token just drawn: an end token, or one that completes `stop`."""

    def __init__(self, model, tokenizer, stop: str):
        settings = getattr(model, "generation_config", None)
        more = settings.eos_token_id if settings else None
        ends = {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}
        last = _tokens_with(tokenizer, stop[-1]) if stop else []
        device = next(model.parameters()).device
        self.ends = torch.tensor(sorted(ends), device=device)
        self.last = torch.tensor(last, device=device)  # only these can complete `stop`
        self.tokenizer, self.stop = tokenizer, stop

    def __call__(self, token: Tensor, tokens: Tensor, prompt: Tensor, sample: Tensor) -> Tensor:
        """token (B, Q), drawn last; tokens (prompts, n + 1, i + 1), all so far -> bool (B, Q)."""
        done = torch.isin(token, self.ends)
        row, slot = torch.isin(token, self.last).nonzero(as_tuple=True)
        if len(row):
            # `stop` lies within as many tokens as it has bytes, whatever they are.
            ids = tokens[prompt[row], sample[row, slot], -len(self.stop.encode()) :]
            texts = self.tokenizer.batch_decode(ids)
            done[row, slot] |= torch.tensor([self.stop in t for t in texts], device=token.device)
        return done


class _FastDraw:
    """One uniform number a sample and step, drawn on the CPU: the same on every device."""

    def __init__(self, temperature: float, top_p: float, top_k: int, seed: int):
        self.temperature, self.top_p, self.top_k, self.seed = temperature, top_p, top_k, seed

    def begin(self, numbers: list[int], n: int, steps: int) -> None:
        """A new batch: the numbers of its prompts, samples of each, tokens of each at most."""
        seeds = (int(digest(self.seed, number), 16) for number in numbers)
        own = [torch.rand(n, steps, generator=torch.Generator().manual_seed(s)) for s in seeds]
        self.uniform = F.pad(torch.stack(own), (0, 0, 0, 1))  # (prompts, n + 1, steps)

    def __call__(self, logits: Tensor, prompt: Tensor, sample: Tensor, step: int) -> Tensor:
        """logits (B, Q, V) of the open slots -> tokens (B, Q)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        self.uniform = self.uniform.to(logits.device)
        value, token = logits.topk(min(self.top_k or logits.shape[-1], logits.shape[-1]))
        p = (value / self.temperature).softmax(-1)
        mass = p.cumsum(-1)
        p = p.masked_fill(mass - p >= self.top_p, 0)
        mass = p.cumsum(-1)
        u = self.uniform[prompt[:, None], sample, step]  # (B, Q)
        place = torch.searchsorted(mass, u[..., None] * mass[..., -1:])
        return token.gather(-1, place.clamp_max(p.shape[-1] - 1)).squeeze(-1)


class _GenerateDraw:
    """As transformers' generate draws: its warpers, and the noise of torch.multinomial."""

    def __init__(self, temperature: float, top_p: float, top_k: int, seed: int):
        from transformers import (
            LogitsProcessorList,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self.greedy, self.seed, self.random = temperature == 0, seed, None
        self.warpers = LogitsProcessorList()
        if temperature not in (0, 1):
            self.warpers.append(TemperatureLogitsWarper(temperature))
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))

    def begin(self, numbers: list[int], n: int, steps: int) -> None:
        self.b, self.n = len(numbers), n

    def __call__(self, logits: Tensor, prompt: Tensor, sample: Tensor, step: int) -> Tensor:
        """As of _FastDraw."""
        if self.greedy:
            return logits.argmax(-1)
        b, n, v = self.b, self.n, logits.shape[-1]
        self.random = self.random or torch.Generator(logits.device).manual_seed(self.seed)
        scores = self.warpers(None, logits.flatten(0, 1))  # (B * Q, V)
        noise = torch.empty(b * n, v, device=logits.device).exponential_(generator=self.random)
        own = noise[(prompt[:, None] * n + sample.clamp_max(n - 1)).flatten()]
        return (scores.softmax(-1) / own).argmax(-1).view(sample.shape)


SAMPLERS = {"fast": _FastDraw, "generate": _GenerateDraw}
