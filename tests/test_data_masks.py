"""Padding and missing cameras do not count: which rows a mask leaves, and what a run makes of a family's masks."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import together
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vlaquant
from vlaquant.calibrate import observe
from vlaquant.calibrate.masks import counted_rows
from vlaquant.errors import CalibrationError
from vlaquant.export.compressed_tensors import file_tensors
from vlaquant.families import FAMILIES, MODULE, Family

SEEN = torch.tensor([True, False, True])
TOKENS = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize(
    ("mask", "shape", "wanted"),
    [
        (TOKENS, (2, 3, 4), TOKENS.flatten()),
        (TOKENS, (6, 4), TOKENS.flatten()),
        (SEEN, (3, 4), SEEN),
        (SEEN, (3, 5, 4), SEEN.repeat_interleave(5)),
        (SEEN, (3, 2, 5, 4), SEEN.repeat_interleave(10)),
        (SEEN, (15, 4), SEEN.repeat_interleave(5)),
        (TOKENS[:1], (1, 3, 4), TOKENS[0]),
        (torch.tensor([False]), (1, 5, 4), torch.zeros(5, dtype=torch.bool)),
    ],
)
def test_masks_and_the_inputs_that_they_fit(mask: Tensor, shape: tuple[int, ...], wanted: Tensor) -> None:
    x = torch.randn(shape)
    assert torch.equal(counted_rows("one", x, mask), x.reshape(-1, 4)[wanted])


@pytest.mark.parametrize(
    ("mask", "shape"),
    [
        (TOKENS, (2, 4, 4)),
        (TOKENS, (3, 2, 4)),
        (TOKENS, (7, 4)),
        (TOKENS, (1, 6, 4)),
        (SEEN, (2, 3, 4)),
        (SEEN, (4, 4)),
    ],
)
def test_masks_that_do_not_fit(mask: Tensor, shape: tuple[int, ...]) -> None:
    with pytest.raises(CalibrationError) as error:
        counted_rows("tower.fc1", torch.randn(shape), mask)
    assert str(error.value).startswith(f"tower.fc1: its input has the shape {shape}, and the mask of its part,")
    assert str(tuple(mask.shape)) in str(error.value)
    x = torch.randn(shape)
    assert torch.equal(counted_rows("one", x, torch.ones_like(mask)), x.reshape(-1, 4)), "all True always fits"


def test_only_layers_with_a_mask_are_masked() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with observe(model, ["0", "1"]) as observation:
        observation.begin_sample({"0": TOKENS})
        model(torch.randn(2, 3, 4))
    assert {name: stats.tokens for name, stats in observation.stats().items()} == {"0": 3, "1": 6}


def test_images_that_are_read_one_at_a_time_take_turns() -> None:
    model, images = nn.ModuleList([nn.Linear(4, 2)]), torch.randn(3, 5, 4)
    with observe(model, ["0"]) as observation:
        for _ in range(2):
            observation.begin_sample({"0": SEEN})
            for image in [*images, *images]:
                model[0](image.unsqueeze(0))
        stats = observation.stats()["0"]
    assert stats.tokens == 2 * 2 * 2 * 5
    assert torch.equal(stats.channel_high, images[SEEN].amax(dim=(0, 1)))


def test_an_image_without_its_turn_is_noticed() -> None:
    model = nn.ModuleList([nn.Linear(4, 2)])
    with observe(model, ["0"]) as observation:
        observation.begin_sample({"0": SEEN})
        model[0](torch.randn(1, 5, 4))
        with pytest.raises(CalibrationError, match=r"^0: read 1 inputs of one image each, .* about 3 images"):
            observation.begin_sample()


class Policy(nn.Module):
    """A tower for whole images, and a head that reads one token an image; ``run`` gives both outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
        self.head = nn.Sequential(nn.Linear(32, 16))

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.head(self.tower(images).mean(dim=1).unsqueeze(0))
        return output


def masks_of(_model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"tower": inputs["seen"], "head": inputs["seen"].unsqueeze(0)}


