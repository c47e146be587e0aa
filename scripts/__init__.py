"""Python code of the bundle: what the configs in `configs/` name."""
