"""What all benchmarks share: cases, timing, memory, rows of results, documents, peers."""
