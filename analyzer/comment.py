"""`python -m fxroof.analyzer.comment FILE`: a Markdown file as the one comment of a pull request, updated in place.

Which pull request of which repository comes from the environment, as in a job of GitHub Actions: GITHUB_API_URL,
GITHUB_REPOSITORY, GITHUB_TOKEN and FXROOF_PULL_REQUEST. The comment is found again by the tag that it begins with and
by its author; FXROOF_NAME makes a tag of its own, for several comments on one pull request.
"""

import json
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import FxroofError

MOST = 65_536
"""Characters of a comment; GitHub refuses more."""

_SECONDS = 30
_PAGE = 100
_PAGES = 50
_ATTEMPTS = 3
_LONGEST_WAIT = 60.0


class CommentError(FxroofError):
    """The comment could not be put there."""


class _RefusedError(Exception):
    """The API answers that it will not.

    Attributes:
        code: of HTTP.
        said: why.
        wait: seconds after which asking again may help; None where it never will.
    """

    def __init__(self, code: int, said: str, wait: float | None) -> None:
        super().__init__(said)
        self.code = code
        self.said = said
        self.wait = wait


def post(body: str, environment: Mapping[str, str], *, sleep: Callable[[float], None] = time.sleep) -> str:
    """Make our comment with the same tag say this, or add one; returns `created` or `updated`.

    Args:
        body: Markdown that begins with a tag, as `-f markdown` writes it.
        environment: variables of a job of GitHub Actions.
        sleep: waits where the API asks for it.

    Raises:
        CommentError: a variable is missing or means nothing, or the API refuses.
    """
    tag, body = _tagged(body, environment.get("FXROOF_NAME", ""))
    place = _Place(environment)
    body = shortened(body, MOST)
    for attempt in range(1, _ATTEMPTS + 1):
        try:  # all of it again: a comment may have been made although the answer was lost
            return place.put(tag, body)
        except _RefusedError as error:
            if error.wait is None or attempt == _ATTEMPTS:
                raise _explained(error) from error
            sleep(min(error.wait, _LONGEST_WAIT))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CommentError(f"{environment.get('GITHUB_API_URL')} does not answer as GitHub does.") from error
    raise AssertionError("the last attempt returns or raises")


def shortened(body: str, most: int) -> str:
    """The text, or as many of its first lines as leave nothing open and have room for a note of the cut."""
    if _length(body) <= most:
        return body
    note = f"\n\nCut here: a comment holds {most:,} characters. The summary of the job has all.\n"
    room = most - _length(note)
    kept, fence, folded, end = 0, "", 0, 0
    for line in body.splitlines(keepends=True):
        room -= _length(line)
        if room < 0:
            break
        end += len(line)
        mark = re.match(r"(`{3,})(.*)", line)
        if mark is not None and not fence:
            fence = mark[1]
        elif mark is not None and len(mark[1]) >= len(fence) and not mark[2].strip():
            fence = ""
        elif not fence:
            folded += line.count("<details>") - line.count("</details>")
        if not fence and not folded:
            kept = end
    return body[:kept].rstrip("\n") + note


def _length(text: str) -> int:
    """Characters as GitHub counts them at the most: those beyond 16 bits twice."""
    return len(text) + sum(c > "\uffff" for c in text)


def _tagged(body: str, name: str) -> tuple[str, str]:
    found = re.match(r"<!-- ([^\n]*) -->\n", body)
    if found is None:
        raise CommentError("The text does not begin with a tag to find the comment by.", "Write it with: -f markdown")
    if not name:
        return found[0].strip(), body
    own = (
        f"<!-- {found[1]}: {urllib.parse.quote(name, safe=' ').replace('-', '%2D')} -->"  # nothing that ends a comment
    )
    return own, f"{own}\n{body[found.end() :]}"


