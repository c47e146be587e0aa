"""The jobs of a trained network, and what they write."""
