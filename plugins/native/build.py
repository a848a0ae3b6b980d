"""Build the library: compile the kernels, generate the C++ tables, compile the C++."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import adaattn
from adaattn.errors import TargetError
from adaattn.ops.dispatch import OLDEST_ARCHITECTURE
from adaattn.plugins.native.codegen import (
    Compiled,
    Key,
    image_declarations,
    kernel_key,
    kernels_assembly,
    plugin_tables,
)
from adaattn.plugins.native.launch_program import Program, program
from adaattn.plugins.native.node_kinds import Kind
from adaattn.plugins.ptx import LEAST_PTX, entry
from adaattn.system import children, cuda_driver
from adaattn.system.atomic_file import replacing, scratch_folder, write
from adaattn.system.interrupts import SIGNALS
from adaattn.system.supervisor import end_with_parent

SOURCES = Path(__file__).parent
ARCHITECTURES = (80, 86, 89, 90, 100, 120)


OLDEST_PTX = 84  # of CUDA 12.4: drivers since 550 take it


def library(
    kinds: Sequence[Kind],
    architectures: Sequence[int],
    output: Path,
    tensorrt_include: Path,
    cuda_include: Path | None = None,
    on_kernel: Callable[[int, int], None] = lambda done, of: None,
) -> Path:
    """Build the plugins for some kinds of nodes and architectures.

    Args:
        kinds: of nodes, of a model or `common_kinds()`.
        architectures: 90 for sm_90.
        output: the library; it appears, or replaces an earlier one, when all is done.
        tensorrt_include: where NvInfer.h is, of TensorRT 10 or 11.
        cuda_include: where cuda_runtime_api.h is; by default what triton brings.
        on_kernel: called with the number of kernels compiled and of all.

    Raises:
        TargetError: headers or a compiler are missing, or the compiler complains.
    """
    cuda_include = cuda_include or cuda_headers()
    _check_headers(tensorrt_include, cuda_include)
    compiler = _compiler()
    if output.exists() and not output.is_file():
        raise TargetError(f"{output} cannot be written: it is a folder or a device; give a file")
    programs = [program(kind, arch) for arch in sorted(architectures) for kind in kinds]
    places = {
        kernel_key(step.spec, each.capability): (each.kind, each.capability, number)
        for each in programs
        for number, step in enumerate(each.steps)
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(output.parent) as folder:
        kernels = dict(zip(places, _compile(list(places.values()), folder, on_kernel), strict=True))
        made = _make(folder, compiler, programs, kernels, tensorrt_include, cuda_include)
        with replacing(output) as file, made.open("rb") as content:
            shutil.copyfileobj(content, file)
    return output


_MISSING = {
    "NvInfer.h": "give --tensorrt-include the include folder of a TensorRT 10 or 11 (its tar file or the package "
    "libnvinfer-headers-dev has it; pip's wheels do not)",
    "cuda_runtime_api.h": "install triton, which brings it, or a CUDA toolkit, and give --cuda-include",
}


def _check_headers(tensorrt_include: Path, cuda_include: Path) -> None:
    for header, place in (("NvInfer.h", tensorrt_include), ("cuda_runtime_api.h", cuda_include)):
        if not (place / header).is_file():
            raise TargetError(f"{place} holds no {header}: {_MISSING[header]}")


def cuda_headers() -> Path:
    """Return the folder of CUDA headers that triton brings."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "include"


def architectures(text: str) -> list[int]:
    """Return the architectures that a user names, "80,90"; for an empty text that of this machine's GPU.

    Raises:
        TargetError: there is no GPU to ask, or an architecture that the kernels are not written for.
    """
    if not text:
        found = cuda_driver.capability()
        if found is None:
            raise TargetError(f"no GPU to build for: give --arch, such as {','.join(map(str, ARCHITECTURES))}")
        return [found]
    try:
        named = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise TargetError(f"--arch is {text!r}; give numbers such as 80,90") from error
    if min(named) < OLDEST_ARCHITECTURE:
        raise TargetError(f"sm_{min(named)} is too old: the kernels need sm_{OLDEST_ARCHITECTURE} or newer")
    return named


