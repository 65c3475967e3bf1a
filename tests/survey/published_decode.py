"""Decode as estimated beside decode as published, for whole models on one GPU and on several.

Run by hand: python tests/survey/published_decode.py. Prints the table of docs/method.md.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from fxroof.analyzer.analysis import Times
from fxroof.analyzer.pipeline import analyze
from fxroof.analyzer.review import Selection
from fxroof.analyzer.scenario import Scenario

TESTS = Path(__file__).parent.parent
DATA = json.loads((TESTS / "data" / "published_decode.json").read_text())


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A published measurement."""

    model: str
    gpu: str
    tp: int
    tokens_per_second: float

    def predicted(self) -> Times:
        """Seconds of a compiled decode step of the same model in the same situation."""
        report = analyze(
            str(TESTS / "models" / "configs" / self.model),
            gpu=self.gpu,
            scenario=Scenario(input_len=5, output_len=200, tp=self.tp),
            phase="decode",
            execution="compiled",
            selection=Selection(select=("TRC001",)),  # the rules may trace it again
            in_process=True,
        )
        return report.runs[0].phases[0].seconds


ROWS = tuple(Row(**row) for row in DATA["rows"])

if __name__ == "__main__":
    print("| model | GPUs | bound | estimate | measured | estimate / measured |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in ROWS:
        seconds = row.predicted()
        print(
            f"| {row.model} | {row.tp} x {row.gpu} | {1 / seconds.bound:.1f} | {1 / seconds.estimate:.1f} "
            f"| {row.tokens_per_second} | {1 / seconds.estimate / row.tokens_per_second:.2f} |"
        )
