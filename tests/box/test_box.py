"""Whatever a model's file does to the process it runs in: the answer is a report, or one error that says what happened.

Times are looked at only where a time limit is what is tested.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fxroof.analyzer import box, handover
from fxroof.analyzer.errors import BoxError, FxroofError, TargetError, TraceError, WorkloadError
from fxroof.analyzer.pipeline import analyze
from fxroof.analyzer.request import Request

MODEL = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        {constructor}
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        {forward}
        return torch.relu(self.layer(x))

"""
HOOK = """
def example_inputs(phase, batch_size, input_len, context_len):
    import torch
    return torch.zeros({"prefill": 3, "decode": 1, "forward": 2}[phase], 64)

"""
HEAD = "import atexit, ctypes, json, os, signal, subprocess, sys, threading, time\n"


@pytest.fixture
def run(tmp_path):
    """Analyse a file made of a tiny model and some hostile lines."""

    def analyse(*, top="", constructor="pass", forward="pass", **options):
        file = tmp_path / "mine.py"
        file.write_text(HEAD + top + MODEL.format(constructor=constructor, forward=forward))
        return analyze(str(file), gpu="b200", **options)

    return analyse


def whole(report):
    assert report.model.name == "Tiny"
    assert [(op.target, op.user_span.function) for op in report.graphs["forward"].ops] == [
        ("aten.linear.default", "forward"),
        ("aten.relu.default", "forward"),
    ]
    assert report.runs[0].coverage.fraction == 1.0
    assert report.failures == ()
    return True


def test_a_box_gives_what_the_same_process_gives(run):
    boxed = run()
    assert whole(boxed)
    assert run(in_process=True) == boxed


PRINTS = """
print("said by python")
os.write(1, b"said below python\\n")
ctypes.CDLL(None).puts(b"said by C"); ctypes.CDLL(None).fflush(None)
subprocess.run(["echo", "said by a child"])
atexit.register(print, "said at exit")
threading.Thread(target=print, args=("said by a thread",)).start()
print("x" * 5_000_000 + "said at length")
sys.stdout.buffer.write("ü".encode() + b"\\xff said in bytes\\n")
print(json.dumps({"schema_version": 1, "graphs": {}, "runs": []}))
"""


def test_what_the_code_prints_goes_to_standard_error(run, capsys):
    assert whole(run(top=PRINTS))
    out, err = capsys.readouterr()
    assert out == ""
    for how in ("by python", "below python", "by C", "by a child", "at exit", "by a thread", "at length"):
        assert f"said {how}" in err
    assert "ü\ufffd said in bytes" in err
    assert '{"schema_version": 1' in err


@pytest.mark.parametrize(
    "top",
    [
        "os.close(0); os.close(1); os.close(2)",
        "sys.stdout.close(); sys.stderr.close(); signal.signal(signal.SIGPIPE, signal.SIG_IGN)",
        (
            "sys.stdout = sys.stderr = sys.stdin = None; sys.argv.clear(); os.chdir('/'); os.environ.clear()\n"
            "os._exit = sys.exit = json.dumps = json.loads = None"
        ),
        (
            "threading.Thread(target=time.sleep, args=(10_000,)).start(); subprocess.Popen(['sleep', '10000'])\n"
            "[signal.signal(s, signal.SIG_IGN) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]\n"
            "atexit.register(time.sleep, 10_000)"
        ),
        "os.fork()",
        (
            "atexit.register(os._exit, 7)\n"
            "sys.settrace(lambda *a: None); sys.setprofile(lambda *a: None); sys.setrecursionlimit(10_000)"
        ),
        "assert sys.stdin.read() == ''; assert sys.argv == [__file__], sys.argv",
    ],
)
def test_what_a_file_does_to_its_process_does_no_harm(run, top):
    assert whole(run(top=f"{top}\n"))


