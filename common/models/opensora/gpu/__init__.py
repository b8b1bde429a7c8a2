"""The video models' small operations on an NVIDIA GPU, each in one pass over memory instead of several."""
