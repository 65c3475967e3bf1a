"""The shipped accelerators and users' own TOML files, by key, shorthand, device name or path."""

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, get_args

from .gpu import FITTED, UNITS, Confidence, Figure, Gpu, from_figures, taking_over

CATALOG_VERSION = "2026-11-21"
"""The day on which the shipped figures were last collected."""


class CatalogError(ValueError):
    """A GPU that cannot be named or read.

    Attributes:
        message: What is wrong, and where.
        hint: What to do about it.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a name stands for.

    Attributes:
        gpu: The part.
        note: What the name was taken to mean, where it was a family's name; else None.
    """

    gpu: Gpu
    note: str | None


def load(name_or_path: str | Path) -> Resolved:
    """Find a part by key (`b200`), shorthand (`h100`), device name (`NVIDIA H200`) or path (`mine.toml`).

    Names are compared without regard to case, spaces and punctuation. A path ends in `.toml`.

    Raises:
        CatalogError: Nothing has that name, or the TOML cannot be used.
    """
    if isinstance(name_or_path, Path) or name_or_path.endswith(".toml"):
        return Resolved(_read(Path(name_or_path), shipped=False), None)
    wanted = _normalized(name_or_path)
    for key in names():
        if _normalized(key) == wanted:
            return Resolved(_shipped(key), None)
    for gpu in all_gpus():
        if wanted in map(_normalized, gpu.shorthands):
            return Resolved(gpu, f"{name_or_path} means {gpu.key} ({gpu.name})")
    for spelling in (_normalized, _without_vendor):
        for gpu in all_gpus():
            if wanted and wanted in map(spelling, (gpu.name, *gpu.aliases)):
                return Resolved(gpu, None)
    raise _unknown_name(name_or_path)


