"""Benchmarks of the kernels on real models' shapes, beside their peers: `python -m pallas_kernels.bench --help`.

A row of the result has the error beside the time, the peers and the floors of the same run, and null for what nobody
measured. Not imported with the package; torch and tokamax take part where they are installed.
"""
