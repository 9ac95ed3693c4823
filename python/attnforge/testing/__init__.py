"""What proves the kernels, shipped with them: cases, comparisons, benchmarks, generated docs."""
