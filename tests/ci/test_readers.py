"""What comes out of files: whatever they hold, one message that says what is wrong, or a value that all can use."""

import contextlib
import json
import resource
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from fxroof.analyzer.baseline import BaselineError, applied, entries, pruned, to_text
from fxroof.analyzer.baseline import read as read_baseline
from fxroof.analyzer.budgets import METRICS, BudgetError, budgets, from_texts, judge
from fxroof.analyzer.cli import main
from fxroof.analyzer.config import FILES, ConfigError, Settings, find
from fxroof.analyzer.config import read as read_settings
from fxroof.analyzer.diff import diff
from fxroof.analyzer.errors import FxroofError, ReportFileError
from fxroof.analyzer.graph import Graph, Op, Role, Storage, Tensor, TensorRef
from fxroof.analyzer.pipeline import reprice
from fxroof.analyzer.render import _diff
from fxroof.analyzer.render.registry import Options, formats, render
from fxroof.analyzer.report import SCHEMA_VERSION, from_json, is_report, read_report, to_json
from fxroof.analyzer.review import Selection
from fxroof.hardware.catalog import CatalogError
from fxroof.hardware.catalog import load as load_gpu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from render.hostile import SURROGATES, everywhere
from render.sample import report, retraced

OFTEN = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NO_RULES = Selection(select=("TRC001",))


def graph():
    """A linear layer, a view of its result, and an activation written over its input, twice."""
    shapes = ((64, 32), (4, 32), (4, 64), (2, 2, 64))
    sizes = [2 * 64 * 32, 2 * 4 * 32, 2 * 4 * 64]
    roles = (Role.WEIGHT, Role.INPUT, Role.ACTIVATION)
    storages = [Storage(nbytes=n, role=role, name=role.value) for n, role in zip(sizes, roles, strict=True)]
    tensors = [
        Tensor(storage=min(index, 2), dtype="bfloat16", shape=shape, stride=strides(shape))
        for index, shape in enumerate(shapes)
    ]
    weight, x, y, view = (TensorRef(tensor=index) for index in range(4))
    ops = (
        Op(
            name="linear", target="aten.linear.default", args={"input": x, "weight": weight, "bias": None}, outputs=(2,)
        ),
        Op(name="view", target="aten.view.default", args={"self": y, "size": (2, 2, 64)}, outputs=(3,)),
        Op(name="silu", target="aten.silu_.default", args={"self": view}, outputs=(3,), mutates=("self",), repeat=2),
    )
    return Graph(
        phase="decode", tokens=4, storages=tuple(storages), tensors=tuple(tensors), ops=ops, inputs=(1,), outputs=(3,)
    )


def strides(shape):
    found = [1]
    for size in reversed(shape[1:]):
        found.append(found[-1] * size)
    return tuple(reversed(found))


def whole():
    """A report with something in every field that can hold something, and with a graph that can be priced."""
    several = report(several=True)
    filled = retraced(several, graphs=several.graphs | {"decode": graph()})
    return replace(filled, verdicts=judge(filled, from_texts(["decode.tpot=1 ms", "memory.total=+2%"])))


WHOLE = whole()
TEXT = to_json(WHOLE)
DATA = json.loads(TEXT)


def refused(text):
    with pytest.raises(ReportFileError) as caught:
        from_json(text)
    return caught.value.message


def changed(path, value):
    """The report's JSON with another value at a path such as `runs.0.traced`."""
    data = deepcopy(DATA)
    *parents, last = (int(part) if part.isdecimal() else part for part in path.split("/"))
    at = data
    for part in parents:
        at = at[part]
    at[last] = value(at[last]) if callable(value) else value
    return json.dumps(data)


def test_what_was_written_is_read_back():
    assert from_json(TEXT) == WHOLE
    assert to_json(from_json(TEXT)) == TEXT
    assert from_json(b"\xef\xbb\xbf" + TEXT.encode()) == WHOLE
    assert from_json(TEXT.encode("utf-16")) == WHOLE  # as a Windows shell redirects it


