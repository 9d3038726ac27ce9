"""Run an emitted program at full size on fake tensors: shapes, collectives and live memory."""
