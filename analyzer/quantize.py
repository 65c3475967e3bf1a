"""A transformers model as its `quantization_config` says it runs: packed weights, their scales, and the kernels' ops.

The unquantised model is built first; its linears and experts are then given the tensors that a checkpoint holds, on
the meta device and registered as parameters, and forwards that call one op a kernel (`packed.py`). Which modules are
converted, what they hold and which kernel runs follow transformers 5.23 (`transformers/quantizers`,
`transformers/integrations`) and, where it hands over to another library, that library: gptqmodel's Marlin kernels for
AWQ and GPTQ, bitsandbytes, DeepGEMM, and OpenAI's Triton kernels for mxfp4. No quantisation library and no GPU is
needed.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .errors import FxroofError, TargetError
from .packed import (
    FP8,
    FourBitLinear,
    Fp8Linear,
    Mxfp4Experts,
    Mxfp4Mlp,
    PackedExperts,
    PackedLinear,
    RowwiseLinear,
    fp8_weight,
    meta_tensor,
    name_of,
    packed_parameter,
)

Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """What conversion made of a model.

    Attributes:
        parameters: number of parameters of the unquantised model, tied ones once.
        dtypes: those parameters by the type that they are stored in; packed types under their own name, as in `int4`.
        notes: what was converted, what was left, and the kernels assumed.
    """

    parameters: int
    dtypes: dict[str, int]
    notes: tuple[str, ...]


def settings_of(config: Mapping[str, Any], where: str) -> Settings | None:
    """The quantisation settings of a transformers config, or None where its weights are plain.

    Raises:
        TargetError: the method, or a setting of it, is not among those that can be priced.
    """
    text = config.get("text_config")
    found = (
        config.get("quantization_config")
        or config.get("compression_config")
        or (text.get("quantization_config") if isinstance(text, Mapping) else None)
    )
    if not found:
        return None
    if not isinstance(found, Mapping):
        raise TargetError(f"{where}: quantization_config is a {type(found).__name__}, not an object.")
    method = _method(found)
    if method not in _METHODS:
        raise TargetError(
            f"{where}: quantization_config of method {method!r} cannot be priced yet, and pricing the model as if its "
            "weights were unquantised would be wrong by a factor of 2 to 4.",
            f"Methods that can be: {', '.join(_METHODS)}. "
            "Remove quantization_config from a copy of the file to price the unquantised model.",
        )
    return found


def compute_dtype(settings: Settings, dtype: torch.dtype) -> tuple[torch.dtype, tuple[str, ...]]:
    """The type that transformers loads the unquantised rest of such a model in, and a note where it overrides."""
    wanted = dtype
    method = _method(settings)
    if method == "awq" and dtype is torch.bfloat16:
        wanted = torch.float16
    elif method == "fbgemm_fp8":
        wanted = torch.bfloat16
    if wanted is dtype:
        return dtype, ()
    return wanted, (f"transformers loads {method} models in {name_of(wanted)}, not {name_of(dtype)}",)


def convert(model: Any, settings: Settings, where: str) -> Packed:
    """Give a transformers model on meta its packed weights, in place.

    Args:
        model: the unquantised model.
        settings: as `settings_of` returned them.
        where: the config file, for messages.

    Raises:
        TargetError: nothing to convert, or a layer that the method has no kernel for.
    """
    unique = {id(p): p for p in model.parameters()}
    dtypes = Counter[str]()
    for parameter in unique.values():
        dtypes[name_of(parameter.dtype)] += parameter.numel()
    work = _Work(model=model, settings=settings, where=where)
    method = _method(settings)
    if settings.get("dequantize"):
        note = f"quantization_config ({method}) says dequantize: weights are unpacked on loading, and priced so"
        return Packed(parameters=sum(dtypes.values()), dtypes=dict(dtypes.most_common()), notes=(note,))
    try:
        kernel_notes = tuple(_METHODS[method](work))
    except FxroofError:
        raise
    except Exception as error:  # settings are a user's file: any type may stand where another is meant
        raise TargetError(
            f"{where}: quantization_config ({method}) cannot be understood: {type(error).__name__}: {error}"
        ) from error
    if not work.converted:
        raise TargetError(
            f"{where}: quantization_config ({method}) converts no layer of {type(model).__name__}.",
            "Remove quantization_config from a copy of the file to price the unquantised model.",
        )
    for (stored, plain), count in work.moved.items():
        dtypes[plain] -= count
        dtypes[stored] += count
    return Packed(
        parameters=sum(dtypes.values()),
        dtypes={name: count for name, count in dtypes.most_common() if count},
        notes=(work.summary(method), *kernel_notes),
    )


@dataclass
class _Work:
    """A model under conversion, and what was done to it so far."""

    model: Any
    settings: Settings
    where: str
    converted: Counter[str] = field(default_factory=Counter)
    moved: Counter[tuple[str, str]] = field(default_factory=Counter)

    def linears(self, wanted: Callable[[str, nn.Module], bool]) -> list[tuple[str, nn.Linear]]:
        """The linear layers that a method converts; exactly nn.Linear, since subclasses compute something else."""
        return [(n, m) for n, m in self.model.named_modules() if type(m) is nn.Linear and wanted(n, m)]

    def experts(self, wanted: Callable[[str, nn.Module], bool]) -> list[tuple[str, nn.Module]]:
        """The modules that hold experts as stacked matrices, in the manner of transformers' experts interface."""
        stacks = [
            (n, m)
            for n, m in self.model.named_modules()
            if any(_is_stack(k, p) for k, p in m.named_parameters(recurse=False)) and wanted(n, m)
        ]
        for name, module in stacks:
            if not hasattr(module, "has_gate"):
                raise self.refusal(f"{name} ({type(module).__name__}) holds experts in a layout of its own")
        return stacks

    def replace(self, name: str, old: nn.Module, new: nn.Module, stored: str) -> None:
        """Put a packed layer in a linear layer's place; `stored` names the type of its weights."""
        self.model.set_submodule(name, new)
        self.count("linear layers", old.weight, stored)

    def pack_experts(self, module: nn.Module, stored: str, pack: "_Packing", forward: type[nn.Module]) -> None:
        """Replace the stacked matrices of an experts module by packed ones and give it another forward."""
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() != 3:
                continue
            experts, rows, columns = parameter.shape
            outputs, inputs = (columns, rows) if getattr(module, "is_transposed", False) else (rows, columns)
            delattr(module, name)
            self.count("", parameter, stored)
            for suffix, tensor in pack(outputs, inputs).items():
                module.register_parameter(name + suffix, packed_parameter((experts, *tensor.shape), tensor.dtype))
        self.converted["expert stacks"] += 1
        # the module keeps its gating, activation and biases: only how it multiplies changes
        module.__class__ = type(forward.__name__, (forward, type(module)), {})

    def count(self, kind: str, parameter: Any, stored: str) -> None:
        """Write down that a weight is now stored as another type."""
        if kind:
            self.converted[kind] += 1
        self.moved[stored, name_of(parameter.dtype)] += parameter.numel()

    def refusal(self, reason: str) -> TargetError:
        """An error that says what cannot be priced."""
        return TargetError(
            f"{self.where}: quantization_config ({_method(self.settings)}) cannot be priced: {reason}.",
            "Remove quantization_config from a copy of the file to price the unquantised model.",
        )

    def unless_listed(self, listed: Any, *, always_defaults: bool = False) -> Callable[[str, nn.Module], bool]:
        """Which modules transformers converts: `HfQuantizer.get_modules_to_not_convert` and `should_convert_module`."""
        kept = set(listed or ())
        if listed is None or always_defaults:
            kept |= _default_skips(self.model)
        kept |= set(getattr(self.model, "_keep_in_fp32_modules", None) or ())
        patterns = [re.compile(rf"(?:{key})(?:(?<=\.)|(?=\.|$))") for key in kept]
        return lambda name, _: not any(p.match(name) for p in patterns) and not name.endswith(tuple(kept))

    def summary(self, method: str) -> str:
        """What holds packed weights, and which linear layers do not."""
        done = " and ".join(f"{count} {kind}" for kind, count in self.converted.items())
        left = [
            f"{re.sub(r'[.][0-9]+', '.*', name)} ({name_of(parameter.dtype)})"
            for name, module in self.model.named_modules()
            for key, parameter in module.named_parameters(recurse=False)
            if (isinstance(module, nn.Linear) and key == "weight") or _is_stack(key, parameter)
        ]
        names = sorted(dict.fromkeys(left), key=lambda name: name.count("."))
        rest = f", {len(names) - 5} more" if len(names) > 5 else ""
        kept = f"; left as they are: {', '.join(names[:5])}{rest}" if names else ""
        return f"quantised by {method}: {done} hold packed weights{kept}"