def test_every_beginning_of_a_report_is_refused():
    octets = TEXT.encode()
    whole = len(octets.rstrip())
    for length in (*range(300), *range(300, whole, whole // 97), whole - 1):
        refused(octets[:length])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a JSON object"),
        ("[]", "not a JSON object"),
        ("12", "not a JSON object"),
        ("null", "not a JSON object"),
        ('"text"', "not a JSON object"),
        ("{}", "not an fxroof report"),
        ('{"version": "1", "pip_version": "24.0", "install": [], "environment": {}}', "not an fxroof report"),
        ('{"version": "2.1.0", "runs": []}', "not an fxroof report"),
        ('{"schema_version": "2.3.0", "runs": []}', "not an fxroof report"),
        ('{"schema_version": null}', "not an fxroof report"),
        (f'{{"schema_version": {"9" * 4000}}}', "not an fxroof report"),
        (f'{{"schema_version": {SCHEMA_VERSION}}}', "damaged report"),
        (f'{{"schema_version": {SCHEMA_VERSION}, "runs": NaN}}', "not a JSON object"),
        (f'{{"schema_version": {SCHEMA_VERSION}, "runs": {"[" * 10**6}', "nested too deeply"),
        (f'{{"schema_version": {SCHEMA_VERSION}, "more": {"[" * 10**6}{"]" * 10**6}}}', "nested too deeply"),
        (f'{{"schema_version": {"[" * 10**6}{"]" * 10**6}}}', "nested too deeply"),
        (b'{"schema_version": 4, "fxroof_version": "\xff"}', "damaged report"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_report_is_refused(text, said):
    assert said in refused(text)


@pytest.mark.parametrize(("version", "said"), [(1, "an older fxroof"), (SCHEMA_VERSION + 1, "a newer fxroof")])
def test_other_schema_versions_say_which_and_what_to_do(version, said):
    with pytest.raises(ReportFileError) as caught:
        from_json(json.dumps({"schema_version": version, "unknown": []}))
    assert f"version {version}; this fxroof reads version {SCHEMA_VERSION}" in caught.value.message
    assert said in caught.value.message
    assert "Write the report again" in caught.value.hint or "Update fxroof" in caught.value.hint


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("traces", [], "traces: there is none"),
        ("runs/0/traced", 1, "runs[0].traced: there is no trace 1"),
        ("runs/1/traced", -1, "runs[1].traced is -1, below 0"),
        ("runs/1/waterfall/decode/1/finding", 3, "runs[1].waterfall.decode[1].finding: there is no finding 3"),
        ("runs/1/waterfall/decode/1/finding", -1, "finding is -1"),
        ("runs/0/phases/1/name", "decoding", "runs[0].phases[1].name: there is no graph of 'decoding'"),
        ("runs/0/phases/1/name", "prefill", "two have the same name"),
        ("runs/0/phases/0/execution", "fast", "runs[0].phases[0].execution: 'fast' is none"),
        ("runs/0/phases/0/turns", 0, "turns: is 0"),
        ("runs/0/phases/0/ops/3/seconds", -1e-6, "runs[0].phases[0].ops[3].seconds is -1e-06, below 0"),
        ("runs/0/phases/0/ops/3/bytes_read", 10**61, "ops[3].bytes_read is too large a number"),
        ("runs/0/phases/0/ops/3/name", "lm_head", "ops: two have the same name"),
        ("runs/0/phases/0/ops/3/ridge", -1.0, "ops[3].ridge is -1"),
        ("runs/0/phases/0/ops/3/lanes/memory", -1.0, "ops[3].lanes.memory is -1"),
        ("runs/0/phases/0/bound_share", {"magic": 1.0}, "bound_share: 'magic' is no class"),
        ("runs/0/phases/0/bound_share", {"memory": 1e9}, "bound_share.memory: is 1e+09, more than all"),
        ("runs/0/phases/0/executions/eager/estimate_share", {"magic": 1.0}, "eager.estimate_share: 'magic'"),
        ("runs/0/phases/0/executions/compiled/kernels/2/ops", [], "compiled.kernels[2].ops: there is none"),
        ("runs/0/phases/0/executions/compiled/kernels/2/ops", ["x"], "compiled.kernels[2].ops: one is not among"),
        ("runs/0/findings/0/saving_seconds/decode", 1e61, "findings[0].saving_seconds.decode is too large"),
        ("runs/0/findings/0/evidence/cache_bytes", 10**400, "findings[0].evidence.cache_bytes: is too large"),
        ("runs/0/gpu/memory_bandwidth", 0.0, "gpu.memory_bandwidth: is 0"),
        ("runs/0/gpu/matmul_peaks/bfloat16", -1.0, "gpu.matmul_peaks.bfloat16 is -1"),
        ("runs/0/memory/usable_bytes", 0, "memory.usable_bytes: is 0"),
        ("runs/0/memory/usable_bytes", -1, "memory.usable_bytes is -1"),
        ("runs/0/serving/weights_bound_until", "never", "weights_bound_until: 'never' is nothing that takes over"),
        ("runs/0/scenario/batch_size", 0, "runs[0].scenario.batch_size: is 0, below 1"),
        ("traces/0/scenario/prefix_len", 4096, "traces[0].scenario.prefix_len: leaves nothing of the prompt"),
        ("traces/0/model/parameters", -1, "traces[0].model.parameters is -1"),
        ("traces/0/model/dtypes", "bfloat16", "Expected `object`"),
        ("traces/0/graphs/decode/phase", "prefill", "graphs.decode: is the graph of 'prefill'"),
        ("traces/0/graphs/decode/turns", 0, "graphs.decode.turns: is 0"),
        ("traces/0/graphs/decode/inputs", [4], "graphs.decode.inputs: there is no tensor 4"),
        ("traces/0/graphs/decode/outputs", [-1], "graphs.decode.outputs: there is no tensor -1"),
        ("traces/0/graphs/decode/storages/0/nbytes", -1, "graphs.decode.storages[0].nbytes is -1"),
        ("traces/0/graphs/decode/tensors/0/storage", 3, "tensors[0].storage: there is no storage 3"),
        ("traces/0/graphs/decode/tensors/0/shape", "64x32", "Expected `array`, got `str`"),
        ("traces/0/graphs/decode/tensors/0/shape", [64], "tensors[0].stride: 2 for a shape of 1"),
        ("traces/0/graphs/decode/tensors/0/shape", [64, -32], "tensors[0].shape: is below 0"),
        ("traces/0/graphs/decode/tensors/0/shape", [10**30, 32], "tensors[0].shape: has more elements"),
        ("traces/0/graphs/decode/tensors/0/dtype", "float7", "tensors[0].dtype: 'float7' is none"),
        ("traces/0/graphs/decode/ops/0/outputs", [9], "ops[0].outputs: there is no tensor 9"),
        ("traces/0/graphs/decode/ops/0/args/input", {"tensor": 9}, "ops[0].args.input: there is no tensor 9"),
        ("traces/0/graphs/decode/ops/1/args/size", [2, {"tensor": -1}], "ops[1].args.size: there is no tensor -1"),
        ("traces/0/graphs/decode/ops/1/args/size", [2, 10**30], "ops[1].args.size: is too large"),
        ("traces/0/graphs/decode/ops/2/mutates", ["other"], "ops[2].mutates: there is no argument 'other'"),
        ("traces/0/graphs/decode/ops/2/repeat", 0, "ops[2].repeat: is 0"),
        ("traces/0/graphs/decode/ops/2/kernel", "gone", "ops[2].kernel: there is no op 'gone'"),
        ("traces/0/graphs/decode/ops/2/branch", ["linear:2"], "ops[2].branch: 'linear:2' is none"),
        ("traces/0/graphs/decode/ops/2/name", "view", "ops: two have the same name"),
        ("verdicts/0/budget/of", "guess", "Invalid enum value 'guess'"),
        ("verdicts/0/run", None, "Expected `str`, got `null`"),
    ],
)
def test_a_damaged_report_says_where(path, value, said):
    message = refused(changed(path, value))
    assert message.startswith("report: damaged report: ")
    assert said in message
    assert len(message) < 500


def test_figures_that_can_be_below_0_may_be():
    for path in ("findings/0/saving_seconds/decode", "memory/headroom_bytes", "findings/0/evidence/cache_bytes"):
        from_json(changed(f"runs/0/{path}", -3))


def uses(found):
    """Everything that is done with a report, but pricing it again."""
    for name in formats():
        render(found, name, Options())
    render(found, "terminal", Options(width=40, by="module", unicode=False, colour=True))
    assert repr(found)
    for base, head in ((WHOLE, found), (found, WHOLE)):
        compared = diff(base, head)
        for shown in _diff.FORMATS.values():
            shown(compared, head, Options())
    judge(found, [b for name in METRICS for b in from_texts([f"{name}=+2%"])], dict(enumerate(found.runs)))
    known = entries(found)
    to_text(pruned(known, applied(WHOLE, known)))


NUMBERS = (0, 1, -1, 3, 2**40, 2**63, 10**30, -(10**30), 0.5, -0.5, 5e-324, 1e-300, 1e30, 1e60, 1e308, -1e308)
WORDS = ("", "x", "\x1b", "aten.linear.default", "linear:0", "a" * 400)
ODD = st.sampled_from([None, True, *NUMBERS, *WORDS, [], {}, [0], ["x"], {"a": 1}, {"tensor": 1}])


@st.composite
def paths(draw, value):
    """Where something is in a JSON value."""
    path = []
    while isinstance(value, dict | list) and value:
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        path.append(key)
        value = value[key]
        if draw(st.integers(0, 7)) == 0:
            break
    return path


class Mutated:
    """A JSON value that a failing test does not print."""

    def __init__(self, value, said):
        self.value = value
        self.said = said

    def __repr__(self):
        return f"<{self.said}>"


@st.composite
def mutations(draw, original, within=()):
    """A JSON value with something in it replaced, removed, doubled, or taken from elsewhere in it."""
    data = deepcopy(original)
    root = data
    for key in within:
        root = root[key]
    said = []
    for _ in range(draw(st.integers(1, 2))):
        *parents, last = draw(paths(root).filter(bool))
        at = root
        for key in parents:
            at = at[key]
        said.append((*parents, last))
        how = draw(st.sampled_from(["replace", "replace", "remove", "double", "other", "scale"]))
        if how == "replace":
            at[last] = deepcopy(draw(ODD))
        elif how == "remove":
            del at[last]
        elif how == "double" and isinstance(at, list):
            at.insert(last, deepcopy(at[last]))
        elif how == "scale" and isinstance(at[last], int | float):
            at[last] *= draw(st.sampled_from([-1, 2, 1000, 10**12]))
        else:
            other = root
            for key in draw(paths(root)):
                other = other[key]
            at[last] = deepcopy(other)
        said.append(how)
    return Mutated(data, said)


@given(data=st.data())
@OFTEN
def test_a_changed_report_is_refused_or_can_be_used(data):
    try:
        found = from_json(json.dumps(data.draw(mutations(DATA)).value))
    except ReportFileError:
        return
    uses(found)


@given(data=st.data())
@OFTEN
def test_a_changed_graph_is_refused_or_can_be_priced(data):
    within = ("traces", 0, "graphs", "decode")
    try:
        found = from_json(json.dumps(data.draw(mutations(DATA, within)).value))
        again = reprice(found, gpus=["h100"], execution=data.draw(st.sampled_from(["eager", "compiled"])))
    except FxroofError:
        return
    render(again, "terminal", Options())
    assert from_json(to_json(again)) == again


@given(st.binary(max_size=4), st.integers(0, len(TEXT.encode()) - 1))
@OFTEN
def test_flipped_bytes_are_refused_or_can_be_used(octets, place):
    text = TEXT.encode()
    try:
        found = from_json(text[:place] + octets + text[place + len(octets) :])
    except ReportFileError:
        return
    uses(found)


def test_a_key_that_is_there_twice_has_its_last_value():
    assert from_json('{"schema_version": 1,' + TEXT.lstrip()[1:]) == WHOLE


@pytest.mark.parametrize("name", ["analyze", "diff", "baseline"])
def test_a_damaged_report_ends_a_command_with_one_message(tmp_path, name):
    saved = tmp_path / "report.json"
    saved.write_text(changed("runs/0/traced", 7))
    commands = {
        "analyze": ["analyze", saved, "--gpu", "h100"],
        "diff": ["diff", saved, saved],
        "baseline": ["baseline", "write", saved, "--baseline", tmp_path / "known.json"],
    }
    result = CliRunner().invoke(main, [str(part) for part in commands[name]])
    assert result.exit_code == 2
    assert result.stderr.count("error:") == 1
    assert "runs[0].traced: there is no trace 7" in " ".join(result.stderr.split())
    assert not result.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_what_means_to_be_a_report_is_told_from_what_does_not(tmp_path):
    file = tmp_path / "a.json"
    for content, expected in (
        (TEXT, True),
        (TEXT[:200], True),
        ('{"schema_version": 3}', True),
        ('{"model_type": "llama"}', False),
        ("[" * 10**5, False),
        ("", False),
    ):
        file.write_text(content)
        assert is_report(file) is expected
    assert not is_report(tmp_path)
    assert not is_report(tmp_path / "none.json")


def test_devices_and_folders_are_no_reports(tmp_path):
    for path, said in ((tmp_path, "cannot be read"), (Path("/dev/zero"), "not a JSON object")):
        if path.exists():
            with pytest.raises(ReportFileError, match=said):
                read_report(path)


def test_names_that_are_no_utf8_are_written_as_escapes():
    odd = everywhere(report(), SURROGATES)
    text = to_json(odd)
    again = from_json(text.encode())
    assert again.model.name == r"SmallGPT\ud800\udc80"
    assert to_json(again) == text
    assert json.loads(_diff.as_json(diff(odd, odd)))
    known = entries(odd)
    assert not [f for run in applied(odd, known).runs for f in run.findings if not f.suppressed]
    json.loads(to_text(known).encode())


def test_memory_stays_small_whatever_a_number_says():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in ("runs/0/phases/0/bound_share/memory", "runs/0/phases/0/turns", "runs/0/scenario/batch_size"):
        for value in (10**9, 10**15, 2**62):
            try:
                found = from_json(changed(path, value))
            except ReportFileError:
                continue
            uses(found)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


@given(data=st.data())
@OFTEN
def test_a_changed_baseline_is_refused_or_can_be_used(tmp_path, data):
    file = tmp_path / "known.json"
    text = json.dumps(data.draw(mutations(json.loads(to_text(entries(WHOLE))))).value)
    cut = data.draw(st.integers(0, 3 * len(text)))
    file.write_text(text[:cut])
    try:
        known = read_baseline(file)
    except BaselineError:
        return
    applied(WHOLE, known)
    file.write_text(to_text(known))
    assert read_baseline(file) == known


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"version": 2, "other": []}', "version 2; this fxroof reads version 1"),
        (b'{"version": 1, "findings": [{"rule": "A", "module": "", "op": "", "phase": "", "gpu": "", "count": -1}]}',
         "count"),
        (b'{"version": 1, "findings": [' + b"[" * 10**5, "nested too deeply"),
        (b'{"version": 1, "findings": "\xff"}', "is no baseline"),
        (b"", "is no baseline"),
    ],
)  # fmt: skip
def test_baselines_that_are_none(tmp_path, content, said):
    file = tmp_path / "known.json"
    file.write_bytes(content)
    with pytest.raises(BaselineError, match=said):
        read_baseline(file)


