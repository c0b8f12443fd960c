"""Studies: a grid of activation rules x seeds -> cells -> results table -> report."""
