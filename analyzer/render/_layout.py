"""Lines of styled text that fit a width: shortening, wrapping, tables.

Text from a user's model is data: it becomes `rich.text.Text`, which knows no markup, and loses its control
characters.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Literal

from rich.cells import cell_len, chop_cells, set_cell_size
from rich.console import Console
from rich.text import Text

from .registry import Options

Cell = str | Text


def printed(lines: Iterable[Text], options: Options) -> str:
    """The lines as one string; none exceeds the width, none ends in blanks."""
    out = StringIO()
    console = Console(
        file=out,
        width=options.width,
        force_terminal=options.colour,
        color_system="standard" if options.colour else None,
        no_color=not options.colour,
        legacy_windows=False,
    )
    for line in lines:
        fitted = _harmless(line)
        fitted.rstrip()
        fitted.truncate(options.width, overflow="ellipsis")
        if options.colour:
            console.print(fitted, no_wrap=True, highlight=False, crop=False, soft_wrap=True)
        else:
            out.write(fitted.plain + "\n")
    text = out.getvalue()
    return text if options.unicode else text.translate(_ASCII)


def _harmless(line: Text) -> Text:
    """A copy that no terminal and no build server takes for more than text.

    Those look for `::` at the start of a line and for `##[` anywhere in it.
    """
    plain = line.plain
    if plain.isprintable() and not plain.lstrip().startswith("::") and "##[" not in plain:
        return line.copy()
    shown = clean(plain).replace("##[", r"#\x23[")
    start = len(shown) - len(shown.lstrip())
    return Text(shown[:start] + (r"\x3a" + shown[start + 1 :] if shown.startswith("::", start) else shown[start:]))


_ASCII = str.maketrans({
    "…": "~", "×": "x", "µ": "u", "·": "|", "─": "-", "━": "=", "│": "|", "└": "+", "┤": "+", "┴": "+",
    "█": "#", "▒": "=", "░": ".", "▪": "'", "▚": "%", "●": "o", "◆": "@", "—": "-", "–": "-",
    "┊": ":", "≥": ">", "≈": "~", "−": "-",
})  # fmt: skip


def clean(text: str) -> str:
    """The text without control characters, line breaks and direction marks, which show as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_ENOUGH = 4
"""Characters a column that are looked at of a text too long to show: most take one column, accents none."""


def keep_end(text: str, width: int) -> str:
    """The end of a text too long for the width: `…attn.q_proj`."""
    if cell_len(text) <= width:
        return text
    tail = text[-_ENOUGH * max(width, 1) :]
    while tail and cell_len(tail) > max(width - 1, 0):
        tail = tail[1:]
    return f"…{tail}"[: max(width, 0)]


def keep_start(text: str, width: int) -> str:
    """The start of a text too long for the width."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text[: _ENOUGH * width], max(width - 1, 0)).rstrip() + "…" if width > 0 else ""


def keep_line(place: str, width: int) -> str:
    """A `folder/file.py:12` too long for the width: folders go first, the line number stays."""
    if cell_len(place) <= width:
        return place
    parts = place[-_ENOUGH * max(width, 1) :].split("/")
    for first in range(1, len(parts)):
        shorter = "…/" + "/".join(parts[first:])
        if cell_len(shorter) <= width:
            return shorter
    return keep_end(parts[-1], width)  # the file's own name, whole if it fits


_SHORTEN = {"start": keep_start, "end": keep_end, "line": keep_line}


_MOST_LEAST = 999


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A table column.

    Attributes:
        header: its title.
        cells: one a row.
        right: align right, for numbers.
        least: width below which it is not squeezed.
        drop: columns with the highest number go first when space runs out; 0 stays.
        keep: which part of a too long text stays visible.
        gap: blanks before it.
    """

    header: str
    cells: Sequence[Cell]
    right: bool = False
    least: int = _MOST_LEAST + 1
    drop: int = 0
    keep: Literal["start", "end", "line"] = "start"
    gap: int = 2

    @property
    def natural(self) -> int:
        """Width that shows every cell whole."""
        return max(map(_length, (self.header, *self.cells)))

    @property
    def minimum(self) -> int:
        """Width that it can be squeezed to before other columns are dropped."""
        return min(self.natural, max(self.least, cell_len(self.header)))

    @property
    def smallest(self) -> int:
        """Width that it can be squeezed to when nothing is left to drop: room for a line number, no less."""
        return self.natural if self.right or self.least > _MOST_LEAST else max(9, cell_len(self.header))


