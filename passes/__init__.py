"""Graph passes: FX graph in, FX graph out.

The folder stands at the top of the repository because it is one of the two halves of the compiler, yet it is
the package `qcompile.passes` and nothing else: a second copy imported as `passes` would hold its own
registries and its own classes, and `isinstance` across the two would silently be false. The guard below turns
that accident into an error.
"""

assert __name__.startswith("qcompile."), f"import qcompile.passes, not {__name__}"
