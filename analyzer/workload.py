"""A model and a scenario -> the programs to trace: prefill, decode or forward, each with example inputs on meta.

A decode step runs one new token against the state that a prompt of the scenario's mean context leaves behind. That
state is not guessed: the model itself is run over such a prompt on the meta device, and what it hands back is taken.
"""

import contextlib
import copy
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import WorkloadError
from .load import Model
from .meta import building, expose_plain_tensors, on_meta, tracing
from .scenario import Phase, Scenario
from .trace import CACHE, RESULT, explained
from .values import tell

CACHE_ARGUMENTS = (
    "past_key_values", "past_key_value", "kv_cache", "kv_caches", "cache", "caches", "past_kv", "past", "layer_past",
    "cache_params", "state", "states", "memory",
)  # fmt: skip
_LENGTH_FIELDS = (
    "max_position_embeddings", "n_positions", "block_size", "max_seq_len", "max_seq_length", "max_sequence_length",
    "context_length", "n_ctx", "seq_len", "max_len", "seq_length",
)  # fmt: skip
_SIZE_FIELDS = ("image_size", "img_size", "input_size", "resolution")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One phase, ready to trace.

    Attributes:
        phase: which phase, and the tokens in it.
        module: what to trace; the user's model hangs in it under `prefix`.
        args: example inputs on meta.
        cache: those inputs that are carried from step to step.
        prefix: attribute of `module` that is the user's model.
    """

    phase: Phase
    module: nn.Module
    args: tuple[Any, ...]
    cache: tuple[torch.Tensor, ...] = ()
    prefix: str = "model"

    def __post_init__(self) -> None:
        if isinstance(self.module, _Call):
            self.module.known = tuple(getattr(arg, _VALUE, None) for arg in self.args)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The programs of a scenario, the scenario as run, and how inputs and cache were found."""

    programs: tuple[Program, ...]
    scenario: Scenario
    cache_kind: str
    notes: tuple[str, ...] = ()


def plan(model: Model, scenario: Scenario, phase: str = "all") -> Workload:
    """Example inputs for every phase asked for.

    Args:
        model: the model on meta.
        scenario: batch and lengths.
        phase: `prefill`, `decode`, `forward` or `all` that the model has.

    Raises:
        WorkloadError: the forward wants inputs that cannot be guessed.
    """
    if model.example_inputs is not None:
        return _from_hook(model, scenario, phase)
    arguments = _forward_arguments(model.module)
    if not _takes_tokens(model.module, arguments):
        _require(
            phase in ("all", "forward"),
            f"{model.name} takes no tokens: it has no {phase} phase.",
            "Use --phase forward.",
        )
        return _plain_forward(model, scenario, arguments)
    scenario, notes = _fitted(model, scenario)
    names = tuple(arguments)
    if hasattr(model.module, "setup_caches") and "input_pos" in names:
        workload = _own_cache_by_position(model, scenario, phase)
    elif "start_pos" in names:
        workload = _own_cache_by_start(model, scenario, phase)
    elif (argument := next((n for n in names if n in CACHE_ARGUMENTS), None)) and tensors_in(
        template := _cache_after(model, scenario, argument, _fixed_arguments(names))
    ):
        workload = _passed_cache(model, scenario, phase, names, argument, template)
    else:
        workload = _no_cache(model, scenario, phase, arguments)
    return Workload(
        programs=workload.programs,
        scenario=scenario,
        cache_kind=workload.cache_kind,
        notes=(*notes, *workload.notes),
    )


