"""Parameters below float32: float32 is trained, and what is written back is not lost."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.rounding import stochastic_round
from tests.optimizers import ELEMENTWISE, Case
from tests.scenarios import SHAPES, TensorSpec
from tests.training import assert_equal, saved_and_loaded

NARROW = [torch.bfloat16, torch.float16]

# Both types' normal and subnormal numbers, their borders, and float32's subnormals.
sizes = st.one_of(
    st.floats(2.0**-14, 60000.0, width=32),
    st.floats(2.0**-26, 2.0**-14, width=32),
    st.floats(0.0, 2.0**-120, width=32, allow_subnormal=True),
)
values = st.builds(lambda size, sign: size * sign, sizes, st.sampled_from([1.0, -1.0]))


def neighbours(value: float, dtype: torch.dtype) -> tuple[Fraction, Fraction]:
    """The largest number of ``dtype`` not above a value, and the smallest not below it."""
    near = torch.tensor(value).to(dtype)
    bits = near.view(torch.int16)
    around = [near.item()]
    for step in (-1, 1):
        around.append((bits + step).view(dtype).item())
    smallest = torch.tensor(1, dtype=torch.int16).view(dtype).item()
    around += [0.0, smallest, -smallest] if abs(value) <= smallest else []
    exact = [
        Fraction(number) for number in around if number == number and abs(number) != float("inf")
    ]
    return (
        max(number for number in exact if number <= Fraction(value)),
        min(number for number in exact if number >= Fraction(value)),
    )


@pytest.mark.parametrize("dtype", NARROW)
@given(value=values)
def test_up_as_often_as_makes_the_mean_exact(dtype: torch.dtype, value: float) -> None:
    """Counted over all random bits that matter: 2**16 for bfloat16, 2**13 or 2**20 for float16."""
    low, high = neighbours(value, dtype)
    bits = 16 if dtype == torch.bfloat16 else 13 if abs(value) >= 2.0**-14 else 20
    random = torch.arange(1 << bits)
    rounded = stochastic_round(torch.full(random.shape, value), dtype, random)
    assert set(map(Fraction, rounded.unique().tolist())) <= {low, high}
    ups = int((rounded.double() == float(high)).sum()) if low != high else 0
    share = (Fraction(value) - low) / (high - low) if low != high else Fraction(0)
    assert abs(Fraction(ups, 1 << bits) - share) <= Fraction(1, 1 << bits) * (bits == 20)


@pytest.mark.parametrize("dtype", NARROW)
@given(pair=st.tuples(values, values), random=st.integers(-(2**63), 2**63 - 1))
def test_monotone_and_odd(dtype: torch.dtype, pair: tuple[float, float], random: int) -> None:
    both = torch.tensor(sorted(pair))
    rounded = stochastic_round(both, dtype, torch.full((2,), random))
    # The same bits round both away from zero or both toward it only where the signs agree.
    if both[0] * both[1] >= 0:
        assert rounded[0] <= rounded[1]
    assert_equal(stochastic_round(-both, dtype, torch.full((2,), random)), -rounded)


@pytest.mark.parametrize("dtype", NARROW)
def test_what_the_type_holds_stays_itself(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    random = torch.full(every.shape, -1)
    rounded = stochastic_round(every.float(), dtype, random)
    assert torch.equal(rounded.isnan(), every.isnan())
    assert_equal(rounded[~every.isnan()], every[~every.isnan()])


@pytest.mark.parametrize("dtype", NARROW)
def test_unbiased_with_the_random_bits_that_steps_use(dtype: torch.dtype) -> None:
    """One weight of 1 + x: the mean over 40,000 seeds' rounding.

    At 5 standard errors (1 in 1.7 million).
    """
    from gmixout_optim.index_sets import ROUNDING, episode_key, random_bits

    spacing = torch.finfo(dtype).eps
    seeds = 40_000
    keys = torch.tensor([episode_key(seed, 3, 5, ROUNDING) for seed in range(seeds)])
    random = torch.stack([random_bits(int(key), torch.tensor([7]))[0] for key in keys])
    for share in (0.1, 0.5, 0.97):
        rounded = stochastic_round(torch.full((seeds,), 1 + share * spacing), dtype, random)
        ups = float((rounded > 1).double().mean())
        assert abs(ups - share) < 5 * (share * (1 - share) / seeds) ** 0.5


def drift_of(stochastic_rounding: bool, dtype: torch.dtype, **settings: Any) -> Tensor:
    """How far weights of 1 move under a constant gradient with steps far below their spacing."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.ones(300, 100, dtype=dtype))
    base = torch.optim.SGD([param], lr=torch.finfo(dtype).eps / 100)
    settings = dict(
        mask_prob=0.5,
        resample_every=4,
        anchor_decay=0.5,
        lr_scale=1.0,
        episode_warmup=0,
        **settings,
    )
    optimizer = GMixoutOptimizer(base, stochastic_rounding=stochastic_rounding, **settings)
    for _ in range(80):
        param.grad = torch.ones_like(param)
        optimizer.step()
    return 1 - param.detach().double()


