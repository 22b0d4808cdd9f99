"""The affine map: bounds that hold for every input, and equality with an oracle that loops over scalars."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlaquant import numerics
from vlaquant.numerics import (
    OBSERVERS,
    QuantizedWeight,
    all_finite,
    fake_quantize,
    fit_groups,
    from_codes,
    minmax_observer,
    mse_observer,
    percentile_observer,
    qparams,
    quantize_tokens,
    quantize_weight,
    round_weight,
    split_groups,
    sqnr_db,
    to_codes,
)
from vlaquant.scheme import Granularity, QuantSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INT8_TOKENS = QuantSpec(bits=8, granularity=Granularity.TOKEN, dynamic=True)


def spec_of(bits: int, granularity: str = "group", group_size: int = 8, *, symmetric: bool = True) -> QuantSpec:
    size = group_size if granularity == "group" else None
    return QuantSpec(bits=bits, granularity=Granularity(granularity), group_size=size, symmetric=symmetric)


specs = st.builds(
    lambda bits, granularity, symmetric: spec_of(bits, granularity, symmetric=symmetric),
    st.integers(2, 8),
    st.sampled_from(["tensor", "channel", "group"]),
    st.booleans(),
)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """[n, 16] of mixed magnitude: outliers, exact zeros, all-zero rows and rows of one sign."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    n = draw(st.integers(1, 5))
    weight = torch.randn(n, 16, generator=generator) * 10.0 ** draw(st.integers(-4, 3))
    weight[:, draw(st.integers(0, 15))] *= draw(st.sampled_from([1.0, 0.0, 100.0]))
    if draw(st.booleans()):
        weight[draw(st.integers(0, n - 1))] = 0.0
    if draw(st.booleans()):
        weight = weight.abs() * draw(st.sampled_from([1.0, -1.0]))
    return weight


