"""Benchmarks. Each checks its output before it times, and compares within one run."""
