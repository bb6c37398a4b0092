"""Code generation: one op in, kernel text and its binding out.

The folder stands at the top of the repository because it is one of the two halves of the compiler, yet it is
the package `qcompile.codegen` and nothing else: a second copy imported as `codegen` would hold its own kernel
caches, and the two would silently disagree. The guard below turns that accident into an error.
"""

assert __name__.startswith("qcompile."), f"import qcompile.codegen, not {__name__}"
