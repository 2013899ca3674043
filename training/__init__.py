"""Trains, exports and measures the models that ship inside vidpipe. Needs the extra `train`."""
