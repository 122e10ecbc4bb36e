"""Entry points, and one module a method that wires jkd functions into stages."""
