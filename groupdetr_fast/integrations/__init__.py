"""Groups, matching and losses for detectors of other packages: the DETR family's scripts, and transformers.

Import the module that is needed, ``groupdetr_fast.integrations.detr`` or ``groupdetr_fast.integrations.transformers``;
the latter needs the package of its name.
"""
