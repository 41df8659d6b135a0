"""What training costs on machines that are not here, calculated: ``python -m gmixout_optim.bench
--plan --params 7e9 --ranks 64``.

Bytes follow from the shapes of the parameters alone; nothing is measured, and no time is predicted.
They are those of the rank with the most.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from gmixout_optim.bench.bytes import Bytes
from gmixout_optim.bench.models import llama_shapes, shapes_of
from gmixout_optim.bench.options import (
    PROGRAM,
    add_cells,
    add_training,
    density,
    model_name,
    positive,
)
from gmixout_optim.bench.sharding import Sharding, Share
from gmixout_optim.bench.table import pipe_table
from gmixout_optim.cells import Granularity

_STEP_COUNT = 4  # bytes of AdamW's count of steps, one per tensor

FEWEST_WEIGHTS, MOST_WEIGHTS = 10**8, 10**12


@dataclass(frozen=True)
class Cost:
    """Of training with one optimizer, on the rank with the most.

    Attributes:
        title: of the optimizer.
        bytes: in memory between two steps, gradients in place, on average over episodes.
        most: all of these in the episode in which the rank's share is largest.
        network: bytes that the rank sends in a training step, and receives.
        step: bytes that the optimizer's step moves between memory and processor, as
            :func:`gmixout_optim.bench.traffic.step_traffic` counts them.
        redraw: bytes that a redraw moves, likewise.
        drawn: active cells that the rank draws in a redraw.
        file: bytes of the tensors in the optimizer's state dict, of all ranks together.
        file_share: those that the rank holds.
        saving: bytes that making the state dict takes beside what training keeps.
    """

    title: str
    bytes: Bytes
    most: int
    network: int
    step: int
    redraw: int
    drawn: int
    file: int
    file_share: int
    saving: int

    @property
    def memory(self) -> int:
        """Bytes in memory, all together."""
        return self.bytes.weights + self.bytes.beyond_weights


def plan(
    shapes: Sequence[torch.Size],
    dtype: torch.dtype,
    sharding: Sharding,
    density: float,
    settings: Sequence[tuple[Granularity, str]],
) -> list[Cost]:
    """AdamW's own costs, and those of the wrapper with each granularity and gradient layout.

    Raises:
        ValueError: a tensor has more cells than can be numbered.
    """
    plain = _plain_cost(shapes, dtype, sharding)
    costs = [plain]
    for cells, grad_layout in settings:
        title = f"GMixout, {cells}, {grad_layout} gradients"
        if density == 1:  # nothing is mixed
            costs.append(replace(plain, title=title))
            continue
        shares = [Share.of(shape, density, cells, sharding.shards) for shape in shapes]
        costs.append(_cost(title, shares, dtype, sharding, grad_layout == "packed"))
    return costs


def _plain_cost(shapes: Sequence[torch.Size], dtype: torch.dtype, sharding: Sharding) -> Cost:
    """Of ``torch.optim.AdamW``, whose moments have the parameters' dtype."""
    size, counts = dtype.itemsize, _STEP_COUNT * len(shapes)
    shares = [Share.of(shape, 1.0, "row", sharding.shards) for shape in shapes]
    weights = sum(share.weights for share in shares)
    shard = size * weights
    kept = Bytes(weights=shard, gradients=shard, state=2 * shard + counts)
    return Cost(
        title="AdamW",
        bytes=kept,
        most=kept.weights + kept.beyond_weights,
        network=sharding.network_bytes(shard),
        step=7 * shard,  # weights and two moments are read and written, gradients read
        redraw=0,
        drawn=0,
        file=2 * size * sum(shape.numel() for shape in shapes) + counts,
        file_share=kept.state,
        saving=0,
    )


