"""The command line. It alone prints, exits and looks at the environment. Only tracing a model imports torch.

Exit codes: 0 done, 1 findings as severe as --fail-on says, 2 what stopped the analysis, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from .console import Progress, deliver, options, print_error, print_note, silence_stdout
from .parameters import (
    DIFF_FORMATS,
    MODULE_RULES,
    REPORT_FORMATS,
    RULE_NAMES,
    SHARE,
    SIZE,
    complete_gpu,
)
from .scenario import MOST_GPUS, MOST_SECONDS, MOST_SEQUENCES, MOST_TOKENS, Scenario

if TYPE_CHECKING:
    from .config import Project
    from .limits import Budget
    from .report import Report
    from .review import Selection

EXIT_STOPPED = 2
EXIT_FOUND = 1
EXIT_INTERRUPTED = 130


class _Program(click.Group):
    """A group that keeps exit code 1 free for findings and prints one message for each failure."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *more: Any, **extra: Any) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        run = functools.partial(super().main, arguments, prog_name or "fxroof", *more, **extra)
        sys.exit(_exit_code(run, arguments))


def _exit_code(run: Callable[[], object], arguments: Sequence[str]) -> int:
    try:
        returned = run()
        sys.stdout.flush()
    except click.UsageError as error:
        return _usage_error(error)
    except click.ClickException as error:
        return _fail(error.format_message())
    except (KeyboardInterrupt, click.Abort):
        print_error("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        silence_stdout()
        return 0
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else EXIT_STOPPED if error.code else 0
    except Exception as error:  # whatever happens, a program must not confuse a crash with a finding
        return _unexpected(error, debug="--debug" in arguments)
    return returned if isinstance(returned, int) else 0


@click.group(
    cls=_Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=True,
    epilog='Shell completion: eval "$(_FXROOF_COMPLETE=bash_source fxroof)" (or zsh_source, fish_source).',
)
@click.version_option(package_name="fxroof", message="fxroof %(version)s")
def main() -> None:
    """Where must the time of a PyTorch model go on a GPU? Read from the model, without running it.

    \b
    Examples:
      fxroof analyze mymodel.py --gpu b200
      fxroof analyze mymodel.py:build --gpu h100 --batch-size 16 --input-len 4096
      fxroof analyze path/to/llama-3-8b --gpu h100 --gpu mi300x    a folder with config.json
      fxroof analyze mymodel.py --gpu b200 -f json -o report.json
      fxroof analyze report.json --gpu h200                        price it again, without torch
      fxroof gpus                                                  all GPUs
    """  # noqa: D301  # \b is click's mark for text that must not be wrapped


_PROJECT = "fxroof.project"
"""Where a context keeps the settings that were found."""


def _read_settings(ctx: click.Context, _: click.Parameter, file: Path | None) -> Path | None:
    """Take the defaults of all options from the settings: the command line wins."""
    if ctx.resilient_parsing or (file is None and ctx.params.get("isolated")):
        return file
    from .config import find, read

    project = find(Path.cwd()) if file is None else read(file)
    if project is not None:
        ctx.meta[_PROJECT] = project
        ctx.default_map = project.defaults()
    return file


_Command = TypeVar("_Command", bound=Callable[..., Any])


def _with_settings(command: _Command) -> _Command:
    """Options that say where settings come from; `_project` gives them."""
    for option in (
        click.option(
            "--config",
            type=click.Path(path_type=Path),
            callback=_read_settings,
            is_eager=True,
            metavar="FILE",
            help="Settings.  [default: the nearest fxroof.toml, or pyproject.toml with [tool.fxroof]]",
        ),
        click.option("--isolated", is_flag=True, is_eager=True, help="No settings: the command line alone."),
    ):
        command = option(command)
    return command


def _project(ctx: click.Context) -> Project | None:
    if ctx.params["isolated"] and ctx.params["config"] is not None:
        raise click.UsageError("--isolated reads no settings, --config reads some: give one of them.", ctx)
    found: Project | None = ctx.meta.get(_PROJECT)
    return found


def _judging(command: _Command) -> _Command:
    """Options that say what ends with exit code 1."""
    for option in (
        click.option("--exit-zero", is_flag=True, help="Exit with 0 whatever was found."),
        click.option(
            "--fail-on",
            type=click.Choice(["error", "warning", "info", "never"]),
            default="error",
            show_default=True,
            help="Findings of this severity and above end with exit code 1; of a comparison, new ones.",
        ),
        click.option(
            "--budget",
            "budgets",
            multiple=True,
            metavar="METRIC=LIMIT",
            help="Limit, as in 'decode.tpot=12 ms' or 'memory.total=80 GB'; repeat for several. Those of the settings "
            "hold where none is given.",
        ),
    ):
        command = option(command)
    return command


def _limits(texts: Sequence[str], project: Project | None) -> tuple[Budget, ...]:
    from .budgets import from_texts

    return from_texts(texts) if texts or project is None else project.budgets


def _sized(command: _Command) -> _Command:
    """Options that say how many sequences there are, and how long."""
    for option in (
        click.option(
            "--chunk",
            type=click.IntRange(0, MOST_TOKENS),
            default=0,
            show_default=True,
            help="Prefill in chunks of at most so many tokens a sequence; 0 for all at once.",
        ),
        click.option(
            "--prefix-len",
            type=click.IntRange(0, MOST_TOKENS),
            default=0,
            show_default=True,
            help="Tokens of the prompt whose KV cache is there already; prefill computes the others.",
        ),
        click.option(
            "--output-len",
            type=click.IntRange(1, MOST_TOKENS),
            default=256,
            show_default=True,
            help="Tokens generated for each; decode is priced at a context of input + output / 2.",
        ),
        click.option(
            "--input-len",
            type=click.IntRange(1, MOST_TOKENS),
            default=2048,
            show_default=True,
            help="Prompt tokens of each.",
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(1, MOST_SEQUENCES),
            default=1,
            show_default=True,
            help="Sequences in flight.",
        ),
    ):
        command = option(command)
    return command


def _built(command: _Command) -> _Command:
    """Options that say how a model is built and run."""
    for option in (
        click.option(
            "--memory-limit",
            type=SIZE,
            metavar="SIZE",
            help="Memory that it may take, such as 16GB; 0 for no limit.  [default: 80% of this machine's]",
        ),
        click.option(
            "--timeout",
            type=click.IntRange(0, MOST_SECONDS),
            default=600,
            show_default=True,
            metavar="SECONDS",
            help="Time that building and tracing the model may take; 0 for no limit.",
        ),
        click.option("--trust-remote-code", is_flag=True, help="Run code that a model repository brings."),
        click.option(
            "--assume",
            type=click.Choice(["balanced-routing"]),
            multiple=True,
            help="What may be assumed of data where control flow depends on it.",
        ),
        click.option(
            "--input",
            "inputs",
            multiple=True,
            metavar="NAME=SHAPE[:DTYPE]",
            help="Input of forward, such as x=1x3x224x224:bf16; repeat for each.",
        ),
        click.option(
            "--init", metavar="TEXT", default="", help="Expression that builds the model: 'Model(Args(dim=4096))'."
        ),
        click.option(
            "--attention",
            type=click.Choice(["sdpa", "eager"]),
            default="sdpa",
            show_default=True,
            help="Attention implementation of transformers models.",
        ),
        click.option(
            "--phase",
            type=click.Choice(["prefill", "decode", "forward", "encoder", "all"]),
            default="all",
            show_default=True,
            help="What to analyse: all that the model has, or one.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["as-is", "bf16", "fp16", "fp32"]),
            default="as-is",
            show_default=True,
            help="Type to convert floating-point weights to.",
        ),
    ):
        command = option(command)
    return command


@main.command()
@click.argument("targets", nargs=-1, metavar="[TARGET]...")
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_gpu,
    help="GPU to price for, or a TOML file; repeat to compare several.",
)
@click.option(
    "--scenario",
    "scenarios",
    multiple=True,
    metavar="NAME",
    help="Scenario of the settings; repeat for several.  [default: all of them]",
)
@_sized
@click.option(
    "--tp",
    type=click.IntRange(1, MOST_GPUS),
    default=1,
    show_default=True,
    help="GPUs that share every layer: matrices are cut as the model's plan says.",
)
@click.option(
    "--ep",
    type=click.IntRange(1, MOST_GPUS),
    default=1,
    show_default=True,
    help="GPUs that share the experts, each holding some whole; alone, or as many as --tp.",
)
@_built
@click.option(
    "--execution",
    type=click.Choice(["eager", "compiled"]),
    default="eager",
    show_default=True,
    help="Whose kernels are shown in detail: PyTorch's op by op, or a fusing compiler's. Both are summed up.",
)
@click.option(
    "--select",
    type=RULE_NAMES,
    multiple=True,
    help="Only these rules: codes, their beginnings, or names; several with commas.",
)
@click.option("--extend-select", type=RULE_NAMES, multiple=True, help="These rules besides those of --select.")
@click.option("--ignore", type=RULE_NAMES, multiple=True, help="Not these rules.")
@click.option(
    "--per-module-ignore",
    type=MODULE_RULES,
    multiple=True,
    help="Not these rules in modules of that path and all in them, as in 'blocks.*.attn=ATT001,FUS'.",
)
@click.option("--rules", "rule_files", multiple=True, metavar="FILE", help="A Python file with rules of your own.")
@click.option(
    "--min-saving",
    type=SHARE,
    default="1%",
    show_default=True,
    metavar="SHARE",
    help="Share of a phase that a finding has to save.",
)
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    help="File of findings that are known and do not count; see `fxroof baseline`.",
)
@_judging
@click.option("--top", type=click.IntRange(1, 1000), default=10, show_default=True, help="Rows of the hotspot table.")
@click.option(
    "--by",
    type=click.Choice(["op", "module"]),
    default="op",
    show_default=True,
    help="What a hotspot row is.",
)
@click.option(
    "-f",
    "--format",
    "formats",
    type=REPORT_FORMATS,
    multiple=True,
    default=("terminal",),
    show_default=True,
    help="Output format; =FILE writes it there; may be repeated.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write instead of standard output.")
