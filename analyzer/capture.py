"""A request -> frames: builds the model, makes its inputs and traces each phase, one after the other.

A phase that fails does not take the others with it. This runs the user's code: in a box, or in the caller's process
for modules that live there.
"""

import contextlib
import dataclasses
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from .caches import cache_growth
from .errors import FxroofError, TargetError, TraceError, WorkloadError
from .garbage import without_collection
from .handover import BUILDING, Again, Failure, Frame, Opened, PhaseFailed, PhaseTraced, Progress, Question, as_failure
from .load import Model, from_module, from_program, load
from .meta import tracing
from .places import raised_at
from .report import ModelInfo
from .request import Request
from .scenario import Scenario
from .sharding import Sharding, sharded
from .trace import trace
from .values import assuming
from .workload import Program, Workload, plan

Inputs = tuple[Any, ...] | Mapping[str, Any]


Work = Callable[[Model, Program], Iterable[Frame]]
"""What is done with each phase that is ready to trace."""


def from_request(request: Request, *, debug: bool = False, work: Work | None = None) -> tuple[Iterator[Frame], Again]:
    """Frames of a target as named on the command line, and of the same model when it is asked for again.

    Without `work` each phase is traced.

    Raises, while the frames are made:
        FxroofError: the model cannot be built, or no phase has inputs.
    """
    built: list[Model] = []

    def frames() -> Iterator[Frame]:
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
            built.append(model)
            yield from from_model(
                model,
                request.scenario,
                request.phase,
                inputs=request.inputs,
                assume=request.assume,
                debug=debug,
                work=work,
            )
        except SystemExit as error:
            raise ended(request.target, error) from error

    def again(question: Question) -> Iterator[Frame]:
        if request.inputs or not built:
            raise WorkloadError("Inputs that were given by hand are those of one scenario.")
        yield from from_model(built[0], question.scenario, question.phase, assume=request.assume)

    return frames(), again


def from_live(
    value: nn.Module | ExportedProgram,
    example_inputs: Inputs | None,
    scenario: Scenario,
    phase: str,
    dtype: str,
    assume: Sequence[str] = (),
) -> tuple[Iterator[Frame], Again]:
    """The same of what the caller already has: a module, a GraphModule or an exported program. Errors as above."""
    built: list[Model] = []

    def frames() -> Iterator[Frame]:
        yield Progress("copying the model to the meta device")
        built.append(_live(value, example_inputs, phase, dtype))
        yield from from_model(built[0], scenario, phase, assume=assume)

    def again(question: Question) -> Iterator[Frame]:
        if not built:
            raise WorkloadError("There is no model to ask again.")
        yield from from_model(built[0], question.scenario, question.phase, assume=assume)

    return frames(), again


def _live(value: nn.Module | ExportedProgram, example_inputs: Inputs | None, phase: str, dtype: str) -> Model:
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
    return model


