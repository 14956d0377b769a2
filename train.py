"""Train every part of IceBreaker: the stages, in order, and what each depends on.

    python train.py                                    # all stages, embedded default, one table
    python train.py --stage dpo dpo.beta=0.2           # one stage (and what it needs)
    python train.py data.users=mine.jsonl              # your own users (see README)
    python train.py --plan --config configs/qwen2.5-7b.yaml    # memory and tokens; nothing loads
    python train.py --doctor                           # what this machine has and lacks
    python train.py --stage ranker --stage dpo data.feedback=FILE    # a round more; see feedback.py
    torchrun --nproc-per-node=2 train.py --stage dpo   # on two GPUs

Stages: world -> base -> summarize -> match -> rid -> ranker -> sit -> dpo -> eval, and merge where
asked for; their loops stand in rid.py and isg.py. A stage is skipped if its settings and inputs
have not changed, and runs its predecessors first if they are missing.

Departures from the paper: LoRA instead of full fine-tuning; teacher and revisit matcher are offline
rules over text (roles.py) unless an LLM is named (chat.py); the platform is simulated (world.py)
unless logs are given.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import operator
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

import eval as evaluation
import llm
from config import (
    ROOT,
    Config,
    UserError,
    digest,
    file_digest,
    gather,
    load_config,
    processes,
    read_json,
    script,
    write_json,
)
from pipeline import Pipeline, base_folder, short, sum_counts
from serving import feedback
from stages import isg, rid
from tools import tiny_model

# ------------------------------------------------------------------------------------ world, base


def stage_world(p: Pipeline) -> dict:
    """Write the simulated platform's logs, or check the files that the user gave."""
    if not p.config.data.users:
        from world import people

        people.generate(p.config.world).write(p.run / "world")
    return {
        "users": len(p.logged_users),
        "sessions": sum(len(u.sessions) for u in p.logged_users),
        "impressions": len(p.impressions),
    }


def stage_base(p: Pipeline) -> dict:
    """The embedded stand-in for Qwen2.5, pre-trained unless it ships; or a named model."""
    if p.config.generator.model:
        llm.check_model(p.model_path, p.config.generator.revision)
        return {"model": p.config.generator.model}
    folder = base_folder(p.config)
    if not (folder / "figures.json").is_file():
        print(f"  base: {tiny_model.BASE.batches} batches to learn from; weights/ has the default's")
        write_json(
            folder / "figures.json", tiny_model.build_base(tiny_model.BASE, p.config.generator, folder)
        )
    return {"folder": str(folder), **read_json(folder / "figures.json")}


# ------------------------------------------------------------------------------------------ merge


def stage_merge(p: Pipeline) -> dict:
    """The latest policy as a plain 16-bit model, for servers without adapters."""
    adapter = p.run / "sit" / "adapter"
    if p.impressions:
        adapter = p.run / "dpo" / f"round{p.config.dpo.rounds}" / "adapter"
    g, folder = p.config.generator, p.run / "merge" / "model"
    base = llm.load_generator(p.model_path, load_in_4bit=False, revision=g.revision)
    # The folder's name is of this machine, and is left out of what may be published.
    name = Path(p.model_path).name if Path(p.model_path).is_dir() else p.model_path
    card = (
        f"# Conversation starters\n\nWeights of `{name}` with the LoRA adapter "
        f"`{adapter.relative_to(p.run.path)}` of an IceBreaker run (config `{digest(p.config)}`) "
        f"merged in, bfloat16.\n\nPrompt: the chat template "
        f"around `{g.instruction.format(n=g.list_size)}` and one line `- interest` for each "
        f"interest, best first. Answer: `<sug> a && b && ... </sug>`.\n"
    )
    llm.merge_adapter(base, adapter, p.tokenizer, folder, card)
    return {"folder": str(folder), "adapter": str(adapter)}


# ------------------------------------------------------------------------------------------- main


@dataclass(frozen=True)
class Stage:
    run: Callable[[Pipeline], dict]  # returns the figures of its closing line
    needs: tuple[str, ...]  # earlier stages
    settings: tuple[str, ...]  # sections and settings that its result depends on
    alone: bool = False  # of several processes the first does all


STAGES = {
    "world": Stage(stage_world, (), ("world", "data"), alone=True),
    "base": Stage(stage_base, (), ("generator",), alone=True),
    "summarize": Stage(rid.stage_summarize, ("world",), ("roles.summariser",), alone=True),
    "match": Stage(rid.stage_match, ("summarize",), ("encoder", "roles.matcher"), alone=True),
    "rid": Stage(rid.stage_rid, ("match",), ("rid",), alone=True),
    "ranker": Stage(isg.stage_ranker, ("rid",), ("ranker", "generator"), alone=True),  # K slots
    "sit": Stage(isg.stage_sit, ("rid", "base"), ("generator", "sit", "roles.teacher")),
    "dpo": Stage(isg.stage_dpo, ("sit", "ranker"), ("dpo",)),
    "eval": Stage(evaluation.stage_eval, ("dpo",), ("eval",)),
    "merge": Stage(stage_merge, ("dpo",), ("generator",), alone=True),
}
# Settings that say how, or where, the same is computed; or that concern feedback rounds alone.
HOW = [f"generator.{x}" for x in ("endpoint", "endpoint_key_env", "sample_rows",
                                  "gradient_checkpointing")]  # fmt: skip
HOW += ["data.feedback", "dpo.pairs_per_user"]
ALL = [name for name in STAGES if name != "merge"]  # run where nothing else is asked for


