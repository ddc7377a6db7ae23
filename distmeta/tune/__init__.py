"""Ray Tune over meta-hyperparameters: `distmeta tune`."""
