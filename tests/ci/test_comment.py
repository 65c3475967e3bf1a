"""One comment on a pull request: found by its tag and its author, updated in place, never doubled."""

from collections.abc import Iterator

import pytest
from ci.github_api import BOT, MOST, TOKEN, GitHub, serving
from fxroof.analyzer import comment
from fxroof.analyzer.comment import CommentError, post, shortened
from fxroof.analyzer.render import _diff, markdown
from markdown_it import MarkdownIt

TAG = "<!-- fxroof -->"


@pytest.fixture
def github(monkeypatch: pytest.MonkeyPatch) -> Iterator[GitHub]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as served:
        yield served


def job(github: GitHub, **more: str) -> dict[str, str]:
    return {
        "GITHUB_API_URL": github.url,
        "GITHUB_REPOSITORY": "octo/model",
        "GITHUB_TOKEN": TOKEN,
        "FXROOF_PULL_REQUEST": "7",
    } | more


def never(seconds: float) -> None:
    pytest.fail(f"waits {seconds} s")


def test_a_comment_is_made_once_and_then_updated(github):
    assert post(f"{TAG}\nfirst", job(github), sleep=never) == "created"
    assert post(f"{TAG}\nsecond", job(github), sleep=never) == "updated"
    assert [one["body"] for one in github.comments] == [f"{TAG}\nsecond"]


def test_both_renderers_begin_with_the_tag_that_it_looks_for():
    assert markdown.TAG == _diff.TAG == TAG


def test_it_is_found_on_a_later_page(github):
    for _ in range(150):
        github.add("a discussion", {"login": "someone", "type": "User"})
    post(f"{TAG}\nfirst", job(github))
    for _ in range(150):
        github.add(f"it says {TAG}", BOT)
    assert post(f"{TAG}\nsecond", job(github)) == "updated"
    assert github.comments[150]["body"] == f"{TAG}\nsecond"
    assert len(github.comments) == 301


@pytest.mark.parametrize("owner", [None, "release-robot"])
def test_the_comment_of_another_is_left_alone(github, owner):
    theirs = [
        github.add(f"{TAG}\npasted", {"login": "someone", "type": "User"}),
        github.add(f"> {TAG}\nquoted", BOT),
        github.add("", None),
    ]
    before = [one["body"] for one in theirs]
    github.owner = owner
    assert post(f"{TAG}\nfirst", job(github)) == "created"
    assert post(f"{TAG}\nsecond", job(github)) == "updated"
    assert [one["body"] for one in theirs] == before
    assert github.comments[3]["body"] == f"{TAG}\nsecond"
    assert len(github.comments) == 4


def test_names_keep_comments_apart(github):
    for name in ("", "llama", "a --> <script>"):
        assert post(f"{TAG}\n{name}", job(github, FXROOF_NAME=name)) == "created"
    assert post(f"{TAG}\nsecond", job(github, FXROOF_NAME="llama")) == "updated"
    first = [one["body"].splitlines()[0] for one in github.comments]
    assert first[:2] == [TAG, "<!-- fxroof: llama -->"]
    assert first[2].count("-->") == 1
    assert first[2].endswith("-->")
    assert github.comments[1]["body"] == "<!-- fxroof: llama -->\nsecond"


def test_a_comment_deleted_in_the_meantime_is_made_again(github):
    post(f"{TAG}\nfirst", job(github))
    github.failures = [(200, {}, True), (403, {}, False), (404, {}, False)]
    assert post(f"{TAG}\nsecond", job(github), sleep=never) == "created"


def test_a_passing_fault_is_waited_for_and_doubles_nothing(github):
    waited: list[float] = []
    # the comment is made, and the answer is lost
    github.failures = [(200, {}, True), (502, {}, True)]
    assert post(f"{TAG}\nfirst", job(github), sleep=waited.append) == "updated"
    assert waited == [1.0]
    assert len(github.comments) == 1
    github.failures = [(429, {"Retry-After": "7"}, False), (403, {"X-RateLimit-Remaining": "0"}, False)]
    assert post(f"{TAG}\nsecond", job(github), sleep=waited.append) == "updated"
    assert waited == [1.0, 7.0, 60.0]
    assert len(github.comments) == 1


