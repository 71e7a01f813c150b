"""`pipeline bench`: every way to answer, each in a process of its own, measured side by side.

`plan` says what is measured and in which order, `contenders` runs the processes, `records` keeps
what they answered as it comes, `results` makes figures of it, `report` is the JSON's schema, `page`
the HTML. `own` is this project's engine as such a process, `together` its batches; the others are
in `pipeline.peers`.
"""
