"""How many units of each module stay."""
