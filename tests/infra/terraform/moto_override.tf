# Laid beside the AWS module for the apply against moto 5.2, and only there: what moto does not speak is left out.
# The tests with mocks (infra/terraform/aws/tests) check these.

# No add-ons, no access entries.
resource "aws_eks_addon" "vpc_cni" {
  count = 0
}

resource "aws_eks_addon" "kube_proxy" {
  count = 0
}

resource "aws_eks_addon" "coredns" {
  count = 0
}

resource "aws_eks_addon" "ebs_csi" {
  count = 0
}

resource "aws_eks_access_entry" "admin" {
  for_each = toset([])
}

# No parameter groups; a replication group is made but cannot be read back.
resource "aws_elasticache_parameter_group" "redis" {
  count = 0
}

resource "aws_elasticache_replication_group" "redis" {
  count                = 0
  parameter_group_name = null
}

locals {
  redis_address = "rediss://redis.example:6379"
}

# No security group of a cluster.
resource "aws_vpc_security_group_ingress_rule" "redis" {
  referenced_security_group_id = aws_security_group.redis.id
}

# Works, but the provider waits a minute until moto's answers look settled.
resource "aws_s3_bucket_lifecycle_configuration" "models" {
  count = 0
}
