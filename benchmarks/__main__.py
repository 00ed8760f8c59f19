"""`python -m benchmarks` is `neural-layers bench`."""

import sys

from neural_layers.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
