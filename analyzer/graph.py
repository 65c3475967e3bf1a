"""The traced model as plain frozen data: storages, tensors, ops. Knows nothing of torch.

A storage is a block of memory; a tensor is a strided view of one storage; an op maps tensors to tensors.
Whether an op copies or only looks at its input differently is therefore a fact of the data: its output
either lives in the storage of an input or it does not.
"""

import functools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod

import networkx as nx

ITEM_BITS: Mapping[str, int] = {
    "bool": 8,
    "uint8": 8,
    "int8": 8,
    "uint16": 16,
    "int16": 16,
    "uint32": 32,
    "int32": 32,
    "uint64": 64,
    "int64": 64,
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
    "float8_e4m3fnuz": 8,
    "float8_e5m2fnuz": 8,
    "float8_e8m0fnu": 8,
    "float4_e2m1fn_x2": 8,  # two values a byte; the shape counts bytes
    "float16": 16,
    "bfloat16": 16,
    "float32": 32,
    "float64": 64,
    "complex32": 32,
    "complex64": 64,
    "complex128": 128,
}


class Role(StrEnum):
    """What a storage is for; decides the column its bytes are reported in."""

    WEIGHT = "weight"
    """A parameter or a persistent buffer: read-only, loaded from a checkpoint."""
    KV_CACHE = "kv_cache"
    """State carried from one step to the next: keys and values, or a recurrent state."""
    ACTIVATION = "activation"
    INPUT = "input"
    OUTPUT = "output"
    CONSTANT = "constant"
    """Non-persistent buffers and literals: position tables, masks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """A block of device memory.

    Attributes:
        nbytes: its size in bytes.
        role: what it is for.
        name: the parameter, buffer, input or op it belongs to.
        ends_with: name of the op after which the program lets go of it, empty where it keeps it to its end; None where
            that was not seen, and its last use is all that is known.
    """

    nbytes: int
    role: Role
    name: str
    ends_with: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A strided view of a storage; `offset` and `stride` count elements, as in torch."""

    storage: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    @property
    def numel(self) -> int:
        """Number of elements, expanded dimensions counted in full."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements, expanded dimensions counted in full."""
        return self.numel * ITEM_BITS[self.dtype] // 8

    @property
    def touched_bytes(self) -> int:
        """Bytes of distinct memory behind the view.

        At most its elements in dimensions of non-zero stride, and at most the stretch from its first element to its
        last, which overlapping windows share.
        """
        return _distinct(self.shape, self.stride) * ITEM_BITS[self.dtype] // 8


