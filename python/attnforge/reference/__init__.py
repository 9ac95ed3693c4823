"""Plain PyTorch definitions of the operators: slow, float64-capable, and what "right" means."""
