"""Counter-based index sets: which cells of a tensor are active in an episode.

Whether a cell is active is a pure function of ``(seed, tensor, episode, global cell index)``.
Nothing is drawn from a generator with a state, so the same set comes out on every device, on every
rank, eager or compiled, for a whole tensor or for a shard of it, and a checkpoint needs a seed and
a counter only.

The randomness is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators"): a 64-bit finaliser (variant 13 of Stafford's) over a counter that advances by the
golden ratio, started at a key that is itself hashed from ``(seed, tensor, episode)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

Sampler = Literal["stratified", "bernoulli"]

# A number that changes from episode to episode: 0-d tensors where code is compiled, so that it need
# not be again.
Number = int | Tensor
N = TypeVar("N", int, Tensor)

SAMPLERS: tuple[Sampler, ...] = ("stratified", "bernoulli")

# Cell indices are stored as int32, and the products below stay inside int64.
MAX_CELLS = 2**31 - 1

# Cells drawn at a time. On a CPU such chunks stay in cache, several times faster than whole
# tensors; on a GPU launches are what costs, and temporaries take some 32 bytes per cell.
CPU_CHUNK, GPU_CHUNK = 1 << 17, 1 << 22

# The set of draws that one key owns: counter 0 places the strata, counter i + 1 belongs to stratum
# or cell i.
_ROTATION_COUNTER = 0
_FIRST_COUNTER = 1

# The purpose of a tensor's other stream, whose counters are the places of its elements.
ROUNDING = 1


_MASK_64 = (1 << 64) - 1


def _signed(x: int) -> int:
    """The 64-bit pattern of ``x`` as the int64 that torch holds it in."""
    x &= _MASK_64
    return x - (1 << 64) if x >> 63 else x


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _finalise_(x: Tensor) -> Tensor:
    """SplitMix64's output function, in place on an int64 tensor."""
    shifted = torch.empty_like(x)
    for bits, factor in ((30, _MIX_1), (27, _MIX_2), (31, 1)):
        # torch shifts arithmetically: the mask makes it logical.
        torch.bitwise_right_shift(x, bits, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_((1 << (64 - bits)) - 1))
        if factor != 1:
            x.mul_(factor)
    return x


def random_bits(key: Number, counter: Tensor) -> Tensor:
    """64 random bits (int64) for each counter of the stream that ``key`` starts."""
    return _finalise_((counter * _GOLDEN).add_(key))


def _below(bits: Tensor, bound: Number) -> Tensor:
    """Uniform integers in [0, bound) for bound < 2**31, from the upper half of the bits."""
    return (((bits >> 32) & 0xFFFFFFFF) * bound) >> 32


def _finalise_int(x: int) -> int:
    """:func:`_finalise_` for the few numbers that the host needs, in unsigned 64-bit arithmetic."""
    x = (x ^ (x >> 30)) * _MIX_1 & _MASK_64
    x = (x ^ (x >> 27)) * _MIX_2 & _MASK_64
    return x ^ (x >> 31)


def episode_key(seed: int, tensor: int, episode: int, *purpose: int) -> int:
    """The key (int64) of a tensor's stream in an episode; further streams have a ``purpose``.

    The numbers enter one after the other, each through the finaliser, so that neighbouring seeds,
    tensors and episodes start at unrelated places of the one sequence of period 2**64.
    """
    key = 0
    for word in (seed, tensor, episode, *purpose):
        key = _finalise_int((key + (word + 1) * _GOLDEN) & _MASK_64)
    return _signed(key)


def active_count(cells: int, density: float) -> int:
    """The size of a stratified set, ``max(1, round(density * cells))``."""
    return min(cells, max(1, round(density * cells)))


def capacity(cells: int, density: float, sampler: Sampler) -> int:
    """Room for the set of any episode. A Bernoulli set exceeds it with probability below 1e-20."""
    if sampler == "stratified":
        return active_count(cells, density)
    deviation = (cells * density * (1 - density)) ** 0.5
    return min(cells, int(density * cells + 10 * deviation) + 10)


