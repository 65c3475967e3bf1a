"""A target as the user names it -> a Model on the meta device: Python files and transformers configs."""

import contextlib
import dataclasses
import importlib.util
import inspect
import json
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import FxroofError, TargetError
from .meta import building, expose_plain_tensors, on_meta

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model ready to trace.

    Attributes:
        name: what the report calls it.
        source: the target as given.
        module: the model in eval mode, all tensors on meta.
        example_inputs: the user's hook of that name in the target's file, if there is one.
        notes: what was decided while loading, for the report's assumptions.
    """

    name: str
    source: str
    module: nn.Module
    example_inputs: Callable[..., Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the parameters, tied ones once."""
        return sum(p.numel() * p.element_size() for p in self.module.parameters())


def load(target: str, *, dtype: str = "as-is", attention: str = "sdpa") -> Model:
    """Build the model that a target names, without ever allocating its weights.

    Args:
        target: `mymodel.py`, `mymodel.py:attr`, or a transformers config (folder or `config.json`).
        dtype: `as-is`, or the type to convert floating-point parameters to: `bf16`, `fp16`, `fp32`.
        attention: `sdpa` or `eager`, for transformers models.

    Raises:
        TargetError: nothing there, nothing in it that is a model, or its own code failed.
    """
    path_text, _, attribute = target.partition(":")
    path = Path(path_text)
    if path.is_dir() or path.suffix == ".json":
        return _from_config(target, path, dtype, attention)
    if path.suffix != ".py":
        raise TargetError(
            f"{target}: neither a Python file nor a folder with a transformers config.json.",
            "Give mymodel.py, mymodel.py:attr, or a folder that holds config.json.",
        )
    if not path.is_file():
        raise TargetError(f"{path}: no such file.", _similar_files(path))
    return _from_file(target, path, attribute, dtype)


def from_module(module: nn.Module, name: str = "", *, dtype: str = "as-is") -> Model:
    """A Model around a module the caller already has; the module itself is left as it is."""
    return _model(module, name or type(module).__name__, "", dtype, owned=False)


def _from_file(target: str, path: Path, attribute: str, dtype: str) -> Model:
    with building(), contextlib.redirect_stdout(sys.stderr):
        namespace = _execute(path)
        if attribute:
            module = _build(_lookup(namespace, path, attribute), f"{path}:{attribute}")
        else:
            attribute, module = _only_candidate(namespace, path)
    hook = getattr(namespace, "example_inputs", None)
    model = _model(module, type(module).__name__, target, dtype, owned=True)
    return dataclasses.replace(model, example_inputs=hook if callable(hook) else None)


def _execute(path: Path) -> types.ModuleType:
    """Run the user's file as a module of a private name, its folder importable."""
    name = f"_fxroof_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise TargetError(f"{path}: Python cannot import this file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up by name
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _user_error(f"{path}: running the file failed", error, path) from error
    return module


def _lookup(namespace: types.ModuleType, path: Path, attribute: str) -> Any:
    found: Any = namespace
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [n for n, v in vars(namespace).items() if not n.startswith("_") and _may_be_model(v, namespace)]
            raise TargetError(
                f"{path}: no attribute {attribute!r}.", f"Models in this file: {', '.join(names) or 'none'}."
            )
        found = getattr(found, part)
    return found


def _only_candidate(namespace: types.ModuleType, path: Path) -> tuple[str, nn.Module]:
    """The one model of the file: instances before classes before functions, parts of other models left out."""
    own = {n: v for n, v in vars(namespace).items() if not n.startswith("_") and _may_be_model(v, namespace)}
    tiers = (
        {n: v for n, v in own.items() if isinstance(v, nn.Module)},
        {n: v for n, v in own.items() if inspect.isclass(v)},
        {n: v for n, v in own.items() if inspect.isfunction(v)},
    )
    refused: list[str] = []
    for tier in tiers:
        built: dict[str, nn.Module] = {}
        for name, value in tier.items():
            try:
                built[name] = _build(value, f"{path}:{name}")
            except FxroofError as error:
                refused.append(f"{name} ({error.message.rsplit(': ', 1)[-1]})")
        parts = {type(child) for module in built.values() for child in module.modules() if child is not module}
        contained = {id(c) for m in built.values() for c in m.modules() if c is not m}
        whole = {
            n: m
            for n, m in built.items()
            if id(m) not in contained and (isinstance(own[n], nn.Module) or type(m) not in parts)
        }
        if len(whole) == 1:
            return next(iter(whole.items()))
        if whole:
            commands = "\n".join(f"  fxroof analyze {path}:{name}" for name in whole)
            raise TargetError(f"{path}: {len(whole)} models in this file; say which one.", f"Run one of\n{commands}")
    raise TargetError(
        f"{path}: no model found: no nn.Module instance, and no class or function that gives one without arguments"
        + (f"; tried {', '.join(refused[:5])}" if refused else "")
        + ".",
        "Add a function without arguments that returns the model, and name it: mymodel.py:build.",
    )


def _may_be_model(value: Any, namespace: types.ModuleType) -> bool:
    if isinstance(value, nn.Module):
        return True
    if getattr(value, "__module__", None) != namespace.__name__:
        return False
    if inspect.isclass(value):
        return issubclass(value, nn.Module) and _arguments(value) is not None
    if not inspect.isfunction(value) or _required(value):
        return False
    returned = inspect.signature(value).return_annotation
    return value.__name__.startswith(("build", "make", "create", "get", "load", "model")) or (
        inspect.isclass(returned) and issubclass(returned, nn.Module)
    )


