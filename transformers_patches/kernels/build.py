"""Compile the native kernels once and keep them in a cache folder.

`python -m transformers_patches.kernels.build` does it ahead of time (for packagers), for all processors of a family;
otherwise the first use does, for the one at hand. The kernel sources are compiled once per instruction set, each with
its own flags, and the torch-facing rest once, by the system's C++ compiler. It is called with lists of arguments, never through a shell, so folders may have any name. A
finished library's size and hash are stored beside it: one that was truncated or overwritten is built again. A build
that failed is remembered, so that only the first start, and the command above, take the time to try.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from transformers_patches import files
from transformers_patches.files import atomic_folder, make_folder, write_text_atomic
from transformers_patches.kernels.commands import CommandFailed, run_all
from transformers_patches.locks import exclusive

SOURCES = Path(__file__).parent / "csrc"
NAME = "partinfer_kernels"
FLOAT_SOURCES = ("sparse_ffn", "linear", "attend", "choose", "read")
QUANT_SOURCES = ("quant_ffn", "quant_linear", "quant_convert", "planes")
DRIVERS = (
    "bindings",
    "bus_errors",
    "decoder",
    "threads",
    "layer",
    "attention",
    "core_counts",
    "typical_size",
    "by_input",
    "by_up",
    "experts",
    "expert_table",
    "gguf_blocks",
    "rows_on_disk",
    "screened",
    "layouts",
    "dispatch",
    "input",
    "probe",
)
FACTS = "build.json"
AGAIN = "python -m transformers_patches.kernels.build"
COMMON_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")

_AVX2 = ("-O3", "-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-Wno-maybe-uninitialized")


class BuildError(RuntimeError):
    """The kernels can't be compiled here; the message says why."""


@dataclass(frozen=True)
class Isa:
    """One variant of the kernels, for one instruction set."""

    flags: tuple[str, ...]  # of the compiler
    sources: tuple[str, ...]  # what is compiled for it; the rest is taken from the variants in `needs`
    needs: tuple[str, ...] = ()  # names of the variants that it builds on


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
    """The variants for a processor family (`platform.machine()`). Families without variants have the scalar one."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    return ISAS.get(machine, {"scalar": Isa(("-O2",), _BOTH)})


def with_needed(names: list[str], isas: dict[str, Isa]) -> list[str]:
    """The chosen variants, those that they build on, and the scalar one, in the order of the table."""
    wanted = {"scalar", *names}
    for name in names:
        wanted.update(isas[name].needs)
    return [name for name in isas if name in wanted]


_INSTRUCTIONS = {  # of x86-64, as PyTorch names them
    "avx2": ("avx2", "fma3", "f16c"),
    "avx512": ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"),
    "avx512_vnni": ("avx512_vnni",),
    "avx512_bf16": ("avx512_bf16",),
}


def own_isas() -> list[str]:
    """The variants that this processor can run, as far as PyTorch knows it; the others take minutes to compile."""
    isas, capabilities = isas_of(platform.machine()), torch.cpu.get_capabilities()
    return [name for name in isas if all(capabilities.get(one, False) for one in _INSTRUCTIONS.get(name, ()))]


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return files.cache_folder("kernels")


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


def find_library(folder: Path | None = None, isa_names: Collection[str] = ()) -> Path | None:
    """The finished library for these sources, this torch and this machine's compiler (if it has one); else None.

    isa_names: variants that it must have been built with, if there is a compiler that could build them.

    A library whose size or hash has changed since it was built does not count.
    """
    folder = folder or cache_folder()
    compiler = find_compiler()
    names = [_folder_name(compiler)] if compiler else sorted(path.name for path in folder.glob(f"{source_key()}-*"))
    libraries = [folder / name / f"{NAME}.so" for name in names]
    needed = set(isa_names) if compiler else set()
    return next((path for path in libraries if needed <= _asked_for(path) and _is_whole(path)), None)


def _asked_for(library: Path) -> set[str]:
    """The variants that a build was to have: of some the compiler may not have been capable."""
    asked = _read_facts(library.with_name(FACTS)).get("asked")
    return {name for name in asked if isinstance(name, str)} if isinstance(asked, list) else set()


def _is_whole(library: Path) -> bool:
    facts = _read_facts(library.with_name(FACTS))
    try:
        return facts.get("bytes") == library.stat().st_size and facts.get("sha256") == _hash_of(library)
    except OSError:
        return False


def _hash_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_facts(path: Path) -> dict:
    """What a JSON file of a build says; an empty dict if the file is missing or damaged."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def find_failure(folder: Path | None = None) -> BuildError | None:
    """Why an earlier build of these sources with this compiler failed, and how to try again; None if none did."""
    compiler = find_compiler()
    reason = _read_facts(_failure_path(folder or cache_folder(), compiler)).get("reason") if compiler else None
    return (
        BuildError(f"{reason} (when it was tried before; to try again: {AGAIN})") if isinstance(reason, str) else None
    )


