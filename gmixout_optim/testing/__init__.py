"""The method's invariants as checks, for the test suites and the trainings of users.

:func:`check_invariants` looks at a live optimizer, :class:`InvariantMonitor` watches a training,
:func:`check_training` and :func:`parametrize_with_checks` run trainings of their own. The numbers
are those of docs/invariants.md. Hypothesis strategies are in
:mod:`gmixout_optim.testing.strategies`, which is not imported here.
"""

from gmixout_optim.testing.checks import InvariantError, Snapshot, check_invariants
from gmixout_optim.testing.monitor import InvariantMonitor
from gmixout_optim.testing.trainings import check_training, parametrize_with_checks

__all__ = [
    "InvariantError",
    "InvariantMonitor",
    "Snapshot",
    "check_invariants",
    "check_training",
    "parametrize_with_checks",
]
