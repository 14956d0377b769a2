"""What a configuration will need, before anything is loaded: bytes and tokens.

    python train.py --plan --config configs/qwen2.5-7b.yaml    # estimate; no weights, no hub

Counted are the tensors that transformers' Qwen2 with PEFT's LoRA keeps alive. `python -m
benchmarks.plan` measures them on a CPU; results/plan.md has an H100's too, within 2.2 %.

Legend: T tokens of a tree row, H hidden, D heads * head_dim, I intermediate, V vocabulary, r rank;
`a` bytes of a weight and an activation: 2 on a GPU (bf16), 4 on a CPU (fp32).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

import llm
from config import Config, GeneratorConfig
from files import UserError
from llm.logps import HEAD_CHUNK

GIB = 2**30
CARDS = (12, 24, 40, 80)  # GiB
CONTEXT = 1.0 * GIB  # on a card beside the estimate: CUDA's context, cuBLAS, the text encoder
FRAGMENTATION = 1.10  # of torch's allocator: blocks that are free but too small


@dataclass(frozen=True)
class Shape:
    """Of a decoder with RMSNorm, rotary positions, grouped attention and SwiGLU."""

    hidden: int  # H
    layers: int
    heads: int
    kv_heads: int  # keys and values are shared by heads // kv_heads heads
    intermediate: int  # I
    vocabulary: int  # V
    tied: bool  # the head is the embedding: its V * H weights exist once
    head_dim: int
    biases: tuple[bool, ...] = (True,) * 3 + (False,) * 4  # of `linears`; these are Qwen2's

    @property
    def query(self) -> int:
        return self.heads * self.head_dim  # D; not H in every model

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's linear maps: those that LoRA adapts and 4-bit packs."""
        h, i, d, kv = self.hidden, self.intermediate, self.query, self.kv_heads * self.head_dim
        return [(h, d), (h, kv), (h, kv), (d, h), (h, i), (h, i), (i, h)]  # qkv, o; gate, up, down

    @property
    def packed(self) -> int:
        """Weights of the linear maps, the head aside: bitsandbytes leaves it as it is."""
        return self.layers * sum(inside * out for inside, out in self.linears)

    @property
    def parameters(self) -> int:
        bias = sum(out for (_, out), has in zip(self.linears, self.biases, strict=True) if has)
        norms = (2 * self.layers + 1) * self.hidden  # two a layer, and the last
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.packed + self.layers * bias + norms + embeddings

    def lora(self, rank: int) -> int:
        """Weights that are trained: A (r, in) and B (out, r) of every linear map."""
        return self.layers * sum(rank * (inside + out) for inside, out in self.linears)


QWEN = {  # of the hub's config.json; heads of 64 or 128
    "0.5B": Shape(896, 24, 14, 2, 4864, 151_936, True, 64),
    "1.5B": Shape(1536, 28, 12, 2, 8960, 151_936, True, 128),
    "3B": Shape(2048, 36, 16, 2, 11_008, 151_936, True, 128),
    "7B": Shape(3584, 28, 28, 4, 18_944, 152_064, False, 128),
}
BY_NAME = {f"Qwen/Qwen2.5-{k}{end}": s for k, s in QWEN.items() for end in ("", "-Instruct")}
BY_NAME[""] = Shape(576, 30, 9, 3, 1536, 49_152, True, 64, (False,) * 7)  # before its fetch


def read_shape(path: Path) -> Shape:
    """The shape in a config.json; raises UserError for another architecture than is counted."""
    try:
        c = json.loads(path.read_text(encoding="utf-8"))
        if (kind := c["model_type"]) not in ("qwen2", "llama", "mistral"):
            raise UserError(f"{path}: model_type {kind}: only qwen2, llama and mistral are counted")
        qkv = kind == "qwen2" or c.get("attention_bias", False)  # Qwen2 has no switch for it
        biases = (qkv,) * 3 + (kind != "qwen2" and qkv,) + (c.get("mlp_bias", False),) * 3
        h, heads = c["hidden_size"], c["num_attention_heads"]
        kv_heads = c.get("num_key_value_heads") or heads  # left out, or null, where it is the same
        sizes = h, c["num_hidden_layers"], heads, kv_heads, c["intermediate_size"], c["vocab_size"]
        tied, head_dim = c.get("tie_word_embeddings", False), c.get("head_dim") or h // heads
        return Shape(*sizes, tied, head_dim, biases)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no readable model config ({error!r})") from None


def find_shape(config: Config) -> Shape:
    """Of the generator: a local folder, the hub's local cache, or a Qwen2.5; else UserError."""
    g, folder = config.generator, Path(llm.model_path(config.generator))
    path = folder / "config.json" if folder.is_dir() else cached_file(g, "config.json")
    if path:  # goes before the table: it may be changed
        return read_shape(path)
    if g.model in BY_NAME:
        return BY_NAME[g.model]
    raise UserError(
        f"generator.model={g.model}: no such folder, not in the local cache, and no known shape; "
        f"name a local folder with a config.json (where a hub can be reached: hf download "
        f"{g.model} --local-dir FOLDER) or one of {', '.join(k for k in BY_NAME if 'Inst' in k)}")


