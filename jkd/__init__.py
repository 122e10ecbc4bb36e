"""jkd: vision-research methods as pure functions, Flax modules and one sharded training loop."""

__version__ = "0.1.0"
