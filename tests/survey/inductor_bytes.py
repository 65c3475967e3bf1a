"""Inductor's own count of the bytes that its kernels touch: `python tests/survey/inductor_bytes.py [case ...]`.

Writes tests/data/inductor_bytes.json, which the tests compare with. Inductor decides and counts before it writes any
code, so it is stopped there, and no compiler is needed. On a machine without a GPU it is told to decide as for one:
the Triton backend schedules, and what it does differently on CPUs for the sake of CPUs is switched off.
"""

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx

ROOT = Path(__file__).parent.parent.parent
DATA = ROOT / "tests" / "data" / "inductor_bytes.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """What Inductor made of a program: bytes over all its kernels, and how many kernels."""

    bytes: int
    kernels: int


_H100 = {"multi_processor_count": 132, "major": 9, "max_threads_per_multi_processor": 2048, "warp_size": 32}
"""What decides into how many parts a long reduction is split."""


class _CountedError(Exception):
    """Raised in Inductor's scheduler when all is decided."""


def count(program: torch.export.ExportedProgram) -> Count:
    """Compile a program that was exported on the meta device, as far as Inductor's count of bytes."""
    module = _on_cpu(program)
    totals = [0, 0]

    def stop(scheduler: Any) -> None:
        from torch._inductor.scheduler import NopKernelSchedulerNode
        from torch._inductor.virtualized import V

        totals[0] += V.graph.count_bytes()[0]
        totals[1] += sum(not isinstance(n, NopKernelSchedulerNode) for n in scheduler.nodes)
        raise _CountedError

    with _quiet(), _as_for_a_gpu(stop), torch.no_grad():
        torch._dynamo.reset()
        try:
            torch.compile(module)(*_arguments(program))
        except Exception as error:
            if not _is_counted(error):
                raise
    return Count(bytes=totals[0], kernels=totals[1])


def count_as_compiled(program: torch.export.ExportedProgram) -> int:
    """Bytes over all kernels when the program is compiled for this machine and run, with nothing switched off."""
    module = _on_cpu(program)
    with _quiet(), torch.no_grad():
        from torch._inductor import config, metrics

        torch._logging.set_logs(inductor_metrics=True)
        torch._dynamo.reset()
        metrics.reset()
        try:
            with config.patch(force_disable_caches=True):
                torch.compile(module)(*_arguments(program))
            return metrics.num_bytes_accessed
        finally:
            torch._logging.set_logs()


def main(names: list[str]) -> None:
    """Count all cases, or those named, and write the file."""
    sys.path.insert(0, str(ROOT / "tests"))
    from fusion.cases import CASES, program

    known = json.loads(DATA.read_text())["cases"] if DATA.exists() else {}
    for name in names or CASES:
        known[name] = asdict(count(program(name)))
    found = {
        "torch": torch.__version__.partition("+")[0],
        "date": datetime.now(UTC).date().isoformat(),
        "cases": {name: known[name] for name in CASES if name in known},
    }
    DATA.write_text(json.dumps(found, indent=1) + "\n")


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # imports of Inductor use what torch itself has deprecated
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _as_for_a_gpu(stop: Any) -> Iterator[None]:
    from torch._inductor import config, ir, scheduler
    from torch._inductor.runtime import hints

    create = hints.DeviceProperties.create
    settings = {
        "cpu_backend": "triton",
        "force_disable_caches": True,
        "force_pointwise_cat": True,
        "layout_optimization": False,
        "compile_threads": 1,
    }
    with ExitStack() as stack:
        stack.enter_context(config.patch(settings))
        stack.enter_context(mock.patch.object(ir, "is_cpu", return_value=False))
        stack.enter_context(mock.patch.object(scheduler.BaseSchedulerNode, "is_cpu", return_value=False))
        stack.enter_context(mock.patch.object(scheduler.Scheduler, "codegen", stop))
        stack.enter_context(
            mock.patch.object(hints.DeviceProperties, "create", lambda device: create(device)._replace(**_H100))
        )
        yield


def _on_cpu(program: torch.export.ExportedProgram) -> fx.GraphModule:
    from torch.export.passes import move_to_device_pass

    for table in (program.state_dict, program.constants):
        for name, value in table.items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                made = torch.zeros_like(value, device="cpu")
                table[name] = torch.nn.Parameter(made, False) if isinstance(value, torch.nn.Parameter) else made
    program._example_inputs = None
    return move_to_device_pass(program, "cpu").module(check_guards=False)


def _arguments(program: torch.export.ExportedProgram) -> list[torch.Tensor]:
    names = set(program.graph_signature.user_inputs)
    given = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    return [torch.zeros(value.shape, dtype=value.dtype) for value in given]


def _is_counted(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, _CountedError):
            return True
        error = error.__cause__ or error.__context__ or getattr(error, "inner_exception", None)
    return False


if __name__ == "__main__":
    main(sys.argv[1:])
