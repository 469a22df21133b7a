# What the module refuses. One run spoils all variables at once that no other one's check reads, as each has a sentence of its own; node_pools has many.

mock_provider "alicloud" {}

variables {
  region         = "cn-hangzhou"
  zones          = ["cn-hangzhou-h", "cn-hangzhou-i"]
  model_bucket   = "expertscale-test-models"
  checkpoint     = "mixtral"
  fetch_image    = "registry.example/ossutil:2"
  redis_password = "not-A-real-1"
}

run "every_variable" {
  command = plan

  variables {
    name                 = "a-name-longer-than-18"
    region               = "Hangzhou"
    vpc_cidr             = "10.0.0.0/20"
    service_cidr         = "services"
    kubernetes_version   = "1.33"
    model_bucket         = "Models"
    registry_type        = "Free"
    redis_instance_class = "small"
    redis_password       = "onlylowercase"
    checkpoint           = "CHECKPOINT"
    checkpoint_gib       = 0
    fetch_image          = "no-tag"
    image_tag            = "a tag"
    router_max           = 0
    namespace            = "Expert"
    release              = "expert.scale"
  }

  expect_failures = [
    var.name,
    var.region,
    var.vpc_cidr,
    var.service_cidr,
    var.kubernetes_version,
    var.model_bucket,
    var.registry_type,
    var.redis_instance_class,
    var.redis_password,
    var.checkpoint,
    var.checkpoint_gib,
    var.fetch_image,
    var.image_tag,
    var.router_max,
    var.namespace,
    var.release,
  ]
}

run "a_zone_elsewhere" {
  command = plan

  variables {
    zones          = ["cn-hangzhou-h", "cn-beijing-h"]
    redis_password = "Short-1"
  }

  expect_failures = [
    var.zones,
    var.redis_password,
  ]
}

run "one_zone" {
  command = plan

  variables {
    zones = ["cn-hangzhou-h"]
  }

  expect_failures = [
    var.zones,
  ]
}

run "pools_without_gpus_for_the_chart" {
  command = plan

  variables {
    router_pool  = "cpu"
    expert_pools = ["a10", "b200"]
  }

  expect_failures = [
    var.router_pool,
    var.expert_pools,
  ]
}

run "a_pool_named_twice" {
  command = plan

  variables {
    expert_pools = ["a10", "a10"]
  }

  expect_failures = [
    var.expert_pools,
  ]
}

run "no_pool_for_the_head" {
  command = plan

  variables {
    node_pools   = { a10 = { instance_types = ["ecs.gn7i-c8g1.2xlarge"], gpu = "A10", max_nodes = 1 } }
    router_pool  = "a10"
    expert_pools = ["a10"]
  }

  expect_failures = [var.node_pools]
}

run "more_nodes_than_the_most" {
  command = plan

  variables {
    node_pools   = { cpu = { instance_types = ["ecs.g7.xlarge"], min_nodes = 1, max_nodes = 1 }, a10 = { instance_types = ["ecs.gn7i-c8g1.2xlarge"], gpu = "A10", min_nodes = 2, max_nodes = 1 } }
    router_pool  = "a10"
    expert_pools = ["a10"]
  }

  expect_failures = [var.node_pools]
}

run "a_disk_too_small" {
  command = plan

  variables {
    node_pools   = { cpu = { instance_types = ["ecs.g7.xlarge"], min_nodes = 1, max_nodes = 1 }, a10 = { instance_types = ["ecs.gn7i-c8g1.2xlarge"], gpu = "A10", max_nodes = 1, disk_gib = 20 } }
    router_pool  = "a10"
    expert_pools = ["a10"]
  }

  expect_failures = [var.node_pools]
}

run "a_pool_in_no_zone" {
  command = plan

  variables {
    node_pools   = { cpu = { instance_types = ["ecs.g7.xlarge"], min_nodes = 1, max_nodes = 1 }, a10 = { instance_types = ["ecs.gn7i-c8g1.2xlarge"], gpu = "A10", max_nodes = 1, zones = ["cn-hangzhou-z"] } }
    router_pool  = "a10"
    expert_pools = ["a10"]
  }

  expect_failures = [var.node_pools]
}

run "a_price_with_its_currency" {
  command = plan

  variables {
    node_pools   = { cpu = { instance_types = ["ecs.g7.xlarge"], min_nodes = 1, max_nodes = 1 }, a10 = { instance_types = ["ecs.gn7i-c8g1.2xlarge"], gpu = "A10", max_nodes = 1, price_per_hour = "1.2 USD" } }
    router_pool  = "a10"
    expert_pools = ["a10"]
  }

  expect_failures = [var.node_pools]
}

run "no_instance_type" {
  command = plan

  variables {
    node_pools   = { cpu = { instance_types = ["ecs.g7.xlarge"], min_nodes = 1, max_nodes = 1 }, a10 = { instance_types = [], gpu = "A10", max_nodes = 1 } }
    router_pool  = "a10"
    expert_pools = ["a10"]
  }

  expect_failures = [var.node_pools]
}

run "a_pool_in_capitals" {
  command = plan

  variables {
    node_pools   = { cpu = { instance_types = ["ecs.g7.xlarge"], min_nodes = 1, max_nodes = 1 }, a10 = { instance_types = ["ecs.gn7i-c8g1.2xlarge"], gpu = "A10", max_nodes = 1, pool = "A10" } }
    router_pool  = "A10"
    expert_pools = ["A10"]
  }

  expect_failures = [var.node_pools]
}

run "two_gpus_in_one_pool" {
  command = plan

  variables {
    node_pools   = { cpu = { instance_types = ["ecs.g7.xlarge"], min_nodes = 1, max_nodes = 1 }, a10 = { instance_types = ["ecs.gn7i-c8g1.2xlarge"], gpu = "A10", max_nodes = 1 }, other = { instance_types = ["ecs.gn7i-c8g1.2xlarge"], gpu = "L4", pool = "a10", max_nodes = 1 } }
    router_pool  = "a10"
    expert_pools = ["a10"]
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