def _cost(
    title: str, shares: Sequence[Share], dtype: torch.dtype, sharding: Sharding, packs: bool
) -> Cost:
    """Of the wrapper around AdamW. Below float32 it keeps float32 values of the active weights."""
    size = dtype.itemsize
    kept_size = torch.promote_types(dtype, torch.float32).itemsize
    has_values = kept_size != size
    counts = _STEP_COUNT * len(shares)
    weights = sum(share.weights for share in shares)

    def kept(active: int, indices: int) -> Bytes:
        return Bytes(
            weights=size * weights,
            gradients=size * (active if packs else weights),
            state=2 * kept_size * active + counts,
            masters=kept_size * active if has_values else 0,
            anchors=kept_size * active,
            indices=indices,
        )

    active = sum(share.active for share in shares)
    average = kept(active, sum(share.indices for share in shares))
    most = kept(sum(share.most for share in shares), sum(share.most_indices for share in shares))
    # Anchor, values and moments.
    vectors = (3 + has_values) * kept_size
    packed = [share.packed for share in shares]
    file_share = vectors * sum(-(-count // sharding.shards) for count in packed) + counts
    if sharding.shards > 1:
        saving = _saving_bytes(shares, sharding.shards, vectors, kept_size)
    else:
        saving = average.anchors + average.masters
    return Cost(
        title=title,
        bytes=average,
        most=most.weights + most.beyond_weights,
        network=sharding.network_bytes(average.weights),
        step=_step_bytes(active, average.indices, size, kept_size),
        redraw=_redraw_bytes(active, average.indices, size, kept_size),
        drawn=sum(share.drawn for share in shares),
        file=vectors * sum(packed) + counts,
        file_share=file_share,
        saving=saving,
    )


def _step_bytes(active: int, indices: int, size: int, kept_size: int) -> int:
    """What is trained and two moments are read and written, gradients and indices read; values that
    are kept apart from the weights are written to these."""
    written = size if kept_size != size else 0
    return active * (6 * kept_size + size + written) + indices


def _redraw_bytes(active: int, indices: int, size: int, kept_size: int) -> int:
    """An episode ends: anchors and what was trained are read, weights written. Another begins:
    weights are read; anchors, values that are kept and zeros for two moments written.

    Indices are read at the end, written, and read at the beginning.
    """
    ends = 2 * kept_size + size
    begins = size + (3 + (kept_size != size)) * kept_size
    return active * (ends + begins) + 3 * indices


# Of an active element of a rank: int64 numbers from which its place in the packed vector of the
# whole tensor is computed, and that place.
_PLACING, _PLACE = 57, 8


def _saving_bytes(shares: Sequence[Share], shards: int, vectors: int, kept_size: int) -> int:
    """The state dict's vectors grow tensor by tensor, and beside them lies what one tensor takes:
    the places of its active elements as they are computed, or a whole packed vector, twice where
    it has to be padded to be scattered."""
    made = most = 0
    for share in shares:
        own = vectors * -(-share.packed // shards)
        copies = 1 if share.packed % shards == 0 else 2
        joining = copies * kept_size * (share.packed + share.active) + _PLACE * share.active
        most = max(most, made + _PLACING * share.active, made + own + joining)
        made += own
    return most


def tables(costs: Sequence[Cost], resample_every: int) -> str:
    parts = [
        "In memory between two steps, gradients in place, MB per rank:\n\n" + _memory_table(costs),
        "Moved in a step, MB per rank. Network: sent, and as much received; gradients are reduced "
        "dense,\nso it is the same for all. Optimizer: between memory and processor, each tensor "
        "moved once.\n\n" + _traffic_table(costs, resample_every),
        "The optimizer's checkpoint, MB:\n\n" + _file_table(costs),
    ]
    return "\n\n".join(parts)


def _memory_table(costs: Sequence[Cost]) -> str:
    header = ["optimizer", "weights", "gradients", "base state", "masters", "anchors", "indices"]
    header += ["all", "of AdamW's", "at most"]
    rows = []
    for cost in costs:
        kept = cost.bytes
        own = [_mb(part) if part else "" for part in (kept.masters, kept.anchors, kept.indices)]
        parts = [_mb(kept.weights), _mb(kept.gradients), _mb(kept.state), *own]
        ratio = _ratio(cost.memory, costs[0].memory)
        rows.append([cost.title, *parts, _mb(cost.memory), ratio, _mb(cost.most)])
    return pipe_table(header, rows)


def _traffic_table(costs: Sequence[Cost], resample_every: int) -> str:
    header = ["optimizer", "network", "optimizer's step", "of AdamW's", "redraw"]
    header += [f"redraw / {resample_every}", "cells drawn"]
    rows = [
        [
            cost.title,
            _mb(cost.network),
            _mb(cost.step),
            _ratio(cost.step, costs[0].step),
            _mb(cost.redraw) if cost.redraw else "",
            _mb(cost.redraw / resample_every) if cost.redraw else "",
            f"{cost.drawn:,}" if cost.redraw else "",
        ]
        for cost in costs
    ]
    return pipe_table(header, rows)


def _file_table(costs: Sequence[Cost]) -> str:
    header = ["optimizer", "whole", "of AdamW's", "per rank", "transient while saving, per rank"]
    rows = [
        [
            cost.title,
            _mb(cost.file),
            _ratio(cost.file, costs[0].file),
            _mb(cost.file_share),
            _mb(cost.saving),
        ]
        for cost in costs
    ]
    return pipe_table(header, rows)


def _mb(count: float) -> str:
    megabytes = count / 1e6
    return f"{megabytes:,.0f}" if megabytes >= 99.95 else f"{megabytes:.3g}"


def _ratio(ours: int, plain: int) -> str:
    return f"{ours / plain:.3f}x"


def main(arguments: Sequence[str]) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.sharding == "ddp" and given.ranks > 1 and "packed" in given.grad_layout:
        parser.error("--grad-layout packed: DistributedDataParallel needs dense gradients")
    dtype: torch.dtype = getattr(torch, given.dtype)
    shapes = llama_shapes(given.params) if given.model is None else shapes_of(given.model)
    settings = [(cells, layout) for cells in given.granularity for layout in given.grad_layout]
    try:
        sharding = Sharding.of(given.sharding, given.ranks)
        costs = plan(shapes, dtype, sharding, given.density, settings)
    except ValueError as error:
        parser.error(str(error))
    weights = sum(shape.numel() for shape in shapes)
    if given.json:
        found = dict(options=vars(given), weights=weights, costs=list(map(asdict, costs)))
        print(json.dumps(found, indent=2))
        return 0
    model = given.model or f"Llama-like, {given.params:.3g} asked for"
    ranks = f"{given.ranks} rank" + ("s" if given.ranks > 1 else "")
    print(
        f"{model}: {weights:,} weights in {given.dtype}, {len(shapes)} tensors; {ranks}, "
        f"{sharding.name}; d = {given.density:g}.\n"
        "Calculated, not measured, for the rank with the most. Activations, buffers of "
        "collectives and the\nallocator's overhead are not in it.\n"
    )
    print(tables(costs, given.resample_every))
    return 0


def _weights(text: str) -> int:
    try:
        weights = int(float(text))
    except (ValueError, OverflowError):
        weights = 0
    if not FEWEST_WEIGHTS <= weights <= MOST_WEIGHTS:
        raise argparse.ArgumentTypeError(
            f"must be a number of weights such as 7e9, from {FEWEST_WEIGHTS:.0e} to "
            f"{MOST_WEIGHTS:.0e}, got {text!r}"
        )
    return weights


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} --plan",
        description="What training costs on machines that are not here, calculated: bytes in "
        "memory, moved, and in checkpoints, with AdamW and with GMixout around it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--plan", action="store_true", required=True, help=argparse.SUPPRESS)
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument(
        "--params",
        type=_weights,
        metavar="N",
        help="about so many weights in the shapes of a Llama, such as 7e9",
    )
    subject.add_argument("--model", type=model_name, help="as without --plan")
    add("--ranks", type=positive, default=8, help="devices that train together")
    add(
        "--sharding",
        default="fsdp2",
        metavar="S",
        help="fsdp2: all ranks share the weights; ddp: each has all; hsdp:R: R replicas, in each "
        "of which ranks / R share them",
    )
    add(
        "--density",
        type=density,
        default=0.1,
        metavar="D",
        help="share of the weights that trains, 1 - p",
    )
    add_cells(parser, ["dense"])
    add_training(parser)
    add("--json", action="store_true", help="print JSON, in bytes, instead of tables")
    return parser
