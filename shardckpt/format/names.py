"""Names: the paths of values and tensors in a state, as legal Zarr node names."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from urllib.parse import quote

from shardckpt.errors import UnsupportedValueError

__all__ = ["TENSOR_NAME", "join", "join_shown", "key_text", "plain_text", "segment"]

_SEGMENT = r"(?!__|(?:zarr\.json|\.+)(?:/|\Z))[ -.0-\[\]-~]+"
TENSOR_NAME = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT}){{0,127}}")
"""A legal name of a tensor: what Zarr allows, in ASCII, with more segments than values have levels."""

_LONGEST_SHOWN = 2000


def segment(key: object) -> str:
    """`key` as one part of a tensor's name, which is also a legal Zarr node name.

    Slashes, control characters and what Zarr reserves are percent-encoded, so that the keys of one dict keep
    different names.

    >>> segment("layers.0/weight"), segment(3), segment("..")
    ('layers.0%2Fweight', '3', '%2E.')
    """
    return _segment_of_text(plain_text(key) if isinstance(key, str) else str(key))


@lru_cache(maxsize=1 << 16)
def _segment_of_text(text: str) -> str:
    encoded = quote(text, safe=" !$&'()*+,;=:@[]{}<>|^`\"#?~", encoding="utf-8", errors="surrogatepass")
    if not encoded.strip(".") or encoded.startswith("__"):
        encoded = "".join(f"%{byte:02X}" for byte in text[:1].encode() or b"\0") + encoded[1:]
    return encoded if encoded != "zarr.json" else "%7Aarr.json"


def key_text(key: object, path: str) -> str:
    """The text of `key`, a key of the dict at `path`.

    Raises UnsupportedValueError for an integer of more digits than Python converts to text (4300 by default).
    """
    try:
        return str(key)
    except ValueError as error:
        raise UnsupportedValueError(
            f"state[{path!r}] has a key that cannot be written: {error}. Choose another key."
        ) from error


def join(path: str, key: object) -> str:
    """The name of the value under `key` of the container at `path`.

    >>> join("model", "weight"), join("", "model")
    ('model/weight', 'model')
    """
    return f"{path}/{segment(key)}" if path else segment(key)


def join_shown(path: str, key: object) -> str:
    """As `join`, for messages: a name of more than 2000 characters is shortened.

    Otherwise a key of a megabyte would be repeated for each of the values below it.
    """
    joined = join(path, key)
    if len(joined) <= _LONGEST_SHOWN:
        return joined
    digest = hashlib.blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{joined[:100]}...{digest}...{joined[-100:]}"


def plain_text(text: str) -> str:
    """The characters of `text`, also where it is a member of an Enum, whose str() is another text."""
    return str.__str__(text)
