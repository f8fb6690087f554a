"""What every test shares: where the reference data is, a seed, and one thread, which is quickest for tiny networks."""

from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser):
    parser.addoption("--golden", type=Path, default=GOLDEN, metavar="DIR", help="folder of method folders to check")


def pytest_configure():
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    torch.manual_seed(0)  # so that no test depends on what ran before it
