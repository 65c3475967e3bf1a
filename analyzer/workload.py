"""A model and a scenario -> the programs to trace: encoder, prefill, decode or forward, with example inputs on meta.

A decode step runs one new token against the state that a prompt of the scenario's mean context leaves behind. That
state is not guessed: the model itself is run over such a prompt on the meta device, and what it hands back is taken.
"""

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from .calls import (
    VALUE,
    Call,
    Decoder,
    Encoder,
    Features,
    Replay,
    Wrapper,
    cache_tensors,
    emptied,
    returned_cache,
    runs,
    some_tokens,
    tensors_in,
    with_value,
)
from .errors import WorkloadError
from .inputs import HOOK, SYNTAX, Arguments, from_hook, from_texts, signature
from .load import Model
from .loops import UnrolledError, bounded, shortened
from .meta import building, expose_plain_tensors, on_meta, tracing
from .modalities import candidates, is_transformers, shapes_of
from .scenario import Phase, Scenario
from .trace import explained
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
        module: what to trace; the user's model hangs in it under `prefix`. Or a program that is already exported.
        args: example inputs on meta.
        cache: those inputs that are carried from step to step.
        prefix: attribute of `module` that is the user's model.
    """

    phase: Phase
    module: nn.Module | ExportedProgram
    args: tuple[Any, ...]
    cache: tuple[torch.Tensor, ...] = ()
    prefix: str = "model"

    def __post_init__(self) -> None:
        if isinstance(self.module, Wrapper):
            self.module.known = tuple(getattr(arg, VALUE, None) for arg in self.args)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The programs of a scenario, the scenario as run, and how inputs and cache were found."""

    programs: tuple[Program, ...]
    scenario: Scenario
    cache_kind: str
    notes: tuple[str, ...] = ()


def plan(model: Model, scenario: Scenario, phase: str = "all", inputs: Sequence[str] = ()) -> Workload:
    """Example inputs for every phase asked for.

    Args:
        model: the model on meta.
        scenario: batch and lengths.
        phase: `encoder`, `prefill`, `decode`, `forward` or `all` that the model has.
        inputs: `name=1x3x224x224:bf16` for each argument of one forward; empty to make them.

    Raises:
        WorkloadError: the forward wants inputs that cannot be guessed, or has no such phase.
    """
    workload = _planned(model, scenario, phase, inputs)
    _require(bool(workload.programs), f"{model.name} has no {phase} phase.", "Leave out --phase to see those it has.")
    return workload


def _planned(model: Model, scenario: Scenario, phase: str, inputs: Sequence[str]) -> Workload:
    if model.program is not None:
        _require_whole_prompts(model, scenario)
        _require(not inputs, "An exported program brings its own inputs.", "Leave out --input.")
        return _exported(model.program, scenario, phase)
    if inputs or model.example_inputs is not None:
        _require_whole_prompts(model, scenario)
    if inputs:
        return _given(model, scenario, phase, inputs)
    if model.example_inputs is not None:
        return _hooked(model, scenario, phase)
    arguments = _forward_arguments(model.module)
    if is_transformers(model.module):
        if getattr(model.module.config, "is_encoder_decoder", False) and "encoder_outputs" in arguments:
            _require_whole_prompts(model, scenario)
            return _encoder_decoder(model, scenario, phase)
        if not model.module.can_generate():  # type: ignore[operator]  # a method of transformers
            _require_whole_prompts(model, scenario)
            return _encoder(model, scenario, phase, tuple(arguments))
    if not _takes_tokens(model.module, arguments):
        _require_whole_prompts(model, scenario)
        return _plain_forward(model, scenario, phase, arguments)
    workload = _token_model(model, scenario, phase, arguments)
    return _with_features(model, workload, phase, arguments) if is_transformers(model.module) else workload


