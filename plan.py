"""What a configuration will need, before anything is loaded: bytes and tokens; and is all in place.

    python train.py --plan --config configs/qwen2.5-7b.yaml    # estimate; no weights, no hub
    python train.py --doctor --config configs/qwen2.5-7b.yaml  # versions, GPU, 4-bit, hub, disk

The bytes are counted from the tensors that transformers' Qwen2 with PEFT's LoRA keeps alive.
`python -m benchmarks.plan` measures the same on a CPU (results/plan.md); no GPU has confirmed it.

Legend: T tokens of a tree row, H hidden, D heads * head_dim, I intermediate, V vocabulary, r rank;
`a` bytes of a weight and an activation: 2 on a GPU (bf16), 4 on a CPU (fp32).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from config import ROOT, Config, GeneratorConfig, UserError

GIB = 2**30
CARDS = (12, 24, 40, 80)  # GiB
# What a card must have beside the estimate: CUDA context, cuBLAS, the text encoder; fragmentation.
CONTEXT, FRAGMENTATION = 1.0 * GIB, 1.10


# ------------------------------------------------------------------------------------------ shapes


@dataclass(frozen=True)
class Shape:
    """Of a decoder with RMSNorm, rotary positions, grouped attention and SwiGLU."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    head_dim: int
    qkv_bias: bool = True  # Qwen2's
    other_bias: tuple[bool, bool] = (False, False)  # of the attention's output, of the MLP

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's linear maps: those that LoRA adapts and 4-bit packs."""
        h, i, q, kv = self.hidden, self.intermediate, self.query, self.kv_heads * self.head_dim
        return [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]

    @property
    def query(self) -> int:  # D
        return self.heads * self.head_dim

    @property
    def packed(self) -> int:
        """Weights of the linear maps, the head aside."""
        return self.layers * sum(x * y for x, y in self.linears)

    @property
    def parameters(self) -> int:
        out = [y for _, y in self.linears]
        bias = sum(out[:3]) * self.qkv_bias
        bias += out[3] * self.other_bias[0] + sum(out[4:]) * self.other_bias[1]
        rest = self.layers * (bias + 2 * self.hidden) + self.hidden  # and the norms
        return self.packed + rest + self.vocabulary * self.hidden * (1 if self.tied else 2)

    def lora(self, rank: int) -> int:
        return self.layers * sum(rank * (x + y) for x, y in self.linears)


QWEN = {  # of the hub's config.json; heads of 64 or 128
    "0.5B": Shape(896, 24, 14, 2, 4864, 151_936, True, 64),
    "1.5B": Shape(1536, 28, 12, 2, 8960, 151_936, True, 128),
    "3B": Shape(2048, 36, 16, 2, 11_008, 151_936, True, 128),
    "7B": Shape(3584, 28, 28, 4, 18_944, 152_064, False, 128),
}
KNOWN = {f"Qwen/Qwen2.5-{size}{kind}": s for size, s in QWEN.items() for kind in ("", "-Instruct")}


