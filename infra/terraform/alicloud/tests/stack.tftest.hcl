# What the module makes of its defaults, without an account: every resource is mocked, so this checks what is asked of
# Alibaba Cloud.

mock_provider "alicloud" {
  mock_resource "alicloud_cs_managed_kubernetes" {
    defaults = {
      id            = "c0123456789"
      rrsa_metadata = [{ enabled = true, ram_oidc_provider_name = "ack-rrsa-c0123456789", ram_oidc_provider_arn = "acs:ram::1234567890123456:oidc-provider/ack-rrsa-c0123456789", rrsa_oidc_issuer_url = "https://oidc.example/c0123456789" }]
    }
  }

  mock_resource "alicloud_kvstore_instance" {
    defaults = { connection_domain = "r-mock.redis.example" }
  }
}

variables {
  region         = "cn-hangzhou"
  zones          = ["cn-hangzhou-h", "cn-hangzhou-i"]
  model_bucket   = "expertscale-test-models"
  checkpoint     = "mixtral"
  fetch_image    = "registry.example/ossutil:2"
  redis_password = "not-A-real-1"
}

run "defaults" {
  assert {
    condition     = !alicloud_cs_managed_kubernetes.this.slb_internet_enabled && alicloud_cs_managed_kubernetes.this.enable_rrsa
    error_message = "The Kubernetes API must be closed to the internet, and pods must have roles of their own."
  }

  assert {
    condition     = one([for addon in alicloud_cs_managed_kubernetes.this.addons : jsondecode(addon.config).NetworkPolicy if addon.name == "terway-eniip"]) == "true"
    error_message = "Terway must enforce network policies, or the chart's close nothing."
  }

  assert {
    condition     = length(distinct(concat(values(local.node_cidrs), values(local.pod_cidrs)))) == 4 && length(alicloud_snat_entry.nat) == 4
    error_message = "Nodes and pods of each zone have networks of their own, and each a way out."
  }

  assert {
    condition     = { for label in alicloud_cs_kubernetes_node_pool.this["a10-spot"].labels : label.key => label.value } == { "expertscale.io/pool" = "a10", "expertscale.io/capacity" = "spot", "expertscale.io/gpu" = "A10" }
    error_message = "Labels of a10-spot."
  }

  assert {
    condition = alltrue([
      for name, pool in var.node_pools :
      join(" ", [for taint in alicloud_cs_kubernetes_node_pool.this[name].taints : "${taint.key}=${taint.value}:${taint.effect}"]) == (pool.gpu == null ? "" : "nvidia.com/gpu=present:NoSchedule")
    ])
    error_message = "Nodes with GPUs, and no others, carry the taint nvidia.com/gpu=present:NoSchedule."
  }

  assert {
    condition = alltrue([
      for name, pool in var.node_pools :
      alicloud_cs_kubernetes_node_pool.this[name].spot_strategy == (pool.spot ? "SpotAsPriceGo" : "NoSpot") &&
      alicloud_cs_kubernetes_node_pool.this[name].scaling_config[0].type == (pool.spot ? "spot" : pool.gpu == null ? "cpu" : "gpu") &&
      alicloud_cs_kubernetes_node_pool.this[name].scaling_config[0].max_size == pool.max_nodes
    ])
    error_message = "Capacity and bounds must follow `spot`, `gpu` and max_nodes."
  }

  assert {
    condition     = alltrue([for pool in alicloud_cs_kubernetes_node_pool.this : pool.instance_metadata_options[0].http_tokens == "required" && pool.ram_role_name == alicloud_ram_role.node.role_name])
    error_message = "Nodes have the role without policies."
  }

  assert {
    condition     = alicloud_oss_bucket_public_access_block.models.block_public_access && one(alicloud_oss_bucket.models.server_side_encryption_rule).sse_algorithm == "AES256"
    error_message = "The model bucket must be closed and encrypted."
  }

  assert {
    condition     = jsondecode(alicloud_oss_bucket.models.policy).Statement[0].Condition.Bool["acs:SecureTransport"] == ["false"]
    error_message = "The model bucket answers over TLS only."
  }

  assert {
    condition     = alicloud_kvstore_instance.redis.security_ips == toset(concat(values(local.node_cidrs), values(local.pod_cidrs))) && alicloud_kvstore_instance.redis.config["EvictionPolicy"] == "noeviction"
    error_message = "Redis listens to the cluster's networks and never evicts what Ray knows."
  }

  assert {
    condition = jsondecode(alicloud_ram_role.model_reader.assume_role_policy_document).Statement[0].Condition.StringEquals == {
      "oidc:aud" = ["sts.aliyuncs.com"]
      "oidc:iss" = ["https://oidc.example/c0123456789"]
      "oidc:sub" = ["system:serviceaccount:expertscale:expertscale-head", "system:serviceaccount:expertscale:expertscale-worker"]
    }
    error_message = "Only the chart's two service accounts of this cluster may read models."
  }

  assert {
    condition     = join(" ", flatten([for statement in jsondecode(alicloud_ram_policy.model_reader.policy_document).Statement : statement.Action])) == "oss:ListObjects oss:GetObject"
    error_message = "Reading models needs these two actions and no others."
  }

  assert {
    condition     = alltrue(flatten([for statement in jsondecode(alicloud_ram_policy.model_reader.policy_document).Statement : [for resource in statement.Resource : strcontains(resource, "expertscale-test-models")]]))
    error_message = "Reading models must name the bucket."
  }

  assert {
    condition     = output.image_repository == "expertscale-registry-vpc.cn-hangzhou.cr.aliyuncs.com/expertscale/expertscale"
    error_message = "Nodes pull the image inside the network."
  }

  assert {
    condition = yamldecode(output.helm_values).workerGroups.experts[*].nodeSelector == [
      { "expertscale.io/pool" = "a10" }, { "expertscale.io/pool" = "t4" }, { "expertscale.io/pool" = "a100" },
    ]
    error_message = "The chart's expert groups come in the order of expert_pools and select by the pool label."
  }

  assert {
    condition     = yamldecode(output.helm_values).image.tag == "0.1.0-cuda" && endswith(yamldecode(output.helm_values).model.volume.objectStorage.uri, "/mixtral")
    error_message = "The chart is told which image and which checkpoint."
  }

  assert {
    condition     = yamldecode(output.helm_values).gcsFaultTolerance.redis.address == "r-mock.redis.example:6379"
    error_message = "The chart's Redis is the one made here."
  }
}

