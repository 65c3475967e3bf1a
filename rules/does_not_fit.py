"""Weights, KV cache, activations and CUDA's own memory exceed what the GPU has.

**What it checks.** The sum of the four at the end of the generation against the memory that programs can use, where a
smaller batch does not help. Where one does, that is MEM002.

**Why it costs.** It does not run; or parts move over the host link, some fifty times slower than device memory.

**How it is estimated.** See the memory lines of the report. The remedies are arithmetic on them: weights at half
and at a quarter of their width, the longest context that fits, and the fewest GPUs that hold it all.

**Remedy.** The smallest change that is enough: a shorter context, narrower weights, more GPUs.

    fxroof analyze MODEL --gpu NAME --input-len 4096
    fxroof analyze MODEL --gpu NAME --tp 2

**When to ignore.** When weights are offloaded on purpose.

**References.** docs/method.md.
"""

from collections.abc import Iterator

from ..analyzer.finding import Match, Remedy, Severity, Situation, rule
from ..analyzer.memory import Memory


@rule("MEM001", "does-not-fit", severity=Severity.ERROR)
def check(situation: Situation) -> Iterator[Match]:
    """The run as a whole, said once: in the phase whose activations are the largest."""
    memory = situation.memory
    if memory is None or memory.fits is not False or situation.analysis.name != memory.activations_phase:
        return
    if memory.max_batch_size:
        return
    usable, missing = memory.usable_bytes or 0, -(memory.headroom_bytes or 0)
    options = tuple(_options(memory, missing))
    yield Match(
        op=None,
        message=f"{_gigabytes(memory.total_bytes)} are needed and {_gigabytes(usable)} can be used",
        evidence={
            "weights_bytes": memory.weights_bytes,
            "kv_cache_bytes": memory.kv_cache_bytes,
            "activations_bytes": memory.activations_bytes,
            "overhead_bytes": memory.overhead_bytes,
            "usable_bytes": usable,
        },
        remedy=Remedy(text="; ".join(options) or "No change of context or width is enough: a larger GPU."),
        always=True,
    )


def _options(memory: Memory, missing: int) -> Iterator[str]:
    """What is enough on its own, the least intrusive first."""
    if memory.max_context_len:
        yield f"context {memory.max_context_len:,} instead of {memory.context_len:,} fits"
    for name, share in (("half", 0.5), ("a quarter", 0.75)):
        if share * memory.weights_bytes > missing:
            yield f"weights at {name} of their width fit"
            break
    if memory.min_gpus and memory.min_gpus > 1:
        yield f"{memory.min_gpus:,} of these GPUs hold it (--tp {memory.min_gpus})"


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:,.1f} GB"
