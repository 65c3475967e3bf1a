"""The box that a model's code runs in: a process of its own with limits on time and memory. No torch on this side.

The child (`worker.py`) is a fresh interpreter that leads a process group, is told what to do on its standard input and
answers in frames on a pipe of its own. What its code prints goes to standard error. However that code ends, hangs or
grows, `Box.frames` gives what was complete, then says in one error what happened, and nothing of the group is left.

A box keeps accidents in, not attackers: it takes no rights away from the code that runs in it.
"""

import codecs
import contextlib
import os
import re
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .clocked import Order
from .errors import BoxError, TargetError
from .handover import BUILDING, WORKER, Finished, Frame, Job, Progress, Question, Refused, stack_signal
from .places import is_users, shown
from .request import Request

AVAILABLE = os.name == "posix"
"""Elsewhere there are no process groups and no pipes to pass on: the code runs in the caller's process."""

_TICK = 0.1
_GRACE = 2.0
_STARTUP = 300.0
_CHUNK = 1 << 20
_SHARE_OF_MEMORY = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the child may take.

    Attributes:
        seconds: wall time from where the model's code begins to run; 0 for no limit.
        memory: bytes that the child and its children hold; 0 for no limit, None for most of what this machine has.
    """

    seconds: float = 600.0
    memory: int | None = None


class Box:
    """A child process that builds and traces, and runs if there is an order: enter to start it, leave to be rid of it.

    Raises:
        BoxError: on entering: the child cannot be started.
        TargetError: on entering: this process is itself the child of a box.
    """

    def __init__(self, request: Request, *, limits: Limits, debug: bool = False, order: Order | None = None) -> None:
        self._target = request.target
        self._request = request
        self._limits = limits
        self._debug = debug
        self._order = order
        self._secret = secrets.token_hex(16)
        self._doing = ""
        self._finished = False
        self._buffer = bytearray()
        self._decode = msgspec.msgpack.Decoder(Frame).decode
        self._text = codecs.getincrementaldecoder("utf-8")("replace")

    def __enter__(self) -> "Box":
        _refuse_a_box_in_a_box(self._target)
        self._memory = _memory_limit(self._limits.memory)
        self._until = time.monotonic() + self._limits.seconds + _STARTUP
        self._answers, answers_end = os.pipe()
        self._places, places_end = os.pipe()
        questions_end, self._questions = os.pipe()
        try:
            self._child = self._started(answers_end, questions_end, places_end)
        except BaseException:
            os.close(self._answers)
            os.close(self._places)
            os.close(self._questions)
            raise
        finally:
            os.close(answers_end)
            os.close(places_end)
            os.close(questions_end)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._questions)  # nothing more is asked: the child leaves
        try:
            if self._finished:
                self._await_end()
        finally:
            self._kill()
            os.close(self._answers)
            os.close(self._places)

    def again(self, question: Question) -> Iterator[Frame]:
        """What the child hands over of the same model in another scenario; nothing where it has ended.

        Raises:
            BoxError: as `frames`, which must have come to an end.
        """
        if not self._finished:
            return
        self._finished = False
        self._until = time.monotonic() + self._limits.seconds
        try:
            os.write(self._questions, msgspec.json.encode(question) + b"\n")
        except OSError:
            return
        yield from self.frames()

    def frames(self) -> Iterator[Frame]:
        """What the child hands over, as it comes.

        Raises:
            BoxError: the child exceeded a limit, broke the pipe, or ended before it was done.
        """
        ended = closed = 0.0
        next_look = 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            selector.register(self._noise, selectors.EVENT_READ)
            while True:
                # asked before reading: whatever the child wrote before its end is then there to be read
                if not ended and self._child.poll() is not None:
                    ended = time.monotonic()
                ready = selector.select(0 if ended else _TICK)
                for key, _ in ready:
                    data = os.read(key.fd, _CHUNK)
                    if not data:
                        selector.unregister(key.fd)
                        closed = time.monotonic() if key.fd == self._answers else closed
                    elif key.fd == self._answers:
                        self._buffer += data
                    else:
                        self._relay(data)
                for frame in self._received():
                    self._note(frame)
                    self._finished = isinstance(frame, Finished | Refused)
                    yield frame
                    if self._finished:
                        return
                now = time.monotonic()
                if ended and (not ready or now > ended + _GRACE):
                    raise self._death()
                if closed and not ended and now > closed + _GRACE:
                    raise self._broken("closed the pipe that fxroof waits at")
                if self._limits.seconds and now > self._until:
                    raise self._too_slow()
                if now > next_look:
                    next_look = now + _TICK
                    self._weigh()

    def _started(self, answers_end: int, questions_end: int, places_end: int) -> "subprocess.Popen[bytes]":
        job = Job(
            request=self._request,
            secret=self._secret,
            answers=answers_end,
            questions=questions_end,
            places=places_end,
            parent=os.getpid(),
            debug=self._debug,
            order=self._order,
        )
        try:
            told = msgspec.json.encode(job)
        except UnicodeEncodeError as error:
            raise TargetError(f"{self._target!r}: a name that is not valid UTF-8.", "Rename the file.") from error
        try:
            child = subprocess.Popen(  # noqa: S603  # our own module in our own interpreter
                [sys.executable, "-P", "-u", "-m", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(answers_end, questions_end, places_end),
                start_new_session=True,
            )
        except OSError as error:
            raise BoxError(f"{sys.executable or 'Python'} cannot be started: {error.strerror}.") from error
        assert child.stdin is not None and child.stdout is not None  # noqa: S101, PT018  # narrows what PIPE gives
        self._noise = child.stdout
        with contextlib.suppress(BrokenPipeError), child.stdin:
            child.stdin.write(told)
        return child

    def _received(self) -> Iterator[Frame]:
        head = self._secret.encode()
        start = len(head) + 8
        while len(self._buffer) >= start:
            if not self._buffer.startswith(head):
                raise self._broken("wrote into the pipe that fxroof waits at")
            end = start + int.from_bytes(self._buffer[len(head) : start], "big")
            if len(self._buffer) < end:
                return
            try:
                frame: Frame = self._decode(memoryview(self._buffer)[start:end])
            except msgspec.MsgspecError as error:
                raise self._broken("wrote into the pipe that fxroof waits at") from error
            self._buffer = self._buffer[end:]
            yield frame

    def _note(self, frame: Frame) -> None:
        if isinstance(frame, Progress):
            self._doing = frame.message
            if frame.message == BUILDING:  # how long torch took to import says nothing of the model
                self._until = time.monotonic() + self._limits.seconds

    def _relay(self, data: bytes) -> None:
        text = self._text.decode(data)
        with contextlib.suppress(OSError, ValueError):  # our own standard error may be closed
            if sys.stderr is not None:
                sys.stderr.write(text)
                sys.stderr.flush()

    def _await_end(self) -> None:
        """Let the child finish what it prints and tidies up at its end, for a while."""
        until = time.monotonic() + _GRACE
        with selectors.DefaultSelector() as selector:
            selector.register(self._noise, selectors.EVENT_READ)
            while (left := until - time.monotonic()) > 0:
                ended = self._child.poll() is not None
                ready = selector.select(0 if ended else min(left, _TICK / 10))
                data = os.read(self._noise.fileno(), _CHUNK) if ready else b""
                if data:
                    self._relay(data)
                elif ready:
                    self._child.wait(left)
                    return
                elif ended:
                    return

    def _kill(self) -> None:
        family = _family(self._child.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)
        for member in family[1:]:  # those that left the group
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(member, signal.SIGKILL)
        self._child.wait()
        self._noise.close()

    def _weigh(self) -> None:
        if not self._memory:
            return
        family = _family(self._child.pid)
        held = sum(map(_held, family))
        if held > self._memory and len(family) > 1:
            held = sum(map(_held_alone, family))  # children that were forked share pages with their parent
        if held > self._memory:
            raise BoxError(
                f"{self._target}: stopped{self._while()}{self._place()}: its process held {held / 1e9:.1f} GB, "
                f"more than the limit of {self._memory / 1e9:.1f} GB.",
                f"{_WHAT_TAKES_IT if self._order is None else ''}--memory-limit sets another limit.",
            )

    def _too_slow(self) -> BoxError:
        return BoxError(
            f"{self._target}: not done after {self._limits.seconds:g} seconds: stopped{self._while()}{self._place()}.",
            "--timeout sets another limit, 0 none; a shorter --input-len makes loops over tokens shorter.",
        )

    def _broken(self, what: str) -> BoxError:
        return BoxError(f"{self._target}: its code {what}{self._while()}.", "Leave file descriptors alone.")

    def _death(self) -> BoxError:
        code = self._child.returncode
        if not self._doing:
            return BoxError(
                f"{sys.executable} could not run {WORKER}: it ended with {_ending(code)}.",
                "What it printed says why.",
            )
        if code >= 0:
            hint = "Put what must not run on import under: if __name__ == '__main__':"
        elif code == -signal.SIGKILL:
            hint = "The system does that when memory runs out."
        else:
            hint = "Endless recursion and errors in extension modules end so; --debug shows the line."
        return BoxError(f"{self._target}: its code ended the process{self._while()} with {_ending(code)}.", hint)

    def _while(self) -> str:
        return f" while {self._doing}" if self._doing else ""

    def _place(self) -> str:
        """Where in the user's code the child is, by the stack that it writes when signalled."""
        if not self._doing:
            return ""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self._child.pid, stack_signal())
        with selectors.DefaultSelector() as selector:
            selector.register(self._places, selectors.EVENT_READ)
            if not selector.select(1.0):
                return ""
        time.sleep(_TICK)  # the stack comes in several writes
        stack = os.read(self._places, _CHUNK).decode("utf-8", "replace")
        frames = re.findall(r'^  File "(.+)", line (\d+) in ', stack, re.MULTILINE)
        return next((f" at {shown(file)}:{line}" for file, line in frames if is_users(file)), "")


