"""What the rules find in models that nobody tuned for: the table in docs/findings.md.

Run by hand, about twenty minutes: python tests/survey/findings.py [ARCHITECTURE ...]. Without names it surveys all,
writes tests/data/findings.json and the table. What was read by hand, and whether it is true, is kept in
tests/data/findings_read.json: a finding is known by its rule, architecture and line.

Each architecture of transformers is built from its default config, of full width with few layers, in bfloat16, and run
at batch 1 over a prompt of 1,024 tokens, or over what its config says of images and sound.
"""

import json
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from causal_lms import LIMIT_SECONDS, ROOT, _cut, _limited, _line

DATA = ROOT / "tests" / "data" / "findings.json"
READ = ROOT / "tests" / "data" / "findings_read.json"
PAGE = ROOT / "docs" / "findings.md"
GPU = "h100_sxm"
LAYERS = 4

DECODERS = (
    "apertus", "bamba", "bloom", "codegen", "cohere", "cohere2", "ctrl", "ernie4_5", "exaone4", "falcon_mamba",
    "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj",
    "granite", "granitemoe", "helium", "jetmoe", "llama", "mamba", "mamba2", "mistral", "mixtral", "mpt", "nemotron",
    "olmo", "olmo2", "olmoe", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "smollm3", "stablelm", "starcoder2", "xglm",
)  # fmt: skip
ENCODERS = (
    "albert", "bert", "convnext", "dinov2", "distilbert", "electra", "modernbert", "mobilenet_v2", "resnet", "roberta",
    "segformer", "siglip_vision_model", "swin", "vit", "wav2vec2",
)  # fmt: skip
SEQUENCES = ("bart", "m2m_100", "t5", "whisper")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A finding, without what follows from the GPU's figures."""

    architecture: str
    code: str
    confidence: str
    phases: tuple[str, ...]
    module: str
    count: int
    line: str
    message: str
    share: float
    """The larger of the shares of a phase's estimate and bound that it saves."""

    @property
    def key(self) -> str:
        return f"{self.code} {self.architecture} {self.line}"


def survey(kind: str) -> list[Found]:
    """Everything that the rules find in an architecture."""
    from fxroof.analyzer.load import from_module
    from fxroof.analyzer.pipeline import analyze_model
    from fxroof.analyzer.scenario import Scenario

    # lengths are shortened where a model has fewer positions
    scenario = Scenario(batch_size=1, input_len=1024, output_len=64)
    (run,) = analyze_model(from_module(_build(kind), kind), gpus=[GPU], scenario=scenario).runs
    if run.rule_failures:
        raise RuntimeError(str(run.rule_failures))
    whole = {phase.name: phase.seconds for phase in run.phases}
    return [
        Found(
            architecture=kind,
            code=f.code,
            confidence=f.confidence.value,
            phases=f.phases,
            module=f.module,
            count=f.count,
            line=_place(f),
            message=f.message,
            share=round(
                max(
                    [
                        0.0,
                        *(s / whole[n].estimate for n, s in f.saving_seconds.items()),
                        *(s / whole[n].bound for n, s in f.saving_bound_seconds.items()),
                    ]
                ),
                4,
            ),
        )
        for f in run.findings
    ]


def _place(finding: Any) -> str:
    file = finding.library_file or finding.file
    line = finding.library_line or finding.line
    parts = Path(file).parts
    if "transformers" in parts:
        file = "/".join(parts[len(parts) - parts[::-1].index("transformers") - 1 :])
    return f"{file}:{line}" if file else ""


def _build(kind: str) -> Any:
    import torch
    import transformers
    from fxroof.analyzer.meta import building
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind]()
    for part in {id(p): p for p in (config, config.get_text_config())}.values():
        _cut(part, LAYERS)
    if kind in DECODERS:
        auto: Any = transformers.AutoModelForCausalLM
    elif kind in SEQUENCES:
        auto = transformers.AutoModelForSpeechSeq2Seq if kind == "whisper" else transformers.AutoModelForSeq2SeqLM
    else:
        auto = transformers.AutoModel
    with building():
        return auto.from_config(config, dtype=torch.bfloat16)


