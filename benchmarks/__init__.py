"""What a training step costs: throughput and memory, measured and estimated."""
