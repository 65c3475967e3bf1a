"""Runs the phases of a model on a device and times them: as a whole, and op by op in the order of the graph's ops.

The model's own forward is run, eagerly and in inference mode, where PyTorch's dispatcher hands over the operators that
a graph has, not those that they are made of: they are those of the graph in the same order, and what is not is
reported.
"""

import contextlib
import datetime
import functools
import gc
import platform
import resource
import subprocess
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..hardware.catalog import CatalogError
from ..hardware.catalog import load as load_gpu
from ..hardware.gpu import Gpu
from .alignment import aligned
from .calls import Call, Decoder, Encoder, Features, Replay
from .capture import from_request
from .clocked import Clocked, ClockedCall, Machine, MeasureError, Order, Stray, part_of
from .graph import Graph, Role
from .handover import Again, Calibrated, Frame, PhaseClocked, PhaseTraced, Progress
from .load import Model
from .materialize import RealMemory, vocabulary_of
from .memory import moments
from .meta import keeping
from .pricing import price
from .request import Request
from .residence import defaults_to_host
from .trace import export, from_exported
from .workload import Program

LEAST_RUNS = 3
_WARM_UPS = 3
_PASSES = 5


def from_order(request: Request, order: Order, *, debug: bool = False) -> tuple[Iterator[Frame], Again]:
    """Frames of a target that is traced and then run; the model is not asked for again.

    Raises, while the frames are made:
        MeasureError: there is no such device, or no part to price against.
        FxroofError: as `capture.from_request`.
    """

    def frames() -> Iterator[Frame]:
        with on_threads(order.threads):
            yield from _frames(request, order, debug)

    def again(_: object) -> Iterator[Frame]:
        return iter(())

    return frames(), again


