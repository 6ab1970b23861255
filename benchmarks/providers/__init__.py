"""One file a provider: `PROVIDERS`, a sequence of `benchmarks.provider.Provider`. A new file is found by itself."""
