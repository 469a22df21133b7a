# What the module makes of its defaults, without an account: every resource is mocked, so this checks what is asked of AWS.

mock_provider "aws" {
  mock_data "aws_partition" {
    defaults = { partition = "aws" }
  }

  mock_data "aws_caller_identity" {
    defaults = { account_id = "123456789012" }
  }

  mock_resource "aws_iam_role" {
    defaults = { arn = "arn:aws:iam::123456789012:role/mocked" }
  }

  mock_resource "aws_iam_openid_connect_provider" {
    defaults = { arn = "arn:aws:iam::123456789012:oidc-provider/oidc.example/id/MOCK" }
  }

  mock_resource "aws_kms_key" {
    defaults = { arn = "arn:aws:kms:us-east-1:123456789012:key/mocked" }
  }

  mock_resource "aws_s3_bucket" {
    defaults = { arn = "arn:aws:s3:::mocked" }
  }

  mock_resource "aws_launch_template" {
    defaults = { id = "lt-0123456789abcdef0", latest_version = 3 }
  }

  mock_resource "aws_ecr_repository" {
    defaults = { repository_url = "123456789012.dkr.ecr.us-east-1.amazonaws.com/expertscale" }
  }

  mock_resource "aws_elasticache_replication_group" {
    defaults = { primary_endpoint_address = "master.redis.example" }
  }

  mock_resource "aws_eks_cluster" {
    defaults = {
      identity = [{ oidc = [{ issuer = "https://oidc.example/id/MOCK" }] }]
    }
  }
}

variables {
  region           = "us-east-1"
  zones            = ["us-east-1a", "us-east-1b"]
  admin_arns       = ["arn:aws:iam::123456789012:role/operators"]
  model_bucket     = "expertscale-test-models"
  checkpoint       = "mixtral"
  redis_auth_token = "not-a-real-token-0123"
}