@contextlib.contextmanager
def on_threads(number: int) -> Iterator[None]:
    """Let a CPU compute on so many threads; 0 for as many as torch takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _frames(request: Request, order: Order, debug: bool) -> Iterator[Frame]:
    device = device_of(order.device)
    gpu = _part(order, device)
    with keeping() as kept:
        bench = Bench(device, gpu, order, RealMemory(device, kept)) if gpu else None

        def run(model: Model, program: Program) -> Iterator[Frame]:
            nonlocal bench
            if bench is None:  # not before there is something to run: a typing error should not cost ten seconds
                from .calibrate import QUICK, calibrate, to_toml

                yield Progress("measuring this machine, which takes some ten seconds")
                toml = to_toml(calibrate(device, QUICK))
                yield Calibrated(toml)
                bench = Bench(device, part_of(toml).gpu, order, RealMemory(device, kept))
            yield from bench.frames(model, program)

        traced, _ = from_request(request, debug=debug, work=run)
        yield from traced


def device_of(name: str) -> torch.device:
    """The device of that name, `auto` being the first GPU or, without one, the CPU.

    Raises:
        MeasureError: this machine does not have it.
    """
    there = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if there else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MeasureError(f"{name!r} is no device.", "Use cuda, cuda:1 or cpu.") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise MeasureError(f"{name}: fxroof measures on CUDA devices and on the CPU.", "Use cuda or cpu.")
    if not there:
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise MeasureError(
            f"{name}: {built} (torch {torch.__version__}).",
            "--device cpu measures on the CPU; `python -c 'import torch; torch.cuda.init()'` says why there is none.",
        )
    try:
        index = device.index if ":" in name else torch.cuda.current_device()
        known = index < torch.cuda.device_count()
        if known:
            torch.cuda.mem_get_info(index)  # whether it lets this process in is not known before something is asked
    except (RuntimeError, AssertionError) as error:
        raise MeasureError(
            f"{name}: CUDA does not start: {_first_line(error)}", "--device cpu measures on the CPU."
        ) from error
    if not known:
        raise MeasureError(f"{name}: this machine has {torch.cuda.device_count()} CUDA device(s), from cuda:0 on.")
    return torch.device("cuda", index)


def machine_of(device: torch.device) -> Machine:
    """What the device is."""
    on_gpu = device.type == "cuda"
    return Machine(
        device=str(device),
        name=torch.cuda.get_device_name(device) if on_gpu else _processor(),
        driver=_driver() if on_gpu else "",
        torch_version=str(torch.__version__),
        threads=0 if on_gpu else torch.get_num_threads(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def free_bytes(device: torch.device) -> int | None:
    """Memory of the device that a program can still have; None where the system does not say."""
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


class Bench:
    """Runs the phases of one model, which share its weights.

    Args:
        device: where.
        gpu: the part that they are priced on, for the size of its cache and the choice of kernels.
        order: how.
        memory: where the weights are made.
    """

    def __init__(self, device: torch.device, gpu: Gpu, order: Order, memory: RealMemory) -> None:
        self.device = device
        self.gpu = gpu
        self.order = order
        self.memory = memory
        self.clock: _Clock = _CudaClock(device) if device.type == "cuda" else _CpuClock()

    def frames(self, model: Model, program: Program) -> Iterator[Frame]:
        """A phase's graph, and what it took.

        Raises:
            MeasureError: there is not memory enough, or the model does not run.
        """
        if model.packed is not None:
            raise MeasureError(
                f"{model.name} is quantised: fxroof prices its kernels, but PyTorch alone cannot run them.",
                "Measure the model without its quantization_config.",
            )
        given = program.module
        exported = given if isinstance(given, ExportedProgram) else export(given, program.args)
        graph = from_exported(exported, program.args, phase=program.phase, cache=program.cache, prefix=program.prefix)
        yield PhaseTraced(graph)
        yield Progress(f"running {program.phase.name} on {self.device}")
        if self.device.type == "cuda":
            gc.collect()  # which is off while phases are made: cycles of the last one hold memory of the device
        needed = self._needed(graph)
        self._check_memory(program.phase.name, needed)
        try:
            with torch.inference_mode(), self.memory.inside(model.module), self._default_device():
                clocked = self._clocked(model, program, graph, needed)
        except torch.OutOfMemoryError as error:
            _let_go(error)
            raise MeasureError(
                f"{program.phase.name}: {self.device} ran out of memory: {_first_line(error)}", _SMALLER
            ) from error
        except (RuntimeError, NotImplementedError, AssertionError, TypeError, ValueError, IndexError) as error:
            _let_go(error)
            raise MeasureError(
                f"{program.phase.name} does not run on {self.device}: {type(error).__name__}: {_first_line(error)}",
                "A device written into the model's code must be the one that is measured on (--device).",
            ) from error
        yield PhaseClocked(clocked)

    def _default_device(self) -> contextlib.AbstractContextManager[object]:
        """What the program has made of the default device, which was only noted: nothing is on a GPU otherwise."""
        return self.device if self.device.type == "cuda" and not defaults_to_host() else contextlib.nullcontext()

    def _clocked(self, model: Model, program: Program, graph: Graph, needed: int) -> Clocked:
        args = self.memory.inputs(program.args, vocabulary_of(model.module))
        counters = [(counter, counter.clone()) for counter in _counters([*args, *model.module.buffers()])]
        ready = self._ready(program, args)

        def prepare(wrap: _Wrap | None = None) -> _Run:
            for counter, beginning in counters:
                if not torch.equal(counter, beginning):
                    counter.copy_(beginning)
            return ready(wrap)

        self._through(prepare())  # what is set up when it is first used is no part of a step
        peak = self.clock.peak_bytes(prepare())
        runs = self._timed(prepare)
        mode, failure, skipped = "", "", 0
        compiled: Sequence[float] = ()
        if self.order.compile:
            before = _graphs_skipped()
            mode, compiled, failure = self._compiled(program, args, prepare)
            skipped = _graphs_skipped() - before if self.device.type == "cuda" else 0
        calls: tuple[ClockedCall, ...] = ()
        strays: tuple[Stray, ...] = ()
        passes, problem = 0, ""
        if self.order.kernels:
            try:
                calls, strays, passes = self._by_op(prepare, graph)
            except _NotAlignedError as error:
                problem = str(error)
            except RuntimeError as error:  # of the profiler, or for want of memory: the whole phase stands
                problem = f"{type(error).__name__}: {_first_line(error)}"
                _let_go(error)
        return Clocked(
            phase=program.phase.name,
            machine=machine_of(self.device),
            runs=tuple(runs),
            compiled_runs=tuple(compiled),
            compiled_mode=mode,
            compiled_failure=failure,
            graphs_skipped=skipped,
            calls=calls,
            strays=strays,
            passes=passes,
            clock=self.clock.overhead(),
            kernels_failure=problem,
            peak_bytes=peak,
            needed_bytes=needed,
        )

    def _ready(self, program: Program, args: Sequence[Any]) -> "_Prepare":
        if isinstance(program.module, ExportedProgram):
            steps = _Steps(program.module, args, self.memory)
            return lambda _: steps.run
        return functools.partial(_prepared, program.module, args, self.memory)

    def _needed(self, graph: Graph) -> int:
        """Bytes that tensors take at most while the phase runs."""
        resident = sum(s.nbytes for s in graph.storages if s.role in (Role.WEIGHT, Role.CONSTANT))
        return resident + max((moment.nbytes for moment in moments(graph, price(graph, self.gpu))), default=0)

    def _check_memory(self, phase: str, needed: int) -> None:
        free = free_bytes(self.device)
        more = needed - self.memory.held_bytes
        if free is not None and more > free:
            raise MeasureError(
                f"{phase} needs about {needed / 1e9:.3g} GB of memory on {self.device}, "
                f"of which {free / 1e9:.3g} GB are free.",
                _SMALLER,
            )

    def _timed(self, prepare: "Callable[[], _Run]", *, mark: bool = False) -> list[float]:
        began = time.perf_counter()
        taken: list[float] = []
        while len(taken) < max(LEAST_RUNS, self.order.runs):
            run = prepare()
            if mark:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch leaves it so
            taken.append(self.clock.time(run))
            if time.perf_counter() - began > self.order.seconds and len(taken) >= LEAST_RUNS:
                break
        return taken

    def _through(self, run: "_Run") -> None:
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _compiled(self, program: Program, args: Sequence[Any], prepare: "_Prepare") -> tuple[str, list[float], str]:
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        if isinstance(program.module, ExportedProgram):
            return mode, [], "an exported program is run as it is"
        wrap = functools.cache(functools.partial(torch.compile, mode=mode, dynamic=False))
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            for tensor in args:
                if isinstance(tensor, torch.Tensor):  # or CUDA graphs copy the whole cache in each step
                    torch._dynamo.mark_static_address(tensor)
        try:
            for _ in range(_WARM_UPS):  # compiles, then records the CUDA graph, then replays it
                run = prepare(wrap)
                if on_gpu:  # or a graph would be recorded as what follows the last one, if that has left anything
                    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch leaves it so
                self._through(run)
            return mode, self._timed(lambda: prepare(wrap), mark=on_gpu), ""
        except Exception as error:  # whatever a compiler raises: the eager figures stand
            failure = f"{type(error).__name__}: {_first_line(error)}"
            _let_go(error)
            return mode, [], failure
        finally:
            torch._dynamo.reset()
            if on_gpu:
                gc.collect()  # the memory of CUDA graphs is given back with the last object of theirs

    def _by_op(
        self, prepare: "Callable[[], _Run]", graph: Graph
    ) -> tuple[tuple[ClockedCall, ...], tuple[Stray, ...], int]:
        expected, members = _expected(graph)
        record = _Parts()
        run = prepare()
        with record:
            self._through(run)
        found = aligned(expected, record.signatures)
        began = time.perf_counter()
        passes: list[list[float]] = []
        kernels: list[int] | None = None
        while len(passes) < _PASSES and (len(passes) < 2 or time.perf_counter() - began < self.order.seconds):
            times, kernels, signatures = self.clock.times(prepare())
            if signatures != record.signatures:
                raise _NotAlignedError("the operators that it runs differ from run to run")
            passes.append(times)
        faults = self.clock.faults(prepare())
        return _put_together(members, record, found, passes, kernels, faults)


_SMALLER = "Use a smaller --batch-size or --input-len, or build fewer layers with --init."

_Run = Callable[[], Any]
_Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
_Prepare = Callable[..., _Run]
Signature = tuple[str, tuple[tuple[int, ...], ...]]


class _NotAlignedError(Exception):
    """Ops cannot be told apart."""


def _prepared(module: nn.Module, args: Sequence[Any], memory: RealMemory, wrap: _Wrap | None = None) -> _Run:
    """A call of the user's forward, ready to go: what belongs to no step of theirs, as copying a cache, is done."""

    def through(function: Any) -> Callable[..., Any]:
        return function if wrap is None else wrap(function)

    match module:
        case Call() if module.template[0] is not None:
            state = memory.state(module.template[0], args[1:])
            return functools.partial(through(module.model), args[0], **{module.cache_argument: state}, **module.fixed)
        case Call():
            positional = args[: len(args) - len(module.names)]
            named = dict(zip(module.names, args[len(positional) :], strict=True))
            return functools.partial(through(module.model), *positional, **named, **module.fixed)
        case Replay():
            given = module.given[0]
            positional, named = memory.state((given.args, dict(given.kwargs)), args)
            return functools.partial(through(module.model), *positional, **named)
        case Decoder():
            state = memory.state(module.state[0], args[2:])
            return functools.partial(through(module.run), args[0], args[1], state)
        case Encoder() | Features():
            return functools.partial(through(module), *args)
    return functools.partial(through(module), *args)


