"""Seeded mutations of what users hand to the four commands: files of models, folders of exports, arrays, arguments.

Whatever they get, the commands answer with a status that they document, one line for an error and no traceback, leave
nothing behind, end in time, and never return other numbers than of the unchanged files without a word.

One file, though long: the mutations of each kind share the worker, the judge and the report.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import select
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch

import adaattn
from adaattn.export.artifacts.arrays import save_arrays
from adaattn.export.cli import export as export_command
from adaattn.export.cli import parity as parity_command
from adaattn.export.cli import run as run_command
from adaattn.plugins.native import cli as plugins
from tests.support import models
from tests.support.paths import ROOT

SEED = 15
COUNTS = {"arguments": 46, "folder": 44, "array": 22, "model": 24, "payload": 14, "program": 10}
THOROUGH = {"arguments": 600, "folder": 600, "array": 200, "model": 300, "payload": 150, "program": 150}
SECONDS = 300  # of a call, on a machine that is busy with other tests
LARGEST = 1 << 30  # bytes that a call may take: all files are small
STATUSES = {"export": (0, 1, 2), "parity": (0, 1, 2), "run": (0, 2), "plugins": (0, 2)}
ESCAPE = "\x1b[31m"


class Worker:
    """The process that calls the commands; another one takes its place where it dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def call(self, command: str, arguments: list[str], where: Path, whole: bool = False) -> dict[str, Any] | str:
        """Return the answer, or a word for why there is none."""
        if self._process is None:
            environment = os.environ | {
                "TMPDIR": str(where.parent / "tmp"),
                "XDG_CACHE_HOME": str(where.parent / "cache"),
            }
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fuzz_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        job = {"command": command, "arguments": arguments, "where": str(where), "whole": whole}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], SECONDS)
        line = process.stdout.readline() if ready else ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.close()
        return "died" if ready else "hung"

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@dataclass
class Mutation:
    """A call with something changed.

    Args:
        same: it must do as the unchanged one does, or be refused: the change can be seen.
    """

    command: str
    arguments: list[str]
    what: str
    same: bool = False


@dataclass
class Bench:
    """Where mutations are tried: good files, a folder that is made anew for each, and what good calls answer."""

    worker: Worker
    good: Path
    scratch: Path
    answers: dict[str, dict[str, Any]]


GOOD: dict[str, tuple[str, list[str]]] = {
    "model": ("export", ["model.pt", "-q", "--target", "onnx", "-o", "out"]),
    "program": ("export", ["program.pt2", "--allow-pickle", "-q", "--target", "onnx", "-o", "out"]),
    "check": ("parity", ["made", "--backend", "ort-cpu", "--json"]),
    "files": ("parity", ["made", "--backend", "ort-cpu", "--junit", "j.xml", "--html", "p.html"]),
    "bisect": ("parity", ["bisect", "made", "-o", "part.onnx"]),
    "run": ("run", ["made", "--input", "x=@x.npy", "--json"]),
    "keep": ("run", ["made", "--input", "x=@x.npy", "-o", "y.npz"]),
    "build": ("plugins", ["build", "made/model.onnx", "--arch", "90", "--tensorrt-include", "none"]),
    "rewrite": ("plugins", ["onnxruntime", "made/model.onnx"]),
}
"""The calls that are mutated, and the parts of an answer that must stay."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Export a model, save a program, and record what good calls answer."""
    root = tmp_path_factory.mktemp("fuzz")
    good, scratch = root / "good", root / "scratch"
    for folder in (good, scratch, root / "tmp", root / "cache"):
        folder.mkdir()
    torch.manual_seed(SEED)
    model = models.tiny()
    adaattn.save(model, good / "model.pt", inputs={"x": "B,S,16"}, dims={"S": "1:9:17"})
    tokens = {1: torch.export.Dim("S", min=1, max=17)}
    program = torch.export.export(model, (torch.randn(1, 9, 16),), dynamic_shapes=(tokens, None)[:1])
    torch.export.save(program, good / "program.pt2")
    np.save(good / "x.npy", np.random.default_rng(SEED).standard_normal((1, 9, 16)).astype(np.float32))
    worker = Worker()
    made = worker.call("export", ["model.pt", "-q", "--target", "onnx", "-o", "made"], good, whole=True)
    assert isinstance(made, dict), made
    assert (made["status"], made["err"]) == (0, ""), made
    found = Bench(worker, good, scratch, {})
    for name, (command, arguments) in GOOD.items():
        fresh(found)
        answer = worker.call(command, arguments, scratch)
        assert isinstance(answer, dict), answer
        assert answer["status"] == (2 if name == "build" else 0), answer
        found.answers[name] = answer
    yield found
    worker.close()