def test_it_gives_up_with_what_the_api_says(github):
    waited: list[float] = []
    github.failures = [(503, {}, False)] * 3
    with pytest.raises(CommentError, match="503 Server Error"):
        post(f"{TAG}\nfirst", job(github), sleep=waited.append)
    assert len(waited) == 2
    assert len(github.asked) == 3


def test_a_token_that_only_reads_is_explained(github):
    github.read_only = True
    with pytest.raises(CommentError, match="403 Resource not accessible by integration") as raised:
        post(f"{TAG}\nfirst", job(github), sleep=never)
    assert "pull-requests: write" in raised.value.hint
    assert TOKEN not in f"{raised.value.message}{raised.value.hint}"


def test_nobody_there_is_one_message(github):
    waited: list[float] = []
    with pytest.raises(CommentError, match="could not be put there"):
        post(f"{TAG}\nfirst", job(github, GITHUB_API_URL="http://127.0.0.1:1"), sleep=waited.append)


@pytest.mark.parametrize(
    "wrong",
    [
        {"GITHUB_REPOSITORY": "octo/model/../../x"},
        {"GITHUB_REPOSITORY": ""},
        {"FXROOF_PULL_REQUEST": ""},
        {"FXROOF_PULL_REQUEST": "7/../8"},
        {"FXROOF_PULL_REQUEST": "٧"},
        {"GITHUB_TOKEN": ""},
        {"GITHUB_TOKEN": "a\r\nX-Evil: 1"},
        {"GITHUB_API_URL": "file:///etc"},
        {"GITHUB_API_URL": "http://host/a b"},
    ],
)
def test_variables_that_mean_nothing_are_one_message(github, wrong):
    with pytest.raises(CommentError):
        post(f"{TAG}\nfirst", job(github, **wrong), sleep=never)
    assert github.asked == []


def test_an_answer_that_is_not_githubs_is_one_message(github, monkeypatch):
    for said in ({"message": "hello"}, ["hello"], [{"body": TAG, "user": "x"}], None):
        monkeypatch.setattr(github, "answer", lambda *_, said=said: (200, said))
        with pytest.raises(CommentError, match="does not answer as GitHub does"):
            post(f"{TAG}\nfirst", job(github), sleep=never)


def test_a_text_without_a_tag_is_refused(github):
    with pytest.raises(CommentError, match="tag"):
        post("# mine", job(github))
    assert github.asked == []


# --- what is too long


def test_a_long_text_is_cut_where_nothing_is_open(github):
    row = "<details><summary>a</summary>\n\n```python\n<details>\nx = 1\n```\n\n</details>\n"
    body = f"{TAG}\n" + row * 2000
    assert post(body, job(github)) == "created"
    kept, note = github.comments[0]["body"].split("\n\nCut here: ")
    assert len(github.comments[0]["body"]) <= MOST
    assert "65,536 characters" in note
    assert body.startswith(kept)
    assert kept.endswith("</details>")
    assert len(kept) > MOST - len(row) - 200


@pytest.mark.parametrize("most", [300, 301, 302, 350, 400])
def test_no_limit_is_exceeded(most):
    for body in ("x\n" * 500, "😀\n" * 500, "x" * 1000, "````\n```\n" * 200, "| a |\r\n" * 200):
        cut = shortened(f"{TAG}\n{body}", most)
        assert len(cut.encode("utf-16-le")) // 2 <= most
        assert cut.startswith(TAG)
        page = MarkdownIt("commonmark").parse(cut)
        assert page[-2].type == "inline"
        assert page[-2].content.startswith("Cut here: ")
        assert page[-2].level == 1  # in a paragraph of its own, in no block of code
    assert shortened(f"{TAG}\nshort\n", most) == f"{TAG}\nshort\n"


# --- the command


def test_the_command_says_what_it_did(github, tmp_path, monkeypatch, capsys):
    file = tmp_path / "comment.md"
    file.write_text(f"{TAG}\nfirst", encoding="utf-8")
    for name, value in job(github).items():
        monkeypatch.setenv(name, value)
    for said in ("created", "updated"):
        monkeypatch.setattr("sys.argv", ["comment", str(file)])
        assert comment.main() == 0
        assert capsys.readouterr().out == f"comment {said}\n"
    for arguments in ([], ["a", "b"], [str(tmp_path / "missing.md")], [str(tmp_path)]):
        monkeypatch.setattr("sys.argv", ["comment", *arguments])
        assert comment.main() == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
