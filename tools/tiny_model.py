"""The embedded stand-in for Qwen2.5: a Qwen2-architecture model of about a million weights and its
byte-level BPE, pre-trained here on generic starter lists, for where no model hub is reachable.

    python -m tools.tiny_model --out FOLDER --batches 2000 --batch_tokens 1024 --learning_rate 2e-3

weights/tiny is what the default settings gave on one H100 in four minutes; runs begin with it. The
command above makes a lesser one within minutes on two cores, for generator.model=FOLDER.

It knows what a fluent model knows of the task (short questions in a list, how to copy a subject out
of a line), and nothing of any user or of the simulated platform: its subjects are random words and
word pieces of the encoder's vocabulary, joined to names that nearly all occur once, since copying
unseen names is learned from many distinct ones.
"""

import argparse
import dataclasses
import math
import os
import random
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import llm
from config import GeneratorConfig
from files import atomic_path, progress, read_yaml, script, write_json
from llm.encoder import packaged_minilm

TASK = GeneratorConfig()  # the prompt, list size and sampling that runs have by default
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEAD_CHUNK = 1 << 16  # positions that are scored at once: V is small
SHAPE = {  # with the default vocabulary 920,192 weights
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},  # as Qwen2.5
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of the training; the defaults are those of weights/tiny."""

    vocabulary: int = 2048
    batches: int = 5000  # four minutes of an H100; too many for a CPU
    batch_tokens: int = 49_152  # prompts and lists
    lists: int = 4  # per prompt
    tokenizer_prompts: int = 20_000  # from which the vocabulary is learned
    learning_rate: float = 6e-3
    seed: int = 0


class Corpus:
    """Prompts of interest lines, and lists of starters about subjects named in those lines.

    Languages are "en" and "zh". A line's form has a place for its subject {x}, some for {y} too.
    """

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.phrases = read_yaml("tools/tiny_corpus.yaml")
        vocabulary = Path(packaged_minilm(), "vocab.txt").read_text(encoding="utf-8").split("\n")
        letters = [w for w in vocabulary if w.isascii() and w.strip("#").isalpha()]
        words = [w for w in letters if w[0] != "#" and len(w) > 2]
        self.common, self.rare = words[:400], words[400:]  # they are in order of frequency
        self.pieces = [w[2:] for w in letters if w[0] == "#" and len(w) > 3]  # "##ing" -> "ing"

    def subject(self, code: str) -> str:
        """A name or noun phrase, such as "coffee grinder" or "Baldur's Gate 3", of random words."""
        rng = self.rng
        if code == "zh":  # level 1 of GB 2312: the most common characters
            pairs = [(rng.randint(0xB0, 0xD6), rng.randint(0xA1, 0xFE)) for _ in range(4)]
            return "".join(bytes(p).decode("gb2312") for p in pairs[: rng.choice([2, 2, 3, 4])])
        words = rng.choices(self.rare, k=rng.choice([1, 2, 2, 2, 3, 3, 4]))
        if len(words) < 4 and rng.random() < 0.4:  # a word that is in no dictionary
            words[0] = rng.choice(self.rare)[:4] + rng.choice(self.pieces)
            rng.shuffle(words)
        if rng.random() < 0.1:  # a sequel or a year
            words.append(str(rng.choice([rng.randint(1, 9), rng.randint(10, 2050)])))
        if rng.random() < 0.45:
            return " ".join(words)
        words = [w.upper() if len(w) < 6 and rng.random() < 0.06 else w.capitalize() for w in words]
        joint = rng.choice([" "] * 14 + ["-", "-", "'s ", " of ", " the ", " & ", ""])
        return " ".join([joint.join(words[:2]), *words[2:]])

    def form(self, code: str) -> str:
        """A line with places for its subjects."""
        rng, kind, phrases = self.rng, self.rng.random(), self.phrases[code]
        if kind < 0.15:
            return rng.choice(phrases["pairs"])
        before, after = rng.choice(phrases["openings"]), rng.choice(phrases["endings"])
        if code == "en" and kind < 0.4:  # any words, or the phrases would be learned by heart
            before = " ".join(rng.choices(self.common, k=rng.choice([1, 2, 3, 4, 5, 6, 7, 25])))
            after = " ".join(rng.choices(self.common, k=rng.randint(1, 6)))
        parts = [[before, "{x}", after], [before, "{x}"], ["{x}", after], ["{x}"]]
        space = "" if code == "zh" else " "
        return space.join(rng.choices(parts, [5, 8, 3, 4])[0]).replace(" ?", "?")

    def line(self, code: str, held_out: bool = False, bare: float = 0.0) -> tuple[str, list[str]]:
        """What somebody may have asked (the subject alone for a share `bare`), and its subjects."""
        if self.rng.random() < bare:
            subject = self.subject(code)
            return subject, [subject]
        form = self.rng.choice(self.phrases["held_out"]) if held_out else self.form(code)
        if not held_out and self.rng.random() < 0.03:  # what a robot asks: one thing in many ways
            form = ". ".join([form, *(self.form(code) for _ in range(self.rng.randint(1, 9)))])
        if form[0] != "{" and self.rng.random() < 0.5:  # a subject stays as it is
            form = form[0].upper() + form[1:]
        names = {key: self.subject(code) for key in "xy" if f"{{{key}}}" in form}
        return form.format(**names), list(names.values())

    def prompt(self, code: str, count: int, held_out=False, bare=0.0) -> tuple[list, list]:
        """`count` interest lines and the subjects in them; held_out, bare: as of `line`."""
        rows = [self.line(code, held_out, bare) for _ in range(count)]
        return [line for line, _ in rows], [name for _, subjects in rows for name in subjects]

    def starters(self, subjects: list[str], code: str, n: int) -> list[str]:
        """n questions; no subject comes twice before each has come, if they suffice."""
        rng = self.rng
        # Mostly in the order of the lines, which is easier to learn than any order.
        order = subjects if rng.random() < 0.7 else rng.sample(subjects, len(subjects))
        forms = rng.sample(self.phrases[code]["templates"], n)
        others = [rng.choice(subjects) for _ in forms]
        return [form.format(x=order[i % len(order)], y=others[i]) for i, form in enumerate(forms)]

    def example(self, list_size: int, num_lists: int, done: float = 1.0) -> tuple[list, list]:
        """Interest lines and lists of starters for them; done: share of the training behind."""
        code = "zh" if self.rng.random() < 0.05 else "en"
        most = 10 if done > 0.45 else 4 if done > 0.3 else 2 if done > 0.15 else 1  # easy first
        count = min(most, self.rng.choice([1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8, 8, 10]))
        lines, subjects = self.prompt(code, count, bare=max(0.5, 1 - 3 * done))
        return lines, [self.starters(subjects, code, list_size) for _ in range(num_lists)]


class Batches:
    """Prompts and lists of about `batch_tokens` tokens a batch, easy to hard; [-1] is held out."""

    # Batch i is written anew from (seed, i) wherever it is asked for: so a GPU can have many
    # processes write for it, and what they write does not depend on them.

    def __init__(self, tokenizer, settings: Settings):
        self.tokenizer, self.settings, self.corpus = tokenizer, settings, Corpus(settings.seed)

    def __len__(self) -> int:
        return self.settings.batches

    def __getitem__(self, i: int) -> llm.TreeRows:
        self.corpus.rng.seed(f"{self.settings.seed} {i}")
        done = i / len(self) if i >= 0 else 1.0
        prompts, completions, size = [], [], 0
        while size < self.settings.batch_tokens:
            lines, lists = self.corpus.example(TASK.list_size, self.settings.lists, done)
            prompts.append(_prompt(self.tokenizer, lines))
            completions.append([llm.encode_completion(self.tokenizer, y) for y in lists])
            size += len(prompts[-1]) + sum(map(len, completions[-1]))
        return llm.tree_rows(prompts, completions)


def _prompt(tokenizer, lines: list[str]) -> list[int]:
    return llm.encode_prompt(tokenizer, lines, TASK.list_size, TASK.instruction, 400)


def tokenizer_texts(settings: Settings) -> list[str]:
    """Prompts and lists of the corpus, from easy to hard."""
    corpus, texts, n = Corpus(settings.seed), [], settings.tokenizer_prompts
    for number in range(n):
        lines, (starters,) = corpus.example(TASK.list_size, 1, number / n)
        texts += ["\n- ".join([TASK.instruction, *lines]), f"\n{llm.format_starters(starters)}"]
    return texts


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML control tokens and template, as Qwen2.5 has."""
    tokenizer, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    # A Chinese character has the same tokens wherever it stands, so that it can be copied.
    split = [pre_tokenizers.Split(Regex("[一-鿿]"), "isolated"), byte_level(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    start = {"initial_alphabet": byte_level.alphabet(), "special_tokens": special}
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False, **start)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[2],
        additional_special_tokens=special[1:2],
        clean_up_tokenization_spaces=False,  # or " ?" would lose its space
        chat_template=CHATML)