def fresh(bench: Bench) -> None:
    """Make the scratch folder anew."""
    shutil.rmtree(bench.scratch)
    shutil.copytree(bench.good, bench.scratch)
    os.mkfifo(bench.scratch / "pipe")
    os.symlink("loop", bench.scratch / "loop")


# ---- mutations of bytes, archives and JSON


def damage(chance: random.Random, content: bytes) -> bytes:
    """Return bytes that are cut, flipped, doubled, or none."""
    at, length = chance.randrange(len(content)), chance.choice((1, 2, 8, 64, 4096))
    return chance.choice(
        (
            lambda: b"",
            lambda: content[:at],
            lambda: content[at:],
            lambda: content[:at] + chance.randbytes(length) + content[at + length :],
            lambda: content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :],
            lambda: content[:at] + bytes(length) + content[at + length :],
            lambda: content[:at] + content[at + length :],
            lambda: content[:at] + content[at:][:length] + content[at:],
            lambda: chance.randbytes(length),
            lambda: content + content,
        )
    )()


def replace(chance: random.Random, path: Path, scratch: Path) -> str:
    """Put something that is not a plain file in the place of a file."""
    kind = chance.choice(("gone", "folder", "pipe", "endless", "loop", "other"))
    others = [scratch / name for name in ("model.pt", "x.npy", "made/report.json")]
    other = chance.choice([each for each in others if each != path])
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "other":
        shutil.copy(other, path)
    return kind


