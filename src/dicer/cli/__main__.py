"""``python -m dicer.cli`` is ``dicer``."""

import sys

from dicer.cli.main import main

sys.exit(main())
