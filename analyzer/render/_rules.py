"""The rules themselves: a list of all, and the page of one."""

from collections.abc import Sequence

import msgspec
from rich.text import Text

from ..finding import Rule
from ._layout import Column, printed, table
from .registry import Options


def listing(rules: Sequence[Rule], options: Options) -> str:
    """One line a rule: code, name, severity and what it is about."""
    columns = [
        Column(header="code", cells=[Text(rule.code, style="bold") for rule in rules]),
        Column(header="name", cells=[rule.name for rule in rules]),
        Column(header="severity", cells=[rule.severity.value for rule in rules], drop=1),
        Column(header="what is wrong", cells=[rule.doc.split("\n", 1)[0] for rule in rules], least=20, keep="start"),
    ]
    return printed(list(table(columns, options.width)), options)


def page(rule: Rule) -> str:
    """A rule's page in Markdown."""
    return f"# {rule.code} {rule.name}\n\nSeverity: {rule.severity.value}\n\n{rule.doc}\n"


def as_json(rules: Sequence[Rule]) -> str:
    """Code, name, severity and page of each rule."""
    found = [
        {"code": rule.code, "name": rule.name, "severity": rule.severity.value, "page": rule.doc, "origin": rule.origin}
        for rule in rules
    ]
    return msgspec.json.format(msgspec.json.encode(found), indent=1).decode() + "\n"