def tensorrt_headers(given: Path | None) -> Path:
    """Return the folder of NvInfer.h: as given, or where packages put it."""
    usual = (Path("/usr/include/x86_64-linux-gnu"), Path("/usr/include/aarch64-linux-gnu"), Path("/usr/include"))
    return given or next((folder for folder in usual if (folder / "NvInfer.h").is_file()), usual[0])


def cached(
    kinds: Sequence[Kind],
    architectures: Sequence[int],
    tensorrt_include: Path,
    cuda_include: Path | None = None,
    on_kernel: Callable[[int, int], None] = lambda done, of: None,
    force: bool = False,
) -> Path:
    """Return a library from the cache, which is built where the cache does not have it.

    The cache is a private folder, `adaattn` in XDG_CACHE_HOME or ~/.cache. A file named after what goes into a library
    holds the hash of the library, and the library is named after its hash, so that one which was changed is noticed and
    built again.

    Args:
        force: build it though the cache has it.

    Raises:
        TargetError: as of `library`, or somebody else may write to the cache.
    """
    folder = _private_cache()
    index = folder / f"{_key_of(kinds, architectures, tensorrt_include, cuda_include or cuda_headers())}.sha256"
    if not force and index.is_file():
        digest = index.read_text()
        kept = folder / f"libadaattn_plugins-{digest[:16]}.so"
        if kept.is_file() and _sha256(kept) == digest:
            return kept
    with scratch_folder(folder) as scratch:
        made = library(kinds, architectures, scratch / "library.so", tensorrt_include, cuda_include, on_kernel)
        digest = _sha256(made)
        kept = folder / f"libadaattn_plugins-{digest[:16]}.so"
        write(kept, made.read_bytes())
        write(index, digest.encode())
    return kept


def _private_cache() -> Path:
    """Return the folder of the cache, which only this user may write to, since a library in it is loaded and runs."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():  # as its specification says
        root = Path.home() / ".cache"
    folder = root / "adaattn"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place, shared in ((folder.resolve(), 0), (folder.resolve().parent, stat.S_ISVTX)):
        about = place.stat()
        foreign = hasattr(os, "geteuid") and about.st_uid not in (os.geteuid(), *((0,) if shared else ()))
        writable = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not about.st_mode & shared
        if foreign or writable:
            raise TargetError(
                f"{place} belongs to somebody else or others may write to it, and a library from it would run: make it "
                "yours (chmod 700), set XDG_CACHE_HOME to another folder, or give --output"
            )
    return folder


def _key_of(kinds: Sequence[Kind], architectures: Sequence[int], tensorrt_include: Path, cuda_include: Path) -> str:
    """Return the hash of all that a library is made of: sources, headers, compilers and the variables that steer them.

    Raises:
        TargetError: there are no headers or no compiler.
    """
    import triton
    from triton.backends.nvidia import compiler as compilers

    _check_headers(tensorrt_include, cuda_include)
    compiler = _compiler()
    with scratch_folder() as folder:
        for name in ("plugins.inc", "images.inc"):  # made in a build; the headers that they need are those of the rest
            (folder / name).touch()
        includes = ("-isystem", tensorrt_include, "-isystem", cuda_include, "-I", folder)
        rules = _run(compiler, "-std=c++17", "-M", "-MT", "key", *includes, SOURCES / "adaattn_plugins.cpp")
        headers = [Path(word.replace("\\ ", " ")) for word in re.findall(r"(?:\\.|\S)+", rules.partition(":")[2])]
        headers = [path for path in headers if path.is_file() and folder not in path.parents]
    package = Path(adaattn.__file__).parent
    sources = [
        *package.rglob("*.py"),
        *SOURCES.parent.rglob("*.py"),
        *SOURCES.glob("*.cpp"),
        SOURCES / "CMakeLists.txt",
    ]
    ptxas = {Path(compilers.get_ptxas(arch).path) for arch in architectures}
    steering = {
        name: value
        for name, value in os.environ.items()
        if name in ("CXXFLAGS", "CPPFLAGS", "LDFLAGS") or name.startswith("TRITON_")
    }
    content = (
        *(sorted(map(repr, kinds)), sorted(architectures), sorted(steering.items())),
        *(triton.__version__, compiler, _run(compiler, "--version"), shutil.which("cmake")),
        *(sorted((str(path), _sha256(path)) for path in {*headers, *sources, *ptxas}),),
    )
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def _compiler() -> str:
    """Find the C++ compiler that builds the library, with and without CMake."""
    found = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
    if found is None:
        raise TargetError("no C++ compiler: apt install g++ (and cmake, or do without)")
    return found


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _compile(
    wanted: Sequence[tuple[Kind, int, int]], folder: Path, on_kernel: Callable[[int, int], None]
) -> list[Compiled]:
    """Compile all kernels on all processors; return them in order."""
    on_kernel(0, len(wanted))
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("fork")  # other methods start Python anew, and import from the current folder
    with ProcessPoolExecutor(mp_context=context, initializer=_end_with_parent) as pool:
        try:
            futures = [pool.submit(_compiled, *place, folder) for place in wanted]
            for done, future in enumerate(as_completed(futures)):
                future.result()
                on_kernel(done + 1, len(wanted))
            return [future.result() for future in futures]
        except BaseException:
            for worker in set(multiprocessing.active_children()) - others:  # they would end what they are at first
                worker.kill()
            raise


def _end_with_parent() -> None:
    """Let a worker end when the process that started it ends, and leave signals to that process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    end_with_parent(signal.SIGKILL)
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()  # where Linux does not do it


