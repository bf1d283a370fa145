"""``python -m dicer`` is ``dicer``."""

from dicer.cli.main import main

raise SystemExit(main())