def expanded(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Scale and zero for every single value, [n, k]."""
    n, k = weight.codes.shape
    scale = weight.scale.float()
    zero = torch.zeros_like(scale) if weight.zero is None else weight.zero.float()
    columns = torch.arange(k) * scale.shape[1] // k
    return scale.expand(n, -1)[:, columns], zero.expand(n, -1)[:, columns]


def check_half_step(weight: Tensor, quantized: QuantizedWeight) -> None:
    """Values whose code needed no clamping are at most half a step away."""
    scale, zero = expanded(quantized)
    position = torch.round(weight / scale) + zero
    unclipped = (position >= quantized.spec.qmin) & (position <= quantized.spec.qmax)
    error = (quantized.dequantize() - weight).abs()
    assert (error <= scale.abs() / 2 + 1e-6 * weight.abs())[unclipped].all()


def oracle(weight: Tensor, spec: QuantSpec, dtype: torch.dtype) -> tuple[list[list[int]], list[list[float]]]:
    """Codes and scales by the definition, one scalar after the other in float32."""
    rows = weight.numpy().astype(np.float32)
    if spec.granularity is Granularity.TENSOR:
        rows = rows.reshape(1, -1)
    size = spec.group_size or rows.shape[1]
    codes: list[list[int]] = []
    scales: list[list[float]] = []
    for row in rows:
        codes.append([])
        scales.append([])
        for start in range(0, len(row), size):
            group = row[start : start + size]
            low, high = min(np.float32(0), group.min()), max(np.float32(0), group.max())
            steps = np.float32(spec.qmax - spec.qmin)
            turns = spec.symmetric and spec.bits < 8
            largest = max(-low, high) / np.float32(-spec.qmin if turns else steps / 2)
            exact = largest if spec.symmetric else (high - low) / steps
            scale = np.float32(torch.tensor(exact).to(dtype).item())
            if scale == 0:
                tiny = torch.finfo(torch.float32).tiny if dtype != torch.float16 else 2.0**-24
                scale = np.float32(tiny)
            scale *= np.float32(-1.0 if turns and high > -low else 1.0)
            zero = 0 if spec.symmetric else min(max(round(float(spec.qmin - low / scale)), spec.qmin), spec.qmax)
            codes[-1] += [min(max(round(float(value / scale)) + zero, spec.qmin), spec.qmax) for value in group]
            scales[-1].append(float(scale))
    return codes, scales


def check_oracle(weight: Tensor, spec: QuantSpec, dtype: torch.dtype) -> None:
    quantized = quantize_weight(weight, spec, scale_dtype=dtype)
    codes, scales = oracle(weight, spec, dtype)
    assert quantized.codes.flatten().tolist() == [code for row in codes for code in row]
    assert quantized.scale.float().tolist() == scales


@settings(max_examples=150)
@given(weight=weights(), spec=specs, dtype=st.sampled_from(DTYPES))
def test_matches_scalar_oracle(weight: Tensor, spec: QuantSpec, dtype: torch.dtype) -> None:
    check_oracle(weight, spec, dtype)


@pytest.mark.parametrize("broken", ["floor", "wrong zero sign"])
def test_oracle_notices_a_broken_map(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def floored(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
        return (torch.floor(x / scale) + zero).clamp(spec.qmin, spec.qmax)

    def negated(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
        return (torch.round(x / scale) - zero).clamp(spec.qmin, spec.qmax)

    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    spec = spec_of(4, symmetric=False)
    check_oracle(weight, spec, torch.float32)
    monkeypatch.setattr(numerics, "to_codes", floored if broken == "floor" else negated)
    with pytest.raises(AssertionError):
        check_oracle(weight, spec, torch.float32)
    with pytest.raises(AssertionError):
        check_half_step(weight, quantize_weight(weight, spec, scale_dtype=torch.float32))


@settings(max_examples=100)
@given(weight=weights(), spec=specs, dtype=st.sampled_from(DTYPES), observer=st.sampled_from(sorted(OBSERVERS)))
def test_bounds(weight: Tensor, spec: QuantSpec, dtype: torch.dtype, observer: str) -> None:
    quantized = quantize_weight(weight, spec, scale_dtype=dtype, observer=OBSERVERS[observer])
    float_weight = quantized.dequantize()
    assert quantized.codes.dtype == torch.int8
    assert quantized.scale.dtype == dtype
    assert (quantized.zero is None) == spec.symmetric
    assert quantized.codes.min() >= spec.qmin
    assert quantized.codes.max() <= spec.qmax
    assert (quantized.scale != 0).all()
    assert torch.isfinite(float_weight).all()
    assert (float_weight[weight == 0] == 0).all()
    check_half_step(weight, quantized)


@settings(max_examples=100)
@given(weight=weights(), spec=specs)
def test_minmax_clips_at_most_a_step(weight: Tensor, spec: QuantSpec) -> None:
    """With the full range, clamping costs no more than a step: half of it for rounding, half for the shorter side."""
    quantized = quantize_weight(weight, spec, scale_dtype=torch.float32)
    scale, _ = expanded(quantized)
    steps = 0.5 if spec.symmetric and spec.bits == 8 else 1.0
    assert ((quantized.dequantize() - weight).abs() <= scale.abs() * steps * 1.001).all()


def test_shapes_per_granularity() -> None:
    weight = torch.randn(6, 16)
    shapes = {"tensor": (1, 1), "channel": (6, 1), "group": (6, 2)}
    for granularity, shape in shapes.items():
        quantized = quantize_weight(weight, spec_of(4, granularity, symmetric=False), scale_dtype=torch.float32)
        assert quantized.codes.shape == (6, 16)
        assert quantized.scale.shape == shape
        assert quantized.zero is not None
        assert quantized.zero.shape == shape
    assert split_groups(weight, spec_of(4)).shape == (6, 2, 8)


def test_symmetric_eight_bits_can_be_negated() -> None:
    weight = torch.tensor([[-2.0, 1.0, 2.0]])
    quantized = quantize_weight(weight, spec_of(8, "channel"), scale_dtype=torch.float32)
    negated = quantize_weight(-weight, spec_of(8, "channel"), scale_dtype=torch.float32)
    assert quantized.codes.tolist() == [[-127, 64, 127]]
    assert torch.equal(quantized.codes, -negated.codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_all_zero_row(dtype: torch.dtype, symmetric: bool) -> None:  # noqa: FBT001
    weight = torch.zeros(2, 16)
    weight[1] = 1.0
    quantized = quantize_weight(weight, spec_of(4, symmetric=symmetric), scale_dtype=dtype)
    assert (quantized.scale != 0).all()
    assert (quantized.dequantize()[0] == 0).all()


def test_codes_belong_to_the_stored_scale() -> None:
    """Codes chosen against the float32 scale would be worse once the scale is rounded to bfloat16."""
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    spec = spec_of(8, "channel")
    stored = quantize_weight(weight, spec, scale_dtype=torch.bfloat16)
    exact = quantize_weight(weight, spec, scale_dtype=torch.float32)
    late = QuantizedWeight(exact.codes, exact.scale.bfloat16(), None, spec)
    assert torch.equal(stored.scale, late.scale)
    assert sqnr_db(weight, stored.dequantize()) > sqnr_db(weight, late.dequantize())
    check_half_step(weight, stored)
    with pytest.raises(AssertionError):
        check_half_step(weight, late)


def test_float16_scales_use_subnormals() -> None:
    """Rows of small values keep their resolution: 6e-5, the smallest normal float16, would be too coarse a step."""
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)) * 1e-3
    quantized = quantize_weight(weight, spec_of(8, "channel"), scale_dtype=torch.float16)
    assert quantized.scale.max() < torch.finfo(torch.float16).smallest_normal
    assert sqnr_db(weight, quantized.dequantize()) > 38


def test_huge_values_do_not_overflow_float16_scales() -> None:
    weight = torch.tensor([[3e7, -3e7, 1.0, 0.0]])
    quantized = quantize_weight(weight, spec_of(4, "channel"), scale_dtype=torch.float16)
    assert torch.isfinite(quantized.dequantize()).all()
    assert quantized.codes.tolist() == [[7, -8, 0, 0]]


@pytest.mark.parametrize("magnitude", [1e-45, 1e-39, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_magnitudes_stay_finite(magnitude: float, symmetric: bool, dtype: torch.dtype) -> None:  # noqa: FBT001
    weight = torch.tensor([[1.0, -1.0, 0.5, 0.0]]) * magnitude
    quantized = quantize_weight(weight, spec_of(8, "channel", symmetric=symmetric), scale_dtype=dtype)
    assert torch.isfinite(quantized.dequantize(torch.float64)).all()


@settings(max_examples=40)
@given(weight=weights(), spec=specs, dtype=st.sampled_from(DTYPES))
def test_mse_is_never_worse_than_minmax(weight: Tensor, spec: QuantSpec, dtype: torch.dtype) -> None:
    def squared_error(observer: numerics.Observer) -> Tensor:
        quantized = quantize_weight(weight, spec, scale_dtype=dtype, observer=observer)
        return split_groups((quantized.dequantize() - weight).double().square(), spec).sum(-1)

    mse, minmax = squared_error(mse_observer), squared_error(minmax_observer)
    assert (mse <= minmax * (1 + 1e-5)).all()


def test_mse_gains_on_an_outlier() -> None:
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    weight[:, 7] = 12.0
    spec = spec_of(3, "channel")
    errors = {
        name: sqnr_db(weight, quantize_weight(weight, spec, scale_dtype=torch.float32, observer=observer).dequantize())
        for name, observer in OBSERVERS.items()
    }
    assert errors["mse"] > errors["minmax"] + 1


@settings(max_examples=50)
@given(weight=weights(), quantile=st.floats(0.5, 1.0, exclude_min=True))
def test_percentile_is_torch_quantile(weight: Tensor, quantile: float) -> None:
    groups = split_groups(weight, spec_of(4))
    scale, zero = percentile_observer(quantile)(groups, spec_of(4), torch.float32)
    low, high = (groups.quantile(q, dim=-1, keepdim=True) for q in (1.0 - quantile, quantile))
    wanted, wanted_zero = qparams(low, high, spec_of(4), torch.float32)
    assert torch.allclose(scale, wanted, rtol=1e-4)
    assert torch.equal(zero, wanted_zero)


def test_percentile_takes_more_values_than_torch_quantile() -> None:
    weight = torch.arange(2**24 + 2, dtype=torch.float32).reshape(1, 2, -1).reshape(1, 1, -1)
    scale, _ = percentile_observer(0.999)(weight, spec_of(8, "tensor"), torch.float32)
    assert scale.item() == pytest.approx(0.999 * 2**24 / 127, rel=1e-3)


@settings(max_examples=50)
@given(weight=weights(), symmetric=st.booleans())
def test_tokens_have_a_scale_each(weight: Tensor, symmetric: bool) -> None:  # noqa: FBT001
    spec = QuantSpec(bits=8, granularity=Granularity.TOKEN, symmetric=symmetric, dynamic=True)
    codes, scale, zero = quantize_tokens(weight, spec)
    rows = spec_of(8, "channel", symmetric=symmetric)
    assert torch.equal(codes, quantize_weight(weight, rows, scale_dtype=torch.float32).codes)
    assert scale.shape == zero.shape == (weight.shape[0], 1)
    assert ((from_codes(codes, scale, zero) - weight).abs() <= scale * (0.5 if symmetric else 1.0) * 1.001).all()


def test_tokens_of_an_empty_batch_and_of_narrow_dtypes() -> None:
    codes, scale, _ = quantize_tokens(torch.empty(0, 8), INT8_TOKENS)
    assert codes.shape == (0, 8)
    assert scale.shape == (0, 1)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(quantize_tokens(x, INT8_TOKENS)[0], quantize_tokens(x.float(), INT8_TOKENS)[0])


def test_fake_quantize_is_a_round_trip() -> None:
    x = torch.linspace(-1, 1, 33)
    scale, zero = qparams(x.min(), x.max(), spec_of(4, "tensor", symmetric=False), torch.float32)
    spec = spec_of(4, "tensor", symmetric=False)
    assert torch.equal(fake_quantize(x, scale, zero, spec), from_codes(to_codes(x, scale, zero, spec), scale, zero))
    again = fake_quantize(fake_quantize(x, scale, zero, spec), scale, zero, spec)
    assert torch.allclose(again, fake_quantize(x, scale, zero, spec))


def test_dequantize_in_float64_is_exact() -> None:
    spec = spec_of(8, "channel", symmetric=False)
    scale = torch.tensor([[1 / 3]])
    quantized = QuantizedWeight(torch.tensor([[127, -128, 5]], dtype=torch.int8), scale, torch.tensor([[-128]]), spec)
    assert quantized.dequantize(torch.float64).tolist() == [[code * scale.item() for code in (255, 0, 133)]]
    assert quantized.dequantize(torch.bfloat16).dtype == torch.bfloat16


@settings(max_examples=40)
@given(weight=weights(), spec=specs, dtype=st.sampled_from(DTYPES), observer=st.sampled_from(sorted(OBSERVERS)))
def test_blocks_of_rows_change_nothing(weight: Tensor, spec: QuantSpec, dtype: torch.dtype, observer: str) -> None:
    whole = quantize_weight(weight, spec, scale_dtype=dtype, observer=OBSERVERS[observer])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numerics, "_BLOCK", 2 * weight.shape[1])
        blocks = quantize_weight(weight, spec, scale_dtype=dtype, observer=OBSERVERS[observer])
        scale, zero = fit_groups(weight, spec, OBSERVERS[observer], dtype)
    assert torch.equal(blocks.codes, whole.codes)
    assert torch.equal(blocks.scale, whole.scale)
    assert torch.equal(scale.to(dtype), whole.scale)
    assert (blocks.zero is None) == (whole.zero is None)
    assert whole.zero is None or blocks.zero is None or torch.equal(blocks.zero, whole.zero)
    assert whole.zero is None or torch.equal(zero.to(torch.int8), whole.zero)


@settings(max_examples=40)
@given(weight=weights(), spec=specs, dtype=st.sampled_from(DTYPES))
def test_rounding_without_codes_and_rows_of_codes(weight: Tensor, spec: QuantSpec, dtype: torch.dtype) -> None:
    quantized = quantize_weight(weight, spec, scale_dtype=dtype)
    rounded = quantized.dequantize()
    assert torch.equal(round_weight(weight, spec, scale_dtype=dtype), rounded)
    rows = slice(1, None)
    assert torch.equal(quantized.rows(rows).dequantize(), rounded[rows])


def test_all_finite() -> None:
    assert all_finite(torch.full((4, 4), 3e38))
    assert all_finite(torch.empty(0, 4))
    assert all_finite(torch.full((64, 64), 6e4, dtype=torch.float16))
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.zeros(4, 4)
        x[1, 2] = bad
        assert not all_finite(x)
        x[0, 0] = -bad
        assert not all_finite(x)


def test_sqnr() -> None:
    x = torch.tensor([3.0, 4.0])
    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(x, x + torch.tensor([0.3, 0.4])) == pytest.approx(20.0, abs=1e-3)
    assert sqnr_db(torch.zeros(2), x) == -math.inf
    assert math.isnan(sqnr_db(x, torch.tensor([3.0, math.nan])))
