"""An optimizer around another: groups, state, state dicts, copies and hooks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from gmixout_optim import checkpoint, ranks, settings
from gmixout_optim.active_gradient import can_be_active, give_up_gradients, take_gradients
from gmixout_optim.bases import guard, initial_state, lr_is_zero
from gmixout_optim.fresh_layers import warn_of_fresh_layers
from gmixout_optim.layout import Layout
from gmixout_optim.members import Member, Members, parameters
from gmixout_optim.packed_gradient import own_gradients
from gmixout_optim.report import Report, make_report
from gmixout_optim.shards import (
    any_of_ranks,
    like,
    local_of,
    mesh_of,
    reshard,
    settled,
    total_norm,
)
from gmixout_optim.warn import warn

if TYPE_CHECKING:
    from typing_extensions import Self

P = ParamSpec("P")
T = TypeVar("T")


def eagerly(method: Callable[P, T]) -> Callable[P, T]:
    """Runs a public method without autograd, also in inference mode or in a compiled function."""

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        # Inference mode goes out first: leaving it turns autograd on.
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    eager: Callable[P, T] = _disable_dynamo(run)  # imports torch._dynamo at the first call only
    return eager


def _register(
    hook: Callable[[Any], None], hooks: OrderedDict[int, Callable[[Any], None]]
) -> RemovableHandle:
    if not callable(hook):
        raise TypeError(f"hook must be callable with the optimizer, got {hook!r}")
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


class WrappingOptimizer(Optimizer):
    """What of the wrapper is not the method.

    Groups and state are the base's, one truth whichever of the two a scheduler or a loop holds.
    """

    base: Optimizer

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Before Python finds fault with further arguments, which are the base's.
        if args and cls.__init__.__module__.startswith(__package__):
            settings.check_base(args[0], WrappingOptimizer)
        return super().__new__(cls)

    def _wrap(self, layout: Layout, mixed: list[Member], grad_layout: settings.GradLayout) -> None:
        self.base = base = layout.base
        self._layout = layout
        self._members: Members = layout.members
        self._run = layout.members.run
        self._grad_layout = grad_layout
        self._is_busy = False
        self._open_blocks = 0
        self._warned: set[str] = set()
        self._has_met = False  # whether ranks have found that they agree
        self._resample_pre_hooks: OrderedDict[int, Callable[[Any], None]] = OrderedDict()
        self._resample_hooks: OrderedDict[int, Callable[[Any], None]] = OrderedDict()
        # Optimizer.__init__ would make groups and a state of its own. This sets up hooks and step
        # alone.
        super().__setstate__({"defaults": {**base.defaults, **self._members.defaults}})
        self._adopt(base.param_groups, mixed)
        guard(base)
        if grad_layout == "active" and mixed and not any(map(can_be_active, mixed)):
            warn(
                "grad_layout='active' only packs gradients here: no mixed parameter has columns or "
                "rows as cells; use granularity='column'"
            )

    def __getattr__(self, name: str) -> Any:
        text = f"{type(self).__name__!r} object has no attribute {name!r}"
        base = self.__dict__.get("base")
        if base is not None and hasattr(base, name):
            text += f", but its base has: use optimizer.base.{name}, or pass on optimizer.base"
        raise AttributeError(text, name=name, obj=self)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's groups, with the keys ``mask_prob``, ``anchor_decay`` and ``granularity``."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        # A resumed run may bring the groups that were added before it was saved.
        added = groups[self._members.group_count :]
        mixed = self._checked(added)
        self.base.param_groups = groups
        self._follow()
        self._adopt(added, mixed)

    @property
    def state(self) -> Any:
        """The base's state by parameter; packed where the base works on packed vectors.

        Under ``"gmixout"`` it shows what the wrapper keeps of a parameter.
        """
        if not self._is_busy:
            self._layout.show_slots()
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def episode(self) -> int:
        """Index of the running episode, from 0."""
        return self._run.episode

    @property
    def steps_in_episode(self) -> int:
        """Steps taken in the running episode."""
        return self._run.steps_in_episode

    def active_mask(self, param: Tensor) -> Tensor:
        """Which weights of a parameter train in the running episode: bool, of its shape.

        A DTensor where the parameter is one.
        """
        member = self._member_of(param)
        if member is None:
            return torch.ones_like(param, dtype=torch.bool)
        return like(param, member.mask())

    @eagerly
    def anchor(self, param: Tensor) -> Tensor:
        """A dense copy of a mixed parameter's anchor, of its shape and dtype.

        A DTensor where the parameter is one.
        """
        member = self._member_of(param)
        if member is None:
            raise ValueError(
                "param is not mixed (excluded, or mask_prob=0): it has no anchor. "
                "optimizer.report() lists what is"
            )
        if member.slot is not None:
            self._layout.slot(member)  # where the parameter is now
            self._layout.residual.look(member)
        return like(param, self._layout.residual.dense_anchor(member))

    @eagerly
    def report(self) -> Report:
        """What is mixed, or why not, how far it has moved, and its bytes; prints as a table."""
        self._bind()
        return make_report(self._layout)

    def register_resample_hook(self, hook: Callable[[Any], None]) -> RemovableHandle:
        """Call ``hook(optimizer)`` after each episode's end, the next episode having begun.

        Returns:
            a handle whose ``remove()`` takes the hook away.
        """
        return _register(hook, self._resample_hooks)

    def register_resample_pre_hook(self, hook: Callable[[Any], None]) -> RemovableHandle:
        """Call ``hook(optimizer)`` before each episode's end: nothing has moved yet.

        Returns:
            a handle whose ``remove()`` takes the hook away.
        """
        return _register(hook, self._resample_pre_hooks)

    @eagerly
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients so that the norm of those that will be used is at most ``max_norm``.

        Used are the gradients of the active weights (times s with rescaling) and of parameters that
        are not mixed. :func:`torch.nn.utils.clip_grad_norm_` works too, but clips by the norm over
        all weights; of packed gradients by that over the active ones, not times s. Of parameters in
        pieces (DTensors) it is the norm over all ranks, which all have to call this.

        Returns:
            the norm before clipping, a 0-d tensor.
        """
        self._bind()
        every = dict.fromkeys(param for _, _, _, param in parameters(self.param_groups))
        params = [param for param in every if param.grad is not None]
        used = []
        for param in params:
            member = self._members.get(param)
            if member is None:
                param.grad = settled(param.grad, param)
                assert param.grad is not None
                used.append((param, local_of(param.grad)))
            else:
                used.append((param, self._layout.active_gradient(member)))
        norm = total_norm(used, norm_type)
        for mesh in {mesh_of(param) for param in params}:
            some = [param for param in params if mesh_of(param) == mesh]
            clip_grads_with_norm_(some, max_norm, norm)
        return norm

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Give up the gradients of all parameters, or fill them with zeros."""
        self._bind()
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as :meth:`torch.optim.Optimizer.add_param_group`; it may set group keys."""
        self._refuse_in_step("add_param_group()")
        self._bind()
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError(
                "optimizer parameters need to be organized in ordered collections, but the "
                "ordering of tensors in sets will change between runs. Please use a list instead."
            )
        # As torch does: a generator is not used up by a call that fails.
        params = param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
        named = bool(params) and isinstance(params[0], tuple)
        proposed = {**param_group, "params": [param[1] if named else param for param in params]}
        if named:
            proposed["param_names"] = [param[0] for param in params]
        mixed = self._checked([proposed])
        self.base.add_param_group(param_group)
        for member in mixed:
            member.group = param_group
        self._adopt([param_group], mixed)

    def state_dict(self) -> dict[str, Any]:
        """The state of base and wrapper: exact in mid-episode, and without index sets.

        Where parameters are in pieces on several ranks it is a collective call, as loading is. It
        holds the packed vectors of whole parameters then, as DTensors, and is loaded by any number
        of ranks.

        Raises:
            RuntimeError: some of these ranks do not call it, within the process group's timeout.
        """
        self._refuse_in_step("state_dict()")
        self._bind()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        ranks.meet(
            (member.param for member in self._members),
            "state_dict()",
            partial(checkpoint.form_of_state, self._layout),
        )
        with torch.no_grad():
            state_dict = checkpoint.make_state_dict(self._layout)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    @eagerly
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the optimizer that made ``state_dict`` was; load the model's weights as well.

        Hyperparameters, seed and counters are taken from it.

        Raises:
            ValueError: it belongs to another model, to a bare optimizer or to other settings, or is
                damaged; the message says what differs, and nothing has changed.
        """
        self._refuse_in_step("load_state_dict()")
        self._bind()
        if isinstance(state_dict, dict):
            state_dict = dict(state_dict)
            for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
                changed = pre_hook(self, state_dict)
                state_dict = state_dict if changed is None else changed
        leaves = tree_leaves(state_dict)
        ranks.meet(leaves, "load_state_dict()", partial(checkpoint.form_of, leaves))
        checkpoint.take_state_dict(self._layout, state_dict)
        self._has_met = False
        self._members.release()  # until the next step: what they held is given up
        self._take_gradients()
        # The model's weights were loaded, too.
        reshard({id(m.param) for m in self._members if m.cells.is_distributed})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # As in torch, hooks stay behind; so does a scheduler's patch of this instance's step.
        self._layout.hide_slots()
        with torch.no_grad():
            self._layout.look(but_converted=True)
        left = {"step", "_resample_pre_hooks", "_resample_hooks", "_is_busy", "_open_blocks"}
        return {
            key: value
            for key, value in self.__dict__.items()
            if key not in left and not key.startswith("_optimizer_")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        left_behind: dict[str, Any] = {"_is_busy": False, "_open_blocks": 0}
        left_behind |= {"_resample_pre_hooks": OrderedDict(), "_resample_hooks": OrderedDict()}
        of_base = {key: item for key, item in state.items() if key in ("state", "param_groups")}
        own = {key: item for key, item in state.items() if key not in of_base}
        super().__setstate__({**left_behind, **self.__dict__, **own})
        for key, item in of_base.items():
            setattr(self.base, key, item)
        guard(self.base)
        if self._members.was_holding:
            self._members.hold()
        self._layout.seal()  # the copied parameters have other versions
        for member in self._members:
            if member.packs_gradients:
                member.packs_gradients = False
                take_gradients(member, self._grad_layout == "active")

    def __repr__(self) -> str:
        run = self._run
        lines = [
            f"{type(self).__name__} (",
            f"  base: {run.base}, {run.residual} residual, {run.layout} layout, {run.sampler} "
            "sampler",
            f"  resample_every: {run.resample_every}, lr_scale: {run.lr_scale}, "
            f"episode_warmup: {run.episode_warmup}, rescale: {run.rescale}, seed: {run.seed}",
            f"  episode: {run.episode}, steps_in_episode: {run.steps_in_episode}",
        ]
        for number, group in enumerate(self.param_groups):
            lines.append(f"  parameter group {number}, {len(group['params'])} parameters")
            lines += [
                f"    {key}: {value}"
                for key, value in sorted(group.items())
                if key not in ("params", "param_names", settings.KEY)
            ]
        return "\n".join([*lines, ")"])

    def _bind(self) -> None:
        """Know the groups and parameters that took the places of others, or raise."""
        if not self._is_busy:  # else the base is shown others
            self._follow()
            self._members.bind(self.param_groups)

    def _check_groups(self) -> None:
        self._bind()
        self._members.check_groups(self.param_groups)

    def _follow(self) -> None:
        """Mix the parameters that took the places of others, unless the base trained these."""
        replaced = self._members.replaced(self.param_groups)
        if not replaced or any(param in self.base.state for param in replaced):
            return
        mixed = [replaced.get(member.param, member.param) for member in self._members]
        settings.resolve_layout(self.base, self._run, mixed)
        self._members.follow(replaced)
        for param in replaced:
            give_up_gradients(param)
        self._take_gradients()

    def _checked(self, added: Sequence[dict[str, Any]]) -> list[Member]:
        """The members in groups that are to be added. Nothing is changed."""
        self._members.hold()
        mixed = self._members.find(added, self._members.param_count)
        settings.resolve_layout(self.base, self._run, [member.param for member in mixed])
        warn_of_fresh_layers(mixed)
        return mixed

    def _adopt(self, groups: Sequence[dict[str, Any]], mixed: list[Member]) -> None:
        initial = initial_state(self.base) if mixed else None
        for member in mixed:
            self._layout.check_state(member)
            member.initial_state = initial
        self._members.adopt(groups, mixed)
        for group in groups:
            for param in group["params"]:
                if not self._members.is_held_elsewhere(param):
                    give_up_gradients(param)
        self._take_gradients()

    def _take_gradients(self) -> None:
        """Have backward make the gradients wanted, also after thawing, consolidate(), a redraw."""
        active = self._grad_layout == "active"
        if self._grad_layout != "dense":
            for member in self._members:
                is_taken = member.packs_gradients and not active
                if not is_taken and not self._members.is_held_elsewhere(member.param):
                    take_gradients(member, active)
            for param in self._unmixed():
                own_gradients(param, self._members)

    def _give_up_gradients(self) -> None:
        """Have them be what backward makes of them, until a further step."""
        for member in self._members:
            if member.packs_gradients:
                give_up_gradients(member.param)
                member.packs_gradients, member.gradient_kind = False, "dense"
        if self._grad_layout != "dense":
            for param in self._unmixed():
                give_up_gradients(param)

    def _unmixed(self) -> Iterator[Tensor]:
        for _, _, _, param in parameters(self.param_groups):
            if param not in self._members and not self._members.is_held_elsewhere(param):
                yield param

    def _next_episode(self, keep_foreign: bool = False) -> list[Member]:
        """End the episode and begin the next; returns the members that were left as they are."""
        for hook in list(self._resample_pre_hooks.values()):
            hook(self)
        with self._working_in_base():
            left, moved = self._layout.end_episode(keep_foreign)
            self._layout.begin_episode()
        self._take_gradients()
        self._layout.tell()
        self._warn_of_mixed(moved)
        for hook in list(self._resample_hooks.values()):
            hook(self)
        return left

    def _only_creates_state(self) -> bool:
        """Whether this step only creates state, as torch.distributed.checkpoint's first does.

        Its learning rates and gradients are zero, and it is no step of the training.
        """
        if (
            self._run.episode > 0
            or self._run.steps_in_episode > 0
            or self._members.trained()
            or not all(map(lr_is_zero, self.param_groups))
        ):
            return False
        params = [param for *_, param in parameters(self.param_groups)]
        grads = [local_of(param.grad) for param in params if param.grad is not None]
        return not any(any_of_ranks([any(bool(grad.any()) for grad in grads)], params))

    def _check_may_train(self, call: str) -> None:
        self._refuse_while_evaluating(call)
        is_on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if is_on_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{call} inside the capture of a CUDA graph: the learning rate of the episode's "
                "warm-up and its index sets come from the host, and a replay would repeat those of "
                "this step for ever; capture forward and backward alone"
            )
        self._check_groups()
        self._members.hold()
        if not self._has_met:
            ranks.check_not_replaced(param for *_, param in parameters(self.param_groups))
            ranks.check_alike(self._members, self.param_groups)
            self._has_met = True
        if self._run.residual == "persistent" and self._layout.shows_deployed:
            self._layout.show_live()  # after consolidate()

    def _warn_of_kept(self, written: list[Member], call: str) -> None:
        self._warn_once(
            written,
            call,
            f"were written since the last step, by a loaded checkpoint or a constraint: {call} "
            "keeps them as they are. To take them as what the episode learned and average them "
            "in, call resample() before",
        )

    def _warn_of_mixed(self, written: list[Member]) -> None:
        self._warn_once(
            written,
            "resample()",
            "were written by somebody else in the episode that ended, and the anchor moved toward "
            "them by 1 - anchor_decay. After loading a checkpoint call resync(), which takes it "
            "as the anchor; a constraint that is applied after every step needs nothing",
        )

    def _member_of(self, param: Tensor) -> Member | None:
        self._bind()
        if not isinstance(param, Tensor):
            raise TypeError(f"param must be one of the optimizer's parameters, got {param!r}")
        if not any(param is known for group in self.param_groups for known in group["params"]):
            raise ValueError(
                f"param of shape {tuple(param.shape)} is not one of this optimizer's parameters"
            )
        return self._members.get(param)

    @contextmanager
    def _working_in_base(self) -> Iterator[None]:
        """The base's state holds what is the base's own, and nobody else may call in."""
        self._layout.hide_slots()
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False

    def _refuse_while_evaluating(self, call: str) -> None:
        self._refuse_in_step(call)
        shown = "the model holds the weights to deploy there, not those that are trained"
        if self._open_blocks:
            raise RuntimeError(f"{call} inside eval_weights(): {shown}; leave the block first")
        if self._run.evaluating:
            raise RuntimeError(
                f"{call} after eval(), or after loading a checkpoint that was saved so: {shown}; "
                "load the model's weights, if any, then call optimizer.train()"
            )

    def _refuse_in_step(self, call: str) -> None:
        if self._is_busy:
            raise RuntimeError(
                f"{call} inside step(), from a closure or from a hook of the base: call it after "
                "the step"
            )

    def _warn_once(self, written: list[Member], kind: str, message: str) -> None:
        if written and kind not in self._warned:
            self._warned.add(kind)
            names = ", ".join(member.name for member in written[:3])
            more = f" and {len(written) - 3} more" if len(written) > 3 else ""
            warn(f"weights of {names}{more} {message}")
