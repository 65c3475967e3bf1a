"""The same model gives the same bytes, in every format: whatever the seed of hashes, wherever its folder lies."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from fxroof.analyzer.render.registry import formats
from support import ROOT

TINY = "GPT(GPTConfig(vocab_size=64, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=64))"


def analysed(folder, seed):
    """What the command writes for a model that is named relative to the folder that it runs in, by format."""
    folder.mkdir(parents=True)
    (folder / "mymodel.py").write_bytes((ROOT / "examples" / "mymodel.py").read_bytes())
    outputs = [f"--format={name}={name}.out" for name in formats()]
    asked = ["mymodel.py", "--init", TINY, "--gpu=b200", "--gpu=h100", "--input-len=16", "--output-len=4", *outputs]
    done = subprocess.run(
        [sys.executable, "-m", "fxroof.analyzer", "analyze", *asked, "--exit-zero", "--quiet", "--isolated"],
        cwd=folder,
        env=os.environ | {"PYTHONHASHSEED": str(seed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: (folder / f"{name}.out").read_bytes() for name in formats()}


def test_two_runs_of_a_model_write_the_same_bytes(tmp_path):
    with ThreadPoolExecutor() as pool:
        one, other = pool.map(analysed, [tmp_path / "a", tmp_path / "b" / "deeper"], [0, 4242])
    assert one["json"].count(b'"name": "') > 100
    for name in formats():
        assert one[name] == other[name], name
