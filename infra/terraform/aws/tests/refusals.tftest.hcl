# What the module refuses. One run spoils all variables at once that no other one's check reads, as each has a sentence of its own; node_pools has many.

mock_provider "aws" {
  mock_data "aws_partition" {
    defaults = { partition = "aws" }
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

run "every_variable" {
  command = plan

  variables {
    name               = "a-name-longer-than-18"
    region             = "US East"
    vpc_cidr           = "10.0.0.0/20"
    kubernetes_version = "1.33.2"
    admin_arns         = []
    api_cidrs          = ["0.0.0.0/0"]
    model_bucket       = "Models"
    redis_node_type    = "t3.small"
    redis_auth_token   = "short"
    checkpoint         = "CHECKPOINT"
    checkpoint_gib     = 0
    fetch_image        = "no-tag"
    image_tag          = "a tag"
    router_max         = 0
    namespace          = "Expert"
    release            = "expert.scale"
  }

  expect_failures = [
    var.name,
    var.region,
    var.vpc_cidr,
    var.kubernetes_version,
    var.admin_arns,
    var.api_cidrs,
    var.model_bucket,
    var.redis_node_type,
    var.redis_auth_token,
    var.checkpoint,
    var.checkpoint_gib,
    var.fetch_image,
    var.image_tag,
    var.router_max,
    var.namespace,
    var.release,
  ]
}

run "a_zone_elsewhere_and_an_admin_without_arn" {
  command = plan

  variables {
    zones      = ["us-east-1a", "eu-west-1a"]
    admin_arns = ["operators"]
  }

  expect_failures = [
    var.zones,
    var.admin_arns,
  ]
}

run "one_zone" {
  command = plan

  variables {
    zones = ["us-east-1a"]
  }

  expect_failures = [
    var.zones,
  ]
}

run "pools_without_gpus_for_the_chart" {
  command = plan

  variables {
    router_pool  = "cpu"
    expert_pools = ["a10g", "b200"]
  }

  expect_failures = [
    var.router_pool,
    var.expert_pools,
  ]
}

run "a_pool_named_twice" {
  command = plan

  variables {
    expert_pools = ["l4", "l4"]
  }

  expect_failures = [
    var.expert_pools,
  ]
}

run "no_pool_for_the_head" {
  command = plan

  variables {
    node_pools   = { a10g = { instance_types = ["g5.2xlarge"], gpu = "A10G", max_nodes = 1 } }
    router_pool  = "a10g"
    expert_pools = ["a10g"]
  }

  expect_failures = [var.node_pools]
}

run "more_nodes_than_the_most" {
  command = plan

  variables {
    node_pools   = { cpu = { instance_types = ["m6i.xlarge"], min_nodes = 1, max_nodes = 1 }, a10g = { instance_types = ["g5.2xlarge"], gpu = "A10G", min_nodes = 2, max_nodes = 1 } }
    router_pool  = "a10g"
    expert_pools = ["a10g"]
  }

  expect_failures = [var.node_pools]
}

run "a_disk_too_small" {
  command = plan

  variables {
    node_pools   = { cpu = { instance_types = ["m6i.xlarge"], min_nodes = 1, max_nodes = 1 }, a10g = { instance_types = ["g5.2xlarge"], gpu = "A10G", max_nodes = 1, disk_gib = 20 } }
    router_pool  = "a10g"
    expert_pools = ["a10g"]
  }

  expect_failures = [var.node_pools]
}

run "a_pool_in_no_zone" {
  command = plan

  variables {
    node_pools   = { cpu = { instance_types = ["m6i.xlarge"], min_nodes = 1, max_nodes = 1 }, a10g = { instance_types = ["g5.2xlarge"], gpu = "A10G", max_nodes = 1, zones = ["us-east-1f"] } }
    router_pool  = "a10g"
    expert_pools = ["a10g"]
  }

  expect_failures = [var.node_pools]
}

run "a_price_with_its_currency" {
  command = plan

  variables {
    node_pools   = { cpu = { instance_types = ["m6i.xlarge"], min_nodes = 1, max_nodes = 1 }, a10g = { instance_types = ["g5.2xlarge"], gpu = "A10G", max_nodes = 1, price_per_hour = "1.2 USD" } }
    router_pool  = "a10g"
    expert_pools = ["a10g"]
  }

  expect_failures = [var.node_pools]
}

run "no_instance_type" {
  command = plan

  variables {
    node_pools   = { cpu = { instance_types = ["m6i.xlarge"], min_nodes = 1, max_nodes = 1 }, a10g = { instance_types = [], gpu = "A10G", max_nodes = 1 } }
    router_pool  = "a10g"
    expert_pools = ["a10g"]
  }

  expect_failures = [var.node_pools]
}

run "a_pool_in_capitals" {
  command = plan

  variables {
    node_pools   = { cpu = { instance_types = ["m6i.xlarge"], min_nodes = 1, max_nodes = 1 }, a10g = { instance_types = ["g5.2xlarge"], gpu = "A10G", max_nodes = 1, pool = "A10G" } }
    router_pool  = "A10G"
    expert_pools = ["A10G"]
  }

  expect_failures = [var.node_pools]
}

run "two_gpus_in_one_pool" {
  command = plan

  variables {
    node_pools   = { cpu = { instance_types = ["m6i.xlarge"], min_nodes = 1, max_nodes = 1 }, a10g = { instance_types = ["g5.2xlarge"], gpu = "A10G", max_nodes = 1 }, other = { instance_types = ["g5.2xlarge"], gpu = "L4", pool = "a10g", max_nodes = 1 } }
    router_pool  = "a10g"
    expert_pools = ["a10g"]
  }

  expect_failures = [var.node_pools]
}

run "a_reserved_spot_pool" {
  command = plan

  variables {
    node_pools   = { cpu = { instance_types = ["m6i.xlarge"], min_nodes = 1, max_nodes = 1 }, a10g = { instance_types = ["g5.2xlarge"], gpu = "A10G", max_nodes = 1, spot = true, capacity_reservation_id = "cr-1" } }
    router_pool  = "a10g"
    expert_pools = ["a10g"]
  }

  expect_failures = [var.node_pools]
}

run "more_routers_than_gpus" {
  command = plan

  variables {
    router_max = 16
  }

  expect_failures = [output.helm_values]
}
