"""``python -m dicer`` is ``dicer``."""

import sys

from dicer.cli.main import main

sys.exit(main())