run "defaults" {
  assert {
    condition     = !aws_eks_cluster.this.vpc_config[0].endpoint_public_access && aws_eks_cluster.this.vpc_config[0].endpoint_private_access
    error_message = "Without api_cidrs the Kubernetes API must be reachable inside the network only."
  }

  assert {
    condition     = !aws_eks_cluster.this.access_config[0].bootstrap_cluster_creator_admin_permissions && tolist(keys(aws_eks_access_entry.admin)) == var.admin_arns
    error_message = "Only admin_arns may administer the cluster."
  }

  assert {
    condition     = jsondecode(aws_eks_addon.vpc_cni.configuration_values).enableNetworkPolicy == "true"
    error_message = "The VPC CNI must enforce network policies, or the chart's close nothing."
  }

  assert {
    condition     = aws_eks_node_group.this["l4-spot"].labels == tomap({ "expertscale.io/pool" = "l4", "expertscale.io/capacity" = "spot", "expertscale.io/gpu" = "L4", "nvidia.com/gpu.present" = "true" })
    error_message = "Labels of l4-spot."
  }

  assert {
    condition     = aws_eks_node_group.this["a10g"].labels["expertscale.io/pool"] == aws_eks_node_group.this["a10g-spot"].labels["expertscale.io/pool"]
    error_message = "On-demand and spot nodes of one pool must carry the same pool label."
  }

  assert {
    condition = alltrue([
      for name, pool in var.node_pools :
      join(" ", [for taint in aws_eks_node_group.this[name].taint : "${taint.key}=${taint.value}:${taint.effect}"]) == (pool.gpu == null ? "" : "nvidia.com/gpu=present:NO_SCHEDULE")
    ])
    error_message = "Nodes with GPUs, and no others, carry the taint nvidia.com/gpu=present:NoSchedule."
  }

  assert {
    condition = alltrue([
      for name, pool in var.node_pools :
      aws_eks_node_group.this[name].capacity_type == (pool.spot ? "SPOT" : "ON_DEMAND") && aws_eks_node_group.this[name].ami_type == (pool.gpu == null ? "AL2023_x86_64_STANDARD" : "AL2023_x86_64_NVIDIA")
    ])
    error_message = "Capacity and image must follow `spot` and `gpu`."
  }

  assert {
    condition     = alltrue([for template in aws_launch_template.node : template.metadata_options[0].http_tokens == "required" && template.metadata_options[0].http_put_response_hop_limit == 1])
    error_message = "Pods must not reach the node's role."
  }

  assert {
    condition = (
      aws_s3_bucket_public_access_block.models.block_public_acls && aws_s3_bucket_public_access_block.models.block_public_policy &&
      aws_s3_bucket_public_access_block.models.ignore_public_acls && aws_s3_bucket_public_access_block.models.restrict_public_buckets
    )
    error_message = "The model bucket must be closed to the public."
  }

  assert {
    condition     = one(one(aws_s3_bucket_server_side_encryption_configuration.models.rule).apply_server_side_encryption_by_default).kms_master_key_id == aws_kms_key.models.arn
    error_message = "The model bucket must be encrypted with its own key."
  }

  assert {
    condition     = aws_elasticache_replication_group.redis.transit_encryption_enabled && aws_elasticache_replication_group.redis.at_rest_encryption_enabled && aws_elasticache_replication_group.redis.automatic_failover_enabled
    error_message = "Redis must be encrypted and fail over."
  }

  assert {
    condition     = join(" ", [for parameter in aws_elasticache_parameter_group.redis.parameter : "${parameter.name}=${parameter.value}"]) == "maxmemory-policy=noeviction"
    error_message = "Redis must never evict what Ray knows."
  }

  assert {
    condition = jsondecode(aws_iam_role.service_account["model-reader"].assume_role_policy).Statement[0].Condition.StringEquals == {
      "oidc.example/id/MOCK:aud" = "sts.amazonaws.com"
      "oidc.example/id/MOCK:sub" = ["system:serviceaccount:expertscale:expertscale-head", "system:serviceaccount:expertscale:expertscale-worker"]
    }
    error_message = "Only the chart's two service accounts may read models."
  }

  assert {
    condition     = sort(flatten([for statement in jsondecode(aws_iam_role_policy.model_reader.policy).Statement : statement.Action])) == tolist(["kms:Decrypt", "s3:GetObject", "s3:ListBucket"])
    error_message = "Reading models needs these three actions and no others."
  }

  assert {
    condition     = !contains(flatten([for statement in jsondecode(aws_iam_role_policy.model_reader.policy).Statement : statement.Resource]), "*")
    error_message = "Reading models must name the bucket and the key."
  }

  assert {
    condition = alltrue([
      for statement in jsondecode(aws_iam_role_policy.cluster_autoscaler.policy).Statement :
      statement.Resource != "*" || can(statement.Condition) || alltrue([for action in flatten([statement.Action]) : can(regex(":(Describe|Get)", action))])
    ])
    error_message = "What changes something must be bound to this cluster; only reading may have resource *."
  }

  assert {
    condition     = tolist(keys(aws_iam_role_policy_attachment.node)) == tolist(["AmazonEC2ContainerRegistryPullOnly", "AmazonEKSWorkerNodePolicy"])
    error_message = "Nodes may join and pull, nothing else."
  }

  assert {
    condition     = length(aws_nat_gateway.this) == 1 && length(aws_route.nat) == 2
    error_message = "One NAT gateway serves all zones unless nat_per_zone."
  }

  assert {
    condition = yamldecode(output.helm_values).workerGroups.experts[*].nodeSelector == [
      { "expertscale.io/pool" = "a10g" }, { "expertscale.io/pool" = "l4" }, { "expertscale.io/pool" = "h100" },
    ]
    error_message = "The chart's expert groups come in the order of expert_pools and select by the pool label."
  }

  assert {
    condition     = yamldecode(output.helm_values).workerGroups.experts[*].maxReplicas == [14, 8, 8]
    error_message = "One pod per GPU: 8 + 8 A10G nodes less two for routers, 8 L4 nodes, 1 node of 8 H100."
  }

  assert {
    condition     = yamldecode(output.helm_values).image.tag == "0.1.0-cuda" && endswith(yamldecode(output.helm_values).model.volume.objectStorage.uri, "/mixtral")
    error_message = "The chart is told which image and which checkpoint."
  }

  assert {
    condition     = yamldecode(output.helm_values).gcsFaultTolerance.redis.address == "rediss://master.redis.example:6379"
    error_message = "The chart's Redis is the one made here, over TLS."
  }
}

