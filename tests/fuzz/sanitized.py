"""Build the native operations with AddressSanitizer and UndefinedBehaviorSanitizer, and make the calls of operation_calls.py.

    python -m tests.fuzz.sanitized build/sanitized --isa scalar avx2 -- --count 300

Everything behind `--` goes to operation_calls. The first report of a sanitizer ends the run. It needs GCC with its
sanitizer libraries. Compiling takes a few minutes; a library that is in the folder already is used again.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

from transformers_patches.kernels import build

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined")
FLAGS = (*SANITIZE, "-g", "-O1", "-fno-omit-frame-pointer", "-fopenmp")


def compile_all(folder: Path, compiler: str, isa_names: list[str]) -> Path:
    """The library, compiled if it isn't in the folder yet."""
    library = folder / f"sanitized-{build.source_key()}-{'-'.join(isa_names)}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    isas = build.isas_of(platform.machine())
    names = build.with_needed(isa_names, isas)
    jobs = []
    for name in names:
        flags = [
            *build.COMMON_FLAGS,
            *(f for f in isas[name].flags if not f.startswith("-O")),
            f"-DPARTINFER_ISA=isa_{name}",
        ]
        jobs += [(source, f"{source}.{name}.o", flags) for source in isas[name].sources]
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    flags = [
        "-std=c++20",
        "-fPIC",
        *(f"-I{path}" for path in includes),
        *(f"-DPARTINFER_HAVE_{n.upper()}" for n in names),
    ]
    jobs += [(source, f"{source}.o", flags) for source in build.DRIVERS]

    def compile_one(job: tuple[str, str, list[str]]) -> str:
        source, target, flags = job
        command = [compiler, *flags, *FLAGS, "-c", str(build.SOURCES / f"{source}.cpp"), "-o", str(folder / target)]
        subprocess.run(command, check=True)
        return str(folder / target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs))
    torch_lib = Path(torch.__file__).parent / "lib"
    openmp = [str(path) for path in sorted(torch_lib.glob("libgomp*.so*"))[:1]] or ["-fopenmp"]
    linked = [f"-L{torch_lib}", "-lc10", "-ltorch_cpu", "-ltorch", f"-Wl,-rpath,{torch_lib}"]
    subprocess.run([compiler, "-shared", *SANITIZE, *objects, *openmp, *linked, "-o", str(library)], check=True)
    return library


def runtime(compiler: str, name: str) -> str:
    """The path of one of the compiler's libraries. The sanitizer's must be loaded before anything else."""
    answer = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = answer.stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"{compiler} has no {name}: install its sanitizer libraries")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the library is built")
    parser.add_argument("--isa", nargs="+", choices=list(build.isas_of(platform.machine())), default=["scalar"])
    parser.add_argument("--variant", help="the kernels to use (default: the fastest that were built)")
    given = sys.argv[1:]
    own = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:own])
    found = build.find_compiler()
    if found is None:
        raise SystemExit("no C++ compiler was found")
    preloaded = [runtime(found[0], name) for name in ("libasan.so", "libstdc++.so.6")]
    library = compile_all(options.folder, found[0], options.isa)
    environment = os.environ | {
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    calls = [sys.executable, "-m", "tests.fuzz.operation_calls", "--library", str(library), *given[own + 1 :]]
    if options.variant:
        calls += ["--variant", options.variant]
    return subprocess.run(calls, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
