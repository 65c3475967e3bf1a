"""The roofline as a picture of characters: both axes logarithmic, ops as points."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import ceil, floor, log10

from rich.text import Text

from . import _units as units

_GUTTER = 13
_MOST_DECADES = 8
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What is drawn at (intensity in FLOP/byte, performance in FLOP/s); without a mark the whole phase."""

    mark: str
    intensity: float
    performance: float
    style: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """min(peak, intensity * bandwidth); `path` names the unit and dtype of the peak."""

    peak: float
    bandwidth: float
    path: str

    @property
    def ridge(self) -> float:
        """Intensity at which both limits meet, FLOP/byte."""
        return self.peak / self.bandwidth

    def at(self, intensity: float) -> float:
        """The most FLOP/s that this intensity allows."""
        return min(self.peak, intensity * self.bandwidth)


def picture(roof: Roof, points: Sequence[Point], width: int, height: int, *, unicode: bool) -> list[Text]:
    """The plot with its axes, `height` + 2 lines.

    Args:
        roof: the roof.
        points: what to draw; those without FLOPs have no place on a logarithmic axis and are skipped.
        width: columns in all.
        height: rows of the plot itself.
        unicode: draw the roof in braille dots, else in slashes and dashes.
    """
    drawn = [p for p in points if p.intensity > 0 and p.performance > 0]
    canvas = _Canvas.around(roof, drawn, max(width - _GUTTER, 10), height)
    canvas.draw_roof(roof, unicode=unicode)
    canvas.draw_ridge(roof)
    canvas.draw_points(drawn, roof)
    canvas.write_peaks(roof)
    return list(canvas.lines())