def cached_file(g: GeneratorConfig, name: str) -> Path | None:
    """Where the hub's local cache holds a file of generator.model; asks no network."""
    try:
        path = try_to_load_from_cache(g.model, name, revision=g.revision or None)
    except HFValidationError:  # no hub id: a path that does not exist
        return None
    return Path(path) if isinstance(path, str) else None  # may be a mark of "known to be missing"


def weight_bytes(s: Shape, in_4bit: bool, a: int) -> float:
    """Of the frozen base model."""
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


def training(s: Shape, g: GeneratorConfig, users: int, lists: int, a: int) -> dict[str, float]:
    """Bytes of a step on `users` rows [prompt | list 0 | ...] of the greatest length."""
    h, i, width = s.hidden, s.intermediate, g.max_prompt_tokens + lists * g.max_new_tokens
    tokens, scored = users * width, users * lists * g.max_new_tokens  # B * T, and those of lists
    layer, mask = tokens * saved_bytes(s, g.lora_rank, a), users * width**2 * a  # mask (B, 1, T, T)
    if a == 2:  # CUDA's kernel takes keys in eights: a layer keeps a padded copy
        layer += mask
    kept, again = (tokens * a * h, layer) if g.gradient_checkpointing else (layer, 0)
    positions = 2 * tokens * a * s.head_dim  # cosines and sines; as the mask, once for all layers
    # A layer's backward holds most in its MLP: two gradients of (T, I) while silu(gate) * up is
    # undone; or the weight at `down`, dequantised for the product, its LoRA input (T, I) dropped.
    weight = a * h * i if g.load_in_4bit else 0
    mlp = max(2 * a * i * tokens, (2 * a - 4) * i * tokens + weight)
    mlp += (4 if a == 4 else 12) * h * tokens  # the output's gradient; in bf16 fp32 copies
    # The vocabulary's rows: logits in fp32, in bf16 also as the head makes them; those of a chunk
    # stay until the next are made. Beside them the last norm, and the scored positions.
    chunk, logit = min(HEAD_CHUNK, scored), 4 if a == 4 else 4 + a
    head = s.vocabulary * max(logit * chunk, 4 * chunk + logit * min(chunk, scored - chunk))
    return with_peak(
        weight_bytes(s, g.load_in_4bit, a), 4 * 4 * s.lora(g.lora_rank),  # fp32: w, dw, averages
        {"activations kept": mask + positions + s.layers * kept},
        {"a layer's backward": again + mlp,
         "head chunk": head + tokens * (4 + a) * h + 2 * scored * a * h})


