"""The generic corpus is well-formed, and the same settings give the same model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llm
from config import GeneratorConfig
from files import ROOT, read_json
from tools import tiny_model

MICRO = tiny_model.Settings(
    vocabulary=400, batches=6, batch_tokens=1024, tokenizer_prompts=24, lists=2
)


@pytest.fixture(scope="module")
def examples():
    corpus = tiny_model.Corpus(3)
    return [corpus.example(5, 2) for _ in range(400)]


def test_lists_have_k_distinct_starters_that_parse_back(examples):
    for _, lists in examples:
        for starters in lists:
            parsed = llm.parse_starters(llm.format_starters(starters)).starters
            assert len(set(starters)) == len(parsed) == 5


@pytest.mark.parametrize("code", ["en", "zh"])
@pytest.mark.parametrize("held_out", [False, True])
def test_every_starter_holds_a_subject_that_a_line_holds(code, held_out):
    corpus = tiny_model.Corpus(4)
    if held_out and code == "zh":
        pytest.skip("held-out forms are English")
    for count in range(1, 9):
        lines, subjects = corpus.prompt(code, count, held_out)
        starters = corpus.starters(subjects, code, 5)
        assert len(lines) == count
        assert all(any(x in line for line in lines) for x in subjects)
        assert all(any(x in starter for x in subjects) for starter in starters)
        named = {x for x in subjects if any(x in starter for starter in starters)}
        assert len(named) >= min(5, len(set(subjects)))


def test_subjects_are_nearly_all_distinct():
    corpus = tiny_model.Corpus(0)
    names = [corpus.subject("en") for _ in range(5000)]
    assert len(set(names)) > 0.9 * len(names)
    assert len({corpus.subject("zh") for _ in range(500)}) > 490


def test_held_out_lines_are_of_forms_never_trained_on():
    corpus = tiny_model.Corpus(0)
    trained = {corpus.form("en").lower() for _ in range(60_000)}  # each opening with each ending
    held_out = {form.lower() for form in corpus.phrases["held_out"]} - {"{x}"}  # bare: in both
    assert "recommend me {x} please" in held_out and "how do i start with {x}" in trained
    assert held_out.isdisjoint(trained)
    for _ in range(300):
        line, names = corpus.line("en", held_out=True)
        for key, name in zip("xy", names, strict=False):
            line = line.replace(name, f"{{{key}}}", 1)
        assert line.lower() in held_out | {"{x}"}


def test_the_first_examples_are_the_easy_ones():
    corpus = tiny_model.Corpus(6)
    lines, lists = corpus.example(5, 2, done=0.0)
    assert len(lines) == 1 and all(lines[0] in starter for x in lists for starter in x)
    assert max(len(corpus.example(5, 1)[0]) for _ in range(100)) == 10


def test_the_seed_decides_the_corpus(examples):
    again, other = tiny_model.Corpus(3), tiny_model.Corpus(5)
    assert [again.example(5, 2) for _ in range(400)] == examples
    assert other.example(5, 2) != examples[0]


def test_a_batch_is_the_same_whoever_writes_it_and_when():
    texts = tiny_model.tokenizer_texts(MICRO)
    batches = tiny_model.Batches(tiny_model.train_tokenizer(texts, MICRO.vocabulary), MICRO)
    backwards = [batches[i] for i in reversed(range(len(batches)))][::-1]
    assert not torch.equal(backwards[2].ids, backwards[3].ids)
    assert MICRO.batch_tokens <= (backwards[3].branch >= 0).sum() < 2 * MICRO.batch_tokens
    others = [*torch.utils.data.DataLoader(batches, batch_size=None, num_workers=2)]
    for a, b in zip(backwards, others, strict=True):
        assert all(map(torch.equal, vars(a).values(), vars(b).values()))


def test_a_base_model_loads_in_transformers_and_is_the_same_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a CPU's bytes are the same
    shape = {"num_hidden_layers": 2, "intermediate_size": 32}
    monkeypatch.setattr(tiny_model, "SHAPE", tiny_model.SHAPE | shape)
    monkeypatch.setattr(tiny_model, "TASK", GeneratorConfig(max_new_tokens=12))
    figures = [tiny_model.build(MICRO, tmp_path / name) for name in "ab"]
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b
    assert figures[0]["held_out_loss"] == figures[1]["held_out_loss"]
    assert read_json(tmp_path / "a" / "figures.json") == figures[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert model.config.model_type == "qwen2" and len(tokenizer) == model.config.vocab_size
    assert (
        tokenizer.decode(tokenizer.encode("吉他 and Baldur's Gate 3")) == "吉他 and Baldur's Gate 3"
    )


def test_copying_counts_whole_lists_and_starters_that_hold_a_subject(monkeypatch):
    def sample(model, tokenizer, prompts, n, **_):
        good = [f"<sug> {' && '.join([f'About {p[i % len(p)]}' for i in range(5)])} </sug>"
                for p in prompts[::2]]  # fmt: skip
        bad = ["<sug> one && two && three"] * len(prompts[1::2])
        return [[text] for pair in zip(good, bad, strict=True) for text in pair]

    monkeypatch.setattr(tiny_model, "_prompt", lambda tokenizer, lines: lines)
    monkeypatch.setattr(llm, "sample", sample)
    figures = tiny_model.copying(None, None, seed=0)
    # Of 96 prompts half have five starters, all about a subject, and half three about none.
    assert figures == {"whole_lists": 0.5, "copied_subjects": 5 / 8}


def test_runs_begin_with_the_shipped_model_which_knows_the_task():
    """Without it the first command would pre-train for long, and unseen."""
    generator = GeneratorConfig(model="tiny")
    path = llm.model_path(generator)
    assert Path(path).resolve() == ROOT / "weights" / "tiny" and not Path(path).is_absolute()
    assert llm.model_path(GeneratorConfig(model="a/b")) == "a/b"
    model, tokenizer = llm.load_generator(path), llm.load_tokenizer(path)
    lines = ["where to start with Wexford Harbour?", "my new coffee press"]
    prompt = llm.encode_prompt(tokenizer, lines, 5, generator.instruction, 400)
    [lists] = llm.sample(
        model, tokenizer, [prompt], 8, max_new_tokens=160, temperature=0.7, top_p=0.95, seed=0
    )
    assert all("Wexford Harbour" in text or "coffee press" in text for text in lists)


def test_the_default_settings_have_the_shape_of_the_shipped_model():
    shipped = read_json(ROOT / "weights" / "tiny" / "config.json")
    ours = tiny_model.SHAPE | {"vocab_size": tiny_model.Settings().vocabulary}
    assert {name: shipped[name] for name in ours} == ours


def test_the_command_takes_settings_and_refuses_others(monkeypatch, tmp_path, capsys):
    built = []
    monkeypatch.setattr(tiny_model, "build", lambda *a: built.append(a))
    command = ["tiny_model", "--out", str(tmp_path / "m"), "--batches=3", "--learning_rate=1e-2"]
    monkeypatch.setattr("sys.argv", command)
    tiny_model.main()
    assert built == [(tiny_model.Settings(batches=3, learning_rate=0.01), str(tmp_path / "m"))]
    for word in ("--batchs=3", "--batches=many", "batches=3"):
        monkeypatch.setattr("sys.argv", ["tiny_model", "--out", "m", word])
        with pytest.raises(SystemExit):
            tiny_model.main()
        assert word.split("=")[0] in capsys.readouterr().err


def test_the_simulated_platform_is_never_read():
    code = """
import sys
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
from tools import tiny_model
corpus = tiny_model.Corpus(0)
corpus.example(5, 2)
assert any("tiny_corpus" in path for path in opened), opened
world = [p for p in opened if "taxonomy" in p or "/world/" in p]
assert not world and not any(name.split(".")[0] == "world" for name in sys.modules), world
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
