"""The settings of a project: `[tool.fxroof]` in pyproject.toml, or fxroof.toml. No torch here.

What is unknown or of the wrong type is an error that names the file and the line.
"""

import contextlib
import difflib
import os
import re
import tomllib
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import msgspec

from ..hardware.catalog import CatalogError
from ..hardware.catalog import load as load_gpu
from .budgets import BudgetError, budgets
from .errors import FxroofError
from .limits import Budget
from .parameters import SHARE, SIZE
from .scenario import MOST_GPUS, MOST_SECONDS, MOST_SEQUENCES, MOST_TOKENS

FILES = ("fxroof.toml", "pyproject.toml")


class ConfigError(FxroofError):
    """The settings of a project cannot be read or mean nothing."""


def _kebab(name: str) -> str:
    return name.replace("_", "-")


_Tokens = Annotated[int, msgspec.Meta(ge=1, le=MOST_TOKENS)]
_MaybeTokens = Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)]
_Sequences = Annotated[int, msgspec.Meta(ge=1, le=MOST_SEQUENCES)]
_Gpus = Annotated[int, msgspec.Meta(ge=1, le=MOST_GPUS)]


class ScenarioSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename=_kebab):
    """A named scenario: what `--batch-size` and its like say on the command line; None leaves it to their default.

    Attributes:
        name: how reports and budgets call it.
        batch_size: sequences in flight.
        input_len: prompt tokens of each.
        output_len: tokens generated for each.
        prefix_len: tokens of the prompt whose cache is there already.
        chunk: most prompt tokens that go through the model at once; 0 for all.
        tp: GPUs over which matrices are cut.
        ep: GPUs over which experts are dealt out.
        budgets: those of this scenario, as in `Settings`.
    """

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    batch_size: _Sequences | None = None
    input_len: _Tokens | None = None
    output_len: _Tokens | None = None
    prefix_len: _MaybeTokens | None = None
    chunk: _MaybeTokens | None = None
    tp: _Gpus | None = None
    ep: _Gpus | None = None
    budgets: dict[str, Any] = {}


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename=_kebab):
    """What a project asks for; None and empty values leave it to the command line's default.

    Attributes:
        targets: as on the command line; files are relative to the settings' folder, as are those of the next three.
        gpus: catalogue keys, device names or TOML files.
        rules: files with rules of the project's own.
        baseline: file of findings that are known.
        scenarios: named ones; none for the command line's single scenario.
        phase: as `--phase`.
        dtype: as `--dtype`.
        attention: as `--attention`.
        execution: as `--execution`.
        init: as `--init`, for all targets.
        inputs: as `--input`, for all targets.
        assume: as `--assume`.
        select: as `--select`.
        extend_select: as `--extend-select`.
        ignore: as `--ignore`.
        per_module_ignores: rules by pattern of module paths.
        min_saving: share such as `1%`.
        fail_on: as `--fail-on`.
        timeout: as `--timeout`, seconds.
        memory_limit: as `--memory-limit`.
        budgets: limits by metric, tables or dotted keys.
    """

    targets: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    baseline: str | None = None
    scenarios: tuple[ScenarioSettings, ...] = ()
    phase: Literal["all", "prefill", "decode", "forward", "encoder"] | None = None
    dtype: Literal["as-is", "bf16", "fp16", "fp32"] | None = None
    attention: Literal["sdpa", "eager"] | None = None
    execution: Literal["eager", "compiled"] | None = None
    init: str | None = None
    inputs: tuple[str, ...] = ()
    assume: tuple[Literal["balanced-routing"], ...] = ()
    select: tuple[str, ...] = ()
    extend_select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    per_module_ignores: dict[str, tuple[str, ...]] = {}
    min_saving: str | None = None
    fail_on: Literal["error", "warning", "info", "never"] | None = None
    timeout: Annotated[int, msgspec.Meta(ge=0, le=MOST_SECONDS)] | None = None
    memory_limit: str | None = None
    budgets: dict[str, Any] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """The settings that were found.

    Attributes:
        file: where.
        settings: what it says.
        budgets: its limits, those of scenarios among them.
    """

    file: Path
    settings: Settings
    budgets: tuple[Budget, ...]

    def defaults(self) -> dict[str, Any]:
        """The settings as values of the command line's options, by its parameters' names; paths as seen from here.

        What the command line's own types refuse is refused there.
        """
        settings = self.settings
        found = {name: value for name in _PLAIN if (value := getattr(settings, name)) not in (None, ())}
        found |= {"gpus": [self._part(gpu) for gpu in settings.gpus]} if settings.gpus else {}
        found |= {"rule_files": [self._path(file) for file in settings.rules]} if settings.rules else {}
        found |= {"baseline": self._path(settings.baseline)} if settings.baseline else {}
        ignored = [f"{pattern}={','.join(rules)}" for pattern, rules in settings.per_module_ignores.items() if rules]
        return found | ({"per_module_ignore": ignored} if ignored else {})

    def targets(self) -> tuple[str, ...]:
        """The targets, those that are files or folders beside the settings as seen from here."""
        return tuple(self._target(target) for target in self.settings.targets)

    def _target(self, target: str) -> str:
        name, colon, attribute = target.partition(":")
        there = self.file.parent / name
        return f"{self._path(name)}{colon}{attribute}" if name and there.exists() else target

    def _part(self, gpu: str) -> str:
        return self._path(gpu) if gpu.endswith(".toml") else gpu

    def _path(self, path: str) -> str:
        return os.path.relpath(self.file.parent / path)


