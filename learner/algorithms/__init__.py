"""Advantages and losses: small pure functions, tensors in, tensors out."""
