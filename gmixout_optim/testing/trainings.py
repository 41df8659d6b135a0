"""Invariants that need trainings of their own: twin runs from a factory."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from math import log2
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.bases import ELEMENTWISE, is_own
from gmixout_optim.index_sets import active_cells_in_block
from gmixout_optim.settings import KEY
from gmixout_optim.testing.checks import (
    InvariantError,
    bits,
    check_eval_weights,
    check_index_sets,
    check_invariants,
    check_set,
    require_same,
)
from gmixout_optim.testing.monitor import InvariantMonitor

# Returns a model, an optimizer around its parameters, and batches; the same each time.
Make = Callable[[], tuple[nn.Module, Optimizer, Iterable[Any]]]
Loss = Callable[[nn.Module, Any], Tensor]


class NotApplicableError(Exception):
    """A check that says nothing about this optimizer and these settings."""


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss of models that return it: alone, as ``.loss`` or as ``["loss"]``."""
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, tuple | list):
        output = model(*batch)
    else:
        output = model(batch)
    loss = output["loss"] if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(
            "the model's output is no loss (a tensor of one element, .loss or ['loss']): pass "
            "loss=lambda model, batch: ..."
        )
    return loss


@dataclass
class Plan:
    """What the checks share: the factory, how a loss is computed, and the wrapper's settings."""

    make: Make
    steps: int
    loss: Loss
    settings: dict[str, Any]

    def start(self, **settings: Any) -> Training:
        """A training with the wrapper; ``settings`` override the plan's."""
        training = self.bare()
        training.optimizer = GMixoutOptimizer(training.optimizer, **{**self.settings, **settings})
        return training

    def bare(self) -> Training:
        made = self.make()
        if not isinstance(made, tuple) or len(made) != 3:
            raise TypeError(f"make() must return (model, base optimizer, batches), got {made!r}")
        model, base, batches = made
        if isinstance(base, GMixoutOptimizer):
            raise TypeError(
                "make() must return the base optimizer, not a GMixoutOptimizer: its settings are "
                "arguments of the check"
            )
        some = list(islice(batches, self.steps))
        if not some:
            raise ValueError("make() returned no batches")
        return Training(model, base, list(islice(cycle(some), self.steps)), self.loss)


class Training:
    """A model in training, a step at a time."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, batches: list[Any], loss: Loss
    ) -> None:
        self.model = model
        self.optimizer: Any = optimizer
        self.batches = batches
        self.loss = loss
        self.time = 0

    @property
    def params(self) -> list[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    @property
    def needs_closure(self) -> bool:
        return isinstance(getattr(self.optimizer, "base", self.optimizer), torch.optim.LBFGS)

    def backward(self) -> Tensor:
        """Gradients of the batch whose turn it is; dropout draws the same in all twins."""
        self.optimizer.zero_grad()
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(self.time)
            loss = self.loss(self.model, self.batches[self.time])
            loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def step(self) -> None:
        if self.needs_closure:
            self.optimizer.step(self.backward)
        else:
            self.backward()
            self.optimizer.step()
        self.time += 1

    def run(self, steps: int) -> Training:
        for _ in range(steps):
            self.step()
        return self

    def names(self) -> list[str]:
        known: dict[Tensor, str] = {param: name for name, param in self.model.named_parameters()}
        return [known.get(param, f"parameter {place}") for place, param in enumerate(self.params)]


def step_together(leader: Training, *others: Training) -> None:
    """A step of twins with the gradients of the first, but for bases that need a closure.

    So twins differ by the rounding of each step alone, not by what a network makes of it.
    """
    if leader.needs_closure:
        for training in (leader, *others):
            training.step()
        return
    leader.backward()
    for training in others:
        for param, other in zip(training.params, leader.params, strict=True):
            param.grad = None if other.grad is None else _dense(other.grad).clone()
    for training in (leader, *others):
        training.optimizer.step()
        training.time += 1


def _dense(grad: Any) -> Tensor:
    dense: Tensor = grad.dense() if hasattr(grad, "dense") and hasattr(grad, "active") else grad
    return dense


def compare(
    invariant: int, ours: Training, other: Training, what: str, tolerance: float = 0.0
) -> None:
    """Raise where weights of two trainings differ: bit for bit, or relative to a tensor's size."""
    for name, a, b in zip(ours.names(), ours.params, other.params, strict=True):
        if tolerance and b.numel():  # what is near counts as equal
            near = (a - b).detach().abs() <= tolerance * b.detach().abs().max()
            a = torch.where(near | (a - b).isnan(), b, a)
        text = f"after step {ours.time} {{count}} of {{total}} weights differ from {what}"
        require_same(invariant, name, a, b, text)


