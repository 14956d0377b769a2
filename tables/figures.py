"""The pictures of a report: training curves, frontier, topic rings, lines.

    text = Path("runs/default/metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    figures.curves(rows, experiments.read()["curves"], "results/training_curves.png", "Training")

Rings follow the paper's Figure 3, the others are ours. Each function takes plain data, leaves it as
it is and writes one PNG; the same input gives the same bytes. An interval is (value, low, high), as
metrics.bootstrap gives it. Colour is never the only key: lines differ in marker and dash, bars in
hatch, topics of a ring in number.
"""

import contextlib
import itertools
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from files import atomic_path

Interval = tuple[float, float, float]  # value, low, high

# Okabe and Ito; their yellow is too pale for a line, their black too dark under a number.
COLOURS = "#0072B2 #D55E00 #009E73 #E69F00 #CC79A7 #56B4E9 #000000 #999999".split()
RING_COLOURS, GREY = [*COLOURS[:6], "#F0E442"], "#BBBBBB"
MARKERS = "osD^vPX*<"
DASHES = ["-", "--", "-.", ":", (0, (6, 1)), (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1))]
OTHERS, LEAST = "Others", 0.04  # topics with a smaller share are pooled
STYLE = Path(__file__).with_suffix(".mplstyle")
HALO = [withStroke(linewidth=3, foreground="white")]  # behind text that lies on something


def readable(name: str, width: int = 30, rows: int = 2) -> str:
    """A name in at most `rows` lines of `width` characters."""
    return "\n".join(textwrap.wrap(name, width, max_lines=rows, placeholder=" …"))