_PLAIN = (
    "phase", "dtype", "attention", "execution", "init", "inputs", "assume", "select", "extend_select", "ignore",
    "min_saving", "fail_on", "timeout", "memory_limit",
)  # fmt: skip
"""Settings that are options under the same name."""


def find(folder: Path) -> Project | None:
    """The settings for a folder: of the nearest fxroof.toml, or pyproject.toml with `[tool.fxroof]`, at it or above.

    Raises:
        ConfigError: that file cannot be read.
    """
    for place in (folder, *folder.parents):
        for name in FILES:
            file = place / name
            if _is_there(file) and (name == FILES[0] or "fxroof" in _tool(_document(file))):
                return read(file)
    return None


def read(file: Path) -> Project:
    """The settings of a file.

    Raises:
        ConfigError: it cannot be read, is no TOML, or says what fxroof does not know.
    """
    text = _text(file)
    document = _document(file)
    inside = () if file.name != "pyproject.toml" else ("tool", "fxroof")
    table = document if not inside else _tool(document).get("fxroof", {})
    try:
        settings = msgspec.convert(table, Settings)
    except msgspec.ValidationError as error:
        raise _invalid(file, text, inside, str(error)) from error
    _check_texts(file, text, inside, settings)
    names = [scenario.name for scenario in settings.scenarios]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{file}: two scenarios are called {twice!r}.", "Give each a name of its own.")
    return Project(file=file, settings=settings, budgets=tuple(_budgets(file, text, inside, settings)))


def _check_texts(file: Path, text: str, inside: tuple[str, ...], settings: Settings) -> None:
    """Refuse here, where the line is known, what an option's type would refuse."""
    for name, kind in (("min_saving", SHARE), ("memory_limit", SIZE)):
        value = getattr(settings, name)
        try:
            kind.convert(value, None, None) if value is not None else None
        except click.BadParameter as error:
            place = f"{file}:{_line(text, (*inside, _kebab(name)))}"
            raise ConfigError(f"{place}: {_kebab(name)}: {error.message}", _WHERE) from error


_WHERE = "docs/ci.md lists the settings."


def _is_there(file: Path) -> bool:
    try:
        return file.is_file()
    except PermissionError:  # a folder above that is not ours
        return False


