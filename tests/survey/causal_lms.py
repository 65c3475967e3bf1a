"""Every causal-LM architecture of transformers at small size, in both phases: the table in docs/architectures.md.

Run by hand, about ten minutes: python tests/survey/causal_lms.py. It writes tests/data/causal_lms.json and the table.
`survey(type)` is what the tests call for a sample of architectures.

A default config is cut to as few layers as still run: layers of different kinds alternate in many architectures.
"""

import contextlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
DATA = ROOT / "tests" / "data" / "causal_lms.json"
PAGE = ROOT / "docs" / "architectures.md"
LIMIT_SECONDS = 240
LAYER_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one architecture.

    `runs_on_meta`: transformers' own forward runs on the meta device; what cannot is nobody's to trace.
    """

    type: str
    runs_on_meta: bool
    analysed: bool
    phases: tuple[str, ...] = ()
    cache: str = ""
    unpriced: tuple[str, ...] = ()
    reason: str = ""


def architectures() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def survey(kind: str) -> Result:
    """Build a small model of an architecture and analyse prefill and decode."""
    reason = ""
    for layers in (2, 4, 8, None):
        try:
            model = _build(kind, layers)
        except Exception as error:
            reason = reason or f"transformers cannot build its default config: {_line(error)}"
            continue
        result = _analyse(kind, model, runs_on_meta=_runs(model))
        if result.analysed:
            return result
        reason = result.reason
        runs = result.runs_on_meta
        if layers is None:
            return Result(type=kind, runs_on_meta=runs, analysed=False, reason=reason)
    return Result(type=kind, runs_on_meta=False, analysed=False, reason=reason)


def _build(kind: str, layers: int | None) -> Any:
    import torch
    import transformers
    from fxroof.analyzer.meta import building
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind]()
    text = config.get_text_config()
    if getattr(text, "is_decoder", None) is False:
        text.is_decoder = True
    if layers is not None:
        _cut(text, layers)
    with building():
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _cut(config: Any, layers: int) -> None:
    name = next((n for n in LAYER_FIELDS if isinstance(getattr(config, n, None), int)), None)
    if name is None or getattr(config, name) <= layers:
        return
    before = getattr(config, name)
    for field, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == before:
            setattr(config, field, _one_of_each(value, layers))
    setattr(config, name, layers)


def _one_of_each(kinds: Any, layers: int) -> Any:
    """As many entries as layers, every kind among them where that is possible, in the order of first appearance."""
    try:
        firsts = list(dict.fromkeys(kinds))[:layers]
    except TypeError:
        return kinds[:layers]
    return type(kinds)([*firsts, *kinds[: layers - len(firsts)]])


def _runs(model: Any) -> bool:
    import torch
    from fxroof.analyzer.meta import on_meta

    try:
        with torch.no_grad():
            on_meta(model)(torch.empty(1, 16, dtype=torch.int64, device="meta"))
    except Exception:
        return False
    return True


def _analyse(kind: str, model: Any, *, runs_on_meta: bool) -> Result:
    from fxroof.analyzer.load import from_module
    from fxroof.analyzer.pipeline import analyze_model
    from fxroof.analyzer.scenario import Scenario

    scenario = Scenario(batch_size=2, input_len=64, output_len=16, lengths_given=True)
    try:
        report = analyze_model(from_module(model, kind), gpus=["h100_sxm"], scenario=scenario)
    except Exception as error:
        return Result(type=kind, runs_on_meta=runs_on_meta, analysed=False, reason=_line(error))
    (run,) = report.runs
    return Result(
        type=kind,
        runs_on_meta=runs_on_meta,
        analysed=True,
        phases=tuple(phase.name for phase in run.phases),
        cache=report.model.cache_kind,
        unpriced=tuple(u.target for u in run.coverage.unpriced),
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {LIMIT_SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def _page(results: list[Result], versions: str) -> str:
    done = [r for r in results if r.analysed]
    able = [r for r in results if r.runs_on_meta]
    lines = [
        "# Architectures of transformers",
        "",
        "Written by `python tests/survey/causal_lms.py`; do not edit. Every causal-LM architecture at small size: its",
        "default config with few layers, batch 2, prompt 64, in bfloat16.",
        "",
        f"{versions}: {len(done)} of {len(results)} analysed; of the {len(able)} that transformers itself runs on the",
        f"meta device {sum(r.analysed for r in able)} ({sum(r.analysed for r in able) / max(1, len(able)):.0%}).",
        "",
        "| architecture | analysed | phases | KV cache | reason, or operators without a formula |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        why = ", ".join(r.unpriced) or r.reason.replace("|", "\\|")
        lines.append(f"| {r.type} | {'yes' if r.analysed else 'no'} | {', '.join(r.phases)} | {r.cache} | {why} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    results = []
    for kind in architectures() if len(sys.argv) < 2 else sys.argv[1:]:
        start = time.perf_counter()
        try:
            with _limited():
                result = survey(kind)
        except TimeoutError as error:
            result = Result(type=kind, runs_on_meta=True, analysed=False, reason=str(error))
        results.append(result)
        print(f"{time.perf_counter() - start:6.1f} s", result, flush=True)
    if len(sys.argv) < 2:
        versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
        DATA.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
        PAGE.write_text(_page(results, versions))


if __name__ == "__main__":
    main()
