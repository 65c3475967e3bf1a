"""Which files are the user's own, and how messages name them."""

import contextlib
import sysconfig
import traceback
from pathlib import Path

_FOREIGN = (str(Path(__file__).parent), sysconfig.get_path("stdlib"), "<")


def is_users(file: str) -> bool:
    """Whether a source file is neither fxroof's nor Python's nor an installed package's."""
    return not file.startswith(_FOREIGN) and not {"site-packages", "dist-packages"} & set(Path(file).parts)


def shown(file: str) -> str:
    """The path as the user would write it: relative where it lies below the working directory."""
    with contextlib.suppress(ValueError, OSError):
        return str(Path(file).relative_to(Path.cwd()))
    return file


def raised_at(error: BaseException) -> str:
    """` at mymodel.py:7`: the user's line that an error came from; empty when there is none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    return f" at {shown(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
