#!/usr/bin/env python3
"""Compile the kernels for aarch64 and check the NEON variants under user-mode emulation.

Debian: apt-get install g++-aarch64-linux-gnu qemu-user
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[3]))

from transformers_patches.kernels import build  # noqa: E402

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
DRIVERS = (
    *("threads", "layer", "attention", "core_counts", "typical_size", "by_up", "screened", "layouts"),
    *("dispatch", "input", "probe"),
)


def main() -> int:
    missing = [program for program in (COMPILER, EMULATOR) if shutil.which(program) is None]
    if missing:
        print(
            f"error: {' and '.join(missing)} not found: apt-get install g++-aarch64-linux-gnu qemu-user",
            file=sys.stderr,
        )
        return 2
    isas = build.isas_of("aarch64")
    jobs = [
        (build.SOURCES / f"{source}.cpp", f"{source}.{name}.o", [*isa.flags, f"-DPARTINFER_ISA=isa_{name}"])
        for name, isa in isas.items()
        for source in isa.sources
    ]
    defines = [f"-DPARTINFER_HAVE_{name.upper()}" for name in isas]
    jobs += [(build.SOURCES / f"{driver}.cpp", f"{driver}.o", ["-O2", "-fopenmp", *defines]) for driver in DRIVERS]
    jobs.append((HERE / "check.cpp", "check.o", ["-O2", f"-I{build.SOURCES}"]))
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(job: tuple[Path, str, list[str]]) -> str:
            source, name, flags = job
            target = str(Path(folder) / name)
            subprocess.run([COMPILER, *build.COMMON_FLAGS, *flags, "-c", str(source), "-o", target], check=True)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        program = str(Path(folder) / "check")
        subprocess.run([COMPILER, "-static", "-fopenmp", *objects, "-o", program], check=True)
        # Once with all of the emulated processor's instructions, once with one that has no dot products.
        return max(
            subprocess.run([EMULATOR, "-cpu", cpu, program], check=False).returncode for cpu in ("max", "cortex-a53")
        )


if __name__ == "__main__":
    sys.exit(main())
