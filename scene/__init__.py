"""Geometry: cameras and their paths, depth, point clouds, renders. Knows nothing of the network."""
