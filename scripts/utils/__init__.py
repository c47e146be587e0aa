"""Files, figures, processes and settings: what knows nothing of the model."""
