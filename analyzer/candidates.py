"""User code -> a module: which of a file's classes, functions and objects is the model, and how it is made."""

import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import re
import shlex
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from torch import nn

from .errors import FxroofError, TargetError
from .meta import building

_MODULE_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_FACTORY = re.compile(r"(build|make|create|get_model|load_model|model)")
_CONFIG = re.compile(r"(config|args|arguments|params|hparams|settings|options)$", re.IGNORECASE)
_ASK = "Name the model (mymodel.py:attr), or build it in place: --init 'Model(...)'."


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A module that user code made, under the name the user would give it, and the file's own example inputs."""

    module: nn.Module
    example_inputs: Callable[..., Any] | None = None
    notes: tuple[str, ...] = ()


def names_module(text: str) -> bool:
    """Whether a target may be a dotted module name rather than a path."""
    path = Path(text)
    is_package = (path / "__init__.py").is_file() and not (path / "config.json").exists()
    return _MODULE_NAME.fullmatch(text) is not None and (is_package or not path.exists())


def from_code(place: str, attribute: str, init: str) -> Built:
    """Import a file or a dotted module and build the model in it.

    Args:
        place: path of a Python file, or a module importable from the working directory or the environment.
        attribute: dotted name of the model or of what makes it; empty to find it.
        init: expression that builds it; empty to call what `attribute` names.

    Raises:
        TargetError: importing failed, nothing there is a model, or several are.
    """
    with _user_code():
        namespace = _imported(place)
        notes: tuple[str, ...] = ()
        if init:
            module = _evaluated(namespace, place, init)
        elif attribute:
            module = _built(_looked_up(namespace, place, attribute), f"{place}:{attribute}", namespace)
        else:
            module, notes = _only_candidate(namespace, place)
    hook = getattr(namespace, "example_inputs", None)
    return Built(module=_unwrapped(module), example_inputs=hook if callable(hook) else None, notes=notes)


@contextlib.contextmanager
def _user_code() -> Iterator[None]:
    """Meta device, prints to stderr; compilers that would hide the program's ops hand back what they are given."""
    compilers = ((torch, "compile"), (torch.jit, "script"))
    saved = [(owner, name, getattr(owner, name)) for owner, name in compilers]
    with building(), contextlib.redirect_stdout(sys.stderr):
        for owner, name, _ in saved:
            setattr(owner, name, _same)
        try:
            yield
        finally:
            for owner, name, value in saved:
                setattr(owner, name, value)


def _same(model: Any = None, *_: Any, **__: Any) -> Any:
    return _same if model is None else model


def _unwrapped(module: nn.Module) -> nn.Module:
    """What torch.compile and the parallel wrappers wrap."""
    while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
        module = inner
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _unwrapped(module.module)
    return module


def _imported(place: str) -> types.ModuleType:
    if names_module(place):
        return _imported_by_name(place)
    path = Path(place)
    try:
        return _executed(path)
    except Exception as error:
        if isinstance(error, ImportError) and "no known parent package" in str(error):
            return _imported_in_package(path)
        raise user_error(f"{path}: running the file failed", error, path) from error
    except SystemExit as error:
        raise TargetError(
            f"{path}: the file ends the program (sys.exit) when it is imported{_at(error)}.",
            'Put what is not the model under `if __name__ == "__main__":`.',
        ) from error