# The checks, in the order of the invariants


def _watched(plan: Plan, invariant: int, **settings: Any) -> None:
    training = plan.start(**settings)
    with InvariantMonitor._of_one(training.optimizer, invariant):
        training.run(plan.steps)


def check_off_s(plan: Plan) -> None:
    """1: off S the live weights are the anchor after every step."""
    _watched(plan, 1)


def check_within_episodes(plan: Plan) -> None:
    """2: within an episode neither the anchor nor S changes."""
    _watched(plan, 2)
    training = plan.start()
    optimizer, before = training.optimizer, None
    members = [member for member in optimizer._members if member.cells.density < 1]
    # Tensors of a few cells may get the set that they had. Of so many bits: once in 10**9.
    if sum(-log2(m.cells.density) * len(m.index()) for m in members) < 30:
        return
    for _ in range(plan.steps):  # and a redraw draws another set
        training.step()
        if optimizer.steps_in_episode == 0:
            sets = [member.index().tolist() for member in members]
            if sets == before:
                raise InvariantError(2, f"episode {optimizer.episode} has the sets of the last one")
            before = sets


def check_ema(plan: Plan) -> None:
    """3: the anchor moves on S only, at an episode's end, by the EMA formula."""
    _watched(plan, 3)
    training = plan.start()
    snapshot = None
    for _ in range(plan.steps):
        snapshot = check_invariants(training.optimizer, snapshot=snapshot)
        training.step()


def check_decay(plan: Plan) -> None:
    """4: with anchor_decay=1 the anchor never moves, with 0 an episode's end moves no weight."""
    training = plan.start(anchor_decay=1.0)
    for group in training.optimizer.param_groups:
        group["anchor_decay"] = 1.0
    optimizer, members = training.optimizer, list(training.optimizer._members)
    first = {member: optimizer.anchor(member.param) for member in members}
    for _ in range(plan.steps):
        training.step()
        for member in members:
            now, what = optimizer.anchor(member.param), "{count} anchors moved with anchor_decay=1"
            require_same(4, member.name, now, first[member], what)
    if optimizer._run.residual != "episodic":
        return
    training = plan.start(anchor_decay=0.0, rescale=False, resample_every=None)
    for group in training.optimizer.param_groups:
        group["anchor_decay"] = 0.0
    for step in range(plan.steps):
        training.step()
        if step % 3 == 2:
            live = [param.detach().clone() for param in training.params]
            training.optimizer.resample()
            for name, param, before in zip(training.names(), training.params, live, strict=True):
                if not training.optimizer._run.stochastic_rounding:
                    what = "{count} weights moved at an episode's end"
                    require_same(4, name, param, before, what)


def check_unmixed(plan: Plan) -> None:
    """5: with mask_prob=0 weights and state are the bare optimizer's, bit for bit."""
    ours, bare = plan.start(mask_prob=0.0), plan.bare()
    for group in ours.optimizer.param_groups:
        if group["mask_prob"] != 0:
            raise NotApplicableError("a parameter group has a mask_prob of its own")
    for _ in range(plan.steps):
        step_together(bare, ours)
        compare(5, ours, bare, "the bare optimizer's")
    for name, a, b in zip(ours.names(), ours.params, bare.params, strict=True):
        own, other = ours.optimizer.base.state.get(a, {}), bare.optimizer.state.get(b, {})
        for key, item in other.items():
            if isinstance(item, Tensor) and not _equal(own[key], item):
                raise InvariantError(5, f"the state {key!r} differs from the bare one's", name)


