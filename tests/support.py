"""What several tests need: the models the tool must run on, traced once a session."""

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fxroof.analyzer.graph import Graph
from fxroof.analyzer.load import Model, load
from fxroof.analyzer.scenario import Scenario
from fxroof.analyzer.trace import trace
from fxroof.analyzer.workload import Program, Workload, plan

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "tests" / "models"
CONFIGS = MODELS / "configs"

SHORT = Scenario(batch_size=2, input_len=96, output_len=32)

TARGETS = {
    "mymodel": str(ROOT / "examples" / "mymodel.py"),
    "nanogpt": f"{MODELS / 'nanogpt_like.py'}:build",
    "gptfast": f"{MODELS / 'gptfast_like.py'}:build",
    "llama_reference": f"{MODELS / 'llama_reference_like.py'}:build_on_cuda",
    "moe": str(MODELS / "moe_like.py"),
    "vit": str(MODELS / "vit.py"),
    "vit_mha": f"{MODELS / 'vit_mha.py'}:build_mha",
    "vit_encoder": f"{MODELS / 'vit_mha.py'}:build",
    "resnet18": f"{MODELS / 'resnet.py'}:resnet18",
    "resnet50": f"{MODELS / 'resnet.py'}:resnet50",
    "gpt2": str(CONFIGS / "gpt2"),
    "llama-3-8b": str(CONFIGS / "llama-3-8b"),
    "mistral-7b": str(CONFIGS / "mistral-7b-v0.1"),
    "gemma-2-9b": str(CONFIGS / "gemma-2-9b"),
    "phi-3-mini": str(CONFIGS / "phi-3-mini"),
    "qwen3-8b": str(CONFIGS / "qwen3-8b"),
    "mixtral-8x7b": str(CONFIGS / "mixtral-8x7b"),
    "qwen3-30b-a3b": str(CONFIGS / "qwen3-30b-a3b"),
    "llama-3-70b": str(CONFIGS / "llama-3-70b"),
    "llama-3.1-405b": str(CONFIGS / "llama-3.1-405b"),
}
TOKEN_MODELS = tuple(n for n in TARGETS if not n.startswith(("vit", "resnet")))


@dataclass(frozen=True, slots=True)
class Traced:
    """A model, its programs and its graphs by phase."""

    model: Model
    workload: Workload
    graphs: dict[str, Graph]

    def program(self, phase: str) -> Program:
        return next(p for p in self.workload.programs if p.phase.name == phase)


LAYERS = 4
"""Layers that published configs are cut to in most tests: every layer is the same program."""


@functools.cache
def traced(name: str, scenario: Scenario = SHORT, *, whole: bool = False) -> Traced:
    """A model with its graphs; transformers configs cut to a few layers unless the `whole` is asked for."""
    target = TARGETS[name]
    if Path(target).is_dir() and not whole:
        config = json.loads((Path(target) / "config.json").read_text())
        config["n_layer" if "n_layer" in config else "num_hidden_layers"] = LAYERS
        target = str(Path(tempfile.mkdtemp()) / name)
        Path(target).mkdir()
        (Path(target) / "config.json").write_text(json.dumps(config))
    model = load(target)
    workload = plan(model, scenario)
    return Traced(model, workload, {p.phase.name: trace_program(p) for p in workload.programs})


def trace_program(program: Program) -> Graph:
    return trace(program.module, program.args, phase=program.phase, cache=program.cache, prefix=program.prefix)
