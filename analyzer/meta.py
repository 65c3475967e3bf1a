"""Running user code where no data is: large tensors on the meta device, other devices redirected to it.

Everything here is a context manager that puts back what it changed. `building` is for constructors, `tracing` for
forwards. Both answer as the GPU would where the meta device cannot: autocast casts, `.cuda()` stays put, and nobody
is told that an export is under way, since libraries take another path then (dense masks, repeated KV heads).
"""

import contextlib
import copy
import functools
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.proxy import TracerBase
from torch.overrides import TorchFunctionMode

from .residence import HOST, Residence, current, default_to, residing
from .values import Values, following

SMALL = 1 << 22
"""Elements up to which a constructor's tensor keeps real values: constructors read them, and masks need them."""

_FACTORIES = frozenset(
    {
        torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.randperm,
        torch.arange, torch.linspace, torch.logspace, torch.eye, torch.tensor, torch.empty_strided,
        torch.tril_indices, torch.triu_indices, torch.scalar_tensor, torch.normal, torch.range,
        torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like,
        torch.hann_window, torch.hamming_window, torch.blackman_window, torch.as_tensor, torch.from_numpy,
    }
)  # fmt: skip

# PyTorch's CUDA autocast lists: what runs in the low type, and what is lifted to float32
_AUTOCAST_LOW = frozenset(
    {
        torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.addbmm, torch.baddbmm, torch.mv, torch.addmv,
        torch.einsum, torch.chain_matmul, torch.linalg.multi_dot, torch.conv1d, torch.conv2d, torch.conv3d,
        torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d, torch.prelu,
        torch.nn.functional.linear, torch.nn.functional.conv1d, torch.nn.functional.conv2d,
        torch.nn.functional.conv3d, torch.nn.functional.conv_transpose1d, torch.nn.functional.conv_transpose2d,
        torch.nn.functional.conv_transpose3d, torch.nn.functional.scaled_dot_product_attention,
        torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.Tensor.mm, torch.Tensor.bmm,
        torch.Tensor.baddbmm, torch.Tensor.addmm, torch.Tensor.mv,
    }
)  # fmt: skip
_AUTOCAST_HIGH = frozenset(
    {
        torch.exp, torch.Tensor.exp, torch.log, torch.Tensor.log, torch.pow, torch.Tensor.pow,
        torch.Tensor.__pow__, torch.rsqrt, torch.Tensor.rsqrt, torch.softmax, torch.Tensor.softmax,
        torch.log_softmax, torch.nn.functional.softmax, torch.nn.functional.log_softmax, torch.sum,
        torch.Tensor.sum, torch.cumsum, torch.Tensor.cumsum, torch.cumprod, torch.norm, torch.Tensor.norm,
        torch.nn.functional.layer_norm, torch.layer_norm, torch.nn.functional.group_norm, torch.group_norm,
        torch.nn.functional.rms_norm, torch.rms_norm, torch.nn.functional.softplus, torch.nn.functional.gelu,
        torch.nn.functional.normalize, torch.cosine_similarity, torch.cdist, torch.erfinv, torch.expm1,
        torch.prod, torch.reciprocal, torch.tan, torch.acos, torch.asin, torch.cosh, torch.sinh, torch.log1p,
        torch.log2, torch.log10,
    }
) - {torch.nn.functional.gelu}  # fmt: skip


