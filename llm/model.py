"""The generator's weights: loading, 4-bit, LoRA, adapters, merging.

LoRA (arXiv:2106.09685) on every linear layer but the head, NF4 weights as of QLoRA
(arXiv:2305.14314). Adapters are plain PEFT folders; weights are safetensors, nothing is unpickled.

    hf download Qwen/Qwen2.5-7B-Instruct --local-dir FOLDER   # then generator.model=FOLDER
"""

import contextlib
import logging
import os
import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from config import TINY, GeneratorConfig
from files import AGAIN, ROOT, UserError, atomic_path, read_json, read_tensors, write_json
from llm.weights import make_smollm2, smollm2_folder

# peft takes seconds to import, for which a command without an adapter need not wait: it is imported
# where an adapter is made or loaded.
LARGEST_ON_CPU = 2  # billion parameters in 4 bit; a larger model would take days
# What a config calls the longest text that is seen whole. A longer one has no positions, or layers
# look no further back than a window (Llama 4: chunk), which the mask of tree rows would lift.
LIMITS = ("max_position_embeddings", "sliding_window", "attention_chunk_size")


def settle_libraries() -> None:
    """Tiny numbers are zero for the whole process; notes of libraries about which a reader of the
    log can do nothing are silenced."""
    # Adam's averages of weights that hardly move become denormal, which slows a CPU several times.
    # What a run's models compute later has its last digits only with the same switch.
    torch.set_flush_denormal(True)
    transformers_logging.disable_progress_bar()  # of loading, between our lines
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")


def model_path(generator: GeneratorConfig) -> str:
    """generator.model, a hub id or a folder; the folder of SmolLM2 or of the stand-in."""
    if generator.model == TINY:
        # Relative, as an adapter keeps its base's path and may go with its run elsewhere.
        return os.path.relpath(ROOT / "weights" / "tiny")
    # SmolLM2's is made when something is first loaded from it.
    return generator.model or str(smollm2_folder())


def load_tokenizer(path: str, revision: str = ""):
    """The tokenizer, with a token to fill up rows with: any will do, as none is seen or scored."""
    tokenizer = _load(AutoTokenizer, path, revision)
    if tokenizer.eos_token_id is None:
        raise UserError(f"generator.model={path}: its tokenizer has no end token (eos_token), with "
                        "which a list would end; name another model")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # Another one than the end token, if there is one: trainers that mask by pad (TRL, when the
        # run's folder is used there) would never teach the end. Special, so that no text shows it.
        others = [t for t in tokenizer.all_special_ids if t != tokenizer.eos_token_id]
        tokenizer.pad_token_id = (others or [tokenizer.eos_token_id])[0]
    return tokenizer


def dtype_of(precision: str) -> torch.dtype:
    """What generator.precision means on this machine."""
    if precision == "auto":  # with AVX512-BF16 a CPU is twice as fast, without it slower in 16 bit
        fast = torch.cuda.is_available() or any(
            has for name, has in torch.cpu.get_capabilities().items() if name.endswith("_bf16"))
        precision = "bfloat16" if fast else "float32"
    return getattr(torch, precision)


def load_generator(path: str, load_in_4bit: bool = False, gradient_checkpointing: bool = False,
                   revision: str = "", precision: str = "float32"):
    """A causal LM of a folder or the hub, in generator.precision; NF4 if asked for."""
    gpu, dtype = torch.cuda.is_available(), dtype_of(precision)
    if load_in_4bit and not gpu:  # refused before any weight is read
        with torch.device("meta"):  # shapes without memory
            bare = AutoModelForCausalLM.from_config(load_config(path, revision))
        if (billions := bare.num_parameters() / 1e9) > LARGEST_ON_CPU:
            raise UserError(
                f"generator.model={path}: {billions:.1f} billion parameters in 4 bit need a GPU, "
                f"and there is none; name a model of at most {LARGEST_ON_CPU} billion")
    nf4 = BitsAndBytesConfig(  # the scales are quantised too: 0.4 bit a weight less
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True)
    model, info = _load(
        AutoModelForCausalLM, path, revision, dtype=dtype, use_safetensors=True,
        quantization_config=nf4 if load_in_4bit else None, output_loading_info=True,
        device_map={"": torch.cuda.current_device() if gpu else "cpu"},
        attn_implementation="sdpa")  # takes the masks of tree rows, which flash attention does not
    if absent := sorted(info["missing_keys"]):  # transformers fills them with random numbers
        count = f"{len(absent)} weights are missing, {absent[0]} the first"
        raise UserError(f"generator.model={path}: {count}; download it again")
    for module in model.modules():
        # On a CPU with AVX512-BF16, bitsandbytes repacks the weights at the first eval-mode
        # forward, and training after it is silently wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def load_config(path: str, revision: str = ""):
    return _load(AutoConfig, path, revision)


def check_length(config, length: int) -> None:
    """Raise UserError if the model does not see all of a text of `length` tokens."""
    text = config.get_text_config()
    limits = {name: getattr(text, name, None) for name in LIMITS}
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Phi's: beyond it, the longest text of a batch decides how the positions of all are coded.
        name = "original_max_position_embeddings"
        limits[name] = getattr(text, name, None) or rope.get(name)
    for name, limit in limits.items():
        if limit and length > limit:
            raise UserError(
                f"generator.model={config.name_or_path}: a prompt and a list of {length} tokens "
                f"outgrow its {name} of {limit}; lower generator.max_prompt_tokens or "
                f"generator.max_new_tokens (endpoint.max_tokens for roles), or name another model")


