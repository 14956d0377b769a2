"""What a configuration will need, before anything is loaded: bytes and tokens; and is all in place.

    python train.py --plan --config configs/qwen2.5-7b.yaml    # estimate; no weights, no hub
    python train.py --doctor --config configs/qwen2.5-7b.yaml  # versions, GPU, 4-bit, hub, disk

The bytes are counted from the tensors that transformers' Qwen2 with PEFT's LoRA keeps alive.
`python -m benchmarks.plan` measures the same on a CPU (results/plan.md); a 7B model's DPO steps and
the heaviest call of each stage on an H100 stand there too, within 2.2 %.

Legend: T tokens of a tree row, H hidden, D heads * head_dim, I intermediate, V vocabulary, r rank;
`a` bytes of a weight and an activation: 2 on a GPU (bf16), 4 on a CPU (fp32).
"""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from config import ROOT, Config, GeneratorConfig, UserError

GIB = 2**30
CARDS = (12, 24, 40, 80)  # GiB
# What a card must have beside the estimate: CUDA context, cuBLAS, the text encoder; fragmentation.
CONTEXT, FRAGMENTATION = 1.0 * GIB, 1.10
HELD_OUT_LISTS = 2  # of each user when isg.improve values a checkpoint


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
    biases: tuple[bool, ...] = (True,) * 3 + (False,) * 4  # of `linears`; these are Qwen2's

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
        bias = sum(y * has for (_, y), has in zip(self.linears, self.biases, strict=True))
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
        qkv = kind == "qwen2" or c.get("attention_bias", False)
        out, mlp = kind != "qwen2" and qkv, c.get("mlp_bias", False)
        return Shape(
            hidden=c["hidden_size"],
            layers=c["num_hidden_layers"],
            heads=c["num_attention_heads"],
            kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
            intermediate=c["intermediate_size"],
            vocabulary=c["vocab_size"],
            tied=c.get("tie_word_embeddings", False),
            head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
            biases=(qkv,) * 3 + (out,) + (mlp,) * 3,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no readable model config ({error!r})") from None


def find_shape(config: Config) -> Shape:
    """Of generator.model: a local folder, the hub's local cache, or a known Qwen2.5."""
    g, b = config.generator, config.base
    if not g.model:
        sizes = (b.hidden, b.layers, b.heads, b.kv_heads, b.intermediate, b.vocabulary)
        return Shape(*sizes, tied=True, head_dim=b.hidden // b.heads)
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
    nf4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # 4 bit; a scale of 8 bit for 64, of 32 for 256 * 64
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
    # LoRA input (tokens, I) is free by then.
    mlp = max(2 * a * i * tokens, (2 * a - 4) * i * tokens + weight)
    return mlp + (4 if a == 4 else 12) * h * tokens  # the output's gradient; in bf16 fp32 copies


def training(s: Shape, g: GeneratorConfig, users: int, lists: int, a: int) -> dict[str, float]:
    """Bytes of a step on `users` rows [prompt | list 0 | ...] of the greatest length."""
    width = g.max_prompt_tokens + lists * g.max_new_tokens  # T
    tokens, scored = users * width, users * lists * g.max_new_tokens
    layer, mask = tokens * saved_bytes(s, g.lora_rank, a), users * width**2 * a
    inputs = tokens * a * s.hidden
    if a == 2:  # CUDA's kernel takes keys in eights: a layer keeps a padded copy
        layer += mask
    checkpoint = g.gradient_checkpointing
    once = mask + 2 * tokens * a * s.head_dim  # and cosines and sines of the positions
    # The vocabulary's rows: logits in fp32, in bf16 also as the head makes them; those of a chunk
    # stay until the next are made. Beside them the last norm, and the scored positions.
    chunk, logit = min(256, scored), 4 if a == 4 else 4 + a
    head = s.vocabulary * max(logit * chunk, 4 * chunk + logit * min(chunk, scored - chunk))
    terms = {
        "weights": weight_bytes(s, g.load_in_4bit, a),
        "LoRA, gradients, AdamW": 4 * 4 * s.lora(g.lora_rank),  # fp32: w, dw and two averages
        "activations kept": once + s.layers * (inputs if checkpoint else layer),
        "a layer's backward": layer * checkpoint + layer_work(s, tokens, g.load_in_4bit, a),
        "head chunk": head + tokens * (4 + a) * s.hidden + 2 * scored * a * s.hidden,
    }
    return terms | {"peak": _peak(terms, "a layer's backward", "head chunk")}


def sampling(s: Shape, g: GeneratorConfig, n: int, a: int, lora_bytes=4) -> dict[str, float]:
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
    drawn = 0 if g.top_k else 32  # sorted values, ids, softmax, sums
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


# -------------------------------------------------------------------------------------------- plan


def stages(config: Config, s: Shape, a: int) -> dict[str, dict[str, float]]:
    """Bytes of each stage at its peak, in terms."""
    g, dpo = config.generator, config.dpo
    lora, weights = s.lora(g.lora_rank), weight_bytes(s, g.load_in_4bit, a)
    local = "generator" in vars(config.roles).values()  # plays roles: a base model of its own
    other = dict.fromkeys(("sit", "dpo", "sampling"), local * weights)
    other["dpo"] += 4 * lora  # the best checkpoint so far
    if dpo.reference == "sit" and dpo.rounds > 1:
        other["dpo"] += weights + 4 * lora
    fewest = min(dpo.samples, HELD_OUT_LISTS, config.eval.lists)  # the most prompts at a time
    made = {
        "sit": training(s, g, config.sit.batch_users, config.sit.lists_per_row, a),
        "dpo": training(s, g, config.dpo.batch_users, 1 + len(dpo.negatives), a),
        # Checkpoints are tried out between two steps: gradients, AdamW and the best are there too.
        "sampling": sampling(s, g, fewest, a, lora_bytes=20),
    }
    for name, terms in made.items():
        terms["other models"] = other[name]
        terms["peak"] += other[name]
    return made


def token_lines(config: Config) -> list[str]:
    """Upper estimates: every prompt and list as long as the settings let it be."""
    g, sit, dpo = config.generator, config.sit, config.dpo
    row = g.max_prompt_tokens + sit.lists_per_row * g.max_new_tokens
    tree = g.max_prompt_tokens + (1 + len(dpo.negatives)) * g.max_new_tokens
    pairs = sum(range(1, dpo.rounds + 1))  # a round trains on its own pairs and on earlier ones
    drawn = g.max_prompt_tokens + dpo.samples * g.max_new_tokens

    def total(count: int, each: int) -> str:
        return f"{(count or 1) * each:,}" + ("" if count else " a user")  # 0: all there are

    return [
        f"sit       {sit.batch_users * row:,} a step, in all "
        f"{total(sit.max_rows, sit.epochs * row)}",
        f"dpo       {dpo.batch_users * tree:,} a step, in all "
        f"{total(dpo.max_users, (dpo.passes + 1) * pairs * tree)} with the reference's",
        f"sampling  {max(1, g.sample_rows // dpo.samples) * drawn:,} a batch, for dpo in all "
        f"{total(dpo.max_users, dpo.rounds * drawn)}; and for held-out users",
    ]


def plan(config: Config) -> str:
    """Parameters, bytes and tokens of the generator's stages; raises UserError if unknown."""
    g, s = config.generator, find_shape(config)
    on_gpu, on_cpu = stages(config, s, 2), stages(config, s, 4)
    kind = "4-bit NF4, double quantisation, bf16 compute" if g.load_in_4bit else "bf16"

    def line(name: str, cells) -> str:
        return f"  {name:24}" + "".join(f"{x:>11}" for x in cells)

    table = [line("", on_gpu)]
    every = dict.fromkeys(term for terms in on_gpu.values() for term in terms)
    for term in sorted(every, key="peak".__eq__):  # the peak last
        values = [terms.get(term) for terms in on_gpu.values()]
        table.append(line(term, ["" if x is None else f"{x / GIB:.2f}" for x in values]))
    table.append(line("smallest card", [smallest_card(x["peak"]) for x in on_gpu.values()]))
    cpu = ", ".join(f"{name} {x['peak'] / GIB:.2f}" for name, x in on_cpu.items())
    return "\n".join(
        [
            f"{g.model or 'embedded base model'}: {s.parameters:,} parameters, "
            f"{s.lora(g.lora_rank):,} trained (LoRA r{g.lora_rank})",
            f"\nGiB on a GPU, {kind}; an estimate (results/plan.md):",
            *table,
            "  A peak has the larger of the two that come in turn: a layer's backward and the head "
            "chunk;\n  reading the prompts and a token's step. A card is enough with "
            f"{FRAGMENTATION - 1:.0%} for fragmentation and\n  {CONTEXT / GIB:g} GiB for CUDA's "
            "context and the text encoder beside the peak.",
            f"\nGiB without a GPU, fp32 compute: {cpu}; Python takes about 1 more",
            f"\nTokens at most, of prompts of {g.max_prompt_tokens} and lists of "
            f"{g.max_new_tokens}:",
            *(f"  {line}" for line in token_lines(config)),
            *(["  lists come from generator.endpoint, not from here"] if g.endpoint else []),
        ]
    )


def smallest_card(peak: float) -> str:
    fits = [c for c in CARDS if peak * FRAGMENTATION + CONTEXT <= c * GIB]
    return f"{fits[0]} GB" if fits else "none"


# ------------------------------------------------------------------------------------------ doctor


def doctor(config: Config) -> str:
    """A line for each thing that a run needs: ok, or a problem and what to do. Never raises."""
    lines = []
    for check in (_versions, _gpu, _four_bit, _hub, _endpoints, _room):
        try:
            for fine, text in check(config):
                lines.append(f"{'ok' if fine else 'problem':9}{text}")
        except Exception as error:  # whatever is broken, the other lines are still of use
            reason = " ".join(str(error).split()) or type(error).__name__
            lines.append(f"{'problem':9}{check.__name__.strip('_')}: {reason[:300]}")
    return "\n".join(lines)


Found = Iterator[tuple[bool, str]]


def _versions(config: Config) -> Found:
    yield sys.version_info >= (3, 11), f"Python {platform.python_version()} (3.11 or later)"
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", text, re.MULTILINE))
    for name in ("torch", "transformers", "peft", "bitsandbytes"):
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            here = "missing"
        same = here.split("+")[0] == pins[name]
        yield same, f"{name} {here}" + ("" if same else f": pip install {name}=={pins[name]}")


def _gpu(config: Config) -> Found:
    import torch

    if not torch.cuda.is_available():
        yield True, "no GPU: the embedded default and small models run on the CPU"
        return
    card = torch.cuda.get_device_properties(0)
    bf16 = torch.cuda.is_bf16_supported()
    text = f"GPU {card.name}, {card.total_memory / GIB:.1f} GiB, CUDA {torch.version.cuda}"
    yield bf16, text + (", bf16" if bf16 else ": no bf16, which starts with compute capability 8.0")


def _four_bit(config: Config) -> Found:
    import torch

    from llm import quiet_libraries

    quiet_libraries()
    from bitsandbytes.nn import Linear4bit

    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    layer = Linear4bit(64, 64, bias=False, compute_dtype=dtype, quant_type="nf4").to(device)
    x = torch.randn(4, 64, device=device, dtype=dtype, requires_grad=True)
    layer(x).sum().backward()
    fine = bool(x.grad.isfinite().all() and x.grad.any())
    advice = "" if fine else ": no gradient; set generator.load_in_4bit=false"
    yield fine, f"4-bit layer of bitsandbytes, forward and backward on {device}{advice}"


def unreachable(url: str, key: str = "") -> str:
    """Why there is no answer from `url` within 3 seconds, or ""."""
    if not url.startswith(("http://", "https://")):
        return "no http address"
    request = urllib.request.Request(url)
    if key:
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=3):
            return ""
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except (OSError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    except ValueError:  # its text holds the header
        return "no valid address, or no valid key"


def _hub(config: Config) -> Found:
    g, there = config.generator, _at_hand(config.generator)
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    why = "HF_HUB_OFFLINE is set" if offline else unreachable(hub)
    advice = "; nothing is needed from it" if there else (
        f": where it can be reached, hf download {g.model} --local-dir FOLDER; then copy FOLDER "
        f"here and set generator.model=FOLDER"
    )
    yield there or not why, f"hub {hub}: {why + advice if why else 'reachable'}"


def _at_hand(g: GeneratorConfig) -> bool:
    if not g.model or Path(g.model).is_dir():
        return True
    return any(cached_file(g, f"model.safetensors{end}") for end in ("", ".index.json"))


def _endpoints(config: Config) -> Found:
    asked = "endpoint" in vars(config.roles).values()
    base = config.endpoint.base_url or os.environ.get("OPENAI_BASE_URL", "")
    if asked and not base:
        yield False, "endpoint.base_url: a role asks an endpoint; set it, or OPENAI_BASE_URL"
    g = config.generator
    for name, url, variable in (
        ("endpoint.base_url", base, config.endpoint.key_env),
        ("generator.endpoint", g.endpoint, g.endpoint_key_env),
    ):
        if url:
            key = os.environ.get(variable, "").strip() if variable else ""
            why = unreachable(url.rstrip("/") + "/models", key)
            shown = url.split("@")[-1]  # whatever stands before is a secret
            advice = f": {why}; start the server, or correct {name} or its key"
            yield not why, f"{name} {shown}" + (advice if why else " answers")


def _room(config: Config) -> Found:
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE

    g, s, gpu = config.generator, find_shape(config), torch.cuda.is_available()
    if not gpu and s.parameters > 2e9:
        yield False, f"no GPU, which {s.parameters / 1e9:.1f} B parameters need: a smaller model"
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    peak = max(x["peak"] for x in stages(config, s, 2 if gpu else 4).values())
    places = [("RAM", ram, 4 * GIB if gpu else peak + GIB, "a smaller model or a GPU; see --plan")]
    if gpu:
        card = torch.cuda.get_device_properties(0).total_memory
        advice = "smaller batch_users, sample_rows or max_prompt_tokens; see --plan"
        places.append(("GPU memory", card, peak * FRAGMENTATION + CONTEXT, advice))
    adapters = 4 * s.lora(g.lora_rank) * (config.dpo.rounds + 2)  # sit, each round, the baseline
    disks = [(f"run.root ({config.run.root})", config.run.root, adapters + GIB / 2)]
    if not _at_hand(g):
        disks.append((f"the hub's cache ({HF_HUB_CACHE})", HF_HUB_CACHE, 2 * s.parameters))
    for name, folder, need in disks:
        path = Path(folder).absolute()
        free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
        places.append((f"free disk for {name}", free, need, "make room, or set run.root, HF_HOME"))
    for name, has, need, advice in places:
        text = f"{name}: {has / GIB:.1f} GiB, {need / GIB:.1f} needed by estimate"
        yield has >= need, text if has >= need else f"{text}; {advice}"
    yield True, f"{os.cpu_count()} cores"
