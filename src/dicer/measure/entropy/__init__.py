"""How much the output's entropy hangs on each module."""
