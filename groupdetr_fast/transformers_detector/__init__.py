"""The DETRs of Hugging Face transformers as detectors of this package: its data, training loop, metrics and reports.

families.py says what is peculiar to each architecture, source.py what is known of a model before it is built, and
build.py builds it and loads its weights; detector.py has the detector, and criterion.py its losses, which are those of
transformers, divided by the objects of a whole step. The first two files import nothing of transformers.
"""
