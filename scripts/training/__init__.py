"""The objective, the trainer and what happens around an update."""
