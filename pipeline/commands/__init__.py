"""The commands of `pipeline`: options in, one call of a stage, its result printed."""
