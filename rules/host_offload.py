"""Weights, cache or other tensors cross the link to the host in every step.

**What it checks.** Copies between host and device that a forward makes: a layer that is brought for its turn and sent
back, `layer.to("cuda") ... layer.to("cpu")`; a cache that is kept on the host; a tensor that goes to the host and
returns, `x.cpu() ... .cuda()`; a tensor that is made on the host and copied, `torch.arange(n).to(x.device)`.
Inputs, and weights that the forward does not move to the host, count as on the device. `"cpu"` is the host where the
function that moves names it; a device out of a setting is that of the run. Results that end on the host are no finding.
Copies into memory that exists (`copy_`), and hooks of accelerate, are not seen. Ops on the host are priced as those of
the device. What is made on the host counts from 64 KiB: smaller copies take microseconds, and constants that libraries
make once, such as the few bytes of a cache that is set up, look like those of every step in a trace.

Where no weights are seen to cross, and the run needs more memory than programs can use (MEM001): what it would cost to
leave the missing bytes of the weights on the host, as offloading libraries do.

**Why it costs.** PCIe is some fifty times slower than device memory: 64 GB/s over 16 lanes of generation 5 against
3,350 on an H100. A dense model reads all its weights in every step: one tenth of them left behind makes a step several
times as long. And without `non_blocking=True` the host waits for every copy, and launches nothing meanwhile.

**How it is estimated.** Bytes over the link's published rate, one way, in the bound; what is reached of it from pinned
memory in the estimate, since pageable memory takes longer still. Copies run one after the other with all else, as on
one stream. The saving is that of the program without the copies, on tensors that stay on the device and need the
memory that is stated; where the program writes to a copy or to what was copied, a copy on the device remains. For
missing bytes no saving is stated, since what offloading spares is the run itself: bytes a step = missing bytes x the
share of the weights that a step reads.

**Remedy.** Keep it on the device, or make it there.

    positions = torch.arange(n, device=x.device)  # not torch.arange(n).to(x.device)
    self.model.to("cuda")                         # once, not layer.to("cuda") ... layer.to("cpu") in each step

Where it does not fit: narrower weights or a quantised cache (see MEM001). Where it must be offloaded, a larger batch
spreads the same bytes over more tokens, and pinned memory with `non_blocking=True` overlaps copies with work.

**When to ignore.** Work that has time: evaluation over night, batches in the thousands.

**Example.**

    fxroof analyze meta-llama/Meta-Llama-3-70B --gpu h100_sxm

**References.** PCI-SIG, "PCI Express Base Specification", revisions 3.0 to 6.0; Sheng et al., "FlexGen:
High-Throughput Generative Inference of Large Language Models with a Single GPU" (ICML 2023); Hugging Face Accelerate
documentation, "Handling big models for inference"; PyTorch tutorials, "A guide on good usage of non_blocking and
pin_memory() in PyTorch".
"""

from collections.abc import Iterator
from dataclasses import replace

from ..analyzer.analysis import PhaseAnalysis
from ..analyzer.finding import Confidence, Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.graph import ITEM_BITS, Graph, Op, Role, TensorRef
from ..analyzer.memory import Memory
from ..analyzer.rewrite import Draft
from ..hardware.gpu import Gpu

_FIT = Remedy(
    text="Make it fit (see MEM001 or MEM002); else let a larger batch share the bytes that cross the link in a step.",
    code="model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)",
)
_WEIGHTS = Remedy(
    text="Bring them once, before the first step, and leave them on the device.",
    code='model.to("cuda")  # once; no layer.to("cuda") ... layer.to("cpu") in forward',
)
_CACHE = Remedy(
    text="Keep the cache on the device; where that is too small for it, a quantised one.",
    code="return k  # not k.cpu()",
)
_RETURNING = Remedy(
    text="Compute on the device what is computed on the host.",
    code="y = function(x)  # not function(x.cpu()).to(x.device)",
)
_MADE = Remedy(
    text="Make it on the device; what is the same in every step, once, as a buffer.",
    code="positions = torch.arange(n, device=x.device)  # not torch.arange(n).to(x.device)",
)


