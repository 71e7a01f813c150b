"""Something that runs: backends that turn exported graphs into engines, with their self-checks and manifests.

Imports only from `export` and `drafter`.
"""
