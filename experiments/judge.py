"""What became of an ablation's runs: results, whether what the paper says came out, table and plot."""

import json
import math
import signal
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from fastdino.config import Config, from_dict, resolved
from fastdino.diagnostics import Doctor
from fastdino.files import printable, write_atomically
from fastdino.monitor import read_metrics

SOURCES = {  # of what the paper says, by group of variants
    **{"teacher": "figure 6", "collapse": "figure 7", "multi-crop": "tables 7 and 8", "patch": "figure 5"},
    **{"teacher-temp": "appendix D", "centre": "appendix D"},
}
SWEEPS = ("teacher-temp", "centre", "prototypes", "batch", "patch")
COLLAPSE = ("collapsed to uniform", "collapsed to one dimension")
SIGNS = (*COLLAPSE, "the teacher equals the student", "logits grow", "fp16 overflowed")  # the doctor's
JUDGED = {True: "as in the paper", False: "NOT as in the paper", None: "undecided"}
COLUMNS = {"entropy": ".2f", "prototypes_used": ".0f", "feature_rank": ".1f", "images_per_s": ".0f"}
LEGEND = """
Means over seeds ± standard deviations. k-NN: the teacher's, k = 20. to base: the difference of the means ±
the standard deviation of one seed's difference, called spread below. untrained: k-NN of the network before
training. entropy: the teacher's, as a share of ln K. at the end: what the doctor sees in the last lines of
metrics.jsonl.
"""

Result = dict[str, Any]
Results = Mapping[
    str, Sequence[Result]
]  # of the seeds of each configuration, by its flags; the base has none


@dataclass(frozen=True)
class Variant:
    """Flags of fastdino-train under a name, and the question (`group`) that they answer.

    paper: what it says where that is clear-cut: learns, collapses, or worse or better than the base.
    """

    group: str
    name: str
    flags: str = ""
    paper: str = ""

    @property
    def seeds(self) -> int:
        """Three where it matters most what the paper says, two in the sweeps of a number."""
        return 2 if self.group in SWEEPS else 3

    @property
    def statement(self) -> str:
        """What the paper says, and where."""
        return f"{self.paper} ({SOURCES[self.group]})" if self.paper else ""


def result_of(folder: Path, code: int, log: str) -> Result:
    """What a run that ended with exit status `code` and printed `log` left in `folder`.

    `at_end` are those of SIGNS that the doctor sees in the last lines of metrics.jsonl: a network may look
    collapsed for a while and recover. `entropy` is a share of ln K.
    """
    state = "trained" if code == 0 else "diverged" if "non-finite steps in a row" in log else "failed"
    result: Result = {"state": state, "error": "", "at_end": []}
    if state == "failed":
        lines = [line for line in log.splitlines() if line.strip()] or ["it printed nothing"]
        result["error"] = next((x for x in reversed(lines) if x.startswith("fastdino-")), lines[-1])
        if code < 0:
            result["error"] = f"killed by {signal.Signals(-code).name}: if memory ran out, lower --jobs"
    metrics = [line for line in read_metrics(folder) if "images_per_s" in line]
    if not metrics:
        return result
    config = from_dict(Config, json.loads((folder / "config.json").read_text()))
    doctor, said, last = Doctor(config), list[str](), metrics[-1]
    for line, following in list(pairwise([*metrics, {"epoch": math.inf}]))[-Doctor.PATIENCE :]:
        values = {name: value for name, value in line.items() if value is not None}
        said += doctor.examine(line["step"], values, following["epoch"] > line["epoch"])
    result |= {name: last.get(name) for name in COLUMNS}
    if (entropy := last.get("teacher_entropy")) is not None:
        result["entropy"] = entropy / math.log(max(2, resolved(config.model.out_dim)))
    if (path := folder / "knn.json").exists():
        knn = json.loads(path.read_text())
        result |= {"knn": knn["teacher"]["20"], "untrained": knn["untrained network"]["20"]}
    return result | {"at_end": [sign for sign in SIGNS if any(sign in sentence for sentence in said)]}


