"""Run the comparisons, each in a process of its own, and write results/benchmarks.md.

    pip install -r requirements-dev.txt && python -m benchmarks
    python -m benchmarks sit contrastive        # these anew, the others as they were last measured

All take about an hour of one core. Growth with the users: `python -m benchmarks.scaling`;
faults and what is left of a run: `python -m benchmarks.faults`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

from benchmarks.common import Row, bits, gpu_marks, gpu_notes, gpu_rows, table
from files import ROOT, read_json, write_json

SCRIPTS = (
    "dpo", "grpo", "sit", "sampling", "contrastive", "list_search", "list_quality", "precision"
)
RESULTS = ROOT / "results"


def run(script: str) -> dict:
    """Run one comparison and return what its last line, JSON, says."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}"], stdout=subprocess.PIPE, text=True,
        check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    print(done.stdout, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def page(results: dict[str, dict]) -> str:
    """results/benchmarks.md from what each script printed."""
    columns = Row.__dataclass_fields__
    rows = [
        Row(**{k: v for k, v in row.items() if k in columns})  # the ratios are computed anew
        for script in SCRIPTS
        for row in results.get(script, {}).get("rows", [])
    ]
    machines = {json.dumps(result["machine"]) for result in results.values()}
    lines = [
        "# Beside the peers\n",
        "```bash\npip install -r requirements-dev.txt && python -m benchmarks\n```\n",
        "CPU seconds of one thread, candidates in turn in one process, medians of five "
        "(dpo, grpo, sampling: of three); peak memory of a process that does nothing else.\n",
        *(
            ", ".join(f"{name} {value}" for name, value in json.loads(machine).items()) + ".\n"
            for machine in sorted(machines)
        ),
        "DPO, GRPO, SIT and sampling: SmolLM2-135M-Instruct where it is named, else random weights "
        "of Qwen2.5-0.5B's width and 151,936 tokens, 4 layers; fp32, LoRA r16 on all linear layers "
        "(sampling: none). Each script's first lines say what its peer does.\n",
        table(rows),
        f"\nBelow what was asked: {'; '.join(r.work for r in rows if r.missed) or 'none'}.\n",
    ]
    for script in SCRIPTS:
        if "table" in (result := results.get(script, {})):
            command = f"`python -m benchmarks.{script}`"
            lines.append(f"## {result['benchmark']}\n\n{command}: {result['text']}")
            lines.append(f"\n{result['table']}\n")
    return "\n".join([*lines, *gpu_section()]) + "\n"


def gpu_section() -> list[str]:
    """The table of results/gpu.jsonl."""
    lines = ["## On a GPU\n", "`python -m benchmarks.gpu > results/gpu.jsonl`:"]
    if not (rows := gpu_rows()):
        return [*lines, "not measured."]
    waits, marks = [r for r in rows if r["how"] == "one list"], gpu_marks(rows)
    lines += [
        f"random weights of Qwen2.5-7B's shape on one {rows[0]['device']}, torch "
        f"{rows[0]['torch']}. A DPO step is of one user, 1 + 3 lists of 64 tokens, ours with "
        "gradient checkpointing, TRL's without; a stage is the heaviest call of one with the "
        "settings of configs/qwen2.5-7b.yaml; peak: of the card's dense bf16 arithmetic, model "
        "FLOP only; bandwidth: of reading the weights once a token, prefill in the time.\n",
        "| weights | work | prompt | tokens/s | of peak or bandwidth | memory, GB | under 24 GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row in waits:
            continue
        share = row.get("share_of_peak") or row.get("share_of_bandwidth")  # of a card that is known
        step = row["how"].startswith(("sampling", "stage"))
        cells = [
            bits(row), row["how"] if step else f"DPO step, {row['how']}", row["prompt"],
            f"{row.get('tokens_per_s', 0):,.0f}{marks[row.get('note')]}",
            f"{share:.0%}" if share else "–",
            f"{row['peak_gb']:.1f}" if "peak_gb" in row else "–",
            {True: "yes", False: "no"}.get(row.get("fits_24_gb"), "–"),
        ]  # fmt: skip
        if row.get("out_of_memory"):
            cells[3:6] = ["out of memory" + marks[row.get("note")], "–", "–"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        *gpu_notes(rows),
        "\nOne user, one list, by our sampler without a server; the paper has 0.28 s and 2.9 s, of "
        "its own model and cards:\n",
        "| weights | prompt | first token, s | 70 tokens, s |",
        "|---|---|---|---|",
        *(
            f"| {bits(r)} | {r['prompt']} | {r['first_token_s']:.2f} | {r['list_of_70_s']:.1f} |"
            for r in waits
        ),
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scripts", nargs="*", metavar="script", help=", ".join(SCRIPTS))
    scripts = parser.parse_args().scripts or SCRIPTS
    if unknown := set(scripts) - set(SCRIPTS):
        parser.error(f"no such comparison: {', '.join(sorted(unknown))}")
    kept = RESULTS / "benchmarks.json"
    for script in scripts:
        results = read_json(kept) if kept.is_file() else {}
        write_json(kept, results | {script: run(script)})
    (RESULTS / "benchmarks.md").write_text(page(read_json(kept)), encoding="utf-8")


if __name__ == "__main__":
    main()
