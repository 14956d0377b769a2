"""What test_two_processes_equal_one runs alone and under torchrun: sampling, mining, sit, dpo.

    python tests/torchrun_work.py FINISHED OUT section.key=value ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import conftest  # noqa: F401  (the tests' small base model)

import llm
import pipeline
import train
from config import ROOT, gather, load_config, processes, read_json, share, write_json
from stages import isg


def main() -> None:
    finished, out, *words = sys.argv[1:]
    llm.quiet_libraries()
    with train.joined_processes():
        count = processes()[1]
        p = pipeline.Pipeline(load_config(ROOT / "configs" / "tiny.yaml", words))
        states = isg.chosen_states(p, [0, 1], 7, isg.random.Random(0))
        p.fit_to_show = lambda text, interests, repeats=False: [text[:40], text[40:80], "Chess?"]
        lists = p.sample_lists(p.policy(None), [s.interests for s in states], 2, 5)
        taught = isg.teacher_lists(p, states, 2, "test")
        p.ranker("train")
        own = share(zip(states, lists, taught, strict=True))
        found, counts = isg.mine_round(
            p, p.ranker("train"), [s for s, *_ in own], [x + y for _, x, y in own]
        )
        rows = [
            (p.prompt(s.interests), [llm.encode_completion(p.tokenizer, x) for x in y])
            for s, y in zip(states, taught, strict=True)
        ]
        model, figures = isg.instruct(p, rows)
        llm.save_adapter(model, Path(out) / f"sit{count}")
        pairs = read_json(Path(finished) / "dpo" / "round1" / "pairs.json")
        figures |= isg.align(p, model, pairs, "round 1")
        llm.save_adapter(model, Path(out) / f"dpo{count}")
        figures = {k: v for k, v in figures.items() if isinstance(v, float)}
        made = {"lists": lists, "pairs": gather(found), "figures": figures}
        made["counts"] = pipeline.sum_counts(gather([dict(counts)]))
        write_json(Path(out) / f"made{count}.json", made)


if __name__ == "__main__":
    main()
