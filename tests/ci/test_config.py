"""Settings of a project: what they say, where they are looked for, and what is refused with its line."""

import textwrap

import pytest
from fxroof.analyzer.config import ConfigError, find, read

GOOD = """
targets = ["model.py", "model.py:build", "package.module:attr"]
gpus = ["h100", "parts/mine.toml"]
rules = ["lint/rules.py"]
baseline = ".fxroof-baseline.json"
min-saving = "2%"
per-module-ignores = { "blocks.*" = ["ATT001", "FUS"] }

[[scenarios]]
name = "chat"
input-len = 512
budgets.decode.tpot = "12 ms"

[[scenarios]]
name = "rag"
batch-size = 4
input-len = 8192

[budgets]
memory.total = "80 GB"
decode.time = [{ limit = "+2%", of = "bound", gpu = "h100" }, "crossing 3 ms"]
"""


@pytest.fixture
def project(tmp_path):
    def written(text, name="fxroof.toml"):
        file = tmp_path / name
        file.write_text(textwrap.dedent(text))
        return file

    (tmp_path / "model.py").write_text("")
    return written


def test_what_settings_say(project, monkeypatch, tmp_path):
    found = read(project(GOOD))
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    assert found.targets() == ("../model.py", "../model.py:build", "package.module:attr")
    assert found.defaults() == {
        "gpus": ["h100", "../parts/mine.toml"],
        "rule_files": ["../lint/rules.py"],
        "baseline": "../.fxroof-baseline.json",
        "min_saving": "2%",
        "per_module_ignore": ["blocks.*=ATT001,FUS"],
    }
    assert [(b.metric, b.kind, b.scenario, b.gpu) for b in found.budgets] == [
        ("memory.total", "absolute", "", ""),
        ("decode.time", "share", "", "h100_sxm"),  # as reports call it
        ("decode.time", "crossing", "", ""),
        ("decode.tpot", "absolute", "chat", ""),
    ]


def test_pyproject_holds_the_same(project):
    nested = GOOD.replace("[[scenarios]]", "[[tool.fxroof.scenarios]]").replace("[budgets]", "[tool.fxroof.budgets]")
    inside = read(project("[project]\nname = 'x'\n[tool.fxroof]\n" + nested, "pyproject.toml"))
    assert inside.settings == read(project(GOOD)).settings


def test_the_nearest_file_counts(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    assert find(inner) is None
    (tmp_path / "fxroof.toml").write_text('targets = ["far.py"]')
    (tmp_path / "a" / "pyproject.toml").write_text("[tool.ruff]\nline-length = 100")  # not ours: looked beyond
    assert find(inner).settings.targets == ("far.py",)
    (tmp_path / "a" / "pyproject.toml").write_text('[tool.fxroof]\ntargets = ["near.py"]')
    assert find(inner).settings.targets == ("near.py",)
    (tmp_path / "a" / "fxroof.toml").write_text('targets = ["nearest.py"]')
    assert find(inner).settings.targets == ("nearest.py",)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("\n# a comment\ntarget = ['m.py']\n", 3, "target is not known"),
        ("targets = [\n  'm.py',\n  3,\n]\n", 1, "Expected `str`"),
        ("gpus = ['h100']\nfail-on = 'warn'\n", 2, "fail-on"),
        ("[[scenarios]]\nname='a'\n\n[[scenarios]]\nname='b'\nbatch-size='two'\n", 6, "scenarios"),
        ("[[scenarios]]\nname='a'\nbatch-size=0\n", 3, ">= 1"),
        ("[[scenarios]]\nbatch-size=1\n", 1, "name"),
        ("[[scenarios]]\nname='a'\nbatch_size=2\n", 3, "batch_size is not known"),
        ("[budgets]\ndecode.tpot = '12 ms'\ndecode.topt = '12 ms'\n", 3, "decode.topt"),
        ("[budgets]\nmemory.total = '12 ms'\n", 2, "not in bytes"),
        ("[budgets]\nmemory.total = 80\n", 2, "80 is no limit"),
        ("[budgets.decode.tpot]\nlimit = '1 ms'\nscenario = 'chat'\n", 1, "there is no scenario 'chat'"),
        ("\n[budgets]\ndecode.tpot = {limit = '1 ms', gpu = 'h1000'}\n", 3, "h1000"),
        ("gpus=['b200']\nmin-saving = 'much'\n", 2, "no share"),
        ("gpus=['b200']\n\nmemory-limit = 'all'\n", 3, "no size"),
    ],
)
def test_what_means_nothing_is_refused_with_its_line(project, text, line, said):
    file = project(text)
    with pytest.raises(ConfigError) as caught:
        read(file)
    assert caught.value.message.startswith(f"{file}:{line}: ")
    assert said in caught.value.message
    assert caught.value.hint


def test_near_names_are_suggested(project):
    with pytest.raises(ConfigError) as caught:
        read(project("fail_on = 'error'"))
    assert "fail-on" in caught.value.hint


@pytest.mark.parametrize("text", ["targets = [", "a = 1\na = 2\n", "x = " + "[" * 5000, "x = " + "9" * 5000, "x = 1\0"])
def test_what_is_no_toml_is_refused(project, text):
    with pytest.raises(ConfigError) as caught:
        read(project(text))
    assert "is no TOML" in caught.value.message


def test_no_file_and_no_utf8(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes("# ä".encode("latin-1"))
    with pytest.raises(ConfigError, match="UTF-8"):
        read(tmp_path / "latin.toml")


def test_two_scenarios_of_one_name(project):
    with pytest.raises(ConfigError, match="two scenarios are called 'a'"):
        read(project("[[scenarios]]\nname='a'\n[[scenarios]]\nname='a'\n"))
