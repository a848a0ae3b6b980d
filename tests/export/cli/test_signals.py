"""Any moment of a signal: DIR is whole, old or new, nothing is left, no child lives on, and what is said is true.

One file, though long: every test starts the same commands and looks for the same leftovers.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from adaattn.errors import ConfigError
from adaattn.export import pipeline
from adaattn.export.artifacts import folder, manifest
from adaattn.export.cli import parity as parity_command
from adaattn.export.cli import run as run_command
from adaattn.export.runtime import session
from adaattn.plugins.native import build as builder
from adaattn.system import atomic_file, children
from adaattn.system.interrupts import SIGNALS, held, raise_on_signals
from tests.support.cli import alive, run, start

LINEAR = ("tests.support.models:linear", "--input", "input=B,16", "--target", "onnx")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ends(process: subprocess.Popen[str], seconds: float = 1.0) -> bool:
    """Whether all that a command has started ends in time."""
    end = time.monotonic() + seconds
    while alive(process):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "what the test waits for does not come"
        time.sleep(0.02)


# Folders that replace each other, in processes that get a signal at a random moment. Nothing here imports torch.
SWAPS = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
from adaattn.system import atomic_file
from adaattn.errors import ConfigError
from adaattn.export.artifacts import folder
from adaattn.system.interrupts import SIGNALS, raise_on_signals

seed, rounds, steps = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
OUT = Path("out")

def no_renameat2(*arguments):
    raise OSError(22, "no such flag here")

if steps == "two":
    atomic_file._renameat2 = no_renameat2

def export(text, written):
    with folder.staging(OUT, True, on_written=lambda: written.append(text)) as made:
        files = {f"sub{n}/file": f"{text} {n}".encode() * 1000 for n in range(8)}
        for name, content in files.items():
            (made.folder / name).parent.mkdir()
            atomic_file.write(made.folder / name, content)
        hashes = {name: {"sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()}
        about = {"format": "adaattn-export", "version": 1, "files": hashes, "text": text}
        (made.folder / "manifest.json").write_text(json.dumps(about))

def child(text):
    raise_on_signals()
    written = []
    status = 0
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        export(text, written)
    except KeyboardInterrupt:
        status = 10 if written else 11
    # As in a command, the exception is gone by now, and with it what waited for its clean-up.
    os._exit(status)

def text_of_whole():
    folder.check_output(OUT, True)  # refuses all but an export that is whole
    return json.loads((OUT / "manifest.json").read_text())["text"]

random.seed(seed)
start = time.perf_counter()
export("first", [])
usual = time.perf_counter() - start
before, seen = "first", {-9: 0, 11: 0}
number = 0
while number < rounds or min(seen[-9], seen[11]) < 5:  # killed, and interrupted before the move
    number += 1
    assert number < rounds + 500, seen
    text, kind = f"text {number}", random.choice([signal.SIGKILL, *SIGNALS])
    there = set(os.listdir())
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    pid = os.fork()
    if not pid:
        child(text)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    time.sleep(random.uniform(0, 1.5 * usual))
    os.kill(pid, kind)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if kind == signal.SIGKILL:
        if steps == "two":
            atomic_file.sweep(Path())  # as every next run does first
    else:
        assert status in (0, 10, 11), status
        # A run that is interrupted as it begins may not have swept yet what a killed one left.
        left = set(os.listdir()) - {"out"}
        assert left <= (there if status == 11 else set()), (status, left)
    now = text_of_whole()
    allowed = {0: {text}, 10: {text}, 11: {before}}.get(status, {before, text})
    assert now in allowed, (number, kind, status, before, now)
    seen[status] = seen.get(status, 0) + 1
    before = now
export("last", [])
assert text_of_whole() == "last"
assert os.listdir() == ["out"], os.listdir()
print(seen)
"""