class _Call(nn.Module):
    """Calls the model and returns every tensor of its result, the cache it hands back apart from the rest.

    With a `template`, inputs after the tokens are tensors to rebuild the cache argument around.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        names: Sequence[str] = (),
        fixed: Mapping[str, Any] | None = None,
        cache_argument: str = "",
        template: Any = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.fixed = dict(fixed or {})
        self.cache_argument = cache_argument
        self.template = [template]  # in a list, so that a template that is a module is not registered
        self.known: Sequence[torch.Tensor | None] = ()

    def forward(self, *inputs: Any) -> dict[str, tuple[torch.Tensor, ...]]:
        for given, real in zip(inputs, self.known, strict=False):
            if real is not None:
                tell(given, real)
        if self.template[0] is not None:
            state = refilled(self.template[0], inputs[1:])
            result = self.model(inputs[0], **{self.cache_argument: state}, **self.fixed)
        else:
            positional = inputs[: len(inputs) - len(self.names)]
            named = dict(zip(self.names, inputs[len(positional) :], strict=True))
            result = self.model(*positional, **named, **self.fixed)
        cache = tensors_in(returned_cache(result, self.cache_argument)) if self.cache_argument else []
        carried = {id(t) for t in cache}
        return {RESULT: tuple(t for t in tensors_in(result) if id(t) not in carried), CACHE: tuple(cache)}


def returned_cache(result: Any, argument: str) -> Any:
    """The cache in what a model returned: the field of the argument's name, or the last part that is not the first."""
    if isinstance(result, Mapping):
        return result.get(argument)
    if (field_value := getattr(result, argument, None)) is not None:
        return field_value
    if isinstance(result, tuple | list) and len(result) > 1:
        return next((part for part in reversed(result[1:]) if tensors_in(part)), None)
    return None


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor inside nested containers and plain objects, each once, in a fixed order; modules left out."""
    found: dict[int, torch.Tensor] = {}
    _collect(value, found, set())
    return list(found.values())


def refilled(template: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """A copy of a nested object with its tensors replaced, in the order of `tensors_in`."""
    old = tensors_in(template)
    memo: dict[int, Any] = {id(o): n for o, n in zip(old, tensors, strict=True)}
    return copy.deepcopy(template, memo)


def _passed_cache(
    model: Model, scenario: Scenario, phase: str, names: Sequence[str], argument: str, template: Any
) -> Workload:
    """Models that take and return their cache, transformers' among them."""
    fixed = _fixed_arguments(names)
    programs = []
    if phase in ("all", "prefill"):
        programs.append(
            Program(
                phase=scenario.phase("prefill", length=scenario.input_len),
                module=_Call(model.module, fixed=fixed, cache_argument=argument),
                args=(_tokens(scenario.batch_size, scenario.input_len),),
            )
        )
    if phase in ("all", "decode"):
        cache = tuple(
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors_in(template)
        )
        programs.append(
            Program(
                phase=scenario.phase("decode"),
                module=_Call(model.module, fixed=fixed, cache_argument=argument, template=template),
                args=(_tokens(scenario.batch_size, 1), *cache),
                cache=cache,
            )
        )
    return Workload(programs=tuple(programs), scenario=scenario, cache_kind=f"passed as `{argument}`")


def _own_cache_by_position(model: Model, scenario: Scenario, phase: str) -> Workload:
    """Models that own their cache buffers and are told positions (gpt-fast's manner)."""
    capacity = scenario.input_len + scenario.output_len
    with building(), contextlib.redirect_stdout(sys.stderr):
        model.module.setup_caches(scenario.batch_size, capacity)  # type: ignore[operator]  # the user's method
    allocated = getattr(model.module, "max_seq_length", None)  # a larger cache set up before is kept
    capacity = max(capacity, allocated) if isinstance(allocated, int) else capacity
    on_meta(model.module, owned=True)
    expose_plain_tensors(model.module)
    names = list(_forward_arguments(model.module))
    order = [n for n in names if n == "input_pos" or names.index(n) == 0]
    programs = []
    filled = scenario.context_len / capacity
    for name, length, fill in (("prefill", scenario.input_len, 0.0), ("decode", 1, filled)):
        if phase in ("all", name):
            inputs = {order[0]: _tokens(scenario.batch_size, length)}
            start = 0 if name == "prefill" else scenario.context_len
            inputs["input_pos"] = _with_value(torch.arange(start, start + length))
            programs.append(
                Program(
                    phase=scenario.phase(name, length=length, cache_fill=fill),
                    module=_Call(model.module, names=order),
                    args=tuple(inputs[n] for n in order),
                )
            )
    return Workload(programs=tuple(programs), scenario=scenario, cache_kind=f"owned by the model, {capacity} positions")


def _own_cache_by_start(model: Model, scenario: Scenario, phase: str) -> Workload:
    """Models that own their cache and are told a start position (the manner of Meta's Llama reference)."""
    first = next(iter(_forward_arguments(model.module)))
    programs = []
    for name, length, start in (("prefill", scenario.input_len, 0), ("decode", 1, scenario.context_len)):
        if phase in ("all", name):
            programs.append(
                Program(
                    phase=scenario.phase(name, length=length, cache_fill=1.0 if start else 0.0),
                    module=_Call(model.module, names=(first,), fixed={"start_pos": start}),
                    args=(_tokens(scenario.batch_size, length),),
                )
            )
    return Workload(programs=tuple(programs), scenario=scenario, cache_kind="owned by the model")


