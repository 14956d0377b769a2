"""Train every part of IceBreaker: the stages, in order, and what each depends on.

    python train.py                                    # all stages, embedded default, one table
    python train.py --stage dpo dpo.beta=0.2           # one stage (and what it needs)
    python train.py data.users=mine.jsonl              # your own users (see README)
    python train.py --plan --config configs/qwen2.5-7b.yaml    # memory and tokens; nothing loads
    python train.py --doctor                           # what this machine has and lacks
    python train.py --stage ranker --stage dpo data.feedback=FILE  # a round: serving/feedback.py
    torchrun --nproc-per-node=2 train.py               # on two GPUs
    python train.py --config configs/garm.yaml         # a sibling paper: From Clicks to Preference
    python train.py --config configs/qualeqs.yaml      # the other: QualEQS, for a shop

Stages: world -> base -> summarize -> match -> rid -> ranker -> sit -> dpo -> eval, and merge where
asked for. Of run.method=garm: world -> base -> dialogues -> sft -> reward -> fuse -> rl -> eval;
of qualeqs: world -> base -> dialogues -> sft -> rl -> mine -> eval.
A stage, in the file of its name in stages/, is skipped if its settings and inputs have not changed,
and runs its predecessors first if they are missing.

Departures: LoRA, not full tuning; teacher and matcher are rules unless an LLM is named (roles/);
the platform is simulated (world/) unless logs are given.
"""

import argparse
import contextlib
import copy
import json
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
from pydantic import BaseModel

import data
import llm
from config import TINY, Config, GeneratorConfig, RlConfig, load_config
from files import UserError, digest, file_digest, gather_counts, meet, one_line, processes, script
from roles.players import Players, players_of
from run import Run, given_files
from serving import feedback
from stages import garm_eval, mine, quality_eval
from stages.dialogues import stage_dialogues
from stages.dpo import stage_dpo
from stages.eval import stage_eval
from stages.fuse import stage_fuse
from stages.match import RULES, stage_match
from stages.merge import stage_merge
from stages.ranker import stage_ranker
from stages.reward import stage_reward
from stages.rid import stage_rid
from stages.rl import stage_rl
from stages.sft import stage_sft
from stages.sit import CORPUS, stage_sit
from stages.steps import return_memory
from stages.summarize import stage_summarize
from stages.warm_start import stage_warm_start
from tools import doctor, plan
from world import dialogues, people, shop, shop_goods


def stage_world(run: Run, players: Players, key: str) -> dict:
    """Write the simulated platform's logs, or check the files that the user gave."""
    if not run.config.data.users:
        if run.folder.has_run("world"):
            print(f"  world: written anew (version {people.VERSION}), and all that rests on it")
        people.World(run.config.world).write(run.folder / "world")
    return {
        "users": len(run.logged_users),
        "sessions": sum(len(user.sessions) for user in run.logged_users),
        "impressions": len(run.impressions)}


def stage_base(run: Run, players: Players, key: str) -> dict:
    """Is the generator there? Asked before hours of other work."""
    path = players.writer.model_path  # a hub id, a folder, or weights/tiny
    g, default = run.config.generator, GeneratorConfig()
    llm.check_model(path, g.revision, g.max_prompt_tokens + g.max_new_tokens)
    if g.model == TINY and (g.list_size, g.instruction) != (default.list_size, default.instruction):
        print("  base: weights/tiny was made for other lists; python -m tools.tiny_model makes one")
    return {"model": path}


def stage_dialogue_world(run: Run, players: Players, key: str) -> dict:
    """Write the simulated conversations, or check the file that the user gave."""
    if not run.config.data.dialogues:
        dialogues.Dialogues(run.config.dialogues, run.encoder).write(run.folder / "world")
    rows = data.read_dialogues(run.dialogues_file)
    return {"contexts": len(rows), "clicked": sum(bool(row.clicked) for row in rows)}


def stage_shop(run: Run, players: Players, key: str) -> dict:
    """Write the simulated shop and its log, or check the files that the user gave."""
    if not run.config.data.dialogues:
        own = shop_goods.goods_of(data.read_catalogue(run.catalogue_file), data.read_policies(
            run.policies_file)) if run.config.data.catalogue else None
        shop.Shop(run.config.shop, own).write(run.folder / "world")
    rows, cases = data.read_dialogues(run.dialogues_file), run.config.quality.cases
    return {"contexts": len(rows), "clicked": sum(bool(row.clicked) for row in rows),
            "products": len(data.read_catalogue(run.catalogue_file)),
            "policies": len(data.read_policies(run.policies_file)),
            "cases": len(data.read_quality_cases(cases)) if cases else 0}


