"""What the tracing side hands to the pricing side: frames, in this process or through the box's pipe. No torch here.

A model that fails in one phase hands over the others: `collect` gives what was complete, and names what was not.
"""

import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from .clocked import Clocked, Order
from .errors import FxroofError
from .graph import Graph
from .report import ModelInfo, PhaseFailure, Traced
from .request import Request
from .scenario import Scenario

Say = Callable[[str], None]
"""Told what is being done, for a status line."""

WORKER = "fxroof.analyzer.worker"
"""The module that the child of a box runs."""

BUILDING = "building the model on the meta device"
"""The progress with which the user's code begins to run: time is counted from there."""

BUG = "This is a bug in fxroof. Please report it with the output of the same command and --debug."


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An FxroofError as data: the name of its class, its message and its hint."""

    kind: str
    message: str
    hint: str


class Progress(msgspec.Struct, frozen=True, tag=True):
    """What is being done from now on."""

    message: str


class Opened(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model is built and its inputs are made: a phase of each name follows, traced or failed."""

    model: ModelInfo
    scenario: Scenario
    phases: tuple[str, ...]
    torch_version: str


class PhaseTraced(msgspec.Struct, frozen=True, tag=True):
    """A phase's graph."""

    graph: Graph


class PhaseFailed(msgspec.Struct, frozen=True, tag=True):
    """A phase that has no graph, and why."""

    phase: str
    failure: Failure


class PhaseClocked(msgspec.Struct, frozen=True, tag=True):
    """What a phase took when it was run."""

    clocked: Clocked


class Calibrated(msgspec.Struct, frozen=True, tag=True):
    """What the machine was found to do, as the text of a TOML file of the catalogue's kind."""

    toml: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The end: nothing more can be handed over, and why."""

    failure: Failure


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The end: everything was handed over."""


Frame = Progress | Opened | PhaseTraced | PhaseFailed | PhaseClocked | Calibrated | Refused | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """A traced model, and by which torch."""

    traced: Traced
    torch_version: str


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A phase of the same model in another scenario, which the child of a box traces as well."""

    scenario: Scenario
    phase: str


Again = Callable[[Question], Iterable[Frame]]
"""Traces the model that was traced before once more."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What the child of a box is told.

    Attributes:
        request: what to build and trace.
        secret: what every frame starts with, so that nothing written by accident is taken for one.
        answers: file descriptor to write frames to.
        questions: file descriptor to read further questions from, one a line; what was asked first is done then.
        places: file descriptor to write the stack to when signalled.
        parent: process id of the box's owner, without which the child has no reason to live.
        debug: show tracebacks and the warnings of libraries.
        order: how to run the phases; None where they are only traced.
    """

    request: Request
    secret: str
    answers: int
    questions: int
    places: int
    parent: int
    debug: bool
    order: Order | None = None


def stack_signal() -> signal.Signals:
    """The signal that makes the child of a box write its stack."""
    return signal.SIGUSR2


def collect(frames: Iterable[Frame], say: Say) -> Collected:
    """All frames put together.

    Raises:
        FxroofError: there is no phase to show for it.
    """
    opened: Opened | None = None
    graphs: dict[str, Graph] = {}
    failed: dict[str, Failure] = {}
    try:
        for frame in frames:
            match frame:
                case Progress(message):
                    say(message)
                case Opened():
                    opened = frame
                case PhaseTraced(graph):
                    graphs[graph.phase] = graph
                case PhaseFailed(phase, failure):
                    failed[phase] = failure
                case Refused(failure):
                    raise as_error(failure)
                case Finished():
                    pass
    except FxroofError as error:
        if opened is None or not graphs:
            raise
        missing = (name for name in opened.phases if name not in graphs and name not in failed)
        failed |= dict.fromkeys(missing, as_failure(error))
    if opened is None or not graphs:
        raise as_error(next(iter(failed.values()), _NOTHING))
    return Collected(
        traced=Traced(
            model=opened.model,
            scenario=opened.scenario,
            graphs=graphs,
            failures=tuple(PhaseFailure(phase=n, message=f.message, hint=f.hint) for n, f in failed.items()),
        ),
        torch_version=opened.torch_version,
    )


def as_failure(error: Exception) -> Failure:
    """The error as data; what is no FxroofError is a bug of ours."""
    if isinstance(error, FxroofError):
        return Failure(kind=type(error).__name__, message=_sendable(error.message), hint=_sendable(error.hint))
    text = str(error).strip().split("\n", 1)[0][:300]
    message = f"internal error: {type(error).__name__}{': ' if text else ''}{text}"
    return Failure(kind=FxroofError.__name__, message=_sendable(message), hint=BUG)


def as_error(failure: Failure) -> FxroofError:
    """The error that a failure was made of, of the same class."""
    return _kinds().get(failure.kind, FxroofError)(failure.message, failure.hint)


def _kinds() -> dict[str, type[FxroofError]]:
    kinds: dict[str, type[FxroofError]] = {}
    waiting: list[type[FxroofError]] = [FxroofError]
    while waiting:
        kind = waiting.pop()
        kinds[kind.__name__] = kind
        waiting += kind.__subclasses__()
    return kinds


def _sendable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


_NOTHING = Failure(kind=FxroofError.__name__, message="internal error: nothing was traced", hint=BUG)
