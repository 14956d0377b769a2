"""Rows of `python -m benchmarks.faults` about what others send: files of data, a model's outputs,
texts with control tokens, weights and names of a stranger's run.

As in fault_runs.py a row is a function of a Bench, here of its folder, and of the Row that counts.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

import data
import llm
from benchmarks.fault_runs import Bench, seeded
from config import load_config
from files import ROOT, UserError
from llm.prompts import _control_tokens, encode_text
from llm.starters import clean_starter, format_starters, parse_starters
from roles.writer import fit_to_show
from run import Run
from serving import feedback
from tests.test_llm import other_tokenizer


def malformed(bench: Bench, row) -> None:
    """Files of a grammar: good rows whose bytes, values or keys were changed; and one long line."""
    good = {
        data.read_users: {"user_id": "a", "profile": {"age": "9"}, "sessions": [
            {"session_id": "s", "timestamp": "2026-05-01T09:00:00", "summary": "chess"}]},
        data.read_impressions: {"user_id": "a", "timestamp": "2026-05-01T09:00:00",
                                "starters": ["a b", "c"], "clicked": [1], "sessions_after": 3},
        data.read_dialogues: {"dialogue_id": "d", "user_id": "u", "timestamp": None, "intent": "x",
                              "turns": [{"role": "user", "content": "hi"}],
                              "suggestions": ["a", "b", "c"], "clicked": [0], "unsafe": False},
        data.read_catalogue: {"id": "p", "name": "kettle", "category": ["k"], "brand": "b",
                              "price": 3.5, "currency": "EUR", "attributes": {}},
    }
    values = [None, True, -1, 1e308, 10**400, "", "\ud800", "\u202e", [], {}, [[]], "9" * 5000]
    path = bench.folder / "rows.jsonl"
    for number in range(50 * bench.tries):
        rng = seeded("data", number)
        read = rng.choice([*good])
        rows = [json.loads(json.dumps(good[read])) for _ in range(3)]
        target = rng.choice(rows)
        for _ in range(rng.randrange(1, 4)):
            key = rng.choice([*target, "other"])
            if rng.random() < 0.3:
                target.pop(key, None)
            else:
                target[key] = rng.choice(values)
        text = bytearray("\n".join(map(json.dumps, rows)).encode())
        for _ in range(rng.choice((0, 0, 1, 3))):
            text[rng.randrange(len(text))] = rng.randrange(256)
        path.write_bytes(text[: rng.choice((len(text), len(text), rng.randrange(len(text))))])
        try:
            read(path)
            row.count("read")
        except data.DataError as error:
            named = all(re.match(rf"{path}:\d+: |\.\.\. and", x) for x in str(error).splitlines())
            row.count("refused with lines", "" if named else f"file {number}: {error}")
        except Exception as error:
            row.count("", f"file {number}: {type(error).__name__}: {error}")
    long_line(bench, row)


def long_line(bench: Bench, row) -> None:
    """2 GB without a line's end, of a sparse file."""
    path = bench.folder / "long.jsonl"
    with open(path, "wb") as file:
        file.truncate(2**31)
    # Not ru_maxrss, which begins with what the parent had.
    code = ("import sys, data\ntry:\n    data.read_users(sys.argv[1])\n"
            "except data.DataError as e:\n    print(str(e)[-60:], '|', "
            "open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True,
                          text=True)
    path.unlink()
    peak = int(done.stdout.rpartition("|")[2] or 2**30) / 1024
    row.count("2 GB line: refused, under 512 MiB", "" if "longer than" in done.stdout
              and peak < 512 else f"2 GB line: {peak:.0f} MiB, {done.stdout}{done.stderr[-200:]}")


PIECES = [
    "<sug>", "</sug>", "<think>", "</think>", "&&", " a b", "1. ", '"', "\x00", "三体?", "\n- ",
    "**", "`", "_", "[", "]", "{", "\\", ",", ":", "&amp;", "＆", "２．", "[THINK]", "\n", "? ",
    "😀", "What is chess?", "\u202e", "\ud800", "<|im_end|>", "https://a.b", "Sure! ",
]


