"""What a remedy saves, in words."""

from dataclasses import replace

import pytest
from fxroof.analyzer.finding import Finding
from fxroof.analyzer.render import _findings, _seen
from fxroof.analyzer.report import Run
from render.sample import report


def with_savings(estimate: float, bound: float, execution: str) -> tuple[Finding, Run]:
    """A finding that saves these shares of a phase of 10 ms, of which 8 ms are its bound."""
    run = report().runs[0]
    phase = run.phases[0]
    times = replace(phase.seconds, estimate=10e-3, bound=8e-3)
    found = replace(
        run.findings[0],
        saving_seconds={phase.name: estimate * 10e-3},
        saving_bound_seconds={phase.name: bound * 8e-3},
        saving_per="step",
    )
    return found, replace(run, phases=(replace(phase, seconds=times, execution=execution),))


@pytest.mark.parametrize(
    ("estimate", "bound", "execution", "told", "in_short"),
    [
        (0.12, 0.25, "eager", ["1.20 ms (12.0%)", "of its bound 2.00 ms (25.0%)"], "1.20 ms, 12.0%"),
        (0.00021, 0.00001, "eager", ["2.10 µs (0.02%)", "of its bound nothing"], "2.10 µs, 0.02%"),
        # what two decimals of a percentage do not show is nothing, on either side of zero
        (0.00002, 0.00009, "eager", ["nothing", "of its bound nothing"], ""),
        (-0.00002, -0.00009, "compiled", ["nothing", "of its bound nothing"], ""),
        (-0.07, 0.1, "eager", ["-700 µs (-7.0%)", "of its bound 800 µs (10.0%)"], "-700 µs, -7.0%"),
        # the GPU is waited for in a compiled phase, the host in an eager one
        (0.0, 0.1, "compiled", ["nothing", "of its bound 800 µs (10.0%)"], "800 µs, 10.0% of its bound alone"),
        (
            0.0005, 0.1, "eager",
            ["nothing while launches set the pace", "of its bound 800 µs (10.0%)"], "800 µs, 10.0% of its bound alone",
        ),
    ],
)  # fmt: skip
def test_a_saving_is_told_alike_to_people_and_machines(
    estimate: float, bound: float, execution: str, told: list[str], in_short: str
) -> None:
    found, run = with_savings(estimate, bound, execution)
    name = run.phases[0].name
    assert list(_findings._savings(found, run)) == [f"{name} {told[0]}", told[1]]
    assert _seen.saves(found, run) == (f"{name} {in_short}" if in_short else "")