def _is_stack(name: str, parameter: torch.Tensor) -> bool:
    return parameter.dim() == 3 and name.endswith("_proj") and parameter.element_size() > 1


_Packing = Callable[[int, int], dict[str, torch.Tensor]]
"""Outputs and inputs of a matrix -> its packed tensors on meta, by the suffix that each adds to the matrix's name."""


def _default_skips(model: Any) -> set[str]:
    # transformers' get_keys_to_not_convert: tied weights, the last module and the output embedding
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    keys = set(tied) | (set(tied.values()) if isinstance(tied, Mapping) else set())
    keys.add(list(model.named_parameters())[-1][0])
    output = model.get_output_embeddings()
    keys |= {name for name, module in model.named_modules() if output is not None and module is output}
    return {key.removesuffix(".weight") for key in keys}


# fp8 in blocks (DeepSeek-V3) or per tensor: integrations/finegrained_fp8.py


def _finegrained_fp8(work: _Work) -> Iterable[str]:
    settings = work.settings
    # ignored_layers is vLLM's spelling, whose fp8 has no blocks unless it says so
    block = settings.get("weight_block_size", None if "ignored_layers" in settings else (128, 128))
    static = str(settings.get("activation_scheme", "dynamic")).lower() == "static"
    exponents = settings.get("scale_fmt", "float") == "ue8m0"
    if settings.get("expert_dtype", "fp8") != "fp8":
        raise work.refusal(f"expert_dtype {settings['expert_dtype']!r}")
    if settings.get("modules_to_convert"):
        raise work.refusal("modules_to_convert (fp8 embeddings)")
    blocks = None if block is None else (int(block[0]), int(block[1]))
    scale = torch.float8_e8m0fnu if exponents else torch.float32
    kernel = "triton"
    if blocks == (128, 128) and not static:
        kernel = "deepgemm_ue8m0" if exponents else "deepgemm"
    wanted = work.unless_listed(settings.get("modules_to_not_convert", settings.get("ignored_layers")))
    for name, module in work.model.named_modules():
        if isinstance(module, nn.Linear) and "GroupedLinear" in type(module).__name__ and wanted(name, module):
            raise work.refusal(f"{name} is a block-diagonal {type(module).__name__}")
    for name, linear in work.linears(wanted):
        work.replace(name, linear, Fp8Linear(linear, blocks, scale, kernel, static=static), name_of(FP8))
    for name, module in work.experts(lambda n, m: n.endswith(".experts") and wanted(n, m)):
        if getattr(module, "has_bias", False):
            raise work.refusal(f"{name} has biases, which transformers' fp8 experts do not take")
        work.pack_experts(module, name_of(FP8), lambda n, k: fp8_weight(n, k, blocks, scale), PackedExperts)
    per = f"{blocks[0]}x{blocks[1]} blocks" if blocks else "per tensor"
    yield (
        f"fp8 weights scaled {per}, {'static' if static else 'dynamic'} activation scales, products of fp8 by fp8: "
        + (
            "DeepGEMM after a kernel that quantises activations, on "
            + ("Hopper and datacentre Blackwell" if exponents else "Hopper")
            + "; elsewhere transformers' Triton kernel, which quantises as it loads"
            if kernel != "triton"
            else "transformers' Triton kernel, which quantises as it loads"
        )
    )
    if work.converted["expert stacks"]:
        yield "fp8 experts: one grouped Triton kernel a projection over rows sorted by expert, quantising as it loads"
    yield (
        "on NVIDIA parts without fp8 matrix units (before compute capability 8.9) transformers would unpack the model "
        "to 16 bit on loading: remove quantization_config to price that"
    )


