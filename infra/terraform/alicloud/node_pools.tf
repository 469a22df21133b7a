# Node pools, one per entry of `node_pools`, with the labels that the chart's worker groups select and the taint they
# tolerate. How many nodes there are is ACK's autoscaler's business, within min_nodes and max_nodes.

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
      pool.gpu == null ? {} : { "expertscale.io/gpu" = pool.gpu },
      pool.price_per_hour == null ? {} : { "expertscale.io/price-per-hour" = pool.price_per_hour },
    )
  }
}

resource "alicloud_cs_kubernetes_node_pool" "this" {
  for_each = var.node_pools

  cluster_id                    = alicloud_cs_managed_kubernetes.this.id
  node_pool_name                = each.key
  vswitch_ids                   = [for zone in coalesce(each.value.zones, var.zones) : alicloud_vswitch.nodes[zone].id]
  instance_types                = each.value.instance_types
  instance_charge_type          = "PostPaid"
  spot_strategy                 = each.value.spot ? "SpotAsPriceGo" : "NoSpot"
  multi_az_policy               = each.value.spot ? "COST_OPTIMIZED" : "BALANCE"
  image_type                    = "AliyunLinux3"
  ram_role_name                 = alicloud_ram_role.node.role_name
  system_disk_category          = "cloud_essd"
  system_disk_performance_level = "PL1"
  system_disk_size              = local.disk_gib[each.key]
  system_disk_encrypted         = true
  tags                          = var.tags

  instance_metadata_options {
    http_tokens = "required"
  }

  scaling_config {
    enable   = true
    min_size = each.value.min_nodes
    max_size = each.value.max_nodes
    type     = each.value.spot ? "spot" : each.value.gpu == null ? "cpu" : "gpu"
  }

  management {
    enable      = true
    auto_repair = true
  }

  dynamic "labels" {
    for_each = local.pool_labels[each.key]

    content {
      key   = labels.key
      value = labels.value
    }
  }

  dynamic "taints" {
    for_each = each.value.gpu == null ? [] : ["present"]

    content {
      key    = "nvidia.com/gpu"
      value  = taints.value
      effect = "NoSchedule"
    }
  }
}
