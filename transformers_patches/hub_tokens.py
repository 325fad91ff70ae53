"""Hub tokens: checked before they are used, and never shown."""

from __future__ import annotations

import os
import re

from transformers_patches.errors import PartInferError

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_NOT_IN_TOKENS = re.compile(r"[^!-~]")  # whitespace, control characters, and what is not ASCII: HTTP headers hold none
_SHAPES = re.compile(r"hf_\w+|(?<=Bearer )\S+", re.ASCII)


def checked_token(given: str | None) -> str | None:
    """The token that was given, if it can be one; None leaves it to the hub library to find one.

    Raises PartInferError, which does not show it, for a token that is empty or holds characters that no token has; also
    for one that the library would find, in the environment or in the file of `hf auth login`.
    """
    if given is not None:
        _check(given, "--token")
        return given
    for name in VARIABLES:
        if os.environ.get(name):
            _check(os.environ[name].strip("\r\n"), name)  # the library strips line ends, too
            return None
    from huggingface_hub import get_token  # takes a moment to import

    if kept := get_token():
        _check(kept, "the file of hf auth login")
    return None


def _check(token: str, where: str) -> None:
    if not token:
        raise PartInferError(f"the hub token in {where} is empty: give one, or leave it out")
    bad = _NOT_IN_TOKENS.search(token)
    if bad:
        raise PartInferError(
            f"the hub token in {where} has {_kind(bad[0])} at place {bad.start() + 1} of {len(token)}: copy it again "
            "without spaces and ends of lines (it is not shown here)"
        )


def _kind(character: str) -> str:
    if character.isspace():
        return "whitespace"
    return "a character that is not ASCII" if ord(character) > 127 else "a control character"


def without_tokens(text: str) -> str:
    """A text, such as a library's message, with everything that is or looks like a hub token left out."""
    known = [value.strip() for name in VARIABLES if (value := os.environ.get(name, "")).strip()]
    for token in known:
        text = text.replace(token, "<token>")
    return _SHAPES.sub("<token>", text)