@_with_settings
@click.option("-q", "--quiet", is_flag=True, help="No progress on standard error.")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure, and library warnings.")
@click.pass_context
def analyze(
    ctx: click.Context,
    /,
    targets: tuple[str, ...],
    gpus: tuple[str, ...],
    scenarios: tuple[str, ...],
    dtype: str,
    phase: str,
    attention: str,
    execution: str,
    init: str,
    inputs: tuple[str, ...],
    assume: tuple[str, ...],
    trust_remote_code: bool,
    timeout: int,
    memory_limit: int | None,
    select: tuple[tuple[str, ...], ...],
    extend_select: tuple[tuple[str, ...], ...],
    ignore: tuple[tuple[str, ...], ...],
    per_module_ignore: tuple[tuple[tuple[str, str], ...], ...],
    rule_files: tuple[str, ...],
    min_saving: float,
    baseline: Path | None,
    budgets: tuple[str, ...],
    fail_on: str,
    exit_zero: bool,
    top: int,
    by: str,
    formats: tuple[tuple[str, Path | None], ...],
    output: Path | None,
    quiet: bool,
    debug: bool,
    **_: object,
) -> int:
    """Say where a model's time goes on a GPU, phase by phase and line by line.

    \b
    Examples:
      fxroof analyze mymodel.py --gpu b200
      fxroof analyze mymodel.py:build --gpu h100 --gpu b200 --phase decode --batch-size 32
      fxroof analyze mymodel.py --gpu b200 -f json -o report.json
      fxroof analyze report.json --gpu h200

    What is not given on the command line is taken from the settings: targets, GPUs, scenarios, rules, budgets.

    TARGET is mymodel.py, mymodel.py:attr or package.module:attr (a module, or a class or function that
    gives one without arguments), a folder with a transformers config.json, hf:ORG/NAME, an exported
    program (.pt2), or a report saved with -f json, which is priced again without torch.

    The model's code runs in a process of its own, for as long and as large as --timeout and
    --memory-limit allow. Exit code 2 says that something, perhaps only one phase, was not analysed.
    """  # noqa: D301  # \b is click's mark for text that must not be wrapped
    outputs = _outputs(formats, output)
    for _format, file in outputs:
        _check_destination(file)
    project = _project(ctx)
    targets = targets or (project.targets() if project else ())
    if not targets:
        raise click.UsageError(
            "Missing argument 'TARGET': a model, such as mymodel.py. `fxroof init` writes settings that name one.", ctx
        )
    limits = _limits(budgets, project)
    from .baseline import applied, read

    known = read(baseline) if baseline else {}
    gpus = tuple(dict.fromkeys(gpus))
    from .review import Selection

    selection = Selection(
        select=tuple(chain(*select)),
        extend=tuple(chain(*extend_select)),
        ignore=tuple(chain(*ignore)),
        files=rule_files,
        modules=tuple(chain(*per_module_ignore)),
    )
    saved = _saved_report(targets)
    if saved is not None:
        _refuse_tracing_options(ctx, targets[0])
        report = _repriced(ctx, saved, gpus if _was_given(ctx, "gpus") else (), selection)
    elif not gpus:
        raise click.UsageError("Missing option '--gpu'. For example: --gpu h100; `fxroof gpus` lists all.", ctx)
    else:
        situations = _situations(ctx, project, scenarios)
        from .pipeline import analyze as analyze_target
        from .report import merged

        with Progress(quiet=quiet) as progress:
            report = merged(
                analyze_target(
                    target,
                    gpus=gpus,
                    scenarios=situations,
                    phase=phase,
                    dtype=dtype,
                    attention=attention,
                    execution=execution,
                    selection=selection,
                    least_saving=min_saving,
                    init=init,
                    inputs=inputs,
                    assume=assume,
                    trust_remote_code=trust_remote_code,
                    timeout=timeout,
                    memory_limit=memory_limit,
                    debug=debug,
                    progress=progress.say,
                )
                for target in dict.fromkeys(targets)
            )
    if baseline is not None:
        report = applied(report, known)
    if limits:
        from .budgets import judge

        report = replace(report, verdicts=judge(report, limits))
    from .render.registry import render

    for name, file in outputs:
        deliver(render(report, name, options(file, top=top, by=by)), file)
    for failure in report.failures:
        print_error(f"{failure.phase} was not analysed: {failure.message}", failure.hint)
    if report.failures:
        return EXIT_STOPPED
    return EXIT_FOUND if not exit_zero and _fails(report, fail_on) else 0


