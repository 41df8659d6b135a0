"""Active gradients in compiled code and in other people's models."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from gmixout_optim import GMixoutOptimizer, PackedGradient
from tests.test_active_gradients import Net, assert_moved_alike, kinds, net, tokens, wrap
from tests.training import weights

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


@pytest.fixture(autouse=True)
def _layers_of_any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("gmixout_optim.active_gradient.LEAST_MULTIPLY_ADDS", 0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Deep(nn.Module):
    """Blocks alike, an embedding, filters, and an activation in place."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 64)
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(depth))
        self.conv = nn.Conv1d(64, 40, 3, padding=1)
        self.head = nn.Linear(40, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = hidden + F.relu(block(hidden), inplace=True)
        return self.head(self.conv(hidden.transpose(1, 2)).tanh().mean(2))


def deep(dtype: torch.dtype = torch.float64) -> Deep:
    torch.manual_seed(0)
    return Deep().to(dtype)


def train(
    model: nn.Module, call: Callable[[Tensor], Tensor], grad_layout: str, **settings: Any
) -> GMixoutOptimizer:
    """Over several episodes, with gradients accumulated in each third step."""
    optimizer = wrap(model, grad_layout, base=partial(torch.optim.SGD, lr=0.1), **settings)
    for step in range(8):
        optimizer.zero_grad()
        call(tokens(step)).float().square().mean().backward()
        if step % 3 == 0:
            call(tokens(step + 100)).float().square().mean().backward()
        if grad_layout == "active":
            matrices = [name for name, kind in kinds(optimizer).items() if kind == "active"]
            assert len(matrices) == 5, matrices
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("granularity", ["column", "row"])
def test_a_compiled_model_is_one_graph_and_is_not_compiled_again(
    granularity: str, backend: str
) -> None:
    packed = deep()
    train(packed, packed, "packed", granularity=granularity)
    model = deep()
    counter = CompileCounterWithBackend(backend)
    optimizer = train(
        model,
        torch.compile(model, backend=counter, fullgraph=True),
        "active",
        granularity=granularity,
    )
    assert optimizer.episode == 2
    assert counter.frame_count == 1
    torch.testing.assert_close(weights(model), weights(packed))


def test_blocks_compiled_one_by_one_share_code_and_not_gradients() -> None:
    packed = deep()
    train(packed, packed, "packed")
    model = deep()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    train(model, model, "active")
    assert counter.frame_count == 1
    torch.testing.assert_close(weights(model), weights(packed))


@pytest.mark.parametrize("granularity", ["column", "row"])
def test_compiled_with_autocast(granularity: str) -> None:
    runs = []
    for grad_layout in ("packed", "active"):
        model = deep(torch.float32)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

        def call(batch: Tensor, compiled: Any = compiled) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return compiled(batch)

        train(model, call, grad_layout, granularity=granularity)
        runs.append(model)
    assert_moved_alike(runs[1], runs[0], deep(torch.float32))


def test_compiled_with_checkpoints_and_sizes_that_change() -> None:
    runs = []
    for grad_layout in ("packed", "active"):
        model = deep()

        def forward(batch: Tensor, model: Deep = model) -> Tensor:
            hidden = model.embedding(batch)
            for block in model.blocks:
                hidden = checkpoint(block, hidden, use_reentrant=False).tanh()
            return model.head(model.conv(hidden.transpose(1, 2)).mean(2))

        call = torch.compile(forward, backend="aot_eager", fullgraph=True)
        train(
            model, lambda batch, call=call: call(batch[:, : 5 + int(batch[0, 0]) % 4]), grad_layout
        )
        runs.append(weights(model))
    torch.testing.assert_close(*runs)


def test_of_a_draw_without_cells_nothing_is_computed_actively() -> None:
    """Sets of independent cells vary in size, down to none."""
    runs = []
    for grad_layout in ("packed", "active"):
        torch.manual_seed(0)
        model = nn.Linear(64, 40).double()
        optimizer = wrap(
            model,
            grad_layout,
            sampler="bernoulli",
            mask_prob=0.98,
            resample_every=1,
            lr_scale=1.0,
            base=partial(torch.optim.SGD, lr=1e-3),
        )
        call = torch.compile(model, backend="aot_eager")
        sizes = set()
        inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).double()
        for _ in range(8):
            optimizer.zero_grad()
            sizes.add(int(optimizer.active_mask(model.weight)[0].sum()))
            call(inputs).square().sum().backward()
            optimizer.step()
        assert 0 in sizes
        assert len(sizes) > 2
        optimizer.consolidate()
        runs.append(weights(model))
    torch.testing.assert_close(*runs)


