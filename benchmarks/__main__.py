"""Run every comparison, each in a process of its own, and write results/benchmarks.md.

    pip install -r requirements-dev.txt && python -m benchmarks

About half an hour, of one core. Growth with the number of users: `python -m benchmarks.scaling`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchmarks.common import Row, table
from benchmarks.list_quality import quality_table
from config import ROOT

SCRIPTS = ("dpo", "sit", "sampling", "contrastive", "list_search", "list_quality")
RESULTS = ROOT / "results"


def main() -> None:
    rows, quality, machine = [], [], {}
    for script in SCRIPTS:
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{script}"], stdout=subprocess.PIPE, text=True,
            check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        print(done.stdout, flush=True)
        made = json.loads(done.stdout.splitlines()[-1])
        known = Row.__dataclass_fields__
        rows += [Row(**{k: v for k, v in r.items() if k in known}) for r in made.get("rows", [])]
        quality += made.get("quality", [])
        machine = made.get("machine", machine)
    gpu = RESULTS / "gpu.jsonl"
    figures = f"```\n{gpu.read_text(encoding='utf-8')}```" if gpu.is_file() else "Not measured."
    lines = [
        "# Beside the peers\n",
        "```bash\npip install -r requirements-dev.txt && python -m benchmarks\n```\n",
        "CPU seconds of one thread, candidates in turn in one process, medians of five "
        "(sampling 160 tokens or three prompts: three); peak memory of a process that does "
        "nothing else. "
        f"{', '.join(f'{name} {value}' for name, value in machine.items())}.\n",
        "DPO, SIT and sampling: random weights of Qwen2.5-0.5B's width and 151,936 tokens, 4 "
        "layers, fp32, LoRA r16 on all linear layers (sampling: none). Each script's first lines "
        "say what its peer does.\n",
        table(rows),
        f"\nBelow what was asked: {'; '.join(r.work for r in rows if r.missed) or 'none'}.\n",
        "## List quality against time\n",
        "`python -m benchmarks.list_quality`: lists of 6 from 64 real starters with random "
        "utilities. Value is lambda U + (1 - lambda) D at lambda 0.4, mean over 64 users.\n",
        quality_table(quality),
        f"\n## On a GPU\n\n`python -m benchmarks.gpu > results/gpu.jsonl`\n\n{figures}",
    ]
    (RESULTS / "benchmarks.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
