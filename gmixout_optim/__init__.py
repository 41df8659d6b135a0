"""GMixout, a regularizer for fine-tuning pretrained models, as a pure-torch optimizer wrapper."""

from gmixout_optim.optimizer import GMixoutOptimizer
from gmixout_optim.packed_gradient import PackedGradient
from gmixout_optim.param_groups import mixout_param_groups
from gmixout_optim.report import Report, TensorReport

__version__ = "0.1.0"

__all__ = ["GMixoutOptimizer", "PackedGradient", "Report", "TensorReport", "mixout_param_groups"]
