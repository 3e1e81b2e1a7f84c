"""What an exported graph allows: groups of units, their costs, and running it in pieces.

To read in this order: tracing.py (the graph and its layers), propagate.py (how each operation
carries units), group_reader.py (the groups that may be pruned); head_labels.py and head_groups.py
do the same inside attention's heads.
costs.py counts parameters and FLOPs, executor.py runs the graph, replay.py two networks side by
side, and unfold.py makes matrix products of convolutions.
"""
