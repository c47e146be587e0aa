"""Files, image formats, figures, processes and settings; nothing here depends on the model."""
