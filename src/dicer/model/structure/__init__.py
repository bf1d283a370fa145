"""A family found by its structure: change one key of the config, look which tensors change, and prove what that says."""
