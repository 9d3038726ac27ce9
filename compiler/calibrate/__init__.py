"""Measure the present machine, and write it down as a device and a cluster of the language."""
