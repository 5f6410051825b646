import pytest
import torch
from lively import lively


@pytest.fixture(params=["paper-tiny", "modern-tiny"])
def model(request):
    return lively(request.param)


@pytest.fixture
def batch():
    """Source ids with padding on the right, and their mask."""
    torch.manual_seed(5)
    lengths = [9, 4, 7, 9, 1, 6]
    ids = torch.randint(3, 40, (6, 9))
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 0), mask
