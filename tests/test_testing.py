"""gmixout_optim.testing: silent on what is right, and every check finds what it is for."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gmixout_optim import GMixoutOptimizer, bases, cells, layout, mixing, packed, residual
from gmixout_optim.testing import (
    InvariantError,
    InvariantMonitor,
    check_invariants,
    check_training,
    parametrize_with_checks,
    strategies,
)
from gmixout_optim.testing import trainings as trainings_module
from gmixout_optim.testing.checks import take_snapshot
from gmixout_optim.testing.trainings import CHECKS, plan_of
from tests.optimizers import DENSE_GRADIENTS, Case
from tests.training import loss_of, small_model, train, weights

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

NAMES = {int(name.split("_")[1]): name for name in CHECKS}
SETTINGS: dict[str, dict[str, Any]] = {
    "packed": dict(),
    "dense": dict(layout="dense"),
    "rescale": dict(rescale=True, granularity="row"),
    "persistent": dict(residual="persistent"),
    "mixout": dict(residual="persistent", rescale=True, resample_every=1),
    "packed gradients": dict(grad_layout="packed", granularity=4),
    "bernoulli": dict(sampler="bernoulli", exclude="head.*"),
}
EVERY = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def make(base: Callable[..., Any] = torch.optim.AdamW) -> Callable[[], Any]:
    def make_training() -> Any:
        model = small_model(torch.float32)
        return model, base(model.named_parameters(), lr=0.02), range(9)

    return make_training


LOSS: Any = loss_of


def check(number: int, base: Any = torch.optim.AdamW, steps: int = 9, **settings: Any) -> None:
    settings = {"mask_prob": 0.5, "resample_every": 4, **settings}
    CHECKS[NAMES[number]](plan_of(make(base), steps, LOSS, settings))


# Silence


@EVERY
def test_every_check_passes(settings: dict[str, Any]) -> None:
    results = check_training(
        make(), 9, loss=LOSS, **{"mask_prob": 0.5, "resample_every": 4, **settings}
    )
    assert list(results) == list(CHECKS)
    for name, result in results.items():
        assert result == "passed" or result.startswith("does not apply: "), name


@pytest.mark.parametrize("base", [torch.optim.LBFGS, torch.optim.Adafactor, torch.optim.SGD])
def test_every_check_passes_for_other_bases(base: Any) -> None:
    check_training(make(base), 7, loss=LOSS, mask_prob=0.5, resample_every=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY
def test_an_optimizer_is_left_as_it_was(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Checked in every step or never: the same training, without a warning."""
    runs = []
    for checked in (False, True):
        model = small_model(dtype)
        base = torch.optim.AdamW(model.named_parameters(), lr=0.02)
        optimizer = GMixoutOptimizer(base, **{"mask_prob": 0.5, "resample_every": 3, **settings})
        snapshot = None
        for step in range(10):
            train(model, optimizer, [step])
            if checked:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    snapshot = check_invariants(optimizer, snapshot=snapshot)
                if step == 4:
                    optimizer.eval()
                    snapshot = check_invariants(optimizer, snapshot=snapshot)
                    optimizer.train()
        runs.append(weights(model))
    assert all(map(torch.equal, *runs))


@given(strategies.runs())
def test_random_runs_hold_all_that_can_be_seen(run: strategies.RandomRun) -> None:
    snapshot = None
    steps = run.train(lambda params: torch.optim.AdamW(params, lr=0.01))
    for number, (_, optimizer) in enumerate(steps):
        if number == 0:
            monitor = InvariantMonitor(optimizer, every=1)
            monitor.start()
        snapshot = check_invariants(optimizer, snapshot=snapshot)
    monitor.stop()


# Broken optimizers. Each is found by the check that is named for it.


def after_each_step(patch: pytest.MonkeyPatch, do: Callable[[Any], None]) -> None:
    for kind in (packed.PackedLayout, sys.modules["gmixout_optim.dense"].DenseLayout):
        step = kind.step

        def broken(self: Any, closure: Any, step: Any = step) -> Any:
            loss = step(self, closure)
            with torch.no_grad():
                for member in self.members:
                    do(member)
            self.seal()
            return loss

        patch.setattr(kind, "step", broken)


