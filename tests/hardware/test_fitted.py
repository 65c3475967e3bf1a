"""Figures fitted on measured kernels: which part has them, and what the others take over from it."""

import pickle
import re
from pathlib import Path

import pytest
from fxroof.hardware.catalog import CatalogError, all_gpus, load
from fxroof.hardware.gpu import FITTED, UNITS
from hypothesis import given
from hypothesis import strategies as st

MEASURED = ("a100_sxm_80gb", "h100_sxm")
# blocks of a cluster load for each other on Hopper and on the Blackwell of data centres and of Thor, and nowhere else
LIKE_H100 = ["h100", "h200", "h20", "gh200", "b200", "b300", "gb200", "gb300", "jetson_thor"]
COUNTED = 'name = "Mine"\nmemory_bandwidth_gb_per_s = 1000\nboost_clock_mhz = 1000\nsm_count = 10\n'


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Loads a part of a user's own that says this beside the least."""
    path = tmp_path_factory.mktemp("parts") / "mine.toml"

    def read(text, *, vendor="nvidia", least=COUNTED):
        path.write_text(f'vendor = "{vendor}"\n{least}{text}')
        return load(path).gpu

    return read


def origins(gpu):
    return {figure.taken_from or gpu.key for figure in gpu.figures if figure.key in FITTED}


@pytest.mark.parametrize("gpu", all_gpus(), ids=lambda gpu: gpu.key)
def test_every_nvidia_part_with_a_clock_has_figures_of_a_part_like_it(gpu):
    if gpu.vendor != "nvidia" or not gpu.clock_hz:
        assert (gpu.fitted, origins(gpu)) == ({}, set())
        return
    expected = "h100_sxm" if gpu.key.startswith(tuple(LIKE_H100)) else "a100_sxm_80gb"
    assert origins(gpu) == {expected}
    assert gpu.fitted == load(expected).gpu.fitted
    assert gpu.fitted.keys() == FITTED.keys()


def test_only_the_parts_that_were_measured_have_figures_of_their_own():
    assert tuple(gpu.key for gpu in all_gpus() if origins(gpu) == {gpu.key}) == MEASURED


def test_what_is_taken_over_cites_the_part_and_the_source_there():
    own = {figure.key: figure for figure in load("h100_sxm").gpu.figures}["product_cycles"]
    other = {figure.key: figure for figure in load("b200").gpu.figures}["product_cycles"]
    sibling = {figure.key: figure for figure in load("h200_sxm").gpu.figures}["product_cycles"]
    named = {figure.key: figure for figure in load("rtx_5090").gpu.figures}["product_cycles"]
    assert "A100 SXM and the H100 SXM" in own.source_title
    assert other.source_title == f"{own.source_title}, taken over from h100_sxm: the nearest that was measured"
    assert sibling.source_title == f"{own.source_title}, taken over from h100_sxm: same architecture"
    assert named.source_title.endswith(", taken over from a100_sxm_80gb: named in its file")
    assert (other.value, other.unit, other.taken_from) == (own.value, "clk", "h100_sxm")


@given(st.integers(0, 40), st.integers(0, 9))
def test_a_file_of_a_users_own_gets_the_figures_of_the_nearest_capability(mine, major, minor):
    gpu = mine(f'compute_capability = "{major}.{minor}"')
    assert origins(gpu) == {"h100_sxm" if 9 <= major <= 11 else "a100_sxm_80gb"}


def test_parts_of_one_capability_take_over_from_one_part():
    found = {}
    for gpu in all_gpus():
        if gpu.fitted:
            found.setdefault(gpu.compute_capability, set()).update(origins(gpu))
    assert {capability: keys for capability, keys in found.items() if len(keys) > 1} == {}


def test_what_a_shipped_part_names_holds_for_parts_like_it(mine):
    (figure, *_) = (f for f in mine('compute_capability = "12.0"').figures if f.key in FITTED)
    assert "taken over from a100_sxm_80gb: as on rtx_" in figure.source_title