def stage_key(p: Pipeline, name: str, *without: str) -> str:
    """Digest of all that a stage's result depends on: settings, data files, earlier stages.

    without: settings that are left out of account.
    """
    stage, files = STAGES[name], []
    if name == "world" and p.config.data.users:
        files = [file_digest(f) for f in (p.users_file, p.impressions_file) if f]
    if name == "base" and not p.config.generator.model:
        folder = base_folder(p.config)
        files = [folder.name]  # holds tiny_model.BASE
        if folder.parent != Path(p.config.run.root):  # it ships
            files += [file_digest(folder / "model.safetensors")]
    config = copy.deepcopy(p.config)
    for setting in (*HOW, *without):
        section, field = setting.split(".")
        setattr(getattr(config, section), field, None)
    e, g = config.endpoint, config.generator
    llm_of = {  # what tells the LLM of a role from another
        "endpoint": [e.model, e.temperature, e.max_tokens],
        "generator": [g.model, g.revision],
    }
    values = [operator.attrgetter(setting)(config) for setting in stage.settings]
    values += [llm_of[x] for x in values if isinstance(x, str) and x in llm_of]
    # A stage that ran again because calls had failed has made something else than before.
    before = [(stage_key(p, s, *without), failed_calls(p, s)) for s in stage.needs]
    return digest(name, p.config.run.seed, values, files, before)


def failed_calls(p: Pipeline, name: str) -> int:
    """Calls to LLMs in vain, as far as this stage has run: it is run again and asks for these."""
    done = (p.run / name / "done.json").is_file()
    return p.run.figures(name).get("failed_calls", 0) if done else 0


def out_of_memory(config: Config, stage: str) -> str:
    """What was in memory, and the next setting to change."""
    g, batch = config.generator, getattr(getattr(config, stage, None), "batch_users", None)
    if g.sample_rows > {"dpo": 32, "eval": 1}.get(stage, g.sample_rows):
        advice = f"generator.sample_rows={g.sample_rows // 2}"
    elif batch and batch > 1:
        advice = f"{stage}.batch_users={batch // 2}"
    elif not g.gradient_checkpointing:
        advice = "generator.gradient_checkpointing=true"
    elif not g.load_in_4bit:
        advice = "generator.load_in_4bit=true"
    else:
        advice = f"generator.max_prompt_tokens={g.max_prompt_tokens // 2}"
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    users = f"batches of {batch} users, " if batch else ""
    return (
        f"{stage}: memory is full ({users}prompts of up to {g.max_prompt_tokens} tokens, "
        f"peak {peak:.1f} GiB); try {advice}"
    )


@contextlib.contextmanager
def explained(config: Config, stage: str):
    """Raise UserError with advice where memory is full."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if "out of memory" in str(error) or "DefaultCPUAllocator" in str(error):
            raise UserError(out_of_memory(config, stage)) from None
        raise


def run_stages(config: Config, wanted: list[str]) -> None:
    """Run the wanted stages and, first, those they need; skip what is done with these settings."""
    # Adam's averages of weights that hardly move become denormal, which slows a CPU several times.
    torch.set_flush_denormal(True)
    llm.quiet_libraries()
    if config.data.feedback:
        with explained(config, "dpo"):
            feedback.train_round(config, wanted, free=HOW)
        return
    p, needed = Pipeline(config), set(wanted)
    for name in reversed(STAGES):
        if name in needed:
            needed.update(STAGES[name].needs)
    for name in (s for s in STAGES if s in needed):
        key, note = stage_key(p, name), "" if name in wanted else f" (for {', '.join(wanted)})"
        if p.run.is_done(name, key) and not failed_calls(p, name):
            print(f"{name}: already done with these settings, skipped")
            continue
        print(f"{name}: running{note}", flush=True)
        p.key = stage_key(p, name, "dpo.rounds", "dpo.vanilla")  # a round is the same without
        started = time.time()
        figures: dict = {}
        with explained(config, name):
            if processes()[0] == 0 or not STAGES[name].alone:
                figures = STAGES[name].run(p)
        calls = p.calls()
        if not STAGES[name].alone:
            calls = sum_counts(gather([calls]))
        if calls:
            good = ("asked", "cached", "answered")
            figures["calls"] = calls
            figures["failed_calls"] = sum(n for kind, n in calls.items() if kind not in good)
        p.encoder.save()
        figures["seconds"] = round(time.time() - started, 1)
        p.run.mark_done(name, key, **figures)
        p.run.log(name, **figures)
        print(f"{name}: {short(figures)}", flush=True)
    if "eval" in wanted:
        print("\n" + (p.run / "eval" / "table.md").read_text(encoding="utf-8"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"Everything is in {p.run.path}; peak memory {peak:.1f} GiB")


@contextlib.contextmanager
def joined_processes():
    """What `torchrun` started meets here; only the first process prints."""
    number, count = processes()
    if count == 1:
        yield
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The first process works alone in some stages, and the others wait for it.
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(days=7)
    )
    try:
        with (
            open(os.devnull, "w") as nothing,
            contextlib.redirect_stdout(nothing if number else sys.stdout),
        ):
            yield
    finally:
        torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", action="append", choices=[*STAGES, "all"], help="default: all")
    parser.add_argument("--config", default=str(ROOT / "configs" / "tiny.yaml"))
    parser.add_argument("--plan", action="store_true", help="memory and tokens; loads nothing")
    parser.add_argument("--doctor", action="store_true", help="what this machine has and lacks")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.settings)
    if arguments.plan or arguments.doctor:
        from tools import plan

        print(plan.plan(config) if arguments.plan else plan.doctor(config))
        return
    stages = arguments.stage or ["all"]
    with joined_processes():
        run_stages(config, ALL if "all" in stages else stages)


if __name__ == "__main__":
    script(main)
