"""Stages of paper 003: the chain and its resumption, GRPO, reward models, faulty contexts."""

import json
import math
import random
import re
import shutil
from collections import Counter
from datetime import timedelta

import pytest
import torch

import data
import garm
import llm
import train
from config import DataConfig, load_config
from files import UserError, file_digest, read_json
from roles.players import Players, players_of
from roles.rules import Rules
from roles.suggester import Suggester
from run import Run
from stages import fuse, garm_eval, reward, rl, sft
from stages.composite import COMPONENTS, Composite, of_lists
from stages.dialogues import Context, clean_contexts, clean_suggestion, read_contexts, weeks_of
from stages.reward import RewardModel, load_reward, new_head, pairs_of
from tests.test_llm import difference, gradient, one_at_a_time, tiny, with_lora
from tools import tiny_model

SUBJECTS = "bread tea chess jazz knots ferns stars clay maps bees".split()
VERBS = "bake brew learn hear tie grow watch shape draw keep".split()
SMALL = """run.method=garm run.name=g run.seed=3 generator.max_prompt_tokens=90
    generator.max_new_tokens=24 generator.lora_rank=4 generator.precision=float32
    data.train=0.4 data.valid=0.25 data.judge=0.2 data.test=0.15 sft.candidates=6
    sft.max_contexts=8 sft.unsafe=0.2 reward.max_contexts=8 reward.batch_users=3
    fuse.probes=1 fuse.probe_steps=4 fuse.max_contexts=3
    rl.steps=2 rl.batch_users=2 rl.group=3 rl.candidates=9 rl.rft_contexts=4
    rl.unsafe=0.2 rl.learning_rate=1e-3 dpo.batch_users=2 eval.max_users=6""".split()


class Words:
    """In place of MiniLM: a text is the bag of its words."""

    dim = 64

    def __call__(self, texts):
        rows = torch.zeros(len(texts), self.dim)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split():
                row[sum(map(ord, word)) % self.dim] += 1
        return torch.nn.functional.normalize(rows, dim=1)

    def save(self):
        pass


# Used for runs of the other sibling paper too, test_qualeqs_stages.py.


def without_models(patch, rollouts) -> None:
    """The encoder is a bag of words; in place of a policy writes `rollouts`."""
    patch.setattr(Run, "encoder", Words())
    patch.setattr(Suggester, "rollouts", rollouts)


def trained(config, rollouts) -> None:
    """Every stage without a break, for a fixture that outlives a test."""
    with pytest.MonkeyPatch.context() as patch:
        without_models(patch, rollouts)
        train.run_stages(config, list(train.METHODS[config.run.method]))


def opened(config) -> tuple[Run, Players, Suggester]:
    run = Run(config, describe=False)
    players = players_of(run)
    return run, players, Suggester(players.writer)


def weights_in(root) -> dict[str, str]:
    return {str(path.relative_to(root)): file_digest(path)
            for path in sorted(root.rglob("*.safetensors"))}


def scripted(self, model, contexts, n, seed, task="", **how):
    """In place of a policy that can write: answers by the seed, some malformed or declining."""
    result = []
    for place in range(len(contexts)):
        rng, answers = random.Random(f"{seed} {place}"), []
        for _ in range(n):
            texts = [f"{rng.choice(['Draw', 'Show', 'Find'])} {subject} {rng.choice(VERBS)}"
                     for subject in rng.sample(SUBJECTS, 3)]
            text = garm.format_answer(texts) if task in ("", "three") else texts[0]
            answers.append(self.completion(rng.choice([text] * 4 + ["no list", garm.UNSAFE])))
        result.append(answers)
    return result


def log_of(contexts: int) -> list[data.Dialogue]:
    """A click log of eight weeks; one context in six is unsafe."""
    rng, rows = random.Random(0), []
    for i in range(contexts):
        subject, verb, unsafe = SUBJECTS[i % 10], VERBS[i % 10], i % 6 == 5
        shown = [f"How do I {verb} {subject}?", f"Explain old {subject} to me", "Make it shorter"]
        rng.shuffle(shown)
        day = f"03-{2 + i % 28:02}" if i % 4 else f"04-{1 + i % 26:02}"
        said = [("user", f"Tell me about {subject} {i}"), ("assistant", f"They {verb} {subject}.")]
        rows.append(data.Dialogue(
            dialogue_id=f"d{i}", user_id=f"u{i % 37}", timestamp=f"2026-{day}T10:00:00",
            turns=[data.Turn(role=role, content=text) for role, text in said],
            suggestions=[] if unsafe else shown, clicked=[] if unsafe else [i % 3],
            unsafe=unsafe))
    return rows


