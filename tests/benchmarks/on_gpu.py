"""Run where CUDA is: bandwidth, products, whole steps of three transformers models, each beside floor, bound, estimate.

    python tests/benchmarks/on_gpu.py -o results.json              needs CUDA, and 80 GB for the largest model
    python tests/benchmarks/on_gpu.py --only products steps -o some.json
    python tests/benchmarks/on_gpu.py --dry -o results.json        tiny sizes on the CPU: does the program work?

Without CUDA it runs dry by itself, and says so. Results are data: part, driver, torch, date, and a row for everything
that was measured. Where Nsight Compute may read hardware counters, ten kernels have their DRAM bytes beside ours.
"""

import argparse
import csv
import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import msgspec
import torch
from fxroof.analyzer.calibrate import FULL, Depth, calibrate, to_toml
from fxroof.analyzer.clock import device_of, machine_of
from fxroof.analyzer.clocked import Machine, Order
from fxroof.analyzer.errors import FxroofError
from fxroof.analyzer.measure import measure
from fxroof.analyzer.measured import Measured
from fxroof.analyzer.pipeline import analyze
from fxroof.analyzer.render._measured import terminal
from fxroof.analyzer.render.registry import Options
from fxroof.analyzer.request import Request
from fxroof.analyzer.review import Selection
from fxroof.analyzer.scenario import Scenario
from fxroof.hardware.catalog import CatalogError
from fxroof.hardware.catalog import load as load_gpu

CONFIGS = Path(__file__).parent.parent / "models" / "configs"
DRY_DEPTH = Depth(seconds=0.01, largest=1 << 24, step=4.0, sides=(64, 128))
NO_RULES = Selection(select=("TRC001",))

KERNELS = '''"""Kernels to run by themselves."""

import torch
import torch.nn.functional as F
from torch import nn


class Kernel(nn.Module):
    def __init__(self, name, scale, dtype=torch.bfloat16):
        super().__init__()
        self.name = name
        n = 1024 * scale
        self.weight = nn.Parameter(torch.empty(n, n, dtype=dtype))
        self.line = nn.Parameter(torch.empty(n, dtype=dtype))

    def forward(self, x):
        match self.name:
            case "product":
                return F.linear(x, self.weight)
            case "product of one row":
                return F.linear(x[:1], self.weight)
            case "add":
                return x + x.flip(0)
            case "silu":
                return F.silu(x)
            case "rms norm":
                return F.rms_norm(x, (x.shape[-1],), self.line)
            case "layer norm":
                return F.layer_norm(x, (x.shape[-1],), self.line, self.line)
            case "softmax":
                return x.softmax(-1)
            case "transpose":
                return x.t().contiguous()
            case "cat":
                return torch.cat((x, x), 0)
            case "attention":
                heads = x.view(x.shape[0], -1, 64).transpose(0, 1)[None]
                return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)


class Product(nn.Module):
    def __init__(self, n, k, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, k, dtype=dtype))

    def forward(self, x):
        return F.linear(x, self.weight)
'''
NAMES = (
    "product", "product of one row", "add", "silu", "rms norm", "layer norm", "softmax", "transpose", "cat",
    "attention",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement; seconds, or bytes in `counters`. None where there is none, and then why."""

    group: str
    name: str
    floor: float | None = None
    bound: float | None = None
    estimate: float | None = None
    measured: float | None = None
    spread: float | None = None
    bytes_ours: float | None = None
    bytes_measured: float | None = None
    why_not: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What one run of this program found."""

    machine: Machine
    part: str
    dry: bool
    rows: tuple[Row, ...]
    calibrated: str


def main() -> None:
    """Measure, print as it goes, write the data."""
    options = _arguments()
    dry = options.dry or not torch.cuda.is_available()
    if dry:
        _say("DRY RUN on the CPU with tiny sizes: it shows that this program works, and nothing of any GPU.")
    device = device_of("cpu" if dry else "cuda")
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "kernels.py").write_text(KERNELS, encoding="utf-8")
        if options.kernel:
            _run_kernel(here, options.kernel, dry)
            return
        found = calibrate(device, DRY_DEPTH if dry else FULL, lambda what: _say(f"measuring {what}"))
        own = here / "this_machine.toml"
        own.write_text(to_toml(found), encoding="utf-8")
        part = options.gpu or _part(found.machine, own)
        groups = {
            "bandwidth": lambda: _bandwidths(found.usual_bandwidth, found.bandwidth, part),
            "products": lambda: _products(here, part, dry),
            "steps": lambda: _steps(here, part, dry),
            "counters": lambda: _counters(here, part, dry),
        }
        rows: list[Row] = []
        for row in chain.from_iterable(groups[name]() for name in options.only or groups):
            _say(_shown(row))
            rows.append(row)
            results = Results(
                machine=machine_of(device), part=part, dry=dry, rows=tuple(rows), calibrated=to_toml(found)
            )
            if options.output:  # after each row: whoever lends a GPU may take it back
                options.output.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    below = [row for row in rows if row.measured and row.bound and row.measured < 0.97 * row.bound]
    _say(f"{len(rows)} rows, {len(below)} below their bound{', which is a fault' if below else ''}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="file for the results, JSON")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--gpu", default="", help="catalogue key or TOML, if the device's name is not in the catalogue")
    parser.add_argument("--only", nargs="+", choices=["bandwidth", "products", "steps", "counters"], help="not all")
    parser.add_argument("--kernel", default="", choices=["", *NAMES], help="run this kernel alone, for a profiler")
    return parser.parse_args()