def test_a_compiled_model_outlives_its_optimizer() -> None:
    """And is dense again, or another optimizer's."""
    model = deep()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = wrap(model)
    compiled(tokens(0)).sum().backward()
    assert isinstance(model.conv.weight.grad, PackedGradient)
    del optimizer
    gc.collect()
    model.zero_grad()
    compiled(tokens(0)).sum().backward()
    plain = deep()
    plain(tokens(0)).sum().backward()
    torch.testing.assert_close(
        [param.grad for param in model.parameters()], [param.grad for param in plain.parameters()]
    )
    model.zero_grad()
    optimizer = wrap(model, seed=1)
    compiled(tokens(0)).sum().backward()
    mask = optimizer.active_mask(model.conv.weight)
    torch.testing.assert_close(
        model.conv.weight.grad.dense(), torch.where(mask, plain.conv.weight.grad, 0.0)
    )


def test_sets_that_vary_in_size_do_not_compile_again() -> None:
    """Compiled code makes dense gradients for them."""
    model = deep()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = wrap(model, sampler="bernoulli", resample_every=1)
    for step in range(12):
        optimizer.zero_grad()
        compiled(tokens(step)).square().mean().backward()
        optimizer.step()
    assert counter.frame_count == 1
    assert set(kinds(optimizer).values()) == {"packed", "dense"}


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_weights_with_hooks_have_dense_gradients_in_compiled_code(kind: str) -> None:
    """Where they would be passed by; seen when the optimizer is built, and at each step."""

    def scale(grad: Tensor) -> Tensor:
        return grad * 0.5

    def scale_in_place(param: Tensor) -> None:
        param.grad.mul_(0.5)

    hook = scale if kind == "register_hook" else scale_in_place
    for is_early in (True, False):
        torch._dynamo.reset()
        model, plain = deep(), deep()
        weight = model.blocks[0].weight
        if is_early:
            getattr(weight, kind)(hook)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        optimizer = wrap(model, resample_every=None, base=partial(torch.optim.SGD, lr=0.0))
        compiled(tokens(0)).sum().backward()
        if not is_early:
            assert kinds(optimizer)["blocks.0.weight"] == "active"
            getattr(weight, kind)(hook)
            optimizer.step()
            optimizer.zero_grad()
            compiled(tokens(0)).sum().backward()
        plain(tokens(0)).sum().backward()
        expected = torch.where(optimizer.active_mask(weight), plain.blocks[0].weight.grad, 0.0)
        torch.testing.assert_close(weight.grad.dense(), 0.5 * expected)
        assert kinds(optimizer)["blocks.0.weight"] == "packed"
        assert kinds(optimizer)["blocks.1.weight"] == "active"


def test_what_compiled_code_cannot_give() -> None:
    """As docs/method.md says: it goes past the weight's node in the graph."""
    model = nn.Linear(64, 40)
    optimizer = wrap(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(torch.randn(4, 64)).sum()
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(loss, model.weight)
    compiled(torch.randn(4, 64)).sum().backward(inputs=[model.weight, model.bias])
    assert model.weight.grad is None
    assert model.bias.grad is not None
    loss = compiled(torch.randn(4, 64)).sum()
    optimizer.resample()
    loss.backward()
    with pytest.raises(RuntimeError, match="episode that has ended"):
        optimizer.step()
    model.zero_grad()
    loss = compiled(torch.randn(4, 64)).sum()
    del optimizer
    gc.collect()
    with pytest.raises(RuntimeError, match=r"GMixoutOptimizer .* is gone"):
        loss.backward()


# Models


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def timm_model(name: str, **settings: Any) -> nn.Module:
    from torchvision_compat import ensure_torchvision

    ensure_torchvision()
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=3, **settings)