def _require_whole_prompts(model: Model, scenario: Scenario) -> None:
    _require(
        not scenario.prefix_len and not scenario.chunk,
        f"{model.name} takes no KV cache that fxroof knows how to fill, so no part of a prompt can be there already.",
        "Leave out --prefix-len and --chunk.",
    )


def _token_model(model: Model, scenario: Scenario, phase: str, arguments: Mapping[str, inspect.Parameter]) -> Workload:
    scenario, notes = _fitted(model, scenario)
    _require(
        scenario.prefix_len < scenario.input_len,
        f"A cached prefix of {scenario.prefix_len} tokens leaves nothing of a prompt of {scenario.input_len}.",
        "Give --input-len the whole prompt, prefix included.",
    )
    try:
        workload = _of_its_manner(model, scenario, phase, arguments)
    except UnrolledError:
        fixed = _fixed_arguments(tuple(arguments))
        scenario, loops = shortened(model.module, scenario, fixed, cached=True)
        notes = [*notes, *loops]
        workload = _of_its_manner(model, scenario, phase, arguments, patient=True)
    return dataclasses.replace(workload, notes=(*notes, *_how_prompts_go(workload.scenario), *workload.notes))


def _how_prompts_go(scenario: Scenario) -> Iterator[str]:
    if scenario.prefix_len:
        yield f"{scenario.prefix_len} of {scenario.input_len} prompt tokens are in the cache already"
    if scenario.prompt_turns > 1:
        yield (
            f"prefill in {scenario.prompt_turns} chunks of at most {scenario.chunk} tokens: the mean one is analysed, "
            f"{scenario.prompt_len} tokens after {scenario.prompt_past}, and counts {scenario.prompt_turns} times"
        )


def _of_its_manner(
    model: Model,
    scenario: Scenario,
    phase: str,
    arguments: Mapping[str, inspect.Parameter],
    *,
    patient: bool = False,
) -> Workload:
    """The programs of a token model by the way it keeps its cache; unless `patient`, loops over tokens are stopped."""
    names = tuple(arguments)
    if hasattr(model.module, "setup_caches") and "input_pos" in names:
        return _own_cache_by_position(model, scenario, phase)
    if "start_pos" in names:
        return _own_cache_by_start(model, scenario, phase)
    argument = next((n for n in names if n in CACHE_ARGUMENTS), "")
    if argument:
        with contextlib.nullcontext() if patient else bounded():
            template = _cache_after(model, scenario, argument, _fixed_arguments(names), scenario.context_len)
        if tensors_in(template):
            return _passed_cache(model, scenario, phase, names, argument, template)
    return _no_cache(model, scenario, phase, arguments)


