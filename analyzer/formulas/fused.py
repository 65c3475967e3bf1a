"""One kernel in the place of many ops: what it moves and computes is stated by whoever planned it."""

from ..cost import Access, Call, Cost, formula
from ..graph import Arg, TensorRef


@formula("fxroof.fused")
def fused(call: Call) -> Cost:
    """Every tensor in `reads` is read once, every one in `writes` and among the results written once.

    Bytes are those that a tensor touches, but where `read_bytes` and `written_bytes` state others. The work is that of
    the ops in whose place it runs: `flops` in each of the types in `dtypes`, and `special` transcendental results.
    """
    args = call.op.args
    reads = [v.tensor for v in _items(args.get("reads")) if isinstance(v, TensorRef)]
    writes = [*(v.tensor for v in _items(args.get("writes")) if isinstance(v, TensorRef)), *call.op.outputs]
    read = zip(reads, _items(args.get("read_bytes")), strict=True)
    written = zip(writes, _items(args.get("written_bytes")), strict=True)
    return Cost(
        vector={
            str(dtype): float(flops)
            for dtype, flops in zip(_items(args.get("dtypes")), _items(args.get("flops")), strict=True)
            if isinstance(flops, int | float)
        },
        special=_number(args.get("special")),
        traffic=(
            *(Access(tensor=tensor, read=_bytes(call, tensor, stated)) for tensor, stated in read),
            *(Access(tensor=tensor, written=_bytes(call, tensor, stated)) for tensor, stated in written),
        ),
        scratch_read=call.integer("scratch_read", 0),
        scratch_written=call.integer("scratch_written", 0),
    )


def _bytes(call: Call, tensor: int, stated: Arg) -> int:
    if isinstance(stated, int):
        return stated
    touched = call.graph.tensors[tensor]
    return min(touched.touched_bytes, call.graph.storages[touched.storage].nbytes)


def _items(value: Arg) -> tuple[Arg, ...]:
    return value if isinstance(value, tuple) else ()


def _number(value: Arg) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
