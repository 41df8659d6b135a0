"""The bytes that a step has to move between memory and processor."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.bases import per_cell_state
from gmixout_optim.bench.bytes import kept_gradient


def step_traffic(optimizer: Optimizer) -> int:
    """Bytes of one step, each tensor moved once; of an optimizer that has stepped, its gradients in
    place.

    What the base trains and its state are read and written, its gradients read. Packed, indices are
    read besides, and where values are kept apart from the weights, these are written. A processor
    moves whole cache lines, and so more than this where single elements are gathered.
    """
    return sum(
        _traffic_of(optimizer, param)
        for group in optimizer.param_groups
        for param in group["params"]
    )


def _traffic_of(optimizer: Optimizer, param: Tensor) -> int:
    member = optimizer._members.get(param) if isinstance(optimizer, GMixoutOptimizer) else None
    slot = None if member is None else member.slot
    trained = param if slot is None else slot.anchor
    count, state = trained.numel(), optimizer.state[param]
    base = optimizer.base if isinstance(optimizer, GMixoutOptimizer) else optimizer
    changed = sum(state[key].nbytes for key in per_cell_state(base, state, trained.shape))
    if slot is None or slot.value is None:
        changed += count * param.element_size()
    else:
        changed += slot.value.nbytes
    moved: int = 2 * changed + count * kept_gradient(param).element_size()
    if member is not None and slot is not None:
        moved += member.index().nbytes
        moved += 0 if slot.value is None else count * param.element_size()
    return moved
