"""Tools for testing low-bit code, ours and yours.

`strategies` generates formats, schemes, shapes and values (Hypothesis); `oracles` states the laws in the
plainest way, element by element in exact arithmetic, to compare fast code with. Import the modules: only
`strategies`, `problems`, `graphs` and `fuzz` need Hypothesis, and say so where it is missing.
"""
