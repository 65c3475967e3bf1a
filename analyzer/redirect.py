"""Imports from a repository, taken from its checkout at another revision. Only Python's own modules are imported here.

A project that is installed from its working tree (`pip install -e .`), or that PYTHONPATH leads to, would give the code
of the working tree to a target of any revision. `environment` is for a process, and for those that it starts, in which
that code comes from the checkout: what would be found in the repository is found at the same place there, or it is
missing. fxroof itself stays what it is.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

_HOOK, _DATA = "sitecustomize.py", "move.json"
_STDLIB = Path(os.__file__).parent
_PACKAGES = frozenset(("site-packages", "dist-packages"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A repository and the checkout that stands for it.

    Attributes:
        top: of the repository, links resolved.
        tree: top of the checkout, links resolved.
        copies: top-level modules that were installed as copies of the repository's, and where in the checkout they are
            looked for.
    """

    top: Path
    tree: Path
    copies: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def of(self, place: str) -> str | None:
        """Where a place in the repository lies in the checkout; None for what is not the repository's."""
        real = Path(place)
        if not real.is_absolute():
            return None
        real = real.resolve()
        if not real.is_relative_to(self.top) or real.is_relative_to(self.tree) or real.is_relative_to(_STDLIB):
            return None
        if _PACKAGES & set(real.parts):  # an environment that lies in the repository
            return None
        return str(self.tree / real.relative_to(self.top))


def written(move: Move, folder: Path) -> None:
    """Make a folder (new, empty) the one that `environment` needs."""
    told = {"top": str(move.top), "tree": str(move.tree), "copies": dict(move.copies)}
    (folder / _DATA).write_text(json.dumps(told), encoding="utf-8")
    (folder / _HOOK).write_text(_STARTED, encoding="utf-8")


def read(folder: Path) -> Move:
    """What `written` put into a folder."""
    told = json.loads((folder / _DATA).read_text(encoding="utf-8"))
    return Move(top=Path(told["top"]), tree=Path(told["tree"]), copies=told["copies"])


def environment(folder: Path, given: Mapping[str, str]) -> dict[str, str]:
    """The variables of a process whose imports are redirected, made of those given."""
    paths = [str(folder), *filter(None, [given.get("PYTHONPATH")])]
    return {**given, "PYTHONPATH": os.pathsep.join(paths)}


_STARTED = '''\
"""Written by fxroof: Python runs this when it starts."""

import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if entry != _here]
_ours = sys.modules.pop("sitecustomize")
try:
    import sitecustomize  # the environment's own
except ModuleNotFoundError:
    sys.modules["sitecustomize"] = _ours
from fxroof.analyzer.redirect import install

install(_here)
'''


def install(folder: str) -> None:
    """Redirect the imports of this process, as a folder says that `written` made."""
    move = read(Path(folder))
    sys.path[:] = [move.of(entry) or entry for entry in sys.path]
    sys.meta_path.insert(0, _Redirected(move))


class _Redirected:
    """Asks the other finders, and looks in the checkout for what they find in the repository."""

    def __init__(self, move: Move) -> None:
        self._move = move

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] == "fxroof":
            return None
        if path is None and name in self._move.copies:
            return PathFinder.find_spec(name, self._move.copies[name]) or _missing(name)
        spec = self._found(name, path, target)
        if spec is None:
            return None
        return self._file(spec) if spec.has_location else self._folders(spec)

    def _found(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in tuple(sys.meta_path):
            find: Callable[..., ModuleSpec | None] | None = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None and finder is not self else None
            if spec is not None:
                return spec
        return None

    def _file(self, spec: ModuleSpec) -> ModuleSpec:
        moved = self._move.of(spec.origin or "")
        if moved is None:
            return spec
        if not Path(moved).is_file():
            return _missing(spec.name)
        inside = None if spec.submodule_search_locations is None else [str(Path(moved).parent)]
        return spec_from_file_location(spec.name, moved, submodule_search_locations=inside) or spec

    def _folders(self, spec: ModuleSpec) -> ModuleSpec:
        """A package without a file of its own, or what Python brings."""
        folders = list(spec.submodule_search_locations or ())
        moved = [self._move.of(folder) or folder for folder in folders]
        if moved != folders:
            spec.submodule_search_locations = moved
        return spec


def _missing(name: str) -> ModuleSpec:
    raise ModuleNotFoundError(f"No module named {name!r} at this revision", name=name)
