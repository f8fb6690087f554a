"""`diaphane env`: versions, devices and folders, for a report of a fault."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..weights import load as weights_load
from .errors import line
from .options import Parser

PACKAGES = ("diaphane", "torch", "triton", "safetensors", "huggingface_hub", "numpy", "pillow", "tqdm")


def parser() -> Parser:
    """The command's options."""
    return Parser("env", description="Say versions, devices and folders, for a report of a fault.", epilog="")


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    parser().parse_args(argv)
    print(f"python           {platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        try:
            print(f"{name:17}{version(name)}")
        except PackageNotFoundError:
            print(f"{name:17}not installed")
    print(f"cpu              {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        print(f"cuda:{i:<12}{properties.name}, {properties.total_memory >> 30} GiB")
    if not torch.cuda.is_available():
        print("cuda             none")
    print(line(f"package          {Path(__file__).parent}"))
    print(line(f"cache            {HF_HUB_CACHE}{' (offline)' if HF_HUB_OFFLINE else ''}"))
    print(f"embedded         {', '.join(weights_load.embedded()) or 'none'}")
    return 0