@dataclass(frozen=True)
class Stage:
    run: Callable[[Run, Players, str], dict]  # returns the figures of its closing line
    needs: tuple[str, ...]  # earlier stages
    settings: tuple[str, ...]  # sections and settings that its result depends on
    # Likewise the content of these, which no earlier stage has made: name -> path.
    files: Callable[[Config], dict] = lambda config: {}
    alone: bool = False  # of several processes the first does all


def tiny_weights(config: Config) -> dict:
    """Of the stand-in, which ships, and may be made anew."""
    folder = Path(llm.model_path(config.generator))
    return {"weights/tiny": folder / "model.safetensors"} if config.generator.model == TINY else {}


STAGES = {
    "world": Stage(stage_world, (), ("world", "data"), given_files, alone=True),
    "base": Stage(stage_base, (), ("generator",), tiny_weights, alone=True),
    "summarize": Stage(stage_summarize, ("world",), ("roles.summariser",), alone=True),
    # Every later stage is anew where what the rules read has changed.
    "match": Stage(stage_match, ("summarize",), ("encoder", "roles.matcher"),
                   lambda config: {f"roles/{path.name}": path for path in RULES}, alone=True),
    "rid": Stage(stage_rid, ("match",), ("rid",), alone=True),
    "ranker": Stage(stage_ranker, ("rid",), ("ranker", "generator"), alone=True),  # K slots
    "sit": Stage(stage_sit, ("rid", "base"), ("generator", "sit", "roles.teacher"),
                 lambda config: {"the corpus": CORPUS} if config.sit.corpus_rows else {}),
    "dpo": Stage(stage_dpo, ("sit", "ranker"), ("dpo",)),
    "eval": Stage(stage_eval, ("dpo",), ("eval",)),
    "merge": Stage(stage_merge, ("dpo",), ("generator",), alone=True),
}
PROBED = [  # what a short probe of RL depends on
    f"rl.{name}" for name in RlConfig.model_fields
    if name not in ("arms", "steps", "candidates", "rft_contexts")]
GARM = {  # From Clicks to Preference: garm.py, docs/garm.md
    "world": Stage(
        stage_dialogue_world, (), ("dialogues", "data", "encoder"), given_files, alone=True),
    "base": STAGES["base"],
    "dialogues": Stage(stage_dialogues, ("world", "base"), (), alone=True),
    "sft": Stage(stage_sft, ("dialogues",), ("generator", "sft")),
    "reward": Stage(stage_reward, ("dialogues",), ("generator", "reward")),
    "fuse": Stage(stage_fuse, ("sft", "reward"), ("fuse", *PROBED, "roles.judge")),
    "rl": Stage(stage_rl, ("fuse",), ("rl", "sft", "dpo", "roles.judge")),
    "eval": Stage(garm_eval.stage_eval, ("rl",), ("eval",)),
}
QUALEQS = {  # Quality Over Clicks: qualeqs.py, docs/qualeqs.md
    "world": Stage(stage_shop, (), ("shop", "data", "encoder"), given_files, alone=True),
    "base": STAGES["base"], "dialogues": GARM["dialogues"],
    "sft": Stage(stage_warm_start, ("dialogues",),
                 ("generator", "sft", "quality.mix", "quality.ablations"),
                 lambda config: {"the corpus": CORPUS} if config.quality.mix else {}),
    "rl": Stage(mine.stage_rl, ("sft",), (
        "rl", "roles.judge", "quality.cases", "quality.failed_as_zero", "quality.ablations"),
        lambda config: {"quality.cases": path} if (path := config.quality.cases) else {}),
    "mine": Stage(mine.stage_mine, ("rl",), ("quality",)),
    "eval": Stage(quality_eval.stage_eval, ("mine",), ("eval",)),
}
# run.method: the paper, and its stages in order
METHODS = {"icebreaker": STAGES, "garm": GARM, "qualeqs": QUALEQS}
ONLY_IF_ASKED = ("merge",)  # not run where nothing else is asked for
# Settings that say how, or where, the same is computed; or that concern feedback rounds alone.
HOW = (
    "generator.endpoint", "generator.endpoint_key_env", "generator.sample_rows",
    "generator.micro_batch", "generator.gradient_checkpointing", "data.feedback",
    "dpo.pairs_per_user",
)
# A round of DPO is the same whatever follows it; a reward model or an arm, whatever is beside it.
ROUNDS = ("dpo.rounds", "dpo.vanilla", "reward.kinds", "rl.arms", "quality.rounds",
          "quality.ablations")


