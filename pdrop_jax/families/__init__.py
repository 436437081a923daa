"""Model families beside LLaVA, a folder each; docs/families.md says how one is added.

A folder holds what its family does not share with LLaVA, in files of the same names: ``config`` (the vision
tower), ``params`` (its arrays), ``tower`` (its functions), ``inputs`` (pictures, grids and positions, on the host) and
``checkpoint`` (config translation and tensor names, in both directions). A family that differs from another in a few
switches of its config has only the files that differ: ``qwen3_vl`` runs the tower of ``qwen2_vl``.
"""