@main.command()
@click.argument("target", required=False)
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    default=("h100",),
    show_default=True,
    metavar="NAME",
    shell_complete=complete_gpu,
    help="GPU that the settings are to name; repeat for several.",
)
@click.option("--init", metavar="TEXT", default="", help="Expression that builds the model, as for analyze.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="fxroof.toml", show_default=True, help="File to write."
)
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on standard error.")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure, and library warnings.")
@click.pass_context
def init(
    ctx: click.Context,
    /,
    target: str | None,
    gpus: tuple[str, ...],
    init: str,
    output: Path,
    quiet: bool,
    debug: bool,
    *,
    force: bool,
) -> None:
    """Write commented settings that work for a model, with budgets a tenth above what it takes today.

    \b
    Examples:
      fxroof init mymodel.py --gpu b200
      fxroof init                                 where one file defines a model

    The model is analysed first; where that fails, nothing is written.
    """  # noqa: D301  # \b is click's mark for text that must not be wrapped
    _check_destination(output)
    if output.exists() and not force:
        raise click.UsageError(f"{output} is there already: --force writes over it, -o names another file.", ctx)
    from .starter import model_files, settings_text

    if target is None:
        files = [os.path.relpath(file) for file in model_files(Path.cwd())]
        if len(files) != 1:
            named = f"Several files define one: {', '.join(files[:5])}." if files else "No file here defines one."
            raise click.UsageError(f"Name the model: fxroof init mymodel.py. {named}", ctx)
        target = files[0]
    from .pipeline import analyze as analyze_target

    with Progress(quiet=quiet) as progress:
        report = analyze_target(
            target,
            gpus=gpus,
            scenarios=(Scenario(name="chat"),),
            init=init,
            debug=debug,
            progress=progress.say,
        )
    there = Path(target)
    beside = os.path.relpath(there, output.resolve().parent) if there.exists() else target
    deliver(settings_text(beside, report, init), output)
    print_note(f"{output} written. Now: fxroof analyze")


