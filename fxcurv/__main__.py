"""python -m fxcurv."""

import sys

from fxcurv.cli import main

sys.exit(main())
