"""Ops and detectors against their peers on a CPU, and what is made of the results."""
