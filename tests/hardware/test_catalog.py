"""Finding parts by name, and refusing files that cannot be used."""

import pickle
from pathlib import Path

import pytest
from fxroof.hardware.catalog import CATALOG_VERSION, CatalogError, all_gpus, load, names
from hypothesis import given
from hypothesis import strategies as st

KEYS = names()
MINIMAL = 'name = "Mine"\nvendor = "me"\nmemory_bandwidth_gb_per_s = 1000\n'
SOURCE = '[sources.s]\nkind = "vendor"\ntitle = "t"\nkeys = [{keys}]\n'


def test_every_shipped_file_loads():
    assert len(KEYS) == 62
    assert [gpu.key for gpu in all_gpus()] == list(KEYS)
    assert CATALOG_VERSION == "2026-11-21"


@pytest.mark.parametrize("key", KEYS)
def test_every_figure_cites_a_source(key):
    figures = load(key).gpu.figures
    assert figures
    for figure in figures:
        assert figure.source_title.strip()
        assert figure.source_kind in {"vendor", "repo", "measured", "secondary", "derived", "unverified"}
        assert figure.confidence in {"high", "medium", "low"}


@pytest.mark.parametrize("key", KEYS)
def test_figures_from_memory_are_marked_low(key):
    assert {f.confidence for f in load(key).gpu.figures if f.source_kind == "unverified"} <= {"low"}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_resolves_to_itself_without_a_note(key):
    resolved = load(key)
    assert (resolved.gpu.key, resolved.note) == (key, None)
    assert load(key.upper().replace("_", "-")).gpu is resolved.gpu


def test_no_name_belongs_to_two_parts():
    owners: dict[str, set[str]] = {}
    for gpu in all_gpus():
        for name in (gpu.key, gpu.name, *gpu.aliases, *gpu.shorthands):
            owners.setdefault("".join(filter(str.isalnum, name.casefold())), set()).add(gpu.key)
    assert {name: keys for name, keys in owners.items() if len(keys) > 1} == {}


@pytest.mark.parametrize("gpu", all_gpus(), ids=lambda gpu: gpu.key)
def test_device_names_and_shorthands_resolve_to_their_part(gpu):
    for alias in (gpu.name, *gpu.aliases):
        assert load(alias).gpu is gpu
        assert load(alias.upper().replace(" ", "_")).gpu is gpu
    for shorthand in gpu.shorthands:
        assert load(shorthand).gpu is gpu


@pytest.mark.parametrize(
    ("device_name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100_sxm"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H100 NVL", "h100_nvl"),
        ("NVIDIA H200", "h200_sxm"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA A100-SXM4-80GB", "a100_sxm_80gb"),
        ("A100-SXM4-80GB", "a100_sxm_80gb"),
        ("NVIDIA A100 80GB PCIe", "a100_pcie_80gb"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("NVIDIA GeForce RTX 5090", "rtx_5090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx_pro_6000_blackwell_server"),
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD Instinct MI250X", "mi250x_gcd"),
    ],
)
def test_what_torch_reports_is_recognised_without_a_note(device_name, key):
    resolved = load(device_name)
    assert (resolved.gpu.key, resolved.note) == (key, None)


@pytest.mark.parametrize(
    ("shorthand", "note"),
    [
        ("h100", "h100 means h100_sxm (NVIDIA H100 SXM5 80GB)"),
        ("H200", "H200 means h200_sxm (NVIDIA H200 SXM 141GB)"),
        ("a100", "a100 means a100_sxm_80gb (NVIDIA A100 SXM4 80GB)"),
        (
            "rtx pro 6000",
            "rtx pro 6000 means rtx_pro_6000_blackwell_ws (NVIDIA RTX PRO 6000 Blackwell Workstation 96GB)",
        ),
    ],
)
def test_a_family_name_says_which_part_it_was_taken_for(shorthand, note):
    assert load(shorthand).note == note


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("h1000", "h100_sxm"), ("b20", "b200"), ("mi300", "mi300x"), ("rtx4091", "rtx_4090")],
)
def test_an_unknown_name_suggests_the_nearest(name, suggestion):
    with pytest.raises(CatalogError, match=f"no GPU is called '{name}'") as caught:
        load(name)
    assert suggestion in caught.value.hint
    assert caught.value.hint.endswith("run `fxroof gpus` for the list")


