"""The detectors that this package rebuilds, as their authors published them, to run beside ours.

One file for each: what is peculiar to it. Nothing of a repository is here: a checkout of it is named, and its modules
are imported from there. ``checkout.py`` does that, ``original.py`` says what all have in common, and ``conditions.py``
under which conditions two codes can be compared to the last digits.
"""
