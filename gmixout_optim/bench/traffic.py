"""The bytes that a step has to move between memory and processor."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.bases import per_cell_state
from gmixout_optim.bench.bytes import kept_gradient


def step_traffic(optimizer: Optimizer) -> int:
    """Bytes of one step, each tensor moved once; of an optimizer that has stepped, its gradients in place.

    What the base trains (the weights, or the packed values) and its state are read and written, its gradients read.
    Packed, indices are read and active weights written besides. A processor moves whole cache lines, and so
    more than this where single elements are gathered.
    """
    return sum(
        _traffic_of(optimizer, param)
        for group in optimizer.param_groups
        for param in group["params"]
    )


def _traffic_of(optimizer: Optimizer, param: Tensor) -> int:
    slot = optimizer.slot_of(param) if isinstance(optimizer, GMixoutOptimizer) else None
    trained = param if slot is None else slot.value
    state = optimizer.state[param]
    changed = [trained, *(state[key] for key in per_cell_state(state, trained.shape))]
    moved: int = 2 * sum(tensor.nbytes for tensor in changed)
    moved += trained.numel() * kept_gradient(param).element_size()
    if slot is not None:
        moved += slot.index.nbytes + trained.numel() * param.element_size()
    return moved
