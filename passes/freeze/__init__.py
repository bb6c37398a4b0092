"""Swap float weights for packed ones."""