@main.command()
@click.argument("target")
@click.option(
    "--gpu",
    default="",
    metavar="NAME",
    shell_complete=complete_gpu,
    help="GPU to hold it against, or a TOML file.  [default: the catalogue's part of the device's name; on a CPU, what "
    "a quick calibration finds]",
)
@click.option(
    "--device", default="auto", show_default=True, help="cuda, cuda:1, cpu; auto takes CUDA where there is one."
)
@click.option("--scenario", "wanted", metavar="NAME", help="Scenario of the settings.  [default: the options' own]")
@_sized
@_built
@click.option("--compile", "compiled", is_flag=True, help="Also run what torch.compile makes of it.")
@click.option(
    "--runs", type=click.IntRange(3, 10_000), default=20, show_default=True, help="Times that each phase is run."
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.0, MOST_SECONDS),
    default=20.0,
    show_default=True,
    help="Time after which no further run of a phase begins.",
)
@click.option("--threads", type=click.IntRange(0, 4096), default=0, help="Threads of a CPU.  [default: torch's]")
@click.option("--no-kernels", is_flag=True, help="Time phases alone, not their ops.")
@click.option("--top", type=click.IntRange(1, 1000), default=10, show_default=True, help="Rows of the table of ops.")
@click.option(
    "-f", "--format", "format_", type=click.Choice(["terminal", "json"]), default="terminal", show_default=True
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write instead of standard output.")
@_with_settings
@click.option("-q", "--quiet", is_flag=True, help="No progress on standard error.")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure, and library warnings.")
@click.pass_context
def measure(
    ctx: click.Context,
    /,
    target: str,
    gpu: str,
    device: str,
    wanted: str | None,
    dtype: str,
    phase: str,
    attention: str,
    init: str,
    inputs: tuple[str, ...],
    assume: tuple[str, ...],
    timeout: int,
    memory_limit: int | None,
    runs: int,
    seconds: float,
    threads: int,
    top: int,
    format_: str,
    output: Path | None,
    *,
    trust_remote_code: bool,
    compiled: bool,
    no_kernels: bool,
    quiet: bool,
    debug: bool,
    **_: object,
) -> int:
    """Run a model on this machine, and hold what it takes against its bound and its estimate, op by op.

    \b
    Examples:
      fxroof measure mymodel.py
      fxroof measure mymodel.py --device cpu --gpu ./mycpu.toml --input-len 128
      fxroof measure path/to/llama-3-8b --compile -f json -o measured.json

    Weights are random; the model's code runs in a process of its own, as in analyze. docs/measure.md says how.
    """  # noqa: D301  # \b is click's mark for text that must not be wrapped
    _check_destination(output)
    from .clocked import Order
    from .measure import measure as measured
    from .measured import to_json
    from .render._measured import terminal
    from .request import Request

    (scenario,) = _situations(ctx, _project(ctx), (wanted,)) if wanted else _situations(ctx, None, ())
    request = Request(
        target=target,
        init=init,
        inputs=inputs,
        scenario=scenario,
        phase=phase,
        dtype=dtype,
        attention=attention,
        trust_remote_code=trust_remote_code,
        assume=assume,
    )
    order = Order(
        device=device,
        gpu=gpu,
        runs=runs,
        seconds=seconds,
        compile=compiled,
        kernels=not no_kernels,
        threads=threads,
    )
    with Progress(quiet=quiet) as progress:
        found = measured(request, order, timeout=timeout, memory_limit=memory_limit, debug=debug, progress=progress.say)
    deliver(to_json(found) if format_ == "json" else terminal(found, options(output, top=top)), output)
    for failure in found.failures:
        print_error(f"{failure.phase} was not measured: {failure.message}", failure.hint)
    return EXIT_STOPPED if found.failures else 0


@main.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), help="TOML file to write instead of standard output.")
@click.option(
    "--device", default="auto", show_default=True, help="cuda, cuda:1, cpu; auto takes CUDA where there is one."
)
@click.option("--quick", is_flag=True, help="Some ten seconds in place of a minute.")
@click.option("--threads", type=click.IntRange(0, 4096), default=0, help="Threads of a CPU.  [default: torch's]")
@click.option("-q", "--quiet", is_flag=True, help="No progress on standard error.")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")  # read where failures are told
def calibrate(output: Path | None, device: str, threads: int, *, quick: bool, quiet: bool, debug: bool) -> None:  # noqa: ARG001  # read where failures are told
    """Measure this machine: bandwidth, matmul rates, cache, launches. The file is one that --gpu takes.

    \b
    Examples:
      fxroof calibrate -o mygpu.toml
      fxroof analyze mymodel.py --gpu ./mygpu.toml
    """  # noqa: D301  # \b is click's mark for text that must not be wrapped
    _check_destination(output)
    with Progress(quiet=quiet) as progress:
        progress.say("importing torch")
        from .calibrate import FULL, QUICK, to_toml
        from .calibrate import calibrate as calibrated
        from .clock import device_of, on_threads

        with on_threads(threads):
            found = calibrated(device_of(device), QUICK if quick else FULL, progress.say)
    deliver(to_toml(found), output)