@pytest.mark.parametrize("rounds", [25, pytest.param(1500, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("steps", ["one", "two"])
def test_a_signal_at_a_random_moment_leaves_the_old_folder_or_the_new_one(steps: str, rounds: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SWAPS, "7", str(rounds), steps], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout


RACE = (
    SWAPS[: SWAPS.index("random.seed")]
    + """
for number in range(rounds):
    try:
        export(f"{seed} {number}", [])
    except ConfigError as error:
        assert "was changed while it was being replaced" in str(error), error
"""
)


def test_exports_that_race_for_one_folder_leave_one_of_them_whole() -> None:
    commands = [[sys.executable, "-c", RACE, str(seed), "15", "one"] for seed in range(4)]
    with ThreadPoolExecutor() as pool:
        ended = pool.map(lambda x: subprocess.run(x, capture_output=True, text=True, check=False), commands)
        for done in ended:
            assert done.returncode == 0, done.stderr
    assert os.listdir() == ["out"]
    folder.check_output(Path("out"), force=True)


def at(where: str, monkeypatch: pytest.MonkeyPatch, signals: tuple[int, ...]) -> None:
    """Send signals to this process before or after a function is called, for the first time only."""
    moment, _, name = where.partition(" ")
    module: Any = {"atomic_file": atomic_file, "folder": folder, "manifest": manifest}[name.split(".")[0]]
    name = name.split(".")[1]
    function, sent = getattr(module, name), []

    def send() -> None:
        if not sent:
            sent.append(True)
            for number in signals:
                os.kill(os.getpid(), number)

    def called(*arguments: Any) -> Any:
        if moment == "before":
            send()
        found = function(*arguments)
        if moment == "after":
            send()
        return found

    monkeypatch.setattr(module, name, called)


POINTS = [
    f"{moment} {name}"
    for name in (
        *("atomic_file._make", "folder.check_output", "manifest.write_manifest", "atomic_file.sync", "folder.snapshot"),
        *("atomic_file.exchange", "atomic_file._renameat2", "atomic_file.remove", "atomic_file._remove"),
    )
    for moment in ("before", "after")
]
FEW = {
    "before atomic_file.exchange",
    "after atomic_file.exchange",
    "before atomic_file.remove",
}


@pytest.mark.parametrize("force", [True, pytest.param(False, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("where", [x if x in FEW else pytest.param(x, marks=pytest.mark.thorough) for x in POINTS])
def test_what_the_command_says_after_a_signal_is_true(
    where: str, force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal at each step of the move; and a second one, while the first is answered."""
    out = tmp_path / "a" / "out"
    options = (*LINEAR, "-q", "--no-verify", "-o", out)
    signals = [(number,) for number in SIGNALS] + [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGHUP)]
    if where in FEW and force:
        signals = signals[POINTS.index(where) % 3 :: 3]
    for numbers in signals:
        before = None
        if force:
            if not out.exists():
                assert run(*options).exit_code == 0
            before = (out / "manifest.json").stat().st_ino
        with monkeypatch.context() as patched:
            at(where, patched, numbers)
            result = run(*options, "--force")
        assert "Traceback" not in result.stderr
        now = (out / "manifest.json").stat().st_ino if out.exists() else None
        if now is not None:
            folder.check_output(out, force=True)
        if result.exit_code == 0:
            assert now not in (None, before)
        elif "nothing was written" in result.stderr:
            assert now == before
            assert force or os.listdir(tmp_path) == []
        else:
            assert f"interrupted; {out} is written and whole" in result.stderr
            assert now not in (None, before)
        if now is not None:
            assert os.listdir(out.parent) == ["out"]
        if not force and out.exists():
            atomic_file.remove(out.parent)


@pytest.mark.parametrize("stage", ["capture", pytest.param("onnx", marks=pytest.mark.thorough), "report"])
def test_a_signal_in_any_stage_writes_nothing(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = pipeline._Clock.stage

    def signalled(clock: Any, name: str) -> Any:
        if name == stage:
            os.kill(os.getpid(), signal.SIGHUP)
        return begin(clock, name)

    monkeypatch.setattr(pipeline._Clock, "stage", signalled)
    result = run(*LINEAR, "-q", "--no-verify", "-o", "a/b/out")
    assert (result.exit_code, result.stderr) == (2, "adaattn-export: interrupted; nothing was written\n")
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    assert run(*LINEAR, "-q", "-o", out).exit_code == 0
    return out


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("name", ["adaattn-parity", "adaattn-run"])
def test_a_signal_to_the_other_commands_leaves_nothing(
    name: str, number: int, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = session.session_of

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        return opened(*arguments)

    for module in ("verification.backends", "runtime.onnxruntime"):
        monkeypatch.setattr(f"adaattn.export.{module}.session_of", interrupted)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {kind: signal.getsignal(kind) for kind in SIGNALS}
    written = str(tmp_path / "written")
    try:
        if name == "adaattn-parity":
            result = CliRunner().invoke(parity_command.main, [str(exported), "--backend", "ort-cpu", "--html", written])
        else:
            result = CliRunner().invoke(run_command.main, [str(exported), "--input", "input=2,16", "-o", written])
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    assert result.exit_code != 0
    assert os.listdir(tmp_path) == []


def test_signals_are_held_back_and_none_is_lost() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    raise_on_signals()
    done = []
    try:
        for number in SIGNALS:
            with pytest.raises(KeyboardInterrupt), held():  # noqa: PT012 - what is tested is the order
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), signal.SIGINT)
                done.append(number)
            assert signal.getsignal(number) is signal.default_int_handler
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        raise_on_signals()
        with held():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert done == list(SIGNALS)


FAMILY = """
import os, sys
from adaattn.system.children import run
run(["sh", "-c", "sleep 100 & sleep 100 & echo > started; wait"])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGQUIT])
def test_programs_and_what_they_start_end_with_the_process_that_asked_for_them(number: int, tmp_path: Path) -> None:
    token = f"{random.getrandbits(64):x}"
    process = subprocess.Popen(
        [sys.executable, "-c", FAMILY],
        env={**os.environ, "ADAATTN_TEST": token},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.token = token
    wait_until((tmp_path / "started").exists)
    assert len(alive(process)) >= 5  # Python, the supervisor, sh, two sleeps
    process.send_signal(number)
    process.wait(timeout=10)
    assert ends(process)


def test_the_supervisor_needs_no_signal_of_linux_to_end(tmp_path: Path) -> None:
    """Where its parent lives on and only the pipe is closed, as on systems without such a signal when a parent ends."""
    reading, writing = os.pipe()
    command = ["sh", "-c", "sleep 100 & echo > started; wait"]
    token = f"{random.getrandbits(64):x}"
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(children.SUPERVISOR), str(reading), *command],
        env={**os.environ, "ADAATTN_TEST": token},
        pass_fds=(reading,),
        start_new_session=True,
    )
    os.close(reading)
    wait_until((tmp_path / "started").exists)
    os.close(writing)
    assert process.wait(timeout=5) == -signal.SIGKILL
    process.token = token
    assert ends(process)


def test_a_program_ends_for_its_caller_as_it_ended() -> None:
    assert children.run(["sh", "-c", "echo said; echo more >&2; exit 3"]) == (3, "said\nmore\n")
    assert children.run(["sh", "-c", "kill -SEGV $$"])[0] == -signal.SIGSEGV
    assert children.run(["sh", "-c", "kill -KILL $$"])[0] == -signal.SIGKILL
    code, said = children.run(["no-such-program"])
    assert (code, said) == (1, "no-such-program: No such file or directory\n")
    assert children.run(["sh", "-c", "echo $GIVEN"], {"GIVEN": "a value"}) == (0, "a value\n")


def _compiled(kind: Any, arch: int, step: int, parent: Path) -> int:
    if step:
        time.sleep(100)
    return step


def test_an_interrupted_build_of_plugins_does_not_wait_for_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "_compiled", _compiled)

    def interrupt(done: int, of: int) -> None:
        if done:
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        builder._compile([(None, 80, step) for step in range(4)], tmp_path, interrupt)
    assert time.monotonic() - start < 5
    assert not builder.multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGKILL, *(pytest.param(x, marks=pytest.mark.thorough) for x in SIGNALS)])
def test_no_worker_outlives_a_build_of_plugins(number: int, tmp_path: Path) -> None:
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "NvInfer.h").touch()  # kernels are compiled before it is read
    command = ("build", "--arch", "80", "--tensorrt-include", "include", "--output", "library.so")
    variables = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "include"), "TMPDIR": str(tmp_path)}
    process = start(*command, folder=tmp_path, command="adaattn-plugins", **variables)
    wait_until(lambda: len(alive(process)) > 1 or process.poll() is not None)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode != 0
    assert ends(process), said
    atomic_file.sweep(tmp_path)  # as the next run does first
    assert os.listdir(tmp_path) == ["include"]


