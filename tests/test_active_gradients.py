"""Gradients computed for the active rows or columns alone: the same as dense ones on S."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gmixout_optim import GMixoutOptimizer, PackedGradient
from tests.training import assert_equal, saved_and_loaded, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*freshly initialised")

FUNCTIONALS = {
    name: getattr(F, name) for name in ("linear", "conv1d", "conv2d", "conv3d", "embedding")
}


@pytest.fixture(autouse=True)
def _layers_of_any_size(monkeypatch: pytest.MonkeyPatch) -> Any:
    """And whatever a test leaves behind is gone before the next."""
    monkeypatch.setattr("gmixout_optim.active_gradient.LEAST_MULTIPLY_ADDS", 0)
    yield
    gc.collect()
    assert {name: getattr(F, name) for name in FUNCTIONALS} == FUNCTIONALS


def wrap(model: nn.Module, grad_layout: str = "active", **settings: Any) -> GMixoutOptimizer:
    base = settings.pop("base", partial(torch.optim.AdamW, lr=0.01))
    settings = {"granularity": "column", "mask_prob": 0.8, "resample_every": 3, **settings}
    if hasattr(model, "head"):
        settings["exclude"] = "head.*"
    return GMixoutOptimizer(base(model.named_parameters()), grad_layout=grad_layout, **settings)


def kinds(optimizer: GMixoutOptimizer) -> dict[str, str]:
    return {tensor.name: tensor.gradient for tensor in optimizer.report().tensors}


class Net(nn.Module):
    """A layer of each kind, one without bias and one whose output is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 64, padding_idx=3)
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)
        self.conv = nn.Conv1d(64, 40, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(40)
        self.attention = nn.MultiheadAttention(40, 4, batch_first=True)
        self.head = nn.Linear(40, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + self.down(F.relu(self.up(hidden), inplace=True))
        hidden = F.relu(self.conv(hidden.transpose(1, 2)), inplace=True).transpose(1, 2)
        hidden = self.norm(hidden)
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return self.head(hidden.mean(1))


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def tokens(step: int) -> Tensor:
    return torch.randint(30, (4, 12), generator=torch.Generator().manual_seed(step))


MATRICES = [
    "embedding.weight",
    "up.weight",
    "down.weight",
    "conv.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
]


def loss_of(model: Callable[[Tensor], Tensor], step: int) -> Tensor:
    return model(tokens(step)).float().square().mean()


def trained(
    grad_layout: str,
    loss: Callable[[Net, int], Tensor] = loss_of,
    steps: int = 8,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> tuple[Net, GMixoutOptimizer]:
    model = net(dtype)
    optimizer = wrap(model, grad_layout, **settings)
    weight = dict(model.named_parameters())
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        if grad_layout == "active":
            used = [name for name in MATRICES if optimizer.active_mask(weight[name]).any()]
            assert all(kinds(optimizer)[name] == "active" for name in used)
        optimizer.step()
    return model, optimizer


def assert_close(ours: nn.Module, others: nn.Module) -> None:
    torch.testing.assert_close(weights(ours), weights(others), rtol=1e-9, atol=1e-9)


def assert_moved_alike(ours: nn.Module, others: nn.Module, start: nn.Module) -> None:
    """In low precision: what was learned differs by less than a tenth of itself."""
    for one, other, before in zip(weights(ours), weights(others), weights(start), strict=True):
        assert float((one - other).norm()) <= 0.1 * float((other - before).norm())


SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(granularity="row"),
        dict(sampler="bernoulli"),
        dict(granularity="row", sampler="bernoulli", mask_prob=0.97),
        dict(rescale=True),
        dict(resample_every=1),
        dict(mask_prob=0.1, base=SGD),
        dict(granularity="row", anchor_decay=0.9, base=SGD),
    ],
    ids=lambda settings: str({**settings, "base": ""}),
)
def test_a_training_equals_that_with_packed_gradients(settings: dict[str, Any]) -> None:
    active, _ = trained("active", **settings)
    packed, _ = trained("packed", **settings)
    assert_close(active, packed)


def with_autocast(model: Net, step: int) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return loss_of(model, step)


def accumulated(model: Net, step: int) -> Tensor:
    loss_of(model, step + 100).backward()
    loss_of(model, step + 200).backward()
    return loss_of(model, step)


def used_twice(model: Net, step: int) -> Tensor:
    return loss_of(model, step) + loss_of(model, step + 100)


def with_penalties(model: Net, step: int) -> Tensor:
    """Other uses of the same weights in the same graph, before and after."""
    penalty = model.up.weight.square().sum() + model.conv.weight.abs().sum()
    return penalty + loss_of(model, step) + model.embedding.weight.square().sum()


def tied(model: Net, step: int) -> Tensor:
    """The embedding is the output layer, too."""
    hidden = model.up(model.embedding(tokens(step)))
    return F.linear(model.down(hidden), model.embedding.weight).square().mean() + loss_of(
        model, step
    )


def with_checkpoints(model: Net, step: int, use_reentrant: bool) -> Tensor:
    hidden = model.embedding(tokens(step)).requires_grad_()

    def block(hidden: Tensor) -> Tensor:
        return model.down(model.up(hidden).relu())

    hidden = checkpoint(block, hidden, use_reentrant=use_reentrant)
    return hidden.square().mean() + loss_of(model, step)


def in_functional_call(model: Net, step: int) -> Tensor:
    parameters = dict(model.named_parameters())
    return torch.func.functional_call(model, parameters, (tokens(step),)).square().mean()


@pytest.mark.parametrize("granularity", ["column", "row"])
@pytest.mark.parametrize(
    "loss",
    [
        with_autocast,
        accumulated,
        used_twice,
        with_penalties,
        tied,
        partial(with_checkpoints, use_reentrant=False),
        partial(with_checkpoints, use_reentrant=True),
        in_functional_call,
    ],
    ids=lambda loss: getattr(loss, "__name__", f"checkpoint {getattr(loss, 'keywords', '')}"),
)
def test_however_weights_are_used(loss: Callable[..., Tensor], granularity: str) -> None:
    low = loss is with_autocast
    settings = dict(loss=loss, granularity=granularity, base=SGD)
    settings["dtype"] = torch.float32 if low else torch.float64
    active, _ = trained("active", **settings)
    packed, _ = trained("packed", **settings)
    if low:
        assert_moved_alike(active, packed, net(torch.float32))
    else:
        assert_close(active, packed)


def test_replicas_have_dense_gradients() -> None:
    """DataParallel's weights are copies that autograd leads back to the Parameters."""
    model, plain = net(), net()
    optimizer = wrap(model)
    for each in (model, plain):
        copies = {name: param * 1 for name, param in each.named_parameters()}
        torch.func.functional_call(each, copies, (tokens(0),)).square().mean().backward()
    assert set(kinds(optimizer).values()) == {"packed", "dense"}
    for param, other in zip(model.parameters(), plain.parameters(), strict=True):
        if isinstance(param.grad, PackedGradient):
            expected = torch.where(optimizer.active_mask(param), other.grad, 0.0)
            torch.testing.assert_close(param.grad.dense(), expected)


LAYERS: dict[str, Callable[[bool], nn.Module]] = {
    "linear": lambda bias: nn.Linear(40, 36, bias),
    "conv1d": lambda bias: nn.Conv1d(40, 36, 3, 2, 1, bias=bias),
    "conv2d": lambda bias: nn.Conv2d(40, 36, (3, 1), (1, 2), (1, 0), bias=bias),
    "conv3d": lambda bias: nn.Conv3d(40, 36, 2, 1, 1, dilation=2, bias=bias),
    "pointwise": lambda bias: nn.Conv2d(40, 36, 1, bias=bias),
    "pointwise, strided": lambda bias: nn.Conv2d(40, 36, 1, (3, 2), bias=bias),
    "dilated": lambda bias: nn.Conv2d(40, 36, 3, 2, 2, 2, bias=bias),
    "same": lambda bias: nn.Conv1d(40, 36, 4, padding="same", bias=bias),
    "groups": lambda bias: nn.Conv1d(80, 36, 3, groups=2, bias=bias),
    "embedding": lambda bias: nn.Embedding(36, 40, padding_idx=5 if bias else None),
}
LEFT_DENSE = ("same", "groups")


@st.composite
def inputs_of(draw: st.DrawFn, name: str, layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """Of any number of dimensions and in any memory format that the layer takes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    batch = draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    if isinstance(layer, nn.Embedding):
        return torch.randint(36, batch, generator=generator)
    if isinstance(layer, nn.Linear):
        shape = [*batch, 40]
    else:
        sides = draw(
            st.lists(
                st.integers(5, 7), min_size=layer.weight.ndim - 2, max_size=layer.weight.ndim - 2
            )
        )
        channels = layer.in_channels
        shape = [draw(st.integers(1, 3)), channels, *sides]
        if draw(st.booleans()):
            shape = shape[1:]  # without a batch
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    form = draw(st.sampled_from(["contiguous", "strided", "channels_last", "expanded"]))
    if form == "strided":
        values = torch.stack([values, values], -1)[..., 0]
    if form == "channels_last" and values.ndim == 4:
        values = values.to(memory_format=torch.channels_last)
    if form == "expanded":
        values = values[:1].expand(values.shape)
    return values


@pytest.mark.parametrize("granularity", ["column", "row"])
@pytest.mark.parametrize("name", LAYERS)
@given(data=st.data())
def test_gradients_are_the_dense_ones_on_s(
    name: str, granularity: str, data: st.DataObject
) -> None:
    """Of the weight, and everywhere those of bias and input."""
    draw = data.draw
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = LAYERS[name](draw(st.booleans())).to(dtype)
    if name in ("conv2d", "pointwise") and draw(st.booleans()):
        layer = layer.to(memory_format=torch.channels_last)
    inputs = draw(inputs_of(name, layer, dtype))
    double, needs_input, redrawn = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    sides = []
    for grad_layout in ("dense", "active"):
        layer.zero_grad()
        optimizer = wrap(layer, grad_layout, granularity=granularity, mask_prob=0.7)
        if redrawn:
            optimizer.resample()
        leaf = inputs.detach()
        if needs_input and leaf.is_floating_point():
            leaf.requires_grad_()
        outputs = layer(leaf)
        loss = outputs.double().pow(3).sum()
        if double:
            loss = loss + layer(leaf).double().square().sum()
        loss.backward()
        grads = {}
        for key, param in layer.named_parameters():
            grad = param.grad
            grads[key] = grad.dense() if isinstance(grad, PackedGradient) else grad
            grads[key] = torch.where(optimizer.active_mask(param), grads[key], 0.0)
            if grad_layout == "active":
                wanted = "active" if key == "weight" else "packed"
                is_batched = not isinstance(layer, nn.modules.conv._ConvNd) or (
                    inputs.ndim == layer.weight.ndim
                )
                if name in LEFT_DENSE or not is_batched:
                    wanted = "packed"
                assert kinds(optimizer)[key] == wanted
        sides.append((outputs, leaf.grad, grads))
        optimizer.consolidate()
    (outputs, of_input, grads), (our_outputs, of_our_input, our_grads) = sides
    precise = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.05}[dtype]
    scale = max(1.0, max(float(grad.abs().max()) for grad in grads.values()))
    torch.testing.assert_close(our_outputs, outputs, rtol=precise, atol=precise)
    if of_input is not None:
        torch.testing.assert_close(of_our_input, of_input, rtol=precise, atol=precise * scale)
    for key in grads:
        torch.testing.assert_close(our_grads[key], grads[key], rtol=precise, atol=precise * scale)


def test_of_the_input_only_the_active_columns_are_saved() -> None:
    """Rows keep all of it, as a plain layer does."""
    inputs = torch.randn(64, 768, requires_grad=True)
    saved = {}
    for granularity, grad_layout in (("column", "packed"), ("row", "active"), ("column", "active")):
        model = nn.Linear(768, 40)
        optimizer = wrap(model, grad_layout, granularity=granularity, mask_prob=0.9)
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes, own: Any = model) -> Tensor:
            if tensor.data_ptr() != own.weight.data_ptr():
                sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(inputs)
        saved[granularity, grad_layout] = sum(sizes)
        optimizer.consolidate()
    whole = inputs.nbytes
    assert saved["column", "packed"] == whole
    assert whole <= saved["row", "active"] < 1.01 * whole
    assert saved["column", "active"] < 0.11 * whole


def test_no_gradient_is_ever_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    _optimizer = wrap(model)
    shapes = {tuple(param.shape) for name, param in model.named_parameters() if name in MATRICES}
    made: list[tuple[int, ...]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if func._overloadpacket.__name__ not in ("detach", "t"):
                parts = torch.utils._pytree.tree_leaves(result)
                made.extend(tuple(part.shape) for part in parts if type(part) is Tensor)
            return result

    loss = loss_of(model, 0)
    with Watch():
        loss.backward()
    assert made
    assert not shapes & set(made)


# Small layers


def test_small_layers_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """By multiply-adds: tokens times inputs times outputs."""
    monkeypatch.setattr("gmixout_optim.active_gradient.LEAST_MULTIPLY_ADDS", 10 * 64 * 40)
    model = nn.Linear(64, 40)
    for rows, kind in ((9, "packed"), (10, "active")):
        optimizer = wrap(model)
        model(torch.randn(rows, 64)).sum().backward()
        assert kinds(optimizer) == {"weight": kind, "bias": "packed"}
        assert "  " + kind in str(optimizer.report())
        optimizer.consolidate()
        model.zero_grad()


@pytest.mark.parametrize("granularity", ["element", 4])
def test_other_cells_are_packed_afterwards(granularity: Any) -> None:
    model = net()
    optimizer = wrap(model, granularity=granularity)
    loss_of(model, 0).backward()
    assert set(kinds(optimizer).values()) == {"packed", "dense"}
    assert kinds(optimizer)["head.weight"] == "dense"


# The wrapped functionals


def is_wrapped() -> bool:
    wrapped = {getattr(F, name) is not FUNCTIONALS[name] for name in FUNCTIONALS}
    assert len(wrapped) == 1
    return wrapped.pop()


def test_consolidate_undoes_it_and_a_further_step_does_it_again() -> None:
    model = net()
    names = [name for name, param in model.named_parameters() for _ in vars(param)]
    optimizer = wrap(model)
    assert is_wrapped()
    optimizer.consolidate()
    assert not is_wrapped()
    assert [name for name, param in model.named_parameters() for _ in vars(param)] == names
    loss_of(model, 0).backward()
    optimizer.step()
    assert is_wrapped()
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    assert kinds(optimizer)["up.weight"] == "active"


def test_garbage_collection_undoes_it() -> None:
    model = net()
    optimizer = wrap(model)
    loss_of(model, 0).backward()
    optimizer.step()
    assert is_wrapped()
    del optimizer
    gc.collect()
    assert not is_wrapped()
    model.zero_grad()
    loss_of(model, 0).backward()
    assert {type(param.grad) for param in model.parameters()} == {Tensor}


def test_it_does_not_keep_model_and_optimizer_alive() -> None:
    import weakref

    model = net()
    optimizer = wrap(model)
    loss_of(model, 0).backward()
    optimizer.step()
    gone = weakref.ref(optimizer), weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_several_optimizers_in_any_order() -> None:
    for order in itertools.permutations(range(3)):
        models = [net() for _ in range(3)]
        optimizers = [wrap(model, seed=seed) for seed, model in enumerate(models)]
        for number in order:
            for model in models:
                model.zero_grad()
                loss_of(model, 0).backward()
            assert is_wrapped()
            optimizers[number].consolidate()
            assert isinstance(models[number].up.weight.grad, PackedGradient)
        assert not is_wrapped()


def test_somebody_elses_wrapper_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def wrapped_by(inner: Any, name: str) -> Any:
        def linear(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(name)
            return inner(*args, **kwargs)

        return linear

    original = F.linear
    before = wrapped_by(original, "before")
    F.linear = before
    try:
        model = net()
        optimizer = wrap(model)
        F.linear = after = wrapped_by(F.linear, "after")
        loss_of(model, 0).backward()
        assert kinds(optimizer)["up.weight"] == "active"
        optimizer.consolidate()
        assert F.linear is after
        model.zero_grad()
        calls.clear()
        loss_of(model, 0).backward()
        assert set(calls) == {"before", "after"}
        assert type(model.up.weight.grad) is Tensor
        again = wrap(model)
        model.zero_grad()
        loss_of(model, 0).backward()
        assert kinds(again)["up.weight"] == "active"
        again.consolidate()
        assert F.linear is after
    finally:
        F.linear = original


def test_other_calls_are_what_they_were() -> None:
    model, other = net(), nn.Linear(6, 4)
    _optimizer = wrap(model)
    inputs = torch.randn(3, 6)
    assert_equal(F.linear(inputs, other.weight, other.bias), inputs @ other.weight.t() + other.bias)
    other(inputs).sum().backward()
    assert type(other.weight.grad) is Tensor
    assert F.linear.__name__ == "linear"
    with torch.no_grad():
        assert not model(tokens(0)).requires_grad
    with torch.inference_mode():
        model(tokens(0))
    with pytest.raises(RuntimeError):
        model.up(torch.randn(3, 6).double())
    with pytest.raises(RuntimeError, match="dtype"):
        model.up(torch.randn(3, 64))


# Copies and files


def test_copies_and_files_hold_plain_parameters() -> None:
    model = net()
    optimizer = wrap(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        loss_of(copied, 0).backward()
        assert {type(param.grad) for param in copied.parameters()} == {Tensor}
    plain = saved_and_loaded([nn.Parameter(param.detach()) for param in model.parameters()])
    assert_equal(plain, saved_and_loaded(list(model.parameters())))
    assert_equal(dict(model.state_dict()), saved_and_loaded(model.state_dict()))

    both = copy.deepcopy((model, optimizer))
    for of, by in ((model, optimizer), both):
        for step in range(5):
            by.zero_grad()
            loss_of(of, step).backward()
            assert kinds(by)["up.weight"] == "active"
            by.step()
    assert_equal(weights(model), weights(both[0]))


def test_a_shallow_copy_of_a_parameter_is_not_the_parameter() -> None:
    model = net()
    optimizer = wrap(model)
    other = copy.copy(model.up.weight)
    F.linear(torch.randn(5, 64).double(), other).sum().backward()
    assert type(other.grad) is Tensor
    assert model.up.weight.grad is None
    assert kinds(optimizer)["up.weight"] == "dense"


def test_a_run_resumes_exactly() -> None:
    whole, _ = trained("active", steps=8)
    model, optimizer = trained("active", steps=5)
    saved = saved_and_loaded((model.state_dict(), optimizer.state_dict()))
    resumed = net()
    resumed.load_state_dict(saved[0])
    other = wrap(resumed)
    other.load_state_dict(saved[1])
    for step in range(5, 8):
        other.zero_grad()
        loss_of(resumed, step).backward()
        assert kinds(other)["up.weight"] == "active"
        other.step()
    assert_equal(weights(whole), weights(resumed))


# Episodes


@pytest.mark.parametrize("granularity", ["column", "row"])
def test_an_episode_that_ends_between_forward_and_backward(granularity: str) -> None:
    """The gradient is of other weights than those that are active now."""
    model = net()
    optimizer = wrap(model, granularity=granularity)
    loss = loss_of(model, 0)
    optimizer.resample()
    loss.backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"episode that has ended.*zero_grad"):
        optimizer.step()
    assert_equal(before, weights(model))
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    optimizer.step()


def test_an_episode_that_ends_before_a_checkpoint_is_computed_again() -> None:
    """What is computed again is of the new episode, and so is its gradient."""
    grads = []
    for resampled in (True, False):
        model = net()
        optimizer = wrap(model)
        hidden = torch.randn(7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        if not resampled:
            optimizer.resample()
        loss = checkpoint(model.up, hidden.requires_grad_(), use_reentrant=False).square().sum()
        if resampled:
            optimizer.resample()
        loss.backward()
        optimizer.step()
        grads.append(model.up.weight.grad.dense())
    torch.testing.assert_close(*grads)


def test_gradients_of_two_episodes_are_not_added_up() -> None:
    model = net()
    optimizer = wrap(model)
    loss_of(model, 0).backward()
    optimizer.resample()
    loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match="episode that has ended"):
        optimizer.step()


# Autograd


def test_hooks_on_weights_fire() -> None:
    model = net()
    optimizer = wrap(model)
    seen: list[str] = []
    weight = model.up.weight
    weight.register_hook(lambda grad: seen.append(type(grad).__name__) or grad * 2)
    weight.register_post_accumulate_grad_hook(lambda param: seen.append(type(param.grad).__name__))
    loss_of(model, 0).backward()
    doubled = weight.grad.dense()
    assert seen == ["PackedGradient"] * 2
    plain = net()
    loss_of(plain, 0).backward()
    mask = optimizer.active_mask(weight)
    torch.testing.assert_close(doubled, torch.where(mask, 2 * plain.up.weight.grad, 0.0))


def test_autograd_grad_and_inputs() -> None:
    model = net()
    optimizer = wrap(model)
    (grad,) = torch.autograd.grad(loss_of(model, 0), model.up.weight)
    assert isinstance(grad, PackedGradient)
    loss_of(model, 0).backward(inputs=[model.up.weight])
    assert_equal(grad.dense(), model.up.weight.grad.dense())
    assert model.down.weight.grad is None
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(model.up.weight.grad.dense(), 3 * grad.dense())
    optimizer.step()


def test_anomaly_mode() -> None:
    model = net()
    optimizer = wrap(model)
    with torch.autograd.detect_anomaly(check_nan=True):
        loss_of(model, 0).backward()
    optimizer.step()


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("granularity", ["column", "row"])
def test_a_penalty_on_the_gradient_of_the_input(granularity: str, amp: bool) -> None:
    """As in WGAN-GP: its gradient reaches the weights."""
    grads = []
    for grad_layout in ("packed", "active"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 1))
        optimizer = wrap(model, grad_layout, granularity=granularity)
        inputs = torch.randn(8, 64, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            score = model(inputs).sum()
        (of_input,) = torch.autograd.grad(score, inputs, create_graph=True)
        (of_input.norm(dim=1) - 1).square().mean().backward()
        grads.append([layer.weight.grad.dense() for layer in (model[0], model[2])])
        optimizer.consolidate()
    tolerance = 2e-2 if amp else 1e-5
    torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in LEFT_DENSE])
def test_a_gradient_that_is_differentiated_is_whole_by_row(name: str) -> None:
    layers = [LAYERS[name](True).double(), LAYERS[name](True).double()]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizer = wrap(layers[0], granularity="row")
    sides = [7] * max(0, layers[0].weight.ndim - 2)
    inputs = torch.randn(2, 40, *sides, generator=torch.Generator().manual_seed(0)).double()
    if name == "embedding":
        inputs = torch.arange(12) * 3
    seconds = []
    for layer in layers:
        loss = layer(inputs).pow(3).sum()
        (grad,) = torch.autograd.grad(loss, layer.weight, create_graph=True)
        grad.square().sum().backward()
        seconds.append((grad, layer.weight.grad))
    torch.testing.assert_close(seconds[0][0], seconds[1][0])
    mask = optimizer.active_mask(layers[0].weight)
    ours = seconds[0][1]
    ours = ours.dense() if isinstance(ours, PackedGradient) else torch.where(mask, ours, 0.0)
    torch.testing.assert_close(ours, torch.where(mask, seconds[1][1], 0.0))


def test_by_column_it_cannot_be_differentiated() -> None:
    """It has zeros where the true one has none; a penalty on it would be another one."""
    layer = nn.Linear(64, 40)
    optimizer = wrap(layer)
    loss = layer(torch.randn(5, 64)).pow(3).sum()
    (grad,) = torch.autograd.grad(loss, layer.weight, create_graph=True)
    assert torch.equal(grad != 0, optimizer.active_mask(layer.weight))
    with pytest.raises(RuntimeError, match=r"granularity='column'.*grad_layout='packed'"):
        grad.square().sum().backward()


def test_transforms_of_torch_func_are_dense() -> None:
    model = net()
    _optimizer = wrap(model)
    up = model.up
    inputs = torch.randn(5, 64, dtype=torch.float64)
    each = torch.func.vmap(torch.func.grad(lambda row: up(row).square().sum()))(inputs)
    whole = torch.autograd.grad(up(inputs.requires_grad_()).square().sum(), inputs)[0]
    torch.testing.assert_close(each, whole)
    value, tangent = torch.func.jvp(up, (inputs.detach(),), (torch.ones_like(inputs),))
    torch.testing.assert_close(tangent, up.weight.sum(1).expand_as(value))


def test_traces_are_of_plain_layers() -> None:
    model = net()
    _optimizer = wrap(model)
    traced = torch.jit.trace(model.up, torch.randn(3, 64).double())
    assert "aten::linear" in str(traced.inlined_graph)
    graph = torch.fx.symbolic_trace(nn.Sequential(model.up, nn.ReLU()))
    inputs = torch.randn(3, 64).double()
    torch.testing.assert_close(graph(inputs), model.up(inputs).relu())
    exported = torch.export.export(model.up, (inputs,))
    assert "linear" in str(exported.graph)


# Refusals


def test_what_does_not_go_together_is_refused() -> None:
    for settings in (dict(layout="dense"), dict(residual="persistent")):
        with pytest.raises(ValueError, match="grad_layout='active' needs layout='packed'"):
            wrap(net(), **settings)
    model = net()
    optimizer = wrap(model)
    with pytest.raises(RuntimeError, match=r"torch.jit.script.*grad_layout='active'.*consolidate"):
        torch.jit.script(nn.Linear(3, 3))
    torch.jit.script(_scriptable)
    optimizer.consolidate()
    torch.jit.script(nn.Linear(3, 3))


def _scriptable(x: Tensor) -> Tensor:
    return x + 1


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_distributed_data_parallel_is_refused(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(net())
        _optimizer = wrap(model)
        with pytest.raises(RuntimeError, match=r"grad_layout='active'.*DistributedDataParallel"):
            model(tokens(0))
    finally:
        torch.distributed.destroy_process_group()


# What users do


@pytest.mark.parametrize("granularity", ["column", "row"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_parameter_that_changes_before_it_is_trained(granularity: str, compiled: bool) -> None:
    """Its shape, as when a vocabulary grows, or its dtype."""
    for change in (lambda old: torch.randn(42, 66).to(old.dtype), lambda old: old.bfloat16()):
        torch._dynamo.reset()
        layer = nn.Linear(64, 42)
        optimizer = wrap(layer, granularity=granularity)
        layer.weight.data = change(layer.weight.data)
        layer.bias.data = layer.bias.data.to(layer.weight.dtype)
        call = torch.compile(layer, backend="aot_eager") if compiled else layer
        inputs = torch.ones(3, layer.weight.shape[1], dtype=layer.weight.dtype)
        call(inputs).float().sum().backward()
        mask = optimizer.active_mask(layer.weight)
        assert_equal(layer.weight.grad.dense(), torch.where(mask, 3.0, 0.0).to(inputs.dtype))
        optimizer.step()
        optimizer.zero_grad()
        call(inputs).float().sum().backward()
        assert kinds(optimizer)["weight"] == "active"


def test_a_loss_from_before_a_step() -> None:
    """A plain layer does not save its weight where its input needs no gradient."""
    for layer, inputs in (
        (nn.Linear(64, 40), torch.randn(3, 64)),
        (nn.Conv1d(40, 36, 3), torch.randn(2, 40, 7)),
        (nn.Embedding(36, 40), torch.arange(6)),
    ):
        optimizer = wrap(layer, resample_every=None)
        earlier = layer(inputs).square().sum()
        layer(inputs).square().sum().backward()
        optimizer.step()
        earlier.backward()
        optimizer.step()
        optimizer.consolidate()


def test_arguments_of_convolutions() -> None:
    model = net()
    optimizer = wrap(model)
    numpy = pytest.importorskip("numpy")
    free = nn.Parameter(torch.randn(4, 40, 3, dtype=torch.float64))
    inputs = torch.randn(2, 40, 9, dtype=torch.float64)
    for weight in (free, model.conv.weight[:, :40].detach(), nn.Parameter(free.detach())):
        for argument in (2, (2,), [2], numpy.int64(2)):
            for name in ("stride", "padding", "dilation"):
                inner = FUNCTIONALS["conv1d"](inputs, weight[:, :40], **{name: argument})
                assert_equal(F.conv1d(inputs, weight[:, :40], **{name: argument}), inner)
    hidden = torch.randn(2, 64, 9, dtype=torch.float64)
    for argument in (2, (2,), [2], numpy.int64(2)):
        for name in ("stride", "padding", "dilation"):
            ours = F.conv1d(hidden, model.conv.weight, **{name: argument})
            plain = FUNCTIONALS["conv1d"](hidden, model.conv.weight, **{name: argument})
            torch.testing.assert_close(ours, plain)
            ours.sum().backward()
            assert kinds(optimizer)["conv.weight"] == "active"
    for empty in (torch.randn(0, 40, 9).double(), torch.randn(0, 64, 9).double()):
        weight = free if empty.shape[1] == 40 else model.conv.weight
        F.conv1d(empty, weight).sum().backward()
    assert F.linear(hidden[:0, 0, :1].expand(0, 64), model.up.weight).shape == (0, 96)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model.up(torch.randn(3, 63).double())
    with pytest.raises(RuntimeError, match="channels"):
        model.conv(inputs)


def test_inputs_that_are_not_strided() -> None:
    layer = nn.Linear(64, 40)
    optimizer = wrap(layer)
    rows = torch.randn(3, 64)
    layer(rows.to_sparse()).sum().backward()
    nested = torch.nested.nested_tensor([rows, rows[:2]], layout=torch.jagged)
    layer(nested).values().sum().backward()
    assert kinds(optimizer)["weight"] == "packed"
    whole = 2 * rows.sum(0) + rows[:2].sum(0)
    expected = torch.where(optimizer.active_mask(layer.weight), whole, 0.0)
    torch.testing.assert_close(layer.weight.grad.dense(), expected)


def test_a_tied_embedding_with_sparse_gradients() -> None:
    """Added to the dense one of the output layer, as autograd does."""
    runs = []
    for grad_layout in ("packed", "active"):
        torch.manual_seed(0)
        embedding = nn.Embedding(40, 64, sparse=True).double()
        optimizer = wrap(embedding, grad_layout, base=SGD)
        for step in range(4):
            optimizer.zero_grad()
            hidden = embedding(torch.arange(step, 40, 3))
            F.linear(hidden, embedding.weight).square().sum().mul(1e-4).backward()
            optimizer.step()
        runs.append(weights(embedding))
        optimizer.consolidate()
    torch.testing.assert_close(*runs)


def test_hooks_that_keep_zeros() -> None:
    model = net()
    optimizer = wrap(model)
    weight = model.up.weight
    weight.register_hook(lambda grad: torch.nan_to_num(grad.clamp(-1e-3, 1e-3)))
    loss_of(model, 0).backward()
    assert 0 < float(weight.grad.active.abs().max()) <= 1e-3
    with pytest.raises(RuntimeError, match="packed gradient"):
        weight + weight.grad
    optimizer.step()


def test_scripts_of_functions_and_classes_are_compiled_as_ever() -> None:
    from torch.jit import script

    optimizer = wrap(net())
    from torch.jit import script as bound

    size = 3

    @torch.jit.script
    class Counter:
        def __init__(self) -> None:
            self.value = 0

        def add(self, by: int) -> int:
            self.value += by
            return self.value

    @torch.jit.script
    def count(by: int) -> int:
        counter = Counter()
        return counter.add(by)

    assert count(size) == 3
    optimizer.consolidate()
    for each in (script, bound):
        each(nn.Linear(3, 3))


def test_gradients_of_two_parameters_are_not_added_up() -> None:
    """Their active weights are others."""
    model = nn.Sequential(nn.Linear(64, 40), nn.Linear(64, 40))
    _optimizer = wrap(model)
    inputs = torch.randn(3, 64)
    (model[0](inputs) + model[1](inputs)).sum().backward()
    first, second = (layer.weight.grad for layer in model)
    before = first.active.clone()
    for use in (lambda: first + second, lambda: first.add_(second), lambda: first.copy_(second)):
        with pytest.raises(RuntimeError, match="packed gradient of another parameter"):
            use()
    assert_equal(first.active, before)
    assert_equal((first + first).active, 2 * before)


def test_a_redraw_that_fails_half_way_does_not_lock_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = net()
    optimizer = wrap(model, resample_every=2)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        with monkeypatch.context() as patch:
            if step == 1:
                patch.setattr(optimizer._layout, "_begin_episodes", lambda _: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    optimizer.step()
            else:
                optimizer.step()


def test_loading_leaves_what_another_optimizer_has_taken() -> None:
    model = net()
    first = wrap(model)
    saved = first.state_dict()
    first.consolidate()
    second = wrap(model, seed=1)
    first.load_state_dict(saved)
    loss_of(model, 0).backward()
    second.step()
    assert kinds(second)["up.weight"] == "active"


def test_it_is_said_where_nothing_can_be_active() -> None:
    with pytest.warns(UserWarning, match=r"only packs gradients.*granularity='column'"):
        wrap(net(), granularity="element")
