"""Formats that leave dicer, and the code that travels with them."""

# First of all: the model file, imported alone, would be asked for its classes half-way through.
import transformers as transformers
