"""Trained models for programs without jkd, and from them: safetensors, PyTorch's weights, StableHLO programs."""