_WHAT_TAKES_IT = "Weights take no memory in fxroof: look for data that this line loads or computes. "


def _refuse_a_box_in_a_box(target: str) -> None:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name == WORKER:
        raise TargetError(
            f"{target}: to be analysed by the code of a file that fxroof is analysing.",
            "Put the call under: if __name__ == '__main__':",
        )


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _memory_limit(wanted: int | None) -> int:
    if wanted == 0:
        return 0
    if not Path("/proc/self/status").exists():
        if wanted:
            raise BoxError("A memory limit needs /proc, which this system does not have.", "Leave out --memory-limit.")
        return 0
    return wanted or int(_SHARE_OF_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _family(process: int) -> Sequence[int]:
    """A process and all its descendants."""
    family = [process]
    for member in family:
        for children in Path(f"/proc/{member}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                family += map(int, children.read_text().split())
    return family


def _held(process: int) -> int:
    """Bytes of memory that cannot be had back from a process, pages of files left out."""
    return _kilobytes(f"/proc/{process}/status", ("RssAnon:", "RssShmem:"))


def _held_alone(process: int) -> int:
    """The same, pages that several processes share divided between them."""
    return _kilobytes(f"/proc/{process}/smaps_rollup", ("Pss_Anon:", "Pss_Shmem:"))


def _kilobytes(file: str, fields: tuple[str, ...]) -> int:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(fields))