def _build(value: Any, where: str) -> nn.Module:
    if isinstance(value, nn.Module):
        return value
    if not callable(value):
        raise TargetError(f"{where} is a {type(value).__name__}, not a model.", "Name a module, a class or a function.")
    arguments = _arguments(value)
    if arguments is None:
        names = ", ".join(p.name for p in _required(value))
        raise TargetError(
            f"{where} cannot be called without arguments: it needs {names}.",
            "Add a function without arguments that builds it, and name that: mymodel.py:build.",
        )
    try:
        made = value(*arguments)
    except Exception as error:
        raise _user_error(f"{where}() failed", error, None) from error
    if not isinstance(made, nn.Module):
        raise TargetError(f"{where}() returned a {type(made).__name__}, not a torch.nn.Module.")
    return made


def _arguments(value: Any) -> tuple[Any, ...] | None:
    """Arguments to call with: none, or one config object whose own fields all have defaults; None when neither fits."""
    required = _required(value)
    if not required:
        return ()
    if len(required) > 1:
        return None
    kind = required[0].annotation
    if isinstance(kind, str):
        kind = getattr(sys.modules.get(value.__module__), kind, None)
    if not inspect.isclass(kind) or issubclass(kind, nn.Module) or kind.__module__ == "builtins" or _required(kind):
        return None
    try:
        return (kind(),)
    except Exception:
        return None


def _required(value: Any) -> list[inspect.Parameter]:
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in parameters if p.default is inspect.Parameter.empty and p.kind not in kinds]


def _from_config(target: str, path: Path, dtype: str, attention: str) -> Model:
    file = path / "config.json" if path.is_dir() else path
    content = _config_content(file)
    if content.get("quantization_config"):
        method = content["quantization_config"].get("quant_method", "unknown")
        raise TargetError(
            f"{file}: quantization_config ({method}) cannot be priced yet, and pricing the model as if its weights "
            "were unquantised would be wrong by a factor of 2 to 4.",
            "Remove quantization_config from a copy of the file to price the unquantised model.",
        )
    transformers = _transformers(file)
    notes: list[str] = []
    try:
        config = transformers.AutoConfig.from_pretrained(str(file.parent if path.is_dir() else file))
    except Exception as error:
        raise TargetError(f"{file}: transformers cannot read this config: {_line(error)}") from error
    stored = getattr(config, "dtype", None)
    wanted = DTYPES.get(dtype) or (stored if isinstance(stored, torch.dtype) else None)
    if wanted is None:
        wanted = torch.bfloat16
        notes.append("the config names no dtype; bfloat16 assumed")
    try:
        with building(), contextlib.redirect_stdout(sys.stderr):
            # left to itself transformers takes SDPA wherever the architecture supports it
            chosen = {"attn_implementation": attention} if attention == "eager" else {}
            module = transformers.AutoModelForCausalLM.from_config(config, dtype=wanted, **chosen)
    except Exception as error:
        raise TargetError(
            f"{file}: transformers cannot build a causal language model from this config: {_line(error)}"
        ) from error
    taken = getattr(module.config, "_attn_implementation", attention)
    if taken != attention:
        notes.append(f"transformers runs this architecture with {taken} attention")
    name = path.resolve().name if path.is_dir() else path.resolve().parent.name
    model = _model(module, name, target, "as-is", owned=True)
    return dataclasses.replace(model, notes=(*notes, f"transformers {transformers.__version__}", *model.notes))


def _config_content(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise TargetError(f"{file}: no such file.", "A folder target must hold a transformers config.json.")
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise TargetError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict) or not (content.get("model_type") or content.get("architectures")):
        raise TargetError(f"{file}: neither a saved fxroof report nor a transformers config (it has no model_type).")
    return content


def _transformers(file: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise TargetError(
            f"{file} is a transformers config, and transformers is not installed.",
            'Install it with: pip install "fxroof[hf]"',
        ) from error
    return transformers


def _model(module: nn.Module, name: str, source: str, dtype: str, *, owned: bool) -> Model:
    notes = []
    module = on_meta(module, owned=owned)
    expose_plain_tensors(module)
    if dtype in DTYPES:
        module = module.to(DTYPES[dtype])
        notes.append(f"floating-point parameters and buffers converted to {dtype}")
    return Model(name=name, source=source, module=module.eval(), notes=tuple(notes))


def _user_error(what: str, error: Exception, path: Path | None) -> TargetError:
    if isinstance(error, FxroofError):
        return TargetError(error.message, error.hint)
    line = next((f"{f.filename}:{f.lineno}" for f in reversed(list(_frames(error)))), "")
    place = f" at {line}" if line else (f" in {path}" if path else "")
    return TargetError(f"{what}{place}: {type(error).__name__}: {_line(error)}", "Run with --debug for the traceback.")


def _frames(error: BaseException) -> Iterator[Any]:
    import traceback

    skipped = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    return (f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(skipped))


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:300] or type(error).__name__


def _similar_files(path: Path) -> str:
    import difflib

    if not path.parent.is_dir():
        return ""
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=3)
    return f"Did you mean {' or '.join(str(path.parent / c) for c in close)}?" if close else ""
