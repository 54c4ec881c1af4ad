"""The exact testbed: a world with a known optimum, where a loss can be trained and compared with that optimum.

The tests of the losses use it. The studies built on it are in `experiments/tabular/`.
"""
