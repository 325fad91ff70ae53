"""Data sets from the Hugging Face hub, saved to disk with the datasets library."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from downloads.folder import check_free_space, damage, publish, read_manifest, work_folder, write_manifest
from downloads.hub import CONNECT_SECONDS, hub_errors
from downloads.model import Fetched
from transformers_patches.errors import PartInferError
from transformers_patches.hub_tokens import checked_token, without_tokens
from transformers_patches.locks import exclusive


def dataset_folder(parent: Path, name: str, config: str | None) -> Path:
    """Where a data set goes: <parent>/<last part of its name>, with -<config> if it has one."""
    return parent / (name.rstrip("/").split("/")[-1] + (f"-{config}" if config else ""))


def download_dataset(
    name: str, config: str | None, parent: Path, revision: str | None = None, token: str | None = None
) -> Fetched:
    """Make sure that a data set is saved under parent, and fetch it only if it is not.

    config: the data set's configuration (a "subset"), for those that have several. The folder is what
    datasets.load_from_disk reads. Raises PartInferError; nothing is then left that looks complete.
    """
    target = dataset_folder(parent, name, config)
    token = checked_token(token)
    place = Path(os.path.realpath(target))  # a link to a folder stays one
    if not os.access(place.parent, os.W_OK) and (there := _already_there(target, name, revision)):
        return there  # where nothing can be written, there is no lock, and no need for one
    with exclusive(target, wait=True):
        if there := _already_there(target, name, revision):
            return there
        manifest = read_manifest(target)
        if target.exists() and not manifest:
            raise PartInferError(f"{target} exists and was not made by download.py: move it or give --datasave_path")
        if manifest and (manifest.name, manifest.revision) != (name, revision):
            raise PartInferError(
                f"{target} holds {manifest.name} (revision {manifest.revision}), asked for was {name} (revision "
                f"{revision}): give another --datasave_path, or delete it first"
            )
        work = work_folder(place)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            _save(name, config, revision, token, work)
            manifest = write_manifest(work / "finished", name, "hub", revision)
            publish(work / "finished", place)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return Fetched(str(target), "hub", manifest.total_bytes, False)


def _already_there(target: Path, name: str, revision: str | None) -> Fetched | None:
    manifest = read_manifest(target)
    if manifest is None or (manifest.name, manifest.revision) != (name, revision) or damage(target, manifest):
        return None
    return Fetched(str(target), manifest.source, manifest.total_bytes, True)


def _save(name: str, config: str | None, revision: str | None, token: str | None, work: Path) -> None:
    from datasets import DownloadConfig, load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from huggingface_hub import HfApi

    with hub_errors("data set", name, revision):
        info = HfApi().dataset_info(name, revision=revision, token=token, files_metadata=True, timeout=CONNECT_SECONDS)
        print(f"{info.id} from the hub, commit {info.sha[:12]}", file=sys.stderr)
        # downloaded, cached as Arrow, saved as Arrow: three copies for a while
        check_free_space(3 * sum(file.size or 0 for file in info.siblings or ()), work)
        options = {
            "cache_dir": str(work / "cache"),
            "token": token,
            "download_config": DownloadConfig(cache_dir=work / "cache" / "downloads", token=token),
        }
        try:
            try:
                loaded = load_dataset(info.id, config, revision=info.sha, **options)
            except RuntimeError as error:
                if "scripts are no longer supported" not in str(error):
                    raise
                # a repository with a loading script: the hub keeps its own Parquet copy of most of those
                loaded = load_dataset(info.id, config, revision="refs/convert/parquet", **options)
            loaded.save_to_disk(str(work / "finished"))
        except (ValueError, RuntimeError, DatasetNotFoundError, DatasetGenerationError) as error:
            reason = " ".join(without_tokens(str(error)).split("Example of usage")[0].split())[:400]
            raise PartInferError(f"can't load {name}, config {config}: {reason}; see --data_config") from None
