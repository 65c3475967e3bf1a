"""What an op launches in eager mode on CUDA, as PyTorch itself dispatches it: the oracle for `Cost.parts`.

Run on meta, where tensors of the CPU are what the host computes for itself. An op is a kernel where CUDA has one of its
own, by the native_functions.yaml that torchgen ships; else its composite implementation is followed.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchgen
import yaml
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

KEYS = torch._C.DispatchKey
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "expand", "unsqueeze", "squeeze_", "permute", "select", "slice",
    "as_strided", "alias", "detach", "lift_fresh", "unbind", "split", "_reshape_alias", "squeeze", "empty",
    "empty_like", "empty_strided", "new_empty", "new_empty_strided", "unfold", "diagonal", "expand_as", "unsqueeze_",
    "unsafe_split", "real", "resize_",
}  # fmt: skip
"""What looks at memory or takes it, and runs nothing."""
PRIMITIVE = {"clone", "copy_", "_to_copy", "fill_", "zeros", "cat", "stack", "norm", "full"}
"""Composite by name, one kernel by deed."""
OVERWRITING = {"copy_", "fill_", "zero_", "_index_put_impl_", "index_fill_", "put_", "masked_scatter_", "scatter_"}
"""What writes into its first argument and does not read it."""
ONE_RESULT = {"native_batch_norm", "nll_loss_forward", "nll_loss2d_forward", "log_sigmoid_forward"}
"""Where further results are statistics of a few bytes, or written on the CPU alone."""
CHOOSING = {"nll_loss_forward", "nll_loss2d_forward"}
"""What reads an element of its first argument for each of its second."""


class Launched(NamedTuple):
    """A kernel: the operator, bytes of its tensor arguments and of its results."""

    name: str
    read: int
    written: int


class Eager(TorchDispatchMode):
    """Records kernels in order."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Launched] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::")
        base = name.split(".")[0]
        if func.namespace == "aten" and base not in VIEWS | PRIMITIVE and name not in _native():
            for key in _composite(func):
                with self:
                    return func._op_dk(key, *args, **kwargs)
        result = func(*args, **kwargs)
        tensors = [t for t in pytree.tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        if base not in VIEWS and any(t.is_meta for t in tensors):
            given = [*args[base in OVERWRITING :], *(v for k, v in kwargs.items() if k != "out")]
            written = touched(result[0] if base in ONE_RESULT else result)
            unread = touched(args[0]) - args[1].numel() * args[0].itemsize if base in CHOOSING else 0
            self.kernels.append(Launched(base, touched(given) - unread, written))
        return result


def launched(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Launched]:
    """The kernels of a call on tensors on meta."""
    with torch.no_grad(), Eager() as eager:
        function(*args, **kwargs)
    return eager.kernels


def inside(target: Any, *args: Any) -> list[Launched]:
    """What an op's implementation dispatches to, for ops that have the same one on the CPU, where this runs, and CUDA.

    The op's own kernel, which it calls without dispatching, is not among them.
    """
    assert target.name().removeprefix("aten::") in _native("CPU, CUDA")
    seen: list[Launched] = []

    class Inside(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            name = func.name().removeprefix("aten::").split(".")[0]
            if name not in VIEWS:
                given = [t for t in pytree.tree_leaves(args[name in OVERWRITING :]) if isinstance(t, torch.Tensor)]
                seen.append(Launched(name, sum(t.nbytes for t in given), result.nbytes))
            return result

    with torch.no_grad(), Inside():
        target._op_dk(KEYS.CPU, *args)
    return seen


def touched(values: Any) -> int:
    """Bytes of distinct tensors; what is expanded counts once, what the host holds does not count."""
    tensors = [t for t in pytree.tree_leaves(values) if isinstance(t, torch.Tensor) and t.is_meta]
    distinct = {(t.untyped_storage()._cdata, t.storage_offset(), t.dtype, *_real(t)) for t in tensors}
    sizes = {(home, offset, size * dtype.itemsize) for home, offset, dtype, size, _ in distinct}
    return sum(nbytes for _, _, nbytes in sizes)


def _real(tensor: torch.Tensor) -> tuple[int, int]:
    sizes = [n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step]
    return functools.reduce(int.__mul__, sizes, 1), len(sizes)


def _composite(func: Any) -> list[Any]:
    keys = ["CompositeImplicitAutograd", "CompositeExplicitAutograd"]
    found = [k for k in keys if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), k)]
    if func.name().removeprefix("aten::") in _native("CompositeExplicitAutogradNonFunctional"):
        found.insert(0, "CompositeExplicitAutogradNonFunctional")
    return [getattr(KEYS, k) for k in found]


@functools.cache
def _native(key: str = "CUDA") -> frozenset[str]:
    """Overloads that have an implementation of their own under a dispatch key, or one for several keys."""
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    found: set[str] = set()
    delegates: dict[str, str] = {}
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        name = entry["func"].split("(")[0].strip()
        if any(_names(key, keys) for keys in entry.get("dispatch") or {}):
            found.add(name)
        if "structured_delegate" in entry:
            delegates[name] = entry["structured_delegate"]
    return frozenset(found | {name for name, target in delegates.items() if target in found})


def _names(wanted: str, keys: str) -> bool:
    return {k.strip() for k in wanted.split(",")} <= {k.strip() for k in keys.split(",")}
