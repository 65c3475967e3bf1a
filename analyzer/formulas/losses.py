"""Losses: work per element of the prediction, and one addition more when they are summed.

Steps are those of `aten/src/ATen/native/Loss.cpp`: a loss per element is written and read again by the kernel that
sums or averages.
"""

from functools import partial
from math import prod

from ..cost import Call, Cost, formula
from .arithmetic import broadcast, item_bytes, vector
from .parts import Buffer, Kernels

_NONE, _MEAN = 0, 1


def _loss(call: Call, flops: float, special: float = 0.0) -> Cost:
    """One kernel for the loss of each element, one for their sum or mean."""
    count = prod(broadcast(call.inputs))
    if call.integer("reduction", _MEAN) == _NONE:
        return call.cost(vector=vector(call.output.dtype, count * flops), special=special * count)
    run = Kernels(call)
    name = call.op.target.split(".")[1]
    each = run.kernel(name, run.others(), _size(call), flops=count * flops, special=count * special)
    return _reduced(call, run, each)


formula("aten.mse_loss")(partial(_loss, flops=2))
formula("aten.huber_loss", "aten.smooth_l1_loss")(partial(_loss, flops=6))
formula("aten.binary_cross_entropy")(partial(_loss, flops=5, special=2))


@formula("aten.l1_loss")
def l1_loss(call: Call) -> Cost:
    """A difference, then its magnitude: a kernel each."""
    run, count = Kernels(call), prod(broadcast(call.inputs))
    difference = run.kernel("sub", run.given("self", "target"), _size(call), flops=count)
    each = run.kernel("abs", (difference,), _each(call, run), flops=count)
    return _reduced(call, run, each)


@formula("aten.binary_cross_entropy_with_logits")
def binary_cross_entropy_with_logits(call: Call) -> Cost:
    """(1 - target) * x - log sigmoid(x), factor by factor; weights of positives and of elements where given."""
    run, count = Kernels(call), prod(broadcast(call.inputs))
    x, target = run.argument("self"), run.argument("target")
    likely = run.kernel("log_sigmoid_forward", (x,), _size(call), flops=3 * count, special=2 * count)
    if positive := call.optional("pos_weight"):
        excess = run.kernel("sub", run.given("pos_weight"), positive.nbytes, flops=positive.numel)
        factor = run.kernel("mul", (excess, target), _size(call), flops=count)
        run.kernel("add_", (factor,), factor, flops=count)
        run.kernel("mul_", (likely, factor), likely, flops=count)
    each = run.kernel("fill_", (), _each(call, run))
    run.kernel("sub_", (each, target), each, flops=count)
    run.kernel("mul_", (each, x), each, flops=count)
    run.kernel("sub_", (each, likely), each, flops=count)
    if call.optional("weight"):
        run.kernel("mul_", (each, *run.given("weight")), each, flops=count)
    return _reduced(call, run, each)


@formula("aten.kl_div")
def kl_div(call: Call) -> Cost:
    """The sum of target * log(target) - target * x, or of exp(target) * (target - x) for a target in logarithms."""
    run, count = Kernels(call), prod(broadcast(call.inputs))
    x, target = run.argument("self"), run.argument("target")
    wanted = call.tensor("target")
    if call.flag("log_target"):
        difference = run.kernel("sub", (target, x), _size(call), flops=count)
        share = run.kernel("exp", (target,), wanted.nbytes, special=wanted.numel)
        each = run.kernel("mul", (share, difference), _each(call, run), flops=count)
    else:
        entropy = run.kernel("xlogy", (target,), wanted.nbytes, flops=wanted.numel, special=wanted.numel)
        crossed = run.kernel("mul", (target, x), _size(call), flops=count)
        each = run.kernel("sub", (entropy, crossed), _each(call, run), flops=count)
    return _reduced(call, run, each)


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
    """A log-softmax, written and read, and a negative log-likelihood on top (LossNLL.cpp).

    A target of probabilities is multiplied with all of the log-softmax instead of choosing from it. Smoothing of
    labels, which takes more kernels, is not counted.
    """
    source, target = call.tensor("self"), call.tensor("target")
    run, count, rows = Kernels(call, source.dtype), source.numel, _rows(source.shape)
    log = run.kernel("_log_softmax", run.given("self"), source.nbytes, flops=4 * count, special=count + rows)
    if target.shape == source.shape and "float" in target.dtype:
        weights = run.given("weight")
        for factor in (*weights, run.argument("target")):
            log = run.kernel("mul", (log, factor), source.nbytes, flops=count)
        left = rows if call.integer("reduction", _MEAN) == _NONE else 1
        size = left * item_bytes(source)
        each = run.kernel("sum", (log,), size, flops=count)
        mean = call.integer("reduction", _MEAN) == _MEAN
        each = run.kernel("neg", (each,), size if mean else run.result(), flops=left)
        if mean:
            run.kernel("div", (each,), run.result(), flops=1)
        return run.cost()
    chosen = Buffer(min(log.nbytes, target.numel * item_bytes(source)))
    likelihood = "nll_loss2d_forward" if len(source.shape) > _MATRIX else "nll_loss_forward"
    run.kernel(likelihood, (chosen, *run.given("target", "weight")), run.result(), flops=2 * target.numel)
    return run.cost()


_MATRIX = 2


def _rows(shape: tuple[int, ...]) -> int:
    classes = shape[1] if len(shape) > 1 else shape[0]
    return prod(shape) // max(classes, 1)


def _size(call: Call) -> int:
    """Bytes of a loss for each element."""
    return prod(broadcast(call.inputs)) * item_bytes(call.output)


def _each(call: Call, run: Kernels) -> Buffer | int:
    return run.result() if call.integer("reduction", _MEAN) == _NONE else _size(call)


def _reduced(call: Call, run: Kernels, each: Buffer) -> Cost:
    if call.integer("reduction", _MEAN) != _NONE:
        name = "mean" if call.integer("reduction", _MEAN) == _MEAN else "sum"
        run.kernel(name, (each,), run.result(), flops=prod(broadcast(call.inputs)))
    return run.cost()