def rezip(chance: random.Random, content: bytes) -> tuple[str, bytes]:
    """Write an archive again, with a member dropped, renamed, doubled, changed, swapped or compressed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at, other = chance.randrange(len(members)), chance.randrange(len(members))
    name, data = members[at]
    kind = chance.choice(("drop", "rename", "double", "change", "empty", "swap", "compress"))
    if kind == "drop":
        del members[at]
    elif kind == "rename":
        members[at] = (chance.choice((f"{name}x", f"../{name}", f"/{name}", "", name.upper())), data)
    elif kind == "double":
        members.append((name, members[other][1]))
    elif kind == "change":
        members[at] = (name, damage(chance, data or b"0"))
    elif kind == "empty":
        members[at] = (name, b"")
    elif kind == "swap":
        members[at], members[other] = (name, members[other][1]), (members[other][0], data)
    out = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if kind == "compress" else zipfile.ZIP_STORED
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(out, "w", method) as archive:  # names twice
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name) if name else zipfile.ZipInfo("x"), data, method)
    return f"{kind} {members[at % len(members)][0] if members else ''}", out.getvalue()


JSON = (
    *("null", "true", "-1", "0", "1e400", "NaN", "-Infinity", '""', "[]", "{}", '"[/x]"', '"$\\\\frac{1}"'),
    *('"\\u001b[31m<b>&\\u0000\\ud800"', "9" * 5000, "[" * 3000 + "]" * 3000, '"../../x"', '"/dev/zero"', "1.5"),
)


def change_json(chance: random.Random, text: str) -> tuple[str, str]:
    """Drop, rename or replace a value at a random place of a JSON text."""
    whole = json.loads(text)
    at: Any = whole
    path: list[Any] = []
    while isinstance(at, (dict, list)) and at and (not path or chance.random() < 0.75):
        path.append(chance.choice(list(at)) if isinstance(at, dict) else chance.randrange(len(at)))
        at, parent = at[path[-1]], at
    kind = chance.choice(("drop", "rename", "replace", "replace", "whole"))
    marker = "\0here"
    if kind == "drop":
        del parent[path[-1]]
    elif kind == "rename" and isinstance(parent, dict):
        parent[chance.choice((ESCAPE, "[/x]", "", "../x", "<b>"))] = parent.pop(path[-1])
    elif kind == "whole":
        whole = marker
    else:
        parent[path[-1]] = marker
    given = chance.choice(JSON)
    return f"{kind} {path} {given[:20]}", json.dumps(whole).replace(json.dumps(marker), given)


def change_arrays(chance: random.Random, path: Path) -> str:
    """Drop, rename, swap or change an array of an .npz."""
    with np.load(path) as archive:
        arrays = dict(archive)
    name, other = chance.choice(list(arrays)), chance.choice(list(arrays))
    x = arrays[name]
    flat = x.reshape(-1)

    def with_value(value: object) -> np.ndarray[Any, Any]:
        out = x.copy()
        if out.size and out.dtype.kind in "fiub":
            out.reshape(-1)[chance.randrange(out.size)] = value if out.dtype.kind == "f" else 1
        return out

    changes: dict[str, Callable[[], Any]] = {
        "drop": lambda: arrays.pop(name),
        "rename": lambda: arrays.update({chance.choice((f"{name}x", "x", "a/b", "a/b/c", ESCAPE)): arrays.pop(name)}),
        "swap": lambda: arrays.update({name: arrays[other], other: x}),
        "type": lambda: arrays.update(
            {name: np.zeros(x.shape, chance.choice(("S3", "U3", "c8", "i1", "f2", "M8[s]")))}
        ),
        "shape": lambda: arrays.update({name: chance.choice((flat, x[None], flat[:1], flat[:0], x.T))}),
        "value": lambda: arrays.update({name: with_value(chance.choice((np.nan, np.inf, -1.0, 1e38, 0.0)))}),
        "all": lambda: arrays.update({name: np.full_like(x, np.nan if x.dtype.kind == "f" else 0)}),
        "case": lambda: [arrays.pop(each) for each in list(arrays) if each.split("/")[0] == name.split("/")[0]],
        "none": arrays.clear,
    }
    kind = chance.choice(list(changes))
    changes[kind]()
    save_arrays(path, arrays)
    return f"{kind} {name}"


# ---- one kind of mutation each


def mutate_folder(chance: random.Random, bench: Bench) -> Mutation:
    """Change a file of an export; the hash in the manifest follows it now and then."""
    made = bench.scratch / "made"
    name = chance.choice(("report.json", "manifest.json", "golden.npz", "trace.npz", "model.onnx"))
    call = chance.choice(("check", "check", "files", "bisect", "run", "keep", "build", "rewrite"))
    path = made / name
    way = chance.random()
    if way < 0.15:
        what = f"replace {replace(chance, path, bench.scratch)}"
    elif name.endswith(".json") and way < 0.85:
        what, text = change_json(chance, path.read_text())
        path.write_text(text)
    elif name.endswith(".npz") and way < 0.6:
        what = change_arrays(chance, path)
    elif name.endswith(".npz") and way < 0.75:
        what, content = rezip(chance, path.read_bytes())
        path.write_bytes(content)
    else:
        what = "damage"
        path.write_bytes(damage(chance, path.read_bytes()))
    signed = name != "manifest.json" and path.is_file() and not path.is_symlink() and chance.random() < 0.5
    if signed:
        manifest = json.loads((made / "manifest.json").read_text())
        manifest["files"][name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (made / "manifest.json").write_text(json.dumps(manifest))
    command, arguments = GOOD[call]
    return Mutation(command, arguments, f"{call}: {name} {what}{' signed' if signed else ''}", same=not signed)


def mutate_array(chance: random.Random, bench: Bench) -> Mutation:
    """Change the array that a model gets."""
    path = bench.scratch / "x.npy"
    x = np.load(path)
    way = chance.choice(("damage", "damage", "replace", "array", "header"))
    what = way
    if way == "damage":
        path.write_bytes(damage(chance, path.read_bytes()))
    elif way == "replace":
        what = replace(chance, path, bench.scratch)
    elif way == "array":
        made = [
            *(x.astype(kind) for kind in ("f8", "f2", "i8", "c8", "S4", "U2", "?", ">f4")),
            *(x[0], x[:, :0], x[:0], x.T, np.float32(3), np.array([None, {}], object), np.asfortranarray(x)),
            *(np.full_like(x, value) for value in (np.nan, np.inf, 3e38)),
            np.zeros(3, [("a", "f4"), ("b", "O")]),
        ]
        number = chance.randrange(len(made))
        what = f"array {number}"
        np.save(path, made[number], allow_pickle=True)
    else:
        shape = chance.choice(
            ("(10**12,)", "(1, 9, 10**9)", "(-1, 9, 16)", "()", "'a'", "(1, 9, 16", "[[]]*9", "x" * 70000)
        )
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        path.write_bytes(b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header + x.tobytes())
        what = f"header {shape[:20]}"
    command, arguments = GOOD[chance.choice(("run", "keep"))]
    return Mutation(command, arguments, what)


def mutate_model(chance: random.Random, bench: Bench) -> Mutation:
    """Change the bytes of a model.pt, or members of its archive."""
    return _mutate_file(chance, bench, "model", "model.pt")


def mutate_program(chance: random.Random, bench: Bench) -> Mutation:
    """Change the bytes of a .pt2, or members of its archive."""
    return _mutate_file(chance, bench, "program", "program.pt2")


def _mutate_file(chance: random.Random, bench: Bench, call: str, name: str) -> Mutation:
    path = bench.scratch / name
    content = path.read_bytes()
    way = chance.random()
    signed = False
    if way < 0.1:
        what = replace(chance, path, bench.scratch)
    elif way < 0.4:
        what, content = rezip(chance, content)
        path.write_bytes(content)
        signed = what.startswith(("change", "swap", "double", "empty"))  # with checksums of the new content
    else:
        what = "damage"
        path.write_bytes(damage(chance, content))
    command, arguments = GOOD[call]
    return Mutation(command, arguments, what, same=not signed)


VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**12, 2**70, 1.5, float("nan"), float("inf"), "", "x", ESCAPE, "[/x]", [], {}, (), b"x", 1j),
    *(torch.zeros(3), torch.zeros(16, 16, dtype=torch.complex64), torch.zeros(16, 16, device="meta")),
    *(
        torch.zeros(16, 16).to_sparse(),
        torch.full((16,), float("nan")),
        torch.zeros(0),
        torch.zeros((), dtype=torch.int64),
    ),
    *(
        torch.float16,
        torch.zeros(1).expand(10**9),
        "adaattn.encoder:Encoder",
        "os:system",
        "9" * 5000,
        "1:1:999999999999",
    ),
)


def mutate_payload(chance: random.Random, bench: Bench) -> Mutation:
    """Change what a model.pt says: written anew, it is a whole file with something else in it."""
    path = bench.scratch / "model.pt"
    payload: Any = torch.load(path, weights_only=True)
    at, keys = payload, []
    while isinstance(at, dict) and at and (not keys or chance.random() < 0.8):
        keys.append(chance.choice(list(at)))
        at, parent = at[keys[-1]], at
    kind = chance.choice(("drop", "rename", "replace", "replace", "replace"))
    value = chance.choice(VALUES)
    if kind == "drop":
        del parent[keys[-1]]
    elif kind == "rename":
        parent[chance.choice((ESCAPE, "[/x]", "", 3, None, "x" * 10000))] = parent.pop(keys[-1])
    else:
        parent[keys[-1]] = value
    torch.save(payload, path)
    command, arguments = GOOD["model"]
    said = f"{kind} {'/'.join(map(str, keys))} {repr(value)[:30] if kind == 'replace' else ''}"
    return Mutation(command, arguments, said)


WORDS = (
    *(
        "",
        " ",
        "-1",
        "0",
        "1",
        "nan",
        "inf",
        "-inf",
        "1" + "0" * 400,
        "9" * 5000,
        "x" * 100_000,
        ESCAPE,
        "[/x]",
        "[bold]x",
    ),
    *("a\nb", "é×", "\udcff", ".", "..", "/", "--", "-", "=", "x=", "=x", "x=@", "x=@pipe", "x=@/dev/zero", "x=@loop"),
    *(
        "x=-1,9,16",
        "x=1,9,32",
        "x=1000000,1000000,1000",
        "x=1,9,16",
        "x=1,0,16",
        "x=1,9",
        f"x={'9' * 5000}",
        "x=1,9,16:f4",
    ),
    *("x=B,S,16", "x=B,S,16:float16", "x=B,S,16:int64<9", f"x=B,S,{'9' * 5000}", "x=B,S,16<" + "9" * 5000, "S=1:9:17"),
    *("S=5:3:9", "S=0:0:0", f"S=1:1:{'9' * 5000}", "S=1:9", "B=1:1:1", "S=1:9:17,B=1:1:1", "8.9", "99.9", "8.9,,12.0"),
    *("/dev/zero", "/dev/full", "pipe", "loop", "made", "model.pt", "program.pt2", "x.npy", "made/golden.npz", "none"),
    *("made/model.onnx", "none/none", "%s", "{0}", "$(id)", "'", '"', "model.pt/x", "hf:made", "hf:none", "none:f"),
    *(
        "onnx",
        "tensorrt",
        "ort-cpu",
        "ort-cuda",
        "ort-cpu,ort-cpu",
        "float16",
        "check",
        "bisect",
        "build",
        "onnxruntime",
    ),
    *("-q", "-v", "--json", "--force", "--help", "-h", "--version", "--no-verify", "--time", "--calls=2", "--seed=3"),
    *(
        "--input",
        "--dim",
        "--tolerance",
        "--output",
        "-o",
        "--target",
        "--samples",
        "--opset",
        "--weights",
        "--backend",
    ),
    *(
        "--junit",
        "--html",
        "--seed",
        "--calls",
        "--arch",
        "--workspace",
        "--compute-capability",
        "--profile",
        "--device",
    ),
    *(
        "--state",
        "--balance",
        "--output-tolerance",
        "--allocation",
        "--external-data-threshold",
        "--plugins",
        "--timing-cache",
        "--allow-pickle",
        "--cuda-graph",
    ),
)


OPTIONS = {
    "export": export_command.main.params,
    "parity": [*parity_command.check.params, *parity_command.bisect.params],
    "run": run_command.main.params,
    "plugins": [*plugins.build.params, *plugins.onnxruntime.params],
}


def mutate_arguments(chance: random.Random, bench: Bench) -> Mutation:
    """Drop, double, replace, insert and swap arguments; most often give an option some value."""
    command, arguments = GOOD[chance.choice(list(GOOD))]
    arguments = list(arguments)
    options = [each for each in OPTIONS[command] if isinstance(each, click.Option)]
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(len(arguments) + 1)
        word = chance.choice(WORDS)
        kind = chance.choice(("option", "option", "option", "drop", "double", "replace", "insert", "swap"))
        if kind == "option":
            option = chance.choice(options)
            arguments += [option.opts[0], *([] if option.is_flag else [word])]
        elif kind == "drop":
            del arguments[at : at + 1]
        elif kind == "double":
            arguments[at:at] = arguments[at : at + 2]
        elif kind == "replace":
            arguments[at : at + 1] = [word]
        elif kind == "insert":
            arguments[at:at] = [word]
        else:
            chance.shuffle(arguments)
    return Mutation(command, arguments, "")


MUTATE = {
    "arguments": mutate_arguments,
    "folder": mutate_folder,
    "array": mutate_array,
    "model": mutate_model,
    "payload": mutate_payload,
    "program": mutate_program,
}


# ---- the judge


def files_in(bench: Bench) -> dict[str, tuple[int, int]]:
    """Return all files of the scratch folder, and what lies in the temporary one."""
    places = [*bench.scratch.rglob("*"), *(bench.scratch.parent / "tmp").iterdir()]
    stats = {str(path.relative_to(bench.scratch.parent)): path.lstat() for path in places}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def faults(mutation: Mutation, answer: dict[str, Any], good: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with an answer, apart from files that are left."""
    name, status, out, err = f"adaattn-{mutation.command}", answer["status"], answer["out"], answer["err"]
    shown = {"-h", "--help", "--version"} & set(mutation.arguments)
    loud = any(each == "-v" or ("--verbose".startswith(each[:9]) and len(each) > 3) for each in mutation.arguments)
    if answer["escaped"]:
        yield f"an exception left the command: {answer['escaped']}"
    if status not in STATUSES[mutation.command]:
        yield f"status {status}"
    if answer["said"]:
        yield f"C++ printed {answer['said'][:200]!r}"
    if answer["grown"] > LARGEST:
        yield f"it took {answer['grown'] >> 20} MiB"
    lines = [line for line in err.splitlines() if not line.startswith("  ")]  # stages of an export are indented
    if not loud:
        if "Traceback" in out + err:
            yield "a traceback"
        if len(lines) > 1 or (status == 2 and len(lines) != 1):
            yield f"{len(lines)} lines on standard error"
    if status == 2 and not (lines and lines[-1].startswith(f"{name}: ")):
        yield f"no line of {name}"
    if any(len(line) > 600 or not line.isprintable() for line in lines) and not loud:
        yield "a line that is long or not printable"
    if f"{name}: unexpected " in err:
        yield "unexpected to the command itself"
    if status == 2 and out:
        yield "an error, and something on standard output"
    if not all(line.isprintable() for line in out.splitlines()):
        yield "standard output is not printable"
    if "--json" in mutation.arguments and status < 2 and not shown:
        try:
            json.loads(out, parse_constant=lambda word: pytest.fail(word))
        except ValueError:
            yield "standard output is no JSON"
    said = lines or "is not the file that was exported" in out or "is missing" in out
    if mutation.same and status == 0 and outcome(answer) != outcome(good) and not said:
        yield "silently another result"


