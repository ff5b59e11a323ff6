"""The claims of the paper (Xu & Wu 2025, arXiv 2502.10793) measured on real data; README.md has commands and results."""