def family(**changes: Any) -> Family:
    """Samples are (images [n, t, k], seen [n])."""
    policy = replace(
        MODULE,
        name="masked",
        parts=(("tower", r"tower\..*"), ("head", r"head\..*")),
        owns=lambda model: isinstance(model, Policy),
        inputs=lambda _model, sample: {"images": sample[0], "seen": sample[1]},
        run=lambda model, inputs: model(inputs["images"]),
        token_masks=masks_of,
    )
    return replace(policy, **changes)


@contextmanager
def known(one: Family) -> Iterator[None]:
    before = dict(FAMILIES)
    FAMILIES.clear()
    FAMILIES.update({one.name: one} | before)
    try:
        yield
    finally:
        FAMILIES.clear()
        FAMILIES.update(before)


def samples(noise: float, count: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Two cameras see something; the third is missing, and its image is ``noise``."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(3, 8, 32, generator=generator) for _ in range(count)]
    for images in made:
        images[1] = noise
    return [(images, SEEN) for images in made]


RECIPE: dict[str, Any] = {
    "rules": [{"part": part, "scheme": "w4a16", "group_size": 16} for part in ("tower", "head")],
    "transforms": [{"kind": "awq", "grid": 4}],
    "quantizer": {"kind": "gptq"},
    "calibration": {"kind": "jsonl", "path": "unused", "min_tokens": 12},
}


def quantized(noise: float, one: Family | None = None, **options: Any) -> dict[str, Tensor]:
    with known(one or family()):
        model = Policy()
        vlaquant.quantize(model, RECIPE, samples=samples(noise), **options)
        return file_tensors(model)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_what_a_missing_camera_shows_changes_nothing() -> None:
    assert same(quantized(0.0), quantized(3.0))
    unmasked = family(token_masks=MODULE.token_masks)
    assert not same(quantized(0.0, unmasked), quantized(3.0, unmasked)), "without masks it does"


def test_a_run_of_ones_own_has_no_masks() -> None:
    def run(model: nn.Module, sample: Any) -> object:
        return model(sample[0])

    assert not same(quantized(0.0, run=run), quantized(3.0, run=run))


def write(noise: float, folder: Path) -> None:
    save_file(quantized(noise), folder / f"{os.environ['RANK']}.safetensors")


def test_several_processes_mask_alike(tmp_path: Path) -> None:
    ended = together(tmp_path / "log", 2, write, 3.0, tmp_path)
    assert [one.code for one in ended] == [0, 0], "\n".join(one.err for one in ended)
    wanted = quantized(0.0)
    assert all(same(wanted, load_file(tmp_path / f"{rank}.safetensors")) for rank in range(2))


def blind(position: int) -> Callable[[Any, Any], dict[str, Tensor]]:
    """Samples from ``position`` on see nothing."""
    count = iter(range(1000))

    def inputs(_model: Any, sample: Any) -> dict[str, Tensor]:
        seen = sample[1] if next(count) < position else torch.zeros(3, dtype=torch.bool)
        return {"images": sample[0], "seen": seen}

    return inputs


def test_a_policy_that_never_sees_anything_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"^tower: the masks leave out everything in all 6 samples .* blind"):
        quantized(0.0, family(inputs=blind(0)))


def test_one_sample_with_a_camera_is_enough_to_go_on() -> None:
    # …until a layer has seen too little, which says so
    with pytest.raises(CalibrationError, match=r"saw fewer than 12 tokens: head\.0 \(2\)"):
        quantized(0.0, family(token_masks=masks_of, inputs=lambda _m, s: {"images": s[0], "seen": _first(s)}))


def _first(sample: tuple[Tensor, Tensor]) -> Tensor:
    return SEEN if torch.equal(sample[0], samples(0.0)[0][0]) else torch.zeros(3, dtype=torch.bool)


def test_masks_of_no_part_are_an_error() -> None:
    with pytest.raises(CalibrationError, match="family masked has masks for eyes, which is no part of it"):
        quantized(0.0, family(token_masks=lambda _model, inputs: {"eyes": inputs["seen"]}))
