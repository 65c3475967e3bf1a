"""Savings priced on a few layers are those of the whole model."""

import pytest
from findings.situations import situation
from fxroof.analyzer.finding import registered
from fxroof.analyzer.graph import Role
from fxroof.analyzer.load import load
from fxroof.analyzer.repetition import layers, without_layers
from fxroof.analyzer.review import load_rules
from fxroof.analyzer.rewrite import Draft, RewriteError
from fxroof.analyzer.savings import Change, Repricer, timed
from fxroof.analyzer.workload import plan
from support import SHORT, TARGETS, cut, trace_program, traced

load_rules()
pytestmark = pytest.mark.xdist_group("savings")  # one worker traces it
LAYERS = 16
"""As many as it takes for a few to be priced in the place of all; those between are alike however many they are."""


@pytest.fixture(scope="module")
def graphs():
    programs = plan(load(cut(TARGETS["llama-3-70b"], LAYERS)), SHORT).programs
    return {program.phase.name: trace_program(program) for program in programs}


def in_full(repricer, changes):
    situation = repricer.situation
    graph = repricer.graph(changes)
    return repricer.as_written - timed(graph, situation.gpu, situation.analysis.execution)


@pytest.mark.parametrize("execution", ["eager", "compiled"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_few_layers_stand_for_all(graphs, phase, execution):
    place = situation(graphs[phase], execution=execution)
    repricer = Repricer(place)
    assert repricer._short is not None
    tried = 0
    for rule in registered():
        matches = [m for m in rule.check(place) if m.rewrite is not None]
        changes = [Change(m.op, m.rewrite) for m in matches]
        if len(changes) < LAYERS:
            continue
        tried += 1
        ours, truth = repricer.saving(changes), in_full(repricer, changes)
        slack = 1e-3 * repricer.as_written.estimate
        assert ours.bound == pytest.approx(truth.bound, rel=0.02, abs=slack), rule.code
        assert ours.estimate == pytest.approx(truth.estimate, rel=0.02, abs=slack), rule.code
    assert tried


def test_a_layer_left_out_takes_its_work_along(graphs):
    graph = graphs["decode"]
    run = layers(graph, left=5)
    assert run.turns >= LAYERS - 1
    short = Draft(graph, without_layers(graph, run, 3)).finish()
    linears = [sum(op.target == "aten.linear.default" for op in g.ops) for g in (graph, short)]
    assert linears == [LAYERS * 7 + 1, LAYERS * 7 + 1 - 7 * (run.turns - 3)]
    made = {short.tensors[i].storage for op in short.ops for i in op.outputs}
    given = {i for i, s in enumerate(short.storages) if s.role is not Role.ACTIVATION}
    assert all(short.tensors[i].storage in made | given for op in short.ops for i in op.inputs)


def test_a_remedy_that_leans_on_a_layer_left_out_is_refused(graphs):
    graph = graphs["decode"]
    run = layers(graph, left=5)
    part = without_layers(graph, run, 3)
    gone = graph.ops[run.start + 5 * run.period + 1]
    draft = Draft(graph, part)
    wanted = gone.outputs[0]
    other = next(i for i in part.ops[:100] if graph.ops[i].outputs and graph.ops[i].target == gone.target)
    draft.substitute(graph.ops[other].outputs[0], wanted)
    with pytest.raises(RewriteError, match="left out"):
        draft.finish()


def test_small_models_are_priced_whole():
    assert Repricer(situation(traced("llama-3-8b").graphs["decode"]))._short is None
