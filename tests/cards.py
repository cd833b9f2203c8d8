"""What the card here must have for a test to run on it."""

import pytest
import torch

needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="this card has no FP8"
)