@functools.lru_cache(maxsize=4096)  # layers are alike: few shapes, asked for very often
def _distinct(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    if 0 in shape:
        return 0
    strided = [(size, step) for size, step in zip(shape, stride, strict=True) if step != 0]
    return min(prod(size for size, _ in strided), 1 + sum((size - 1) * step for size, step in strided))


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A source line. `library` is true when it lies in an installed package, not in the user's project."""

    file: str
    line: int
    function: str = ""
    library: bool = False

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRef:
    """An argument that is a tensor: its index in `Graph.tensors`."""

    tensor: int


Scalar = None | bool | int | float | str
Arg = Scalar | TensorRef | tuple[Scalar | TensorRef, ...]


def tensor_of(value: Arg) -> int | None:
    """The tensor that an argument is; None where it is none, or several."""
    return value.tensor if isinstance(value, TensorRef) else None


def tensors_of(value: Arg) -> Iterator[int]:
    """The tensors of an argument: itself, or those of a list."""
    if isinstance(value, TensorRef):
        yield value.tensor
    elif isinstance(value, tuple):
        for item in value:
            if isinstance(item, TensorRef):
                yield item.tensor


@dataclass(frozen=True, kw_only=True)  # without slots, so that `inputs` is found once
class Op:
    """One call in the traced program.

    Attributes:
        name: the fx node's name, unique in the graph.
        target: operator and overload, as in `aten.linear.default`.
        module: qualified name of the module whose forward made the call; empty for the root.
        args: every argument by its schema name, defaults filled in.
        outputs: indices of the tensors it returns.
        mutates: names of the arguments it writes into.
        span: innermost source line outside torch.
        user_span: innermost source line in the user's project, when there is one.
        repeat: times it runs: the trip count of the loops around it.
        branch: branches of conditions it belongs to, outermost first, each as `name of the condition:number`.
        kernel: name of the op whose kernel computes it on chip; empty for an op of its own.
        number: symbol under which the number that it hands to the host is among later arguments; empty for none.
    """

    name: str
    target: str
    module: str = ""
    module_type: str = ""
    args: Mapping[str, Arg] = field(default_factory=dict)
    outputs: tuple[int, ...] = ()
    mutates: tuple[str, ...] = ()
    span: Span | None = None
    user_span: Span | None = None
    repeat: int = 1
    branch: tuple[str, ...] = ()
    kernel: str = ""
    number: str = ""

    @functools.cached_property
    def inputs(self) -> tuple[int, ...]:
        """Indices of the tensors it takes, in argument order, each once."""
        return tuple(dict.fromkeys(index for value in self.args.values() for index in tensors_of(value)))

    @property
    def anchor(self) -> Span | None:
        """The line to show the user: their own when the call passed through it, else the library's."""
        return self.user_span or self.span


@dataclass(frozen=True, kw_only=True)  # without slots, so that `kinds` is found once
class Graph:
    """One phase of a model as a straight-line program over tensors.

    Attributes:
        phase: `prefill`, `decode` or `forward`.
        tokens: rows the phase pushes through the model (batch x length); 0 for non-token models.
        new_tokens: tokens that a user gains by the phase: all of a prompt, one a sequence in decode.
        cache_fill: share of a cache the model owns that holds earlier tokens; 1 for caches passed in.
        turns: times it runs for one prompt: the chunks that the prompt is cut into.
        expert_ranks: GPUs that share the experts: a row routed to an expert meets it here once in so many times.
        inputs: tensors given by the caller, caches included.
        outputs: tensors returned to the caller.
    """

    phase: str
    tokens: int = 0
    new_tokens: int = 0
    cache_fill: float = 1.0
    turns: int = 1
    expert_ranks: int = 1
    storages: tuple[Storage, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    ops: tuple[Op, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    @functools.cached_property
    def kinds(self) -> tuple[int, ...]:
        """A number for every op, equal where two ops cost the same: same operator, arguments, layouts and aliasing.

        Layers are alike, so that a model of 5,000 ops has some 60 kinds.
        """
        known: dict[tuple[object, ...], int] = {}
        layout = _Layouts(self)
        return tuple(known.setdefault(self._likeness(op, layout), len(known)) for op in self.ops)

    def _likeness(self, op: Op, layout: "_Layouts") -> tuple[object, ...]:
        order: dict[int, int] = {}

        def seen(tensor: int) -> tuple[int, int]:
            return order.setdefault(tensor, len(order)), layout[tensor]

        values: list[object] = []
        for value in op.args.values():
            if type(value) is TensorRef:
                values.append(seen(value.tensor))
            elif type(value) is tuple:
                values.append(tuple([seen(v.tensor) if type(v) is TensorRef else (type(v), v) for v in value]))
            else:
                values.append((type(value), value))
        results = tuple([seen(tensor) for tensor in op.outputs])
        homes: dict[int, int] = {}
        aliasing = tuple([homes.setdefault(self.tensors[tensor].storage, len(homes)) for tensor in order])
        return op.target, op.mutates, op.repeat, op.kernel, tuple(values), results, aliasing

    @functools.cached_property
    def idle(self) -> frozenset[int]:
        """Ops that move or compute what nobody needs; views, which do nothing, left out."""
        live = needed(self.ops, self.tensors, self.outputs, self)
        return frozenset(
            index
            for index, (op, wanted) in enumerate(zip(self.ops, live, strict=True))
            if not wanted and not is_assertion(op) and not self.is_view(op)
        )

    def role(self, tensor: int) -> Role:
        """Role of the storage behind a tensor."""
        return self.storages[self.tensors[tensor].storage].role

    def mutated(self, op: Op) -> tuple[int, ...]:
        """Tensors the op writes into."""
        if not op.mutates:
            return ()
        return tuple(dict.fromkeys(i for name in op.mutates for i in tensors_of(op.args.get(name))))

    def is_view(self, op: Op) -> bool:
        """True when the op moves no data: it writes nothing and all it returns lives where its inputs live."""
        if op.mutates or not op.outputs:
            return False
        homes = {self.tensors[i].storage for i in op.inputs}
        return all(self.tensors[i].storage in homes for i in op.outputs)


class _Layouts(dict[int, int]):
    """A number for every tensor, equal for those of equal layout; found for those that are asked for."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.known: dict[tuple[object, ...], int] = {}

    def __missing__(self, tensor: int) -> int:
        t = self.graph.tensors[tensor]
        home = self.graph.storages[t.storage]
        name = (t.dtype, t.shape, t.stride, t.offset, home.nbytes, home.role)
        self[tensor] = found = self.known.setdefault(name, len(self.known))
        return found


def needed(
    ops: Sequence[Op],
    tensors: Sequence[Tensor],
    outputs: Iterable[int],
    graph: Graph,
    kept: Container[int] = (),
) -> list[bool]:
    """For every op whether something of what it does is left: in a result, in memory that stays, or with the host.

    Args:
        ops: in order.
        tensors: theirs.
        outputs: tensors that are returned.
        graph: whose inputs, weights and caches stay.
        kept: ops that count as needed.
    """
    given = {graph.tensors[i].storage for i in graph.inputs}
    lasting = {i for i, s in enumerate(graph.storages) if s.role in (Role.WEIGHT, Role.KV_CACHE, Role.CONSTANT)} | given
    wanted = {tensors[i].storage for i in outputs}
    live = [False] * len(ops)
    for index in range(len(ops) - 1, -1, -1):
        op = ops[index]
        touched = {tensors[i].storage for name in op.mutates for i in tensors_of(op.args.get(name))}
        made = {tensors[i].storage for i in op.outputs}
        live[index] = (
            not made.isdisjoint(wanted)
            or not (touched.isdisjoint(wanted) and touched.isdisjoint(lasting))
            or index in kept
            or is_read_back(op)
            or op.target.startswith(("fxroof.to_host.", "fxroof.to_device."))  # which Python may look at or keep
        )
        if live[index]:
            wanted |= {tensors[i].storage for i in op.inputs}
    dropped = {
        tensors[i].storage for op, stays in zip(ops, live, strict=True) if not stays for i in op.outputs
    } - wanted
    for index, op in enumerate(ops):
        if is_assertion(op):  # which goes with what it looks at
            live[index] = not dropped & {tensors[i].storage for i in op.inputs}
    return live


def is_assertion(op: Op) -> bool:
    """True where an op only looks at tensors: it returns, changes and hands on nothing."""
    return not op.outputs and not op.mutates and not is_read_back(op)


def is_read_back(op: Op) -> bool:
    """True where an op hands a value to the host, whose use the graph does not show."""
    return op.target.startswith(("aten.item.", "aten._local_scalar_dense.", "fxroof.read_later."))


def dataflow(graph: Graph) -> "nx.DiGraph[int]":
    """The order that data imposes on the ops.

    Nodes are indices into `graph.ops`. An edge u -> v with `storage=s` says that v reads what u last wrote into
    storage s; views hand on their base's storage, so data is followed through them without extra edges.
    """
    digraph: nx.DiGraph[int] = nx.DiGraph()
    writer: dict[int, int] = {}
    for index, op in enumerate(graph.ops):
        digraph.add_node(index)
        for tensor in op.inputs:
            storage = graph.tensors[tensor].storage
            if storage in writer:
                digraph.add_edge(writer[storage], index, storage=storage)
        if not graph.is_view(op):
            for tensor in (*op.outputs, *graph.mutated(op)):
                writer[graph.tensors[tensor].storage] = index
    return digraph
