"""Stages of paper 001: the chain and its resumption, mining, a judge that fails, one's own shop."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch

import data
import garm
import llm
import train
from config import load_config
from files import UserError, read_json
from roles import chat, prompted
from roles.players import Players
from roles.rules import Rules
from roles.suggester import Suggester
from roles.writer import drained
from run import Run
from serving.engine import Ask
from serving.suggest import Suggestions
from stages import mine, quality_eval, warm_start
from stages.dialogues import Context
from stages.quality import Quality, log_contexts
from tests.test_garm_stages import opened, trained, weights_in, without_models
from tests.test_llm import tiny
from tests.test_quality import CASES, GOODS, GROUP, Scripted, talk
from tools import tiny_model

GOOD = [text for text, marks, _ in CASES if marks == (1, 1, 1)]
BAD = [text for text, marks, _ in CASES if marks != (1, 1, 1)]
SMALL = """run.method=qualeqs run.name=q run.seed=3 generator.max_prompt_tokens=90
    generator.max_new_tokens=24 generator.lora_rank=4 generator.precision=float32
    generator.list_size=3 data.train=0.4 data.valid=0.2 data.judge=0.2 data.test=0.2
    sft.max_contexts=8 quality.mix=0.5 quality.rounds=2 quality.contexts=8 quality.share=0.5
    rl.steps=2 rl.batch_users=2 rl.group=3 rl.learning_rate=1e-3 eval.max_users=5
    eval.lists=2""".split()


def scripted(self, model, contexts, n, seed, task="", **how):
    """In place of a policy that can write: answers by seed and context, good, bad or malformed."""
    result = []
    for turns in contexts:
        rng, answers = random.Random(f"{seed} {turns[0].content}"), []
        for _ in range(n):
            texts = rng.sample(rng.choice([GOOD, BAD, GOOD + BAD]), 3)
            answers.append(self.completion(rng.choice([garm.format_answer(texts)] * 5 + ["none"])))
        result.append(answers)
    return result


def log_of(contexts: int) -> list[data.Dialogue]:
    """A shop's log; one context in three has a click."""
    rng, rows = random.Random(0), []
    for i in range(contexts):
        row = talk(f"I need a kettle for person {i}", "We have two kettles.")
        rows.append(row.model_copy(update={
            "dialogue_id": f"d{i}", "user_id": f"u{i % 31}", "intent": ("product", "policy")[i % 2],
            "suggestions": rng.sample(GOOD, 2) + rng.sample(BAD, 1), "unsafe": False,
            "clicked": [i % 3] if i % 3 == 0 else []}))
    return rows


@pytest.fixture(autouse=True)
def _without_models(monkeypatch):
    without_models(monkeypatch, scripted)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random model whose vocabulary is that of the log; beside it the shop's files."""
    folder = tmp_path_factory.mktemp("hub") / "random"
    texts = [text for row in log_of(20) for text in (row.turns[0].content, *row.suggestions)]
    tokenizer = tiny_model.train_tokenizer(texts * 3, 400)
    tokenizer.save_pretrained(folder)
    tiny(vocabulary=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    data.write_dialogues(folder.parent / "log.jsonl", log_of(90))
    data.write_catalogue(folder.parent / "catalogue.jsonl", [
        data.Product(id=i, name=name, category=[category, GROUP[category]], brand=brand,
                     price=price, currency="EUR", attributes=attributes, stock=2)
        for i, name, category, brand, price, attributes in GOODS])
    text = "returns:\n  window: Send it back within 30 days.\n"
    (folder.parent / "policies.yaml").write_text(text)
    return folder


def small(root: Path, model_folder, *words):
    files = [f"data.{name}={model_folder.parent}/{file}" for name, file in (
        ("dialogues", "log.jsonl"), ("catalogue", "catalogue.jsonl"),
        ("policies", "policies.yaml"))]
    return load_config(None, [*SMALL, f"run.root={root}", f"generator.model={model_folder}",
                              *files, *words])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model_folder):
    """A run in which every stage ran without a break; tests only read it."""
    root = tmp_path_factory.mktemp("qualeqs")
    trained(small(root, model_folder), scripted)
    return root


