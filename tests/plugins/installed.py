"""A folder with a model, and packages installed beside it, for the command line to find."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class Installed:
    """Packages are modules that an entry point of one group names."""

    def __init__(self, folder: Path, group: str, model: str) -> None:
        self.folder, self.site, self.model, self.group = folder, folder / "site", folder / "model.py", group
        self.site.mkdir()
        self.model.write_text(model)

    def add(self, package: str, source: str) -> None:
        (self.site / f"{package}.py").write_text(source)
        info = self.site / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{self.group}]\n{package} = {package}\n")

    def fxroof(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fxroof.analyzer", *args],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.site)},
        )

    def analyze(self, *args: str) -> subprocess.CompletedProcess[str]:
        return self.fxroof("analyze", str(self.model), "--gpu", "h100", *args)

    def run(self, *args: str) -> dict[str, Any]:
        """The one run of an analysis that does not fail."""
        done = self.analyze("-f", "json", *args)
        assert done.returncode == 0, done.stderr
        run: dict[str, Any] = json.loads(done.stdout)["runs"][0]
        return run
