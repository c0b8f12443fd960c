"""Activation functions: declare -> look up -> assign to sites -> probe."""