@rule("MEM003", "host-offload", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Every copy between host and device; or what would have to cross if it is to run at all."""
    copies = [i for i, op in enumerate(situation.graph.ops) if _is_copy(op) and situation.costs[i].exchange]
    if copies:
        yield from _Copies(situation).matches(copies)
    if not any(_is_module_move(situation.graph.ops[i]) for i in copies):
        yield from _missing(situation)


def _is_copy(op: Op) -> bool:
    return op.target.startswith(("fxroof.to_host.", "fxroof.to_device.")) or _is_module_move(op)


def _is_module_move(op: Op) -> bool:
    return op.target.startswith(("fxroof.move_to_host.", "fxroof.move_to_device."))


class _Copies:
    """Copies of one phase."""

    def __init__(self, situation: Situation) -> None:
        self.situation = situation
        self.graph = situation.graph
        self.written = _written(situation.graph)
        memory = situation.memory
        self.fits = memory is None or memory.fits is not False

    def matches(self, copies: list[int]) -> Iterator[Match]:
        """One for each copy that need not be."""
        for index in copies:
            found = self._judged(index)
            if found is None:
                continue
            message, remedy, confidence = found
            lasts = remedy in (_WEIGHTS, _CACHE)
            yield Match(
                op=index,
                message=message,
                evidence=self._evidence(index),
                remedy=remedy if self.fits or not lasts else _FIT,
                confidence=confidence if self.fits or not lasts else Confidence.LOW,
                rewrite=self._without(index),
            )

    def _judged(self, index: int) -> tuple[str, Remedy, Confidence] | None:
        """What is wrong with a copy, what to do, and how sure that is; None where nothing is."""
        op = self.graph.ops[index]
        if _is_module_move(op):
            return "weights cross the link to the host in every step", _WEIGHTS, Confidence.HIGH
        if Role.KV_CACHE in (self.graph.role(op.inputs[0]), self.graph.role(op.outputs[0])):
            return "the cache crosses the link to the host in every step", _CACHE, Confidence.HIGH
        if op.target.startswith("fxroof.to_host."):
            back, kept = self._goes(op.outputs[0])
            if kept:
                return "the cache crosses the link to the host in every step", _CACHE, Confidence.MEDIUM
            return (_RETURNS, _RETURNING, Confidence.HIGH) if back else None
        left, literal = self._comes(op.inputs[0])
        if left:
            return _RETURNS, _RETURNING, Confidence.HIGH
        exchange = self.situation.costs[index].exchange
        if exchange is None or op.repeat * exchange.nbytes < _FEWEST_BYTES:
            return None
        message = "what is made on the host is copied to the device in every step"
        return message, _MADE, Confidence.MEDIUM if literal else Confidence.HIGH

    def _goes(self, tensor: int) -> tuple[bool, bool]:
        """Of a tensor on the host: whether it or what is made of it returns to the device, or is kept in a cache."""
        back = kept = False
        pending, seen = [tensor], {tensor}
        while pending:
            for user in self.situation.flow.users(pending.pop()):
                op = self.graph.ops[user]
                if _is_copy(op):
                    back = True
                    continue
                new = set(op.outputs) - seen
                kept = kept or any(self.graph.role(i) is Role.KV_CACHE for i in new)
                seen |= new
                pending += new
        return back, kept

    def _comes(self, tensor: int) -> tuple[bool, bool]:
        """Of a tensor on the host: whether it is made of what was on the device before, or of values in the program."""
        left = literal = False
        pending, seen = [tensor], {tensor}
        while pending:
            tensor = pending.pop()
            maker = self.situation.flow.maker(tensor)
            if maker is None or tensor in self.graph.ops[maker].inputs:  # no op makes it
                literal = True
                continue
            op = self.graph.ops[maker]
            if _is_copy(op):
                left = True
                continue
            new = set(op.inputs) - seen
            seen |= new
            pending += new
        return left, literal

    def _evidence(self, index: int) -> dict[str, str | int | float]:
        op, gpu = self.graph.ops[index], self.situation.gpu
        exchange = self.situation.costs[index].exchange
        crossing = op.repeat * (exchange.nbytes if exchange else 0)
        tensor = self.graph.tensors[op.inputs[0]]
        found: dict[str, str | int | float] = {"bytes_over_the_link_a_step": crossing}
        if gpu.host_bandwidth:
            found["seconds_over_the_link"] = crossing / gpu.host_bandwidth
        return found | {
            "seconds_from_device_memory": crossing / gpu.memory_bandwidth,
            "device_memory_to_keep_it_bytes": tensor.numel * ITEM_BITS[tensor.dtype] // 8,
            "copies_waited_for": 0 if op.args.get("non_blocking") else op.repeat,
            "host_link": _link(gpu) if gpu.host_bandwidth else "no published rate",
        }

    def _without(self, index: int) -> Rewrite:
        op, graph = self.graph.ops[index], self.graph
        homes = {graph.tensors[i].storage for i in (*op.inputs, *op.outputs)}
        changed = bool(op.outputs) and any(self.written.get(home, -1) > index for home in homes)

        def rewrite(draft: Draft) -> None:
            if not draft.claim((index,)):
                return
            if changed:  # as two tensors they stay, on the device
                copied = {"self": TensorRef(tensor=op.inputs[0]), "memory_format": None}
                draft.replace(index, replace(op, target="aten.clone.default", args=copied))
                return
            draft.remove((index,))
            for made, given in zip(op.outputs, op.inputs, strict=False):
                draft.substitute(made, given)

        return rewrite


_FEWEST_BYTES = 64 * 1024
"""Of what is made on the host: 1 µs over PCIe 5."""

_RETURNS = "a tensor goes to the host and comes back"


def _written(graph: Graph) -> dict[int, int]:
    """The op that writes last in place, by storage."""
    ops = ((i, op) for i, op in enumerate(graph.ops) if op.mutates and not op.target.startswith("aten.detach_."))
    return {graph.tensors[tensor].storage: index for index, op in ops for tensor in graph.mutated(op)}


def _missing(situation: Situation) -> Iterator[Match]:
    """The run as a whole, said once: in the phase that runs most often."""
    memory, gpu, phase = situation.memory, situation.gpu, situation.analysis
    if memory is None or not gpu.host_bandwidth or not _is_said_of(situation, memory):
        return
    crossing = _bytes_a_step(memory, phase)
    if crossing <= 0:
        return
    over_link = crossing / gpu.host_bandwidth
    yield Match(
        op=None,
        message=f"offloaded, a step of {phase.name} would wait at least {_seconds(over_link)} for the host link",
        evidence={
            "missing_bytes": -(memory.headroom_bytes or 0),
            "bytes_over_the_link_a_step": crossing,
            "seconds_over_the_link": over_link,
            "seconds_from_device_memory": crossing / gpu.memory_bandwidth,
            "seconds_of_the_phase": phase.seconds.estimate,
            "host_link": _link(gpu),
        },
        remedy=_FIT,
        always=True,
    )


def _is_said_of(situation: Situation, memory: Memory) -> bool:
    names = {situation.analysis.name, *situation.others}
    return situation.analysis.name == ("decode" if "decode" in names else memory.activations_phase)


def _bytes_a_step(memory: Memory, phase: PhaseAnalysis) -> int:
    """Weights that are missing and read; of what is missing beyond all weights nothing is said."""
    if memory.fits is not False or not memory.weights_bytes:
        return 0
    missing = min(-(memory.headroom_bytes or 0), memory.weights_bytes)
    return round(missing * min(1.0, phase.floor.weight_bytes / memory.weights_bytes))


def _link(gpu: Gpu) -> str:
    return f"{(gpu.host_bandwidth or 0) / 1e9:,.0f} GB/s one way; device memory {gpu.memory_bandwidth / 1e9:,.0f} GB/s"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
