"""Colours that everybody can tell apart, on both pages."""

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from vlaquant.report.colours import COLOURS, SURFACES, part_colours, sequential, variables

#: What a reader without one kind of cone sees, in linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
WHITE = np.array([0.95047, 1.0, 1.08883])


def linear_rgb(colour: str) -> NDArray[np.float64]:
    """``#rrggbb`` without the gamma of sRGB."""
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """WCAG 2.2."""
    dark, light = sorted(float(linear_rgb(colour) @ TO_XYZ[1]) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


def lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIE 1976."""
    xyz = TO_XYZ @ rgb.clip(0, 1) / WHITE
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def difference(one: str, other: str, blindness: str) -> float:
    seen = [lab(BLINDNESS[blindness] @ linear_rgb(colour)) for colour in (one, other)]
    return float(np.linalg.norm(seen[0] - seen[1]))


def test_the_formulae_know_what_is_known() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    assert lab(linear_rgb("#ff0000")) == pytest.approx([53.24, 80.09, 67.20], abs=0.1)
    # A red and a green that only readers with all cones can tell apart
    assert difference("#a05000", "#6b6b00", "none") > 3 * difference("#a05000", "#6b6b00", "deuteranopia")


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast(theme: int) -> None:
    page, panel = SURFACES["page"][theme], SURFACES["panel"][theme]
    for name, pair in COLOURS.items():
        assert contrast(pair[theme], page) >= 3.0, name
    for name in ("text", "quiet", "link", "good", "bad"):
        for ground in (page, panel):
            assert contrast(SURFACES[name][theme], ground) >= 4.5, name


@pytest.mark.parametrize("blindness", BLINDNESS)
@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_no_two_colours_look_alike(theme: int, blindness: str) -> None:
    for (one, first), (other, second) in combinations(COLOURS.items(), 2):
        assert difference(first[theme], second[theme], blindness) >= 10.0, (one, other)


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_the_order_of_the_scale_is_seen_by_its_lightness(blindness: str) -> None:
    colours = ["#{:02x}{:02x}{:02x}".format(*sequential(share)) for share in np.linspace(0, 1, 21)]
    lightness = [lab(BLINDNESS[blindness] @ linear_rgb(colour))[0] for colour in colours]
    assert np.diff(lightness).min() > 1.0


def test_parts_have_colours_of_their_own() -> None:
    found = part_colours(["vision", "language", "vision", *"abcdefg"])
    assert list(found)[:2] == ["vision", "language"]
    assert len(set(list(found.values())[:6])) == 6
    assert found["g"] == "grey"


def test_themes_set_the_same_variables() -> None:
    themes = [{one.split(":")[0] for one in variables(dark=dark).split(";")} for dark in (False, True)]
    assert themes[0] == themes[1]
    assert len(themes[0] - {""}) == len(COLOURS) + len(SURFACES)
