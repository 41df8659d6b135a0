"""The command ``python -m gmixout_optim.bench``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from gmixout_optim.bench import gpu_plan, plan, training
from gmixout_optim.bench.memory import Loop, measure_peaks
from gmixout_optim.bench.options import Options, read_options
from gmixout_optim.bench.progress import Progress
from gmixout_optim.bench.result import Result
from gmixout_optim.bench.speed import measure_speed
from gmixout_optim.bench.table import tables

# What runs in place of the measurement, by the option that asks for it.
_COMMANDS = {"--training": training.main, "--plan-gpu": gpu_plan.main, "--plan": plan.main}


def main(arguments: Sequence[str]) -> int:
    """Returns 1 where a training loop failed, with the reason in the output."""
    named = {argument.partition("=")[0] for argument in arguments}
    for name, command in _COMMANDS.items():
        if name in named:
            return command(arguments)
    options = read_options(arguments)
    result = measure(options)
    print(json.dumps(result.to_dict(), indent=2) if options.json else tables(result))
    return 1 if any(peak.error for peak in result.peaks) else 0


def measure(options: Options) -> Result:
    loops = [
        Loop(options.subject, options.batch_size, options.threads, setting)
        for setting in options.memory_settings
    ]
    parts = len(loops) + (1 + len(options.settings) if options.with_speed else 0)
    with Progress(parts) as progress:
        peaks = measure_peaks(loops, progress.begin)  # first, while this process holds nothing
        speed = (
            measure_speed(
                options.subject,
                options.settings,
                options.rounds,
                options.resample_every,
                progress.begin,
            )
            if options.with_speed
            else None
        )
    return Result(options, peaks, speed)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
