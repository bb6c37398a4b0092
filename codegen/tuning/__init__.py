"""Measured choices, as data. Each table says on what it was measured; `bench/kernels/cpu.py` measures again."""