class _Partition:
    """``size`` consecutive integer strata of ``range(cells)``, as equal in length as can be.

    Stratum j starts at ``(j * step) >> shift``, a fixed-point form of ``floor(j * cells / size)``
    that needs no division and cannot overflow for ``cells`` up to :data:`MAX_CELLS`.
    """

    def __init__(self, cells: int, size: int) -> None:
        self.cells, self.size = cells, size
        self.shift = 62 - cells.bit_length()
        self.step = -((-cells << self.shift) // size)

    def of(self, position: N) -> N:
        """The stratum that holds ``position``; int64 tensors of both, or ints."""
        j = position * self.size // self.cells
        # The estimate is off by one at most, either way.
        j = j + -1 * ((j * self.step) >> self.shift > position)
        return j + 1 * (((j + 1) * self.step) >> self.shift <= position)


def _picks(j: Tensor, key: Number, step: Number, shift: Number) -> Tensor:
    """One position inside each stratum ``j`` (int64), uniform."""
    start = (j * step) >> shift
    length = ((j * step + step) >> shift) - start
    return _below(random_bits(key, j + _FIRST_COUNTER), length).add_(start)


def stratified_cells(
    order: Tensor,
    key: Number,
    first: Number,
    rotation: Number,
    cells: Number,
    size: Number,
    step: Number,
    shift: Number,
) -> Tensor:
    """The active cells of the circularly consecutive strata ``first + order``, as int32.

    Tensor arithmetic only, and every number may be a 0-d tensor: compiled once, it serves all
    tensors and episodes.
    """
    j = order + first
    j = torch.where(j >= size, j - size, j)
    cell = _picks(j, key, step, shift).add_(rotation)
    return torch.where(cell >= cells, cell - cells, cell).to(torch.int32)


def bernoulli_mask(cell: Tensor, key: Number, density: float) -> Tensor:
    """Whether each cell (int64 global index) is active, with probability ``density``."""
    last = max(0, int(density * 2.0**64) - 1) - 2**63
    return random_bits(key, cell + _FIRST_COUNTER) <= last


def active_cells(
    cells: int,
    density: float,
    *,
    seed: int,
    tensor: int,
    episode: int,
    sampler: Sampler = "stratified",
    start: int = 0,
    stop: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The active cells of one tensor in one episode that lie in ``range(start, stop)``.

    Args:
        cells: number of cells of the whole tensor, at most 2**31 - 1.
        density: probability d = 1 - p that a cell is active, in (0, 1].
        seed: the run's seed.
        tensor: the number of the tensor in its optimizer.
        episode: the number of the episode.
        sampler: ``"stratified"``: exactly ``max(1, round(d * cells))`` cells of the whole tensor,
            one from each of as many strata of the cell range, the strata rotated by a random
            offset, so that every cell is active with the same probability; ``"bernoulli"``: each
            cell independently.
        start, stop: the part of the cells asked for (a shard); the whole tensor without. A part is
            exactly the intersection of the whole set with the range, and costs in proportion to its
            length.
        device: where the indices are made.

    Returns:
        int32 tensor of global cell indices, sorted and unique.
    """
    stop = cells if stop is None else stop
    _check(cells, density, sampler, start, stop)
    if start == stop:
        return torch.empty(0, dtype=torch.int32, device=device)
    if sampler == "bernoulli":
        key = episode_key(seed, tensor, episode)
        return _active_bernoulli(key, density, start, stop, device)
    drawn = strata(cells, density, seed, tensor, episode, start, stop)
    pieces = [stratified_cells(order, *drawn.numbers) for order in _chunks(0, drawn.size, device)]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32, device=device)


def _check(cells: int, density: float, sampler: Sampler, start: int, stop: int) -> None:
    if not 0 <= start <= stop <= cells <= MAX_CELLS:
        raise ValueError(
            f"active_cells needs 0 <= start <= stop <= cells <= {MAX_CELLS}, got start={start}, "
            f"stop={stop}, cells={cells}; a tensor with more cells needs a wider granularity"
        )
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {SAMPLERS}, got {sampler!r}")


def _all_strata(
    cells: int, density: float, seed: int, tensor: int, episode: int
) -> tuple[int, _Partition, int]:
    """A tensor's key in an episode, its strata, and the random offset by which they are rotated."""
    key = episode_key(seed, tensor, episode)
    # All 64 bits: 32 are too few for a uniform place among up to 2**31 cells.
    rotation = _finalise_int((key + _ROTATION_COUNTER * _GOLDEN) & _MASK_64) * cells >> 64
    return key, _Partition(cells, active_count(cells, density)), rotation


class Strata(NamedTuple):
    """The strata of a tensor in an episode whose picks lie in a range of its cells.

    Attributes:
        size: how many.
        numbers: what :func:`stratified_cells` takes after ``order``, which is ``range(size)``.
    """

    size: int
    numbers: tuple[int, ...]


def strata(
    cells: int, density: float, seed: int, tensor: int, episode: int, start: int, stop: int
) -> Strata:
    """Those of ``range(start, stop)``, which is not empty. The arguments are those of
    :func:`active_cells`."""
    key, whole, rotation = _all_strata(cells, density, seed, tensor, episode)
    first, count = _strata_in_range(whole, key, rotation, start, stop)
    return Strata(count, (key, first, rotation, cells, whole.size, whole.step, whole.shift))


def stratified_ordinals(
    cell: Tensor, cells: int, density: float, seed: int, tensor: int, episode: int
) -> Tensor:
    """Where active cells (int64) stand in the stratified set of the whole tensor, without drawing
    that. The arguments are those of :func:`active_cells`."""
    if cell.numel() == 0:  # of a tensor without cells there are no strata
        return cell
    key, whole, rotation = _all_strata(cells, density, seed, tensor, episode)
    first, _ = _strata_in_range(whole, key, rotation, 0, cells)
    position = cell - rotation
    ordinal = whole.of(torch.where(position < 0, position + cells, position)) - first
    return torch.where(ordinal < 0, ordinal + whole.size, ordinal)


def stratified_cells_of_many(numbers: Tensor, drawn: Tensor) -> None:
    """Write the active cells of many tensors, one after the other, into a vector.

    Compiled it is one kernel for all of them, each cell of which finds its tensor.

    Args:
        numbers: int64, a row for each tensor: where in the vector its cells begin, and the numbers
            of :class:`Strata`.
        drawn: the vector. What lies between the cells of two tensors is arbitrary.
    """
    place = torch.arange(drawn.shape[0], device=drawn.device)
    tensor = torch.bucketize(place, numbers[:, 0].contiguous(), right=True) - 1
    start, *rest = numbers[tensor].unbind(1)
    drawn.copy_(stratified_cells(place - start, *rest))


def active_cells_in_block(
    shape: Sequence[int],
    density: float,
    *,
    offsets: Sequence[int],
    sizes: Sequence[int],
    seed: int,
    tensor: int,
    episode: int,
    sampler: Sampler = "stratified",
    device: torch.device | str | None = None,
) -> Tensor:
    """The active cells inside a rectangular block of a tensor whose cells form a grid of ``shape``.

    Cells are numbered in row-major order over the grid. ``offsets`` and ``sizes`` (as long as
    ``shape``) place the block. The other arguments are those of :func:`active_cells`.

    Returns:
        int32 tensor of row-major cell indices *inside the block*, sorted and unique: exactly the
        part of the whole set that the block holds.
    """
    if not len(shape) == len(offsets) == len(sizes) or any(
        not 0 <= o <= o + s <= n for n, o, s in zip(shape, offsets, sizes, strict=True)
    ):
        raise ValueError(
            f"the block at offsets={tuple(offsets)} of sizes={tuple(sizes)} does not lie in a grid "
            f"of shape={tuple(shape)}"
        )
    if prod(sizes) == 0:
        return torch.empty(0, dtype=torch.int32, device=device)
    starts, length = runs_of_block(shape, offsets, sizes)
    run, place = active_cells_in_runs(
        prod(shape),
        density,
        starts=starts,
        length=length,
        seed=seed,
        tensor=tensor,
        episode=episode,
        sampler=sampler,
        device=device,
    )
    return (run * length + place).to(torch.int32)


def runs_of_block(
    shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]
) -> tuple[Tensor, int]:
    """The runs of consecutive cells that make up a block: where they start, and their length.

    The arguments are those of :func:`active_cells_in_block`. The starts are int64, in order.
    """
    cut = [dim for dim, (n, s) in enumerate(zip(shape, sizes, strict=True)) if s < n]
    last = cut[-1] if cut else 0
    stride = prod(shape[last + 1 :])
    starts = torch.tensor([offsets[last] * stride if shape else 0], device="cpu")
    for dim in reversed(range(last)):
        stride *= shape[dim + 1]
        more = torch.arange(offsets[dim], offsets[dim] + sizes[dim], device="cpu") * stride
        starts = (more[:, None] + starts).view(-1)
    return starts, prod(sizes[last:])


def active_cells_in_runs(
    cells: int,
    density: float,
    *,
    starts: Tensor,
    length: int,
    seed: int,
    tensor: int,
    episode: int,
    sampler: Sampler = "stratified",
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The active cells in runs of ``length`` consecutive cells, which begin at ``starts``.

    A run may end beyond the tensor, where nothing is active. It costs in proportion to the cells of
    all runs. The other arguments are those of :func:`active_cells`.

    Args:
        starts: int64, on the host.
        length: at most ``cells``.

    Returns:
        int64 tensors, run by run: the number of the run of each active cell, and its place there.
    """
    words = dict(seed=seed, tensor=tensor, episode=episode)
    if len(starts) == 1:
        start = int(starts)
        stop = min(cells, start + length)
        cell = active_cells(
            cells, density, **words, sampler=sampler, start=start, stop=stop, device=device
        )
        return torch.zeros_like(cell, dtype=torch.int64), cell.long() - start
    _check(cells, density, sampler, 0, cells)
    key, whole, rotation = _all_strata(cells, density, **words)
    starts = starts.to(device)
    # Strata that a run can touch, see _Partition.of().
    touched = min(whole.size, length * whole.size // cells + 4)
    width = touched if sampler == "stratified" else length
    counter = torch.arange(width, device=device)
    pieces = []
    for run in _chunks(0, len(starts), device, width):
        some = starts[run][:, None]
        if sampler == "stratified":
            low = (some - rotation) % cells
            pick = _picks((whole.of(low) + counter) % whole.size, key, whole.step, whole.shift)
            place = (pick - low) % cells
            active = (place < length) & (some + place < cells)
        else:
            place = counter.expand(len(run), -1)
            active = bernoulli_mask(some + place, key, density) & (some + place < cells)
        pieces.append((run[:, None].expand_as(active)[active], place[active]))
    runs, places = zip(*pieces, strict=True)
    return torch.cat(runs), torch.cat(places)


def _chunks(
    start: int, stop: int, device: torch.device | str | None, width: int = 1
) -> Iterator[Tensor]:
    """``range(start, stop)`` as int64 tensors, made one at a time; a number is ``width`` cells."""
    chunk = max(1, chunk_on(torch.device("cpu" if device is None else device)) // width)
    return (
        torch.arange(low, min(low + chunk, stop), device=device)
        for low in range(start, stop, chunk)
    )


def chunk_on(device: torch.device) -> int:
    """How many cells to work on at a time."""
    return CPU_CHUNK if device.type == "cpu" else GPU_CHUNK


def _active_bernoulli(
    key: int, density: float, start: int, stop: int, device: torch.device | str | None
) -> Tensor:
    pieces = [
        cell[bernoulli_mask(cell, key, density).nonzero().squeeze(1)].to(torch.int32)
        for cell in _chunks(start, stop, device)
    ]
    return torch.cat(pieces)


def _strata_in_range(
    whole: _Partition, key: int, rotation: int, start: int, stop: int
) -> tuple[int, int]:
    """The first stratum, in circular order, and the number of those with picks in the range.

    Only the two strata that the range's ends cut can have their pick outside, and these two are
    looked at on the host: no device has to be asked how many cells there are.
    """
    low = (start - rotation) % whole.cells
    high = low + (stop - start) - 1
    at_low, at_high = whole.of(low), whole.of(high % whole.cells)
    ends = torch.tensor([at_low, at_high], device="cpu")
    pick_low, pick_high = _picks(ends, key, whole.step, whole.shift).tolist()
    first = at_low if pick_low >= low else at_low + 1
    last = at_high if pick_high <= high % whole.cells else at_high - 1
    turns = high // whole.cells
    return first % whole.size, last + turns * whole.size - first + 1
