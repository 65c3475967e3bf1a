"""A saved torch.export program (`.pt2`) -> an ExportedProgram, without running what its author may have put there.

torch.export.load unpickles some payloads without restriction, evaluates shape expressions as Python, and looks
operators up by dotted name. So the archive is read first, and refused where it holds more than a program and tensors.
"""

import ast
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from .errors import TargetError
from .meta import on_meta

_TARGET = re.compile(
    r"torch\.ops\.\w+\.\w+(\.\w+)?|torch\.(sym_\w+|ops\.higher_order\.\w+)|math\.\w+"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_)"
)
_FILE_OPS = re.compile(r"torch\.ops\.\w*\.(from_file|save|load)\w*(\.\w+)?")
_PAYLOAD = re.compile(r"(weight|tensor)_\d+|[\w.-]+_config\.json")
_WORD = re.compile(r"[A-Za-z_]\w*")
_SYMBOLIC = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Constant, ast.Name, ast.Call, ast.keyword,
    ast.Tuple, ast.List, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context,
)  # fmt: skip


def read(path: Path) -> ExportedProgram:
    """Load a saved program.

    Raises:
        TargetError: not such a file, or one that could run code while it is read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_code(path, archive)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError) as error:
        raise TargetError(
            f"{path}: not a program saved by torch.export.save: {error}", "Save it again with torch.export.save."
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path)
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0][:300]
        raise TargetError(
            f"{path}: torch {torch.__version__} cannot read this program: {type(error).__name__}: {reason}",
            "Programs are read by the torch version that saved them; save it again with this one.",
        ) from error


def weights_of(program: ExportedProgram) -> nn.Module:
    """A module that holds a program's parameters and buffers, on meta and under their names."""
    root = nn.Module()
    for name, value in program.state_dict.items():
        owner = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if isinstance(value, nn.Parameter):
            owner.register_parameter(last, value)
        else:
            owner.register_buffer(last, value)
    return on_meta(root, owned=True)


def _refuse_code(path: Path, archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    parts = [n.split("/", 1)[-1] for n in names]
    if not any(p.startswith("models/") and p.endswith(".json") for p in parts):
        if any(p.startswith("data/aotinductor/") for p in parts):
            raise TargetError(
                f"{path}: an AOTInductor package holds compiled machine code and no graph to analyse.",
                "Save the exported program instead: torch.export.save(program, 'model.pt2').",
            )
        raise ValueError("it holds no models/*.json")
    for name, part in zip(names, parts, strict=True):
        stored = part.startswith(("data/weights/", "data/constants/"))
        if part.startswith("data/aotinductor/") or (stored and not _PAYLOAD.fullmatch(Path(part).name)):
            raise _refused(path, f"{part} is a pickle or machine code")
        if stored and part.endswith(".json"):
            for tensor, payload in json.loads(archive.read(name))["config"].items():
                if payload.get("use_pickle") or not payload.get("tensor_meta"):
                    raise _refused(path, f"`{tensor}` is stored as a pickle")
        if part.startswith("models/") and part.endswith(".json"):
            for where, text in _texts(json.loads(archive.read(name))):
                if where == "expr_str" and not _is_arithmetic(text):
                    raise _refused(path, f"a shape expression is more than arithmetic: {text[:80]}")
                if where == "target" and "." in text and (not _TARGET.fullmatch(text) or _FILE_OPS.fullmatch(text)):
                    raise _refused(path, f"it calls {text[:80]}, which is no tensor operator")


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, str):
                yield key, item
            else:
                yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _is_arithmetic(text: str) -> bool:
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _SYMBOLIC):
            return False
        # sympy's own functions and classes begin with a capital; Python's that do harm do not
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id[:1].isupper()):
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not _WORD.fullmatch(node.value):
            return False
        if isinstance(node, ast.Name) and node.id.startswith("_"):
            return False
    return True


def _refused(path: Path, reason: str) -> TargetError:
    return TargetError(
        f"{path}: refused, because reading it could run code that came with the file: {reason}.",
        "Analyse the Python file that the program was exported from.",
    )
