"""Number formats of training: which dtype computes, which dtype keeps."""
