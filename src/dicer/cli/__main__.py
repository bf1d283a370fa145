"""``python -m dicer.cli`` is ``dicer``."""

from dicer.cli.main import main

raise SystemExit(main())
