"""Passes on the functional ATen graph: fused epilogues, outlined layers."""
