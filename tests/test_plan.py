"""Counts equal to real models', saved bytes equal to autograd's, peaks near measured ones."""

import inspect
import json
import re
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import llm
from benchmarks.plan import row
from config import load_config
from files import ROOT, UserError
from tools import doctor, plan

CONFIGS = sorted((ROOT / "configs").glob("qwen*.yaml"))
SEVEN = ["generator.model=Qwen/Qwen2.5-7B-Instruct", "generator.load_in_4bit=true"]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """Nothing listens at port 9, and the local cache is empty."""
    for name in ("HF_ENDPOINT", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def make(family: str = "qwen2", **more):
    """A small model with grouped attention."""
    sizes = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=160, vocab_size=300,
    )
    config, model = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM),
    }[family]
    torch.manual_seed(0)
    return model(config(**{**sizes, **more})).eval()


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
        ("llama", {"head_dim": 32}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ],
)
def test_parameters_equal_those_of_the_model_built(tmp_path, family, more):
    model = make(family, **more)
    model.save_pretrained(tmp_path)
    shape = plan.find_shape(load_config(None, [f"generator.model={tmp_path}"]))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    trained = llm.add_lora(model, 5, 10, seed=0)
    assert shape.lora(5) == sum(p.numel() for p in trained.parameters() if p.requires_grad)


def test_the_embedded_model_has_the_parameters_that_are_counted():
    config = load_config(None, [])
    weights = load_file(f"{llm.model_path(config.generator)}/model.safetensors")
    assert plan.find_shape(config).parameters == sum(w.numel() for w in weights.values())


def test_the_head_is_counted_in_the_chunks_it_is_computed_in():
    chunk = inspect.signature(llm.completion_logps).parameters["head_chunk"].default
    assert chunk == plan.HEAD_CHUNK


def test_the_table_of_shapes_gives_the_published_sizes():
    sizes = {name: s.parameters / 1e9 for name, s in plan.QWEN.items()}
    assert sizes == pytest.approx({"0.5B": 0.494, "1.5B": 1.54, "3B": 3.09, "7B": 7.62}, rel=5e-3)
    assert plan.QWEN["7B"].lora(16) == 40_370_176


def test_nf4_with_double_quantisation_has_the_bytes_of_bitsandbytes():
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(512, 1024, bias=False, quant_type="nf4").to("cpu")
    state = layer.weight.quant_state
    packed = layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    shape = plan.Shape(512, 1, 8, 8, 1024, 0, True, 64)
    share = plan.weight_bytes(shape, True, 0) / shape.packed  # a = 0: of the packed ones alone
    assert packed / layer.weight.quant_state.shape.numel() == pytest.approx(share)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_autograd_keeps_the_bytes_that_are_counted(bf16, kv_heads):
    """Of a layer: what three layers keep beyond two."""
    kept = {}
    for layers in (2, 3):
        model = make(num_hidden_layers=layers, num_key_value_heads=kv_heads)
        model = llm.add_lora(model.bfloat16() if bf16 else model, 16, 32, seed=0)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}

        def pack(tensor, storages=storages):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage  # held: no address comes twice
            return tensor

        prompts = torch.randint(300, (3, 20)).tolist()
        lists = [[y] for y in torch.randint(300, (3, 7)).tolist()]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            llm.completion_logps(model, prompts, lists)
        kept[layers] = sum(s.nbytes() for place, s in storages.items() if place not in weights)
    shape = plan.Shape(64, 1, 4, kv_heads, 160, 300, True, 16)
    assert kept[3] - kept[2] == 3 * 27 * plan.saved_bytes(shape, 16, 2 if bf16 else 4)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured by Linux's /proc")
@pytest.mark.parametrize(
    "case", [("small", "dpo", "fp32", True, 128), ("small", "sampling", "bf16", False, 128)]
)
def test_a_measured_peak_is_within_15_percent(case):
    measured = row(*case)
    assert measured["ratio"] == pytest.approx(1, abs=0.15)
    assert measured["ratio_without_weights"] == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_are_planned_as_their_first_lines_say(path):
    config = load_config(path)
    stages = plan.stage_bytes(config, plan.find_shape(config), 2)
    head = path.read_text(encoding="utf-8").partition("generator:")[0].replace("\n# ", " ")
    said = re.search(r"of (\d+) GB.* (\S+) \(sit\), (\S+) \(dpo\) and (\S+) GiB", head).groups()
    assert list(said[1:]) == [f"{terms['peak'] / plan.GIB:.2f}" for terms in stages.values()]
    cards = [plan.smallest_card(terms["peak"]) for terms in stages.values()]
    assert max(cards, key=lambda x: int(x.split()[0])) == f"{said[0]} GB"
    assert config.generator.load_in_4bit and config.generator.gradient_checkpointing
    assert f"--config configs/{path.name}" in head
    assert config.generator.model in plan.plan(config)


def test_there_is_a_config_of_each_size():
    assert [p.stem for p in CONFIGS] == ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"]


