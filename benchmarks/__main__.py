"""Run the comparisons, each in a process of its own, and write results/benchmarks.md.

    pip install -r requirements-dev.txt && python -m benchmarks
    python -m benchmarks sit contrastive        # these anew, the others as they were last measured

All take about 45 minutes of one core. Growth with the users: `python -m benchmarks.scaling`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

from benchmarks.common import Row, table
from config import ROOT, read_json, write_json

SCRIPTS = ("dpo", "sit", "sampling", "contrastive", "list_search", "list_quality", "precision")
RESULTS = ROOT / "results"


def run(script: str) -> dict:
    """Run one comparison and return what its last line, JSON, says."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}"], stdout=subprocess.PIPE, text=True,
        check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    print(done.stdout, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def page(made: dict[str, dict]) -> str:
    """results/benchmarks.md from what each script printed."""
    known = Row.__dataclass_fields__
    rows = [
        Row(**{k: v for k, v in row.items() if k in known})
        for script in SCRIPTS
        for row in made.get(script, {}).get("rows", [])
    ]
    machines = {json.dumps(one["machine"]) for one in made.values()}
    gpu = RESULTS / "gpu.jsonl"
    figures = f"```\n{gpu.read_text(encoding='utf-8')}```" if gpu.is_file() else "Not measured."
    lines = [
        "# Beside the peers\n",
        "```bash\npip install -r requirements-dev.txt && python -m benchmarks\n```\n",
        "CPU seconds of one thread, candidates in turn in one process, medians of five "
        "(sampling 96 tokens: once); peak memory of a process that does nothing else.\n",
        *(
            ", ".join(f"{name} {value}" for name, value in json.loads(one).items()) + ".\n"
            for one in sorted(machines)
        ),
        "DPO, SIT and sampling: random weights of Qwen2.5-0.5B's width and 151,936 tokens, 4 "
        "layers, fp32, LoRA r16 on all linear layers (sampling: none). Each script's first lines "
        "say what its peer does.\n",
        table(rows),
        f"\nBelow what was asked: {'; '.join(r.work for r in rows if r.missed) or 'none'}.\n",
    ]
    for script in SCRIPTS:
        if "table" in made.get(script, {}):
            one = made[script]
            lines.append(f"## {one['benchmark']}\n\n`python -m benchmarks.{script}`: {one['text']}")
            lines.append(f"\n{one['table']}\n")
    lines.append(f"## On a GPU\n\n`python -m benchmarks.gpu > results/gpu.jsonl`\n\n{figures}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scripts", nargs="*", metavar="script", help=", ".join(SCRIPTS))
    scripts = parser.parse_args().scripts or SCRIPTS
    if unknown := set(scripts) - set(SCRIPTS):
        parser.error(f"no such comparison: {', '.join(sorted(unknown))}")
    kept = RESULTS / "benchmarks.json"
    for script in scripts:
        made = read_json(kept) if kept.is_file() else {}
        write_json(kept, made | {script: run(script)})
    (RESULTS / "benchmarks.md").write_text(page(read_json(kept)), encoding="utf-8")


if __name__ == "__main__":
    main()
