"""The state dict: what goes in, and what is checked before anything of it is taken."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gmixout_optim.bases import ELEMENTWISE
from gmixout_optim.layout import KEY, Slot
from gmixout_optim.mixed_tensor import MixedTensor
from gmixout_optim.settings import check_anchor_decay

if TYPE_CHECKING:
    from gmixout_optim.optimizer import GMixoutOptimizer

# What says how far the run is. The rest of the run's settings must agree.
_COUNTERS = ("seed", "episode", "steps_in_episode")
_PROGRESS = (*_COUNTERS, "evaluating")


def parameters(optimizer: GMixoutOptimizer) -> Iterator[tuple[int, dict[str, Any], int, Tensor]]:
    """``(number, group, place in the group, parameter)`` of all parameters."""
    number = 0
    for group in optimizer.param_groups:
        for place, param in enumerate(group["params"]):
            yield number, group, place, param
            number += 1


def name_of(group: dict[str, Any], place: int, number: int) -> str:
    names = group.get("param_names")
    return names[place] if names is not None else f"parameter {number}"


def state_dict(optimizer: GMixoutOptimizer) -> dict[str, Any]:
    """torch's format: ``state`` by parameter number, ``param_groups`` with numbers for parameters.

    A mixed tensor's entry holds the base's state of it and, under ``"gmixout"``, its value and anchor.
    """
    for pre_hook in optimizer._optimizer_state_dict_pre_hooks.values():
        pre_hook(optimizer)
    state: dict[Any, Any] = {
        key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)
    }
    groups = [
        {key: value for key, value in group.items() if key != "params"} | {"params": []}
        for group in optimizer.param_groups
    ]
    for group in groups:
        group[KEY] = {**optimizer.run, "trained": len(optimizer.layout.slots)}
    place_of = {
        id(group): saved for group, saved in zip(optimizer.param_groups, groups, strict=True)
    }
    for number, group, _, param in parameters(optimizer):
        place_of[id(group)]["params"].append(number)
        if optimizer.state.get(param):
            state[number] = dict(optimizer.state[param])
    result: dict[str, Any] = {"state": state, "param_groups": groups}
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        changed = post_hook(optimizer, result)
        if changed is not None:
            result = changed
    return result


def load_state_dict(optimizer: GMixoutOptimizer, given: dict[str, Any]) -> None:
    """Check all of a state dict, then take it. A ValueError leaves the optimizer as it was.

    Unlike torch's, this never casts state to the parameter's dtype: anchors and values are kept exactly.
    """
    if not isinstance(given, dict):
        raise ValueError(f"state_dict must be a dict, got {type(given).__name__}")
    state_dict = dict(given)
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = pre_hook(optimizer, state_dict)
        if changed is not None:
            state_dict = changed
    groups = _checked_groups(optimizer, state_dict)
    run = groups[0][KEY]
    state, slots = _checked_state(optimizer, state_dict, groups, run)
    _check_base_takes(optimizer, state, groups)

    # All is checked: from here on nothing fails.
    for group, loaded in zip(optimizer.param_groups, groups, strict=True):
        own: dict[str, Any] = {key: group[key] for key in ("params", "param_names") if key in group}
        group.clear()
        group.update({**optimizer.base.defaults, **loaded, **own, KEY: optimizer.run})
    optimizer.run.update({key: run[key] for key in _PROGRESS})
    with optimizer.layout.apart():
        optimizer.layout.restore(slots)
        optimizer.state.clear()
        optimizer.state.update(state)
        optimizer.base.__setstate__(
            {"state": optimizer.state, "param_groups": optimizer.param_groups}
        )
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _checked_groups(
    optimizer: GMixoutOptimizer, state_dict: dict[str, Any]
) -> list[dict[str, Any]]:
    """The saved groups, copied, with everything that must agree with the optimizer's checked."""
    saved = state_dict.get("param_groups")
    if not isinstance(saved, list) or not isinstance(state_dict.get("state"), dict):
        raise ValueError("state_dict has no 'param_groups' list and 'state' dict: it is damaged")
    saved = [_up_to_date(group) for group in saved]
    own = optimizer.param_groups
    if len(saved) != len(own):
        raise ValueError(
            f"state_dict has {len(saved)} parameter groups, this optimizer {len(own)}: it belongs to another model"
        )
    for place, (group, mine) in enumerate(zip(saved, own, strict=True)):
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise ValueError(
                f"parameter group {place} of state_dict has no 'params' list: it is damaged"
            )
        if len(group["params"]) != len(mine["params"]):
            raise ValueError(
                f"parameter group {place} of state_dict has {len(group['params'])} parameters, this optimizer's "
                f"{len(mine['params'])}: it belongs to another model"
            )
        names, own_names = group.get("param_names"), mine.get("param_names")
        if names and own_names and names != own_names:
            saved_name, own_name = next(
                pair for pair in zip(names, own_names, strict=True) if pair[0] != pair[1]
            )
            raise ValueError(
                f"parameter group {place} of state_dict has {saved_name!r} where this optimizer has {own_name!r}: it "
                "belongs to another model, or one whose parameters come in another order"
            )
        if not isinstance(group.get(KEY), dict):
            raise ValueError(
                f"parameter group {place} of state_dict has no {KEY!r} entry: it is the state of a bare optimizer. "
                "Load it into the base before wrapping it"
            )
        _check_settings(group[KEY], optimizer.run, f"parameter group {place}")
        for key in ("mask_prob", "granularity"):
            if group.get(key) != mine[key]:
                raise ValueError(
                    f"state_dict has {key}={group.get(key)!r} in parameter group {place}, this optimizer "
                    f"{key}={mine[key]!r}: build it with the settings of the run that was saved"
                )
        _check_hyperparameters(group, mine, place)
        if group[KEY] != saved[0][KEY]:
            raise ValueError(
                f"parameter group {place} of state_dict is at another step than group 0: it is damaged"
            )
    return deepcopy(saved)


