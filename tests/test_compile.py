"""Compiled equals eager, and nothing is compiled again after the first redraw."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from gmixout_optim import GMixoutOptimizer, compiled, fused, packed
from tests.optimizers import ELEMENTWISE, Case
from tests.training import assert_equal

pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    fused.forget()
    counters.clear()
    yield
    torch._dynamo.reset()


def parameters(device: str = "cpu") -> list[nn.Parameter]:
    """Two of a shape, a filter in channels_last, a vector, a scalar."""
    torch.manual_seed(0)
    shapes = [(12, 10), (12, 10), (6, 4, 3, 3), (30,), ()]
    params = [nn.Parameter(torch.randn(shape).to(device)) for shape in shapes]
    params[2].data = params[2].data.to(memory_format=torch.channels_last)
    return params


def run(
    case: Case, compile: bool, steps: int = 10, device: str = "cpu", **settings: object
) -> tuple[list[torch.Tensor], GMixoutOptimizer, list[int]]:
    """Weights after some steps, the optimizer, and how many graphs had been compiled after each
    step."""
    params = parameters(device)
    optimizer = GMixoutOptimizer(
        case(params), resample_every=3, mask_prob=0.6, compile=compile, **settings
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    graphs = []
    for step in range(steps):
        for number, param in enumerate(params):
            generator = torch.Generator().manual_seed(100 * step + number)
            noise = torch.randn(param.shape, generator=generator).to(device)
            param.grad = torch.empty_like(param).copy_(0.5 * param.detach() + noise)
        optimizer.step()
        if (
            step > 4
        ):  # constant at first: a rate that starts to change later must not compile either
            scheduler.step()
        graphs.append(counters["stats"]["unique_graphs"])
    return [param.detach().clone() for param in params], optimizer, graphs


EAGER = ("SGD-dampening", "ASGD", "Rprop")  # they drop their state at a redraw


@pytest.mark.parametrize("case", [c for c in ELEMENTWISE if c.name not in EAGER], ids=repr)
def test_compiled_equals_eager_and_compiles_once(case: Case) -> None:
    eager, eager_optimizer, _ = run(case, compile=False)
    assert counters["stats"]["unique_graphs"] == 0
    compiled, optimizer, graphs = run(case, compile=True)
    assert graphs[1] > 0
    # Steps 3, 6 and 9 end episodes; the first of them compiles the redraw.
    assert graphs[3:] == [graphs[3]] * len(graphs[3:])
    assert not counters["graph_break"]
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    for param, other in zip(
        optimizer.param_groups[0]["params"], eager_optimizer.param_groups[0]["params"], strict=True
    ):
        assert_equal(optimizer.active_mask(param), eager_optimizer.active_mask(other))
    assert isinstance(optimizer.param_groups[0]["lr"], float)


def test_settings_compiled() -> None:
    case = next(case for case in ELEMENTWISE if case.name == "AdamW")
    settings = dict(rescale=True, anchor_decay=0.5)
    eager, _, _ = run(case, compile=False, **settings)
    compiled, optimizer, graphs = run(case, compile=True, **settings)
    assert graphs[3:] == [graphs[3]] * len(graphs[3:])
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    restored = copy.deepcopy(optimizer)  # compiled code stays behind
    assert_equal(restored.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("AdamW", dict(sampler="bernoulli")),
        ("AdamW", dict(layout="dense")),
        ("AdamW", dict(residual="persistent")),
        ("SGD-dampening", dict()),
    ],
    ids=str,
)
def test_what_would_compile_again_and_again_runs_eagerly(name: str, settings: dict) -> None:
    case = next(case for case in ELEMENTWISE if case.name == name)
    eager, _, _ = run(case, compile=False, steps=4, **settings)
    compiled, _, graphs = run(case, compile=True, steps=4, **settings)
    assert graphs == [0] * 4
    assert_equal(eager, compiled)


def adamw(params: list[nn.Parameter], compile: bool, **settings: object) -> GMixoutOptimizer:
    base = torch.optim.AdamW(params, lr=0.01, betas=(0.9, 0.99))
    return GMixoutOptimizer(base, mask_prob=0.6, compile=compile, resample_every=3, **settings)


def take_steps(
    params: list[nn.Parameter], optimizer: GMixoutOptimizer, steps: int, present: object = None
) -> None:
    """Steps on gradients that depend on the step; ``present(step, number)`` says which there
    are."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for number, param in enumerate(params):
            grad = torch.randn(param.shape, generator=generator)
            param.grad = None if present and not present(step, number) else grad
        optimizer.step()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_a_second_optimizer_of_the_same_shapes_compiles_nothing() -> None:
    first, second = parameters(), parameters()
    take_steps(first, adamw(first, True), 5)
    made = graphs()
    assert made > 0
    take_steps(second, adamw(second, True, seed=1), 5)
    assert graphs() == made