run "routers_and_experts_share_a_pool" {
  variables {
    node_pools = {
      cpu   = { instance_types = ["m6i.xlarge"], min_nodes = 1, max_nodes = 2 }
      small = { instance_types = ["g6.2xlarge"], gpu = "L4", min_nodes = 2, max_nodes = 4, price_per_hour = "1.5" }
      spot  = { instance_types = ["g6.2xlarge"], gpu = "L4", pool = "small", spot = true, max_nodes = 4, price_per_hour = "0.6" }
      free  = { instance_types = ["g5.2xlarge"], gpu = "A10G", max_nodes = 2, disk_gib = 70 }
    }
    router_pool    = "small"
    router_max     = 3
    expert_pools   = ["small", "free"]
    checkpoint_gib = 300
  }

  assert {
    condition = [
      for group in concat([yamldecode(output.helm_values).workerGroups.router], yamldecode(output.helm_values).workerGroups.experts) :
      [group.minReplicas, group.maxReplicas]
    ] == [[1, 3], [1, 5], [0, 2]]
    error_message = "Routers and experts of one pool share its GPUs: together no more than there are."
  }

  assert {
    condition = [
      for group in concat([yamldecode(output.helm_values).workerGroups.router], yamldecode(output.helm_values).workerGroups.experts) :
      lookup(group.labels, "expertscale.io/price-per-hour", "none")
    ] == ["1.5000", "1.5000", "none"]
    error_message = "A group costs what the dearest of its nodes costs; without a price it has no label."
  }

  assert {
    condition     = [aws_launch_template.node["small"].block_device_mappings[0].ebs[0].volume_size, aws_launch_template.node["free"].block_device_mappings[0].ebs[0].volume_size] == [424, 70]
    error_message = "A disk holds the checkpoint of each pod, unless disk_gib says otherwise."
  }

  assert {
    condition     = aws_eks_node_group.this["small"].tags["k8s.io/cluster-autoscaler/node-template/resources/ephemeral-storage"] == "360Gi"
    error_message = "The autoscaler must know how much of the disk pods can have."
  }
}

run "open_api_and_nat_everywhere" {
  variables {
    api_cidrs    = ["198.51.100.0/24"]
    nat_per_zone = true
    node_pools = {
      cpu  = { instance_types = ["m6i.xlarge"], min_nodes = 1, max_nodes = 2 }
      h100 = { instance_types = ["p5.48xlarge"], gpu = "H100", gpus_per_node = 8, max_nodes = 1, zones = ["us-east-1b"], capacity_reservation_id = "cr-0123456789abcdef0", price_per_hour = "55.04" }
    }
    router_pool  = "h100"
    expert_pools = ["h100"]
  }

  assert {
    condition     = aws_eks_cluster.this.vpc_config[0].endpoint_public_access && aws_eks_cluster.this.vpc_config[0].public_access_cidrs == toset(["198.51.100.0/24"])
    error_message = "api_cidrs must be the only networks that reach the API."
  }

  assert {
    condition     = aws_eks_node_group.this["h100"].subnet_ids == toset([aws_subnet.private["us-east-1b"].id])
    error_message = "A pool's zones choose its subnets."
  }

  assert {
    condition     = aws_launch_template.node["h100"].capacity_reservation_specification[0].capacity_reservation_target[0].capacity_reservation_id == "cr-0123456789abcdef0"
    error_message = "A pool's reservation must be in its launch template."
  }

  assert {
    condition     = length(aws_launch_template.node["cpu"].capacity_reservation_specification) == 0
    error_message = "A pool without a reservation must name none."
  }

  assert {
    condition     = aws_eks_node_group.this["h100"].labels["expertscale.io/price-per-hour"] == "55.04"
    error_message = "A price must become a label."
  }

  assert {
    condition     = yamldecode(output.helm_values).workerGroups.experts[0].labels["expertscale.io/price-per-hour"] == "6.8800"
    error_message = "A pod has one of the node's eight GPUs, and costs an eighth."
  }

  assert {
    condition     = length(aws_nat_gateway.this) == 2 && aws_route.nat["us-east-1b"].nat_gateway_id == aws_nat_gateway.this["us-east-1b"].id
    error_message = "With nat_per_zone every zone must have its own way out."
  }
}
