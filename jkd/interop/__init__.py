"""Trained models for programs without jkd: safetensors files, and StableHLO programs."""