def _counters(tensors: Iterable[Any]) -> list[torch.Tensor]:
    """Those that may count steps: each run begins where the first one did, not behind the end of its cache."""
    return [
        tensor
        for tensor in tensors
        if isinstance(tensor, torch.Tensor)
        and tensor.numel() <= _MOST_COUNTERS
        and not (tensor.is_floating_point() or tensor.is_complex())
    ]


_MOST_COUNTERS = 4096


def _graphs_skipped() -> int:
    """Graphs so far that torch.compile did not make CUDA graphs of: it says so in its logs alone."""
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


def _let_go(error: BaseException) -> None:
    """Drop what the frames of an error hold: all the tensors of a run, as long as somebody keeps the error."""
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it so
    """Writes down the operators that run, and what they return."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it so
        self.signatures: list[Signature] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.signatures.append(_signature(func, result))
        return result


def _signature(func: Any, result: Any) -> Signature:
    if isinstance(result, torch.Tensor):
        return _spelt_alike(str(func)), (tuple(result.shape),)
    shapes = tuple(tuple(t.shape) for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
    return _spelt_alike(str(func)), shapes


def _spelt_alike(target: str) -> str:
    """`aten.to` for all ways to ask for a type or a device: a trace knows one device, and asks for none."""
    return "aten.to" if target.startswith(("aten.to.", "fxroof.to_")) else target


class _Parts(_Recorder):
    """Writes down the operators that run, and those that they are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[list[str]] = []
        self._depth = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._depth:
            self.parts.append([])
        result = self._taken_apart(func, args, kwargs or {})
        if result is NotImplemented:
            result = func(*args, **(kwargs or {}))
            self.parts[-1].append(str(func))
        if not self._depth:
            self.signatures.append(_signature(func, result))
        return result

    def _taken_apart(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not isinstance(func, torch._ops.OpOverload) or not func._can_decompose():
            return NotImplemented
        self._depth += 1
        try:
            with self:  # type: ignore[no-untyped-call]  # torch leaves it so
                return func.decompose(*args, **kwargs)
        finally:
            self._depth -= 1


def _expected(graph: Graph) -> tuple[list[Signature], list[tuple[str, ...]]]:
    """What a graph runs, in order; and the ops that each of those stands for: several where one has a body."""
    expected: list[Signature] = []
    members: list[tuple[str, ...]] = []
    bodies: list[str] = []
    for op in graph.ops:
        if op.repeat != 1 or op.branch or op.kernel:  # of a body, written down before the op that runs it
            bodies.append(op.name)
            continue
        if op.target.startswith(_OF_THE_TRACE):
            continue
        joins = op.target.startswith("higher_order.")
        target = op.target.removeprefix("higher_order.")
        expected.append((_spelt_alike(target), tuple(graph.tensors[i].shape for i in op.outputs)))
        members.append((*(bodies if joins else ()), op.name))
        if joins:
            bodies = []
    return expected, members


class _Steps:
    """An exported program, run node by node on real tensors.

    Args:
        exported: the program.
        args: real inputs.
        memory: where its weights are.
    """

    def __init__(self, exported: ExportedProgram, args: Sequence[Any], memory: RealMemory) -> None:
        self._exported = exported
        self._memory = memory
        self._given = self._all_given(args)
        self._constants: dict[fx.Node, Any] = {}

    def run(self) -> Any:
        """The program's results."""
        return self._run(self._exported.graph_module, dict(self._given))

    def _all_given(self, args: Sequence[Any]) -> dict[fx.Node, Any]:
        program = self._exported
        kinds = torch.export.graph_signature.InputKind
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        given = iter(args)
        env: dict[fx.Node, Any] = {}
        for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
            if spec.kind == kinds.USER_INPUT:
                env[node] = next(given, None)
                continue
            target = str(spec.target)
            value: Any = program.state_dict.get(target, program.constants.get(target))
            if isinstance(value, torch.Tensor):
                value = self._memory.tensor(value.detach(), f".{target}", weight=spec.kind == kinds.PARAMETER)
            env[node] = value
        return env

    def _run(self, graph_module: fx.GraphModule, env: dict[fx.Node, Any]) -> Any:
        left = {node: len(node.users) for node in graph_module.graph.nodes}
        for node in graph_module.graph.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], lambda n: env[n])
            if node.op == "get_attr":
                if node not in self._constants:  # to bring them to the device is no part of a step
                    value: Any = functools.reduce(getattr, node.target.split("."), graph_module)
                    self._constants[node] = self._memory.tensor(value) if isinstance(value, torch.Tensor) else value
                env[node] = self._constants[node]
            elif node.op == "call_function":
                args = fx.node.map_arg(node.args, lambda n: env[n])
                kwargs = fx.node.map_arg(node.kwargs, lambda n: env[n])
                env[node] = self._call(node, self._on_device(args), self._on_device(kwargs))
            for used in node.all_input_nodes:  # as Python would, let go of what is not needed any more
                left[used] -= 1
                if not left[used]:
                    del env[used]
        return None

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            bodies = [a for a in args if isinstance(a, fx.GraphModule)]
            if str(target) in _CONTEXTS and len(bodies) == 1:
                operands = args[args.index(bodies[0]) + 1 :]
                holes = [n for n in bodies[0].graph.nodes if n.op == "placeholder"]
                return self._run(bodies[0], dict(zip(holes, operands, strict=False)))
        elif isinstance(target, torch._ops.OpOverload) and target.namespace == "fxroof":
            return _moved(str(target), args, self._memory.device)
        return target(*args, **kwargs)

    def _on_device(self, values: Any) -> Any:
        return pytree.tree_map_only(torch.device, lambda _: self._memory.device, values)


