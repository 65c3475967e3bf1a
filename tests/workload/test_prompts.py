"""Cached prefixes and prefill in chunks, against prompts that go through whole."""

import pytest
from fxroof.analyzer.analysis import PhaseAnalysis, analyze_phase
from fxroof.analyzer.errors import FxroofError
from fxroof.analyzer.pipeline import analyze
from fxroof.analyzer.scenario import Scenario
from fxroof.hardware.catalog import load
from hypothesis import given
from hypothesis import strategies as st
from support import NO_RULES, TARGETS, traced

H100 = load("h100_sxm").gpu


def prefill(name: str, **lengths: int) -> PhaseAnalysis:
    return analyze_phase(traced(name, Scenario(**lengths)).graphs["prefill"], H100)[0]


@given(
    input_len=st.integers(1, 5000),
    prefix=st.integers(0, 4999),
    chunk=st.integers(0, 6000),
)
def test_chunks_add_up_to_the_prompt(input_len: int, prefix: int, chunk: int) -> None:
    if prefix >= input_len:
        return
    scenario = Scenario(input_len=input_len, prefix_len=prefix, chunk=chunk)
    new = input_len - prefix
    sizes = [min(chunk or new, new - start) for start in range(0, new, chunk or new)]
    assert scenario.prompt_turns == len(sizes)
    assert scenario.prompt_turns * scenario.prompt_len == pytest.approx(new, abs=scenario.prompt_turns / 2 + 1)
    # every token sees the tokens before its chunk: the mean chunk has the mean of what equal chunks see
    equal = new / len(sizes)
    mean = sum(prefix + i * equal for i in range(len(sizes))) / len(sizes)
    assert scenario.prompt_past == pytest.approx(mean, abs=1.5)


@pytest.mark.parametrize("name", ["llama-3-8b", "gptfast", "llama_reference", "mymodel"])
def test_chunks_do_the_work_of_the_whole_prompt_and_read_the_weights_again(name: str) -> None:
    whole, chunk = (prefill(name, input_len=96, output_len=32, chunk=n) for n in (0, 24))
    assert chunk.turns == 4
    assert chunk.tokens * 4 == whole.tokens
    # fewer pairs in attention, since no chunk meets what comes after it; more heads where each chunk asks for one
    assert 4 * chunk.flops.matmul == pytest.approx(whole.flops.matmul, rel=0.2)
    assert 4 * chunk.bytes.weight > 2 * whole.bytes.weight


def test_a_prefix_is_read_and_not_computed() -> None:
    whole, rest = (prefill("llama-3-8b", input_len=96, output_len=32, prefix_len=n) for n in (0, 64))
    assert rest.tokens == 32
    assert rest.floor.cache_read_bytes == pytest.approx(64 / 96 * whole.floor.cache_written_bytes, rel=0.05)


@pytest.mark.parametrize(
    ("target", "scenario", "said"),
    [
        (TARGETS["vit"], Scenario(chunk=8), "no part of a prompt can be there already"),
        (TARGETS["mymodel"], Scenario(input_len=64, prefix_len=64), "leaves nothing of a prompt of 64"),
        (TARGETS["nanogpt"], Scenario(input_len=64, prefix_len=8), "no part of a prompt can be there already"),
    ],
)
def test_where_it_makes_no_sense_it_is_refused(target: str, scenario: Scenario, said: str) -> None:
    with pytest.raises(FxroofError, match=said):
        analyze(target, gpu="h100", scenario=scenario, selection=NO_RULES, in_process=True)


def test_time_to_first_token_counts_every_chunk() -> None:
    report = analyze(
        TARGETS["mymodel"], gpu="h100", scenario=Scenario(input_len=96, chunk=32), selection=NO_RULES, in_process=True
    )
    (run,) = report.runs
    first = run.phases[0]
    assert run.serving is not None
    assert run.serving.ttft is not None
    assert run.serving.ttft.bound == pytest.approx(3 * first.seconds.bound)
    assert any("3 chunks of at most 32 tokens" in note for note in report.model.notes)
