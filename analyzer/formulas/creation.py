"""Tensors made from nothing: their result is written, and what they are shaped like is not read.

Random numbers and sequences count as 0 FLOPs; the generators' integer work is not modelled.
"""

from ..cost import Call, Cost, formula, free

free(
    "aten.empty",
    "aten.empty_like",
    "aten.empty_permuted",
    "aten.empty_strided",
    "aten.new_empty",
    "aten.new_empty_strided",
    "aten._assert_scalar",
    "aten._assert_tensor_metadata",
    "aten._functional_assert_scalar",
    "aten._functional_sym_constrain_range",
    "aten._functional_sym_constrain_range_for_size",
    "aten._make_dep_token",
    "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size",
    "aten.sym_is_contiguous",
    "aten.sym_numel",
    "aten.sym_size",
    "aten.sym_storage_offset",
    "aten.sym_stride",
    "aten.detach_",
    "aten.requires_grad_",
    # in-place changes of shape and stride alone
    "aten.as_strided_",
    "aten.squeeze_",
    "aten.swapaxes_",
    "aten.swapdims_",
    "aten.t_",
    "aten.transpose_",
    "aten.unsqueeze_",
)


@formula(
    "aten.arange",
    "aten.range",
    "aten.linspace",
    "aten.eye",
    "aten.zeros",
    "aten.zeros_like",
    "aten.new_zeros",
    "aten.zero",
    "aten.ones",
    "aten.ones_like",
    "aten.new_ones",
    "aten.full",
    "aten.full_like",
    "aten.new_full",
    "aten.fill",
    "aten.scalar_tensor",
    "aten.tril_indices",
    "aten.triu_indices",
    "aten.fft_fftfreq",
    "aten.fft_rfftfreq",
    "aten.rand",
    "aten.rand_like",
    "aten.randn",
    "aten.randn_like",
    "aten.randint",
    "aten.randint_like",
    "aten.randperm",
    "aten.random",
    "aten.uniform",
    "aten.normal",
    "aten.exponential",
    "aten.cauchy",
    "aten.geometric",
    "aten.log_normal",
)
def filled(call: Call) -> Cost:
    """The result is written; `self` gives its shape or is overwritten, and is not read."""
    return call.cost(reads={"self": 0})


@formula(
    "aten.logspace",
    "aten.bartlett_window",
    "aten.blackman_window",
    "aten.hamming_window",
    "aten.hann_window",
    "aten.kaiser_window",
)
def computed(call: Call) -> Cost:
    """A transcendental per element: a power, or a cosine (none for the triangle of `bartlett_window`)."""
    linear = call.op.target.startswith("aten.bartlett")
    return call.cost(special=0 if linear else call.output.numel)