def read_shape(path: Path) -> Shape:
    """The shape in a config.json; raises UserError for another architecture than is counted."""
    try:
        c = json.loads(path.read_text(encoding="utf-8"))
        kind = c["model_type"]
        if kind not in ("qwen2", "llama", "mistral"):
            raise UserError(f"{path}: model_type {kind}: only qwen2, llama and mistral are counted")
        bias = kind == "llama" and c.get("attention_bias", False)
        return Shape(
            hidden=c["hidden_size"],
            layers=c["num_hidden_layers"],
            heads=c["num_attention_heads"],
            kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
            intermediate=c["intermediate_size"],
            vocabulary=c["vocab_size"],
            tied=c.get("tie_word_embeddings", False),
            head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
            qkv_bias=kind == "qwen2" or bias,
            other_bias=(bias, kind == "llama" and c.get("mlp_bias", False)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no readable model config ({error!r})") from None


def find_shape(config: Config) -> Shape:
    """Of generator.model: a local folder, the hub's local cache, or a known Qwen2.5."""
    g, b = config.generator, config.base
    if not g.model:
        return Shape(
            b.hidden, b.layers, b.heads, b.kv_heads, b.intermediate, b.vocabulary, True,
            b.hidden // b.heads,
        )
    if Path(g.model).is_dir():
        return read_shape(Path(g.model) / "config.json")
    if cached := cached_file(g, "config.json"):
        return read_shape(cached)
    if g.model in KNOWN:
        return KNOWN[g.model]
    raise UserError(
        f"generator.model={g.model}: no such folder, not in the local cache, and no known shape; "
        f"name a local folder with a config.json (where a hub can be reached: hf download "
        f"{g.model} --local-dir FOLDER) or one of {', '.join(k for k in KNOWN if 'Inst' in k)}"
    )


def cached_file(g: GeneratorConfig, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(g.model, name, revision=g.revision or None)
    except HFValidationError:  # no hub id: a path that does not exist
        return None
    return Path(found) if isinstance(found, str) else None


# ------------------------------------------------------------------------------------------- bytes


def weight_bytes(s: Shape, in_4bit: bool, a: int) -> float:
    if not in_4bit:
        return a * s.parameters
    nf4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # and a scale of 8 bit to 64 weights, one of 32 to 256 * 64
    return nf4 * s.packed + a * (s.parameters - s.packed)


def saved_bytes(s: Shape, rank: int, a: int) -> int:
    """What autograd keeps of a layer for each token."""
    h, d, i = s.hidden, s.query, s.intermediate
    total = 2 * (4 * h + 4)  # the two norms: their fp32 input, and 1 / root mean square
    total += 4 * a * d + 4 * s.heads  # attention: q, k, v (repeated to all heads), out; logsumexp
    total += 3 * a * i  # SwiGLU: gate, silu(gate), up
    total += 7 * 4 * rank  # LoRA: A x of each of seven maps, in fp32
    if a == 4:
        return total + 2 * 4 * h + 4 * i  # LoRA's x: of q, k, v; of gate, up; of down. o's is `out`
    return total + 5 * 4 * h + 4 * d + 4 * i  # LoRA's x as an fp32 copy for each of seven maps


def layer_work(s: Shape, tokens: int, in_4bit: bool, a: int) -> float:
    """The most that a layer's backward holds beside what was saved: in its MLP."""
    h, i = s.hidden, s.intermediate
    weight = a * h * i if in_4bit else 0  # dequantised for the matrix product, then dropped
    # Two gradients of (tokens, I) while silu(gate) * up is undone; or the weight at `down`, whose
    # fp32 LoRA input (tokens, I) is free by then.
    mlp = max(2 * a * i * tokens, (2 * a - 4) * i * tokens + weight)
    return mlp + (4 if a == 4 else 12) * h * tokens  # the output's gradient; in bf16 fp32 copies


def training(s: Shape, g: GeneratorConfig, users: int, lists: int, a: int) -> dict[str, float]:
    """Bytes of a step on `users` rows [prompt | list 0 | ...] of the greatest length."""
    width = g.max_prompt_tokens + lists * g.max_new_tokens  # T
    tokens, scored = users * width, users * lists * g.max_new_tokens
    layer, mask = tokens * saved_bytes(s, g.lora_rank, a), users * width**2 * a
    inputs = tokens * a * s.hidden
    if g.attention == "flex_attention":
        mask = 0
    elif a == 2:  # CUDA's kernel takes keys in eights: a layer keeps a padded copy
        layer += mask
    checkpoint = g.gradient_checkpointing
    once = mask
    once += 2 * tokens * a * s.head_dim  # cosines and sines of the positions
    once += scored * a * s.hidden  # d log p / d hidden of the scored positions
    terms = {
        "weights": weight_bytes(s, g.load_in_4bit, a),
        "LoRA, gradients, AdamW": 4 * 4 * s.lora(g.lora_rank),  # fp32: w, dw and two averages
        "activations kept": once + s.layers * (inputs if checkpoint else layer),
        "a layer's backward": layer * checkpoint + layer_work(s, tokens, g.load_in_4bit, a),
        # A chunk's logits in fp32, in bf16 also as they come from the head or go back into it.
        "head chunk": min(g.head_chunk, scored) * s.vocabulary * (4 if a == 4 else 4 + a)
        + scored * a * s.hidden,
    }
    return terms | {"peak": _peak(terms, "a layer's backward", "head chunk")}


def sampling(
    s: Shape, g: GeneratorConfig, n: int, a: int, lora_bytes: int = 4
) -> dict[str, float]:
    """Bytes of decoding n lists of each of sample_rows // n prompts to the end.

    lora_bytes: of each LoRA weight; between steps of training AdamW's state is there too.
    """
    prompts, width = max(1, g.sample_rows // n), g.max_prompt_tokens
    length = width + n * g.max_new_tokens  # of a row of the cache
    h, d, i, kv = s.hidden, s.query, s.intermediate, s.kv_heads * s.head_dim
    logits = prompts * n * s.vocabulary
    weight = a * h * i if g.load_in_4bit else 0
    per_token = a * i + a * i  # silu(gate), up
    per_token += 3 * a * h + (4 * h if a == 2 else 0)  # embedding, residual, normed; LoRA's x
    drawn = 0 if g.sampler == "fast" and g.top_k else 32  # sorted values, ids, softmax, sums
    repeated = 2 * a * prompts * length * d if s.heads > s.kv_heads and n > 1 else 0
    steps = prompts * n * length * (a + 3)  # the mask, and the truth values it is made of
    terms = {
        "weights": weight_bytes(s, g.load_in_4bit, a),
        "LoRA, gradients, AdamW": lora_bytes * s.lora(g.lora_rank),
        "KV cache": 2 * a * s.layers * prompts * length * kv,  # allocated whole in the first step
        # Beside these LoRA's product and its sum in fp32, (T, I) each; and the mask.
        "reading the prompts": prompts * width * per_token
        + max(2 * 4 * i * prompts * width, weight)
        + prompts * width**2 * a,
        # The prompts' hidden states stay. Logits of the last step are there until the new ones are.
        "a token's step": prompts * width * a * h
        + 4 * logits
        + max(repeated + steps + weight, (4 + a if a == 2 else 4) * logits, drawn * logits),
    }
    return terms | {"peak": _peak(terms, "reading the prompts", "a token's step")}


def _peak(terms: dict[str, float], *in_turn: str) -> float:
    """All at once, of those `in_turn` the largest alone."""
    return sum(terms.values()) - sum(terms[x] for x in in_turn) + max(terms[x] for x in in_turn)
