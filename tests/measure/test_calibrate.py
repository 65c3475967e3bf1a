import dataclasses
from pathlib import Path

import pytest
import torch
from fxroof.analyzer import calibrate as calibration
from fxroof.analyzer.analysis import analyze_phase
from fxroof.analyzer.calibrate import Calibration, Curve, Depth, calibrate, to_toml
from fxroof.analyzer.clocked import Machine, MeasureError, part_of
from fxroof.analyzer.estimate import derating
from fxroof.analyzer.scenario import Phase
from fxroof.analyzer.trace import trace
from fxroof.hardware.catalog import load

TINY = Depth(seconds=0.005, largest=1 << 22, step=4.0, sides=(64, 128))
MI = 2**20


def curve(kind: str, rates: dict[int, float]) -> Curve:
    return Curve(kind=kind, best=rates, usual={size: rate / 2 for size, rate in rates.items()})


def known() -> Calibration:
    """A machine with 8 MiB of cache, 100 GB/s in it and 10 GB/s behind it."""
    steps = [MI, 2 * MI, 4 * MI, 8 * MI, 16 * MI, 32 * MI, 64 * MI, 128 * MI]
    rates = {size: (100e9 if size <= 8 * MI else 10e9) for size in steps}
    return Calibration(
        machine=Machine(
            device="cpu", name='A "quick" CPU', driver="", torch_version="2.13", threads=4, date="2026-11-21"
        ),
        vendor="cpu",
        compute_capability="",
        units=None,
        clock=None,
        memory_bytes=32 << 30,
        curves=(curve("read", rates), curve("copy", {size: 0.8 * rate for size, rate in rates.items()})),
        cache_bytes=16 * MI,
        cache_stated=False,
        matmul={"float32": (200e9, 150e9), "bfloat16": (800e9, 600e9)},
        special=(4e9, 1e9),
        launch=5e-6,
        launch_again=2e-6,
        latency=4e-6,
        memory_latency=1e-6,
        read_back=3e-6,
        seconds=12.0,
    )


def known_gpu(**other: object) -> Calibration:
    """One with 132 multiprocessors at 1.98 GHz, whose L2 gives 5 TB/s and its memory 1 TB/s, a microsecond late."""
    sizes = [MI, 4 * MI, 16 * MI, 64 * MI, 256 * MI, 1024 * MI]
    rates = {size: 5e12 if size < 60 * MI else 1e12 for size in sizes}
    late = {size: size / (size / rate + 1e-6) for size, rate in rates.items()}
    machine = Machine(
        device="cuda:0", name="NVIDIA H999", driver="600.1", torch_version="2.13", threads=0, date="2026-11-21"
    )
    given: dict[str, object] = {
        "machine": machine, "vendor": "nvidia", "compute_capability": "9.0", "units": 132, "clock": 1.98e9,
        "curves": tuple(Curve(kind=kind, best=rates, usual=late) for kind in ("read", "copy")),
        "cache_bytes": 60 * MI, "cache_stated": True, "special": None, "latency": 1e-6, "memory_latency": None,
    }  # fmt: skip
    return dataclasses.replace(known(), **given | other)  # type: ignore[arg-type]  # fields of it


