"""`python -m sltrain_ds.cli VERB`, for when the console script is not on PATH."""

import sys

from sltrain_ds.cli import main

sys.exit(main())