def _part(machine: Machine, own: Path) -> str:
    """The catalogue's part of the device's name; of others what was just measured."""
    try:
        return load_gpu(machine.name).gpu.key
    except CatalogError:
        _say(f"{machine.name} is not in the catalogue: priced on what was just measured of it")
        return str(own)


def _bandwidths(usual, best: float, part: str) -> Iterator[Row]:
    peak = load_gpu(part).gpu.memory_bandwidth
    size = 1 << 30
    for kind in ("read", "write", "copy", "update"):
        yield Row(group="bandwidth", name=f"{kind} of 1 GiB", bound=size / peak, measured=size / usual(kind))
    yield Row(group="bandwidth", name="best of all, 1 GiB", bound=size / peak, measured=size / best)


def _products(here: Path, part: str, dry: bool) -> Iterator[Row]:
    sizes = (64, 256) if dry else (1024, 4096, 8192)
    rows = (1, 128) if dry else (1, 16, 128, 1024, 4096, 16384)
    for dtype in ("float32", "bfloat16"):
        for side in sizes:
            for m in rows:
                init = f"Product({side}, {side}, torch.{dtype})"
                shape = f"x={m}x{side}:{dtype}"
                yield from _rows(
                    "product", f"{m} x {side} x {side} {dtype}", _measured(here / "kernels.py", part, dry, init, shape)
                )


MODELS: Mapping[str, tuple[str, Scenario]] = {
    "dense": ("llama-3-8b", Scenario(batch_size=1, input_len=2048, output_len=256, lengths_given=True)),
    "mixture of experts": ("qwen3-30b-a3b", Scenario(batch_size=8, input_len=1024, output_len=256, lengths_given=True)),
    "long context": ("qwen3-8b", Scenario(batch_size=1, input_len=32768, output_len=256, lengths_given=True)),
}


def _steps(here: Path, part: str, dry: bool) -> Iterator[Row]:
    """Prefill and decode, eager and under torch.compile with CUDA graphs, and the memory that they hold."""
    for name, (config, scenario) in MODELS.items():
        target = CONFIGS / config
        if dry:
            target = _shrunk(target, here / config)
            scenario = Scenario(input_len=24, output_len=4, lengths_given=True)
        found = _measured(target, part, dry, scenario=scenario, compiled=True)
        yield from _rows("step", f"{name} ({config})", found, compiled=True)
        if isinstance(found, Measured):
            _say(terminal(found, Options(width=120)))


def _shrunk(config: Path, folder: Path) -> Path:
    """The same architecture with two small layers."""
    content = json.loads((config / "config.json").read_text(encoding="utf-8"))
    content |= {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "moe_intermediate_size": 32, "num_experts": 4,
        "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def _measured(
    target: Path,
    part: str,
    dry: bool,
    init: str = "",
    shape: str = "",
    *,
    scenario: Scenario | None = None,
    compiled: bool = False,
) -> Measured | FxroofError:
    order = Order(
        device="cpu" if dry else "cuda", gpu=part, runs=3 if dry else 30, seconds=0.2 if dry else 20.0, compile=compiled
    )
    request = Request(target=str(target), init=init, inputs=(shape,) if shape else (), scenario=scenario or Scenario())
    try:
        return measure(request, order, in_process=True)
    except FxroofError as error:
        return error


