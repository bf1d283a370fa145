"""Forms of a pruned model other than the stock checkpoint."""