def weights_off_s_move(patch: pytest.MonkeyPatch) -> None:
    def move(member: Any) -> None:
        member.param.data[~member.mask()] += 1e-3

    after_each_step(patch, move)


def an_anchor_moves_within_an_episode(patch: pytest.MonkeyPatch) -> None:
    after_each_step(patch, lambda member: member.slot and member.slot.anchor.mul_(1.01))


def the_set_is_not_redrawn(patch: pytest.MonkeyPatch) -> None:
    draw = cells.Cells.draw
    patch.setattr(
        cells.Cells, "draw", lambda self, seed, episode, *kernel: draw(self, seed, 0, *kernel)
    )


def the_anchor_takes_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mixing, "moved_anchor", lambda anchor, value, decay: value.clone())


def decay_is_never_quite_0_or_1(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        mixing,
        "moved_anchor",
        lambda anchor, value, decay: torch.lerp(anchor, value, 1 - min(max(decay, 1e-7), 1 - 1e-7)),
    )


def unmixed_gradients_are_scaled(patch: pytest.MonkeyPatch) -> None:
    enter = packed.enter_step

    def scaled(base: Any, *args: Any) -> Any:
        for group in base.param_groups:
            group["lr"] *= 1.0001
        return enter(base, *args)

    patch.setattr(packed, "enter_step", scaled)


def packed_gradients_are_others(patch: pytest.MonkeyPatch) -> None:
    module = sys.modules["gmixout_optim.packed_step"]
    used = module._used_gradient
    patch.setattr(module, "_used_gradient", lambda *args: used(*args).roll(1))


def moments_are_not_reset(patch: pytest.MonkeyPatch) -> None:
    def keep(*args: Any) -> list[Any]:
        return []

    patch.setattr(layout, "renew_state", keep)


def a_set_has_a_cell_twice(patch: pytest.MonkeyPatch) -> None:
    draw = cells.Cells.draw

    def twice(self: Any, *args: Any) -> Tensor:
        index = draw(self, *args)
        return torch.cat([index[:1], index[:-1]]) if len(index) > 1 else index

    patch.setattr(cells.Cells, "draw", twice)


def a_set_is_too_small(patch: pytest.MonkeyPatch) -> None:
    draw = cells.Cells.draw
    patch.setattr(cells.Cells, "draw", lambda self, *args: draw(self, *args)[:1])


def the_first_cells_are_always_drawn(patch: pytest.MonkeyPatch) -> None:
    draw = cells.Cells.draw

    def first(self: Any, *args: Any) -> Tensor:
        index = draw(self, *args)
        return torch.arange(len(index), dtype=index.dtype)

    patch.setattr(cells.Cells, "draw", first)


def a_set_in_use_is_not_that_of_the_seed(patch: pytest.MonkeyPatch) -> None:
    index = sys.modules["gmixout_optim.members"].Member.index
    patch.setattr(
        sys.modules["gmixout_optim.members"].Member,
        "index",
        lambda self, *kernel: (
            index(self, *kernel).flip(0).flip(0).roll(0)
            if self.run.episode == 0
            else self.cells.draw(self.run.seed, self.run.episode + 7)
        ),
    )


def a_counter_is_skipped_when_a_state_is_loaded(patch: pytest.MonkeyPatch) -> None:
    from gmixout_optim.settings import Run

    go_on = Run.go_on_from

    def skip(self: Any, saved: dict[str, Any]) -> None:
        go_on(self, {**saved, "steps_in_episode": 0})

    patch.setattr(Run, "go_on_from", skip)


def an_anchor_is_not_saved_exactly(patch: pytest.MonkeyPatch) -> None:
    restored = residual.Residual.restored

    def rounded(self: Any, *args: Any) -> Any:
        slot = restored(self, *args)
        slot.anchor = slot.anchor.bfloat16().to(slot.anchor.dtype)
        return slot

    patch.setattr(residual.Residual, "restored", rounded)


def eval_is_not_undone(patch: pytest.MonkeyPatch) -> None:
    def nothing(self: Any, member: Any) -> None:
        member.slot.live = None

    patch.setattr(residual.Residual, "show_live", nothing)


def eval_shows_the_live_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(residual.EpisodicResidual, "deployed", lambda self, member: self.theta(member))


