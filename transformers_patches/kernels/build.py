"""Compile the native kernels once and keep them in a cache folder.

`python -m transformers_patches.kernels.build` does it ahead of time (for packagers); otherwise the first use does.
The kernel sources are compiled once per instruction set, each with its own flags, by the system's C++ compiler;
torch.utils.cpp_extension compiles the torch-facing rest and links everything (it needs `ninja`).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from transformers_patches.files import write_text_atomic

SOURCES = Path(__file__).parent / "csrc"
NAME = "partinfer_kernels"
FLOAT_SOURCES = ("sparse_ffn", "linear", "attend", "choose", "read")
QUANT_SOURCES = ("quant_ffn", "quant_linear", "quant_convert", "planes")
DRIVERS = (
    "bindings",
    "decoder",
    "threads",
    "layer",
    "attention",
    "core_counts",
    "typical_size",
    "by_up",
    "screened",
    "layouts",
    "dispatch",
    "input",
    "probe",
)
COMMON_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")

_AVX2 = ("-O3", "-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-Wno-maybe-uninitialized")


class BuildError(RuntimeError):
    """The kernels can't be compiled here; the message says why."""


@dataclass(frozen=True)
class Isa:
    """One variant: compiler flags, and which sources differ from the variant that it builds on."""

    flags: tuple[str, ...]
    sources: tuple[str, ...]
    needs: tuple[str, ...] = ()


_BOTH = FLOAT_SOURCES + QUANT_SOURCES
ISAS: dict[str, dict[str, Isa]] = {
    "x86_64": {
        "scalar": Isa(("-O2",), _BOTH),
        "avx2": Isa(_AVX2, _BOTH),
        "avx512": Isa(_AVX512, _BOTH),
        "avx512_vnni": Isa((*_AVX512, "-mavx512vnni"), QUANT_SOURCES, ("avx512",)),
        "avx512_bf16": Isa((*_AVX512, "-mavx512bf16"), FLOAT_SOURCES, ("avx512", "avx512_vnni")),
    },
    "aarch64": {
        "scalar": Isa(("-O2",), _BOTH),
        "neon": Isa(("-O3",), _BOTH),
        "neon_dotprod": Isa(("-O3", "-march=armv8.2-a+dotprod"), QUANT_SOURCES, ("neon",)),
    },
}


def isas_of(machine: str) -> dict[str, Isa]:
    """The variants for a processor family (`platform.machine()`); only the scalar one for families without their own."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    return ISAS.get(machine, {"scalar": Isa(("-O2",), _BOTH)})


def with_needed(names: list[str], isas: dict[str, Isa]) -> list[str]:
    """The chosen variants, those that they build on, and the scalar one, in the order of the table."""
    wanted = {"scalar", *names}
    for name in names:
        wanted.update(isas[name].needs)
    return [name for name in isas if name in wanted]


def cache_folder() -> Path:
    """Where compiled kernels are kept: $PARTINFER_CACHE, else ~/.cache/partinfer."""
    return Path(os.environ.get("PARTINFER_CACHE") or Path.home() / ".cache" / "partinfer").expanduser() / "kernels"


def source_key() -> str:
    """A hash that changes whenever the kernels must be compiled again, whichever the compiler."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    isas = isas_of(platform.machine())
    digest.update(repr((torch.__version__, platform.machine(), COMMON_FLAGS, isas)).encode())
    return digest.hexdigest()[:16]


def find_compiler() -> tuple[str, str] | None:
    """Path and version line of the C++ compiler ($CXX, else c++), or None."""
    path = shutil.which(os.environ.get("CXX") or "c++")
    if path is None:
        return None
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return (path, answer.stdout.splitlines()[0]) if answer.returncode == 0 and answer.stdout else None


def find_library(folder: Path | None = None) -> Path | None:
    """The path of a finished library for these sources, this torch and this machine's compiler, if it has one; or None."""
    folder = folder or cache_folder()
    compiler = find_compiler()
    pattern = f"{source_key()}-{_compiler_key(compiler) if compiler else '*'}"
    finished = [path.parent / f"{NAME}.so" for path in folder.glob(f"{pattern}/build.json")]
    return next((path for path in sorted(finished) if path.is_file()), None)


