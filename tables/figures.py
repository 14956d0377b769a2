"""The pictures of a report: curves, frontier, topic rings, A/B days, reward hacking, lines.

    rows = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    figures.curves(rows, "results/curves.png")

Each function takes plain dicts (what JSON holds), leaves them as they are and writes one PNG; the
same input gives the same bytes. An interval may be None or absent: then none is drawn. Colour is
never the only key: lines differ in marker and dash, bars in hatch, topics of a ring in number.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import textwrap
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Wedge
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from config import atomic_path

# Okabe and Ito; their yellow is too pale for a line, their black too dark under a number.
COLOURS = "#0072B2 #D55E00 #009E73 #E69F00 #CC79A7 #56B4E9 #000000 #999999".split()
RING_COLOURS, GREY = [*COLOURS[:6], "#F0E442"], "#BBBBBB"
MARKERS, HATCHES = "osD^vPX*<", ("", "///", "...")
DASHES = ["-", "--", "-.", ":", (0, (6, 1)), (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1))]
OTHERS, LEAST = "Others", 0.04  # topics with a smaller share are pooled
CHINESE_FONTS = ["Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "PingFang SC",
                 "WenQuanYi Micro Hei", "Microsoft YaHei", "SimHei", "Arial Unicode MS"]
STYLE = {  # 8 inches of 120 dots; a README shows them at about 800 px, and 10 pt as 14 px
    "figure.dpi": 120, "savefig.dpi": 120, "font.size": 10, "axes.titlesize": 11,
    "figure.titlesize": 12, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.8,
    "hatch.linewidth": 0.8, "hatch.color": "black", "legend.frameon": False,
    "axes.formatter.useoffset": False, "text.parse_math": False,  # a name may hold a dollar sign
}
HALO = [withStroke(linewidth=3, foreground="white")]  # behind text that lies on something


@functools.cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """Font families in order of preference, and the code points that one of them has."""
    files = {f.name: f.fname for f in font_manager.fontManager.ttflist}
    names = [n for n in CHINESE_FONTS if n in files and Path(files[n]).is_file()][:1]
    paths = [font_manager.findfont("DejaVu Sans"), *(files[n] for n in names)]
    points = (font_manager.get_font(path).get_charmap() for path in paths)
    return ["DejaVu Sans", *names], frozenset(itertools.chain(*points))


def readable(name, width: int = 30, rows: int = 2) -> str:
    """A name in at most `rows` lines of `width`; what no font here has becomes its code points."""
    text, known = "", _fonts()[1]
    for drawn, group in itertools.groupby(" ".join(str(name).split()), lambda c: ord(c) in known):
        run = list(group)
        text += "".join(run) if drawn else f"‹{' '.join(f'{ord(c):x}' for c in run)}›"
    width = width // 2 if any(ord(c) > 0x2E80 for c in text) else width  # Chinese is twice as wide
    text = "\n".join(textwrap.wrap(text, width, max_lines=rows, placeholder=" …"))
    return f" {text}" if text.startswith("_") else text  # matplotlib hides a label that begins so


@contextlib.contextmanager
def sheet(path: str | Path, title: str, panels: int = 1, height: float = 4.6, per_row: int = 2):
    """Open a figure in the one style of all: yields (figure, axes); on disk whole or not at all."""
    columns = min(per_row, panels)
    with matplotlib.style.context(["default", STYLE, {"font.family": _fonts()[0]}]):
        figure = Figure((8, height), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.07)
        FigureCanvasAgg(figure)  # no pyplot: no window, nothing shared between figures
        axes = figure.subplots(-(-panels // columns), columns, squeeze=False).ravel().tolist()
        for spare in axes[panels:]:
            spare.remove()
        figure.suptitle(readable(title, 76, 3))
        yield figure, axes[:panels]
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")


def _label(axes, xlabel: str, ylabel: str, title: str = "") -> None:
    axes.set(xlabel=readable(xlabel, 60), ylabel=readable(ylabel, 34), title=readable(title, 40, 3))


def _legend(figure, handles: dict, handlelength: float = 3.0) -> None:
    """One legend below all panels, in as many columns as its longest label leaves room for."""
    longest = max((len(row) for label in handles for row in label.split("\n")), default=0)
    columns = max(1, min(len(handles), int(100 / (longest + 6 + handlelength))))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns,
                  handlelength=handlelength)


def _handles(axes) -> dict:
    """label -> line, of all panels; a label that several have, once."""
    found = [zip(*ax.get_legend_handles_labels(), strict=True) for ax in axes]
    return {label: handle for handle, label in itertools.chain(*found)}


def _key(i: int) -> dict:
    """How line i looks; marker and colour repeat together only after 72."""
    return {"color": COLOURS[i % 8], "marker": MARKERS[i % 9], "linestyle": DASHES[i % 7]}


def _bars(value: float, interval) -> np.ndarray | None:
    """(2, 1) lengths below and above; a value just outside its interval by rounding gets 0."""
    if interval is None or None in interval:
        return None
    return np.maximum([[value - interval[0]], [interval[1] - value]], 0.0)


# ------------------------------------------------------------------------------- lines with bands


def lines(series: dict[str, dict], path, xlabel: str, ylabel: str, title: str,
          right: dict[str, dict] | None = None, right_ylabel: str = "") -> None:
    """label -> {"x", "y", "low", "high"} (lists) as lines with bands; `right`: a second panel."""
    panels = [(series, ylabel)] + ([(right, right_ylabel)] if right else [])
    names = list(dict.fromkeys(name for rows, _ in panels for name in rows))
    with sheet(path, title, len(panels)) as (figure, axes):
        for ax, (rows, label) in zip(axes, panels, strict=True):
            for name, row in rows.items():
                gone = [None] * len(row["x"])
                y, low, high = (np.array(row.get(k) or gone, float) for k in ("y", "low", "high"))
                key = _key(names.index(name))
                ax.fill_between(row["x"], low, high, color=key["color"], alpha=0.15, linewidth=0)
                ax.plot(row["x"], y, label=readable(name),
                        markevery=1 if len(y) < 16 else len(y) // 8, **key)
            ticks = sorted({x for row in rows.values() for x in row["x"]})
            gap = min((b - a for a, b in itertools.pairwise(ticks)), default=1)
            if ticks and gap * 20 >= ticks[-1] - ticks[0]:  # few: one tick for each
                ax.set_xticks(ticks[:: -(-len(ticks) // 10)])
            elif all(float(x).is_integer() for x in ticks):
                ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            _label(ax, xlabel, label)
        _legend(figure, _handles(axes))


def ab_days(daily: dict[str, dict], path, title: str = "") -> None:
    """CTR and sessions per user and day, up to each day; arm -> {"day", "ctr", "ctr_low",
    "ctr_high", "sessions", "sessions_low", "sessions_high"} (lists), CTR as a share."""

    def panel(name: str, factor: float) -> dict[str, dict]:
        ends = {"y": name, "low": f"{name}_low", "high": f"{name}_high"}
        return {arm: {"x": row["day"]} | {k: [None if v is None else factor * v for v in row[field]]
                                          for k, field in ends.items() if row.get(field)}
                for arm, row in daily.items()}

    lines(panel("ctr", 100), path, "day of the test", "click-through rate (CTR), %",
          title or "A/B test: means of all days up to each, bands 95 %",
          panel("sessions", 1), "sessions per user and day")


def hacking(rows: dict[str, dict], path, title: str = "") -> None:
    """method -> {"train", "held_out", "truth"} -> {"lift", "interval"}, lifts as shares of the
    baseline's mean (0.1: 10 % above it), so that rankers and truth can be compared."""
    judges = {"train": "training ranker", "held_out": "held-out ranker", "truth": "hidden truth"}
    with sheet(path, title or "Lift over the baseline, by who judges") as (figure, [ax]):
        for j, (judge, label) in enumerate(judges.items()):
            cells = [(i + 0.27 * (j - 1), row[judge])
                     for i, row in enumerate(rows.values()) if row.get(judge)]
            if not cells:
                continue
            ax.bar([x for x, _ in cells], [100 * cell["lift"] for _, cell in cells], 0.26,
                   label=label, color=COLOURS[j], hatch=HATCHES[j], edgecolor="white",
                   hatchcolor="white")
            for x, cell in cells:
                lift, bars = 100 * cell["lift"], _bars(cell["lift"], cell.get("interval"))
                ax.errorbar(x, lift, None if bars is None else 100 * bars, color="black", capsize=3,
                            linewidth=1.2)
                beyond = 0 if bars is None else 100 * float(bars[int(lift >= 0), 0])
                end, up = lift + math.copysign(beyond, lift), lift >= 0
                ax.annotate(f"{lift:+.0f}".replace("-", "−"), (x, end), (0, 3 if up else -3),
                            textcoords="offset points", fontsize=9, ha="center",
                            va="bottom" if up else "top")
        ax.axhline(0, color="black", linewidth=1)
        width = max(8, 88 // max(1, len(rows)))
        ax.set_xticks(range(len(rows)), [readable(name, width, 3) for name in rows])
        ax.grid(False, axis="x")
        ax.margins(y=0.1)
        _label(ax, "", "lift, % of the baseline's mean (whiskers: 95 %)")
        _legend(figure, _handles([ax]))


# ---------------------------------------------------------------------------------------- frontier


def frontier(points: dict[str, dict], path, lines: dict[str, list[str]] | None = None,
             xlabel: str = "utility", ylabel: str = "diversity",
             title: str = "Utility against diversity, 95 % bars: better is up and to the right",
             ) -> None:
    """name -> {"x", "x_interval", "y", "y_interval"} as named points with 95 % bars; `lines` joins
    the points of each label (a sweep of lambda) in order. A point's "label", if it has one, is
    written for its name; an empty one is not.
    """
    lines = lines or {}
    place = {name: (p["x"], p["y"]) for name, p in points.items()}
    alone = [name for name in points if name not in itertools.chain(*lines.values())]
    key = {name: _key(len(lines) + i) for i, name in enumerate(alone)}
    with sheet(path, title, height=5.2) as (figure, [ax]):
        for i, (label, names) in enumerate(lines.items()):
            key |= dict.fromkeys(names, _key(i))
            xy = zip(*(place[n] for n in names), strict=True)
            ax.plot(*xy, label=readable(label, 40), **_key(i))
        for name, p in points.items():
            bars = [_bars(p[k], p.get(f"{k}_interval")) for k in "yx"]
            ax.errorbar(p["x"], p["y"], *bars, capsize=3, markersize=8, elinewidth=1.2, **key[name])
        ax.margins(0.12)
        _label(ax, xlabel, ylabel)
        if lines:
            _legend(figure, _handles([ax]))
        figure.draw_without_rendering()  # the layout is final now: names can be placed in pixels
        boxes = _drawn_boxes(ax.transData.transform, points, lines)
        for name, p in points.items():
            if label := p.get("label", name):
                _name_point(ax, readable(label, 24), place[name], boxes, key[name]["color"])


def _drawn_boxes(pixel, points: dict[str, dict], lines: dict[str, list[str]]) -> list[tuple]:
    """What names should not cover: (left, bottom, right, top, weight) of points, bars and lines."""
    boxes, at = [], {name: pixel((p["x"], p["y"])) for name, p in points.items()}
    for name, p in points.items():
        boxes.append((*at[name] - 8, *at[name] + 8, 5.0))
        for k in "xy":
            if _bars(p[k], p.get(f"{k}_interval")) is not None:
                ends = [p | {k: v} for v in p[f"{k}_interval"]]
                low, high = (pixel((end["x"], end["y"])) for end in ends)
                boxes.append((*low - 2, *high + 2, 1.0))
    for a, b in itertools.chain(*(itertools.pairwise(names) for names in lines.values())):
        steps = [at[a] + t * (at[b] - at[a]) for t in np.linspace(0, 1, 25)]
        boxes += [(*xy - 3, *xy + 3, 1.0) for xy in steps]
    return boxes


def _name_point(ax, name: str, point: tuple, boxes: list[tuple], colour: str) -> None:
    """Write the name of a point where it covers least, close by if it can; adds it to boxes."""
    text = ax.annotate(name, point, (0, 0), textcoords="offset pixels", ha="center", va="center",
                       path_effects=HALO)
    text.set_in_layout(False)  # else it would move the axes under the names before it
    xy, half = ax.transData.transform(point), np.array(text.get_window_extent().size) / 2 + 2
    frame, best = ax.get_window_extent(), None
    left, bottom, right, top, weight = np.array(boxes).T
    for radius, turn in itertools.product((10, 20, 32, 46, 62, 80, 100, 130), range(16)):
        way = np.array([math.cos((turn + 2) * math.pi / 8), math.sin((turn + 2) * math.pi / 8)])
        offset = radius * way + half * np.clip(1.5 * way, -1, 1)
        low, high = xy + offset - half, xy + offset + half
        wide = np.clip(np.minimum(right, high[0]) - np.maximum(left, low[0]), 0, None)
        tall = np.clip(np.minimum(top, high[1]) - np.maximum(bottom, low[1]), 0, None)
        outside = np.clip([*(frame.min - low), *(high - frame.max)], 0, None).sum()
        cost = (wide * tall * weight).sum() + 1000 * outside + 4 * radius
        if best is None or cost < best[0]:
            best = cost, radius, offset, (*low, *high, 50.0)
    _, radius, offset, box = best
    boxes.append(box)
    text.set_position(offset)
    if radius > 20:  # far: a thread to its point
        ax.annotate("", point, offset, textcoords="offset pixels", zorder=1, arrowprops={
            "arrowstyle": "-", "color": colour, "alpha": 0.6}).set_in_layout(False)


# ------------------------------------------------------------------------------------------- rings


def rings(panels: list[dict], path, functional=(), title: str = "") -> None:
    """Nested rings (the paper's Figure 3); panel: {"title", "inner": {topic: share}, "outer",
    "inner_label", "outer_label"}. Topics in `functional` are hatched and come after the rest."""
    pooled = [{ring: _pooled(panel[ring]) for ring in ("inner", "outer")} for panel in panels]
    total: dict[str, float] = {}
    for topic, share in (x for p in pooled for ring in p.values() for x in ring.items()):
        total[topic] = total.get(topic, 0.0) + share
    order = sorted(total, key=lambda t: (t == OTHERS, t in functional, -total[t], t))
    looks = {t: {"facecolor": GREY if t == OTHERS else "#777777" if t in functional else
                 RING_COLOURS[i % 7], "edgecolor": "white",
                 "hatch": "///" if t in functional else ""} for i, t in enumerate(order)}
    height = 0.6 + 4.8 * -(-len(panels) // 2) + 0.22 * -(-(len(order) + 1) // 2)
    title = title or "Topics by share: numbers as in the legend, shares where there is room"
    with sheet(path, title, len(panels), height) as (figure, axes):
        for ax, panel, parts in zip(axes, panels, pooled, strict=True):
            notes = [readable(panel["title"], 40)]
            for ring, radius in (("inner", 0.66), ("outer", 1.0)):
                angle = 90.0  # clockwise from the top
                for i, topic in enumerate(order, 1):
                    share = parts[ring].get(topic, 0.0)
                    ax.add_patch(Wedge((0, 0), radius, angle - 360 * share, angle, width=0.33,
                                       **looks[topic]))
                    middle = math.radians(angle - 180 * share)
                    x, y = ((radius - 0.165) * f(middle) for f in (math.cos, math.sin))
                    text = f"{i}\n{share:.0%}" if share * radius > 0.05 else str(i)
                    ax.text(x, y, text if share else "", fontsize=9, ha="center", va="center",
                            linespacing=1.0, path_effects=HALO)
                    angle -= 360 * share
                notes.append(f"{ring}: {readable(panel.get(f'{ring}_label', ring), 22, 1)}")
                if functional and parts[ring]:  # before small topics are pooled
                    share = sum(v for t, v in panel[ring].items() if t in functional)
                    notes[-1] += f" ({share / sum(panel[ring].values()):.0%} functional)"
            # The title lies within the axes: of axes that keep a shape the layout misplaces it.
            ax.set(xlim=(-1.02, 1.02), ylim=(-1.02, 1.47), aspect="equal")
            ax.set_title("\n".join(notes), y=2.04 / 2.49)
            ax.axis("off")
        keys = {f"{i}  {readable(t, 34, 1)}": Patch(**looks[t]) for i, t in enumerate(order, 1)}
        if set(order) & set(functional):
            keys["hatched: functional"] = Patch(facecolor="white", edgecolor="black", hatch="///")
        _legend(figure, keys, handlelength=1.8)


def _pooled(shares: dict[str, float]) -> dict[str, float]:
    """Shares that add to 1, those under LEAST together as OTHERS."""
    total, pooled = sum(shares.values()), {}
    for topic, share in shares.items() if total else ():
        key = topic if share >= LEAST * total else OTHERS
        pooled[key] = pooled.get(key, 0.0) + share / total
    return pooled


# ------------------------------------------------------------------------------------------ curves


def last_run(rows: list[dict]) -> dict[tuple, list[dict]]:
    """(stage, "loss" or "held_out", ranker or round) -> its rows, of the last run alone.

    A step that does not go on is a rerun: it replaces the rows of its part and of those after it.
    SIT logs its epoch at each step; there a rerun shows in a learning rate that rises once more.
    """
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        stage, at = row.get("stage"), row.get("step", row.get("epoch"))
        if at is None or stage not in ("rid", "ranker", "sit", "dpo"):
            continue
        key = (stage, "loss" if "loss" in row else "held_out", row.get("ranker", row.get("round")))
        if before := found.get(key):
            first = []
            last = before[-1].get("step", before[-1].get("epoch"))
            again = at < last or at == last and stage != "sit"
            if at == last and stage == "sit" and row["learning_rate"] > before[-1]["learning_rate"]:
                again = before[-1]["learning_rate"] < max(r["learning_rate"] for r in before)
                if before[-1]["learning_rate"] == before[0]["learning_rate"]:
                    first = before[-1:]  # the rerun began a step ago, with a fall of the rate
            if again:
                after = list(found)[list(found).index(key) :]
                found = {k: v for k, v in found.items() if k not in after or k[0] != stage}
                found[key] = first
        found.setdefault(key, []).append(row)
    return found


PANELS = [  # stage, field, title, x, y, a value to compare with
    ("rid", "loss", "RID: contrastive loss", "epoch", "loss, nats", None),
    ("rid", "valid_auc", "RID: held-out AUC (dotted: chance)", "epoch", "AUC", 0.5),
    ("ranker", "held_out_loss", "Rankers: held-out loss", "epoch", "loss, nats", None),
    ("sit", "loss", "SIT: loss", "step", "loss, nats a token", None),
    ("dpo", "loss", "DPO: loss (dotted: ln 2)", "", "loss, nats", math.log(2)),
    ("dpo", "margin", "DPO: margin over the reference", "", "log-probability, nats", 0.0),
    ("dpo", "chosen_logp_change", "DPO: chosen lists", "", "log-probability change, nats", 0.0),
    ("dpo", "held_out", "DPO: utility and diversity, held out", "", "start of the round = 1", 1.0),
]


def curves(rows: list[dict], path, title: str = "") -> None:
    """Rows of a run's metrics.jsonl: losses and held-out figures of the stages that are there."""
    found, drawn = last_run(rows), []
    start, end = {}, 0  # the rounds of DPO one after another on one axis
    for (stage, kind, part), logged in found.items():
        if stage == "dpo" and kind == "loss":
            start[part], end = end, end + logged[-1]["step"]
    for panel in PANELS:
        kind, series = "held_out" if panel[1] == "held_out" else "loss", {}
        for part, logged in ((k[2], v) for k, v in found.items() if k[:2] == (panel[0], kind)):
            xy = [(start.get(part, 0) + r["step"] if "step" in r else
                   i if panel[0] == "sit" else r["epoch"] + 1, r[panel[1]])
                  for i, r in enumerate(logged, 1) if r.get(panel[1]) is not None]
            if xy:  # the held-out figure is relative to where its round started
                series[part] = [(start.get(part, 0), 1.0)] * (kind == "held_out") + xy
        drawn += [(panel, series)] if series else []
    if not drawn:
        raise ValueError("curves: no epoch or step of rid, ranker, sit or dpo in these rows")
    title = title or "Training curves (long ones: each step thin, a running mean thick)"
    names = {"train": "trains the generator", "judge": "judges (held out)"}
    with sheet(path, title, len(drawn), 0.9 + 2.6 * -(-len(drawn) // 2)) as (figure, axes):
        for ax, ((stage, _, name, xlabel, ylabel, level), series) in zip(axes, drawn, strict=True):
            for part, xy in series.items():
                number = list(start).index(part) if part in start else part == "judge"
                _trace(ax, number, *zip(*xy, strict=True), readable(names.get(part, part)))
            if level is not None:
                ax.axhline(level, color="black", linestyle=":", linewidth=1)
            if stage == "ranker":
                ax.legend()
            if stage == "dpo":
                ax.set_xlim(-0.03 * end - 1, 1.03 * end + 1)
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
            _label(ax, xlabel or "step, rounds one after another", ylabel, name)
        dpo = [ax for ax, (panel, _) in zip(axes, drawn, strict=True) if panel[0] == "dpo"]
        _legend(figure, _handles(dpo))


def _trace(ax, i: int, x: tuple, y: tuple, label: str) -> None:
    """A curve; of more than 40 points the running mean over a twentieth of them, in front."""
    key, mean = _key(i) | {"linestyle": "-"}, y  # dashes of a jagged line cannot be told apart
    if len(y) > 40:
        ax.plot(x, y, color=key["color"], linewidth=0.6, alpha=0.4)
        window = np.ones(len(y) // 20)
        mean = np.convolve(y, window, "same") / np.convolve(np.ones(len(y)), window, "same")
    ax.plot(x, mean, markersize=5, markevery=1 if len(y) < 16 else len(y) // 6, label=label, **key)
