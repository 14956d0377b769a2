"""The pictures of a report: training curves, frontiers, topic rings, A/B days, hacking, lines.

    rows = [json.loads(line) for line in open("runs/tiny/metrics.jsonl")]
    figures.curves(rows, "results/curves.png")

Each function takes plain dicts (what JSON holds), leaves them as they are and writes one PNG; the
same input gives the same bytes. An interval may be None or absent: then nothing is drawn for it.
Colour is never the only key: lines differ in marker and dash, bars in hatch, ring topics by number.
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
from matplotlib import font_manager, patches, patheffects
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from config import atomic_path

COLOURS = "#0072B2 #D55E00 #009E73 #E69F00 #CC79A7 #56B4E9 #000000".split()  # Okabe and Ito, no yellow
RING_COLOURS = [c for c in COLOURS if c != "#000000"] + ["#F0E442"]  # numbers must show on them
MARKERS, HATCHES = "osD^vPX", ("", "///", "...")
DASHES = ["-", "--", "-.", ":", (0, (6, 1)), (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1))]
GREY, WIDTH, LEAST = "#BBBBBB", 8.0, 0.04  # WIDTH in inches; topics under LEAST go to OTHERS
OTHERS = "Others"
CHINESE_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei",
                 "WenQuanYi Zen Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei",
                 "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS")  # fmt: skip
STYLE = {  # 8 inches at 120 dots: a README shows it at about 800 px, 10 pt as 14 px
    "figure.dpi": 120, "savefig.dpi": 120, "font.size": 10, "axes.titlesize": 11,
    "figure.titlesize": 12, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.8,
    "lines.markersize": 6, "hatch.linewidth": 0.8, "legend.frameon": False, "legend.handlelength": 3,
    "text.parse_math": False, "axes.formatter.useoffset": False,  # names may hold a dollar sign
}  # fmt: skip


@functools.cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """Font families in order of preference, and the code points that one of them has."""
    files = {f.name: f.fname for f in font_manager.fontManager.ttflist if f.style == "normal"}
    names = [n for n in CHINESE_FONTS if n in files and Path(files[n]).is_file()][:1]
    paths = [font_manager.findfont("DejaVu Sans"), *(files[n] for n in names)]
    points = (font_manager.get_font(path).get_charmap() for path in paths)
    return ["DejaVu Sans", *names], frozenset(itertools.chain(*points))


def readable(name, width: int = 30, rows: int = 2) -> str:
    """A name in at most `rows` lines of `width`; what no font here has becomes its code points."""
    known, parts = _fonts()[1], []
    runs = itertools.groupby(" ".join(str(name).split()), lambda c: ord(c) in known)
    for drawable, run in runs:
        parts.append("".join(run) if drawable else f"‹{' '.join(f'{ord(c):x}' for c in run)}›")
    text = "".join(parts)
    width = width // 2 if any(ord(c) > 0x2E80 for c in text) else width  # Chinese is twice as wide
    text = "\n".join(textwrap.wrap(text, width, max_lines=rows, placeholder=" …"))
    return f" {text}" if text.startswith("_") else text  # matplotlib hides a label that begins so


@contextlib.contextmanager
def sheet(path: str | Path, title: str, rows=1, columns=1, height=4.6):
    """Open a figure in the one style of all: yields (figure, its axes); whole on disk or absent."""
    with matplotlib.style.context(["default", STYLE, {"font.family": _fonts()[0]}]):
        figure = Figure((WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)  # no pyplot: no window, nothing shared between figures
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        figure.suptitle(readable(title, 78, 3))
        yield figure, axes
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")


def _legend(figure, handles: list, labels: list[str]) -> None:
    """One legend below all panels, in as many columns as its longest label leaves room for."""
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = max(1, min(len(labels), int(100 / (longest + 9))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _label(axes, xlabel: str, ylabel: str, title: str = "") -> None:
    axes.set_xlabel(readable(xlabel, 60))
    axes.set_ylabel(readable(ylabel, 34))
    axes.set_title(readable(title, 46, 3))


def _floats(values, count: int, factor: float = 1.0) -> np.ndarray:
    """(count,); what is missing is nan, which matplotlib leaves out."""
    values = [None] * count if values is None else values
    return factor * np.array([math.nan if v is None else v for v in values], float)


def _bars(value: float, interval) -> np.ndarray | None:
    """(2, 1) lengths below and above, as errorbar wants them; a mean may lie outside by rounding."""
    if interval is None or None in interval:
        return None
    return np.maximum([[value - interval[0]], [interval[1] - value]], 0.0)


def _band(axes, series: dict[str, dict], factor: float = 1.0) -> None:
    """A line with its 95 % band for each series, and ticks at the x values where few."""
    for i, (name, row) in enumerate(series.items()):
        x, count = row["x"], len(row["x"])
        y, low, high = (_floats(row.get(k), count, factor) for k in ("y", "low", "high"))
        key = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "linestyle": DASHES[i % 7]}
        axes.fill_between(x, low, high, color=key["color"], alpha=0.15, linewidth=0)
        axes.plot(x, y, label=readable(name), markevery=max(1, count // 8), **key)
    ticks = sorted({v for row in series.values() for v in row["x"]})
    gap = min((b - a for a, b in itertools.pairwise(ticks)), default=1)
    if len(ticks) < 10 and gap >= 0.05 * (ticks[-1] - ticks[0]):
        axes.set_xticks(ticks, [f"{v:g}" for v in ticks])
    elif all(float(v).is_integer() for v in ticks):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def lines(series: dict[str, dict], path, xlabel: str, ylabel: str, title: str,
          right: dict[str, dict] | None = None, right_ylabel: str = "") -> None:  # fmt: skip
    """label -> {"x", "y", "low", "high"} (lists) as lines with bands; `right`: a second panel."""
    both = [(series, ylabel), (right, right_ylabel)][: 1 + (right is not None)]
    with sheet(path, title, 1, len(both)) as (figure, axes):
        for ax, (rows, name) in zip(axes, both, strict=True):
            _band(ax, rows)
            _label(ax, xlabel, name)
        _legend(figure, *axes[0].get_legend_handles_labels())


def ab_days(daily: dict[str, dict], path, title: str = "") -> None:
    """Cumulative CTR and sessions per user by day; arm -> {"day", "ctr", "ctr_low", "ctr_high",
    "sessions", "sessions_low", "sessions_high"}, CTR a share."""
    title = title or "A/B test: cumulative means up to each day, bands 95 %"
    panels = [("ctr", "taps per shown list (CTR), %", 100), ("sessions", "sessions per user", 1)]
    with sheet(path, title, 1, 2, 4.2) as (figure, axes):
        for ax, (name, ylabel, factor) in zip(axes, panels, strict=True):
            _band(ax, {arm: {"x": row["day"], "y": row.get(name), "low": row.get(f"{name}_low"),
                             "high": row.get(f"{name}_high")} for arm, row in daily.items()},
                  factor)  # fmt: skip
            _label(ax, "day of the test", ylabel)
        _legend(figure, *axes[0].get_legend_handles_labels())


def hacking(rows: dict[str, dict], path, title: str = "") -> None:
    """method -> {"train", "held_out", "truth"} -> {"lift", "interval"}: lifts as shares of the
    baseline's mean (0.1: 10 % above it), so that rankers and truth can be compared."""
    title = title or "Lift over the baseline by who judges: what only the training ranker sees is hacked"
    judges = {"train": "training ranker", "held_out": "held-out ranker", "truth": "hidden truth"}
    with sheet(path, title) as (figure, [ax]):
        for j, (judge, label) in enumerate(judges.items()):
            found = [(i, row[judge]) for i, row in enumerate(rows.values()) if row.get(judge)]
            places = [i + 0.27 * (j - 1) for i, _ in found]
            heights = [100 * cell["lift"] for _, cell in found]
            ax.bar(places, heights, 0.26, label=label, color=COLOURS[j], hatch=HATCHES[j],
                   edgecolor="white")  # fmt: skip
            for place, height, (_, cell) in zip(places, heights, found, strict=True):
                low, high = [100 * v for v in cell.get("interval") or (cell["lift"],) * 2]
                if cell.get("interval"):
                    ax.errorbar(place, height, _bars(height, (low, high)), color="black",
                                capsize=3, linewidth=1.2)  # fmt: skip
                end, sign = (max(high, 0), 1) if height >= 0 else (min(low, 0), -1)
                ax.annotate(f"{height:+.0f}", (place, end), (0, 3 * sign), fontsize=9, ha="center",
                            textcoords="offset points", va="bottom" if sign > 0 else "top")  # fmt: skip
        ax.axhline(0, color="black", linewidth=1)
        width = max(8, int(80 / max(1, len(rows))))
        ax.set_xticks(range(len(rows)), [readable(name, width) for name in rows])
        ax.grid(False, axis="x")
        ax.margins(y=0.1)
        _label(ax, "", "lift, % of the baseline's mean (bars: 95 %)")
        _legend(figure, *ax.get_legend_handles_labels())


