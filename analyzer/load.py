"""A target as the user names it -> a Model on the meta device: Python code, transformers configs, saved programs."""

import contextlib
import dataclasses
import difflib
import functools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from .archive import read, weights_of
from .candidates import first_line, from_code, names_module
from .errors import FxroofError, TargetError
from .meta import building, expose_plain_tensors, on_meta
from .quantize import Packed, compute_dtype, convert, settings_of

HUB = "hf:"
_HUB_NAME = re.compile(r"([\w.-]+/)?[\w.-]+")
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
        packed: what the model would be without its quantisation; None where there is none.
        program: the model as torch.export saved it; its module then only holds the weights.
    """

    name: str
    source: str
    module: nn.Module
    example_inputs: Callable[..., Any] | None = None
    notes: tuple[str, ...] = ()
    packed: Packed | None = None
    program: ExportedProgram | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones once; of a quantised model, of what its packed tensors stand for."""
        return self.packed.parameters if self.packed else sum(p.numel() for p in self.module.parameters())

    @property
    def dtypes(self) -> dict[str, int]:
        """Those parameters by the type that they are stored in, the commonest first."""
        if self.packed:
            return self.packed.dtypes
        found = Counter[str]()
        for parameter in self.module.parameters():
            found[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
        return dict(found.most_common())

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the parameters as stored, scales and zero points included, tied ones once."""
        return sum(p.numel() * p.element_size() for p in self.module.parameters())


def load(
    target: str, *, init: str = "", dtype: str = "as-is", attention: str = "sdpa", trust_remote_code: bool = False
) -> Model:
    """Build the model that a target names, without ever allocating its weights.

    Args:
        target: `mymodel.py`, `mymodel.py:attr`, `package.module:attr`, a transformers config (folder, `config.json`
            or `hf:ORG/NAME`), or a program saved by torch.export (`.pt2`).
        init: an expression in the file's namespace that builds the model.
        dtype: `as-is`, or the type to convert floating-point parameters to: `bf16`, `fp16`, `fp32`.
        attention: `sdpa` or `eager`, for transformers models.
        trust_remote_code: run code that a transformers repository brings.

    Raises:
        TargetError: nothing there, nothing in it that is a model, or its own code failed.
    """
    place, attribute = _split(target)
    path = Path(place)
    if not place.strip():
        raise TargetError(f"{target!r} names nothing.", _TARGETS)
    is_file_name = path.suffix in (".pt2", ".json", *_WEIGHTS)
    is_code = path.suffix == ".py" or (names_module(place) and not is_file_name and not target.startswith(HUB))
    if init and not is_code:
        raise TargetError(f"--init builds a model in a Python file's namespace, and {target} is not Python code.")
    if target.startswith(HUB):
        if not _HUB_NAME.fullmatch(place):
            raise TargetError(f"{target}: not a repository name.", "Write it as hf:ORG/NAME.")
        return _from_config(target, place, dtype, attention, trust_remote_code)
    if is_code and path.suffix == ".py" and not path.is_file():
        raise TargetError(f"{path}: no such file.", _similar_files(path))
    if is_code:
        return _from_code(target, place, attribute, init, dtype)
    if path.suffix == ".pt2" and path.is_file():
        if dtype != "as-is":
            raise TargetError(f"{target}: an exported program is analysed in the types it was exported with.")
        return from_program(read(path), path.stem, source=target)
    if path.is_dir() or (path.suffix == ".json" and path.is_file()):
        return _from_config(target, place, dtype, attention, trust_remote_code)
    raise _no_target(target, path)


def from_module(module: nn.Module, name: str = "", *, dtype: str = "as-is") -> Model:
    """A Model around a module the caller already has; the module itself is left as it is."""
    return _model(module, name or type(module).__name__, "", dtype, owned=False)


def from_program(program: ExportedProgram, name: str = "", *, source: str = "") -> Model:
    """A Model around a program that torch.export made."""
    return Model(
        name=name or "exported program",
        source=source,
        module=weights_of(program),
        program=program,
        notes=("exported program: analysed as exported, in the shapes of its example inputs",),
    )


def _split(target: str) -> tuple[str, str]:
    if target.startswith(HUB):
        return target.removeprefix(HUB).strip("/"), ""
    place, colon, attribute = target.rpartition(":")
    if not colon or Path(target).exists() or "/" in attribute:
        return target, ""
    return place, attribute


def _from_code(target: str, place: str, attribute: str, init: str, dtype: str) -> Model:
    built = from_code(place, attribute, init)
    name = type(built.module).__name__
    model = _model(built.module, name, target, dtype, owned=True)
    return dataclasses.replace(model, example_inputs=built.example_inputs, notes=(*built.notes, *model.notes))


def _no_target(target: str, path: Path) -> TargetError:
    if path.suffix in _WEIGHTS and path.is_file():
        return TargetError(
            f"{target}: {_WEIGHTS[path.suffix]}",
            "Give the Python file or the transformers config.json of the model; weights are never needed.",
        )
    if path.is_file():
        return TargetError(
            f"{target}: neither a Python file, a transformers config.json nor an exported program.",
            "Give mymodel.py, mymodel.py:attr, a folder that holds config.json, or model.pt2.",
        )
    return TargetError(
        f"{target}: no such file, folder or module.",
        _similar_files(path) or _TARGETS,
    )


_TARGETS = "Give mymodel.py, package.module:attr, a folder that holds config.json, or hf:ORG/NAME."


_PICKLE = "a pickle file: loading it runs whatever code its author put there, so fxroof does not."
_WEIGHTS = {
    ".safetensors": "weights only: there is no model code in it to analyse.",
    ".gguf": "weights only: there is no PyTorch model code in it to analyse.",
    ".onnx": "an ONNX graph: fxroof reads PyTorch models.",
    **dict.fromkeys((".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".tar"), _PICKLE),
}


def _from_config(target: str, place: str, dtype: str, attention: str, trust_remote_code: bool) -> Model:
    """A transformers model from `config.json` (a file, a folder, or a name on the hub)."""
    transformers = _transformers(place)
    content = _config_content(place, transformers)
    settings = settings_of(content, place)
    _refuse_remote_code(place, content, transformers, trust_remote_code)
    notes: list[str] = []
    try:
        cached = {} if Path(place).exists() else _cached(place, transformers)
        config = transformers.AutoConfig.from_pretrained(place, **cached, **_remote(content, trust_remote_code))
    except Exception as error:
        raise TargetError(f"{place}: transformers cannot read this config: {first_line(error)}") from error
    wanted = DTYPES.get(dtype) or _stored_dtype(config)
    if wanted is None:
        wanted = torch.bfloat16
        notes.append("the config names no dtype; bfloat16 assumed")
    if settings is not None:
        wanted, overridden = compute_dtype(settings, wanted)
        notes += overridden
    try:
        with building(), contextlib.redirect_stdout(sys.stderr):
            # left to itself transformers takes SDPA wherever the architecture supports it
            chosen = {"attn_implementation": attention} if attention == "eager" else {}
            build = _constructor(transformers, config, content, trust_remote_code)
            module = build(config, dtype=wanted, **chosen)
    except FxroofError:
        raise
    except Exception as error:
        raise TargetError(
            f"{place}: transformers cannot build a model from this config: {first_line(error)}"
        ) from error
    taken = getattr(module.config, "_attn_implementation", attention)
    if taken != attention:
        notes.append(f"transformers runs this architecture with {taken} attention")
    packed = convert(module, settings, place) if settings is not None else None
    if packed is not None:
        notes += packed.notes
    model = _model(module, _config_name(target, place), target, "as-is", owned=True)
    notes.append(f"transformers {transformers.__version__}: {type(module).__name__}")
    return dataclasses.replace(model, packed=packed, notes=(*notes, *model.notes))


def _constructor(
    transformers: Any, config: Any, content: Mapping[str, Any], trust_remote_code: bool
) -> Callable[..., Any]:
    """What builds a config's model: the class that it names, else its type's class for the likeliest task."""
    remote = _remote(content, trust_remote_code)
    if remote:
        names = [n for n in content["auto_map"] if n.startswith("AutoModel") and hasattr(transformers, n)]
        preferred = next((n for n in names if n == "AutoModelForCausalLM"), names[0] if names else "AutoModel")
        auto = getattr(transformers, preferred)
        return functools.partial(auto.from_config, **remote)
    for name in getattr(config, "architectures", None) or ():
        named: Any = getattr(transformers, name, None)
        if isinstance(config, getattr(named, "config_class", None) or ()):
            return named._from_config  # type: ignore[no-any-return]  # transformers is untyped here
    tasks = ["CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", *_TASKS]
    if getattr(config, "is_encoder_decoder", False):
        tasks.remove("CAUSAL_LM")  # some types have a decoder alone there
    elif not getattr(config, "is_decoder", False) and type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        tasks.remove("CAUSAL_LM")  # encoders have a causal twin, for those who set is_decoder
    for task in tasks:
        mapping = getattr(transformers, f"MODEL_FOR_{task}_MAPPING", {})
        if type(config) in mapping:
            kind = mapping[type(config)]
            return (kind[0] if isinstance(kind, tuple) else kind)._from_config  # type: ignore[no-any-return]  # transformers is untyped here
    return transformers.AutoModel.from_config  # type: ignore[no-any-return]  # transformers is untyped here


_TASKS = (
    "IMAGE_TEXT_TO_TEXT", "ZERO_SHOT_IMAGE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION", "CTC", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "MULTIMODAL_LM",
)  # fmt: skip
"""Tasks after the language ones, in the order in which a config of several means them."""


def _refuse_remote_code(place: str, content: Mapping[str, Any], transformers: Any, trust_remote_code: bool) -> None:
    known = content.get("model_type") in transformers.CONFIG_MAPPING
    if content.get("auto_map") and not known and not trust_remote_code:
        raise TargetError(
            f"{place}: transformers {transformers.__version__} has no model of type {content.get('model_type')!r}; its "
            "repository brings Python code of its own, which fxroof does not run unasked.",
            "If you trust that code, add --trust-remote-code.",
        )


def _remote(content: Mapping[str, Any], trust_remote_code: bool) -> dict[str, Any]:
    return {"trust_remote_code": True} if trust_remote_code and content.get("auto_map") else {}


def _stored_dtype(config: Any) -> torch.dtype | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    return found if isinstance(found, torch.dtype) else None


def _config_name(target: str, place: str) -> str:
    if target.startswith(HUB):
        return place.rsplit("/", 1)[-1]
    path = Path(place).resolve()
    return path.name if path.is_dir() else path.parent.name


def _config_content(place: str, transformers: Any) -> dict[str, Any]:
    if not Path(place).exists():
        return _hub_content(place, transformers)
    file = Path(place) / "config.json" if Path(place).is_dir() else Path(place)
    if not file.is_file():
        raise TargetError(f"{file}: no such file.", "A folder target must hold a transformers config.json.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TargetError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict) or not (content.get("model_type") or content.get("architectures")):
        raise TargetError(f"{file}: neither a saved fxroof report nor a transformers config (it has no model_type).")
    return content


def _hub_content(name: str, transformers: Any) -> dict[str, Any]:
    try:
        content, _ = transformers.PreTrainedConfig.get_config_dict(name, **_cached(name, transformers))
    except Exception as error:
        raise _not_on_hub(name, error) from error
    if not content:
        raise TargetError(f"hf:{name}: this repository has no transformers config.json.")
    return dict(content)


def _cached(name: str, transformers: Any) -> dict[str, Any]:
    """What keeps transformers from asking the hub for what is on this disk; without a network it asks for long."""
    found = transformers.utils.cached_file(name, "config.json", local_files_only=True, **_QUIET)
    return {"local_files_only": True} if found else {}


_QUIET = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}


def _not_on_hub(name: str, error: Exception) -> TargetError:
    reasons = " ".join(str(e) for e in (error, error.__cause__, error.__context__) if e is not None)
    if "gated" in reasons.lower() or "401" in reasons or "403" in reasons:
        return TargetError(
            f"hf:{name}: the repository is gated, private or does not exist: {first_line(error)}",
            "Log in with `hf auth login` if you have access, or download its config.json and give the folder.",
        )
    if "not a valid model identifier" in reasons or "404" in reasons or "Repo id must" in reasons:
        return TargetError(f"hf:{name}: no such repository on the Hugging Face hub.", "Write it as hf:ORG/NAME.")
    return TargetError(
        f"hf:{name}: the config is not in the local cache and the hub cannot be reached.",
        "Check the network, or download the repository's config.json and give its folder.",
    )


def _transformers(place: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise TargetError(
            f"{place} is a transformers config, and transformers is not installed.",
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


def _similar_files(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=3)
    return f"Did you mean {' or '.join(str(path.parent / c) for c in close)}?" if close else ""
