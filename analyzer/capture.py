"""A request -> frames: builds the model, makes its inputs and traces each phase, one after the other.

A phase that fails does not take the others with it. This runs the user's code: in a box, or in the caller's process
for modules that live there.
"""

import contextlib
import dataclasses
import gc
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from .caches import cache_growth
from .errors import TargetError, TraceError, WorkloadError
from .graph import Graph
from .handover import BUILDING, Failure, Frame, Opened, PhaseFailed, PhaseTraced, Progress, as_failure
from .load import Model, from_module, from_program, load
from .places import raised_at
from .report import ModelInfo
from .request import Request
from .scenario import Scenario
from .trace import trace
from .values import assuming
from .workload import Program, Workload, plan

Inputs = tuple[Any, ...] | Mapping[str, Any]


def from_request(request: Request, *, debug: bool = False) -> Iterator[Frame]:
    """Frames of a target as named on the command line.

    Raises:
        FxroofError: the model cannot be built, or no phase has inputs.
    """
    yield Progress(BUILDING)
    here = Path.cwd()
    try:
        model = load(
            request.target,
            init=request.init,
            dtype=request.dtype,
            attention=request.attention,
            trust_remote_code=request.trust_remote_code,
        )
        os.chdir(here)  # a file may change it, and source lines are shown relative to where the user is
        yield from from_model(
            model, request.scenario, request.phase, inputs=request.inputs, assume=request.assume, debug=debug
        )
    except SystemExit as error:
        raise ended(request.target, error) from error


def from_live(
    value: nn.Module | ExportedProgram,
    example_inputs: Inputs | None,
    scenario: Scenario,
    phase: str,
    dtype: str,
    assume: Sequence[str] = (),
) -> Iterator[Frame]:
    """Frames of what the caller already has: a module, a GraphModule or an exported program. Errors as above."""
    yield Progress("copying the model to the meta device")
    if isinstance(value, ExportedProgram):
        if dtype != "as-is" or example_inputs is not None:
            raise WorkloadError(
                "An exported program is analysed in the types and for the inputs that it was exported with.",
                "Leave out dtype and example_inputs, or give the module that it was exported from.",
            )
        model = from_program(value)
    else:
        model = from_module(value, dtype=dtype)
    if example_inputs is None and isinstance(value, fx.GraphModule):
        example_inputs = _recorded_inputs(value)
    if example_inputs is not None:
        given, only = example_inputs, "forward" if phase == "all" else phase
        model = dataclasses.replace(model, example_inputs=lambda name, *_: given if name == only else None)
    yield from from_model(model, scenario, phase, assume=assume)


def from_model(
    model: Model,
    scenario: Scenario,
    phase: str = "all",
    *,
    inputs: Sequence[str] = (),
    assume: Sequence[str] = (),
    debug: bool = False,
) -> Iterator[Frame]:
    """Frames of a loaded model. Errors as above."""
    with _without_collection(), assuming(frozenset(assume)):
        workload, failures = _planned(model, scenario, phase, inputs)
        yield Opened(
            model=_info(model, workload, assume),
            scenario=workload.scenario,
            phases=(*failures, *(program.phase.name for program in workload.programs)),
            torch_version=str(torch.__version__),
        )
        for name, failure in failures.items():
            yield PhaseFailed(name, failure)
        for program in workload.programs:
            name = program.phase.name
            yield Progress(f"tracing {name}")
            try:
                yield PhaseTraced(_traced(program))
            except (Exception, SystemExit) as error:
                if debug:
                    traceback.print_exception(error)
                known = ended(model.source or model.name, error) if isinstance(error, SystemExit) else error
                yield PhaseFailed(name, as_failure(known))


def ended(what: str, error: BaseException) -> TargetError:
    """The error of user code that tried to end the program, by whatever it raised."""
    how = (
        f"ended the program (exit {error.code})" if isinstance(error, SystemExit) else f"raised {type(error).__name__}"
    )
    return TargetError(
        f"{what}: its code {how} while it was loaded or traced{raised_at(error)}.",
        "Put what must not run on import under: if __name__ == '__main__':",
    )


def _planned(
    model: Model, scenario: Scenario, phase: str, inputs: Sequence[str]
) -> tuple[Workload, dict[str, Failure]]:
    """The programs to trace; where they cannot be had all at once, those that can be had one by one."""
    try:
        return plan(model, scenario, phase, inputs), {}
    except (WorkloadError, TraceError) as error:
        if phase != "all" or inputs:
            raise
        found, failures = _planned_apart(model, scenario, error.message)
        if not found or not failures:
            raise error from None
        programs = tuple(program for workload in found for program in workload.programs)
        return dataclasses.replace(found[0], programs=programs), failures


def _planned_apart(model: Model, scenario: Scenario, reason: str) -> tuple[list[Workload], dict[str, Failure]]:
    """The phases that can be had alone, and those that fail for that reason: others the model does not have."""
    found: list[Workload] = []
    failures: dict[str, Failure] = {}
    for name in ("encoder", "prefill", "decode"):
        try:
            found.append(plan(model, scenario, name))
        except (WorkloadError, TraceError) as error:
            if error.message == reason:
                failures[name] = as_failure(error)
    return found, failures


def _traced(program: Program) -> Graph:
    return trace(program.module, program.args, phase=program.phase, cache=program.cache, prefix=program.prefix)


def _info(model: Model, workload: Workload, assume: Sequence[str]) -> ModelInfo:
    return ModelInfo(
        name=model.name,
        source=model.source,
        parameters=model.parameters,
        parameter_bytes=model.parameter_bytes,
        dtypes=model.dtypes,
        cache_kind=workload.cache_kind,
        cache=cache_growth(model, workload),
        notes=(*model.notes, *workload.notes, *(f"assumed where values are needed: {name}" for name in assume)),
    )


def _recorded_inputs(module: fx.GraphModule) -> Inputs:
    recorded = tuple(node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder")
    if any(value is None for value in recorded):
        raise WorkloadError(
            "This GraphModule does not record its inputs.", "Give them: analyze(module, example_inputs=(x,), gpu=...)."
        )
    return tuple(
        torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta") if isinstance(v, torch.Tensor) else v
        for v in recorded
    )


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    # a trace allocates millions of objects that all live to its end: looking for garbage among them costs a tenth
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
