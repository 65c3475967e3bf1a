"""The command line. It alone prints, exits and looks at the environment. Only tracing a model imports torch.

Exit codes: 0 done, 1 findings as severe as --fail-on says, 2 what stopped the analysis, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections import Counter

    from rich.console import Console
    from rich.status import Status

    from .baseline import Entry
    from .render.registry import Options
    from .report import Report
    from .review import Selection

EXIT_STOPPED = 2
EXIT_FOUND = 1
EXIT_INTERRUPTED = 130

_MOST_SEQUENCES = 1_000_000
_MOST_TOKENS = 10_000_000
_MOST_GPUS = 1024
_MOST_SECONDS = 10_000_000
_WIDTH_OFF_TERMINAL = 100
_LEAST_WIDTH = 40


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
        _silence_stdout()
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


class _Formats(click.ParamType[tuple[str, "Path | None"]]):
    """A registered renderer, looked up only when a format is given, and the file that it writes: `sarif=out.sarif`."""

    name = "format"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002  # click's signature
        from .render.registry import formats

        return f"[{'|'.join(formats())}][=FILE]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path | None]:
        from .render.registry import formats

        if isinstance(value, tuple):
            return value
        name, given, file = str(value).partition("=")
        if name not in formats():
            self.fail(f"{name!r} is not one of {', '.join(formats())}.", param, ctx)
        if given and not file:
            self.fail(f"{value!r} names no file: for example {name}=out.txt.", param, ctx)
        return name, Path(file) if file else None

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002  # click's signature
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[click.shell_completion.CompletionItem]:
        from .render.registry import formats

        return [click.shell_completion.CompletionItem(name) for name in formats() if name.startswith(incomplete)]


class _Memory(click.ParamType[int]):
    """A size such as `16GB` or `512 MiB` -> bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT])(i?)B?", str(value).strip(), re.IGNORECASE)
        if match is None and str(value).strip() != "0":
            self.fail(f"{value!r} is no size: for example 16GB, 512MiB, or 0 for no limit.", param, ctx)
        if match is None:
            return 0
        power = "KMGT".index(match[2].upper()) + 1
        return max(int(float(match[1]) * (1024 if match[3] else 1000) ** power), 1)