@pytest.mark.parametrize(
    ("top", "said"),
    [
        ("sys.exit(0)", "sys.exit"),
        ("os._exit(0)", "exit code 0"),
        ("os._exit(3)", "exit code 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal SIGKILL"),
        ("signal.alarm(1); time.sleep(60)", "signal SIGALRM"),
        ("ctypes.string_at(0)", "signal SIGSEGV"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        ("class Odd(BaseException): pass\nraise Odd", "raised Odd"),
        ("def f(): f()\nf()", "RecursionError"),
        ("os.closerange(3, 4096)", "exit code 1"),
        ("for fd in range(3, 64):\n    try: os.write(fd, b'{}' * 99)\n    except OSError: pass", "wrote into the pipe"),
        ("os.killpg(0, signal.SIGKILL)", "signal SIGKILL"),
        ("threading.Timer(0.2, os._exit, (0,)).start(); time.sleep(60)", "exit code 0"),
    ],
)
def test_a_file_that_ends_its_process_is_an_error_that_says_how(run, top, said):
    with pytest.raises(FxroofError) as caught:
        run(top=f"{top}\n")
    assert said in caught.value.message
    assert "mine.py" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("constructor", "said"),
    [
        ("sys.exit(0)", "ends the program"),
        ("os._exit(0)", "exit code 0"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        ("raise ValueError('\\ud800 \\x1b[31m')", "ValueError"),
    ],
)
def test_a_constructor_that_ends_the_process(run, constructor, said):
    with pytest.raises((BoxError, TargetError), match=r"mine\.py") as caught:
        run(constructor=constructor)
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("forward", "kind"),
    [
        ("sys.exit(0)", FxroofError),
        ("os._exit(0)", BoxError),
        ("raise KeyboardInterrupt", FxroofError),
        ("x = x + 1 if self.layer(x).sum() > 0 else x", TraceError),
        ("raise TypeError('no')", WorkloadError),
    ],
)
def test_errors_arrive_as_the_classes_they_were(run, forward, kind):
    with pytest.raises(kind):
        run(forward=forward, top=HOOK if kind is not WorkloadError else "")


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        ("assert len(x) > 1, 'no batch of one'", "no batch of one"),
        ("len(x) > 1 or sys.exit(0)", "ended the program (exit 0)"),
        ("len(x) > 1 or os._exit(0)", "exit code 0"),
        ("while len(x) == 1: pass", "not done after 8 seconds"),
    ],
)
def test_a_phase_that_fails_leaves_the_others(run, forward, said):
    report = run(top=HOOK, forward=forward, timeout=8)
    assert "prefill" in report.graphs
    assert [p.name for p in report.runs[0].phases] == list(report.graphs)
    failure = report.failures[0]
    assert failure.phase == "decode"
    assert said in failure.message
    assert failure.hint
    assert (*report.graphs, failure.phase) == ("prefill", "decode")


def test_a_phase_without_inputs_leaves_the_others(run):
    report = run(top=HOOK.replace("import torch", "import torch; phase == 'decode' and 1 / 0"))
    assert list(report.graphs) == ["prefill"]
    assert [f.phase for f in report.failures] == ["decode"]
    assert "ZeroDivisionError" in report.failures[0].message


def test_every_error_class_survives_the_way_back():
    for kind in handover._kinds().values():
        back = handover.as_error(handover.as_failure(kind("a message", "a hint")))
        assert (type(back), back.message, back.hint) == (kind, "a message", "a hint")


@pytest.mark.parametrize(
    "endless",
    [
        {"constructor": "while True: pass"},
        {"constructor": "time.sleep(10_000)"},
        {"top": "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(1)\n"},
        {"top": "signal.signal(signal.SIGALRM, print)\nsignal.alarm(1)\nwhile True: pass\n"},
        {"top": "while True: print('on and on')\n"},
        {"top": "lock = threading.Lock(); lock.acquire(); lock.acquire()\n"},
    ],
    ids=str,
)
def test_code_without_an_end_is_stopped_and_its_line_named(run, tmp_path, endless):
    with pytest.raises(BoxError, match=r"not done after 2 seconds: stopped while .*mine\.py:\d+") as caught:
        run(timeout=2, **endless)
    assert "--timeout" in caught.value.hint


def test_nothing_that_the_code_started_is_left(run, tmp_path):
    note = tmp_path / "pids"
    detached = "subprocess.Popen(['sleep', '10000'], start_new_session=True)"
    with pytest.raises(BoxError, match="not done after 2 seconds"):
        run(
            top=f"children = [subprocess.Popen(['sleep', '10000']), {detached}]\n"
            f"open({str(note)!r}, 'w').write(' '.join(str(c.pid) for c in children))\nwhile True: pass\n",
            timeout=2,
        )
    for pid in map(int, note.read_text().split()):
        assert gone(pid)


def gone(pid, within=10.0):
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is watched through /proc")


@needs_proc
@pytest.mark.parametrize(
    "hog",
    [
        "hoard = [bytearray(b'x' * 50_000_000) for _ in range(100) if not time.sleep(0.02)]",
        "import numpy; hoard = [numpy.ones(10_000_000) for _ in range(60) if not time.sleep(0.02)]",
        "subprocess.run([sys.executable, '-c', \"hoard = bytearray(b'x' * 700_000_000)\\nwhile 1: pass\"])",
    ],
)
def test_a_memory_hog_is_stopped(run, hog):
    with pytest.raises(BoxError, match=r"its process held .* GB, more than the limit of 0\.8 GB") as caught:
        run(top=f"{hog}\n", memory_limit=800_000_000)
    assert "mine.py:2" in caught.value.message
    assert "--memory-limit" in caught.value.hint


