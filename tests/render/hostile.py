"""A report in which every text that comes from a user's model tries to be more than text."""

from dataclasses import replace

from render.sample import partial, renamed, report, retraced

TEXT = (
    "</script><img src=x onerror=alert(1)> \x1b[31m \x00 ::error::owned\n::warning file=a::b\r\n%0A%0D##[error]x"
    " ```` `x` |a|b| [t](http://evil.example/) ![i](//evil.example) @everyone #1 GH-2 www.evil.example &lt; $x$ ]]> "
    "\u202e\u2066abc\u2069\u202c \ufffe \u2028 \"q\" 'q' {0} =cmd|' /C calc'!A0,;\t\\|_a_ *b* ~c~ \\"
)
SURROGATES = "\ud800\udc80"


def hostile(text=TEXT, *, several=False):
    """The sample, one of its phases failed, with the text everywhere; `several` GPUs or one."""
    base = retraced(report(several=several), failures=partial().failures)
    changed = renamed(base, text)
    return replace(changed, runs=tuple(_run(run, text) for run in changed.runs))


def _run(run, text):
    return replace(
        run,
        gpu=replace(run.gpu, key=f"{run.gpu.key}{text}", name=text, note=text),
        findings=tuple(_finding(finding, text) for finding in run.findings),
        rule_failures=tuple(replace(f, code=text, message=text) for f in run.rule_failures),
        unused_suppressions=(f"{text}:3", text),
    )


def _finding(finding, text):
    return replace(
        finding,
        name=text,
        module=text,
        op=text,
        file=f"{text}.py" if finding.file else "",
        library_file=f"/{text}.py" if finding.file else "",
        library_line=7,
        message=text,
        evidence={text: text},
        remedy=replace(finding.remedy, text=text, code=f"{text}\n{text}"),
        suppressed=finding.suppressed and text,
    )