JOINTS = (" && ", "\n- ", "\n", "\n2. ", "&&", "&&&", " &#38;&#38; ", "\t")
OF_THREE = ("; ", "；", " [SEP] ", "<sep>")  # or more: two may be one starter
OF_QUESTIONS = (" ", "、", " & ", " → ", " $$ ")  # three or more of them
NUMBERS = ("abcde", "①②③④⑤", "1️⃣ 2️⃣ 3️⃣ 4️⃣ 5️⃣".split())


def one_line(asked: list[str], rng) -> str:
    """Starters as one text, in one of the forms that lists have."""
    joints = JOINTS + (OF_THREE + OF_QUESTIONS) * (len(asked) > 2)
    joint = rng.choice((*joints, *NUMBERS))
    if joint in NUMBERS:
        sign = ") " if joint == "abcde" else " "
        return " ".join(f"{number}{sign}{y}" for number, y in zip(joint, asked, strict=False))
    return f"{'?' * (joint in OF_QUESTIONS)}{joint}".join(asked) + "?"


def parser(bench: Bench, row) -> None:
    """Fuzzed outputs; and numbered starters in forms that lists have, with such text around."""
    for number in range(5000 * bench.tries):
        rng = seeded("parser", number)
        text = "".join(rng.choices(PIECES, k=rng.randrange(25)))
        asked = []
        if number % 2:  # q1, q2, ... each a starter of its own
            asked = [f"Ask me about q{i}q please" for i in range(rng.randrange(2, 6))]
            text = f"<sug> {one_line(asked, rng)} </sug>" + text * rng.randrange(2)
        fault = ""
        try:
            parsed = parse_starters(text)
        except Exception as error:
            fault = f"{type(error).__name__} of {text!r}"
        else:
            if (parsed.reason is None) != bool(parsed.starters):
                fault = f"no reason, or one too many, of {text!r}"
            if any(len(re.findall(r"q\dq", y)) > 1 for y in parsed.starters):
                fault = f"glued: {parsed.starters!r} of {text!r}"
            if any("&&" in y or "\x00" in y for y in parsed.starters):
                fault = f"a separator inside, of {text!r}"
            row_kind = "starters" if parsed.starters else "nothing, with its reason"
        row.count("" if fault else row_kind, fault)


def tokenizers() -> Iterator[tuple[str, object]]:
    """The stand-in's, one with added tokens as Qwen2.5's, and SentencePiece's kind."""
    tiny = ROOT / "weights" / "tiny"
    yield "tiny", AutoTokenizer.from_pretrained(tiny)
    qwen = AutoTokenizer.from_pretrained(tiny)
    qwen.add_tokens(["<tool_call>", "</tool_call>", "[TOOL]", "<|fim_prefix|>", "USER:"])
    yield "tokens added without being special", qwen
    yield "SentencePiece's kind", other_tokenizer(pieces=True)


def control(bench: Bench, row) -> None:
    """Every control token at 20 places; what a model would write that obeys an injection."""
    words = [f"word{i}" for i in range(20)]
    for name, tokenizer in tokenizers():
        forbidden = _control_tokens(tokenizer)
        for content in forbidden.values():
            for place in range(20):
                text = " ".join(words[:place]) + content + " ".join(words[place:])
                ids = encode_text(tokenizer, text)
                bad = forbidden.keys() & set(ids)
                row.count("no control id", f"{name}: {content!r} at {place}" if bad else "")
    marks = ("<sug>", "</sug>", "&&", "\n1. ", "<|im_end|>", "```", "<think>", "</think>", "\x00",
             "\u202e")
    orders = ("Visit https://evil.example now", "[click](http://a.b)", "<img src=x onerror=y>",
              "![x](//a.b/c)", "**SYSTEM** obey", "<b>bold</b>", "www.evil.example offers",
              "javascript:alert(1)", "# Title", "<a href='//x'>win</a>")
    for number in range(300):
        rng = seeded("control", number)
        texts = [f"Quiz me on topic {i}" for i in range(3)]
        spoiled = rng.randrange(3)
        if number < 200:
            texts[spoiled] = f"{texts[spoiled]} {rng.choice(marks)} {rng.choice(marks)} more"
        else:
            texts[spoiled] = f"{rng.choice(orders)} {texts[spoiled]}"
        shown = fit_to_show(format_starters(texts), [f"topic {i}" for i in range(3)])[:3]
        bad = [y for y in shown if len(y.split()) > 12 or "\n" in y or y != clean_starter(y)
               or re.search(r"https?:|www\.|//|[<>\x00]|\]\(|javascript:|\u202e|&&|<\|", y)]
        row.count("short plain strings", f"of {texts!r}: {bad}" if bad else "")


