"""Matching, losses and the training loop. Knows outputs and targets, not detectors."""
