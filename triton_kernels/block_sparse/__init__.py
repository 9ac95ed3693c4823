"""Block-sparse attention in Triton: forward and backward over ascending lists of blocks."""
