"""Groups, matching, losses and kernels for detectors of others: the DETR family, transformers, RF-DETR, LibreYOLO.

Import the module that is needed, ``groupdetr_fast.integrations.detr``, ``groupdetr_fast.integrations.multihead``
(groups inside torch's own attention), ``groupdetr_fast.integrations.transformers``,
``groupdetr_fast.integrations.rfdetr`` or ``groupdetr_fast.integrations.libreyolo``; the latter three need the package
of their name.
"""
