"""`python -m launcher` is `launch`."""

import sys

from .cli import main

sys.exit(main())
