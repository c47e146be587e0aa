"""Python runs this file first in every process that the tests start, which saves a quarter of MONAI's import."""

import gc
import sys

gc.set_threshold(100_000)  # an import makes a million objects that stay, among which nothing has to be searched for
sys.modules["mlflow"] = None  # MONAI imports it where it is installed; the tests that use it start no process