def values_of(results: Sequence[Result], name: str) -> list[float]:
    """Those of the runs that trained to the end and have it."""
    return [r[name] for r in results if r["state"] == "trained" and r.get(name) is not None]


def mean_of(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, NaN of no and of a single value."""
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """How far the mean of `a` is above that of `b`, and the standard deviation of one seed's difference."""
    (mean_a, deviation_a), (mean_b, deviation_b) = mean_of(a), mean_of(b)
    return mean_a - mean_b, math.hypot(deviation_a, deviation_b)


def judge(paper: str, runs: Sequence[Result], base: Sequence[Result]) -> tuple[bool | None, str]:
    """Whether what the paper says came out, None where that cannot be told, and what came out.

    worse, better: k-NN differs from the base's by more than the spread over seeds. learns: it is above that
    of the network before training by more, and no seed ends with one of the doctor's COLLAPSE. collapses: it
    is not, or every seed ends so.
    """
    knn, relative = values_of(runs, "knn"), paper in ("worse", "better")
    above, spread = difference(knn, values_of(base, "knn") if relative else values_of(runs, "untrained"))
    told = f"k-NN {above:+.1f} to {'the base' if relative else 'untrained'}, spread {spread:.1f}"
    unknown = ("one seed has no spread" if knn else "no k-NN") if math.isnan(above + spread) else ""
    trained = [r for r in runs if r["state"] == "trained"]
    collapsed = [[sign for sign in COLLAPSE if sign in r["at_end"]] for r in trained]
    if relative and unknown:
        return None, unknown
    if relative:
        outcome = "worse" if above < -spread else "better" if above > spread else "no different"
    elif diverged := sum(r["state"] == "diverged" for r in runs):
        outcome, told = "diverges", f"{diverged} of {len(runs)} seeds"
    elif not trained:
        return None, "no run has ended"
    elif all(collapsed):
        outcome, told = "collapses", ", ".join(dict.fromkeys(chain(*collapsed)))
    elif unknown:
        return None, unknown
    elif any(collapsed) and above > spread:
        outcome, told = "collapses in part", f"{sum(map(bool, collapsed))} of {len(trained)} seeds"
    else:
        outcome = "learns" if above > spread else "collapses"
    return outcome == paper, f"{outcome}: {told}"


def shown(mean: float, deviation: float = math.nan, form: str = ".1f") -> str:
    """A number and its spread; empty if there is none."""
    spread = "" if math.isnan(deviation) else f" ± {deviation:.1f}"
    return "" if math.isnan(mean) else f"{mean:{form}}{spread}"


def cells(v: Variant, results: Results) -> dict[str, str]:
    """A line of the table, by column."""
    runs, base = results[v.flags], values_of(results[""], "knn")
    knn = values_of(runs, "knn")
    ends = Counter(sign for r in runs for sign in r["at_end"] if r["state"] == "trained")
    ends.update(f"{r['state']} {r['error']}".strip() for r in runs if r["state"] != "trained")
    return {
        "variant": v.name if v.flags or v.name == "base" else f"{v.name} (base)",
        "k-NN, %": shown(*mean_of(knn)),
        "to base": shown(*difference(knn, base), form="+.1f") if v.flags else "",
        "untrained": shown(*mean_of(values_of(runs, "untrained"))),
        **{name: shown(mean_of(values_of(runs, name))[0], form=form) for name, form in COLUMNS.items()},
        "at the end": ", ".join(f"{sign} ({n} of {len(runs)})" for sign, n in ends.items()),
        "flags": v.flags,
    }


def report(variants: Sequence[Variant], results: Results, heading: str) -> str:
    """The tables, one a group, and whether what the paper says came out, as Markdown."""
    lines = ["# Ablation", "", heading, LEGEND]
    for group in dict.fromkeys(v.group for v in variants):
        table = [cells(v, results) for v in variants if v.group == group]
        table = [{c: text.replace("|", "\\|") for c, text in line.items()} for line in table]
        widths = {c: max(len(c), *(len(line[c]) for line in table)) for c in table[0]}
        table = [{c: c for c in widths}, {c: "-" * n for c, n in widths.items()}, *table]
        rows = (" | ".join(text.ljust(widths[c]) for c, text in line.items()) for line in table)
        lines += [f"## {group}", "", *(f"| {row} |" for row in rows), ""]
    # What is said of several variants with the same runs is one statement.
    stated = {(v.flags, v.paper): v for v in reversed(variants) if v.paper}.values()
    judged = [(v, *judge(v.paper, results[v.flags], results[""])) for v in variants if v in stated]
    counts = Counter(came_out for _, came_out, _ in judged)
    lines.append("What the paper says: " + ", ".join(f"{counts[k]} {JUDGED[k]}" for k in JUDGED if counts[k]))
    lines += ["", *(f"- {JUDGED[k]}: {v.name} {v.statement}; here {told}" for v, k, told in judged)]
    return printable("\n".join(lines if judged else lines[:-2])) + "\n"


def plot(variants: Sequence[Variant], results: Results, path: Path) -> None:
    """Draw the k-NN of each seed as a dot, or a cross if it ended collapsed, and each mean as a bar.

    A line stands at the base's mean, a grey bar at that of a variant's network before training.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display is asked for
    from matplotlib.figure import Figure

    groups = dict.fromkeys(v.group for v in variants)
    figure = Figure(figsize=(11, 1.2 + 0.23 * (len(variants) + 1.5 * len(groups))), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    right = axis.get_yaxis_transform()  # x in shares of the axis, y in rows
    axis.axvline(mean_of(values_of(results[""], "knn"))[0], color="tab:blue", linewidth=1, label="base, mean")
    y, names = 0.0, {}
    for group in groups:
        y += 1.5
        axis.text(-0.01, y, group, transform=right, weight="bold", va="center", ha="right")
        axis.axhline(y - 0.75, color="0.85", linewidth=0.8)
        for v in (v for v in variants if v.group == group):
            y += 1
            names[y], runs = cells(v, results)["variant"], results[v.flags]
            fallen = [r for r in runs if set(COLLAPSE) & set(r["at_end"])]
            for seeds, marker in (([r for r in runs if r not in fallen], "o"), (fallen, "x")):
                x, color = values_of(seeds, "knn"), "tab:blue" if marker == "o" else "tab:red"
                axis.plot(x, [y] * len(x), marker, color=color, markersize=5, alpha=0.7)
            axis.plot(mean_of(values_of(runs, "untrained"))[0], y, "|", color="grey", markersize=10)
            mean = mean_of(values_of(runs, "knn"))[0]
            axis.plot(mean, y, "|", color="black", markersize=13, markeredgewidth=2)
            states = Counter(r["state"] for r in runs if r["state"] != "trained")
            notes, colour = [f"{n} {state}" for state, n in states.items()], "black"
            if v.paper:
                came_out = judge(v.paper, runs, results[""])[0]
                notes.append(f"{v.paper}: {JUDGED[came_out]}")
                colour = {True: "tab:green", False: "tab:red", None: "grey"}[came_out]
            axis.text(1.01, y, ", ".join(notes), transform=right, va="center", color=colour, fontsize=9)
    axis.plot([], [], "o", color="tab:blue", label="a seed")
    axis.plot([], [], "x", color="tab:red", label="a seed that ended collapsed")
    axis.plot([], [], "|", color="grey", label="the network before training")
    axis.set_yticks([*names], [*names.values()])
    axis.set_ylim(y + 1, 0.5)
    axis.set_xlabel("k-NN (k = 20) in %")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=9)
    write_atomically(path, lambda tmp: figure.savefig(tmp, format="png", dpi=110))
