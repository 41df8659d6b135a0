"""The optimizer wrapper: gather, base step, scatter, end of episode."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gmixout_optim import checkpoint, settings
from gmixout_optim.bases import Closure, guard
from gmixout_optim.dense import DenseLayout, PersistentLayout
from gmixout_optim.fresh_layers import warn_of_fresh_layers
from gmixout_optim.index_sets import Sampler
from gmixout_optim.layout import KEY, Draws, Layout, Slot
from gmixout_optim.mixed_tensor import Granularity, MixedTensor
from gmixout_optim.packed import PackedLayout
from gmixout_optim.packed_gradient import leave_gradients_of, pack_gradients_of
from gmixout_optim.param_groups import matches
from gmixout_optim.report import Report, make_report

if TYPE_CHECKING:
    from typing_extensions import Self

ResampleHook = Callable[["GMixoutOptimizer"], None]


class GMixoutOptimizer(Optimizer):
    r"""Wraps any :class:`torch.optim.Optimizer` so that a random part of the weights trains at a time.

    GMixout, or Intermittent Stochastic Regularization (arXiv 2510.06982), in optimizer steps. With live weights
    :math:`\theta`, anchor :math:`A` and active index set :math:`S` of density :math:`1 - p`, per tensor:

    .. math::
        \begin{aligned}
            &\textbf{an episode begins with } \theta = A \textbf{ and a new } S \\
            &\textbf{for } i = 1 \textbf{ to } k \textbf{ do} \\
            &\hspace{5mm} \theta_S \leftarrow \textbf{base step}(\theta_S, (\nabla_\theta f)_S) \\
            &A_S \leftarrow \lambda A_S + (1 - \lambda) \theta_S \\
            &\theta \leftarrow A
        \end{aligned}

    Off :math:`S` the live weights are the anchor, so everything is stored and computed on :math:`S` only.

    Args:
        base (Optimizer): the optimizer that does the steps, already holding the model's parameters. Its groups
            and its state are shared: a scheduler may hold either optimizer.
        mask_prob (float): p, the probability in [0, 1) that a weight sits at its anchor. A group with the key
            ``mask_prob`` has its own; with 0 its parameters are not mixed, and the base trains them as ever
            (default: 0.9)
        exclude (str or sequence of str): glob patterns of parameter names that are not mixed, such as
            ``"head.*"``. The base must have been built from ``model.named_parameters()`` (default: none)
        resample_every (int, optional): k, the length of an episode in optimizer steps; None for one episode
            without end (default: 20)
        anchor_decay (float): lambda in [0, 1], the weight of the old anchor in its moving average; 1 keeps the
            pretrained weights as anchor, 0 takes all that was learned. A group with the key ``anchor_decay`` has
            its own, which may change while training (default: 0.5)
        residual (str): ``"episodic"``: what an episode learned moves into the anchor at its end (GMixout);
            ``"persistent"``: the learned weights are kept whole beside the anchor, and each mask shows
            a part of them (Mixout) (default: "episodic")
        rescale (bool): Mixout's inverted scaling: the model computes with A + (phi - A) / (1 - p), where the
            base trains phi (default: False)
        lr_scale (float, optional): mixed weights train with so many times their group's ``lr``, once an episode has
            warmed up; parameters that are not mixed keep it, and so does the group. None for 1 / (1 - p) on the average
            over an episode, with which a weight that is active in a share 1 - p of the steps goes as far as the base
            alone would take it (at p = 0.9 it rises from 1 to 19 in an episode of 20 steps); for 1 with ``rescale``, the persistent
            residual, and LBFGS, which has one rate for all (default: None)
        episode_warmup (int, optional): steps at the start of each episode over which the learning rate of mixed weights
            rises linearly to its full value; 0 for none. The base's state starts fresh there, and a fresh Adam steps
            by the sign of one gradient. None for the whole episode, and for 0 with ``resample_every=None``, the
            persistent residual, whose state goes on, LBFGS, and Rprop and ASGD, which read ``lr`` ahead of the step.
            Steps are the episode's: call :meth:`resample` after unfreezing a layer. Optimizers that want one ``lr`` in
            all groups need 0 here and ``lr_scale=1.0`` (default: None)
        granularity (str or int): what is masked as one cell: ``"element"``, ``"row"`` (an output row or filter),
            or a number of consecutive elements; a tensor that the number does not divide falls back to elements.
            A group with the key ``granularity`` has its own (default: "element")
        sampler (str): ``"stratified"``: sets of constant size, spread evenly; ``"bernoulli"``: each cell
            independently (default: "stratified")
        layout (str): ``"packed"``: the base works on vectors of the active values, right for element-wise
            optimizers; ``"dense"``: on the parameters themselves, right for all; ``"auto"``: packed for optimizers
            known to be element-wise (default: "auto")
        grad_layout (str): ``"packed"``: as soon as backward has a mixed parameter's gradient, its active part is
            packed and the rest is freed; ``param.grad`` is then a :class:`PackedGradient`, which can be accumulated,
            scaled, clipped and zeroed, and refuses other operators. Needs the packed layout; not for
            DistributedDataParallel. ``"dense"``: gradients stay as they are (default: "dense")
        carry_state (bool): keep the base's state of cells that stay active when the set is redrawn, instead of
            a fresh start for all (default: False)
        stochastic_rounding (bool): write to bfloat16 and float16 parameters by stochastic instead of nearest
            rounding, so that what is smaller than their spacing is not lost at an episode's end. Trained values,
            anchors and the base's state are float32 either way. Needs the packed layout (default: False)
        seed (int): selects the index sets and the random bits of rounding, in [0, 2**63) (default: 0)
        compile (bool, optional): run the packed step and the redraw as code fused by :func:`torch.compile`; None
            for on with CUDA parameters, off otherwise (default: None)

    Raises:
        TypeError: ``base`` is not an optimizer or is a GMixoutOptimizer, or an argument has the wrong type.
        ValueError: an argument is out of range, or the layout does not fit the base.

    Example::

        >>> model = torch.nn.Sequential()
        >>> model.body, model.head = torch.nn.Linear(4, 64), torch.nn.Linear(64, 2)
        >>> optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-4)
        >>> optimizer = GMixoutOptimizer(optimizer, exclude="head.*")
        >>> model.head(model.body(torch.randn(8, 4))).square().mean().backward()
        >>> optimizer.step()
        >>> with optimizer.eval_weights():
        ...     _ = model.body(torch.randn(8, 4))  # validate here
        >>> optimizer.consolidate()  # after training: the model holds the weights to deploy
    """

    base: Optimizer

    def __init__(
        self,
        base: Optimizer,
        *,
        mask_prob: float = 0.9,
        exclude: str | Sequence[str] = (),
        resample_every: int | None = 20,
        anchor_decay: float = 0.5,
        residual: settings.Residual = "episodic",
        rescale: bool = False,
        lr_scale: float | None = None,
        episode_warmup: int | None = None,
        granularity: Granularity = "element",
        sampler: Sampler = "stratified",
        layout: settings.LayoutName = "auto",
        grad_layout: settings.GradLayout = "dense",
        carry_state: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        compile: bool | None = None,
    ) -> None:
        settings.check_base(base, GMixoutOptimizer)
        self.base = base
        self.run = settings.check_run(
            base=type(base).__name__,
            residual=residual,
            rescale=rescale,
            lr_scale=lr_scale,
            episode_warmup=episode_warmup,
            sampler=sampler,
            layout=layout,
            carry_state=carry_state,
            resample_every=resample_every,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
        )
        group_defaults = settings.check_group_keys(
            dict(mask_prob=mask_prob, anchor_decay=anchor_decay, granularity=granularity)
        )
        self._exclude = settings.check_exclude(exclude, base.param_groups)
        self._compile = None if compile is None else settings.check_flag("compile", compile)
        self.mixed: dict[Tensor, MixedTensor] = {}
        # Optimizer.__init__ would make groups and a state of its own. This sets up hooks and step alone: groups
        # and state stay the base's, one truth whichever of the two a scheduler or a loop holds.
        super().__setstate__({"defaults": {**base.defaults, **group_defaults}})
        self._resample_hooks: OrderedDict[int, ResampleHook] = OrderedDict()
        self._live: list[tuple[MixedTensor, Tensor]] | None = None
        self._in_step = False

        self.run["episode_warmup"] = settings.resolve_episode_warmup(self.run, base)
        mixed = self._find_mixed(base.param_groups, first_number=0)
        self.run["layout"] = settings.resolve_layout(
            base, self.run, [tensor.param for tensor in mixed]
        )
        # Mixed tensors whose gradients are to be packed once there are any: frozen ones, and all after consolidate().
        self._unpacked: set[MixedTensor] = set()
        self._packs_gradients = settings.check_needs_packed(base, self.run, grad_layout)
        self.layout = self._make_layout()
        warn_of_fresh_layers(mixed)
        self._adopt(base.param_groups, mixed)
        guard(base)

    @classmethod
    def mixout(cls, base: Optimizer, mask_prob: float = 0.9, **kwargs: Any) -> Self:
        """Mixout (Lee et al. 2020, arXiv 1909.11299), at 0.9 High-rate Mixout (arXiv 2510.06955).

        A persistent residual with inverted scaling, a new mask in every step, and the pretrained weights as
        anchor throughout. ``kwargs`` are those of the class and override these.
        """
        mixout = {
            "residual": "persistent",
            "rescale": True,
            "resample_every": 1,
            "anchor_decay": 1.0,
        }
        return cls(base, mask_prob=mask_prob, **{**mixout, **kwargs})

    @classmethod
    def random_masking(cls, base: Optimizer, mask_prob: float = 0.9, **kwargs: Any) -> Self:
        """One fixed random mask: a share of 1 - ``mask_prob`` of the weights is fine-tuned, the rest never moves.

        ``kwargs`` are those of the class and override these.
        """
        masking = {"resample_every": None, "anchor_decay": 0.0, "lr_scale": 1.0}
        return cls(base, mask_prob=mask_prob, **{**masking, **kwargs})

    # One truth for hyperparameters and state, see __init__.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's parameter groups, with the keys ``mask_prob``, ``anchor_decay`` and ``granularity``."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base's state, keyed by the model's parameters; packed where the base works on packed vectors."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def episode(self) -> int:
        """Index of the running episode, from 0."""
        episode: int = self.run["episode"]
        return episode

    @property
    def steps_in_episode(self) -> int:
        """Steps taken in the running episode."""
        steps: int = self.run["steps_in_episode"]
        return steps

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One step of the base on the active weights; ends the episode after its k-th.

        Args:
            closure (Callable, optional): evaluates the model anew and returns the loss.

        Returns:
            the closure's loss, None without one.

        Raises:
            RuntimeError: inside :meth:`eval_weights` or after :meth:`eval`, or where a mixed parameter has a sparse gradient. Nothing
                has changed then.
        """
        self._refuse_out_of_place("step()")
        settings.check_groups_still_fit(self.param_groups, self.run, self.mixed.values())
        only_makes_state = self._only_makes_state()
        with self._working_in_base():
            loss = self.layout.step(list(self.mixed.values()), closure)
        self._pack_again()
        if only_makes_state:
            return loss
        self.run["steps_in_episode"] += 1
        k = self.run["resample_every"]
        if k is not None and self.steps_in_episode >= k:
            self.resample()
        return loss

    @torch.no_grad()
    def resample(self) -> None:
        """End the episode now, move the anchor, and begin the next episode on new index sets."""
        self._refuse_out_of_place("resample()")
        settings.check_groups_still_fit(self.param_groups, self.run, self.mixed.values())
        with self._working_in_base():
            self.layout.end_episode()
            self._next_episode(self.run["carry_state"])
        for hook in list(self._resample_hooks.values()):
            hook(self)

    @torch.no_grad()
    def resync(self) -> None:
        """Take the weights now in the model as the anchor, after loading other weights into it, and begin a new episode.

        What the running episode learned is given up, and the base starts fresh on mixed tensors (with the
        persistent residual it keeps its state).
        """
        self._refuse_out_of_place("resync()")
        with self._working_in_base():
            self.layout.reanchor()
            self._next_episode(carry_state=False)

    @torch.no_grad()
    def consolidate(self) -> None:
        """End the episode, also when it is only partly run, and leave the model at the weights to deploy.

        Episodic: the anchor, to which the episode was added. Persistent: the mean over masks,
        A + d * s * (U - A). The model is then a plain model, and nothing of the method is left in it.
        """
        self._refuse_out_of_place("consolidate()")
        if self.run["residual"] == "persistent":
            for tensor, slot in self.layout.open_slots():
                self.layout.show(tensor, slot, self.layout.deployed(tensor, slot))
        elif self.steps_in_episode > 0:
            self.resample()
        if self._packs_gradients:
            # Also the parameters are plain ones; a further step has them packed again.
            for tensor in self.mixed.values():
                leave_gradients_of(tensor.param)
                self._unpacked.add(tensor)

    @contextmanager
    def eval_weights(self) -> Iterator[None]:
        """The model at exactly the weights that :meth:`consolidate` would leave, inside the block only.

        For validation in mid-training. The live weights are put back bit for bit, also when the block raises.
        ``step()`` inside raises a RuntimeError; a nested block changes nothing.
        """
        if self.run["evaluating"]:
            yield
            return
        self.eval()
        try:
            yield
        finally:
            self.train()

    @torch.no_grad()
    def eval(self) -> None:
        """Put the weights of :meth:`eval_weights` into the model until :meth:`train` is called.

        The pair is for loops that call it by themselves: Hugging Face's Trainer and Accelerate do. Called again
        it changes nothing. A checkpoint of model and optimizer saved in between holds the weights to deploy in
        the model; a run goes on from it exactly, once :meth:`train` has been called.
        """
        if self.run["evaluating"]:
            return
        self._refuse_in_step("eval()")
        live: list[tuple[MixedTensor, Tensor]] = []
        try:
            for tensor, slot in self.layout.open_slots():
                live.append((tensor, self.layout.live(tensor, slot)))
                self.layout.show(tensor, slot, self.layout.deployed(tensor, slot))
        except BaseException:
            self._show(live)
            raise
        self._live = live
        self.run["evaluating"] = True

    @torch.no_grad()
    def train(self) -> None:
        """Put the live weights back into the model after :meth:`eval`; otherwise change nothing."""
        if not self.run["evaluating"]:
            return
        if self._live is not None:
            self._show(self._live)
        else:  # saved in between, and loaded
            for tensor, slot in self.layout.open_slots():
                self.layout.write_theta(tensor, slot)
        self._live = None
        self.run["evaluating"] = False

    def _show(self, live: list[tuple[MixedTensor, Tensor]]) -> None:
        for tensor, weights in live:
            slot = self.layout.slot(tensor)  # where the parameter is now
            self.layout.show(tensor, slot, weights.to(tensor.param.device))

    def active_mask(self, param: Tensor) -> Tensor:
        """Which weights of a parameter train in the running episode: bool, the parameter's shape."""
        self._check_known(param)
        tensor = self.mixed.get(param)
        if tensor is None:
            return torch.ones_like(param, dtype=torch.bool)
        return tensor.mask(self.layout.draws.cells(tensor))

    @torch.no_grad()
    def anchor(self, param: Tensor) -> Tensor:
        """A dense copy of a mixed parameter's anchor, of its shape and dtype."""
        self._check_known(param)
        tensor = self.mixed.get(param)
        if tensor is None:
            raise ValueError(
                "param is not mixed (excluded, or mask_prob=0): it has no anchor. optimizer.report() lists what is"
            )
        return self.layout.dense_anchor(tensor)

    @torch.no_grad()
    def report(self) -> Report:
        """What is mixed and what is not and why, how far it has moved, and the bytes it takes; prints as a table."""
        return make_report(self)

    def register_resample_hook(self, hook: ResampleHook) -> RemovableHandle:
        """Call ``hook(optimizer)`` after each episode's end, the next episode having begun.

        Returns:
            a handle whose ``remove()`` takes the hook away.
        """
        if not callable(hook):
            raise TypeError(f"hook must be callable with the optimizer, got {hook!r}")
        handle = RemovableHandle(self._resample_hooks)
        self._resample_hooks[handle.id] = hook
        return handle

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients so that the norm of those that will be used is at most ``max_norm``.

        Used are the gradients of the active weights (times s with rescaling) and of parameters that are not
        mixed. :func:`torch.nn.utils.clip_grad_norm_` works too, but clips by the norm over all weights; of packed
        gradients by that over the active ones, not times s.

        Returns:
            the norm before clipping, a tensor without dimensions.
        """
        params = [
            param
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        used = []
        for param in params:
            tensor = self.mixed.get(param)
            used.append(param.grad if tensor is None else self.layout.used_gradient(tensor))
        norm = get_total_norm([grad for grad in used if grad.numel()], norm_type)
        clip_grads_with_norm_(params, max_norm, norm)
        return norm

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base, as :meth:`torch.optim.Optimizer.add_param_group`; it may set the group keys."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError(
                "optimizer parameters need to be organized in ordered collections, but the ordering of tensors in sets "
                "will change between runs. Please use a list instead."
            )
        params = [params] if isinstance(params, Tensor) else list(params)
        param_group["params"] = (
            params  # as torch does: a generator is not used up by a call that fails
        )
        named = bool(params) and isinstance(params[0], tuple)
        proposed = {**param_group, "params": [param[1] if named else param for param in params]}
        if named:
            proposed["param_names"] = [param[0] for param in params]
        count = sum(len(group["params"]) for group in self.param_groups)
        mixed = self._find_mixed([proposed], first_number=count)
        settings.resolve_layout(self.base, self.run, [tensor.param for tensor in mixed])
        warn_of_fresh_layers(mixed)
        self.base.add_param_group(param_group)
        for tensor in mixed:
            tensor.group = param_group
        self._adopt([param_group], mixed)

    def state_dict(self) -> dict[str, Any]:
        """The state of base and wrapper: exact in mid-episode, without index sets, which the seed gives again."""
        self._refuse_in_step("state_dict()")
        return checkpoint.state_dict(self)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the optimizer that made ``state_dict`` was; load the model's weights as well.

        Hyperparameters, seed and counters are taken from it.

        Raises:
            ValueError: it belongs to another model, to a bare optimizer or to other settings, or is damaged; the
                message says what differs, and nothing has changed.
        """
        self._refuse_in_step("load_state_dict()")
        checkpoint.load_state_dict(self, state_dict)
        self._live = None

    def __getstate__(self) -> dict[str, Any]:
        # As in torch, hooks stay behind; so does a scheduler's patch of this instance's step.
        left = {"step", "_resample_hooks"}
        return {
            key: value
            for key, value in self.__dict__.items()
            if key not in left and not key.startswith("_optimizer_")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_resample_hooks": OrderedDict(), **state})
        guard(self.base)
        for tensor in self.mixed.values():
            if tensor not in self._unpacked:
                self._pack_gradient(tensor)

    def slot_of(self, param: Tensor) -> Slot | None:
        """What the library keeps of a parameter in the running episode; None while it has never been trained."""
        tensor = self.mixed.get(param)
        return None if tensor is None else self.layout.trained_slot(tensor)

    def shows_deployed(self, tensor: MixedTensor, slot: Slot) -> bool:
        """Whether the model holds the weights to deploy: in eval, or in a persistent run that was consolidated."""
        if self.run["evaluating"]:
            return True
        consolidated = self.run["residual"] == "persistent"
        return consolidated and torch.equal(tensor.param, self.layout.deployed(tensor, slot))

    def _next_episode(self, carry_state: bool) -> None:
        self.run["episode"] += 1
        self.run["steps_in_episode"] = 0
        self.layout.begin_episode(carry_state)

    def _make_layout(self) -> Layout:
        draws = Draws(self.run)
        if self.run["residual"] == "persistent":
            return PersistentLayout(self.base, draws)
        if self.run["layout"] == "dense":
            return DenseLayout(self.base, draws)
        static_shapes = self.run["sampler"] == "stratified"
        return PackedLayout(self.base, draws, self._compile, static_shapes)

    def _find_mixed(self, groups: Iterable[dict[str, Any]], first_number: int) -> list[MixedTensor]:
        """The parameters of the groups that are mixed, checked; nothing is changed."""
        mixed = []
        number = first_number
        for group in groups:
            own = {**group, **settings.check_group_keys({**self.defaults, **group})}
            for place, param in enumerate(group["params"]):
                if not isinstance(param, Tensor):
                    raise TypeError(
                        f"optimizer can only optimize Tensors, but one of the params is {param!r}"
                    )
                name = checkpoint.name_of(group, place, number)
                if self.reason_unmixed(own, place) is None:
                    settings.check_parameter(name, param, own["granularity"])
                    mixed.append(
                        MixedTensor(
                            param,
                            group,
                            number,
                            name,
                            own["mask_prob"],
                            own["granularity"],
                            self.run["rescale"],
                            settings.lr_scale_of(self.run, self.base, own["mask_prob"]),
                            self.run,
                        )
                    )
                number += 1
        return mixed

    def reason_unmixed(self, group: dict[str, Any], place: int) -> str | None:
        """Why the parameter at ``place`` of a group is not mixed; None where it is."""
        names = group.get("param_names")
        if names is not None and matches(names[place], self._exclude):
            return "excluded"
        if group["mask_prob"] == 0:
            return "mask_prob is 0"
        if group["params"][place].numel() == 0:
            return "empty"
        return None

    def _adopt(self, groups: Iterable[dict[str, Any]], mixed: list[MixedTensor]) -> None:
        for group in groups:
            group.update(settings.check_group_keys({**self.defaults, **group}))
            group[KEY] = self.run
            for param in group["params"]:
                leave_gradients_of(param)
        with self.layout.apart():
            for tensor in mixed:
                self.mixed[tensor.param] = tensor
                self.layout.take_over(tensor)
                self._pack_gradient(tensor)

    def _pack_gradient(self, tensor: MixedTensor) -> None:
        """Have backward pack the parameter's gradients, if asked for; only what is not frozen can be hooked."""
        if self._packs_gradients and isinstance(self.layout, PackedLayout):
            if tensor.param.requires_grad:
                pack_gradients_of(tensor.param, tensor, self.layout)
                self._unpacked.discard(tensor)
            else:
                self._unpacked.add(tensor)

    def _pack_again(self) -> None:
        """What was frozen when it was wrapped, and what goes on after consolidate(), comes with a dense gradient once."""
        for tensor in [tensor for tensor in self._unpacked if tensor.param.grad is not None]:
            self._pack_gradient(tensor)

    def _check_known(self, param: Tensor) -> None:
        if not isinstance(param, Tensor):
            raise TypeError(f"param must be one of the optimizer's parameters, got {param!r}")
        if not any(param is known for group in self.param_groups for known in group["params"]):
            raise ValueError(
                f"param of shape {tuple(param.shape)} is not one of this optimizer's parameters"
            )

    @contextmanager
    def _working_in_base(self) -> Iterator[None]:
        """The base's state holds what is the base's own, and nobody else may call in."""
        self._in_step = True
        try:
            with self.layout.apart():
                yield
        finally:
            self._in_step = False

    def _only_makes_state(self) -> bool:
        """Whether this is the step that torch.distributed.checkpoint takes to have a fresh optimizer's state.

        Its learning rates and gradients are zero, and it is no step of the training.
        """
        return (
            self.episode == self.steps_in_episode == 0
            and not self.layout.slots
            and all(group["lr"] == 0 for group in self.param_groups)
            and not any(
                bool(param.grad.any())
                for group in self.param_groups
                for param in group["params"]
                if param.grad is not None
            )
        )

    def _refuse_out_of_place(self, call: str) -> None:
        self._refuse_in_step(call)
        if self.run["evaluating"]:
            raise RuntimeError(
                f"{call} inside eval_weights() or after eval(): the model holds the weights to deploy there, not those "
                "that are trained; leave the block or call optimizer.train() first"
            )

    def _refuse_in_step(self, call: str) -> None:
        if self._in_step:
            raise RuntimeError(
                f"{call} inside step(), from a closure or from a hook of the base: call it after the step"
            )
