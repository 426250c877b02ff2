"""One module per backend. Each defines `SPEC` (a LoaderSpec) and an Engine class; see loaders/README.md."""
