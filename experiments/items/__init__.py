"""The tables and figures of arXiv 2502.11026, and the project's own comparisons, as data."""

from experiments.items import appendix, cost, default, general, hha, reward_data, reward_kl, reward_time

_FOUND = {**hha.ITEMS, **cost.ITEMS, **general.ITEMS, **appendix.ITEMS}
PAPER_ITEMS = {name: _FOUND[name] for name in sorted(_FOUND, key=lambda name: (not name.startswith("table"), name))}
ITEMS = {**PAPER_ITEMS, **default.ITEMS, **reward_kl.ITEMS, **reward_time.ITEMS, **reward_data.ITEMS}
