"""What the cluster is: configuration, checkpoints, placement, membership, and the fabric rows travel on."""
