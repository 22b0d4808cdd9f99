"""Image and prompt -> what the model reads. Class names are those in published ``preprocessor_config.json`` files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from vlaquant.errors import CheckpointError

ImageLike = Image.Image | NDArray[np.uint8]

_IMAGENET_MEAN, _IMAGENET_STD = (0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)
_INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def prompt(instruction: str) -> str:
    """The question that OpenVLA was trained with."""
    return f"In: What action should the robot take to {instruction.lower()}?\nOut:"


class PromptCache:
    """The tokens of the instructions that were last asked for, as a robot gets the same one many times in a row.

    It belongs to one tokenizer, and forgets everything when it meets another or one with more tokens.
    """

    SIZE = 32

    def __init__(self) -> None:
        self._tokenizer: tuple[PreTrainedTokenizerBase | None, int] = (None, 0)
        self._tokens: dict[str, list[int]] = {}

    def tokens(self, tokenizer: PreTrainedTokenizerBase, instruction: str) -> list[int]:
        """Token ids of the instruction's prompt; not to be changed."""
        if self._tokenizer[0] is not tokenizer or self._tokenizer[1] != len(tokenizer):
            self._tokenizer, self._tokens = (tokenizer, len(tokenizer)), {}
        tokens = self._tokens.get(instruction)
        if tokens is None:
            tokens = tokenizer(prompt(instruction))["input_ids"]
            if len(self._tokens) == self.SIZE:
                del self._tokens[next(iter(self._tokens))]
            self._tokens[instruction] = tokens
        return tokens


class PrismaticImageProcessor(BaseImageProcessor):
    """Resizes and normalises one image per tower and stacks the results along the channels.

    Args:
        use_fused_vision_backbone: whether there are two towers.
        image_resize_strategy: ``resize-naive`` (to the square, whatever the aspect), ``resize-crop`` (shorter side,
            then the centre) or ``letterbox`` (padded to a square first, with the colour of the last tower's mean).
        input_sizes: [3, size, size] per tower, pixels.
        means: per tower and channel, of values in [0, 1].
        stds: likewise.
        tvf_normalize_params: per tower ``mean`` and ``std`` as they are applied. Published files hold them beside
            ``means`` and ``stds``, rounded to bfloat16, and the policy was trained with the rounded ones: they count.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  a list by transformers' convention

    def __init__(
        self,
        *,
        use_fused_vision_backbone: bool = False,
        image_resize_strategy: str = "resize-naive",
        input_sizes: Sequence[Sequence[int]] = ((3, 224, 224),),
        interpolations: Sequence[str] = ("bicubic",),
        means: Sequence[Sequence[float]] = (_IMAGENET_MEAN,),
        stds: Sequence[Sequence[float]] = (_IMAGENET_STD,),
        tvf_normalize_params: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        if image_resize_strategy not in {"resize-naive", "resize-crop", "letterbox"}:
            raise CheckpointError(f"image_resize_strategy={image_resize_strategy!r} is not known")
        self.use_fused_vision_backbone = use_fused_vision_backbone
        self.image_resize_strategy = image_resize_strategy
        self.input_sizes = [list(size) for size in input_sizes]
        self.interpolations = list(interpolations)
        self.means = [list(mean) for mean in means]
        self.stds = [list(std) for std in stds]
        self.tvf_normalize_params = [dict(params) for params in tvf_normalize_params or ()] or [
            {"mean": mean, "std": std, "inplace": False} for mean, std in zip(self.means, self.stds, strict=True)
        ]
        super().__init__(**kwargs)

    def preprocess(self, images: ImageLike | Sequence[ImageLike], **kwargs: Any) -> BatchFeature:
        """Images -> ``pixel_values`` float32 [b, 3 or 6, height, width]."""
        batch = images if isinstance(images, Sequence) else [images]
        return BatchFeature({"pixel_values": torch.from_numpy(np.stack([self._pixels(_as_pil(one)) for one in batch]))})

    def _pixels(self, image: Image.Image) -> NDArray[np.float32]:
        """float32 [3 or 6, height, width]; towers that read one size share the resized image."""
        resized: dict[tuple[int, str], NDArray[np.uint8]] = {}
        towers = []
        for tower, (*_, size) in enumerate(self.input_sizes):
            key = size, self.interpolations[tower]
            if key not in resized:
                resized[key] = np.asarray(self._resize(image, size, _INTERPOLATIONS[key[1]]))
            towers.append(_normalized(resized[key], self.tvf_normalize_params[tower]))
        return np.concatenate(towers)

    def _resize(self, image: Image.Image, size: int, how: Image.Resampling) -> Image.Image:
        if self.image_resize_strategy == "resize-naive":
            return image.resize((size, size), how)
        if self.image_resize_strategy == "letterbox":
            image = _letterbox(image, tuple(int(channel * 255) for channel in self.means[-1]))
        shorter = min(image.size)
        grown = image.resize((int(size * image.width / shorter), int(size * image.height / shorter)), how)
        left, top = round((grown.width - size) / 2.0), round((grown.height - size) / 2.0)
        return grown.crop((left, top, left + size, top + size))


def _normalized(pixels: NDArray[np.uint8], applied: Mapping[str, Any]) -> NDArray[np.float32]:
    """[height, width, 3] in 0 to 255 -> [3, height, width]; channels first, so that numpy's inner loops are long."""
    mean, std = (np.asarray(applied[name], dtype=np.float32).reshape(3, 1, 1) for name in ("mean", "std"))
    values = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
    values /= np.float32(255.0)
    values -= mean
    values /= std
    return values


def _as_pil(image: ImageLike) -> Image.Image:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _letterbox(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    """Equal borders on both sides, so an odd difference leaves the result one pixel off square."""
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    padded = Image.new("RGB", (image.width + 2 * left, image.height + 2 * top), fill)
    padded.paste(image, (left, top))
    return padded


class PrismaticProcessor(ProcessorMixin):
    """Image processor and tokenizer together."""

    def __init__(
        self,
        image_processor: PrismaticImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)  # type: ignore[no-untyped-call]

    def __call__(self, text: str | list[str], images: ImageLike | Sequence[ImageLike], **kwargs: Any) -> BatchFeature:
        """Prompts and images -> ``input_ids``, ``attention_mask`` [b, t] and ``pixel_values``."""
        pixels = self.image_processor.preprocess(images)
        tokens = self.tokenizer(text, **{"return_tensors": "pt", "padding": True} | kwargs)
        if pixels["pixel_values"].shape[0] != tokens["input_ids"].shape[0]:
            raise CheckpointError(
                f"{tokens['input_ids'].shape[0]} prompts for {pixels['pixel_values'].shape[0]} images; give as many"
            )
        return BatchFeature({**tokens, **pixels})
