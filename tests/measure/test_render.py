import dataclasses

import pytest
from fxroof.analyzer.clocked import Machine, Stray
from fxroof.analyzer.measured import Measured, MeasuredCall, MeasuredPhase, timing
from fxroof.analyzer.render._measured import terminal
from fxroof.analyzer.render.registry import Options
from fxroof.analyzer.report import GpuInfo, ModelInfo
from fxroof.analyzer.roofline import Bound
from fxroof.analyzer.scenario import Scenario


def call(index: int, *, least: float = 3e-3, seen: bool = True) -> MeasuredCall:
    return MeasuredCall(
        ops=(f"linear_{index}",), target="aten.linear.default", module=f"blocks.{index}.mlp.up[bold]", file="model.py",
        line=17, shape="1x64, 64x64 -> 1x64", dtype="bfloat16", ran=("aten.addmm.default",), seen=seen, seconds=4e-3,
        least=least, bound=2e-3, estimate=2.5e-3, lane=Bound.MEMORY, kernels=None, expected_kernels=1,
        because=("a product of 1 row",),
    )  # fmt: skip


def measured(*calls: MeasuredCall, failure: str = "") -> Measured:
    phase = MeasuredPhase(
        name="decode", tokens=1, floor=1e-3, bound=2e-3, estimate=4e-3, compiled_bound=1.5e-3, compiled_estimate=2e-3,
        eager=timing([8e-3, 6e-3, 7e-3]), compiled=timing([3e-3]), compiled_failure="",
        compiled_mode="reduce-overhead", graphs_skipped=1,
        calls=calls, strays=(Stray(target="aten.to", shape="4", calls=2, seconds=1e-6),), passes=5, clock=1.5e-6,
        kernels_failure=failure, peak_bytes=None, needed_bytes=10**9,
    )  # fmt: skip
    return Measured(
        fxroof_version="0",
        machine=Machine(device="cpu", name="CPU", driver="", torch_version="2.13", threads=2, date="2026-11-21"),
        model=ModelInfo(name="GPT", source="model.py", parameters=5, parameter_bytes=10**6, dtypes={}, cache_kind=""),
        scenario=Scenario(),
        gpu=GpuInfo(
            key="mine", name="mine", note="", memory_bandwidth=1e9, memory_bytes=None, cache_bytes=0, matmul_peaks={},
            ridges={}, confidence="medium",
        ),
        gpu_source="calibration",
        phases=(phase,),
    )  # fmt: skip


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_no_line_is_wider_than_asked_for(width: int) -> None:
    text = terminal(measured(call(0), call(1), call(2, least=1e-3)), Options(width=width))
    assert max(map(len, text.splitlines())) <= width


def test_ratios_stand_beside_times() -> None:
    text = terminal(measured(call(0)), Options(width=200))
    eager = next(line for line in text.splitlines() if line.startswith("eager"))
    assert eager.split() == ["eager", "1.00", "ms", "2.00", "ms", "4.00", "ms", "7.00", "ms", "3.50×", "1.75×", "6.00",
                             "ms", "28.6%", "3"]  # fmt: skip
    compiled = next(line for line in text.splitlines() if line.startswith("compiled"))
    assert "2.00×" in compiled
    assert "1.50×" in compiled
    assert "measured just now" in text
    assert "compiled   not all in CUDA graphs" in text


def test_what_was_measured_is_seen_on_a_narrow_terminal() -> None:
    text = terminal(measured(call(0)), Options(width=80))
    eager = next(line for line in text.splitlines() if line.startswith("eager"))
    assert "7.00 ms" in eager


def test_layers_are_folded_and_markup_is_text() -> None:
    text = terminal(measured(call(0), call(1), call(2)), Options(width=200))
    rows = [line for line in text.splitlines() if "linear" in line and "ms" in line]
    assert len(rows) == 1
    assert "blocks.*.mlp.up[bold] ×3" in rows[0]
    assert "12.0 ms" in rows[0]
    assert "a product of 1 row: blocks.*.mlp.up[bold] linear" in text


def test_an_op_that_beats_its_bound_is_shouted_and_one_that_does_not_is_not() -> None:
    assert "FASTER THAN THE BOUND" not in terminal(measured(call(0)), Options())
    text = terminal(measured(call(0), call(1, least=1e-3)), Options())
    assert "FASTER THAN THE BOUND: 1 ops" in text
    assert measured(call(1, least=1e-3)).phases[0].too_fast
    assert not measured(call(1, least=1e-3, seen=False)).phases[0].too_fast


def test_what_was_not_seen_is_counted_and_what_was_not_timed_is_told() -> None:
    text = terminal(measured(call(0), call(1, seen=False)), Options())
    assert "1 of 2 of the graph's ops seen to run" in text
    assert "2 others" in text
    assert "not timed: for a reason" in terminal(measured(failure="for a reason"), Options())


def test_a_single_run_has_no_spread() -> None:
    assert timing([5e-3]).spread == 0
    assert dataclasses.asdict(timing([4.0, 2.0, 3.0])) == {"median": 3.0, "least": 2.0, "spread": 2 / 3, "runs": 3}
