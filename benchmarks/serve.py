"""The server beside raw `generate` on the same model: latency, batching, look-ups.

    python -m benchmarks.serve runs/default          # a finished run; writes results/serving.md

One client: transformers' generate, our sampler and the server take turns on the same prompts, one
list each. Then 1, 8 and 32 clients, each sending its next request when the last one is answered,
with every request a person of its own; and one client whose answers are ready. Wall-clock seconds:
only the ratios mean something on another machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import torch

import data
import llm
from benchmarks.common import machine
from config import load_config
from files import ROOT
from roles.writer import Writer
from run import Run

PEOPLE, CLIENTS, ROUNDS = 40, (1, 8, 32), 6


@contextlib.contextmanager
def server(run: Path, *settings: str):
    """A server of this run with a store of its own; gives an httpx client's base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "serve.py", "--run", str(run), "--port", str(port)]
        log = open(Path(folder) / "log", "w")  # noqa: SIM115 - closed with the process
        process = subprocess.Popen(
            [*command, f"serve.store={folder}/store.sqlite", *settings], cwd=ROOT, stdout=log,
            stderr=log, env={k: v for k, v in os.environ.items() if k != "ICEBREAKER_KEY"},
        )
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(url + "/readyz").is_success:
                        break
                if process.poll() is not None:
                    raise SystemExit((Path(folder) / "log").read_text())
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait(30)


def body(user: data.User, **more) -> dict:
    sessions = user.model_dump(mode="json")["sessions"]
    return {"sessions": sessions, "profile": user.profile, **more}


def timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def p50_p95(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.0f} / {1e3 * quantile(seconds, 0.95):.0f}"


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def one_client(run: Run, users: list[data.User], url: str) -> dict[str, list[float]]:
    """Seconds of each way to a list, in turn for each person."""
    g, writer = run.config.generator, Writer(run.config, answers=Path(":memory:"))
    tokenizer = writer.tokenizer
    model = writer.policy(run.adapter("last" if run.impressions else "sit"))
    times: dict[str, list[float]] = {"generate": [], "sampler": [], "server": []}
    with httpx.Client(base_url=url, timeout=60) as http:
        for number, user in enumerate(users):
            # What the server distils from the whole history, stage rid has distilled of it.
            prompt = writer.prompt(run.states[user.user_id][-1].interests)
            ids = torch.tensor([prompt])  # (1, T)

            def generate(ids=ids, number=number):
                torch.manual_seed(number)
                model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True,
                    max_new_tokens=g.max_new_tokens, temperature=g.temperature, top_p=g.top_p,
                    top_k=g.top_k, stop_strings=["</sug>"], tokenizer=tokenizer,
                    pad_token_id=tokenizer.pad_token_id,
                )

            def sampler(prompt=prompt, number=number):
                writer.draw(model, [prompt], 1, seed=number)

            def ask(user=user):
                http.post("/v1/starters", json=body(user)).raise_for_status()

            for name, work in (("generate", generate), ("sampler", sampler), ("server", ask)):
                times[name].append(timed(work))
    return {name: values[2:] for name, values in times.items()}  # the first two warm up


def many_clients(url: str, users: list[data.User], clients: int) -> tuple[list[float], float]:
    """Seconds of each request, and answers per second."""
    seconds: list[float] = []

    async def client(http, number: int) -> None:
        for turn in range(ROUNDS if clients > 1 else 5 * ROUNDS):
            user = users[(number + turn * clients) % len(users)]
            started = time.perf_counter()
            exclude = [f"turn {turn} of {number}"]  # a request of its own: nothing is the same
            reply = await http.post("/v1/starters", json=body(user, exclude=exclude))
            reply.raise_for_status()
            seconds.append(time.perf_counter() - started)

    async def everyone() -> float:
        async with httpx.AsyncClient(
            base_url=url, timeout=120, limits=httpx.Limits(max_connections=clients)
        ) as http:
            started = time.perf_counter()
            await asyncio.gather(*(client(http, i) for i in range(clients)))
            return time.perf_counter() - started

    whole = asyncio.run(everyone())
    return seconds, len(seconds) / whole


def ready_answers(url: str, user: data.User, times: int = 300) -> list[float]:
    """Seconds of requests whose answer is ready."""
    path = f"/v1/users/{user.user_id}/sessions"
    with httpx.Client(base_url=url, timeout=60) as http:
        http.put(path, json={"sessions": body(user)["sessions"]}).raise_for_status()
        ask = {"user_id": user.user_id}
        for _ in range(100):
            if http.post("/v1/starters", json=ask).json()["starters"][0]["source"] == "cached":
                break
            time.sleep(0.1)
        return [timed(lambda: http.post("/v1/starters", json=ask)) for _ in range(times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="folder of a finished run")
    folder = Path(parser.parse_args().run)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    llm.settle_libraries()
    words = [f"run.root={folder.parent}", f"run.name={folder.name}"]
    run = Run(load_config(folder / "config.yaml", words), describe=False)
    users = [u for u in run.users.values() if run.states[u.user_id][-1].interests][: PEOPLE + 2]
    with server(folder, "serve.candidates=1") as url:
        version = httpx.get(url + "/v1/model").json()["model"]
        times = one_client(run, users, url)
    median = {name: statistics.median(values) for name, values in times.items()}
    names = {"generate": "raw `generate`, the prompt given", "sampler": "our sampler, the same",
             "server": "the server, from sessions to starters, one list"}  # fmt: skip
    lines = [
        "# The server\n",
        f"```bash\npython -m benchmarks.serve runs/{folder.name}\n```\n",
        ", ".join(f"{name} {value}" for name, value in machine().items()) + f"; version "
        f"{version}, {torch.get_num_threads()} threads. Milliseconds of wall clock.\n",
        f"## One client, in turn for {len(times['server'])} people\n",
        "| | p50 / p95, ms | beside `generate` |\n|---|---|---|",
        *(f"| {names[name]} | {p50_p95(times[name])} | {median[name] / median['generate']:.2f} |"
          for name in names),
        "\n## Clients that ask at once\n",
        "| lists sampled | clients | p50 / p95, ms | answers a second | beside one client |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for candidates in (1, run.config.serve.candidates):
        with server(folder, f"serve.candidates={candidates}") as url:
            alone = None
            many_clients(url, users, 4)  # warms up
            for clients in CLIENTS:
                seconds, rate = many_clients(url, users, clients)
                alone = alone or rate
                lines.append(
                    f"| {candidates} | {clients} | {p50_p95(seconds)} | {rate:.1f} | "
                    f"{rate / alone:.1f}× |"
                )
            cached = ready_answers(url, users[0])
    lines += [
        "\n## Answers that are ready\n",
        f"{len(cached)} requests of one client, until its last byte: p50 "
        f"{1e3 * statistics.median(cached):.1f} ms, p95 {1e3 * quantile(cached, 0.95):.1f} ms.\n",
        "Not measured: the server on a GPU. The sampler alone, beside the paper's 0.28 s to the "
        "first token and 2.9 s for a list of 70: [benchmarks.md](benchmarks.md).",
    ]
    page = "\n".join(lines) + "\n"
    (ROOT / "results" / "serving.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