@main.group()
def baseline() -> None:
    """Findings that a project knows and has put up with.

    \b
    Examples:
      fxroof analyze mymodel.py --gpu b200 -f json=report.json
      fxroof baseline write report.json
      fxroof analyze mymodel.py --gpu b200 --baseline .fxroof-baseline.json
      fxroof baseline prune report.json
    """  # noqa: D301  # \b is click's mark for text that must not be wrapped


_BASELINE = click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    default=".fxroof-baseline.json",
    show_default=True,
    help="The file.",
)


@baseline.command()
@click.argument("report", type=click.Path(path_type=Path))
@_BASELINE
@_with_settings
def write(report: Path, baseline: Path, **_: object) -> None:
    """Write all findings of a saved REPORT into the file: they count no more, new ones do."""
    _check_destination(baseline)
    from .baseline import entries, to_text
    from .report import read_report

    deliver(to_text(entries(read_report(report))), baseline)


@baseline.command()
@click.argument("report", type=click.Path(path_type=Path))
@_BASELINE
@_with_settings
def prune(report: Path, baseline: Path, **_: object) -> None:
    """Take out of the file what a saved REPORT no longer shows; its other GPUs and phases stay."""
    _check_destination(baseline)
    from .baseline import pruned, read, to_text
    from .report import read_report

    deliver(to_text(pruned(read(baseline), read_report(report))), baseline)


