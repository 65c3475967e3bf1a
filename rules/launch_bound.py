"""The GPU waits for Python: launching a kernel takes longer than running it.

**What it checks.** The phase, run eagerly, is likely to take at least a fifth longer than the same kernels launched
by a CUDA graph.

**Why it costs.** Eager PyTorch needs 5 to 10 µs of host time an op, whatever the op does; kernels of a small batch
run for 2 or 3. The GPU is idle in between, and a faster GPU is no faster.

**How it is estimated.** Saving = estimate of the eager kernels as Python launches them - estimate of the very same
kernels launched by a graph. What compiling fuses beyond that is not counted here. The bound does not know of
launches, so it does not change.

**Remedy.** Record the step once and replay it.

    step = torch.compile(step, mode="reduce-overhead")

That needs fixed shapes and addresses: a static KV cache, inputs copied into the same tensors.

**When to ignore.** Phases that run rarely, such as the encoder of a long generation; hosts that launch much faster.

**References.** PyTorch documentation, "CUDA Graphs"; PyTorch blog, "Accelerating Generative AI II: GPT, Fast"
(2023).
"""

from collections.abc import Iterator

from ..analyzer.estimate import derating
from ..analyzer.execution import execute
from ..analyzer.finding import Match, Remedy, Severity, Situation, rule
from ..analyzer.kernels import eager_kernels

_REMEDY = Remedy(
    text="Record the step once as a CUDA graph and replay it.",
    code='step = torch.compile(step, mode="reduce-overhead")',
)
_LONGER = 1.2
"""How much longer launching takes than replaying before it is what sets the pace."""


@rule("LCH001", "launch-bound", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """The phase as a whole, where eager launches set its pace."""
    if situation.analysis.execution != "eager":
        return
    graph, gpu = situation.graph, situation.gpu
    kernels = eager_kernels(graph, situation.costs)
    replayed = execute(graph, kernels, gpu, derating(gpu), eager=False).execution.estimate
    written = situation.analysis.executions.eager
    if written.estimate > _LONGER * replayed:
        yield Match(
            op=None,
            message="the GPU waits for Python to launch kernels",
            evidence={
                "kernels": len(kernels),
                "seconds_as_launched": written.estimate,
                "seconds_as_graph": replayed,
            },
            remedy=_REMEDY,
            replayed=True,
        )