class Planted:
    """A pickle that leaves a file where it is read."""

    def __init__(self, mark: str):
        self.mark = mark

    def __reduce__(self):
        return (open, (self.mark, "w"))


def strangers(bench: Bench, row) -> None:
    """Pickles in place of and beside weights; names that lead out of a run's folder."""
    mark = bench.folder / "ran"
    for name in ("pytorch_model.bin", "model.bin", "training_args.bin", "optimizer.pt", "x.pkl"):
        for alone in (True, False):
            model = bench.folder / "stranger"
            shutil.rmtree(model, ignore_errors=True)
            shutil.copytree(ROOT / "weights" / "tiny", model)
            (model / name).write_bytes(pickle.dumps(Planted(str(mark))))
            if alone:
                (model / "model.safetensors").unlink()
            try:
                llm.load_generator(str(model), revision="", precision="float32")
                outcome = "loaded without it"
            except UserError:
                outcome = "refused"
            fault = f"{name}: was run" if mark.exists() else ""
            row.count(outcome, fault or (f"{name}: {outcome}" if alone and outcome != "refused"
                                         else ""))
    for name in ("adapter_model.bin", "adapter_model.pt"):
        folder = bench.folder / "adapter"
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(pickle.dumps(Planted(str(mark))))
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
        try:
            with llm.whole_adapter(folder):
                row.count("", f"{name}: was taken")
        except (UserError, OSError):
            row.count("refused", f"{name}: was run" if mark.exists() else "")
    names = ["..", ".", "../x", "a/../../b", "/etc", "a/b", "x/", "..\\..", "~/x", "%2e%2e/x",
             "....//x", "./x", "//x", "a//b", "x/../y"]
    for name in names:
        for field in ("run.name", "adapter"):
            row.count("refused or inside", leads_out(bench, name, field))


def leads_out(bench: Bench, name: str, field: str) -> str:
    """Why a name leads out of its folder, if it does."""
    root = Path(tempfile.mkdtemp(dir=bench.folder))
    if field == "run.name":
        try:
            words = [f"run.name={json.dumps(name)}", f"run.root={root}"]
            settings = load_config(None, words)
        except UserError:
            return ""
        path = (root / settings.run.name).resolve()
        return "" if path.parent == root.resolve() else f"run.name={name}: {path}"
    # What a stranger's run says that servers are to take up; every other one a link.
    run = Run(load_config(None, [f"run.root={root}", "run.name=r", "dpo.rounds=1"]), False)
    folder = run.folder.path
    (folder / "dpo/round1/adapter").mkdir(parents=True)
    (folder / "feedback").mkdir()
    (folder / "dpo/done.json").write_text('{"key": "k"}')
    if len(name) % 2:
        (folder / "link").symlink_to("/etc")
        name = "link"
    (folder / "feedback/current.json").write_text(json.dumps(
        {"run": "k", "adapter": name, "ranker": f"{name}/r.safetensors", "version": "v"}))
    try:
        newest = feedback.current(run)
    except UserError:
        return ""
    path = (folder / newest["adapter"]).resolve()
    return "" if path.is_relative_to(folder.resolve()) else f"{field} {name}: {path}"
