"""A result as text: Markdown's pipe tables, aligned."""

from __future__ import annotations

from collections.abc import Sequence

from gmixout_optim.bench.machine import machine_facts
from gmixout_optim.bench.memory import Peak
from gmixout_optim.bench.result import Result
from gmixout_optim.bench.speed import Compared, Footprint, Speed
from gmixout_optim.bench.subject import Setting
from gmixout_optim.bench.timing import Cost, Spread

NOTHING = "-"
SETTING = ["d", "granularity", "grad_layout", "compiled"]
PLAIN = ["plain", "", "", ""]


def tables(result: Result) -> str:
    """Everything that was measured, for people."""
    options, subject = result.options, result.options.subject
    facts = machine_facts(subject.device)
    rounded = ", stochastic rounding" if options.settings[0].stochastic_rounding else ""
    parts = [
        f"{subject.base_title()} plain and wrapped; {subject.model}: {result.weights:,} weights in "
        f"{subject.dtype_name}{rounded}\n"
        f"{', '.join(f'{key} {fact}' for key, fact in facts.items())}\n{options.command}"
    ]
    if result.speed is not None:
        parts += [
            _time_table(result.speed, options.rounds, options.resample_every),
            _bytes_table(result.speed, result.weights),
            _traffic_table(result.speed, result.weights),
        ]
    if result.peaks:
        parts.append(_peak_table(result.peaks, options.batch_size))
    return "\n\n".join(parts)


def pipe_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be; those without content in any row are left out."""
    used = [place for place in range(len(header)) if any(row[place] for row in rows)]
    cells = [[row[place] for place in used] for row in (header, *rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(used))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _time_table(speed: Speed, rounds: int, resample_every: int) -> str:
    header = [
        *SETTING,
        "step",
        "step, ms",
        "plain step, ms",
        "packing",
        "backward",
        "redraw",
        f"redraw / {resample_every}",
        "all per step",
        "kernels",
    ]
    rows = [
        [
            *_setting(one.setting),
            _spread(one.times.step.plain_steps, ".2f", "x"),
            _spread(one.times.step.ms, ".3g"),
            _spread(one.times.plain_ms, ".3g"),
            _added(one.times.packing),
            _added(one.times.backward),
            _spread(one.times.redraw.plain_steps, ".1f"),
            f"{one.times.redraw.plain_steps.median / resample_every:.3f}",
            f"{one.times.all_per_step:.2f}x",
            _kernels(one, speed.plain),
        ]
        for one in speed.settings
    ]
    return (
        f"Time, without forward and backward: median of {rounds} rounds in which both optimizers "
        "step (10th to 90th "
        "percentile).\n"
        "step: ratio to the plain step. The others in plain steps. packing: what it adds to a "
        "backward that throws "
        "gradients away.\n"
        "backward: the same against one that keeps dense gradients, with the time that memory "
        "for these "
        "takes.\n"
        f"all per step: step + packing + redraw / {resample_every}.\n\n"
    ) + pipe_table(header, rows)


def _bytes_table(speed: Speed, weights: int) -> str:
    names = ["weights", "gradients", "state", "masters", "anchors", "indices"]
    header = [*SETTING, *names, "optimizer", "beyond weights", "resume file"]

    def row(first: list[str], of: Footprint, ratios: Sequence[float | None]) -> list[str]:
        totals = [of.bytes.optimizer, of.bytes.beyond_weights, of.resume_file.bytes]
        return [
            *first,
            *(f"{getattr(of.bytes, name) / weights:.2f}" for name in names),
            *(
                f"{total / weights:.2f}{_in_brackets(ratio)}"
                for total, ratio in zip(totals, ratios, strict=True)
            ),
        ]

    rows = [row(PLAIN, speed.plain, [None] * 3)]
    rows += [
        row(
            _setting(one.setting),
            one.footprint,
            [one.optimizer_ratio, one.beyond_weights_ratio, one.resume_file_ratio],
        )
        for one in speed.settings
    ]
    return (
        "Bytes per weight of the model, between two steps (ratio to plain). Optimizer: state to "
        "indices; beyond "
        "weights: gradients too;\nresume file: torch.save(optimizer.state_dict()).\n\n"
    ) + pipe_table(header, rows)


def _traffic_table(speed: Speed, weights: int) -> str:
    copy = speed.copy_bytes_per_second
    sides = [(PLAIN, speed.plain, speed.plain_copy_share)]
    sides += [(_setting(one.setting), one.footprint, one.copy_share) for one in speed.settings]
    rows = [
        [
            *first,
            f"{footprint.traffic / weights:.2f}",
            f"{share * copy.median / 1e9:.3g}",
            f"{share:.0%}",
        ]
        for first, footprint, share in sides
    ]
    spread = f"{copy.median / 1e9:.3g} GB/s ({copy.low / 1e9:.3g} to {copy.high / 1e9:.3g})"
    return (
        f"Traffic: bytes that a step has to move, over its median time. Copying a large buffer "
        f"moves {spread}.\n"
        "Not counted: the rest of a cache line where single elements are gathered, and what a CPU "
        "reads before it "
        "overwrites, as copying does.\n\n"
    ) + pipe_table([*SETTING, "bytes per weight", "GB/s", "of copying"], rows)


def _peak_table(peaks: Sequence[Peak], batch_size: int) -> str:
    rows = []
    for peak in peaks:
        first = PLAIN if peak.setting is None else _setting(peak.setting)
        if peak.peak is None or peak.beyond_baseline is None:
            rows.append([*first, f"failed: {peak.error}", NOTHING])
        else:
            rows.append(
                [
                    *first,
                    f"{peak.peak / 1e6:,.0f}{_in_brackets(peak.peak_ratio)}",
                    f"{peak.beyond_baseline / 1e6:,.0f}{_in_brackets(peak.beyond_baseline_ratio)}",
                ]
            )
    return (
        f"Peak memory in MB of a process that trains the model, batch size {batch_size} (ratio to "
        "plain), and without what "
        "it had before the model.\nOn a CPU with glibc: MALLOC_MMAP_THRESHOLD_=131072 unless "
        "set, so "
        "that freed tensors do "
        "not stay in its heap.\n\n"
    ) + pipe_table([*SETTING, "peak", "without baseline"], rows)


def _setting(setting: Setting) -> list[str]:
    compiled = "yes" if setting.compiled else ""
    return [f"{setting.density:g}", str(setting.granularity), setting.grad_layout, compiled]


def _kernels(one: Compared, plain: Footprint) -> str:
    kernels = one.footprint.kernels
    return "" if kernels is None else f"{kernels} (plain {plain.kernels})"


def _spread(spread: Spread, form: str, unit: str = "") -> str:
    return f"{spread.median:{form}}{unit} ({spread.low:{form}} to {spread.high:{form}})"


def _added(cost: Cost | None) -> str:
    return NOTHING if cost is None else _spread(cost.plain_steps, "+.2f")


def _in_brackets(ratio: float | None) -> str:
    return "" if ratio is None else f" ({ratio:.3f}x)"
