"""Fourier transforms: 5 n log2 n FLOPs for n complex points, half that when one side is real.

The usual count of the radix-2 Cooley-Tukey algorithm, as in FFTW's benchFFT. Over several dimensions n is the
product of their lengths. Each transform is charged one reading and one writing.
"""

from math import log2, prod

from ..cost import Call, Cost, formula
from ..graph import Tensor
from .arithmetic import is_complex, item_bytes, vector, wrapped


@formula(
    "aten.fft_fft",
    "aten.fft_fft2",
    "aten.fft_fftn",
    "aten.fft_ifft",
    "aten.fft_ifft2",
    "aten.fft_ifftn",
    "aten.fft_rfft",
    "aten.fft_rfft2",
    "aten.fft_rfftn",
    "aten.fft_irfft",
    "aten.fft_irfft2",
    "aten.fft_irfftn",
    "aten.fft_hfft",
    "aten.fft_hfft2",
    "aten.fft_hfftn",
    "aten.fft_ihfft",
    "aten.fft_ihfft2",
    "aten.fft_ihfftn",
    "aten._fft_c2c",
    "aten._fft_r2c",
    "aten._fft_c2r",
)
def fft(call: Call) -> Cost:
    """Points of the larger side (the real one, if either is) by the log of the length transformed."""
    source, out = call.tensor("self"), call.output
    real = not (is_complex(source.dtype) and is_complex(out.dtype))
    dims = [wrapped(d, len(out.shape)) for d in _dims(call, out)]
    lengths = list(out.shape)
    if dims and not is_complex(source.dtype):
        # a real input's last dimension is given, or as long as the input's; the result may hold half of it
        last = dims[-1]
        given = call.integers("s") or call.integers("n")
        lengths[last] = given[-1] if given else source.shape[last]
    n = prod(lengths[d] for d in dims)
    points = prod(lengths)
    return call.cost(vector=vector(out.dtype, (2.5 if real else 5.0) * points * log2(max(n, 1))))


@formula("aten.stft")
def stft(call: Call) -> Cost:
    """A windowed transform per frame; the windowed frames are written and read."""
    source, out = call.tensor("self"), call.output
    n = call.integer("n_fft", 1)
    bins = n if is_complex(source.dtype) or call.arg("onesided") is False else n // 2 + 1
    values = out.numel if is_complex(out.dtype) else out.numel // 2
    frames = values // max(bins, 1)
    factor = 5.0 if is_complex(source.dtype) else 2.5
    windowed = frames * n
    return call.cost(
        vector=vector(out.dtype, windowed * (factor * log2(max(n, 1)) + 1)),
        scratch_read=windowed * item_bytes(source),
        scratch_written=windowed * item_bytes(source),
    )


def _dims(call: Call, out: Tensor) -> list[int]:
    given = call.integers("dim")
    if given:
        return list(given)
    lengths = call.integers("s")
    return list(range(-len(lengths), 0)) if lengths else list(range(-len(out.shape), 0))
