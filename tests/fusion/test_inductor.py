"""Fused traffic against Inductor's own count of the bytes that its kernels touch."""

import functools
import json
import shutil
import statistics
import subprocess
import sys

import pytest
from fusion.cases import CASES, program
from fxroof.analyzer.cost import bytes_by_role
from fxroof.analyzer.fusion import compiled_kernels
from fxroof.analyzer.pricing import price
from fxroof.analyzer.trace import from_exported
from fxroof.hardware import catalog
from support import ROOT
from survey.inductor_bytes import DATA

RECORDED = json.loads(DATA.read_text())["cases"]
PAGE = ROOT / "docs" / "fusion.md"
H100 = catalog.load("h100_sxm").gpu

COUNTED_OTHERWISE = {"cross_entropy": "a fused kernel that gathers is charged the whole of what it gathers from"}
"""Cases in which the count is not the traffic, and why."""


@functools.cache
def ours(name: str) -> int:
    graph = from_exported(program(name))
    kernels = compiled_kernels(graph, price(graph, H100))
    return sum(k.repeat * sum(map(sum, bytes_by_role(graph, k.cost).values())) for k in kernels)


def deviation(name: str) -> float:
    return ours(name) / RECORDED[name]["bytes"] - 1


@pytest.mark.parametrize("name", sorted(CASES.keys() - COUNTED_OTHERWISE))
def test_bytes_are_those_that_inductor_counts(name: str) -> None:
    assert abs(deviation(name)) < 0.10


def test_bytes_are_mostly_exactly_those_and_the_page_names_the_others() -> None:
    deviations = {name: abs(deviation(name)) for name in CASES}
    assert statistics.median(deviations.values()) < 0.001
    text = PAGE.read_text(encoding="utf-8")
    assert not [name for name, far in deviations.items() if far > 0.03 and f"| {name} |" not in text]


@pytest.mark.parametrize("name", ["residual_rms_norm", "swiglu_mlp"])
def test_inductor_still_counts_what_is_recorded(name: str) -> None:
    found = apart(f"count(program({name!r}))")
    assert f'"bytes": {RECORDED[name]["bytes"]}, "kernels": {RECORDED[name]["kernels"]}' in found


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler here")
def test_inductor_compiles_for_this_machine_what_it_plans_for_a_gpu() -> None:
    assert f'"bytes": {RECORDED["rms_norm"]["bytes"]}' in apart(
        "Count(bytes=count_as_compiled(program('rms_norm')), kernels=0)"
    )


def apart(expression: str) -> str:
    """A count made in a process of its own, since a compiler leaves its hooks in the one that it ran in."""
    code = (
        "import dataclasses, json; from fusion.cases import program; "
        "from survey.inductor_bytes import Count, count, count_as_compiled; "
        f"print(json.dumps(dataclasses.asdict({expression})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