def _executed(path: Path) -> types.ModuleType:
    """Run the user's file as a module of a private name, its folder importable."""
    name = f"_fxroof_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise TargetError(f"{path}: Python cannot import this file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up by name
    _importable(path.resolve().parent)
    with _no_bytecode():
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _no_bytecode() -> Iterator[None]:
    """Leave no `__pycache__` beside the user's file."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _imported_in_package(path: Path) -> types.ModuleType:
    """A file with relative imports is part of a package: import it as that."""
    root = path.resolve().parent
    names = [path.stem, root.name]
    while (root / "__init__.py").is_file() and (root.parent / "__init__.py").is_file():
        root = root.parent
        names.append(root.name)
    _importable(root.parent)
    return _imported_by_name(".".join(reversed(names)))


def _imported_by_name(name: str) -> types.ModuleType:
    _importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise TargetError(
                f"{name}: no file or folder of this name, and no module that Python can import"
                + (f" ({error.name} is missing)." if error.name != name else "."),
                "Give mymodel.py, package.module:attr, a folder that holds config.json, or hf:ORG/NAME.",
            ) from error
        raise user_error(f"{name}: importing the module failed", error, None) from error
    except Exception as error:
        raise user_error(f"{name}: importing the module failed", error, None) from error
    except SystemExit as error:
        raise TargetError(f"{name}: the module ends the program (sys.exit) when it is imported{_at(error)}.") from error


def _importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _evaluated(namespace: types.ModuleType, place: str, init: str) -> nn.Module:
    try:
        code = compile(init.strip(), "<--init>", "eval")
    except (SyntaxError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise TargetError(
            f"--init {init!r} is not a Python expression: {reason}.",
            "Give one expression in the file's namespace, such as --init 'Model(ModelArgs(dim=4096))'.",
        ) from error
    try:
        made = eval(code, vars(namespace))  # noqa: S307  # the user's own expression over the user's own file
    except NameError as error:
        names = ", ".join(n for n in vars(namespace) if not n.startswith("_"))
        raise TargetError(f"--init {init!r}: {first_line(error)}.", f"Names in {place}: {names}.") from error
    except Exception as error:
        raise user_error(f"--init {init!r} failed", error, None) from error
    return _built(made, f"--init {init!r}", namespace)


def _looked_up(namespace: types.ModuleType, place: str, attribute: str) -> Any:
    found: Any = namespace
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [c.name for c in _candidates(namespace)]
            raise TargetError(
                f"{place}: no attribute {attribute!r}.", f"Models in this file: {', '.join(names) or 'none'}."
            )
        found = getattr(found, part)
    return found


def _built(value: Any, where: str, namespace: types.ModuleType) -> nn.Module:
    if isinstance(value, nn.Module):
        return value
    if not callable(value):
        raise TargetError(f"{where} is a {type(value).__name__}, not a model.", "Name a module, a class or a function.")
    arguments = _arguments(value, namespace)
    if arguments is None:
        raise TargetError(
            f"{where} cannot be called without arguments: it needs {_needs(value)}.",
            f"Say them with --init '{_call(value)}', or add a function without arguments that builds it.",
        )
    try:
        made = value(*arguments)
    except Exception as error:
        raise user_error(f"{where}() failed", error, None) from error
    except SystemExit as error:
        raise TargetError(f"{where}() ends the program (sys.exit){_at(error)}.") from error
    if not isinstance(made, nn.Module):
        raise TargetError(f"{where}() returned a {type(made).__name__}, not a torch.nn.Module.")
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """Something in the user's namespace that may be, or make, the model."""

    name: str
    value: Any
    tier: int  # objects before classes before functions


def _candidates(namespace: types.ModuleType) -> list[_Candidate]:
    found, seen = [], set[int]()
    for name, value in vars(namespace).items():
        tier = _tier(value, namespace)
        if tier is not None and not name.startswith("_") and id(value) not in seen:
            seen.add(id(value))
            found.append(_Candidate(name=name, value=value, tier=tier))
    return found


def _tier(value: Any, namespace: types.ModuleType) -> int | None:
    if isinstance(value, nn.Module):
        return 0
    if isinstance(value, functools.partial):
        made = value.func
        return 2 if inspect.isclass(made) and issubclass(made, nn.Module) else None
    if getattr(value, "__module__", None) != namespace.__name__:
        return None
    if inspect.isclass(value):
        return 1 if issubclass(value, nn.Module) else None
    return 2 if inspect.isfunction(value) and _makes_model(value, namespace) else None


def _makes_model(function: types.FunctionType, namespace: types.ModuleType) -> bool:
    returned = _signature(function).return_annotation
    if inspect.isclass(returned) and returned is not inspect.Signature.empty:
        return issubclass(returned, nn.Module)
    if _FACTORY.match(function.__name__):
        return True
    tree = _tree(namespace)
    body = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function.__name__), None)
    calls = [
        n.value.func
        for n in ast.walk(body or ast.Module([], []))
        if isinstance(n, ast.Return) and isinstance(n.value, ast.Call)
    ]
    made = [vars(namespace).get(c.id) for c in calls if isinstance(c, ast.Name)]
    return any(inspect.isclass(m) and issubclass(m, nn.Module) for m in made)


