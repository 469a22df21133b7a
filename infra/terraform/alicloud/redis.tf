# Redis (Tair) for Ray's global control store, so that a lost head node loses nothing. Two nodes in two zones and a password.
# No TLS: the provider documents it for older engine versions only. It listens inside the network, to the cluster's vSwitches.

resource "alicloud_kvstore_instance" "redis" {
  db_instance_name            = "${var.name}-redis"
  instance_type               = "Redis"
  engine_version              = "7.0"
  instance_class              = var.redis_instance_class
  payment_type                = "PostPaid"
  vswitch_id                  = alicloud_vswitch.nodes[var.zones[0]].id
  zone_id                     = var.zones[0]
  secondary_zone_id           = var.zones[1]
  vpc_auth_mode               = "Open"
  password                    = var.redis_password
  security_ips                = concat(values(local.node_cidrs), values(local.pod_cidrs))
  instance_release_protection = var.deletion_protection
  tags                        = var.tags

  # Full memory must be an error, not a silent loss of what Ray knows.
  config = {
    EvictionPolicy = "noeviction"
    appendonly     = "yes"
  }
}

locals {
  redis_address = "${alicloud_kvstore_instance.redis.connection_domain}:6379"
}
