"""What this machine has and lacks for a configuration, and what to do about it.

    python train.py --doctor --config configs/qwen2.5-7b.yaml  # versions, GPU, 4-bit, hub, disk
"""

import http.client
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import constants

import llm
from config import Config, GeneratorConfig
from files import ROOT
from llm.model import LARGEST_ON_CPU
from tools.plan import CONTEXT, FRAGMENTATION, GIB, cached_file, find_shape, stage_bytes

Lines = Iterator[tuple[bool, str]]  # whether it is well, and what it is


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


def _versions(config: Config) -> Lines:
    yield sys.version_info >= (3, 11), f"Python {platform.python_version()} (3.11 or later)"
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", text, re.MULTILINE))
    for name in ("torch", "transformers", "peft", "bitsandbytes"):  # tested as one set
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            here = "missing"
        same = here.split("+")[0] == pins[name]  # torch says 2.13.0+cpu of a build for CPUs
        yield same, f"{name} {here}" + ("" if same else f": pip install {name}=={pins[name]}")


def _gpu(config: Config) -> Lines:
    if not torch.cuda.is_available():
        yield True, "no GPU: the embedded default and small models run on the CPU"
        return
    card = torch.cuda.get_device_properties(0)
    bf16 = torch.cuda.is_bf16_supported()  # in which models are loaded there (llm/model.py)
    text = f"GPU {card.name}, {card.total_memory / GIB:.1f} GiB, CUDA {torch.version.cuda}"
    yield bf16, text + (", bf16" if bf16 else ": no bf16, which starts with compute capability 8.0")


def _four_bit(config: Config) -> Lines:
    llm.settle_libraries()
    # Here, as importing it already fails on some machines: then this is a line, and no crash.
    from bitsandbytes.nn import Linear4bit

    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    layer = Linear4bit(64, 64, bias=False, compute_dtype=dtype, quant_type="nf4").to(device)
    inputs = torch.randn(4, 64, device=device, dtype=dtype, requires_grad=True)
    layer(inputs).sum().backward()  # where a kernel is missing, zeros may come back and no error
    fine = bool(inputs.grad.isfinite().all() and inputs.grad.any())
    text = f"4-bit layer of bitsandbytes, forward and backward on {device}"
    yield fine, text if fine else f"{text}: no gradient; set generator.load_in_4bit=false"


def unreachable(url: str, key: str = "") -> str:
    """Why there is no answer from `url` within 3 seconds, or ""."""
    if not url.startswith(("http://", "https://")):  # urllib would read file:/// too
        return "no http address"
    request = urllib.request.Request(url)
    if key:  # not sent on to where a redirect leads
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=3):
            return ""  # whatever it says: it is there, and takes the key
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except (OSError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    except ValueError:  # its text holds the header
        return "no valid address, or no valid key"


def at_hand(g: GeneratorConfig) -> bool:
    """Whether the generator's weights are on this machine; asks no network."""
    names = ("model.safetensors", "model.safetensors.index.json")  # whole, or in parts
    return Path(llm.model_path(g)).is_dir() or any(cached_file(g, name) for name in names)


def _hub(config: Config) -> Lines:
    g, url = config.generator, os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    why = "HF_HUB_OFFLINE is set" if offline else unreachable(url)
    there = not g.model or at_hand(g)  # pip fetches that one
    advice = "; nothing is needed from it" if there else (
        f": where it can be reached, hf download {g.model} --local-dir FOLDER; then copy FOLDER "
        "here and set generator.model=FOLDER")
    yield there or not why, f"hub {url}: {why + advice if why else 'reachable'}"


def _endpoints(config: Config) -> Lines:
    g, e = config.generator, config.endpoint
    base_url = e.base_url or os.environ.get("OPENAI_BASE_URL", "")
    if "endpoint" in vars(config.roles).values() and not base_url:
        yield False, "endpoint.base_url: a role asks an endpoint; set it, or OPENAI_BASE_URL"
    chat = "endpoint.base_url", base_url, e.key_env
    policy = "generator.endpoint", g.endpoint, g.endpoint_key_env
    for name, url, variable in (chat, policy):  # each with its key alone: they may be of two owners
        if url:
            key = os.environ.get(variable, "").strip()
            why = unreachable(url.rstrip("/") + "/models", key)  # it needs the key
            shown = url.split("@")[-1]  # whatever stands before is a secret
            advice = f": {why}; start the server, or correct {name} or its key"
            yield not why, f"{name} {shown}" + (advice if why else " answers")


def _room(config: Config) -> Lines:
    """Memory and disk beside the estimate of tools/plan.py."""
    g, s, on_gpu = config.generator, find_shape(config), torch.cuda.is_available()
    if not on_gpu and s.parameters > LARGEST_ON_CPU * 1e9:
        yield False, f"no GPU, which {s.parameters / 1e9:.1f} B parameters need: a smaller model"
    stages = stage_bytes(config, s, llm.dtype_of(g.precision).itemsize)
    peak = max(terms["peak"] for terms in stages.values())
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # bytes
    needed = 4 * GIB if on_gpu else peak + GIB  # Python itself takes one
    places = [("RAM", ram, needed, "a smaller model or a GPU; see --plan")]
    if on_gpu:
        card = torch.cuda.get_device_properties(0).total_memory
        advice = "smaller batch_users, sample_rows or max_prompt_tokens; see --plan"
        places.append(("GPU memory", card, peak * FRAGMENTATION + CONTEXT, advice))
    root, cache = config.run.root, constants.HF_HUB_CACHE  # HF_HOME moves the second
    adapters = 4 * s.lora(g.lora_rank) * (config.dpo.rounds + 2)  # sit, each round, the baseline
    disks = [(f"run.root ({root})", root, adapters + GIB / 2)]
    if not at_hand(g):  # 2 bytes a parameter come from the hub
        disks.append((f"the hub's cache ({cache})", cache, 2 * s.parameters))
    for name, folder, needed in disks:
        path = Path(folder).absolute()  # or the first parent that exists: it may come later
        free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
        advice = "make room, or set run.root, HF_HOME"
        places.append((f"free disk for {name}", free, needed, advice))
    for name, has, needed, advice in places:
        text = f"{name}: {has / GIB:.1f} GiB, {needed / GIB:.1f} needed by estimate"
        yield has >= needed, text if has >= needed else f"{text}; {advice}"
    yield True, f"{os.cpu_count()} cores"
