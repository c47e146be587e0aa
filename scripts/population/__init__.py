"""The population prior: one Gaussian for all latents of a network together, fitted to a cohort."""