def _only_candidate(namespace: types.ModuleType, place: str) -> tuple[nn.Module, tuple[str, ...]]:
    """The one model of the file: objects before classes before functions, parts of other models left out."""
    candidates = _candidates(namespace)
    uses = _uses(namespace)
    refused: dict[str, str] = {}
    for tier in range(3):
        roots = _unused([c for c in candidates if c.tier == tier], uses)
        built: dict[str, nn.Module] = {}
        waiting: list[_Candidate] = []
        for candidate in roots:
            try:
                module = _built(candidate.value, f"{place}:{candidate.name}", namespace)
            except FxroofError as error:
                refused[candidate.name] = error.message.removeprefix(f"{place}:{candidate.name}")
                if _composite(candidate, candidates, uses):
                    waiting.append(candidate)
                continue
            if any(True for _ in module.parameters()):  # losses and activations are no models
                built[candidate.name] = module
        built = _whole(built)
        if len(built) == 1 and not waiting:
            ((name, module),) = built.items()
            return module, tuple(f"{place}:{name} taken; {n}{why}" for n, why in refused.items() if tier == 1)
        if built:
            commands = [f"fxroof analyze {shlex.quote(f'{place}:{n}')}" for n in built]
            commands += [f"fxroof analyze {shlex.quote(place)} --init {shlex.quote(_call(w.value))}" for w in waiting]
            raise TargetError(
                f"{place}: {len(commands)} models in this file; say which one.",
                "Run one of\n" + "\n".join(f"  {c}" for c in commands),
            )
    raise _none_found(namespace, place, [c for c in candidates if c.name in refused], refused)


def _none_found(
    namespace: types.ModuleType, place: str, candidates: Sequence[_Candidate], refused: Mapping[str, str]
) -> TargetError:
    message = f"{place}: no model can be made from this file without arguments."
    if refused:
        reasons = "\n".join(f"  {name}{why}" for name, why in list(refused.items())[:8])
        asking = [c for c in candidates if _arguments(c.value, namespace) is None][:4]
        commands = [f"  fxroof analyze {shlex.quote(place)} --init {shlex.quote(_call(c.value))}" for c in asking]
        hint = "\n".join(["Say the arguments:", *commands]) if commands else "Run with --debug for the traceback."
        return TargetError(f"{message}\n{reasons}", hint)
    if _has_main_block(namespace):
        return TargetError(
            f"{message} It has no nn.Module, class or function at top level that makes one, and the code under "
            '`if __name__ == "__main__":` is not run.',
            "Move the model into a function without arguments, and name it: mymodel.py:build.",
        )
    return TargetError(
        f"{place}: no model found: no nn.Module object, and no class or function that gives one.",
        "Add a function without arguments that returns the model, and name it: mymodel.py:build.",
    )


def _unused(candidates: Sequence[_Candidate], uses: "nx.DiGraph[str]") -> list[_Candidate]:
    """Those that no other uses as a part, directly or through helpers; members of a circle do not use each other."""

    def reaches(a: str, b: str) -> bool:
        return a in uses and b in uses and nx.has_path(uses, a, b)

    names = [c.name for c in candidates]
    return [
        c for c in candidates if not any(n != c.name and reaches(n, c.name) and not reaches(c.name, n) for n in names)
    ]


def _composite(candidate: _Candidate, candidates: Sequence[_Candidate], uses: "nx.DiGraph[str]") -> bool:
    """Whether it is made of other models of the file, and so unlikely to be a stray layer."""
    if candidate.tier != 1 or candidate.name not in uses:
        return False
    below = nx.descendants(uses, candidate.name)
    return any(c.name in below for c in candidates if c.tier == 1)


