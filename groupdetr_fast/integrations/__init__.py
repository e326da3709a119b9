"""Groups, matching, losses and kernels for detectors of others: the DETR family's scripts, transformers, LibreYOLO.

Import the module that is needed, ``groupdetr_fast.integrations.detr``, ``groupdetr_fast.integrations.transformers`` or
``groupdetr_fast.integrations.libreyolo``; the latter two need the package of their name.
"""
