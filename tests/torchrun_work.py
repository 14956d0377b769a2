"""What test_two_processes_equal_one runs alone and under torchrun: sampling, mining, sit, dpo.

    python tests/torchrun_work.py FINISHED OUT section.key=value ...
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import llm
import train
from config import load_config
from files import ROOT, gather, gather_counts, processes, read_json, share, write_json
from roles import players as players_module
from roles import writer as writer_module
from run import Run
from stages import dpo, pairs, ranker, sit


def main() -> None:
    finished, out, *words = sys.argv[1:]
    llm.settle_libraries()
    with train.joined_processes():
        count = processes()[1]
        run = Run(load_config(ROOT / "configs" / "tiny.yaml", words))
        writer = writer_module.Writer(run.config, Path(":memory:"))
        players = players_module.Players(run.config, run.encoder, writer)
        for module in (writer_module, players_module):
            module.fit_to_show = lambda text, *_: [text[:40], text[40:80], "Chess?"]
        states = sit.draw_states(run, [0, 1], 7, random.Random(0))
        inputs = [s.interests for s in states]
        lists = writer.sample(writer.policy(None), inputs, 2, 5)
        taught = sit.taught_lists(run, players, states, 2, "test")
        both = [policy + teacher for policy, teacher in zip(lists, taught, strict=True)]
        scorer = ranker.load_ranker(run, "train")
        searched = pairs.search(run, scorer, share(states), share(both))
        mined, counts = pairs.mine(run, searched, share(lists))
        rows = [
            (writer.prompt(s.interests), [llm.encode_completion(writer.tokenizer, y) for y in full])
            for s, full in zip(states, taught, strict=True)
        ]
        model, figures = sit.instruct(run, writer, rows, run.config.sit, "sit")
        llm.save_adapter(model, Path(out) / f"sit{count}")
        rows = dpo.encoded(writer, read_json(Path(finished) / "dpo" / "round1" / "pairs.json"))
        figures |= dpo.align(run, writer, model, rows, "round 1", run.config.dpo)
        llm.save_adapter(model, Path(out) / f"dpo{count}")
        figures = {k: v for k, v in figures.items() if isinstance(v, float)}
        result = {"lists": lists, "pairs": gather(mined), "figures": figures}
        result["counts"] = gather_counts(counts)
        write_json(Path(out) / f"made{count}.json", result)


if __name__ == "__main__":
    main()
