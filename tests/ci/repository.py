"""Git repositories in temporary folders, with a small model in two versions: what tests of CI have in common."""

import os
import subprocess
from pathlib import Path

from support import ROOT

WHOLE = (
    (ROOT / "examples" / "mymodel.py").read_text(encoding="utf-8").replace("n_layers: int = 24", "n_layers: int = 2")
)
FAST = "return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))"
SLOW = "return self.down_proj((F.silu(self.gate_proj(x)) * self.up_proj(x)).float().to(x.dtype))"

_MLP = WHOLE[WHOLE.index("class MLP(") : WHOLE.index("class Block(")]
LAYERS = "import torch.nn as nn\nimport torch.nn.functional as F\nfrom torch import Tensor\n\n\n" + _MLP.replace(
    "config: GPTConfig", "config"
)
"""The model's MLP as a module of a package, `mylayers.mlp`."""
MODEL = WHOLE.replace(_MLP, "").replace(
    "from torch import Tensor\n", "from mylayers.mlp import MLP\nfrom torch import Tensor\n"
)
"""The rest of the model, which imports it."""

_IDENTITY = {"GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@example.com"}
_IDENTITY |= {name.replace("AUTHOR", "COMMITTER"): value for name, value in _IDENTITY.items()}
_ALONE = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, **_IDENTITY}


def git(folder: Path, *arguments: str) -> str:
    """What git prints; whatever this machine's settings are, they do not matter."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | _ALONE
    done = subprocess.run(["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def commit(folder: Path, files: dict[str, str], message: str = "change") -> str:
    """Write files, commit all, and say which commit that is."""
    if not (folder / ".git").exists():
        folder.mkdir(parents=True, exist_ok=True)
        git(folder, "init", "--quiet", "--initial-branch=main")
    put(folder, files)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", message)
    return git(folder, "rev-parse", "HEAD")
