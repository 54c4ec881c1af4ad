"""The tables and figures of arXiv 2502.11026, as data."""

from experiments.items import appendix, cost, general, hha

_FOUND = {**hha.ITEMS, **cost.ITEMS, **general.ITEMS, **appendix.ITEMS}
ITEMS = {name: _FOUND[name] for name in sorted(_FOUND, key=lambda name: (not name.startswith("table"), name))}
