"""What became of an ablation's runs: results, whether what the paper says came out, table and plot."""

import json
import math
import shlex
import signal
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastdino.config import Config, from_dict, number
from fastdino.data.sources import printable
from fastdino.diagnostics import Doctor
from fastdino.files import write_atomically
from fastdino.monitor import read_metrics

COLLAPSE = ("collapsed to uniform", "collapsed to one dimension")
SIGNS = (*COLLAPSE, "the teacher equals the student", "logits grow", "fp16 overflowed")  # the doctor's
SCORES = {"knn": "k-NN, %", "feature_rank": "feature rank"}  # by the first of them that a run has

Result = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """Flags of fastdino-train under a name, and the question (`group`) that they answer.

    paper: learns, collapses, or worse or better than the base, where the paper is clear-cut; source: where.
    """

    group: str
    name: str
    flags: tuple[str, ...] = ()
    paper: str = ""
    source: str = ""
    seeds: int = 3


@dataclass(frozen=True)
class Row:
    """A variant, the results of its seeds and of the base's, and each seed's k-NN before training."""

    variant: Variant
    results: list[Result]
    base: list[Result]
    untrained: list[float]

    @property
    def is_base(self) -> bool:
        """Whether it has the base's configuration."""
        return self.results is self.base

    @property
    def name(self) -> str:
        """The variant's, with a mark on the base."""
        own = self.variant.name
        return f"{own} (base)" if self.is_base and own != "base" else own


def result_of(folder: Path, code: int, said: str) -> Result:
    """What a run that ended with exit status `code` left in `folder`; `said` is what it printed.

    `at_end` are those of SIGNS that the doctor sees in the last lines of metrics.jsonl: a network may look
    collapsed for a while and recover. `entropy` is the teacher's as a share of ln K, `seconds` are those of
    the updates, without start and k-NN.
    """
    state = "trained" if code == 0 else "diverged" if "non-finite steps in a row" in said else "failed"
    result: Result = {"state": state, "error": "", "at_end": [], "seconds": 0.0}
    if state == "failed":
        lines = [line for line in said.splitlines() if line.strip()] or ["it said nothing"]
        result["error"] = next((x for x in reversed(lines) if x.startswith("fastdino-")), lines[-1])
        if code < 0:
            result["error"] = f"killed by {signal.Signals(-code).name}: if memory ran out, lower --jobs"
    metrics = [line for line in read_metrics(folder) if "images_per_s" in line]
    if not metrics:
        return result
    config = from_dict(Config, json.loads((folder / "config.json").read_text()))
    doctor, sentences, seconds, step = Doctor(config), list[str](), 0.0, 0
    for line, following in zip(metrics, [*metrics[1:], None], strict=True):
        seconds += (line["step"] - step) * config.optim.batch_size / line["images_per_s"]
        step = line["step"]
        if line in metrics[-Doctor.PATIENCE :]:
            values = {name: value for name, value in line.items() if value is not None}
            last_of_epoch = following is None or following["epoch"] > line["epoch"]
            sentences += doctor.examine(step, values, last_of_epoch)
    entropy = metrics[-1].get("teacher_entropy")
    names = ("loss", "prototypes_used", "feature_rank", "feature_std", "images_per_s")
    return result | {
        "step": step,
        "seconds": seconds,
        "knn": metrics[-1].get("knn_20"),
        **{name: metrics[-1].get(name) for name in names},
        "entropy": None if entropy is None else entropy / math.log(max(2, number(config.model.out_dim))),
        "at_end": [sign for sign in SIGNS if any(sign in sentence for sentence in sentences)],
        "said": [line for line in said.splitlines() if any(sign in line for sign in SIGNS)],
    }


def values_of(results: Sequence[Result], name: str) -> list[float]:
    """Those of the runs that trained to the end and have it."""
    return [r[name] for r in results if r["state"] == "trained" and r.get(name) is not None]


