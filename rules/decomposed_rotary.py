"""A rotary embedding is spelt out in elementwise ops, each of which goes through memory.

**What it checks.** Queries or keys turned by tables of cosines and sines: with halves or neighbours swapped and one of
them negated (`x * cos + rotate_half(x) * sin`), on halves or neighbours that are joined at the end, or as a product of
complex numbers; with the casts around it, and with elements that are not turned and joined to the others. A cast that
ends a norm (FUS002) or begins an attention that is spelt out (ATT001) is theirs.

**Why it costs.** A rotation reads each element once, does three operations with it and writes it back. Spelt out it is
five to ten kernels, in float32 where the rows were cast, and half of them write as much as the queries are large.

**How it is estimated.** The ops become one kernel, which reads the rows and the tables and writes the turned rows. The
arithmetic stays, and so does the making of the tables.

**Remedy.** Compile the function: one kernel comes of it. torch.compile leaves complex products as they are, so write
those with halves and real tables first. Libraries have the kernel too: `flash_attn.layers.rotary.apply_rotary_emb`,
`liger_kernel.transformers.liger_rotary_pos_emb`.

    apply_rotary_pos_emb = torch.compile(apply_rotary_pos_emb)

**When to ignore.** When the model is compiled later on.

**Example.**

    def rotate_half(x):
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((-x2, x1), dim=-1)

    q = q * cos + rotate_half(q) * sin

**References.** Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021); Hsu et al., "Liger
Kernel: Efficient Triton Kernels for LLM Training" (2024).
"""

from collections.abc import Iterator

from ..analyzer.finding import Match, Remedy, Severity, Situation, rule
from ._chains import fused, joined
from ._rotary import rotations

_REMEDY = Remedy(
    text="Compile the rotation: one kernel comes of it.",
    code="apply_rotary_pos_emb = torch.compile(apply_rotary_pos_emb)",
)
_COMPLEX = Remedy(
    text="Write the rotation with halves and real tables, and compile it: complex products are left as they are.",
    code="x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)\n"
    "x = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)",
)


@rule("FUS003", "decomposed-rotary", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Every rotation that is spelt out, at the last op that does arithmetic; a compiled phase has none."""
    if situation.analysis.execution != "eager":
        return
    graph = situation.graph
    for chain in joined(situation, situation.once(rotations)):
        outputs = [t for index in chain.ops for t in graph.ops[index].outputs]
        yield Match(
            op=chain.anchor,
            message=f"a rotary embedding is spelt out in {len(chain.ops)} ops",
            evidence={"ops": len(chain.ops), "bytes": chain.bytes, "fused_bytes": chain.fused_bytes},
            remedy=_COMPLEX if any(graph.tensors[t].dtype.startswith("complex") for t in outputs) else _REMEDY,
            rewrite=fused(chain),
        )
