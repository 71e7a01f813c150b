"""What a user runs: the command line, its typed configuration, the stages and their reports.

The highest floor: nothing below imports from here.
"""
