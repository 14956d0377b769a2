"""Every picture: written without a warning, the same bytes twice, its input as it was."""

import copy
import itertools
import json
import math
import warnings

import pytest
from matplotlib.figure import Figure
from PIL import Image

from tables import experiments, figures

LONG = "a name that goes on and on, with no regard for the room that a picture has " * 3
PANELS = experiments.read()["curves"]
NAMES = ["PE", LONG, "SFT, list search", "λ 0.1", "100 %", "IceBreaker"]
INTERVALS = [[0.25, 0.1, 0.4], [0.2, 0.2, 0.2], [0.3, 0.3, 0.5], [0.1, 0.2, 0.3],
             [-0.2, -0.4, -0.1], [0.0, -1.0, 1.0]]  # the fourth lies outside, by rounding


def dpo(name: str, steps: int, loss: float = 0.6) -> list[dict]:
    rows = []
    for i in range(1, steps + 1):
        rows.append({"stage": "dpo", "round": name, "step": i, "loss": loss, "margin": 0.1 * i,
                     "chosen_logp_change": -0.1 * i if i % 2 else None})
    return rows


def sit(steps: int, loss: float, epochs: int = 1, until: int | None = None) -> list[dict]:
    return [{"stage": "sit", "epoch": i * epochs // steps, "step": i + 1, "loss": loss}
            for i in range(steps)][:until]


LOG = [
    {"stage": "world", "users": 3},
    *({"stage": "rid", "epoch": i, "loss": 3 - i, "held_out_loss": 2.5 - i} for i in range(3)),
    {"stage": "rid", "auc": 0.6, "seconds": 1.0},
    *({"stage": "ranker", "ranker": r, "epoch": i, "loss": 0.2, "held_out_loss": 0.1 / (i + 1)}
      for r in ("train", "judge") for i in range(4)),
    *sit(100, 0.5, 5), *dpo("round 1", 8), *dpo("round 2", 50), *dpo("clicked", 9),
]
SERIES = {n: {"x": [1, 2, 3], "y": [i, None, i + 1], "low": [i - 1, None, i], "high": [i + 1] * 3}
          for i, n in enumerate(NAMES)}
ONE = {"only": {"x": [2], "y": [0.5], "low": [0.4], "high": [0.6]}}
DAYS = {n: {"x": [*range(1, 31)], "y": [0.1 * i] * 30, "low": [0.05 * i] * 30,
            "high": [0.2 * i] * 30} for i, n in enumerate(NAMES)}
POINTS = dict(zip(NAMES, zip(INTERVALS, INTERVALS[::-1], strict=True), strict=True))
SWEEP = {LONG: {"PE": "λ 0.1", "100 %": "", "λ 0.1": "λ 1"}}
TOPICS = dict.fromkeys([*NAMES, *map(str, range(9)), "tiny"], 1.0) | {"tiny": 0.1}
PANEL = {"title": LONG, "inner": TOPICS, "outer": {"PE": 3, "3": 1}, "inner_label": "history",
         "outer_label": LONG}


def rings(panels, path):
    figures.rings(panels, {"3", "λ 0.1"}, path, LONG)


def frontier(points, path, lines=None):
    figures.frontier(points, lines or {}, path, LONG)


def lines(panels, path):
    rows = [figures.Panel(ylabel, LONG, series, level=0.5) for ylabel, series in panels.items()]
    figures.lines(rows, path, LONG)


CASES = {
    "curves": (lambda x, path: figures.curves(x, PANELS, path, LONG), LOG),
    "curves of one epoch": (lambda x, path: figures.curves(x, PANELS, path, "t"), LOG[:2]),
    "frontier": (lambda x, path: frontier(x, path, SWEEP), POINTS),
    "frontier of one point": (frontier, {"only": ([1, 0, 2], [2, 2, 2])}),
    "rings": (rings, [PANEL] * 3),
    "rings, one empty": (rings, [PANEL | {"inner": {}}]),
    "lines": (lines, {LONG: SERIES}),
    "two panels": (lines, {"a": SERIES, "b": ONE}),
    "days": (lines, {"a": DAYS}),
    "one point": (lines, {"": ONE}),
}


@pytest.mark.parametrize("case", CASES)
def test_pictures(case, tmp_path):
    draw, data = CASES[case]
    before = copy.deepcopy(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(data, tmp_path / "a.png")
        draw(json.loads(json.dumps(data)), tmp_path / "b.png")
    assert data == before
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.size[0] == 960 and 400 <= image.size[1] <= 2000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, as matplotlib holds them."""
    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (save(f, *a, **k), kept.append(f)))
    return kept


def test_every_point_and_line_is_named_once_and_drawn_with_its_bars(drawn, tmp_path):
    frontier(POINTS, tmp_path / "a.png", {"a sweep": {"PE": "λ 0.1", "100 %": ""}})
    [axes], [legend] = drawn[0].axes, drawn[0].legends
    named = [text.get_text().replace("\n", " ") for text in legend.get_texts()]
    alone = [figures.readable(n, 40).replace("\n", " ") for n in POINTS if n not in ("PE", "100 %")]
    assert named == ["a sweep", *alone]
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["λ 0.1"]
    joined = next(line for line in axes.lines if line.get_label() == "a sweep")
    assert [*joined.get_xdata()] == [0.25, -0.2] and [*joined.get_ydata()] == [0.0, 0.2]
    bars = axes.collections[:2]  # of the sweep: along x, then along y
    assert bars[0].get_segments()[0][:, 0] == pytest.approx([0.1, 0.4])
    assert bars[1].get_segments()[0][:, 1] == pytest.approx([-1, 1])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_titles_keep_clear_of_each_other(count, drawn, tmp_path):
    rings([PANEL] * count, tmp_path / "a.png")
    figures.curves(LOG, PANELS, tmp_path / "b.png", LONG)
    for figure in drawn:
        boxes = [ax.title.get_window_extent() for ax in figure.axes]
        boxes.append(figure._suptitle.get_window_extent())
        boxes.append(figure.legends[0].get_window_extent())
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_small_topics_are_pooled_and_functional_ones_hatched(drawn, tmp_path):
    assert figures._pooled({"a": 6, "b": 0.3, "c": 3.4, "d": 0.3}) == pytest.approx(
        {"a": 0.6, "Others": 0.06, "c": 0.34})
    panel = {"title": "t", "inner": {"a": 1, "chores": 3}, "inner_label": "talk",
             "outer": {"a": 1}, "outer_label": "lists"}
    figures.rings([panel], {"chores"}, tmp_path / "a.png", "t")
    labels = [t.get_text() for t in drawn[0].legends[0].get_texts()]
    assert labels == ["1  a", "2  chores", "hatched: functional"]
    assert [bool(h.get_hatch()) for h in drawn[0].legends[0].legend_handles] == [False, True, True]
    assert "inner: talk (75% functional)" in drawn[0].axes[0].get_title()


def test_a_long_name_is_cut_at_its_last_row():
    assert figures.readable(LONG, 20).endswith("…") and figures.readable(LONG, 20).count("\n") == 1


def losses(rows):
    return {(stage, part): [r["loss"] for r in rows]
            for (stage, part), rows in figures.last_run(rows).items()}


def test_a_rerun_replaces_its_part_and_those_after_it():
    first = [*dpo("round 1", 3, 1), *dpo("round 2", 3, 2), *dpo("round 3", 2, 3)]
    again = losses([*LOG[1:4], *first, *dpo("round 2", 2, 9)])
    kept = {("dpo", "round 1"): [1] * 3, ("dpo", "round 2"): [9] * 2}
    assert again == {("rid", None): [3, 2, 1]} | kept


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("steps", [10, 40, 100])
def test_a_rerun_of_sit_is_told_by_its_step(steps, epochs):
    assert losses(sit(steps, 1.0, epochs)) == {("sit", None): [1.0] * steps}
    for killed in (1, steps // 2, steps):
        rows = [*sit(steps, 1.0, epochs, killed), *sit(steps, 2.0, epochs)]
        assert losses(rows) == {("sit", None): [2.0] * steps}


def test_dpo_rounds_stand_one_after_another(drawn, tmp_path):
    figures.curves(LOG, PANELS, tmp_path / "a.png", "t")
    [axes] = [a for a in drawn[0].axes if a.get_title().startswith("DPO: loss")]
    named = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert named["round 1"] == [*range(1, 9)] and named["round 2"] == [*range(9, 59)]
    assert named["clicked"] == [*range(59, 68)]
    assert axes.lines[-1].get_ydata()[0] == pytest.approx(math.log(2))


def test_nothing_to_draw_is_said_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="no epoch or step"):
        figures.curves([{"stage": "world"}], PANELS, tmp_path / "a.png", "t")
    with pytest.raises(KeyError):
        figures.lines([figures.Panel("", "", {"a": {"y": [1]}})], tmp_path / "a.png", "")
    assert not list(tmp_path.iterdir())
