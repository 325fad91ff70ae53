"""The pack of all neurons that `--make_pack` puts beside a model, so that neurons can be read on demand."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from transformers_patches.errors import PartInferError
from transformers_patches.load.pack_writer import write_pack
from transformers_patches.neurons.lookup import TASK_TYPES
from transformers_patches.plan.neuron_files import settings_for
from transformers_patches.weights.file_kinds import is_pack
from transformers_patches.weights.lookup import model_name
from transformers_patches.weights.model_files import read_config
from transformers_patches.weights.pack_description import DESCRIPTION

DTYPE = "int4"  # where none is given: the smallest
_OF_A_RUN = ("memory", "context", "on_demand", "loaded_neurons_percent", "device", "kernels", "max_loss")
_WEIGHTS = (".safetensors", ".gguf", ".bin")


def own_pack(source: Path, given: dict, *, task_type: str = TASK_TYPES[0], quiet: bool = False) -> Path:
    """The folder of the model's own pack, which is written if it is not there.

    source: a checkpoint folder or GGUF file. given: fields of PartInferConfig by name, as for the run. Raises
    PartInferError if a pack is there that was made before the model was changed. Making it takes more memory than a bounded run.
    """
    dtype = given.get("dtype", "auto")
    dtype = DTYPE if dtype == "auto" else dtype
    pack = source.parent / f"{model_name(source)}-{dtype}-pack"
    if is_pack(pack):
        _check_newer(pack, source)
        return pack
    if not quiet:
        print(f"writing {pack}, for this and later runs", file=sys.stderr)
    # In a process of its own: packing needs more memory than a run that --memory bounds, and none of it stays.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        process.submit(_write, source, pack, given | {"dtype": dtype}, task_type).result()
    return pack


def _write(source: Path, pack: Path, given: dict, task_type: str) -> None:
    everything = {"start_num": 0, "end_num": read_config(source).num_hidden_layers - 1, "sparsity": 0.7}
    kept = {name: value for name, value in given.items() if name not in _OF_A_RUN}
    write_pack(source, pack, settings_for(source, everything | kept | {"loaded_neurons_percent": 1.0}, task_type))


def _check_newer(pack: Path, source: Path) -> None:
    made = (pack / DESCRIPTION).stat().st_mtime
    files = [source] if source.is_file() else [path for path in source.iterdir() if path.suffix in _WEIGHTS]
    changed = next((path for path in sorted(files) if path.stat().st_mtime > made), None)
    if changed is not None:
        raise PartInferError(f"{changed} is newer than the pack {pack}: remove the pack, so that it is made again")
