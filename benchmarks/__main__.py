"""Run every comparison, each in a process of its own, and write results/benchmarks.md.

    pip install -r requirements-dev.txt && python -m benchmarks
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from benchmarks.common import Row, table
from config import ROOT

SCRIPTS = ("dpo", "sit", "sampling", "contrastive", "list_search", "list_quality")
PACKAGES = ("torch", "transformers", "peft", "trl", "sentence-transformers", "pyversity")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [x.split(":")[1] for x in info.read_text().splitlines() if x.startswith("model name")]
    return names[0].strip() if names else platform.processor()


def main() -> None:
    rows, quality = [], []
    for script in SCRIPTS:
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{script}"], stdout=subprocess.PIPE, text=True,
            check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        print(done.stdout, flush=True)
        made = json.loads(done.stdout.splitlines()[-1])
        rows += [Row(**r) for r in made.get("rows", [])]
        quality += made.get("quality", [])
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    missed = [r.work for r in rows if r.at_least and r.ratio < r.at_least]
    lines = [
        "# Beside the peers\n",
        "```bash\npip install -r requirements-dev.txt && python -m benchmarks\n```\n",
        f"CPU seconds of one thread, candidates in turn in one process, median of five; peak "
        f"memory of a process that does nothing else. {processor()}, {platform.system()}, Python "
        f"{platform.python_version()}; {versions}.\n",
        "DPO, SIT and sampling: random weights of Qwen2.5-0.5B's width and 151,936 tokens, 4 "
        "layers, fp32, LoRA r16 on all linear layers (sampling: none).\n",
        table(rows),
        f"\nBelow what was asked: {', '.join(missed) or 'none'}.\n",
        "On a GPU: not measured (`benchmarks/gpu.py` holds the measurement).\n",
        "## List quality against time\n",
        "`python -m benchmarks.list_quality`: lists of 6 from 64 real starters with random "
        "utilities. Value is lambda U + (1 - lambda) D at lambda 0.4, mean over 64 users.\n",
        "| method | value | CPU ms a user |\n|---|---|---|",
    ]
    for r in sorted(quality, key=lambda r: -r["value"]):
        lines.append(f"| {r['method']} | {r['value']:.4f} | {r['ms_per_user']:.2f} |")
    (ROOT / "results" / "benchmarks.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
