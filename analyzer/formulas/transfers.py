"""Copies between host and device memory, as a trace shows them: see `analyzer/residence.py`.

Bytes cross the link to the host, and device memory on its own side alone. A tensor with gaps is first made dense on the
device that it leaves (aten/src/ATen/native/cuda/Copy.cu, `copy_requires_temporaries`). A copy that is not asked to go
on without waiting ends with a synchronization of the stream, in both directions.
"""

from math import prod

from ..cost import Access, Call, Cost, Exchange, formula
from ..graph import Tensor
from .arithmetic import item_bytes


@formula("fxroof.to_host", "fxroof.move_to_host")
def to_host(call: Call) -> Cost:
    """Read on the device."""
    source = call.tensor("self")
    dense = source.numel * item_bytes(source)
    gathered = 0 if _is_dense(source) else dense
    (given,) = call.op.inputs
    return _cost(call, "to_host", dense, Access(tensor=given, read=source.touched_bytes), gathered)


@formula("fxroof.to_device", "fxroof.move_to_device")
def to_device(call: Call) -> Cost:
    """Written on the device."""
    source = call.tensor("self")
    dense = source.numel * item_bytes(source)
    (made,) = call.op.outputs or call.op.inputs
    return _cost(call, "to_device", dense, Access(tensor=made, written=dense), 0)


def _cost(call: Call, kind: str, nbytes: int, access: Access, gathered: int) -> Cost:
    return Cost(
        traffic=(access,) if access.read or access.written else (),
        scratch_read=gathered,
        scratch_written=gathered,
        exchange=Exchange(kind=kind, nbytes=nbytes, gpus=1),
        note="" if call.gpu.host_bandwidth else UNKNOWN,
        waits=not call.flag("non_blocking"),
    )


UNKNOWN = "the link to the host has no published rate: not priced"


def _is_dense(tensor: Tensor) -> bool:
    """Whether elements fill a stretch of memory, in whatever order."""
    reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
    return reach == prod(tensor.shape) or 0 in tensor.shape
