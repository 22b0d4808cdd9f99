"""The only room that reads and writes checkpoint directories. Weights are safetensors, and nothing is ever pickled.

A directory is written beside its final place, verified there, and renamed when it is complete, so that a run that is
killed leaves nothing behind that looks like a result. Single files are written in the same way.
"""

from vlaquant.checkpoint.directory import (
    MANIFEST,
    check_source,
    read_config,
    read_manifest,
    read_tensors,
    require_finite,
    side_files,
    weight_files,
)
from vlaquant.checkpoint.identity import sha256, sha256_all, source_identity
from vlaquant.checkpoint.json_files import write_json
from vlaquant.checkpoint.output import atomic_directory, check_output, copy_side_files, replace_directory
from vlaquant.checkpoint.syncing import sync_directory
from vlaquant.checkpoint.tensor_files import TensorEntry, TensorFiles
from vlaquant.checkpoint.tensor_writing import join_tensor_files, write_made_tensors, write_tensor_file, write_tensors

__all__ = [
    "MANIFEST",
    "TensorEntry",
    "TensorFiles",
    "atomic_directory",
    "check_output",
    "check_source",
    "copy_side_files",
    "join_tensor_files",
    "read_config",
    "read_manifest",
    "read_tensors",
    "replace_directory",
    "require_finite",
    "sha256",
    "sha256_all",
    "side_files",
    "source_identity",
    "sync_directory",
    "weight_files",
    "write_json",
    "write_made_tensors",
    "write_tensor_file",
    "write_tensors",
]