def the_whole_residual_is_deployed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        residual.PersistentResidual, "deployed", lambda self, member: member.slot.value.clone()
    )


def blocks_draw_for_themselves(patch: pytest.MonkeyPatch) -> None:
    block = trainings_module.active_cells_in_block
    patch.setattr(
        trainings_module,
        "active_cells_in_block",
        lambda *args, seed, **kwargs: block(*args, seed=seed + 1, **kwargs),
    )


def the_storage_is_replaced(patch: pytest.MonkeyPatch) -> None:
    def replace(member: Any) -> None:
        member.param.data = member.param.data.clone()

    after_each_step(patch, replace)


def gradients_are_zeroed(patch: pytest.MonkeyPatch) -> None:
    def zero(member: Any) -> None:
        if member.param.grad is not None:
            member.param.grad.zero_()

    after_each_step(patch, zero)


def the_mask_is_not_applied(patch: pytest.MonkeyPatch) -> None:
    def write(self: Any, member: Any) -> None:
        member.param.detach().copy_(member.slot.value)

    patch.setattr(residual.PersistentResidual, "begin_episode", write)


BROKEN: list[tuple[int, Callable[[pytest.MonkeyPatch], None], dict[str, Any]]] = [
    (1, weights_off_s_move, {}),
    (1, weights_off_s_move, dict(layout="dense", granularity="row")),
    (1, the_mask_is_not_applied, dict(residual="persistent")),
    (2, an_anchor_moves_within_an_episode, {}),
    (2, an_anchor_moves_within_an_episode, dict(residual="persistent")),
    (2, the_set_is_not_redrawn, {}),
    (3, the_anchor_takes_all, {}),
    (3, the_anchor_takes_all, dict(layout="dense")),
    (3, the_anchor_takes_all, dict(residual="persistent")),
    (4, decay_is_never_quite_0_or_1, {}),
    (5, unmixed_gradients_are_scaled, {}),
    (6, packed_gradients_are_others, {}),
    (6, moments_are_not_reset, {}),
    (7, a_set_has_a_cell_twice, {}),
    (7, a_set_is_too_small, {}),
    (7, the_first_cells_are_always_drawn, {}),
    (7, the_set_is_not_redrawn, {}),
    (8, a_counter_is_skipped_when_a_state_is_loaded, {}),
    (8, an_anchor_is_not_saved_exactly, dict(layout="dense")),
    (9, eval_is_not_undone, {}),
    (9, eval_is_not_undone, dict(residual="persistent")),
    (9, eval_shows_the_live_weights, {}),
    (10, blocks_draw_for_themselves, {}),
    (11, the_whole_residual_is_deployed, {}),
    (12, the_storage_is_replaced, {}),
    (12, gradients_are_zeroed, {}),
]


