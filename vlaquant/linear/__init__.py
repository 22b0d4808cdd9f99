"""Layers whose weight stays packed: buffers named as in the file, and a kernel that reads them.

``state_dict()`` of such a layer *is* the compressed-tensors format, so saving and loading need no conversion. What a
kernel needs beside the buffers is made at the first forward, is not saved, and is dropped when the buffers change.
"""

from vlaquant.linear.category import CategoryBank
from vlaquant.linear.embedding import QuantEmbedding
from vlaquant.linear.layers import QuantLinear, W4A16Linear, W8A8Linear, empty_linear, from_quantized
from vlaquant.linear.replace import is_replaceable, replace_module_
from vlaquant.linear.tables import Table, empty_table, pack_table, replace_table_, table_kind, table_objection
from vlaquant.linear.weight import PackedWeight

__all__ = [
    "CategoryBank",
    "PackedWeight",
    "QuantEmbedding",
    "QuantLinear",
    "Table",
    "W4A16Linear",
    "W8A8Linear",
    "empty_linear",
    "empty_table",
    "from_quantized",
    "is_replaceable",
    "pack_table",
    "replace_module_",
    "replace_table_",
    "table_kind",
    "table_objection",
]