run "price_zone_and_public_api" {
  variables {
    api_public = true
    node_pools = {
      cpu = { instance_types = ["ecs.g7.xlarge"], min_nodes = 1, max_nodes = 2 }
      a10 = { instance_types = ["ecs.gn7i-c8g1.2xlarge"], gpu = "A10", max_nodes = 3, zones = ["cn-hangzhou-i"], price_per_hour = "9.5" }
    }
    expert_pools = ["a10"]
  }

  assert {
    condition     = alicloud_cs_managed_kubernetes.this.slb_internet_enabled
    error_message = "api_public opens the Kubernetes API."
  }

  assert {
    condition     = alicloud_cs_kubernetes_node_pool.this["a10"].vswitch_ids == tolist([alicloud_vswitch.nodes["cn-hangzhou-i"].id])
    error_message = "A pool's zones choose its vSwitches."
  }

  assert {
    condition     = one([for label in alicloud_cs_kubernetes_node_pool.this["a10"].labels : label.value if label.key == "expertscale.io/price-per-hour"]) == "9.5"
    error_message = "A price must become a label."
  }

  assert {
    condition     = [for group in [yamldecode(output.helm_values).workerGroups.router, yamldecode(output.helm_values).workerGroups.experts[0]] : [group.maxReplicas, group.labels["expertscale.io/price-per-hour"]]] == [[2, "9.5000"], [1, "9.5000"]]
    error_message = "Routers and experts of one pool share its GPUs, and groups carry the price."
  }

  assert {
    condition     = alicloud_cs_kubernetes_node_pool.this["a10"].system_disk_size == 212
    error_message = "A disk holds the checkpoint of each pod."
  }
}
