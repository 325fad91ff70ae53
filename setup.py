"""What pyproject.toml has no words for: data folders beside the packages that an installed package holds inside."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_namespace_packages, setup

PACKAGES = ["transformers_patches", "profiler", "evaluation", "server", "downloads", "texts"]
ENDINGS = (".json", ".safetensors")
DATA = {f"transformers_patches.shipped.{folder}": folder for folder in ("prompts", "neuron_files")}


def files(folder: str) -> list[str]:
    """The data below a folder, relative to it."""
    return [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.suffix in ENDINGS]


setup(
    packages=[*find_namespace_packages(include=[*PACKAGES, *(f"{name}.*" for name in PACKAGES)]), *DATA],
    package_dir=DATA,
    package_data={
        "": ["*.yaml", "*.jsonl"],
        "server": ["page.html"],
        "transformers_patches.kernels": ["csrc/*"],
        **{package: files(folder) for package, folder in DATA.items()},
    },
)
