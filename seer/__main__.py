"""`python -m seer` is `seer`."""

import sys

from seer.cli.main import main

sys.exit(main())
