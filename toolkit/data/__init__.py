"""Video in and out, face crops, dataset layouts, manifests, frames, and the embedded puppet data set."""
