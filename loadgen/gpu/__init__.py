"""What ``loadgen bench gpu`` is made of: models of published size, their work in operations, clocks, rates."""