def _up_to_date(group: Any) -> Any:
    """A saved group in the present format."""
    if not isinstance(group, dict) or not isinstance(group.get(KEY), dict):
        return group
    run = group[KEY]
    if run.get("version") == 1:
        run = {**run, "version": 2, "stochastic_rounding": False}
    if run.get("version") == 2:
        run = {**run, "version": 3, "lr_scale": 1.0}
    if run.get("version") == 3:
        run = {**run, "version": 4, "episode_warmup": 0}
    return {**group, KEY: run}


def _check_hyperparameters(saved: dict[str, Any], own: dict[str, Any], place: int) -> None:
    """What may change while training is taken from the state dict, if it is of the right kind."""
    for key, value in own.items():
        kind = _kind(value)
        if key in saved and kind in (float, tuple) and _kind(saved[key]) is not kind:
            raise ValueError(
                f"parameter group {place} of state_dict has {key}={saved[key]!r}, where this optimizer has {value!r}: "
                "it is damaged"
            )
    try:
        check_anchor_decay(saved.get("anchor_decay"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"parameter group {place} of state_dict: {error}") from None


def _kind(value: Any) -> type:
    """Numbers are alike, in tensors too, and so are sequences."""
    if isinstance(value, Tensor | Real):
        return float
    return tuple if isinstance(value, list | tuple) else type(value)


def _check_settings(saved: dict[str, Any], own: dict[str, Any], where: str) -> None:
    if saved.get("version") != own["version"]:
        raise ValueError(
            f"state_dict has format version {saved.get('version')!r}, this library reads versions up to {own['version']}"
        )
    for key in _PROGRESS:
        value = saved.get(key)
        fits = type(value) is int and value >= 0 if key in _COUNTERS else type(value) is bool
        if not fits:
            raise ValueError(f"state_dict has {key}={value!r} in {where}: it is damaged")
    k = own["resample_every"]
    if saved["seed"] >= 2**63 or (k is not None and saved["steps_in_episode"] >= k):
        raise ValueError(
            f"state_dict has seed={saved['seed']} and steps_in_episode={saved['steps_in_episode']} in {where}, of "
            f"resample_every={k}: it is damaged"
        )
    for key, value in own.items():
        if key not in _PROGRESS and saved.get(key) != value:
            raise ValueError(
                f"state_dict has {key}={saved.get(key)!r}, this optimizer {key}={value!r}: build it with the "
                "settings of the run that was saved"
            )


def _checked_state(
    optimizer: GMixoutOptimizer,
    state_dict: dict[str, Any],
    groups: list[dict[str, Any]],
    run: dict[str, Any],
) -> tuple[dict[Any, Any], dict[MixedTensor, Slot]]:
    """Copies of the saved state, keyed by parameter, and the slots of mixed tensors."""
    numbers = [number for group in groups for number in group["params"]]
    owners = {
        number: (group, place, param)
        for number, (_, group, place, param) in zip(numbers, parameters(optimizer), strict=True)
    }
    packed = run["layout"] == "packed"
    _check_keys(optimizer, state_dict["state"], owners)
    state: dict[Any, Any] = {}
    slots: dict[MixedTensor, Slot] = {}
    for number, entry in state_dict["state"].items():
        if number not in owners:
            state[number] = deepcopy(entry)
            continue
        group, place, param = owners[number]
        name = name_of(group, place, number)
        if not isinstance(entry, dict):
            raise ValueError(f"the state of {name} in state_dict is no dict: it is damaged")
        tensor = optimizer.mixed.get(param)
        if (KEY in entry) > (tensor is not None):
            raise ValueError(f"{name} was mixed in the run that was saved and is not mixed here")
        if packed and tensor is not None and KEY not in entry:
            raise ValueError(f"{name} is mixed here and was not in the run that was saved")
        shape = param.shape
        if tensor is not None and KEY in entry:
            if not isinstance(entry[KEY], dict):
                raise ValueError(
                    f"the {KEY!r} entry of {name} in state_dict is no dict: it is damaged"
                )
            index = tensor.address(tensor.draw(run["seed"], run["episode"], run["sampler"]))
            slot = slots[tensor] = optimizer.layout.restored(tensor, index, entry[KEY])
            shape = slot.value.shape if packed else shape
        of_base = {key: value for key, value in entry.items() if key != KEY}
        if of_base:
            state[param] = {
                key: _fitting_state(optimizer, name, key, value, param, shape)
                for key, value in of_base.items()
            }
    if run.get("trained") != len(slots):
        raise ValueError(
            f"state_dict holds values and anchors of {len(slots)} tensors, but was made with those of "
            f"{run.get('trained')}: it is damaged"
        )
    return state, slots


def _check_keys(
    optimizer: GMixoutOptimizer, entries: dict[Any, Any], owners: dict[int, Any]
) -> None:
    """Numbers of parameters, and of parameters of a group the same kinds of state."""
    of_torch = type(optimizer.base).__module__.startswith("torch.optim")
    forms: dict[int, dict[str, bool]] = {}
    for number, entry in entries.items():
        if number not in owners:
            if isinstance(number, int) or of_torch:
                raise ValueError(
                    f"state_dict has a state for parameter {number!r}, which is in none of its groups: it is damaged"
                )
            continue
        if type(optimizer.base) in ELEMENTWISE and isinstance(entry, dict):
            form = {key: isinstance(item, Tensor) for key, item in entry.items() if key != KEY}
            group, place, _ = owners[number]
            if form and form != forms.setdefault(id(group), form):
                raise ValueError(
                    f"state_dict holds {sorted(form)} of {name_of(group, place, number)} and {sorted(forms[id(group)])} "
                    "of another parameter of its group, or tensors for the one only: it is damaged"
                )


def _check_base_takes(
    optimizer: GMixoutOptimizer, state: dict[Any, Any], groups: list[dict[str, Any]]
) -> None:
    """Raise where the base's own __setstate__, which brings old formats up to date, fails on the saved state."""
    probe = object.__new__(type(optimizer.base))
    probe.__dict__.update({**optimizer.base.__dict__, "defaults": dict(optimizer.base.defaults)})
    own = [
        {**group, "params": mine["params"]}
        for group, mine in zip(groups, optimizer.param_groups, strict=True)
    ]
    try:
        probe.__setstate__(
            {
                "state": {
                    key: dict(entry) if isinstance(entry, dict) else entry
                    for key, entry in state.items()
                },
                "param_groups": own,
            }
        )
    except Exception as error:
        raise ValueError(
            f"state_dict does not hold what {type(optimizer.base).__name__} keeps ({error!r}): it is damaged"
        ) from error


def _fitting_state(
    optimizer: GMixoutOptimizer, name: str, key: str, value: Any, param: Tensor, shape: Any
) -> Any:
    """A copy of one entry of the base's state where the base keeps it."""
    if not isinstance(value, Tensor):
        return deepcopy(value)
    if type(optimizer.base) in ELEMENTWISE and value.ndim > 0 and value.shape != shape:
        raise ValueError(
            f"state_dict holds {key!r} of {name} with shape {tuple(value.shape)}, but this optimizer needs "
            f"{tuple(shape)}: it belongs to another model or other settings"
        )
    # torch keeps step counts on the host unless the step runs on the device.
    stays = key == "step" and value.device.type == "cpu" and not _steps_on_device(optimizer, param)
    return value.detach().to("cpu" if stays else param.device, copy=True)


def _steps_on_device(optimizer: GMixoutOptimizer, param: Tensor) -> bool:
    return any(
        bool(group.get("capturable") or group.get("fused"))
        for group in optimizer.param_groups
        if any(param is known for known in group["params"])
    )
