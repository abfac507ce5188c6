"""Quality beside other quantizers: `benchmarks/quality_vs_peers.py` is the program, docs/benchmarks.md the method."""