# ---------------------------------------------------------------------------------------- frontier


def frontier(points: dict[str, dict], path, lines: dict[str, list[str]] | None = None,
             xlabel="utility", ylabel="diversity",
             title="Utility against diversity: better is up and to the right") -> None:  # fmt: skip
    """name -> {"x", "x_interval", "y", "y_interval"} as named points with 95 % bars; `lines` joins
    the named points of each label (a sweep of lambda) in order."""
    lines = lines or {}
    of_line = {name: i for i, names in enumerate(lines.values()) for name in names}
    alone = itertools.count(len(lines))  # a point of no line has a colour and marker of its own
    with sheet(path, title, height=5.2) as (figure, [ax]):
        for i, (label, names) in enumerate(lines.items()):
            x, y = ([points[n][k] for n in names] for k in "xy")
            ax.plot(x, y, color=COLOURS[i % 7], linestyle=DASHES[i % 7], marker=MARKERS[i % 7],
                    label=readable(label, 40))  # fmt: skip
        keys = {name: of_line[name] if name in of_line else next(alone) for name in points}
        for name, p in points.items():
            bars = [_bars(p[k], p.get(f"{k}_interval")) for k in "yx"]
            ax.errorbar(p["x"], p["y"], *bars, color=COLOURS[keys[name] % 7], capsize=3, markersize=8,
                        fmt=MARKERS[keys[name] % 7], linewidth=1.2, elinewidth=1.2)  # fmt: skip
        ax.margins(0.12)
        _label(ax, xlabel, ylabel)
        if lines:
            _legend(figure, *ax.get_legend_handles_labels())
        _name_points(figure, ax, points, [[points[n] for n in names] for names in lines.values()])


