"""Figures against what is known of the parts from elsewhere."""

import pytest
from fxroof.hardware.catalog import all_gpus, load, names

GIB = 1024**3
KEYS = names()


def gpu(key):
    return load(key).gpu


def figure(key, name):
    return next((f.value for f in gpu(key).figures if f.key == name), None)


# dense vendor peak over vendor bandwidth, FLOP per byte, worked out by hand from the datasheets
RIDGES = {
    ("h100_sxm", "bfloat16"): 295,
    ("h100_sxm", "float8_e4m3fn"): 591,
    ("h100_pcie", "bfloat16"): 371,
    ("h200_sxm", "bfloat16"): 206,
    ("b200", "bfloat16"): 292,
    ("b200", "float8_e4m3fn"): 584,
    ("b200", "float4_e2m1fn_x2"): 1169,
    ("b300", "float4_e2m1fn_x2"): 1753,
    ("b300", "int8"): 19,
    ("gb200", "bfloat16"): 312,
    ("a100_sxm_80gb", "bfloat16"): 153,
    ("a100_sxm_80gb", "int8"): 306,
    ("l4", "bfloat16"): 403,
    ("l40s", "float8_e5m2"): 848,
    ("rtx_4090", "bfloat16"): 164,
    ("rtx_5090", "bfloat16"): 117,
    ("mi300x", "bfloat16"): 247,
    ("mi300x", "float8_e4m3fnuz"): 493,
    ("mi355x", "float4_e2m1fn_x2"): 1258,
    ("gaudi3", "bfloat16"): 500,
    ("tpu_v5e", "int8"): 480,
    ("h100_sxm", "float32"): 20,
    ("m2_ultra", "float32"): 34,
}


@pytest.mark.parametrize(("key", "dtype"), RIDGES)
def test_ridge_point(key, dtype):
    assert gpu(key).ridge(dtype) == pytest.approx(RIDGES[key, dtype], abs=0.5)


# dense 16-bit matrix FLOP per clock and SM (CU, Xe-core): architecture constants of the vendors' whitepapers
FLOPS_PER_CLOCK = {
    1024: "v100_sxm2_16gb v100_sxm2_32gb t4 a10 a40 rtx_a6000 l4 l40s rtx_6000_ada rtx_pro_6000_blackwell_ws "
    "rtx_pro_6000_blackwell_server dgx_spark_gb10 mi210 mi250x mi250x_gcd",
    512: "a10g l40 rtx_3090 rtx_4090 rtx_5090 rx_7900_xtx strix_halo_395",
    2048: "a100_sxm_40gb a100_pcie_40gb a100_sxm_80gb a100_pcie_80gb jetson_agx_orin_64gb mi300a mi300x "
    "mi325x arc_b580",
    4096: "h100_sxm h100_pcie h200_sxm gh200_96gb gh200_144gb mi350x mi355x max_1550",
    8192: "b200 b300 gb200 gb300 jetson_thor_t5000",
}
# data-centre Hopper and Blackwell quote the tensor peak below the boost clock, by up to 9%
QUOTED_BELOW_BOOST = {
    "h100_sxm", "h100_pcie", "h200_sxm", "gh200_96gb", "gh200_144gb", "b200", "b300", "gb200", "gb300",
}  # fmt: skip
CLOCK_UNRELATED = {
    "h100_nvl": "power-limited quote",
    "h200_nvl": "power-limited quote",
    "h20": "capped tensor rate",
    "rubin": "pre-release, no clock",
}


@pytest.mark.parametrize(
    ("key", "known"), [(key, known) for known, keys in FLOPS_PER_CLOCK.items() for key in keys.split()]
)
def test_peak_per_clock_and_sm_is_the_architectures(key, known):
    part = gpu(key)
    peak = part.tensor.get("bfloat16", part.tensor["float16"])
    per_clock = peak / part.clock_hz / part.sm_count
    if key in QUOTED_BELOW_BOOST:
        assert 0.91 * known <= per_clock <= known
    elif key == "dgx_spark_gb10":  # derived from a rounded 1 PF headline
        assert per_clock == pytest.approx(known, rel=0.06)
    else:
        assert per_clock == pytest.approx(known, rel=0.012)


