"""fxroof has no formula for an operator of this model.

**What it checks.** Ops that are neither priced nor proved free.

**Why it costs.** They are charged their inputs and outputs once, and no FLOPs: the totals may be too low, and no
rule looks inside them.

**How it is estimated.** It is not: what they really cost is what is not known.

**Remedy.** Give fxroof a formula for the operator, in a module of your own package that its entry point
`fxroof.formulas` names, and report it if the operator is PyTorch's.

    @formula("mylib.myop")
    def myop(call: Call) -> Cost:
        return call.cost(matmul={"bfloat16": 2.0 * call.output.numel * call.tensor("x").shape[-1]})

**When to ignore.** Where the bytes charged are a small share of the phase.

**References.** docs/formulas.md.
"""

from collections.abc import Iterator

from ..analyzer.cost import Status, bytes_by_role, operator_name
from ..analyzer.finding import Match, Remedy, Severity, Situation, rule


@rule("TRC001", "unpriced-operators", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Every op without a formula."""
    for index, (op, cost) in enumerate(zip(situation.graph.ops, situation.costs, strict=True)):
        if cost.status is Status.UNPRICED:
            operator = operator_name(op.target)
            moved = sum(read + written for read, written in bytes_by_role(situation.graph, cost).values())
            yield Match(
                op=index,
                message=f"{operator} has no formula: its inputs and outputs are charged, and no FLOPs",
                evidence={"operator": operator, "bytes_charged": op.repeat * moved},
                remedy=Remedy(
                    text=f"Register a formula for {operator} through the entry point fxroof.formulas.",
                    code=f'@formula("{operator}")\ndef price(call: Call) -> Cost: ...',
                ),
                always=True,
            )
