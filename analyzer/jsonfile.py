"""JSON in files of fxroof's own, in and out: whatever the file or the text holds, an error that says what is wrong."""

import codecs
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from .errors import FxroofError

_Kind = TypeVar("_Kind")


def content(path: Path) -> bytes:
    """What a file holds; of one that does not begin as JSON only the beginning: a device may have no end.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(_BEGINNING)
        begins = not start.isascii() or start.lstrip()[:1] in (b"{", b"[", b"")
        return start + file.read() if begins and b"\0\0" not in start else start


_BEGINNING = 64


def decoded(octets: bytes | str, kind: type[_Kind], failure: Callable[[str], FxroofError]) -> _Kind:
    """The value of a type that a JSON text stands for; a key that is there twice has its last value.

    Args:
        octets: the text.
        kind: the type.
        failure: makes the error of what is wrong.
    """
    try:
        return msgspec.json.decode(_utf8(octets), type=kind)
    except RecursionError as error:
        raise failure("it is nested too deeply") from error
    except (msgspec.MsgspecError, UnicodeError) as error:
        said = str(error)
        raise failure(said if len(said) <= _LONGEST else f"{said[:_LONGEST]}…") from error


_LONGEST = 300


def encoded(value: object) -> str:
    """A value as JSON text that `decoded` reads; the same bytes for the same value."""
    try:
        octets = msgspec.json.encode(value)
    except UnicodeEncodeError:  # a file name that is no UTF-8 has no place in JSON but as an escape
        octets = msgspec.json.encode(_without_surrogates(msgspec.to_builtins(value)))
    return msgspec.json.format(octets, indent=1).decode() + "\n"


def encodable(text: str) -> str:
    """The text with lone surrogates, which have no octets, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _utf8(octets: bytes | str) -> bytes | str:
    """The text without a mark of its encoding; some shells write UTF-16 into a file."""
    if isinstance(octets, str):
        return octets
    if octets.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return octets.decode("utf-16")
    return octets.removeprefix(codecs.BOM_UTF8)


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, dict):
        return {encodable(key): _without_surrogates(item) for key, item in value.items()}
    return [_without_surrogates(item) for item in value] if isinstance(value, list | tuple) else value
