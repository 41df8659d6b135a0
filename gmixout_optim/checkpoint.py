"""The state dict: what goes in, and what is checked before anything of it is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim import mixing
from gmixout_optim.bases import (
    ELEMENTWISE,
    SHARED_KEYS,
    is_own,
    keeps_state,
    own_entries,
    per_cell_state,
    take_own_entries,
)
from gmixout_optim.layout import Layout, is_whole, kept_tensors
from gmixout_optim.members import Member, Slot, name_of, parameters
from gmixout_optim.param_groups import unwrapped
from gmixout_optim.residual import slot_of
from gmixout_optim.settings import KEY, check_anchor_decay, check_saved_run, up_to_date
from gmixout_optim.shards import any_of_ranks, is_dtensor, like, local_of, placed_like

Groups = list[dict[str, Any]]


def form_of_state(layout: Layout) -> list[Any]:
    """What a state dict would hold, but for the values of tensors."""
    run, state = layout.members.run.shown, layout.base.state
    return [
        run,
        *(
            (member.name, member.param.shape, sorted(state.get(member.param, {}).keys() - {KEY}))
            for member in layout.members.trained()
        ),
    ]


def form_of(leaves: Sequence[Any]) -> list[Any]:
    """What decides how a state dict is taken: its numbers, and the forms of its tensors."""
    return [
        (leaf.shape, leaf.dtype, is_dtensor(leaf)) if isinstance(leaf, Tensor) else repr(leaf)
        for leaf in leaves
    ]


def make_state_dict(layout: Layout) -> dict[str, Any]:
    """torch's format: ``state`` by parameter number, ``param_groups`` with numbers for parameters.

    A mixed tensor's entry holds the base's state of it and, under ``"gmixout"``, what its slot
    keeps.
    """
    base, members = layout.base, layout.members
    layout.pack_state()
    trained = members.trained()
    for each in trained:
        each.notice()
    flags = [slot_of(each).foreign for each in trained]
    written = dict(zip(trained, any_of_ranks(flags, [m.param for m in trained]), strict=True))
    state: dict[Any, Any] = {
        key: value for key, value in base.state.items() if not isinstance(key, Tensor)
    }
    run = {**members.run.shown, "trained": len(trained)}
    groups: Groups = [{**group, "params": [], KEY: dict(run)} for group in base.param_groups]
    saved_as = {id(group): saved for group, saved in zip(base.param_groups, groups, strict=True)}
    for number, group, _, param in parameters(base.param_groups):
        saved_as[id(group)]["params"].append(number)
        entry = {key: item for key, item in base.state.get(param, {}).items() if key != KEY}
        member = members.get(param)
        if member is not None and member.slot is not None:
            entry = _joined(layout, member, entry)
            entry[KEY]["written"] = int(written[member])
        elif member is not None and entry:
            entry[KEY] = {"trained": 0}  # the base's state is not packed yet
        elif not keeps_state(base, group) and trained:
            # Tools want an entry of all parameters, or of none.
            entry[KEY] = {"mixed": 0}
        if entry:
            state[number] = entry
    return {**deepcopy(own_entries(base)), "state": state, "param_groups": groups}


def _joined(layout: Layout, member: Member, entry: dict[str, Any]) -> dict[str, Any]:
    """The base's state of a member, and copies of what its slot keeps, as a file has them."""
    run, slot = layout.members.run, slot_of(member)
    packing = member.cells.packing(member.index(), run.seed, run.episode)
    packed: set[str] = set()
    if run.layout == "packed":
        packed = per_cell_state(layout.base, entry, slot.anchor.shape)
    state = {key: packing.join(item) if key in packed else item for key, item in entry.items()}
    kept: dict[str, Any] = {"number": member.cells.number}
    for name, item in kept_tensors(slot).items():
        is_packed = not is_whole(layout.residual, name)
        kept[name] = (packing.join(item) if is_packed else like(member.param, item)).clone()
    return {**state, KEY: kept}


def _held(param: Tensor, tensor: Any) -> Any:
    """A tensor of the shape of a parameter, in its pieces; anything else as it is."""
    fits = isinstance(tensor, Tensor) and tensor.shape == param.shape
    is_spread = is_dtensor(tensor) or is_dtensor(param)
    return placed_like(tensor, param) if fits and is_spread else tensor