# fp8 by rows: integrations/fbgemm_fp8.py


def _fbgemm_fp8(work: _Work) -> Iterable[str]:
    wanted = work.unless_listed(work.settings.get("modules_to_not_convert"))
    for name, linear in work.linears(wanted):
        new = RowwiseLinear(linear, FP8)
        work.replace(name, linear, new, name_of(FP8))
    if work.experts(wanted):
        raise work.refusal("transformers has FBGEMM experts for Llama 4 alone")
    yield (
        "fp8 weights scaled per output channel, activations per row: FBGEMM's quantise_fp8_per_row, then its row-wise "
        "product of fp8 by fp8; it needs compute capability 9.0"
    )


# integers of a few bits with 16-bit activations


def _awq(work: _Work) -> Iterable[str]:
    settings = work.settings
    bits, group = int(settings.get("bits", settings.get("w_bit", 4))), _group(settings, "q_group_size")
    if bits not in (4, 8):
        raise work.refusal(f"{bits} bits")
    wanted = work.unless_listed(settings.get("modules_to_not_convert"), always_defaults=True)
    zeros = bool(settings.get("zero_point", True))
    _pack_integers(work, wanted, bits, group, zeros=zeros, stored_zeros=zeros)
    yield _weight_only(bits, group, "Marlin, as gptqmodel picks it")
    yield from _expert_kernels(work)