def stage_key(run: Run, name: str, *without: str) -> str:
    """Digest of all that a stage's result depends on: settings, data files, earlier stages.

    without: settings that are left out of account.
    """
    stage, method = METHODS[run.config.run.method][name], run.config.run.method
    files = [*map(file_digest, stage.files(run.config).values())]
    if stage.run is stage_world and not files:  # another version: all is trained anew
        files = [f"world {people.VERSION}"]
    config = copy.deepcopy(run.config)  # from which settings are taken out
    for setting in (*HOW, *without):
        section, field = setting.split(".")
        setattr(getattr(config, section), field, None)
    e, g = config.endpoint, config.generator
    llm_of = {  # what tells the LLM of a role from another
        "endpoint": [e.model, e.temperature, e.max_tokens],
        "generator": [g.model, g.revision]}
    # "dpo" is a whole section, "roles.teacher" one setting.
    values = [operator.attrgetter(setting)(config) for setting in stage.settings]
    values += [llm_of[value] for value in values if isinstance(value, str) and value in llm_of]
    # A stage that ran again because calls had failed has made something else than before.
    # Recursive: what changes here changes every later stage.
    # Of garm none is made again: what it did without a judgement is done (fuse.py, rl.py).
    before = [(stage_key(run, s, *without), failed_calls(run, s) if method != "garm" else 0)
              for s in stage.needs]
    return digest(name, config.run.seed, values, files, before)


def stage_inputs(run: Run, name: str) -> dict:
    """Settings ("section.key") of a stage's own and digests of its data, by which it would differ;
    not those of earlier stages, nor those that only add to what is there."""
    config, values = run.config, {"run.seed": run.config.run.seed}
    stage = METHODS[config.run.method][name]
    for setting in stage.settings:
        value = operator.attrgetter(setting)(config)
        if isinstance(value, BaseModel):
            values |= {f"{setting}.{key}": inner for key, inner in value.model_dump().items()}
        else:
            values[setting] = value
    values |= {f"{file}, the content": file_digest(path)
               for file, path in stage.files(config).items()}
    return {key: value for key, value in values.items() if key not in (*HOW, *ROUNDS)}


def refuse_changes(config: Config, named: list[str]) -> None:
    """Raise UserError where a stage that is there or was begun had other settings, unless it is
    done and named on the command line: nobody trains anew for hours by a word too many."""
    run, stages = Run(config, describe=False), METHODS[config.run.method]
    for name in () if config.data.feedback else stages:
        before = run.folder.record(name).get("settings", {})
        now = json.loads(json.dumps(stage_inputs(run, name))) if before else {}
        changed = [key for key in before | now if now.get(key, "") != before.get(key, "")]
        begun = changed and not run.folder.has_run(name)
        # Of `world` begun alone nothing is trained: a file that it has refused may be mended.
        if not changed or (begun and name == "world") or (name in named and not begun):
            continue
        key = changed[0]
        then, said = (json.dumps(settings.get(key, "")) for settings in (before, now))
        others = f" (and {', '.join(changed[1:4])})" if changed[1:] else ""
        back = f"bring back {key}" if "," in key else f"{key}={then}"
        anew = f"rm -r {run.folder / name}" if begun else f"--stage {name}"
        if not key.startswith("data.") and (key not in before or key not in now):
            raise UserError(
                f"{key}: stage {name} of {run.folder.path} is of another version of this code, "
                f"which {'knew' if key in before else 'did not know'} this setting; to train it "
                f"anew: {anew}; to start another run: run.name=NAME")
        raise UserError(
            f"{key}={said}: stage {name} of {run.folder.path} was "
            f"{'begun' if begun else 'trained'} with {then}{others}; to go on "
            f"with it: {back}; to train it anew: {anew}; to start another run: run.name=NAME")


def failed_calls(run: Run, name: str) -> int:
    """Calls to LLMs in vain, as far as this stage has run: it is run again and asks for these."""
    return run.folder.figures(name).get("failed_calls", 0) if run.folder.has_run(name) else 0


def out_of_memory(config: Config, stage: str) -> str:
    """What was in memory, and the next setting to change."""
    # Cheapest first: what changes the time, then the precision, then the prompt.
    g, least = config.generator, dict.fromkeys(("dpo", "sft", "fuse", "rl", "mine"), 32)
    trains = config.rl if stage in ("fuse", "mine") else getattr(config, stage, None)
    batch = getattr(trains, "batch_users", None)
    at_once = batch and min(batch, g.micro_batch or batch)
    if g.sample_rows > (least | {"eval": 1}).get(stage, g.sample_rows):
        advice = f"generator.sample_rows={g.sample_rows // 2}"
    elif at_once and at_once > 1:
        advice = f"generator.micro_batch={at_once // 2}"
    elif not g.gradient_checkpointing:
        advice = "generator.gradient_checkpointing=true"
    elif not g.load_in_4bit:
        advice = "generator.load_in_4bit=true"
    else:
        advice = f"generator.max_prompt_tokens={g.max_prompt_tokens // 2}"
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    users = f"{at_once} users at a time, " if at_once else ""
    return (
        f"{stage}: memory is full ({users}prompts of up to {g.max_prompt_tokens} tokens, "
        f"peak {peak:.1f} GiB); try {advice}")


