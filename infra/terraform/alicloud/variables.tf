# What an operator decides. Names are the same in ../aws wherever the idea is.

variable "name" {
  description = "Prefix of everything made here, and the name of the cluster."
  type        = string
  default     = "expertscale"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,16}[a-z0-9]$", var.name))
    error_message = "name: 3 to 18 lower-case letters, digits and hyphens, beginning with a letter and not ending in a hyphen."
  }
}

variable "region" {
  description = "Alibaba Cloud region, for instance cn-hangzhou."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}-[a-z]+(-[a-z0-9]+)?$", var.region))
    error_message = "region: an Alibaba Cloud region such as cn-hangzhou or ap-southeast-1."
  }
}

variable "zones" {
  description = "Zones, two or more; the GPU types you want must be sold in at least one of them."
  type        = list(string)

  validation {
    condition     = length(var.zones) >= 2 && length(var.zones) <= 4 && length(distinct(var.zones)) == length(var.zones)
    error_message = "zones: two to four different zones; a Redis that fails over needs two."
  }

  validation {
    condition     = alltrue([for zone in var.zones : startswith(zone, var.region)])
    error_message = "zones: every zone must lie in region ${var.region}, as ${var.region}-h does."
  }
}

variable "vpc_cidr" {
  description = "Addresses of the network. A pod has one of them, so nodes with many pods want a large network."
  type        = string
  default     = "10.42.0.0/16"

  validation {
    condition     = can(cidrhost(var.vpc_cidr, 0)) && try(tonumber(split("/", var.vpc_cidr)[1]) <= 18, false)
    error_message = "vpc_cidr: an IPv4 network of /18 or larger, such as 10.42.0.0/16."
  }
}

variable "service_cidr" {
  description = "Addresses of Kubernetes services; must not overlap vpc_cidr."
  type        = string
  default     = "172.21.0.0/20"

  validation {
    condition     = can(cidrhost(var.service_cidr, 0))
    error_message = "service_cidr: an IPv4 network such as 172.21.0.0/20."
  }
}

variable "kubernetes_version" {
  description = "ACK's Kubernetes version, such as 1.33.3-aliyun.1; null takes the newest when the cluster is made."
  type        = string
  default     = null

  validation {
    condition     = var.kubernetes_version == null || can(regex("^1\\.[0-9]{2}\\.[0-9]+-aliyun\\.[0-9]+$", var.kubernetes_version))
    error_message = "kubernetes_version: a version as ACK names it, such as 1.33.3-aliyun.1, or null."
  }
}

variable "api_public" {
  description = "Whether the Kubernetes API can be reached from the internet. ACK takes no list of networks here, so rather use a VPN."
  type        = bool
  default     = false
}

variable "secrets_key_id" {
  description = "KMS key that encrypts Kubernetes secrets; null leaves them as ACK stores them."
  type        = string
  default     = null
}

variable "deletion_protection" {
  description = "Refuse to delete the cluster and Redis, by Terraform or the console."
  type        = bool
  default     = true
}

