"""The control path: how many replicas each expert group should have."""