def _load(kind, path: str, revision: str, **settings):
    """kind.from_pretrained, whose failures become one UserError with what to do."""
    if path == str(smollm2_folder()):
        make_smollm2()
    try:  # never with code that a repository brings along
        settings |= {"revision": revision or "main", "trust_remote_code": False}
        return kind.from_pretrained(path, **settings)
    except torch.OutOfMemoryError:  # explained where the stage is known (train.explained)
        raise
    except Exception as error:  # a file may be broken in as many ways as there are readers
        reason = " ".join(str(error).split())[:200]
        if "attention implementation" in reason:  # Bloom, MPT, GPT-Neo, Gemma 2, GPT-OSS
            advice = "its attention takes no mask of lists that share a prompt: name another model"
        elif "configuration class" in reason:  # T5, LLaVA
            advice = "it is no causal language model of text: name another model"
        elif "bitsandbytes" in reason:
            advice = "set generator.load_in_4bit=false"
        else:
            advice = ("name a local folder (where a hub can be reached: hf download MODEL "
                      "--local-dir FOLDER), or leave it empty for SmolLM2")
        raise UserError(f"generator.model={path}: cannot be loaded ({reason}); {advice}") from None


def add_lora(model, rank: int, alpha: int, seed: int):
    """LoRA on all linear layers but the head, without dropout: log-probabilities compare."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)  # A is random; B is zero, so that it begins as the bare model
    linear = "all-linear"  # PEFT's word for them; it leaves out the head
    # A router of experts may be a Linear by its class, and return several tensors (Phi-3.5-MoE).
    routers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
               and type(module).__module__.startswith("transformers.")]
    settings = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=linear,
                          exclude_modules=routers or None)
    return get_peft_model(model, settings).eval()


@contextlib.contextmanager
def whole_adapter(folder: str | Path):
    """Loads an adapter inside; raises UserError where its files are damaged or hold no numbers."""
    read_tensors(Path(folder) / "adapter_model.safetensors")  # refuses what is damaged
    try:
        with warnings.catch_warnings():  # PEFT goes on with random weights in place of missing ones
            warnings.filterwarnings("error", "Found missing adapter keys")
            yield
    except torch.OutOfMemoryError:  # explained where the stage is known
        raise
    except Exception as error:  # as many as there are ways to break a file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: no adapter of this model ({reason}); {AGAIN}") from None


def load_adapter(model, folder: str | Path, trainable: bool):
    from peft import PeftModel

    with whole_adapter(folder):
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable).eval()


def save_adapter(model, folder: str | Path) -> None:
    """A vanilla PEFT folder, written whole or not at all."""  # plain PEFT and vLLM load it
    with atomic_path(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)


def adapter_weights(model, folder: str | Path | None = None) -> dict[str, torch.Tensor]:
    """The LoRA weights of a saved adapter, by their names in a model with one of the same shape;
    of no folder a copy of the model's own as they are now."""
    if folder is None:
        return {name: weight.detach().clone()
                for name, weight in model.named_parameters() if "lora_" in name}
    stored = read_tensors(Path(folder) / "adapter_model.safetensors")
    # PEFT leaves the adapter's own name out of a file.
    return {name: stored[name.replace(".default.", ".")].to(weight.device)
            for name, weight in model.named_parameters() if "lora_" in name}


@contextlib.contextmanager
def other_adapter(model, weights: dict[str, torch.Tensor]):
    """`model` with these LoRA weights in place of its own, which come back behind the block.

    So one base in memory serves policy, reference and reward model. Nothing is copied: the two
    swap places. No graph may be open whose backward comes later.
    """
    named = [(w, weights[name]) for name, w in model.named_parameters() if name in weights]

    def swap() -> None:
        for weight, other in named:
            weight.data, other.data = other.data, weight.data

    swap()
    try:
        yield model
    finally:
        swap()


def merge_adapter(model, adapter: str | Path, tokenizer, folder: str | Path, card: str) -> None:
    """Write the model (16 or 32 bit) with the adapter in its weights, tokenizer and model card."""
    # In 16 bit: into a 4-bit base the sum would be rounded to 4 bit again.
    merged = load_adapter(model, adapter, trainable=False).merge_and_unload().bfloat16()
    # For servers with transformers 4 also under the names of then: without rope_theta they would
    # turn by another angle and say nothing.
    rope = getattr(merged.config, "rope_parameters", None) or {}
    if "rope_theta" in rope:
        merged.config.rope_theta = rope["rope_theta"]
    with atomic_path(folder) as temporary:
        merged.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        settings = read_json(temporary / "tokenizer_config.json")
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # an alias in transformers 5
        write_json(temporary / "tokenizer_config.json", settings)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def decoder_and_head(model, length: int):
    """(decoder, head) below PEFT's and the causal LM's wrappers, for texts of `length` tokens.

    That a linear head is all that follows the decoder is measured once: check.check_tree_rows.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # under PEFT
    check_length(causal.config, length)
    return causal.get_decoder(), causal.get_output_embeddings()
