# Node groups, one per entry of `node_pools`, with the labels that the chart's worker groups select and the taint they
# tolerate. How many nodes there are is the cluster autoscaler's business, within min_nodes and max_nodes.

locals {
  # Each pod has a copy of the checkpoint and up to 20 GiB in /tmp; one pod per GPU, the head on nodes without. The kubelet
  # keeps a tenth of a disk free, and some for itself.
  usable = 0.85
  disk_gib = {
    for name, pool in var.node_pools : name => coalesce(
      pool.disk_gib, ceil((40 + (pool.gpu == null ? 1 : pool.gpus_per_node) * (var.checkpoint_gib + 20)) / local.usable)
    )
  }

  pool_labels = {
    for name, pool in var.node_pools : name => merge(
      {
        "expertscale.io/pool"     = coalesce(pool.pool, name)
        "expertscale.io/capacity" = pool.spot ? "spot" : "on-demand"
      },
      pool.gpu == null ? {} : {
        "expertscale.io/gpu" = pool.gpu
        # NVIDIA's device plugin runs where this is said, or where node feature discovery has found a GPU.
        "nvidia.com/gpu.present" = "true"
      },
      pool.price_per_hour == null ? {} : { "expertscale.io/price-per-hour" = pool.price_per_hour },
    )
  }
}

resource "aws_launch_template" "node" {
  for_each = var.node_pools

  name_prefix            = "${var.name}-${each.key}-"
  update_default_version = true

  block_device_mappings {
    device_name = "/dev/xvda"

    ebs {
      volume_type           = "gp3"
      volume_size           = local.disk_gib[each.key]
      encrypted             = true
      delete_on_termination = true
    }
  }

  # One hop: pods cannot take the node's role, they have roles of their own.
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  dynamic "capacity_reservation_specification" {
    for_each = each.value.capacity_reservation_id == null ? [] : [each.value.capacity_reservation_id]

    content {
      capacity_reservation_target {
        capacity_reservation_id = capacity_reservation_specification.value
      }
    }
  }

  tag_specifications {
    resource_type = "instance"
    tags          = { Name = "${var.name}-${each.key}" }
  }
}

resource "aws_eks_node_group" "this" {
  for_each = var.node_pools

  cluster_name           = aws_eks_cluster.this.name
  node_group_name_prefix = "${each.key}-"
  node_role_arn          = aws_iam_role.node.arn
  subnet_ids             = [for zone in coalesce(each.value.zones, var.zones) : aws_subnet.private[zone].id]
  version                = aws_eks_cluster.this.version
  ami_type               = each.value.gpu == null ? "AL2023_x86_64_STANDARD" : "AL2023_x86_64_NVIDIA"
  capacity_type          = each.value.spot ? "SPOT" : "ON_DEMAND"
  instance_types         = each.value.instance_types
  labels                 = local.pool_labels[each.key]

  # Without it the cluster autoscaler thinks that a node not yet there has no disk, and starts none for pods that ask for some.
  tags = {
    "k8s.io/cluster-autoscaler/node-template/resources/ephemeral-storage" = "${floor(local.disk_gib[each.key] * local.usable)}Gi"
  }

  launch_template {
    id      = aws_launch_template.node[each.key].id
    version = aws_launch_template.node[each.key].latest_version
  }

  scaling_config {
    min_size     = each.value.min_nodes
    desired_size = each.value.min_nodes
    max_size     = each.value.max_nodes
  }

  update_config {
    max_unavailable = 1
  }

  dynamic "taint" {
    for_each = each.value.gpu == null ? [] : ["present"]

    content {
      key    = "nvidia.com/gpu"
      value  = taint.value
      effect = "NO_SCHEDULE"
    }
  }

  lifecycle {
    create_before_destroy = true
    # The autoscaler's number, not ours.
    ignore_changes = [scaling_config[0].desired_size]
  }

  depends_on = [aws_eks_addon.vpc_cni, aws_eks_addon.kube_proxy, aws_iam_role_policy_attachment.node]
}
