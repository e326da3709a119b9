"""The training loop. It is given a model and a criterion, and knows neither detectors nor losses."""