def graph_of_a_product(rows: int) -> object:
    class Product(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(rows, rows, bias=False, device="meta")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    return trace(Product().eval(), (torch.empty(rows, rows, device="meta"),), phase=Phase())


def test_figures_of_a_known_machine_come_back_in_base_units() -> None:
    gpu = part_of(to_toml(known())).gpu
    assert gpu.name == 'A "quick" CPU (cpu)'
    assert gpu.memory_bandwidth == pytest.approx(10e9)
    assert gpu.cache_bytes == 16 * MI
    assert gpu.memory_usable_bytes == 32 << 30
    assert gpu.l2_bandwidth == pytest.approx(100e9)
    assert gpu.l2_bandwidth_measured == pytest.approx(45e9)  # between half of 100 and half of 80
    assert dict(gpu.tensor) == pytest.approx({"float32": 200e9, "bfloat16": 800e9})
    assert dict(gpu.vector) == pytest.approx({"float32": 200e9})
    assert gpu.special_per_second == pytest.approx(4e9)


def test_medians_are_what_estimates_reckon_with() -> None:
    reached = derating(part_of(to_toml(known())).gpu)
    assert reached.reading.value == pytest.approx(0.5)
    assert reached.copying.value == pytest.approx(0.4)
    assert reached.matmul["float32"].value == pytest.approx(0.75)
    assert reached.launch.value == pytest.approx(5e-6)
    assert reached.launch_again.value == pytest.approx(2e-6)
    assert reached.latency.value == pytest.approx(4e-6)
    assert reached.memory_latency.value == pytest.approx(1e-6)
    assert reached.read_back.value == pytest.approx(3e-6)
    assert reached.special is not None
    assert reached.special.value == pytest.approx(1e9)
    assert "measured" in reached.launch.source


def test_catalogue_parts_keep_their_assumptions() -> None:
    reached = derating(load("b200").gpu)
    assert reached.special is None
    assert (reached.launch.value, reached.read_back.value) == (8e-6, 10e-6)
    assert "pytorch#41383" in reached.launch.source


def test_a_gpu_that_says_its_clock_is_taken_for_one_whose_kernels_were_measured() -> None:
    gpu = part_of(to_toml(known_gpu())).gpu
    assert (gpu.sm_count, gpu.clock_hz) == (132, pytest.approx(1.98e9))
    figures = {figure.key: figure.source_title for figure in gpu.figures}
    assert figures["max_sm_clock_mhz"].startswith("asked of the device: NVIDIA H999")
    reached = derating(gpu)
    assert reached.products.latency.fitted_on
    assert "same architecture" in reached.products.latency.source
    slow = derating(part_of(to_toml(known_gpu(latency=9e-6))).gpu)  # its own, where that is more
    assert (slow.latency.value, slow.products.latency.value) == pytest.approx((9e-6, 9e-6))
    assert "measured" in slow.products.latency.source
    silent = part_of(to_toml(known_gpu(clock=None))).gpu
    assert derating(silent).products.latency.fitted_on == ""


def test_special_functions_of_a_gpu_are_those_that_its_guide_says() -> None:
    gpu = part_of(to_toml(known_gpu())).gpu
    assert gpu.special_per_second == pytest.approx(16 * 132 * 1.98e9)
    assert {f.key: f.source_kind for f in gpu.figures}["sfu_exp_per_clk_per_sm"] == "vendor"
    assert derating(gpu).special is None
    assert part_of(to_toml(known_gpu(compute_capability="10.3"))).gpu.special_per_second is None


def test_gaps_between_kernels_are_not_counted_to_a_gpu_s_cache() -> None:
    assert part_of(to_toml(known_gpu())).gpu.l2_bandwidth_measured == pytest.approx(5e12)
    slower = part_of(to_toml(known_gpu(latency=1e-9))).gpu.l2_bandwidth_measured
    assert slower is not None
    assert slower < 4.5e12


def test_products_are_not_of_zeros() -> None:
    bench = calibration._Bench(torch.device("cpu"), TINY)
    for dtype in ("float32", "bfloat16", "int8"):
        product = bench._product(dtype, 64, 64)()
        assert (product != 0).float().mean() > 0.9, dtype


def test_every_figure_is_traced_to_the_run() -> None:
    gpu = part_of(to_toml(known())).gpu
    kinds = {figure.key: (figure.source_kind, figure.source_title) for figure in gpu.figures}
    assert all(kind == "measured" for kind, _ in kinds.values())
    _, title = kinds["memory_bandwidth_gb_per_s"]
    assert "measured by fxroof calibrate" in title
    assert "2026-11-21" in title
    assert "torch 2.13" in title
    assert kinds["memory_usable_bytes"][1].startswith("asked of the device")


def test_a_program_is_priced_on_it() -> None:
    gpu = part_of(to_toml(known())).gpu
    small, _ = analyze_phase(graph_of_a_product(512), gpu)  # type: ignore[arg-type]  # a graph
    large, _ = analyze_phase(graph_of_a_product(1024), gpu)  # type: ignore[arg-type]  # a graph
    assert small.seconds.bound == pytest.approx(2 * 512**3 / 200e9)
    assert large.seconds.bound == pytest.approx(8 * small.seconds.bound)
    assert large.seconds.estimate > small.seconds.estimate > small.seconds.bound


@pytest.mark.parametrize(
    ("fast", "expected"),
    [([1, 2, 4, 8], 16 * MI), ([], None), ([1, 2, 4], 8 * MI)],
)
def test_the_cache_ends_where_the_rate_falls(fast: list[int], expected: int | None) -> None:
    sizes = [1, 2, 4, 8, 16, 32, 64, 128]
    rates = {size * MI: 50e9 if size in fast else 10e9 for size in sizes}
    assert calibration._cache_of([curve("read", rates)]) == expected


def test_this_cpu_gives_a_part() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = calibrate(torch.device("cpu"), TINY)
        bench = calibration._Bench(torch.device("cpu"), TINY)
        times = [min(bench.seconds(bench._product("float32", side, side))) for side in (64, 512)]
    finally:
        torch.set_num_threads(before)
    assert times[1] > times[0]  # 512 times the work
    gpu = part_of(to_toml(found)).gpu
    assert 1e8 < gpu.memory_bandwidth < 1e13
    assert 1e8 < gpu.tensor["float32"] < 1e14
    assert "bfloat16" in gpu.tensor
    assert found.seconds < 60
    for share in gpu.achieved.values():
        assert 0 < share <= 1
    phase, _ = analyze_phase(graph_of_a_product(64), gpu)  # type: ignore[arg-type]  # a graph
    assert 0 < phase.seconds.bound <= phase.seconds.estimate


def test_a_full_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "free_bytes", lambda _: 1 << 20)
    with pytest.raises(MeasureError, match="1 MB of free memory"):
        calibrate(torch.device("cpu"), TINY)


def test_a_name_that_would_break_the_file_is_quoted(tmp_path: Path) -> None:
    found = known()
    machine = dataclasses.replace(found.machine, name='x"\\\n[sources]')
    file = tmp_path / "mine.toml"
    file.write_text(to_toml(dataclasses.replace(found, machine=machine)), encoding="utf-8")
    assert load(str(file)).gpu.name == 'x"\\ [sources] (cpu)'
