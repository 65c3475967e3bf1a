"""Comments in the user's code that say which findings are known: `# fxroof: ignore[KVC001] short contexts only`."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Suppression:
    """One such comment.

    Attributes:
        codes: of the rules that it is about.
        reason: why; empty if it gives none.
    """

    codes: tuple[str, ...]
    reason: str


Suppressions = Mapping[tuple[str, int], Suppression]
"""By file and line."""


def read_suppressions(files: Iterable[str]) -> dict[tuple[str, int], Suppression]:
    """The comments of some source files; those that cannot be read have none."""
    found: dict[tuple[str, int], Suppression] = {}
    for file in dict.fromkeys(files):
        try:
            text = Path(file).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            match = _COMMENT.search(line)
            if match:
                codes = tuple(code.strip() for code in match["codes"].split(",") if code.strip())
                found[file, number] = Suppression(codes=codes, reason=match["reason"].strip())
    return found


_COMMENT = re.compile(r"#\s*fxroof:\s*ignore\[(?P<codes>[\w,\s-]+)\](?P<reason>[^#]*)")
