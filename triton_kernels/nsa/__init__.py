"""Native sparse attention's choice of blocks in Triton: importance, and the best by it."""
