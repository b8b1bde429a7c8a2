"""Groups of processes that compute one thing together, formed on demand from any member set, without a global world."""