def _whole(built: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those that are not part of another."""
    inside = {id(child) for module in built.values() for child in module.modules() if child is not module}
    return {name: module for name, module in built.items() if id(module) not in inside}


def _uses(namespace: types.ModuleType) -> "nx.DiGraph[str]":
    """Which top-level names of a file mention which, annotations aside."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for node in _tree(namespace).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            defined = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined = [t.id for t in targets if isinstance(t, ast.Name)]
        else:
            continue
        graph.add_edges_from((name, used) for name in defined for used in _mentioned(node) if used != name)
    return graph


def _mentioned(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Name):
        yield node.id
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _mentioned(child)


def _tree(namespace: types.ModuleType) -> ast.Module:
    try:
        return ast.parse(inspect.getsource(namespace))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def _has_main_block(namespace: types.ModuleType) -> bool:
    return any(isinstance(n, ast.If) and "__main__" in ast.dump(n.test) for n in _tree(namespace).body)


def _arguments(value: Any, namespace: types.ModuleType) -> tuple[Any, ...] | None:
    """Arguments to call with: none, or one config object whose own fields all have defaults; None when neither fits."""
    required = _required(value)
    if not required:
        return ()
    if len(required) > 1 or required[0].kind is inspect.Parameter.KEYWORD_ONLY:
        return None
    kind = required[0].annotation
    if kind is inspect.Parameter.empty:
        kind = _config_for(value, required[0].name, namespace)
    if not inspect.isclass(kind) or issubclass(kind, nn.Module) or kind.__module__ == "builtins" or _required(kind):
        return None
    try:
        return (kind(),)
    except Exception:
        return None


def _config_for(value: Any, parameter: str, namespace: types.ModuleType) -> type | None:
    """The class of the file that an unannotated `config` can only mean."""
    if not _CONFIG.search(parameter):
        return None
    found = [
        kind
        for kind in vars(namespace).values()
        if inspect.isclass(kind)
        and not issubclass(kind, nn.Module)
        and kind.__module__ == namespace.__name__
        and (dataclasses.is_dataclass(kind) or _CONFIG.search(kind.__name__))
    ]
    own = [kind for kind in found if kind.__name__.startswith(getattr(value, "__name__", " "))]
    return own[0] if len(own) == 1 else found[0] if len(found) == 1 else None


def _required(value: Any) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = _signature(value).parameters.values()
    return [p for p in parameters if p.default is inspect.Parameter.empty and p.kind not in kinds]


def _signature(value: Any) -> inspect.Signature:
    for resolve in (True, False):  # annotations that are strings may name what only type checkers see
        try:
            return inspect.signature(value, eval_str=resolve)
        except (TypeError, ValueError):
            return inspect.Signature()
        except Exception:  # noqa: S112  # whatever evaluating the user's annotation raises
            continue
    return inspect.Signature()


def _needs(value: Any) -> str:
    required = _required(value)
    names = ", ".join(p.name for p in required)
    kind = required[0].annotation if len(required) == 1 else inspect.Parameter.empty
    if inspect.isclass(kind) and kind is not inspect.Parameter.empty and (fields := _required(kind)):
        return f"{names} (a {kind.__name__}, which needs {', '.join(p.name for p in fields)})"
    return names


def _call(value: Any) -> str:
    """The call to complete, such as `GPT(config=...)`."""
    made = value.func if isinstance(value, functools.partial) else value
    given = []
    for p in _required(value):
        kind = p.annotation if inspect.isclass(p.annotation) else inspect.Parameter.empty
        if kind is inspect.Parameter.empty or kind.__module__ == "builtins" or issubclass(kind, nn.Module):
            given.append(f"{p.name}=...")
        else:
            given.append(f"{kind.__name__}({', '.join(f'{f.name}=...' for f in _required(kind))})")
    return f"{getattr(made, '__name__', 'Model')}({', '.join(given)})"


def user_error(what: str, error: BaseException, path: Path | None) -> TargetError:
    """An error in the user's code, with the line of it."""
    if isinstance(error, FxroofError):
        return TargetError(error.message, error.hint)
    place = _at(error) or (f" in {path}" if path else "")
    reason = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, ModuleNotFoundError):
        return TargetError(f"{what}{place}: {reason}", "Install it in the environment that fxroof runs in.")
    return TargetError(f"{what}{place}: {reason}", "Run with --debug for the traceback.")


def _at(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    skipped = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(skipped)]
    frames = [f for f in frames if f"{Path('lib', 'python3')}" not in f.filename or "site-packages" in f.filename]
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return str(error).strip().split("\n", 1)[0][:300] or type(error).__name__