def outcome(answer: dict[str, Any]) -> Any:
    """Return the part of an answer that unchanged files determine."""
    if not answer["out"].startswith("{"):
        return answer.get("fingerprint"), answer["status"]
    report = json.loads(answer["out"])
    if "verdict" not in report:
        return report["outputs"]
    rows = [
        {key: row[key] for key in ("name", "case", "verdict", "error", "limit")}
        for target in report["targets"]
        for row in target["outputs"]
    ]
    return report["verdict"], rows


def try_one(bench: Bench, kind: str, number: int, whole: bool = False) -> tuple[str, list[str]]:
    """Try one mutation and return what came of it, and what is wrong with it.

    Args:
        whole: what loads is exported too, which takes seconds each.
    """
    fresh(bench)
    mutation = MUTATE[kind](random.Random(f"{SEED} {kind} {number}"), bench)
    before = files_in(bench)
    answer = bench.worker.call(mutation.command, mutation.arguments, bench.scratch, whole)
    about = f"{kind} {number}, {mutation.what} adaattn-{mutation.command} {str(mutation.arguments)[:300]}"
    if isinstance(answer, str):
        return answer, [f"{about}: it {answer}"]
    call = next((name for name, good in GOOD.items() if list(good[1]) == mutation.arguments), "check")
    wrong = list(faults(mutation, answer, bench.answers[call]))
    after = files_in(bench)
    new = {name for name in after if after[name] != before.get(name)} - {"scratch"}
    hidden = sorted(name for name in new if any(part.startswith(".") for part in Path(name).parts) or "tmp/" in name)
    if hidden or len(after) < len(before):
        wrong.append(f"leftovers or losses: {hidden} {sorted(before.keys() - after.keys())}")
    if answer["status"] == 2 and new:
        wrong.append(f"refused, and written: {sorted(new)[:5]}")
    verdict = ("passed", "failed", "refused")[answer["status"]] if answer["status"] in (0, 1, 2) else "?"
    return verdict, [f"{about}: {each}; {answer['err'][-300:]!r}" for each in wrong]


@pytest.mark.parametrize("kind", list(MUTATE))
def test_mutations(kind: str, bench: Bench, request: pytest.FixtureRequest) -> None:
    thorough = request.config.getoption("--thorough")
    count = (THOROUGH if thorough else COUNTS)[kind]
    came, wrong = Counter[str](), []
    for number in range(count):
        verdict, found = try_one(bench, kind, number, whole=thorough and kind in ("arguments", "payload"))
        came[verdict] += 1
        wrong += found
    print(f"{kind}: {dict(came)}")
    assert not wrong, f"{len(wrong)} faults:\n" + "\n".join(wrong)
