"""What a model of transformers is shown: windows of a text file, or images with an instruction."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.import_utils import is_torchvision_available

from vlaquant.errors import CalibrationError
from vlaquant.families.base import Inputs
from vlaquant.families.observation import Observation


def text_samples(directory: Path, text_file: Path, count: int, length: int) -> list[Tensor]:
    """``count`` windows of ``length`` tokens [1, length], evenly spread over a text file.

    Raises:
        CalibrationError: no such file, or too short for one window.
    """
    if not text_file.is_file():
        raise CalibrationError(f"{text_file}: no such text file")
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    ids = torch.tensor(tokenizer(text_file.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    if len(ids) < length:
        raise CalibrationError(f"{text_file}: holds {len(ids)} tokens, fewer than sequence_length={length}")
    starts = torch.linspace(0, len(ids) - length, min(count, len(ids) // length)).long()
    return [ids[start : start + length].unsqueeze(0) for start in starts.tolist()]


def open_processor(model: Any) -> Any:
    """The processor of the directory that a model came from; ``model.processor`` if somebody has set one.

    Raises:
        CalibrationError: the directory has none, or it needs a package that is not installed.
    """
    if getattr(model, "processor", None) is None:
        directory = model.config.name_or_path
        kind: Any = PROCESSOR_MAPPING.get(type(model.config), None)
        if kind is None or not directory:
            raise CalibrationError(
                f"{type(model).__name__} has no processor for images; set model.processor, or calibrate it with text"
            )
        try:
            model.processor = _images_only(kind).from_pretrained(directory, local_files_only=True)
        except (ImportError, OSError, ValueError) as error:
            reason = str(error).rstrip(".")
            raise CalibrationError(
                f"{directory}: its {kind.__name__} cannot be opened: {reason}. Set model.processor to one that can, "
                "or calibrate with text"
            ) from error
    return model.processor


def _images_only(kind: type[ProcessorMixin]) -> Any:
    """The processor without its part for videos, which exists only where torchvision is installed."""
    parts = kind.get_attributes()
    if is_torchvision_available() or "video_processor" not in parts:
        return kind
    wanted = [name for name in parts if name != "video_processor"]

    class ImagesOnly(kind):  # type: ignore[misc, valid-type]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return wanted

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
            opened = dict(zip(wanted, super()._get_arguments_from_pretrained(*args, **kwargs), strict=True))
            return [opened.get(name) for name in parts]

    ImagesOnly.__name__ = kind.__name__  # the processor's files name their class
    return ImagesOnly


def image_text_inputs(model: Any, sample: Observation) -> Inputs:
    """Tensors for ``model(**inputs)``: the instruction as a chat where the processor has a template for it.

    Images of missing cameras are left out.

    Raises:
        CalibrationError: no image, or what :func:`open_processor` raises.
    """
    images = [image.convert("RGB") for image in sample.images if image is not None]
    if not images:
        raise CalibrationError(f"episode {sample.episode}, {sample.instruction!r}: holds no image")
    processor = open_processor(model)
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": sample.instruction}]
        messages = [{"role": "user", "content": content}]
        # The tokenizer's own method, because some processors' asks their part for videos
        render = processor.tokenizer.apply_chat_template
        text = render(messages, chat_template=processor.chat_template, add_generation_prompt=True, tokenize=False)
    else:
        text = processor.image_token * len(images) + sample.instruction
    batch = processor(images=images, text=text, return_tensors="pt")
    known = inspect.signature(model.forward).parameters.keys() - {"labels"}
    embedding = model.get_input_embeddings().weight
    return {
        name: tensor.to(embedding.device, embedding.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in batch.items()
        if name in known and isinstance(tensor, Tensor)
    }
