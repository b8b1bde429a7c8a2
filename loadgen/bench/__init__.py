"""Micro-benchmarks: each compares one thing of ours with the bare thing underneath, in the same run, interleaved."""