def _page(found: list[Found], kinds: list[str], failed: dict[str, str], versions: str) -> str:
    read = json.loads(READ.read_text()) if READ.exists() else {}
    codes = sorted({f.code for f in found})
    lines = [
        "# What the rules find in models that nobody tuned for",
        "",
        "Written by `python tests/survey/findings.py`; do not edit. Architectures of transformers at their default",
        f"config with {LAYERS} layers, bfloat16, batch 1, 1,024 prompt tokens, run eagerly on `{GPU}`, every phase.",
        "",
        f"{versions}: {len(kinds) - len(failed)} architectures of {len(kinds)}, {len(found)} findings.",
        "A sample of each rule's findings was read against the source lines that they name, by readers who had not",
        "written the rules. True means: the waste is there, line and words are right, the remedy does the same with",
        "less, and it is no noise. The causes of what was false were then mended. The last two columns are of the",
        "rules as they are now: which of the false ones are still reported at their line, and the share of true ones",
        "among what was read and is reported; what was reported at another line is not read anew.",
        "",
        "| rule | findings | architectures | read | true | precision as read | false, still reported | precision now |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for code in sorted({*codes, *(key.split()[0] for key in read)}):
        mine = [f for f in found if f.code == code]
        verdicts = {key: verdict["true"] for key, verdict in read.items() if key.split()[0] == code}
        left = [_holds(read[f.key]) for f in mine if f.key in verdicts]
        cells = (
            *(code, len(mine), len({f.architecture for f in mine}), len(verdicts), sum(verdicts.values())),
            *(_share(list(verdicts.values())), left.count(False), _share(left)),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if failed:
        lines += ["", "Not analysed: " + "; ".join(f"{kind} ({why})" for kind, why in failed.items()) + "."]
    lines += ["", "## What fired where", "", "| architecture | rules, with the number of findings |", "|---|---|"]
    for kind in kinds:
        counts = {c: sum(f.code == c for f in found if f.architecture == kind) for c in codes}
        told = ", ".join(f"{c} {n}" if n > 1 else c for c, n in counts.items() if n)
        lines.append(f"| {kind} | {told or ('not analysed' if kind in failed else 'nothing')} |")
    now = {f.key for f in found}
    false = [(key, verdict["why"]) for key, verdict in sorted(read.items()) if not _holds(verdict) and key in now]
    if false:
        lines += [
            "",
            "## What was read, is false, and is still reported",
            "",
            *(f"- {key}: {why}" for key, why in false),
        ]
    return "\n".join(lines) + "\n"


def _holds(verdict: dict[str, Any]) -> bool:
    """Whether a finding is true as the rules are now: `mended` ones say something else at the same line."""
    return bool(verdict["true"] or verdict.get("mended"))


def _share(verdicts: list[bool]) -> str:
    return f"{sum(verdicts) / len(verdicts):.0%}" if verdicts else ""


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    kinds = sys.argv[1:] or [*DECODERS, *ENCODERS, *SEQUENCES]
    found: list[Found] = []
    failed: dict[str, str] = {}
    for kind in kinds:
        start = time.perf_counter()
        try:
            with _limited():
                more = survey(kind)
        except TimeoutError:
            failed[kind] = f"took more than {LIMIT_SECONDS} s"
        except Exception as error:
            failed[kind] = _line(error)
        else:
            found += more
            for f in more:
                print("  ", f.code, f.line, f.module, f"x{f.count}", f"{f.share:.1%}", f.message[:90])
        print(f"{time.perf_counter() - start:6.1f} s {kind} {failed.get(kind, '')}", flush=True)
    if len(sys.argv) < 2:
        versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
        DATA.write_text(json.dumps([asdict(f) for f in found], indent=1) + "\n")
        PAGE.write_text(_page(found, kinds, failed, versions))


if __name__ == "__main__":
    main()
