"""How much fxroof adds to torch.export, how much memory it needs, how fast it answers without torch.

Run by hand: python tests/benchmarks/speed.py [--rounds 3]. Ratios are of medians measured in turn in one run, so the
machine's speed cancels out. Goals: analysis of a 70B over bare torch.export of the same graphs <= 1.15; pricing a saved
report again, which is all that comes after the trace (kernels, fusion, caches, estimates, memory), <= 0.10 of it; peak
memory of a 405B analysis < 2 GB; all rules on a 70B < 2 s; `--help` and `gpus` < 0.3 of `import torch`.
"""

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "models" / "configs"


def analysis_over_export(name: str, rounds: int) -> None:
    import torch
    from fxroof.analyzer.load import load
    from fxroof.analyzer.pipeline import analyze_model, reprice
    from fxroof.analyzer.review import Selection, load_rules
    from fxroof.analyzer.scenario import Scenario
    from fxroof.analyzer.workload import plan

    model = load(str(CONFIGS / name))
    programs = plan(model, Scenario()).programs
    nothing = Selection(ignore=tuple(rule.code for rule in load_rules()[0]))
    ours, bare, again, rules = [], [], [], []
    for turn in range(rounds + 1):
        start = time.perf_counter()
        report = analyze_model(model, gpus=["h100_sxm"], scenario=Scenario(), selection=nothing)
        middle = time.perf_counter()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for program in programs:
                torch.export.export(program.module, program.args, strict=False)
        end = time.perf_counter()
        reprice(report, gpus=["b200"], execution="compiled", selection=nothing)
        priced = time.perf_counter()
        reprice(report, gpus=["b200"], execution="compiled")
        reviewed = time.perf_counter()
        if turn:  # the first round warms caches up
            ours.append(middle - start)
            bare.append(end - middle)
            again.append(priced - end)
            rules.append((reviewed - priced) - (priced - end))
    a, b = statistics.median(ours), statistics.median(bare)
    print(f"{name}: analysis {a:.2f} s, bare export {b:.2f} s, ratio {a / b:.3f} (goal <= 1.15)")
    c = statistics.median(again)
    print(f"{name}: priced again in {c:.2f} s (goal < 0.5), {c / a:.3f} of the analysis (goal <= 0.10)")
    print(f"{name}: all rules in {statistics.median(rules):.2f} s (goal < 2)")


def peak_memory(name: str) -> None:
    code = (
        "import resource, sys; from fxroof.analyzer.pipeline import analyze; "
        f"analyze({str(CONFIGS / name)!r}, gpus=['b200']); "
        "print(max(resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print(f"{name}: peak memory {int(out.stdout) / 1e6:.2f} GB (goal < 2)")


def answers_without_torch(rounds: int) -> None:
    commands = {
        "import torch": [sys.executable, "-c", "import torch"],
        "fxroof --help": [sys.executable, "-m", "fxroof.analyzer", "--help"],
        "fxroof gpus": [sys.executable, "-m", "fxroof.analyzer", "gpus"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, capture_output=True, check=True)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds.pop("import torch"))
    for name, times in seconds.items():
        took = statistics.median(times)
        print(f"{name}: {took:.2f} s, import torch {base:.2f} s, ratio {took / base:.3f} (goal < 0.3)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="llama-3-70b")
    chosen = parser.parse_args()
    answers_without_torch(chosen.rounds)
    analysis_over_export(chosen.model, chosen.rounds)
    peak_memory("llama-3.1-405b")