def new_model(settings: Settings, tokenizer) -> Qwen2ForCausalLM:
    """Random weights of Qwen2's architecture, with the copy circuit written into them."""
    torch.manual_seed(settings.seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        **SHAPE, vocab_size=len(tokenizer), bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    # The tokens that begin an interest line and a list of starters.
    install_copy_circuit(model, *tokenizer.convert_tokens_to_ids(["-", "<"]))
    return model


@torch.no_grad()
def install_copy_circuit(model, line_mark: int, list_mark: int, width=32, sharpness=24.0) -> None:
    """Write the copying of prompt text into the initial attention weights; they stay trainable."""
    # The stand-in must copy names it never saw from the prompt into its lists. A real Qwen2.5 has
    # learned that; from random weights it would emerge only after many millions of tokens.
    #
    # Embeddings leave the last `width` + 1 coordinates free. Layer 0, head 0 attends one token
    # back, by its biases alone, and writes a projection of that token there; head 1 notes whether
    # `list_mark` came before, so whether a place belongs to a list. Layer 1, head 0 (induction)
    # looks in the prompt for a place whose previous token is the current one, and adds the
    # embedding of the token there. Head 0 of the later layers does the same for places after
    # `line_mark`, where the subject of a line may begin.
    config, decoder = model.config, model.model
    d, h = config.hidden_size, config.hidden_size // config.num_attention_heads
    half, flag, e = h // 2, d - width - 1, d - width
    embedding = decoder.embed_tokens.weight
    embedding.normal_(0, e**-0.5)  # rows of length 1
    embedding[:, flag:] = 0
    match = torch.linalg.qr(torch.randn(e, width))[0].T  # (width, e), orthonormal rows
    # Content is compared in the slow rotary pairs, which hardly turn within a prompt.
    slow = torch.cat([torch.arange(half - width // 2, half), torch.arange(h - width // 2, h)])
    gain = (sharpness / d * 8 * (e / width) ** 0.5) ** 0.5
    first, induction, *pointers = layers = [layer.self_attn for layer in decoder.layers]
    for attention in layers:
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear.weight[:h] = linear.bias[:h] = 0
        attention.o_proj.weight[:, :h] = 0
    # Rotary pair i is (i, i + half). The score at distance t is the sum of cos((t - 1) f_i).
    f = decoder.rotary_emb.inv_freq
    first.q_proj.bias[:h] = sharpness * torch.cat([torch.cos(f), -torch.sin(f)])
    first.k_proj.bias[:half] = sharpness / 4
    first.v_proj.weight[:width, :e] = match
    first.o_proj.weight[e:, :width] = torch.eye(width) / (d / 2) ** 0.5
    mark = embedding[list_mark, :e] * d**0.5  # as the attention sees it, behind the norm
    first.q_proj.weight[h:] = first.k_proj.weight[h:] = first.v_proj.weight[h:] = 0
    first.q_proj.bias[h + slow] = gain * match @ mark
    first.k_proj.weight[h + slow, :e] = gain * match
    first.v_proj.weight[h, :e] = mark / d
    first.o_proj.weight[:, h:] = 0
    first.o_proj.weight[flag, h] = 1.0
    induction.q_proj.weight[slow, :e] = gain * match
    for attention in (induction, *pointers):
        strength = 4 if attention is induction else 1  # a guess must not drown a continuation
        copy = torch.linalg.qr(torch.randn(e, h))[0].T  # (h, e)
        attention.v_proj.weight[:h, :e] = copy
        attention.o_proj.weight[:e, :h] = copy.T * (strength * e / h / d**0.5)
        attention.k_proj.weight[slow, e:] = gain * torch.eye(width)
        attention.q_proj.bias[half - width // 2 - 1] = -5.0  # not in a list
        attention.k_proj.weight[half - width // 2 - 1, flag] = 5.0
    for attention in pointers:
        attention.q_proj.bias[slow] = gain * match @ embedding[line_mark, :e] * d**0.5


def train(model, batches: Batches, settings: Settings) -> None:
    """AdamW over the batches in their order; warm-up, a plateau, then a cosine to a thirtieth."""
    # Attention and embeddings hold the copy circuit and move slower, or it would be lost at once.
    groups, rate = {1.0: [], 0.3: []}, settings.learning_rate  # share of the rate -> weights
    for name, weight in model.named_parameters():
        groups[0.3 if "self_attn" in name or "embed" in name else 1.0].append(weight)
    groups = [{"params": weights, "lr": share * rate} for share, weights in groups.items()]
    optimiser = torch.optim.AdamW(groups, rate, betas=(0.9, 0.95), weight_decay=0.0)

    def factor(step: int) -> float:
        done = max(0.0, step / len(batches) - 0.3) / 0.7
        return min((step + 1) / 50, 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    # A GPU takes batches faster than one process writes them.
    workers = max(0, min(14, (os.cpu_count() or 1) - 2)) if model.device.type == "cuda" else 0
    ahead = 1 if workers else None  # a batch each: they lie in /dev/shm, small in a container
    loader = DataLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=ahead)
    for number, rows in enumerate(bar := progress(loader, "tiny model", len(batches))):
        loss = -llm.row_logps(model, rows, HEAD_CHUNK).mean()  # Eq. (5): prompts are not learned
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if number % 50 == 0:  # .item() waits for the GPU
            bar.set(loss=f"{loss.item():.3f}")
    model.eval()


def build(settings: Settings, folder: str | Path) -> dict:
    """Pre-train a transformers folder; return its figures, which it holds as figures.json too.

    The same settings give the same weights on a CPU.
    """
    started, device = time.time(), "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = train_tokenizer(tokenizer_texts(settings), settings.vocabulary)
    batches, model = Batches(tokenizer, settings), new_model(settings, tokenizer).to(device)
    train(model, batches, settings)
    with torch.no_grad():
        loss = -llm.row_logps(model, batches[-1], HEAD_CHUNK).mean().item()
    figures = {
        "parameters": model.num_parameters(), "held_out_loss": loss,
        **copying(model, tokenizer, settings.seed),
        "seconds": round(time.time() - started), "made_by": f"{device}, torch {torch.__version__}"}
    with atomic_path(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "figures.json", figures)
    return figures


def copying(model, tokenizer, seed: int) -> dict:
    """Of lists sampled for new subjects, in lines of forms never trained on, 1 to 8 a prompt:
    the share with K starters, and the share of starters that hold a whole subject."""
    corpus = Corpus(seed + 1)
    new = [corpus.prompt("en", count, held_out=True) for count in range(1, 9) for _ in range(12)]
    lists = llm.sample(
        model, tokenizer, [_prompt(tokenizer, lines) for lines, _ in new], 1, seed=0,
        max_new_tokens=TASK.max_new_tokens, temperature=TASK.temperature, top_p=TASK.top_p)
    whole, copied = [], []
    for (_, subjects), (text,) in zip(new, lists, strict=True):
        starters = text.removeprefix("<sug>").partition("</sug>")[0].split("&&")
        whole.append(text.rstrip().endswith("</sug>") and len(starters) == TASK.list_size)
        copied += [any(name in starter for name in subjects) for starter in starters]
    return {"whole_lists": sum(whole) / len(whole), "copied_subjects": sum(copied) / len(copied)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="folder of the model")
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    values = vars(parser.parse_args())
    folder = values.pop("out")
    llm.settle_libraries()
    if torch.cuda.is_available():  # TF32; a CPU's bits stay as they are
        torch.set_float32_matmul_precision("high")
    print(build(Settings(**values), folder))
    print(f"next: python train.py generator.model={folder}")


if __name__ == "__main__":
    script(main)