@contextlib.contextmanager
def sheet(path: str | Path, title: str, panels: int = 1, height: float = 4.6):
    """Open a figure in the one style of all: yields (figure, axes); on disk whole or not at all."""
    columns = min(2, panels)  # a row
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure((8, height))  # inches; no pyplot: no window, nothing shared
        figure.suptitle(readable(title, 76, 3))
        yield figure, [figure.add_subplot(-(-panels // columns), columns, i + 1)
                       for i in range(panels)]
        with atomic_path(path) as temporary:  # not reached where drawing raised
            figure.savefig(temporary, format="png")


def _legend(figure, handles: dict | None = None) -> None:
    """One legend below all panels, in as many columns as its longest label leaves room for.

    handles: label -> line; of the panels where not given, a label that several have once.
    """
    pairs = (zip(*ax.get_legend_handles_labels(), strict=True) for ax in figure.axes)
    handles = handles or {label: line for line, label in itertools.chain(*pairs)}
    longest = max((len(row) for label in handles for row in label.split("\n")), default=0)
    columns = max(1, min(len(handles), 100 // (longest + 9)))  # 100 characters, 9 for a line
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)


def _key(i: int) -> dict:
    """How line i looks; marker and colour repeat together only after 72."""
    return {"color": COLOURS[i % 8], "marker": MARKERS[i % 9], "linestyle": DASHES[i % 7]}


def _bars(value, low, high) -> np.ndarray:
    """(2, n) lengths below and above; a value just outside its interval by rounding gets 0."""
    return np.maximum([value - low, high - value], 0.0).reshape(2, -1)


@dataclass(frozen=True)
class Panel:
    """Lines on two axes: label -> {"x", "y"} and, for a band, "low" and "high" (lists)."""

    ylabel: str  # with its unit
    xlabel: str
    series: dict[str, dict]
    title: str = ""
    level: float | None = None  # a value to compare with


def lines(panels: list[Panel], path, title: str) -> None:
    """A label looks the same in every panel and is named once, below; an empty one is not."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    height = 4.6 if len(panels) < 3 else 0.9 + 2.6 * -(-len(panels) // 2)  # inches
    with sheet(path, title, len(panels), height) as (figure, axes):
        for ax, panel in zip(axes, panels, strict=True):
            for name, row in panel.series.items():
                y, key = np.array(row["y"], float), _key(names.index(name))  # None becomes nan
                if "low" in row:
                    low, high = (np.array(row[end], float) for end in ("low", "high"))
                    ax.fill_between(row["x"], low, high, color=key["color"], alpha=0.15, lw=0)
                if len(y) > 40:  # a jagged line: thin, and its running mean over a twentieth
                    ax.plot(row["x"], y, color=key["color"], linewidth=0.6, alpha=0.4)
                    window, ones = np.ones(len(y) // 20), np.ones(len(y))
                    # At both ends the window holds fewer points: divided by how many there are.
                    y = np.convolve(y, window, "same") / np.convolve(ones, window, "same")
                every = 1 if len(y) < 16 else len(y) // 8  # markers would cover a long line
                ax.plot(row["x"], y, label=readable(name), markersize=5, markevery=every, **key)
            if panel.level is not None:
                ax.axhline(panel.level, color="black", linestyle=":", linewidth=1)
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))  # steps, days
            ax.set(xlabel=readable(panel.xlabel, 60), ylabel=readable(panel.ylabel, 34),
                   title=readable(panel.title, 40, 3))
        _legend(figure)


def frontier(points: dict[str, tuple[Interval, Interval]], lines: dict[str, dict[str, str]], path,
             title: str) -> None:
    """Point -> (utility, keywords), with 95 % bars; line -> its points in order (a sweep of lambda)
    -> what is written beside each, if anything. The legend names lines, and points of no line."""
    joined = {name for names in lines.values() for name in names}
    series = lines | {name: {name: ""} for name in points if name not in joined}
    with sheet(path, title, height=5.6) as (figure, [ax]):
        for i, (label, names) in enumerate(series.items()):
            x, y = (np.array([points[name][axis] for name in names]) for axis in (0, 1))  # (n, 3)
            ax.plot(x[:, 0], y[:, 0], label=readable(label, 40), markersize=8, **_key(i))
            ax.errorbar(x[:, 0], y[:, 0], _bars(*y.T), _bars(*x.T), fmt="none",
                        elinewidth=1.2, color=_key(i)["color"])
            for place, text in zip(np.stack([x[:, 0], y[:, 0]], 1), names.values(), strict=True):
                ax.annotate(text, place, (5, 5), textcoords="offset points", fontsize=9,
                            color=_key(i)["color"], path_effects=HALO)
        ax.margins(0.12)  # room for what is written beside points
        ax.set(xlabel="utility: R-Score against PE (held-out ranker)",
               ylabel="distinct keywords per list")
        _legend(figure)


def rings(panels: list[dict], functional: set[str], path, title: str) -> None:
    """Nested rings (the paper's Figure 3); panel: {"title", "inner": {topic: share}, "outer",
    "inner_label", "outer_label"}. Topics in `functional` are hatched and come after the rest."""
    pooled = [{ring: _pooled(panel[ring]) for ring in ("inner", "outer")} for panel in panels]
    # Of all rings: the order of topics is the same in each.
    total = sum((ring for rows in pooled for ring in rows.values()), Counter())
    # The largest first; chores and the pooled rest stand at the end, whatever their share.
    order = sorted(total, key=lambda t: (t == OTHERS, t in functional, -total[t], t))
    looks = {t: {"facecolor": GREY if t == OTHERS else "#777777" if t in functional else
                 RING_COLOURS[i % 7], "hatch": "///" if t in functional else ""}
             for i, t in enumerate(order)}
    height = 0.6 + 4.8 * -(-len(panels) // 2) + 0.22 * -(-(len(order) + 1) // 2)  # with its legend
    with sheet(path, title, len(panels), height) as (figure, axes):
        for ax, panel, shares in zip(axes, panels, pooled, strict=True):
            notes = [readable(panel["title"], 40)]
            for ring, radius in (("inner", 0.66), ("outer", 1.0)):
                _ring(ax, shares[ring], order, looks, radius)
                notes.append(f"{ring}: {readable(panel[f'{ring}_label'], 22, 1)}")
                if functional and shares[ring]:  # before small topics are pooled
                    share = sum(v for t, v in panel[ring].items() if t in functional)
                    notes[-1] += f" ({share / sum(panel[ring].values()):.0%} functional)"
            # The title lies within the axes: of axes that keep a shape the layout misplaces it.
            ax.set(xlim=(-1.02, 1.02), ylim=(-1.02, 1.47), aspect="equal")
            ax.set_title("\n".join(notes), y=2.04 / 2.49)
            ax.axis("off")  # rings have no scale
        keys = {f"{i}  {readable(t, 34, 1)}": Patch(edgecolor="white", **looks[t])
                for i, t in enumerate(order, 1)}
        if functional & total.keys():
            keys["hatched: functional"] = Patch(facecolor="white", edgecolor="black", hatch="///")
        _legend(figure, keys)


def _ring(ax, shares: dict[str, float], order: list[str], looks: dict, radius: float) -> None:
    """Wedges with their numbers and, where there is room, shares."""
    topics = [topic for topic in order if shares.get(topic)]
    numbers = [f"{order.index(t) + 1}" + f"\n{shares[t]:.0%}" * (shares[t] * radius > 0.05)
               for t in topics]
    if topics:  # nothing is no pie
        wedges, _ = ax.pie([shares[t] for t in topics], radius=radius, startangle=90,
                           counterclock=False, wedgeprops={"width": 0.33, "edgecolor": "white"},
                           labels=numbers, labeldistance=1 - 0.165 / radius,  # mid-ring
                           textprops={"fontsize": 9, "ha": "center", "va": "center",
                                      "linespacing": 1.0, "path_effects": HALO})
        for wedge, topic in zip(wedges, topics, strict=True):
            wedge.set(**looks[topic])


def _pooled(shares: dict[str, float]) -> dict[str, float]:
    """Shares that add to 1, those under LEAST together as OTHERS."""
    total, pooled = sum(shares.values()), Counter()
    for topic, share in shares.items():
        pooled[topic if share >= LEAST * total else OTHERS] += share / (total or 1)
    return pooled


RANKER_NAMES = {"train": "training ranker", "judge": "held-out ranker"}


def last_run(rows: list[dict]) -> dict[tuple, list[dict]]:
    """(stage, tower, ranker or round) -> its rows, of the last run alone.

    A step that does not go on is a rerun: it replaces the rows of its part and of those after it.
    """
    parts: dict[tuple, list[dict]] = {}
    for row in rows:
        stage, at = row.get("stage"), row.get("step", row.get("epoch"))
        if at is None or stage not in ("rid", "ranker", "sit", "dpo"):
            continue  # a stage's last line, or one of another stage
        part = next((row[name] for name in ("tower", "ranker", "round") if name in row), None)
        key = stage, part
        if key in parts and at <= parts[key][-1].get("step", parts[key][-1].get("epoch")):
            after = list(parts)[list(parts).index(key) :]
            parts = {k: v for k, v in parts.items() if k not in after or k[0] != stage}
        parts.setdefault(key, []).append(row)
    return parts


def curves(rows: list[dict], panels: list[dict], path, title: str) -> None:
    """Rows of a run's metrics.jsonl: losses and other figures of the stages that are there.

    panels: what to draw of them, as experiments.yaml has it. Raises ValueError if there is nothing.
    """
    logged, drawn = last_run(rows), []
    start, end = {}, 0  # the rounds of DPO one after another on one axis
    for (stage, part), steps in logged.items():
        if stage == "dpo":
            start[part], end = end, end + steps[-1]["step"]
    for labels in map(dict, panels):
        stage, field, series = labels.pop("stage"), labels.pop("field"), {}
        for (logged_by, part), steps in logged.items():
            begin = start.get(part, 0)
            xy = [(begin + row["step"] if "step" in row else row["epoch"] + 1, row[field])
                  for row in steps if row.get(field) is not None]
            if xy and logged_by == stage:
                x, y = zip(*xy, strict=True)
                series[RANKER_NAMES.get(part, part or "")] = {"x": x, "y": y}
        if series:
            drawn.append(Panel(series=series, **labels))
    if not drawn:
        raise ValueError("curves: no epoch or step of rid, ranker, sit or dpo in these rows")
    lines(drawn, path, title)
