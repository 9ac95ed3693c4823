"""Contextual position encoding in Triton: forward and backward."""