@pytest.mark.parametrize("name", ["", " ", "-", "NVIDIA", "NVIDIA A100-SXM4-80GB MIG 3g.40gb", "x" * 10**6])
def test_a_name_of_no_part_is_refused_briefly(name):
    with pytest.raises(CatalogError) as caught:
        load(name)
    assert len(caught.value.message) < 100


@given(st.text(max_size=40))
def test_any_text_is_a_part_or_a_catalog_error(text):
    try:
        key = load(text).gpu.key
    except CatalogError:
        return
    assert key in KEYS


def test_a_user_file_needs_no_sources(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL + "tensor_bf16_tflops = 100\n")
    for spelling in (path, str(path)):
        gpu = load(spelling).gpu
        assert (gpu.key, gpu.name, gpu.confidence) == ("mine", "Mine", "unstated")
        assert gpu.ridge("bfloat16") == 100
        assert {figure.source_kind for figure in gpu.figures} == {"user"}


def test_a_user_file_may_cite_some_figures(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL + 'sm_count = 4\nlow_confidence_keys = ["sm_count"]\n' + SOURCE.format(keys='"sm_count"'))
    cited = {f.key: (f.source_id, f.confidence) for f in load(path).gpu.figures}
    assert cited == {"memory_bandwidth_gb_per_s": ("user", "unstated"), "sm_count": ("s", "low")}


def test_a_shipped_file_works_as_a_user_file():
    shipped = load("b200").gpu
    path = Path(__file__).parents[2] / "hardware" / "catalog" / "b200.toml"
    assert load(path).gpu == shipped


def test_parts_survive_pickling_and_hash():
    gpu = load("b200").gpu
    assert pickle.loads(pickle.dumps(gpu)) == gpu  # noqa: S301  # our own
    assert len({gpu, load("b200").gpu, load("h100").gpu}) == 2