def check_layouts(plan: Plan) -> None:
    """6: the packed and the dense layout give the same weights."""
    probe = plan.start()
    if type(probe.optimizer.base) not in ELEMENTWISE:
        raise NotApplicableError(
            f"{type(probe.optimizer.base).__name__} is not known to be element-wise"
        )
    if probe.optimizer._run.residual != "episodic" or plan.settings.get("stochastic_rounding"):
        raise NotApplicableError("the settings have one layout only")
    if any(param.is_complex() or param.element_size() < 4 for param in probe.params):
        raise NotApplicableError("below float32 the layouts round differently")
    del probe
    packed, dense = plan.start(layout="packed"), plan.start(layout="dense", grad_layout="dense")
    for _ in range(plan.steps):
        step_together(dense, packed)
        eps = max(torch.finfo(param.dtype).eps for param in dense.params)
        compare(6, packed, dense, "the dense layout's", tolerance=1e3 * eps)


def check_sets(plan: Plan) -> None:
    """7: sets are valid and redrawn, and each cell is active as often as it should be."""
    optimizer, episodes = plan.start().optimizer, max(plan.steps, 30)
    for member in optimizer._members:
        cells, run = member.cells, member.run
        hits = torch.zeros(member.param.shape, dtype=torch.float64)
        for episode in range(episodes):
            index = cells.draw(run.seed, episode)
            check_set(member, index)
            hits += cells.mask(index).cpu()
        d, count = cells.density, hits.numel() // max(1, cells.grid.width)
        if d == 1 or count < 2:
            continue
        # Of independent cells the sum of squares is of mean 1 and variance 2 / cells; a fixed
        # number of them varies less. Six standard deviations: one false alarm in 10**8.
        spread = float(((hits - episodes * d) ** 2).mean() / (episodes * d * (1 - d)))
        if abs(spread - 1) > 6 * (2 / count + 1 / (count * episodes * d)) ** 0.5 + 2 / count:
            raise InvariantError(
                7,
                f"over {episodes} episodes cells are not active equally often: their counts vary "
                f"{spread:.2f} times as much as those of independent draws",
                member.name,
            )
    check_index_sets(optimizer)


