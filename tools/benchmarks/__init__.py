"""What tools/benchmark.py measures, one file each."""