def _no_cache(model: Model, scenario: Scenario, phase: str, arguments: Mapping[str, inspect.Parameter]) -> Workload:
    """Models without a cache: a decode step is a forward over the whole prefix."""
    wanted = [n for n, p in list(arguments.items())[1:] if p.default is inspect.Parameter.empty]
    _require(not wanted, _unknown_inputs(model, arguments), _HOOK)
    programs = [
        Program(
            phase=scenario.phase(name, length=length),
            module=_Call(model.module, fixed=_fixed_arguments(tuple(arguments), cached=False)),
            args=(_tokens(scenario.batch_size, length),),
        )
        for name, length in (("prefill", scenario.input_len), ("decode", scenario.context_len + 1))
        if phase in ("all", name)
    ]
    return Workload(
        programs=tuple(programs),
        scenario=scenario,
        cache_kind="none",
        notes=("the model keeps no KV cache: every decoded token is a forward over the whole prefix",),
    )


def _plain_forward(model: Model, scenario: Scenario, arguments: Mapping[str, inspect.Parameter]) -> Workload:
    wanted = [n for n, p in arguments.items() if p.default is inspect.Parameter.empty]
    _require(len(wanted) <= 1, _unknown_inputs(model, arguments), _HOOK)
    for candidate in _guesses(model.module, scenario):
        if _runs(model.module, (candidate,)):
            shape = "x".join(map(str, candidate.shape))
            program = Program(phase=Phase(), module=_Call(model.module), args=(candidate,))
            kind = str(candidate.dtype).removeprefix("torch.")
            return Workload(
                programs=(program,),
                scenario=scenario,
                cache_kind="not a token model",
                notes=(f"input guessed from the first layer: {shape} {kind}",),
            )
    raise WorkloadError(_unknown_inputs(model, arguments), _HOOK)


def _from_hook(model: Model, scenario: Scenario, phase: str) -> Workload:
    """The user's `example_inputs(phase, batch_size, input_len, context_len)`: arguments, or None for no such phase."""
    assert model.example_inputs is not None  # noqa: S101  # narrows the type; plan() asked
    programs = []
    for name in ("prefill", "decode", "forward"):
        if phase not in ("all", name):
            continue
        with building():
            given = model.example_inputs(name, scenario.batch_size, scenario.input_len, scenario.context_len)
        if given is None:
            continue
        names = tuple(given) if isinstance(given, Mapping) else ()
        values = (
            tuple(given.values()) if isinstance(given, Mapping) else given if isinstance(given, tuple) else (given,)
        )
        values = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), values)
        length = {"prefill": scenario.input_len, "decode": 1, "forward": 0}[name]
        programs.append(
            Program(
                phase=scenario.phase(name, length=length),
                module=_Call(model.module, names=names),
                args=values,
                cache=tuple(t for v in values if not isinstance(v, torch.Tensor) for t in tensors_in(v)),
            )
        )
    _require(bool(programs), "example_inputs() returned None for every phase asked for.", _HOOK)
    return Workload(programs=tuple(programs), scenario=scenario, cache_kind="given by example_inputs()")


_HOOK = (
    "Add a function to the file: example_inputs(phase, batch_size, input_len, context_len), returning the arguments "
    "of forward as a tuple or a dict, or None where the model has no such phase."
)


def _cache_after(model: Model, scenario: Scenario, argument: str, fixed: Mapping[str, Any]) -> Any:
    """The cache that the model returns for a prompt of the mean context: run on meta, so shapes are all it costs."""
    tokens = _tokens(scenario.batch_size, scenario.context_len)
    with tracing(), contextlib.redirect_stdout(sys.stderr):
        try:
            tell(tokens, getattr(tokens, _VALUE))
            result = model.module(tokens, **fixed)
        except Exception as error:
            raise explained(error) from error
    return returned_cache(result, argument)


def _fixed_arguments(names: Sequence[str], *, cached: bool = True) -> dict[str, Any]:
    # what transformers' generate() passes; use_cache also serves hand-written models of that manner
    fixed: dict[str, Any] = {}
    if "use_cache" in names:
        fixed["use_cache"] = cached
    if "logits_to_keep" in names:
        fixed["logits_to_keep"] = 1
    return fixed