def test_every_part_with_sms_and_matrix_units_is_checked_against_its_architecture():
    checked = {key for keys in FLOPS_PER_CLOCK.values() for key in keys.split()}
    has_both = {part.key for part in all_gpus() if part.sm_count and part.tensor}
    assert has_both - checked == CLOCK_UNRELATED.keys()


SAME_RATE_8_BIT = {"gaudi3", "tpu_v5p", "tpu_v6e", "inferentia2"}  # published: FP8 runs at the BF16 rate
ODD_8_BIT = {"rubin", "trainium2"}  # announced, or published per core and per chip unequally


@pytest.mark.parametrize("key", KEYS)
def test_fp8_doubles_bf16_unless_published_otherwise(key):
    tensor = gpu(key).tensor
    if "float8" in tensor and key not in ODD_8_BIT:
        expected = 1 if key in SAME_RATE_8_BIT else 2
        assert tensor["float8"] / tensor["bfloat16"] == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize("key", KEYS)
def test_tf32_halves_bf16_and_fp16_equals_it_on_nvidia(key):
    part = gpu(key)
    if part.vendor == "nvidia" and "bfloat16" in part.tensor:
        assert part.tensor["float16"] == pytest.approx(part.tensor["bfloat16"], rel=0.01)
        if "tfloat32" in part.tensor:
            assert part.tensor["tfloat32"] == pytest.approx(part.tensor["bfloat16"] / 2, rel=0.015)


def test_fp8_exists_only_from_ada_on():
    for part in all_gpus():
        if part.vendor == "nvidia":
            assert ("float8" in part.tensor) == (part.compute_capability >= (8, 9)), part.key
            assert ("float4" in part.tensor) == (part.compute_capability >= (10, 0)), part.key


@pytest.mark.parametrize("key", KEYS)
def test_the_vector_rate_was_not_filed_as_the_tensor_rate(key):
    part = gpu(key)
    half = part.tensor.get("bfloat16", part.tensor.get("float16"))
    if half and "float32" in part.vector:
        assert half >= 1.9 * part.vector["float32"]


@pytest.mark.parametrize("key", KEYS)
def test_achieved_shares_fit_the_achieved_figures(key):
    part = gpu(key)
    achieved = {f.key: f.value for f in part.figures if f.key.startswith("achieved_")}
    for name, share in part.achieved.items():
        kind, what = name.split("_")
        short = {"bfloat16": "bf16", "float16": "fp16", "float8": "fp8", "float4": "fp4"}.get(what)
        peak = part.tensor[what] / 1e12 if kind == "tensor" else part.memory_bandwidth / 1e9
        figure_key = f"achieved_tensor_{short}_tflops" if short else f"achieved_memory_{what}_gb_per_s"
        assert share == pytest.approx(achieved[figure_key] / peak, rel=0.01), name


def test_units_reach_base():
    part = gpu("a100_sxm_80gb")
    assert part.memory_bandwidth == 2_039_000_000_000
    assert part.tensor["bfloat16"] == 312_000_000_000_000
    assert part.tensor["int8"] == 624_000_000_000_000
    assert part.clock_hz == 1_410_000_000
    assert part.l2_bytes == part.cache_bytes == 41_943_040
    assert part.shared_memory_per_sm_bytes == 167_936
    assert part.register_file_per_sm_bytes == 262_144
    assert part.l2_bandwidth == 7_219_000_000_000
    assert part.link_bandwidth == 300_000_000_000
    assert part.host_bandwidth == 31_000_000_000
    assert part.memory_label_bytes == 80_000_000_000
    assert part.compute_capability == (8, 0)
    assert part.release_year == 2020


