"""The commands of ``groupdetr``, one file each."""
