"""Where a model's layers come from."""
