"""From images to a plain checkpoint. Every command of `ewavit` is a function here:
`loop.train`, `loop.resume`, `export.evaluate`, `export.export` and `plan.plan`.
"""
