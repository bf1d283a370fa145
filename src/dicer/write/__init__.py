"""How does a pruned model get out?"""
