"""Stage `merge`: the latest policy as a plain 16-bit model, for servers that know no adapters.

    python train.py --stage merge
"""

from pathlib import Path

import llm
from files import digest
from roles.players import Players
from run import Run


def stage_merge(run: Run, players: Players, key: str) -> dict:
    """Write merge/model: a transformers folder with tokenizer and a model card."""
    adapter = run.adapter("last" if run.impressions else "sit")  # without taps there is no DPO
    g, writer, folder = run.config.generator, players.writer, run.folder / "merge" / "model"
    # Into 4-bit weights the sum would be rounded to 4 bit again: the base is loaded in 16 bit.
    base = llm.load_generator(writer.model_path, revision=g.revision, precision=g.precision)
    # The folder's name is of this machine, and is left out of what may be published.
    path = Path(writer.model_path)
    card = (
        f"# Conversation starters\n\nWeights of `{path.name if path.is_dir() else path}` with the "
        f"LoRA adapter `{adapter.relative_to(run.folder.path)}` of an IceBreaker run (config "
        f"`{digest(run.config)}`) merged in, bfloat16.\n\nPrompt: the chat template "
        f"around `{g.instruction.format(n=g.list_size)}` and one line `- interest` for each "
        f"interest, best first. Answer: `<sug> a && b && ... </sug>`.\n")
    llm.merge_adapter(base, adapter, writer.tokenizer, folder, card)  # whole or not at all
    return {"folder": str(folder), "adapter": str(adapter)}