def test_7b_is_planned_in_a_second_without_its_weights():
    started = time.monotonic()
    text = plan.plan(load_config(None, SEVEN))
    assert time.monotonic() - started < 1
    assert "7,615,616,512 parameters, 40,370,176 trained" in text
    assert re.search(r"peak( +\d+\.\d\d){3}", text) and re.search(r"smallest card .*GB", text)


def test_settings_move_the_estimate_as_they_should():
    def peaks(*more):
        words = ["generator.micro_batch=2", "sit.batch_users=8", "dpo.rounds=2", *more]
        config = load_config(None, [*SEVEN, *words])
        stages = plan.stage_bytes(config, plan.find_shape(config), 2)
        return [terms["peak"] for terms in stages.values()]

    base = sit, dpo, sampling = peaks()
    assert all(x > y for x, y in zip(peaks("generator.load_in_4bit=false"), base, strict=True))
    assert peaks("generator.gradient_checkpointing=true")[0] < sit / 2
    one, whole = peaks("generator.micro_batch=1"), peaks("generator.micro_batch=0")
    assert one[0] < sit < whole[0] and one[1] < dpo < whole[1]
    assert peaks("sit.batch_users=4")[0] == sit  # two at a time, however many a step has
    assert peaks("generator.sample_rows=32")[2] < sampling
    weights = plan.weight_bytes(plan.QWEN["7B"], True, 2)
    assert peaks("roles.teacher=generator")[0] == pytest.approx(sit + weights)


def test_tokens_are_those_of_full_rows():
    words = "sit.max_rows=10 sit.epochs=2 dpo.max_users=0 dpo.rounds=2".split()
    text = plan.plan(load_config(None, words))
    assert f"in all {10 * 2 * (320 + 192):,}" in text
    lists = 1 + 4  # chosen; a rejected one of each kind
    passes = 2 + 1  # of training and, once, of the reference
    assert f"in all {(1 + 2) * passes * (320 + lists * 192):,} a user" in text


@pytest.mark.parametrize("model", ["someone/unheard-of", "./no/such/folder", "a" * 200])
def test_an_unknown_model_is_refused_with_advice(model):
    with pytest.raises(UserError, match="hf download"):
        plan.plan(load_config(None, [f"generator.model={model}"]))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": "qwen2"}', '{"model_type": "x"}'])
def test_a_config_that_cannot_be_counted_is_refused_by_its_name(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        plan.plan(load_config(None, [f"generator.model={tmp_path}"]))


def test_a_cached_config_goes_before_the_table(tmp_path):
    name = tmp_path / "cache" / "models--Qwen--Qwen2.5-7B-Instruct"
    folder = name / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (name / "refs").mkdir()
    (name / "refs" / "main").write_text("0123")
    make().save_pretrained(folder)
    assert plan.find_shape(load_config(None, SEVEN)).hidden == 64


def test_the_doctor_says_what_is_there_and_what_to_do():
    bad = ["generator.endpoint=http://127.0.0.1:9/v1", "endpoint.base_url=file:///etc/passwd"]
    lines = doctor.doctor(load_config(None, [*SEVEN, *bad])).splitlines()
    assert all(re.match(r"(ok|problem) +\S", line) for line in lines)
    text = "\n".join(lines)
    for part in ("Python 3", "torch ", "peft ", "4-bit layer", "free disk for run.root", "cores"):
        assert part in text
    assert re.search(r"problem +hub http://127.0.0.1:9: .*hf download Qwen", text)
    assert re.search(r"problem +generator.endpoint http://127.0.0.1:9/v1: .*start the server", text)
    assert re.search(r"problem +no GPU, which 7.6 B", text) or torch.cuda.is_available()
    assert re.search(r"problem +endpoint.base_url .*no http address", text)


def test_the_doctor_outlives_what_is_broken(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("bitsandbytes.nn.Linear4bit", broken)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.0.1")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x"}))
    text = doctor.doctor(load_config(None, [f"generator.model={tmp_path}"]))
    assert "problem  four_bit: no such instruction" in text
    assert re.search(r"problem +torch 0.0.1: pip install torch==", text)
    assert re.search(r"ok +hub .*HF_HUB_OFFLINE is set", text)
    assert re.search(r"problem +room: .*model_type x", text)


def test_a_key_is_shown_nowhere(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret\nkey")
    text = doctor.doctor(load_config(None, ["endpoint.base_url=http://me:secret@127.0.0.1:9/v1"]))
    assert "secret" not in text and "127.0.0.1:9/v1" in text


def test_a_key_goes_to_its_own_endpoint_alone(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a")
    monkeypatch.setenv("OTHER_KEY", "b")
    asked = {}
    monkeypatch.setattr(doctor, "unreachable", lambda url, key="": asked.update({url: key}) or "")
    roles, generator = "endpoint.base_url=http://x/v1", "generator.endpoint=http://y/v1"
    doctor.doctor(load_config(None, [roles, generator]))
    assert (asked["http://x/v1/models"], asked["http://y/v1/models"]) == ("a", "")
    doctor.doctor(load_config(None, [roles, generator, "generator.endpoint_key_env=OTHER_KEY"]))
    assert (asked["http://x/v1/models"], asked["http://y/v1/models"]) == ("a", "b")