def test_special_function_rate_is_near_what_was_measured():
    assert gpu("gb200").special_per_second == pytest.approx(4.943e12, rel=0.02)
    assert gpu("gb300").special_per_second == pytest.approx(10.024e12, rel=0.01)
    assert gpu("mi300x").special_per_second is None


def test_a_link_given_both_ways_only_is_halved():
    assert gpu("a40").link_bandwidth == 56_250_000_000
    assert gpu("gaudi2").host_bandwidth == 32_000_000_000


def test_host_link_is_the_chip_to_chip_one_where_there_is_one():
    assert gpu("gh200_96gb").host_bandwidth == 450_000_000_000
    assert gpu("l4").link_bandwidth is None


def test_cache_counts_every_level():
    assert gpu("mi300x").cache_bytes == (32 + 256) * 2**20
    assert gpu("tpu_v5e").cache_bytes == 128 * 2**20
    assert gpu("m4_max").cache_bytes is None


def test_measured_l2_bandwidth_is_kept_apart_from_the_peak():
    assert gpu("h100_sxm").l2_bandwidth is None
    assert gpu("h100_sxm").l2_bandwidth_measured == 9_800_000_000_000


# GiB as torch prints total_memory
@pytest.mark.parametrize(
    ("key", "gib"),
    [
        ("h100_sxm", 79.1),
        ("h200_sxm", 141.0),
        ("b200", 178.4),
        ("gb200", 184.3),
        ("gb300", 276.6),
        ("a100_sxm_80gb", 79.3),
    ],
)
def test_usable_memory_is_what_cuda_reports(key, gib):
    part = gpu(key)
    assert not part.memory_usable_is_estimate
    assert part.memory_usable_bytes / GIB == pytest.approx(gib, abs=0.06)


@pytest.mark.parametrize("part", all_gpus(), ids=lambda part: part.key)
def test_usable_memory_lies_below_the_label_read_as_gib(part):
    label_gib = part.memory_label_bytes / 1e9
    assert 0.9 * label_gib <= part.memory_usable_bytes / GIB <= 1.0005 * label_gib


@pytest.mark.parametrize(("key", "gib"), [("t4", 15), ("l4", 22.5), ("a10g", 22.5), ("l40s", 45), ("rtx_4090", 24)])
def test_inline_ecc_is_taken_off_gddr_cards(key, gib):
    part = gpu(key)
    assert part.memory_usable_is_estimate
    assert 0.97 * gib <= part.memory_usable_bytes / GIB < gib


def test_memory_shared_with_the_host_counts_decimal():
    assert gpu("dgx_spark_gb10").memory_usable_bytes == 128_000_000_000


SIBLINGS = [
    ("a100_sxm_40gb", "a100_sxm_80gb"),
    ("a100_sxm_80gb", "a100_pcie_80gb"),
    ("v100_sxm2_16gb", "v100_sxm2_32gb"),
    ("h100_sxm", "h200_sxm"),
    ("h100_sxm", "gh200_96gb"),
    ("h100_nvl", "h200_nvl"),
    ("mi300x", "mi325x"),
]


@pytest.mark.parametrize(("one", "other"), SIBLINGS)
def test_siblings_compute_alike(one, other):
    for table in ("tensor", "vector"):
        assert getattr(gpu(one), table) == pytest.approx(getattr(gpu(other), table), rel=0.016)


@pytest.mark.parametrize(("hgx", "rack"), [("b200", "gb200"), ("b300", "gb300")])
def test_a_rack_part_outruns_its_hgx_sibling_by_a_ninth(hgx, rack):
    for dtype, peak in gpu(hgx).tensor.items():
        if dtype != "float64":
            assert gpu(rack).tensor[dtype] / peak == pytest.approx(10 / 9, rel=0.011)


def test_a_gcd_is_half_the_card():
    card, die = gpu("mi250x"), gpu("mi250x_gcd")
    assert die.tensor["bfloat16"] * 2 == card.tensor["bfloat16"]
    assert die.memory_label_bytes * 2 == card.memory_label_bytes
    assert die.sm_count * 2 == card.sm_count


