"""The optimizer wrapper: gather, base step, scatter, end of episode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from torch.optim import Optimizer

from gmixout_optim import settings
from gmixout_optim.bases import Closure, has_rates
from gmixout_optim.cells import Granularity
from gmixout_optim.dense import DenseLayout
from gmixout_optim.fresh_layers import warn_of_fresh_layers
from gmixout_optim.index_sets import Sampler
from gmixout_optim.members import Member, Members
from gmixout_optim.packed import PackedLayout
from gmixout_optim.param_groups import check_exclude
from gmixout_optim.rates import Rates
from gmixout_optim.wrapper import WrappingOptimizer, eagerly

if TYPE_CHECKING:
    from typing_extensions import Self


class GMixoutOptimizer(WrappingOptimizer):
    r"""Wraps a torch optimizer so that a random part of the weights trains at a time.

    GMixout, or Intermittent Stochastic Regularization (arXiv 2510.06982), in optimizer steps. With
    live weights :math:`\theta`, anchor :math:`A` and active index set :math:`S` of density
    :math:`1 - p`, per tensor:

    .. math::
        \begin{aligned}
            &\textbf{an episode begins with } \theta = A \textbf{ and a new } S \\
            &\textbf{for } i = 1 \textbf{ to } k \textbf{ do} \\
            &\hspace{5mm} \theta_S \leftarrow \textbf{base step}(\theta_S, (\nabla_\theta f)_S) \\
            &A_S \leftarrow \lambda A_S + (1 - \lambda) \theta_S \\
            &\theta \leftarrow A
        \end{aligned}

    Off :math:`S` the live weights are the anchor, so everything is stored and computed on :math:`S`
    only. The model holds the truth: weights that somebody else changes between two steps are what
    the next step works on.

    Args:
        base (Optimizer): the optimizer that does the steps, already holding the model's parameters,
            after ``fully_shard()``. It shares groups and state: a scheduler may hold either one.
        mask_prob (float): p, the probability in [0, 1) that a weight sits at its anchor. A group
            with the key ``mask_prob`` has its own; with 0 its parameters are not mixed, and the
            base trains them as ever (default: 0.9)
        exclude (str or sequence of str): glob patterns of parameter names that are not mixed, such
            as ``"head.*"``. The base must have been built from ``model.named_parameters()``
            (default: none)
        resample_every (int, optional): k, the length of an episode in optimizer steps; None for
            never (default: 20)
        anchor_decay (float): lambda in [0, 1], the weight of the old anchor in its moving average;
            1 keeps the pretrained weights as anchor, 0 takes all that was learned. A group with the
            key ``anchor_decay`` has its own, which may change while training (default: 0.5)
        residual (str): ``"episodic"``: what an episode learned moves into the anchor at its end
            (GMixout); ``"persistent"``: the learned weights are kept whole beside the anchor, and
            each mask shows a part of them (Mixout) (default: "episodic")
        rescale (bool): Mixout's inverted scaling: the model computes with A + (phi - A) / d, where
            the base trains phi and d is the density that was drawn (default: False)
        lr_scale (float or "auto"): mixed weights train with so many times their group's ``lr``,
            once an episode has warmed up; parameters that are not mixed keep it, and so does the
            group. ``"auto"``: 1 / d on the average over an episode, with which a weight that is
            active in a share d of the steps goes as far as the base alone would take it (at p = 0.9
            it rises from 1 to 19 in an episode of 20 steps); by row 1 / sqrt(d); 1 with
            ``rescale``, the persistent residual, and bases that cannot be shown rates: LBFGS, which
            has one for all, and those with ``lr=None``, which find it themselves (default: "auto")
        episode_warmup (int or "auto"): steps at the start of each episode over which the learning
            rate of mixed weights rises linearly to its full value; 0 for none. The base's state
            starts fresh there, and a fresh Adam steps by the sign of one gradient. ``"auto"``: the
            whole episode; 0 with ``resample_every=None``, the persistent residual, whose state goes
            on, bases that cannot be shown rates, and Rprop and ASGD, which read ``lr`` ahead of the
            step. After unfreezing a layer call :meth:`resample`. Optimizers that want one ``lr`` in
            all groups need 0 here and ``lr_scale=1.0`` (default: "auto")
        granularity (str or int): what is masked as one cell: ``"element"``, ``"column"`` (a few
            input features or channels), ``"row"`` (an output row or filter), or a number of
            consecutive elements; a tensor that these do not fit falls back to elements. A group
            with the key ``granularity`` has its own (default: "element")
        sampler (str): ``"stratified"``: sets of constant size, spread evenly; ``"bernoulli"``: each
            cell independently (default: "stratified")
        layout (str): ``"packed"``: the base works on vectors of the active values, right for
            element-wise optimizers; ``"dense"``: on the parameters themselves, right for all;
            ``"auto"``: packed for optimizers known to be element-wise (default: "auto")
        grad_layout (str): ``"packed"``: as soon as backward has a mixed parameter's gradient, its
            active part is packed and the rest is freed; ``param.grad`` is then a
            :class:`PackedGradient`, which can be accumulated, scaled, clipped and zeroed, and
            refuses other operators. ``"active"``: where columns or rows are cells, backward of
            linear layers, convolutions and embeddings computes the active part alone; elsewhere it
            packs. Both need the packed layout, and no DistributedDataParallel. ``"dense"``:
            gradients stay as they are (default: "dense")
        stochastic_rounding (bool): write to bfloat16 and float16 parameters by stochastic instead
            of nearest rounding, so that what is smaller than their spacing is not lost at an
            episode's end. Trained values, anchors and the base's state are float32 either way.
            Needs the packed layout (default: False)
        seed (int): selects the index sets and the random bits of rounding, in [0, 2**63) (default:
            0)
        compile (bool or "auto"): run the packed step and the redraw as code fused by
            :func:`torch.compile`. ``"auto"``: on for CUDA parameters, off otherwise; DTensors step
            eagerly (default: "auto")

    Raises:
        TypeError: ``base`` is not an optimizer or is a GMixoutOptimizer, or an argument has the
            wrong type.
        ValueError: an argument is out of range, the layout does not fit the base, or another
            GMixoutOptimizer mixes one of the parameters.

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

    def __init__(
        self,
        base: Optimizer,
        *,
        mask_prob: float = 0.9,
        exclude: str | Sequence[str] = (),
        resample_every: int | None = 20,
        anchor_decay: float = 0.5,
        residual: settings.ResidualName = "episodic",
        rescale: bool = False,
        lr_scale: float | Literal["auto"] = "auto",
        episode_warmup: int | Literal["auto"] = "auto",
        granularity: Granularity = "element",
        sampler: Sampler = "stratified",
        layout: settings.LayoutName = "auto",
        grad_layout: settings.GradLayout = "dense",
        stochastic_rounding: bool = False,
        seed: int = 0,
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        settings.check_base(base, WrappingOptimizer)
        run = settings.make_run(
            base,
            residual=residual,
            rescale=rescale,
            lr_scale=lr_scale,
            episode_warmup=episode_warmup,
            sampler=sampler,
            layout=layout,
            resample_every=resample_every,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
        )
        defaults = settings.check_group_keys(
            dict(mask_prob=mask_prob, anchor_decay=anchor_decay, granularity=granularity)
        )
        patterns = check_exclude(exclude, base.param_groups)
        compile = settings.check_compile(compile)
        keeps_size = rescale or residual == "persistent" or not has_rates(base)
        rates = Rates(run.lr_scale, run.episode_warmup, run.resample_every, keeps_size)
        members = Members(run, rates, patterns, defaults)
        mixed = members.find(base.param_groups)
        run.layout = settings.resolve_layout(base, run, [member.param for member in mixed])
        grad_layout = settings.check_grad_layout(run, grad_layout)
        warn_of_fresh_layers(mixed)
        self._wrap(
            PackedLayout(base, members, compile)
            if run.layout == "packed"
            else DenseLayout(base, members),
            mixed,
            grad_layout,
        )

    @classmethod
    def mixout(cls, base: Optimizer, mask_prob: float = 0.9, **kwargs: Any) -> Self:
        """Mixout (Lee et al. 2020, arXiv 1909.11299), at 0.9 High-rate Mixout (arXiv 2510.06955).

        A persistent residual with inverted scaling, a new mask in every step, and the pretrained
        weights as anchor throughout. ``kwargs`` are those of the class and override these.
        """
        mixout = dict(residual="persistent", rescale=True, resample_every=1, anchor_decay=1.0)
        return cls(base, mask_prob=mask_prob, **{**mixout, **kwargs})

    @classmethod
    def random_masking(cls, base: Optimizer, mask_prob: float = 0.9, **kwargs: Any) -> Self:
        """One fixed mask: a share 1 - ``mask_prob`` of the weights trains, the rest never moves.

        ``kwargs`` are those of the class and override these.
        """
        masking = dict(resample_every=None, anchor_decay=0.0, lr_scale=1.0)
        return cls(base, mask_prob=mask_prob, **{**masking, **kwargs})

    @eagerly
    def step(self, closure: Closure | None = None) -> Any:
        """One step of the base on the active weights; ends the episode after its k-th.

        Args:
            closure (Callable, optional): evaluates the model anew and returns the loss.

        Returns:
            the closure's loss, None without one.

        Raises:
            RuntimeError: inside :meth:`eval_weights` or after :meth:`eval`, or where a mixed
                parameter has a sparse gradient. Nothing has changed then.
        """
        self._check_may_train("step()")
        only_creates_state = closure is None and self._only_creates_state()
        with self._working_in_base():
            loss = self._layout.step(closure)
        self._take_gradients()
        if only_creates_state:
            return loss
        self._run.steps_in_episode += 1
        if self._run.episode_is_over:
            self._next_episode()
        self._layout.tell()
        return loss

    @eagerly
    def resample(self) -> None:
        """End the episode now, move the anchor, and begin the next episode on new index sets.

        The anchor moves toward the weights that are in the model, whoever wrote them; weights that
        somebody else wrote in this episode are warned about once.
        """
        self._check_may_train("resample()")
        self._next_episode()

    @eagerly
    def resync(self) -> None:
        """Take the weights now in the model as the anchor, and begin a new episode.

        What the running episode learned is given up, and the base starts fresh on mixed tensors
        (with the persistent residual it keeps its state).
        """
        self._refuse_while_evaluating("resync()")
        self._check_groups()
        self._members.hold()
        with self._working_in_base():
            self._layout.reanchor()
            self._layout.begin_episode()
        self._take_gradients()

    @eagerly
    def consolidate(self) -> None:
        """End the episode, though only partly run; the model is left at the weights to deploy.

        Episodic: the anchor, to which the episode was added. Persistent: the mean over masks,
        A + d * s * (U - A). The model is a plain model then, which another optimizer may mix.
        Tensors that somebody else wrote since the last step, a loaded checkpoint say, stay as they
        are; a warning says so once. After :meth:`eval` the model keeps the weights that it shows.
        """
        self._refuse_in_step("consolidate()")
        if self._open_blocks:
            self._refuse_while_evaluating("consolidate()")
        self._check_groups()
        self.train()
        left: list[Member] = []
        if self._run.residual == "persistent":
            self._layout.show_live()
            left = self._layout.show_deployed()
            for member in left:
                self._layout.residual.reanchor(member)
        elif self.steps_in_episode > 0:
            left = self._next_episode(keep_foreign=True)
        self._members.release()
        self._give_up_gradients()
        self._warn_of_kept(left, "consolidate()")

    @contextmanager
    def eval_weights(self) -> Iterator[None]:
        """Inside the block the model has exactly the weights that :meth:`consolidate` would leave.

        For validation in mid-training. The live weights are put back bit for bit, also when the
        block raises. ``step()`` inside raises a RuntimeError; a nested block changes nothing.
        """
        if self._run.evaluating:
            yield
            return
        self.eval()
        self._open_blocks += 1
        try:
            yield
        finally:
            self._open_blocks -= 1
            self.train()

    @eagerly
    def eval(self) -> None:
        """Put the weights of :meth:`eval_weights` into the model until :meth:`train` is called.

        The pair is for loops that call it by themselves: Hugging Face's Trainer and Accelerate do.
        Called again it changes nothing. Tensors that somebody else wrote since the last step stay
        as they are; a warning says so once. A checkpoint of model and optimizer saved in between
        holds the weights to deploy in the model; a run goes on from it exactly, once :meth:`train`
        has been called.
        """
        self._refuse_in_step("eval()")
        self._check_groups()
        if not self._layout.shows_deployed:  # nor after consolidate(), with the persistent residual
            left = self._layout.show_deployed()
            self._run.evaluating = True
            self._warn_of_kept(left, "eval()")

    @eagerly
    def train(self) -> None:
        """Put the live weights back into the model after :meth:`eval`; otherwise change nothing.

        Tensors that somebody else wrote since :meth:`eval` stay as they are and become the anchor;
        a warning says so once.
        """
        if self._run.evaluating:
            left = self._layout.show_live()
            self._run.evaluating = False
            self._warn_of_kept(left, "train()")