_CONTEXTS = frozenset({"wrap_with_set_grad_enabled", "wrap_with_autocast"})
"""Higher-order ops that are `with` statements in the program that was exported."""


_OF_THE_TRACE = ("aten._assert_", "aten.sym_", "fxroof.move_to_")
"""Beginnings of operators that only a trace writes down."""


def _moved(target: str, args: Any, device: torch.device) -> Any:
    if target.startswith("fxroof.to_host"):
        return args[0].to("cpu")
    return args[0].to(device) if target.startswith("fxroof.to_device") else None


def _put_together(
    members: Sequence[tuple[str, ...]],
    record: _Parts,
    found: Sequence[int | None],
    passes: Sequence[Sequence[float]],
    kernels: Sequence[int] | None,
    faults: Sequence[int] | None,
) -> tuple[tuple[ClockedCall, ...], tuple[Stray, ...], int]:
    """The times of operators, each with the ops that it stands for."""
    belonging = {place: index for index, place in enumerate(found) if place is not None}
    lost: defaultdict[Signature, list[int]] = defaultdict(list)
    for index, place in enumerate(found):
        if place is None:
            lost[record.signatures[index]].append(index)

    def seconds(indices: Sequence[int]) -> list[float]:
        return [sum(times[i] for i in indices) for times in passes]

    calls = []
    for number, ops in enumerate(members):
        own = [belonging[number]] if number in belonging else []
        taken = seconds(own)
        calls.append(
            ClockedCall(
                ops=ops,
                ran=tuple(record.parts[own[0]]) if own else (),
                seconds=median(taken),
                least=min(taken),
                kernels=None if kernels is None else sum(kernels[i] for i in own),
                faults=None if faults is None else sum(faults[i] for i in own),
            )
        )
    strays = tuple(
        Stray(
            target=target,
            shape=", ".join("x".join(map(str, shape)) or "scalar" for shape in shapes),
            calls=len(indices),
            seconds=median(seconds(indices)),
        )
        for (target, shapes), indices in lost.items()
    )
    return tuple(calls), strays, len(passes)


