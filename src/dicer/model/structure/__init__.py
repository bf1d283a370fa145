"""A family found by its structure: a key of the config is changed, and the tensors that follow it are seen."""
