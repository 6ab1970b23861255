"""The benchmark suite: `python -m fastattn bench`, from a checkout.

One registry of workloads (`families`), one file a provider (`providers`), one way to time (`timing`), and nothing timed
that is not right (`gate`). `results` is what a run leaves; `compare`, `plots` and `report` read it.
"""