# part, dtype, unit, path, TFLOP/s, widened from
MATMULS = [
    ("a100_sxm_80gb", "float8_e4m3fn", "tensor", "bfloat16", 312, "float8"),
    ("a100_sxm_80gb", "float64", "tensor", "float64", 19.5, None),
    ("h100_sxm", "float8_e5m2", "tensor", "float8", 1978.9, None),
    ("h100_sxm", "float4_e2m1fn_x2", "tensor", "float8", 1978.9, "float4"),
    ("h100_sxm", "int4", "tensor", "int8", 1978.9, "int4"),
    ("h100_sxm", "float32", "vector", "float32", 66.9, None),
    ("h100_sxm", "complex64", "vector", "float32", 66.9, None),
    ("rtx_5090", "float6", "tensor", "float6", 838, None),
    ("v100_sxm2_16gb", "bfloat16", "vector", "float32", 15.7, "bfloat16"),
    ("v100_sxm2_16gb", "float16", "tensor", "float16", 125, None),
    ("v100_sxm2_16gb", "int8", "tensor", "float16", 125, "int8"),
    ("v100_sxm2_16gb", "float8_e4m3fn", "tensor", "float16", 125, "float8"),
    ("t4", "bfloat16", "vector", "float32", 8.1, "bfloat16"),
    ("t4", "uint8", "tensor", "int8", 130, None),
    ("m2_ultra", "bfloat16", "vector", "float32", 27.2, "bfloat16"),
    ("m2_ultra", "float16", "vector", "float16", 27.2, None),
    ("mi300x", "float32", "tensor", "float32", 163.4, None),
    ("gaudi2", "int8", "tensor", "bfloat16", 432, "int8"),
    ("tpu_v7x", "int4", "tensor", "bfloat16", 2307, "int4"),
]


@pytest.mark.parametrize(("key", "dtype", "unit", "path", "tflops", "widened_from"), MATMULS)
def test_matmul_takes_its_own_path_or_a_documented_wider_one(key, dtype, unit, path, tflops, widened_from):
    rate = gpu(key).matmul_rate(dtype)
    assert (rate.unit, rate.dtype, rate.widened_from) == (unit, path, widened_from)
    assert rate.flops_per_second == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        ("tpu_v5e", "float32"),
        ("tpu_v5e", "float16"),
        ("gaudi2", "float32"),
        ("gaudi3", "float64"),
        ("m4_max", "float64"),
        ("h100_sxm", "int64"),
        ("h100_sxm", "bool"),
        ("h100_sxm", "no_such_dtype"),
    ],
)
def test_no_path_wide_enough_is_none_and_never_a_guess(key, dtype):
    assert gpu(key).matmul_rate(dtype) is None
    assert gpu(key).ridge(dtype) is None


def test_float32_is_rounded_to_tf32_only_where_allowed():
    part = gpu("h100_sxm")
    assert part.matmul_rate("float32").dtype == "float32"
    rounded = part.matmul_rate("float32", tf32=True)
    assert (rounded.unit, rounded.dtype, rounded.widened_from) == ("tensor", "tfloat32", None)
    assert part.ridge("float32", tf32=True) == pytest.approx(148, abs=0.5)
    assert gpu("v100_sxm2_16gb").matmul_rate("float32", tf32=True).dtype == "float32"
    assert gpu("mi355x").matmul_rate("float32", tf32=True).unit == "tensor"
    assert part.matmul_rate("bfloat16", tf32=True) == part.matmul_rate("bfloat16")


WIDTH = {"float4": 4, "int4": 4, "float6": 6, "float8": 8, "int8": 8, "float16": 16, "bfloat16": 16}


