#!/usr/bin/env python3
"""Check kernel variants that this processor can't run.

    run.py           NEON: compiled for aarch64 and run under user-mode emulation
    run.py avx512    AVX-512: compiled with plain loops in place of its instructions (avx512/immintrin.h)

Debian: apt-get install g++-aarch64-linux-gnu qemu-user; and libsimde-dev
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[3]))

from transformers_patches.kernels import build  # noqa: E402

DRIVERS = (
    *("threads", "layer", "attention", "core_counts", "typical_size", "by_up", "screened", "layouts"),
    *("dispatch", "input", "probe"),
)


@dataclass(frozen=True)
class Target:
    """How variants of a machine are compiled and run somewhere else."""

    machine: str
    variants: tuple[str, ...]
    compiler: str
    needs: tuple[str, ...]  # programs, or headers by their path
    packages: str
    flags_of: Callable[[tuple[str, ...]], list[str]]  # of a variant's own flags
    link: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]  # before the program: once for each


def _as_macros(flags: tuple[str, ...]) -> list[str]:
    """No flag lets the compiler use the instructions; the sources hear of them by the macros that it would set."""
    macros = [f"-D__{flag.removeprefix('-m').upper()}__=1" for flag in flags if flag.startswith("-mavx512")]
    return [f"-I{HERE / 'avx512'}", "-include", "immintrin.h", "-O1", "-w", *macros]


TARGETS = {
    "neon": Target(
        machine="aarch64",
        variants=("scalar", "neon", "neon_dotprod"),
        compiler="aarch64-linux-gnu-g++",
        needs=("aarch64-linux-gnu-g++", "qemu-aarch64"),
        packages="g++-aarch64-linux-gnu qemu-user",
        flags_of=list,
        link=("-static",),
        # Once with all of the emulated processor's instructions, once with one that has no dot products.
        commands=(("qemu-aarch64", "-cpu", "max"), ("qemu-aarch64", "-cpu", "cortex-a53")),
    ),
    "avx512": Target(
        machine="x86_64",
        variants=("scalar", "avx512", "avx512_vnni", "avx512_bf16"),
        compiler="c++",
        needs=("c++", "/usr/include/simde/x86/avx512.h"),
        packages="g++ libsimde-dev",
        flags_of=_as_macros,
        link=(),
        commands=((),),
    ),
}


def main(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "neon"
    if len(arguments) > 1 or name not in TARGETS:
        print(f"error: expected {' or '.join(TARGETS)}, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    target = TARGETS[name]
    missing = [need for need in target.needs if shutil.which(need) is None and not Path(need).is_file()]
    if missing:
        print(f"error: {' and '.join(missing)} not found: apt-get install {target.packages}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        program = _compile(target, Path(folder))
        return max(subprocess.run([*command, program], check=False).returncode for command in target.commands)


def _compile(target: Target, folder: Path) -> str:
    """The checking program."""
    isas = {name: isa for name, isa in build.isas_of(target.machine).items() if name in target.variants}
    jobs = [
        (
            build.SOURCES / f"{source}.cpp",
            f"{source}.{name}.o",
            [*target.flags_of(isa.flags), f"-DPARTINFER_ISA=isa_{name}"],
        )
        for name, isa in isas.items()
        for source in isa.sources
    ]
    # Dispatch asks for what the processor has, in the way that the variants' flags answer.
    plain = ["-O2", "-fopenmp", *target.flags_of(()), *(f"-DPARTINFER_HAVE_{name.upper()}" for name in isas)]
    jobs += [(build.SOURCES / f"{driver}.cpp", f"{driver}.o", plain) for driver in DRIVERS]
    jobs.append((HERE / "check.cpp", "check.o", ["-O2", f"-I{build.SOURCES}"]))

    def compile_one(job: tuple[Path, str, list[str]]) -> str:
        source, name, flags = job
        object_file = str(folder / name)
        subprocess.run([target.compiler, *build.COMMON_FLAGS, *flags, "-c", str(source), "-o", object_file], check=True)
        return object_file

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs))
    program = str(folder / "check")
    subprocess.run([target.compiler, *target.link, "-fopenmp", *objects, "-o", program], check=True)
    return program


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
