"""Whole models as estimated beside whole models as published, on one GPU and on several.

Run by hand, half an hour: python tests/survey/published.py [SOURCE...]. Prints every row, then the tables of
docs/method.md, and ends with exit code 1 where a floor or a bound is longer than what was measured.

transformers' model of the same shape is traced. Its cache grows by concatenation, and its gpt-oss repeats keys and
values for every head. No engine does that: the remedies of those two rules are applied, but for rows of transformers
itself.
"""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fxroof.analyzer.analysis import Times
from fxroof.analyzer.pipeline import analyze
from fxroof.analyzer.report import Run
from fxroof.analyzer.review import Selection
from fxroof.analyzer.scenario import Scenario

TESTS = Path(__file__).parent.parent
CONFIGS = TESTS / "models" / "configs"
DATA: dict[str, Any] = json.loads((TESTS / "data" / "published.json").read_text())

TUNED = ("a100_sxm_80gb", "h100_sxm")
"""Parts whose measured kernels the estimate's figures were fitted on, see docs/method.md."""

REMEDIES = ("KVC001", "ATT003")
"""Rules whose remedies make a program of transformers what engines run: the cache in place, key heads not repeated."""

_PHASES = {"prefill": "prefill", "decode": "decode", "request": "all"}
_KINDS = {"prefill": "first token", "decode": "step", "request": "request"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What is traced for a row; rows that differ in the GPU alone share it."""

    model: str
    weights: str
    gpus: int
    kind: str
    batch: int
    input: int
    output: int
    execution: str
    dtype: str

    def times(self, parts: Sequence[str]) -> tuple[Times, ...]:
        """Seconds on each part of what the kind names: the first token, a step, or the whole request."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(config(self.model, self.weights)))
            report = analyze(
                folder,
                gpus=parts,
                scenario=Scenario(
                    batch_size=self.batch,
                    input_len=self.input,
                    output_len=self.output,
                    tp=self.gpus,
                    lengths_given=True,
                ),
                phase=_PHASES[self.kind],
                dtype=self.dtype,
                execution=self.execution,
                selection=Selection(select=REMEDIES),
                least_saving=0.0,
                in_process=True,
            )
        return tuple(self._of(run) for run in report.runs)

    def _of(self, run: Run) -> Times:
        phases = {phase.name: phase.seconds for phase in run.phases}
        if self.execution == "compiled":
            phases = {name: _remedied(run, name, seconds) for name, seconds in phases.items()}
        if self.kind != "request":
            return phases[self.kind]
        first, step = phases["prefill"], phases["decode"]
        return Times(
            floor=first.floor + (self.output - 1) * step.floor,
            bound=first.bound + (self.output - 1) * step.bound,
            estimate=first.estimate + (self.output - 1) * step.estimate,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A published measurement.

    Attributes:
        kind: `prefill`, the time to the first token; `decode`, a step at the mean context; `request`, from the prompt
            to the last token.
        input: tokens of each prompt.
        output: tokens generated for each.
        value: as printed in the source.
        unit: of the value; tokens/s are those of all sequences together: of the prompts for a prefill, else generated.
    """

    source: str
    model: str
    gpu: str
    gpus: int
    kind: str
    batch: int
    input: int
    output: int
    value: float
    unit: str
    weights: str = ""

    @property
    def measured(self) -> float:
        """Seconds."""
        tokens = {"prefill": self.input, "decode": 1, "request": self.output}[self.kind] * self.batch
        return {
            "s": self.value,
            "ms": self.value / 1e3,
            "tokens/s": tokens / self.value,
            "tokens/s/GPU": tokens / self.value / self.gpus,
            "tokens/s with the prompt": (tokens + self.input * self.batch) / self.value,
        }[self.unit]

    @property
    def situation(self) -> Situation:
        source = DATA["sources"][self.source]
        return Situation(
            model=self.model,
            weights=self.weights,
            gpus=self.gpus,
            kind=self.kind,
            batch=self.batch,
            input=self.input,
            output=self.output,
            execution=source["execution"],
            dtype="as-is" if self.weights else source["dtype"],
        )

    @property
    def tuned(self) -> bool:
        """True on parts that figures of estimates were fitted on."""
        return self.gpu in TUNED


ROWS = tuple(Row(**row) for row in DATA["rows"])


def config(model: str, weights: str = "") -> dict[str, Any]:
    """A model's config: a folder's of the tests, or another's with the dimensions that differ; and its quantisation."""
    changes = dict(DATA["models"].get(model, {}))
    found: dict[str, Any] = json.loads((CONFIGS / changes.pop("like", model) / "config.json").read_text())
    found |= changes
    if weights:
        found["quantization_config"] = DATA["weights"][weights]
    return found


def predicted(rows: Iterable[Row]) -> Iterator[tuple[Row, Times]]:
    """Each row and its times, traced once where rows differ in the GPU alone."""
    groups: dict[Situation, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.situation].append(row)
    for situation, same in groups.items():
        parts = tuple(dict.fromkeys(row.gpu for row in same))
        times = dict(zip(parts, situation.times(parts), strict=True))
        yield from ((row, times[row.gpu]) for row in same)


def main(sources: Sequence[str]) -> int:
    """Print the rows of these sources, all if none is named, and what they come to."""
    results = []
    print("| source | model | GPUs | what | batch | in + out | measured | bound | estimate |")
    print("|---|---|---|---|---:|---:|---:|---:|---:|")
    for row, times in predicted(row for row in ROWS if not sources or row.source in sources):
        results.append((row, times))
        print(_line(row, times), flush=True)
    print("\n| source | models | parts | what | rows | bound | estimate |")
    print("|---|---|---|---|---:|---:|---:|")
    for source in DATA["sources"]:
        for kind in _KINDS:
            some = [(r, t) for r, t in results if r.source == source and r.kind == kind]
            if some:
                print(_group(source, kind, some))
    print("\n| what | parts | rows | median error | worst | median ratio | closest bound |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for kind in _KINDS:
        for tuned in (True, False):
            some = [(r, t) for r, t in results if r.kind == kind and r.tuned == tuned]
            if some:
                print(f"| {_KINDS[kind]} | {'tuned' if tuned else 'others'} | {_summary(some)} |")
    if results:
        print(f"| all | all | {_summary(results)} |")
    beaten = [row for row, times in results if max(times.floor, times.bound) > row.measured]
    for row in beaten:
        print(f"BEATS THE BOUND: {row}", file=sys.stderr)
    return 1 if beaten else 0


def _remedied(run: Run, phase: str, seconds: Times) -> Times:
    *_, last, _floor = run.waterfall[phase]
    assert last.estimate is not None, "only the floor has none"
    return Times(floor=seconds.floor, bound=last.bound, estimate=last.estimate)


def _line(row: Row, times: Times) -> str:
    model = f"{row.model} {row.weights}".rstrip()
    lengths = f"{row.input:,}" if row.kind == "prefill" else f"{row.input:,} + {row.output:,}"
    return (
        f"| {row.source} | {model} | {row.gpus} x {row.gpu} | {_KINDS[row.kind]} | {row.batch} | {lengths} "
        f"| {row.measured * 1e3:,.4g} ms | {times.bound / row.measured:.2f} | {times.estimate / row.measured:.2f} |"
    )


def _group(source: str, kind: str, results: Sequence[tuple[Row, Times]]) -> str:
    rows = [row for row, _ in results]
    models = _listed((row.model, row.weights) for row in rows)
    parts = _listed((row.gpu, f"x {row.gpus}" if row.gpus > 1 else "") for row in rows)
    bounds = [times.bound / row.measured for row, times in results]
    estimates = [times.estimate / row.measured for row, times in results]
    return f"| {source} | {models} | {parts} | {_KINDS[kind]} | {len(rows)} | {_span(bounds)} | {_span(estimates)} |"


def _listed(pairs: Iterable[tuple[str, str]]) -> str:
    """Each name once, with what it comes with: `llama-2-7b, int8`."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for name, detail in pairs:
        found[name][detail] = None
    return "; ".join(", ".join((name, *filter(None, details))) for name, details in found.items())


def _span(ratios: Sequence[float]) -> str:
    least, most = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return least if least == most else f"{least} to {most}"


def _summary(results: Sequence[tuple[Row, Times]]) -> str:
    ratios = [times.estimate / row.measured for row, times in results]
    errors = [abs(ratio - 1) for ratio in ratios]
    closest = max(max(times.floor, times.bound) / row.measured for row, times in results)
    return f"{len(results)} | {median(errors):.0%} | {max(errors):.0%} | {median(ratios):.2f} | {closest:.2f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="keys of sources; all if none is given")
    sys.exit(main(parser.parse_args().sources))
