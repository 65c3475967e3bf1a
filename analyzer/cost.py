"""What an op costs, and the registry of the formulas that say so. Pure arithmetic on plain data.

Conventions: a multiply-add is 2 FLOPs; bytes are bytes that cross the device memory bus. A formula is a function
from a `Call` to a `Cost`, registered under an operator name without overload (`aten.linear`), and serves its
in-place (`aten.add_`) and `out=` spellings too.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ..hardware.gpu import Gpu
from .graph import Arg, Graph, Op, Role, Tensor, TensorRef


class Status(StrEnum):
    """How an op's cost is known."""

    PRICED = "priced"
    FREE = "free"
    UNPRICED = "unpriced"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Bytes of one tensor that one op moves.

    Attributes:
        tensor: index in `Graph.tensors`.
        read: bytes read, the least that any run of this op must read.
        written: bytes written.
        expected_read: bytes read on average where that depends on data (experts chosen); else None.
    """

    tensor: int
    read: int = 0
    written: int = 0
    expected_read: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """Matrix products as a kernel tiles them: `batch` times (m, k) x (k, n).

    Attributes:
        batch: products that are independent of each other.
        m: rows of the result.
        n: columns of the result.
        k: inner size.
        aligned: false where rows of an operand or of the result do not begin at multiples of 16 bytes.
        groups: matrices of (k, n) that the rows are dealt out to, such as experts, those that have any; 0 where all
            rows meet the same.
    """

    batch: int
    m: int
    n: int
    k: int
    aligned: bool = True
    groups: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """What a kernel that attends is cut into blocks by.

    Attributes:
        heads: heads of all sequences together that have keys of their own.
        group: query heads that share the keys of one of those.
        queries: of each query head.
        keys: that the mask leaves to the query that sees most of them.
        pairs: of a query and a key that the mask leaves to a query head.
        edges: ends of what a query sees that move with it: 1 where it is causal, 2 where a window is as well.
        size: width of a head of the query.
    """

    heads: int
    group: int
    queries: int
    keys: int
    pairs: int
    edges: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """What GPUs that share a model tell each other in one op, or a GPU and its host.

    Attributes:
        kind: `all_reduce`, `all_gather`, `reduce_scatter` or `all_to_all`; `to_host` or `to_device` for a copy.
        nbytes: bytes of the tensor that one GPU holds before it (all_reduce, reduce_scatter, all_to_all) or after it
            (all_gather); bytes that a copy brings.
        gpus: how many take part.
    """

    kind: str
    nbytes: int
    gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Work and traffic of one op.

    Attributes:
        matmul: FLOPs of matrix products as executed, by operand dtype (torch names).
        vector: FLOPs of elementwise and reduction arithmetic, by dtype computed in.
        special: transcendental results (exp, tanh, rsqrt, sin ...), one each.
        traffic: bytes by tensor.
        scratch_read: bytes read from buffers the op allocates for itself, such as attention scores.
        scratch_written: bytes written to such buffers.
        dense_matmul: matmul FLOPs in the convention of other counters, where causality is ignored; None when
            that is what is executed.
        tf32: true where PyTorch lets float32 operands round to TF32: by default in cuDNN convolutions, in products
            where the program allows it.
        backend: the implementation the GPU would pick, where there is a choice.
        note: what was assumed for this op.
        gemms: the shapes of its matrix products, for tiles and waves; empty where none or not known.
        attended: what a kernel that attends is cut into blocks by; None for others, or where not known.
        exchange: what it tells other GPUs, if anything.
        parts: the kernels it launches where there are several; their work and traffic add up to the whole.
        waits: true where the host waits for it to be done, since Python or the launch of what follows needs a value.
        quantises: true for a kernel that makes narrower numbers of what it reads, with scales of their own.
    """

    status: Status = Status.PRICED
    matmul: Mapping[str, float] = field(default_factory=dict)
    vector: Mapping[str, float] = field(default_factory=dict)
    special: float = 0.0
    traffic: tuple[Access, ...] = ()
    scratch_read: int = 0
    scratch_written: int = 0
    dense_matmul: float | None = None
    tf32: bool = False
    backend: str = ""
    note: str = ""
    gemms: tuple[Gemm, ...] = ()
    attended: Attended | None = None
    exchange: Exchange | None = None
    parts: "tuple[Part, ...]" = ()
    waits: bool = False
    quantises: bool = False

    @property
    def matmul_flops(self) -> float:
        """Matmul FLOPs in the dense convention, comparable with other counters."""
        return self.executed_matmul_flops if self.dense_matmul is None else self.dense_matmul

    @property
    def executed_matmul_flops(self) -> float:
        """Matmul FLOPs that the kernel executes: a causal kernel skips what the mask hides."""
        return sum(self.matmul.values())

    @property
    def vector_flops(self) -> float:
        """Vector FLOPs over all dtypes."""
        return sum(self.vector.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of the kernels that an op launches: what it does, and its share of the op's cost."""

    name: str
    cost: Cost


@dataclass(frozen=True, slots=True)
class Call:
    """An op about to be priced: its tensors and arguments by schema name, on a GPU."""

    graph: Graph
    op: Op
    gpu: Gpu

    def arg(self, name: str, default: Arg = None) -> Arg:
        """An argument by schema name; `default` when the overload has no such argument."""
        return self.op.args.get(name, default)

    def flag(self, name: str) -> bool:
        """A boolean argument; false when absent."""
        return bool(self.op.args.get(name, False))

    def integer(self, name: str, default: int) -> int:
        """An integer argument; `default` when absent or None."""
        value = self.op.args.get(name)
        return value if isinstance(value, int) else default

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers; a single integer is a list of one, and an absent list is empty."""
        value = self.op.args.get(name)
        if isinstance(value, int):
            return (value,)
        return tuple(v for v in value if isinstance(v, int)) if isinstance(value, tuple) else ()

    def tensor(self, name: str) -> Tensor:
        """A tensor argument; KeyError when it is absent or no tensor."""
        found = self.optional(name)
        if found is None:
            raise KeyError(name)
        return found

    def optional(self, name: str) -> Tensor | None:
        """A tensor argument, or None."""
        value = self.op.args.get(name)
        return self.graph.tensors[value.tensor] if isinstance(value, TensorRef) else None

    def tensors(self, name: str) -> tuple[Tensor, ...]:
        """A list argument of tensors, those that are None left out."""
        value = self.op.args.get(name)
        items = value if isinstance(value, tuple) else (value,)
        return tuple(self.graph.tensors[v.tensor] for v in items if isinstance(v, TensorRef))

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """All tensors it takes, each once."""
        return tuple(self.graph.tensors[i] for i in self.op.inputs)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """All tensors it returns or, for an op that only writes into its arguments, those."""
        return tuple(self.graph.tensors[i] for i in self.op.outputs or self.graph.mutated(self.op))

    @property
    def output(self) -> Tensor:
        """The first tensor it returns."""
        return self.outputs[0]

    def cost(
        self,
        *,
        matmul: Mapping[str, float] | None = None,
        vector: Mapping[str, float] | None = None,
        special: float = 0.0,
        reads: Mapping[str, int] | None = None,
        writes: int | None = None,
        expected_reads: Mapping[str, int] | None = None,
        scratch_read: int = 0,
        scratch_written: int = 0,
        dense_matmul: float | None = None,
        tf32: bool = False,
        backend: str = "",
        note: str = "",
        gemms: tuple[Gemm, ...] = (),
        attended: Attended | None = None,
        exchange: Exchange | None = None,
        parts: "tuple[Part, ...]" = (),
        waits: bool = False,
        quantises: bool = False,
    ) -> Cost:
        """The cost with the usual traffic: every tensor argument read once, every result written once.

        Args:
            matmul: FLOPs by operand dtype.
            vector: FLOPs by the dtype computed in.
            special: transcendental results.
            reads: bytes read of an argument where that is not all of it: `{"weight": rows * width}`.
            writes: bytes written in all, where that is not the whole of every result.
            expected_reads: as `reads`, on average, where that depends on data.
            scratch_read: bytes read back from the op's own buffers.
            scratch_written: bytes written to the op's own buffers.
            dense_matmul: see `Cost`.
            tf32: see `Cost`.
            backend: see `Cost`.
            note: see `Cost`.
            gemms: see `Cost`.
            attended: see `Cost`.
            exchange: see `Cost`.
            parts: see `Cost`.
            waits: see `Cost`.
            quantises: see `Cost`.
        """
        return Cost(
            matmul=matmul or {},
            vector=vector or {},
            special=special,
            traffic=_traffic(self, reads or {}, writes, expected_reads or {}),
            scratch_read=scratch_read,
            scratch_written=scratch_written,
            dense_matmul=dense_matmul,
            tf32=tf32,
            backend=backend,
            note=note,
            gemms=gemms,
            attended=attended,
            exchange=exchange,
            parts=parts,
            waits=waits,
            quantises=quantises,
        )


ALLOWS_TF32 = "allow_tf32"
"""Argument of a product whose float32 operands may be rounded to TF32, as some of ATen's convolutions have it."""

CUBLAS = frozenset(
    f"aten.{name}"
    for name in ("linear", "matmul", "mm", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm", "einsum", "tensordot")
)
"""Products that cuBLAS computes, which rounds float32 operands only where the program allows it."""

Formula = Callable[[Call], Cost]

_formulas: dict[str, Formula] = {}


def formula(*operators: str) -> Callable[[Formula], Formula]:
    """Register a function as the price of operators named without overload, such as `aten.linear`.

    Raises:
        ValueError: an operator is registered twice.
    """

    def register(function: Formula) -> Formula:
        for operator in operators:
            if operator in _formulas:
                raise ValueError(f"two formulas for {operator}: {_name(_formulas[operator])} and {_name(function)}")
            _formulas[operator] = function
        return function

    return register


def _name(function: Formula) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def free(*operators: str) -> None:
    """Declare operators that run no kernel on the device at all (assertions, metadata, allocation).

    Views need no declaration: they are recognised by their storage.
    """
    formula(*operators)(lambda _: Cost(status=Status.FREE))


def find_formula(target: str) -> Formula | None:
    """The formula for a target such as `aten.add_.Tensor`, or None."""
    operator = operator_name(target)
    return _formulas.get(operator) or _formulas.get(operator.removesuffix("_"))


def operator_name(target: str) -> str:
    """`aten.linear.default` -> `aten.linear`."""
    return target.rsplit(".", 1)[0] if target.count(".") >= 2 else target


def unpriced(call: Call) -> Cost:
    """What an op without a formula is charged: its inputs and outputs once, and no work."""
    return Cost(status=Status.UNPRICED, traffic=_traffic(call, {}, None, {}))


def bytes_by_role(graph: Graph, cost: Cost) -> dict[Role, tuple[int, int]]:
    """Bytes (read, written) of a cost by role of the storage.

    Reads of several views of one storage are capped by that storage, since memory read once is on chip.
    """
    reads: dict[int, int] = {}
    totals: dict[Role, tuple[int, int]] = {}
    for access in cost.traffic:
        storage = graph.tensors[access.tensor].storage
        before = reads.get(storage, 0)
        reads[storage] = min(before + access.read, graph.storages[storage].nbytes)
        role = graph.storages[storage].role
        read, written = totals.get(role, (0, 0))
        totals[role] = (read + reads[storage] - before, written + access.written)
    if cost.scratch_read or cost.scratch_written:
        read, written = totals.get(Role.ACTIVATION, (0, 0))
        totals[Role.ACTIVATION] = (read + cost.scratch_read, written + cost.scratch_written)
    return totals


def _traffic(
    call: Call, reads: Mapping[str, int], writes: int | None, expected: Mapping[str, int]
) -> tuple[Access, ...]:
    graph, op = call.graph, call.op
    seen: dict[int, Access] = {}
    for name, value in op.args.items():
        for index in _indices(value):
            default = 0 if _is_destination(op, name) else _reach(graph, index)
            read = reads.get(name, default)
            known = seen.get(index)
            if known is None or known.read < read:
                seen[index] = Access(tensor=index, read=read, expected_read=expected.get(name))
    accesses = list(seen.values())
    written = _written(graph, op)
    total = sum(touched for _, touched in written)
    for index, touched in written:
        share = touched if writes is None else (writes * touched // total if total else 0)
        accesses.append(Access(tensor=index, written=share))
    return tuple(a for a in accesses if a.read or a.written or a.expected_read)


def _written(graph: Graph, op: Op) -> Iterable[tuple[int, int]]:
    # an output that aliases an argument is written only if the op mutates that argument
    inputs = {graph.tensors[i].storage for i in op.inputs}
    mutated = graph.mutated(op)
    fresh = [i for i in op.outputs if graph.tensors[i].storage not in inputs]
    return [(i, _reach(graph, i)) for i in (*mutated, *fresh)]


def _is_destination(op: Op, name: str) -> bool:
    return name in op.mutates and name.rstrip("0123456789") == "out"


def _reach(graph: Graph, index: int) -> int:
    tensor = graph.tensors[index]
    return min(tensor.touched_bytes, graph.storages[tensor.storage].nbytes)


def _indices(value: Arg) -> tuple[int, ...]:
    if isinstance(value, TensorRef):
        return (value.tensor,)
    if isinstance(value, tuple):
        return tuple(v.tensor for v in value if isinstance(v, TensorRef))
    return ()