@pytest.fixture(autouse=True)
def _without_models(monkeypatch):
    without_models(monkeypatch, scripted)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random model whose vocabulary is that of the log."""
    folder = tmp_path_factory.mktemp("hub") / "random"
    texts = [t.content for row in log_of(20) for t in row.turns] + ["1. 2. 3. Unsafe", "YES", "NO"]
    tokenizer = tiny_model.train_tokenizer(texts * 3, 400)
    tokenizer.save_pretrained(folder)
    model = tiny(vocabulary=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    return folder


def small(root, model_folder, *words):
    path = root / "log.jsonl"
    if not path.is_file():
        data.write_dialogues(path, log_of(200))
    return load_config(None, [*SMALL, f"run.root={root}", f"data.dialogues={path}",
                              f"generator.model={model_folder}", *words])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model_folder):
    """A run in which every stage ran without a break; tests only read it."""
    root = tmp_path_factory.mktemp("garm")
    trained(small(root, model_folder), scripted)
    return root


# ---------------------------------------------------------------------------------------- the chain


def test_every_stage_runs_and_is_then_done(whole, model_folder, capsys):
    run, _, suggester = opened(small(whole, model_folder))
    figures = {name: run.folder.figures(name) for name in train.GARM}
    assert figures["sft"]["candidates"]["lists"] > 0 and figures["sft"]["unsafe"] > 0
    assert set(figures["reward"]) >= {"gaussian", "bradley_terry", "paired", "pairs"}
    assert set(figures["rl"]) >= {"gaussian", "bradley_terry", "rft", "dpo"}
    steps = (run.folder / "rl" / "gaussian" / "steps.jsonl").read_text().splitlines()
    assert len(steps) == 2
    for line in map(json.loads, steps):  # each component is logged as it is and weighted
        assert set(line["components"]) == set(line["weighted"]) == set(COMPONENTS)
        assert line["reward"] == pytest.approx(sum(line["weighted"].values()), abs=1e-4)
    answers = [json.loads(row) for row in (run.folder / "eval" / "answers.jsonl").open()]
    names = ["PE", "SFT", "RFT-BTRM", "RL-BTRM", "RL-GaRM", "DPO-GaRM"]
    assert list(garm_eval.policies(run)) == names and list(answers[0]["answers"]) == names
    adapters = {digest for path, digest in weights_in(whole).items() if "adapter" in path}
    assert len(adapters) == 9  # teacher, SFT, three reward models, four arms: none is another
    train.run_stages(small(whole, model_folder), list(train.GARM))
    assert capsys.readouterr().out.count("already done") == len(train.GARM)


def test_a_run_killed_three_times_ends_with_the_same_weights(
    whole, model_folder, tmp_path, monkeypatch
):
    shutil.copy(whole / "log.jsonl", tmp_path)
    config, save, saved = small(tmp_path, model_folder), llm.save_adapter, []
    # Behind the teacher, the first reward model and the second arm, each at the next adapter.
    kills = [1, 3, 7]

    def killed(*arguments):
        if kills and len(saved) == kills[0]:
            kills.pop(0)
            raise KeyboardInterrupt
        saved.append(save(*arguments))

    monkeypatch.setattr(llm, "save_adapter", killed)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train.run_stages(config, ["rl"])
    train.run_stages(config, ["rl"])
    assert len(saved) == 9  # nothing was trained twice
    assert weights_in(tmp_path) == weights_in(whole)


def test_without_distillation_all_three_of_a_clicked_list_are_learned(
    whole, model_folder, tmp_path, monkeypatch
):
    rows, tune = [], sft.instruct
    monkeypatch.setattr("stages.sft.instruct", lambda run, writer, some, *more: (
        rows.extend(some) or tune(run, writer, some, *more)))
    shutil.copy(whole / "log.jsonl", tmp_path)
    train.run_stages(small(tmp_path, model_folder, "sft.distillation=false"), ["sft"])
    run, _, suggester = opened(small(tmp_path, model_folder))
    assert not (run.folder / "sft" / "teacher").exists()
    shown = {garm.format_answer(c.dialogue.suggestions)
             for c in read_contexts(run) if not c.unsafe and c.dialogue.clicked}
    learned = {text for _, answers in rows for text in suggester.texts([answers])[0]}
    assert garm.UNSAFE in learned and learned - {garm.UNSAFE} <= shown


def test_a_stage_of_another_paper_is_refused_in_a_line(model_folder, tmp_path):
    with pytest.raises(UserError, match="--stage dpo: run.method=garm has world, base, dialogues"):
        train.wanted_stages(small(tmp_path, model_folder), ["dpo"])
    assert train.wanted_stages(load_config(), ["all"]) == [s for s in train.STAGES if s != "merge"]


def test_runs_from_before_the_sibling_paper_stay_done():
    assert "dialogues" not in DataConfig().model_dump()  # nor in the digest of stage `world`
    assert DataConfig(dialogues="a").model_dump()["dialogues"] == "a"


# ---------------------------------------------------------------------------------------- contexts


def context(*texts, suggestions=(), clicked=(), unsafe=False, **more) -> Context:
    """Turns of user and assistant in turn."""
    turns = [data.Turn(role=("user", "assistant")[i % 2], content=t) for i, t in enumerate(texts)]
    return Context(data.Dialogue(dialogue_id="a", turns=turns, suggestions=list(suggestions),
                                 clicked=list(clicked), unsafe=unsafe, **more), "train", 0)


@pytest.mark.parametrize("row, fault", [
    ({"dialogue_id": "a", "turns": [], "suggestions": [], "clicked": []}, "turns"),
    ({"dialogue_id": "a", "turns": [{"role": "user", "content": " "}], "suggestions": [],
      "clicked": []}, "turns.0.content"),
    ({"dialogue_id": "a", "turns": [{"role": "user", "content": "x"}], "suggestions": ["y"],
      "clicked": [1]}, "clicked"),
])
def test_a_malformed_or_empty_context_is_one_clear_error(row, fault, tmp_path, model_folder):
    (tmp_path / "log.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"log.jsonl:1: {fault}"):
        train.run_stages(small(tmp_path, model_folder), ["world"])


def test_what_is_cut_is_counted_by_reason():
    rows = [context("Why?").dialogue, context("...").dialogue, context("Why?").dialogue]
    unknown = rows[0].model_copy(update={"unsafe": None, "dialogue_id": "b"})
    cut = Counter()
    kept = clean_contexts([*rows, unknown], cut)
    assert kept == rows[:1]
    assert cut == {"without words": 1, "repeated without a click": 1, "safety unknown": 1}
    assert clean_contexts([unknown], cut) == [unknown]  # where nobody has labelled, all are safe


@pytest.mark.parametrize("text, clean, reason", [
    ("How  do I bake it??", "How do I bake it?", ""),
    ("What is a cafÃ© latte", "What is a café latte", ""),
    ("a word " * 14, None, "long"),
    ("怎么烤面包", None, "language"),
    ("Hello!", None, "meaningless"),
    ("tell me about BREAD.", None, "repeats a query"),
])
def test_suggestions_are_cleaned_by_the_rules_of_c1(text, clean, reason):
    result, why = clean_suggestion(text, context("Tell me about bread", "It is baked."))
    assert why == reason and (clean is None or result == clean)


def test_the_last_four_weeks_of_a_longer_log_are_w1_to_w4():
    rows = [context("Why?", timestamp=f"2026-03-{day:02}T23:00:00").dialogue
            for day in (2, 3, 8, 9, 16, 23, 30)]
    rows = [row.model_copy(update={"dialogue_id": str(i)}) for i, row in enumerate(rows)]
    assert list(weeks_of(rows).values()) == [0, 0, 0, 1, 2, 3, 4]
    assert set(weeks_of(rows[:5]).values()) == {0}  # three weeks: nothing is held back


def test_weeks_are_those_of_the_whole_log(model_folder, tmp_path):
    rows = log_of(60)
    first = min(rows, key=lambda row: row.timestamp).timestamp
    # A row that is cut, 17 days before all others: no whole weeks, so the others' weeks shift.
    early = rows[0].model_copy(update={
        "dialogue_id": "early", "timestamp": first - timedelta(days=17),
        "turns": [data.Turn(role="user", content="...")]})
    data.write_dialogues(tmp_path / "log.jsonl", [early, *rows])
    train.run_stages(small(tmp_path, model_folder), ["dialogues"])
    contexts = read_contexts(Run(small(tmp_path, model_folder), describe=False))
    weeks = weeks_of([early, *rows])
    assert {c.dialogue.dialogue_id: c.week for c in contexts} == {
        c.dialogue.dialogue_id: weeks[c.dialogue.dialogue_id] for c in contexts}
    assert weeks != weeks_of(rows) | {"early": 0} and len(contexts) == 60


def test_a_long_conversation_is_cut_from_the_front(model_folder, tmp_path):
    _, _, suggester = opened(small(tmp_path, model_folder))
    turns = context(*(f"{'Ask' if i % 2 == 0 else 'Say'} number{i} bread tea" for i in range(40)))
    ids, cut = suggester.prompt_and_cut(turns.turns)
    text = suggester.tokenizer.decode(ids)
    assert len(ids) <= 90 and cut > 30
    assert "number38" in text and "number39" in text and "number0 " not in text
    tight = small(tmp_path, model_folder, "generator.max_prompt_tokens=10")
    with pytest.raises(UserError, match="max_prompt_tokens: no room for a conversation"):
        train.run_stages(tight, ["dialogues"])  # before anything is trained
    # One exchange beyond the limit: its ends are cut, the query keeps half of the room.
    ids, cut = suggester.prompt_and_cut(context("tea " * 300, "maps " * 300).turns)
    text = suggester.tokenizer.decode(ids)
    assert len(ids) <= 90 and cut == 1 and "User: tea" in text and "Assistant: maps" in text


def test_text_of_a_user_becomes_no_control_token(model_folder, tmp_path):
    _, _, suggester = opened(small(tmp_path, model_folder))
    ids = suggester.prompt(context("a <|im_end|> b <|im_start|>system").turns)
    plain = suggester.prompt(context("a b").turns)
    for token in suggester.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"]):
        assert ids.count(token) == plain.count(token)


# ---------------------------------------------------------------------------------------- tree rows

TREES = ([[1, 2, 3, 4, 5], [6], [7, 8]], [[[9, 10], [11], [9, 10]], [[3, 4, 5, 6]], [[7], [8, 9]]])


def test_token_log_probabilities_equal_one_sequence_at_a_time():
    model, (prompts, answers) = with_lora(tiny()), TREES
    logps, mask = llm.token_logps(model, prompts, answers)  # (R, T)
    flat = [(p, c) for p, some in zip(prompts, answers, strict=True) for c in some]
    assert mask.sum(1).tolist() == [len(c) for _, c in flat]
    for row, on, (prompt, answer) in zip(logps, mask, flat, strict=True):
        for t in range(len(answer)):  # each token on its own, after those before it
            expected = one_at_a_time(model, prompt + answer[:t], answer[t : t + 1])
            assert row[on][t].item() == pytest.approx(expected.item(), abs=2e-4)


def test_last_states_equal_one_sequence_at_a_time():
    model, (prompts, answers) = with_lora(tiny()), TREES
    found = llm.last_hidden(model, prompts, answers)  # (R, H)
    flat = [p + c for p, some in zip(prompts, answers, strict=True) for c in some]
    decoder = model.get_base_model().get_decoder()
    alone = torch.cat([decoder(torch.tensor([ids])).last_hidden_state[:, -1] for ids in flat])
    assert (found - alone).abs().max() < 1e-4


def test_adapters_swap_places_and_come_back(tmp_path):
    model, other = with_lora(tiny()), llm.add_lora(tiny(), 4, 8, seed=1)
    llm.save_adapter(other, tmp_path / "other")
    before = {name: w.clone() for name, w in model.named_parameters()}
    weights = llm.adapter_weights(model, tmp_path / "other")
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(KeyError), llm.other_adapter(model, weights):
        assert torch.equal(model(ids).logits, other(ids).logits)
        raise KeyError
    assert all(torch.equal(w, before[name]) for name, w in model.named_parameters())


# -------------------------------------------------------------------------------------------- GRPO


def batch_of(model, group: int = 3) -> rl.Batch:
    prompts, answers = [[1, 2, 3, 4], [5, 6]], [[[7, 8], [9], [10, 11, 12]], [[3], [4, 5], [6, 7]]]
    with torch.no_grad():
        logps, mask = llm.token_logps(model, prompts, answers)
    valid = torch.tensor([[True, True, True], [True, False, True]])
    advantages = garm.group_advantages(torch.tensor([[1.0, 2.0, 4.0], [0.0, 9.0, 1.0]]), valid)
    # The reference is another policy.
    return rl.Batch(prompts, answers, logps - 0.3, mask, valid, advantages)


@pytest.mark.parametrize("reduction", ["sequence", "token", "constant"])
def test_the_first_step_is_on_policy_and_its_loss_is_that_by_hand(reduction):
    model = with_lora(tiny())
    settings = load_config(None, [f"rl.reduction={reduction}", "rl.beta=0.5"]).rl
    batch = batch_of(model)
    figures = rl.backward(lambda *a: llm.token_logps(model, *a), batch, [0, 1], settings, 0)
    kept = batch.valid.flatten()
    assert torch.equal(batch.old_logps[kept][batch.mask[kept]],
                       (batch.ref_logps + 0.3)[kept][batch.mask[kept]])  # the ratio is 1
    assert figures["clipped"] == 0
    # So each token costs -A + beta k3, and k3 = e^d - d - 1 with d = -.3 everywhere.
    k3 = math.exp(-0.3) + 0.3 - 1
    lengths, gains = [2, 1, 3, 1, 2], batch.advantages[batch.valid].tolist()
    total = {"sequence": 5, "token": 9, "constant": 5 * 3}[reduction]
    cost = [(-gain + 0.5 * k3) * (1 if reduction == "sequence" else length)
            for gain, length in zip(gains, lengths, strict=True)]
    assert figures["loss"] == pytest.approx(sum(cost) / total, abs=1e-5)
    assert figures["kl"] == pytest.approx(k3, abs=1e-5)


@pytest.mark.parametrize("reduction", ["sequence", "token", "constant"])
def test_parts_of_a_batch_add_up_to_its_gradient(reduction):
    settings, results = load_config(None, [f"rl.reduction={reduction}"]).rl, []
    for micro in (0, 1):
        model = with_lora(tiny())
        batch = batch_of(model)
        figures = rl.backward(lambda *a, m=model: llm.token_logps(m, *a), batch, [0, 1], settings,
                              micro)
        grads = torch.cat([w.grad.flatten() for w in model.parameters() if w.requires_grad])
        results.append((figures["loss"], grads))
    (whole, together), (parts, apart) = results
    assert whole == pytest.approx(parts, abs=1e-5) and difference(apart, together) < 1e-4


def test_a_rollout_without_a_judgement_moves_nothing():
    settings, grads = load_config().rl, []
    for token in (9, 200):  # what the invalid rollout says
        model = with_lora(tiny())
        batch = batch_of(model)
        batch.rollouts[1][1] = [token, 5]
        rl.backward(lambda *a, m=model: llm.token_logps(m, *a), batch, [0, 1], settings, 0)
        grads.append(torch.cat([w.grad.flatten() for w in model.parameters() if w.requires_grad]))
    assert torch.equal(*grads)


def test_later_updates_of_a_batch_keep_the_sampling_policy(whole, model_folder, monkeypatch):
    config = small(whole, model_folder, "rl.updates=3", "rl.learning_rate=0.05")
    run, players, suggester = opened(config)
    model = suggester.policy(run.adapter("sft"), trainable=True)
    composite = Composite(players, suggester, load_reward(run, suggester, "gaussian", model))
    ratios, loss = [], garm.grpo_loss

    def watched(logps, old, *more):
        ratios.append((logps - old)[more[2].bool()].abs().max().item())
        return loss(logps, old, *more)

    monkeypatch.setattr(garm, "grpo_loss", watched)
    weights = torch.ones(len(COMPONENTS))
    log = rl.grpo(run, suggester, model, composite, weights, rl.batches(run, 1), "test")
    parts = len(ratios) // 3
    assert max(ratios[:parts]) == 0 and min(ratios[parts:]) > 0 and log[0]["kl"] > 0


def test_groups_without_variance_cost_no_step_and_are_counted(whole, model_folder, monkeypatch):
    run, players, suggester = opened(small(whole, model_folder))
    monkeypatch.setattr(Suggester, "rollouts", lambda self, model, contexts, n, *_, **__: [
        [self.completion("no list")] * n for _ in contexts])  # alike in every component
    model = suggester.policy(run.adapter("sft"), trainable=True)
    before = [w.clone() for w in model.parameters()]
    composite = Composite(players, suggester, load_reward(run, suggester, "gaussian", model))
    log = rl.grpo(run, suggester, model, composite, torch.ones(len(COMPONENTS)),
                  rl.batches(run, 2), "test")
    assert [line["skipped_groups"] for line in log] == [2, 2]
    assert all(map(torch.equal, model.parameters(), before))


def test_where_nobody_declines_what_is_unsafe_nothing_is_preferred(whole, model_folder):
    run, players, suggester = opened(small(whole, model_folder))
    model = suggester.policy(run.adapter("sft"), trainable=True)
    composite = Composite(players, suggester, load_reward(run, suggester, "gaussian", model))
    lists = [garm.format_answer(["Bake bread", "Draw maps", text]) for text in ("Hear jazz", "Run")]
    logps, mask = torch.tensor([[-3.0], [-1.0], [-2.0]]), torch.ones(3, 1, dtype=torch.bool)
    parts = composite([context("How do I steal?", unsafe=True)], [[*lists, "no list"]], logps, mask)
    assert (parts == parts[0]).all()
    safe = composite([context("Why bake?")], [[*lists, "no list"]], logps, mask)
    assert safe[:, COMPONENTS.index("log_perplexity")].tolist() == [-3, -1, -2]


def test_a_judge_that_fails_is_counted_and_nothing_is_lost(whole, model_folder, monkeypatch):
    run, players, suggester = opened(small(whole, model_folder))
    calls = []

    def qualify(self, rows):  # every fifth call fails
        calls.extend(rows)
        return [None if i % 5 == 0 else 1.0 for i in range(len(rows))]

    monkeypatch.setattr(Rules, "qualify", qualify)
    model = suggester.policy(run.adapter("sft"), trainable=True)
    composite = Composite(players, suggester, load_reward(run, suggester, "gaussian", model))
    log = rl.grpo(run, suggester, model, composite, torch.ones(len(COMPONENTS)),
                  rl.batches(run, 2), "test")
    assert calls and sum(line["invalid"] for line in log) > 0
    assert all(math.isfinite(line["reward"]) and math.isfinite(line["loss"]) for line in log)
    assert all(w.isfinite().all() for w in model.parameters())


# ----------------------------------------------------------------------------------- reward models


def test_scores_of_a_tree_equal_those_of_one_suggestion_at_a_time(whole, model_folder):
    run, _, suggester = opened(small(whole, model_folder))
    turns = [c.turns for c in read_contexts(run)[:3]]
    texts = [["Bake bread", "Draw maps of tea"], [], ["Hear jazz"]]
    for kind in ("gaussian", "bradley_terry"):
        model = load_reward(run, suggester, kind)
        model.head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
        together, alone = model.score(turns, texts), []
        for some, told in zip(texts, turns, strict=True):
            single = [model.score([told], [[text]]) for text in some]
            alone.append([torch.cat([s[j][0] for s in single]) if single else torch.zeros(0)
                          for j in range(2)])
        for j in range(2):
            for found, expected in zip(together[j], alone, strict=True):
                assert (found - expected[j]).abs().max().item() < 1e-4 if len(found) else True
        assert (torch.cat(together[1]) > 0).all() == (kind == "gaussian")


def test_the_paired_model_says_what_a_plain_forward_says(whole, model_folder):
    run, _, suggester = opened(small(whole, model_folder))
    model = load_reward(run, suggester, "paired")
    turns = read_contexts(run)[0].turns
    pairs = [("Bake bread", "Hear jazz"), ("Hear jazz", "Bake bread")]
    tokenizer, ask = suggester.tokenizer, reward.read_yaml("prompts.yaml")["suggest_paired"]
    for found, (a, b) in zip(model.preference([turns], [pairs])[0], pairs, strict=True):
        question = llm.encode_text(tokenizer, f"Query 1: {a}\nQuery 2: {b}{ask}")
        prompt = suggester.prompt(turns, "paired") + question
        yes, no = (one_at_a_time(model.model, prompt, llm.encode_text(tokenizer, word)).exp()
                   for word in (" YES", " NO"))
        assert found.item() == pytest.approx((yes / (yes + no)).item(), abs=1e-4)


def test_losses_are_those_of_the_book(model_folder, tmp_path):
    run, _, suggester = opened(small(tmp_path, model_folder))
    rows = pairs_of([context("Why bake?", suggestions=SUBJECTS[:3], clicked=[2]),
                     context("Why brew?", suggestions=SUBJECTS[3:6], clicked=[1, 2])])
    assert [pairs for _, pairs in rows] == [[(2, 0), (2, 1)], [(1, 0), (2, 0)]]
    model = with_lora(tiny(vocabulary=len(suggester.tokenizer)))
    head = new_head(model)
    head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    shown = [c.dialogue.suggestions for c, _ in rows]
    for kind in ("gaussian", "bradley_terry"):
        reward_model = RewardModel(suggester, model, kind, head)
        losses, _ = reward_model.losses(model, rows, random.Random(0))
        mu, sigma = reward_model.score([c.turns for c, _ in rows], shown)
        for loss, (i, (w, r)) in zip(
                losses, [(i, p) for i, (_, pairs) in enumerate(rows) for p in pairs], strict=True):
            expected = -math.log(torch.sigmoid(mu[i][w] - mu[i][r]))
            if kind == "gaussian":
                expected = garm.gaussian_loss(mu[i][w], sigma[i][w], mu[i][r], sigma[i][r], 0.1)
            assert loss.item() == pytest.approx(float(expected), abs=1e-4)
    assert gradient(model, losses.sum()).abs().max() > 0  # LoRA learns too


# ------------------------------------------------------------------------------------------ fusion


def test_trends_within_two_errors_are_none():
    parts = [{name: 0.0 for name in COMPONENTS} for _ in range(6)]
    for i, line in enumerate(parts):
        line["reward"], line["length"] = float(i), (-1.0) ** i  # it rises; it wavers
        line["safety"] = float(i) if i in (0, 5) else None  # one batch with an unsafe context each
    # From 1 to 2.5; variances 3 and .75, so the error is 1.12: beyond one, but not beyond two.
    for line, value in zip(parts, (0.0, 0.0, 3.0, 2.0, 2.0, 3.5), strict=True):
        line["judge"] = value
    trends = fuse.component_trends([{"components": line} for line in parts])
    assert dict(zip(COMPONENTS, trends.tolist(), strict=True)) == {
        **dict.fromkeys(COMPONENTS, 0.0), "reward": 3.0}


def test_components_are_listed_of_the_contexts_that_they_are_about():
    parts = torch.zeros(3, len(COMPONENTS))
    parts[:, COMPONENTS.index("safety")] = torch.tensor([0.0, 0.0, -1.0])
    parts[:, COMPONENTS.index("length")] = torch.tensor([0.8, 0.4, 0.0])
    listed = rl.by_context(COMPONENTS, parts, torch.tensor([False, False, True]))
    assert listed["safety"] == -1 and listed["length"] == pytest.approx(0.6)
    # No unsafe context has come.
    listed = rl.by_context(COMPONENTS, parts[:2], torch.tensor([False, False]))
    assert listed["safety"] is None and listed["length"] == pytest.approx(0.6)


def test_a_component_that_bad_answers_have_more_of_gets_no_weight(
    whole, model_folder, monkeypatch, capsys
):
    run, players, _ = opened(small(whole, model_folder, "fuse.probes=0"))
    rows = torch.tensor([[1.0, -0.5] + [0.0] * 7, [0.8, -0.1] + [0.0] * 7])  # less length is better
    monkeypatch.setattr(fuse, "differences", lambda *_: rows)
    trace = fuse.fuse_kind(run, players, "gaussian")
    assert trace["fitted"]["length"] < 0 == trace["weights"]["length"]
    assert trace["weights"]["format"] == trace["fitted"]["format"] > 0
    assert "below 0: length" in capsys.readouterr().out


def test_weights_favour_good_answers_and_the_trace_is_kept(whole, model_folder):
    run, _, _ = opened(small(whole, model_folder))
    for kind in ("gaussian", "bradley_terry"):
        trace = read_json(run.folder / "fuse" / kind / "trace.json")
        assert trace["right_in_sample"] >= 0.5 and trace["initial"]["format"] > 0
        assert len(trace["probes"]) == 1 and len(trace["probes"][0]["steps"]) == 4
        assert trace["weights"] == trace["probes"][0]["weights"]
    assert rl.fused_weights(run, "gaussian").tolist() == pytest.approx(
        list(read_json(run.folder / "fuse" / "gaussian" / "trace.json")["weights"].values()))


def test_components_left_out_weigh_nothing_and_unknown_ones_are_refused(whole, model_folder):
    run, *_ = opened(small(whole, model_folder))
    left_out = ["log_perplexity", "reward"]
    weights = rl.fused_weights(run, "gaussian", left_out).tolist()
    weights = dict(zip(COMPONENTS, weights, strict=True))
    assert weights["log_perplexity"] == weights["reward"] == 0 and weights["format"] != 0


@pytest.mark.parametrize("words, reason", [
    (["rl.arms=[gaussian-ppl]"], "rl.arms: no component 'ppl' in gaussian-ppl; "),
    (["rl.arms=[dpo-perplexity]"], "did you mean 'log_perplexity'?"),
    (["rl.arms=[rft]", "reward.kinds=[gaussian]"], "reward.kinds: rl.arms=rft needs bradley_terry"),
    (["rl.arms=[dpo]", "reward.kinds=[bradley_terry]"], "rl.arms=dpo needs gaussian"),
    (["rl.arms=[gaussian-judge]", "reward.kinds=[purm]"], "gaussian-judge needs gaussian"),
    (["reward.kinds=[gaussian]"], "rl.arms=bradley_terry needs bradley_terry"),
    (["rl.arms=[gausian]"], "rl.arms: no arm 'gausian' in gausian; did you mean 'gaussian'?"),
    (["rl.arms=[paired]"], "no arm 'paired' in paired; known: gaussian, bradley_terry, rft, dpo"),
    (["rl.arms=[rft-judge]"], "no component 'judge' in rft-judge; known: none"),
    (["rl.arms=[../../gaussian]"], "rl.arms: no arm"),
])
def test_an_arm_without_its_model_or_without_what_there_is_not_is_refused_at_load(words, reason):
    with pytest.raises(UserError, match=re.escape(reason)):
        load_config(None, ["run.method=garm", *words])
    load_config(None, words)  # of IceBreaker no arm is trained


def test_every_fault_of_a_list_costs_the_component_that_it_is_meant_for(monkeypatch):
    rows = [context(f"Tell me about {x}", suggestions=[
        f"How do I {v} {x}?", f"Explain old {x} to me", "Make it shorter"], clicked=[1])
        for x, v in zip(SUBJECTS[:4], VERBS, strict=False)]
    monkeypatch.setattr(fuse, "chosen", lambda some, split, unsafe=False: (
        [context("How can I steal?", unsafe=True)] if unsafe else rows))
    monkeypatch.setattr(fuse, "clicked_list", lambda c, run, counts: c.dialogue.suggestions)
    hits = []
    for c, good, bad in fuse.violations(None, rows, 7, random.Random(0)):
        assert bad != good
        rewards = [garm.rule_rewards(y, c.queries[-1], c.unsafe) for y in (good, bad)]
        hits.append({name for name, value in rewards[0].items() if value > rewards[1][name]})
    assert len(hits) == 7 and "format" in hits[0] and hits[1] == {"diversity"}
    assert hits[4] == {"length"} and hits[5] - {"diversity"} == {"language"}
    assert hits[6] == {"format", "safety"}


def test_failed_calls_of_a_judge_change_no_key_of_a_policy(whole, model_folder, monkeypatch):
    run, *_ = opened(small(whole, model_folder))
    before = train.stage_key(run, "rl")
    monkeypatch.setattr(train, "failed_calls", lambda run, name: 3)
    assert train.stage_key(run, "rl") == before


def test_an_arm_that_is_added_trains_alone(whole, model_folder, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "copy")
    saved, save = [], llm.save_adapter
    monkeypatch.setattr(llm, "save_adapter", lambda m, f: saved.append(f.parent.name) or save(m, f))
    root, arms = tmp_path / "copy", "gaussian,bradley_terry,rft,dpo,gaussian-log_perplexity"
    config = small(root, model_folder, f"rl.arms=[{arms}]", f"data.dialogues={whole}/log.jsonl")
    train.run_stages(config, ["rl"])
    assert saved == ["gaussian-log_perplexity"]
    names = list(garm_eval.policies(Run(config, describe=False)))
    assert names[-2:] == ["RL-GaRM w/o log_perplexity", "DPO-GaRM"]


def test_a_malformed_answer_earns_no_more_than_the_worst_list():
    mu = [torch.tensor([-3.0, -1.0]), torch.zeros(0), torch.tensor([5.0])]
    rows = [context("Why?")], mu, [torch.ones_like(m) for m in mu], [["a", "b"], [], ["c"]]
    means, confidence = of_lists(*rows)
    assert means.tolist() == [-2.0, -2.0, 5.0] and confidence.tolist() == [-1.0] * 3