HOSTILE = {
    "empty": ("", "name is missing"),
    "no bandwidth": ('name = "x"\nvendor = "y"', "memory_bandwidth_gb_per_s is missing"),
    "not TOML": ("name = = 1", "not TOML"),
    "duplicate key": (MINIMAL + 'name = "again"', "not TOML"),
    "deep nesting": ("a = " + "[" * 100_000, "not TOML"),
    "endless integer": (MINIMAL + "memory_gb = " + "9" * 10_000, "not TOML"),
    "huge integer": (MINIMAL + "memory_gb = " + "9" * 400, "memory_gb is 9"),
    "unknown key": (MINIMAL + "tensor_bf16_tflop = 1", "tensor_bf16_tflop is unknown"),
    "unknown table": (MINIMAL + "[meta]\nschema = 1", "meta is unknown"),
    "text for a number": (MINIMAL + 'sm_count = "132"', "sm_count is '132', not a number"),
    "number for text": (MINIMAL + "architecture = 9", "architecture is 9, not text"),
    "blank name": ('name = " "\nvendor = "y"\nmemory_bandwidth_gb_per_s = 1', "name is ' ', not text"),
    "truth for a number": (MINIMAL + "sm_count = true", "sm_count is True, not a number"),
    "date for a number": (MINIMAL + "sm_count = 2026-11-21", "not a number"),
    "list for a number": (MINIMAL + "sm_count = [1]", "not a number"),
    "half an SM": (MINIMAL + "sm_count = 1.5", "not a whole number"),
    "zero": (MINIMAL + "tensor_fp16_tflops = 0", "tensor_fp16_tflops is 0"),
    "negative": (MINIMAL + "tensor_fp16_tflops = -1.0", "tensor_fp16_tflops is -1.0"),
    "not a number": (MINIMAL + "tensor_fp16_tflops = nan", "tensor_fp16_tflops is nan"),
    "infinite": (MINIMAL + "tensor_fp16_tflops = inf", "tensor_fp16_tflops is inf"),
    "underflow": (MINIMAL + "tensor_fp16_tflops = 1e-320", "tensor_fp16_tflops is 1e-320"),
    "above the peak": (
        MINIMAL + "achieved_memory_read_fraction = 1.2",
        "achieved_memory_read_fraction is 1.2",
    ),
    "odd capability": (MINIMAL + 'compute_capability = "9"', "compute_capability is '9'"),
    "alias as text": (MINIMAL + 'aliases = "x"', "aliases is 'x', not a list"),
    "alias of numbers": (MINIMAL + "aliases = [1]", "aliases is 1, not text"),
    "odd confidence": (MINIMAL + 'confidence = "sure"', "confidence is 'sure'"),
    "list as confidence": (MINIMAL + "confidence = []", "confidence is []"),
    "confidence in nothing": (
        MINIMAL + 'low_confidence_keys = ["sm_count"]',
        "keys names 'sm_count'",
    ),
    "sources as text": (MINIMAL + 'sources = "web"', "sources is 'web', not a table"),
    "source as text": (MINIMAL + '[sources]\na = "web"', "sources.a is 'web', not a table"),
    "source without title": (
        MINIMAL + '[sources.a]\nkind = "vendor"\nkeys = []',
        "sources.a.title is missing",
    ),
    "source without keys": (
        MINIMAL + '[sources.a]\nkind = "vendor"\ntitle = "t"',
        "sources.a.keys is missing",
    ),
    "odd source kind": (
        MINIMAL + '[sources.a]\nkind = "rumour"\ntitle = "t"\nkeys = []',
        "sources.a.kind is 'rumour'",
    ),
    "odd source entry": (MINIMAL + SOURCE.format(keys="") + "page = 1", "sources.s.page is unknown"),
    "source of nothing": (MINIMAL + SOURCE.format(keys='"sm_count"'), "sources.s.keys names 'sm_count'"),
    "source of a name": (MINIMAL + SOURCE.format(keys='"name"'), "sources.s.keys names 'name'"),
    "two sources": (
        MINIMAL
        + SOURCE.format(keys='"memory_bandwidth_gb_per_s"')
        + SOURCE.format(keys='"memory_bandwidth_gb_per_s"').replace("sources.s", "sources.t"),
        "has two sources, s and t",
    ),
}


@pytest.mark.parametrize(("text", "complaint"), HOSTILE.values(), ids=HOSTILE)
def test_a_bad_file_gives_one_error_naming_file_and_fault(tmp_path, text, complaint):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(CatalogError) as caught:
        load(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert complaint in caught.value.message
    assert caught.value.hint
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x00" * 100, b"#" * (2**20 + 1)])
def test_bytes_that_are_no_text_are_refused(tmp_path, content):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(CatalogError, match=r"not TOML|larger than"):
        load(path)


@pytest.mark.parametrize("name", ["absent.toml", "folder.toml", "nul\0.toml", "x" * 5000 + ".toml"])
def test_a_path_to_no_file_is_refused(tmp_path, name):
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(CatalogError):
        load(str(tmp_path / name))


def test_an_unknown_key_suggests_the_right_one(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text(MINIMAL + "tensor_bf16_tflop = 1")
    with pytest.raises(CatalogError) as caught:
        load(path)
    assert caught.value.hint == "did you mean tensor_bf16_tflops?"


def test_a_shipped_figure_without_source_is_refused(tmp_path, monkeypatch):
    from fxroof.hardware import catalog

    (tmp_path / "bare.toml").write_text(MINIMAL)
    monkeypatch.setattr(catalog, "_FOLDER", tmp_path)
    with pytest.raises(CatalogError, match="memory_bandwidth_gb_per_s has no source"):
        catalog._shipped.__wrapped__("bare")
