"""One run, put together from the rest of the package: its configuration, its data, the training, the evaluation."""
