"""Everything that takes a time: forward passes in turns, by runtime, and the memory that one needs."""