@cache
def names() -> tuple[str, ...]:
    """The keys of the shipped parts, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


@cache
def all_gpus() -> tuple[Gpu, ...]:
    """Every shipped part, sorted by key."""
    return tuple(map(_shipped, names()))


_FOLDER = Path(__file__).parent / "catalog"
_MAX_FILE_BYTES = 2**20
_LARGEST, _SMALLEST = 1e18, 1e-9
_SOURCE_KINDS = ("vendor", "repo", "measured", "secondary", "derived", "unverified", "user")
_CONFIDENCES = get_args(Confidence)
_CONFIDENCE_LISTS: dict[str, Confidence] = {
    "high_confidence_keys": "high",
    "medium_confidence_keys": "medium",
    "low_confidence_keys": "low",
}
_MANDATORY = ("name", "vendor", "memory_bandwidth_gb_per_s")
_DESCRIPTIVE = {
    "name",
    "vendor",
    "aliases",
    "shorthands",
    "collected",
    "confidence",
    *_CONFIDENCE_LISTS,
    "price_dates",
    "notes",
    "disagreements",
    "sources",
}


def _normalized(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def _without_vendor(name: str) -> str:
    return re.sub(r"^(nvidia|amd|intelr)", "", _normalized(name))


def _unknown_name(name: str) -> CatalogError:
    shown = name if len(name) <= 60 else f"{name[:57]}..."
    keys_by_name = {
        _normalized(known): gpu.key for gpu in all_gpus() for known in (*gpu.aliases, *gpu.shorthands, gpu.key)
    }
    close = difflib.get_close_matches(_normalized(shown), keys_by_name, n=6)
    nearest = list(dict.fromkeys(keys_by_name[known] for known in close))[:3]
    question = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    return CatalogError(f"no GPU is called {shown!r}", f"{question}run `fxroof gpus` for the list")


@cache
def _shipped(key: str) -> Gpu:
    return _read(_FOLDER / f"{key}.toml", shipped=True)


def _read(path: Path, *, shipped: bool) -> Gpu:
    file = _File(path, _document(path))
    return file.completed(file.gpu(must_cite=shipped))


@cache
def _relatives() -> Mapping[str, Gpu]:
    """The shipped parts whose files have fitted figures, or name a part for them; nothing is taken over yet."""
    files = (_FOLDER / f"{key}.toml" for key in names())
    # only few have, and parsing all files takes longer than anything else here
    some = [path for path in files if any(key in path.read_text(encoding="utf-8") for key in (_LIKE, *FITTED))]
    return {path.stem: _File(path, _document(path)).gpu(must_cite=True) for path in some}


_LIKE = "kernels_like"
"""The key that names the part whose fitted figures are taken over."""


@cache
def _measured() -> Mapping[str, Gpu]:
    """The parts whose own kernels were fitted on."""
    return {key: gpu for key, gpu in _relatives().items() if gpu.fitted.keys() == FITTED.keys()}


def _origin(gpu: Gpu) -> tuple[Gpu, str] | None:
    """The part whose kernels are taken to be like those of another, and why.

    It is that of the vendor with the nearest compute capability that is not above, else with the lowest; where that one
    names a part, it is the one named.
    """
    telling = (other for key, other in _relatives().items() if key in _measured() or _named(other))
    kin = sorted((other for other in telling if other.vendor == gpu.vendor), key=_capability)
    if not kin:
        return None
    nearest = next((other for other in reversed(kin) if _capability(other) <= _capability(gpu)), kin[0])
    if _named(nearest):
        return _measured()[_named(nearest)], f"as on {nearest.key}"
    alike = gpu.architecture == nearest.architecture or gpu.compute_capability == nearest.compute_capability
    return nearest, "same architecture" if alike else "the nearest that was measured"


def _capability(gpu: Gpu) -> tuple[int, int]:
    return gpu.compute_capability or (0, 0)


def _named(gpu: Gpu) -> str:
    return next((str(figure.value) for figure in gpu.figures if figure.key == _LIKE), "")


def _document(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise CatalogError(f"{path}: no such file", "give the path of a TOML file, or a name from `fxroof gpus`")
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise CatalogError(f"{path}: larger than 1 MiB", "a GPU's file holds one table of figures")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except CatalogError:
        raise
    except OSError as error:
        raise CatalogError(f"{path}: {error.strerror or error}", "make the file readable") from error
    except (ValueError, RecursionError) as error:
        raise CatalogError(f"{path}: not TOML: {error}", "correct the file at the place named") from error


class _File:
    """Checks one document and turns it into a Gpu; every complaint names the file and the key."""

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self._path = path
        self._document = document

    def gpu(self, *, must_cite: bool) -> Gpu:
        for key in self._document:
            self._check_known(key)
        for key in _MANDATORY:
            if key not in self._document:
                self._fail(key, "is missing", f"every GPU needs {', '.join(_MANDATORY)}")
        return from_figures(
            self._figures(must_cite=must_cite),
            key=self._path.stem,
            name=self._text("name"),
            vendor=self._text("vendor"),
            confidence=self._confidence(),
            aliases=self._texts("aliases"),
            shorthands=self._texts("shorthands"),
            notes=self._texts("notes"),
            disagreements=self._texts("disagreements"),
        )

    def completed(self, gpu: Gpu) -> Gpu:
        """The part with the fitted figures that its file lacks, taken over from another part."""
        own, named = gpu.fitted.keys(), _named(gpu)
        missing = [key for key in FITTED if key not in own]
        if not (gpu.clock_hz and gpu.sm_count):  # how long cycles and waves are is not known then
            if named or own:
                key = _LIKE if named else next(iter(own))
                self._fail(key, "needs a clock and a count of SMs", "give boost_clock_mhz and sm_count, or remove it")
            return gpu
        if named and named not in _measured():
            self._fail(_LIKE, f"is {_shown(named)}", f"name one of {', '.join(_measured())}, or remove it")
        found = (_measured()[named], "named in its file") if named else _origin(gpu)
        if missing and own and not found:
            self._fail(missing[0], "is missing", f"give it, or name a part for what is missing in {_LIKE}")
        if not missing or not found:
            return gpu
        origin, why = found
        figures = {figure.key: figure for figure in origin.figures}
        return taking_over(
            gpu,
            (
                replace(
                    figures[key],
                    source_id=f"{origin.key}/{figures[key].source_id}",
                    source_title=f"{figures[key].source_title}, taken over from {origin.key}: {why}",
                    taken_from=origin.key,
                )
                for key in missing
            ),
        )

    def _figures(self, *, must_cite: bool) -> tuple[Figure, ...]:
        sources = self._sources()
        confidences = self._confidences()
        figures = []
        for key in self._document:
            if key in _DESCRIPTIVE:
                continue
            if must_cite and key not in sources:
                self._fail(key, "has no source", "name it in the `keys` of one [sources.<id>] table")
            source_id, title, kind = sources.get(key, ("user", "stated without a source", "user"))
            figures.append(
                Figure(
                    key=key,
                    value=self._value(key),
                    unit=UNITS[key],
                    confidence=confidences[key],
                    source_id=source_id,
                    source_title=title,
                    source_kind=kind,
                )
            )
        return tuple(figures)

    def _sources(self) -> dict[str, tuple[str, str, str]]:
        """The (id, title, kind) of the source of each figure."""
        source_of: dict[str, tuple[str, str, str]] = {}
        for source_id, table in self._table("sources", self._document.get("sources", {})).items():
            where = f"sources.{source_id}"
            source = self._table(where, table)
            for entry in source.keys() - {"kind", "title", "via", "keys"}:
                self._fail(f"{where}.{entry}", "is unknown", "a source has kind, title, keys and perhaps via")
            title = self._is_text(f"{where}.title", source.get("title"))
            kind = self._is_text(f"{where}.kind", source.get("kind"))
            if kind not in _SOURCE_KINDS:
                self._fail(f"{where}.kind", f"is {kind!r}", f"use one of {', '.join(_SOURCE_KINDS)}")
            for key in self._are_texts(f"{where}.keys", source.get("keys")):
                self._check_figure(f"{where}.keys", key)
                if key in source_of:
                    self._fail(key, f"has two sources, {source_of[key][0]} and {source_id}", "name the better one")
                source_of[key] = (source_id, title, kind)
        return source_of

    def _confidences(self) -> dict[str, Confidence]:
        confidences = dict.fromkeys(self._document, self._confidence())
        for listing, confidence in _CONFIDENCE_LISTS.items():
            for key in self._texts(listing):
                self._check_figure(listing, key)
                confidences[key] = confidence
        return confidences

    def _confidence(self) -> Confidence:
        stated = self._document.get("confidence", "unstated")
        known: list[Confidence] = [confidence for confidence in _CONFIDENCES if confidence == stated]
        if not known:
            self._fail("confidence", f"is {_shown(stated)}", f"use one of {', '.join(_CONFIDENCES)}")
        return known[0]

    def _value(self, key: str) -> float | int | str:
        value, unit = self._document[key], UNITS[key]
        if not unit:
            text = self._is_text(key, value)
            if key == "compute_capability" and not re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,3}", text):
                self._fail(key, f"is {_shown(text)}", 'write it as text, such as "9.0"')
            return text
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._fail(key, f"is {_shown(value)}, not a number", f"give the plain number in {unit}")
        if not _SMALLEST < value < _LARGEST:
            self._fail(key, f"is {_shown(value)}", f"give a positive number in {unit}, or leave the key out")
        if unit in {"count", "year", "B"} and not isinstance(value, int):
            self._fail(key, f"is {_shown(value)}, not a whole number", "give a whole number")
        if unit == "fraction" and value > 1:
            self._fail(key, f"is {_shown(value)}", "give a share, at most 1")
        return value

    def _check_known(self, key: str) -> None:
        if key in UNITS or key in _DESCRIPTIVE:
            return
        close = difflib.get_close_matches(key[:60], (*UNITS, *_DESCRIPTIVE), n=1)
        self._fail(key[:60], "is unknown", f"did you mean {close[0]}?" if close else "remove it")

    def _check_figure(self, where: str, key: str) -> None:
        if key not in self._document or key not in UNITS:
            self._fail(where, f"names {_shown(key)}, which is no figure of this file", "correct or remove the name")

    def _text(self, key: str) -> str:
        return self._is_text(key, self._document[key])

    def _texts(self, key: str) -> tuple[str, ...]:
        return self._are_texts(key, self._document.get(key, []))

    def _is_text(self, where: str, value: object) -> str:
        if not isinstance(value, str) or not value.strip():
            self._fail(where, f"is {_shown(value)}, not text", "give text in quotes")
        return value

    def _are_texts(self, where: str, value: object) -> tuple[str, ...]:
        if not isinstance(value, list):
            self._fail(where, f"is {_shown(value)}, not a list", "give a list of text")
        return tuple(self._is_text(where, item) for item in value)

    def _table(self, where: str, value: object) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            self._fail(where, f"is {_shown(value)}, not a table", f"write it as [{where}]")
        return value

    def _fail(self, key: str, problem: str, hint: str) -> NoReturn:
        raise CatalogError(f"{self._path}: {key} {problem}", hint)


def _shown(value: object) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
