"""Observing: statistics equal those of all inputs kept, sharing is never wrong, and bad data is named."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from oracles import naive_statistics
from torch import Tensor, nn
from watched import FIELDS, TwoBlocks, assert_same, hook_count, linear_names, model_and_samples, run_all

from vlaquant.calibrate import ActStats, Observation, observe
from vlaquant.errors import CalibrationError


def inputs_of(model: TwoBlocks, name: str, samples: Sequence[Tensor]) -> Tensor:
    """All rows [t, k] that one Linear reads, kept whole."""
    kept: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: kept.append(args[0].detach().clone()))
    run_all(model, samples, Observation({}, hessian_for=(), sample_rows=1, seed=0))
    hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in kept])


@pytest.mark.parametrize("inference", [False, True])
def test_observed_statistics_match_naive_ones(inference) -> None:
    model, samples = model_and_samples()
    names = [name for name in linear_names(model) if "unused" not in name]
    with torch.inference_mode(inference), observe(model, names, hessian_for=names) as observation:
        run_all(model, samples, observation)
    stats = observation.stats()
    assert set(stats) == set(names)
    for name in names:
        for field, value in naive_statistics(inputs_of(model, name, samples)).items():
            torch.testing.assert_close(getattr(stats[name], field).double(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inference", [False, True])
def test_input_that_changes_in_place_is_taken_as_it_was(inference) -> None:
    first, second, third = (nn.Linear(4, 4) for _ in range(3))
    model = nn.ModuleList([first, second, third])
    with torch.inference_mode(inference), observe(model, ["0", "1", "2"]) as observation:
        x = torch.ones(2, 4)
        first(x)
        second(x)
        x.mul_(5.0)
        third(x)
        x.zero_()
    stats = observation.stats()
    assert [float(stats[name].high) for name in "012"] == [1.0, 1.0, 5.0]
    assert observation.shared() == {"0": "0", "1": "0", "2": "2"}


def test_reused_memory_is_no_reason_to_share() -> None:
    layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(6)])
    with observe(layers, list("012345")) as observation:
        for factor, layer in enumerate(layers):
            layer(torch.full((2, 4), float(factor)))
    assert [float(observation.stats()[name].high) for name in "012345"] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_repeated_and_interleaved_calls() -> None:
    layers = nn.ModuleList([nn.Linear(1, 1) for _ in range(3)])
    orders = itertools.permutations([(0, 1.0), (1, 1.0), (2, 1.0), (0, 1.0), (1, 3.0)])
    for order in itertools.islice(orders, 0, None, 7):
        with observe(layers, ["0", "1", "2"], hessian_for=["0", "1", "2"]) as observation:
            for index, value in order:
                layers[index](torch.full((1, 1), value))
        means = {name: float(stats.mean_abs) for name, stats in observation.stats().items()}
        assert means == {"0": 1.0, "1": 2.0, "2": 1.0}
        assert {name: stats.tokens for name, stats in observation.stats().items()} == {"0": 2, "1": 2, "2": 1}


def test_hessian_only_where_asked_for() -> None:
    model, samples = model_and_samples()
    with observe(model, ["blocks.0.q", "blocks.0.k"], hessian_for=["blocks.0.k"]) as observation:
        run_all(model, samples, observation)
    stats = observation.stats()
    assert stats["blocks.0.q"].hessian is None
    assert stats["blocks.0.k"].hessian is not None


def test_statistics_may_be_read_on_the_way() -> None:
    model, samples = model_and_samples()
    with observe(model, ["blocks.0.q"], hessian_for=["blocks.0.q"]) as observation:
        model(samples[0])
        early = observation.stats()["blocks.0.q"]
        assert early.hessian is not None
        hessian = early.hessian.clone()
        model(samples[1])
    assert (early.tokens, observation.stats()["blocks.0.q"].tokens) == (5, 11)
    assert torch.equal(early.hessian, hessian)


def test_hooks_are_removed_even_after_an_error() -> None:
    model, samples = model_and_samples()
    samples[0][0, 0, 0] = torch.nan
    with observe(model, linear_names(model)):
        assert hook_count(model) == 18
    assert hook_count(model) == 0
    with pytest.raises(CalibrationError), observe(model, linear_names(model)):
        model(samples[0])
    assert hook_count(model) == 0


def test_outputs_are_untouched() -> None:
    model, samples = model_and_samples()
    before = model(samples[0])
    model.reset()
    with observe(model, linear_names(model)):
        assert torch.equal(model(samples[0]), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_float_any_leading_shape_and_keyword_inputs(dtype: torch.dtype) -> None:
    linear = nn.Linear(4, 2, dtype=dtype)
    model = nn.ModuleList([linear])
    with observe(model, ["0"], hessian_for=["0"]) as observation:
        linear(input=torch.ones(4, dtype=dtype))
        linear(torch.ones(2, 3, 5, 4, dtype=dtype))
        linear(torch.ones(0, 4, dtype=dtype))
        linear(torch.ones(8, 2, dtype=dtype).T[:, ::2])
    stats = observation.stats()["0"]
    assert stats.tokens == 33
    assert all(getattr(stats, name).dtype is torch.float32 for name in FIELDS)
    torch.testing.assert_close(stats.hessian, torch.ones(4, 4), rtol=0.0, atol=0.0)


def masked_run(mask: Tensor | None, x: Tensor) -> ActStats:
    model = nn.ModuleList([nn.Linear(x.shape[-1], 2)])
    with observe(model, ["0"], hessian_for=["0"]) as observation:
        observation.begin_sample({} if mask is None else {"0": mask})
        model[0](x)
    return observation.stats()["0"]


def test_masked_tokens_do_not_count_and_may_be_anything() -> None:
    x = torch.randn(2, 5, 4)
    mask = torch.tensor([[True, True, False, False, False], [True, True, True, True, False]])
    padded = x.masked_fill(~mask.unsqueeze(-1), float("nan"))
    assert_same(masked_run(mask, padded), masked_run(None, x[mask]))


def test_mask_lasts_for_one_sample_and_may_change_within() -> None:
    model, x = nn.ModuleList([nn.Linear(4, 2)]), torch.randn(1, 3, 4)
    with observe(model, ["0"]) as observation:
        observation.begin_sample({"0": torch.tensor([[True, False, False]])})
        model[0](x)
        observation.masks = {"0": torch.tensor([[True, True, False]])}
        model[0](x)
        observation.begin_sample()
        model[0](x)
    assert observation.stats()["0"].tokens == 1 + 2 + 3


def test_mask_has_to_be_bool() -> None:
    with pytest.raises(CalibrationError, match=r"^0: .*use bool"):
        masked_run(torch.ones(2, 5, dtype=torch.int64), torch.randn(2, 5, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_first_layer_with_bad_values_is_named_at_once(bad: float) -> None:
    model, samples = model_and_samples()
    names = linear_names(model)
    origin, earlier = (model.get_submodule(f"blocks.0.{name}") for name in "ov")
    spoilt = samples[1].clone()
    spoilt[0, 1, 2] = 1e30

    def spoil(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.masked_fill(output.abs() > 1e20, bad)

    origin.register_forward_hook(spoil)
    nn.init.ones_(earlier.get_parameter("weight"))
    with (
        observe(model, [*reversed(names)]) as observation,
        pytest.raises(CalibrationError, match=r"^blocks\.0\.odd: 1 of 6 input tokens hold NaN or Inf in sample 1,"),
    ):
        run_all(model, [samples[0], spoilt], observation)


def test_without_begin_sample_no_sample_is_named() -> None:
    model = nn.ModuleList([nn.Linear(4, 2)])
    with observe(model, ["0"]), pytest.raises(CalibrationError, match="Inf, and it is the first"):
        model[0](torch.full((1, 4), torch.nan))


def test_starved_layers_are_named() -> None:
    model, samples = model_and_samples()
    with observe(model, linear_names(model)) as observation:
        run_all(model, samples, observation)
    with pytest.raises(CalibrationError) as error:
        observation.check(min_tokens=1)
    assert "2 of 18 layers" in str(error.value)
    assert "blocks.0.unused (0), blocks.1.unused (0)" in str(error.value)
    with observe(model, ["blocks.0.q"]) as observation:
        run_all(model, samples, observation)
    observation.check(min_tokens=33)
    with pytest.raises(CalibrationError, match=r"blocks\.0\.q \(33\)"):
        observation.check(min_tokens=34)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.0.gat", "does not exist.*did you mean 'blocks.0.gate'"),
        ("blocks.0", "is a Block"),
        ("attention.out_proj", "is a NonDynamicallyQuantizableLinear"),
    ],
)
def test_only_plain_linears_can_be_watched(name: str, message: str) -> None:
    model = TwoBlocks()
    model.attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(CalibrationError, match=message), observe(model, ["blocks.0.q", name]):
        pass
    assert hook_count(model) == 0


def test_hessian_for_a_layer_that_is_not_watched() -> None:
    with (
        pytest.raises(CalibrationError, match=r"not watched: blocks\.0\.k"),
        observe(TwoBlocks(), ["blocks.0.q"], hessian_for=["blocks.0.q", "blocks.0.k"]),
    ):
        pass
