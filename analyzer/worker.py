"""The child of a box, `python -m fxroof.analyzer.worker`: builds and traces what it is told on standard input.

It answers on a pipe of its own. fxroof, torch and what torch.export needs are imported before the user's folder becomes
importable, and the process ends when the work does, whatever threads the user's code has started.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import importlib
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from os import _exit as leave  # bound now: the user's code may replace it
from typing import NoReturn

import msgspec

from .handover import Finished, Frame, Job, Progress, Question, Refused, as_failure, stack_signal

_DIE_WITH_PARENT, _ADOPT_ORPHANS = 1, 36  # of prctl


def main() -> NoReturn:
    """Do the job on standard input, hand over its frames, and leave."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    send = _sender(job)
    send(Progress("importing torch"))
    _settle(job)
    try:
        _import_what_tracing_needs()
        from .capture import ended, from_request

        if job.order is None:
            frames, again = from_request(job.request, debug=job.debug)
        else:
            from .clock import from_order

            frames, again = from_order(job.request, job.order, debug=job.debug)
        _hand_over(frames, send)
        with open(job.questions, "rb") as questions:  # noqa: PTH123  # a file descriptor is all there is
            for line in questions:
                try:
                    _hand_over(again(msgspec.json.decode(line, type=Question)), send)
                except Exception as error:  # the next question may fare better
                    send(Refused(as_failure(error)))
    except BaseException as error:  # user code may raise anything to end the program
        if job.debug:
            traceback.print_exception(error)
        send(Refused(as_failure(error if isinstance(error, Exception) else ended(job.request.target, error))))
    _leave_tidily()


def _hand_over(frames: Iterable[Frame], send: Callable[[Frame], None]) -> None:
    for frame in frames:
        send(frame)
    send(Finished())


def _sender(job: Job) -> Callable[[Frame], None]:
    encode = msgspec.msgpack.Encoder().encode
    pipe, process = _identity(job.answers), os.getpid()

    def send(frame: Frame) -> None:
        if os.getpid() != process:
            leave(0)  # the user's code forked, and this is not the process that was asked
        payload = encode(frame)
        rest = memoryview(job.secret.encode() + len(payload).to_bytes(8, "big") + payload)
        try:
            if _identity(job.answers) != pipe:
                leave(1)  # the user's code closed it, and this is some file of its own
            while rest:
                rest = rest[os.write(job.answers, rest) :]
        except OSError:
            leave(1)

    return send


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _settle(job: Job) -> None:
    for descriptor in (job.answers, job.questions, job.places):
        os.set_inheritable(descriptor, False)
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123  # a file descriptor is all that is wanted
        os.dup2(nothing.fileno(), 0)
    sys.argv[:] = [job.request.target]
    faulthandler.register(stack_signal(), file=job.places, all_threads=False)
    if job.debug:
        faulthandler.enable()
    else:
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        prctl(_ADOPT_ORPHANS, 1, 0, 0, 0)  # so that the parent finds all descendants below this process
    if os.getppid() != job.parent:
        leave(1)


def _import_what_tracing_needs() -> None:
    # torch.export imports these when it is first used; a `profile.py` beside the user's file would be found then
    for name in ("numpy", "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "torch.export._trace"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _leave_tidily() -> NoReturn:
    with contextlib.suppress(BaseException):  # what the user's code asked to be done at the end
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    leave(0)


if __name__ == "__main__":
    main()
