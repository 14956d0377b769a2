"""Closing the loop on the simulated platform: tap, train, serve, and tap more?

    python -m benchmarks.loop runs/default           # a finished run; writes results/loop.md

People of the simulated platform visit a running server, which shows them lists, and tap by their
hidden click model. `train.py data.feedback=STORE` trains a round from what the server's store holds
by then; the server takes it up while it runs. Other people, whom neither the run nor the round has
learned from, are served before and after: do they tap more, by the hidden click model? Exits with 3
if the round is refused or the click rate does not rise, which chance can bring about, and with 1 if
a part fails. The run itself is left as it is.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np

from benchmarks.serve import server
from config import load_config
from files import ROOT
from run import Run
from stages.metrics import bootstrap
from world import people
from world.click_model import Truth

AT_ONCE, DRAWS = 16, 3
PEOPLE, VISITS = 300, 5  # of results/loop.md; with others nothing is written there


async def visits(url: str, users: list[str], visit, times: int) -> list[list]:
    """visit(client, user, number) of each user, `times` of them in turn, AT_ONCE users at once."""
    free = asyncio.Semaphore(AT_ONCE)

    async def one(http, user: str) -> list:
        async with free:
            return [await visit(http, user, number) for number in range(times)]

    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        return await asyncio.gather(*(one(http, user) for user in users))


async def starters(http, user: str, **more) -> dict:
    reply = await http.post("/v1/starters", json={"user_id": user, **more})
    return reply.raise_for_status().json()


def tapping(truth: Truth):
    """A visit: see a list, tap what one likes, say so."""
    rng = np.random.default_rng(0)

    async def visit(http, user: str, number: int) -> tuple[int, int]:
        reply = await starters(http, user)
        texts = [s["text"] for s in reply["starters"]]
        if not texts:
            return 0, 0
        taps = np.flatnonzero(rng.random(len(texts)) < truth.click_probabilities(user, texts))
        events = [{"impression_id": reply["impression_id"], "type": "shown"}]
        events += [events[0] | {"type": "tap", "slot": int(i)} for i in taps]
        (await http.post("/v1/events", json={"events": events})).raise_for_status()
        return len(texts), len(taps)

    return visit


def watching(truth: Truth):
    """A list's expected taps; nothing is reported, so nothing of the server's state changes."""

    async def visit(http, user: str, number: int) -> float:
        reply = await starters(http, user, refresh=True, exclude=[f"draw {number}"])
        return truth.expected_clicks(user, [s["text"] for s in reply["starters"]])

    return visit


def train_round(folder: Path, words: list[str], store: Path) -> str:
    """Train a round from what the store holds; gives train.py's last line, which says what came."""
    command = [sys.executable, "train.py", "--stage", "ranker", "--stage", "dpo", "--config",
               folder / "config.yaml", *words, f"data.feedback={store}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr[-2000:], sep="\n")
    if done.returncode:
        raise SystemExit("the round failed")
    if not (folder / "feedback" / "current.json").is_file():
        print("the round was refused")
        raise SystemExit(3)
    return done.stdout.strip().splitlines()[-1].rpartition(" (")[0]


def model_after(url: str, model: str) -> str:
    """The model that the server takes up in place of this one; it looks every few seconds."""
    for _ in range(100):
        if (newest := httpx.get(url + "/v1/model").json()["model"]) != model:
            return newest
        time.sleep(0.2)
    raise SystemExit("the server did not take up the round")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="folder of a finished run on the simulated platform")
    parser.add_argument("--people", type=int, default=PEOPLE, help="who visit and tap")
    parser.add_argument("--visits", type=int, default=VISITS, help="of each of them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "runs" / Path(arguments.run).name
        shutil.copytree(arguments.run, folder, ignore=shutil.ignore_patterns("serve.sqlite*"))
        loop(folder, arguments.people, arguments.visits)


def loop(folder: Path, tappers: int, times: int) -> None:
    """tappers: how many people tap; times: how often each of them visits."""
    words = [f"run.root={folder.parent}", f"run.name={folder.name}"]
    run = Run(load_config(folder / "config.yaml", words))
    truth = people.load_truth(folder / "world")
    tapping_users = [u for u in run.ids("train", "valid", "judge") if run.users[u].sessions]
    tapping_users = tapping_users[:tappers]
    others = [u for u in run.ids("test") if run.states[u][-1].interests]
    store = folder / "serve.sqlite"
    with server(folder, f"serve.store={store}") as url:
        old = httpx.get(url + "/v1/model").json()["model"]
        before = asyncio.run(visits(url, others, watching(truth), DRAWS))
        seen = np.array(asyncio.run(visits(url, tapping_users, tapping(truth), times))).sum((0, 1))
        verdict = train_round(folder, words, store)
        new = model_after(url, old)
        after = asyncio.run(visits(url, others, watching(truth), DRAWS))
    a, b = np.mean(before, axis=1), np.mean(after, axis=1)  # (users,) expected taps a list
    difference, low, high = bootstrap([b - a])
    page = f"""# The loop: tapped, trained, served

```bash
python -m benchmarks.loop runs/{folder.name}
```

{len(tapping_users)} people of the simulated platform visited a running server {times} times each:
{seen[0]} starters shown, {seen[1]} tapped. A round was trained from the server's store, and the
server took it up while it ran. {len(others)} other people, whom nothing has learned from, by the
hidden click model:

| model | expected taps a list |
|---|---|
| {old} | {a.mean():.4f} |
| {new} | {b.mean():.4f} |

Difference by person, 95 % bootstrap interval: {difference:+.4f} [{low:+.4f}, {high:+.4f}].

{verdict}.
"""
    if (tappers, times) == (PEOPLE, VISITS):
        (ROOT / "results" / "loop.md").write_text(page, encoding="utf-8")
    print(page)
    if difference <= 0:
        print("the click rate did not rise")
        raise SystemExit(3)


if __name__ == "__main__":
    main()