def _failure_path(folder: Path, compiler: tuple[str, str]) -> Path:
    return folder / f"{_folder_name(compiler)}.failed.json"


def build(isa_names: list[str] | None = None, force: bool = False, again: bool = True) -> Path:
    """Compile the library, and return its path. If there is one already that has the variants, only return its path.

    isa_names: the variants to compile, beside those of a library that is replaced; None: all.
    again: try even if an earlier build has failed.

    Raises BuildError if there is no compiler or it fails. Interrupted, it ends at once, and the next build starts
    afresh. A second process waits for the first, and takes what that has built.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler was found (install g++, or name one in CXX)")
    folder = cache_folder() / _folder_name(compiler)
    make_folder(folder.parent)
    wanted = list(isas_of(platform.machine())) if isa_names is None else isa_names
    with exclusive(folder, wait=True):
        found = find_library(folder.parent, wanted)
        if found is not None and not force:
            return found
        if not again and (failure := find_failure(folder.parent)):
            raise failure
        try:
            with atomic_folder(folder) as work:
                _compile(work, compiler, [*wanted, *(() if force else _asked_for(folder / f"{NAME}.so"))])
                shutil.rmtree(folder, ignore_errors=True)  # one that is damaged, or to be built again
        except BuildError as error:
            with suppress(OSError):
                write_text_atomic(_failure_path(folder.parent, compiler), json.dumps({"reason": str(error)}))
            raise
        _failure_path(folder.parent, compiler).unlink(missing_ok=True)
    return folder / f"{NAME}.so"


def _compile(folder: Path, compiler: tuple[str, str], isa_names: list[str]) -> None:
    isas = isas_of(platform.machine())
    asked = with_needed([name for name in isas if name in isa_names], isas)
    supported = [name for name in asked if _accepts_flags(compiler[0], isas[name].flags)]
    names = [name for name in supported if set(isas[name].needs) <= set(supported)]
    start = time.monotonic()
    objects = {folder / f"{source}.o": [*_driver_flags(names), str(SOURCES / f"{source}.cpp")] for source in DRIVERS}
    for name in names:
        flags = [*COMMON_FLAGS, *isas[name].flags, f"-DPARTINFER_ISA=isa_{name}"]
        for source in isas[name].sources:
            objects[folder / f"{source}.{name}.o"] = [*flags, str(SOURCES / f"{source}.cpp")]
    library = folder / f"{NAME}.so"
    try:
        run_all([[compiler[0], *arguments, "-c", "-o", str(target)] for target, arguments in objects.items()])
        run_all([[compiler[0], "-shared", *map(str, objects), *_libraries(), "-o", str(library)]])
    except CommandFailed as error:
        raise BuildError(f"the compiler failed: {error}") from None
    for path in objects:
        path.unlink()
    facts = {"compiler": compiler[1], "torch": torch.__version__, "variants": names, "asked": asked}
    facts |= {
        "seconds": round(time.monotonic() - start, 1),
        "bytes": library.stat().st_size,
        "sha256": _hash_of(library),
    }
    write_text_atomic(folder / FACTS, json.dumps(facts, indent=1))


def _driver_flags(isa_names: list[str]) -> list[str]:
    """Flags of the sources that use torch: its headers, its C++ standard, and which variants there are."""
    include = Path(torch.__file__).parent / "include"
    headers = [
        part for path in (include, include / "torch" / "csrc" / "api" / "include") for part in ("-isystem", str(path))
    ]
    defines = [f"-DPARTINFER_HAVE_{name.upper()}" for name in isa_names]
    return ["-fPIC", "-std=c++20", "-O2", "-fopenmp", "-fvisibility=hidden", *headers, *defines]


def _libraries() -> list[str]:
    """Torch's libraries by their paths. They are loaded already when the kernels are, so those need not find them."""
    folder = Path(torch.__file__).parent / "lib"
    # Torch's own OpenMP library: the same threads, whatever name the wheel gave the file.
    openmp = [str(path) for path in sorted(folder.glob("libgomp*.so*"))[:1]] or ["-fopenmp"]
    return [*openmp, *(str(folder / f"lib{name}.so") for name in ("c10", "torch_cpu", "torch"))]


def _folder_name(compiler: tuple[str, str]) -> str:
    return f"{source_key()}-{_compiler_key(compiler)}"


def _accepts_flags(compiler: str, flags: tuple[str, ...]) -> bool:
    command = [compiler, *flags, "-x", "c++", "-c", os.devnull, "-o", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _compiler_key(compiler: tuple[str, str]) -> str:
    return hashlib.sha256(repr(compiler).encode()).hexdigest()[:8]


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
    facts = _read_facts(library.with_name(FACTS))
    print(f"{library}\nvariants: {' '.join(facts['variants'])}\ncompiler: {facts['compiler']}, {facts['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