class _CpuClock:
    """Times by the host's clock: on a CPU an op is done when it returns."""

    def time(self, run: _Run) -> float:
        began = time.perf_counter()
        result = run()
        taken = time.perf_counter() - began
        del result
        return taken

    def times(self, run: _Run) -> tuple[list[float], list[int] | None, list[Signature]]:
        """Seconds of each operator, kernels launched by each, and what they are."""
        timer = _Timer()
        with timer:
            run()
        return timer.seconds, None, timer.signatures

    def faults(self, run: _Run) -> list[int] | None:
        """Pages that each operator touches for the first time."""
        counter = _Faults()
        with counter:
            run()
        return counter.pages

    def overhead(self) -> float:
        """Seconds that it shows for an operator that does nothing."""
        some = torch.zeros(4)
        timer = _Timer()
        with timer:
            for _ in range(100):
                some.view(4)
        return median(timer.seconds)

    def peak_bytes(self, run: _Run) -> int | None:
        """The most memory that tensors hold while it runs, where that is known."""
        del run
        return None


class _CudaClock:
    """Times by the GPU's own events, and kernels by the profiler, since the host runs ahead of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.set_device(device)

    def time(self, run: _Run) -> float:
        """As above."""
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]  # torch leaves it so
        start, end = events
        torch.cuda.synchronize()
        start.record()
        result = run()
        end.record()
        torch.cuda.synchronize()
        del result
        return float(start.elapsed_time(end)) * 1e-3

    def times(self, run: _Run) -> tuple[list[float], list[int] | None, list[Signature]]:
        """As above."""
        from torch.profiler import ProfilerActivity, profile

        marker = _Marker()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            with marker:
                run()
            torch.cuda.synchronize()
        seconds, kernels = _by_mark(profiled.events() or (), len(marker.signatures))
        if not any(kernels):
            raise _NotAlignedError("torch's profiler saw no kernel: CUPTI is missing, or not allowed to look")
        return seconds, kernels, marker.signatures

    def faults(self, run: _Run) -> list[int] | None:
        """None: a GPU's memory is all there."""
        del run
        return None

    def overhead(self) -> float:
        """Nothing: kernels are timed by the GPU."""
        return 0.0

    def peak_bytes(self, run: _Run) -> int | None:
        """As above."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        result = run()
        torch.cuda.synchronize()
        del result
        return int(torch.cuda.max_memory_allocated(self.device))


_Clock = _CpuClock | _CudaClock
_MARK = "fxroof:"


def _by_mark(events: Iterable[Any], count: int) -> tuple[list[float], list[int]]:
    """Seconds on the device, and kernels launched, under each mark among a profiler's events."""
    seconds, kernels = [0.0] * count, [0] * count
    for event in events:
        if event.name.startswith(_MARK) and event.device_type.name == "CPU":  # the device has a copy of the mark
            index = int(event.name.removeprefix(_MARK))
            launched = list(_launched(event))
            seconds[index] = sum(kernel.duration for kernel in launched) * 1e-6
            kernels[index] = len(launched)
    return seconds, kernels


