"""seer: self-supervised pretraining of RegNetY on your own uncurated images (SwAV, after SEER)."""

__version__ = "0.1.0"
