import torch  # noqa: F401  (before any module here: importing torch registers the operators, which needs them all)
