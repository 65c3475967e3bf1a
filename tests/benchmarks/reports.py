"""How long a large report takes to be written, read, shown and compared, and how much memory.

Run by hand: python tests/benchmarks/reports.py [--ops 100000] [--rounds 3]. The report is the renderers' sample with
that many ops in one phase and in its graph. Ratios are of medians measured in turn in one run, so the machine's speed
cancels out: over `json.loads`, or `json.dumps`, of the same text. Goals at 100,000 ops: reading <= 1.0, writing <= 0.3,
each format and a comparison <= 0.5; peak memory of reading <= 1.0 of what `json.loads` needs, of all else <= 1.5.
"""

import argparse
import json
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fxroof.analyzer.baseline import applied, entries, to_text
from fxroof.analyzer.diff import diff
from fxroof.analyzer.graph import Graph, Op, Role, Storage, Tensor, TensorRef
from fxroof.analyzer.render import _diff
from fxroof.analyzer.render.registry import Options, formats, render
from fxroof.analyzer.report import Report, from_json, to_json
from render.sample import op, report, retraced, summed


def many(count: int, *, lines: int = 900, moved: int = 1_000_000) -> Report:
    """A report whose decode phase has that many ops, in a graph of as many; each moves so many bytes."""
    names = [f"mul_{i}" for i in range(count)]
    ops = tuple(
        op(name, "aten.mul.Tensor", module=f"blocks.{i}.part", line=1 + i % lines, vector=1e6, read=moved)
        for i, name in enumerate(names)
    )
    original = report()
    run = replace(original.runs[0], phases=(summed("decode", 2, ops),))
    return replace(retraced(original, graphs={"decode": _graph(names)}), runs=(run,))


def _graph(names: list[str]) -> Graph:
    """A chain: each op doubles what the one before it made."""
    storages = tuple(Storage(nbytes=1024, role=Role.ACTIVATION, name=name) for name in ("input", *names))
    tensors = tuple(Tensor(storage=i, dtype="bfloat16", shape=(512,), stride=(1,)) for i in range(len(storages)))
    ops = tuple(
        Op(name=name, target="aten.mul.Tensor", args={"self": TensorRef(tensor=i), "other": 2.0}, outputs=(i + 1,))
        for i, name in enumerate(names)
    )
    return Graph(
        phase="decode", storages=storages, tensors=tensors, ops=ops, inputs=(0,), outputs=(len(names),), tokens=2
    )


def tasks(given: Report) -> dict[str, tuple[Callable[[], object], str]]:
    """What is measured, each with what it is measured against."""
    text = to_json(given)
    value = json.loads(text)
    other = many(len(given.runs[0].phases[0].ops), moved=1_100_000)
    compared = diff(given, other)
    known = entries(given)
    shown = {name: (lambda name=name: render(given, name, Options()), "json.loads") for name in formats()}
    return {
        "json.loads": (lambda: json.loads(text), "json.loads"),
        "json.dumps": (lambda: json.dumps(value, indent=1), "json.dumps"),
        "read": (lambda: from_json(text), "json.loads"),
        "write": (lambda: to_json(given), "json.dumps"),
        **shown,
        "diff": (lambda: diff(given, other), "json.loads"),
        "diff terminal": (lambda: _diff.terminal(compared, Options()), "json.loads"),
        "diff markdown": (lambda: _diff.markdown(compared), "json.loads"),
        "diff json": (lambda: _diff.as_json(compared), "json.loads"),
        "baseline": (lambda: applied(given, known) and to_text(known), "json.loads"),
    }


def measure(count: int, rounds: int) -> None:
    """Seconds and peak memory of each task, and their ratios."""
    found = tasks(many(count))
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, (task, _) in found.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    peaks = {name: _peak(task) for name, (task, _) in found.items()}
    for name, (_, against) in found.items():
        took, theirs = statistics.median(seconds[name]), statistics.median(seconds[against])
        print(
            f"{name:<14}{took:>7.2f} s{took / theirs:>7.2f} of {against}"
            f"{peaks[name] / 1e6:>9.1f} MB{peaks[name] / peaks[against]:>7.2f}"
        )


def _peak(task: Callable[[], object]) -> int:
    tracemalloc.start()
    task()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    measure(chosen.ops, chosen.rounds)
