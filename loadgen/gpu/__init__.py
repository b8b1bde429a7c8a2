"""What ``loadgen bench gpu`` and ``gpu-llm`` are made of: models of published size, their work, clocks, rates."""
