"""Tokens out: draft trees, verification, sampling, caches, the decode loop, the Generator and the server.

Imports only from `engines`, `export` and `drafter`.
"""