@pytest.mark.parametrize("granularity", ["element", "row", 4])
@pytest.mark.parametrize("dtype", NARROW)
def test_small_steps_arrive_on_average(dtype: torch.dtype, granularity: Any) -> None:
    """80 steps, each on half of the weights; an episode's end keeps half: 20 whole steps."""
    exact = 20 * torch.finfo(dtype).eps / 100
    nearest = drift_of(False, dtype, granularity=granularity)
    assert not nearest.any()
    moved = drift_of(True, dtype, granularity=granularity)
    # Downward from 1 the spacing is half as large: a share of 0.4 of the weights has moved by one.
    assert abs(float(moved.mean()) / exact - 1) < 0.05


def parameters(dtype: torch.dtype, specs: list[TensorSpec]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(spec.make(torch.randn(spec.shape, generator=generator).to(dtype)))
        for spec in specs
    ]


def take_steps(params: list[nn.Parameter], optimizer: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("case", ELEMENTWISE, ids=repr)
@given(data=st.data())
def test_the_invariants_hold_in_low_precision(case: Case, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(NARROW))
    memories = st.sampled_from(["contiguous", "transposed", "channels_last"])
    spec = st.builds(TensorSpec, st.sampled_from(SHAPES), memories, st.just("w"))
    specs = data.draw(st.lists(spec, min_size=1, max_size=3))
    decay = data.draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    settings = dict(
        mask_prob=0.6,
        anchor_decay=decay,
        resample_every=None,
        granularity=data.draw(st.sampled_from(["element", "row", "column", 2])),
        sampler=data.draw(st.sampled_from(["stratified", "bernoulli"])),
        rescale=data.draw(st.booleans()),
        stochastic_rounding=data.draw(st.sampled_from([True, True, False])),
    )
    params = parameters(dtype, specs)
    optimizer = GMixoutOptimizer(case(params), **settings)
    steps = data.draw(st.integers(1, 3))
    for episode in range(3):
        anchors = [param.detach().clone() for param in params]
        masks = [optimizer.active_mask(param) for param in params]
        take_steps(params, optimizer, range(10 * episode, 10 * episode + steps))
        live = [param.detach().clone() for param in params]
        for mask, anchor, now in zip(masks, anchors, live, strict=True):
            assert_equal(anchor[~mask], now[~mask])
        # What is shown is what consolidate() leaves, and comes back; a saved run goes on from it.
        optimizer.eval()
        shown = [param.detach().clone() for param in params]
        saved = saved_and_loaded((shown, optimizer.state_dict()))
        optimizer.train()
        assert_equal(live, [param.detach() for param in params])
        resumed_params = [nn.Parameter(s.make(w)) for s, w in zip(specs, saved[0], strict=True)]
        resumed = GMixoutOptimizer(case(resumed_params), **settings)
        resumed.load_state_dict(saved[1])
        resumed.train()
        assert_equal(live, [param.detach() for param in resumed_params])
        kept = [optimizer.state.get(param, {}).get("gmixout") for param in params]
        before = [None if slot is None else slot["anchor"].double() for slot in kept]
        optimizer.resample()
        for param, mask, anchor, now, deployed in zip(
            params, masks, before, live, shown, strict=True
        ):
            moved = param.detach()
            assert_equal(moved, deployed)
            if anchor is None or not now.isfinite().all() or not moved.isfinite().all():
                continue
            if decay == 1:
                assert_equal(moved[mask].double(), anchor)
            if decay == 0 and not settings["rescale"]:
                assert_equal(moved, now)
            if not settings["rescale"]:
                ends = torch.stack([anchor, now[mask].double()])
                assert ((moved[mask] >= ends.amin(0)) & (moved[mask] <= ends.amax(0))).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_the_same_seed_rounds_the_same_way_and_another_otherwise(dtype: torch.dtype) -> None:
    runs = []
    for seed in (1, 1, 2):
        params = parameters(dtype, [TensorSpec((40, 50), "contiguous", "w")])
        base = torch.optim.SGD(params, lr=1e-3)
        optimizer = GMixoutOptimizer(base, mask_prob=0.0001, stochastic_rounding=True, seed=seed)
        take_steps(params, optimizer, range(1))
        runs.append(params[0].detach())
    assert_equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("granularity", ["element", "row", "column", 4])
def test_rounding_in_pieces_changes_nothing(
    granularity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for chunk in (1 << 17, 64):
        monkeypatch.setattr("gmixout_optim.index_sets.CPU_CHUNK", chunk)
        params = parameters(torch.bfloat16, [TensorSpec((60, 96), "contiguous", "w")])
        base = torch.optim.AdamW(params, lr=1e-3)
        settings = dict(mask_prob=0.5, granularity=granularity, stochastic_rounding=True)
        take_steps(params, GMixoutOptimizer(base, **settings), range(2))
        runs.append(params[0].detach())
    assert_equal(*runs)


@pytest.mark.parametrize("shape", [(4, 6, 3, 3), (2, 5, 4, 1), (3, 40, 2, 2)])
def test_the_memory_format_does_not_matter(shape: tuple[int, ...]) -> None:
    """Also where it changes within an episode."""
    runs = []
    for before, after in (
        ("contiguous",) * 2,
        ("channels_last",) * 2,
        ("contiguous", "channels_last"),
    ):
        params = parameters(torch.bfloat16, [TensorSpec(shape, before, "w")])
        base = torch.optim.AdamW(params, lr=1e-3)
        optimizer = GMixoutOptimizer(
            base,
            mask_prob=0.5,
            granularity="column",  # elements where there are few
            resample_every=4,
            stochastic_rounding=True,
        )
        take_steps(params, optimizer, range(2))
        if before != after:
            params[0].data = params[0].data.to(memory_format=torch.channels_last)
        take_steps(params, optimizer, range(2, 7))
        runs.append(params[0].detach().contiguous())
    assert_equal(runs[0], runs[1])
    assert_equal(runs[0], runs[2])


def test_what_is_kept_is_float32() -> None:
    params = parameters(torch.bfloat16, [TensorSpec((40, 50), "contiguous", "w")])
    optimizer = GMixoutOptimizer(torch.optim.AdamW(params), stochastic_rounding=True)
    take_steps(params, optimizer, range(2))
    state = copy.copy(optimizer.state[params[0]])
    kept = {**state.pop("gmixout"), **state}
    assert {name: item.dtype for name, item in kept.items() if item.ndim} == dict.fromkeys(
        ("exp_avg", "exp_avg_sq", "value", "anchor"), torch.float32
    )
    assert params[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_parameters_are_written_as_they_are(dtype: torch.dtype) -> None:
    runs = []
    for stochastic_rounding in (False, True):
        params = parameters(dtype, [TensorSpec((40, 50), "contiguous", "w")])
        base = torch.optim.AdamW(params)
        take_steps(
            params, GMixoutOptimizer(base, stochastic_rounding=stochastic_rounding), range(3)
        )
        runs.append(params[0].detach())
    assert_equal(*runs)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.AdamW, dict(layout="dense")),
        (torch.optim.Adafactor, dict()),
        (torch.optim.AdamW, dict(residual="persistent")),
    ],
)
def test_layouts_without_masters_refuse(kind: Any, settings: dict) -> None:
    params = parameters(torch.bfloat16, [TensorSpec((4, 5), "contiguous", "w")])
    with pytest.raises(ValueError, match="stochastic_rounding=True needs layout='packed'"):
        GMixoutOptimizer(kind(params, lr=0.01), stochastic_rounding=True, **settings)


