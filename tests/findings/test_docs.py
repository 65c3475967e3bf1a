"""docs/rules.md is made of the rules' own pages."""

from pathlib import Path

import pytest
from fxroof.analyzer.render._rules import page
from fxroof.analyzer.review import load_rules

DOCS = Path(__file__).parent.parent.parent / "docs" / "rules.md"
HEAD = """# Rules

What each rule checks, what it costs, how the saving is computed, what to write instead. `fxroof rule CODE` shows one
of these pages. They are the docstrings in `rules/`: `pytest tests/findings/test_docs.py --update-goldens` writes them.

"""


def test_the_pages_are_those_of_the_rules(request: pytest.FixtureRequest) -> None:
    own = [rule for rule in load_rules()[0] if rule.origin.startswith("fxroof.rules")]
    text = HEAD + "\n".join(page(rule).replace("# ", "## ", 1) for rule in own)
    if request.config.getoption("--update-goldens"):
        DOCS.write_text(text, encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == text, "pytest tests/findings/test_docs.py --update-goldens"
