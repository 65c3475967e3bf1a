"""Layers that hold packed weights, as quantised transformers models run them, and the ops that they call.

Every tensor of a checkpoint is a parameter on the meta device; every kernel is an op of the namespace `fxroof`, which
has shapes and nothing to compute. `formulas/quantized.py` prices them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

FP8 = torch.float8_e4m3fn


def meta_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on meta."""
    return torch.empty(shape, dtype=dtype, device="meta")


def packed_parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """A parameter on meta; integers too are weights to load."""
    return nn.Parameter(meta_tensor(shape, dtype), requires_grad=False)


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def fp8_weight(outputs: int, inputs: int, block: tuple[int, int] | None, scale: torch.dtype) -> dict[str, torch.Tensor]:
    """An fp8 matrix and its scales by block, or one scale; keys are suffixes to the name of the matrix."""
    tiles = (1, 1) if block is None else (-(-outputs // block[0]), -(-inputs // block[1]))
    return {"": meta_tensor((outputs, inputs), FP8), "_scale_inv": meta_tensor(tiles, scale)}


class Fp8Linear(nn.Module):
    """Weights and activations in fp8: quantise the rows, multiply, scale; a bias is a kernel of its own."""

    def __init__(
        self,
        linear: nn.Linear,
        block: tuple[int, int] | None,
        scale: torch.dtype,
        kernel: str,
        *,
        static: bool = False,
        fused_bias: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        tensors = fp8_weight(linear.out_features, linear.in_features, block, scale)
        self.weight = packed_parameter(tensors[""].shape, FP8)
        self.weight_scale_inv = packed_parameter(tensors["_scale_inv"].shape if block else (), scale)
        self.activation_scale = packed_parameter((), torch.float32) if static else None
        self.bias: nn.Parameter | None = linear.bias
        self.group = block[1] if block else linear.in_features
        self.kernel, self.fused_bias = kernel, fused_bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `torch.nn.Linear`."""
        ops = torch.ops.fxroof
        rows, scales = ops.quantize_activations(x, self.activation_scale, self.group, FP8, self.kernel)
        bias = self.bias if self.fused_bias else None
        out: torch.Tensor = ops.linear_scaled(
            rows, scales, self.weight, self.weight_scale_inv, bias, x.dtype, self.kernel
        )
        return out if self.bias is None or self.fused_bias else out.add_(self.bias)


class RowwiseLinear(nn.Module):
    """Weights of 8 bits with a scale an output channel, activations of 8 bits with a scale a row."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, kernel: str = "rowwise") -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = packed_parameter((linear.out_features, linear.in_features), dtype)
        self.weight_scale = packed_parameter((linear.out_features, 1), torch.float32)
        self.bias = linear.bias
        self.stored, self.kernel = dtype, kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `torch.nn.Linear`."""
        ops = torch.ops.fxroof
        rows, scales = ops.quantize_activations(x, None, self.in_features, self.stored, self.kernel)
        out: torch.Tensor = ops.linear_scaled(
            rows, scales, self.weight, self.weight_scale, self.bias, x.dtype, self.kernel
        )
        return out


class PackedLinear(nn.Module):
    """Weights of a few bits, widened to the activations' type in registers as they are multiplied."""

    def __init__(self, linear: nn.Linear, packing: Mapping[str, torch.Tensor], *, zeros: bool, ordered: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for suffix, tensor in packing.items():
            self.register_parameter(suffix.removeprefix("_"), packed_parameter(tensor.shape, tensor.dtype))
        self.bias = linear.bias
        # checkpoints hold zero points and an order even where the kernel does without
        self.zeros, self.ordered = zeros, ordered

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `torch.nn.Linear`."""
        out: torch.Tensor = torch.ops.fxroof.linear_packed(
            x,
            self.qweight,
            self.scales,
            self.qzeros if self.zeros else None,
            self.g_idx if self.ordered else None,
            self.bias,
            self.out_features,
        )
        return out


class FourBitLinear(nn.Module):
    """Weights of 4 bits in blocks of 64 that share a scale (QLoRA, Dettmers et al. 2023, section 3)."""

    def __init__(self, linear: nn.Linear, *, nested: bool, half_computes_in: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        count = linear.weight.numel()
        blocks = -(-count // 64)
        self.weight = packed_parameter((-(-count // 2), 1), torch.uint8)
        self.absmax = packed_parameter((blocks,), torch.uint8 if nested else torch.float32)
        self.nested_absmax = packed_parameter((-(-blocks // 256),), torch.float32) if nested else None
        self.bias: nn.Parameter | None = linear.bias
        # Linear4bit.set_compute_type: bfloat16 and float32 activations overrule the config
        self.half_computes_in = half_computes_in

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `torch.nn.Linear`."""
        ops, given = torch.ops.fxroof, x.dtype
        if given is torch.float16 and self.half_computes_in is not given:
            x = x.to(self.half_computes_in)
        if x.numel() == x.shape[-1]:
            out: torch.Tensor = ops.linear_packed(
                x, self.weight, self.absmax, self.nested_absmax, None, None, self.out_features
            )
            out = out if self.bias is None else out + self.bias.to(x.dtype)
        else:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            shape = (self.out_features, self.in_features)
            plain = ops.dequantize_weight(self.weight, self.absmax, self.nested_absmax, shape, x.dtype)
            out = torch.nn.functional.linear(x, plain, bias)
        return out.to(given)


class PackedExperts(nn.Module):
    """transformers' `grouped_mm` experts (integrations/moe.py) over packed matrices."""

    num_experts: int
    has_gate: bool
    zeros = False
    _is_expert_parallel = False
    act_fn: Any
    post_expert_norm: Any
    _apply_gate: Any

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Rows of hidden states, the experts chosen for each and their weights -> the weighted sum of results."""
        tokens, chosen = top_k_index.shape
        experts, order = torch.sort(top_k_index.reshape(-1))
        rows = hidden_states[order // chosen]
        counts = torch.histc(experts.int(), bins=self.num_experts, min=0, max=self.num_experts - 1)
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        if self.has_gate:
            inner = self._apply_gate(self._product(rows, "gate_up_proj", experts, ends))
        else:
            inner = self.act_fn(self._product(rows, "up_proj", experts, ends))
        out = self._product(inner, "down_proj", experts, ends)
        if getattr(self, "has_post_expert_norm", False):
            out = self.post_expert_norm(out)
        out = out * top_k_weights.reshape(-1)[order].to(out.dtype).unsqueeze(-1)
        if self._is_expert_parallel:  # rows of other GPUs' experts were not computed
            out.masked_fill_((experts >= self.num_experts).unsqueeze(-1), 0.0)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.size(0), device=order.device)
        return out[back].view(tokens, chosen, -1).sum(dim=1).to(hidden_states.dtype)

    def _product(self, rows: torch.Tensor, name: str, experts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        bias = getattr(self, f"{name}_bias", None)
        held = self._parameters
        packed = f"{name}_qweight" in held
        weight: Any = held[f"{name}_qweight" if packed else name]
        scales: Any = held[f"{name}_scales" if packed else f"{name}_scale_inv"]
        zeros = held.get(f"{name}_qzeros") if self.zeros else None
        outputs = scales.shape[-1] if packed else weight.shape[1]
        out: torch.Tensor = torch.ops.fxroof.grouped_linear(rows, weight, scales, zeros, ends, outputs)
        if bias is None:
            return out
        index = experts.clamp(max=self.num_experts - 1) if self._is_expert_parallel else experts
        return out.add_(bias[index])


class Mxfp4Mlp(nn.Module):
    """Router, then experts whose routing is one kernel."""

    router: Any
    experts: Any

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states -> the experts' result and the router's logits."""
        router = self.router
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = torch.nn.functional.linear(rows, router.weight, router.bias)
        scores, experts = torch.ops.fxroof.route(logits, router.top_k)
        return self.experts(rows, experts, scores).reshape(hidden_states.shape), logits


class Mxfp4Experts(nn.Module):
    """Two products over the chosen experts' packed matrices."""

    def forward(self, rows: torch.Tensor, experts: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Rows of hidden states -> the weighted sum of their experts' results."""
        ops = torch.ops.fxroof
        inner = ops.experts_gate_up_mxfp4(
            rows, experts, self.gate_up_proj, self.gate_up_proj_scales, self.gate_up_proj_bias
        )
        out: torch.Tensor = ops.experts_down_mxfp4(
            inner, experts, scores, self.down_proj, self.down_proj_scales, self.down_proj_bias
        )
        return out


# the ops: what they take, and the shapes of what they give; there is nothing to compute


def _quantized(x: torch.Tensor, scale: torch.Tensor | None, group: int, dtype: torch.dtype, *_: Any) -> Any:
    groups = (1,) if scale is not None else (*x.shape[:-1], -(-x.shape[-1] // group))
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(groups, dtype=torch.float32)


def _routed(logits: torch.Tensor, top_k: int) -> Any:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int32)


_OPS: Mapping[str, Callable[..., Any]] = {
    "quantize_activations(Tensor x, Tensor? scale, int group, ScalarType dtype, str kernel) -> (Tensor, Tensor)": (
        _quantized
    ),
    "linear_scaled(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType dtype, "
    "str kernel) -> Tensor": (
        lambda x, _, weight, __, ___, dtype, ____: x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)
    ),
    "linear_packed(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? order, Tensor? bias, int outputs) "
    "-> Tensor": lambda x, *rest: x.new_empty((*x.shape[:-1], rest[-1])),
    "dequantize_weight(Tensor weight, Tensor scales, Tensor? nested, int[] shape, ScalarType dtype) -> Tensor": (
        lambda weight, _, __, shape, dtype: weight.new_empty(shape, dtype=dtype)
    ),
    "grouped_linear(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor ends, int outputs) -> Tensor": (
        lambda x, *rest: x.new_empty((x.shape[0], rest[-1]))
    ),
    "route(Tensor logits, int top_k) -> (Tensor, Tensor)": _routed,
    "experts_gate_up_mxfp4(Tensor x, Tensor experts, Tensor weight, Tensor scales, Tensor bias) -> Tensor": (
        lambda x, experts, weight, *_: x.new_empty((experts.numel(), weight.shape[1] // 2))
    ),
    "experts_down_mxfp4(Tensor x, Tensor experts, Tensor scores, Tensor weight, Tensor scales, Tensor bias) "
    "-> Tensor": lambda x, experts, _, weight, *__: x.new_empty((experts.shape[0], weight.shape[1])),
}
_LIBRARY: Any = torch.library.Library("fxroof", "DEF")  # type: ignore[no-untyped-call]  # torch's own
for _schema, _shape in _OPS.items():
    _LIBRARY.impl(_LIBRARY.define(_schema), _shape, "Meta")
