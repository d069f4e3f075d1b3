"""Window attention without its N x N scores: Triton on CUDA, C++ on CPUs, and which of them serves.

Knows torch alone.
"""
