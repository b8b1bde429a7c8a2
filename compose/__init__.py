"""The stack: one compose file, container images, and ``triptych``, which runs the same file as plain processes."""