variable "node_pools" {
  description = <<-EOT
    Node pools by name. `pool` is what the chart selects (label expertscale.io/pool; by default the pool's name), so that an
    on-demand and a spot pool can serve one worker group. `gpu` is the type as Ray names it and gives the nodes the taint
    nvidia.com/gpu; leave it out for a pool without GPUs. `price_per_hour` of one node becomes a label of the nodes and, for
    one GPU, of the chart's worker groups: `GET /v1/cluster` shows both, and pre-warming starts what is cheapest. `disk_gib` is by
    default what checkpoint_gib asks for. `pod_cpu` and `pod_memory` are what a worker pod with one GPU asks for in the values
    this module hands to the chart.
  EOT
  type = map(object({
    instance_types = list(string)
    pool           = optional(string)
    gpu            = optional(string)
    gpus_per_node  = optional(number, 1)
    spot           = optional(bool, false)
    min_nodes      = optional(number, 0)
    max_nodes      = number
    disk_gib       = optional(number)
    zones          = optional(list(string))
    price_per_hour = optional(string)
    pod_cpu        = optional(number, 6)
    pod_memory     = optional(string, "24Gi")
  }))

  default = {
    cpu = {
      instance_types = ["ecs.g7.2xlarge"]
      min_nodes      = 2
      max_nodes      = 4
    }
    a10 = {
      instance_types = ["ecs.gn7i-c8g1.2xlarge"]
      gpu            = "A10"
      max_nodes      = 8
    }
    a10-spot = {
      instance_types = ["ecs.gn7i-c8g1.2xlarge", "ecs.gn7i-c16g1.4xlarge"]
      pool           = "a10"
      gpu            = "A10"
      spot           = true
      max_nodes      = 8
    }
    t4-spot = {
      instance_types = ["ecs.gn6i-c8g1.2xlarge", "ecs.gn6i-c16g1.4xlarge"]
      pool           = "t4"
      gpu            = "T4"
      spot           = true
      max_nodes      = 8
    }
    a100 = {
      instance_types = ["ecs.gn7e-c16g1.4xlarge"]
      gpu            = "A100"
      max_nodes      = 4
      pod_cpu        = 12
      pod_memory     = "100Gi"
    }
  }

  validation {
    condition     = alltrue([for name, pool in var.node_pools : can(regex("^[a-z][a-z0-9-]{0,14}$", name)) && can(regex("^[a-z][a-z0-9-]{0,14}$", coalesce(pool.pool, name)))])
    error_message = "node_pools: names and `pool` are 1 to 15 lower-case letters, digits and hyphens, beginning with a letter."
  }

  validation {
    condition     = alltrue([for pool in values(var.node_pools) : length(pool.instance_types) > 0])
    error_message = "node_pools: every pool names at least one instance type."
  }

  validation {
    condition     = alltrue([for pool in values(var.node_pools) : pool.min_nodes >= 0 && pool.max_nodes >= 1 && pool.max_nodes >= pool.min_nodes])
    error_message = "node_pools: 0 <= min_nodes <= max_nodes, and max_nodes at least 1."
  }

  validation {
    condition = alltrue(flatten([
      for name, pool in var.node_pools : [
        for other_name, other in var.node_pools :
        coalesce(pool.pool, name) != coalesce(other.pool, other_name) || pool.gpu == other.gpu
      ]
    ]))
    error_message = "node_pools: node pools of one `pool` must have the same `gpu`."
  }

  validation {
    condition     = anytrue([for pool in values(var.node_pools) : pool.gpu == null && !pool.spot && pool.min_nodes >= 1])
    error_message = "node_pools: one pool without `gpu` and `spot` must keep min_nodes >= 1, for the Ray head, the operator and DNS."
  }

  validation {
    condition     = alltrue([for pool in values(var.node_pools) : pool.disk_gib == null ? true : pool.disk_gib >= 50])
    error_message = "node_pools: disk_gib is at least 50; the CUDA image alone unpacks to more than 10 GiB."
  }

  validation {
    condition     = alltrue(flatten([for pool in values(var.node_pools) : [for zone in coalesce(pool.zones, []) : contains(var.zones, zone)]]))
    error_message = "node_pools: the zones of a pool must be among `zones`."
  }

  validation {
    condition     = alltrue([for pool in values(var.node_pools) : pool.price_per_hour == null || can(regex("^[0-9]+(\\.[0-9]+)?$", pool.price_per_hour))])
    error_message = "node_pools: price_per_hour is a number in quotes, such as \"1.21\"."
  }
}

variable "model_bucket" {
  description = "Name of the OSS bucket for checkpoints; names are unique across all of OSS."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.model_bucket))
    error_message = "model_bucket: 3 to 63 lower-case letters, digits and hyphens."
  }
}

variable "registry_type" {
  description = "Edition of the ACR instance: Basic, Standard or Advanced."
  type        = string
  default     = "Basic"

  validation {
    condition     = contains(["Basic", "Standard", "Advanced"], var.registry_type)
    error_message = "registry_type: Basic, Standard or Advanced."
  }
}

variable "checkpoint" {
  description = "Folder of the checkpoint in model_bucket, which the values for the chart name."
  type        = string

  validation {
    condition     = can(regex("^[A-Za-z0-9][A-Za-z0-9._/-]*[A-Za-z0-9._-]$", var.checkpoint)) && var.checkpoint != "CHECKPOINT"
    error_message = "checkpoint: a folder in the bucket such as deepseek-v2-lite or qwen/qwen3-moe, without slashes around it."
  }
}

