"""Text from a user's model as Markdown that shows it and does nothing else: no table, link, mention or HTML of its own.

Markup characters become character references, which Markdown never takes for markup, wherever they stand: also a
vertical bar in a table. GitHub looks for mentions, issue numbers and addresses in the finished page, so those are
parted by a character of no width.
"""

import re

from ._layout import clean


def text(value: str) -> str:
    """Running text."""
    parted = _TRIGGERS.sub(lambda match: f"{match[0]}\u200b", clean(value))
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", parted)


_TRIGGERS = re.compile(r"@(?=\S)|#(?=\d)|\bGH(?=-\d)|/(?=/)|\bwww(?=\.)|\b(?:mailto|xmpp)(?=:)", re.IGNORECASE)
_MARKUP = re.compile("[\\\\`*\\[\\]<>&|~$#!@\u200b]|(?<![^\\W_])_|_(?![^\\W_])")  # an underscore within a word is none


def code(value: str) -> str:
    """Text in a fixed-width font, in a line or in a table."""
    shown = clean(value)
    if shown and not _BREAKS_CODE.search(shown) and shown == shown.strip():
        return f"`{shown}`"
    return code_in_html(value)


def code_in_html(value: str) -> str:
    """The same as HTML: where Markdown is not looked for, as in a summary, and for what a code span cannot hold."""
    return f"<code>{text(value)}</code>"


_BREAKS_CODE = re.compile(r"[`|\\]")


def block(lines: list[str], language: str) -> str:
    """Lines of code in a fence that is longer than any in them."""
    shown = [clean(line) for line in lines]
    longest = max((len(run) for line in shown for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join((f"{fence}{language}", *shown, fence))


def length(value: str) -> int:
    """Characters as GitHub counts them at the most: those beyond 16 bits twice."""
    return len(value) + sum(c > "\uffff" for c in value)


def shortened(value: str, most: int) -> str:
    """The start of a text too long to show."""
    return value if len(value) <= most else f"{value[: most - 1]}…"