def test_without_a_capability_a_part_is_taken_for_the_oldest(mine):
    assert origins(mine("")) == {"a100_sxm_80gb"}


@pytest.mark.parametrize("vendor", ["nvidia", "me"])
def test_a_file_may_name_the_part_whose_kernels_are_alike(mine, vendor):
    gpu = mine('compute_capability = "8.0"\nkernels_like = "h100_sxm"', vendor=vendor)
    assert gpu.fitted == load("h100_sxm").gpu.fitted
    assert origins(gpu) == {"h100_sxm"}


def test_own_figures_stay_and_the_others_are_taken_over(mine):
    gpu = mine('compute_capability = "9.0"\nkernel_cycles = 2000')
    assert gpu.fitted == {**load("h100_sxm").gpu.fitted, "kernel_cycles": 2000}
    assert origins(gpu) == {"mine", "h100_sxm"}
    assert pickle.loads(pickle.dumps(gpu)) == gpu  # noqa: S301  # our own


def test_a_part_with_all_of_its_own_takes_nothing_over_whoever_made_it(mine):
    values = {key: 0.5 if key.endswith("_fraction") else 700 for key in FITTED}
    gpu = mine("".join(f"{key} = {value}\n" for key, value in values.items()), vendor="me")
    assert (gpu.fitted, origins(gpu)) == (values, {"mine"})


@pytest.mark.parametrize("vendor", ["amd", "me"])
def test_parts_of_vendors_without_measured_kernels_have_none(mine, vendor):
    assert mine('compute_capability = "9.0"', vendor=vendor).fitted == {}


@pytest.mark.parametrize("known", ["", "boost_clock_mhz = 1000", "sm_count = 10"])
def test_without_clock_or_sms_nothing_is_taken_over(mine, known):
    least = f'name = "Mine"\nmemory_bandwidth_gb_per_s = 1\n{known}\n'
    assert mine('compute_capability = "9.0"', least=least).fitted == {}
    for asked in ('kernels_like = "h100_sxm"', "product_cycles = 100"):
        with pytest.raises(CatalogError, match="needs a clock and a count of SMs") as caught:
            mine(asked, least=least)
        assert "boost_clock_mhz" in caught.value.hint


@pytest.mark.parametrize("name", ["h1000", "h100", "h200_sxm", "mi300x", "", "x" * 1000])
def test_only_a_part_that_was_measured_can_be_named(mine, name):
    with pytest.raises(CatalogError, match=r"mine\.toml: kernels_like is '") as caught:
        mine(f'kernels_like = "{name}"')
    assert len(caught.value.message) < 300
    if name:
        assert caught.value.hint == "name one of a100_sxm_80gb, h100_sxm, or remove it"


def test_some_figures_alone_are_not_enough(mine):
    with pytest.raises(CatalogError, match="product_cycles is missing") as caught:
        mine("kernel_cycles = 100", vendor="me")
    assert "kernels_like" in caught.value.hint


def test_a_unit_is_in_the_name_of_every_figure():
    units = {"cycles": "clk", "fraction": "fraction", "factor": "factor"}
    assert {key: UNITS[key] for key in FITTED} == {key: units[key.rsplit("_", 1)[1]] for key in FITTED}


def test_the_documented_figures_are_those_of_the_files():
    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text(encoding="utf-8")
    rows = {row[1]: row for row in re.finditer(r"^\| [^|]+ \| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)}
    a100, h100 = (load(key).gpu.fitted for key in MEASURED)
    assert rows.keys() == FITTED.keys()
    for key, row in rows.items():
        of_a100, of_h100 = row[2], row[3]
        first, second = (re.match(r"[\d.,]*\d", cell) for cell in (of_a100, of_h100))
        assert first or of_a100 == "the H100's"
        assert second or of_h100.startswith("the same")
        told = [float(found[0].replace(",", "")) for found in (first, second) if found]
        assert told in ([a100[key], h100[key]], [a100[key]] if a100[key] == h100[key] else [])
