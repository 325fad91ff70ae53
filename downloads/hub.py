"""Models from the Hugging Face hub: which files are needed, how many bytes, and every error in one line."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from downloads.folder import check_free_space
from transformers_patches.errors import PartInferError
from transformers_patches.hub_tokens import without_tokens

CONNECT_SECONDS = 5  # so that a hub that can't be reached shows at once
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_SAFETENSORS = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
_BIN = r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?"


class HubUnreachable(PartInferError):
    """The hub did not answer, or answered that it is out of order."""


@dataclass(frozen=True)
class Repository:
    """A model repository at one commit."""

    hub_id: str  # owner/name
    commit: str  # its full hash
    sizes: dict[str, int]  # bytes of each file that is needed from it, by path

    @property
    def needs_conversion(self) -> bool:
        return any(name.endswith(".bin") for name in self.sizes)


def find_repository(hub_id: str, revision: str | None, token: str | None) -> Repository:
    """Ask the hub what a model consists of; HubUnreachable, or PartInferError for other refusals."""
    with hub_errors("model", hub_id, revision):
        info = HfApi().model_info(hub_id, revision=revision, token=token, files_metadata=True, timeout=CONNECT_SECONDS)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return Repository(info.id, info.sha, {name: sizes[name] for name in needed_files(hub_id, sizes)})


def needed_files(hub_id: str, names: Iterator[str]) -> list[str]:
    """Of a repository's files: config, tokenizer, and the safetensors, or the .bin files where it has no safetensors.

    Raises PartInferError for a repository without such weights.
    """
    names = list(names)
    for pattern in (_SAFETENSORS, _BIN):
        weights = [name for name in names if re.fullmatch(pattern, name)]
        sharded = [name for name in weights if re.search(r"-of-\d+|\.index\.json$", name)]
        if weights:
            return sorted([name for name in names if name in SMALL_FILES] + (sharded or weights))
    raise PartInferError(
        f"{hub_id} has neither model.safetensors nor pytorch_model.bin, in one or in shards: give a model in the "
        "standard Hugging Face layout"
    )


def fetch(repository: Repository, folder: Path, token: str | None) -> None:
    """Download a repository's needed files into a folder.

    Files that are there already are kept. After a cut connection, the download goes on where it broke; after an
    interruption of the program, the unfinished file starts over. Raises PartInferError, also for files of the wrong
    size.
    """
    missing = {name: size for name, size in repository.sizes.items() if not (folder / name).is_file()}
    converted = sum(repository.sizes.values()) if repository.needs_conversion else 0
    check_free_space(sum(missing.values()) + converted, folder)
    with hub_errors("model", repository.hub_id, repository.commit):
        snapshot_download(
            repository.hub_id,
            revision=repository.commit,
            local_dir=folder,
            allow_patterns=[glob.escape(name) for name in repository.sizes],
            token=token,
        )
    for name, size in repository.sizes.items():
        path = folder / name
        if not path.is_file():
            raise HubUnreachable(f"{repository.hub_id}: {name} did not arrive; run the command again to go on")
        if path.stat().st_size != size:
            path.unlink()
            raise PartInferError(f"{repository.hub_id}: {name} arrived damaged; run the command again to go on")


@contextmanager
def hub_errors(kind: str, hub_id: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub library raises into PartInferError; kind: model or data set."""
    try:
        yield
    except GatedRepoError:
        address = f"https://huggingface.co/{'' if kind == 'model' else 'datasets/'}{hub_id}"
        raise PartInferError(
            f"{hub_id} is gated: accept its terms at {address}, then give a token of that account with --token or "
            "in HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise PartInferError(
            f"the hub has no {kind} {hub_id!r}, or it is private: check the name, or give a token that may read it "
            "with --token or in HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise PartInferError(f"{hub_id} has no revision {revision!r}: give a branch, tag or commit of it") from None
    except HFValidationError as error:
        raise PartInferError(f"{hub_id!r} can't be a hub id: {_line(error)}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PartInferError(f"the hub refuses access to {hub_id} ({status}): check --token or HF_TOKEN") from None
        raise HubUnreachable(f"the hub answered {status} for {hub_id}: try again later") from None
    except OfflineModeIsEnabled:
        raise HubUnreachable("the hub is switched off by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE: unset them") from None
    except (httpx2.TransportError, LocalEntryNotFoundError, XetDownloadError) as error:
        raise HubUnreachable(
            f"no network, or the hub can't be reached ({_line(error)}); run the command again to go on"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(without_tokens(str(error)).split())[:120] or type(error).__name__
