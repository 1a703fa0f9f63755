"""Benchmarks: what is measured (suites), how (timing), and what is shown of it (report). `lab` runs it."""