@dataclass(slots=True)
class _Canvas:
    columns: int
    rows: int
    x: tuple[float, float]
    y: tuple[float, float]
    cells: dict[tuple[int, int], tuple[str, str]] = field(default_factory=dict)

    @staticmethod
    def around(roof: Roof, points: Iterable[Point], columns: int, rows: int) -> "_Canvas":
        seen = [p.intensity for p in points]
        right = log10(max(roof.ridge * 4, *seen, 1.0) * 1.5)
        left = max(log10(min(roof.ridge / 20, *seen, 1.0) / 2), right - _MOST_DECADES)
        top = log10(roof.peak) + 0.7  # room for labels above the flat part
        lowest = min([roof.at(10.0**left), *(p.performance for p in points)])
        return _Canvas(columns, rows, (left, right), (max(log10(lowest) - 0.2, top - _MOST_DECADES - 1), top))

    def dot(self, intensity: float, performance: float, across: int, down: int) -> tuple[int, int]:
        """(row, column) on a grid of `down` x `across` places."""
        column = (log10(intensity) - self.x[0]) / (self.x[1] - self.x[0]) * (across - 1)
        row = (self.y[1] - log10(performance)) / (self.y[1] - self.y[0]) * (down - 1)
        return min(max(round(row), 0), down - 1), min(max(round(column), 0), across - 1)

    def cell(self, intensity: float, performance: float) -> tuple[int, int]:
        row, column = self.dot(intensity, performance, self.columns * 2, self.rows * 4)
        return row // 4, column // 2

    def draw_roof(self, roof: Roof, *, unicode: bool) -> None:
        across, down = (self.columns * 2, self.rows * 4) if unicode else (self.columns, self.rows)
        dots: dict[tuple[int, int], int] = {}
        before: int | None = None
        for column in range(across):
            intensity = 10 ** (self.x[0] + (self.x[1] - self.x[0]) * column / (across - 1))
            row, _ = self.dot(intensity, roof.at(intensity), across, down)
            for filled in range(row, max(before if before is not None else row, row + 1)):
                if unicode:
                    place = (filled // 4, column // 2)
                    dots[place] = dots.get(place, 0) | _BRAILLE[filled % 4][column % 2]
                else:
                    self.cells[filled, column] = ("-" if intensity > roof.ridge else "/", "dim")
            before = row
        for place, bits in dots.items():
            self.cells[place] = (chr(0x2800 + bits), "")

    def draw_ridge(self, roof: Roof) -> None:
        top, column = self.cell(roof.ridge, roof.peak)
        for row in range(top + 1, self.rows):
            self.cells.setdefault((row, column), ("┊", "dim"))
        text = f"ridge {units.digits(roof.ridge, trim=True)} FLOP/byte"
        bottom = self.rows - 1
        self.write(text, "dim", [(bottom, column + 2), (bottom, column - len(text) - 1), (bottom - 1, column + 2)])

    def draw_points(self, points: Sequence[Point], roof: Roof) -> None:
        clusters: dict[tuple[int, int], list[Point]] = {}
        for point in sorted(points, key=lambda p: (self.cell(p.intensity, p.performance), p.mark)):
            row, column = self.cell(point.intensity, point.performance)
            self.cells[row, column] = ("●" if point.mark else "◆", point.style)
            if point.mark:
                near = next((c for c in clusters if c[0] == row and 0 <= column - c[1] <= 1), (row, column))
                clusters.setdefault(near, []).append(point)
        for (row, column), members in clusters.items():
            label = "".join(sorted(p.mark for p in members))
            left, right = column - len(label), column + 1 + len(members) // 2
            above = column - len(label) // 2
            if members[0].intensity < roof.ridge:
                wanted = [
                    (row, left),
                    (row - 1, left),
                    (row - 1, left - 1),
                    (row + 1, right),
                    (row, right),
                    (row + 2, right),
                ]
            else:
                wanted = [
                    (row - 1, above),
                    (row - 2, above),
                    (row + 1, above),
                    (row + 2, above),
                    (row, right),
                ]
            wanted += [(row + down, column + side) for down in (3, -3, 4) for side in (-2, 0, 2)]
            self.write(label, f"bold {members[0].style}", wanted)

    def write_peaks(self, roof: Roof) -> None:
        flat, ridge = self.cell(roof.ridge, roof.peak)
        peak = f"{units.rate(roof.peak, 'FLOP/s')} {roof.path}".rstrip()
        ends = [
            (flat - 1, self.columns - len(peak)),
            (flat + 1, self.columns - len(peak)),
            (flat - 2, self.columns - len(peak)),
        ]
        self.write(peak, "dim", ends)
        slope = units.rate(roof.bandwidth, "B/s")
        middles = (0.45, 0.3, 0.6, 0.15, 0.75)
        spots = []
        for middle in middles:
            intensity = 10 ** (self.x[0] + (log10(roof.ridge) - self.x[0]) * middle)
            row, column = self.cell(intensity, roof.at(intensity))
            spots += [(row - 1, column - len(slope) - 1), (row + 1, column + 3)]
        self.write(slope, "dim", [(row, column) for row, column in spots if column < ridge])

    def write(self, text: str, style: str, places: Iterable[tuple[int, int]]) -> None:
        """Write text at the first place where it covers nothing."""
        for row, column in places:
            span = [(row, column + i) for i in range(len(text))]
            inside = 0 <= row < self.rows and column >= 0 and column + len(text) <= self.columns
            if inside and not any(place in self.cells for place in span):
                for place, character in zip(span, text, strict=True):
                    self.cells[place] = (character, style)
                return

    def lines(self) -> Iterator[Text]:
        labels = {}
        for exponent in range(ceil(self.y[0]), floor(self.y[1]) + 1):
            row, _ = self.cell(10.0 ** self.x[0], 10.0**exponent)
            labels[row] = units.scaled(10.0**exponent, "FLOP/s", trim=True)
        for row in range(self.rows):
            label = labels.get(row, "")
            line = Text(label.rjust(_GUTTER - 2) + (" ┤" if label else " │"), style="dim")
            cells = [self.cells.get((row, column), (" ", "")) for column in range(self.columns)]
            for style, run in groupby(cells, key=lambda cell: cell[1]):
                text = "".join(character for character, _ in run)
                line.append(text, style=style if "dim" in style else f"not dim {style}")
            yield line
        yield from self._axis()

    def _axis(self) -> Iterator[Text]:
        ticks = {}
        for exponent in range(ceil(self.x[0]), floor(self.x[1]) + 1):
            _, column = self.cell(10.0**exponent, 10.0 ** self.y[0])
            ticks[column] = (
                f"{10.0**exponent:g}" if exponent < 3 else units.scaled(10.0**exponent, "", trim=True).replace(" ", "")
            )
        rule = "".join("┴" if column in ticks else "─" for column in range(self.columns))
        yield Text(" " * (_GUTTER - 1) + "└" + rule, style="dim")
        text = [" "] * (self.columns + 1)
        for column, label in ticks.items():
            start = min(max(column - len(label) // 2, 0), self.columns - len(label))
            text[start : start + len(label)] = label
        yield Text("FLOP/byte".rjust(_GUTTER - 2) + "  " + "".join(text).rstrip(), style="dim")
