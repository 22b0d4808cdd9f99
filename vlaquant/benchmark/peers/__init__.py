"""Other packages that multiply with packed weights, each behind the same small interface.

A peer's file is imported only if its package is installed. It gets the same codes and scales as our kernels, so that
what differs is the product; whether it is the right product is checked before it is timed.
"""

import importlib
import importlib.metadata
import importlib.util

from vlaquant.benchmark.peers.base import Peer

__all__ = ["ADAPTERS", "Peer", "installed_peers"]

#: Module that must be installed -> ours, which has ``PEERS``.
ADAPTERS = {
    "torch": "vlaquant.benchmark.peers.torch_dynamic",
    "torchao": "vlaquant.benchmark.peers.torchao_int4",
    "onnxruntime": "vlaquant.benchmark.peers.onnx_runtime",
    "openvino": "vlaquant.benchmark.peers.open_vino",
    "auto_round_kernel": "vlaquant.benchmark.peers.auto_round_ark",
}


def installed_peers() -> tuple[tuple[Peer, ...], dict[str, str]]:
    """The peers that can be imported, and for each package that cannot the reason."""
    peers: list[Peer] = []
    missing: dict[str, str] = {}
    for package, adapter in ADAPTERS.items():
        if importlib.util.find_spec(package) is None:
            missing[package] = "not installed"
            continue
        try:
            peers += importlib.import_module(adapter).PEERS
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            missing[package] = f"does not import: {error}"
    return tuple(peers), missing
