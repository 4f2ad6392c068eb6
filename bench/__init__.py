"""Where the figures of the README come from: benchmarks, and the generators of what they run on."""
