"""What is asked of a machine that runs a model's phases, and what came of it, as plain data. No torch here."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..hardware.catalog import Resolved
from ..hardware.catalog import load as load_gpu
from .errors import FxroofError


class MeasureError(FxroofError):
    """The model, or the machine, cannot be measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """How to run the phases.

    Attributes:
        device: `cuda`, `cuda:1`, `cpu`, or `auto` for CUDA where there is one.
        gpu: catalogue key, device name or path to a TOML, to price against; empty for the catalogue's part of the
            device's name, and on a CPU for what a quick calibration finds.
        runs: times that a phase is run.
        seconds: time after which no further run of a phase begins; three are made whatever they take.
        compile: also run what torch.compile makes of it.
        kernels: also time every op.
        threads: of a CPU; 0 for as many as torch takes.
    """

    device: str = "auto"
    gpu: str = ""
    runs: int = 20
    seconds: float = 20.0
    compile: bool = False
    kernels: bool = True
    threads: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where and when something was measured.

    Attributes:
        device: `cuda:0` or `cpu`.
        name: as the driver or the system calls it.
        driver: version of the GPU's driver; empty on a CPU.
        torch_version: which torch.
        threads: that torch uses on a CPU; 0 on a GPU.
        date: day, as 2026-11-21.
    """

    device: str
    name: str
    driver: str
    torch_version: str
    threads: int
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockedCall:
    """A call of the graph as it ran.

    Attributes:
        ops: names of the graph's ops that it stands for; several where a body was traced inside.
        ran: operators that PyTorch ran for it, views included; empty where it was not seen to run.
        seconds: median of the passes.
        least: the fastest pass.
        kernels: launched on the device; None on a CPU.
        faults: pages of memory that were touched for the first time; None on a GPU.
    """

    ops: tuple[str, ...]
    ran: tuple[str, ...]
    seconds: float
    least: float
    kernels: int | None = None
    faults: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stray:
    """Operators that ran and that no op of the graph stands for."""

    target: str
    shape: str
    calls: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocked:
    """A phase as it ran.

    Attributes:
        phase: which.
        machine: where.
        runs: seconds of each run, eagerly, one after the other as steps are.
        compiled_runs: the same of what torch.compile makes of it; empty where that was not asked for, or failed.
        compiled_mode: mode of torch.compile; empty as above.
        compiled_failure: why it failed; empty where it did not.
        graphs_skipped: graphs that torch.compile did not make CUDA graphs of.
        calls: what the graph's ops took, in order; empty where that was not asked for, or failed.
        strays: what ran beside them.
        passes: runs in which ops were timed one by one.
        clock: seconds that the clock shows for an op that does nothing.
        kernels_failure: why ops were not timed; empty where they were.
        peak_bytes: the most device memory that tensors held during a run; None on a CPU.
        needed_bytes: the same by fxroof's account.
    """

    phase: str
    machine: Machine
    runs: tuple[float, ...]
    compiled_runs: tuple[float, ...] = ()
    compiled_mode: str = ""
    compiled_failure: str = ""
    graphs_skipped: int = 0
    calls: tuple[ClockedCall, ...] = ()
    strays: tuple[Stray, ...] = ()
    passes: int = 0
    clock: float = 0.0
    kernels_failure: str = ""
    peak_bytes: int | None = None
    needed_bytes: int = 0


def part_of(toml: str, name: str = "this_machine") -> Resolved:
    """The part that a TOML text describes.

    Raises:
        CatalogError: it describes none.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.toml"
        file.write_text(toml, encoding="utf-8")
        return load_gpu(file)
