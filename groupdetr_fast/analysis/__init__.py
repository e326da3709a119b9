"""The paper's measurements, one command each: ``groupdetr analyze``."""
