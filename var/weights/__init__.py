"""VAR's weight: how Z(x) is estimated.

It is a library too, which needs torch and no run:

    from var import weights
    w = weights.weigh(weights.Grouped(drop_zero_variance=True), rewards, prompt, temperature=0.5)
"""

from var.weights.estimators import Global, Grouped, InBatch, Prompt, Sampled, Value, weigh

__all__ = ["Global", "Grouped", "InBatch", "Prompt", "Sampled", "Value", "weigh"]
