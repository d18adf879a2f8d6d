"""One thread a process: the tests' tensors are small, and pytest-xdist runs two processes."""

import gc

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def quick_garbage_collection():
    """What has been imported, some 100,000s of objects, is not looked at in every collection."""
    gc.collect()
    gc.freeze()