def _gptq(work: _Work) -> Iterable[str]:
    settings = work.settings
    bits, group = int(settings["bits"]), _group(settings)
    if bits not in (2, 3, 4, 8):
        raise work.refusal(f"{bits} bits")
    skipped = []
    for rule, override in (settings.get("dynamic") or {}).items():
        if rule.startswith("-:"):
            skipped.append(re.compile(rule[2:]))
        elif override.get("bits", bits) != bits or override.get("group_size", group) != group:
            raise work.refusal(f"the rule {rule!r} gives some layers other bits")
    inside = settings.get("modules_in_block_to_quantize")
    ends = tuple(name for names in inside for name in ([names] if isinstance(names, str) else names)) if inside else ()
    blocks = {n for n, m in work.model.named_modules() if isinstance(m, nn.ModuleList)}
    output = work.model.get_output_embeddings()

    def wanted(name: str, module: nn.Module) -> bool:
        # optimum's convert_model: the linear layers of the repeated blocks
        if module is output:
            return bool(settings.get("lm_head"))
        in_block = any(name.startswith(f"{b}.") for b in blocks)
        listed = not ends or name.endswith((*ends, ".experts"))
        return in_block and listed and not any(p.match(name) for p in skipped)

    ordered = bool(settings.get("desc_act", False))
    zeros = not settings.get("sym", True)
    _pack_integers(work, wanted, bits, group, zeros=zeros, stored_zeros=True, ordered=ordered, indexed=True)
    yield _weight_only(bits, group, "Marlin, as gptqmodel picks it")
    if ordered:
        yield "desc_act: the kernel is preceded by one that reorders the columns of the activations"
    yield from _expert_kernels(work)


def _pack_integers(
    work: _Work,
    wanted: Callable[[str, nn.Module], bool],
    bits: int,
    group: int,
    *,
    zeros: bool,
    stored_zeros: bool,
    ordered: bool = False,
    indexed: bool = False,
) -> None:
    for name, linear in work.linears(wanted):
        packing = _integers(linear.out_features, linear.in_features, bits, group, stored_zeros, linear.weight.dtype)
        if indexed:
            packing["_g_idx"] = meta_tensor((linear.in_features,), torch.int32)
        work.replace(name, linear, PackedLinear(linear, packing, zeros=zeros, ordered=ordered), f"int{bits}")
    dtype = work.model.dtype
    for _, module in work.experts(wanted):
        work.pack_experts(
            module, f"int{bits}", lambda n, k: _integers(n, k, bits, group, stored_zeros, dtype), PackedExperts
        )
        module.zeros = zeros  # type: ignore[assignment]  # a plain attribute of what is now a PackedExperts


