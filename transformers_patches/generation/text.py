"""Text from tokens that come one by one, in pieces that add up to tokenizer.decode of them all; and stop strings."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase, TokenizersBackend

Sink = Callable[[str], None]

INCOMPLETE = "\ufffd"  # what a character's bytes decode to as long as some are missing
CONTEXT = (
    16  # characters of earlier text that tokens are decoded after: more than any decoder strips from a text's start
)
# Decoders of the tokenizers library that change nothing before the last token, apart from unfinished characters
LOCAL_DECODERS = {"BPEDecoder", "ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}
# transformers' clean_up_tokenization, in its order
TIDYING = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
)
TIDYING += ((" 've", "'ve"), (" 're", "'re"))


class TextDecoder:
    """The text of token ids that are pushed one by one, special tokens left out.

    All that `push` and `finish` return, put together, equals tokenizer.decode(ids, skip_special_tokens=True). Held back
    is what a later token can still change: characters that lack bytes, and runs of byte tokens, of which one wrong byte
    spoils the whole run. With a tokenizer from outside the tokenizers library, or a decoder that is not known here, all
    of the text comes at the end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._ids: list[int] = []  # from the context's first on
        self._known = ""  # text of the ids before `_cut`, all of which has been returned
        self._cut = self._next_start = 0  # both are places between tokens where nothing is held back
        self._tidying = [_Replacement(*pair) for pair in TIDYING] if _tidies(tokenizer) else []
        self._streams = _is_local(tokenizer)
        if self._streams:
            self._backend = tokenizer.backend_tokenizer
            self._special = {
                added.content for added in self._backend.get_added_tokens_decoder().values() if added.special
            }
            self._decode = lambda ids: self._backend.decode(ids, skip_special_tokens=False)
            self._token = self._backend.id_to_token
        else:
            self._special = set(tokenizer.all_special_tokens)
            self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
            self._token = tokenizer.convert_ids_to_tokens

    def special(self, token_id: int) -> str | None:
        """The text of a special token, None for any other; special ones must not be pushed."""
        token = self._token(token_id)
        return token if token in self._special else None

    def push(self, token_id: int) -> str:
        """Take a token. Returns the text that has become certain with it."""
        token = self._token(token_id)
        if self._streams and token is None:  # a model may have more ids than its tokenizer has tokens: no text
            return ""
        self._ids.append(token_id)
        if not self._streams or _is_byte(token):
            return ""
        text = self._decode(self._ids)
        if text.endswith(INCOMPLETE):
            return ""
        piece = text[len(self._known) :]
        self._known, self._cut = text, len(self._ids)
        self._shorten()
        return _tidy(self._tidying, piece)

    def rest(self) -> str:
        """What `finish` would return now."""
        if self._cut == len(self._ids) and not self._tidying:
            return ""
        return _tidy(copy.deepcopy(self._tidying), self._decode(self._ids)[len(self._known) :], end=True)

    def finish(self) -> str:
        """The text that has been held back. Nothing may be pushed afterwards."""
        rest = self.rest()
        self._streams = False
        return rest

    def _shorten(self) -> None:
        """Forget early tokens, so that decoding a token costs the same however long the text is."""
        if self._next_start == 0:
            self._next_start = self._cut if len(self._known) >= CONTEXT else 0
        elif len(self._known) >= 2 * CONTEXT:
            context = self._decode(self._ids[self._next_start :])
            if len(context) >= CONTEXT:
                self._ids, self._known = self._ids[self._next_start :], context
                self._cut = self._next_start = len(self._ids)


