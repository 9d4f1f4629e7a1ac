"""All that scripts/bench/save compares, by the word that --only takes."""

from __future__ import annotations

from _peers.base import Candidate
from _peers.dcp import Dcp, DcpProcess, DcpThread
from _peers.dlrover_flash import Dlrover
from _peers.orbax_async import Orbax
from _peers.ours import Shardckpt
from _peers.safetensors_file import Safetensors
from _peers.torch_checkpointing_async import TorchCheckpointing
from _peers.torch_save import TorchSave
from _peers.torchsnapshot_async import Torchsnapshot

__all__ = ["CANDIDATES"]

CANDIDATES: dict[str, type[Candidate]] = {
    "shardckpt": Shardckpt,
    "dcp": Dcp,
    "dcp-thread": DcpThread,
    "dcp-process": DcpProcess,
    "torch": TorchSave,
    "safetensors": Safetensors,
    "torchsnapshot": Torchsnapshot,
    "orbax": Orbax,
    "torch-checkpointing": TorchCheckpointing,
    "dlrover": Dlrover,
}
"""Those after safetensors need an environment that `scripts/bench/peers` makes."""
