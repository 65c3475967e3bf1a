"""The page for a pull request, parsed as GitHub's Markdown: what it shows, and what hostile text cannot do to it."""

import html
import re
from dataclasses import replace

import pytest
from fxroof.analyzer.render._markdown import block, code, text
from fxroof.analyzer.render.registry import Options, render
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from render.hostile import TEXT, hostile
from render.sample import partial, report

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
OWN_HTML = re.compile(r"<!-- fxroof -->|</?(details|summary|code|sub)>")


def shown(given):
    return render(given, "markdown", Options())


def page(given):
    """The page as HTML, which must hold no markup beyond the renderer's own."""
    source = shown(given)
    assert source.startswith("<!-- fxroof -->\n")
    made = {"a", "img", "em", "s"} & {match.lower() for match in re.findall(r"<(\w+)", PARSER.render(source))}
    assert not made
    for token in PARSER.parse(source):
        for part in [token, *(token.children or ())]:
            if part.type in ("html_block", "html_inline"):
                assert "<" not in OWN_HTML.sub("", part.content)
    return PARSER.render(source)


def running(html_page):
    """Text outside code, where GitHub looks for mentions, numbers of issues and addresses."""
    outside = re.sub(r"<(code|pre)>.*?</\1>|<pre><code.*?</code></pre>", "", html_page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", "", outside))


def test_one_gpu(golden):
    golden("markdown.md", shown(report()))


def test_several_gpus(golden):
    golden("markdown_several.md", shown(report(several=True)))


def test_a_phase_that_failed(golden):
    golden("markdown_partial.md", shown(partial()))


def test_evidence_that_is_no_number_is_written():
    original = report()
    odd = replace(original.runs[0].findings[0], evidence={"bytes": float("inf"), "seconds": float("nan")})
    given = replace(original, runs=(replace(original.runs[0], findings=(odd,)),))
    assert "bytes inf, seconds nan" in shown(given)


def test_tables_and_details():
    made = page(report(several=True))
    assert made.count("<table>") == 2
    assert made.count("<tr>") == 2 + 4 + 2
    assert made.count("<details>") == made.count("</details>") == 2
    assert '<pre><code class="language-python">cache[:, pos] = k' in made


@pytest.mark.parametrize("several", [False, True])
def test_hostile_text_changes_nothing_of_the_page(several):
    plain, made = page(hostile("x", several=several)), page(hostile(several=several))
    for tag in ("table", "tr", "td", "details", "summary", "h3", "pre", "li", "sub"):
        assert made.count(f"<{tag}>") == plain.count(f"<{tag}>"), tag
    seen = running(made)
    assert not re.search(r"@\w|#\d|//|www\.|GH-\d|mailto:", seen, re.IGNORECASE)


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("`|\\<>&@#*_~[]()!$ \n\tab1:/.-w="), max_size=30) | st.text(max_size=20))
def test_text_and_code_read_back_in_a_table(value):
    source = f"| a | b |\n|---|---|\n| x{text(value)}x | {code(value)} |\n"
    made = PARSER.render(source)
    cells = re.findall(r"<td>(.*)</td>", made)
    assert len(cells) == 2
    meant = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    shown_text, shown_code = (html.unescape(re.sub("<[^>]*>", "", cell)).replace("\u200b", "") for cell in cells)
    assert shown_text == f"x{meant}x"
    assert shown_code.strip() == meant.strip()
    assert not re.search(r"<(?!/?code>)", "".join(cells))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.sampled_from("`~ab \n"), max_size=12), max_size=4))
def test_a_fence_is_longer_than_what_it_holds(lines):
    tokens = PARSER.parse(block(lines, "python"))
    assert [token.type for token in tokens] == ["fence"]


def test_a_finding_beyond_the_limit_is_counted_not_cut():
    original = report()
    first = original.runs[0].findings[0]
    for many in (50, 400, 3000):
        found = tuple(replace(first, line=i, module=f"blocks.{i}") for i in range(many))
        given = replace(original, runs=(replace(original.runs[0], findings=found),))
        source = shown(given)
        assert len(source) <= 65_000
        rows, details = len(re.findall(r"^\| KVC001", source, re.MULTILINE)), source.count("<details>")
        assert details == source.count("</details>")
        assert rows >= details
        last = source.splitlines()[-1]
        listed = {name: int(n.replace(",", "")) for n, name in re.findall(r"(\d[\d,]*) (findings|details|notes)", last)}
        assert last.startswith("Left out for length: ") == bool(listed)
        assert rows + listed.get("findings", 0) == many
        assert details + listed.get("details", 0) == many
        assert (many == 50) == (not listed)
        assert "details" in listed or not listed  # they go before rows do


@pytest.mark.parametrize("text", ["x" * 50_000, "|" * 50_000, "\U0001f600" * 50_000, TEXT * 500])
def test_long_text_does_not_break_the_limit(text):
    source = shown(hostile(text, several=True))
    assert len(source.encode("utf-16-le")) // 2 <= 65_000
    page(hostile(text, several=True))
    assert source.count("<details>") == source.count("</details>") > 0