def build(isa_names: list[str] | None = None, force: bool = False) -> Path:
    """Compile and load the library. If there is one already, only return its path, without loading it.

    Raises BuildError if there is no compiler or it fails.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler was found (install g++, or name one in CXX)")
    if shutil.which("ninja") is None:
        raise BuildError("ninja was not found (pip install ninja)")
    folder = cache_folder() / f"{source_key()}-{_compiler_key(compiler)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        found = find_library(folder.parent)
        if found is not None and not force:
            return found
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted build left
        folder.mkdir()
        return _compile(folder, compiler, isa_names)


def _compile(folder: Path, compiler: tuple[str, str], isa_names: list[str] | None) -> Path:
    isas = isas_of(platform.machine())
    names = with_needed(isa_names if isa_names is not None else list(isas), isas)
    supported = [name for name in names if _accepts_flags(compiler[0], isas[name].flags)]
    names = [name for name in supported if set(isas[name].needs) <= set(supported)]
    jobs = [(name, source) for name in names for source in isas[name].sources]

    def compile_one(job: tuple[str, str]) -> str:
        name, source = job
        target = folder / f"{source}.{name}.o"
        flags = [*COMMON_FLAGS, *isas[name].flags, f"-DPARTINFER_ISA=isa_{name}"]
        _run([compiler[0], *flags, "-c", str(SOURCES / f"{source}.cpp"), "-o", str(target)])
        return str(target)

    start = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs))
    library = _link(folder, objects, names)
    for path in folder.glob("*.o"):
        path.unlink()
    facts = {"compiler": compiler[1], "torch": torch.__version__, "variants": names}
    facts["seconds"] = round(time.monotonic() - start, 1)
    write_text_atomic(folder / "build.json", json.dumps(facts, indent=1))  # last: marks a finished build
    return library


def _link(folder: Path, objects: list[str], names: list[str]) -> Path:
    """Compile the drivers and bindings, link, and load."""
    from torch.utils import cpp_extension  # takes a second to import, and only a build needs it

    defines = [f"-DPARTINFER_HAVE_{name.upper()}" for name in names]
    # Torch's own OpenMP library by its path: the same threads, whatever name the wheel gave the file.
    torch_lib = Path(torch.__file__).parent / "lib"
    openmp = [str(path) for path in sorted(torch_lib.glob("libgomp*.so*"))[:1]] or ["-fopenmp"]
    try:
        cpp_extension.load(
            name=NAME,
            sources=[str(SOURCES / f"{source}.cpp") for source in DRIVERS],
            extra_cflags=["-O2", "-fopenmp", "-fvisibility=hidden", *defines],
            extra_ldflags=[*objects, *openmp],
            build_directory=str(folder),
            is_python_module=False,
        )
    except (RuntimeError, OSError) as error:
        raise BuildError(f"the compiler failed: {_last_line(str(error))}") from error
    return folder / f"{NAME}.so"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        wrong = next((line for line in done.stderr.splitlines() if "error" in line), _last_line(done.stderr))
        raise BuildError(f"the compiler failed: {wrong}")


def _last_line(text: str) -> str:
    return next(reversed([line for line in text.splitlines() if line.strip()]), "it said nothing")


def _accepts_flags(compiler: str, flags: tuple[str, ...]) -> bool:
    command = [compiler, *flags, "-x", "c++", "-c", os.devnull, "-o", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _compiler_key(compiler: tuple[str, str]) -> str:
    return hashlib.sha256(repr(compiler).encode()).hexdigest()[:8]


@contextmanager
def _locked(path: Path):
    """Let only one process compile; the others wait and then find the result."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: list[str] | None = None) -> int:
    """The command line: build and print what was built."""
    known = list(isas_of(platform.machine()))
    parser = argparse.ArgumentParser(prog="python -m transformers_patches.kernels.build", description=__doc__)
    parser.add_argument(
        "--isa", nargs="+", choices=known, help="variants to build (default: all that the compiler can)"
    )
    parser.add_argument("--force", action="store_true", help="build again, even if it is there")
    options = parser.parse_args(arguments)
    try:
        library = build(options.isa, force=options.force or options.isa is not None)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    facts = json.loads((library.parent / "build.json").read_text())
    print(f"{library}\nvariants: {' '.join(facts['variants'])}\ncompiler: {facts['compiler']}, {facts['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
