"""JSON texts for a store that every node reads: large ones are compressed, since what many nodes say is alike."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

__all__ = ["pack_json", "unpack_json"]

_COMPRESSED = "zlib:"  # begins no JSON text
_LARGE = 4096  # characters


def pack_json(value: Any) -> str:
    """`value` as a text."""
    text = json.dumps(value)
    if len(text) < _LARGE:
        return text
    return _COMPRESSED + base64.b64encode(zlib.compress(text.encode(), level=1)).decode()


def unpack_json(text: str) -> Any:
    """The value that `pack_json` has made `text` of."""
    if text.startswith(_COMPRESSED):
        text = zlib.decompress(base64.b64decode(text.removeprefix(_COMPRESSED))).decode()
    return json.loads(text)
