"""Lilliput beside other CPU engines: `benchmarks/vs_llama_cpp.py` is the program, docs/benchmarks.md the method."""
