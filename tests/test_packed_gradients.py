"""grad_layout="packed": the same training as with dense gradients, in a tenth of their memory."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gmixout_optim import GMixoutOptimizer, PackedGradient
from tests.optimizers import ELEMENTWISE, Case
from tests.scenarios import SHAPES, TensorSpec
from tests.training import assert_equal, loss_of, saved_and_loaded, small_model, train, weights

MEMORIES = ["contiguous", "transposed", "channels_last"]


def wrap(model: nn.Module, grad_layout: str = "packed", **settings: Any) -> GMixoutOptimizer:
    base = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    settings = {"exclude": "head.*", "mask_prob": 0.6, "resample_every": 3, **settings}
    return GMixoutOptimizer(base, grad_layout=grad_layout, **settings)


def assert_alike(run: Callable[[nn.Module, GMixoutOptimizer], Any], **settings: Any) -> None:
    """``run`` on a fresh model gives the same with both kinds of gradients.

    The weights and the state dict are the same afterwards too.
    """
    sides = []
    for grad_layout in ("dense", "packed"):
        model = small_model()
        optimizer = wrap(model, grad_layout, **settings)
        sides.append((run(model, optimizer), weights(model), optimizer.state_dict()))
    assert_equal(*sides)


def is_packed(param: Tensor) -> bool:
    return type(param.grad) is PackedGradient


@pytest.mark.parametrize("case", ELEMENTWISE, ids=repr)
@given(data=st.data())
def test_equals_dense_gradients_bit_for_bit(case: Case, data: st.DataObject) -> None:
    """Micro-batches, missing gradients, all settings: weights and state dicts after every step."""
    draw = data.draw
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    specs = draw(
        st.lists(
            st.builds(TensorSpec, st.sampled_from(SHAPES), st.sampled_from(MEMORIES), st.just("w")),
            min_size=1,
            max_size=3,
        )
    )
    settings = dict(
        layout="packed",
        mask_prob=draw(st.sampled_from([0.6, 0.9, 0.0])),
        granularity=draw(st.sampled_from(["element", "row", "column", 2, 3])),
        sampler=draw(st.sampled_from(["stratified", "bernoulli"])),
        rescale=draw(st.booleans()),
        stochastic_rounding=draw(st.booleans()),
        resample_every=draw(st.sampled_from([2, 1, 3, None])),
    )
    set_to_none = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    start = [spec.make(torch.randn(spec.shape, generator=generator).to(dtype)) for spec in specs]
    sides = []
    for grad_layout in ("dense", "packed"):
        params = [nn.Parameter(spec.make(w)) for spec, w in zip(specs, start, strict=True)]
        sides.append((params, GMixoutOptimizer(case(params), grad_layout=grad_layout, **settings)))
    for _ in range(4):
        for _ in range(draw(st.integers(1, 3))):
            for number, spec in enumerate(specs):
                if draw(st.integers(0, 3)) == 3:
                    continue
                grad = torch.randn(spec.shape, generator=generator).to(dtype)
                for params, _ in sides:
                    torch.autograd.backward([params[number]], [spec.make(grad)])
        for _, optimizer in sides:
            optimizer.step()
            for param in optimizer.param_groups[0]["params"] if settings["mask_prob"] else ():
                packs = optimizer is sides[1][1] and param.numel() > 0
                assert param.grad is None or is_packed(param) == packs
            optimizer.zero_grad(set_to_none=set_to_none)
        (dense_params, dense), (params, packed) = sides
        assert_equal([p.detach() for p in dense_params], [p.detach() for p in params])
        assert_equal(dense.state_dict(), packed.state_dict())


def test_a_model_is_trained_as_with_dense_gradients() -> None:
    assert_alike(lambda model, optimizer: train(model, optimizer, range(8)))


def test_dense_gradients_are_freed_while_backward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from gmixout_optim import packed_gradient

    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)])
    _optimizer = wrap(model, exclude=())
    alive: list[int] = []
    seen: list[weakref.ref[Tensor]] = []
    pack = packed_gradient._active_part

    def watched(member: Any, grad: Tensor) -> Tensor:
        alive.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(grad))
        return pack(member, grad)

    monkeypatch.setattr(packed_gradient, "_active_part", watched)
    model(torch.randn(2, 32)).sum().backward()
    assert len(alive) == 12
    assert max(alive) <= 1
    for param in model.parameters():
        assert is_packed(param)
        assert param.grad.active.numel() == round(0.4 * param.numel())
        assert param.grad.active.untyped_storage().nbytes() == 4 * param.grad.active.numel()


def test_what_a_packed_gradient_says_of_itself() -> None:
    dense_model, model = small_model(), small_model()
    _optimizer = wrap(dense_model, "dense")
    optimizer = wrap(model)
    loss_of(dense_model, 0).backward()
    loss_of(model, 0).backward()
    param, grad = model.body.weight, model.body.weight.grad
    assert (grad.shape, grad.dtype, grad.device) == (param.shape, param.dtype, param.device)
    active = optimizer.active_mask(param)
    whole = torch.where(active, dense_model.body.weight.grad, 0.0)
    assert_equal(grad.dense(), whole)
    assert_equal(grad.active, whole[active])
    assert "active=19" in repr(grad)
    for norm_type in (1.0, 2.0, 3.0, float("inf")):
        assert_equal(
            torch.linalg.vector_norm(grad, norm_type),
            torch.linalg.vector_norm(whole[active], norm_type),
        )
    assert_equal(grad.norm(), whole.norm())
    assert bool(grad.any())
    assert not bool(grad.isnan().any())
    assert_equal(grad.float().norm(), whole.float().norm())
    assert_equal((grad * 2).dense(), whole * 2)
    assert_equal(grad.detach().clone().abs().dense(), whole.abs())
    grad.clamp_(-0.01, 0.01)
    assert_equal(grad.dense(), whole.clamp(-0.01, 0.01))


@pytest.mark.parametrize(
    "use",
    [
        lambda grad: grad + 1,
        lambda grad: grad.add_(1),
        lambda grad: grad.exp(),
        lambda grad: grad.clamp_(min=0.1, max=1.0),
        lambda grad: grad.clamp_(max=1.0),
        lambda grad: torch.linalg.vector_norm(grad, -1.0),
        lambda grad: torch.linalg.vector_norm(grad, 0),
        lambda grad: torch.linalg.vector_norm(grad, dim=0),
        lambda grad: torch._foreach_norm([grad], -1.0),
        lambda grad: torch._foreach_mul_([grad], [grad]),
        lambda grad: torch._foreach_mul_([torch.ones(grad.shape)], [grad]),
        lambda grad: torch._foreach_mul_([grad], [torch.ones(grad.active.shape)]),
        lambda grad: grad.any(dim=0),
        lambda grad: grad * torch.ones(grad.shape),
        lambda grad: torch.ones(grad.shape).mul_(grad),
        lambda grad: torch.ones(()) * grad,
        lambda grad: torch.empty(grad.shape).copy_(grad),
        lambda grad: grad.flatten(),
        lambda grad: grad[0],
    ],
)
def test_other_operators_are_refused(use: Any) -> None:
    model = small_model(torch.float32)
    _optimizer = wrap(model)
    loss_of(model, 0).backward()
    grad = model.body.weight.grad
    before = grad.active.clone()
    with pytest.raises(RuntimeError, match=r"packed gradient"):
        use(grad)
    assert_equal(before, grad.active)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("own", [True, False], ids=["optimizer", "torch"])
def test_clipping(own: bool, norm_type: float) -> None:
    """Both clip by the norm of what is used, as optimizer.clip_grad_norm_ with dense gradients."""
    dense_model, model = small_model(), small_model()
    dense, optimizer = wrap(dense_model, "dense"), wrap(model)
    for step in range(5):
        for each in (dense, optimizer):
            each.zero_grad()
        loss_of(dense_model, step).backward()
        loss_of(model, step).backward()
        expected = dense.clip_grad_norm_(0.05, norm_type)
        if own:
            norm = optimizer.clip_grad_norm_(0.05, norm_type)
        else:
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05, norm_type)
        assert float(norm) > 0.05
        torch.testing.assert_close(norm, expected)
        dense.step()
        optimizer.step()
        torch.testing.assert_close(weights(model), weights(dense_model))


def test_clipping_by_value() -> None:
    dense_model, model = small_model(), small_model()
    dense, optimizer = wrap(dense_model, "dense"), wrap(model)
    for of, by in ((dense_model, dense), (model, optimizer)):
        train(of, by, range(5), lambda _, of=of: nn.utils.clip_grad_value_(of.parameters(), 0.01))
    assert_equal(weights(dense_model), weights(model))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_unscales_and_skips(fused: bool, unscale: bool) -> None:
    model = small_model(torch.float32)
    plain_model = copy.deepcopy(model)

    def build(of: nn.Module, grad_layout: str) -> GMixoutOptimizer:
        base = torch.optim.AdamW(of.named_parameters(), lr=0.01, fused=fused)
        return GMixoutOptimizer(
            base, exclude="head.*", mask_prob=0.6, resample_every=2, grad_layout=grad_layout
        )

    plain, optimizer = build(plain_model, "dense"), build(model, "packed")
    train(plain_model, plain, range(5))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in (0, 1, "inf", 2, 3, 4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, 0 if step == "inf" else step)).backward()
        before = (weights(model), optimizer.episode, optimizer.steps_in_episode)
        if step == "inf":
            model.body.weight.grad.active[3] = float("inf")
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == "inf":
            assert_equal(before, (weights(model), optimizer.episode, optimizer.steps_in_episode))
            assert scaler.get_scale() == 512.0
    assert_equal(weights(plain_model), weights(model))


def test_unmixed_gradients_stay_dense() -> None:
    model = small_model()
    _optimizer = wrap(model)
    loss_of(model, 0).backward()
    assert [is_packed(param) for param in model.parameters()] == [True, True, False, False]
    groups = [
        {"params": model.body.parameters(), "mask_prob": 0.0},
        {"params": model.head.parameters()},
    ]
    model.zero_grad()
    _optimizer = GMixoutOptimizer(torch.optim.SGD(groups, lr=0.1), grad_layout="packed")
    loss_of(model, 0).backward()
    assert [is_packed(param) for param in model.parameters()] == [False, False, True, True]


def test_the_model_may_zero_gradients() -> None:
    models = []
    for grad_layout in ("dense", "packed"):
        for set_to_none in (True, False):
            model = small_model()
            optimizer = wrap(model, grad_layout)
            for step in range(7):
                loss_of(model, step).backward()
                optimizer.step()
                model.zero_grad(set_to_none=set_to_none)
            models.append(weights(model))
    for others in models[1:]:
        assert_equal(models[0], others)


def test_gradients_of_an_episode_that_has_ended_are_refused() -> None:
    model = small_model()
    optimizer = wrap(model, resample_every=1)
    loss_of(model, 0).backward()
    optimizer.step()
    before = (weights(model), optimizer.state_dict())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"episode that has ended.*zero_grad"):
            optimizer.step()
        loss_of(model, 1).backward()  # as where a discriminator's gradients are thrown away
        with pytest.raises(RuntimeError, match=r"episode that has ended.*zero_grad"):
            optimizer.clip_grad_norm_(1.0)
    assert_equal(before, (weights(model), optimizer.state_dict()))
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    with pytest.raises(RuntimeError, match="episode that has ended"):
        optimizer.step()


def test_zero_is_a_gradient_in_every_episode() -> None:
    """Weight decay goes on, as with dense zeros."""

    def run(model: nn.Module, optimizer: GMixoutOptimizer) -> None:
        loss_of(model, 0).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        optimizer.resample()
        optimizer.step()

    assert_alike(run, sampler="bernoulli")


def test_gradients_of_another_optimizer_are_refused() -> None:
    """After consolidate() the parameters are free; what backward packed before it is not used."""
    model = small_model()
    first = wrap(model)
    loss_of(model, 0).backward()
    first.consolidate()
    second = wrap(model, seed=1)
    with pytest.raises(RuntimeError, match="another GMixoutOptimizer"):
        second.step()
    model.zero_grad()
    loss_of(model, 0).backward()
    second.step()
    with pytest.raises(ValueError, match="mixed by another GMixoutOptimizer"):
        first.step()
    model.zero_grad()
    second.consolidate()
    third = wrap(model, "dense")
    loss_of(model, 0).backward()
    assert not any(is_packed(param) for param in model.parameters())
    third.step()


def test_an_optimizer_is_gone_as_soon_as_nobody_holds_it() -> None:
    """And its hooks do nothing: the next optimizer has the model to itself."""
    model = small_model()
    gc.disable()
    try:
        optimizer = wrap(model)
        train(model, optimizer, range(4))
        del optimizer
        model.zero_grad()
        plain = torch.optim.AdamW(model.parameters())
        train(model, plain, range(2))
    finally:
        gc.enable()


def test_consolidate_leaves_plain_parameters() -> None:
    model = small_model()
    optimizer = wrap(model)
    train(model, optimizer, range(4))
    optimizer.consolidate()
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())
    model.zero_grad()
    loss_of(model, 0).backward()
    assert not any(is_packed(param) for param in model.parameters())
    optimizer.step()  # training goes on after all
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    assert is_packed(model.body.weight)


def test_nothing_is_read_from_the_model_before_the_first_step() -> None:
    """A trial backward, then other weights are loaded."""

    def run(model: nn.Module, optimizer: GMixoutOptimizer) -> None:
        loss_of(model, 0).backward()
        optimizer.zero_grad()
        model.load_state_dict(small_model(seed=3).state_dict())
        train(model, optimizer, range(4))

    assert_alike(run)


@pytest.mark.parametrize("move_on", ["resample", "resync", "load"])
def test_an_episode_that_ends_before_its_first_step(move_on: str) -> None:
    """What backward drew for it is not used in the next."""

    def run(model: nn.Module, optimizer: GMixoutOptimizer) -> None:
        loss_of(model, 0).backward()
        optimizer.zero_grad()
        if move_on == "load":
            other_model = small_model()
            other = wrap(other_model, seed=5)
            train(other_model, other, range(4))
            model.load_state_dict(other_model.state_dict())
            optimizer.load_state_dict(other.state_dict())
        else:
            getattr(optimizer, move_on)()
        train(model, optimizer, range(4, 8))

    assert_alike(run)


def test_a_model_that_is_moved_between_backward_and_step() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters()), grad_layout="packed")
    model(torch.randn(2, 4, 5, 5)).square().mean().backward()
    optimizer.step()
    model.to(memory_format=torch.channels_last)
    optimizer.step()
    before = [param.detach().clone() for param in model.parameters()]
    model.double()
    with pytest.raises(RuntimeError, match=r"was torch.float32.*convert the model before"):
        optimizer.step()
    assert_equal(before, [param.detach().float() for param in model.parameters()])


def test_sets_without_active_weights() -> None:
    for norm_type in (2.0, float("inf")):
        for clip in (nn.utils.clip_grad_norm_, None):
            model = small_model(torch.float32)
            optimizer = wrap(model, sampler="bernoulli", mask_prob=0.999, exclude=())
            loss_of(model, 0).backward()
            assert any(param.grad.active.numel() == 0 for param in model.parameters())
            if clip is None:
                optimizer.clip_grad_norm_(1.0, norm_type)
            else:
                clip(model.parameters(), 1.0, norm_type)
            optimizer.step()


def test_nothing_is_kept_alive() -> None:
    model = small_model()
    optimizer = wrap(model)
    loss_of(model, 0).backward()
    optimizer.step()
    grad = model.body.weight.grad
    gone = [weakref.ref(optimizer), weakref.ref(model.body.weight)]
    del optimizer
    assert gone[0]() is None
    with pytest.raises(RuntimeError, match="gone"):
        grad.dense()
    del model, grad
    gc.collect()
    assert gone[1]() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_pack_their_own_gradients(copied: Any) -> None:
    model = small_model()
    optimizer = wrap(model)
    train(model, optimizer, range(4))
    optimizer.zero_grad()
    other_model, other = copied((model, optimizer))
    losses = train(model, optimizer, range(4, 9))
    assert losses == train(other_model, other, range(4, 9))
    assert is_packed(other_model.body.weight)
    assert_equal(weights(model), weights(other_model))


def test_what_is_frozen_when_it_is_wrapped_is_packed_once_it_trains() -> None:
    models = []
    for grad_layout in ("dense", "packed"):
        model = small_model()
        model.body.weight.requires_grad_(False)
        optimizer = wrap(model, grad_layout)
        train(model, optimizer, range(2))
        model.body.weight.requires_grad_(True)
        train(model, optimizer, range(2, 6))
        models.append((weights(model), optimizer.state_dict()))
    assert is_packed(model.body.weight)
    assert_equal(*models)


def test_groups_that_are_added_later() -> None:
    model = small_model()
    base = torch.optim.AdamW(model.body.parameters(), lr=0.01)
    optimizer = GMixoutOptimizer(base, grad_layout="packed")
    optimizer.add_param_group({"params": list(model.head.parameters())})
    loss_of(model, 0).backward()
    assert all(is_packed(param) for param in model.parameters())
    optimizer.step()


def test_a_closure() -> None:
    def run(model: nn.Module, optimizer: GMixoutOptimizer) -> list[float]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, 3)
            loss.backward()
            return loss

        return [float(optimizer.step(closure).detach()) for _ in range(7)]

    assert_alike(run)


def test_a_graph_of_the_gradient_stays_whole() -> None:
    model = small_model()
    optimizer = wrap(model)
    loss_of(model, 0).backward(create_graph=True)
    grad = model.body.weight.grad
    assert not is_packed(model.body.weight)
    grad.square().sum().backward()  # a gradient penalty
    optimizer.step()


def test_saved_between_backward_and_step() -> None:
    """Also before the first step: what backward opened is whole."""
    for steps in (0, 2, 3):
        model = small_model()
        optimizer = wrap(model)
        train(model, optimizer, range(steps))
        optimizer.zero_grad()
        loss_of(model, steps).backward()
        saved = saved_and_loaded((model.state_dict(), optimizer.state_dict()))
        resumed_model = small_model(seed=1)
        resumed = wrap(resumed_model)
        resumed_model.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        train(resumed_model, resumed, range(steps, 9))
        optimizer.step()
        train(model, optimizer, range(steps + 1, 9))
        assert_equal(weights(model), weights(resumed_model))


def test_state_dicts_do_not_depend_on_how_gradients_are_kept() -> None:
    models = [small_model(), small_model()]
    train(models[0], one := wrap(models[0], "dense"), range(5))
    other = wrap(models[1], "packed")
    models[1].load_state_dict(models[0].state_dict())
    other.load_state_dict(one.state_dict())
    train(models[0], one, range(5, 9))
    train(models[1], other, range(5, 9))
    assert_equal(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        (torch.optim.AdamW, dict(layout="dense"), "base=AdamW works on whole tensors"),
        (torch.optim.Adafactor, dict(), "base=Adafactor works on whole tensors"),
        (torch.optim.AdamW, dict(residual="persistent"), "residual='persistent'"),
    ],
)
def test_layouts_that_need_whole_tensors_refuse(kind: Any, settings: dict, reason: str) -> None:
    model = small_model()
    base = kind(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match=f"grad_layout='packed' needs layout='packed': {reason}"):
        GMixoutOptimizer(base, grad_layout="packed", **settings)
    assert "gmixout" not in base.param_groups[0]


@pytest.mark.parametrize("options", [dict(), dict(gradient_as_bucket_view=True)], ids=str)
def test_distributed_data_parallel_is_refused_with_the_reason(options: dict) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = small_model()
        _optimizer = wrap(model)
        parallel = nn.parallel.DistributedDataParallel(model, **options)
        with pytest.raises(RuntimeError, match=r"DistributedDataParallel.*grad_layout='dense'"):
            loss_of(parallel, 0).backward()
        with pytest.raises(RuntimeError, match="packed gradient"):
            torch.distributed.all_reduce(model.body.bias.grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.compile
def test_compiled() -> None:
    runs = []
    for grad_layout in ("dense", "packed"):
        model = small_model(torch.float32)
        optimizer = wrap(model, grad_layout, compile=True)
        train(model, optimizer, range(8))
        runs.append(weights(model))
    assert_equal(*runs)


@pytest.mark.compile
def test_a_model_that_is_compiled() -> None:
    runs = []
    for grad_layout in ("dense", "packed"):
        model = small_model(torch.float32)
        optimizer = wrap(model, grad_layout)
        compiled = torch.compile(model)
        for step in range(5):
            for _ in range(2):
                loss_of(compiled, step).backward()
            assert is_packed(model.body.weight) == (grad_layout == "packed")
            optimizer.step()
            optimizer.zero_grad()
        runs.append(weights(model))
    assert_equal(*runs)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_on_cuda(compile: bool) -> None:
    runs = []
    for grad_layout in ("dense", "packed"):
        model = small_model(torch.float32).cuda()
        optimizer = wrap(model, grad_layout, compile=compile)
        for step in range(8):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(16, 6, generator=generator).cuda()).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
        runs.append(weights(model))
    torch.testing.assert_close(*runs)
