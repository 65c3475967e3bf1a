"""What a finding is known by from run to run: never a line number, a measured value or the number of layers."""

import hashlib
from collections import Counter
from collections.abc import Iterable

from .finding import Finding

Identity = tuple[str, str, str]
"""Rule, folded module path, operator."""


def identity(finding: Finding) -> Identity:
    """What stays when lines move and layers are added."""
    return finding.code, finding.module, finding.op


def fingerprints(findings: Iterable[Finding]) -> tuple[str, ...]:
    """A short name for each finding of a run, no two alike: equal identities are numbered in the order of lines."""
    found = tuple(findings)
    seen: Counter[Identity] = Counter()
    names: dict[int, str] = {}
    for index in sorted(range(len(found)), key=lambda i: (found[i].file, found[i].line, i)):
        known = identity(found[index])
        text = "\n".join((*known, str(seen[known])))
        names[index] = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]
        seen[known] += 1
    return tuple(names[index] for index in range(len(found)))
