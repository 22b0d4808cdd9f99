"""Image preprocessing against the original's numbers; prompts; action tokens and their statistics."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles_openvla import image_processor_fields, record, reference_processor, tensors
from PIL import Image

from vlaquant.errors import CheckpointError
from vlaquant.models.openvla import (
    ActionTokens,
    PrismaticImageProcessor,
    action_statistics,
    normalize,
    processing,
    prompt,
    unnormalize,
)

IMAGES = sorted(key.removeprefix("image.") for key in tensors("preprocessing") if key.startswith("image."))
STRATEGIES = ("resize-naive", "resize-crop", "letterbox")
STATS = {"low": np.array([-2.0, 0.0, 0.0]), "high": np.array([4.0, 0.5, 1.0]), "mask": np.array([True, True, False])}


def image(name):
    return tensors("preprocessing")[f"image.{name}"].numpy()


def image_processor(strategy, **changes):
    fields = image_processor_fields(record()["preprocessing"][strategy])
    return PrismaticImageProcessor(**(fields | changes))


def distance(made, strategy, name):
    """Largest difference from what the original made of the image."""
    pixels = made.preprocess(image(name))["pixel_values"]
    wanted = tensors("preprocessing")[f"{strategy}.{name}"]
    assert pixels.shape == (1, *wanted.shape)
    return float((pixels[0] - wanted).abs().max())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", IMAGES)
def test_pixels_are_the_original_ones(strategy, name):
    assert distance(image_processor(strategy), strategy, name) <= 1e-6


@pytest.mark.parametrize("name", IMAGES)
def test_pixels_without_applied_statistics_use_the_given_ones(name):
    assert distance(image_processor("letterbox", tvf_normalize_params=None), "plain-letterbox", name) <= 1e-6


def test_rounded_statistics_count():
    exact = image_processor("resize-naive", tvf_normalize_params=None)
    assert distance(exact, "resize-naive", "wide") > 5e-3


def test_letterbox_takes_the_last_mean():
    means = record()["preprocessing"]["letterbox"]["means"]
    assert distance(image_processor("letterbox", means=means[::-1]), "letterbox", "wide") > 0.1


def test_letterbox_of_an_odd_border_is_not_square(monkeypatch):
    def square(picture, fill):
        side = max(picture.size)
        padded = Image.new("RGB", (side, side), fill)
        padded.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return padded

    monkeypatch.setattr(processing, "_letterbox", square)
    assert distance(image_processor("letterbox"), "letterbox", "odd") > 0.1
    assert distance(image_processor("letterbox"), "letterbox", "square") <= 1e-6


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_processor_survives_saving(strategy, tmp_path):
    made = image_processor(strategy)
    made.save_pretrained(tmp_path)
    again = PrismaticImageProcessor.from_pretrained(tmp_path)
    assert distance(again, strategy, "tall") <= 1e-6
    for field in ("means", "stds", "input_sizes", "tvf_normalize_params", "tvf_resize_params"):
        assert getattr(again, field) == record()["preprocessing"][strategy][field]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_image_modes_become_rgb(mode):
    picture = Image.fromarray(image("tall")).convert(mode)
    made = image_processor("resize-naive")
    pixels = made.preprocess([picture, np.asarray(picture.convert("RGB"))])["pixel_values"]
    assert pixels.shape == (2, 6, 16, 16)
    assert torch.equal(pixels[0], pixels[1])


def test_unknown_strategy_is_refused():
    with pytest.raises(CheckpointError, match="resize-slowly"):
        PrismaticImageProcessor(image_resize_strategy="resize-slowly")


def test_processor_pads_on_request_and_counts():
    processor = reference_processor("fused")
    texts = [prompt("Pick up the red block"), prompt("open drawer")]
    both = processor(texts, [image("tall"), image("wide")])
    assert both["input_ids"].shape == both["attention_mask"].shape
    assert both["attention_mask"].sum(dim=1).tolist() == [18, 15]
    longer = processor(texts, [image("tall"), image("wide")], padding="max_length", max_length=30)
    assert longer["input_ids"].shape == (2, 30)
    with pytest.raises(CheckpointError, match="2 prompts for 1 images"):
        processor(texts, image("tall"))


def test_prompt_is_the_one_of_training():
    assert prompt("Push the BLOCK") == "In: What action should the robot take to push the block?\nOut:"


@given(st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=9))
def test_tokens_return_to_the_centre_of_their_bin(values):
    tokens = ActionTokens(256, 32000)
    action = np.array(values)
    encoded = tokens.encode(action)
    assert encoded.min() >= 32000 - 256
    assert encoded.max() <= 31999
    assert np.abs(tokens.decode(encoded) - np.clip(action, -1.0, 1.0)).max() <= 1 / 255 + 1e-12
    assert np.array_equal(tokens.decode(tokens.encode(tokens.decode(encoded))), tokens.decode(encoded))


def test_last_token_is_the_lowest_action():
    tokens = ActionTokens(256, 32000)
    assert tokens.encode(np.array([-1.0, 1.0])).tolist() == [31999, 31744]
    assert tokens.decode(np.array([31999]))[0] == pytest.approx(-1.0 + 1 / 255)
    # Two tokens share the highest bin, and tokens that stand for no action go to the nearest end.
    assert tokens.bins(np.array([31745, 31744, 5, 32063])).tolist() == [254, 254, 254, 0]


@given(st.lists(st.floats(-1.0, 1.0), min_size=3, max_size=3))
def test_units_round_trip(values):
    normalized = np.array(values)
    np.testing.assert_allclose(normalize(unnormalize(normalized, STATS), STATS), normalized, atol=1e-12)


def test_units_are_those_of_the_dataset():
    assert unnormalize(np.array([-1.0, 1.0, 0.25]), STATS).tolist() == [-2.0, 0.5, 0.25]
    assert normalize(np.array([10.0, 0.25, 7.0]), STATS).tolist() == [1.0, 0.0, 1.0]


def test_a_constant_dimension_is_finite():
    stats = {"low": np.array([0.3]), "high": np.array([0.3]), "mask": np.array([True])}
    assert np.isfinite(normalize(np.array([0.3]), stats)).all()
    assert unnormalize(np.array([0.7]), stats).tolist() == [0.3]


def test_statistics_by_name():
    one = {"bridge": {"action": {"q01": [0.0, 1.0], "q99": [1.0, 2.0]}}}
    assert action_statistics(one, None)["mask"].tolist() == [True, True]
    two = one | {"fractal": {"action": {"q01": [0.0], "q99": [1.0], "mask": [False]}}}
    assert action_statistics(two, "fractal")["mask"].tolist() == [False]
    with pytest.raises(CheckpointError, match="bridge, fractal; say which with unnorm_key"):
        action_statistics(two, None)
    with pytest.raises(CheckpointError, match=r"'libero'.*holds bridge, fractal"):
        action_statistics(two, "libero")
    with pytest.raises(CheckpointError, match="none"):
        action_statistics({}, None)
