"""From token ids to printable strings and from words to token ids: the one place where either is decided."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

from workbench.errors import UnknownToken, require_one_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Match = Literal["folded", "exact", "regex"]


def token_strings(tokenizer: "PreTrainedTokenizerBase", d_vocab: int) -> list[str]:
    """The printable string of every token id, `d_vocab` of them.

    Spaces are kept, as they tell ` dog` from `dog`; line breaks and other control characters are escaped (`\\n`);
    bytes that are no complete UTF-8 character read `\\xf0\\x9f`; ids that pad the embedding matrix beyond the
    tokenizer read `<unused 50300>`.
    """
    raw = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), d_vocab))))
    special = set(tokenizer.all_special_ids)
    byte_level = _is_byte_level(raw)
    strings = [
        f"<unused {i}>" if token is None else token if i in special else _printable(token, byte_level)
        for i, token in enumerate(raw)
    ]
    return strings + [f"<unused {i}>" for i in range(len(strings), d_vocab)]


def token_bytes(tokenizer: "PreTrainedTokenizerBase", d_vocab: int) -> list[int]:
    """How many bytes of UTF-8 text each token id stands for, `d_vocab` of them; special and unused ones for none."""
    raw = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), d_vocab))))
    special, byte_level = set(tokenizer.all_special_ids), _is_byte_level(raw)
    sizes = []
    for i, token in enumerate(raw):
        if token is None or i in special:
            sizes.append(0)
        elif byte_level:
            sizes.append(len(token))
        else:
            sizes.append(1 if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode()))
    return sizes + [0] * (d_vocab - len(sizes))


def fold(token: str) -> str:
    """The token without surrounding space and case, the sense in which ` Dog` and `dog` are one word."""
    return token.strip().casefold()


def matching_ids(strings: Iterable[tuple[int, str]], text: str, match: Match) -> list[int]:
    """Ids of the tokens (id and string) that `text` names.

    Args:
        match: `folded` ignores space around the token and case; `exact` is the very string, with its space;
            `regex` is a Python regular expression searched for in the token.
    Raises:
        UnknownToken: if `text` is no regular expression.
    """
    require_one_of("match", match, get_args(Match))
    if match == "regex":
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise UnknownToken(f"{text!r} is not a regular expression ({error}). Mend it, or search without regex.") from None
        return [i for i, token in strings if pattern.search(token)]
    if match == "exact":
        return [i for i, token in strings if token == text]
    return [i for i, token in strings if fold(token) == fold(text)]


def no_such_token(strings: Iterable[str], text: str, match: Match) -> UnknownToken:
    """The error of a text that is no token, with tokens that begin like it. Most words are several tokens."""
    head = fold(text)[:3]
    near = [token for token in strings if head and fold(token).startswith(head)][:5]
    hint = f" Tokens that begin like it: {', '.join(map(repr, near))}." if near and match != "regex" else ""
    return UnknownToken(
        f"{text!r} ({match}) is no single token of this vocabulary.{hint} "
        "Ask for one of its pieces, or use a regular expression."
    )


def token_id(tokenizer: "PreTrainedTokenizerBase", strings: Sequence[str], text: str) -> int:
    """The id of the one token that is `text`, of which a leading space is a part; line breaks and the like as they are, or
    escaped as `token_strings` has them.

    Raises:
        UnknownToken: if it is no single token (the text says of which it is made), or the string of several.
    """
    found = matching_ids(enumerate(strings), _escaped(text), "exact")
    if len(found) > 1:
        raise UnknownToken(
            f"{text!r} is the string of {len(found)} tokens, {found[:5]}. Give one of these ids instead (on the command "
            f"line id:{found[0]})."
        )
    if not found:
        pieces = [strings[i] for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i < len(strings)]
        made = f" It is made of {', '.join(map(repr, pieces))}." if len(pieces) > 1 else ""
        spaced = f" {' ' + text!r}, with a leading space, is one." if " " + _escaped(text) in strings else ""
        raise UnknownToken(f"{text!r} is no single token of this vocabulary.{made}{spaced} Name one token, or give its id.")
    return found[0]


def ordinary_ids(tokenizer: "PreTrainedTokenizerBase", d_vocab: int) -> list[int]:
    """Ids of the tokens that texts are made of: none that is special or was added, and none that pads the embedding matrix."""
    raw = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), d_vocab))))
    apart = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return [i for i, token in enumerate(raw) if token is not None and i not in apart]


def shown(token: str) -> str:
    """The token as a terminal or a picture shows it: a leading or trailing space becomes a visible `·`."""
    core = token.strip(" ")
    return (
        f"{'·' * (len(token) - len(token.lstrip(' ')))}{core}{'·' * (len(token) - len(token.rstrip(' ')))}"
        if core
        else "·" * len(token)
    )


def shortened(text: str, length: int = 60) -> str:
    """A text in quotes, on one line; of a long one the end."""
    return repr(text) if len(text) <= length else "…" + repr(text[-length:])


def joined(tokens: Iterable[str]) -> str:
    """Several tokens on one line, spaces visible."""
    return "  ".join(shown(token) for token in tokens)


def _printable(token: str, byte_level: bool) -> str:
    if byte_level:
        table = _bytes_of_characters()
        text = b"".join(table.get(c, c.encode()) for c in token).decode("utf-8", errors="backslashreplace")
    elif match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):  # SentencePiece's name of a lone byte
        text = bytes([int(match[1], 16)]).decode("utf-8", errors="backslashreplace")
    else:
        text = token.replace("▁", " ")
    return _escaped(text)


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _is_byte_level(raw: Sequence[str | None]) -> bool:
    """Whether tokens are spelled in GPT-2's byte alphabet: then `Ġ`, its space, occurs in it and `▁` does not lead."""
    spaced = sum(token.startswith("Ġ") for token in raw if token)
    return spaced > sum(token.startswith("▁") for token in raw if token)


@lru_cache(maxsize=1)
def _bytes_of_characters() -> dict[str, bytes]:
    """Inverse of GPT-2's byte alphabet: printable bytes stand for themselves, the others for U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): bytes([b]) for b in printable} | {chr(0x100 + i): bytes([b]) for i, b in enumerate(others)}
