"""VAR's weight: how Z(x) is estimated."""
