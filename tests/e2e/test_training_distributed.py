"""Two processes train through the roundings, replicated and sharded, as one does, save what they have, and go on from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.e2e.two import EXPECTED
from tests.processes import run_two


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes(tmp_path: Path) -> None:
    for lines, errors in run_two("tests.e2e.two", tmp_path):
        assert lines == EXPECTED, errors