def test_bad_input() -> None:
    params = parameters(torch.bfloat16, [TensorSpec((4, 5), "contiguous", "w")])
    base = torch.optim.AdamW(params)
    with pytest.raises(TypeError, match="stochastic_rounding must be a bool, got 1"):
        GMixoutOptimizer(base, stochastic_rounding=1)
    with pytest.raises(
        ValueError, match="grad_layout must be one of 'dense', 'packed', 'active', got 'sparse'"
    ):
        GMixoutOptimizer(base, grad_layout="sparse")
    with pytest.raises(TypeError, match="grad_layout must be a string"):
        GMixoutOptimizer(base, grad_layout=None)


@pytest.mark.compile
@pytest.mark.parametrize("dtype", NARROW)
def test_compiled(dtype: torch.dtype) -> None:
    """The same bits round; a weight may differ by a spacing where float32 does in its last bit."""
    runs = []
    for compile in (False, True):
        params = parameters(dtype, [TensorSpec((40, 50), "contiguous", "w")])
        optimizer = GMixoutOptimizer(
            torch.optim.AdamW(params, lr=1e-3),
            mask_prob=0.5,
            resample_every=3,
            stochastic_rounding=True,
            compile=compile,
        )
        take_steps(params, optimizer, range(8))
        runs.append(params[0].detach())
    assert (runs[0] != runs[1]).double().mean() < 0.01
    torch.testing.assert_close(*runs, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", NARROW)
def test_rounds_the_same_way_on_cuda(dtype: torch.dtype) -> None:
    values = torch.randn(100_000) * 10.0 ** torch.randint(-8, 3, (100_000,))
    random = torch.randint(-(2**62), 2**62, values.shape)
    on_cpu = stochastic_round(values, dtype, random)
    assert_equal(on_cpu, stochastic_round(values.cuda(), dtype, random.cuda()).cpu())


def loss_after(dtype: torch.dtype, wrapped: bool, stochastic_rounding: bool = False) -> float:
    """Of a deployed linear model that regresses a shift of its weights, in small steps."""
    torch.manual_seed(0)
    start = torch.randn(50, 40).to(torch.bfloat16).to(dtype)
    inputs = torch.randn(256, 50)
    targets = inputs @ (start.float() + 0.03 * torch.randn(50, 40))
    weight = nn.Parameter(start.clone())
    optimizer: Any = torch.optim.AdamW([weight], lr=3e-4, weight_decay=0.0)
    if wrapped:
        settings = dict(
            mask_prob=0.5, resample_every=5, anchor_decay=0.5, lr_scale=1.0, episode_warmup=0
        )
        optimizer = GMixoutOptimizer(optimizer, stochastic_rounding=stochastic_rounding, **settings)
    for _ in range(300):
        optimizer.zero_grad()
        (inputs.to(dtype) @ weight - targets.to(dtype)).square().mean().backward()
        optimizer.step()
    if wrapped:
        optimizer.consolidate()
    with torch.no_grad():
        return float((inputs @ weight.float() - targets).square().mean())


def test_a_bfloat16_model_follows_float32() -> None:
    untrained = 50 * 0.03**2  # in expectation
    assert loss_after(torch.float32, wrapped=False) < 0.05 * untrained
    assert loss_after(torch.bfloat16, wrapped=False) > 0.8 * untrained  # AdamW alone stalls
    wanted = loss_after(torch.float32, wrapped=True)
    assert wanted < 0.3 * untrained
    assert loss_after(torch.bfloat16, wrapped=True) > 0.7 * untrained  # so does rounding to nearest
    assert loss_after(torch.bfloat16, wrapped=True, stochastic_rounding=True) < 1.4 * wanted
