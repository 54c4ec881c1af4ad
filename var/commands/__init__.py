"""The commands: `python train.py`, or `var-train` if the package is installed, and likewise the others."""
