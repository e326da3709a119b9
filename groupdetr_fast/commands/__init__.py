"""Commands of ``groupdetr`` that are more than their flags."""
