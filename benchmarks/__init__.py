"""Side-by-side microbenchmarks: every backend of an op and its peers, interleaved in one process."""
