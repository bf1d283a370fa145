"""Checkpoints as GGUF files that llama.cpp loads; layers may differ in width where an architecture allows that."""