def from_model(
    model: Model,
    scenario: Scenario,
    phase: str = "all",
    *,
    inputs: Sequence[str] = (),
    assume: Sequence[str] = (),
    debug: bool = False,
    work: Work | None = None,
) -> Iterator[Frame]:
    """Frames of a loaded model. Errors as above."""
    work = work or _traced
    figures = _figures(model)
    with without_collection(), assuming(frozenset(assume)), contextlib.ExitStack() as shared:
        sharding, workload, failures = _planned_for_all(model, scenario, phase, inputs, shared)
        yield Opened(
            model=_info(model, figures, sharding, workload, assume),
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
                yield from work(model, program)
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


_MOST_LEFT_WHOLE = 4
"""Classes of modules that may turn out not to run on a share before the model is given up."""


def _planned_for_all(
    model: Model, scenario: Scenario, phase: str, inputs: Sequence[str], shared: contextlib.ExitStack
) -> tuple[Sharding | None, Workload, dict[str, Failure]]:
    """The programs to trace: the model's own, or those of a share of it, which it is until `shared` is closed.

    Modules whose forward does not run on a share are left whole.
    """
    if scenario.gpus == 1:
        return None, *_planned(model, scenario, phase, inputs)
    if model.program is not None:
        raise WorkloadError(
            f"{model.name} is an exported program: its shapes are those of one GPU, so it cannot be cut for several.",
            "Give the Python file or the transformers config that it was exported from.",
        )
    whole: frozenset[str] = frozenset()
    while True:
        share = functools.partial(sharded, model.module, tp=scenario.tp, ep=scenario.ep, whole=whole)
        with contextlib.ExitStack() as attempt:
            sharding = attempt.enter_context(share())
            try:
                workload, failures = _planned(model, scenario, phase, inputs)
            except FxroofError as error:
                problem, failed = error, _failed_on_share(error, model.module, sharding)
            else:
                failed = _failed_in_a_run(workload, model.module, sharding)
                if failed is None:
                    shared.push(attempt.pop_all())
                    return sharding, workload, failures
                problem = WorkloadError(f"{failed}: its forward does not run on a share of its layers.")
        failed = failed or _failed_on_inputs(model, share, scenario, phase, inputs)
        if failed is None or len(whole) == _MOST_LEFT_WHOLE:
            raise type(problem)(f"As one of {scenario.gpus} GPUs: {problem.message}", problem.hint)
        whole |= {failed}


def _failed_in_a_run(workload: Workload, root: nn.Module, sharding: Sharding) -> str | None:
    """As `_failed_on_share`, by a run before the trace; a share that passes its cache on has run to make it."""
    if not workload.programs or workload.cache_kind.startswith("passed"):
        return None
    program = workload.programs[0]
    try:
        with tracing(), contextlib.redirect_stdout(sys.stderr):
            program.module(*program.args)
    except Exception as error:  # others will come up in the trace
        return _failed_on_share(error, root, sharding)
    return None


def _failed_on_inputs(
    model: Model,
    share: Callable[[], contextlib.AbstractContextManager[Sharding]],
    scenario: Scenario,
    phase: str,
    inputs: Sequence[str],
) -> str | None:
    """As `_failed_on_share`, where the error was taken for one of guessed inputs: run on those of the whole model."""
    try:
        workload = plan(model, scenario, phase, inputs)
    except FxroofError:
        return None
    with share() as sharding:
        return _failed_in_a_run(workload, model.module, sharding)


def _failed_on_share(error: BaseException, root: nn.Module, sharding: Sharding) -> str | None:
    """The class of the innermost module that failed and whose layers are cut, if there is one below the model."""
    names = {id(module): name for name, module in root.named_modules()}
    called: list[Any] = []
    cause: BaseException | None = error
    while cause is not None:
        called += [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(cause.__traceback__)]
        cause = cause.__cause__ or cause.__context__
    for owner in (owner for owner in reversed(called) if id(owner) in names):
        inside = f"{names[id(owner)]}."
        if inside != "." and any(name.startswith(inside) for name in sharding.cut):
            return type(owner).__name__
    return None


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


def _traced(_: Model, program: Program) -> Iterator[Frame]:
    module, args, phase = program.module, program.args, program.phase
    yield PhaseTraced(trace(module, args, phase=phase, cache=program.cache, prefix=program.prefix))


def _figures(model: Model) -> ModelInfo:
    """What is known of a model before it is planned for, and cut."""
    return ModelInfo(
        name=model.name,
        source=model.source,
        parameters=model.parameters,
        parameter_bytes=model.parameter_bytes,
        dtypes=model.dtypes,
        cache_kind="",
        notes=model.notes,
    )


def _info(
    model: Model, figures: ModelInfo, sharding: Sharding | None, workload: Workload, assume: Sequence[str]
) -> ModelInfo:
    """The figures and what planning added; `model` is now a share if there is a sharding."""
    return dataclasses.replace(
        figures,
        cache_kind=workload.cache_kind,
        cache=cache_growth(model, workload, shards=sharding.cache_shards if sharding else 1),
        parameter_bytes_per_gpu=model.parameter_bytes if sharding else None,
        notes=(
            *figures.notes,
            *(sharding.notes if sharding else ()),
            *workload.notes,
            *(f"assumed where values are needed: {name}" for name in assume),
        ),
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
