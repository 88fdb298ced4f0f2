"""What every test may rely on: no network, one thread, no progress bars in the output."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """A test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)
