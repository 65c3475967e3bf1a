"""The parts of the benchmark for GPUs that need none."""

from pathlib import Path

from benchmarks.on_gpu import KERNELS, NAMES, _bytes_ours, _part, summed
from fxroof.analyzer.clocked import Machine

NCU = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","gemm","dram__bytes_read.sum","Mbyte","1,536.50"
"0","1","gemm","dram__bytes_write.sum","Kbyte","512.00"
"1","1","reduce","dram__bytes_read.sum","byte","100"
"1","1","reduce","sm__cycles.sum","cycle","5"
"""


def test_bytes_of_all_kernels_are_summed_in_their_units() -> None:
    assert summed(NCU) == 1_536_500_000 + 512_000 + 100


def test_a_profiler_that_may_not_look_gives_nothing() -> None:
    assert summed("==ERROR== ERR_NVGPUCTRPERM: no permission to access GPU performance counters\n") is None
    assert summed("") is None


def test_a_gpu_is_priced_by_its_name_and_another_by_what_was_measured() -> None:
    def machine(name: str) -> Machine:
        return Machine(device="cuda:0", name=name, driver="1", torch_version="2.13", threads=0, date="2026-11-21")

    assert _part(machine("NVIDIA H200"), Path("own.toml")) == "h200_sxm"
    assert _part(machine("AMD EPYC"), Path("own.toml")) == "own.toml"


def test_our_bytes_of_a_kernel_are_those_of_its_tensors(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(KERNELS, encoding="utf-8")
    assert len(NAMES) == 10
    # 256 x 1024 bfloat16 in and out
    ours = _bytes_ours(tmp_path, "silu", str(Path(__file__).parent / "tiny_cache.toml"), dry=True)
    assert ours == 2 * 256 * 1024 * 2
