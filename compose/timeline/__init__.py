"""Timelines: which slot did which step of which video, at which degree of parallelism, as a page and as a trace."""