def _launched(event: Any) -> Iterator[Any]:
    # the device has a copy of each range, by its name; and so has what torch counts where it has no CUPTI
    yield from (kernel for kernel in event.kernels if kernel.name != event.name)
    for child in event.cpu_children:
        yield from _launched(child)


class _Timer(_Recorder):  # type: ignore[no-untyped-call]  # torch leaves it so
    """Writes down what each operator takes."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        began = time.perf_counter()
        result = func(*args, **kwargs)
        self.seconds.append(time.perf_counter() - began)
        self.signatures.append(_signature(func, result))
        return result


class _Faults(_Recorder):  # type: ignore[no-untyped-call]  # torch leaves it so
    """Writes down how many pages each operator touches for the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.pages: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        result = func(*args, **(kwargs or {}))
        self.pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return result


class _Marker(_Recorder):  # type: ignore[no-untyped-call]  # torch leaves it so
    """Marks each operator for the profiler."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch.profiler.record_function(f"{_MARK}{len(self.signatures)}"):
            result = func(*args, **(kwargs or {}))
        self.signatures.append(_signature(func, result))
        return result


def _part(order: Order, device: torch.device) -> Gpu | None:
    """The part to price against; None for a CPU, which has to be measured."""
    if order.gpu:
        return load_gpu(order.gpu).gpu
    if device.type == "cpu":
        return None
    name = torch.cuda.get_device_name(device)
    try:
        return load_gpu(name).gpu
    except CatalogError as error:
        raise MeasureError(
            f"{device} is a {name}, of which the catalogue knows nothing.",
            "`fxroof calibrate -o mygpu.toml` measures what it can do; then --gpu ./mygpu.toml.",
        ) from error


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "CPU"


@functools.cache
def _driver() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],  # noqa: S607  # where PATH has it
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return told.stdout.split("\n", 1)[0].strip()
    return str(torch.version.hip or "")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:300]
