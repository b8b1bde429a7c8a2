"""Decisions about videos: DDiT (arXiv 2506.13497), its baselines and ours; a slot is given out one step at a time."""
