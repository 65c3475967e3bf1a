"""A stand-in for the part of GitHub's API that comments go through, on a port of this machine."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "ghs_1"  # noqa: S105  # of this stand-in alone
BOT = {"login": "github-actions[bot]", "type": "Bot"}
MOST = 65_536


class GitHub:
    """The comments of pull request 7 of octo/model, and what was asked.

    Attributes:
        comments: in the order in which they were made.
        asked: method and path of every request.
        owner: whose token it is; None for that of a job, which has no user.
        read_only: whether the token may write, as in pull requests from forks.
        failures: answers to give instead, the first first: code, headers, whether what was asked is done all the same.
    """

    def __init__(self) -> None:
        self.comments: list[dict[str, Any]] = []
        self.asked: list[tuple[str, str]] = []
        self.owner: str | None = None
        self.read_only = False
        self.failures: list[tuple[int, dict[str, str], bool]] = []
        self.url = ""
        self._made = 0

    def add(self, body: str, user: dict[str, str] | None) -> dict[str, Any]:
        self._made += 1
        self.comments.append({"id": 1000 + self._made, "body": body, "user": user})
        return self.comments[-1]

    def answer(self, method: str, path: str, token: str, data: Any) -> tuple[int, Any]:
        self.asked.append((method, path))
        if token != f"Bearer {TOKEN}":
            return 401, {"message": "Bad credentials"}
        if path == "/user":
            return (200, {"login": self.owner}) if self.owner else (403, {"message": "Resource not accessible"})
        if method != "GET" and self.read_only:
            return 403, {"message": "Resource not accessible by integration"}
        if method != "GET" and len(data["body"]) > MOST:
            return 422, {"message": "body is too long"}
        listed = re.fullmatch(r"/repos/octo/model/issues/7/comments\?per_page=(\d+)&page=(\d+)", path)
        if method == "GET" and listed:
            size, page = int(listed[1]), int(listed[2])
            return 200, self.comments[size * (page - 1) : size * page]
        if (method, path) == ("POST", "/repos/octo/model/issues/7/comments"):
            user = {"login": self.owner, "type": "User"} if self.owner else BOT
            return 201, self.add(data["body"], user)
        one = re.fullmatch(r"/repos/octo/model/issues/comments/(\d+)", path)
        found = next((comment for comment in self.comments if one and comment["id"] == int(one[1])), None)
        if method == "PATCH" and found is not None:
            found["body"] = data["body"]
            return 200, found
        return 404, {"message": "Not Found"}


@contextmanager
def serving() -> Iterator[GitHub]:
    github = GitHub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            data = json.loads(self.rfile.read(length)) if length else None
            token = self.headers.get("Authorization", "")
            failure = github.failures.pop(0) if github.failures else None
            code, said = 500, {"message": "Server Error"}
            if failure is None or failure[2]:
                code, said = github.answer(self.command, self.path, token, data)
            else:
                github.asked.append((self.command, self.path))
            code, headers = (code, {}) if failure is None else failure[:2]
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        do_GET = do_POST = do_PATCH = _answer  # http.server's names

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    github.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield github
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