def _rows(group: str, name: str, found: Measured | FxroofError, *, compiled: bool = False) -> Iterator[Row]:
    if isinstance(found, FxroofError):
        yield Row(group=group, name=name, why_not=found.message)
        return
    for phase in found.phases:
        title = f"{name}, {phase.name}" if phase.name != "forward" else name
        yield Row(
            group=group, name=f"{title}, eager" if compiled else title, floor=phase.floor, bound=phase.bound,
            estimate=phase.estimate, measured=phase.eager.median, spread=phase.eager.spread,
        )  # fmt: skip
        if compiled:
            took = phase.compiled
            yield Row(
                group=group, name=f"{title}, compiled", floor=phase.floor, bound=phase.compiled_bound,
                estimate=phase.compiled_estimate, measured=took.median if took else None,
                spread=took.spread if took else None, why_not=phase.compiled_failure,
            )  # fmt: skip
            yield Row(
                group="memory", name=title, bytes_ours=phase.needed_bytes, bytes_measured=phase.peak_bytes,
                why_not="" if phase.peak_bytes is not None else "torch counts no memory on a CPU",
            )  # fmt: skip
    for failure in found.failures:
        yield Row(group=group, name=f"{name}, {failure.phase}", why_not=failure.message)


METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")


def _counters(here: Path, part: str, dry: bool) -> Iterator[Row]:
    """DRAM bytes of ten kernels by hardware counters, beside ours; each is larger than any cache."""
    for name in NAMES:
        ours = _bytes_ours(here, name, part, dry)
        seen, why_not = (None, "a dry run") if dry else _bytes_seen(name)
        yield Row(group="DRAM bytes", name=name, bytes_ours=ours, bytes_measured=seen, why_not=why_not)


def _sizes(name: str, dry: bool) -> tuple[str, str]:
    scale = 1 if dry else 8
    rows = 256 if dry else 4096 if name == "attention" else 32768
    return f"Kernel({name!r}, {scale})", f"x={rows}x{1024 * scale}:bf16"


def _bytes_ours(here: Path, name: str, part: str, dry: bool) -> float:
    init, shape = _sizes(name, dry)
    report = analyze(
        str(here / "kernels.py"), gpu=part, init=init, inputs=(shape,), selection=NO_RULES, in_process=True
    )
    return report.runs[0].phases[0].executions.eager.bytes_hbm


def _run_kernel(here: Path, name: str, dry: bool) -> None:
    """What the profiler watches: the kernel, and what makes its input."""
    sys.path.insert(0, str(here))
    import kernels  # the file that was just written

    _init, shape = _sizes(name, dry)
    rows, columns = (int(size) for size in shape.removeprefix("x=").removesuffix(":bf16").split("x"))
    device = "cpu" if dry else "cuda"
    module = kernels.Kernel(name, columns // 1024).to(device)
    x = torch.randn(rows, columns, device=device).to(torch.bfloat16)
    with torch.inference_mode():
        module(x)
        if not dry:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
        module(x)
        if not dry:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()


def _bytes_seen(name: str) -> tuple[float | None, str]:
    profiler = shutil.which("ncu")
    if profiler is None:
        return None, "Nsight Compute (ncu) is not installed"
    command = [profiler, "--csv", "--profile-from-start", "off", "--metrics", ",".join(METRICS)]
    try:
        told = subprocess.run(
            [*command, sys.executable, __file__, "--kernel", name],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
    except subprocess.TimeoutExpired:
        return None, "ncu was not done after ten minutes"
    seen = summed(told.stdout)
    if seen is None:
        lines = [line for line in (told.stdout + told.stderr).splitlines() if "ERR" in line or "rror" in line]
        return None, lines[0] if lines else f"ncu ended with {told.returncode} and no figures"
    return seen, ""


UNITS = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12}


def summed(text: str) -> float | None:
    """The bytes of all kernels in what `ncu --csv` prints; None where there are none."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return None
    rows = csv.DictReader(io.StringIO("\n".join(lines[start:])))
    found = [
        float(row["Metric Value"].replace(",", "")) * UNITS[row["Metric Unit"]]
        for row in rows
        if row["Metric Name"] in METRICS
    ]
    return sum(found) if found else None


def _shown(row: Row) -> str:
    if row.bytes_ours is not None:
        seen = f"{row.bytes_measured / 1e6:12,.1f} MB" if row.bytes_measured is not None else f"- ({row.why_not})"
        return f"{row.group:12} {row.name:52} ours {row.bytes_ours / 1e6:12,.1f} MB   measured {seen}"
    figures = (row.floor, row.bound, row.estimate, row.measured)
    cells = " ".join("          -" if value is None else f"{value * 1e6:11,.1f}" for value in figures)
    ratio = f"{row.measured / row.bound:8.2f}x bound" if row.measured and row.bound else row.why_not
    return f"{row.group:12} {row.name:52} {cells} us {ratio}"


if __name__ == "__main__":
    main()
