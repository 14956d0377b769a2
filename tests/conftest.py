import pytest
import torch

# The models of the tests are tiny: two threads gain nothing, and where other programs use the
# machine they wait for each other at every operation.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _exact_floats():
    """A training run flushes tiny numbers to zero for the whole process; hypothesis objects."""
    torch.set_flush_denormal(False)
