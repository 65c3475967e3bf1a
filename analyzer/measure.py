"""The public call behind `fxroof measure`: a target -> what it took on this machine, beside what it was said to take.

The target's code runs in a box, see `box.py`; its graphs and times come back and are priced here.
"""

from collections.abc import Callable, Iterable, Iterator

from ..hardware.catalog import Resolved
from ..hardware.catalog import load as load_gpu
from . import box
from .clocked import Clocked, MeasureError, Order, part_of
from .errors import FxroofError
from .estimate import derating
from .garbage import without_collection
from .handover import Calibrated, Frame, PhaseClocked, collect
from .measured import Measured, beside
from .pipeline import gpu_info
from .report import PhaseFailure, Traced, fxroof_version
from .request import Request


def measure(
    request: Request,
    order: Order,
    *,
    timeout: float = 600.0,
    memory_limit: int | None = None,
    in_process: bool = False,
    debug: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Run a target's phases on this machine.

    Args:
        request: the model and the scenario.
        order: the device, the part to price against, how often to run.
        timeout: seconds that tracing and running may take; 0 for no limit.
        memory_limit: bytes of the host's memory that they may hold; 0 for no limit, None for most of what it has.
        in_process: run the target's code in this process, without limits.
        debug: show tracebacks of the target's code and warnings of libraries.
        progress: told what is being done.

    Returns:
        The measurement; phases that did not run while others did are in its `failures`.

    Raises:
        FxroofError: the model cannot be loaded, traced, run or priced.
        CatalogError: the GPU is unknown.
    """
    if request.scenario.gpus > 1:
        raise MeasureError(
            f"--tp and --ep share a model over {request.scenario.gpus} GPUs; fxroof measures on one.",
            "Leave them out.",
        )
    named = load_gpu(order.gpu) if order.gpu else None  # before the slow part: a typing error should not cost a trace
    if in_process or not box.AVAILABLE:
        from .clock import from_order

        frames, _ = from_order(request, order, debug=debug)
        return _measured(frames, order, named, progress)
    limits = box.Limits(seconds=timeout, memory=memory_limit)
    with box.Box(request, limits=limits, debug=debug, order=order) as child:
        return _measured(child.frames(), order, named, progress)


def _measured(
    frames: Iterable[Frame], order: Order, named: Resolved | None, progress: Callable[[str], None]
) -> Measured:
    clocked: list[Clocked] = []
    calibrated: list[str] = []
    stopped: list[FxroofError] = []

    def others() -> Iterator[Frame]:
        try:
            for frame in frames:
                if isinstance(frame, PhaseClocked):
                    clocked.append(frame.clocked)
                elif isinstance(frame, Calibrated):
                    calibrated.append(frame.toml)
                else:
                    yield frame
        except FxroofError as error:
            stopped.append(error)
            raise

    traced = collect(others(), progress).traced
    failures = _not_run(traced, clocked, stopped)
    if not clocked:
        first = failures[0]
        raise MeasureError(first.message, first.hint)
    machine = clocked[0].machine
    resolved = named or (part_of(calibrated[0]) if calibrated else load_gpu(machine.name))
    with without_collection():
        phases = tuple(beside(traced.graphs[each.phase], each, resolved.gpu) for each in clocked)
    return Measured(
        fxroof_version=fxroof_version(),
        machine=machine,
        model=traced.model,
        scenario=traced.scenario,
        gpu=gpu_info(resolved),
        gpu_source="calibration" if calibrated else "file" if order.gpu.endswith(".toml") else "catalogue",
        phases=phases,
        failures=failures,
        derating=derating(resolved.gpu).figures,
    )


def _not_run(traced: Traced, clocked: Iterable[Clocked], stopped: Iterable[FxroofError]) -> tuple[PhaseFailure, ...]:
    """The phases that did not run, those included that were traced when the process ended."""
    told = {each.phase for each in clocked} | {failure.phase for failure in traced.failures}
    reason = next(iter(stopped), None)
    lost = tuple(
        PhaseFailure(phase=name, message=reason.message, hint=reason.hint)
        for name in traced.graphs
        if name not in told and reason is not None
    )
    return (*traced.failures, *lost)