def _compiled(kind: Kind, arch: int, step: int, parent: Path) -> Compiled:
    from triton.backends.nvidia import compiler

    spec = program(kind, arch).steps[step].spec
    kernel = entry(spec, arch, max(OLDEST_PTX, LEAST_PTX.get(arch, OLDEST_PTX)))
    target = next(line.split()[1] for line in kernel.ptx.splitlines() if line.startswith(".target"))
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(kernel.ptx)
        _run(compiler.get_ptxas(arch).path, f"-arch={target}", source, "-o", binary, scratch=Path(folder))
        return Compiled(kernel, binary.read_bytes())


def _make(
    folder: Path,
    compiler: str,
    programs: Sequence[Program],
    kernels: Mapping[Key, Compiled],
    trt: Path,
    cuda: Path,
) -> Path:
    (folder / "plugins.inc").write_text(plugin_tables(programs, kernels))
    (folder / "images.inc").write_text(image_declarations(kernels))
    (folder / "kernels.S").write_text(kernels_assembly(folder, kernels))
    made = folder / "libadaattn_plugins.so"
    if shutil.which("cmake"):
        definitions = {
            "GENERATED": folder,
            "TENSORRT_INCLUDE": trt,
            "CUDA_INCLUDE": cuda,
            "CMAKE_CXX_COMPILER": compiler,
            "CMAKE_BUILD_TYPE": "Release",
        }
        options = [f"-D{name}={value}" for name, value in definitions.items()]
        _run("cmake", "-S", SOURCES, "-B", folder / "build", *options, scratch=folder)
        _run("cmake", "--build", folder / "build", scratch=folder)
        return folder / "build" / made.name
    _run(
        compiler,
        *("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wpedantic"),
        *("-isystem", trt, "-isystem", cuda, "-I", folder),
        *(SOURCES / "adaattn_plugins.cpp", folder / "kernels.S", "-ldl", "-o", made),
        scratch=folder,
    )
    return made


def _run(*command: object, scratch: Path | None = None) -> str:
    """Run a program and return what it prints; its temporary files go to a folder that is always deleted."""
    code, said = children.run([str(part) for part in command], {} if scratch is None else {"TMPDIR": str(scratch)})
    if code:
        raise TargetError(f"{command[0]} failed:\n{said.strip()[-4000:]}")
    return said