def llama() -> nn.Module:
    from torchvision_compat import ensure_torchvision

    ensure_torchvision()
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 36, batch_first=True)
        self.bilinear = nn.Bilinear(36, 36, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.lstm(inputs)[0][:, -1]
        return self.bilinear(hidden, hidden)


class Normed(nn.Module):
    """What uses a weight otherwise than a linear layer, or makes it anew."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(40, 36))
        self.product = nn.Parameter(torch.randn(36, 40))
        self.transposed = nn.ConvTranspose1d(36, 40, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.normed(inputs) + inputs @ self.product.t()
        hidden = hidden + torch.einsum("bti,oi->bto", inputs, self.product)
        return self.transposed(hidden.transpose(1, 2))


VIT = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], int]] = {
    # How it is made, its loss, how many weights are computed actively.
    "timm ViT": (
        lambda: timm_model("vit_tiny_patch16_224", **VIT),
        lambda model: model(images()).square().sum(),
        9,
    ),
    "timm ConvNeXt": (
        lambda: timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(40, 40, 40, 40)),
        lambda model: model(images(64)).square().sum(),
        12,
    ),
    "timm EfficientNet-Lite": (
        lambda: timm_model("tf_efficientnet_lite0"),
        lambda model: model(images(64)).square().sum(),
        30,
    ),
    "timm ResNet-50": (
        lambda: timm_model("resnet50"),
        lambda model: model(images(64)).square().sum(),
        53,
    ),
    "Llama": (
        llama,
        lambda model: model(input_ids=tokens(0), labels=tokens(0)).loss,
        15,
    ),
    "LSTM": (Recurrent, lambda model: model(torch.ones(2, 5, 40)).square().sum(), 0),
    "other uses": (Normed, lambda model: model(torch.ones(2, 5, 40)).square().sum(), 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_model_are_the_dense_ones_on_s(name: str) -> None:
    make, loss, active = MODELS[name]
    torch.manual_seed(0)
    model = make().double() if name in ("LSTM", "other uses") else make()
    if name not in ("LSTM", "other uses"):
        model.eval()
    else:
        loss_of = loss

        def loss(model: nn.Module) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                torch.set_default_dtype(torch.float64)
                try:
                    return loss_of(model)
                finally:
                    torch.set_default_dtype(torch.float32)

    plain = copy.deepcopy(model)
    loss(plain).backward()
    optimizer = GMixoutOptimizer(
        torch.optim.AdamW(model.named_parameters()), granularity="column", grad_layout="active"
    )
    loss(model).backward()
    found = [tensor for tensor, kind in kinds(optimizer).items() if kind == "active"]
    assert len(found) == active, found
    for (key, param), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if other.grad is None:
            assert param.grad is None
            continue
        expected = torch.where(optimizer.active_mask(param), other.grad, 0.0)
        tolerance = 1e-4 * max(1e-3, float(other.grad.abs().max()))
        torch.testing.assert_close(
            param.grad.dense(),
            expected,
            rtol=1e-3,
            atol=tolerance,
            msg=lambda m, key=key: f"{key}: {m}",
        )
    optimizer.step()


def test_deep_copies_of_a_wrapped_model_train_apart() -> None:
    model = net()
    optimizer = wrap(model)
    other: Net
    other, other_optimizer = copy.deepcopy((model, optimizer))
    model(tokens(0)).sum().backward()
    assert other.up.weight.grad is None
    other(tokens(1)).sum().backward()
    assert other.up.weight.grad._member() is other_optimizer._members.get(other.up.weight)
