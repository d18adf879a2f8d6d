"""One thread a process: the tests' tensors are small, and pytest-xdist runs two processes."""

import torch

torch.set_num_threads(1)