@main.command(context_settings={"ignore_unknown_options": True})
@_with_settings
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="BASE.json HEAD.json | ARGUMENTS OF analyze")
@click.option("--base", "revision", metavar="REV", help="Git revision to compare with; analyses the target there.")
@click.option(
    "--head", "head_revision", metavar="REV", help="Git revision to compare.  [default: the files as they are]"
)
@click.option(
    "--save-reports",
    "folder",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Folder for base.json and head.json.",
)
@_judging
@click.option("--top", type=click.IntRange(1, 1000), default=10, show_default=True, help="Modules to show of a phase.")
@click.option(
    "-f",
    "--format",
    "formats",
    type=DIFF_FORMATS,
    multiple=True,
    default=("terminal",),
    show_default=True,
    help="Output format; =FILE writes it there; may be repeated.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write instead of standard output.")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
@click.pass_context
def diff(
    ctx: click.Context,
    /,
    arguments: tuple[str, ...],
    revision: str | None,
    head_revision: str | None,
    folder: Path | None,
    budgets: tuple[str, ...],
    fail_on: str,
    exit_zero: bool,
    top: int,
    formats: tuple[tuple[str, Path | None], ...],
    output: Path | None,
    debug: bool,
    **_: object,
) -> int:
    """Compare two reports, or two revisions: what became slower or faster, where, why, and which findings are new.

    \b
    Examples:
      fxroof diff base.json head.json
      fxroof diff base.json head.json --budget 'decode.tpot=12 ms' --budget 'memory.total=+2%'
      fxroof diff --base main mymodel.py --gpu b200
      fxroof diff --base origin/main -f terminal -f markdown=comment.md

    Reports are written by `fxroof analyze ... -f json=FILE`. With --base, everything that is no option of this command
    is handed to `fxroof analyze`, once in a checkout of that revision and once here; both sides use the settings that
    are here. Without budgets, no phase may take 2% longer. Exit code 1 says that a budget is broken, a finding as
    severe as --fail-on is new, or a phase can no longer be analysed.
    """  # noqa: D301  # \b is click's mark for text that must not be wrapped
    outputs = _outputs(formats, output)
    for _format, file in outputs:
        _check_destination(file)
    project = _project(ctx)
    limits = _limits(budgets, project)
    from .diff import diff as compared
    from .render import _diff
    from .report import read_report, to_json

    doubts: tuple[str, ...] = ()
    if revision is not None:
        before, after, doubts = _at_revisions(ctx, arguments, revision, head_revision, debug=debug)
    elif head_revision is not None:
        raise click.UsageError("--head names a revision: --base has to name one, too.", ctx)
    elif len(arguments) != 2 or any(argument.startswith("-") for argument in arguments):
        raise click.UsageError(
            "Give two saved reports, as in: fxroof diff base.json head.json; or one, fxroof diff --base main.", ctx
        )
    else:
        before, after = (read_report(Path(argument)) for argument in arguments)
    for name, report in (("base", before), ("head", after)):
        if folder is not None and report is not None:
            deliver(to_json(report), folder / f"{name}.json")
    found = compared(before, after, budgets=limits, fail_on=fail_on, doubts=doubts)
    for name, file in outputs:
        deliver(_diff.FORMATS[name](found, after, options(file, top=top)), file)
    if found.failing:
        return 0 if exit_zero else EXIT_FOUND
    return 0


