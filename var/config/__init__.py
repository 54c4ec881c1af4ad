"""Whether a configuration is sound, and where its run is kept."""
