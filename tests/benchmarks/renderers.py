"""How long each format takes for a report of many ops, and how much memory.

Run by hand: python tests/benchmarks/renderers.py [--ops 100000]. The report is the renderers' sample with that many ops
in one phase. Goals at 100,000 ops: every format < 10 s and < 1 GB beyond the report itself.
"""

import argparse
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fxroof.analyzer.render.registry import Options, formats, render
from fxroof.analyzer.report import Report
from render.sample import op, report, summed


def many(count: int) -> Report:
    ops = (
        op(f"mul_{i}", "aten.mul.Tensor", module=f"blocks.{i}.part", line=1 + i % 900, vector=1e6, read=1e6)
        for i in range(count)
    )
    original = report()
    run = replace(original.runs[0], phases=(summed("decode", 2, tuple(ops)),))
    return replace(original, runs=(run,))


def measure(given: Report, name: str) -> None:
    start = time.perf_counter()
    text = render(given, name, Options())
    seconds = time.perf_counter() - start
    tracemalloc.start()
    render(given, name, Options())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{name:<10}{seconds:>8.2f} s{peak / 1e6:>10.1f} MB{len(text) / 1e6:>10.2f} MB of text")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", type=int, default=100_000)
    given = many(parser.parse_args().ops)
    for name in formats():
        measure(given, name)
