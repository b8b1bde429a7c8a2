"""Decisions about language: routes, batches, admission, flips (MemServe, arXiv 2406.17565; TetriInfer, 2401.11181)."""
