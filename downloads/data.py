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
    with exclusive(target, wait=True):
        manifest = read_manifest(target)
        if manifest and manifest.name == name and manifest.revision == revision and not damage(target, manifest):
            return Fetched(str(target), manifest.source, manifest.total_bytes, True)
        if target.exists() and not manifest:
            raise PartInferError(f"{target} exists and was not made by download.py: move it or give --datasave_path")
        if manifest and (manifest.name, manifest.revision) != (name, revision):
            raise PartInferError(
                f"{target} holds {manifest.name} (revision {manifest.revision}), asked for was {name} (revision "
                f"{revision}): give another --datasave_path, or delete it first"
            )
        place = Path(os.path.realpath(target))  # a link to a folder stays one
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