def mean_of(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, NaN of no and of a single value."""
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def gain(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """How far the mean of `a` is above that of `b`, and the standard deviation of one seed's difference."""
    (mean_a, deviation_a), (mean_b, deviation_b) = mean_of(a), mean_of(b)
    return mean_a - mean_b, math.hypot(deviation_a, deviation_b)


def outcome(results: Sequence[Result], untrained: Sequence[float]) -> tuple[str, str]:
    """What became of a variant, and by what it is told; the first is empty where it cannot be told.

    collapses: every seed ends with one of the doctor's COLLAPSE, or k-NN is not above that of the network
    before training by more than the spread over seeds. learns: it is, and no seed ends so.
    """
    trained = [r for r in results if r["state"] == "trained"]
    if diverged := sum(r["state"] == "diverged" for r in results):
        return "diverges", f"{diverged} of {len(results)} seeds"
    if not trained:
        return "", "no run has ended"
    signs = [sign for r in trained for sign in r["at_end"] if sign in COLLAPSE]
    fallen = sum(bool(set(COLLAPSE) & set(r["at_end"])) for r in trained)
    if fallen == len(trained):
        return "collapses", ", ".join(dict.fromkeys(signs))
    knn = values_of(trained, "knn")
    above, spread = gain(knn, untrained)
    if math.isnan(above + spread):
        return "", "one seed has no spread" if knn else "no k-NN"
    told = f"k-NN {above:+.1f} to untrained, spread {spread:.1f}"
    if above <= spread:
        return "collapses", told
    return ("collapses in part", f"{fallen} of {len(trained)} seeds") if fallen else ("learns", told)


def verdict(row: Row) -> tuple[bool | None, str]:
    """Whether what the paper says came out, None where that cannot be told, and what did."""
    if row.variant.paper in ("worse", "better"):
        knn = values_of(row.results, "knn")
        above, spread = gain(knn, values_of(row.base, "knn"))
        if math.isnan(above + spread):
            return None, "one seed has no spread" if knn else "no k-NN"
        came = "worse" if above < -spread else "better" if above > spread else "no different"
        return came == row.variant.paper, f"{came}: k-NN {above:+.1f} to the base, spread {spread:.1f}"
    came, told = outcome(row.results, row.untrained)
    return (came == row.variant.paper if came else None), f"{came}: {told}" if came else told


CAME_OUT = {True: "as in the paper", False: "NOT as in the paper", None: "undecided"}


def shown(mean: float, deviation: float = math.nan, form: str = ".1f") -> str:
    """A number and its spread; empty if there is none."""
    if math.isnan(mean):
        return ""
    return f"{mean:{form}}" + ("" if math.isnan(deviation) else f" ± {deviation:.1f}")


def score_of(rows: Sequence[Row]) -> str:
    """What the runs are compared by."""
    return next((s for s in SCORES if any(values_of(row.results, s) for row in rows)), "knn")


def cells(row: Row, score: str) -> dict[str, str]:
    """A line of the table, by column."""
    v, results, its = row.variant, row.results, values_of(row.results, score)
    ends = Counter(sign for r in results for sign in r["at_end"] if r["state"] == "trained")
    ends.update(f"{r['state']} {r['error']}".strip() for r in results if r["state"] != "trained")
    line = {
        "variant": row.name,
        SCORES[score]: shown(*mean_of(its)),
        "to base": "" if row.is_base else shown(*gain(its, values_of(row.base, score)), form="+.1f"),
        "untrained": shown(*mean_of(row.untrained)),
    }
    for column, name, form in (
        ("entropy", "entropy", ".2f"),
        ("prototypes", "prototypes_used", ".0f"),
        ("seconds", "seconds", ".0f"),
    ):
        line[column] = shown(mean_of(values_of(results, name))[0], form=form)
    return line | {
        "at the end": ", ".join(f"{sign} ({n} of {len(results)})" for sign, n in ends.items()),
        "the paper": f"{v.paper} ({v.source}): {CAME_OUT[verdict(row)[0]]}" if v.paper else "",
    }


def statements(rows: Sequence[Row]) -> list[str]:
    """How many of the paper's statements came out, and on each whether it did."""
    lines, came, said = list[str](), Counter[bool | None](), set[tuple[int, str]]()
    for row in rows:
        if not row.variant.paper or (id(row.results), row.variant.paper) in said:
            continue  # or said of another variant with the same runs
        said.add((id(row.results), row.variant.paper))
        v, (came_out, told) = row.variant, verdict(row)
        came[came_out] += 1
        lines.append(f"- {CAME_OUT[came_out]}: {v.name} {v.paper} ({v.source}); here {told}")
    counts = ", ".join(f"{came[key]} {text}" for key, text in CAME_OUT.items() if came[key])
    return [f"What the paper says: {counts}", "", *lines] if lines else []


def groups_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by the question that they answer."""
    return {
        g: [row for row in rows if row.variant.group == g]
        for g in dict.fromkeys(r.variant.group for r in rows)
    }


def show(rows: Sequence[Row]) -> None:
    """Print the tables and what came out."""
    console, score = Console(highlight=False), score_of(rows)
    if not console.is_terminal:
        console.width = 130
    lines = [cells(row, score) for row in rows]
    columns = [c for c in lines[0] if c != "the paper" and any(line[c] for line in lines)]
    table = Table()
    for c in columns:
        words = c in ("variant", "at the end")
        table.add_column(c, justify="left" if words else "right", no_wrap=c != "at the end")
    for row, line, following in zip(rows, lines, [*rows[1:], None], strict=True):
        last = following is None or following.variant.group != row.variant.group
        table.add_row(*(Text(printable(line[c])) for c in columns), end_section=last)
    console.print(table)
    for text in statements(rows):
        console.print(printable(text), markup=False, soft_wrap=True)


LEGEND = """
Means over seeds ± standard deviations. k-NN: the teacher's, k = 20. to base: the difference of the means ±
the standard deviation of one seed's difference, called spread below. untrained: k-NN of the network before
training. entropy: the teacher's, as a share of ln K; prototypes: as many as a batch uses; both at the last
update. seconds: of the updates. at the end: what the doctor sees in the last lines of metrics.jsonl."""


def write_markdown(rows: Sequence[Row], heading: Sequence[str], path: Path) -> None:
    """The tables as Markdown below the lines of `heading`."""
    lines, score = [*heading, LEGEND], score_of(rows)
    for group, its in groups_of(rows).items():
        table = [cells(row, score) | {"flags": shlex.join(row.variant.flags)} for row in its]
        lines += ["", f"## {group}", "", "| " + " | ".join(table[0]) + " |", "|" + "---|" * len(table[0])]
        lines += ["| " + " | ".join(x.replace("|", "\\|") for x in line.values()) + " |" for line in table]
    lines += ["", *statements(rows)]
    write_atomically(path, lambda beside: beside.write_text(printable("\n".join(lines)) + "\n"))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw each seed as a dot, or a cross if it ended collapsed, each mean as a bar, one group below another.

    A line stands at the base's mean, a dotted one at that of its network before training, a grey bar at that
    of another network before training.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display is asked for
    from matplotlib.figure import Figure

    score, groups = score_of(rows), groups_of(rows)
    lines = len(rows) + 1.5 * len(groups)
    figure = Figure(figsize=(11, 1.2 + 0.23 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    right = axis.get_yaxis_transform()  # x in shares of the axis, y in rows
    start = next((row.untrained for row in rows if row.is_base), [])
    axis.axvline(
        mean_of(values_of(rows[0].base, score))[0], color="tab:blue", linewidth=1, label="base, mean"
    )
    if score == "knn":
        axis.axvline(mean_of(start)[0], color="grey", linestyle=":", label="the network before training")
    y, names = 0.0, {}
    for group, its in groups.items():
        y += 1.5
        axis.text(-0.01, y, group, transform=right, weight="bold", va="center", ha="right")
        axis.axhline(y - 0.75, color="0.85", linewidth=0.8)
        for row in its:
            y += 1
            names[y] = row.name
            ends = {"o": [], "x": []}  # type: dict[str, list[float]]
            for r in row.results:
                ends["x" if set(COLLAPSE) & set(r["at_end"]) else "o"] += values_of([r], score)
            for marker, color in (("o", "tab:blue"), ("x", "tab:red")):
                axis.plot(ends[marker], [y] * len(ends[marker]), marker, color=color, markersize=5, alpha=0.7)
            mean = mean_of(ends["o"] + ends["x"])[0]
            axis.plot(mean, y, "|", color="black", markersize=13, markeredgewidth=2)
            if score == "knn" and row.untrained != start[: len(row.untrained)]:
                axis.plot(mean_of(row.untrained)[0], y, "|", color="grey", markersize=10)
            states = Counter(r["state"] for r in row.results if r["state"] != "trained")
            notes, colour = [f"{n} {state}" for state, n in states.items()], "black"
            if row.variant.paper:
                came = verdict(row)[0]
                notes.append(f"{row.variant.paper}: {CAME_OUT[came]}")
                colour = {True: "tab:green", False: "tab:red", None: "grey"}[came]
            axis.text(1.01, y, ", ".join(notes), transform=right, va="center", color=colour, fontsize=9)
    axis.plot([], [], "o", color="tab:blue", label="a seed")
    axis.plot([], [], "x", color="tab:red", label="a seed that ended collapsed")
    axis.set_yticks([*names], [*names.values()])
    axis.set_ylim(y + 1, 0.5)
    axis.set_xlabel("k-NN (k = 20) in %" if score == "knn" else SCORES[score])
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=9)
    write_atomically(path, lambda beside: figure.savefig(beside, format="png", dpi=110))
