"""Evaluation: zero-shot classification, retrieval, linear probes, and the features that they work on."""
