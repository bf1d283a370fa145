"""What is a model worth?"""

from dicer.evaluate.quality import Evaluation, evaluate, perplexity

__all__ = ["Evaluation", "evaluate", "perplexity"]
