"""Losses: work per element of the prediction, and one addition more when they are summed."""

from functools import partial
from math import prod

from ..cost import Call, Cost, formula
from .arithmetic import broadcast, item_bytes, vector

_NONE = 0


def _loss(call: Call, flops: float, special: float = 0.0) -> Cost:
    count = prod(broadcast(call.inputs))
    summed = call.integer("reduction", 1) != _NONE
    return call.cost(vector=vector(call.output.dtype, count * (flops + summed)), special=special * count)


formula("aten.mse_loss", "aten.l1_loss")(partial(_loss, flops=2))
formula("aten.huber_loss", "aten.smooth_l1_loss")(partial(_loss, flops=6))
formula("aten.binary_cross_entropy")(partial(_loss, flops=5, special=2))
formula("aten.binary_cross_entropy_with_logits")(partial(_loss, flops=7, special=2))
formula("aten.kl_div")(partial(_loss, flops=2, special=1))


@formula("aten.nll_loss", "aten.nll_loss_nd", "aten.nll_loss2d", "aten.nll_loss_forward", "aten.nll_loss2d_forward")
def nll_loss(call: Call) -> Cost:
    """One log-probability a target is read, negated and added."""
    targets = call.tensor("target").numel
    source = call.tensor("self")
    return call.cost(
        vector=vector(source.dtype, 2 * targets),
        reads={"self": min(source.touched_bytes, targets * item_bytes(source))},
    )


@formula("aten.cross_entropy_loss")
def cross_entropy(call: Call) -> Cost:
    """A log-softmax, written and read, and a negative log-likelihood on top."""
    source = call.tensor("self")
    targets = call.tensor("target").numel
    return call.cost(
        vector=vector(source.dtype, 4 * source.numel + 2 * targets),
        special=source.numel + targets,
        scratch_written=source.numel * item_bytes(source),
        scratch_read=targets * item_bytes(source),
    )
