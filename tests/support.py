"""What several tests need: the models the tool must run on, traced once a session."""

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fxroof.analyzer.graph import Graph
from fxroof.analyzer.load import Model, load
from fxroof.analyzer.review import Selection
from fxroof.analyzer.scenario import Scenario
from fxroof.analyzer.trace import trace
from fxroof.analyzer.workload import Program, Workload, plan

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "tests" / "models"
CONFIGS = MODELS / "configs"

NO_RULES = Selection(select=("TRC001",))
"""For tests of everything but findings: rules may have the model traced again."""

SHORT = Scenario(batch_size=2, input_len=96, output_len=32)

TARGETS = {
    "mymodel": str(ROOT / "examples" / "mymodel.py"),
    "nanogpt": f"{MODELS / 'nanogpt_like.py'}:build",
    "gptfast": f"{MODELS / 'gptfast_like.py'}:build",
    "llama_reference": f"{MODELS / 'llama_reference_like.py'}:build_on_cuda",
    "mingpt": str(MODELS / "mingpt_like.py"),
    "mamba_minimal": str(MODELS / "mamba_minimal_like.py"),
    "moe": str(MODELS / "moe_like.py"),
    "dit": f"{MODELS / 'dit_like.py'}:DiT_B_4",
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
    "gemma-3-27b": str(CONFIGS / "gemma-3-27b"),
    "mixtral-8x22b": str(CONFIGS / "mixtral-8x22b"),
    "llama-4-scout": str(CONFIGS / "llama-4-scout"),
    "olmoe-1b-7b": str(CONFIGS / "olmoe-1b-7b"),
    "mamba2-2.7b": str(CONFIGS / "mamba2-2.7b"),
    "jamba-1.5-mini": str(CONFIGS / "jamba-1.5-mini"),
    "qwen3-next-80b-a3b": str(CONFIGS / "qwen3-next-80b-a3b"),
    "bert-base": str(CONFIGS / "bert-base"),
    "flan-t5-xl": str(CONFIGS / "flan-t5-xl"),
    "whisper-large-v3": str(CONFIGS / "whisper-large-v3"),
    "vit-base-patch16-224": str(CONFIGS / "vit-base-patch16-224"),
    "clip-vit-l14": str(CONFIGS / "clip-vit-l14"),
    "llava-1.5-7b": str(CONFIGS / "llava-1.5-7b"),
    "qwen2-vl-7b": str(CONFIGS / "qwen2-vl-7b"),
}
INPUTS = {"dit": ("x=2x4x32x32", "t=2:int64", "y=2")}
TOKEN_MODELS = tuple(n for n in TARGETS if not n.startswith(("vit", "resnet", "dit")))


@dataclass(frozen=True, slots=True)
class Traced:
    """A model, its programs and its graphs by phase."""

    model: Model
    workload: Workload
    graphs: dict[str, Graph]

    def program(self, phase: str) -> Program:
        return next(p for p in self.workload.programs if p.phase.name == phase)


LAYERS = 4
"""Layers that deep models are cut to in most tests: every layer is the same program."""

_LAYERS_OF_EACH_KIND = {"gemma-3-27b": 6, "jamba-1.5-mini": 5}
_FEWER_LAYERS = {"mymodel": f"GPT(GPTConfig(n_layers={LAYERS}))"}
_LAYER_COUNTS = (
    "n_layer", "num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "depth",
)  # fmt: skip


@functools.cache
def traced(name: str, scenario: Scenario = SHORT, *, whole: bool = False) -> Traced:
    """A model with its graphs; deep ones are cut to a few layers unless the `whole` is asked for."""
    target = TARGETS[name]
    if Path(target).is_dir() and not whole:
        target = cut(target, _LAYERS_OF_EACH_KIND.get(name, LAYERS))
    model = load(target, init="" if whole else _FEWER_LAYERS.get(name, ""))
    workload = plan(model, scenario, inputs=INPUTS.get(name, ()))
    return Traced(model, workload, {p.phase.name: trace_program(p) for p in workload.programs})


def cut(folder: str, layers: int) -> str:
    """A copy of a config with that many layers in each of its stacks."""
    config = json.loads((Path(folder) / "config.json").read_text())
    if "text_config" in config:
        config["text_config"].setdefault("num_hidden_layers", layers)
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        part |= {key: layers for key in _LAYER_COUNTS if key in part}
        if "layer_types" in part:
            part["layer_types"] = part["layer_types"][:layers]
    copy = Path(tempfile.mkdtemp()) / Path(folder).name
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(config))
    return str(copy)


def trace_program(program: Program) -> Graph:
    return trace(program.module, program.args, phase=program.phase, cache=program.cache, prefix=program.prefix)
