"""Frame-level fake detector: timm backbone, heads, the LightningModule, detection on a video file."""