def _name_points(figure, ax, points: dict[str, dict], joined: list[list[dict]]) -> None:
    """Write each point's name where it covers least, starting near the point."""
    figure.draw_without_rendering()  # the layout is final: pixels can be compared
    pixel = ax.transData.transform
    at = {name: pixel((p["x"], p["y"])) for name, p in points.items()}
    boxes = [(*xy - 8, *xy + 8, 4.0) for xy in at.values()]  # left, bottom, right, top, weight
    for p in points.values():
        for k in "xy":
            if p.get(f"{k}_interval") and None not in p[f"{k}_interval"]:
                ends = [pixel(((p | {k: v})["x"], (p | {k: v})["y"])) for v in p[f"{k}_interval"]]
                boxes.append((*ends[0] - 2, *ends[1] + 2, 2.0))
    for chain in joined:
        for a, b in itertools.pairwise(pixel((p["x"], p["y"])) for p in chain):
            boxes += [(*a + t * (b - a) - 3, *a + t * (b - a) + 3, 2.0) for t in np.linspace(0, 1, 25)]
    frame = ax.get_window_extent()

    def cost(box, radius: float) -> float:
        left, bottom, right, top = box
        inside = [max(0, min(right, r) - max(left, l)) * max(0, min(top, t) - max(bottom, b)) * w
                  for l, b, r, t, w in boxes]  # noqa: E741  # fmt: skip
        past = max(0, frame.x0 - left, right - frame.x1) + max(0, frame.y0 - bottom, top - frame.y1)
        return sum(inside) + 1000 * past + 2 * radius

    angles = [math.tau * i / 16 for i in (2, 6, 14, 10, 0, 8, 4, 12, 1, 3, 5, 7, 9, 11, 13, 15)]
    for name, xy in at.items():
        text = ax.annotate(readable(name, 24), (points[name]["x"], points[name]["y"]), (0, 0),
                           textcoords="offset pixels", ha="center", va="center")  # fmt: skip
        size = np.array(text.get_window_extent().size) / 2 + 2
        tried = []
        for radius, angle in itertools.product((10, 20, 32, 46, 62, 80, 100), angles):
            way = np.array([math.cos(angle), math.sin(angle)])
            offset = radius * way + size * np.clip(1.5 * way, -1, 1)
            box = (*xy + offset - size, *xy + offset + size)
            tried.append((cost(box, radius), radius, tuple(offset), box))
        _, radius, offset, box = min(tried)
        boxes.append((*box, 20.0))
        text.set_position(offset)
        text.set_in_layout(False)  # else it would move the axes under the other names
        text.set_path_effects([patheffects.withStroke(linewidth=3, foreground="white")])
        if radius > 20:
            ax.annotate("", (points[name]["x"], points[name]["y"]), offset, annotation_clip=False,
                        textcoords="offset pixels", zorder=1,
                        arrowprops={"arrowstyle": "-", "color": GREY}).set_in_layout(False)  # fmt: skip