def table(columns: Sequence[Column], width: int, *, indent: int = 0) -> list[Text]:
    """A header and the rows. Columns are dropped, then squeezed to their least, then below it, until they fit."""
    shown = [c for c in columns if any(_length(cell) for cell in c.cells)]
    available = width - indent
    while _needed(shown, [c.minimum for c in shown]) > available and any(c.drop for c in shown):
        shown.remove(max(shown, key=lambda c: c.drop))
    widths = [c.natural for c in shown]
    for least in ([c.minimum for c in shown], [min(c.minimum, c.smallest) for c in shown]):
        while (excess := _needed(shown, widths) - available) > 0 and widths != least:
            slack = [w - m for w, m in zip(widths, least, strict=True)]
            widest = max(range(len(widths)), key=lambda i: (slack[i] > 0, widths[i]))
            widths[widest] -= min(slack[widest], max(1, excess // 4))
    rows = [[Text(c.header, style="dim") for c in shown]]
    rows += [[as_text(c.cells[i]) for c in shown] for i in range(len(columns[0].cells))]
    return [_row(row, shown, widths, indent) for row in rows]


def as_text(cell: Cell) -> Text:
    """A cell as Text."""
    return cell if isinstance(cell, Text) else Text(cell)


def wrapped(text: str, width: int) -> list[str]:
    """Lines of words that fit; a word wider than the line is cut."""
    lines = [""]
    for word in clean(text).split():
        for piece in chop_cells(word, max(width, 1)):
            joined = f"{lines[-1]} {piece}".strip()
            if cell_len(joined) <= width:
                lines[-1] = joined
            else:
                lines.append(piece)
    return lines


def bullets(items: Iterable[str], width: int, *, style: str = "") -> list[Text]:
    """Paragraphs with a dash and a hanging indent."""
    lines = []
    for item in items:
        for number, line in enumerate(wrapped(item, width - 4)):
            lines.append(Text(("  - " if number == 0 else "    ") + line, style=style))
    return lines


def fact(label: str, parts: Iterable[Cell], width: int, *, label_width: int = 11) -> list[Text]:
    """A labelled line whose parts are joined by dots and wrapped between each other."""
    lines: list[Text] = []
    room = width - label_width
    for part in parts:
        pieces = [as_text(part)] if _length(part) <= room else [Text(line) for line in wrapped(str(part), room)]
        for piece in pieces:
            if lines and lines[-1].cell_len + 3 + piece.cell_len <= width and piece is pieces[0]:
                lines[-1].append(" · ", style="dim").append_text(piece)
            else:
                start = label if not lines else ""
                lines.append(Text(start.ljust(label_width), style="").append_text(piece))
                lines[-1].stylize("dim", 0, label_width)
    return lines


def beside(left: Sequence[Text], right: Sequence[Text], left_width: int) -> list[Text]:
    """Two blocks next to each other."""
    lines = []
    for i in range(max(len(left), len(right))):
        line = left[i].copy() if i < len(left) else Text()
        if i < len(right):
            line.pad_right(max(left_width - line.cell_len, 0))
            line.append_text(right[i])
        lines.append(line)
    return lines


def title(text: str, width: int, *, heavy: bool = False) -> Text:
    """A heading with a rule to the right edge."""
    rule = "━" if heavy else "─"
    shown = keep_start(text, width - 6)
    line = Text(f"{rule * 2} ", style="dim").append(shown, style="bold not dim")
    return line.append(f" {rule * max(width - cell_len(shown) - 4, 0)}", style="dim")


def _row(cells: Sequence[Text], columns: Sequence[Column], widths: Sequence[int], indent: int) -> Text:
    line = Text(" " * indent)
    for number, (cell, column, width) in enumerate(zip(cells, columns, widths, strict=True)):
        if number:
            line.append(" " * column.gap)
        if cell.cell_len > width:
            cell = Text(_SHORTEN[column.keep](cell.plain, width), style=cell.style)
        blank = " " * max(width - cell.cell_len, 0)
        if column.right:
            line.append(blank).append_text(cell)
        else:
            line.append_text(cell).append(blank)
    return line


def _needed(columns: Sequence[Column], widths: Sequence[int]) -> int:
    return sum(widths) + sum(column.gap for column in columns[1:])


def _length(cell: Cell) -> int:
    return as_text(cell).cell_len