def _integers(
    outputs: int, inputs: int, bits: int, group: int, zeros: bool, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """GPTQ's layout, and in bytes AWQ's: packed along the inputs in int32, scales and zero points a group."""
    groups = -(-inputs // group) if group > 0 else 1
    packed = {
        "_qweight": meta_tensor((inputs * bits // 32, outputs), torch.int32),
        "_scales": meta_tensor((groups, outputs), dtype),
    }
    if zeros:
        packed["_qzeros"] = meta_tensor((groups, -(-outputs * bits // 32)), torch.int32)
    return packed


def _weight_only(bits: int, group: int, kernel: str) -> str:
    per = f"a group of {group}" if group > 0 else "a row"
    return (
        f"weights of {bits} bits with a 16-bit scale {per}, activations of 16 bits: one kernel that widens weights in "
        f"registers and multiplies in the activations' type ({kernel})"
    )


def _expert_kernels(work: _Work) -> Iterable[str]:
    if work.converted["expert stacks"]:
        yield (
            "packed experts: one grouped kernel a projection over rows sorted by expert, as vLLM's Marlin experts; "
            "transformers has none of its own"
        )


def _group(settings: Settings, other: str = "group_size") -> int:
    return int(settings.get("group_size", settings.get(other, 128)))


# compressed-tensors: the format of llm-compressor


def _compressed_tensors(work: _Work) -> Iterable[str]:
    groups = work.settings["config_groups"]
    ignored = list(work.settings.get("ignore") or ())
    yield from (note for group in groups.values() for note in _compressed_group(work, group, ignored))
    if work.settings.get("kv_cache_scheme"):
        yield "kv_cache_scheme is not applied: transformers keeps the cache in the model's own type"
    yield (
        "kernels as vLLM runs this format; transformers by itself unpacks these weights to 16 bit at the first "
        "forward: remove quantization_config to price that"
    )


def _compressed_group(work: _Work, group: Settings, ignored: list[str]) -> Iterable[str]:
    weights, activations = group["weights"], group.get("input_activations")
    kind, bits, strategy = weights.get("type", "int"), int(weights["num_bits"]), weights.get("strategy")
    targets = list(group["targets"])

    def wanted(name: str, module: nn.Module) -> bool:
        # a stack of experts is linear layers in the checkpoint
        stacked = type(module) is not nn.Linear
        full = f"{name}.0.down_proj" if stacked else name
        return _targeted(full, "Linear", targets) and not _targeted(full, "Linear", ignored)

    if activations is None and kind == "int" and bits in (4, 8):
        size = int(weights.get("group_size") or -1)
        zeros = not weights.get("symmetric", True)
        ordered = weights.get("actorder") == "group"
        _pack_integers(work, wanted, bits, size, zeros=zeros, stored_zeros=zeros, ordered=ordered, indexed=ordered)
        yield _weight_only(bits, size, "Marlin")
        yield from _expert_kernels(work)
        return
    same = activations is not None and (activations.get("type", "int"), int(activations["num_bits"])) == (kind, bits)
    if not same or bits != 8 or kind not in ("int", "float"):
        inputs = "16-bit activations" if activations is None else f"{activations}"
        raise work.refusal(f"weights of {bits}-bit {kind} with {inputs}")
    dtype = FP8 if kind == "float" else torch.int8
    block = weights.get("block_structure") if strategy == "block" else None
    if strategy == "block" and block is None:
        raise work.refusal("blocks without block_structure")
    if isinstance(block, str):
        block = [int(n) for n in block.split("x")]
    blocks = None if block is None else (int(block[0]), int(block[1]))
    for name, linear in work.linears(wanted):
        new: nn.Module
        if blocks is None:
            new = RowwiseLinear(linear, dtype)
        else:
            new = Fp8Linear(linear, blocks, torch.float32, "rowwise", fused_bias=True)
        work.replace(name, linear, new, name_of(dtype))
    if dtype is torch.int8 and work.experts(wanted):
        raise work.refusal("experts in int8")
    for _, module in work.experts(wanted):
        work.pack_experts(
            module, name_of(dtype), lambda n, k: fp8_weight(n, k, blocks or (1, k), torch.float32), PackedExperts
        )
    per = f"{blocks[0]}x{blocks[1]} blocks" if blocks else "per output channel"
    yield (
        f"{name_of(dtype)} weights scaled {per}, activations of the same type: a kernel that quantises them, then a "
        f"product of {name_of(dtype)} by {name_of(dtype)}"
    )
    if work.converted["expert stacks"]:
        yield "experts: one grouped kernel a projection over rows sorted by expert, quantising as it loads"


def _targeted(name: str, kind: str, patterns: Iterable[str]) -> bool:
    return any(
        re.match(p[3:], name) is not None if p.startswith("re:") else p in (kind, name) or name.startswith(f"{p}.")
        for p in patterns
    )


# bitsandbytes: integrations/bitsandbytes.py


def _bitsandbytes(work: _Work) -> Iterable[str]:
    settings = work.settings
    four = not settings.get("load_in_8bit", settings.get("_load_in_8bit"))
    wanted = work.unless_listed(settings.get("llm_int8_skip_modules"))
    convolutions = [n for n, m in work.model.named_modules() if type(m).__name__ == "Conv1D" and wanted(n, m)]
    if convolutions:
        raise work.refusal(f"{convolutions[0]} is a Conv1D")
    kind = str(settings.get("bnb_4bit_quant_type", "fp4")) if four else "int8"
    for name, linear in work.linears(wanted):
        if four:
            nested = bool(settings.get("bnb_4bit_use_double_quant"))
            compute = getattr(torch, str(settings.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch."))
            new: nn.Module = FourBitLinear(linear, nested=nested, half_computes_in=compute)
        else:
            new = RowwiseLinear(linear, torch.int8, "bitsandbytes")
        work.replace(name, linear, new, kind)
    if four:
        yield (
            f"{kind} weights in blocks of 64: bitsandbytes multiplies a single row straight from packed weights, and "
            "for more rows first unpacks the whole matrix to 16 bit in device memory"
        )
    else:
        yield (
            "int8 weights scaled per output channel: bitsandbytes quantises activations by row, multiplies int8 by "
            "int8 into int32 in device memory and scales that; outlier columns, which depend on data, are left out"
        )


# mxfp4: integrations/mxfp4.py


def _mxfp4(work: _Work) -> Iterable[str]:
    wanted = work.unless_listed(work.settings.get("modules_to_not_convert"))
    for name, module in list(work.model.named_modules()):
        if type(module).__name__ != "GptOssMLP" or not wanted(f"{name}.experts", module):
            continue
        work.pack_experts(module.experts, "mxfp4", _mxfp4_weight, Mxfp4Experts)
        for parameter_name, parameter in list(module.experts.named_parameters(recurse=False)):
            if parameter_name.endswith("_bias"):
                setattr(module.experts, parameter_name, packed_parameter(parameter.shape, torch.float32))
                work.moved["float32", name_of(parameter.dtype)] += parameter.numel()
        module.__class__ = type("Mxfp4Mlp", (Mxfp4Mlp, type(module)), {})
    yield (
        "mxfp4 experts, blocks of 32 e2m1 values with an e8m0 scale: OpenAI's Triton kernels (matmul_ogs), which "
        "gather, add the bias and apply SwiGLU in the first product and scatter in the second; activations are "
        "bfloat16, so weights are widened to that and multiplied there, on Hopper and on Blackwell alike"
    )


def _mxfp4_weight(outputs: int, inputs: int) -> dict[str, torch.Tensor]:
    blocks = -(-inputs // 32)
    return {
        "": meta_tensor((outputs, blocks * 16), torch.uint8),
        "_scales": meta_tensor((outputs, blocks), torch.uint8),
    }


def _method(settings: Settings) -> str:
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    return str(settings.get("quant_method", "unknown"))


_METHODS: Mapping[str, Callable[[_Work], Iterable[str]]] = {
    "fp8": _finegrained_fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "mxfp4": _mxfp4,
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
}
