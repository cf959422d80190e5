"""The engine around metadiff: Ray and FFCV."""
