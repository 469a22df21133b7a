# What the chart has to know of this cloud, in the chart's own words. Model, keys and Serve settings are not known here.

locals {
  pools = {
    for pool in distinct(concat([var.router_pool], var.expert_pools)) : pool => [
      for name, each in var.node_pools : each if each.gpu != null && coalesce(each.pool, name) == pool
    ]
  }

  gpus = { for pool, nodes in local.pools : pool => sum([for each in nodes : each.max_nodes * each.gpus_per_node]) }

  # Of one GPU for an hour, as a pod has one: the dearest of the node pools that say a price.
  prices = {
    for pool, nodes in local.pools : pool => [for each in nodes : tonumber(each.price_per_hour) / each.gpus_per_node if each.price_per_hour != null]
  }
  price_labels = {
    for pool, prices in local.prices : pool => length(prices) == 0 ? {} : { "expertscale.io/price-per-hour" = format("%.4f", max(prices...)) }
  }

  # One pod per GPU. Pods of one group are equal: pod_cpu and pod_memory of its first node pool, by name, hold for all.
  # What routers have of a pool's GPUs, experts cannot have as well.
  worker_groups = {
    for pool, nodes in local.pools : pool => {
      name         = pool
      minReplicas  = max(0, sum([for each in nodes : each.min_nodes * each.gpus_per_node]) - (pool == var.router_pool ? 1 : 0))
      maxReplicas  = local.gpus[pool] - (pool == var.router_pool ? var.router_max : 0)
      labels       = merge({ "expertscale.io/pool" = pool, "ray.io/accelerator-type" = nodes[0].gpu }, local.price_labels[pool])
      nodeSelector = { "expertscale.io/pool" = pool }
      tolerations  = [{ key = "nvidia.com/gpu", operator = "Exists", effect = "NoSchedule" }]
      resources = {
        requests = { cpu = tostring(nodes[0].pod_cpu), memory = nodes[0].pod_memory }
        limits   = { cpu = tostring(nodes[0].pod_cpu), memory = nodes[0].pod_memory, "nvidia.com/gpu" = "1" }
      }
    }
  }

  router_group = merge(local.worker_groups[var.router_pool], {
    name        = "router"
    minReplicas = 1
    maxReplicas = var.router_max
    labels      = merge({ "expertscale.io/pool" = "router" }, local.price_labels[var.router_pool])
  })

  helm_values = {
    image = { repository = local.image_repository, tag = var.image_tag }
    model = {
      volume = {
        objectStorage = {
          enabled   = true
          uri       = "oss://${alicloud_oss_bucket.models.bucket}/${var.checkpoint}"
          image     = var.fetch_image
          command   = ["sh", "-c", "ossutil cp --recursive --update \"$MODEL_URI/\" \"$MODEL_DIR/\""]
          env       = [{ name = "OSS_REGION", value = var.region }]
          sizeLimit = "${var.checkpoint_gib}Gi"
        }
      }
    }
    serviceAccount = {
      headName    = "${var.release}-head"
      workerName  = "${var.release}-worker"
      annotations = { "pod-identity.alibabacloud.com/role-name" = alicloud_ram_role.model_reader.role_name }
    }
    gcsFaultTolerance = {
      enabled = true
      redis = {
        address        = local.redis_address
        passwordSecret = { existingSecret = "${var.release}-redis" }
      }
    }
    head = { nodeSelector = { "expertscale.io/pool" = local.cpu_pools[0] } }
    workerGroups = {
      router  = local.router_group
      experts = [for pool in var.expert_pools : local.worker_groups[pool]]
    }
  }

  cpu_pools = [for name, each in var.node_pools : coalesce(each.pool, name) if each.gpu == null && !each.spot && each.min_nodes >= 1]
}
