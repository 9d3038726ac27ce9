"""Verify: an emitted program on real processes against the single-device reference."""
