"""A report of many ops: all of it is written, read, compared and held against a baseline. Times are a benchmark's."""

from dataclasses import replace

import pytest
from benchmarks.reports import many
from fxroof.analyzer.baseline import applied, entries
from fxroof.analyzer.diff import diff
from fxroof.analyzer.pipeline import reprice
from fxroof.analyzer.render import _diff
from fxroof.analyzer.render.registry import Options
from fxroof.analyzer.report import from_json, to_json
from fxroof.analyzer.review import Selection

pytestmark = pytest.mark.xdist_group("big")

OPS = 5_000


@pytest.fixture(scope="module")
def big():
    return many(OPS)


def test_it_is_read_back(big):
    text = to_json(big)
    assert from_json(text) == big
    assert text.count("aten.mul.Tensor") >= 2 * OPS


def test_it_is_compared(big):
    assert not diff(big, big).failing
    ops = big.runs[0].phases[0].ops
    run = big.runs[0]
    changed = [replace(op, bytes_read=op.bytes_read + 10) if index % 2 else op for index, op in enumerate(ops)]
    head = replace(big, runs=(replace(run, phases=(replace(run.phases[0], ops=tuple(changed)),)),))
    (phase,) = diff(big, head).phases
    assert phase.head_work.bytes - phase.base_work.bytes == 10 * OPS // 2
    assert [module.module for module in phase.modules] == ["blocks.*.part"]
    for show in _diff.FORMATS.values():
        assert show(diff(big, head), head, Options())


def test_it_is_held_against_a_baseline(big):
    known = applied(big, entries(big))
    assert not [finding for finding in known.runs[0].findings if not finding.suppressed]


def test_it_is_priced_again(big):
    (run,) = reprice(big, gpus=["h100"], selection=Selection(select=("TRC001",))).runs
    # each op reads and writes 512 elements of two bytes
    assert (run.phases[0].bytes.read, run.phases[0].bytes.written) == (1024 * OPS, 1024 * OPS)
    assert len(run.phases[0].executions.eager.kernels) == OPS