def _passed_cache(
    model: Model, scenario: Scenario, phase: str, names: Sequence[str], argument: str, template: Any
) -> Workload:
    """Models that take and return their cache, transformers' among them."""
    fixed = _fixed_arguments(names)
    past = scenario.prompt_past
    before = _cache_after(model, scenario, argument, fixed, past) if past and phase in ("all", "prefill") else None
    programs = []
    for name, length, state in (("prefill", scenario.prompt_len, before), ("decode", scenario.step_len, template)):
        if phase in ("all", name):
            cache = tuple(map(emptied, tensors_in(state)))
            programs.append(
                Program(
                    phase=scenario.phase(name, length=length),
                    module=Call(model.module, fixed=fixed, cache_argument=argument, template=state),
                    args=(some_tokens(scenario.batch_size, length), *cache),
                    cache=tuple(cache_tensors(cache)),
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
    for name, length, start in (
        ("prefill", scenario.prompt_len, scenario.prompt_past),
        ("decode", scenario.step_len, scenario.context_len),
    ):
        if phase in ("all", name):
            inputs = {order[0]: some_tokens(scenario.batch_size, length)}
            inputs["input_pos"] = with_value(torch.arange(start, start + length))
            programs.append(
                Program(
                    phase=scenario.phase(name, length=length, cache_fill=start / capacity),
                    module=Call(model.module, names=order),
                    args=tuple(inputs[n] for n in order),
                )
            )
    return Workload(programs=tuple(programs), scenario=scenario, cache_kind=f"owned by the model, {capacity} positions")


def _own_cache_by_start(model: Model, scenario: Scenario, phase: str) -> Workload:
    """Models that own their cache and are told a start position (the manner of Meta's Llama reference)."""
    first = next(iter(_forward_arguments(model.module)))
    programs = []
    for name, length, start in (
        ("prefill", scenario.prompt_len, scenario.prompt_past),
        ("decode", scenario.step_len, scenario.context_len),
    ):
        if phase in ("all", name):
            programs.append(
                Program(
                    phase=scenario.phase(name, length=length, cache_fill=1.0 if start else 0.0),
                    module=Call(model.module, names=(first,), fixed={"start_pos": start}),
                    args=(some_tokens(scenario.batch_size, length),),
                )
            )
    return Workload(programs=tuple(programs), scenario=scenario, cache_kind="owned by the model")


def _no_cache(model: Model, scenario: Scenario, phase: str, arguments: Mapping[str, inspect.Parameter]) -> Workload:
    """Models without a cache: a decode step is a forward over the whole prefix."""
    _require_whole_prompts(model, scenario)
    wanted = [n for n, p in list(arguments.items())[1:] if p.default is inspect.Parameter.empty]
    _require(not wanted, _unknown_inputs(model), HOOK)
    fixed = _fixed_arguments(tuple(arguments), cached=False)
    if not _predicts_tokens(model.module, fixed):
        return _one_forward(
            model,
            Arguments((some_tokens(scenario.batch_size, scenario.input_len),)),
            scenario,
            phase,
            tokens=scenario.input_len,
            notes=("nothing that the model returns has the width of its vocabulary: it generates no tokens",),
        )
    scenario, notes = shortened(model.module, scenario, fixed, cached=False)
    programs = [
        Program(
            phase=scenario.phase(name, length=length),
            module=Call(model.module, fixed=fixed),
            args=(some_tokens(scenario.batch_size, length),),
        )
        for name, length in (("prefill", scenario.input_len), ("decode", scenario.context_len + 1))
        if phase in ("all", name)
    ]
    return Workload(
        programs=tuple(programs),
        scenario=scenario,
        cache_kind="none",
        notes=("the model keeps no KV cache: every decoded token is a forward over the whole prefix", *notes),
    )


def _predicts_tokens(module: nn.Module, fixed: Mapping[str, Any]) -> bool:
    """Whether a result is as wide as an embedding is long; if the model cannot be asked, it is taken to be so."""
    vocabularies = {m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)}
    try:
        with tracing(), contextlib.redirect_stdout(sys.stderr):
            result = module(some_tokens(1, 8), **fixed)
    except Exception:  # the trace will say what is wrong
        return True
    return any(t.dim() and t.shape[-1] in vocabularies for t in tensors_in(result))


def _plain_forward(
    model: Model, scenario: Scenario, phase: str, arguments: Mapping[str, inspect.Parameter]
) -> Workload:
    wanted = [n for n, p in arguments.items() if p.default is inspect.Parameter.empty]
    _require(len(wanted) <= 1, _unknown_inputs(model), HOOK)
    for candidate in _guesses(model.module, scenario):
        if runs(model.module, (candidate,)):
            note = f"input guessed from the first layer: {_described(candidate)}"
            return _one_forward(model, Arguments((candidate,)), scenario, phase, notes=(note,))
    raise WorkloadError(_unknown_inputs(model), HOOK)


def _encoder(model: Model, scenario: Scenario, phase: str, names: tuple[str, ...]) -> Workload:
    """Models of transformers that generate nothing: one forward over text, images, sound or several of them."""
    limit = _length_limit(model.module)
    notes: tuple[str, ...] = ()
    if limit is not None and scenario.input_len > limit and not scenario.lengths_given:
        scenario = dataclasses.replace(scenario, input_len=limit)
        notes = (f"the model has {limit} positions: length reduced to {limit}",)
    for inputs in candidates(model.module, names, scenario):
        if runs(model.module, (), inputs):
            text = "input_ids" in inputs
            only = len(inputs) == 1
            shapes = ", ".join(f"{n} {_described(t)}" for n, t in inputs.items())
            return _one_forward(
                model,
                Arguments((), inputs),
                scenario,
                phase,
                tokens=scenario.input_len if text and only else 0,
                notes=(*(notes if text else ()), f"inputs from the config: {shapes}"),
            )
    return _plain_forward(model, scenario, phase, _forward_arguments(model.module))


def _with_features(
    model: Model, workload: Workload, phase: str, arguments: Mapping[str, inspect.Parameter]
) -> Workload:
    """Language models that also see: the prompt holds an image, or the image's encoder is a phase of its own."""
    if (workload.scenario.prefix_len or workload.scenario.chunk) and "pixel_values" in arguments:
        note = "text only: with a cached prefix or in chunks, images are not analysed"
        return dataclasses.replace(workload, notes=(*workload.notes, note))
    if "pixel_values" not in arguments or not hasattr(model.module, "get_image_features"):
        others = [n for n in ("pixel_values", "input_features", "input_values") if n in arguments]
        note = f"text only: what makes tokens of {', '.join(others)} is not analysed"
        return dataclasses.replace(workload, notes=(*workload.notes, *([note] if others else [])))
    if phase == "decode":
        return workload
    scenario = workload.scenario
    features = Features(model.module)
    image = next((i for i in shapes_of(model.module, "pixel_values", scenario) if runs(features, (i,))), None)
    if image is None:
        note = "text only: the image encoder wants inputs that its config does not tell, and is not analysed"
        return dataclasses.replace(workload, notes=(*workload.notes, note))
    seen = _prompt_with_image(model, scenario, image, tuple(arguments))
    if seen is not None:
        programs = tuple(seen if p.phase.name == "prefill" else p for p in workload.programs)
        note = f"the prompt begins with one image, {_described(image)}, whose features are some of its tokens"
    else:
        encoder = Program(phase=scenario.phase("encoder", length=0), module=features, args=(image,))
        programs = (*([encoder] if phase in ("all", "encoder") else []), *workload.programs)
        note = (
            f"phase encoder: one image a sequence, {_described(image)}; its features are tokens of the prompt, and "
            "putting them among the others is not analysed"
        )
    return dataclasses.replace(workload, programs=programs, notes=(*workload.notes, note))


def _prompt_with_image(model: Model, scenario: Scenario, image: torch.Tensor, names: tuple[str, ...]) -> Program | None:
    """A prefill whose first tokens stand for the image; None where the model does not run so."""
    config = model.module.config
    placeholder = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    with tracing(), contextlib.redirect_stdout(sys.stderr):
        rows = [t.numel() // t.shape[-1] for t in Features(model.module)(image)]
    length, rest = divmod(sum(rows), scenario.batch_size)
    if not isinstance(placeholder, int) or rest or not 0 < length < scenario.input_len:
        return None
    ids: torch.Tensor = getattr(some_tokens(scenario.batch_size, scenario.input_len), VALUE)
    ids[:, :length] = placeholder
    inputs = {"input_ids": ids, "pixel_values": image}
    # what the model's own processor says of the tokens, where it does
    inputs |= {n: (ids == placeholder).long() for n in ("token_type_ids", "mm_token_type_ids") if n in names}
    given = Arguments((), inputs | _fixed_arguments(names))
    argument = next((n for n in names if n in CACHE_ARGUMENTS), "")
    program = _replayed(model, given, scenario.phase("prefill", length=scenario.input_len), argument)
    return program if runs(program.module, program.args) else None


def _encoder_decoder(model: Model, scenario: Scenario, phase: str) -> Workload:
    """An encoder run over the input, the decoder's first token over that, and a decoder step with both caches."""
    module: Any = model.module
    scenario, notes = _source_fitted(model, scenario)
    encoder = Encoder(module)
    source = next((t for t in shapes_of(module, module.main_input_name, scenario) if runs(encoder, (t,))), None)
    if source is None:
        raise WorkloadError(_unknown_inputs(model), HOOK)
    notes = (*notes, f"encoder input: {module.main_input_name} {_described(source)}; the decoder starts from one token")
    batch = scenario.batch_size
    with tracing(), contextlib.redirect_stdout(sys.stderr):
        states = encoder(source)
        scenario = dataclasses.replace(scenario, source_len=int(states.shape[1]), input_len=1)
        try:
            template = Decoder(module).run(some_tokens(batch, scenario.context_len), states).past_key_values
        except Exception as error:
            raise explained(error) from error
    states = emptied(states)
    cache = tuple(map(emptied, tensors_in(template)))
    programs = [
        Program(
            phase=scenario.phase("encoder", length=scenario.source_len),
            module=encoder,
            args=(source,),
        ),
        Program(phase=scenario.phase("prefill"), module=Decoder(module), args=(some_tokens(batch, 1), states)),
        Program(
            phase=scenario.phase("decode"),
            module=Decoder(module, template),
            args=(some_tokens(batch, 1), states, *cache),
            cache=tuple(cache_tensors(cache)),
        ),
    ]
    return Workload(
        programs=tuple(p for p in programs if phase in ("all", p.phase.name)),
        scenario=scenario,
        cache_kind="passed as `past_key_values`: the decoder's own, and that of its attention to the encoder",
        notes=notes,
    )


def _source_fitted(model: Model, scenario: Scenario) -> tuple[Scenario, tuple[str, ...]]:
    """The scenario within the limits of encoder and decoder, each of which has positions of its own."""
    limit = _length_limit(model.module)
    target_limit = getattr(model.module.config, "max_target_positions", None) or limit
    if limit is None or (scenario.input_len <= limit and scenario.output_len < (target_limit or limit)):
        return scenario, ()
    if scenario.lengths_given:
        return scenario, (f"input or output exceeds the model's own limit of {limit} positions",)
    fitted = dataclasses.replace(
        scenario,
        input_len=min(scenario.input_len, limit),
        output_len=min(scenario.output_len, max(1, (target_limit or limit) - 1)),
    )
    return fitted, (f"the model has {limit} positions: input reduced to {fitted.input_len}",)


def _given(model: Model, scenario: Scenario, phase: str, inputs: Sequence[str]) -> Workload:
    """Inputs of one forward as `--input` says them."""
    arguments = from_texts(model.name, model.module, inputs)
    _require(
        bool(tensors_in((arguments.args, dict(arguments.kwargs)))), "--input names no tensor to compute with.", SYNTAX
    )
    return _one_forward(model, arguments, scenario, phase, notes=("inputs as given by --input",))


def _hooked(model: Model, scenario: Scenario, phase: str) -> Workload:
    """The user's `example_inputs(phase, batch_size, input_len, context_len)`: arguments, or None for no such phase."""
    assert model.example_inputs is not None  # noqa: S101  # narrows the type; plan() asked
    lengths = (scenario.batch_size, scenario.input_len, scenario.context_len)
    programs: list[Program] = []
    for name in ("prefill", "decode", "forward"):
        if phase not in ("all", name) or (phase == "all" and name == "forward" and programs):
            continue
        given = from_hook(model.name, model.module, model.example_inputs, name, lengths)
        if given is not None:
            length = {"prefill": scenario.input_len, "decode": 1, "forward": 0}[name]
            programs.append(_replayed(model, given, scenario.phase(name, length=length)))
    _require(bool(programs), "example_inputs() returned None for every phase asked for.", HOOK)
    return Workload(programs=tuple(programs), scenario=scenario, cache_kind="given by example_inputs()")


def _one_forward(
    model: Model,
    given: Arguments,
    scenario: Scenario,
    phase: str,
    *,
    tokens: int = 0,
    notes: tuple[str, ...] = (),
) -> Workload:
    _require(
        phase in ("all", "forward"),
        f"{model.name} is analysed as one forward: it has no {phase} phase.",
        "Leave out --phase, or add example_inputs() to the file to say what its phases are.",
    )
    program = _replayed(model, given, scenario.phase("forward", length=tokens))
    kind = "none" if tokens else "not a token model"
    return Workload(programs=(program,), scenario=scenario, cache_kind=kind, notes=notes)


def _replayed(model: Model, given: Arguments, phase: Phase, cache_argument: str = "") -> Program:
    """A program that calls forward with these arguments; what they hold beside top-level tensors is state."""
    whole = (given.args, dict(given.kwargs))
    tensors = tensors_in(whole)
    meta = tuple(map(emptied, tensors))
    named = _by_name(model.module, given)
    state = {
        name: value
        for name, value in named.items()
        if tensors_in(value) and (name in CACHE_ARGUMENTS or not isinstance(value, torch.Tensor))
    }
    carried = {id(t) for value in state.values() for t in cache_tensors(value)} if phase.name != "forward" else set()
    if carried and not cache_argument:
        cache_argument = next((n for n in state if n in CACHE_ARGUMENTS), next(iter(state)))
    return Program(
        phase=phase,
        module=Replay(model.module, given, cache_argument),
        args=meta,
        cache=tuple(m for t, m in zip(tensors, meta, strict=True) if id(t) in carried),
    )


def _by_name(module: nn.Module, given: Arguments) -> dict[str, Any]:
    bound = inspect.signature(module.forward).bind(*given.args, **given.kwargs).arguments
    flat: dict[str, Any] = {}
    for name, value in bound.items():
        kind = inspect.signature(module.forward).parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            flat |= {f"{name}.{i}": v for i, v in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            flat |= value
        else:
            flat[name] = value
    return flat


def _exported(program: ExportedProgram, scenario: Scenario, phase: str) -> Workload:
    _require(phase in ("all", "forward"), f"An exported program has no {phase} phase.", "Leave out --phase.")
    args, kwargs = program.example_inputs or ((), {})
    leaves = tensors_in((args, kwargs))
    meta = {id(t): emptied(t) for t in leaves}
    flat = torch.utils._pytree.tree_leaves((args, kwargs))
    given = tuple(meta.get(id(leaf), leaf) for leaf in flat)
    return Workload(
        programs=(Program(phase=Phase(), module=program, args=given, prefix=""),),
        scenario=scenario,
        cache_kind="not a token model",
    )


def _cache_after(model: Model, scenario: Scenario, argument: str, fixed: Mapping[str, Any], length: int) -> Any:
    """The cache that the model returns for a prompt of that length: run on meta, so shapes are all it costs."""
    tokens = some_tokens(scenario.batch_size, length)
    with tracing(), contextlib.redirect_stdout(sys.stderr):
        try:
            tell(tokens, getattr(tokens, VALUE))
            result = model.module(tokens, **fixed)
        except UnrolledError:
            raise
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
    fitted = dataclasses.replace(scenario, input_len=limit - output_len, output_len=output_len)
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
    return runs(module, (some_tokens(1, 8),))


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


def _forward_arguments(module: nn.Module) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters
    return {n: p for n, p in parameters.items() if p.kind not in kinds}


def _unknown_inputs(model: Model) -> str:
    return f"{model.name}: cannot guess inputs for forward{signature(model.module)}."


def _described(tensor: torch.Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape))} {str(tensor.dtype).removeprefix('torch.')}"


def _require(condition: bool, message: str, hint: str) -> None:
    if not condition:
        raise WorkloadError(message, hint)
