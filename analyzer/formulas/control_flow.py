"""What higher-order ops cost beside the functions they call, which are ops of the graph themselves.

Their ops carry how often they run, the branch they lie on, or the kernel that computes them on chip: see `graph.Op`.
"""

from ..cost import Call, Cost, Status, formula


@formula("higher_order.cond")
def condition(_: Call) -> Cost:
    """The result of the branch taken, where that branch left it; `pricing` says which branch is charged."""
    return Cost(status=Status.FREE)


@formula("higher_order.while_loop")
def while_loop(call: Call) -> Cost:
    """Nothing beside its turns."""
    unknown = "a loop of unknown length is charged for one turn"
    return Cost(status=Status.FREE, note="" if isinstance(call.arg("trips"), int) else unknown)


@formula("higher_order.scan", "higher_order.map_impl")
def scan(call: Call) -> Cost:
    """The result of every step is read and copied into the stacked result, as in eager PyTorch."""
    copied = sum(tensor.nbytes for tensor in call.outputs)
    return call.cost(reads={"each": 0}, scratch_read=copied)


@formula("higher_order.associative_scan")
def associative_scan(call: Call) -> Cost:
    """Every element read once and written once; combining goes on in the same kernel, length - 1 times at least."""
    return call.cost(note="associative_scan taken as one kernel, as torch.compile makes it")