class _Place:
    """The comments of a pull request."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._api = (environment.get("GITHUB_API_URL") or "https://api.github.com").rstrip("/")
        repository, number = (environment.get(name, "") for name in ("GITHUB_REPOSITORY", "FXROOF_PULL_REQUEST"))
        self._token = environment.get("GITHUB_TOKEN", "")
        if not re.fullmatch(r"https?://[^\s/]+(/[\w./-]*)?", self._api):
            raise CommentError(f"GITHUB_API_URL is no address: {self._api!r}.")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or not re.fullmatch("[0-9]+", number):
            raise CommentError(
                "GITHUB_REPOSITORY and FXROOF_PULL_REQUEST do not name a pull request.",
                "Outside pull requests, leave the comment out.",
            )
        if not re.fullmatch(r"[!-~]+", self._token):
            raise CommentError("GITHUB_TOKEN is empty or no token.", "Pass the job's token: ${{ github.token }}")
        self._issues = f"{self._api}/repos/{repository}/issues"
        self._number = number

    def put(self, tag: str, body: str) -> str:
        known = self._found(tag)
        if known is not None:
            try:
                self._call("PATCH", f"{self._issues}/comments/{known}", {"body": body})
            except _RefusedError as error:
                if error.code not in (404, 410):  # deleted in the meantime
                    raise
            else:
                return "updated"
        self._call("POST", f"{self._issues}/{self._number}/comments", {"body": body})
        return "created"

    def _found(self, tag: str) -> int | None:
        """Our comment with this tag; anyone can write the tag, so the author has to be the token's, too."""
        ours: Callable[[Any], bool] | None = None
        for page in range(1, _PAGES + 1):
            comments = self._call("GET", f"{self._issues}/{self._number}/comments?per_page={_PAGE}&page={page}")
            if not isinstance(comments, list):
                raise TypeError
            for comment in comments:
                if str(comment.get("body", "")).startswith(tag):
                    ours = ours or self._ours()
                    if ours(comment.get("user")):
                        return int(comment["id"])
            if len(comments) < _PAGE:
                break
        return None

    def _ours(self) -> Callable[[Any], bool]:
        """Tells whether an author is the one whose token this is; a job's token has no user, its author is a bot."""
        try:
            login = self._call("GET", f"{self._api}/user")["login"]
        except _RefusedError as error:
            if error.wait is not None:
                raise
            return lambda author: not author or author.get("type") == "Bot"
        return lambda author: bool(author) and author.get("login") == login

    def _call(self, method: str, url: str, data: Mapping[str, Any] | None = None) -> Any:
        request = urllib.request.Request(  # noqa: S310  # http or https, by the check of the address
            url,
            method=method,
            data=None if data is None else json.dumps(data).encode(),
            headers={
                "Authorization": f"Bearer {self._token}",
                "Accept": "application/vnd.github+json",
                "X-GitHub-Api-Version": "2022-11-28",
                "Content-Type": "application/json",
                "User-Agent": "fxroof",
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as answer:  # noqa: S310  # the same
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            with error:
                raise _RefusedError(error.code, f"{_what(error)} ({method} {url})", _wait(error)) from error
        except (OSError, ValueError) as error:
            raise _RefusedError(0, f"{error} ({method} {url})", 1.0) from error


def _what(error: urllib.error.HTTPError) -> str:
    try:
        said = json.loads(error.read(10_000))["message"]
    except (OSError, ValueError, KeyError, TypeError):
        said = error.reason
    return f"{error.code} {said}"


def _wait(error: urllib.error.HTTPError) -> float | None:
    """Seconds that the API asks to wait, or that a passing fault takes; None where waiting does not help."""
    after = error.headers.get("Retry-After", "")
    if after.isascii() and after.isdigit():
        return float(after)
    if error.code in (403, 429) and error.headers.get("X-RateLimit-Remaining") == "0":
        return _LONGEST_WAIT
    return 1.0 if error.code == 429 or error.code >= 500 else None


def _explained(error: _RefusedError) -> CommentError:
    hint = ""
    if error.code in (401, 403, 404):
        hint = "The job needs permissions: pull-requests: write; pull requests from forks never have it."
    return CommentError(f"The comment could not be put there: {error.said}.", hint)


def main() -> int:
    """Post the file that is named; 0, or 2 with a message."""
    try:
        if len(sys.argv) != 2:
            raise CommentError("Name one Markdown file.")
        text = Path(sys.argv[1]).read_text(encoding="utf-8")
        sys.stdout.write(f"comment {post(text, os.environ)}\n")
    except FxroofError as error:
        sys.stderr.write(f"error: {error.message}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
    except (OSError, UnicodeDecodeError) as error:
        sys.stderr.write(f"error: {sys.argv[1]}: cannot be read: {error}\n")
    else:
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