def _at_revisions(
    ctx: click.Context, arguments: Sequence[str], base: str, head: str | None, *, debug: bool
) -> tuple[Report | None, Report, tuple[str, ...]]:
    """The reports of two revisions, None for a base that cannot be analysed, and why it cannot."""
    from .report import is_report

    named = next((argument for argument in arguments if is_report(Path(argument))), None)
    if named is not None:
        raise click.UsageError(f"{named} is a saved report: leave it out, or leave out --base.", ctx)
    from .revisions import NotAnalysedError, analysed, checked_out

    project = _project(ctx)
    overlay = (project.file,) if project is not None else ()
    handed = [*arguments, *(["--debug"] if debug else [])]
    # the settings that are here are used on both sides; a checkout has them at their place
    handed.append(f"--config={project.file.resolve()}" if project is not None else "--isolated")
    with contextlib.ExitStack() as checkouts:

        def folder_of(revision: str) -> Path:
            return checkouts.enter_context(checked_out(revision, Path.cwd(), overlay=overlay))

        before, after = folder_of(base), folder_of(head) if head is not None else Path.cwd()
        print_note(f"fxroof: analysing {head or 'the files as they are'}")
        found = analysed(handed, after, head or "the files as they are")
        print_note(f"fxroof: analysing {base}")
        try:
            return analysed(handed, before, base), found, ()
        except NotAnalysedError as error:
            return None, found, (f"the base was not analysed: {error.message}",)


@main.command()
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="The pages of all rules.")
@click.option("-f", "--format", "format_", type=click.Choice(["terminal", "json"]), default="terminal")
def rule(name: str | None, format_: str, *, everything: bool) -> None:
    """List the rules, or show the page of one.

    \b
    Examples:
      fxroof rule
      fxroof rule KVC001
      fxroof rule --all -f json
    """  # noqa: D301  # \b is click's mark for text that must not be wrapped
    from .render import _rules
    from .review import Selection, load_rules, selected

    rules, _ = load_rules()
    chosen = selected(rules, Selection(select=(name,))) if name else rules
    if format_ == "json":
        deliver(_rules.as_json(chosen), None)
    elif name or everything:
        deliver("\n".join(map(_rules.page, chosen)), None)
    else:
        deliver(_rules.listing(chosen, options(None)), None)


@main.command()
@click.argument("name", required=False, shell_complete=complete_gpu)
def gpus(name: str | None) -> None:
    """List the GPUs, or show all that is known of one.

    \b
    Examples:
      fxroof gpus
      fxroof gpus h100
      fxroof gpus mygpu.toml
    """  # noqa: D301  # \b is click's mark for text that must not be wrapped
    from ..hardware.catalog import CATALOG_VERSION, all_gpus, load
    from .render import _catalog

    how = options(None)
    if name is None:
        deliver(_catalog.catalog(all_gpus(), CATALOG_VERSION, how), None)
    else:
        resolved = load(name)
        deliver(_catalog.part(resolved.gpu, resolved.note, how), None)


_SCENARIO = ("batch_size", "input_len", "output_len", "prefix_len", "chunk", "tp", "ep")
"""Options of `analyze` that make a scenario."""


def _situations(ctx: click.Context, project: Project | None, wanted: Sequence[str]) -> tuple[Scenario, ...]:
    """The scenarios of the settings that are wanted, or the command line's; what is given there holds in each."""
    chosen = {name: ctx.params[name] for name in _SCENARIO if name in ctx.params}
    given = {name: value for name, value in chosen.items() if _was_given(ctx, name)}
    known = {scenario.name: scenario for scenario in project.settings.scenarios} if project else {}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        names = f"Known: {', '.join(known)}." if known else "The settings name none."
        raise click.UsageError(f"There is no scenario {unknown[0]!r}. {names}", ctx)
    if not known:
        return (Scenario(**chosen, lengths_given=not _LENGTHS.isdisjoint(given)),)
    found = []
    for name in dict.fromkeys(wanted or known):
        own = {key: value for key in _SCENARIO if (value := getattr(known[name], key)) is not None} | given
        found.append(Scenario(**{**chosen, **own}, name=name, lengths_given=not _LENGTHS.isdisjoint(own)))
    return tuple(found)