def take_state_dict(layout: Layout, given: Any) -> None:
    """Check all of a state dict, then take it. A ValueError leaves everything as it was.

    Unlike torch's, this never casts state to the parameter's dtype: anchors are kept exactly.
    """
    if not isinstance(given, dict):
        raise ValueError(f"state_dict must be a dict, got {type(given).__name__}")
    base, run = layout.base, layout.members.run
    groups = _checked_groups(given, base.param_groups, layout)
    state, slots = _checked_state(given["state"], groups, layout)

    before = [dict(group) for group in base.param_groups], dict(base.state)
    layout.hide_slots()
    for group, loaded in zip(base.param_groups, groups, strict=True):
        own: dict[str, Any] = {key: group[key] for key in ("params", "param_names") if key in group}
        group.clear()
        group.update({**base.defaults, **loaded, **own, KEY: run.shown})
    _replace(base.state, state)
    try:
        # Brings the formats of older versions of torch up to date.
        base.__setstate__({"state": base.state, "param_groups": base.param_groups})
        beside = {key: given[key] for key in given if key not in ("state", "param_groups")}
        missing = own_entries(base).keys() - beside.keys()
        if missing:
            raise KeyError(f"{sorted(missing)} of the base's own state_dict()")
        if beside and type(base).load_state_dict is not Optimizer.load_state_dict:
            take_own_entries(base, deepcopy(beside))
    except Exception as error:
        for group, old in zip(base.param_groups, before[0], strict=True):
            _replace(group, old)
        _replace(base.state, before[1])
        raise ValueError(
            f"state_dict does not hold what {type(base).__name__} keeps ({error!r}): it is damaged"
        ) from error
    run.go_on_from(groups[0][KEY])
    layout.forget()
    for member in layout.members:
        member.slot = slots.get(member.param)


def _replace(mapping: dict[Any, Any], items: dict[Any, Any]) -> None:
    mapping.clear()
    mapping.update(items)


def _checked_groups(given: dict[str, Any], own: Groups, layout: Layout) -> Groups:
    """The saved groups, copied, with everything that must agree with the optimizer's checked."""
    saved = given.get("param_groups")
    if not isinstance(saved, list) or not isinstance(given.get("state"), dict):
        raise ValueError("state_dict has no 'param_groups' list and 'state' dict: it is damaged")
    if len(saved) != len(own):
        raise ValueError(
            f"state_dict has {len(saved)} parameter groups, this optimizer {len(own)}: it belongs "
            "to another model"
        )
    groups: Groups = []
    for place, (group, mine) in enumerate(zip(saved, own, strict=True)):
        where = f"parameter group {place}"
        _check_parameters(group, mine, where)
        if not isinstance(group.get(KEY), dict):
            raise ValueError(
                f"{where} of state_dict has no {KEY!r} entry: it is the state of a bare optimizer. "
                "Load it into the base before wrapping it"
            )
        group = {
            **group,
            KEY: {"saved_version": group[KEY].get("version"), **up_to_date(group[KEY])},
        }
        check_saved_run(group[KEY], layout.members.run, where)
        for key in ("mask_prob", "granularity"):
            if group.get(key) != mine[key]:
                raise ValueError(
                    f"state_dict has {key}={group.get(key)!r} in {where}, this optimizer "
                    f"{key}={mine[key]!r}: build it with the settings of the run that was saved"
                )
        _check_hyperparameters(group, mine, where)
        groups.append(group)
        if group[KEY] != groups[0][KEY]:
            raise ValueError(
                f"{where} of state_dict is at another step than group 0: it is damaged"
            )
    return deepcopy(groups)


def _check_parameters(saved: Any, own: dict[str, Any], where: str) -> None:
    """As many as the optimizer has, of the same names."""
    if not isinstance(saved, dict) or not isinstance(saved.get("params"), list):
        raise ValueError(f"{where} of state_dict has no 'params' list: it is damaged")
    if len(saved["params"]) != len(own["params"]):
        raise ValueError(
            f"{where} of state_dict has {len(saved['params'])} parameters, this optimizer's "
            f"{len(own['params'])}: it belongs to another model"
        )
    names, own_names = saved.get("param_names"), own.get("param_names")
    if names and own_names and not _same_names(names, own_names):
        for name, own_name in zip(names, own_names, strict=True):
            if unwrapped(name) != unwrapped(own_name):
                raise ValueError(
                    f"{where} of state_dict has {name!r} where this optimizer has {own_name!r}: it "
                    "belongs to another model, or one whose parameters come in another order"
                )


