"""The stages of gpu_report.py: each has a function ``run(recorder)``, which adds its rows to the recorder."""
