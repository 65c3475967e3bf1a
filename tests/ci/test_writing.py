"""What is written: all of a file or nothing of it, and one message where it cannot be."""

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fxroof.analyzer.console import deliver, write_whole
from fxroof.analyzer.errors import ReportFileError
from fxroof.analyzer.report import to_json
from render.sample import report

TEXT = to_json(report())


def test_a_full_disk_leaves_what_was_there(tmp_path):
    saved, out = tmp_path / "report.json", tmp_path / "out"
    saved.write_text(TEXT)
    out.write_text("old")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); "
        "from fxroof.analyzer.cli import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "analyze", str(saved), "-f", f"json={out}", "-f", f"sarif={out}.2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1
    assert "cannot be written: File too large" in done.stderr
    assert out.read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "report.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no such device here")
def test_a_full_standard_output_is_an_error(tmp_path):
    saved = tmp_path / "report.json"
    saved.write_text(TEXT)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fxroof.analyzer", "analyze", str(saved), "-f", "concise"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr == "error: Standard output cannot be written: No space left on device.\n"


def test_a_pipe_behind_a_name_is_written_and_not_replaced(tmp_path):
    code = "from fxroof.analyzer.console import deliver; from pathlib import Path; deliver('text', Path('/dev/stdout'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "text"), done.stderr
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    read = []
    reader.start()
    deliver("text", pipe)
    reader.join(timeout=10)
    assert read == ["text"]
    assert pipe.is_fifo()


@pytest.mark.parametrize("name", ["folder", "folder/none/out", "/proc/fxroof"])
def test_where_nothing_can_be_written_is_said(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ReportFileError, match="cannot be written"):
        deliver("text", tmp_path / name)
    assert [file.name for file in tmp_path.rglob("*")] == ["folder"]


def test_the_longest_name_can_be_written_and_rights_stay(tmp_path):
    file = tmp_path / ("\u754c" * 84)
    file.write_text("old")
    file.chmod(0o640)
    write_whole(file, "new")
    assert file.read_text() == "new"
    assert file.stat().st_mode & 0o777 == 0o640


def _write_often(path, text, turns):
    for _ in range(turns):
        write_whole(path, text)


def test_two_runs_into_one_file_leave_one_whole_report(tmp_path):
    file = tmp_path / "out"
    texts = [letter * 200_000 for letter in "abcd"]
    context = multiprocessing.get_context("fork")
    writers = [threading.Thread(target=_write_often, args=(file, text, 10)) for text in texts[:2]]
    writers += [context.Process(target=_write_often, args=(file, text, 10)) for text in texts[2:]]
    for writer in reversed(writers):  # processes first: a fork beside threads is what nobody wants
        writer.start()
    for writer in writers:
        writer.join()
    assert file.read_text() in texts
    assert [found.name for found in tmp_path.iterdir()] == ["out"]
    assert [writer.exitcode for writer in writers[2:]] == [0, 0]
