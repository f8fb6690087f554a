"""What a process says when it loads names from the Hub at HF_ENDPOINT, one line a name; for test_weights_hub."""

import sys

from diaphane.weights.errors import WeightsError
from diaphane.weights.load import load

for name in sys.argv[1:]:
    try:
        repo, _, file = name.partition(":")
        network = load(repo, file=file or None)
        print(f"loaded {network.family} {network.config['resolution']} {network.path.name}")
    except WeightsError as e:
        print(f"{type(e).__name__}: {e}")