variable "checkpoint_gib" {
  description = "Room for the checkpoint in each pod, which copies it. Disks get it for each pod of a node, with 20 GiB for /tmp, and 40 GiB for the image and the system."
  type        = number
  default     = 120

  validation {
    condition     = var.checkpoint_gib >= 1 && floor(var.checkpoint_gib) == var.checkpoint_gib
    error_message = "checkpoint_gib: a whole number, 1 or more."
  }
}

variable "fetch_image" {
  description = "Image that copies the checkpoint into each pod, with `sh` and ossutil 2, where nodes can pull it. It is yours to build."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9._:/-]*(:[A-Za-z0-9._-]+|@sha256:[0-9a-f]{64})$", var.fetch_image))
    error_message = "fetch_image: an image with its tag or digest, such as registry.example/client:2."
  }
}

variable "image_tag" {
  description = "Tag of the image in the registry made here; infra/docker builds VERSION-cuda and VERSION-cpu."
  type        = string
  default     = "0.1.0-cuda"

  validation {
    condition     = can(regex("^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$", var.image_tag))
    error_message = "image_tag: letters, digits, '.', '_' and '-', such as 0.1.0-cuda."
  }
}

variable "redis_instance_class" {
  description = "Instance class of Redis. Ray's control store is small; what counts is that it stays."
  type        = string
  default     = "redis.shard.small.2.ce"

  validation {
    condition     = can(regex("^(redis|tair)\\.", var.redis_instance_class))
    error_message = "redis_instance_class: a class such as redis.shard.small.2.ce."
  }
}

variable "redis_password" {
  description = "Password of Redis. It is kept in Terraform's state, so encrypt the state's backend; see the README."
  type        = string
  sensitive   = true

  validation {
    condition = (
      can(regex("^[A-Za-z0-9!@#$%^&*()_+=-]{8,32}$", var.redis_password)) && length([
        for kind in ["[A-Z]", "[a-z]", "[0-9]", "[^A-Za-z0-9]"] : kind if can(regex(kind, var.redis_password))
      ]) >= 3
    )
    error_message = "redis_password: 8 to 32 characters, of three of the kinds upper case, lower case, digits and !@#$%^&*()_+-="
  }
}

variable "router_pool" {
  description = "Pool (label expertscale.io/pool) whose GPUs run routers, in the values for the chart."
  type        = string
  default     = "a10"

  validation {
    condition     = contains([for name, pool in var.node_pools : coalesce(pool.pool, name) if pool.gpu != null], var.router_pool)
    error_message = "router_pool: must be the pool of a node pool with `gpu`."
  }
}

variable "router_max" {
  description = "How many GPUs of router_pool are the routers'; where experts run in that pool too, they get the others."
  type        = number
  default     = 2

  validation {
    condition     = var.router_max >= 1 && floor(var.router_max) == var.router_max
    error_message = "router_max: a whole number, 1 or more."
  }
}

variable "expert_pools" {
  description = "Pools whose GPUs run experts, in this order. Append new ones: another order makes KubeRay build a new cluster."
  type        = list(string)
  default     = ["a10", "t4", "a100"]

  validation {
    condition     = length(var.expert_pools) > 0 && length(distinct(var.expert_pools)) == length(var.expert_pools)
    error_message = "expert_pools: one or more pools, each named once."
  }

  validation {
    condition     = alltrue([for pool in var.expert_pools : contains([for name, each in var.node_pools : coalesce(each.pool, name) if each.gpu != null], pool)])
    error_message = "expert_pools: every entry must be the pool of a node pool with `gpu`."
  }
}

variable "namespace" {
  description = "Kubernetes namespace the chart is installed in; only service accounts in it may read models."
  type        = string
  default     = "expertscale"

  validation {
    condition     = can(regex("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", var.namespace))
    error_message = "namespace: a Kubernetes name: at most 63 lower-case letters, digits and hyphens."
  }
}

variable "release" {
  description = "Name of the chart's release. Its pods' service accounts are RELEASE-head and RELEASE-worker."
  type        = string
  default     = "expertscale"

  validation {
    condition     = can(regex("^[a-z]([a-z0-9-]{0,45}[a-z0-9])?$", var.release))
    error_message = "release: at most 47 lower-case letters, digits and hyphens, beginning with a letter (KubeRay's rule)."
  }
}

variable "tags" {
  description = "Tags on everything that can carry them."
  type        = map(string)
  default     = {}
}
