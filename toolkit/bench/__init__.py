"""Benchmarks: whole training steps, activations and fused operations, detection. Speed and memory as ratios within one run."""