class _Redirect(TorchFunctionMode):
    """Sends every tensor to meta (or, below `keep` elements, to the CPU) whatever device was asked for."""

    def __init__(self, keep: int, values: Values | None = None, residence: Residence | None = None) -> None:
        super().__init__()
        self.keep = keep
        self.values = values
        self.residence = residence
        self.autocast: list[torch.dtype | None] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _QUERIES or (type(func) is _GETTER and func != _DEVICE):
            return func(*args, **(kwargs or {}))  # most calls of a trace only ask for shapes and the like
        kwargs = dict(kwargs or {})
        if torch.compiler.is_dynamo_compiling():
            return func(*args, **kwargs)  # the inside of torch.cond and the like, which dynamo captures
        if func in _FACTORIES:
            return self._create(func, args, kwargs)
        if func in _MOVES:
            return self._moved(args[0], *_asked(func, args, kwargs))
        if func == _DEVICE:
            if _asked_by(_CUDA_ONLY):
                return torch.device("cuda")
            if self.residence is not None and self.residence.is_on_host(args[0]):
                return HOST
        if func is torch.Tensor.type_as and self.residence is not None and self.residence.are_apart(*args[:2]):
            func, args = torch.Tensor.to, args[:2]  # which takes it to the other's device
        if func is torch.Tensor.to:
            device, non_blocking = _asked(func, args, kwargs)
            args, kwargs = _without_device(args, kwargs)
            # a copy to another device is cast before it leaves
            made = args[0] if len(args) == 1 and not kwargs else self._call(func, args, kwargs)
            return self._moved(made, device, non_blocking)
        if func is torch.Tensor.type and args[1:] and isinstance(args[1], str):
            args = (args[0], getattr(torch, _LEGACY_TYPES.get(args[1].rsplit(".", 1)[-1], "float32")))
        elif "device" in kwargs:
            device, kwargs["device"] = kwargs["device"], torch.device("meta")
            made = self._call(func, args, kwargs)
            if self.residence is not None and device is not None and isinstance(made, torch.Tensor):
                self.residence.put(made, host=self.residence.is_host(device))
            return made
        return self._call(func, args, kwargs)

    def _call(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        if self.autocast and self.autocast[-1] is not None:
            args, kwargs = _autocast(func, args, kwargs, self.autocast[-1])
        if self.keep:
            args, kwargs = _one_device(args, kwargs)
        result = func(*args, **kwargs) if self.values is None else self.values.call(func, args, kwargs)
        if self.residence is not None:
            self.residence.follow(func, args, kwargs, result)
        return result

    def _moved(self, tensor: torch.Tensor, device: Any, non_blocking: bool) -> torch.Tensor:
        if self.residence is None or device is None:
            return tensor
        made = self.residence.moved(tensor, host=self.residence.is_host(device), non_blocking=non_blocking)
        if self.values is not None and made is not tensor:
            self.values.copied(tensor, made)
        return made

    def module_moved(self, module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """In place of `nn.Module.to`."""
        device, non_blocking = _asked(torch.Tensor.to, (module, *args), kwargs)
        args, kwargs = _without_device((module, *args), kwargs)
        if len(args) > 1 or kwargs:
            _real_module_to(*args, **kwargs)
        if self.residence is not None and device is not None:
            self.residence.move_module(module, host=self.residence.is_host(device), non_blocking=non_blocking)
        return module

    def _create(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        # the meta device has no pinned memory, and only values that come from data need the CPU
        kwargs.pop("pin_memory", None)
        if func is torch.tensor and not self.keep and type(args[0]) in (bool, int, float):
            func, args = torch.full, ((), args[0])  # keeps the value in the graph, where loops are counted by it
        if func is torch.from_numpy:
            made = func(*args)
            made = made if self.keep and made.numel() <= self.keep else made.to("meta")
            if self.residence is not None:
                self.residence.created(func, args, None, made)
            return made
        device, kwargs["device"] = kwargs.get("device"), "meta"
        made = func(*args, **kwargs)
        if self.values is not None:
            self.values.created(func, args, kwargs, made)
        if self.residence is not None:
            if func is torch.as_tensor and isinstance(args[0], torch.Tensor):
                self.residence.follow(func, args, {}, made)
                return self._moved(made, device, False)
            self.residence.created(func, args, device, made)
        if not self.keep or made.numel() > self.keep or any(_is_meta(a) for a in args):
            return made
        kwargs["device"] = "cpu"
        return func(*args, **kwargs)


_DEVICE = torch.Tensor.device.__get__
_CUDA_ONLY = ("torch._higher_order_ops.associative_scan", "torch.nn.attention.flex_attention")
"""Modules of torch that refuse tensors of other devices."""


def _asked_by(modules: Collection[Any], frames: int = 6) -> bool:
    # frames of torch's own function modes may lie between a question and our answer
    frame: FrameType | None = sys._getframe(2)
    for _ in range(frames):
        if frame is None:
            return False
        if frame.f_globals.get("__name__") in modules:
            return True
        frame = frame.f_back
    return False


def _fake_device(self: FakeTensor) -> torch.device:
    if _asked_by(_CUDA_ONLY, 1):
        return torch.device("cuda")
    residence = current()
    if residence is not None and residence.has_host:
        asks = sys._getframe(1).f_code.co_filename
        if not asks.startswith(_TORCH) and residence.is_on_host(self):
            return HOST
    return _real_fake_device(self)


_real_fake_device: Callable[[FakeTensor], torch.device] = vars(FakeTensor)["device"].fget

_GETTER = types.MethodWrapperType
_QUERIES = frozenset(
    {
        torch.Tensor.stride, torch.Tensor.storage_offset, torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel,
        torch.Tensor.untyped_storage, torch.Tensor.is_inference, torch.Tensor.is_conj, torch.Tensor.is_neg,
        torch.Tensor._is_view, torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.is_contiguous,
        torch.sym_max, torch.sym_min,
    }
)  # fmt: skip
_MOVES = frozenset({torch.Tensor.cuda, torch.Tensor.cpu, torch.Tensor.pin_memory, torch.Tensor.xpu})
_LEGACY_TYPES = {
    "HalfTensor": "float16", "BFloat16Tensor": "bfloat16", "FloatTensor": "float32", "DoubleTensor": "float64",
    "LongTensor": "int64", "IntTensor": "int32", "BoolTensor": "bool", "ByteTensor": "uint8", "CharTensor": "int8",
}  # fmt: skip


@contextlib.contextmanager
def building() -> Iterator[None]:
    """For constructors: parameters and large tensors on meta, small ones real, devices redirected."""
    with _redirected(SMALL) as mode, _parameters_on_meta(), _patched_autocast(mode):
        yield


@contextlib.contextmanager
def tracing(residence: Residence | None = None) -> Iterator[None]:
    """For forwards: everything on meta, devices redirected, autocast made explicit, export kept secret.

    Args:
        residence: what is on the host when the forward begins, and is told of what moves.
    """
    where = residence or Residence()
    with (
        torch.no_grad(),
        following() as values,
        residing(where),
        _redirected(0, values, where) as mode,
        _patched_autocast(mode),
        _as_run(),
    ):
        yield


@contextlib.contextmanager
def keeping() -> Iterator[dict[str, torch.Tensor]]:
    """Values of small buffers that `on_meta` takes away, by name, for whoever runs the model for real."""
    kept: dict[str, torch.Tensor] = {}
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


_kept: ContextVar[dict[str, torch.Tensor] | None] = ContextVar("kept", default=None)


def on_meta(module: nn.Module, *, owned: bool = False) -> nn.Module:
    """The module with every tensor on meta, ties and views of one storage kept.

    An `owned` module is changed in place; any other is copied and left untouched.
    """
    memo: dict[int, torch.Tensor] = {}
    storages: dict[int, torch.UntypedStorage] = {}
    for tensor in _tensors_of(module):
        if not tensor.is_meta and id(tensor) not in memo:
            memo[id(tensor)] = _meta_like(tensor, storages)
    if not memo:
        return module
    if (kept := _kept.get()) is not None:
        for path, child in module.named_modules():
            held = {**child._buffers, **vars(child)}
            kept |= {
                f"{path}.{name}": value
                for name, value in held.items()
                if isinstance(value, torch.Tensor) and not value.is_meta and value.numel() <= SMALL
            }
    if not owned:
        return copy.deepcopy(module, dict(memo))
    for child in module.modules():
        stores: tuple[dict[str, Any], ...] = (child._parameters, child._buffers, vars(child))
        for store in stores:
            for name, value in list(store.items()):
                if isinstance(value, torch.Tensor) and id(value) in memo:
                    store[name] = memo[id(value)]
    return module


def expose_plain_tensors(module: nn.Module) -> None:
    """Register tensors that modules keep as plain attributes as non-persistent buffers, so that their name survives."""
    for child in module.modules():
        for name, value in list(vars(child).items()):
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                delattr(child, name)
                child.register_buffer(name, value, persistent=False)


@contextlib.contextmanager
def _redirected(keep: int, values: Values | None = None, residence: Residence | None = None) -> Iterator[_Redirect]:
    mode = _Redirect(keep, values, residence)
    replaced: list[tuple[Any, str, Any]] = []

    def patch(owner: Any, name: str, value: Any) -> None:
        replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    patch(nn.Module, "to", lambda self, *args, **kwargs: mode.module_moved(self, *args, **kwargs))
    patch(nn.Module, "cuda", lambda self, *_, **__: mode.module_moved(self, "cuda"))
    patch(nn.Module, "cpu", lambda self: mode.module_moved(self, HOST))
    patch(torch, "set_default_device", default_to)
    patch(torch.cuda, "set_device", lambda *_: None)
    patch(torch.cuda, "synchronize", lambda *_: None)
    patch(torch.cuda, "empty_cache", lambda: None)
    try:
        with mode, warnings.catch_warnings():
            yield mode
    finally:
        for owner, name, value in reversed(replaced):
            setattr(owner, name, value)


_real_module_to = nn.Module.to


def _asked(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """The device that a move asks for, or a tensor that is there; None for none. And whether it does not wait."""
    if func is torch.Tensor.cpu:
        return HOST, False
    if func is not torch.Tensor.to:
        device = None if func is torch.Tensor.pin_memory else "cuda"
        return device, bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
    rest = [kwargs[name] for name in ("device", "other") if kwargs.get(name) is not None]
    flags = [a for a in args[1:] if isinstance(a, bool)]
    numbers = [a for a in args[1:2] if isinstance(a, int) and not isinstance(a, bool)]
    named = [a for a in args[1:2] if isinstance(a, str | torch.device | torch.Tensor)]
    device = next(iter((*rest, *named, *numbers)), None)
    return device, bool(kwargs.get("non_blocking", flags[0] if flags else False))


def _without_device(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    kwargs.pop("device", None)
    kwargs.pop("non_blocking", None)
    rest = list(args[1:])
    if rest and (
        isinstance(rest[0], str | torch.device) or (isinstance(rest[0], int) and not isinstance(rest[0], bool))
    ):
        del rest[0]
    if rest and isinstance(rest[0], torch.Tensor):
        rest[0] = rest[0].dtype  # `.to(other)` takes other's device too, and all are on one
    if len(rest) > 1 and isinstance(rest[1], bool):
        rest = rest[:1]
    return (args[0], *rest), kwargs


def _one_device(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Real tensors join meta ones on meta; where all are real they stay real."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    tensors += [t for a in args if isinstance(a, list | tuple) for t in a if isinstance(t, torch.Tensor)]
    if len({t.device for t in tensors}) < 2:
        return args, kwargs

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not value.is_meta:
            return value.to("meta")
        if type(value) in (list, tuple):
            return type(value)(move(v) for v in value)
        return value

    with torch._C.DisableTorchFunction():
        return tuple(move(a) for a in args), {key: move(v) for key, v in kwargs.items()}


def _autocast(
    func: Callable[..., Any], args: Any, kwargs: dict[str, Any], low: torch.dtype | None
) -> tuple[Any, dict[str, Any]]:
    if func in _AUTOCAST_LOW:
        wanted = low
    elif func in _AUTOCAST_HIGH:
        wanted = torch.float32
    else:
        return args, kwargs

    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64:
            return value.to(wanted)
        if type(value) in (list, tuple):
            return type(value)(cast(v) for v in value)
        return value

    return tuple(cast(a) for a in args), {key: cast(v) for key, v in kwargs.items()}


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            twin = getattr(param, "_fxroof_meta", None)
            if twin is None:
                with torch._C.DisableTorchFunction():
                    twin = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
                param._fxroof_meta = twin  # type: ignore[attr-defined]  # so that a tied parameter stays tied
            param = twin
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]  # put back below
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]  # as it was


@contextlib.contextmanager
def _patched_autocast(mode: _Redirect) -> Iterator[None]:
    """Autocast on meta tensors does nothing, and for CUDA it is switched off on a CPU build: do its casts ourselves."""
    cls = torch.amp.autocast_mode.autocast
    names = ("__init__", "__enter__", "__exit__")
    saved = {name: getattr(cls, name) for name in names}

    def init(
        self: Any,
        device_type: str = "cuda",
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        del cache_enabled
        default = torch.bfloat16 if device_type == "cpu" else torch.float16
        self.device, self._enabled, self.fast_dtype = device_type, enabled, dtype or default

    def enter(self: Any) -> Any:
        mode.autocast.append(self.fast_dtype if self._enabled else None)
        return self

    def leave(*_: Any) -> None:
        if mode.autocast:
            mode.autocast.pop()

    for name, value in zip(names, (init, enter, leave), strict=True):
        setattr(cls, name, value)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(cls, name, value)


@contextlib.contextmanager
def _as_run() -> Iterator[None]:
    # dynamo recognises these functions by identity, so it must have met the real ones
    import torch._dynamo.variables.torch
    import torch._higher_order_ops.utils as subgraphs

    names = ("is_exporting", "is_compiling", "is_dynamo_compiling")
    saved = {name: getattr(torch.compiler, name) for name in names}
    compilation = subgraphs._set_compilation_env

    @contextlib.contextmanager
    def capturing() -> Iterator[None]:
        # torch.cond, flex_attention and their kin have dynamo capture their functions
        hidden = {name: getattr(torch.compiler, name) for name in names}
        for name, function in saved.items():
            setattr(torch.compiler, name, function)
        try:
            with compilation():
                yield
        finally:
            for name, function in hidden.items():
                setattr(torch.compiler, name, function)

    subgraphs._set_compilation_env = capturing
    FakeTensor.device = property(_fake_device)  # type: ignore[method-assign, assignment]  # put back below
    frames = getattr(TracerBase, _FILTER)
    for name, function in saved.items():
        setattr(torch.compiler, name, functools.partial(_only_export_is_told, function))
    setattr(TracerBase, _FILTER, _frames_below_forward)
    # transformers takes any fake tensor for a sign of compilation
    helpers: Any = sys.modules.get("transformers.utils.import_utils")
    question = getattr(helpers, "is_fake_tensor", None)
    if question is not None:
        helpers.is_fake_tensor = lambda _: False
    try:
        yield
    finally:
        subgraphs._set_compilation_env = compilation
        FakeTensor.device = property(_real_fake_device)  # type: ignore[method-assign, assignment]  # as it was
        setattr(TracerBase, _FILTER, frames)
        if question is not None:
            helpers.is_fake_tensor = question
        for name, value in saved.items():
            setattr(torch.compiler, name, value)


def _only_export_is_told(truth: Callable[[], bool]) -> bool:
    return truth() if sys._getframe(1).f_globals.get("__name__") in _TOLD else False


_TOLD = ("torch._export.utils", "torch._export.wrappers", "torch._dynamo.eval_frame")
"""Modules of torch that write down torch.vmap, and leave out torch.compile, only if they know of the export."""


def _frames_below_forward(_: TracerBase, stack: traceback.StackSummary) -> traceback.StackSummary:
    # export keeps only frames named `forward`, which blames a helper's work on the line that called the helper
    first = next((i for i, frame in enumerate(stack) if frame.name == "forward"), len(stack))
    return traceback.StackSummary.from_list([f for f in stack[first:] if not f.filename.startswith(_TORCH)])


_TORCH = str(Path(torch.__file__).parent)
_FILTER = "_filter_traceback_frames"


def _tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    for child in module.modules():
        yield from (p for p in child._parameters.values() if p is not None)
        yield from (b for b in child._buffers.values() if b is not None)
        yield from (v for v in vars(child).values() if isinstance(v, torch.Tensor))


def _meta_like(tensor: torch.Tensor, storages: dict[int, torch.UntypedStorage]) -> torch.Tensor:
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        made: torch.Tensor = tensor.to("meta")  # a subclass knows how its parts move
    else:
        source = tensor.untyped_storage()
        if source._cdata not in storages:
            storages[source._cdata] = torch.empty(source.nbytes(), dtype=torch.uint8, device="meta").untyped_storage()
        home = storages[source._cdata]
        made = torch.empty(0, dtype=tensor.dtype, device="meta").set_(
            home, tensor.storage_offset(), tensor.size(), tensor.stride()
        )
    if isinstance(tensor, nn.Parameter) and not isinstance(made, nn.Parameter):
        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta
