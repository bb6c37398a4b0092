"""Hypothesis runs the same examples everywhere: a failure in CI is a failure here."""

from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50, print_blob=True)
settings.load_profile("ci")
