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

# Of what the paper says, by group of variants.
SOURCES = {"teacher": "figure 6", "collapse": "figure 7", "multi-crop": "tables 7 and 8", "patch": "figure 5"}
SOURCES |= dict.fromkeys(("teacher-temp", "centre"), "appendix D")
SWEEPS = ("teacher-temp", "centre", "prototypes", "batch", "patch")
COLLAPSE = ("collapsed to uniform", "collapsed to one dimension")
SIGNS = (*COLLAPSE, "the teacher equals the student", "logits grow", "fp16 overflowed")  # the doctor's
JUDGED = {True: "as in the paper", False: "NOT as in the paper", None: "undecided"}
MARKS = {"o": ("tab:blue", "a seed"), "x": ("tab:red", "a seed that ended collapsed")}
MARKS["|"] = "grey", "the network before training"
COLUMNS = {"entropy": ".2f", "prototypes_used": ".0f", "feature_rank": ".1f", "images_per_s": ".0f"}
LEGEND = """
Means over seeds ± standard deviations. k-NN: the teacher's, k = 20. to base: the difference of the means ±
the standard deviation of one seed's difference, called spread below. untrained: k-NN of the network before
training. entropy: the teacher's, as a share of ln K. at the end: what the doctor sees in the last lines of
metrics.jsonl.
"""

Result = dict[str, Any]
Results = Mapping[str, Sequence[Result]]  # of the seeds of a configuration, by its flags; the base has none


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
        rows = [[*table[0]], ["---"] * len(table[0]), *([*line.values()] for line in table)]
        lines += [f"## {group}", ""]
        lines += ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows] + [""]
    # What is said of several variants with the same runs is one statement.
    stated = {(v.flags, v.paper): v for v in reversed(variants) if v.paper}.values()
    judged = [(v, *judge(v.paper, results[v.flags], results[""])) for v in variants if v in stated]
    if counts := Counter(came_out for _, came_out, _ in judged):
        found = ", ".join(f"{counts[k]} {JUDGED[k]}" for k in JUDGED if counts[k])
        lines += [f"What the paper says: {found}", ""]
        lines += [f"- {JUDGED[k]}: {v.name} {v.statement}; here {told}" for v, k, told in judged]
    return printable("\n".join(lines)) + "\n"


def plot(variants: Sequence[Variant], results: Results, path: Path) -> None:
    """The k-NN of each seed as a dot, or a cross if it ended collapsed; grey bars: before training.

    A line stands at the base's mean.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.5 + 0.25 * len(variants)), layout="constrained")
    axis = figure.subplots()
    axis.axvline(mean_of(values_of(results[""], "knn"))[0], linewidth=1, label="base, mean")
    for y, v in enumerate(variants):
        runs = results[v.flags]
        fallen = [r for r in runs if set(COLLAPSE) & set(r["at_end"])]
        healthy = [r for r in runs if r not in fallen]
        for seeds, mark, name in ((healthy, "o", "knn"), (fallen, "x", "knn"), (runs, "|", "untrained")):
            x = values_of(seeds, name)
            axis.plot(x, [y] * len(x), mark, color=MARKS[mark][0], alpha=0.7)
        states = Counter(r["state"] for r in runs if r["state"] != "trained")
        said = [f"{n} {state}" for state, n in states.items()]
        said += [f"{v.paper}: {JUDGED[judge(v.paper, runs, results[''])[0]]}"] if v.paper else []
        axis.text(1.01, y, ", ".join(said), transform=axis.get_yaxis_transform(), va="center", fontsize=9)
    for mark, (colour, what) in MARKS.items():
        axis.plot([], [], mark, color=colour, label=what)
    axis.set_yticks(range(len(variants)), [f"{v.group}: {cells(v, results)['variant']}" for v in variants])
    axis.invert_yaxis()
    axis.set_xlabel("k-NN (k = 20) in %")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=9)
    write_atomically(path, lambda tmp: figure.savefig(tmp, format="png", dpi=110))
