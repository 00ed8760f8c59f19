"""`python -m neural_layers`."""

import sys

from neural_layers.cli import main

sys.exit(main())