@pytest.mark.parametrize("part", all_gpus(), ids=lambda part: part.key)
def test_no_matmul_narrows_its_operands(part):
    for dtype, bits in WIDTH.items():
        rate = part.matmul_rate(dtype)
        if rate is not None:
            assert WIDTH.get(rate.dtype, 32) >= bits
            assert (dtype, rate.dtype) not in {("bfloat16", "float16"), ("float16", "bfloat16")}
            assert (rate.widened_from is None) == (rate.dtype == dtype)


# part, dtype, path, TFLOP/s, widened from
VECTORS = [
    ("a100_sxm_80gb", "bfloat16", "bfloat16", 39, None),
    ("a100_sxm_80gb", "float16", "float16", 78, None),
    ("b200", "bfloat16", "bfloat16", 75, None),
    ("v100_sxm2_16gb", "bfloat16", "float32", 15.7, "bfloat16"),
    ("mi300x", "float16", "float32", 163.4, "float16"),
    ("h100_sxm", "float8_e4m3fn", "float32", 66.9, "float8"),
    ("h100_sxm", "int64", "float32", 66.9, None),
    ("h100_sxm", "bool", "float32", 66.9, None),
    ("h100_sxm", "complex64", "float32", 66.9, None),
    ("h100_sxm", "float64", "float64", 33.5, None),
]


@pytest.mark.parametrize(("key", "dtype", "path", "tflops", "widened_from"), VECTORS)
def test_vector_rate(key, dtype, path, tflops, widened_from):
    rate = gpu(key).vector_rate(dtype)
    assert (rate.unit, rate.dtype, rate.widened_from) == ("vector", path, widened_from)
    assert rate.flops_per_second == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(("key", "dtype"), [("gb300", "float64"), ("tpu_v4", "float32"), ("gaudi3", "float32")])
def test_vector_rate_without_source_is_none(key, dtype):
    assert gpu(key).vector_rate(dtype) is None


def test_rates_describe_themselves():
    assert gpu("h100_sxm").matmul_rate("bfloat16").describe() == "tensor bfloat16, 989.4 TFLOP/s"
    assert gpu("mi355x").matmul_rate("int8").describe() == "tensor int8, 5033 TOP/s"
    assert (
        gpu("a100_sxm_80gb").matmul_rate("float8_e4m3fn").describe()
        == "tensor bfloat16, 312 TFLOP/s (no float8 path on this part)"
    )


def test_rubin_says_that_it_is_not_released():
    assert "pre-release" in gpu("rubin").notes[0]


def test_figures_keep_the_printed_value_and_unit():
    bandwidth = next(f for f in gpu("b200").figures if f.key == "memory_bandwidth_gb_per_s")
    assert (bandwidth.value, bandwidth.unit, bandwidth.confidence) == (7700, "GB/s", "high")
    assert "Blackwell Datasheet" in bandwidth.source_title
    assert figure("b200", "memory_type") == "HBM3e"


def test_the_memory_pyramid_narrows_towards_the_fast_end() -> None:
    for gpu in all_gpus():
        sizes = {level.name: level.size for level in gpu.memory_levels if level.size}
        assert sizes["device memory"] == max(sizes.values())
        if "L2" in sizes and "shared memory" in sizes and gpu.vendor == "nvidia":
            assert sizes["shared memory"] < 64 * 2**20
        speeds = {level.name: level.bandwidth for level in gpu.memory_levels if level.bandwidth}
        assert speeds["device memory"] == gpu.memory_bandwidth
        assert speeds.get("host link", 0) < gpu.memory_bandwidth
        assert speeds.get("L2", gpu.memory_bandwidth) >= gpu.memory_bandwidth


def test_the_pyramid_of_an_h100() -> None:
    levels = {level.name: level for level in load("h100_sxm").gpu.memory_levels}
    assert levels["registers"].size == 132 * 256 * 1024
    assert levels["shared memory"].size == 132 * 228 * 1024
    assert levels["L2"].size == 50 * 2**20
    assert levels["host link"].bandwidth == 64e9
