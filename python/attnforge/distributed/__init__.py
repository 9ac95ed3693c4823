"""Attention over tokens that are spread over processes (``torch.distributed``)."""