def _budgets(file: Path, text: str, inside: tuple[str, ...], settings: Settings) -> Iterator[Budget]:
    places: list[tuple[tuple[str, ...], dict[str, Any], str]] = [(("budgets",), settings.budgets, "")]
    places += [(("scenarios", str(i), "budgets"), s.budgets, s.name) for i, s in enumerate(settings.scenarios)]
    known = {"", *(scenario.name for scenario in settings.scenarios)}
    for path, table, scenario in places:
        try:
            found = budgets(table, scenario=scenario)
        except BudgetError as error:
            line = _line(text, (*inside, *path, *error.path))
            raise ConfigError(f"{file}:{line}: budgets: {error.message}", error.hint) from error
        for budget in found:
            place = f"{file}:{_line(text, (*inside, *path, *budget.metric.split('.')))}: budget of {budget.metric}"
            if budget.scenario not in known:
                names = ", ".join(sorted(known - {""}))
                raise ConfigError(
                    f"{place}: there is no scenario {budget.scenario!r}.",
                    f"Known: {names}." if names else "Add [[scenarios]] with that name.",
                )
            try:
                key = _part_key(budget.gpu, file, settings) if budget.gpu else ""
            except CatalogError as error:
                raise ConfigError(f"{place}: {error.message}", error.hint) from error
            yield replace(budget, gpu=key)


def _part_key(name: str, file: Path, settings: Settings) -> str:
    """The catalogue key that a budget's GPU is known by in reports.

    Raises:
        CatalogError: there is no such GPU, in the catalogue or among those of the settings.
    """
    try:
        return load_gpu(name).gpu.key
    except CatalogError:
        own = (load_gpu(str(file.parent / gpu)).gpu.key for gpu in settings.gpus if gpu.endswith(".toml"))
        if name in own:
            return name
        raise


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}.", _ELSE) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8.", "Save it as UTF-8.") from error


def _document(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_text(file))
    except (ValueError, RecursionError) as error:  # ValueError: of an integer of thousands of digits, too
        said = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{file}: is no TOML: {said}.", f"Mend that line. {_ELSE}") from error


_ELSE = "--config names another file of settings, --isolated none."


def _tool(document: Mapping[str, Any]) -> Mapping[str, Any]:
    tool = document.get("tool", {})
    return tool if isinstance(tool, dict) else {}


_PATH = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<path>[^`]*)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<field>[^`]*)`")


def _invalid(file: Path, text: str, inside: tuple[str, ...], message: str) -> ConfigError:
    found = _PATH.fullmatch(message)
    what, where = (found["what"], found["path"] or "") if found else (message, "")
    path = tuple(re.findall(r"[^.\[\]]+", where))
    unknown = _UNKNOWN.match(what)
    if unknown is not None:
        owner = ScenarioSettings if path[:1] == ("scenarios",) else Settings
        names = [field.encode_name for field in msgspec.structs.fields(owner)]
        near = difflib.get_close_matches(unknown["field"], names, n=2)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(names)}."
        line = _line(text, (*inside, *path, unknown["field"]))
        return ConfigError(f"{file}:{line}: {unknown['field']} is not known.", hint)
    name = ".".join(path) or "fxroof"
    return ConfigError(f"{file}:{_line(text, (*inside, *path))}: {name}: {what}.", _WHERE)


def _line(text: str, path: tuple[str, ...]) -> int:
    """The line on which what a path leads to begins, or what leads there: the shortest beginning that has it."""
    lines = text.splitlines(keepends=True)
    for known in range(len(path), 0, -1):
        if _leads(tomllib.loads(text), path[:known]):
            leads = partial(_begins, lines, path[:known])
            return bisect_left(range(1, len(lines)), x=True, key=leads) + 1
    return 1


def _begins(lines: Sequence[str], path: tuple[str, ...], count: int) -> bool:
    """Whether so many lines have what a path leads to; a statement that they cut is read to its end."""
    for end in range(count, len(lines) + 1):
        with contextlib.suppress(tomllib.TOMLDecodeError):
            return _leads(tomllib.loads("".join(lines[:end])), path)
    return True


def _leads(document: object, path: tuple[str, ...]) -> bool:
    here = document
    for step in path:
        if isinstance(here, dict) and step in here:
            here = here[step]
        elif isinstance(here, list) and step.isdigit() and int(step) < len(here):
            here = here[int(step)]
        elif isinstance(here, list) and step == "...":
            return bool(here)
        else:
            return False
    return True