def check_resume(plan: Plan) -> None:
    """8: saved, loaded and gone on, at several steps, is never having stopped."""
    whole = plan.start()
    stops = sorted({plan.steps // 5, plan.steps // 2, plan.steps // 2 + 1})
    resumed: list[Training] = []
    for step in range(plan.steps):
        if step in stops:
            twin, buffer = plan.start(), io.BytesIO()
            torch.save([whole.model.state_dict(), whole.optimizer.state_dict()], buffer)
            buffer.seek(0)
            model, state = torch.load(buffer, weights_only=True)
            twin.model.load_state_dict(model)
            twin.optimizer.load_state_dict(state)
            twin.time = whole.time
            resumed.append(twin)
        step_together(whole, *resumed)
        for twin in resumed:
            compare(8, twin, whole, "the training's that was not interrupted")
            _compare_states(twin.optimizer, whole.optimizer)


def _compare_states(ours: GMixoutOptimizer, other: GMixoutOptimizer) -> None:
    a, b = (each.state_dict() for each in (ours, other))
    for mine, its in zip(a["param_groups"], b["param_groups"], strict=True):
        if mine[KEY] != its[KEY]:
            raise InvariantError(8, f"counters are {mine[KEY]}, not {its[KEY]}")
    for number, entry in b["state"].items():
        for key, item in entry.items():
            if isinstance(item, Tensor) and is_own(ours.base, key):
                mine = a["state"][number][key]
                if not _equal(mine, item):
                    raise InvariantError(8, f"the state {key!r} of parameter {number} differs")


def check_shown(plan: Plan) -> None:
    """9: eval_weights() shows what consolidate() leaves, and then the live weights again."""
    shown, consolidated = plan.start(), plan.start()
    for step in range(plan.steps):
        step_together(shown, consolidated)
        check_eval_weights(shown.optimizer)
        if step % 7 == 3 or step == plan.steps - 1:
            live = copy.deepcopy([param.detach() for param in shown.params])
            try:
                with shown.optimizer.eval_weights():
                    raise KeyError
            except KeyError:
                pass
            for name, param, before in zip(shown.names(), shown.params, live, strict=True):
                what = "{count} live weights were not put back after an error"
                require_same(9, name, param, before, what)
    for _ in range(2):
        consolidated.optimizer.consolidate()
        with shown.optimizer.eval_weights():
            compare(9, shown, consolidated, "those that consolidate() leaves")


def check_devices(plan: Plan) -> None:
    """10: the same sets on the CPU, and of blocks that a rank would hold."""
    optimizer = plan.start().optimizer
    for member in optimizer._members:
        run, grid = member.run, member.cells.grid
        if not grid.contiguous:
            continue
        whole = member.cells.draw(run.seed, run.episode).cpu().long()
        third = -(-grid.cells // 3)
        parts = []
        for start in range(0, grid.cells, third):
            part = active_cells_in_block(
                (grid.cells,),
                1 - member.cells.mask_prob,
                offsets=(start,),
                sizes=(min(third, grid.cells - start),),
                seed=run.seed,
                tensor=member.cells.number,
                episode=run.episode,
                sampler=run.sampler,
            )
            parts.append(part.long() + start)
        if not torch.equal(torch.cat(parts), whole):
            raise InvariantError(10, "the sets of its thirds are not the whole's", member.name)


def check_mean_over_masks(plan: Plan) -> None:
    """11: with the persistent residual the mean over masks of theta is deployed."""
    settings = {**plan.settings, "residual": "persistent", "layout": "auto"}
    settings.update(grad_layout="dense", stochastic_rounding=False)
    for rescale in (False, True):
        training = Plan(plan.make, plan.steps, plan.loss, settings).start(rescale=rescale)
        for _ in range(plan.steps):
            training.step()
            check_eval_weights(training.optimizer)
        # Over masks a weight is theta_on in a share d and A in the rest.
        for member in training.optimizer._members.trained():
            mask, d = member.mask(), member.cells.density
            anchor = training.optimizer.anchor(member.param)
            mean = anchor + d * (member.param.detach() - anchor)
            with training.optimizer.eval_weights():
                shown = member.param.detach().clone()
            size = anchor.abs() + (member.param.detach() - anchor).abs()
            eps = torch.finfo(shown.dtype).eps
            wrong = ((shown - mean).abs() > 16 * eps / d * size) & mask & size.isfinite()
            count = int(wrong.sum())
            if count:
                raise InvariantError(
                    11, f"{count} weights to deploy are not the mean over masks", member.name, count
                )


def check_untouched(plan: Plan) -> None:
    """12: modules, Parameters, storages, keys, shapes, dtypes and gradients stay as they are."""
    training = plan.start()
    model, before = training.model, looks(training.model)
    for _ in range(plan.steps):
        if training.needs_closure:
            training.step()
        else:
            training.backward()
            grads = [param.grad for param in training.params]
            kept = [None if grad is None else _dense(grad).clone() for grad in grads]
            training.optimizer.step()
            training.time += 1
            for name, param, grad, values in zip(
                training.names(), training.params, grads, kept, strict=True
            ):
                same = param.grad is grad
                if not same or (grad is not None and not _same(grad, values)):
                    raise InvariantError(12, "step() changed its gradient", name)
        with training.optimizer.eval_weights():
            shown = looks(model)
        for now in (shown, looks(model)):
            for what, a in before.items():
                if now[what] != a:
                    raise InvariantError(12, f"{what} changed in step {training.time}")
    training.optimizer.consolidate()
    if looks(model) != before:
        raise InvariantError(12, "consolidate() changed more than weights")


def _same(grad: Any, values: Tensor | None) -> bool:
    if values is None or hasattr(grad, "active"):
        return True  # packed gradients of an episode that has ended cannot be read
    return _equal(grad, values)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether values are equal; NaN is equal to itself."""
    return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def looks(model: nn.Module) -> dict[str, Any]:
    """What of a model must stay as it is."""
    named = list(model.named_parameters(remove_duplicate=False))
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "Parameters": [
            (name, id(param), param.requires_grad, param.is_leaf) for name, param in named
        ],
        "storages": [(name, param.data_ptr(), param.stride()) for name, param in named],
        "keys, shapes or dtypes": [
            (key, item.shape, item.dtype)
            for key, item in model.state_dict().items()
            if isinstance(item, Tensor)
        ],
        "buffers": [(name, id(buffer)) for name, buffer in model.named_buffers()],
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in model.modules()
        ],
    }


CHECKS: dict[str, Callable[[Plan], None]] = {
    "invariant_1_off_s_weights_are_the_anchor": check_off_s,
    "invariant_2_within_an_episode_nothing_else_changes": check_within_episodes,
    "invariant_3_the_anchor_moves_by_the_ema_formula": check_ema,
    "invariant_4_anchor_decay_0_and_1": check_decay,
    "invariant_5_unmixed_is_the_bare_optimizer": check_unmixed,
    "invariant_6_packed_equals_dense": check_layouts,
    "invariant_7_index_sets": check_sets,
    "invariant_8_resume_is_exact": check_resume,
    "invariant_9_eval_weights": check_shown,
    "invariant_10_the_same_sets_everywhere": check_devices,
    "invariant_11_the_mean_over_masks": check_mean_over_masks,
    "invariant_12_the_model_is_not_touched": check_untouched,
}


def plan_of(make: Make, steps: int, loss: Loss | None, settings: dict[str, Any]) -> Plan:
    if not callable(make):
        raise TypeError(f"make must be callable, got {type(make).__name__}")
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"steps must be an int, got {steps!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}")
    return Plan(make, steps, loss or default_loss, settings)


def check_repeatable(plan: Plan) -> None:
    """Raise a ValueError where two calls of make() give different weights."""
    first, second = plan.bare(), plan.bare()
    for name, a, b in zip(first.names(), first.params, second.params, strict=True):
        if a is b:
            raise ValueError(f"make() returned the same Parameter {name} twice: build a new model")
        if not torch.equal(bits(a), bits(b)):
            raise ValueError(
                f"make() returned other weights of {name} at its second call: set a seed in it "
                "(torch.manual_seed(0)) and load the same checkpoint"
            )


def check_training(
    make: Make, steps: int = 45, *, loss: Loss | None = None, **settings: Any
) -> dict[str, str]:
    """Train twins of a model with an optimizer and check every invariant that applies.

    Each check runs trainings of its own, ten to twenty of them together.

    Args:
        make: returns ``(model, base optimizer, batches)``, anew and the same each time: a seed is
            set in it. The base is bare; batches are repeated where there are fewer than ``steps``.
        steps: of each training. With the default of 45 there are two redraws at
            ``resample_every=20``.
        loss: ``loss(model, batch)``; without it the batch is passed to the model, which returns
            the loss (a tensor, ``.loss`` or ``["loss"]``).
        **settings: of the GMixoutOptimizer, as they are used in training.

    Returns:
        what came of each check by its name: "passed", or why it does not apply.

    Raises:
        InvariantError: names the invariant, the parameter and how many weights break it.
        TypeError, ValueError: an argument is of the wrong kind, or ``make`` is not repeatable.
    """
    plan = plan_of(make, steps, loss, settings)
    check_repeatable(plan)
    results = {}
    for name, check in CHECKS.items():
        try:
            check(plan)
            results[name] = "passed"
        except NotApplicableError as reason:
            results[name] = f"does not apply: {reason}"
    return results


def parametrize_with_checks(
    makes: Sequence[Make],
    *,
    steps: int = 45,
    loss: Loss | None = None,
    expected_failed_checks: Mapping[str, str] | None = None,
    **settings: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A pytest decorator: every invariant for every factory, one test each.

    Args:
        makes, steps, loss, settings: of :func:`check_training`.
        expected_failed_checks: the reason by the name of a check that is known to fail; the test is
            an xfail then.

    Raises:
        ValueError: a name in ``expected_failed_checks`` is not that of a check.

    Example::

        @parametrize_with_checks([make_vit], exclude="head.*")
        def test_my_training(check):
            check()
    """
    import pytest

    known = dict(expected_failed_checks or {})
    unknown = sorted(set(known) - set(CHECKS))
    if unknown:
        raise ValueError(f"expected_failed_checks names {unknown}: the checks are {list(CHECKS)}")

    def bound(make: Make, name: str) -> Callable[[], None]:
        plan = plan_of(make, steps, loss, settings)

        def check() -> None:
            check_repeatable(plan)
            try:
                CHECKS[name](plan)
            except NotApplicableError as reason:
                pytest.skip(str(reason))

        return check

    cases = [
        pytest.param(
            bound(make, name),
            id=f"{getattr(make, '__name__', type(make).__name__)}-{name}",
            marks=[pytest.mark.xfail(reason=known[name], strict=True)] if name in known else [],
        )
        for make in makes
        for name in CHECKS
    ]
    return pytest.mark.parametrize("check", cases)
