"""The suite itself."""

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="not shown: that workers compute with one thread")
def test_each_of_several_workers_computes_with_one_thread():
    """More would wait for each other in turn: computing takes ten times as long."""
    import torch

    assert torch.get_num_threads() == 1