# ------------------------------------------------------------------------------------------- rings


def _pooled(shares: dict[str, float]) -> dict[str, float]:
    """Shares that add to 1, those under LEAST together as OTHERS."""
    total, pooled = sum(shares.values()), {}
    for topic, share in shares.items():
        key = topic if share >= LEAST * total else OTHERS
        pooled[key] = pooled.get(key, 0.0) + (share / total if total else 0.0)
    return pooled


def rings(panels: list[dict], path, functional=(), title: str = "") -> None:
    """Nested rings (the paper's Figure 3); panel: {"title", "inner": {topic: share}, "outer",
    "inner_label", "outer_label"}. Topics in `functional` are hatched and come last before Others."""
    title = title or "Topics by share; numbers as in the legend, shares where they fit"
    pooled = [{ring: _pooled(p[ring]) for ring in ("inner", "outer")} for p in panels]
    total: dict[str, float] = {}
    for topic, share in (x for p in pooled for ring in p.values() for x in ring.items()):
        total[topic] = total.get(topic, 0.0) + share
    order = sorted(total, key=lambda t: (t == OTHERS, t in functional, -total[t], t))
    colour = {t: RING_COLOURS[i % len(RING_COLOURS)] for i, t in enumerate(order)} | {OTHERS: GREY}
    columns = min(2, len(panels))
    height = 1.2 + 4.1 * -(-len(panels) // columns) + 0.25 * -(-len(order) // 3)
    with sheet(path, title, -(-len(panels) // columns), columns, height) as (figure, axes):
        for ax, panel, parts in itertools.zip_longest(axes, panels, pooled):
            ax.axis("off")
            for ring, radius in (("inner", 0.66), ("outer", 1.0)) if panel else ():
                _ring(ax, {t: parts[ring][t] for t in order if parts[ring].get(t)}, radius, colour,
                      functional, {t: i + 1 for i, t in enumerate(order)})  # fmt: skip
            if panel:
                notes = [_ring_note(panel, ring, functional) for ring in ("inner", "outer")]
                ax.set_title("\n".join([readable(panel["title"], 46), *notes]))
                ax.set(xlim=(-1.03, 1.03), ylim=(-1.03, 1.03), aspect="equal")
        keys = [patches.Patch(facecolor=colour[t], edgecolor="white", hatchcolor="black",
                              hatch="///" * (t in functional)) for t in order]  # fmt: skip
        labels = [f"{i}  {readable(t, 26, 1)}" for i, t in enumerate(order, 1)]
        if set(order) & set(functional):
            keys.append(patches.Patch(facecolor="white", edgecolor="black", hatch="///"))
            labels.append("hatched: functional")
        _legend(figure, keys, labels)


def _ring(ax, shares: dict[str, float], radius: float, colour: dict, functional, number: dict):
    """One ring, clockwise from the top; share written where the wedge has room for two lines."""
    angle = 90.0
    for topic, share in shares.items():
        wedge = patches.Wedge((0, 0), radius, angle - 360 * share, angle, width=0.33, linewidth=1,
                              facecolor=colour[topic], edgecolor="white", hatchcolor="black",
                              hatch="///" * (topic in functional))  # fmt: skip
        ax.add_patch(wedge)
        middle = math.radians(angle - 180 * share)
        text = f"{number[topic]}\n{share:.0%}" if share * radius > 0.05 else f"{number[topic]}"
        ax.text(*[(radius - 0.165) * f(middle) for f in (math.cos, math.sin)], text, fontsize=9,
                ha="center", va="center", linespacing=1.0, path_effects=[
                    patheffects.withStroke(linewidth=2.5, foreground="white")])  # fmt: skip
        angle -= 360 * share


def _ring_note(panel: dict, ring: str, functional) -> str:
    """Which ring is what, and how much of it is functional before small topics are pooled."""
    note = f"{ring}: {readable(panel.get(f'{ring}_label', ring), 30, 1)}"
    total = sum(panel[ring].values())
    if functional and total:
        share = sum(v for t, v in panel[ring].items() if t in functional) / total
        note += f" ({share:.0%} functional)"
    return note


# ------------------------------------------------------------------------------------------ curves


def last_run(rows: list[dict]) -> dict[tuple, list[dict]]:
    """(stage, ranker or round, "held_out" or "loss") -> its rows, of the last run alone.

    A step that does not go on is a rerun: it replaces the rows of its part and all logged after.
    """
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        at = row.get("step", row.get("epoch"))
        if at is None or row.get("stage") not in ("rid", "ranker", "sit", "dpo"):
            continue
        kind = "loss" if "loss" in row else "held_out"
        key = (row["stage"], row.get("ranker", row.get("round", "")), kind)
        before = found.get(key, [])
        last = before[-1].get("step", before[-1].get("epoch")) if before else -1
        if row["stage"] == "sit" and at == last:  # one line a batch; its rate rises once, then falls
            rates = before[-1]["learning_rate"], row["learning_rate"]
            again = rates[0] < rates[1] and rates[0] < max(r["learning_rate"] for r in before)
        else:
            again = at < last or (at == last and row["stage"] != "sit")
        if again:
            names = list(found)
            for name in names[names.index(key) :]:
                if name[0] == row["stage"]:
                    del found[name]
        found.setdefault(key, []).append(row)
    return found


def curves(rows: list[dict], path, title: str = "") -> None:
    """Rows of a run's metrics.jsonl: losses and held-out figures of all stages that it has."""
    found = last_run(rows)
    start, offset = {}, 0  # DPO's rounds one after another on one axis
    for stage, part, kind in found:
        if stage == "dpo" and kind == "loss":
            start[part], offset = offset, offset + found[stage, part, kind][-1]["step"]
    rounds, steps = "DPO step, rounds one after another", len(found.get(("sit", "", "loss"), []))
    epochs = found["sit", "", "loss"][-1]["epoch"] + 1 if steps else 0
    panels = [  # stage, field, title, x, y, a value to compare with
        ("rid", "loss", "RID: contrastive loss", "epoch", "loss, nats", None),
        ("rid", "valid_auc", "RID: held-out AUC (dotted: chance)", "epoch", "AUC", 0.5),
        ("ranker", "held_out_loss", "Rankers: held-out loss", "epoch", "loss, nats", None),
        ("sit", "loss", "SIT: loss", f"step, {epochs} epochs", "loss, nats a token", None),
        ("dpo", "loss", "DPO: loss (dotted: ln 2, no preference)", rounds, "loss, nats", math.log(2)),
        ("dpo", "margin", "DPO: margin over the reference", rounds, "log-prob., nats", 0.0),
        ("dpo", "chosen_logp_change", "DPO: change of the chosen lists' log-probability", rounds,
         "log-prob., nats", 0.0),
        ("dpo", "held_out", "DPO: utility and diversity of held-out users", rounds,
         "start of the round = 1", 1.0),
    ]  # fmt: skip
    names = {"train": "trains the generator", "judge": "judges (held out)"}

    def parts(stage: str, field: str) -> list[tuple[str, list, list]]:
        kind, out = "held_out" if field == "held_out" else "loss", []
        for (_, part, _), logged in ((k, v) for k, v in found.items() if k[::2] == (stage, kind)):
            kept = [(i, r) for i, r in enumerate(logged, 1) if r.get(field) is not None]
            x = [i if stage == "sit" else r["step"] + start.get(part, 0) if "step" in r
                 else r["epoch"] + 1 for i, r in kept]  # fmt: skip
            out += [(part, x, [r[field] for _, r in kept])] if kept else []
        return out

    drawn = [(p, parts(*p[:2])) for p in panels if parts(*p[:2])]
    if not drawn:
        raise ValueError("curves: no epoch or step of rid, ranker, sit or dpo in these rows")
    title = title or "Training curves (long ones: thin each step, thick a running mean)"
    columns = min(2, len(drawn))
    height = 0.9 + 2.6 * -(-len(drawn) // columns)
    with sheet(path, title, -(-len(drawn) // columns), columns, height) as (figure, axes):
        for ax, item in itertools.zip_longest(axes, drawn):
            if item is None:
                ax.axis("off")
                continue
            (stage, _, name, xlabel, ylabel, level), series = item
            for part, x, y in series:
                _trace(ax, list(start).index(part) if part in start else part == "judge", x, y,
                       readable(names.get(part, part)))  # fmt: skip
            if level is not None:
                ax.axhline(level, color="black", linestyle=":", linewidth=1)
            if stage == "ranker":
                ax.legend()
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            _label(ax, xlabel, ylabel, name)
        shown = [a for a, (p, _) in zip(axes, drawn, strict=False) if p[0] == "dpo"]
        if shown:
            _legend(figure, *shown[0].get_legend_handles_labels())


def _trace(ax, i: int, x: list, y: list, label: str) -> None:
    """A curve; more than 40 points also as a running mean over a twentieth of them."""
    window, thick = np.ones(max(1, len(y) // 20) if len(y) > 40 else 1), y
    if len(window) > 1:
        ax.plot(x, y, color=COLOURS[i % 7], linewidth=0.6, alpha=0.4)
        sums = (np.convolve(v, window, "same") for v in (y, np.ones(len(y))))
        thick = np.divide(*sums)
    ax.plot(x, thick, color=COLOURS[i % 7], linestyle=DASHES[i % 7], marker=MARKERS[i % 7],
            markersize=4, markevery=max(1, len(y) // 8), label=label)  # fmt: skip