def test_more_optimizers_than_torch_recompiles_one_function_for() -> None:
    with torch._dynamo.config.patch(recompile_limit=2):
        for size in range(1, 5):
            params = [nn.Parameter(torch.randn(10 * size))]
            before = graphs()
            take_steps(params, adamw(params, True), 2)
            assert graphs() > before


def test_gradients_that_come_late_and_stay_away() -> None:
    def present(step: int, number: int) -> bool:
        return step > 3 or (number != 1 and (step + number) % 3 > 0)

    compiled, eager = parameters(), parameters()
    take_steps(compiled, adamw(compiled, True), 9, present)
    assert graphs() > 0
    take_steps(eager, adamw(eager, False), 9, present)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_unmixed_parameters_and_groups_step_too() -> None:
    def build(compile: bool) -> tuple[list[nn.Parameter], GMixoutOptimizer]:
        params = parameters()
        groups = [
            {"params": [("a", params[0]), ("head", params[3])], "lr": 0.03},
            {"params": [("b", params[1]), ("c", params[2])], "weight_decay": 0.3},
            {"params": [("plain", params[4])], "mask_prob": 0.0},
        ]
        base = torch.optim.AdamW(groups, lr=0.01)
        # Steps of half a unit would be rounded in more than the last digits of what is left of
        # them.
        settings = dict(exclude="head", compile=compile, resample_every=3, lr_scale=1.0)
        return params, GMixoutOptimizer(base, **settings)

    compiled, optimizer = build(True)
    take_steps(compiled, optimizer, 7)
    assert graphs() > 0
    eager, optimizer = build(False)
    take_steps(eager, optimizer, 7)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_options_that_change_in_every_step_compile_nothing() -> None:
    """And one that has changed for good compiles once."""
    params, others = parameters(), parameters()
    optimizer, eager = adamw(params, True), adamw(others, False)
    take_steps(params, optimizer, 4)
    take_steps(others, eager, 4)
    made = graphs()
    for beta1 in (0.8, 0.7, 0.6):
        for of, each in ((params, optimizer), (others, eager)):
            each.param_groups[0]["betas"] = (beta1, 0.99)
            take_steps(of, each, 1)
        assert graphs() == made
    take_steps(params, optimizer, 2)
    take_steps(others, eager, 2)
    again = graphs()
    assert again > made
    take_steps(params, optimizer, 4)
    take_steps(others, eager, 4)
    assert graphs() == again
    torch.testing.assert_close(params, others, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
@pytest.mark.parametrize("case", [c for c in ELEMENTWISE if c.name not in EAGER], ids=repr)
def test_a_learning_rate_of_zero(case: Case, rate: object) -> None:
    """Weights without a gradient so far, in a warm-up: nothing divides by zero."""
    params = parameters()
    optimizer = GMixoutOptimizer(case(params), mask_prob=0.6, compile=True)
    optimizer.param_groups[0].update(lr=rate, foreach=False)
    for param in params:
        param.grad = torch.zeros_like(param)
    for _ in range(3):
        optimizer.step()
    assert all(param.isfinite().all() for param in params)


def test_what_cannot_be_compiled_steps_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that were to be compiled, once, and the others of the step not again."""

    def fails(*_: object) -> None:
        raise TorchDynamoException("no compiler here")

    def build(compile: bool) -> tuple[list[nn.Parameter], GMixoutOptimizer]:
        params = parameters()
        groups = [
            {"params": params[:3]},
            {"params": params[3:], "mask_prob": 0.0},
        ]
        return params, adamw(groups, compile)

    params, optimizer = build(True)
    others, eager = build(False)
    monkeypatch.setattr(fused, "_compiled", fails)
    with pytest.warns(UserWarning, match="could not be compiled.*no compiler here"):
        take_steps(params, optimizer, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_steps(params, optimizer, 3)
    take_steps(others, eager, 3)
    take_steps(others, eager, 3)
    assert_equal(params, others)


@pytest.mark.parametrize(
    "error", [TorchDynamoException, RuntimeError, OSError, torch.OutOfMemoryError]
)
@pytest.mark.parametrize("when", ["as it compiles", "as it is first called", "half-way"])
@pytest.mark.parametrize(
    "where",
    [
        *("step_parts", "gather_trained", "scatter_moved", "stratified_cells_of_many"),
        "begin_episodes",
    ],
)
def test_a_compiler_that_fails_anywhere_costs_nothing_but_time(
    where: str, when: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a redraw, too: anchors have moved there, and the next episode has begun."""

    def fails(*_: object) -> None:
        raise error("no compiler here")

    _as_on_a_gpu(monkeypatch)
    make, failures = fused._compiled, []

    def compiles(function: Callable[..., None], *args: object) -> object:
        if function.__name__ != where:
            return make(function, *args)
        failures.append(function)
        if when == "as it compiles":
            fails()
        made = make(function, *args)
        run = made._run

        def runs_and_fails(*tensors: torch.Tensor) -> None:
            if when == "half-way":  # its first kernels have been launched
                run(*tensors)
            fails()

        made._run = runs_and_fails
        return made

    monkeypatch.setattr(fused, "_compiled", compiles)
    params, others = parameters(), parameters()
    optimizer, eager = adamw(params, True), adamw(others, False)
    with pytest.warns(UserWarning, match="could not be compiled.*no compiler here"):
        take_steps(params, optimizer, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_steps(params, optimizer, 4)
    take_steps(others, eager, 4)
    take_steps(others, eager, 4)
    assert len(failures) == 1
    assert (optimizer.episode, optimizer.steps_in_episode) == (2, 2)
    torch.testing.assert_close(params, others, rtol=1e-5, atol=1e-6)
    assert_equal(
        [optimizer.active_mask(param) for param in params],
        [eager.active_mask(other) for other in others],
    )


def test_compiled_code_that_has_run_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have written something already."""
    params = parameters()
    optimizer = adamw(params, True)
    take_steps(params, optimizer, 2)

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(optimizer._layout._plan.calls[0].fused, "_run", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()


@pytest.mark.parametrize("settings", [dict(), dict(rescale=True)], ids=["plain", "rescale"])
@pytest.mark.parametrize("anchor_decay", [0.0, 0.3, 0.9, 0.999, 1.0])
def test_invariants_8_and_9_hold_to_the_last_bit(anchor_decay: float, settings: dict) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(5000))]
    optimizer = adamw(params, True, anchor_decay=anchor_decay, **settings)
    take_steps(params, optimizer, 5)
    live = [param.detach().clone() for param in params]
    optimizer.eval()
    shown = [param.detach().clone() for param in params]
    saved = copy.deepcopy((shown, optimizer.state_dict()))
    optimizer.train()
    resumed_params = [nn.Parameter(weights.clone()) for weights in saved[0]]
    resumed = adamw(resumed_params, True, anchor_decay=anchor_decay, **settings)
    resumed.load_state_dict(saved[1])
    resumed.train()
    assert_equal(live, [param.detach() for param in resumed_params])
    take_steps(params, optimizer, 4)
    take_steps(resumed_params, resumed, 4)
    assert_equal(params, resumed_params)
    for of in (optimizer, resumed):
        of.eval()
    shown = [param.detach().clone() for param in params]
    optimizer.train()
    optimizer.consolidate()
    assert_equal(shown, [param.detach() for param in params])


def test_hooks_of_the_base_see_packed_gradients() -> None:
    params = parameters()
    optimizer = adamw(params, True)
    shapes = []
    optimizer.base.register_step_pre_hook(
        lambda base, *_: shapes.append(
            sorted(tuple(p.grad.shape) for group in base.param_groups for p in group["params"])
        )
    )
    take_steps(params, optimizer, 2)
    active = sorted((int(optimizer.active_mask(param).sum()),) for param in params)
    assert shapes == [active, active]


def test_copies_pickles_and_new_groups_step_compiled() -> None:
    params = parameters()
    optimizer = adamw(params, True)
    take_steps(params, optimizer, 4)
    both = [copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))]
    take_steps(params, optimizer, 4)
    for other_params, other in both:
        take_steps(other_params, other, 4)
        assert_equal(params, other_params)

    more, more_copied = nn.Parameter(torch.ones(40)), nn.Parameter(torch.ones(40))
    copied_params, copied = both[0]
    for added, to in ((more, optimizer), (more_copied, copied)):
        to.add_param_group({"params": [added]})
    made = graphs()
    take_steps([*params, more], optimizer, 4)
    assert graphs() > made
    take_steps([*copied_params, more_copied], copied, 4)
    assert_equal([*params, more], [*copied_params, more_copied])
    assert not torch.equal(more, torch.ones(40))


@pytest.mark.parametrize("granularity", ["row", "column"])
def test_wide_cells_step_eagerly_on_a_cpu(granularity: str) -> None:
    params = [nn.Parameter(torch.randn(shape)) for shape in [(6, 40), (40,)]]
    take_steps(params, adamw(params, True, granularity=granularity), 4)
    assert graphs() == 0


def test_anchor_decay_that_changes_compiles_nothing() -> None:
    results = []
    for compile in (True, False):
        params = parameters()
        optimizer = adamw(params, compile)
        made = []
        for decay in (0.9, 0.8, 0.7, 0.6):
            optimizer.param_groups[0]["anchor_decay"] = decay
            take_steps(params, optimizer, 3)
            made.append(graphs())
        assert made[1:] == [made[1]] * 3
        results.append(params)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (compiled, packed):
        monkeypatch.setattr(module, "is_launched", lambda tensor: True)
    monkeypatch.setattr(compiled.Compiler, "_wants", lambda self, member: True)


@pytest.mark.parametrize(
    "case", [c for c in ELEMENTWISE if c.name in ("SGD-momentum", "AdamW", "RAdam")], ids=repr
)
def test_the_form_for_all_tensors_at_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU compiles, on a CPU: large batches, and the base's foreach form."""
    _as_on_a_gpu(monkeypatch)
    eager, _, _ = run(case, compile=False)
    compiled, _, graphs = run(case, compile=True)
    assert graphs[3:] == [graphs[3]] * len(graphs[3:])
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", ["column", "row", 4])
def test_wide_cells_compiled_as_on_a_gpu(
    granularity: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _as_on_a_gpu(monkeypatch)
    runs = []
    for compile in (False, True):
        torch.manual_seed(0)
        shapes = [(6, 96), (6, 96), (4, 40, 3, 3), (30,)]
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        params[2].data = params[2].data.to(memory_format=torch.channels_last)
        optimizer = adamw(params, compile, granularity=granularity)
        take_steps(params, optimizer, 8)
        made = graphs()
        take_steps(params, optimizer, 4)
        assert graphs() == made
        assert (made > 0) == compile
        runs.append([param.detach() for param in params])
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_no_synchronisation_in_steps_and_few_kernels() -> None:
    params = [nn.Parameter(torch.randn(64, 32).cuda()) for _ in range(64)]
    optimizer = adamw(params, True)
    for param in params:
        param.grad = torch.randn_like(param)
    for _ in range(7):
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()  # the second of its episode
        for _ in range(8):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kernels = [event for event in profile.events() if event.device_type.name == "CUDA"]
    assert len(kernels) <= 16


@pytest.mark.gpu
@pytest.mark.parametrize("case", ELEMENTWISE, ids=repr)
def test_compiled_on_cuda(case: Case) -> None:
    eager, _, _ = run(case, compile=False, device="cpu")
    compiled, _, graphs = run(case, compile=True, device="cuda")
    assert graphs[3:] == [graphs[3]] * len(graphs[3:])
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)


def test_all_of_a_state_that_compiled_code_reads_goes_to_the_device() -> None:
    """Not the step count alone: NAdam keeps a product on the host, too."""
    from gmixout_optim.compiled import _move_to_device

    param = nn.Parameter(torch.ones(40, device="meta"))
    optimizer = GMixoutOptimizer(torch.optim.NAdam([param]), layout="packed")
    (member,) = optimizer._members
    state = {param: {"step": torch.tensor(1.0), "mu_product": torch.tensor(0.9), "other": 3}}
    _move_to_device([member], state)
    assert [item.device.type for item in list(state[param].values())[:2]] == ["meta", "meta"]


def test_the_capture_of_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would freeze the warm-up, and the index sets."""
    params = parameters()
    optimizer = adamw(params, False)
    take_steps(params, optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for call in (optimizer.step, optimizer.resample):
        with pytest.raises(RuntimeError, match=r"capture of a CUDA graph.*forward and backward"):
            call()
    assert_equal(before, optimizer.state_dict())
