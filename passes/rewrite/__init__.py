"""Change what the graph computes: merge sites that read one input."""