class _Share(click.ParamType[float]):
    """A share such as `1%` or `0.01`, as a number."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(%?)", text)
        if match is None:
            self.fail(f"{value!r} is no share: for example 1% or 0.01.", param, ctx)
        return float(match[1]) / (100 if match[2] else 1)


class _RuleNames(click.ParamType[tuple[str, ...]]):
    """Codes, beginnings of codes or names of rules, with commas between them."""

    name = "rule"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in str(value).split(","))
        if not all(names):
            self.fail(f"{value!r} names a rule too few: for example ATT001,FUS.", param, ctx)
        return names


class _ModuleRules(click.ParamType[tuple[tuple[str, str], ...]]):
    """A pattern of module paths and the rules that are not to look there, `blocks.*.attn=ATT001,FUS`."""

    name = "module=rule"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[str, str], ...]:
        if isinstance(value, tuple):
            return value
        pattern, _, rules = str(value).rpartition("=")
        if not pattern:
            self.fail(f"{value!r} is not MODULE=RULES: for example blocks.*.attn=ATT001,FUS.", param, ctx)
        return tuple((pattern, rule) for rule in _RuleNames().convert(rules, param, ctx))


def _complete_gpu(
    ctx: click.Context,  # noqa: ARG001  # click's signature
    param: click.Parameter,  # noqa: ARG001
    incomplete: str,
) -> list[click.shell_completion.CompletionItem]:
    from ..hardware.catalog import names

    return [click.shell_completion.CompletionItem(name) for name in names() if name.startswith(incomplete)]


@main.command()
@click.argument("target")
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    metavar="NAME",
    shell_complete=_complete_gpu,
    help="GPU to price for, or a TOML file; repeat to compare several.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1, _MOST_SEQUENCES),
    default=1,
    show_default=True,
    help="Sequences in flight.",
)
@click.option(
    "--input-len",
    type=click.IntRange(1, _MOST_TOKENS),
    default=2048,
    show_default=True,
    help="Prompt tokens of each.",
)
@click.option(
    "--output-len",
    type=click.IntRange(1, _MOST_TOKENS),
    default=256,
    show_default=True,
    help="Tokens generated for each; decode is priced at a context of input + output / 2.",
)
@click.option(
    "--prefix-len",
    type=click.IntRange(0, _MOST_TOKENS),
    default=0,
    show_default=True,
    help="Tokens of the prompt whose KV cache is there already; prefill computes the others.",
)
@click.option(
    "--chunk",
    type=click.IntRange(0, _MOST_TOKENS),
    default=0,
    show_default=True,
    help="Prefill in chunks of at most so many tokens a sequence; 0 for all at once.",
)
@click.option(
    "--tp",
    type=click.IntRange(1, _MOST_GPUS),
    default=1,
    show_default=True,
    help="GPUs that share every layer: matrices are cut as the model's plan says.",
)
@click.option(
    "--ep",
    type=click.IntRange(1, _MOST_GPUS),
    default=1,
    show_default=True,
    help="GPUs that share the experts, each holding some whole; alone, or as many as --tp.",
)
@click.option(
    "--dtype",
    type=click.Choice(["as-is", "bf16", "fp16", "fp32"]),
    default="as-is",
    show_default=True,
    help="Type to convert floating-point weights to.",
)
@click.option(
    "--phase",
    type=click.Choice(["prefill", "decode", "forward", "encoder", "all"]),
    default="all",
    show_default=True,
    help="What to analyse: all that the model has, or one.",
)
@click.option(
    "--attention",
    type=click.Choice(["sdpa", "eager"]),
    default="sdpa",
    show_default=True,
    help="Attention implementation of transformers models.",
)
@click.option(
    "--execution",
    type=click.Choice(["eager", "compiled"]),
    default="eager",
    show_default=True,
    help="Whose kernels are shown in detail: PyTorch's op by op, or a fusing compiler's. Both are summed up.",
)
@click.option("--init", metavar="TEXT", default="", help="Expression that builds the model: 'Model(Args(dim=4096))'.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=SHAPE[:DTYPE]",
    help="Input of forward, such as x=1x3x224x224:bf16; repeat for each.",
)
@click.option(
    "--assume",
    type=click.Choice(["balanced-routing"]),
    multiple=True,
    help="What may be assumed of data where control flow depends on it.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that a model repository brings.")
@click.option(
    "--timeout",
    type=click.IntRange(0, _MOST_SECONDS),
    default=600,
    show_default=True,
    metavar="SECONDS",
    help="Time that building and tracing the model may take; 0 for no limit.",
)
@click.option(
    "--memory-limit",
    type=_Memory(),
    metavar="SIZE",
    help="Memory that it may take, such as 16GB; 0 for no limit.  [default: 80% of this machine's]",
)
@click.option(
    "--select",
    type=_RuleNames(),
    multiple=True,
    help="Only these rules: codes, their beginnings, or names; several with commas.",
)
@click.option("--extend-select", type=_RuleNames(), multiple=True, help="These rules besides those of --select.")
@click.option("--ignore", type=_RuleNames(), multiple=True, help="Not these rules.")
@click.option(
    "--per-module-ignore",
    type=_ModuleRules(),
    multiple=True,
    help="Not these rules in modules of that path and all in them, as in 'blocks.*.attn=ATT001,FUS'.",
)
@click.option("--rules", "rule_files", multiple=True, metavar="FILE", help="A Python file with rules of your own.")
@click.option(
    "--min-saving",
    type=_Share(),
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
@click.option(
    "--fail-on",
    type=click.Choice(["error", "warning", "info", "never"]),
    default="error",
    show_default=True,
    help="Findings of this severity and above end with exit code 1.",
)
@click.option("--exit-zero", is_flag=True, help="Exit with 0 whatever was found.")
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
    type=_Formats(),
    multiple=True,
    default=("terminal",),
    show_default=True,
    help="Output format; =FILE writes it there; may be repeated.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write instead of standard output.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on standard error.")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure, and library warnings.")
@click.pass_context
def analyze(
    ctx: click.Context,
    target: str,
    gpus: tuple[str, ...],
    batch_size: int,
    input_len: int,
    output_len: int,
    prefix_len: int,
    chunk: int,
    tp: int,
    ep: int,
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
    fail_on: str,
    exit_zero: bool,
    top: int,
    by: str,
    formats: tuple[tuple[str, Path | None], ...],
    output: Path | None,
    quiet: bool,
    debug: bool,
) -> int:
    """Say where a model's time goes on a GPU, phase by phase and line by line.

    \b
    Examples:
      fxroof analyze mymodel.py --gpu b200
      fxroof analyze mymodel.py:build --gpu h100 --gpu b200 --phase decode --batch-size 32
      fxroof analyze mymodel.py --gpu b200 -f json -o report.json
      fxroof analyze report.json --gpu h200

    TARGET is mymodel.py, mymodel.py:attr or package.module:attr (a module, or a class or function that
    gives one without arguments), a folder with a transformers config.json, hf:ORG/NAME, an exported
    program (.pt2), or a report saved with -f json, which is priced again without torch.

    The model's code runs in a process of its own, for as long and as large as --timeout and
    --memory-limit allow. Exit code 2 says that something, perhaps only one phase, was not analysed.
    """  # noqa: D301  # \b is click's mark for text that must not be wrapped
    outputs = _outputs(formats, output)
    for _, file in outputs:
        _check_destination(file)
    known = _known(baseline)
    saved = _saved_report(target)
    gpus = tuple(dict.fromkeys(gpus))
    from .review import Selection

    selection = Selection(
        select=tuple(chain(*select)),
        extend=tuple(chain(*extend_select)),
        ignore=tuple(chain(*ignore)),
        files=rule_files,
        modules=tuple(chain(*per_module_ignore)),
    )
    if saved is not None:
        _refuse_tracing_options(ctx, target)
        report = _repriced(ctx, saved, gpus, selection)
    elif not gpus:
        raise click.UsageError("Missing option '--gpu'. For example: --gpu h100; `fxroof gpus` lists all.", ctx)
    else:
        from .scenario import Scenario

        given = [_was_given(ctx, name) for name in ("input_len", "output_len")]
        scenario = Scenario(
            batch_size=batch_size,
            input_len=input_len,
            output_len=output_len,
            lengths_given=any(given),
            prefix_len=prefix_len,
            chunk=chunk,
            tp=tp,
            ep=ep,
        )
        from .pipeline import analyze as analyze_target

        with _Progress(quiet=quiet) as progress:
            report = analyze_target(
                target,
                gpus=gpus,
                scenario=scenario,
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
    if known is not None:
        from .baseline import applied

        report = applied(report, known)
    from .render.registry import render

    for name, file in outputs:
        _deliver(render(report, name, _options(file, top=top, by=by)), file)
    for failure in report.failures:
        print_error(f"{failure.phase} was not analysed: {failure.message}", failure.hint)
    if report.failures:
        return EXIT_STOPPED
    return EXIT_FOUND if not exit_zero and _fails(report, fail_on) else 0


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
    "file",
    type=click.Path(path_type=Path),
    default=".fxroof-baseline.json",
    show_default=True,
    help="The file.",
)


@baseline.command()
@click.argument("report", type=click.Path(path_type=Path))
@_BASELINE
def write(report: Path, file: Path) -> None:
    """Write all findings of a saved REPORT into the file: they count no more, new ones do."""
    _check_destination(file)
    from .baseline import entries, to_text
    from .report import read_report

    _deliver(to_text(entries(read_report(report))), file)


@baseline.command()
@click.argument("report", type=click.Path(path_type=Path))
@_BASELINE
def prune(report: Path, file: Path) -> None:
    """Take out of the file what a saved REPORT no longer shows; its other GPUs and phases stay."""
    _check_destination(file)
    from .baseline import pruned, read, to_text
    from .report import read_report

    _deliver(to_text(pruned(read(file), read_report(report))), file)


@main.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("head", type=click.Path(path_type=Path))
@click.option(
    "--budget",
    "limits",
    multiple=True,
    metavar="METRIC=LIMIT",
    help="Limit for the head, as in 'decode.tpot=12 ms' or 'decode.bytes=+2%'; may be repeated.  "
    "[default: no phase takes 2% longer]",
)
@click.option(
    "--fail-on",
    type=click.Choice(["error", "warning", "info", "never"]),
    default="error",
    show_default=True,
    help="Severity from which a new finding fails.",
)
@click.option("--exit-zero", is_flag=True, help="Exit with 0 whatever is found.")
@click.option("--top", type=click.IntRange(1, 1000), default=10, show_default=True, help="Modules to show of a phase.")
@click.option(
    "-f",
    "--format",
    "format_",
    type=click.Choice(["terminal", "markdown", "json"]),
    default="terminal",
    show_default=True,
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write instead of standard output.")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")  # read where failures are told
def diff(
    base: Path,
    head: Path,
    limits: tuple[str, ...],
    fail_on: str,
    exit_zero: bool,
    top: int,
    format_: str,
    output: Path | None,
    debug: bool,  # noqa: ARG001
) -> int:
    """Compare two saved reports: what became slower or faster, where, why, and which findings are new.

    \b
    Examples:
      fxroof diff base.json head.json
      fxroof diff base.json head.json --budget 'decode.tpot=12 ms' --budget 'memory.total=+2%'
      fxroof diff base.json head.json -f markdown -o comment.md

    Both are written by `fxroof analyze ... -f json=FILE`. Exit code 1 says that a budget is exceeded, a finding as
    severe as --fail-on is new, or a phase can no longer be analysed.
    """  # noqa: D301  # \b is click's mark for text that must not be wrapped
    _check_destination(output)
    from .budgets import from_texts
    from .diff import diff as compared
    from .render import _diff
    from .report import read_report

    budgets = from_texts(limits)
    found = compared(read_report(base), read_report(head), budgets=budgets, fail_on=fail_on)
    if format_ == "terminal":
        shown = _diff.terminal(found, _options(output, top=top))
    else:
        shown = _diff.markdown(found) if format_ == "markdown" else _diff.as_json(found)
    _deliver(shown, output)
    return EXIT_FOUND if found.failing and not exit_zero else 0


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
        _deliver(_rules.as_json(chosen), None)
    elif name or everything:
        _deliver("\n".join(map(_rules.page, chosen)), None)
    else:
        _deliver(_rules.listing(chosen, _options(None)), None)


@main.command()
@click.argument("name", required=False, shell_complete=_complete_gpu)
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

    options = _options(None)
    if name is None:
        _deliver(_catalog.catalog(all_gpus(), CATALOG_VERSION, options), None)
    else:
        resolved = load(name)
        _deliver(_catalog.part(resolved.gpu, resolved.note, options), None)


def _known(baseline: Path | None) -> Counter[Entry] | None:
    if baseline is None:
        return None
    from .baseline import read

    return read(baseline)


def _saved_report(target: str) -> Report | None:
    """The report in a .json file, or None where that is something else."""
    path = Path(target)
    if path.suffix != ".json" or not path.is_file():
        return None
    import msgspec

    from .report import read_report

    try:
        head = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
    except (OSError, msgspec.MsgspecError):
        return None
    return read_report(path) if "schema_version" in head else None


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
    """Whether a finding is as severe as that, or more."""
    order = ("error", "warning", "info")
    failing = order[: order.index(fail_on) + 1] if fail_on in order else ()
    return any(f.severity.value in failing and not f.suppressed for run in report.runs for f in run.findings)


def _refuse_tracing_options(ctx: click.Context, target: str) -> None:
    fixed = (
        "batch_size", "input_len", "output_len", "prefix_len", "chunk", "tp", "ep", "dtype", "phase", "attention",
        "init", "inputs", "assume", "trust_remote_code",
    )  # fmt: skip
    given = [param.opts[0] for param in ctx.command.params if param.name in fixed and _was_given(ctx, param.name)]
    if given:
        raise click.UsageError(
            f"{' and '.join(given)} cannot change {target}: a saved report holds traced graphs. "
            "Analyse the model itself with these options.",
            ctx,
        )


def _was_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _options(output: Path | None, **chosen: Any) -> Options:
    from rich.console import Console

    from .render.registry import Options

    to_file = output is not None and str(output) != "-"
    console = Console()
    forced = bool(os.environ.get("FORCE_COLOR"))
    colour = console.is_terminal and not console.no_color and (forced or not to_file)
    if console.is_terminal and not to_file and sys.stdout.isatty():
        width = console.width
    else:
        columns = os.environ.get("COLUMNS", "")
        width = int(columns) if columns.isascii() and columns.isdigit() and int(columns) else _WIDTH_OFF_TERMINAL
    encoding = "utf-8" if to_file else (sys.stdout.encoding or "ascii")
    return Options(
        width=min(max(width, _LEAST_WIDTH), 1000),
        colour=colour,
        unicode=_encodes(encoding, "⠿µ━●"),
        **chosen,
    )


def _encodes(encoding: str, text: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


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


def _deliver(text: str, output: Path | None) -> None:
    if output is None or str(output) == "-":
        encoding = sys.stdout.encoding or "utf-8"
        try:
            sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has seen enough; click would make it exit code 1
            _silence_stdout()
        return
    from .errors import ReportFileError

    try:
        _write_whole(output.resolve(), text)
    except OSError as error:
        raise ReportFileError(
            f"{output}: cannot be written: {error.strerror or error}.",
            "Nothing was left there; name another file.",
        ) from error


def _write_whole(path: Path, text: str) -> None:
    """Write all of a file or nothing: no reader sees half of it, and a failure leaves what was there."""
    if path.exists() and not path.is_file():  # a device or a pipe: replacing it would destroy it
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
        return
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class _Progress:
    """Says on standard error what is done, from the second second on: a status line, or lines off a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._message = ""
        self._lock = threading.Lock()
        self._shown = False
        self._status: Status | None = None
        self._timer = threading.Timer(1.0, self._show)
        self._timer.daemon = True

    def __enter__(self) -> _Progress:
        if not self._quiet:
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            self._quiet = True
            if self._status is not None:
                self._status.stop()

    def say(self, message: str) -> None:
        """Take note of what is being done."""
        with self._lock:
            self._message = message
            if self._shown:
                self._write()

    def _show(self) -> None:
        with self._lock:
            if not self._quiet:
                self._shown = True
                self._write()

    def _write(self) -> None:
        if not self._message or self._quiet:
            return
        if self._status is not None:
            self._status.update(self._message)
            return
        console = _stderr()
        if console.is_terminal and not console.is_dumb_terminal:
            self._status = console.status(self._message)
            self._status.start()
        else:
            console.print(f"fxroof: {self._message}", markup=False, highlight=False, soft_wrap=True)


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


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


def print_error(message: str, hint: str = "") -> None:
    """One message on standard error: what, where, and what to do about it."""
    from rich.text import Text

    console = _stderr()
    with contextlib.suppress(BrokenPipeError):
        for label, style, text in (("error: ", "bold red", message), ("hint: ", "bold", hint)):
            if text:
                line = Text.assemble((label, "" if console.no_color else style), _printable(text))
                console.print(line, soft_wrap=True, highlight=False)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _silence_stdout() -> None:
    # the interpreter flushes stdout on exit and would complain about the closed pipe once more
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