def _fitted(model: Model, scenario: Scenario) -> tuple[Scenario, list[str]]:
    """The scenario within the model's own length limit: defaults shrink, what the user asked for stays."""
    limit = _length_limit(model.module)
    if limit is None or scenario.input_len + scenario.output_len <= limit:
        return scenario, []
    if scenario.lengths_given:
        return scenario, [f"input and output exceed the model's own limit of {limit} positions"]
    output_len = min(scenario.output_len, max(1, limit // 4))
    fitted = Scenario(
        batch_size=scenario.batch_size,
        input_len=limit - output_len,
        output_len=output_len,
        name=scenario.name,
    )
    return fitted, [
        f"the model has {limit} positions: lengths reduced to input {fitted.input_len}, output {output_len}"
    ]


def _length_limit(module: nn.Module) -> int | None:
    owners = [*(getattr(module, n, None) for n in ("config", "params", "args", "cfg", "hparams")), module]
    for owner in owners:
        text = getattr(owner, "get_text_config", None)
        owner = text() if callable(text) else owner
        for name in _LENGTH_FIELDS:
            value = owner.get(name) if isinstance(owner, dict) else getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 1:
                return value
    return None


def _takes_tokens(module: nn.Module, arguments: Mapping[str, inspect.Parameter]) -> bool:
    if not arguments or not any(isinstance(m, nn.Embedding) for m in module.modules()):
        return False
    if {"input_pos", "start_pos", "input_ids", "idx", "tokens", "token_ids"} & set(arguments):
        return True
    return _runs(module, (_tokens(1, 8),))


def _guesses(module: nn.Module, scenario: Scenario) -> Iterator[torch.Tensor]:
    """Inputs that the first layer would take, the likeliest first."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    batch = scenario.batch_size
    shapes: list[tuple[int, ...]] = []
    sizes = list(dict.fromkeys([*_image_sizes(module), 224, 256, 384, 512, 299, 64, 32, 28]))
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            shapes += [(batch, layer.in_channels, s, s) for s in sizes]
        elif isinstance(layer, nn.Conv3d):
            shapes += [(batch, layer.in_channels, 16, s, s) for s in sizes]
        elif isinstance(layer, nn.Conv1d):
            shapes += [(batch, layer.in_channels, n) for n in (scenario.input_len, 3000, 16000)]
        elif isinstance(layer, nn.Linear):
            shapes += [(batch, layer.in_features), (batch, scenario.input_len, layer.in_features)]
        elif isinstance(layer, nn.RNNBase):
            shapes += [(batch, scenario.input_len, layer.input_size)]
        if shapes:
            break
    yield from (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)


def _image_sizes(module: nn.Module) -> list[int]:
    found = []
    for owner in (module, *module.children(), *(getattr(module, n, None) for n in ("config", "cfg", "args"))):
        for name in _SIZE_FIELDS:
            value = getattr(owner, name, None)
            value = value[0] if isinstance(value, tuple | list) and value else value
            if isinstance(value, int) and value > 1:
                found.append(value)
    return found


def _runs(module: nn.Module, args: tuple[Any, ...]) -> bool:
    try:
        with tracing(), contextlib.redirect_stdout(sys.stderr):
            module(*args)
    except Exception:  # whatever user code raises means that this guess was wrong
        return False
    return True


def _forward_arguments(module: nn.Module) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters
    return {n: p for n, p in parameters.items() if p.kind not in kinds}


def _unknown_inputs(model: Model, arguments: Mapping[str, inspect.Parameter]) -> str:
    signature = ", ".join(str(p) for p in arguments.values())
    return f"{model.name}: cannot guess inputs for forward({signature})."


def _tokens(batch_size: int, length: int) -> torch.Tensor:
    # any ids but the first few, which often mean padding, start and end
    return _with_value((torch.arange(batch_size * length) % 89 + 7).view(batch_size, length))


def _with_value(real: torch.Tensor) -> torch.Tensor:
    tensor = torch.empty(real.shape, dtype=real.dtype, device="meta")
    setattr(tensor, _VALUE, real)
    return tensor


_VALUE = "fxroof_value"
"""Attribute of an example input that holds what it contains, for control flow that looks at it."""


def _require(condition: bool, message: str, hint: str) -> None:
    if not condition:
        raise WorkloadError(message, hint)


def _collect(value: Any, found: dict[int, torch.Tensor], seen: set[int]) -> None:
    if isinstance(value, torch.Tensor):
        found.setdefault(id(value), value)
        return
    if id(value) in seen or isinstance(
        value, nn.Module | type | str | bytes | int | float | torch.dtype | torch.device
    ):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        for item in value.values():
            _collect(item, found, seen)
    elif isinstance(value, tuple | list):
        for item in value:
            _collect(item, found, seen)
    elif hasattr(value, "__dict__") and not callable(value):
        for item in vars(value).values():
            _collect(item, found, seen)
