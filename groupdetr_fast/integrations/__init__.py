"""Groups, matching, losses and kernels for detectors of others.

Import the module that is needed: ``groupdetr_fast.integrations.detr`` (scripts of the DETR family) and
``groupdetr_fast.integrations.multihead`` (groups inside torch's own attention) need nothing besides;
``transformers``, ``rfdetr``, ``ultralytics`` and ``libreyolo`` beside them need the package of their name.
"""
