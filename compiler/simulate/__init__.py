"""One step of a plan, event by event: a trace to look at, and where the time goes."""