def _same_names(names: list[str], others: list[str]) -> bool:
    """Whether names are alike, or all of them with the same prefix: a part of a module."""
    pairs = [(unwrapped(a), unwrapped(b)) for a, b in zip(names, others, strict=True)]
    prefixes = {long.removesuffix(short) for long, short in map(_by_length, pairs)}
    return len(prefixes) == 1 and (prefixes == {""} or prefixes.pop().endswith("."))


def _by_length(pair: tuple[str, str]) -> tuple[str, str]:
    a, b = pair
    return (a, b) if len(a) >= len(b) else (b, a)


def _check_hyperparameters(saved: dict[str, Any], own: dict[str, Any], where: str) -> None:
    """What may change while training is taken from the state dict, if it is of the right kind."""
    for key, value in own.items():
        kind = _kind(value)
        if key in saved and kind in (float, tuple) and _kind(saved[key]) is not kind:
            raise ValueError(
                f"{where} of state_dict has {key}={saved[key]!r}, where this optimizer has "
                f"{value!r}: it is damaged"
            )
    try:
        check_anchor_decay(saved.get("anchor_decay"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} of state_dict: {error}") from None


def _kind(value: Any) -> type:
    """Numbers are alike, in tensors too, and so are sequences. Flags may be None."""
    if isinstance(value, Tensor | Real) and not isinstance(value, bool):
        return float
    return tuple if isinstance(value, list | tuple) else type(value)


def _checked_state(
    entries: dict[Any, Any], groups: Groups, layout: Layout
) -> tuple[dict[Any, Any], dict[Tensor, Slot]]:
    """Copies of the saved state, and the slots of mixed tensors, by parameter."""
    base, run = layout.base, groups[0][KEY]
    numbers = [number for group in groups for number in group["params"]]
    owners = {
        number: (name_of(group, place, number), group, param)
        for number, (_, group, place, param) in zip(
            numbers, parameters(base.param_groups), strict=True
        )
    }
    _check_keys(base, entries, owners)
    state: dict[Any, Any] = {}
    slots: dict[Tensor, Slot] = {}
    for number, entry in entries.items():
        if number not in owners:
            state[number] = deepcopy(entry)
            continue
        name, group, param = owners[number]
        of_base, slot = _checked_entry(layout, name, group, param, entry, run)
        if slot is not None:
            slots[param] = slot
        if of_base:
            state[param] = of_base
    if run.get("trained") != len(slots):
        raise ValueError(
            f"state_dict holds anchors of {len(slots)} tensors, but was made with those of "
            f"{run.get('trained')}: it is damaged. A run that starts anew loads no state dict"
        )
    return state, slots


def _checked_entry(
    layout: Layout, name: str, group: dict[str, Any], param: Tensor, entry: Any, run: dict[str, Any]
) -> tuple[dict[str, Any], Slot | None]:
    """The base's state of a parameter, and its slot, where it was trained as a mixed one."""
    if not isinstance(entry, dict):
        raise ValueError(f"the state of {name} in state_dict is no dict: it is damaged")
    kept = entry.get(KEY, {"mixed": 0})
    if not isinstance(kept, dict):
        raise ValueError(f"the {KEY!r} entry of {name} in state_dict is no dict: it is damaged")
    base, member = layout.base, layout.members.get(param)
    was_mixed, is_packed = kept.get("mixed") != 0, run["layout"] == "packed"
    if was_mixed and member is None:
        raise ValueError(f"{name} was mixed in the run that was saved and is not mixed here")
    if is_packed and member is not None and not was_mixed:
        raise ValueError(f"{name} is mixed here and was not in the run that was saved")
    slot, shape = None, param.shape
    held: Callable[[Any], Any] = partial(_held, param)
    if member is not None and was_mixed and kept.get("trained") != 0:
        _check_number(member, kept, name)
        index = member.cells.draw(run["seed"], run["episode"])
        packing = member.cells.packing(index, run["seed"], run["episode"])

        def part(item: Any) -> Any:
            is_vector = isinstance(item, Tensor) and item.ndim == 1
            if not is_vector or (not packing.fits(item) and not is_dtensor(param)):
                return item  # other checks refuse what does not fit
            if not packing.fits(item):
                raise ValueError(
                    f"state_dict holds a vector of {len(item)} values for {name}, of which "
                    f"{packing.size} are active: it is what one rank had, or belongs to another "
                    "model or other settings"
                )
            return packing.part(item)

        kept = {
            key: local_of(_held(param, item)) if is_whole(layout.residual, key) else part(item)
            for key, item in kept.items()
        }
        kept = _kept_up_to_date(layout, member, index, kept, run)
        slot = layout.residual.restored(member, index, kept)
        if is_packed:
            shape, held = slot.anchor.shape, part
    of_base = {}
    for key, value in entry.items():
        if key != KEY:
            is_shared = key in SHARED_KEYS or not is_own(base, key)
            value = value if is_shared else held(value)
            of_base[key] = _fitting_state(base, group, name, key, value, param, shape)
    return of_base, slot


def _check_number(member: Member, saved: dict[str, Any], name: str) -> None:
    """A parameter's number selects its active weights."""
    own = member.cells.number
    if saved.get("number", own) != own:
        raise ValueError(
            f"{name} is parameter {own} here and was parameter {saved['number']} in the run that "
            "was saved, which had other active weights: build the optimizer with the parameters in "
            "the order of that run"
        )


def _check_keys(
    base: Optimizer, entries: dict[Any, Any], owners: dict[int, tuple[str, dict[str, Any], Tensor]]
) -> None:
    """Numbers of parameters, and of parameters of a group the same kinds of state."""
    of_torch = type(base).__module__.startswith("torch.optim")
    forms: dict[int, dict[str, bool]] = {}
    for number, entry in entries.items():
        if number not in owners:
            if isinstance(number, int) or of_torch:
                raise ValueError(
                    f"state_dict has a state for parameter {number!r}, which is in none of its "
                    "groups: it is damaged"
                )
        elif type(base) in ELEMENTWISE and isinstance(entry, dict):
            form = {
                key: isinstance(item, Tensor) for key, item in entry.items() if is_own(base, key)
            }
            name, group, _ = owners[number]
            first = forms.setdefault(id(group), form) if form else form
            if form != first:
                raise ValueError(
                    f"state_dict holds {sorted(form)} of {name} and {sorted(first)} of another "
                    "parameter of its group, or tensors for the one only: it is damaged"
                )


def _fitting_state(
    base: Optimizer,
    group: dict[str, Any],
    name: str,
    key: str,
    value: Any,
    param: Tensor,
    shape: Any,
) -> Any:
    """A copy of one entry of the base's state where the base keeps it."""
    if not isinstance(value, Tensor):
        return deepcopy(value)
    is_packable = type(base) in ELEMENTWISE and is_own(base, key)
    if is_packable and value.ndim > 0 and value.shape != shape:
        raise ValueError(
            f"state_dict holds {key!r} of {name} with shape {tuple(value.shape)}, but this "
            f"optimizer needs {tuple(shape)}: it belongs to another model or other settings"
        )
    # torch keeps step counts on the host unless the step runs on the device.
    on_device = group.get("capturable") or group.get("fused")
    stays = key == "step" and value.device.type == "cpu" and not on_device
    return value.detach().to("cpu" if stays else local_of(param).device, copy=True)


# Older formats


def _kept_up_to_date(
    layout: Layout, member: Member, index: Tensor, saved: dict[str, Any], run: dict[str, Any]
) -> dict[str, Any]:
    """What a state dict holds of a slot, in the present format.

    Before version 5 the dense layout kept its anchor whole, and the live weights of a model that
    showed those to deploy followed from the values.
    """
    anchor, value, cells = saved.get("anchor"), saved.get("value"), member.cells
    if run["saved_version"] >= 5 or not isinstance(anchor, Tensor) or not isinstance(value, Tensor):
        return saved

    def active(item: Tensor) -> Tensor:
        item = item.to(index.device)
        if item.shape != cells.form[1]:
            return item
        return mixing.gather(cells.grid.view(cells.grid.copy(item)), index)

    if run["residual"] == "episodic" and run["layout"] == "dense":
        saved = {**saved, "anchor": active(anchor)}
    if run["evaluating"] and active(anchor).shape == active(value).shape:
        theta = mixing.model_values(active(anchor), active(value), member.scale)
        rounds, dtype = run["stochastic_rounding"], cells.form[0]
        dither = cells.dither(run["seed"], run["episode"]) if rounds else None
        saved = {**saved, "live": mixing.narrowed(theta, dtype, index, dither).to(dtype)}
    return saved
