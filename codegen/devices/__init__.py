"""Lowerings, one module per device."""
