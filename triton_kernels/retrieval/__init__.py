"""Retrieval in Triton: attention to listed keys, scores and selections, LSH codes and look-up."""