@contextlib.contextmanager
def explained(config: Config, stage: str):
    """Raise UserError with advice where memory is full."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if "out of memory" in str(error) or "DefaultCPUAllocator" in str(error):
            raise UserError(out_of_memory(config, stage)) from None
        raise


def wanted_stages(config: Config, names: list[str]) -> list[str]:
    """The stages that --stage names, perhaps several; UserError for an unknown one."""
    stages = METHODS[config.run.method]
    if unknown := [name for name in names if name not in stages and name != "all"]:
        method, names = config.run.method, ", ".join([*stages, "all"])
        raise UserError(f"--stage {unknown[0]}: run.method={method} has {names}")
    return [s for s in stages if s not in ONLY_IF_ASKED] if "all" in names else names


def run_stages(config: Config, wanted: list[str]) -> None:
    """Run the wanted stages and, first, those they need; skip what is done with these settings."""
    llm.settle_libraries()
    if config.data.feedback:
        with explained(config, "dpo"):
            feedback.feedback_round(config, wanted, free=HOW)
        return
    run, needed = Run(config), set(wanted)
    players, stages = players_of(run), METHODS[config.run.method]
    for name in stages:  # one of other settings, or of an earlier stage that had others, is no part
        if run.folder.has_run(name) and run.folder.key(name) != stage_key(run, name):
            run.folder.withdraw(name)  # of what config.yaml describes, though nobody asks for it
    for name in reversed(stages):  # the table is in order: one pass finds all
        if name in needed:
            needed.update(stages[name].needs)
    for name in (s for s in stages if s in needed):
        # Asked again before each: an earlier stage may just have made something else.
        key, note = stage_key(run, name), "" if name in wanted else f" (for {', '.join(wanted)})"
        again = failed_calls(run, name)
        meet()  # all have read it
        if again:
            run.folder.withdraw(name)
            meet()
        if not run.folder.begin(name, key, settings=stage_inputs(run, name)):
            print(f"{name}: already done with these settings, skipped")
            continue
        print(f"{name}: running{note}", flush=True)
        figures = run_stage(run, players, name)
        run.folder.log(name, **figures)  # before: what is done has its line
        run.folder.mark_done(name, key, **figures)
        return_memory()
        print(f"{name}: {one_line(figures)}", flush=True)
    if "eval" in wanted:  # also where it was skipped: the table is what one came for
        print("\n" + (run.folder / "eval" / "table.md").read_text(encoding="utf-8"))
    # ru_maxrss is in KiB on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"Everything is in {run.folder.path}; peak memory {peak:.1f} GiB")


def run_stage(run: Run, players: Players, name: str) -> dict:
    """What one stage made, its calls to LLMs and its seconds."""
    stage, started, figures = METHODS[run.config.run.method][name], time.time(), {}
    with explained(run.config, name):
        if processes()[0] == 0 or not stage.alone:
            figures = stage.run(run, players, stage_key(run, name, *ROUNDS))
    calls = players.calls()
    if not stage.alone:  # each process asked for its share
        calls = gather_counts(calls)
    if calls:  # failed ones make the next start ask again
        good = ("asked", "cached", "answered")
        figures["calls"] = calls
        figures["failed_calls"] = sum(n for kind, n in calls.items() if kind not in good)
    run.encoder.save()  # texts that this stage read first
    figures["seconds"] = round(time.time() - started, 1)
    return figures


@contextlib.contextmanager
def joined_processes():
    """What `torchrun` started meets here; only the first process prints."""
    number, count = processes()
    if count == 1:
        yield
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before anything is loaded
    # The first process works alone in some stages, and the others wait for it.
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(days=7))
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
    parser.add_argument("--stage", action="append", help="one of run.method's; default: all")
    parser.add_argument("--config", help="default: config.py's settings")
    parser.add_argument("--plan", action="store_true", help="memory and tokens; loads nothing")
    parser.add_argument("--doctor", action="store_true", help="what this machine has and lacks")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.settings)
    if arguments.plan or arguments.doctor:
        print(plan.plan(config) if arguments.plan else doctor.doctor(config))
        return
    with joined_processes():
        wanted = wanted_stages(config, arguments.stage or ["all"])
        refuse_changes(config, arguments.stage or [])
        meet()  # all have looked before the first replaces anything
        run_stages(config, wanted)


if __name__ == "__main__":
    script(main)
