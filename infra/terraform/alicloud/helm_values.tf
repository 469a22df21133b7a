# What the chart has to know of this cloud, in the chart's own words. Model, keys and Serve settings are not known here.

locals {
  pools = {
    for pool in distinct(concat([var.router_pool], var.expert_pools)) : pool => [
      for name, each in var.node_pools : each if each.gpu != null && coalesce(each.pool, name) == pool
    ]
  }

  # One pod per GPU. Pods of one group are equal: pod_cpu and pod_memory of its first node pool, by name, hold for all.
  worker_groups = {
    for pool, nodes in local.pools : pool => {
      name         = pool
      minReplicas  = sum([for each in nodes : each.min_nodes * each.gpus_per_node])
      maxReplicas  = sum([for each in nodes : each.max_nodes * each.gpus_per_node])
      labels       = { "expertscale.io/pool" = pool, "ray.io/accelerator-type" = nodes[0].gpu }
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
    labels      = { "expertscale.io/pool" = "router" }
  })

  helm_values = {
    image = { repository = local.image_repository }
    model = {
      volume = {
        objectStorage = {
          enabled = true
          uri     = "oss://${alicloud_oss_bucket.models.bucket}/CHECKPOINT"
          env     = [{ name = "OSS_REGION", value = var.region }]
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
