"""Greedy forward selection inside other libraries, which are needed only here."""
