"""Python runs this file first in every process that the tests start, which saves a third of MONAI's import."""

import gc
import sys
from types import ModuleType

gc.set_threshold(100_000)  # an import makes a million objects that stay, among which nothing has to be searched for
sys.modules["mlflow"] = None  # MONAI imports it where it is installed; the tests that use it start no process
# Ignite imports PyTorch's optimizers of several processes for the name of one of them. This one, which nothing uses,
# takes SymPy and FSDP along.
named_optimizer = ModuleType("torch.distributed.optim.named_optimizer")
named_optimizer._NamedOptimizer = None
sys.modules[named_optimizer.__name__] = named_optimizer