def sampling(s: Shape, g: GeneratorConfig, n: int, a: int, lora_bytes: int = 4) -> dict[str, float]:
    """Bytes of decoding n lists of each of sample_rows // n prompts to the end.

    lora_bytes: of each LoRA weight; between steps of training AdamW's state is there too.
    """
    prompts, width = max(1, g.sample_rows // n), g.max_prompt_tokens
    length = width + n * g.max_new_tokens  # of the trunk and all branches
    h, i, kv = s.hidden, s.intermediate, s.kv_heads * s.head_dim
    logits = prompts * n * s.vocabulary  # of one step, a count and no bytes
    weight = a * h * i if g.load_in_4bit else 0  # dequantised for a product, as in training
    per_token = 2 * a * i + 3 * a * h  # silu(gate), up; embedding, residual, normed
    per_token += a * width + (4 * h if a == 2 else 0)  # the mask; LoRA's x
    product = max(2 * 4 * i * prompts * width, weight)  # LoRA's and its sum in fp32, (T, I) each
    # Scores in two parts and as one, their softmax in fp32, in bf16 also as it goes in and out.
    score = 2 * a + 4 + (6 if a == 2 else 0)  # bytes
    scores = prompts * n * s.heads * (width + g.max_new_tokens) * score
    drawn = 0 if g.top_k else 32  # values, ids, softmax, sums of a sort of all V
    step = max(scores + weight, (4 + a if a == 2 else 4) * logits, drawn * logits)
    return with_peak(
        weight_bytes(s, g.load_in_4bit, a), lora_bytes * s.lora(g.lora_rank),
        {"KV cache": 2 * a * s.layers * prompts * length * kv},  # allocated whole in the first step
        # The prompts' hidden states stay, and the last step's logits until the new ones are there.
        {"reading the prompts": prompts * width * per_token + product,
         "a token's step": prompts * width * a * h + 4 * logits + step})


def with_peak(weights: float, trained: int, kept: dict, in_turn: dict) -> dict[str, float]:
    """All terms and their "peak": at once, but of those that come in turn the largest alone."""
    always = {"weights": weights, "LoRA, gradients, AdamW": trained} | kept
    return always | in_turn | {"peak": sum(always.values()) + max(in_turn.values())}


def stage_bytes(config: Config, s: Shape, a: int) -> dict[str, dict[str, float]]:
    """Bytes of each stage at its peak, in terms."""
    g, dpo = config.generator, config.dpo
    # A base beside the policy, where it plays roles.
    other = weight_bytes(s, g.load_in_4bit, a) * ("generator" in vars(config.roles).values())
    fewest = min(dpo.samples, config.eval.lists)  # the most prompts at a time

    def at_once(users: int) -> int:
        return min(users, g.micro_batch or users)

    stages = {
        "sit": training(s, g, at_once(config.sit.batch_users), config.sit.lists_per_row, a),
        "dpo": training(s, g, at_once(dpo.batch_users), 1 + len(dpo.negatives), a),  # one is chosen
        # An upper bound: as it was measured, with gradients and AdamW beside.
        "sampling": sampling(s, g, fewest, a, lora_bytes=20)}
    return {name: terms | {"other models": other, "peak": terms["peak"] + other}
            for name, terms in stages.items()}


def token_lines(config: Config) -> list[str]:
    """Upper estimates: every prompt and list as long as the settings let it be."""
    g, sit, dpo = config.generator, config.sit, config.dpo
    rows = (sit.lists_per_row, 1 + len(dpo.negatives), dpo.samples)  # lists beside a prompt
    row, tree, drawn = (g.max_prompt_tokens + n * g.max_new_tokens for n in rows)
    pairs = sum(range(1, dpo.rounds + 1))  # a round trains on its own pairs and on earlier ones

    def total(count: int, each: int) -> str:
        return f"in all {count * each:,}" if count else f"in all {each:,} a user"  # 0: all users

    dpo_tokens = total(dpo.max_users, (dpo.passes + 1) * pairs * tree)
    batch, sampled = max(1, g.sample_rows // dpo.samples), total(dpo.max_users, dpo.rounds * drawn)
    return [
        f"  sit       {sit.batch_users * row:,} a step, {total(sit.max_rows, sit.epochs * row)}",
        f"  dpo       {dpo.batch_users * tree:,} a step, {dpo_tokens} with the reference's",
        f"  sampling  {batch * drawn:,} a batch, for dpo {sampled}"]


def table_lines(stages: dict[str, dict[str, float]]) -> list[str]:
    """A row a term, a column a stage, in GiB."""
    names = {name: None for terms in stages.values() for name in terms}
    rows = {"": [*stages]}
    for name in sorted(names, key="peak".__eq__):  # the peak last
        rows[name] = [f"{t[name] / GIB:.2f}" if name in t else "" for t in stages.values()]
    rows["smallest card"] = [smallest_card(terms["peak"]) for terms in stages.values()]
    return [f"  {name:24}" + "".join(f"{x:>11}" for x in cells) for name, cells in rows.items()]


def smallest_card(peak: float) -> str:
    needed = peak * FRAGMENTATION + CONTEXT
    return next((f"{card} GB" for card in CARDS if needed <= card * GIB), "none")


def plan(config: Config) -> str:
    """Parameters, bytes and tokens of the generator's stages; raises UserError if unknown."""
    g, s = config.generator, find_shape(config)
    kind = "4-bit NF4, double quantisation, bf16 compute" if g.load_in_4bit else "bf16"
    a = 2 if g.precision == "bfloat16" else 4  # auto depends on the CPU
    cpu = [f"{name} {terms['peak'] / GIB:.2f}" for name, terms in stage_bytes(config, s, a).items()]
    return "\n".join([
        f"{g.model or 'SmolLM2-135M-Instruct'}: {s.parameters:,} parameters, "
        f"{s.lora(g.lora_rank):,} trained (LoRA r{g.lora_rank})",
        f"\nGiB on a GPU, {kind}; an estimate (results/plan.md):",
        *table_lines(stage_bytes(config, s, 2)),
        "  A peak has the larger of the two that come in turn: a layer's backward and the head "
        "chunk;\n  reading the prompts and a token's step. A card is enough with "
        f"{FRAGMENTATION - 1:.0%} for fragmentation and\n  {CONTEXT / GIB:g} GiB for CUDA's "
        "context and the text encoder beside the peak.",
        f"\nGiB without a GPU, fp32 compute: {', '.join(cpu)}; Python takes about 1 more",
        f"\nTokens at most, of prompts of {g.max_prompt_tokens} and lists of {g.max_new_tokens}:",
        *token_lines(config),
        *(["  lists come from generator.endpoint, not from here"] if g.endpoint else [])])