@given(st.text(alphabet="decode.tpot=+-0123456789 ms%GB,_crossing\x00é٣", max_size=40))
@OFTEN
def test_any_text_is_a_budget_or_none(text):
    try:
        found = from_texts([text, f"decode.tpot={text}"])
    except BudgetError:
        return
    assert all(abs(budget.limit) < float("inf") for budget in found)
    judge(WHOLE, found, dict(enumerate(WHOLE.runs)))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["decode", "decode.tpot", "memory.total", "limit", "of"]), VALUES, max_size=3))
@OFTEN
def test_any_table_is_budgets_or_none(table):
    with contextlib.suppress(BudgetError):
        budgets(table)


def toml(value):
    """A value as TOML; None, which TOML has not, as a text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml(key)} = {toml(item)}' for key, item in value.items())}}}"
    if isinstance(value, int | float):
        return repr(value)
    return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08X}" for c in str(value)) + '"'


KEYS = [*Settings.__struct_encode_fields__, "nothing"]
TABLES = st.dictionaries(st.sampled_from(KEYS), VALUES | ODD, max_size=3)


@given(table=TABLES, name=st.sampled_from(FILES), head=st.sampled_from(["[tool.fxroof]\n", "[tool]\nfxroof = 1\n", ""]))
@OFTEN
def test_any_settings_are_read_or_refused(tmp_path, table, name, head):
    for other in FILES:
        (tmp_path / other).unlink(missing_ok=True)
    file = tmp_path / name
    lines = [f"{key} = {toml(value)}\n" for key, value in table.items()]
    file.write_text((head if name == "pyproject.toml" else "") + "".join(lines), encoding="utf-8")
    for read in (lambda: read_settings(file), lambda: find(tmp_path)):
        with contextlib.suppress(ConfigError):
            read()


@pytest.mark.parametrize("content", [b"\xff", b"[", b"a = " + b"[" * 10**5, b"\x00", b"targets = 1e400", b""])
@pytest.mark.parametrize("read", [read_settings, load_gpu])
def test_what_is_no_toml_is_refused(tmp_path, content, read):
    file = tmp_path / "fxroof.toml"
    file.write_bytes(content)
    if content or read is load_gpu:
        with pytest.raises((ConfigError, CatalogError), match=r"fxroof\.toml"):
            read(file)


FIGURES = {
    "name": "Mine",
    "vendor": "nvidia",
    "memory_bandwidth_gb_per_s": 3000,
    "memory_gb": 80,
    "tensor_bf16_tflops": 900,
    "vector_fp32_tflops": 60,
    "sm_count": 100,
    "boost_clock_mhz": 1700,
    "l2_cache_mb": 50,
    "achieved_memory_read_fraction": 0.9,
}


@given(
    st.dictionaries(st.sampled_from([*FIGURES, "notes", "compute_capability", "nothing"]), VALUES | ODD, max_size=2),
    st.sampled_from(["", *FIGURES]),
    st.sampled_from([1e-9, 1e-3, 1e3, 1e9]),
)
@OFTEN
def test_any_gpu_is_read_and_priced_or_refused(tmp_path, table, scaled, factor):
    figures = FIGURES | table
    if isinstance(figures.get(scaled), int | float):
        figures[scaled] = float(figures[scaled]) * factor
    file = tmp_path / "mine.toml"
    file.write_text("".join(f"{key} = {toml(value)}\n" for key, value in figures.items()))
    try:
        load_gpu(str(file))
    except CatalogError:
        return
    again = reprice(WHOLE, gpus=[str(file)], selection=NO_RULES)
    render(again, "terminal", Options())
    assert from_json(to_json(again)) == again