def _is_local(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a new token leaves the text of all earlier ones alone, apart from what TextDecoder holds back."""
    kind = type(tokenizer)
    if not isinstance(tokenizer, TokenizersBackend) or kind._decode is not TokenizersBackend._decode:
        return False
    if kind.decode is not PreTrainedTokenizerBase.decode:
        return False
    if kind.clean_up_tokenization is not PreTrainedTokenizerBase.clean_up_tokenization:
        return False
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None:
        return True
    try:
        described = json.loads(decoder.__getstate__())
    except Exception:  # a decoder written in Python: the library raises its bare Exception
        return False
    return all(step["type"] in LOCAL_DECODERS for step in described.get("decoders", [described]))


def _tidies(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether transformers' decode also removes spaces before punctuation. TextDecoder does it itself if it streams."""
    if not (_is_local(tokenizer) and tokenizer.clean_up_tokenization_spaces):
        return False
    despite = tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    return type(tokenizer.backend_tokenizer.model).__name__ != "BPE" or despite


def _is_byte(token: str) -> bool:
    """Whether a token stands for one byte, as in <0x0A>."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _overlap(text: str, pattern: str) -> int:
    """Length of the longest end of the text that the pattern begins with, without being all of it."""
    return next((n for n in range(min(len(pattern) - 1, len(text)), 0, -1) if text.endswith(pattern[:n])), 0)


class _Replacement:
    """str.replace of a text that comes in pieces."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new, self.held = old, new, ""

    def __call__(self, text: str, *, end: bool) -> str:
        *before, last = (self.held + text).split(self.old)
        certain = len(last) - (0 if end else _overlap(last, self.old))
        self.held = last[certain:]
        return self.new.join([*before, last[:certain]])


def _tidy(replacements: list[_Replacement], text: str, *, end: bool = False) -> str:
    for replace in replacements:
        text = replace(text, end=end)
    return text


class AnswerText:
    """The text of an answer, up to the first stop string; the sink gets its pieces as soon as they are certain.

    Stop strings are looked for in the text that the answer shows, and in the same text with its special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], sink: Sink | None = None) -> None:
        self.decoder, self.stop, self.sink = TextDecoder(tokenizer), stop, sink
        self.text = ""
        self.stopped = False
        self._pending = ""  # certain, but perhaps the beginning of a stop string
        self._special: list[tuple[int, str]] = []  # special tokens, and where in the text from `_pending` on they came

    def push(self, token_id: int) -> bool:
        """Take a token. Returns whether a stop string has ended the answer."""
        if self.stopped:
            return True
        special = self.decoder.special(token_id)
        if special is None:
            self._pending += self.decoder.push(token_id)
        elif self.stop:
            self._special.append((len(self._pending + self.decoder.rest().rstrip(INCOMPLETE)), special))
        rest = self.decoder.rest() if self.stop else ""
        # bytes that are still missing may change what the run before them reads as
        self._advance("" if rest.endswith(INCOMPLETE) else rest)
        return self.stopped

    def finish(self) -> None:
        """Pass on what has been held back. No token may follow."""
        if not self.stopped:
            self._pending += self.decoder.finish()
            self._advance("")
        self._pass_on(self._pending)

    def _advance(self, rest: str) -> None:
        """Pass on what comes before a stop string, or can't be a part of one.

        rest: text that follows, and may yet change.
        """
        text = self._pending + rest
        found = [places[view.find(s)] for view, places in self._views(text) for s in self.stop if s in view]
        if found:
            self._pass_on(text[: min(found)])
            self._pending, self.stopped = "", True
            return
        certain = [
            places[len(view) - max((_overlap(view, s) for s in self.stop), default=0)]
            for view, places in self._views(self._pending)
        ]
        count = min(certain)
        self._special = [(at - count, token) for at, token in self._special if at >= count]
        self._pass_on(self._pending[:count])
        self._pending = self._pending[count:]

    def _views(self, text: str) -> Iterator[tuple[str, Sequence[int]]]:
        """The text without special tokens and with them, and for each character, and the end, its place in `text`."""
        yield text, range(len(text) + 1)
        if not self._special:
            return
        view, places, before = "", [], 0
        for at, token in self._special:
            if at > len(text):
                break
            view += text[before:at] + token
            places += [*range(before, at), *[at] * len(token)]
            before = at
        yield view + text[before:], [*places, *range(before, len(text) + 1)]

    def _pass_on(self, text: str) -> None:
        self.text += text
        if text and self.sink:
            self.sink(text)