BUILDER = """
import os, signal, subprocess
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
subprocess.Popen(["sleep", "100"])
open("started", "w").close()
signal.pause()
"""


@pytest.mark.thorough
def test_no_builder_outlives_an_export_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "tensorrt_rtx.py").write_text(BUILDER)
    arguments = (*LINEAR[:-1], "tensorrt-rtx", "--no-verify", "-o", "out")
    process = start(*arguments, folder=tmp_path, path=tmp_path / "packages", TMPDIR=str(tmp_path / "packages"))
    wait_until(lambda: (tmp_path / "started").exists() or process.poll() is not None)
    process.kill()
    _, said = process.communicate(timeout=30)
    assert ends(process), said
    for place in (tmp_path, tmp_path / "packages"):
        atomic_file.sweep(place)
    left = {path.name for path in tmp_path.rglob("*") if not path.name.startswith("torchinductor_")}  # torch's cache
    assert left - {"__pycache__"} == {"packages", "started", "tensorrt_rtx.py"}


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(12))
def test_a_signal_to_the_command_at_a_random_moment(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    process = start(*LINEAR, "-o", "out", "--force", folder=tmp_path)
    time.sleep(draw.uniform(0.5, 12))
    number = draw.choice(SIGNALS)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert ends(process)
    if process.returncode == -number:  # it came before the command could answer it
        assert os.listdir(tmp_path) == []
    elif process.returncode == 0 or "is written and whole" in said:
        folder.check_output(tmp_path / "out", force=True)
        assert os.listdir(tmp_path) == ["out"]
    else:
        assert "interrupted" in said
        assert os.listdir(tmp_path) == []


def test_a_failure_after_the_move_is_not_called_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*LINEAR, "-q", "--no-verify", "-o", "out").exit_code == 0

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", refuse)
        result = run(*LINEAR, "--no-verify", "-o", "out", "--force")
    assert result.exit_code == 0, result.stderr
    assert "could not be deleted completely; the rest is in" in " ".join(result.stderr.split())
    folder.check_output(tmp_path / "out", force=True)
    with pytest.raises(ConfigError, match="exists"):
        folder.check_output(tmp_path / "out", force=False)
