"""A language model on an NVIDIA GPU: the decoder in few kernels, kernels in Triton, captured decoding steps."""
