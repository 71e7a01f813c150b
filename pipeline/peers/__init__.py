"""What a user would otherwise pick, behind one protocol: each engine in a file of its own.

`registry` names them, `models` writes a target in their formats, `worker` is the process that one
of them runs in. The adapters and the worker import the standard library and their own engine alone,
so that they run in an interpreter that lacks this project.
"""