def copied(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def names_of(contexts) -> list[str]:
    return [c.dialogue.dialogue_id for c in contexts]


# ---------------------------------------------------------------------------------------- the chain


def test_every_stage_runs_and_is_then_done(whole, model_folder, capsys):
    run, _, _ = opened(small(whole, model_folder))
    figures = {name: run.folder.figures(name) for name in train.QUALEQS}
    assert figures["world"] | {"seconds": 0} == {
        "contexts": 90, "clicked": 30, "products": 4, "policies": 1, "cases": 0, "seconds": 0}
    assert figures["sft"]["mixed"]["rows"] == 8 and figures["sft"]["mixed"]["general_rows"] == 4
    adapters = weights_in(whole)
    assert [path.split("/adapter")[0] for path in adapters] == [
        "q/mine/hard1", "q/mine/hard2", "q/rl/grpo", "q/sft/mixed"]
    assert len({*adapters.values()}) == 4  # none is another
    lines = [json.loads(line) for place in ("rl/grpo", "mine/hard1", "mine/hard2")
             for line in (run.folder / place / "steps.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]  # no two draw alike
    for line in lines:
        assert set(line["components"]) == set(Quality.components)
        assert line["reward"] == pytest.approx(line["components"]["quality"], abs=1e-6)
    names = ["base", "SFT", "SFT-GRPO", "QualEQS, round 1", "QualEQS, round 2"]
    answers = [json.loads(row) for row in (run.folder / "eval" / "answers.jsonl").open()]
    assert list(quality_eval.policies(run)) == names
    assert [*names, "constant list"] == list(answers[0]["answers"])
    assert len({row["answers"]["constant list"][0] for row in answers}) == 1 < len(answers)
    train.run_stages(small(whole, model_folder), list(train.QUALEQS))
    printed = capsys.readouterr().out
    assert printed.count("already done") == len(train.QUALEQS)
    assert "| Method | Strict | Valid |" in printed and "| Method | policy | product |" in printed


def test_a_run_killed_four_times_ends_with_the_same_weights(
    whole, model_folder, tmp_path, monkeypatch
):
    config, save, saved, looked = small(tmp_path, model_folder), llm.save_adapter, [], []
    kills, scores = [1, 2, 3], mine.mined  # before GRPO, the first and the second round are saved

    def killed(*arguments):
        if kills and len(saved) == kills[0]:
            kills.pop(0)
            raise KeyboardInterrupt
        saved.append(save(*arguments))

    def mined(*arguments):
        looked.append(scores(*arguments))
        if len(looked) == 1:  # behind the first mining
            raise KeyboardInterrupt
        return looked[-1]

    monkeypatch.setattr(llm, "save_adapter", killed)
    monkeypatch.setattr(mine, "mined", mined)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            train.run_stages(config, ["mine"])
    train.run_stages(config, ["mine"])
    assert len(saved) == 4 and not kills  # nothing was trained twice
    assert weights_in(tmp_path) == weights_in(whole)
    for number in (1, 2):
        place = f"mine/hard{number}/mined/contexts.json"
        assert read_json(tmp_path / "q" / place) == read_json(whole / "q" / place)


def test_a_further_round_and_an_ablation_train_alone(whole, model_folder, tmp_path, monkeypatch):
    root, saved, save = copied(whole, tmp_path), [], llm.save_adapter
    monkeypatch.setattr(llm, "save_adapter",
                        lambda m, f: saved.append(f"{f.parent.parent.name}/{f.parent.name}")
                        or save(m, f))
    config = small(root, model_folder, "quality.rounds=3",
                   "quality.ablations=[no_mix,no_warm_start,random,clicked]")
    train.run_stages(config, ["eval"])
    assert saved == ["sft/no_mix", "rl/no_warm_start", "mine/hard3",
                     *(f"mine/{kind}{i}" for kind in ("random", "clicked") for i in (1, 2, 3))]
    run = Run(config, describe=False)
    assert run.folder.figures("sft/no_mix")["general_rows"] == 0
    figures = run.folder.figures("mine")
    assert figures["mine/clicked1"]["unclicked"] == 0 and figures["mine/random1"]["unclicked"] == 4
    table = (run.folder / "eval" / "table.md").read_text()
    for name in ("SFT w/o mix ratio", "GRPO", "w/o unclicked", "w/o disagreement"):
        assert f"| {name} |" in table


def test_the_simulated_shop_is_what_a_run_without_files_learns_from(model_folder, tmp_path):
    config = load_config(None, [*SMALL, f"run.root={tmp_path}", "shop.contexts=12",
                                f"generator.model={model_folder}"])
    train.run_stages(config, ["world"])
    run = Run(config, describe=False)
    figures = run.folder.figures("world")
    assert figures["products"] == 2520 and figures["policies"] == 18 and figures["contexts"] > 0
    train.run_stages(config, ["dialogues"])
    clicked, unclicked = log_contexts(run)  # of all people: the test set is apart
    kept = run.folder.figures("dialogues")["kept"]
    assert len(clicked) + len(unclicked) == kept


# ------------------------------------------------------------------------------------------- mining


def test_the_mined_set_by_hand(whole, model_folder, tmp_path, monkeypatch):
    config = small(copied(whole, tmp_path), model_folder, "quality.share=0.6")
    run, players, suggester = opened(config)
    (one, two, three), bad = GOOD[:3], BAD[0]
    lists = {"a": [[one, two, three]] * 3, "b": [[one, bad, bad], [bad] * 3, [bad] * 3],
             "c": [[bad] * 3] * 3, "d": [[one, two, bad], [one, bad, two], [bad, bad, one]],
             "e": [[one, two, three]] * 2 + [None]}  # malformed: three bad ones
    contexts = [Context(talk(f"I need a kettle for {name}").model_copy(
        update={"dialogue_id": name}), "train", 0) for name in lists]
    monkeypatch.setattr(Suggester, "rollouts", lambda self, model, contexts, n, seed, **how: [
        [self.completion(garm.format_answer(some) if some else "no list") for some in written]
        for written in lists.values()])
    chosen = mine.mined(run, players, Quality(run, players), "key", "mine/hand", "rl/grpo",
                        contexts)
    # p (1 - p) of p good of nine: b 1/9, d 5/9, e 6/9; a and c are alike. 60 % of five are three.
    assert names_of(chosen) == ["d", "e", "b"]
    rows = read_json(run.folder / "mine/hand/mined/contexts.json")
    assert {row["dialogue_id"]: round(row["disagreement"] * 81) for row in rows} == {
        "d": 20, "e": 18, "b": 8, "a": 0, "c": 0}
    assert rows[0]["rewards"] == [1, 1, 0, 1, 0, 1, 0, 0, 1]
    assert run.folder.figures("mine/hand/mined") == {
        "looked_at": 5, "hard": 3, "no_variance": 2, "failed": 0}


def test_a_round_has_hard_contexts_first_and_always_as_many_batches(whole, model_folder):
    run, _, _ = opened(small(whole, model_folder))
    clicked, unclicked = log_contexts(run)
    rounds = [mine.round_batches(run, clicked[:3], unclicked[:n], 1) for n in (0, 2, 9)]
    assert [[len(batch) for batch in batches] for batches in rounds] == [[2, 2]] * 3
    names = [{*names_of(sum(batches, []))} for batches in rounds]
    assert names[0] == {*names_of(clicked[:3])}  # three clicked ones, one of them twice
    assert {*names_of(unclicked[:2])} < names[1] and names[2] == {*names_of(unclicked[:4])}


def test_contexts_of_test_people_are_not_learned_from(whole, model_folder):
    run, _, _ = opened(small(whole, model_folder))
    tested = {c.dialogue.user_id for c in quality_eval.held_out(run)}
    parts = log_contexts(run)
    assert tested and not tested & {c.dialogue.user_id for part in parts for c in part}
    assert [bool(c.dialogue.clicked) for part in parts for c in part] == (
        [True] * len(parts[0]) + [False] * len(parts[1]))


def test_the_reward_is_format_times_the_mean_of_products(whole, model_folder):
    run, players, _ = opened(small(whole, model_folder))
    quality, [context] = Quality(run, players), log_contexts(run)[0][:1]
    answers = [garm.format_answer([GOOD[0], GOOD[1], BAD[0]]), "no list"]
    values = quality([context], [answers])
    # BAD[0] speaks as the assistant: answerable 0, the rest 1.
    assert values.tolist() == [pytest.approx([1, 2 / 3, 1, 1, 2 / 3]), [0, 0, 0, 0, 0]]
    rewards, valid = garm.composite_reward(values, quality.weights)
    assert rewards.tolist() == pytest.approx([2 / 3, 0]) and valid.all()


# ------------------------------------------------------------------------------- a judge that fails


def by_llm(monkeypatch, tmp_path, backend) -> chat.Chat:
    """An LLM that is asked by way of the usual client plays the judge."""
    judge = chat.Chat(backend, tmp_path / "answers.sqlite")
    monkeypatch.setattr(Players, "_player", lambda self, role, everyone=(): (
        prompted.Prompted(judge, None) if role == "judge" else Rules(None)))
    monkeypatch.setattr(Players, "calls", lambda self: dict(drained([judge])))
    return judge


class Varied(Scripted):
    """Fails at a rate; else calls a suggestion informative by a hash of its text."""

    def answers(self, requests):
        for i, request in enumerate(requests):
            self.calls.append(request)
            shown = json.loads(request.user.split("\n")[1])["suggestions"]
            text = "\n".join(f"{number} yes yes {'yes' if len(y) % 2 else 'no'}"
                             for number, y in shown.items())
            failed = self.rng.random() < self.rate
            yield (i, "", self.failure) if failed else (i, text, "")


@pytest.mark.parametrize("rate", [0.018, 0.2, 0.5])
def test_training_goes_on_where_a_judge_fails_and_counts_it(
    rate, whole, model_folder, tmp_path, monkeypatch, capsys
):
    root = copied(whole, tmp_path)
    shutil.rmtree(root / "q" / "rl"), shutil.rmtree(root / "q" / "mine")
    by_llm(monkeypatch, tmp_path, Varied(rate))
    config = small(root, model_folder, "quality.rounds=1")
    train.run_stages(config, ["mine"])
    run = Run(config, describe=False)
    figures = run.folder.figures("rl")
    assert "failed_calls" not in figures and figures["judge"]["answered"] > 0
    errors = figures["judge"].get("server error", 0)
    errors += run.folder.figures("mine")["judge"].get("server error", 0)
    assert rate < 0.1 or errors > 0
    for path in run.folder.path.rglob("steps.jsonl"):
        for line in map(json.loads, path.open()):
            assert line["reward"] is None or math.isfinite(line["reward"])  # None: no call answered
            assert math.isfinite(line["loss"])
    adapters = weights_in(root)
    train.run_stages(config, ["mine"])  # what had failed is not asked again, and trains no more
    assert weights_in(root) == adapters
    assert capsys.readouterr().out.count("already done") >= len(train.QUALEQS) - 1


def test_a_judge_that_always_fails_ends_it_with_one_line(
    whole, model_folder, tmp_path, monkeypatch
):
    by_llm(monkeypatch, tmp_path, Varied(1.0))
    config = small(copied(whole, tmp_path), model_folder, "rl.beta=0.5")
    with pytest.raises(UserError, match="scripted.*calls in a row gave no answer") as caught:
        train.run_stages(config, ["rl"])
    assert "\n" not in str(caught.value)
    # Where a server answers, but never so that it can be read, the client does not stop.
    monkeypatch.setattr(chat.Chat, "_count", lambda self, failure: None)
    with pytest.raises(UserError, match="rl/grpo: no answer was judged"):
        train.run_stages(config, ["rl"])


def test_what_failed_is_masked_or_the_papers_zero(whole, model_folder, tmp_path, monkeypatch):
    by_llm(monkeypatch, tmp_path, Scripted(0.0, marks="yes yes yes"))
    for word, expected in (("false", None), ("true", 0.0)):
        run, players, _ = opened(small(whole, model_folder, f"quality.failed_as_zero={word}"))
        quality, [context] = Quality(run, players), log_contexts(run)[0][:1]

        def fails_first(rows, judge=quality.judge):
            return [[v._replace(answerable=math.nan) for v in row] if i == 0 else row
                    for i, row in enumerate(judge(rows))]

        quality.judge = fails_first
        answers = [garm.format_answer(GOOD[i : i + 3]) for i in range(3)]
        rewards, valid = garm.composite_reward(quality([context], [answers]), quality.weights)
        assert valid.tolist() == [expected is not None, True, True]
        gains = garm.group_advantages(rewards.view(1, 3), valid.view(1, 3), False)
        assert (gains[0, 0] == 0) == (expected is None)


# ----------------------------------------------------------------------------------- the served run


def test_a_server_shows_only_what_the_shop_answers(whole, model_folder, monkeypatch):
    engine = Suggestions(small(whole, model_folder))
    assert engine.version.startswith("hard2-")  # the last round
    monkeypatch.setattr(engine.writer, "draw", lambda model, prompts, n, seed, **how: [
        [garm.format_answer([BAD[0], GOOD[0], BAD[-1]])] * n] * len(prompts))
    ask = Ask(data.User(user_id="nobody", sessions=[]), 3, turns=talk("I need a kettle").turns)
    (answer,) = engine.write([ask])
    [shown] = answer.suggestions
    assert shown.text == GOOD[0] and shown.source.startswith("product k1")


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("words, fault", [
    (["data.catalogue=", "data.policies="], "all three, or none"),
    (["data.dialogues=", "data.policies="], "all three, or none"),
    (["data.policies=gone.yaml"], "data.policies=gone.yaml: no such file"),
    (["quality.share=1.5"], "quality.share"),
    (["quality.ablations=[mined]"], "quality.ablations"),
    (["quality.cases=gone.jsonl"], "gone.jsonl"),
])
def test_bad_settings_are_one_clear_line(words, fault, model_folder, tmp_path):
    with pytest.raises(UserError, match=fault) as caught:
        train.run_stages(small(tmp_path, model_folder, *words), ["world"])
    assert "\n" not in str(caught.value)


def test_a_log_without_a_click_is_refused_in_a_line(model_folder, tmp_path):
    rows = [row.model_copy(update={"clicked": []}) for row in log_of(30)]
    path = tmp_path / "silent.jsonl"
    data.write_dialogues(path, rows)
    with pytest.raises(UserError, match="silent.jsonl: no context with a click"):
        train.run_stages(small(tmp_path, model_folder, f"data.dialogues={path}"), ["sft"])


def test_a_catalogue_without_a_log_is_trained_on_by_simulated_shoppers(model_folder, tmp_path):
    config = small(tmp_path, model_folder, "data.dialogues=", "shop.contexts=60", "shop.seed=101")
    train.run_stages(config, ["dialogues"])
    run, _, _ = opened(config)
    assert run.folder.figures("world")["products"] == len(GOODS)
    text = (run.folder / "world" / "dialogues.jsonl").read_text()
    assert "Ovo Luna 300" in text and "Brenwick" not in text
    key = train.stage_key(run, "world")
    path = model_folder.parent / "catalogue.jsonl"
    lines = path.read_text()
    try:  # another catalogue, other shoppers
        path.write_text(lines.replace("Ovo Luna 300", "Ovo Luna 301"))
        assert train.stage_key(run, "world") != key
    finally:
        path.write_text(lines)


def test_general_rows_are_in_the_language_of_the_shop(whole, model_folder):
    run, players, suggester = opened(small(whole, model_folder))
    rows, language = warm_start.domain_rows(run, players)
    assert language == "en" and len(rows) == 8
    general = warm_start.general_rows(run, players, language)
    text = suggester.tokenizer.decode(general[0][1][0])
    assert len(general) > 300 and text.startswith("<sug>")
    assert torch.tensor([len(lists) for _, lists in general]).eq(1).all()
