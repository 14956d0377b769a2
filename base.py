"""The embedded stand-in for Qwen2.5: a Qwen2-architecture model of about a million weights and its
byte-level BPE, pre-trained here on generic starter lists, for where no model hub is reachable.

    python train.py --stage base

It knows what a fluent model knows of the task (short questions in a list, how to copy a subject out
of a line), and nothing of any user or of the simulated platform: its subjects are invented names
and random words of the encoder's vocabulary.

Legend: B rows, T tokens of a row, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

import roles
from config import ROOT, BaseConfig, GeneratorConfig, atomic_path
from llm import completion_logps, encode_completion, encode_prompt, packaged_minilm, sample


class BaseCorpus:
    """Generic starter lists: prompts of interest lines, and a list that copies subjects from lines
    drawn at random. Nearly every subject occurs once, since copying unseen names is learned from
    many distinct ones."""

    def __init__(self, seed: int):
        with open(ROOT / "configs" / "base_corpus.yaml", encoding="utf-8") as file:
            self.phrases = yaml.safe_load(file)
        for code, tail in (("en", ""), ("zh", "_zh")):  # a fluent model knows the usual questions
            self.phrases["templates" + tail] += roles.templates(code)
        vocabulary = Path(packaged_minilm(), "vocab.txt").read_text(encoding="utf-8").split("\n")
        words = [w for w in vocabulary if w.isascii() and w.isalpha() and len(w) > 2]
        self.common, self.rare = words[:400], words[400:]  # they are in order of frequency
        self.rng = random.Random(seed)

    def invented(self, low: int, high: int) -> str:
        return "".join(self.rng.choices(self.phrases["syllables"], k=self.rng.randint(low, high)))

    def subject(self, chinese: bool) -> str:
        rng = self.rng
        if chinese:
            return "".join(rng.choices(self.phrases["characters_zh"], k=rng.randint(2, 4)))
        kind = rng.random()
        if kind < 0.3:
            name = self.invented(2, 4).capitalize()
            if rng.random() < 0.5:
                name += rng.choice([" ", " ", "-", "'s ", " of ", " the "])
                name += self.invented(1, 3).capitalize()
            return name
        if kind < 0.35:
            return f"{self.invented(1, 2).upper()[:4]} {rng.randint(2, 2050)}"
        if kind < 0.45:
            return f"{rng.choice(self.rare)} {self.invented(2, 4)}"
        name = " ".join(rng.choices(self.rare, k=rng.choice([1, 2, 2, 3])))
        return name.title() if rng.random() < 0.5 else name

    def line(self, subject: str, chinese: bool) -> str:
        """What somebody may have asked about a subject."""
        rng, form = self.rng, "{x}"
        if chinese or rng.random() < 0.5:
            form = rng.choice(self.phrases["lines_zh" if chinese else "lines"])
        else:
            before, after = rng.randint(0, 7), rng.randint(0, 4)
            words = rng.choices(self.common, k=before + after)
            form = " ".join([*words[:before], "{x}", *words[before:]])
        text = form.format(x=subject, y=self.subject(chinese))
        return text[0].upper() + text[1:] if rng.random() < 0.5 else text

    def example(self, list_size: int, num_lists: int) -> tuple[list[str], list[list[str]]]:
        """Interest lines and some lists of starters for them."""
        rng, chinese = self.rng, self.rng.random() < 0.06
        count = rng.choice([1, 2, 2, 3, 3, 4, 4, 5, 6, 6, 7, 8, 12, 16])
        subjects = [self.subject(chinese) for _ in range(count)]
        lines = [self.line(x, chinese) for x in subjects]
        return lines, [self.starters(subjects, chinese, list_size) for _ in range(num_lists)]

    def starters(self, subjects: list[str], chinese: bool, n: int) -> list[str]:
        rng = self.rng
        chosen = rng.sample(subjects, min(len(subjects), n))
        chosen += rng.choices(subjects, k=n - len(chosen))
        rng.shuffle(chosen)
        templates = rng.sample(self.phrases["templates_zh" if chinese else "templates"], n)
        return [
            t.format(x=x, y=rng.choice(subjects)) for t, x in zip(templates, chosen, strict=True)
        ]


def build_base(settings: BaseConfig, generator: GeneratorConfig, folder: str | Path) -> dict:
    """Pre-train the stand-in for Qwen2.5 (its architecture, a few million weights) from nothing.

    Nothing but for one thing: copying names is written into its initial weights, see
    install_copy_circuit. Writes a transformers folder with its own byte-level BPE; returns figures.
    Takes minutes.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    started = time.process_time()
    corpus = BaseCorpus(settings.seed)
    k = generator.list_size
    examples = [corpus.example(k, settings.lists) for _ in range(settings.prompts)]
    tokenizer = train_tokenizer(
        ["\n- ".join([generator.instruction, *lines]) for lines, _ in examples]
        + [
            f"\n<sug> {' && '.join(starters)} </sug>" for _, lists in examples for starters in lists
        ],
        settings.vocabulary,
    )

    def encoded(examples):
        return [
            (
                encode_prompt(tokenizer, lines, k, generator.instruction, 400),
                [encode_completion(tokenizer, starters) for starters in lists],
            )
            for lines, lists in examples
        ]

    held = encoded([corpus.example(k, 1) for _ in range(64)])
    batches = _batches(encoded(examples), settings.batch_tokens, random.Random(settings.seed))
    torch.manual_seed(settings.seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            intermediate_size=settings.intermediate,
            tie_word_embeddings=True,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},  # as Qwen2.5
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    install_copy_circuit(model)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decay}, {"params": plain, "weight_decay": 0.0}],
        settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.05,
    )
    warm = max(1, len(batches) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda i: min(
            (i + 1) / warm, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * i / len(batches)))
        ),
    )
    bar = tqdm(batches, "base", disable=None, leave=False)
    for number, batch in enumerate(bar):
        loss = _loss(model, batch)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if bar.disable and number % 100 == 0:
            print(f"  base: batch {number} of {len(batches)}, loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        held_loss = _loss(model, held).item()
    with atomic_path(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "batches": len(batches),
        "held_out_loss": held_loss,
        "cpu_seconds": round(time.process_time() - started),
        **_copying(model, tokenizer, corpus, generator),
    }


@torch.no_grad()
def install_copy_circuit(model, width: int = 32, sharpness: float = 24.0) -> None:
    """Write an induction circuit into the initial weights of layers 0 and 1; they stay trainable.

    The stand-in must copy names it never saw from the prompt into its lists. A real Qwen2.5 has
    learned that; from random weights it would emerge only after many millions of tokens.
    Embeddings leave the last `width` coordinates free. Layer 0, head 0 attends one token back, by
    its biases alone, and writes a projection of that token there. Layer 1, head 0 looks for a place
    whose previous token is the current one, and adds the embedding of the token found.
    """
    config, decoder = model.config, model.model
    d, h = config.hidden_size, config.hidden_size // config.num_attention_heads
    e, half = d - width, h // 2
    embedding = decoder.embed_tokens.weight
    embedding.normal_(0, e**-0.5)  # rows of length 1
    embedding[:, e:] = 0
    match = torch.linalg.qr(torch.randn(e, width))[0].T  # (width, e), orthonormal rows
    copy = torch.linalg.qr(torch.randn(e, h))[0].T  # (h, e)
    previous, induction = (layer.self_attn for layer in decoder.layers[:2])
    for attention in (previous, induction):
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear.weight[:h] = 0
            linear.bias[:h] = 0
        attention.o_proj.weight[:, :h] = 0
    # Rotary pair i is (i, i + half). The score at distance t is the sum of cos((t - 1) f_i).
    f = decoder.rotary_emb.inv_freq
    previous.q_proj.bias[:h] = sharpness * torch.cat([torch.cos(f), -torch.sin(f)])
    previous.k_proj.bias[:half] = sharpness / 4
    previous.v_proj.weight[:width, :e] = match
    previous.o_proj.weight[e:, :width] = torch.eye(width) / (d / 2) ** 0.5
    # Content is compared in the slow pairs, which hardly turn within a prompt.
    slow = torch.cat([torch.arange(half - width // 2, half), torch.arange(h - width // 2, h)])
    gain = (sharpness / d * 8 * (e / width) ** 0.5) ** 0.5
    induction.q_proj.weight[slow, :e] = gain * match
    induction.k_proj.weight[slow, e:] = gain * torch.eye(width)
    induction.v_proj.weight[:h, :e] = copy
    induction.o_proj.weight[:e, :h] = copy.T * (4 * e / h / d**0.5)


def train_tokenizer(texts: list[str], vocabulary: int):
    """Byte-level BPE with ChatML control tokens and template, as Qwen2.5 has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=special[1:2],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return fast


def _batches(rows, tokens: int, rng: random.Random) -> list[list]:
    """Rows of like length together, about `tokens` in a batch, in random order."""

    def length(row) -> int:
        return len(row[0]) + sum(map(len, row[1]))

    batches, batch = [], []
    for row in sorted(rows, key=length):
        batch.append(row)
        if len(batch) * length(row) >= tokens:
            batches.append(batch)
            batch = []
    rng.shuffle(batches)
    return batches


def _loss(model, batch) -> Tensor:
    """Mean cross-entropy of the lists' tokens; prompts are read, not learned."""
    prompts, lists = zip(*batch, strict=True)
    logps = torch.cat(completion_logps(model, list(prompts), list(lists)))
    return -logps.sum() / sum(len(x) for xs in lists for x in xs)


def _copying(model, tokenizer, corpus: BaseCorpus, generator: GeneratorConfig) -> dict:
    """Of lists sampled for new subjects: share with K items, share of starters that copy one."""
    new, k = [[corpus.subject(False) for _ in range(4)] for _ in range(60)], generator.list_size
    prompts = [encode_prompt(tokenizer, lines, k, generator.instruction, 400) for lines in new]
    lists = sample(
        model,
        tokenizer,
        prompts,
        1,
        max_new_tokens=generator.max_new_tokens,
        temperature=generator.temperature,
        top_p=generator.top_p,
        seed=0,
    )
    items = [text.removeprefix("<sug>").partition("</sug>")[0].split("&&") for (text,) in lists]
    copied = [
        any(x in item for x in lines) for lines, row in zip(new, items, strict=True) for item in row
    ]
    whole = [
        text.rstrip().endswith("</sug>") and len(row) == k
        for (text,), row in zip(lists, items, strict=True)
    ]
    return {"whole_lists": sum(whole) / len(whole), "copied_subjects": sum(copied) / len(copied)}
