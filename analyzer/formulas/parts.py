"""Ops that launch several kernels.

`in_parts` is for a product: copies of arguments first, the op itself, what is done to its result. `Kernels` is for
composite ops: the steps that ATen dispatches to, in order.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..cost import Access, Call, Cost, Gemm, Part, bytes_by_role, operator_name
from ..graph import Graph, Tensor, TensorRef
from .arithmetic import multiply_adds, reach, vector
from .attention_kernels import folds


def in_parts(call: Call, cost: Cost, copied: Mapping[str, int], bias: str = "") -> Cost:
    """The cost as several kernels: copies of arguments, the product, and the bias added to it."""
    if not copied and not bias:
        return cost
    indices = {name: tensor_index(call, name) for name in copied}
    added = (tensor_index(call, bias),) if bias else ()
    read = {access.tensor: access for access in cost.traffic if access.read}
    kernels = [
        Part(
            name=f"copy {name} for {operator_name(call.op.target).removeprefix('aten.')}",
            cost=Cost(traffic=(read[index],) if index in read else (), scratch_written=copied[name]),
        )
        for name, index in indices.items()
    ]
    between = call.output.nbytes if bias else 0
    rest = [a for a in cost.traffic if a.written or a.tensor not in (*indices.values(), *added)]
    ends = [a for a in cost.traffic if bias and (a.written or a.tensor in added)]
    total = sum(copied.values())
    product = replace(
        cost,
        vector={} if bias else cost.vector,
        traffic=tuple(a for a in rest if not (bias and a.written)),
        scratch_read=total,
        scratch_written=between,
    )
    kernels.append(Part(name=call.op.target, cost=product))
    if bias:
        kernels.append(Part(name="add bias", cost=Cost(vector=cost.vector, traffic=tuple(ends), scratch_read=between)))
    moved = total + between
    return replace(cost, scratch_read=moved, scratch_written=moved, parts=tuple(kernels))


def tensor_index(call: Call, name: str) -> int:
    """Index in the graph of a tensor argument; KeyError when it is absent or no tensor."""
    ref = call.op.args[name]
    if not isinstance(ref, TensorRef):
        raise KeyError(name)
    return ref.tensor


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """Memory that kernels of an op read or write.

    Attributes:
        nbytes: bytes of it that one kernel touches.
        tensor: index in the graph of an argument or result; None for memory that one kernel hands to the next.
    """

    nbytes: int
    tensor: int | None = None


class Kernels:
    """The kernels of one op in the order they run, each from arguments, results and memory between them.

    Example:
        ```python
        run = Kernels(call)
        shifted = run.kernel("sub", (run.argument("self"), largest), nbytes, flops=elements)
        run.kernel("exp", (shifted,), run.result(), special=elements)
        return run.cost()
        ```
    """

    def __init__(self, call: Call, dtype: str = "") -> None:
        """Arithmetic is filed under `dtype`: that of the first result unless given."""
        self._call = call
        self._dtype = dtype or call.output.dtype
        self._of = operator_name(call.op.target).removeprefix("aten.")
        self._parts: list[Part] = []

    def argument(self, name: str, elements: int | None = None) -> Buffer:
        """A tensor argument, or at most that many of its elements; KeyError when it is absent or no tensor."""
        return Buffer(reach(self._call, self._call.tensor(name), elements), tensor_index(self._call, name))

    def given(self, *names: str) -> tuple[Buffer, ...]:
        """Those of these arguments that are tensors."""
        return tuple(self.argument(name) for name in names if self._call.optional(name))

    def others(self, *names: str, reads: Mapping[str, int] | None = None) -> tuple[Buffer, ...]:
        """All tensor arguments but these; `reads` says how many bytes of one where that is not all of it."""
        buffers: list[Buffer] = []
        for name, value in self._call.op.args.items():
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, TensorRef) and name not in names:
                    whole = reach(self._call, self._call.graph.tensors[item.tensor])
                    buffers.append(Buffer((reads or {}).get(name, whole), item.tensor))
        return tuple(buffers)

    def result(self, elements: int | None = None, order: int = 0) -> Buffer:
        """A result, the first unless said otherwise, or at most that many of its elements."""
        index = self._call.op.outputs[order]
        return Buffer(reach(self._call, self._call.graph.tensors[index], elements), index)

    def kernel(
        self,
        name: str,
        reads: Iterable[Buffer],
        writes: Buffer | int,
        *,
        flops: float = 0.0,
        special: float = 0.0,
        dtype: str = "",
        product: Gemm | None = None,
        also: Iterable[Buffer] = (),
    ) -> Buffer:
        """Add a kernel; returns what it writes.

        Args:
            name: the operator that is dispatched to, without `aten.`.
            reads: what it reads, each once.
            writes: an argument, a result, or what another kernel wrote, written again; or bytes of new memory.
            flops: vector FLOPs.
            special: transcendental results.
            dtype: that of its arithmetic, where it is not the op's.
            product: a matrix product.
            also: what it writes beside.
        """
        target = Buffer(writes) if isinstance(writes, int) else writes
        taken = tuple(dict.fromkeys(reads))
        dtype = dtype or self._dtype
        read: dict[int, int] = {}
        for buffer in taken:
            if buffer.tensor is not None:
                read[buffer.tensor] = max(read.get(buffer.tensor, 0), buffer.nbytes)
        traffic = [Access(tensor=tensor, read=nbytes) for tensor, nbytes in read.items()]
        made = (target, *also)
        traffic += [Access(tensor=buffer.tensor, written=buffer.nbytes) for buffer in made if buffer.tensor is not None]
        count = product.batch * product.m * product.n * product.k if product else 0
        work = Cost(
            matmul=multiply_adds(dtype, count),
            vector=vector(dtype, flops),
            special=special,
            traffic=tuple(a for a in traffic if a.read or a.written),
            scratch_read=sum(buffer.nbytes for buffer in taken if buffer.tensor is None),
            scratch_written=sum(buffer.nbytes for buffer in made if buffer.tensor is None),
            gemms=(product,) if product and count else (),
        )
        self._parts.append(Part(name=f"{name} for {self._of}", cost=work))
        return target

    def cost(self, *, note: str = "") -> Cost:
        """The whole: each argument read once, what is read again counted with memory between the kernels."""
        graph, costs = self._call.graph, [part.cost for part in self._parts]
        read: dict[int, int] = {}
        written: dict[int, int] = {}
        for access in (access for cost in costs for access in cost.traffic):
            if access.read and access.tensor not in written:
                most = reach(self._call, graph.tensors[access.tensor])
                read[access.tensor] = min(read.get(access.tensor, 0) + access.read, most)
            if access.written:
                written[access.tensor] = written.get(access.tensor, 0) + access.written
        traffic = (
            *(Access(tensor=tensor, read=nbytes) for tensor, nbytes in read.items()),
            *(Access(tensor=tensor, written=nbytes) for tensor, nbytes in written.items()),
        )
        whole = Cost(
            matmul=_summed(cost.matmul for cost in costs),
            vector=_summed(cost.vector for cost in costs),
            special=sum(cost.special for cost in costs),
            traffic=traffic,
            note=note,
            gemms=tuple(gemm for cost in costs for gemm in cost.gemms),
        )
        return replace(
            whole,
            scratch_read=sum(_bytes_read(graph, cost) for cost in costs) - _bytes_read(graph, whole),
            scratch_written=sum(cost.scratch_written for cost in costs),
            parts=tuple(self._parts) if len(self._parts) > 1 else (),
        )


def is_contiguous(tensor: Tensor) -> bool:
    """True where elements lie in memory in the order of their dimensions, without gaps."""
    real = [step for size, step in zip(tensor.shape, tensor.stride, strict=True) if size != 1]
    return folds(tensor.shape, tensor.stride) and (not real or real[-1] == 1)


def _bytes_read(graph: Graph, cost: Cost) -> int:
    return sum(read for read, _ in bytes_by_role(graph, cost).values())


def _summed(work: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in work:
        for dtype, flops in one.items():
            total[dtype] = total.get(dtype, 0.0) + flops
    return total
