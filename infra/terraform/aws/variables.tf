# What an operator decides. Names are the same in ../alicloud wherever the idea is.

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
  description = "AWS region, for instance us-east-1."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region: an AWS region such as us-east-1."
  }
}

variable "zones" {
  description = "Availability zones, two or more; the GPU types you want must be sold in at least one of them."
  type        = list(string)

  validation {
    condition     = length(var.zones) >= 2 && length(var.zones) <= 4 && length(distinct(var.zones)) == length(var.zones)
    error_message = "zones: two to four different availability zones; EKS and a Redis that fails over need two."
  }

  validation {
    condition     = alltrue([for zone in var.zones : startswith(zone, var.region)])
    error_message = "zones: every zone must lie in region ${var.region}, as ${var.region}a does."
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

variable "nat_per_zone" {
  description = "A NAT gateway in every zone instead of one for all: nodes keep their way out when a zone fails."
  type        = bool
  default     = false
}

variable "kubernetes_version" {
  description = "Kubernetes version, such as 1.33; null takes the newest that EKS offers when the cluster is made."
  type        = string
  default     = null

  validation {
    condition     = var.kubernetes_version == null || can(regex("^1\\.[0-9]{2}$", var.kubernetes_version))
    error_message = "kubernetes_version: a minor version such as 1.33, or null."
  }
}

variable "admin_arns" {
  description = "IAM roles or users that administer the cluster. Nobody else may, not even who runs Terraform."
  type        = list(string)

  validation {
    condition     = length(var.admin_arns) > 0
    error_message = "admin_arns: name at least one IAM role or user; a cluster that nobody administers can only be deleted."
  }

  validation {
    condition     = alltrue([for arn in var.admin_arns : can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:(role|user)/", arn))])
    error_message = "admin_arns: every entry is the ARN of an IAM role or user, as arn:aws:iam::123456789012:role/operators."
  }
}

variable "api_cidrs" {
  description = "Networks that may reach the Kubernetes API from the internet; empty keeps it inside the network."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for cidr in var.api_cidrs : can(cidrhost(cidr, 0)) && cidr != "0.0.0.0/0"])
    error_message = "api_cidrs: networks such as 198.51.100.0/24, and not the whole internet (0.0.0.0/0)."
  }
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
    instance_types          = list(string)
    pool                    = optional(string)
    gpu                     = optional(string)
    gpus_per_node           = optional(number, 1)
    spot                    = optional(bool, false)
    min_nodes               = optional(number, 0)
    max_nodes               = number
    disk_gib                = optional(number)
    zones                   = optional(list(string))
    capacity_reservation_id = optional(string)
    price_per_hour          = optional(string)
    pod_cpu                 = optional(number, 6)
    pod_memory              = optional(string, "24Gi")
  }))

  default = {
    cpu = {
      instance_types = ["m6i.2xlarge"]
      min_nodes      = 2
      max_nodes      = 4
    }
    a10g = {
      instance_types = ["g5.2xlarge"]
      gpu            = "A10G"
      max_nodes      = 8
    }
    a10g-spot = {
      instance_types = ["g5.2xlarge", "g5.4xlarge"]
      pool           = "a10g"
      gpu            = "A10G"
      spot           = true
      max_nodes      = 8
    }
    l4-spot = {
      instance_types = ["g6.2xlarge", "g6.4xlarge"]
      pool           = "l4"
      gpu            = "L4"
      spot           = true
      max_nodes      = 8
    }
    h100 = {
      instance_types = ["p5.48xlarge"]
      gpu            = "H100"
      gpus_per_node  = 8
      max_nodes      = 1
      pod_cpu        = 20
      pod_memory     = "200Gi"
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
    condition     = alltrue([for pool in values(var.node_pools) : !(pool.spot && pool.capacity_reservation_id != null)])
    error_message = "node_pools: a spot pool cannot have a capacity_reservation_id."
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
  description = "Name of the S3 bucket for checkpoints; names are unique across all of AWS."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.model_bucket))
    error_message = "model_bucket: 3 to 63 lower-case letters, digits and hyphens."
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
  description = "Image that copies the checkpoint into each pod, with `sh` and AWS's client. Its tag could not be looked up."
  type        = string
  default     = "amazon/aws-cli:2.31.0"

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

variable "redis_node_type" {
  description = "ElastiCache node type. Ray's control store is small; what counts is that it stays."
  type        = string
  default     = "cache.t4g.small"

  validation {
    condition     = startswith(var.redis_node_type, "cache.")
    error_message = "redis_node_type: an ElastiCache node type such as cache.t4g.small."
  }
}

variable "redis_auth_token" {
  description = "Password of Redis. It is kept in Terraform's state, so encrypt the state's backend; see the README."
  type        = string
  sensitive   = true

  validation {
    condition     = can(regex("^[A-Za-z0-9!&#$^<>-]{16,128}$", var.redis_auth_token))
    error_message = "redis_auth_token: 16 to 128 letters, digits and !&#$^<>- (what ElastiCache allows)."
  }
}

variable "router_pool" {
  description = "Pool (label expertscale.io/pool) whose GPUs run routers, in the values for the chart."
  type        = string
  default     = "a10g"

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
  default     = ["a10g", "l4", "h100"]

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
  description = "Tags on everything."
  type        = map(string)
  default     = {}
}
