"""Options and fixtures for all tests."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fxroof.analyzer import box
from support import TARGETS

gc.set_threshold(300_000, 10, 10)  # graphs live as long as the tests: looking for garbage among them takes a fifth


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-goldens", action="store_true", help="Write the golden files anew instead of comparing with them."
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests of one model on one worker (`--dist loadgroup`), which then traces it once."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            name = next((value for value in parameters.values() if isinstance(value, str) and value in TARGETS), None)
            if name is not None:
                item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(scope="module")
def unboxed() -> Iterator[None]:
    """Have models run in the tests' own process, where torch is imported already: the box has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(box, "AVAILABLE", False)
        yield


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare text with a file in `goldens/` beside the test, or write the file with --update-goldens."""

    def check(name: str, text: str) -> None:
        path = Path(request.path).parent / "goldens" / name
        if request.config.getoption("--update-goldens"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.read_text(encoding="utf-8") == text, f"{path.name} differs: --update-goldens, then git diff"

    return check
