"""The parts of ``python -m scripts.explore``: the page, its jobs, and who may ask for them."""