_LENGTHS = frozenset({"input_len", "output_len"})


def _saved_report(targets: Sequence[str]) -> Report | None:
    """The report in a .json file, or None where that is something else."""
    from .report import is_report, read_report

    found = [Path(target) for target in targets if is_report(Path(target))]
    if not found:
        return None
    if len(targets) > 1:
        raise click.UsageError(f"{found[0]} is a saved report: give it alone, or two to `fxroof diff`.")
    return read_report(found[0])


_PRICING = (
    "execution",
    "select",
    "extend_select",
    "ignore",
    "per_module_ignore",
    "rule_files",
    "min_saving",
)
"""Options that ask for a saved report to be priced again, as --gpu does."""


def _repriced(ctx: click.Context, saved: Report, gpus: Sequence[str], selection: Selection) -> Report:
    if not gpus and not any(_was_given(ctx, name) for name in _PRICING):
        return saved
    from .pipeline import reprice

    known = next((phase.execution for run in saved.runs for phase in run.phases), "eager")
    return reprice(
        saved,
        gpus=gpus or [run.gpu.key for run in saved.runs],
        execution=ctx.params["execution"] if _was_given(ctx, "execution") else known,
        selection=selection,
        least_saving=ctx.params["min_saving"],
    )


def _fails(report: Report, fail_on: str) -> bool:
    """Whether a budget is broken, or a finding is as severe as that, or more."""
    if any(verdict.kept is False for verdict in report.verdicts):
        return True
    order = ("error", "warning", "info")
    failing = order[: order.index(fail_on) + 1] if fail_on in order else ()
    return any(f.severity.value in failing and not f.suppressed for run in report.runs for f in run.findings)


def _refuse_tracing_options(ctx: click.Context, target: str) -> None:
    fixed = (*_SCENARIO, "scenarios", "dtype", "phase", "attention", "init", "inputs", "assume", "trust_remote_code")
    given = [param.opts[0] for param in ctx.command.params if param.name in fixed and _was_given(ctx, param.name)]
    if given:
        raise click.UsageError(
            f"{' and '.join(given)} cannot change {target}: a saved report holds traced graphs. "
            "Analyse the model itself with these options.",
            ctx,
        )


def _was_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def _outputs(formats: Sequence[tuple[str, Path | None]], output: Path | None) -> list[tuple[str, Path | None]]:
    """Each format and where it goes; what names no file goes to --output, or to standard output."""
    found = [(name, file or output) for name, file in formats]
    files = [str(file.resolve()) for _, file in found if file is not None and str(file) != "-"]
    twice = next((file for file in files if files.count(file) > 1), None)
    if twice is not None:
        raise click.UsageError(f"Two formats for {twice}: give each a file, as in -f json=report.json.")
    return found


def _check_destination(output: Path | None) -> None:
    """Find out before the slow part that a file cannot be written there."""
    if output is None or str(output) == "-":
        return
    if output.is_dir():
        raise click.UsageError(f"-o {output}: is a folder; name a file in it.")
    folder = output.resolve().parent
    if not folder.is_dir():
        raise click.UsageError(f"-o {output}: there is no folder {folder}; create it first.")
    if not os.access(output if output.exists() else folder, os.W_OK):
        raise click.UsageError(f"-o {output}: no permission to write there.")


def _usage_error(error: click.UsageError) -> int:
    """Usage errors in the manner of click: the usage line, then the message."""
    if error.ctx is not None:
        click.echo(error.ctx.get_usage(), err=True)
    hint = f"See `{error.ctx.command_path} --help`." if error.ctx is not None else ""
    return _fail(error.format_message(), hint)


def _unexpected(error: Exception, *, debug: bool) -> int:
    from ..hardware.catalog import CatalogError
    from .errors import FxroofError

    if debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, FxroofError | CatalogError):
        return _fail(error.message, error.hint)
    from .handover import as_failure

    failure = as_failure(error)
    return _fail(failure.message, failure.hint)


def _fail(message: str, hint: str = "") -> int:
    print_error(message, hint)
    return EXIT_STOPPED
