"""Phases of small models, ready for rules, and the comparison of a rewritten graph with a hand-remedied twin."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from fxroof.analyzer.analysis import analyze_phase
from fxroof.analyzer.finding import Rule, Situation
from fxroof.analyzer.graph import Graph
from fxroof.analyzer.load import from_module
from fxroof.analyzer.rewrite import Draft, Flow
from fxroof.analyzer.scenario import Scenario
from fxroof.analyzer.workload import Program, plan
from fxroof.hardware.catalog import load
from support import trace_program
from torch import nn

H100 = load("h100_sxm").gpu
SCENARIO = Scenario(batch_size=2, input_len=512, output_len=64)


class Phases(Mapping[str, Graph]):
    """The phases of a module, each traced when it is asked for."""

    def __init__(self, programs: Iterable[Program]) -> None:
        self._programs = {program.phase.name: program for program in programs}
        self._traced: dict[str, Graph] = {}

    def __getitem__(self, phase: str) -> Graph:
        if phase not in self._traced:
            self._traced[phase] = trace_program(self._programs[phase])
        return self._traced[phase]

    def __iter__(self) -> Iterator[str]:
        return iter(self._programs)

    def __len__(self) -> int:
        return len(self._programs)


def graphs_of(module: nn.Module, scenario: Scenario = SCENARIO, inputs: tuple[str, ...] = ()) -> Phases:
    """The phases of a module, to be traced."""
    with torch.device("meta"):
        return Phases(plan(from_module(module), scenario, inputs=inputs).programs)


def retracing(module: nn.Module, inputs: tuple[str, ...] = ()) -> Callable[[Scenario, str], Graph | None]:
    """A module's phases in other scenarios, as the pipeline hands them to rules."""
    return lambda scenario, phase: graphs_of(module, scenario, inputs).get(phase)


def situation(
    graph: Graph, *, execution: str = "eager", gpu: str = "h100_sxm", scenario: Scenario = SCENARIO, **more: Any
) -> Situation:
    """A phase on a GPU, as a rule sees it."""
    part = load(gpu).gpu
    analysis, costs = analyze_phase(graph, part, execution)
    return Situation(
        graph=graph,
        flow=Flow(graph),
        costs=costs,
        analysis=analysis,
        others={},
        gpu=part,
        scenario=scenario,
        **{"memory": None, **more},
    )


def rewritten(graph: Graph, rule: Rule) -> Graph:
    """The graph with every remedy of a rule that rewrites it."""
    draft = Draft(graph)
    for match in rule.check(situation(graph)):
        if match.rewrite is not None:
            match.rewrite(draft)
    return draft.finish()


def figures(graph: Graph) -> dict[str, float]:
    """What a rewritten graph and the trace of its twin have to agree in."""
    found: dict[str, float] = {}
    for execution in ("eager", "compiled"):
        phase, _ = analyze_phase(graph, H100, execution)
        found |= {
            f"{execution} bound": phase.seconds.bound,
            f"{execution} bytes": phase.executions.of(execution).bytes_l2,
        }
        found |= {"FLOPs": phase.flops.matmul_executed, "vector": phase.flops.vector, "bytes": phase.bytes.total}
    return found