@pytest.mark.parametrize(
    ("number", "breaks", "settings"),
    BROKEN,
    ids=[f"{n}-{f.__name__}-{'-'.join(map(str, s.values()))}" for n, f, s in BROKEN],
)
def test_the_checks_find_a_broken_optimizer(
    number: int,
    breaks: Callable[[pytest.MonkeyPatch], None],
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(number, **settings)
    breaks(monkeypatch)
    with pytest.raises(InvariantError) as caught:
        check(number, **settings)
    assert caught.value.invariant == number
    assert str(caught.value).startswith(f"invariant {number} (")


def test_every_check_is_shown_to_fail() -> None:
    assert {number for number, _, _ in BROKEN} == set(NAMES)


# One moment


@pytest.fixture
def running() -> Iterator[tuple[nn.Module, GMixoutOptimizer]]:
    model = small_model(torch.float32)
    base = torch.optim.AdamW(model.named_parameters(), lr=0.02)
    optimizer = GMixoutOptimizer(base, mask_prob=0.5, resample_every=5)
    train(model, optimizer, range(3))
    return model, optimizer


LIVE = {
    7: [a_set_in_use_is_not_that_of_the_seed, a_set_has_a_cell_twice],
    9: [eval_is_not_undone, eval_shows_the_live_weights],
}


@pytest.mark.parametrize("number", LIVE)
def test_check_invariants_finds_it_at_one_moment(
    number: int, running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = running
    check_invariants(optimizer)
    train(model, optimizer, range(3, 6))
    for breaks in LIVE[number]:
        with monkeypatch.context() as patch:
            breaks(patch)
            with pytest.raises(InvariantError, match=r"body\.weight: .*") as caught:
                check_invariants(optimizer)
            assert (caught.value.invariant, caught.value.tensor) == (number, "body.weight")


def test_check_invariants_against_a_moment_before(running: Any) -> None:
    model, optimizer = running
    member = optimizer._members.get(model.body.weight)
    snapshot = check_invariants(optimizer)
    assert snapshot.bytes == sum(4 * param.numel() for param in model.parameters())
    train(model, optimizer, [3])
    check_invariants(optimizer, snapshot=snapshot)

    off = (~member.mask()).nonzero()[:3]
    before = model.body.weight.detach().clone()
    model.body.weight.data[off[:, 0], off[:, 1]] += 1.0
    with pytest.raises(InvariantError, match="3 of 48 weights changed within") as caught:
        check_invariants(optimizer, snapshot=snapshot)
    assert (caught.value.invariant, caught.value.tensor, caught.value.count) == (
        1,
        "body.weight",
        3,
    )
    model.body.weight.data.copy_(before)
    check_invariants(optimizer, snapshot=snapshot)

    member.slot.anchor[:2] += 1.0
    with pytest.raises(InvariantError, match="the anchor of 2 active weights") as caught:
        check_invariants(optimizer, snapshot=snapshot)
    assert caught.value.invariant == 2
    member.slot.anchor[:2] -= 1.0

    model.body.weight.data = before.clone()
    with pytest.raises(InvariantError, match="its storage changed") as caught:
        check_invariants(optimizer, snapshot=snapshot)
    assert caught.value.invariant == 12


def test_check_invariants_over_redraws(running: Any) -> None:
    model, optimizer = running
    snapshot = check_invariants(optimizer)
    train(model, optimizer, range(3, 11))
    assert optimizer.episode == 2
    check_invariants(optimizer, snapshot=snapshot)
    member = optimizer._members.get(model.body.weight)
    masks = [member.cells.mask(member.cells.draw(0, episode)) for episode in range(2)]
    never = ~(masks[0] | masks[1] | member.mask())
    assert never.any()
    model.body.weight.data[never] += 1.0
    with pytest.raises(InvariantError, match="no episode since had active") as caught:
        check_invariants(optimizer, snapshot=snapshot)
    assert caught.value.invariant == 3
    assert caught.value.count == int(never.sum())


# The monitor


@EVERY
def test_a_monitor_reports_inactive_weights_whoever_wrote_them(settings: dict[str, Any]) -> None:
    model = small_model(torch.float32)
    base = torch.optim.AdamW(model.named_parameters(), lr=0.02)
    optimizer = GMixoutOptimizer(base, **{"mask_prob": 0.5, "resample_every": 5, **settings})
    with InvariantMonitor(optimizer, every=2, on_fail="warn") as monitor:
        train(model, optimizer, range(12))
        assert monitor.failures == []
        off = ~optimizer.active_mask(model.body.weight)
        model.body.weight.data[off] += 0.5
        if optimizer._run.residual == "persistent":
            model.body.weight.data[off] += 0.0
        with pytest.warns(UserWarning, match=r"invariant 1 .*body\.weight"):
            monitor.check()
        train(model, optimizer, range(12, 20))
    assert [error.invariant for error in monitor.failures][:1] == [1]
    assert not optimizer._resample_hooks
    assert not optimizer._resample_pre_hooks


def test_a_monitor_raises_out_of_the_step(running: Any) -> None:
    model, optimizer = running
    place = (~optimizer.active_mask(model.body.weight)).nonzero()[0]
    monitor = InvariantMonitor(optimizer, every=1)

    def watched() -> None:
        with monitor:
            model.body.weight.data[tuple(place)] += 1.0
            train(model, optimizer, [3])

    with pytest.raises(InvariantError, match=r"invariant 1 .*body\.weight: 1 of 48"):
        watched()
    train(model, optimizer, range(4, 8))  # it watches no longer


def test_a_monitor_begins_anew_after_resync_and_load(running: Any) -> None:
    model, optimizer = running
    state = optimizer.state_dict()
    with InvariantMonitor(optimizer, every=1):
        train(model, optimizer, range(3, 7))
        model.load_state_dict(small_model(torch.float32, seed=5).state_dict())
        optimizer.resync()
        train(model, optimizer, range(7, 13))
        optimizer.load_state_dict(state)
        model.load_state_dict(small_model(torch.float32, seed=6).state_dict())
        train(model, optimizer, range(3, 9))
        optimizer.consolidate()


@pytest.mark.filterwarnings("ignore")
def test_a_monitor_under_trainer(tmp_path: Path) -> None:
    import hf_trainer

    trainer = hf_trainer.make_trainer(tmp_path, 20, disable_tqdm=True, use_cpu=True)
    optimizer = trainer.optimizer
    with InvariantMonitor(optimizer, every=3) as monitor:
        trainer.train()
        assert monitor._steps == 20
    assert optimizer.episode > 1


@pytest.mark.filterwarnings("ignore")
def test_a_monitor_under_lightning(tmp_path: Path) -> None:
    import lightning_module

    class Watch(lightning_module.L.Callback):
        def on_train_start(self, trainer: Any, module: nn.Module) -> None:
            (optimizer,) = trainer.optimizers
            self.monitor = InvariantMonitor(optimizer, every=3)
            self.monitor.start()

        def on_train_end(self, trainer: Any, module: nn.Module) -> None:
            self.steps = self.monitor._steps
            self.monitor.stop()

    watch = Watch()
    trainer = lightning_module.make_trainer(
        2,
        callbacks=[watch],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(lightning_module.Module(), *lightning_module.loaders())
    assert watch.steps == trainer.global_step == 16


def test_misuse_of_a_monitor(running: Any) -> None:
    model, optimizer = running
    with pytest.raises(TypeError, match="must be a GMixoutOptimizer, got AdamW"):
        InvariantMonitor(optimizer.base)
    with pytest.raises(TypeError, match="must be a GMixoutOptimizer, got AdamW"):
        check_invariants(optimizer.base)
    for every, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="every must be"):
            InvariantMonitor(optimizer, every)
    with pytest.raises(ValueError, match="on_fail must be 'raise' or 'warn', got 'log'"):
        InvariantMonitor(optimizer, on_fail="log")
    monitor = InvariantMonitor(optimizer)
    monitor.stop()
    with monitor, pytest.raises(RuntimeError, match=r"watching already: stop\(\) it first"):
        monitor.start()
    with monitor:
        train(model, optimizer, [3])
    inside: list[str] = []

    def closure() -> Tensor:
        with pytest.raises(RuntimeError, match=r"check_invariants\(\) inside step"):
            check_invariants(optimizer)
        inside.append("closure")
        return torch.zeros(())

    optimizer.step(closure)
    assert inside


def test_the_hook_before_a_redraw(running: Any) -> None:
    model, optimizer = running
    seen: list[tuple[int, int]] = []
    handle = optimizer.register_resample_pre_hook(
        lambda opt: seen.append((opt.episode, opt.steps_in_episode))
    )
    train(model, optimizer, range(3, 6))
    optimizer.resample()
    assert seen == [(0, 5), (1, 1)]
    handle.remove()
    optimizer.resample()
    assert len(seen) == 2
    with pytest.raises(TypeError, match="hook must be callable"):
        optimizer.register_resample_pre_hook(3)


# Trainings


def test_misuse_of_trainings() -> None:
    good = make()
    with pytest.raises(ValueError, match=r"other weights of 0\.weight at its second call"):
        check_training(
            lambda: (m := nn.Sequential(nn.Linear(3, 3)), torch.optim.SGD(m.parameters()), [1])
        )
    once = good()
    with pytest.raises(ValueError, match=r"the same Parameter body\.weight twice"):
        check_training(lambda: once, loss=LOSS)
    with pytest.raises(TypeError, match=r"make\(\) must return \(model, base optimizer, batches\)"):
        check_training(lambda: good()[:2])
    with pytest.raises(TypeError, match="not a GMixoutOptimizer"):
        check_training(lambda: (good()[0], GMixoutOptimizer(good()[1]), [1]))
    with pytest.raises(ValueError, match="no batches"):
        check_training(lambda: (*good()[:2], []))
    with pytest.raises(TypeError, match="loss=lambda model, batch"):
        check_training(
            lambda: (
                m := small_model(torch.float32),
                torch.optim.SGD(m.parameters()),
                [torch.ones(4, 6)],
            )
        )
    with pytest.raises(TypeError, match="steps must be an int"):
        check_training(good, 4.5)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        check_training(good, 0)
    with pytest.raises(TypeError, match="make must be callable"):
        check_training(3)
    with pytest.raises(ValueError, match="expected_failed_checks names"):
        parametrize_with_checks([good], expected_failed_checks={"invariant_99": "unknown"})


@parametrize_with_checks(
    [make(), make(torch.optim.SGD)], steps=6, loss=LOSS, mask_prob=0.5, resample_every=2
)
def test_parametrized(check: Callable[[], None]) -> None:
    check()


def test_checks_are_selected_and_expected_to_fail(pytester_files: Any) -> None:
    listed, ran = pytester_files
    assert listed.count("make_one-invariant_8_resume_is_exact") == 1
    assert "1 xfailed" in ran
    assert "11 passed" in ran or "10 passed, 1 skipped" in ran


@pytest.fixture
def pytester_files(tmp_path: Any) -> tuple[str, str]:
    file = tmp_path / "test_mine.py"
    file.write_text(
        "import torch\n"
        "from torch import nn\n"
        "from gmixout_optim.testing import parametrize_with_checks\n"
        "def make_one():\n"
        "    torch.manual_seed(0)\n"
        "    model = nn.Linear(6, 5)\n"
        "    return model, torch.optim.AdamW(model.named_parameters()), [torch.randn(8, 6)]\n"
        "reasons = {'invariant_12_the_model_is_not_touched': 'a hook of ours replaces storage'}\n"
        "def loss(model, batch):\n"
        "    if torch.is_grad_enabled() and reasons.get('on'):\n"
        "        model.weight.data = model.weight.data.clone()\n"
        "    return model(batch).square().mean()\n"
        "@parametrize_with_checks([make_one], steps=5, loss=loss, mask_prob=0.5, "
        "expected_failed_checks={k: v for k, v in reasons.items()})\n"
        "def test_mine(check, request):\n"
        "    reasons['on'] = 'invariant_12' in request.node.name\n"
        "    check()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    outputs = [
        subprocess.run([*command, *more], capture_output=True, text=True, cwd=tmp_path).stdout
        for more in (["--collect-only"], ["-W", "ignore"])
    ]
    return outputs[0], outputs[1]


def test_hypothesis_and_pytest_are_imported_where_they_are_needed() -> None:
    code = (
        "import sys, gmixout_optim.testing; "
        "assert not {'hypothesis', 'pytest'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_snapshot_takes_what_the_mixed_weights_take() -> None:
    model = small_model(torch.bfloat16)
    base = torch.optim.AdamW(model.named_parameters(), lr=0.02)
    optimizer = GMixoutOptimizer(base, exclude="head.*")
    assert take_snapshot(optimizer).bytes == 2 * (6 * 8 + 8)
    assert bases.is_guarded(base)


# Every invariant, for every optimizer of torch.optim and any settings


@pytest.mark.parametrize("case", DENSE_GRADIENTS, ids=repr)
@settings(max_examples=max(3, settings().max_examples // 8))
@given(data=st.data())
def test_every_invariant_for_every_optimizer(case: Case, data: st.DataObject) -> None:
    drawn = data.draw(strategies.settings())
    if case.closure:
        drawn |= {"lr_scale": "auto", "episode_warmup": "auto"}
    model = data.draw(strategies.models((torch.float64,)))

    def make_training() -> Any:
        built = model.build()
        named = built.named_parameters()
        matrices = [pair for pair in named if pair[1].ndim == 2 or not case.matrices_only]
        return built, case(matrices), range(6)

    def loss(built: nn.Module, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(5, model.widths[0], generator=generator, dtype=torch.float64)
        hidden: Tensor = built.head(built.body(inputs))
        return hidden.square().mean()

    check_training(make_training, 6, loss=loss, exclude="head.*", **drawn)
