"""DCGAN generator and discriminator, losses, the LightningModule, and latent walks."""
