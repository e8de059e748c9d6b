"""python -m fxcurv."""

import sys

from fxcurv.cli.main import main

sys.exit(main())
