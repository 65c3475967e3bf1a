"""Measured kernels beside fxroof's bounds and estimates of them: the tables in docs/silicon.md.

Run by hand, after `pip install 'fxroof[silicon]'`: python tests/benchmarks/silicon.py [--rows 300 | --all]. Each row of
the package's tables becomes a graph of the calls that were timed, and is priced as any model's is. 300 rows of each
table take two minutes, all 6.6 million rows an hour or more. Ends with exit code 1 where a bound exceeds a measurement.
"""

import argparse
import statistics
import sys
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from silicon_graphs import BUILDERS, Measured, NotPricedError, Predicted, predict
from silicon_tables import GPUS, NoTablesError, excluded, groups, remark, version

TUNED = ("a100_sxm_80gb", "h100_sxm")
"""Parts whose rows figures of estimates may be taken from; all others are the test."""


@dataclass(frozen=True, slots=True)
class Priced:
    """A row and what fxroof makes of it."""

    row: Measured
    predicted: Predicted

    @property
    def ratio(self) -> float:
        """Estimate over measurement."""
        return self.predicted.estimate / self.row.seconds

    @property
    def error(self) -> float:
        """Absolute error of the estimate, of the measurement."""
        return abs(self.ratio - 1)

    @property
    def beaten(self) -> bool:
        """Whether the measurement is faster than the bound."""
        return self.predicted.bound > self.row.seconds


def priced(rows: Iterable[Measured]) -> tuple[list[Priced], str]:
    """Rows priced; else the reason why they cannot be."""
    found: list[Priced] = []
    reason = ""
    for row in rows:
        if row.seconds <= 0:
            continue
        try:
            found.append(Priced(row, predict(row)))
        except NotPricedError as refusal:
            reason = str(refusal)
    return found, reason


HEADER = (
    f"{'gpu':14}{'operator':18}{'backend':21}{'dtype':15}{'rows':>7}{'beaten':>7}{'median':>8}{'p90':>7}{'ratio':>7}"
    "  best; worst case"
)


class Tally:
    """What is left of priced rows once their shapes are forgotten: all tables together have millions."""

    def __init__(self) -> None:
        self.ratios = array("d")
        self.beaten = 0
        self.ends: list[Priced] = []  # the best and the worst

    def __iadd__(self, found: Sequence[Priced]) -> "Tally":
        self.ratios.extend(one.ratio for one in found)
        self.beaten += sum(one.beaten for one in found)
        known = [*self.ends, *found]
        self.ends = [pick(known, key=lambda one: one.error) for pick in (min, max)]
        return self


def line(head: Sequence[str], found: Tally, note: str = "") -> str:
    """A row of the table: errors of estimates, cases of the least and of the greatest."""
    errors = sorted(abs(ratio - 1) for ratio in found.ratios)
    best, worst = (case(one) for one in found.ends)
    return (
        f"{head[0]:14}{head[1]:18}{head[2]:21}{head[3]:15}{len(errors):7,}{found.beaten:7}"
        f"{statistics.median(errors):8.1%}{errors[int(0.9 * len(errors))]:7.0%}"
        f"{statistics.median(found.ratios):7.2f}  {best}; {worst}{note}"
    )


_SHORT: Mapping[str, str] = {
    "batch_size": "b", "num_heads": "h", "num_key_value_heads": "kv", "head_dim": "d", "window_size": "w", "isl": "s",
    "step": "t", "num_tokens": "tokens", "hidden_size": "hidden", "inter_size": "inner", "num_experts": "experts",
    "moe_tp_size": "tp", "moe_ep_size": "ep", "num_gpus": "gpus", "message_size": "elements",
}  # fmt: skip


def case(one: Priced) -> str:
    """A row in short: ratio, shape, measurement."""
    shape = " ".join(f"{_SHORT.get(k, k)}={v}" for k, v in one.row.shape.items() if v and "dtype" not in k)
    return f"{one.ratio:.2f}x [{shape}: {one.row.seconds * 1e6:.4g} µs]"


def main() -> int:
    """Print the tables; 1 where a bound exceeds a measurement."""
    args = arguments()
    print(f"aiconfigurator-core {version()}, {'all rows' if args.all else f'up to {args.rows} rows a table'}\n")
    print(HEADER)
    beaten: list[Priced] = []
    kinds: defaultdict[tuple[str, str, str], Tally] = defaultdict(Tally)
    notes: dict[str, None] = {"": None}
    total = 0
    for rows in groups(args.gpu, args.operator, None if args.all else args.rows, args.seed):
        first = rows[0]
        head = (first.gpu, first.operator, f"{first.backend} {first.version}", first.dtype)
        for reason, count in Counter(filter(None, map(excluded, rows))).items():
            print(f"{head[0]:14}{head[1]:18}{head[2]:21}{head[3]:15}{count:7,} excluded: {reason}")
        rows = tuple(row for row in rows if not excluded(row))
        if not rows:
            continue
        found, reason = priced(rows)
        if not found:
            print(f"{head[0]:14}{head[1]:18}{head[2]:21}{head[3]:15}  not priced: {reason}")
            continue
        said = {remark(one.row): None for one in found}
        notes.update(said)
        mark = "".join(f" ({list(notes).index(note)})" for note in said if note)
        tally = Tally()
        tally += found
        print(line(head, tally, mark), flush=True)
        total += len(found)
        beaten += [one for one in found if one.beaten]
        plain = [one for one in found if not remark(one.row)]
        if plain:
            kinds["tuned" if first.gpu in TUNED else "unseen", first.operator, first.dtype] += plain
    for number, note in enumerate(list(notes)[1:], 1):
        print(f"({number}) {note}; left out of what follows")
    print(f"\n{'':14}{HEADER[14:]}")
    for (part, operator, dtype), tally in sorted(kinds.items(), key=lambda item: item[0][1:] + item[0][:1]):
        print(line((part, operator, "", dtype), tally))
    print(f"\nbound > measured in {len(beaten)} of {total:,} rows")
    for one in sorted(beaten, key=lambda one: one.row.seconds / one.predicted.bound):
        print(f"  {one.predicted.bound / one.row.seconds:.3f} x {one.row}")
    return 1 if beaten else 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300, help="rows of a table, evenly at random")
    parser.add_argument("--all", action="store_true", help="all rows")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of rows")
    parser.add_argument("--gpu", nargs="+", default=list(GPUS.values()), choices=list(GPUS.values()))
    parser.add_argument("--operator", nargs="+", default=list(BUILDERS), choices=list(BUILDERS))
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NoTablesError as missing:
        sys.exit(str(missing))