@needs_proc
def test_children_that_share_memory_are_not_counted_twice(run):
    top = (
        "hoard = bytearray(b'x' * 300_000_000)\n"
        "for _ in range(3):\n    if os.fork() == 0:\n        time.sleep(60)\n        os._exit(0)\ntime.sleep(1)\n"
    )
    assert whole(run(top=top, memory_limit=1_000_000_000))


def test_files_beside_the_model_never_stand_in_for_ours(run, tmp_path, monkeypatch):
    ours = {path.stem for path in Path(box.__file__).parent.glob("*.py")}
    libraries = {"torch", "fxroof", "msgspec", "click", "rich", "numpy", "sympy", "networkx", "rules", "hardware"}
    for name in (ours | libraries | sys.stdlib_module_names) - {"__init__", "__main__"}:
        (tmp_path / f"{name}.py").write_text("raise SystemError('the wrong module')\n")
    (tmp_path / "helper.py").write_text("value = 64\n")
    monkeypatch.chdir(tmp_path)
    assert whole(run(top="import helper\nassert helper.value == 64\n"))


def test_a_file_may_import_its_own_rules(run, tmp_path):
    for name in ("rules", "hardware", "analyzer"):
        (tmp_path / f"{name}.py").write_text("mine = True\n")
    assert whole(run(top="import rules, hardware, analyzer\nassert rules.mine and hardware.mine and analyzer.mine\n"))


def test_lines_are_shown_relative_to_the_callers_folder_whatever_the_file_does(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = run(top="os.chdir('/')\n")
    assert report.graphs["forward"].ops[0].user_span.file == "mine.py"


def test_a_file_that_analyses_itself_does_not_start_over_and_over(run):
    with pytest.raises(FxroofError, match="fxroof is analysing") as caught:
        run(top="from fxroof.analyzer.pipeline import analyze\nanalyze(__file__, gpu='b200')\n")
    assert "__main__" in caught.value.hint


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    with pytest.raises(TargetError, match="not valid UTF-8"):
        analyze(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.py"), gpu="b200")


def test_a_python_that_cannot_be_started_is_an_error(run, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(BoxError, match="cannot be started"):
        run()


def test_a_python_without_fxroof_is_an_error(run, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(BoxError, match="could not run"):
        run()


def test_an_interrupt_of_the_caller_leaves_no_child(run, tmp_path):
    note = tmp_path / "pid"
    top = f"open({str(note)!r}, 'w').write(str(os.getpid()))\nwhile True: pass\n"
    timer = threading.Thread(target=interrupt_when, args=(note,))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run(top=top)
    timer.join()
    assert gone(int(note.read_text()))


def interrupt_when(note):
    while not (note.exists() and note.read_text()):
        time.sleep(0.05)
    signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the child with its parent on Linux only")
def test_a_killed_caller_leaves_no_child(tmp_path):
    note, file = tmp_path / "pid", tmp_path / "mine.py"
    file.write_text(f"import os\nopen({str(note)!r}, 'w').write(str(os.getpid()))\nwhile True: pass\n")
    command = [sys.executable, "-m", "fxroof.analyzer", "analyze", str(file), "--gpu", "b200"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as caller:
        while not (note.exists() and note.read_text()):
            time.sleep(0.05)
        caller.kill()
    assert gone(int(note.read_text()))


def test_frames_come_in_any_pieces():
    opened = box.Box(Request(target="m.py"), limits=box.Limits())
    frames = [handover.Progress("a"), handover.Progress("b" * 1000), handover.Finished()]
    encode = handover.msgspec.msgpack.encode
    stream = b"".join(opened._secret.encode() + len(p).to_bytes(8, "big") + p for p in map(encode, frames))
    found = []
    for start in range(0, len(stream), 7):
        opened._buffer += stream[start : start + 7]
        found += opened._received()
    assert found == frames


def test_the_caller_imports_no_torch(tmp_path):
    (tmp_path / "mine.py").write_text(HEAD + MODEL.format(constructor="pass", forward="pass"))
    code = (
        "import sys\nfrom fxroof.analyzer.pipeline import analyze\n"
        "print(repr(analyze('mine.py', gpu='b200')), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("<fxroof report of Tiny: b200 forward ")
    assert done.stdout.endswith("> False\n")
